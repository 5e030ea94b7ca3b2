"""What a model will see of its data: ``open-instruct data inspect RECIPE`` for sft, dpo and reward.

recipe -> examples -> the mixture, a few examples with what is learnt in colour, lengths, packing,
drops; in the terminal, and as a page
"""

import random
import unicodedata
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from olmo_base.corpus.overlap import NGRAM
from olmo_base.run.artefact import ExampleCounts, atomic_write
from olmo_base.run.errors import UserError
from open_instruct.encode import ChatEncoder, Encoded, EncodedPair, EncodedRated
from open_instruct.examples import (
    Rated,
    SourceUse,
    mixture_lines,
    read_dialogues,
    read_pairs,
    read_rated,
)
from open_instruct.inspect_page import page
from open_instruct.lengths import (
    encode_whole_dialogues,
    encode_whole_pairs,
    encode_whole_rated,
    fit_dialogues,
    fit_pairs,
    fit_rated,
)
from open_instruct.preference import PreferenceRecipe
from open_instruct.reward import RewardRecipe
from open_instruct.sft import SftRecipe
from open_instruct.tokenised import decontaminated, num_repeated, parts_of, prints_of
from open_instruct.tuning import encoder_of

NUM_BINS = 12
BAR_WIDTH = 40  # characters


@dataclass(frozen=True)
class Shown:
    """One example, as the stretches of ids that are shown one below the other."""

    place: str  # file and line
    parts: list[tuple[str, Encoded]]


@dataclass(frozen=True)
class Inspection:
    """The training data of a recipe, as its model will see it."""

    encoder: ChatEncoder
    uses: list[SourceUse]
    shown: list[Shown]
    lengths: list[int]  # of each example's longer sequence, before anything is cut
    max_length: int
    facts: list[str]
    too_long: UserError | None  # what the stage itself would say about lengths


