"""Attention over rows laid end to end by one kernel of a GPU, which takes them as they lie.

N positions of all rows, B rows; H query heads, K key/value heads, h channels of one head.

A kernel is called with where rows begin, so that nothing is padded and no row sees another. It
computes in 16 bits. Where there is none, groups of padded rows go through torch's SDPA.
"""

import importlib.metadata
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo_base.run.errors import UserError

# q_NHh, k_NKh, v_NKh; where each row begins and the last one ends (B + 1, int32); the longest row;
# what scores are multiplied by; how far a position sees, itself included -> NHh
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int | None], Tensor]


def flash_attention_3(
    q_NHh: Tensor,
    k_NKh: Tensor,
    v_NKh: Tensor,
    row_starts: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """By the package flash-attn-3."""
    from flash_attn_interface import flash_attn_varlen_func  # optional, and only if chosen

    return _by_flash(
        flash_attn_varlen_func, q_NHh, k_NKh, v_NKh, row_starts, longest, scale, window
    )


def flash_attention_2(
    q_NHh: Tensor,
    k_NKh: Tensor,
    v_NKh: Tensor,
    row_starts: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """By the package flash-attn."""
    from flash_attn import flash_attn_varlen_func  # optional, and only if chosen

    return _by_flash(
        flash_attn_varlen_func, q_NHh, k_NKh, v_NKh, row_starts, longest, scale, window
    )


def _by_flash(
    function: Any,
    q_NHh: Tensor,
    k_NKh: Tensor,
    v_NKh: Tensor,
    row_starts: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    mixed = function(
        q_NHh,
        k_NKh,
        v_NKh,
        cu_seqlens_q=row_starts,
        cu_seqlens_k=row_starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        deterministic=True,  # a run that goes on gives the same bits
    )
    mixed_NHh: Tensor = mixed[0] if isinstance(mixed, tuple) else mixed
    return mixed_NHh


def torch_varlen(
    q_NHh: Tensor,
    k_NKh: Tensor,
    v_NKh: Tensor,
    row_starts: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """By the kernel that torch brings."""
    from torch.nn.attention.varlen import varlen_attn  # half a second to import

    mixed_NHh = varlen_attn(
        q_NHh,
        k_NKh,
        v_NKh,
        row_starts,
        row_starts,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q_NHh.shape[1] != k_NKh.shape[1],
    )
    assert isinstance(mixed_NHh, Tensor)
    return mixed_NHh


class Kernel(NamedTuple):
    """One of them."""

    name: str
    attend: Attend
    package: str | None  # whose installation it needs; None: torch alone
    capability: tuple[int, int]  # of the GPU, at least


TORCH_VARLEN = "torch's varlen attention"
KERNELS = {  # the fastest first
    "flash_attention_3": Kernel(
        "flash_attention_3", flash_attention_3, "flash-attn-3", (9, 0)
    ),  # Hopper
    "flash_attention_2": Kernel("flash_attention_2", flash_attention_2, "flash-attn", (8, 0)),
    TORCH_VARLEN: Kernel(TORCH_VARLEN, torch_varlen, None, (8, 0)),
}


def rows_kernel(asked: str, device: torch.device, *, bf16: bool) -> Kernel | None:
    """The kernel of a run on ``device``; None where groups of padded rows go through SDPA.

    ``asked`` is the recipe's ``attn_implementation``: a kernel's name, ``auto`` for the fastest
    that is here, anything else for none. Errors: UserError if the kernel cannot be had.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    packages = {kernel.package for kernel in KERNELS.values()} - {None}
    installed = {package for package in packages if package and _is_installed(package)}
    return chosen_kernel(asked, capability, bf16=bf16, installed=installed)


def chosen_kernel(
    asked: str, capability: tuple[int, int] | None, *, bf16: bool, installed: Collection[str]
) -> Kernel | None:
    """As ``rows_kernel``, of a GPU of this ``capability``, None if there is none."""
    if asked in KERNELS:
        missing = _missing(KERNELS[asked], capability, bf16, installed)
        if missing is not None:
            raise UserError(
                f"attn_implementation: {asked} needs {missing}. Set attn_implementation: auto, "
                "which takes what is here."
            )
        return KERNELS[asked]
    if asked != "auto":
        return None
    for kernel in KERNELS.values():
        if _missing(kernel, capability, bf16, installed) is None:
            return kernel
    return None


def _missing(
    kernel: Kernel,
    capability: tuple[int, int] | None,
    bf16: bool,
    installed: Collection[str],
) -> str | None:
    """What a kernel lacks here, in words."""
    if capability is None:
        return "a CUDA GPU, and none is used here"
    if capability < kernel.capability:
        needed, found = (".".join(map(str, version)) for version in (kernel.capability, capability))
        return f"a GPU of compute capability {needed}, and this one has {found}"
    if not bf16:
        return "bf16: true, because it computes in 16 bits"
    if kernel.package is not None and kernel.package not in installed:
        return f"the package {kernel.package}, which is not installed"
    return None


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
