"""Tokenised examples become the micro-batches of optimizer steps.

Examples -> a seeded order, epoch after epoch -> steps -> each rank's share -> micro-batches of
similar length -> padded tensors, and where each token stands once padding is left out. Everything
is a pure function of (lengths, seed, step, rank), so a resumed run and every rank know what all the
others do without asking them.
"""

# N examples of a set; W rows of one example (1 dialogue, or 2 answers of a pair: chosen, rejected)
# S sequences of a micro-batch in its R rows: one in each, or a pair that shares its prompt
# T positions of the longest row; L label tokens

import copy
import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from olmo_base.model.packing import Branches, Group, Packing


class Row(Protocol):
    """One tokenised sequence: its ids, and for each id whether the model learns to predict it."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def is_learnt(self) -> list[bool]: ...


# ---------------------------------------------------------------- examples


class Examples:
    """Tokenised examples of W rows each, held as flat arrays.

    The first id of a row is never a label: nothing stands before it to predict it from.
    """

    def __init__(self, rows_per_example: Sequence[Sequence[Row]]) -> None:
        widths = {len(rows) for rows in rows_per_example} or {1}
        assert len(widths) == 1, f"examples of one set differ in their number of rows: {widths}"
        self.width = widths.pop()
        rows = [row for rows in rows_per_example for row in rows]
        self._ids = [np.asarray(row.ids, dtype=np.int64) for row in rows]
        self._labels = [np.flatnonzero(row.is_learnt[1:]) + 1 for row in rows]  # positions in ids
        row_lengths = np.array([len(ids) for ids in self._ids], dtype=np.int64)
        row_labels = np.array([len(labels) for labels in self._labels], dtype=np.int64)
        self.lengths_NW = row_lengths.reshape(-1, self.width)
        self.num_labels_NW = row_labels.reshape(-1, self.width)
        # How many ids the two of a pair begin with alike, where the model reads those once.
        self._common_N: np.ndarray | None = None

    def sharing_prompts(self) -> "Examples":
        """The same pairs, each read by the model as one row: prompt, chosen and rejected answer.

        All ids that both sequences begin with stand in it once, whether the prompt's or not.
        """
        assert self.width == 2
        shared = copy.copy(self)
        shared._common_N = np.array(
            [_common_length(*self._ids[at : at + 2]) for at in range(0, len(self._ids), 2)],
            dtype=np.int64,
        )
        return shared

    @property
    def shares_prompts(self) -> bool:
        """Whether a row of a batch is a pair."""
        return self._common_N is not None

    @property
    def rows_per_example(self) -> int:
        """Rows that the model reads for one example."""
        return 1 if self.shares_prompts else self.width

    @property
    def positions_N(self) -> np.ndarray:
        """Positions of each example's longest row, as the model reads it."""
        if self._common_N is None:
            return self.lengths_NW.max(axis=1)
        return self.lengths_NW.sum(axis=1) - self._common_N

    def row_lengths(self, numbers: Sequence[int]) -> np.ndarray:
        """Positions of every row of these examples, without padding."""
        lengths = self.positions_N if self.shares_prompts else self.lengths_NW
        return lengths[list(numbers)].ravel()

    def __len__(self) -> int:
        return len(self.lengths_NW)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, without padding; those of a shared prompt count in both."""
        return int(self.lengths_NW.sum())

    @property
    def num_labels(self) -> int:
        """Tokens that are learnt."""
        return int(self.num_labels_NW.sum())

    def sequence(self, number: int, side: int = 0) -> tuple[list[int], list[bool]]:
        """Ids of one sequence of an example, and for each whether it is learnt."""
        row = number * self.width + side
        is_learnt = np.zeros(len(self._ids[row]), dtype=bool)
        is_learnt[self._labels[row]] = True
        return self._ids[row].tolist(), is_learnt.tolist()

    def fingerprint(self) -> str:
        """SHA-256 over every id and every label, in order."""
        digest = hashlib.sha256(self.lengths_NW.tobytes() + self.num_labels_NW.tobytes())
        for ids, labels in zip(self._ids, self._labels, strict=True):
            digest.update(ids.tobytes())
            digest.update(labels.tobytes())
        return digest.hexdigest()

    def batch(self, numbers: Sequence[int], pad_id: int = 0, seed: int = 0) -> "Batch":
        """The examples with these numbers, in this order, right-padded into one micro-batch.

        Without numbers: one position of padding without a label, for a rank that has nothing left
        to do in a step but must take part in it.
        """
        if self._common_N is not None:
            return self._batch_of_shared(numbers, self._common_N, pad_id, seed)
        rows = [number * self.width + side for number in numbers for side in range(self.width)]
        longest = max((len(self._ids[row]) for row in rows), default=1)
        ids_RT = np.full((max(len(rows), 1), longest), pad_id, dtype=np.int64)
        for index, row in enumerate(rows):
            ids_RT[index, : len(self._ids[row])] = self._ids[row]
        num_labels_R = [len(self._labels[row]) for row in rows]
        label_rows_L = np.repeat(np.arange(len(rows)), num_labels_R)  # one sequence in each row
        labels = [self._labels[row] for row in rows]
        columns_L = np.concatenate(labels) if labels else np.zeros(0, dtype=np.int64)
        lengths = np.array([len(self._ids[row]) for row in rows] or [1])
        return Batch(
            ids_RT=torch.from_numpy(ids_RT),
            lengths_R=torch.from_numpy(lengths),
            packing=pack(lengths),
            # Position t predicts id t + 1.
            label_positions_L=torch.from_numpy(label_rows_L * longest + columns_L - 1),
            label_ids_L=torch.from_numpy(ids_RT[label_rows_L, columns_L]),
            label_sequences_L=torch.from_numpy(label_rows_L),
            examples=torch.tensor(list(numbers), dtype=torch.int64),
            num_sequences=len(rows),
            seed=seed,
        )

    def _batch_of_shared(
        self, numbers: Sequence[int], common_N: np.ndarray, pad_id: int, seed: int
    ) -> "Batch":
        lengths = self.positions_N[list(numbers)] if len(numbers) else np.array([1])
        longest = int(lengths.max())
        ids_RT = np.full((len(lengths), longest), pad_id, dtype=np.int64)
        branches_R2 = np.ones((len(lengths), 2), dtype=np.int64)
        nothing = np.zeros(0, dtype=np.int64)
        positions, labels, sequences = [nothing], [nothing], [nothing]
        for row, number in enumerate(numbers):
            chosen, rejected = self._ids[2 * number : 2 * number + 2]
            common = int(common_N[number])
            ids_RT[row, : lengths[row]] = np.concatenate([chosen, rejected[common:]])
            branches_R2[row] = common, len(chosen)
            for side, ids in enumerate((chosen, rejected)):
                places = self._labels[2 * number + side]
                columns = places - 1  # position t predicts id t + 1
                if side == 1:
                    columns = np.where(columns < common, columns, columns - common + len(chosen))
                positions.append(row * longest + columns)
                labels.append(ids[places])
                sequences.append(np.full(len(places), 2 * row + side, dtype=np.int64))
        return Batch(
            ids_RT=torch.from_numpy(ids_RT),
            lengths_R=torch.from_numpy(lengths),
            packing=pack(lengths, branches_R2),
            label_positions_L=torch.from_numpy(np.concatenate(positions)),
            label_ids_L=torch.from_numpy(np.concatenate(labels)),
            label_sequences_L=torch.from_numpy(np.concatenate(sequences)),
            examples=torch.tensor(list(numbers), dtype=torch.int64),
            num_sequences=2 * len(numbers),
            seed=seed,
            branches_R2=torch.from_numpy(branches_R2),
        )


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids two sequences begin with alike."""
    shorter = min(len(a), len(b))
    differs = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differs[0]) if len(differs) else shorter


