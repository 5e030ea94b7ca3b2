"""Rows of unlike lengths laid end to end: padding exists inside attention only.

N positions of all rows, D width; B rows of a group, T positions of its longest, P = B * T places.

Everything but attention treats positions alike, so it runs over the N positions as one long row.
For attention, rows of similar length are taken together as groups, each padded on the right, where
causal attention never looks; or a kernel takes them as they lie. Rows never see each other.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_base.model.varlen import Kernel

# Numbers of rows are filled up to multiples of it: oneDNN prepares a product for each new number,
# which takes about half a millisecond, and steps seldom repeat one by themselves.
ROWS_TOGETHER = 16


class Branches(NamedTuple):
    """Where the tokens of a row stand in their own sequences, and which others belong to those."""

    positions_BT: Tensor
    may_attend_BTT: Tensor  # query by key; windows are added to it


@dataclass(frozen=True)
class Group:
    """Rows that attention takes together: the positions from ``start`` to ``end``."""

    start: int
    end: int
    num_rows: int
    length: int  # T
    places_P: Tensor | None  # which of the group's positions stands where; None: in order, no gaps
    padding: Tensor | None  # the places that hold none; there place_P repeats a position
    branches: Branches | None = None

    def to(self, device: torch.device) -> "Group":
        """The same on a device."""
        return replace(
            self,
            places_P=_to(self.places_P, device),
            padding=_to(self.padding, device),
            branches=None
            if self.branches is None
            else Branches(*(_moved(tensor, device) for tensor in self.branches)),
        )


@dataclass(frozen=True)
class Packing:
    """How the rows of a batch are laid end to end."""

    sources_N: Tensor  # where each position stood in the padded rows, laid end to end
    groups: tuple[Group, ...]
    from_groups_N: Tensor  # where each position stands in the groups' places, laid end to end
    row_starts: Tensor  # where each row begins, and the last one ends; int32
    num_filling: int = 0  # positions at the end that belong to no row and mean nothing
    kernel: Kernel | None = None  # what attends to all rows at once, in place of the groups

    def to(self, device: torch.device) -> "Packing":
        """The same on a device; from pinned memory, so that the copy does not stop the host."""
        return Packing(
            _moved(self.sources_N, device),
            tuple(group.to(device) for group in self.groups),
            _moved(self.from_groups_N, device),
            _moved(self.row_starts, device),
            self.num_filling,
            self.kernel,
        )

    def attended_by(self, kernel: Kernel | None) -> "Packing":
        """The same, its rows attended to by a kernel. Branches are not: they bring masks."""
        has_branches = any(group.branches is not None for group in self.groups)
        return self if kernel is None or has_branches else replace(self, kernel=kernel)

    @property
    def longest(self) -> int:
        """Positions of the longest row, the filling taken for one."""
        return max(self.num_filling, *(group.length for group in self.groups))

    def filled(self) -> "Packing":
        """The same with as many positions as rows of a product should have."""
        assert not self.num_filling
        sources_N = filled(self.sources_N)
        num_filling = len(sources_N) - len(self.sources_N)
        row_starts = self.row_starts
        if num_filling:  # a row of its own: what a kernel leaves out it does not write either
            row_starts = F.pad(row_starts, (0, 1), value=len(sources_N))
        return replace(
            self,
            sources_N=sources_N,
            from_groups_N=filled(self.from_groups_N),
            row_starts=row_starts,
            num_filling=num_filling,
        )

    def apart(self, x_ND: Tensor) -> list[Tensor]:
        """The groups' rows, BTD each."""
        parts: tuple[Tensor, ...] = _Apart.apply(x_ND, self)
        return [
            part_PD.view(group.num_rows, group.length, -1)
            for part_PD, group in zip(parts, self.groups, strict=True)
        ]

    def together(self, parts: list[Tensor]) -> Tensor:
        """The positions of the groups' rows end to end again, ND."""
        joined_ND: Tensor = _Together.apply(self, *(part_BTD.flatten(0, 1) for part_BTD in parts))
        return joined_ND


def filled(numbers_N: Tensor) -> Tensor:
    """With zeros behind them, as many as rows of a product should have."""
    return F.pad(numbers_N, (0, -len(numbers_N) % ROWS_TOGETHER))


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else _moved(tensor, device)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


# Both ways are gathers. Left to itself, autograd would add up rows one by one.


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, packing: Packing) -> tuple[Tensor, ...]:
        ctx.packing = packing
        parts = []
        for group in packing.groups:
            part_ND = x_ND[group.start : group.end]
            if group.places_P is None:
                parts.append(part_ND.clone())
            else:
                parts.append(part_ND.index_select(0, group.places_P))
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _from_groups(grads, ctx.packing), None


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packing: Packing, *parts: Tensor) -> Tensor:
        ctx.packing = packing
        return _from_groups(parts, packing)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        found = []
        for group in ctx.packing.groups:
            part_ND = grads[0][group.start : group.end]
            if group.places_P is not None:
                part_ND = part_ND.index_select(0, group.places_P)
            if group.padding is not None:
                part_ND.index_fill_(0, group.padding, 0.0)
            found.append(part_ND)
        return (None, *found)


def _from_groups(parts: tuple[Tensor, ...], packing: Packing) -> Tensor:
    joined_ND = torch.cat(parts).index_select(0, packing.from_groups_N)
    if packing.num_filling:
        joined_ND[-packing.num_filling :] = 0.0
    return joined_ND
