"""The native model against transformers' Olmo2, and against what attention must mean."""

import dataclasses
import random

import pytest
import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from olmo_base.model.hf_weights import hf_name
from olmo_base.model.transformer import (
    ModelConfig,
    Transformer,
    flops_per_token,
    num_parameters,
)
from olmo_base.run.errors import UserError

SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=200,
    eos_token_id=0,
    pad_token_id=1,
)


def random_config(seed: int) -> ModelConfig:
    """Odd head counts, grouped heads, tied or not, all sorts of sizes."""
    draw = random.Random(seed)
    num_kv_heads = draw.choice([1, 2, 3, 5])
    num_heads = num_kv_heads * draw.choice([1, 2, 3])
    vocab_size = draw.randint(20, 300)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=num_heads * draw.choice([4, 8, 10, 16]),
        intermediate_size=draw.randint(7, 90),
        num_hidden_layers=draw.randint(1, 4),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=draw.choice([70, 100, 130]),
        eos_token_id=draw.randrange(vocab_size),
        pad_token_id=draw.randrange(vocab_size),
        rope_theta=draw.choice([100.0, 10_000.0, 500_000.0]),
        rms_norm_eps=draw.choice([1e-6, 1e-5]),
        tie_word_embeddings=bool(seed % 2),
    )


def random_model(config: ModelConfig, seed: int = 0, scale: float = 0.1) -> Transformer:
    """Weights much larger than at the start of training, norms not at 1: nothing hides."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=scale)
    return model


def same_in_transformers(model: Transformer) -> Olmo2ForCausalLM:
    """transformers' model with the same weights, handed over in memory."""
    shape = dataclasses.asdict(model.config)
    theta = shape.pop("rope_theta")
    config = Olmo2Config(**shape, rope_parameters={"rope_theta": theta, "rope_type": "default"})
    other = Olmo2ForCausalLM(config)
    weights = {hf_name(name): weight for name, weight in model.state_dict().items()}
    result = other.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}  # tied
    other.tie_weights()
    return other.eval()