def inspect_recipe(
    recipe: SftRecipe | PreferenceRecipe | RewardRecipe,
    *,
    num_shown: int = 3,
    by_token: bool = False,
    html: str | Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the training data of a recipe as its model will see it; ``html`` writes a page of it.

    ``by_token`` shows one token a line, with its id. Errors: those of the stage itself. One about
    lengths comes last, after they are shown.
    """
    console = console or Console()
    found = _inspected(recipe, num_shown)
    for example in found.shown:
        console.print(Rule(Text(example.place), align="left"))
        for name, part in example.parts:
            console.print(
                Text(f"{name}: {len(part.ids)} tokens, {sum(part.is_learnt)} learnt", "dim")
            )
            show = _token_lines if by_token else _coloured
            console.print(show(part, found.encoder, console), soft_wrap=True)
    console.print(Rule())
    for line in mixture_lines(found.uses):
        console.print(Text(line), soft_wrap=True)
    console.print(_histogram(found.lengths, found.max_length))
    for line in found.facts:
        console.print(Text(line), soft_wrap=True)
    if html is not None:
        atomic_write(
            html,
            page(
                f"Training data of {recipe.run.output_dir} ({recipe.stage})",
                mixture_lines(found.uses),
                found.facts + ([str(found.too_long)] if found.too_long else []),
                [(row, row[2]) for row in _bins(found.lengths)],
                [(item.place, _stretches(item.parts, found.encoder)) for item in found.shown],
            ),
        )
        console.print(Text(f"written to {html}"), soft_wrap=True)
    if found.too_long is not None:
        raise found.too_long


def _inspected(recipe: SftRecipe | PreferenceRecipe | RewardRecipe, num_shown: int) -> Inspection:
    encoder = encoder_of(recipe)
    data, seed = recipe.data, recipe.run.seed
    counts, uses = ExampleCounts(), list[SourceUse]()
    read: Any = read_pairs
    encode_whole: Any = encode_whole_pairs
    fit: Any = fit_pairs
    if isinstance(recipe, SftRecipe):
        read, encode_whole, fit = read_dialogues, encode_whole_dialogues, fit_dialogues
    elif isinstance(recipe, RewardRecipe):
        read = partial(read_pairs, with_margin=True)
    elif recipe.loss.is_rated:
        read, encode_whole, fit = read_rated, encode_whole_rated, fit_rated

    examples = read(
        data.dataset_mixer, seed=seed, on_bad_row=data.on_bad_row, counts=counts, uses=uses
    )
    parts = [parts_of(example) for example in examples]
    clean, contaminated = decontaminated(examples, parts, data.decontaminate_against)
    if contaminated:
        reason = f"shares {NGRAM} words in a row with evaluation data"
        counts.drop(reason, len(contaminated))
    whole = encode_whole(clean, encoder, data, counts)
    fitted: list[Any] = []
    too_long: UserError | None = None
    try:
        fitted = fit(whole, encoder, data, counts)
    except UserError as error:
        too_long = error

    drawn = random.Random(seed).sample(range(len(whole)), min(num_shown, len(whole)))
    shown = [
        Shown(f"{item.source}, line {item.line}", _parts(item, encoded))
        for item, encoded in (whole[number] for number in sorted(drawn))
    ]
    lengths = [max(len(row.ids) for row in _rows(encoded)) for _, encoded in whole]
    facts = _facts(
        [row for _, encoded in whole for row in _rows(encoded)], counts, too_long is None
    )
    repeated = num_repeated(examples, list(map(prints_of, parts)))
    if repeated:
        facts.append(f"{repeated:,} rows say the same as an earlier row; all are used")
    if too_long is None:
        kept = [len(row.ids) for encoded in fitted for row in _rows(encoded)]
        facts.append(_packing(kept, data.max_length))
    return Inspection(encoder, uses, shown, lengths, data.max_length, facts, too_long)


def _rows(encoded: Encoded | EncodedPair | EncodedRated) -> tuple[Encoded, ...]:
    if isinstance(encoded, EncodedPair):
        return encoded.chosen, encoded.rejected
    return (encoded.sequence,) if isinstance(encoded, EncodedRated) else (encoded,)


def _parts(
    item: object, encoded: Encoded | EncodedPair | EncodedRated
) -> list[tuple[str, Encoded]]:
    """An example as the stretches of ids that are shown one below the other."""
    if isinstance(encoded, EncodedRated):
        assert isinstance(item, Rated)
        name = "a good answer" if item.is_desirable else "a bad answer"
        return [(name, encoded.sequence)]
    if isinstance(encoded, Encoded):
        return [("dialogue", encoded)]
    shared = encoded.shared_prompt_length
    ids, is_learnt = encoded.chosen
    prompt = Encoded(ids[:shared], is_learnt[:shared])
    answers = [
        (name, Encoded(side.ids[shared:], side.is_learnt[shared:]))
        for name, side in (("chosen", encoded.chosen), ("rejected", encoded.rejected))
    ]
    return [("prompt", prompt), *answers]


def _coloured(part: Encoded, encoder: ChatEncoder, console: Console) -> Text:
    """The ids as text: learnt ones green (in ⟦ ⟧ where there are no colours), control tokens
    underlined, so that they differ from text that merely spells them."""
    text = Text()
    marks = ("", "") if console.color_system else ("⟦", "⟧")
    for is_learnt, run in groupby(zip(*part, strict=True), key=lambda item: item[1]):
        text.append(marks[0] * is_learnt)
        ids = [number for number, _ in run]
        for is_control, stretch in groupby(ids, key=lambda number: number in encoder.control_ids):
            style = " ".join(["bold green"] * is_learnt + ["underline"] * is_control)
            decoded = str(encoder.tokenizer.decode(list(stretch)))
            text.append(_printable(decoded), style or None)
        text.append(marks[1] * is_learnt)
    return text


def _token_lines(part: Encoded, encoder: ChatEncoder, console: Console) -> Text:
    """The ids one below the other."""
    text = Text()
    for number, is_learnt in zip(*part, strict=True):
        decoded = encoder.tokenizer.decode([number])
        line = f"{number:>8}  {'learnt' if is_learnt else '      '}  {decoded!r}\n"
        text.append(line, "bold green" if is_learnt else None)
    return text


def _printable(text: str) -> str:
    """Data must not move the cursor, change colours or turn the line: such characters show."""

    def is_plain(character: str) -> bool:
        joins = character in "\n\t\u200c\u200d"  # the last two are part of emoji and of scripts
        return joins or unicodedata.category(character) not in ("Cc", "Cf")

    return "".join(item if is_plain(item) else f"<U+{ord(item):04X}>" for item in text)


def _stretches(
    parts: Sequence[tuple[str, Encoded]], encoder: ChatEncoder
) -> list[tuple[str, list[tuple[str, bool, bool]]]]:
    """Each part as pieces of text: whether it is learnt, and whether it is a control token."""
    return [
        (
            f"{name}: {len(part.ids)} tokens, {sum(part.is_learnt)} learnt",
            [
                (_printable(str(encoder.tokenizer.decode([n for n, _ in run]))), *kind)
                for kind, run in groupby(
                    zip(*part, strict=True),
                    key=lambda item: (item[1], item[0] in encoder.control_ids),
                )
            ],
        )
        for name, part in parts
    ]


# ---------------------------------------------------------------- figures


def _bins(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """From, to, and how many examples have as many tokens; bins of equal width."""
    width = max(1, -(-max(lengths, default=1) // NUM_BINS))
    bins = Counter((length - 1) // width for length in lengths)
    last = max(bins, default=0)
    return [(n * width + 1, (n + 1) * width, bins[n]) for n in range(last + 1)]


def _histogram(lengths: Sequence[int], max_length: int) -> Table:
    table = Table(title="tokens per example", title_justify="left", box=None)
    for name in ("from", "to", "examples"):
        table.add_column(name, justify="right")
    table.add_column()
    rows = _bins(lengths)
    most = max(1, max(count for _, _, count in rows))
    for low, high, count in rows:
        bar = "█" * round(BAR_WIDTH * count / most)
        if low <= max_length < high:
            bar += f"  ← max_length {max_length:,}"
        table.add_row(f"{low:,}", f"{high:,}", f"{count:,}", bar)
    return table


def _facts(sequences: Sequence[Encoded], counts: ExampleCounts, is_final: bool) -> list[str]:
    num_tokens = sum(len(sequence.ids) for sequence in sequences)
    num_learnt = sum(sum(sequence.is_learnt) for sequence in sequences)
    share = num_learnt / num_tokens if num_tokens else 0.0
    lines = [f"{num_tokens:,} tokens, {num_learnt:,} of them learnt ({share:.1%})"]
    if is_final:
        split = f"; {counts.split:,} longer dialogues were split" if counts.split else ""
        lines.append(
            f"{counts.used:,} examples used, {counts.truncated:,} of them truncated{split}"
        )
    lines += [
        f"{number:,} dropped: {reason}" for reason, number in sorted(counts.dropped.items())
    ] or ["none dropped"]
    return lines


def _packing(lengths: Sequence[int], max_length: int) -> str:
    num_rows = packed_rows(lengths, max_length)
    share = sum(lengths) / (num_rows * max_length) if num_rows else 0.0
    return (
        f"packed into rows of {max_length:,}: {num_rows:,} rows, {share:.1%} of them tokens "
        "(longest first, each into the fullest row it fits)"
    )


def packed_rows(lengths: Sequence[int], row_length: int) -> int:
    """Rows that sequences fill if each goes, longest first, into the fullest one it fits."""
    free_counts: Counter[int] = Counter()  # free tokens -> rows with as many
    free: list[int] = []  # the keys of that, in order
    num_rows = 0
    for length in sorted(lengths, reverse=True):
        place = bisect_left(free, length)
        if place == len(free):
            num_rows += 1
            left = row_length - length
        else:
            left = free[place] - length
            free_counts[free[place]] -= 1
            if not free_counts[free[place]]:
                del free[place]
        if not free_counts[left]:
            insort(free, left)
        free_counts[left] += 1
    return num_rows
