"""Many examples as sequences of bounded length: encoded on all cores, and what is too long.

examples -> whole sequences, or a bad row with its line -> at most ``max_length`` ids each
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from olmo_base.run.artefact import ExampleCounts
from olmo_base.run.errors import DataError, UserError
from open_instruct.control_tokens import CannotEncode, Encoded
from open_instruct.encode import ChatEncoder, EncodedPair, EncodedRated, learnt_turns
from open_instruct.examples import DataConfig, Dialogue, Pair, Rated
from open_instruct.turns import Message

BATCH_SIZE = 512  # examples tokenised in one call
SIGNALS = (signal.SIGINT, signal.SIGTERM)
LEAST_FOR_PROCESSES = 4 * BATCH_SIZE  # fewer are not worth starting others

Example = TypeVar("Example", Dialogue, Pair, Rated)
Result = TypeVar("Result")


def encode_dialogues(
    dialogues: Sequence[Dialogue], encoder: ChatEncoder, config: DataConfig, counts: ExampleCounts
) -> list[Encoded]:
    """Dialogues as sequences of at most ``max_length`` ids, in order.

    What is cut or left out is counted, with the reason. Errors: DataError at the first example
    that cannot be used, UserError if more than ``max_too_long_fraction`` are too long.
    """
    whole = encode_whole_dialogues(dialogues, encoder, config, counts)
    return fit_dialogues(whole, encoder, config, counts)


def encode_pairs(
    pairs: Sequence[Pair], encoder: ChatEncoder, config: DataConfig, counts: ExampleCounts
) -> list[EncodedPair]:
    """Pairs whose two sequences have at most ``max_length`` ids each, in order.

    Both sides of a pair keep the same prompt when it is cut. Counts and errors as in
    ``encode_dialogues``.
    """
    whole = encode_whole_pairs(pairs, encoder, config, counts)
    return fit_pairs(whole, encoder, config, counts)


def encode_whole_dialogues(
    dialogues: Sequence[Dialogue], encoder: ChatEncoder, config: DataConfig, counts: ExampleCounts
) -> list[tuple[Dialogue, Encoded]]:
    """The first half of ``encode_dialogues``: sequences of any length."""
    encoder.check_can_be_learnt()
    return _encode_each(
        dialogues,
        lambda batch: encoder.encode_many(
            [item.text or item.messages for item in batch],
            [item.tools for item in batch],
            learn_last_only=config.learn_turns == "last",
        ),
        config,
        counts,
    )


def encode_whole_pairs(
    pairs: Sequence[Pair], encoder: ChatEncoder, config: DataConfig, counts: ExampleCounts
) -> list[tuple[Pair, EncodedPair]]:
    """The first half of ``encode_pairs``: sequences of any length."""
    _refuse_to_split(config, "the two answers of a pair share one prompt")
    encoder.check_can_be_learnt()

    def encode_many(batch: Sequence[Pair]) -> list[EncodedPair]:
        encoded = encoder.encode_many_pairs(
            [(item.prompt, item.chosen, item.rejected, item.tools) for item in batch],
            learn_last_only=config.learn_turns == "last",
        )
        return [
            pair._replace(margin=item.margin) for item, pair in zip(batch, encoded, strict=True)
        ]

    return _encode_each(pairs, encode_many, config, counts)


def encode_rated(
    rated: Sequence[Rated], encoder: ChatEncoder, config: DataConfig, counts: ExampleCounts
) -> list[EncodedRated]:
    """Rated answers as sequences of at most ``max_length`` ids, in order.

    Counts and errors as in ``encode_dialogues``.
    """
    whole = encode_whole_rated(rated, encoder, config, counts)
    return fit_rated(whole, encoder, config, counts)


def encode_whole_rated(
    rated: Sequence[Rated], encoder: ChatEncoder, config: DataConfig, counts: ExampleCounts
) -> list[tuple[Rated, EncodedRated]]:
    """The first half of ``encode_rated``: sequences of any length."""
    _refuse_to_split(config, "a rating is of one answer, behind its whole prompt")
    encoder.check_can_be_learnt()

    def encode_many(batch: Sequence[Rated]) -> list[EncodedRated]:
        # A pair of the answer with itself: pairs know where the prompt ends.
        pairs = encoder.encode_many_pairs(
            [(item.prompt, item.answer, item.answer, item.tools) for item in batch],
            learn_last_only=config.learn_turns == "last",
        )
        return [
            EncodedRated(pair.chosen, pair.shared_prompt_length, item.is_desirable)
            for item, pair in zip(batch, pairs, strict=True)
        ]

    return _encode_each(rated, encode_many, config, counts)


def fit_rated(
    whole: Sequence[tuple[Rated, EncodedRated]],
    encoder: ChatEncoder,
    config: DataConfig,
    counts: ExampleCounts,
) -> list[EncodedRated]:
    """The second half of ``encode_rated``: what to do with those that are too long."""
    _check_lengths([(item, len(rated.sequence.ids)) for item, rated in whole], config)
    kept = []
    for _, rated in whole:
        if len(rated.sequence.ids) > config.max_length:
            if config.on_too_long == "drop":
                counts.drop("longer than max_length")
                continue
            pair = EncodedPair(rated.sequence, rated.sequence, rated.prompt_length)
            cut = _cut_pair(pair, config, encoder.opens_with_bos)
            if isinstance(cut, str):
                counts.drop(cut)
                continue
            rated = EncodedRated(cut.chosen, cut.shared_prompt_length, rated.is_desirable)
            counts.truncated += 1
        kept.append(rated)
    counts.used += len(kept)
    return kept


def fit_dialogues(
    whole: Sequence[tuple[Dialogue, Encoded]],
    encoder: ChatEncoder,
    config: DataConfig,
    counts: ExampleCounts,
) -> list[Encoded]:
    """The second half of ``encode_dialogues``: what to do with those that are too long."""
    _check_lengths([(item, len(sequence.ids)) for item, sequence in whole], config)
    kept = []
    for item, sequence in whole:
        if len(sequence.ids) > config.max_length:
            if config.on_too_long == "drop":
                counts.drop("longer than max_length")
                continue
            if config.on_too_long == "split_turns":
                pieces = _split_turns(item, encoder, config, counts)
                counts.split += bool(pieces)
                kept += pieces
                continue
            sequence = _cut(sequence, config, encoder.opens_with_bos)
            if not any(sequence.is_learnt):
                counts.drop("nothing left to learn after truncation")
                continue
            counts.truncated += 1
        kept.append(sequence)
    counts.used += len(kept)
    return kept


def _split_turns(
    item: Dialogue, encoder: ChatEncoder, config: DataConfig, counts: ExampleCounts
) -> list[Encoded]:
    """A dialogue cut before user turns, each piece behind the system turn and tools of the whole.

    A piece takes as many exchanges as fit. So every answer is learnt once, without what was said
    in earlier pieces. An exchange that does not fit by itself is dropped and counted.
    """
    if item.text is not None:
        counts.drop("text longer than max_length, which has no turns to split at")
        return []
    learnt = learnt_turns(item.messages, 0, config.learn_turns == "last")
    messages: list[Message] = [
        {**turn, "train": number in learnt} for number, turn in enumerate(item.messages)
    ]
    head = messages[:1] if messages[0]["role"] == "system" else []
    exchanges: list[list[Message]] = []
    for turn in messages[len(head) :]:
        if turn["role"] == "user":
            exchanges.append([])
        exchanges[-1].append(turn)

    def fits(piece: list[Message]) -> Encoded | None:
        encoded = encoder.encode_dialogue([*head, *piece], tools=item.tools)
        return encoded if len(encoded.ids) <= config.max_length else None

    pieces: list[Encoded] = []
    piece: list[Message] = []
    last: Encoded | None = None  # the piece, encoded
    for exchange in exchanges:
        longer = fits([*piece, *exchange]) if piece else None
        if longer is not None:
            piece, last = [*piece, *exchange], longer
            continue
        if last is not None:
            pieces.append(last)
        piece, last = exchange, fits(exchange)
        if last is None:
            counts.drop("exchange longer than max_length")
            piece = []
    if last is not None:
        pieces.append(last)
    return [encoded for encoded in pieces if any(encoded.is_learnt)]


def _refuse_to_split(config: DataConfig, why: str) -> None:
    if config.on_too_long == "split_turns":
        raise UserError(
            f"on_too_long: split_turns cuts dialogues of stage sft, and {why}. "
            "Choose drop, truncate_left or truncate_right."
        )


def fit_pairs(
    whole: Sequence[tuple[Pair, EncodedPair]],
    encoder: ChatEncoder,
    config: DataConfig,
    counts: ExampleCounts,
) -> list[EncodedPair]:
    """The second half of ``encode_pairs``: what to do with those that are too long."""
    _check_lengths([(item, pair_length(pair)) for item, pair in whole], config)
    kept = []
    for _, pair in whole:
        if pair_length(pair) > config.max_length:
            if config.on_too_long == "drop":
                counts.drop("longer than max_length")
                continue
            cut = _cut_pair(pair, config, encoder.opens_with_bos)
            if isinstance(cut, str):
                counts.drop(cut)
                continue
            if cut.chosen.ids == cut.rejected.ids:
                counts.drop("chosen and rejected the same after truncation")
                continue
            pair = cut._replace(margin=pair.margin)
            counts.truncated += 1
        kept.append(pair)
    counts.used += len(kept)
    return kept


def _encode_each(
    items: Sequence[Example],
    encode_many: Callable[[Sequence[Example]], list[Result]],
    config: DataConfig,
    counts: ExampleCounts,
) -> list[tuple[Example, Result]]:
    """Each example with its encoding, in order."""
    encoded: list[tuple[Example, Result]] = []
    results: Iterator[Any] = _encoded(items, encode_many)
    for item, result in zip(items, results, strict=True):
        if not isinstance(result, CannotEncode):
            encoded.append((item, result))
        elif config.on_bad_row == "error":
            raise DataError(item.source, item.line, str(result))
        else:
            counts.drop(result.reason)
    return encoded


def _encoded(
    items: Sequence[Example], encode_many: Callable[[Sequence[Example]], list[Result]]
) -> Iterator[Any]:
    """The encoding of each, or why there is none; on all cores where there are many."""
    starts = range(0, len(items), BATCH_SIZE)

    def encode(start: int) -> list[Any]:
        return _encode_batch(items[start : start + BATCH_SIZE], encode_many)

    # Forked processes have the examples and the tokenizer without their being sent.
    num_processes = min(len(os.sched_getaffinity(0)), len(starts)) if sys.platform == "linux" else 1
    if num_processes < 2 or len(items) < LEAST_FOR_PROCESSES:
        for start in starts:
            yield from encode(start)
        return
    global _encode_in_process
    _encode_in_process = lambda start: _packed(encode(start))  # noqa: E731 - what a fork inherits
    # Signals wait until a new process has put the parent's handlers aside: one that came earlier
    # would be answered by those, and the process would live on.
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        pool = multiprocessing.get_context("fork").Pool(num_processes, _start_process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
    try:
        for packed in pool.imap(_run_in_process, starts):
            yield from _unpacked(packed)
        pool.close()
    except BaseException:
        pool.terminate()
        raise
    finally:
        pool.join()
        _encode_in_process = None


def _encode_batch(
    batch: Sequence[Example], encode_many: Callable[[Sequence[Example]], list[Result]]
) -> list[Any]:
    try:
        return list(encode_many(batch))
    except CannotEncode:
        pass  # found and named below
    results: list[Any] = []
    for item in batch:
        try:
            results += encode_many([item])
        except CannotEncode as error:
            results.append(error)
    return results


_encode_in_process: Callable[[int], Any] | None = None


def _start_process() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process is one of all cores
    # A signal is the parent's to answer; it ends these.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _run_in_process(start: int) -> Any:
    assert _encode_in_process is not None
    return _encode_in_process(start)


def _packed(results: list[Any]) -> list[Any]:
    """Encodings with their numbers as bytes, which travel between processes much faster."""

    def pack(value: Any) -> Any:
        if isinstance(value, Encoded):
            ids, is_learnt = value
            return Encoded(np.array(ids, np.int32), np.array(is_learnt, np.bool_))  # type: ignore[arg-type]
        if isinstance(value, EncodedPair):
            chosen, rejected = pack(value.chosen), pack(value.rejected)
            return value._replace(chosen=chosen, rejected=rejected)
        if isinstance(value, EncodedRated):
            return value._replace(sequence=pack(value.sequence))
        return (str(value), value.reason)  # CannotEncode

    return [pack(value) for value in results]


def _unpacked(packed: list[Any]) -> Iterator[Any]:
    def unpack(value: Any) -> Any:
        if isinstance(value, Encoded):
            return Encoded(value.ids.tolist(), value.is_learnt.tolist())  # type: ignore[attr-defined]
        if isinstance(value, EncodedPair):
            chosen, rejected = unpack(value.chosen), unpack(value.rejected)
            return value._replace(chosen=chosen, rejected=rejected)
        if isinstance(value, EncodedRated):
            return value._replace(sequence=unpack(value.sequence))
        return CannotEncode(*value)

    return map(unpack, packed)


def pair_length(pair: EncodedPair) -> int:
    """Ids of the longer side."""
    return max(len(pair.chosen.ids), len(pair.rejected.ids))


def _check_lengths(
    lengths: Sequence[tuple[Dialogue | Pair | Rated, int]], config: DataConfig
) -> None:
    """Refuse examples that are too long, if the recipe refuses them or if there are too many."""
    too_long = [(item, length) for item, length in lengths if length > config.max_length]
    if not too_long:
        return
    longest = max(length for _, length in too_long)
    found = (
        f"{len(too_long):,} of {len(lengths):,} examples ({len(too_long) / len(lengths):.1%}) are "
        f"longer than max_length ({config.max_length:,} tokens); the longest has {longest:,}"
    )
    if config.on_too_long == "error":
        first, length = too_long[0]
        raise DataError(
            first.source,
            first.line,
            f"{length:,} tokens. {found}.",
            "Raise max_length, or choose on_too_long: drop, truncate_left, "
            "truncate_right or, for dialogues, split_turns.",
        )
    if len(too_long) > config.max_too_long_fraction * len(lengths):
        raise UserError(
            f"{found}; max_too_long_fraction allows {config.max_too_long_fraction:.1%}. Raise "
            f"max_length, or raise max_too_long_fraction to let on_too_long: {config.on_too_long} "
            "change that many."
        )


def _cut(sequence: Encoded, config: DataConfig, opens_with_bos: bool) -> Encoded:
    """The sequence with at most ``max_length`` ids; cut on the left, it keeps its bos."""
    if config.on_too_long == "truncate_right":
        return Encoded(sequence.ids[: config.max_length], sequence.is_learnt[: config.max_length])
    return _without(sequence, int(opens_with_bos), len(sequence.ids) - config.max_length)


def _without(sequence: Encoded, start: int, number: int) -> Encoded:
    """The sequence without ``number`` ids from ``start`` on."""
    ids, is_learnt = sequence
    return Encoded(
        ids[:start] + ids[start + number :], is_learnt[:start] + is_learnt[start + number :]
    )


def _cut_pair(pair: EncodedPair, config: DataConfig, opens_with_bos: bool) -> EncodedPair | str:
    """The pair with at most ``max_length`` ids a side, or why nothing useful is left of it."""
    if config.on_too_long == "truncate_right":
        chosen, rejected = (_cut(side, config, opens_with_bos) for side in pair[:2])
        shared = min(pair.shared_prompt_length, config.max_length)
    else:
        number = pair_length(pair) - config.max_length
        start = int(opens_with_bos)
        if number > pair.shared_prompt_length - start:
            return "answer longer than max_length"
        chosen, rejected = (_without(side, start, number) for side in pair[:2])
        shared = pair.shared_prompt_length - number
    if not any(chosen.is_learnt) or not any(rejected.is_learnt):
        return "nothing left to learn after truncation"
    return EncodedPair(chosen, rejected, shared)
