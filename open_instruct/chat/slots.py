"""Where the keys and values of rows are, and what is kept of prompts for those that begin alike.

B rows of a call, T positions, N = B times K, S slots of a row, K key/value heads, h channels.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from olmo_base.model.attention import KeyValueCache

CHUNK = 64  # tokens of a prompt read in one call; a shared prefix is kept in such pieces
PREFIX_BYTES = 256 * 2**20  # keys and values of prompts kept for those that begin alike

Layers = list[tuple[Tensor, Tensor]]  # keys and values of each layer, BKSh


# ---------------------------------------------------------------- where keys and values are


class Slots:
    """Keys and values of up to ``num_rows`` rows. Memory is taken when the first are written."""

    def __init__(self, num_rows: int, span: int) -> None:
        self.num_rows = num_rows
        self.span = span
        self.layers: Layers = []

    def write(self, layer: int, start: int, k_1KTh: Tensor, v_1KTh: Tensor) -> None:
        """Put new keys and values behind the first ``start`` positions of the first row."""
        end = start + k_1KTh.shape[2]
        keys_BKSh, values_BKSh = self._layer(layer, k_1KTh, v_1KTh)
        keys_BKSh[0, :, start:end] = k_1KTh[0]
        values_BKSh[0, :, start:end] = v_1KTh[0]

    def write_one_each(self, layer: int, places_N: Tensor, k_BK1h: Tensor, v_BK1h: Tensor) -> None:
        """Put one position of each row at its place of ``places_of``."""
        keys_BKSh, values_BKSh = self._layer(layer, k_BK1h, v_BK1h)
        keys_BKSh.view(-1, keys_BKSh.shape[3]).index_copy_(0, places_N, k_BK1h.flatten(0, 2))
        values_BKSh.view(-1, values_BKSh.shape[3]).index_copy_(0, places_N, v_BK1h.flatten(0, 2))

    def places_of(self, positions_B: Tensor, num_heads: int) -> Tensor:
        """Where a position of each row and head is among all slots, counted through the rows."""
        heads_BK = torch.arange(len(positions_B) * num_heads, device=positions_B.device)
        return heads_BK * self.span + positions_B.repeat_interleave(num_heads)

    def _layer(self, layer: int, k_BKTh: Tensor, v_BKTh: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.layers):
            shapes = [(self.num_rows, x.shape[1], self.span, x.shape[3]) for x in (k_BKTh, v_BKTh)]
            self.layers.append((k_BKTh.new_zeros(shapes[0]), v_BKTh.new_zeros(shapes[1])))
        return self.layers[layer]

    def part(self, first: int, num_rows: int) -> "Slots":
        """Some of the rows, in the same memory."""
        if num_rows == self.num_rows:
            return self
        part = Slots(num_rows, self.span)
        rows = slice(first, first + num_rows)
        part.layers = [(keys[rows], values[rows]) for keys, values in self.layers]
        return part

    def grown(self, num_rows: int, num_kept: int) -> "Slots":
        """Room for more rows, and in it the first ``num_kept`` of these."""
        grown = Slots(num_rows, self.span)
        for layer, (keys_BKSh, values_BKSh) in enumerate(self.layers):
            new_keys_BKSh, new_values_BKSh = grown._layer(layer, keys_BKSh, values_BKSh)
            new_keys_BKSh[:num_kept] = keys_BKSh[:num_kept]
            new_values_BKSh[:num_kept] = values_BKSh[:num_kept]
        return grown

    def copy_row(self, row: int, source: "Slots", source_row: int, length: int) -> None:
        """Take over the first ``length`` positions of another row."""
        if not self.layers:
            self.layers = [
                (
                    keys.new_zeros((self.num_rows, keys.shape[1], self.span, keys.shape[3])),
                    values.new_zeros((self.num_rows, values.shape[1], self.span, values.shape[3])),
                )
                for keys, values in source.layers
            ]
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            for new_BKSh, old_BKSh in zip(mine, theirs, strict=True):
                new_BKSh[row, :, :length] = old_BKSh[source_row, :, :length]


class View(KeyValueCache):
    """What one call of a model sees of the slots, in the shape of our model's cache."""

    def __init__(
        self, slots: Slots, starts: Sequence[int], num_positions: int, span: int, device: Any
    ) -> None:
        self.slots = slots
        self.starts = starts
        self.length = span - num_positions  # how far the table of rotations must reach
        self.span = span
        starts_B1 = torch.tensor(starts, device=device)[:, None]
        self.positions_BT = starts_B1 + torch.arange(num_positions, device=device)
        self.masks: dict[int | None, Tensor] = {}
        self.places: dict[int, Tensor] = {}  # by the number of heads, of rows with one token each

    @property
    def num_rows(self) -> int:
        """Rows of this call."""
        return len(self.starts)

    @property
    def longest_row(self) -> int:
        """Positions that the longest row holds before this call."""
        return max(self.starts)

    def reserve(self, num_positions: int) -> None:
        """Slots are made with all the room they need."""

    def positions(self, num_positions: int) -> Tensor:
        """See KeyValueCache."""
        return self.positions_BT

    def may_attend(self, num_positions: int, window: int | None = None) -> Tensor:
        """See KeyValueCache. Of a layer with a ``window`` too all positions are kept."""
        if window not in self.masks:
            key_S = torch.arange(self.span, device=self.positions_BT.device)
            position_B1T1 = self.positions_BT[:, None, :, None]
            mask_B1TS = key_S <= position_B1T1
            if window is not None:
                mask_B1TS &= key_S > position_B1T1 - window
            self.masks[window] = mask_B1TS
        return self.masks[window]

    def append(self, layer: int, k_BKTh: Tensor, v_BKTh: Tensor) -> tuple[Tensor, Tensor]:
        """See KeyValueCache."""
        num_heads = k_BKTh.shape[1]
        if k_BKTh.shape[2] > 1:
            self.slots.write(layer, self.starts[0], k_BKTh, v_BKTh)
        else:
            if num_heads not in self.places:
                self.places[num_heads] = self.slots.places_of(self.positions_BT[:, 0], num_heads)
            self.slots.write_one_each(layer, self.places[num_heads], k_BKTh, v_BKTh)
        keys_BKSh, values_BKSh = self.slots.layers[layer]
        rows = len(self.starts)
        return keys_BKSh[:rows, :, : self.span], values_BKSh[:rows, :, : self.span]

    def advance(self, num_positions: int) -> None:
        """Rows count their own positions."""

    def keep_rows(self, rows: list[int]) -> None:
        """Rows leave through SlotBatch."""
        raise AssertionError("a view lives for one call")


