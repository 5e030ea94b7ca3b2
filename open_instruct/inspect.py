"""What a model will see of its data: ``open-instruct data inspect RECIPE`` for sft and dpo.

recipe -> examples -> the mixture, a few examples with what is learnt in colour, lengths, drops
"""

import random
import unicodedata
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from olmo_base.run.artefact import ExampleCounts
from olmo_base.run.errors import UserError
from open_instruct.encode import ChatEncoder, Encoded, EncodedPair
from open_instruct.examples import (
    Dialogue,
    Pair,
    Rated,
    SourceUse,
    mixture_lines,
    read_dialogues,
    read_pairs,
    read_rated,
)
from open_instruct.lengths import (
    encode_whole_dialogues,
    encode_whole_pairs,
    encode_whole_rated,
    fit_dialogues,
    fit_pairs,
    fit_rated,
    pair_length,
)
from open_instruct.preference import PreferenceRecipe
from open_instruct.sft import SftRecipe
from open_instruct.tuning import encoder_of

NUM_BINS = 12
BAR_WIDTH = 40  # characters


def inspect_recipe(
    recipe: SftRecipe | PreferenceRecipe,
    *,
    num_shown: int = 3,
    by_token: bool = False,
    console: Console | None = None,
) -> None:
    """Print the training data of a recipe as its model will see it; writes nothing to disk.

    ``by_token`` shows one token a line, with its id. Errors: those of the stage itself. One about
    lengths comes last, after they are shown.
    """
    console = console or Console()
    encoder = encoder_of(recipe)
    data, seed = recipe.data, recipe.run.seed
    counts, uses = ExampleCounts(), list[SourceUse]()
    whole: Sequence[tuple[Dialogue | Pair | Rated, Encoded | EncodedPair]]
    too_long: UserError | None = None
    if isinstance(recipe, SftRecipe):
        dialogues = read_dialogues(
            data.dataset_mixer, seed=seed, on_bad_row=data.on_bad_row, counts=counts, uses=uses
        )
        whole = encoded_dialogues = encode_whole_dialogues(dialogues, encoder, data, counts)
        try:
            fit_dialogues(encoded_dialogues, encoder, data, counts)
        except UserError as error:
            too_long = error
    elif recipe.loss.is_rated:
        rated = read_rated(
            data.dataset_mixer, seed=seed, on_bad_row=data.on_bad_row, counts=counts, uses=uses
        )
        encoded_rated = encode_whole_rated(rated, encoder, data, counts)
        whole = [(item, encoded.sequence) for item, encoded in encoded_rated]
        try:
            fit_rated(encoded_rated, encoder, data, counts)
        except UserError as error:
            too_long = error
    else:
        pairs = read_pairs(
            data.dataset_mixer, seed=seed, on_bad_row=data.on_bad_row, counts=counts, uses=uses
        )
        whole = encoded_pairs = encode_whole_pairs(pairs, encoder, data, counts)
        try:
            fit_pairs(encoded_pairs, encoder, data, counts)
        except UserError as error:
            too_long = error

    drawn = random.Random(seed).sample(range(len(whole)), min(num_shown, len(whole)))
    for number in sorted(drawn):
        item, encoded = whole[number]
        console.print(Rule(Text(f"{item.source}, line {item.line}"), align="left"))
        for name, part in _parts(encoded):
            if isinstance(item, Rated):
                name = "a good answer" if item.is_desirable else "a bad answer"
            console.print(
                Text(f"{name}: {len(part.ids)} tokens, {sum(part.is_learnt)} learnt", "dim")
            )
            show = _token_lines if by_token else _coloured
            console.print(show(part, encoder, console), soft_wrap=True)
    console.print(Rule())
    for line in mixture_lines(uses):
        console.print(Text(line), soft_wrap=True)
    lengths = [
        pair_length(encoded) if isinstance(encoded, EncodedPair) else len(encoded.ids)
        for _, encoded in whole
    ]
    console.print(_histogram(lengths, data.max_length))
    _print_totals(console, [encoded for _, encoded in whole], counts, is_final=too_long is None)
    if too_long is not None:
        raise too_long


def _parts(encoded: Encoded | EncodedPair) -> list[tuple[str, Encoded]]:
    """An example as the stretches of ids that are shown one below the other."""
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


def _histogram(lengths: Sequence[int], max_length: int) -> Table:
    """How many examples have how many tokens; bins of equal width."""
    table = Table(title="tokens per example", title_justify="left", box=None)
    for name in ("from", "to", "examples"):
        table.add_column(name, justify="right")
    table.add_column()
    width = max(1, -(-max(lengths, default=1) // NUM_BINS))
    bins = [0] * NUM_BINS
    for length in lengths:
        bins[(length - 1) // width] += 1
    last = max((number for number, count in enumerate(bins) if count), default=0)
    for number, count in enumerate(bins[: last + 1]):
        low, high = number * width + 1, (number + 1) * width
        bar = "█" * round(BAR_WIDTH * count / max(bins))
        if low <= max_length < high:
            bar += f"  ← max_length {max_length:,}"
        table.add_row(f"{low:,}", f"{high:,}", f"{count:,}", bar)
    return table


def _print_totals(
    console: Console,
    encoded: Sequence[Encoded | EncodedPair],
    counts: ExampleCounts,
    is_final: bool,
) -> None:
    sequences = [
        side
        for item in encoded
        for side in ((item,) if isinstance(item, Encoded) else (item.chosen, item.rejected))
    ]
    num_tokens = sum(len(sequence.ids) for sequence in sequences)
    num_learnt = sum(sum(sequence.is_learnt) for sequence in sequences)
    share = num_learnt / num_tokens if num_tokens else 0.0
    lines = [f"{num_tokens:,} tokens, {num_learnt:,} of them learnt ({share:.1%})"]
    if is_final:
        lines.append(f"{counts.used:,} examples used, {counts.truncated:,} of them truncated")
    lines += [
        f"{number:,} dropped: {reason}" for reason, number in sorted(counts.dropped.items())
    ] or ["none dropped"]
    for line in lines:
        console.print(Text(line), soft_wrap=True)
