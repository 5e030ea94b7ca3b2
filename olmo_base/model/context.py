"""Context parallelism: long rows cut over ranks, each with a part of the positions.

A row of T positions is cut into two pieces for each of C ranks; rank r has pieces r and 2C-1-r, so
that all ranks have the same number of earlier positions to look at. Queries stay where they are;
keys and values of the whole row are gathered for each layer, which makes attention exact whatever
the mask.
"""

# B batch, T positions of a row, P of them on this rank, H query heads, K key/value heads,
# h channels of one head

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class SplitContext:
    """This rank's part of every row."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank, self.num_ranks = group.rank(), group.size()

    def padded(self, num_positions: int) -> int:
        """How long a row of so many positions must be made to be cut into equal pieces."""
        return num_positions + -num_positions % (2 * self.num_ranks)

    def positions(self, num_positions: int, device: torch.device) -> Tensor:
        """Which of a row's positions this rank has, P."""
        assert num_positions % (2 * self.num_ranks) == 0, "the recipe was checked"
        pieces = torch.arange(num_positions, device=device).chunk(2 * self.num_ranks)
        return torch.cat([pieces[self._rank], pieces[-1 - self._rank]])

    def may_attend(
        self,
        num_positions: int,
        window: int | None,
        document_ids_BT: Tensor | None,
        positions_P: Tensor,
    ) -> Tensor | None:
        """B1PT or 11PT, true where a position of this rank may look; None for plain causality."""
        if document_ids_BT is None and (window is None or window >= num_positions):
            return None
        distance_PT = positions_P[:, None] - torch.arange(num_positions, device=positions_P.device)
        sees = distance_PT >= 0
        if window is not None:
            sees = sees & (distance_PT < window)
        if document_ids_BT is None:
            return sees[None, None]
        of_query_BP = document_ids_BT[:, positions_P]
        return (sees & (of_query_BP[:, :, None] == document_ids_BT[:, None]))[:, None]

    def attend(
        self, q_BHPh: Tensor, k_BKPh: Tensor, v_BKPh: Tensor, may_attend: Tensor | None
    ) -> Tensor:
        """Each of this rank's positions' mix of the row's values, BHPh."""
        # It brings torch's compiler, seconds of every start that needs no split context.
        from torch.nn.attention.bias import causal_lower_right

        parts = _Gather.apply(torch.stack([k_BKPh, v_BKPh]), self._group)
        half = q_BHPh.shape[2] // 2
        early = [part[..., :half, :] for part in parts]
        late = [part[..., half:, :] for part in reversed(parts)]
        k_BKTh, v_BKTh = torch.cat([*early, *late], dim=-2)
        mixed = []
        for first, piece in ((0, self._rank), (half, 2 * self.num_ranks - 1 - self._rank)):
            seen = (piece + 1) * half
            here = slice(first, first + half)
            mask = causal_lower_right(half, seen)
            mixed.append(
                F.scaled_dot_product_attention(
                    q_BHPh[:, :, here],
                    k_BKTh[:, :, :seen],
                    v_BKTh[:, :, :seen],
                    attn_mask=mask if may_attend is None else may_attend[:, :, here, :seen],
                    enable_gqa=q_BHPh.shape[1] != k_BKPh.shape[1],
                )
            )
        return torch.cat(mixed, dim=2)


class _Gather(torch.autograd.Function):
    """Every rank's tensor, on every rank; the gradient of each goes back to where it came from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        mine = torch.empty_like(grads[0])
        dist.reduce_scatter(mine, [grad.contiguous() for grad in grads], group=ctx.group)
        return mine, None
