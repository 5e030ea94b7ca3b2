"""Rotary position embedding (RoFormer, arXiv:2104.09864): angle tables and the rotation.

YaRN (arXiv:2309.00071) stretches the slow angles, for texts longer than those trained on.

B batch, T positions, H heads, h channels of one head, S rows of the table.

Channel ``i`` of a head is paired with channel ``i + h/2`` ("half rotation"), as the released OLMo
weights expect; the paper pairs neighbours, which is the same up to an order of the channels.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from olmo_base.run.errors import UserError


@dataclass(frozen=True)
class Yarn:
    """How YaRN stretches the angles of a model, under the names that its config.json carries."""

    factor: float  # how many times longer
    original_max_position_embeddings: int  # the length trained on
    beta_fast: float = 32.0  # pairs that turn more often than this over that length stay
    beta_slow: float = 1.0  # those that turn less often are slowed by the whole factor
    attention_factor: float | None = None  # cosines and sines are multiplied by it

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise UserError(f"rope_scaling: factor is {self.factor!r}; it must be at least 1.")
        if not self.original_max_position_embeddings >= 1:
            raise UserError(
                "rope_scaling: original_max_position_embeddings is "
                f"{self.original_max_position_embeddings!r}; it must be at least 1."
            )
        if not self.beta_fast > self.beta_slow > 0:
            raise UserError(
                f"rope_scaling: beta_fast is {self.beta_fast!r} and beta_slow {self.beta_slow!r}; "
                "the first must be the larger and both above 0."
            )

    @property
    def scale(self) -> float:
        """What cosines and sines are multiplied by: section 3.4 of the paper unless told."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def ramp(self, head_dim: int, theta: float) -> tuple[int, int]:
        """The pairs up to which angles stay, and from which they are slowed by the whole factor."""

        def pair_that_turns(times: float) -> float:
            length = self.original_max_position_embeddings
            return head_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(pair_that_turns(self.beta_fast)), 0)
        return first, min(math.ceil(pair_that_turns(self.beta_slow)), head_dim - 1)

    def stretched(self, frequencies: Tensor, head_dim: int, theta: float) -> Tensor:
        """The frequencies of all pairs, each kept, slowed, or a mix of the two (section 3.2)."""
        first, last = self.ramp(head_dim, theta)
        span = last - first if last != first else 0.001
        pairs = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32)
        kept = 1 - ((pairs - first) / span).clamp(0, 1)
        return frequencies / self.factor * (1 - kept) + frequencies * kept


class RotaryTable:
    """Cosines and sines of every position, made once per device and lengthened when needed.

    Kept in fp32 and outside the state_dict: they follow from the configuration.
    """

    def __init__(self, head_dim: int, theta: float, yarn: Yarn | None = None) -> None:
        self.head_dim = head_dim
        self.theta = theta
        self.yarn = yarn
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos_Sh, sin_Sh) for at least ``num_positions`` positions."""
        table = self._tables.get(device)
        if table is None or table[0].shape[0] < num_positions:
            # Rounded up, so that decoding one token at a time does not make it anew each step.
            num_positions = -(-num_positions // 256) * 256
            table = rotary_table(num_positions, self.head_dim, self.theta, device, self.yarn)
            self._tables[device] = table
        return table


def rotary_table(
    num_positions: int, head_dim: int, theta: float, device: torch.device, yarn: Yarn | None = None
) -> tuple[Tensor, Tensor]:
    """(cos_Sh, sin_Sh): angle of position s and pair i is s * theta^(-2i/h), in fp32."""
    with torch.autocast(device.type, enabled=False), torch.inference_mode(False), torch.no_grad():
        exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
        frequencies = 1.0 / theta**exponents
        if yarn is not None:
            frequencies = yarn.stretched(frequencies, head_dim, theta)
        positions = torch.arange(num_positions, device=device, dtype=torch.float32)
        angles_Sh = torch.outer(positions, frequencies).repeat(1, 2)
        scale = 1.0 if yarn is None else yarn.scale
        return angles_Sh.cos().mul_(scale), angles_Sh.sin().mul_(scale)


def rotate(x_BTHh: Tensor, cos_Th: Tensor, sin_Th: Tensor, dtype: torch.dtype) -> Tensor:
    """Each pair of channels turned by its position's angle, heads first (BHTh, contiguous).

    ``cos`` and ``sin`` are Th for rows that share positions, B1Th otherwise. The arithmetic is
    fp32, the result in ``dtype``.
    """
    if not torch.is_grad_enabled():
        return _rotated(x_BTHh, cos_Th, sin_Th).to(dtype)
    return _Rotate.apply(x_BTHh, cos_Th, sin_Th, dtype)


class _Rotate(torch.autograd.Function):
    """The rotation together with the change of layout that attention wants.

    In-place halves rather than ``cat``, written where they are wanted: measured on a CPU for 8x256
    tokens of width 256, a third of the time of the textbook form, and its backward pass less.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BTHh: Tensor, cos_Th: Tensor, sin_Th: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(cos_Th, sin_Th)
        ctx.dtype = x_BTHh.dtype
        return _rotated(x_BTHh, cos_Th, sin_Th).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        cos_Th, sin_Th = ctx.saved_tensors
        batch, heads, length, head_dim = grads[0].shape
        out_BTHh = cos_Th.new_empty(batch, length, heads, head_dim)
        # A rotation's transpose turns the other way.
        _turn(grads[0], cos_Th, sin_Th, out_BTHh.transpose(1, 2), sign=-1)
        return out_BTHh.to(ctx.dtype), None, None, None


def _rotated(x_BTHh: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> Tensor:
    batch, length, heads, head_dim = x_BTHh.shape
    out_BHTh = cos_Th.new_empty(batch, heads, length, head_dim)
    _turn(x_BTHh.transpose(1, 2), cos_Th, sin_Th, out_BHTh, sign=1)
    return out_BHTh


def _turn(x_BHTh: Tensor, cos_Th: Tensor, sin_Th: Tensor, out_BHTh: Tensor, sign: int) -> None:
    half = x_BHTh.shape[-1] // 2
    torch.mul(x_BHTh, cos_Th, out=out_BHTh)
    out_BHTh[..., :half].addcmul_(x_BHTh[..., half:], sin_Th[..., half:], value=-sign)
    out_BHTh[..., half:].addcmul_(x_BHTh[..., :half], sin_Th[..., :half], value=sign)
