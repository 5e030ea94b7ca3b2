"""Which kernel attends to rows end to end, what it is called with, and what a model makes of it."""

import math
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from olmo_base.model.transformer import ModelConfig, Transformer
from olmo_base.model.varlen import (
    KERNELS,
    TORCH_VARLEN,
    Kernel,
    chosen_kernel,
    rows_kernel,
    torch_varlen,
)
from olmo_base.run.errors import UserError
from open_instruct.batches import pack

AMPERE, HOPPER, TURING = (8, 0), (9, 0), (7, 5)
BOTH = ("flash-attn", "flash-attn-3")


def name_of(asked, capability, installed=(), bf16=True):
    kernel = chosen_kernel(asked, capability, bf16=bf16, installed=installed)
    return None if kernel is None else kernel.name


@pytest.mark.parametrize(
    ("capability", "installed", "bf16", "name"),
    [
        (HOPPER, BOTH, True, "flash_attention_3"),
        (HOPPER, ("flash-attn",), True, "flash_attention_2"),
        (HOPPER, (), True, TORCH_VARLEN),
        (AMPERE, BOTH, True, "flash_attention_2"),
        (AMPERE, (), True, TORCH_VARLEN),
        (TURING, BOTH, True, None),
        (HOPPER, BOTH, False, None),
        (None, BOTH, True, None),
    ],
)
def test_auto_takes_the_fastest_that_is_here(capability, installed, bf16, name):
    assert name_of("auto", capability, installed, bf16) == name


@pytest.mark.parametrize("asked", ["sdpa", "eager"])
def test_who_asks_for_none_gets_none(asked):
    assert name_of(asked, HOPPER, BOTH) is None


@pytest.mark.parametrize(
    ("asked", "capability", "installed", "bf16", "words"),
    [
        ("flash_attention_2", None, BOTH, True, "needs a CUDA GPU, and none is used here"),
        ("flash_attention_3", AMPERE, BOTH, True, r"capability 9\.0, and this one has 8\.0"),
        ("flash_attention_3", HOPPER, ("flash-attn",), True, "the package flash-attn-3, which is"),
        ("flash_attention_2", HOPPER, BOTH, False, "needs bf16: true"),
    ],
)
def test_what_is_insisted_on_and_is_not_here_is_one_message(
    asked, capability, installed, bf16, words
):
    with pytest.raises(UserError, match=f"{words}.* Set attn_implementation: auto"):
        name_of(asked, capability, installed, bf16)


def test_a_cpu_attends_by_groups():
    assert rows_kernel("auto", torch.device("cpu"), bf16=True) is None
    with pytest.raises(UserError, match="flash_attention_2 needs a CUDA GPU"):
        rows_kernel("flash_attention_2", torch.device("cpu"), bf16=True)


# ---------------------------------------------------------------- what they are called with


def by_hand(q_NHh, k_NKh, v_NKh, row_starts, longest, scale, window):
    """Attention of every row by itself, written out."""
    mixed = []
    for start, end in zip(row_starts[:-1].tolist(), row_starts[1:].tolist(), strict=True):
        length = end - start
        assert 0 < length <= longest
        groups = q_NHh.shape[1] // k_NKh.shape[1]
        q, k, v = (x[start:end].transpose(0, 1) for x in (q_NHh, k_NKh, v_NKh))
        k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        is_seen = (distance >= 0) & (distance < (window or length))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~is_seen, -math.inf)
        mixed.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(mixed)


def flash_by_hand(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    deterministic=False,
):
    """What the packages' function is documented to do; its keys, and the window without itself."""
    assert causal and deterministic and dropout_p == 0.0
    assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    assert cu_seqlens_q.dtype == torch.int32
    left, right = window_size
    assert right in (-1, 0)
    window = None if left == -1 else left + 1
    return by_hand(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, window)


def drawn_rows() -> tuple[Tensor, Tensor, Tensor, Tensor, int, float]:
    generator = torch.Generator().manual_seed(0)
    q_NHh, k_NKh, v_NKh = (torch.randn(12, heads, 8, generator=generator) for heads in (4, 2, 2))
    return q_NHh, k_NKh, v_NKh, torch.tensor([0, 5, 6, 12], dtype=torch.int32), 6, 0.3


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("name", "module"),
    [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")],
)
def test_flash_attention_is_called_by_its_keys(monkeypatch, name, module, window):
    package = ModuleType(module)
    package.flash_attn_varlen_func = flash_by_hand  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, package)
    rows = drawn_rows()
    torch.testing.assert_close(KERNELS[name].attend(*rows, window), by_hand(*rows, window))


@pytest.mark.parametrize("window", [None, 3])
def test_torchs_kernel_takes_what_it_is_given(window):
    q, k, v, starts, longest, scale = drawn_rows()
    q, k, v, starts = (tensor.to("meta") for tensor in (q, k, v, starts))  # else it needs a GPU
    assert torch_varlen(q, k, v, starts, longest, scale, window).shape == (12, 4, 8)


# ---------------------------------------------------------------- what a model makes of it

BY_HAND = Kernel("by hand", by_hand, None, (0, 0))


@pytest.mark.parametrize("layer_types", [None, ("sliding_attention", "full_attention")])
def test_a_kernel_gives_the_native_model_the_gradients_of_its_groups(layer_types):
    windows = {} if layer_types is None else {"sliding_window": 4, "layer_types": layer_types}
    config = ModelConfig(
        model_type="olmo2" if layer_types is None else "olmo3",
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        pad_token_id=1,
        **windows,
    )
    torch.manual_seed(0)
    model = Transformer(config)
    lengths = torch.tensor([9, 3, 14, 9])  # 35 positions: some filling is behind them
    ids_RT = torch.randint(2, 61, (4, 14))
    found = []
    for kernel in (None, BY_HAND):
        model.zero_grad()
        packing = pack(lengths.numpy()).attended_by(kernel)
        hidden_ND = model.packed(ids_RT, packing)
        (hidden_ND * torch.linspace(0, 1, 35)[:, None]).square().mean().backward()
        found.append(
            [hidden_ND.detach()]
            + [weight.grad for weight in model.parameters() if weight.grad is not None]
        )
    assert len(found[0]) == len(found[1]) > 10
    for by_groups, by_kernel in zip(*found, strict=True):
        torch.testing.assert_close(by_kernel, by_groups, rtol=1e-4, atol=1e-5)