def layer_outputs(model: Transformer, ids_BT: torch.Tensor) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: outputs.append(out))
        for layer in (model.embed_tokens, *model.layers)
    ]
    final = model(ids_BT)
    for hook in hooks:
        hook.remove()
    return [*outputs[:-1], final]  # as transformers lists them: the last one is normed


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("is_training", [False, True])
def test_logits_and_every_layer_equal_those_of_transformers(seed: int, is_training: bool):
    config = random_config(seed)
    model = random_model(config, seed)
    other = same_in_transformers(model)
    length = random.Random(seed).choice([1, 7, config.max_position_embeddings])
    ids_BT = torch.randint(config.vocab_size, (3, length))
    with torch.set_grad_enabled(is_training):  # the CPU trains through kernels of its own
        ours = layer_outputs(model, ids_BT)
        logits_BTV = model.logits(ours[-1])
        theirs = other(ids_BT, output_hidden_states=True)
    assert len(ours) == len(theirs.hidden_states)
    for mine, yours in zip(ours, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, yours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_BTV, theirs.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_gradients_equal_those_of_transformers(seed: int):
    # transformers gives the padding id's embedding no gradient, so it does not occur in the text.
    config = dataclasses.replace(random_config(seed), pad_token_id=0)
    model = random_model(config, seed)
    other = same_in_transformers(model)
    ids_BT = torch.randint(1, config.vocab_size, (2, config.max_position_embeddings))
    for logits_BTV in (model.logits(model(ids_BT)), other(ids_BT).logits):
        torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
        ).backward()
    theirs = dict(other.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(
            weight.grad, theirs[hf_name(name)].grad, atol=1e-6, rtol=1e-4, msg=name
        )


def test_a_position_never_sees_what_comes_after_it():
    model = random_model(SMALL)
    ids_BT = torch.randint(61, (2, 150))
    changed_BT = ids_BT.clone()
    changed_BT[:, 90:] = torch.randint(61, (2, 60))
    torch.testing.assert_close(model(ids_BT)[:, :90], model(changed_BT)[:, :90])


@pytest.mark.parametrize("is_training", [False, True])
def test_documents_packed_into_a_row_give_what_they_give_alone(is_training: bool):
    model = random_model(SMALL)
    documents = [torch.randint(61, (1, length)) for length in (5, 90, 1, 40)]
    packed_BT = torch.cat(documents, dim=1)
    numbers_BT = torch.cat([torch.full_like(ids, n) for n, ids in enumerate(documents)], dim=1)
    with torch.set_grad_enabled(is_training):
        packed_BTD = model(packed_BT, document_ids_BT=numbers_BT)
        alone_BTD = torch.cat([model(ids) for ids in documents], dim=1)
    torch.testing.assert_close(packed_BTD, alone_BTD, atol=1e-5, rtol=1e-5)


def test_gradients_of_packed_documents_are_those_of_the_documents_alone():
    model = random_model(SMALL)
    documents = [torch.randint(61, (1, length)) for length in (70, 3, 80)]
    packed_BT = torch.cat(documents, dim=1)
    numbers_BT = torch.cat([torch.full_like(ids, n) for n, ids in enumerate(documents)], dim=1)
    model(packed_BT, document_ids_BT=numbers_BT).square().sum().backward()
    packed = {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
    model.zero_grad()
    sum(model(ids).square().sum() for ids in documents).backward()
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(packed[name], weight.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_bf16_autocast_stays_close_to_fp32_and_keeps_the_residual_stream_in_fp32():
    model = random_model(SMALL, scale=0.02)
    ids_BT = torch.randint(61, (2, 64))
    with torch.autocast("cpu", torch.bfloat16):
        hidden_BTD = model(ids_BT)
    assert hidden_BTD.dtype == torch.float32
    torch.testing.assert_close(hidden_BTD, model(ids_BT), atol=0.1, rtol=0.05)
    hidden_BTD.sum().backward()
    assert all(
        weight.grad is not None
        for name, weight in model.named_parameters()
        if name != "lm_head.weight"
    )


@pytest.mark.parametrize("is_training", [False, True])
def test_bf16_weights_give_what_transformers_gives_in_bf16(is_training: bool):
    model = random_model(SMALL).bfloat16()
    other = same_in_transformers(model).bfloat16()
    ids_BT = torch.randint(61, (2, 64))
    with torch.set_grad_enabled(is_training):
        logits_BTV = model.logits(model(ids_BT))
        theirs_BTV = other(ids_BT).logits
    assert logits_BTV.dtype == theirs_BTV.dtype == torch.bfloat16
    torch.testing.assert_close(logits_BTV, theirs_BTV, atol=0.1, rtol=0.05)


def test_recomputing_layers_in_the_backward_pass_changes_no_gradient():
    model = random_model(SMALL)
    ids_BT = torch.randint(61, (2, 70))
    grads = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(ids_BT).square().sum().backward()
        grads.append(
            [weight.grad.clone() for weight in model.layers.parameters() if weight.grad is not None]
        )
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_cached_steps_of_any_size_give_what_one_pass_gives():
    model = random_model(SMALL)
    ids_BT = torch.randint(61, (3, 60))
    cache = model.new_cache([0, 0, 0], capacity=8)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in ids_BT.split([20, 1, 1, 30, 8], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids_BT), atol=1e-5, rtol=1e-5)


def test_weights_start_normal_with_std_002_cut_at_three_sigma_and_norms_at_one():
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(SMALL, vocab_size=5000))
    weight = model.embed_tokens.weight
    assert weight.abs().max() <= 0.06
    # A normal cut at 3 sigma has 0.9866 of its standard deviation left.
    assert weight.std().item() == pytest.approx(0.02 * 0.9866, rel=0.01)
    assert torch.equal(model.norm.weight, torch.ones(32))


def test_the_same_seed_draws_the_same_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(Transformer(SMALL))
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, two)


def test_tied_embeddings_are_one_tensor_in_the_state_dict():
    model = Transformer(dataclasses.replace(SMALL, tie_word_embeddings=True))
    assert "lm_head.weight" not in model.state_dict()
    assert model.output_weight is model.embed_tokens.weight


@pytest.mark.parametrize("seed", range(6))
def test_counted_parameters_are_those_that_are_there(seed: int):
    config = random_config(seed)
    with torch.device("meta"):
        model = Transformer(config)
    assert num_parameters(config) == sum(weight.numel() for weight in model.parameters())


def test_flops_of_a_tiny_model_by_hand():
    config = dataclasses.replace(SMALL, num_key_value_heads=4, tie_word_embeddings=True)
    # per layer 4*32*32 + 3*32*48 = 8704 weights, two layers, and 61*32 = 1952 of the head
    assert flops_per_token(config, 10) == 6 * (2 * 8704 + 1952) + 12 * 2 * 32 * 10


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 5}, ["hidden_size 32", "num_attention_heads 5"]),
        ({"num_attention_heads": 32, "num_key_value_heads": 32}, ["heads of 1", "even"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads 3", "num_attention_heads 4"]),
        ({"vocab_size": 0}, ["vocab_size is 0", "at least 1"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers is 2.5"]),
        ({"eos_token_id": 61}, ["eos_token_id is 61", "0 to 60"]),
        ({"rope_theta": -1.0}, ["rope_theta is -1.0"]),
    ],
)
def test_a_shape_that_cannot_be_is_refused_in_words(changes: dict[str, float], words: list[str]):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words)


def test_a_row_longer_than_the_model_was_made_for_is_refused():
    model = Transformer(dataclasses.replace(SMALL, max_position_embeddings=8))
    with pytest.raises(UserError, match="9 tokens; this model was made for at most 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
