"""Rows that are decoded together, joining and leaving at any step, each as if it were alone.

A prompt -> chunks of a fixed grid, read one after the other -> a row of keys and values -> a slot
in a batch -> one token a step.

The logits of a row are the same to the last bit whatever runs beside it. Matrix products give a
row other last digits when their shape changes, so every shape here follows from the row alone:
prompts are read by themselves on a grid of CHUNK tokens, the keys of a step are padded to a span
that follows from the row's length, and steps are padded to a number of rows at which this machine
was seen to give the same result as at any other number in use (``stable_sizes``).

B rows of a call, T positions, S slots of a row, K key/value heads, h channels, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from olmo_base.model.decode import LaidOutWeights, is_fast_alone
from olmo_base.model.generate import Generator
from olmo_base.model.transformer import Transformer
from open_instruct.chat.slots import CHUNK, Prefixes, Slots, View, chunk_names

FIRST_SPAN = 64  # slots of a short row; a longer row moves to twice as many, and so on
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # rows that a step may be padded to
MAX_ROWS = SIZES[-1]
TOLERANCE = 1e-3  # logits of two ways through one model, relative to the largest: fp32 gives 1e-6

# ---------------------------------------------------------------- the kinds of model

Forward = Callable[[Tensor, View], Tensor]  # ids_BT -> logits after the last position, BV


def native_forward(model: Transformer) -> Forward:
    """Our model, on slots."""

    def forward(ids_BT: Tensor, view: View) -> Tensor:
        return model.logits(model(ids_BT, cache=view)[:, -1])

    return forward


def laid_out_forward(model: Transformer) -> Forward:
    """Our model on a CPU in fp32, by a copy of its weights that is laid out for few rows."""
    return LaidOutWeights(model, MAX_ROWS).logits_after


def transformers_forward(model: Any) -> Forward:
    """A transformers model whose layers all look at the whole past, on slots."""
    from transformers import Cache  # heavy; our own model needs none of it
    from transformers.cache_utils import CacheLayerMixin

    class SlotLayer(CacheLayerMixin):
        is_sliding = False

        def __init__(self, view: View, layer: int) -> None:
            super().__init__()
            self.view, self.layer = view, layer

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            self.is_initialized = True

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            return self.view.append(self.layer, key_states, value_states)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.view.span, 0

        def get_seq_length(self) -> int:
            return self.view.length

        def get_max_length(self) -> int:
            return self.view.span

    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers

    def forward(ids_BT: Tensor, view: View) -> Tensor:
        outputs = model(
            input_ids=ids_BT,
            attention_mask=view.may_attend(ids_BT.shape[1]),
            position_ids=view.positions_BT,
            past_key_values=Cache(layers=[SlotLayer(view, layer) for layer in range(num_layers)]),
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1]

    return forward


# ---------------------------------------------------------------- batches


class Reading(Protocol):
    """A prompt that is being read."""

    def advance(self) -> Tensor | None:
        """Read one chunk; the logits after the whole prompt, V, once it is read."""


class Batch(Protocol):
    """Rows on their way through a model. A row is whatever ``join`` returned for it."""

    stable_sizes: tuple[int, ...]
    num_reused: int  # prompt tokens whose keys and values were kept from an earlier prompt

    def read(self, prompt: Sequence[int]) -> Reading:
        """Begin to read a prompt."""

    def join(self, reading: Any, copies: int) -> list[Any]:
        """Rows that go on from a prompt that was read to its end."""

    def step(self, next_ids: dict[Any, int]) -> tuple[list[Any], Tensor]:
        """Read one more token of every row: the rows in some order, the logits after each, RV."""

    def leave(self, row: Any) -> None:
        """The row is finished."""

    def clear(self) -> None:
        """Forget all rows and kept prompts: after an error none of them can be trusted."""


class SlotRow:
    """A row of a SlotBatch: where it is, and how many tokens it holds."""

    def __init__(self, span: int, place: int, length: int) -> None:
        self.span, self.place, self.length = span, place, length


class SlotReading:
    """A prompt on its way into slots of its own."""

    def __init__(self, batch: "SlotBatch", prompt: Sequence[int]) -> None:
        self.batch = batch
        self.prompt = list(prompt)
        self.slots = Slots(1, batch.span_of(len(prompt)))
        self.keys = chunk_names(self.prompt)  # names of its chunks
        self.position = batch.prefixes.fill(self.slots, self.keys, len(self.prompt))
        batch.num_reused += self.position

    def advance(self) -> Tensor | None:
        """See Reading."""
        start, end = self.position, min(self.position + CHUNK, len(self.prompt))
        device = self.batch.device
        ids_1T = torch.tensor([self.prompt[start:end]], device=device)
        logits_1V = self.batch.forward(ids_1T, View(self.slots, [start], end - start, end, device))
        if end - start == CHUNK:
            self.batch.prefixes.keep(self.keys[start // CHUNK], self.slots, start)
        self.position = end
        return logits_1V[0] if end == len(self.prompt) else None


class SlotBatch:
    """Rows in slots: those of one span are one call of the model."""

    def __init__(self, forward: Forward, max_length: int, device: torch.device) -> None:
        self.forward = forward
        self.max_length = max_length
        self.device = device
        self.prefixes = Prefixes()
        self.num_reused = 0
        self.groups: dict[int, tuple[Slots, list[SlotRow]]] = {}
        self.stable_sizes: tuple[int, ...] = SIZES

    def span_of(self, length: int) -> int:
        """Slots for a row of this length."""
        span = FIRST_SPAN
        while span < length:
            span *= 2
        return min(span, max(self.max_length, length))

    def read(self, prompt: Sequence[int]) -> SlotReading:
        """See Batch."""
        return SlotReading(self, prompt)

    def join(self, reading: SlotReading, copies: int = 1) -> list[SlotRow]:
        """See Batch."""
        length = len(reading.prompt)
        return [self._place(reading.slots, 0, length) for _ in range(copies)]

    def _place(self, source: Slots, source_row: int, length: int) -> SlotRow:
        """A row of its own for ``length`` positions of another, with room for one more."""
        span = self.span_of(length + 1)
        slots, rows = self.groups.get(span) or (Slots(0, span), [])
        needed = self._padded(len(rows) + 1)
        if slots.num_rows < needed:
            slots = slots.grown(needed, len(rows))
        row = SlotRow(span, len(rows), length)
        slots.copy_row(row.place, source, source_row, length)
        self.groups[span] = (slots, [*rows, row])
        return row

    def _padded(self, num_rows: int) -> int:
        """Rows to compute, or to have memory for: whole blocks, the last one of any stable size."""
        largest = self.stable_sizes[-1]
        whole = (num_rows - 1) // largest * largest
        return whole + next(size for size in self.stable_sizes if size >= num_rows - whole)

    def step(self, next_ids: dict[SlotRow, int]) -> tuple[list[SlotRow], Tensor]:
        """See Batch."""
        for row in next_ids:
            if row.length == row.span:  # full: its next token needs a longer span
                moved = self._place(self.groups[row.span][0], row.place, row.length)
                self.leave(row)
                row.span, row.place = moved.span, moved.place
                self.groups[row.span][1][row.place] = row
        stepped: list[SlotRow] = []
        logits: list[Tensor] = []
        for span, (slots, rows) in self.groups.items():
            if not rows:
                continue
            for first in range(0, len(rows), self.stable_sizes[-1]):
                block = rows[first : first + self.stable_sizes[-1]]
                size = self._padded(len(block))
                padding = [0] * (size - len(block))
                ids_B = torch.tensor([next_ids[row] for row in block] + padding)
                starts = [row.length for row in block] + padding
                view = View(slots.part(first, size), starts, 1, span, self.device)
                logits_BV = self.forward(ids_B[:, None].to(self.device), view)
                for row in block:
                    row.length += 1
                stepped += block
                logits.append(logits_BV[: len(block)])
        return stepped, logits[0] if len(logits) == 1 else torch.cat(logits)

    def leave(self, row: SlotRow) -> None:
        """See Batch. The last row of the group takes the place."""
        slots, rows = self.groups[row.span]
        last = rows.pop()
        if last is not row:
            slots.copy_row(row.place, slots, last.place, last.length)
            last.place = row.place
            rows[last.place] = last
        if not rows and row.span > FIRST_SPAN:
            del self.groups[row.span]  # long rows are rare and large

    def clear(self) -> None:
        """See Batch."""
        self.groups.clear()
        self.prefixes = Prefixes()


class AloneReading:
    """A prompt on its way into a cache of the model's own kind."""

    def __init__(self, batch: "AloneBatch", prompt: Sequence[int]) -> None:
        from transformers import DynamicCache  # heavy; our own model needs none of it

        self.batch = batch
        self.prompt = prompt
        self.cache: Any = DynamicCache(config=batch.model.config.get_text_config(decoder=True))

    def advance(self) -> Tensor | None:
        """See Reading. The whole prompt at once: not every cache can go on in the middle."""
        return self.batch.call(self.prompt, self.cache)


