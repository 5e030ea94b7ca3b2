"""The optimizer: schedules worked out by hand, parameters in the right group, clipping."""

import dataclasses
import math
from typing import get_args

import pytest
import torch
from torch import nn

from olmo_base.optim import (
    OptimConfig,
    Schedule,
    StepGuard,
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    orthogonalized,
    parameter_groups,
    set_learning_rate,
)
from olmo_base.run.recipe import RecipeError


def rates(total_steps, **keys):
    config = OptimConfig(learning_rate=1.0, **keys)
    return [learning_rate_at(step, total_steps, config) for step in range(total_steps)]


def test_a_constant_rate_is_constant_after_the_warmup():
    assert rates(4, lr_scheduler_type="constant") == [1.0] * 4
    assert rates(5, lr_scheduler_type="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_linear_rate_falls_in_equal_steps():
    assert rates(4, lr_scheduler_type="linear") == [1.0, 0.75, 0.5, 0.25]
    half = rates(6, lr_scheduler_type="linear", warmup_ratio=1 / 3, min_lr_ratio=0.5)
    assert half == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625]


def test_a_cosine_rate_is_half_way_in_the_middle():
    found = rates(8, lr_scheduler_type="cosine", min_lr_ratio=0.1)
    assert found[0] == 1.0
    assert found[4] == pytest.approx(0.55)
    assert found[2] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert found == sorted(found, reverse=True)
    assert learning_rate_at(
        8, 8, OptimConfig(learning_rate=1.0, lr_scheduler_type="cosine", min_lr_ratio=0.1)
    ) == pytest.approx(0.1)


def test_a_stable_rate_falls_in_the_last_part_of_the_steps():
    found = rates(10, lr_scheduler_type="warmup_stable_decay", decay_ratio=0.4, warmup_steps=2)
    assert found == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    all_of_it = rates(4, lr_scheduler_type="warmup_stable_decay", decay_ratio=1.0)
    assert all_of_it == rates(4, lr_scheduler_type="linear")


def test_an_inverse_square_root_is_halved_after_four_times_the_steps():
    found = rates(30, lr_scheduler_type="inverse_sqrt", warmup_steps=5)
    assert found[5] == 1.0 and found[20] == pytest.approx(0.5)
    assert rates(10_001 * 3, lr_scheduler_type="inverse_sqrt")[30_000] == pytest.approx(0.5)


def test_a_decay_ratio_of_a_schedule_that_has_none_is_refused():
    with pytest.raises(RecipeError, match="only lr_scheduler_type warmup_stable_decay"):
        OptimConfig(decay_ratio=0.5)


def test_a_warmup_may_begin_above_zero():
    found = rates(5, lr_scheduler_type="constant", warmup_steps=4, warmup_start_ratio=0.2)
    assert found == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])


def test_the_rates_after_the_warmup_are_those_of_transformers():
    from transformers import get_scheduler

    for name, settings in (
        ("linear", None),
        ("cosine", None),
        ("inverse_sqrt", None),
        ("warmup_stable_decay", {"num_decay_steps": 4, "decay_type": "linear"}),
    ):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = get_scheduler(name, optimizer, 3, 20, scheduler_specific_kwargs=settings)
        expected = []
        for _ in range(20):
            expected.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert rates(20, lr_scheduler_type=name, warmup_steps=3)[3:] == pytest.approx(expected[3:])


def test_no_step_has_a_rate_of_zero():
    for name in get_args(Schedule):
        for total in (1, 2, 3, 50):
            assert min(rates(total, lr_scheduler_type=name, warmup_ratio=0.1)) > 0


def test_a_warmup_longer_than_the_run_is_no_error():
    assert rates(3, warmup_steps=6) == [1 / 6, 2 / 6, 3 / 6]


def test_two_ways_to_say_the_warmup_are_one_too_many():
    with pytest.raises(RecipeError, match="keep one of them"):
        OptimConfig(warmup_ratio=0.1, warmup_steps=5)


class Small(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.inner = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def decay_of_names(model, config):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, config):
        params = group["params"]
        assert isinstance(params, list)
        found.update({names[id(parameter)]: group["weight_decay"] for parameter in params})
    return found


def test_matrices_decay_and_norms_biases_and_embeddings_do_not():
    found = decay_of_names(Small(), OptimConfig(weight_decay=0.1))
    assert found == {
        "embed.weight": 0.0,
        "inner.weight": 0.1,
        "inner.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "head.weight": 0.1,
    }


def test_norms_and_embeddings_decay_if_so_wanted():
    found = decay_of_names(Small(), OptimConfig(weight_decay=0.1, decay_norms=True))
    assert {name for name, decay in found.items() if decay == 0} == {"embed.weight"}
    everything = OptimConfig(weight_decay=0.1, decay_norms=True, decay_embeddings=True)
    assert set(decay_of_names(Small(), everything).values()) == {0.1}


