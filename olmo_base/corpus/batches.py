"""Token shards as training sequences: which ones a step gets, and the tensors made of them.

The shards are one long row of tokens, cut every ``max_length``. Sequence ``i`` reads the tokens
from ``i * max_length`` on and is asked for the ones that follow, so each token but the first is
asked for exactly once. Nothing here has a state: the sequences of a step are a function of the
seed and the step, and a stopped run goes on with the same ones.
"""

# S sequences of a step, B of a micro-batch, T positions

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from olmo_base.corpus.shards import Place, Shard, read_shards
from olmo_base.run.errors import UserError

U64 = np.uint64


@dataclass(frozen=True)
class Batch:
    """One micro-batch: ``labels_BT[b, t]`` is the token that follows ``ids_BT[b, : t + 1]``."""

    ids_BT: Tensor
    labels_BT: Tensor
    document_ids_BT: Tensor | None  # 0, 1, … within a sequence; None when documents are not masked

    @property
    def num_labels(self) -> int:
        """Tokens asked for."""
        return self.labels_BT.numel()

    def without(self, max_ngram_repeats: int) -> "Batch":
        """The sequences in which no n-gram follows itself as often as that."""
        kept_B = torch.from_numpy(ngram_repeats(self.ids_BT.numpy()) < max_ngram_repeats)
        if bool(kept_B.all()):
            return self
        documents = None if self.document_ids_BT is None else self.document_ids_BT[kept_B]
        return Batch(self.ids_BT[kept_B], self.labels_BT[kept_B], documents)

    def cut(self, length: int) -> "Batch":
        """The same tokens in rows of ``length``, each blind to the others."""
        if length == self.ids_BT.shape[1]:
            return self
        documents = self.document_ids_BT
        return Batch(
            self.ids_BT.view(-1, length),
            self.labels_BT.view(-1, length),
            None if documents is None else documents.view(-1, length),
        )

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; a copy to a GPU is not waited for."""

        def moved(tensor: Tensor) -> Tensor:
            if device.type == "cuda":
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        documents = None if self.document_ids_BT is None else moved(self.document_ids_BT)
        return Batch(moved(self.ids_BT), moved(self.labels_BT), documents)


# ---------------------------------------------------------------- which sequences


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser: 64 bits in, 64 well-stirred bits out."""
    values = (values ^ (values >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> U64(27))) * U64(0x94D049BB133111EB)
    return values ^ (values >> U64(31))