class AloneRow:
    """A row of an AloneBatch."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache


class AloneBatch:
    """Each row by itself: for models that keep more than the keys and values of all positions."""

    stable_sizes: tuple[int, ...] = (1,)
    num_reused = 0

    def __init__(self, model: Any) -> None:
        self.model = model

    def call(self, ids: Sequence[int], cache: Any) -> Tensor:
        """Logits after the ids, V."""
        ids_1T = torch.tensor([list(ids)], device=self.model.device)
        return self.model(input_ids=ids_1T, past_key_values=cache, use_cache=True).logits[0, -1]

    def read(self, prompt: Sequence[int]) -> AloneReading:
        """See Batch."""
        return AloneReading(self, prompt)

    def join(self, reading: AloneReading, copies: int = 1) -> list[AloneRow]:
        """See Batch."""
        others = [AloneRow(copy.deepcopy(reading.cache)) for _ in range(copies - 1)]
        return [AloneRow(reading.cache), *others]

    def step(self, next_ids: dict[AloneRow, int]) -> tuple[list[AloneRow], Tensor]:
        """See Batch."""
        logits = [self.call([id_], row.cache) for row, id_ in next_ids.items()]
        return list(next_ids), torch.stack(logits)

    def leave(self, row: AloneRow) -> None:
        """See Batch."""

    def clear(self) -> None:
        """See Batch."""


# ---------------------------------------------------------------- which batch fits a model


def new_batch(generator: Generator) -> Batch:
    """The batch for a model: in slots if it was seen to give the model's own logits there."""
    if isinstance(generator.model, Transformer):
        model = generator.model
        forward = laid_out_forward(model) if is_fast_alone(model) else native_forward(model)
        batch = SlotBatch(forward, generator.max_length, model.device)
    else:
        if not _sees_everything(generator):
            return AloneBatch(generator.model)
        forward = transformers_forward(generator.model)
        batch = SlotBatch(forward, generator.max_length, generator.model.device)
        if not _gives_own_logits(batch, generator):
            return AloneBatch(generator.model)
    batch.stable_sizes = find_stable_sizes(batch, generator.vocab_size)
    return batch


