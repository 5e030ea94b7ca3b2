"""The loss of pretraining: hidden states and the tokens that follow, one sum out.

N positions, D width, V vocabulary, C positions of a chunk.
"""

from typing import Any

import torch
from torch import Tensor

from olmo_base.model.products import product

# Logits held at once. On a CPU 2**21 are 8 MiB, which stay in cache: at V = 2048 and D = 192 the
# loss and its gradients then take no longer than their three matrix products, where logits kept
# whole take half as long again. A GPU wants larger products.
MAX_LOGITS = {"cpu": 2**21, "cuda": 2**28}


def next_token_loss(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What to minimise, and the cross-entropy alone; in nats, summed over positions.

    Cross-entropy of ``softmax(hidden @ head.T)`` at the labels, plus ``z_loss`` times the squared
    log of the softmax's denominator, which keeps logits from drifting (PaLM, arXiv:2204.02311,
    section 5). The second result carries no gradient. Logits are computed chunk by chunk, in
    autocast's dtype, and summed in fp32; gradients are made in the same pass, so they never exist
    whole.
    """
    device = hidden_ND.device.type
    dtype = (
        torch.get_autocast_dtype(device)
        if torch.is_autocast_enabled(device)
        else torch.promote_types(hidden_ND.dtype, head_VD.dtype)
    )
    chunk = max(64, MAX_LOGITS.get(device, 2**24) // head_VD.shape[0])
    inputs = (hidden_ND, head_VD, labels_N)
    return _NextTokenLoss.apply(*inputs, z_loss, chunk, dtype, torch.is_grad_enabled())


class _NextTokenLoss(torch.autograd.Function):
    """With p the softmax, s the log of its denominator and y the label's one-hot row:
    d loss / d logits = p * (1 + 2 z s) - y."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        z_loss: float,
        chunk: int,
        dtype: torch.dtype,
        is_grad_enabled: bool,  # inside forward() it never is
    ) -> tuple[Tensor, Tensor]:
        needs_grad = is_grad_enabled and any(ctx.needs_input_grad)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_grad else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=sum_dtype) if needs_grad else None
        cross_entropy = hidden_ND.new_zeros((), dtype=sum_dtype)
        squared_logs = hidden_ND.new_zeros((), dtype=sum_dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight_VD = head_VD.to(dtype)
            for start in range(0, hidden_ND.shape[0], chunk):
                here = slice(start, start + chunk)
                hidden_CD = hidden_ND[here].to(dtype)
                labels_C1 = labels_N[here, None]
                logits_CV = product(hidden_CD, weight_VD).to(sum_dtype)
                highest_C1 = logits_CV.amax(-1, keepdim=True)
                logits_CV -= highest_C1
                chosen_C1 = logits_CV.gather(1, labels_C1)
                weights_CV = logits_CV.exp_()
                total_C1 = weights_CV.sum(-1, keepdim=True)
                log_C1 = total_C1.log()
                cross_entropy += (log_C1 - chosen_C1).sum()
                log_C1 += highest_C1
                if z_loss:
                    squared_logs += log_C1.square().sum()
                if grad_hidden_ND is None or grad_head_VD is None:
                    continue
                grad_CV = weights_CV.mul_((1.0 + 2.0 * z_loss * log_C1) / total_C1)
                grad_CV.scatter_add_(1, labels_C1, torch.full_like(chosen_C1, -1.0))
                grad_CV = grad_CV.to(dtype)
                grad_hidden_ND[here] = product(grad_CV, weight_VD.T)
                if dtype == sum_dtype:
                    grad_head_VD.addmm_(grad_CV.T, hidden_CD)
                else:
                    grad_head_VD += grad_CV.T @ hidden_CD
        if needs_grad:
            ctx.save_for_backward(grad_hidden_ND, grad_head_VD)
            ctx.head_dtype = head_VD.dtype
        ctx.mark_non_differentiable(cross_entropy)
        return cross_entropy + z_loss * squared_logs, cross_entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_head_VD = ctx.saved_tensors
        grad_head_VD = grad_head_VD.mul_(grads[0]).to(ctx.head_dtype)
        return grad_hidden_ND.mul_(grads[0]), grad_head_VD, None, None, None, None, None