def shuffled(
    positions: npt.NDArray[np.int64], length: int, *, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Where the given positions of 0..length-1 go in the shuffle of this seed and epoch.

    A bijection computed entry by entry (a Feistel network over the smallest even number of bits,
    walked until it lands below ``length``), so that a corpus of any size needs no table, and the
    order does not hang on a library's generator staying as it is.
    """
    half_bits = max(1, (max(1, length - 1).bit_length() + 1) // 2)
    shift, mask = U64(half_bits), U64(2**half_bits - 1)
    start = np.array([seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 & 2**64 - 1], U64)
    keys = _mix(_mix(start) + np.arange(1, 9, dtype=U64) * U64(0x9E3779B97F4A7C15))
    result = positions.astype(U64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        left, right = result[outside] >> shift, result[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        result[outside] = left << shift | right
        outside = result >= U64(length)
    return result.astype(np.int64)


def sequences_at(places: range, *, num_sequences: int, seed: int) -> npt.NDArray[np.int64]:
    """The numbers of the sequences at these places of the run's row.

    Each epoch is a new shuffle of all sequences; places may end one and begin the next.
    """
    places_S = np.arange(places.start, places.stop, dtype=np.int64)
    epochs, positions = places_S // num_sequences, places_S % num_sequences
    chosen = np.empty_like(places_S)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = shuffled(positions[here], num_sequences, seed=seed, epoch=int(epoch))
    return chosen


# ---------------------------------------------------------------- the sequences themselves


class TokenSequences:
    """The sequences of ``max_length`` tokens of some shards, mapped into memory.

    Errors: UserError if the shards were made with different tokenizers, if their content is not
    what was written (``verify``), or if they are too short for one sequence.
    """

    def __init__(self, shards: Sequence[Shard], max_length: int, *, verify: bool = False) -> None:
        first = shards[0].info
        refuse_other_tokenizers(shards)
        if verify:
            for shard in shards:
                shard.verify()
        self.max_length = max_length
        self.vocab_size = max(shard.info.vocab_size for shard in shards)
        self.eos_token_id = first.eos_token_id
        self.num_tokens = sum(shard.info.num_tokens for shard in shards)
        self.num_bytes = sum(shard.info.num_bytes for shard in shards)
        self._shards = shards
        self._tokens = [shard.tokens() for shard in shards]
        self._ends = np.cumsum([shard.info.num_tokens for shard in shards])
        self._num_sequences = (self.num_tokens - 1) // max_length
        if self._num_sequences < 1:
            raise UserError(
                f"{shards[0].path.parent} holds {self.num_tokens} tokens; one sequence of "
                f"max_length {max_length} needs {max_length + 1}. Give more text, or lower "
                "max_length."
            )

    @property
    def num_documents(self) -> int:
        """Documents in the shards."""
        return sum(shard.num_documents for shard in self._shards)

    def __len__(self) -> int:
        return self._num_sequences

    def window(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The tokens start..stop-1 of the long row, across shards."""
        parts = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            shard_start = int(self._ends[index]) - len(self._tokens[index])
            end_here = min(stop, int(self._ends[index]))
            parts.append(self._tokens[index][start - shard_start : end_here - shard_start])
            start, index = end_here, index + 1
        return np.concatenate(parts).astype(np.int64)

    def places(self, index: int) -> list[Place]:
        """The documents that the tokens of the sequence of this number belong to, in order."""
        start, stop = index * self.max_length, (index + 1) * self.max_length + 1
        found: list[Place] = []
        for shard, end in zip(self._shards, self._ends.tolist(), strict=True):
            shard_start = end - shard.info.num_tokens
            if start < end and stop > shard_start:
                found += shard.places(
                    max(0, start - shard_start), min(stop - shard_start, shard.info.num_tokens)
                )
        return found

    def at(self, places: range, *, seed: int) -> npt.NDArray[np.int64]:
        """The numbers of the sequences at these places of the run's row."""
        return sequences_at(places, num_sequences=len(self), seed=seed)

    def batch(self, indices: Sequence[int] | npt.NDArray[np.int64], *, mask: bool) -> Batch:
        """The sequences of these numbers. ``mask``: tell their documents apart."""
        T = self.max_length
        tokens_BT1 = torch.empty(len(indices), T + 1, dtype=torch.int64)
        for row_T1, index in zip(tokens_BT1, indices, strict=True):
            row_T1.copy_(torch.from_numpy(self.window(int(index) * T, int(index) * T + T + 1)))
        ids_BT = tokens_BT1[:, :-1].contiguous()
        documents_BT = None
        if mask:  # a document's end-of-text is its own last token
            ends_BT = (ids_BT == self.eos_token_id).long()
            documents_BT = ends_BT.cumsum(1) - ends_BT
        return Batch(ids_BT, tokens_BT1[:, 1:].contiguous(), documents_BT)


@dataclass(frozen=True)
class Share:
    """What one source of a mixture was asked for and gives, in sequences."""

    name: str
    ratio: float  # of all sequences, the ratios of a mixture adding up to 1
    available: int
    used: int

    @property
    def repeats(self) -> float:
        """How often the run reads each of its sequences, on average."""
        return self.used / self.available


def shares_of(
    names: Sequence[str],
    available: Sequence[int],
    ratios: Sequence[float],
    max_repeats: Sequence[float],
    total: int,
) -> list[Share]:
    """Divide ``total`` sequences by ratio, to the nearest whole (the largest remainders get one).

    Errors: UserError if a source would give none, or more than ``max_repeats`` of what it has.
    """
    whole = sum(ratios)
    exact = [ratio / whole * total for ratio in ratios]
    used = [int(number) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (used[i] - exact[i], i))
    for i in by_remainder[: total - sum(used)]:
        used[i] += 1
    shares = [
        Share(name, ratio / whole, number, taken)
        for name, ratio, number, taken in zip(names, ratios, available, used, strict=True)
    ]
    for share, limit in zip(shares, max_repeats, strict=True):
        if share.used == 0:
            raise UserError(
                f"{share.name}: a ratio of {share.ratio:.2g} is less than one of {total} sequences."
                " Raise it, train longer, or leave the source out."
            )
        if share.repeats > limit:
            raise UserError(
                f"{share.name}: a ratio of {share.ratio:.3g} asks for {share.used:,} sequences and "
                f"{share.available:,} are there: each would be read {share.repeats:.2f} times. "
                f"Lower the ratio, train for fewer tokens, or allow max_repeats: "
                f"{math.ceil(share.repeats)}."
            )
    return shares


class Mixture:
    """The sequences of several sources, each with a share of the run's steps.

    All places of the run are shuffled once; each source owns a range of them, as long as its share.
    A source that has less starts over, newly shuffled. So the order is a function of the seed and
    the step, and a source's sequences are read equally often to within one.
    """

    def __init__(self, sources: Sequence[TokenSequences], shares: Sequence[Share]) -> None:
        self._sources, self.shares = sources, shares
        self.max_length = sources[0].max_length
        self.eos_token_id = sources[0].eos_token_id
        self.vocab_size = max(source.vocab_size for source in sources)
        self.num_tokens = sum(source.num_tokens for source in sources)
        self._firsts = np.cumsum([0, *(len(source) for source in sources)])
        self._starts = np.cumsum([0, *(share.used for share in shares)])

    @property
    def num_documents(self) -> int:
        """Documents in all sources."""
        return sum(source.num_documents for source in self._sources)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def at(self, places: range, *, seed: int) -> npt.NDArray[np.int64]:
        """The numbers of the sequences at these places of the run's row."""
        places_S = np.arange(places.start, places.stop, dtype=np.int64)
        owned = shuffled(places_S, int(self._starts[-1]), seed=seed, epoch=0)
        chosen = np.empty_like(owned)
        which = np.searchsorted(self._starts, owned, side="right") - 1
        for i in np.unique(which):
            here = which == i
            epochs, positions = np.divmod(owned[here] - self._starts[i], len(self._sources[i]))
            for epoch in np.unique(epochs):
                now = np.flatnonzero(here)[epochs == epoch]
                order = shuffled(
                    positions[epochs == epoch],
                    len(self._sources[i]),
                    seed=seed + 1 + int(i),
                    epoch=int(epoch),
                )
                chosen[now] = self._firsts[i] + order
        return chosen

    def _source(self, index: int) -> tuple[TokenSequences, int]:
        i = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self._sources[i], index - int(self._firsts[i])

    def places(self, index: int) -> list[Place]:
        """The documents that the tokens of the sequence of this number belong to, in order."""
        source, here = self._source(index)
        return source.places(here)

    def batch(self, indices: Sequence[int] | npt.NDArray[np.int64], *, mask: bool) -> Batch:
        """The sequences of these numbers. ``mask``: tell their documents apart."""
        if len(indices) == 0:
            return self._sources[0].batch([], mask=mask)
        found = []
        for index in indices:
            source, here = self._source(int(index))
            found.append(source.batch([here], mask=mask))
        documents = [batch.document_ids_BT for batch in found if batch.document_ids_BT is not None]
        return Batch(
            torch.cat([batch.ids_BT for batch in found]),
            torch.cat([batch.labels_BT for batch in found]),
            torch.cat(documents) if documents else None,
        )


LONGEST_PERIOD = 13  # tokens of an n-gram whose repetitions are counted


def ngram_repeats(ids_BT: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """How often the most repeated n-gram of each row follows itself: 1 if none does.

    N-grams of 1 to 13 tokens, as in the instance filter of OLMo-2 (arXiv:2501.00656, section 3.1).
    Only whole repetitions count.
    """
    most_B = np.ones(len(ids_BT), dtype=np.int64)
    for period in range(1, min(LONGEST_PERIOD, ids_BT.shape[1] - 1) + 1):
        is_same_BK = ids_BT[:, period:] == ids_BT[:, :-period]
        places_K = np.arange(1, is_same_BK.shape[1] + 1)
        last_other_BK = np.maximum.accumulate(np.where(is_same_BK, 0, places_K), axis=1)
        longest_B = (places_K - last_other_BK).max(axis=1)
        most_B = np.maximum(most_B, longest_B // period + 1)
    return most_B


def micro_batches(
    sequences: TokenSequences | Mixture,
    places: range,
    *,
    micro_batch_size: int,
    seed: int,
    mask: bool,
    max_ngram_repeats: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
) -> list[Batch]:
    """One rank's batches of the optimizer step that reads these places of the run's row.

    The sequences are dealt in order over the ranks.

    Sequences in which an n-gram follows itself ``max_ngram_repeats`` times or more are left out;
    0 leaves out none. Alone, a batch of which nothing is left is left out too; with several ranks
    it is empty, since all must have equally many: they meet in each.
    """
    indices = sequences.at(places, seed=seed)
    first, end = (len(indices) * number // num_ranks for number in (rank, rank + 1))
    most = -(-len(indices) // num_ranks)
    batches = [
        sequences.batch(indices[start : min(start + micro_batch_size, end)], mask=mask)
        for start in range(first, first + most, micro_batch_size)
    ]
    if max_ngram_repeats > 0:
        batches = [batch.without(max_ngram_repeats) for batch in batches]
    return [batch for batch in batches if len(batch.ids_BT) or num_ranks > 1]


def refuse_other_tokenizers(shards: Sequence[Shard]) -> None:
    """Errors: UserError if the shards were not all made with one tokenizer and end token."""
    for shard in shards[1:]:
        if shard.info.tokenizer_sha256 != shards[0].info.tokenizer_sha256:
            raise UserError(
                f"{shard.path.parent} and {shards[0].path.parent} hold the ids of different "
                "tokenizers. Tokenize both with the same one."
            )
        if shard.info.eos_token_id != shards[0].info.eos_token_id:
            raise UserError(
                f"Documents in {shard.path.parent} end with the id {shard.info.eos_token_id}, "
                f"those in {shards[0].path.parent} with {shards[0].info.eos_token_id}. Tokenize "
                "both with the same eos_token."
            )


def split_folder(folder: str | Path, split: str) -> Path:
    """The folder of a split's shards in the output of a tokenize run."""
    return Path(folder) / "tokens" / split


def read_split(folders: Sequence[str | Path], split: str) -> list[Shard]:
    """The shards of a split of several tokenize runs, in order.

    Errors: UserError naming the folder without them; for "eval" an empty list is no error.
    """
    found = []
    for folder in folders:
        path = split_folder(folder, split)
        if split == "eval" and path.is_dir() and not any(path.glob("tokens_*.bin")):
            continue
        found.extend(read_shards(path))
    return found