# ---------------------------------------------------------------- prompts that begin alike


class Prefixes:
    """Keys and values of whole chunks at the beginning of prompts; those long unused go first."""

    def __init__(self, max_bytes: int = PREFIX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._chunks: OrderedDict[bytes, Layers] = OrderedDict()

    def fill(self, slots: Slots, keys: Sequence[bytes], length: int) -> int:
        """Write the known beginning of a prompt; how many positions. Its last is never known."""
        position = 0
        for key in keys:
            if key not in self._chunks or position + CHUNK >= length:
                break
            self._chunks.move_to_end(key)
            for layer, (k_BKTh, v_BKTh) in enumerate(self._chunks[key]):
                slots.write(layer, position, k_BKTh, v_BKTh)
            position += CHUNK
        return position

    def keep(self, key: bytes, slots: Slots, start: int) -> None:
        """Keep one chunk that was just read."""
        chunk = [
            (keys[:, :, start : start + CHUNK].clone(), values[:, :, start : start + CHUNK].clone())
            for keys, values in slots.layers
        ]
        if key not in self._chunks:
            self._chunks[key] = chunk
            self.num_bytes += _num_bytes(chunk)
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= _num_bytes(self._chunks.popitem(last=False)[1])


def chunk_names(prompt: Sequence[int]) -> list[bytes]:
    """A name for each whole chunk that stands for all ids up to its end."""
    names, name = [], b""
    for end in range(CHUNK, len(prompt) + 1, CHUNK):
        name = hashlib.sha256(name + array("q", prompt[end - CHUNK : end]).tobytes()).digest()
        names.append(name)
    return names


def _num_bytes(layers: Layers) -> int:
    return sum(part.numel() * part.element_size() for layer in layers for part in layer)