def test_a_tied_head_is_an_embedding_and_frozen_parameters_are_left_out():
    model = Small(tied=True)
    model.inner.weight.requires_grad_(False)
    found = decay_of_names(model, OptimConfig(weight_decay=0.1))
    assert "inner.weight" not in found
    assert found["embed.weight"] == 0.0
    assert "head.weight" not in found


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_embeddings_move_by_a_rate_of_their_own(optim):
    moved = {}
    for ratio in (1.0, 4.0):
        torch.manual_seed(0)
        model = Small()
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        optimizer = build_optimizer(model, OptimConfig(optim=optim, embedding_lr_ratio=ratio))
        set_learning_rate(optimizer, 1e-3)
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved[ratio] = {
            name: (weight - before[name]).abs().max().item()
            for name, weight in model.named_parameters()
        }
    for name in moved[1.0]:
        times = 4.0 if name == "embed.weight" else 1.0
        assert moved[4.0][name] == pytest.approx(times * moved[1.0][name], rel=1e-3), name


def test_a_step_is_adamw_as_published():
    torch.manual_seed(0)
    model = nn.Linear(2, 2, bias=False).double()
    before = model.weight.detach().clone()
    config = OptimConfig(
        learning_rate=0.1, weight_decay=0.5, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3
    )
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 0.01)
    gradient = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.float64)
    model.weight.grad = gradient.clone()
    optimizer.step()
    # after one step the bias-corrected moments are the gradient and its square
    expected = before * (1 - 0.01 * 0.5) - 0.01 * gradient / (gradient.abs() + 1e-3)
    torch.testing.assert_close(model.weight.detach(), expected)


def test_orthogonalized_keeps_the_directions_and_evens_their_sizes():
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(6, 6))
    right, _ = torch.linalg.qr(torch.randn(9, 6))
    sizes = torch.tensor([9.0, 5.0, 3.0, 1.0, 0.3, 0.1])
    found = orthogonalized(torch.stack([left * sizes @ right.T, left * sizes.flip(0) @ right.T]))
    for matrix in found:
        evened = left.T @ matrix @ right  # diagonal where the singular vectors are kept
        assert (evened - evened.diag().diag()).abs().max() < 1e-5
        assert 0.68 < evened.diag().min() <= evened.diag().max() < 1.14


def test_wide_matrices_take_the_steps_of_narrow_ones():
    """The way by Gram matrices is left to wide ones; a square beside zeros can go either way."""
    torch.manual_seed(0)
    square = torch.randn(2, 48, 48) @ torch.diag(torch.logspace(0, -1, 48))
    wide = torch.cat([square, torch.zeros(2, 48, 100)], dim=2)
    torch.testing.assert_close(
        orthogonalized(wide)[..., :48], orthogonalized(square), rtol=0, atol=1e-4
    )