@dataclass(frozen=True)
class Batch:
    """One micro-batch: what the model reads and where the labels are.

    Padding stands right of every row and is no label. Causal attention keeps it out of the tokens
    before it, and positions count from 0 in every row as models do by themselves, so neither an
    attention mask nor position ids are needed (``logprobs.py`` checks that of each model).

    A row that holds a pair needs both: its rejected answer goes on where the prompt ends and must
    not see the chosen one.
    """

    ids_RT: Tensor
    lengths_R: Tensor
    label_positions_L: Tensor  # in the rows laid end to end: row * T + column
    label_ids_L: Tensor
    label_sequences_L: Tensor
    examples: Tensor  # the number of each example in its set
    num_sequences: int  # S; 0 for the batch without examples
    seed: int = 0  # for what is drawn at random; the same in all micro-batches of a step
    branches_R2: Tensor | None = None  # of pairs: the columns where either answer begins
    packing: Packing | None = None  # the same rows without padding

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; from pinned memory, so that the copy does not stop the host."""
        if device.type == "cpu":
            return self
        packing = None if self.packing is None else self.packing.to(device)
        moved: dict[str, Any] = {"packing": packing}
        moved |= {
            name: (value.pin_memory() if device.type == "cuda" else value).to(
                device, non_blocking=True
            )
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def sums_over_sequences(self, logprobs_L: Tensor) -> Tensor:
        """Sum the label log-probabilities of each sequence: (S,)."""
        zeros_S = logprobs_L.new_zeros(self.num_sequences)
        return zeros_S.index_add(0, self.label_sequences_L, logprobs_L)

    def packed_positions(self) -> Tensor:
        """``label_positions_L`` in the rows without padding."""
        assert self.packing is not None
        where = torch.zeros(self.ids_RT.numel(), dtype=torch.int64, device=self.ids_RT.device)
        count_N = torch.arange(len(self.packing.sources_N), device=self.ids_RT.device)
        where[self.packing.sources_N] = count_N
        return where[self.label_positions_L]

    def position_ids(self) -> Tensor | None:
        """(R, T) for rows of pairs, in which both answers follow the prompt; else None."""
        branches = self._branches()
        return None if branches is None else branches.positions_BT

    def may_attend(self) -> Tensor | None:
        """(R, T, T), query by key, for rows of pairs: all before it but the other answer."""
        branches = self._branches()
        return None if branches is None else branches.may_attend_BTT

    def _branches(self) -> Branches | None:
        if self.branches_R2 is None:
            return None
        return branches_of(self.branches_R2, self.lengths_R, self.ids_RT.shape[1])


def branches_of(starts_R2: Tensor, lengths_R: Tensor, num_columns: int) -> Branches:
    """Two answers behind one prompt in each row; ``starts_R2`` are the columns they begin in."""
    columns_RT = torch.arange(num_columns, device=starts_R2.device).expand(len(starts_R2), -1)
    chosen_R1, rejected_R1 = starts_R2[:, :1], starts_R2[:, 1:]
    positions_RT = torch.where(
        columns_RT < rejected_R1, columns_RT, columns_RT - rejected_R1 + chosen_R1
    )
    # Padding would count on, and a model may know no positions beyond its longest sequence.
    positions_RT = positions_RT.masked_fill(columns_RT >= lengths_R[:, None], 0)
    is_rejected_RT = columns_RT >= rejected_R1
    is_chosen_RT = (columns_RT >= chosen_R1) & ~is_rejected_RT
    is_other_RTT = is_rejected_RT[:, :, None] & is_chosen_RT[:, None, :]
    may_attend_RTT = (columns_RT[:, :, None] >= columns_RT[:, None, :]) & ~is_other_RTT
    return Branches(positions_RT, may_attend_RTT)


# ---------------------------------------------------------------- without padding

GROUP_COST = 64  # what one more group costs attention, in padded positions


def pack(lengths_R: np.ndarray, branches_R2: np.ndarray | None = None) -> Packing:
    """The rows laid end to end, shortest first, in groups of similar length for attention."""
    longest = int(lengths_R.max())
    by_length = np.argsort(lengths_R, kind="stable")
    starts = np.concatenate([[0], np.cumsum(lengths_R[by_length])])
    sources = [row * longest + np.arange(lengths_R[row]) for row in by_length]
    groups, from_groups, num_places = [], [], 0
    for group in cut_by_length(lengths_R[by_length], len(lengths_R), GROUP_COST):
        rows, first = by_length[group], int(starts[group[0]])
        length = int(lengths_R[rows].max())
        columns_BT = np.broadcast_to(np.arange(length), (len(rows), length))
        is_token_BT = columns_BT < lengths_R[rows][:, None]
        row_starts_B1 = (starts[group] - first)[:, None]
        places_P = np.where(is_token_BT, row_starts_B1 + columns_BT, 0).ravel()
        padding = np.flatnonzero(~is_token_BT)
        branches = None
        if branches_R2 is not None:
            branches = branches_of(
                torch.from_numpy(branches_R2[rows]), torch.from_numpy(lengths_R[rows]), length
            )
        has_gaps = len(padding) > 0
        groups.append(
            Group(
                start=first,
                end=int(starts[group[-1] + 1]),
                num_rows=len(rows),
                length=length,
                places_P=torch.from_numpy(places_P) if has_gaps else None,
                padding=torch.from_numpy(padding) if has_gaps else None,
                branches=branches,
            )
        )
        from_groups.append(num_places + np.flatnonzero(is_token_BT))
        num_places += is_token_BT.size
    return Packing(
        sources_N=torch.from_numpy(np.concatenate(sources)),
        groups=tuple(groups),
        from_groups_N=torch.from_numpy(np.concatenate(from_groups)),
        row_starts=torch.from_numpy(starts.astype(np.int32)),
    )


# ---------------------------------------------------------------- cutting by length

# What a micro-batch costs by itself, whatever its size, in padded positions it could have processed
# instead. CPU: 18 ms against 0.26 ms a position, for 2.6 M parameters on one core; a GPU starts
# kernels for a few thousand positions' worth of work before it is busy.
MICRO_BATCH_COST = {"cpu": 64, "cuda": 4096}


def cut_by_length(lengths: np.ndarray, max_examples: int, cost_of_cut: float) -> list[list[int]]:
    """Groups of at most ``max_examples`` of similar length, with the least padding.

    ``lengths`` are sorted, shortest first; groups are runs of their indices. Minimises
    sum(group's longest * group's size + cost_of_cut) exactly, by dynamic programming.
    """
    num_examples = len(lengths)
    best = np.full(num_examples + 1, np.inf)
    best[0] = 0.0
    start_of = np.zeros(num_examples + 1, dtype=np.int64)
    for end in range(1, num_examples + 1):
        starts = np.arange(max(0, end - max_examples), end)
        costs = best[starts] + lengths[end - 1] * (end - starts) + cost_of_cut
        choice = int(costs.argmin())
        best[end], start_of[end] = costs[choice], starts[choice]
    groups: list[list[int]] = []
    end = num_examples
    while end > 0:
        groups.append(list(range(start_of[end], end)))
        end = int(start_of[end])
    return groups[::-1]


# ---------------------------------------------------------------- steps


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation that depends on nothing but seed and epoch."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


@dataclass(frozen=True)
class Cut:
    """One optimizer step, cut for every rank. All of it is known to every rank."""

    numbers: np.ndarray  # the step's examples
    micro_batches: list[list[list[int]]]  # rank -> micro-batch -> example numbers


class MicroBatchSize(NamedTuple):
    """What decides how much memory a micro-batch takes."""

    step: int
    positions: int  # that the model computes
    seen: int  # pairs of positions of a row
    longest: int  # row
    labels: int


class Steps:
    """The optimizer steps of a run over a set of examples.

    A step takes batch size x accumulation x ranks examples from the epochs' orders laid end to
    end, so only the last step of a run can be smaller. ``max_micro_batch`` is the largest number
    of examples put through the model at once; a step is cut finer where that saves padding.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        terms_per_example: np.ndarray,
        examples_per_step: int,
        max_micro_batch: int,
        num_ranks: int,
        num_epochs: float,
        max_steps: int,
        seed: int,
        cost_of_cut: float,
        pad_id: int = 0,
    ) -> None:
        """``terms_per_example``: what the loss is divided by, label tokens or pairs.

        ``max_steps`` above 0 replaces ``num_epochs``.
        """
        assert len(examples) > 0 and len(terms_per_example) == len(examples)
        self.examples = examples
        self.per_step = examples_per_step
        self._terms = terms_per_example
        self._max_micro_batch = max_micro_batch
        self._num_ranks = num_ranks
        self._seed = seed
        self._cost_of_cut = cost_of_cut
        self._pad_id = pad_id
        num_asked = (
            max_steps * examples_per_step if max_steps > 0 else round(len(examples) * num_epochs)
        )
        self._num_examples_in_run = max(1, num_asked)
        self.total = math.ceil(self._num_examples_in_run / examples_per_step)
        self._order = functools.lru_cache(maxsize=2)(
            functools.partial(epoch_order, len(examples), seed)
        )
        self._cut = functools.lru_cache(maxsize=2)(self._cut_step)

    def numbers(self, step: int) -> np.ndarray:
        """The examples of a step (counted from 0), in the order of their epochs."""
        first = step * self.per_step
        places = np.arange(first, min(first + self.per_step, self._num_examples_in_run))
        epochs, within = np.divmod(places, len(self.examples))
        return np.array(
            [self._order(int(epoch))[place] for epoch, place in zip(epochs, within, strict=True)]
        )

    def _cut_step(self, step: int) -> Cut:
        numbers = self.numbers(step)
        longest_N = self.examples.positions_N
        by_length = numbers[np.argsort(longest_N[numbers], kind="stable")]
        micro_batches = []
        for rank in range(self._num_ranks):
            share = by_length[rank :: self._num_ranks]  # every rank gets short and long ones
            groups = cut_by_length(
                longest_N[share] * self.examples.rows_per_example,
                self._max_micro_batch,
                self._cost_of_cut,
            )
            micro_batches.append([[int(share[index]) for index in group] for group in groups])
        # Ranks wait for each other in every backward pass, so all take part equally often.
        most = max(len(groups) for groups in micro_batches)
        for groups in micro_batches:
            groups.extend([] for _ in range(most - len(groups)))
        return Cut(numbers, micro_batches)

    def num_terms(self, step: int) -> int:
        """What the step's loss is divided by, over all micro-batches and ranks."""
        return int(self._terms[self._cut(step).numbers].sum())

    def num_tokens(self, step: int) -> int:
        """The step's tokens without padding, over all micro-batches and ranks."""
        return int(self.examples.lengths_NW[self._cut(step).numbers].sum())

    def epoch(self, step: int) -> float:
        """How many epochs are done after ``step`` steps."""
        return min(step * self.per_step, self._num_examples_in_run) / len(self.examples)

    def micro_batch_sizes(self, num_steps: int, *, packs: bool = False) -> list[MicroBatchSize]:
        """What a model computes in each micro-batch of the first steps.

        With padding, unless the model ``packs``.
        """
        sizes = []
        for step in range(min(num_steps, self.total)):
            for groups in self._cut(step).micro_batches:
                sizes += [self._size(step, group, packs) for group in groups if group]
        return sizes

    def _size(self, step: int, numbers: list[int], packs: bool) -> MicroBatchSize:
        lengths = self.examples.row_lengths(numbers)
        longest = int(lengths.max())
        computed = lengths if packs else np.full_like(lengths, longest)
        return MicroBatchSize(
            step=step,
            positions=int(computed.sum()),
            seen=int((computed**2).sum()),
            longest=longest,
            labels=int(self.examples.num_labels_NW[numbers].sum()),
        )

    def micro_batches(self, step: int, rank: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        seed = int(np.random.SeedSequence([self._seed, step]).generate_state(1)[0])
        return [
            self.examples.batch(numbers, self._pad_id, seed)
            for numbers in self._cut(step).micro_batches[rank]
        ]


def evaluation_batches(
    examples: Examples, *, max_examples: int, num_ranks: int, rank: int, pad_id: int = 0
) -> list[Batch]:
    """This rank's share of a whole set, in batches of similar length, the same ones every time.

    Every rank has equally many, the last ones without examples: those of divided weights gather
    them together.
    """
    by_length = np.argsort(examples.positions_N, kind="stable").tolist()
    starts = range(0, len(by_length), max_examples)
    groups = [by_length[start : start + max_examples] for start in starts]
    groups += [[] for _ in range(-len(groups) % num_ranks)]
    return [examples.batch(group, pad_id) for group in groups[rank::num_ranks]]
