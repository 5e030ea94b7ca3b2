"""Causal self-attention, and the cache of keys and values that decoding reads.

B batch, T positions of this call, S positions attended to, D width, H query heads,
K key/value heads, h channels of one head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_base.model.context import SplitContext
from olmo_base.model.feed_forward import INIT_STD, Linear, RMSNorm, to_matmul_dtype
from olmo_base.model.packing import Packing
from olmo_base.model.rope import rotate

MAX_BLOCKED_LENGTH = 1024  # the CPU training path keeps H*T*T/2 probabilities per row and layer


class KeyValueCache:
    """Keys and values of all layers for a batch of left-padded rows.

    Padding stands before a row, so all rows write the same slot and a step is one slice. Memory is
    taken in blocks and doubles when it is full; layers with a window keep no more than the window.
    """

    # Keys and values of all layers that every row goes on from, kept once: 2, layer, K, P, h
    beginning: Tensor | None = None

    def __init__(
        self,
        windows: Sequence[int | None],
        num_kv_heads: int,
        head_dim: int,
        padding_B: list[int],
        *,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """``windows``: how far each layer sees, None for all the way.

        ``padding_B`` is how many padding positions stand before each row.
        """
        self.length = 0  # positions read, the padding included
        self._padding = list(padding_B)
        self._padding_B = torch.tensor(padding_B, device=device) if any(padding_B) else None
        self._places: list[tuple[int | None, int]] = []  # of each layer: its store, its row there
        num_layers: dict[int | None, int] = {}
        for window in windows:
            index = num_layers.get(window, 0)
            self._places.append((window, index))
            num_layers[window] = index + 1
        self._stores = {
            window: _Store(
                window,
                torch.zeros(
                    (2, number, len(padding_B), num_kv_heads, 0, head_dim),
                    device=device,
                    dtype=dtype,
                ),
            )
            for window, number in num_layers.items()
        }
        for store in self._stores.values():
            store.reserve(capacity)

    @property
    def num_shared(self) -> int:
        """Positions of the shared beginning."""
        return 0 if self.beginning is None else self.beginning.shape[3]

    @property
    def num_rows(self) -> int:
        """Rows in the batch now."""
        return len(self._padding)

    @property
    def longest_row(self) -> int:
        """Tokens in the longest row so far, its padding not counted."""
        return self.num_shared + self.length - min(self._padding)

    @property
    def capacity(self) -> int:
        """Positions there is room for before memory grows."""
        return max(store.data.shape[4] for store in self._stores.values())

    @property
    def num_bytes(self) -> int:
        """Memory taken for keys and values."""
        return sum(store.data.nbytes for store in self._stores.values())

    def reserve(self, num_positions: int) -> None:
        """Make room for ``num_positions`` more positions."""
        for store in self._stores.values():
            store.reserve(self.length + num_positions)

    def positions(self, num_positions: int) -> Tensor:
        """Where the next tokens stand in their own rows: T, or BT if rows have padding."""
        positions_T = self._range(self.length, self.length + num_positions)
        if self._padding_B is None:
            return positions_T + self.num_shared
        return (positions_T - self._padding_B[:, None]).clamp_(min=0) + self.num_shared

    def may_attend(self, num_positions: int, window: int | None) -> Tensor | None:
        """B1TS, true where a new token may look; None where plain causality says it all.

        S are the keys that ``append`` gives to a layer that sees ``window`` far.
        """
        sees_all = window is None or self.length + num_positions <= window
        is_first = self.length == 0 and self.beginning is None
        if self._padding_B is None and (num_positions == 1 or (is_first and sees_all)):
            return None  # what is too far for a single token is no longer kept
        key_S = self._stores[window].key_positions(self.length, num_positions)
        query_T1 = self._range(self.length, self.length + num_positions)[:, None]
        allowed = key_S <= query_T1
        if window is not None:
            allowed &= key_S > query_T1 - window
        if self._padding_B is None:
            allowed = allowed[None, None]
        else:
            is_text_B11S = key_S >= self._padding_B[:, None, None, None]
            # Padding looks at itself: a row that looks nowhere would be NaN, and 0 * NaN is NaN.
            allowed = (allowed & is_text_B11S) | (key_S == query_T1)
        return F.pad(allowed, (self.num_shared, 0), value=True)

    def append(self, layer: int, k_BKTh: Tensor, v_BKTh: Tensor) -> tuple[Tensor, Tensor]:
        """Write this call's keys and values; those that the layer may look at, as BKSh."""
        keys_BKSh, values_BKSh = self.append_own(layer, k_BKTh, v_BKTh)
        if self.beginning is None:
            return keys_BKSh, values_BKSh
        first_k, first_v = self.beginning[:, layer, None].expand(-1, len(k_BKTh), -1, -1, -1)
        return torch.cat([first_k, keys_BKSh], dim=2), torch.cat([first_v, values_BKSh], dim=2)

    def append_own(self, layer: int, k_BKTh: Tensor, v_BKTh: Tensor) -> tuple[Tensor, Tensor]:
        """The same without the shared beginning."""
        window, index = self._places[layer]
        return self._stores[window].append(index, self.length, k_BKTh, v_BKTh)

    def advance(self, num_positions: int) -> None:
        """Count the positions that every layer has now written."""
        self.length += num_positions

    def keep_rows(self, rows: list[int]) -> None:
        """Only these rows stay, in this order."""
        for store in self._stores.values():
            store.keep_rows(rows, self.length)
        self._padding = [self._padding[row] for row in rows]
        if self._padding_B is not None:
            self._padding_B = self._padding_B[rows]

    def share(self, prefix: "KeyValueCache") -> None:
        """Let every row of this empty cache go on from the one row of ``prefix``, kept once.

        Rows hold what comes after it, padding before that. No layer has a window.
        """
        self.beginning = prefix._stores[None].data[:, :, 0, :, : prefix.length]

    def begin_with(self, prefix: "KeyValueCache") -> None:
        """Let every row of this empty cache begin with the one row of ``prefix``.

        Then all rows hold as many positions, padding included, as ``prefix``: what does not fit
        behind a row's padding is left out. No layer has a window.
        """
        data, ready = self._stores[None].data, prefix._stores[None].data
        for row, padding in enumerate(self._padding):
            kept = max(0, prefix.length - padding)
            data[:, :, row, :, prefix.length - kept : prefix.length] = ready[:, :, 0, :, :kept]
        self.length = prefix.length

    def join(self, other: "KeyValueCache", *, room: int) -> None:
        """Take in the rows of another cache, with room for more positions; no layer has a window.

        The shorter rows get more padding, so that all end at the same slot.
        """
        length = max(self.length, other.length)
        old = self._stores[None].data
        num_rows = self.num_rows + other.num_rows
        data = old.new_zeros((*old.shape[:2], num_rows, old.shape[3], length + room, old.shape[5]))
        padding: list[int] = []
        for cache in (self, other):
            rows, more = slice(len(padding), len(padding) + cache.num_rows), length - cache.length
            filled = cache._stores[None].data[:, :, :, :, : cache.length]
            data[:, :, rows, :, more:length] = filled
            padding += [before + more for before in cache._padding]
        self._stores[None].data = data
        self.length, self._padding = length, padding
        self._padding_B = torch.tensor(padding, device=data.device) if any(padding) else None

    def reorder_key_channels(self, order_h: Tensor) -> None:
        """Put the channels of every kept key into another order; later ones must come in it."""
        for store in self._stores.values():
            store.data[0] = store.data[0][..., order_h]
        if self.beginning is not None:  # another cache's as well, which stays as it is
            keys, values = self.beginning
            self.beginning = torch.stack([keys[..., order_h], values])

    def _range(self, start: int, end: int) -> Tensor:
        device = next(iter(self._stores.values())).data.device
        return torch.arange(start, end, device=device)


