import numpy as np
import pytest
import torch

from olmo_base.model.packing import Group, Packing
from olmo_base.model.transformer import ModelConfig, Transformer
from open_instruct.batches import pack

SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=200,
    eos_token_id=2,
    pad_token_id=0,
)
LENGTHS = [5, 150, 9, 9, 1, 70]  # those apart by far are groups of their own


def tiny(**changes):
    torch.manual_seed(0)
    return Transformer(ModelConfig(**(SHAPE | changes)))


def padded(lengths):
    generator = torch.Generator().manual_seed(1)
    ids_RT = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids_RT[row, :length] = torch.randint(3, 61, (length,), generator=generator)
    return ids_RT


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "olmo", "clip_qkv": 0.05},
        {
            "model_type": "olmo3",
            "sliding_window": 4,
            "layer_types": ("sliding_attention", "full_attention"),
        },
    ],
    ids=["olmo2", "olmo1", "olmo3"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_end_to_end_have_the_outputs_and_gradients_of_rows_alone(changes, checkpointing):
    model = tiny(**changes)
    model.gradient_checkpointing = checkpointing
    ids_RT, packing = padded(LENGTHS), pack(np.array(LENGTHS))
    assert len(packing.groups) > 1 and any(group.num_rows > 1 for group in packing.groups)
    weights_RTD = torch.randn(*ids_RT.shape, 32, generator=torch.Generator().manual_seed(2))

    hidden_ND = model.packed(ids_RT, packing)
    (hidden_ND * weights_RTD.flatten(0, 1)[packing.sources_N]).sum().backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    alone_RTD = torch.zeros(*ids_RT.shape, 32)
    for row, length in enumerate(LENGTHS):
        hidden_1TD = model(ids_RT[row : row + 1, :length])
        alone_RTD[row, :length] = hidden_1TD[0].detach()
        (hidden_1TD[0] * weights_RTD[row, :length]).sum().backward()
    torch.testing.assert_close(
        hidden_ND, alone_RTD.flatten(0, 1)[packing.sources_N], atol=1e-5, rtol=0
    )
    for name, weight in model.named_parameters():
        if name == "lm_head.weight":  # hidden states only
            continue
        size = weight.grad.abs().max()
        torch.testing.assert_close(found[name], weight.grad, atol=1e-5 * float(size), rtol=0)


@pytest.mark.parametrize("model_type", ["olmo", "olmo2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_wanted_positions_have_the_outputs_and_gradients_of_all(model_type, checkpointing):
    model = tiny(model_type=model_type)
    model.gradient_checkpointing = checkpointing
    ids_RT, packing = padded(LENGTHS), pack(np.array(LENGTHS))
    wanted_L = torch.tensor([3, 200, 17, 17, 0, 90])  # in any order, and one of them twice
    weights_LD = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))

    def hidden_and_gradients(hidden_LD):
        model.zero_grad()
        (hidden_LD * weights_LD).sum().backward()
        weights = model.named_parameters()
        return hidden_LD, {name: one.grad for name, one in weights if one.grad is not None}

    hidden_LD, found = hidden_and_gradients(model.packed(ids_RT, packing, wanted_L))
    expected_LD, expected = hidden_and_gradients(model.packed(ids_RT, packing)[wanted_L])
    torch.testing.assert_close(hidden_LD, expected_LD, atol=1e-6, rtol=0)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * size, rtol=0)


def test_a_row_does_not_see_its_neighbours():
    model = tiny()
    ids_RT, packing = padded(LENGTHS), pack(np.array(LENGTHS))
    others_RT = padded([length + 1 for length in LENGTHS])[:, : ids_RT.shape[1]]
    others_RT[3] = ids_RT[3]
    is_row_3 = packing.sources_N // ids_RT.shape[1] == 3
    with torch.no_grad():
        before, after = model.packed(ids_RT, packing), model.packed(others_RT, packing)
    torch.testing.assert_close(before[is_row_3], after[is_row_3], atol=1e-6, rtol=0)
    assert not torch.allclose(before[~is_row_3], after[~is_row_3], atol=1e-2)


@pytest.mark.parametrize("fills", [False, True])
def test_apart_and_together_undo_each_other_and_so_do_their_gradients(fills):
    packing = pack(np.array([2, 5, 5, 3, 90]))
    x_ND = torch.randn(len(packing.sources_N), 4, dtype=torch.float64)
    if fills:
        packing = packing.filled()
        assert packing.num_filling == 7  # 105 and these are 112, seven times 16
        x_ND = torch.cat([x_ND, x_ND.new_zeros(7, 4)])
    x_ND.requires_grad_()
    torch.testing.assert_close(packing.together(packing.apart(x_ND)), x_ND)
    parts = [part.detach().requires_grad_() for part in packing.apart(x_ND)]
    assert torch.autograd.gradcheck(lambda *given: packing.together(list(given)), parts)
    weights = [torch.randn_like(part) for part in parts]
    for weight, group in zip(weights, packing.groups, strict=True):
        if group.padding is not None:  # attention gives padding no gradient
            weight.view(-1, 4)[group.padding] = 0.0
    total = sum(
        (part * weight).sum() for part, weight in zip(packing.apart(x_ND), weights, strict=True)
    )
    assert isinstance(total, torch.Tensor)
    total.backward()
    torch.testing.assert_close(x_ND.grad, packing.together(weights))


def test_a_group_by_hand():
    packing = pack(np.array([3, 2]))  # the shorter row comes first
    assert packing.sources_N.tolist() == [3, 4, 0, 1, 2]
    (group,) = packing.groups
    assert isinstance(packing, Packing) and isinstance(group, Group)
    assert (group.start, group.end, group.num_rows, group.length) == (0, 5, 2, 3)
    assert group.places_P is not None and group.padding is not None
    assert group.places_P.tolist() == [0, 1, 0, 2, 3, 4]
    assert group.padding.tolist() == [2]
    assert packing.from_groups_N.tolist() == [0, 1, 3, 4, 5]