def test_a_matrix_without_a_gradient_to_speak_of_stays_where_it_is():
    assert torch.equal(orthogonalized(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", [(4, 10), (10, 4), (6, 6)])
def test_muon_steps_as_that_of_torch(shape, bf16):
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(shape[0], shape[1], bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    start = ours.weight.detach().clone()
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5, optim="muon", muon_momentum=0.9)
    optimizer = build_optimizer(ours, config, bf16=bf16)
    peer = torch.optim.Muon(
        theirs.parameters(), 0.1, 0.5, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        ours.weight.grad = torch.randn(shape[::-1])
        theirs.weight.grad = ours.weight.grad.clone()
        optimizer.step()
        peer.step()
    # torch's rounds to bf16 in other places
    assert (ours.weight - theirs.weight).norm() < 0.03 * (theirs.weight - start).norm()


class WithHead(Small):
    """The head by the name that our models give it."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = self.head


def test_muon_takes_the_matrices_between_embedding_and_head():
    model = WithHead()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(optim="muon", weight_decay=0.1))
    found = [
        ([names[id(one)] for one in group["params"]], group["muon"], group["weight_decay"])
        for group in groups
    ]
    assert found == [
        (["inner.weight"], True, 0.1),
        (["head.weight"], False, 0.1),
        (["embed.weight", "inner.bias", "norm.weight", "norm.bias"], False, 0.0),
    ]


def test_muon_finds_the_head_of_a_hugging_face_model():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = GPTNeoXForCausalLM(config)
    taken = parameter_groups(model, OptimConfig(optim="muon"))[0]["params"]
    assert len(taken) == 4
    assert all(one.shape != model.get_output_embeddings().weight.shape for one in taken)


def test_what_muon_does_not_take_steps_as_with_adamw():
    torch.manual_seed(0)
    models = [WithHead() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    muon = OptimConfig(learning_rate=0.1, optim="muon", adam_beta1=0.8, adam_epsilon=1e-3)
    configs = (muon, dataclasses.replace(muon, optim="adamw"))
    optimizers = [
        build_optimizer(model, config) for model, config in zip(models, configs, strict=True)
    ]
    for _ in range(3):
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            gradient = torch.randn(parameters[0].shape)
            for parameter in parameters:
                parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for (name, one), other in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        assert torch.equal(one, other) == (name != "inner.weight"), name


def test_muon_goes_on_from_its_state_as_if_never_stopped():
    torch.manual_seed(0)
    config = OptimConfig(learning_rate=0.1, optim="muon", weight_decay=0.1)
    gradients = [[torch.randn(p.shape) for p in Small().parameters()] for _ in range(4)]

    def step(model, optimizer, gradients):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()

    straight, stopped = Small(), Small()
    stopped.load_state_dict(straight.state_dict())
    optimizers = build_optimizer(straight, config), build_optimizer(stopped, config)
    for of_step in gradients[:2]:
        step(straight, optimizers[0], of_step)
        step(stopped, optimizers[1], of_step)
    again = Small()
    again.load_state_dict(stopped.state_dict())
    resumed = build_optimizer(again, config)
    resumed.load_state_dict(optimizers[1].state_dict())
    for of_step in gradients[2:]:
        step(straight, optimizers[0], of_step)
        step(again, resumed, of_step)
    for one, other in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_momentum_of_muon_without_muon_is_refused():
    with pytest.raises(RecipeError, match="optim is adamw"):
        OptimConfig(muon_momentum=0.9)


def test_gradients_are_clipped_together_and_the_norm_before_is_told():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    unused = nn.Parameter(torch.zeros(1))
    for limit, scale in ((1.0, 0.2), (10.0, 1.0), (0.0, 1.0)):
        first.grad, second.grad = torch.tensor([3.0]), torch.tensor([-4.0])
        norm = clip_gradients([first, second, unused], limit)
        assert norm.item() == pytest.approx(5.0)
        assert first.grad.item() == pytest.approx(3 * scale, rel=1e-5)
        assert second.grad.item() == pytest.approx(-4 * scale, rel=1e-5)


# ---------------------------------------------------------------- steps better not made


def usual(guard, optimizer, number):
    """Steps of losses 2 and 4 in turn: mean 3, standard deviation close to 1."""
    for i in range(number):
        guard.watch(optimizer, torch.tensor(2.0 + 2 * (i % 2)), torch.tensor(1.0 + i % 2))


def is_left_out(guard, loss, grad_norm=1.0):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], fused=True)
    guard.watch(optimizer, torch.tensor(loss), torch.tensor(grad_norm))
    return bool(optimizer.found_inf)  # type: ignore[attr-defined]


def test_a_step_without_a_number_is_left_out_and_a_spike_if_so_wanted():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], fused=True)
    for sigma in (0.0, 6.0):
        guard = StepGuard(torch.device("cpu"), sigma)
        usual(guard, optimizer, 200)
        assert not is_left_out(guard, 8.9)
        assert is_left_out(guard, 10.1) == (sigma > 0)
        assert is_left_out(guard, 3.0, grad_norm=9.0) == (sigma > 0)
        assert guard.num_skipped == (2 if sigma else 0)
        assert is_left_out(guard, math.nan) and is_left_out(guard, 3.0, math.inf)


def test_no_step_is_a_spike_before_64_told_what_is_usual():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], fused=True)
    guard = StepGuard(torch.device("cpu"), 6.0)
    usual(guard, optimizer, 63)
    assert not is_left_out(guard, 100.0)


def test_the_guard_counts_the_longest_row_of_steps_left_out():
    guard = StepGuard(torch.device("cpu"), 0.0)
    for loss in (math.nan, 1.0, math.nan, math.nan, 1.0, math.nan):
        is_left_out(guard, loss)
    assert (guard.num_skipped, guard.longest) == (4, 2)
    again = StepGuard(torch.device("cpu"), 0.0)
    again.load_state_dict(guard.state_dict())
    is_left_out(again, math.nan)
    is_left_out(again, math.nan)
    assert (again.num_skipped, again.longest) == (6, 3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_left_out_changes_nothing_not_even_the_moments(name):
    torch.manual_seed(0)
    models = [WithHead() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    config = OptimConfig(learning_rate=0.1, weight_decay=0.1, optim=name)
    optimizers = [build_optimizer(model, config) for model in models]
    guard = StepGuard(torch.device("cpu"), 0.0)
    for step in range(4):
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            gradient = torch.randn(parameters[0].shape)
            for parameter in parameters:
                parameter.grad = gradient.clone()
        if step == 1:
            for parameter in models[0].parameters():
                parameter.grad = torch.full_like(parameter, math.nan)
        guard.watch(optimizers[0], torch.tensor(math.nan if step == 1 else 1.0), torch.tensor(1.0))
        optimizers[0].step()
        if step != 1:
            optimizers[1].step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