class _Store:
    """The keys and values of all layers that see equally far.

    Position p stands in slot p, or in slot p modulo the window: what is overwritten is what no
    later token may see.
    """

    def __init__(self, window: int | None, data: Tensor) -> None:
        self.window = window
        self.data = data  # keys and values, layer, B, K, S, h

    def reserve(self, num_positions: int) -> None:
        """Have slots for so many positions in all."""
        old, capacity = self.data, self.data.shape[4]
        needed = self._filled(num_positions)
        if needed <= capacity:
            return
        shape = (*old.shape[:4], self._filled(max(needed, 2 * capacity)), old.shape[5])
        self.data = old.new_zeros(shape)
        self.data[:, :, :, :, :capacity] = old

    def _filled(self, length: int) -> int:
        """Slots that ``length`` positions take."""
        return length if self.window is None else min(length, self.window)

    def key_positions(self, length: int, num_positions: int) -> Tensor:
        """Which positions the keys stand for that ``append`` gives after ``length`` others, S."""
        device, window = self.data.device, self.window
        if window is not None and num_positions == 1:
            slot_S = torch.arange(self._filled(length + 1), device=device)
            return length - (length - slot_S) % window
        first = 0 if window is None else max(0, length - window + 1)
        return torch.arange(first, length + num_positions, device=device)

    def append(
        self, index: int, length: int, k_BKTh: Tensor, v_BKTh: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write after ``length`` positions; the keys and values to look at, as BKSh."""
        (keys_BKSh, values_BKSh), window = self.data[:, index], self.window
        num_positions = k_BKTh.shape[2]
        end = length + num_positions
        if window is None or num_positions == 1:
            start = length if window is None else length % window
            keys_BKSh[:, :, start : start + num_positions] = k_BKTh
            values_BKSh[:, :, start : start + num_positions] = v_BKTh
            filled = self._filled(end)
            return keys_BKSh[:, :, :filled], values_BKSh[:, :, :filled]
        before = torch.arange(max(0, length - window + 1), length, device=self.data.device) % window
        seen = (
            torch.cat([keys_BKSh[:, :, before], k_BKTh], dim=2),
            torch.cat([values_BKSh[:, :, before], v_BKTh], dim=2),
        )
        kept = min(num_positions, window)
        slots = torch.arange(end - kept, end, device=self.data.device) % window
        keys_BKSh[:, :, slots] = k_BKTh[:, :, -kept:]
        values_BKSh[:, :, slots] = v_BKTh[:, :, -kept:]
        return seen

    def keep_rows(self, rows: list[int], length: int) -> None:
        """Only these rows stay, in this order."""
        moved = [new for new, old in enumerate(rows) if new != old]
        if moved:  # rows that stay in place are not copied
            source = [rows[new] for new in moved]
            filled = self._filled(length)
            self.data[:, :, moved, :, :filled] = self.data[:, :, source, :, :filled]
        self.data = self.data[:, :, : len(rows)]


class SharedPrefix:
    """Keys and values of a beginning that all rows of later batches share: read once, as one row.

    The first pass through the layers is kept; those after it look at what was kept as well.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []

    def append(self, layer: int, k_BKTh: Tensor, v_BKTh: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that a row may look at, as BKSh."""
        if layer == len(self._layers):
            self._layers.append((k_BKTh, v_BKTh))
            return k_BKTh, v_BKTh
        kept_k, kept_v = (kept.expand(len(k_BKTh), -1, -1, -1) for kept in self._layers[layer])
        return torch.cat([kept_k, k_BKTh], dim=2), torch.cat([kept_v, v_BKTh], dim=2)


@dataclass(frozen=True)
class Tree:
    """Rows that are not plain texts: several continuations may stand side by side in one.

    ``may_attend`` is B1TS, S being the prefix and then the row; None for plain causality.
    """

    positions_BT: Tensor  # in the text that each token belongs to
    length: int  # of the longest such text
    may_attend: Tensor | None
    prefix: SharedPrefix | None = None

    def sees(self, window: int | None) -> Tensor | None:
        """``may_attend`` in layers with a window, which counts positions of a text."""
        if self.may_attend is None or window is None or window >= self.length:
            return self.may_attend
        batch, num_positions = self.positions_BT.shape
        num_before = self.may_attend.shape[-1] - num_positions
        before_BP = torch.arange(num_before, device=self.positions_BT.device).expand(batch, -1)
        keys_BS = torch.cat([before_BP, self.positions_BT], dim=-1)
        is_near_BTS = self.positions_BT[:, :, None] - keys_BS[:, None] < window
        return self.may_attend & is_near_BTS[:, None]


class Sight(NamedTuple):
    """What layers that see equally far share: how positions turn, and who sees whom."""

    rotation: tuple[Tensor, Tensor]  # cosines and sines, Th or B1Th
    may_attend: Tensor | None  # B1TS; None for plain causality
    window: int | None = None  # for a kernel, which takes no mask


class Attention(nn.Module):
    """Multi-head attention with fewer key/value heads if asked (GQA), RoPE, and QK-norm.

    The norm covers the whole query and the whole key vector, before the heads are split and before
    RoPE (OLMo-2, arXiv:2501.00656, 3.3). Query, key and value stay three maps: a fused one made
    no difference to a CPU (4 % faster to 4 % slower at widths 128 and 256).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        qk_norm_eps: float | None,
        clip_qkv: float | None = None,
        init_std: float = INIT_STD,
        out_init_std: float = INIT_STD,
    ) -> None:
        """``qk_norm_eps`` None leaves the norm out; ``clip_qkv`` cuts queries, keys and values."""
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = hidden_size // num_heads
        self.clip_qkv = clip_qkv
        kv_size = num_kv_heads * self.head_dim
        self.q_proj = Linear(hidden_size, hidden_size, init_std)
        self.k_proj = Linear(hidden_size, kv_size, init_std)
        self.v_proj = Linear(hidden_size, kv_size, init_std)
        self.o_proj = Linear(hidden_size, hidden_size, out_init_std)
        self.q_norm = _qk_norm(hidden_size, qk_norm_eps)
        self.k_norm = _qk_norm(kv_size, qk_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        may_attend: Tensor | None,
        cache: KeyValueCache | SharedPrefix | SplitContext | None,
        layer: int,
    ) -> Tensor:
        """BTD to BTD. ``may_attend`` is B1TS or None for plain causality."""
        x_BTD = to_matmul_dtype(x_BTD)
        v_BTD = self._clipped(self.v_proj(x_BTD))
        # Nested, so that nothing before the rotation stays in memory through attention.
        return self.o_proj(
            self.mix(
                self.q_norm(self._clipped(self.q_proj(x_BTD))),
                self.k_norm(self._clipped(self.k_proj(x_BTD))),
                v_BTD,
                Sight(rotation, may_attend),
                cache,
                layer,
            )
        )

    def packed(
        self,
        x_ND: Tensor,
        packing: Packing,
        sights: Sequence[Sight],
        wanted_L: Tensor | None = None,
    ) -> Tensor:
        """ND to ND: rows laid end to end, each group of them with its ``Sight``.

        A kernel has one for all. LD where only some positions' results are ``wanted``.
        """
        x_ND = to_matmul_dtype(x_ND)
        v_ND = self._clipped(self.v_proj(x_ND))
        mixed_ND = self.mix_rows(
            self.q_norm(self._clipped(self.q_proj(x_ND))),
            self.k_norm(self._clipped(self.k_proj(x_ND))),
            v_ND,
            packing,
            sights,
        )
        return self.o_proj(mixed_ND if wanted_L is None else mixed_ND.index_select(0, wanted_L))

    def mix_rows(
        self, q_ND: Tensor, k_ND: Tensor, v_ND: Tensor, packing: Packing, sights: Sequence[Sight]
    ) -> Tensor:
        """Each position's mix of the values of its own row, ND."""
        if packing.kernel is not None:
            (sight,) = sights
            v_NKh = self._heads(v_ND)
            q_NHh, k_NKh = (
                rotate(self._heads(x_ND)[None], *sight.rotation, v_ND.dtype)[0].transpose(0, 1)
                for x_ND in (q_ND, k_ND)
            )
            scale = self.head_dim**-0.5
            starts, longest = packing.row_starts, packing.longest
            return packing.kernel.attend(
                q_NHh, k_NKh, v_NKh, starts, longest, scale, sight.window
            ).flatten(1)
        parts = zip(*map(packing.apart, (q_ND, k_ND, v_ND)), sights, strict=True)
        mixed = [self.mix(q_BTD, k_BTD, v_BTD, sight) for q_BTD, k_BTD, v_BTD, sight in parts]
        return packing.together(mixed)

    def mix(
        self,
        q_BTD: Tensor,
        k_BTD: Tensor,
        v_BTD: Tensor,
        sight: Sight,
        cache: KeyValueCache | SharedPrefix | SplitContext | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Each position's mix of the values that it may look at, BTD."""
        v_BKTh = self._heads(v_BTD).transpose(1, 2)
        q_BHTh = rotate(self._heads(q_BTD), *sight.rotation, v_BKTh.dtype)
        k_BKTh = rotate(self._heads(k_BTD), *sight.rotation, v_BKTh.dtype)
        if isinstance(cache, SplitContext):
            mixed_BHTh = cache.attend(q_BHTh, k_BKTh, v_BKTh, sight.may_attend)
            return mixed_BHTh.transpose(1, 2).flatten(2)
        is_causal = sight.may_attend is None and q_BTD.shape[1] > 1
        if cache is not None:
            k_BKTh, v_BKTh = cache.append(layer, k_BKTh, v_BKTh)
        mixed_BHTh = attend(q_BHTh, k_BKTh, v_BKTh, sight.may_attend, is_causal=is_causal)
        return mixed_BHTh.transpose(1, 2).flatten(2)

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_dim))

    def _clipped(self, x_BTD: Tensor) -> Tensor:
        return x_BTD if self.clip_qkv is None else x_BTD.clamp(-self.clip_qkv, self.clip_qkv)


