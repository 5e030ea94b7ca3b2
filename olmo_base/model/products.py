"""Matrix products, by the faster of the libraries that torch brings.

M rows (positions), K columns that are summed over, N columns of the result.
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Multiplications from which the other library's start-up no longer counts.
LEAST_WORK = 2**22
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """``x @ weight.T`` over the last axis, with gradients.

    On x86 processors torch gives fp32 products to MKL. While training, those of ``x`` and of its
    gradient go to oneDNN instead, where torch has it: the same sums, in another order, 10 to 25 %
    faster on AMD's Zen 4 at the shapes of small models (docs/performance.md). The weights' gradient
    stays with MKL, which is faster there. Everything else (other dtypes and devices, autocast, no
    gradient, a compiled model, weights spread over ranks, small products) is ``F.linear``.
    """
    if trains_plainly(x_MK, weight_NK) and _is_for_onednn(x_MK, weight_NK):
        return _Linear.apply(x_MK, weight_NK)
    return F.linear(x_MK, weight_NK)


def product(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """``x @ weight.T`` of two matrices without gradients, for code that makes its own."""
    if _is_for_onednn(x_MK, weight_NK):
        return _onednn(x_MK, weight_NK)
    return x_MK @ weight_NK.T


def trains_plainly(x: Tensor, *weights: Tensor) -> bool:
    """Whether a gradient of plain fp32 tensors on a CPU is to be made, by nothing that rewrites it.

    Then functions that make their own gradients may stand in for torch's.
    """
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and (x.requires_grad or any(weight.requires_grad for weight in weights))
        and type(x) is Tensor
        and x.dtype == torch.float32
        and all(type(weight) in (Tensor, torch.nn.Parameter) for weight in weights)
        and all(weight.dtype == torch.float32 for weight in weights)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        IS_X86
        and x.device.type == "cpu"
        and x.dtype == torch.float32 == weight.dtype
        and type(x) is Tensor
        and type(weight) in (Tensor, torch.nn.Parameter)
        and x.numel() * weight.shape[0] >= LEAST_WORK
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x = _onednn(grad, weight.T) if needs_x else None
        grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2) if needs_weight else None
        return grad_x, grad_weight