def _sees_everything(generator: Generator) -> bool:
    """Whether every layer is attention to all of the past, by what the configuration says."""
    config = generator.model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    is_narrow = isinstance(window, int) and window < generator.max_length
    if getattr(config, "layer_types", None) is not None:
        return kinds == {"full_attention"} or (
            kinds <= {"full_attention", "sliding_attention"} and not is_narrow
        )
    return not is_narrow


def _gives_own_logits(batch: SlotBatch, generator: Generator) -> bool:
    """Whether slots give the logits of a plain call. Other kinds of cache fail in many ways."""
    prompt = _some_ids(generator.vocab_size, 12, seed=0)
    try:
        reading = batch.read(prompt[:-2])
        reading.advance()
        row, _ = batch.join(reading, 2)
        other = batch.groups[row.span][1][1]
        batch.step({row: prompt[-2], other: prompt[-1]})
        rows, logits_RV = batch.step({row: prompt[-1], other: prompt[-2]})
        found_V = logits_RV[rows.index(row)]
        expected_V = generator.model(torch.tensor([prompt], device=batch.device)).logits[0, -1]
        batch.leave(row)
        batch.leave(other)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError):
        return False
    largest = expected_V.float().abs().max().clamp(min=1e-3)
    tolerance = TOLERANCE if expected_V.dtype == torch.float32 else 0.1
    return bool((found_V - expected_V).float().abs().max() <= tolerance * largest)


def find_stable_sizes(batch: SlotBatch, vocab_size: int) -> tuple[int, ...]:
    """The sizes of a step at which a row's logits are the same to the last bit.

    At each size the same few rows are stepped in different places beside each other. Sizes that
    disagree with themselves are left out; of the rest the largest set that agrees is taken.
    """
    num_kinds = 3
    readings = []
    for kind in range(num_kinds):
        reading = batch.read(_some_ids(vocab_size, 5 + 3 * kind, seed=1 + kind))
        reading.advance()
        readings.append(reading)
    agreeing: list[tuple[Tensor, list[int]]] = []
    span = batch.span_of(1)
    slots = Slots(MAX_ROWS, span)
    for place in range(MAX_ROWS):
        kind = place % num_kinds
        slots.copy_row(place, readings[kind].slots, 0, len(readings[kind].prompt))
    lengths = [len(readings[place % num_kinds].prompt) for place in range(MAX_ROWS)]
    for size in SIZES:
        seen: list[list[Tensor]] = [[] for _ in range(num_kinds)]
        for first in range(num_kinds if size < num_kinds else 1):
            starts = lengths[first : first + size]
            ids_B1 = torch.tensor(
                [[1 + (first + place) % num_kinds] for place in range(size)], device=batch.device
            )
            view = View(slots.part(first, size), starts, 1, span, batch.device)
            logits_BV = batch.forward(ids_B1, view)
            for place in range(size):
                seen[(first + place) % num_kinds].append(logits_BV[place])
        if not all(torch.equal(one, same[0]) for same in seen for one in same):
            continue
        result = torch.stack([same[0] for same in seen])
        for known, sizes in agreeing:
            if torch.equal(known, result):
                sizes.append(size)
                break
        else:
            agreeing.append((result, [size]))
    best = max((sizes for _, sizes in agreeing), key=lambda sizes: (len(sizes), sizes[-1]))
    return tuple(best)


def _some_ids(vocab_size: int, number: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (number,), generator=generator).tolist()