def _qk_norm(width: int, eps: float | None) -> nn.Module:
    return nn.Identity() if eps is None else RMSNorm(width, eps)


def window_mask(num_positions: int, window: int | None, device: torch.device) -> Tensor | None:
    """TT, true where a position may look: itself and the ``window - 1`` before it.

    None where plain causality says the same.
    """
    if window is None or window >= num_positions:
        return None
    return (
        torch.ones(num_positions, num_positions, dtype=torch.bool, device=device)
        .tril_()
        .triu_(1 - window)
    )


def attend(
    q_BHTh: Tensor, k_BKSh: Tensor, v_BKSh: Tensor, may_attend: Tensor | None, *, is_causal: bool
) -> Tensor:
    """Each position's mix of the values that it may look at, BHTh.

    ``may_attend`` (B1TS or 11TS, true where a position may look) holds the whole rule; without it
    ``is_causal`` says whether a position sees only what is not after it.
    """
    num_positions = q_BHTh.shape[2]
    is_training = torch.is_grad_enabled() and q_BHTh.requires_grad
    if q_BHTh.device.type == "cpu" and is_training and num_positions <= MAX_BLOCKED_LENGTH:
        groups = q_BHTh.shape[1] // k_BKSh.shape[1]
        if groups > 1:
            k_BKSh = k_BKSh.repeat_interleave(groups, dim=1)
            v_BKSh = v_BKSh.repeat_interleave(groups, dim=1)
        return _BlockedAttention.apply(q_BHTh, k_BKSh, v_BKSh, may_attend)
    return F.scaled_dot_product_attention(
        q_BHTh,
        k_BKSh,
        v_BKSh,
        attn_mask=may_attend,
        is_causal=is_causal,
        enable_gqa=q_BHTh.shape[1] != k_BKSh.shape[1],
    )


class _BlockedAttention(torch.autograd.Function):
    """Causal softmax attention over blocks of queries, each seeing only the keys up to its end.

    torch's CPU flash kernel spends most of a short-context training step in its backward pass;
    plain batched products over cache-sized blocks take 75 % of its time in fp32 and half in bf16.
    N is batch times heads, b the queries of a block, s the keys they see.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BHTh: Tensor, k_BHTh: Tensor, v_BHTh: Tensor, may_attend: Tensor | None
    ) -> Tensor:
        batch, heads, length, head_dim = q_BHTh.shape
        q_NTh, k_NTh, v_NTh = (x.reshape(-1, length, head_dim) for x in (q_BHTh, k_BHTh, v_BHTh))
        q_NTh = q_NTh * head_dim**-0.5
        mixed_BTHh = q_NTh.new_empty(batch, length, heads, head_dim)
        block = _block_size(q_NTh)
        future = torch.full((block, block), -math.inf, dtype=q_NTh.dtype).triu_(1)
        probabilities = []
        for start in range(0, length, block):
            end = min(start + block, length)
            scores_Nbs = torch.bmm(q_NTh[:, start:end], k_NTh[:, :end].transpose(1, 2))
            if may_attend is None:
                scores_Nbs[:, :, start:].add_(future[: end - start, : end - start])
            else:
                scores_BHbs = scores_Nbs.view(batch, heads, end - start, end)
                scores_BHbs.masked_fill_(~may_attend[:, :, start:end, :end], -math.inf)
            probabilities.append(torch.softmax(scores_Nbs, -1))
            mixed_Nbh = torch.bmm(probabilities[-1], v_NTh[:, :end])
            mixed_BTHh[:, start:end] = mixed_Nbh.view(batch, heads, -1, head_dim).transpose(1, 2)
        ctx.save_for_backward(q_NTh, k_NTh, v_NTh, *probabilities)
        ctx.shape = q_BHTh.shape
        return mixed_BTHh.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        q_NTh, k_NTh, v_NTh, *probabilities = ctx.saved_tensors
        length = q_NTh.shape[1]
        grad_NTh = grads[0].reshape(q_NTh.shape)
        dq_NTh = torch.empty_like(q_NTh)
        block = _block_size(q_NTh)
        # The last block sees all keys, so its gradients are what the others' are added to.
        for start, probabilities_Nbs in reversed(
            list(zip(range(0, length, block), probabilities, strict=True))
        ):
            end = min(start + block, length)
            grad_Nbh = grad_NTh[:, start:end]
            dv_Nsh = torch.bmm(probabilities_Nbs.transpose(1, 2), grad_Nbh)
            dp_Nbs = torch.bmm(grad_Nbh, v_NTh[:, :end].transpose(1, 2))
            ds_Nbs = torch._softmax_backward_data(
                dp_Nbs, probabilities_Nbs, -1, probabilities_Nbs.dtype
            )
            dq_NTh[:, start:end] = torch.bmm(ds_Nbs, k_NTh[:, :end])
            dk_Nsh = torch.bmm(ds_Nbs.transpose(1, 2), q_NTh[:, start:end])
            if end == length:
                dk_NTh, dv_NTh = dk_Nsh, dv_Nsh
            else:
                dk_NTh[:, :end] += dk_Nsh
                dv_NTh[:, :end] += dv_Nsh
        dq_NTh.mul_(q_NTh.shape[-1] ** -0.5)
        return dq_NTh.view(ctx.shape), dk_NTh.view(ctx.shape), dv_NTh.view(ctx.shape), None


def _block_size(q_NTh: Tensor) -> int:
    return 64 if q_NTh.dtype == torch.float32 else 128
