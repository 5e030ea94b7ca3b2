"""Dataset rows of any known format -> dialogues, preference pairs and rated answers.

    sources.py: rows with their line -> formats.py: checked turns -> here: the mixture

A row that cannot be used as it is stops the run with its file and line, or is dropped and counted.
"""

import hashlib
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from olmo_base.run.artefact import ExampleCounts
from olmo_base.run.errors import DataError
from olmo_base.run.recipe import RecipeError, setting
from open_instruct.formats import (
    DIALOGUE_FORMATS,
    PAIR_FORMATS,
    PROMPT_FORMATS,
    RATED_FORMATS,
    TEXT_FORMAT,
    Format,
    Made,
    Rating,
    Sides,
    check_pair,
    check_rated,
    margin_of,
    recognise,
    select_pairs,
)
from open_instruct.sources import Row, Source, read_rows, rows_of, source_files
from open_instruct.turns import (
    ASKING,
    BadRow,
    Message,
    Tools,
    check_dialogue,
    check_order,
    checked_text,
    kind_of,
    read_tools,
)

__all__ = [
    "BadRow",
    "DataConfig",
    "Dialogue",
    "Message",
    "Pair",
    "Prompt",
    "Rated",
    "Source",
    "SourceUse",
    "mixture_lines",
    "read_dialogues",
    "read_pairs",
    "read_prompts",
    "read_rated",
    "read_rows",
    "source_files",
]

TABLE_WIDTH = 120  # characters of the mixture's table

# ---------------------------------------------------------------- what a recipe says about data

OnBadRow = Literal["error", "drop"]
OnTooLong = Literal["error", "drop", "truncate_left", "truncate_right", "split_turns"]


@dataclass(frozen=True)
class DataConfig:
    """The data keys of a post-training recipe."""

    dataset_mixer: tuple[Source, ...] = setting()
    eval_dataset_mixer: tuple[Source, ...] = ()  # held out; its loss is logged
    max_length: int = setting(2048, low=2, help="tokens")
    learn_turns: Literal["all", "last"] = "all"  # of the assistant's; a turn may opt out by itself
    on_bad_row: OnBadRow = setting("error")
    on_too_long: OnTooLong = setting("error")
    max_too_long_fraction: float = setting(0.01, low=0, high=1)
    decontaminate_against: tuple[str, ...] = ()  # files of evaluation data
    keep_tokenised: bool = setting(
        True, changes_result=False, help="in a folder beside output_dir, for the next run"
    )

    def __post_init__(self) -> None:
        if not self.dataset_mixer:
            raise RecipeError("dataset_mixer", "names no data. List at least one path.")


# ---------------------------------------------------------------- what comes out


@dataclass(frozen=True)
class Dialogue:
    """Turns that end with the assistant's, and the row they came from.

    A row of plain text has no turns; all of its ``text`` is learnt.
    """

    messages: list[Message]
    source: str
    line: int
    text: str | None = None
    tools: Tools | None = None


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first preferred, and the row they came from."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    source: str
    line: int
    margin: float = 0.0  # by how much the first is better, if the row says it
    tools: Tools | None = None


@dataclass(frozen=True)
class Rated:
    """One answer to a prompt, good or bad, and the row it came from."""

    prompt: list[Message]
    answer: list[Message]
    is_desirable: bool
    source: str
    line: int
    tools: Tools | None = None


@dataclass(frozen=True)
class Prompt:
    """Turns that an assistant is to answer, and the row they came from."""

    messages: list[Message]
    source: str
    line: int
    tools: Tools | None = None


@dataclass(frozen=True)
class SourceUse:
    """One line of the mixture's table: what was asked of a source and what it gave."""

    path: str
    formats: tuple[str, ...]  # as recognised in its rows
    asked: str  # in words: "all rows", "500 train rows", "2.5 times the rows"
    available: int  # usable rows
    used: int


def mixture_lines(uses: Sequence[SourceUse]) -> list[str]:
    """The mixture as the lines of a table, one row a source, for the log."""
    table = Table("source", "format", "asked for", "usable", "used", box=SIMPLE, pad_edge=False)
    for column in table.columns[3:]:
        column.justify = "right"
    table.columns[0].overflow = "fold"
    for use in uses:
        numbers = (f"{use.available:,}", f"{use.used:,}")
        table.add_row(*map(Text, (use.path, ", ".join(use.formats), use.asked, *numbers)))
    console = Console(file=io.StringIO(), width=TABLE_WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines() if line.strip()]


# ---------------------------------------------------------------- rows -> the mixture

Example = TypeVar("Example", Dialogue, Pair, Rated, Prompt)


def read_dialogues(
    sources: Sequence[Source],
    *,
    seed: int,
    on_bad_row: OnBadRow,
    counts: ExampleCounts,
    uses: list[SourceUse] | None = None,
) -> list[Dialogue]:
    """The dialogues of a mixture, source by source in the order of their rows.

    Dropped rows are added to ``counts`` and, if given, a line for each source to ``uses``.
    Errors: DataError with file and line, UserError for a source that cannot be found.
    """

    def dialogue(row: Row, form: Format[list[Message]], source: Source) -> list[Dialogue]:
        if form is TEXT_FORMAT:
            text = checked_text(row.value["text"], "'text'")
            return [Dialogue([], row.source, row.line, text)]
        messages = form.read(row.value)
        check_dialogue(messages)
        return [Dialogue(messages, row.source, row.line, tools=read_tools(row.value))]

    return _read(sources, DIALOGUE_FORMATS, dialogue, seed, on_bad_row, counts, uses)


def read_pairs(
    sources: Sequence[Source],
    *,
    seed: int,
    on_bad_row: OnBadRow,
    counts: ExampleCounts,
    uses: list[SourceUse] | None = None,
    with_margin: bool = False,
) -> list[Pair]:
    """The preference pairs of a mixture; everything else as in ``read_dialogues``.

    ``with_margin`` reads each row's ``margin``, a number, where it has one.
    """

    def pairs(row: Row, form: Format[list[Sides]], source: Source) -> list[Pair]:
        margin = margin_of(row.value) if with_margin else 0.0
        selected = select_pairs(form.read(row.value), source.scored_pairs)
        for sides in selected:
            check_pair(*sides)
        tools = read_tools(row.value)
        return [Pair(*sides, row.source, row.line, margin, tools) for sides in selected]

    return _read(sources, PAIR_FORMATS, pairs, seed, on_bad_row, counts, uses)


def read_rated(
    sources: Sequence[Source],
    *,
    seed: int,
    on_bad_row: OnBadRow,
    counts: ExampleCounts,
    uses: list[SourceUse] | None = None,
) -> list[Rated]:
    """The rated answers of a mixture; everything else as in ``read_dialogues``."""

    def rated(row: Row, form: Format[Rating], source: Source) -> list[Rated]:
        prompt, answer, is_desirable = form.read(row.value)
        check_rated(prompt, answer)
        tools = read_tools(row.value)
        return [Rated(prompt, answer, is_desirable, row.source, row.line, tools)]

    return _read(sources, RATED_FORMATS, rated, seed, on_bad_row, counts, uses)


def read_prompts(
    sources: Sequence[Source],
    *,
    seed: int,
    on_bad_row: OnBadRow,
    counts: ExampleCounts,
    uses: list[SourceUse] | None = None,
) -> list[Prompt]:
    """What is asked in a mixture of any rows: the turns before the last answer, if there is one.

    Everything else as in ``read_dialogues``.
    """

    def prompts(row: Row, form: Format[list[Message]], source: Source) -> list[Prompt]:
        messages = form.read(row.value)
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        check_order(messages, "the prompt")
        if not messages or messages[-1]["role"] not in ASKING:
            raise BadRow(
                "prompt does not end with the user",
                "the prompt does not end with a user turn, and nothing else can be answered.",
                "End it with a user turn.",
            )
        return [Prompt(messages, row.source, row.line, read_tools(row.value))]

    return _read(sources, PROMPT_FORMATS, prompts, seed, on_bad_row, counts, uses)


def _read(
    sources: Sequence[Source],
    formats: Sequence[Format[Made]],
    make: Callable[[Row, Format[Made], Source], list[Example]],
    seed: int,
    on_bad_row: OnBadRow,
    counts: ExampleCounts,
    uses: list[SourceUse] | None,
) -> list[Example]:
    mixture: list[Example] = []
    for position, source in enumerate(sources):
        examples: list[Example] = []
        names: set[str] = set()
        form: Format[Made] | None = None
        file = ""
        for row in rows_of(source):
            if row.source != file:  # a folder's files may differ in format
                file, form = row.source, None
            try:
                content = _object(row.value)
                candidate = form or recognise(content, formats)
                examples += make(row, candidate, source)
                form = candidate  # all rows of a file have the format of its first good one
                names.add(form.name)
            except BadRow as bad:
                if on_bad_row == "error":
                    number = f"row {row.number}: " if row.number is not None else ""
                    raise DataError(
                        row.source, row.line, number + bad.problem, bad.next_step
                    ) from None
                counts.drop(bad.reason)
        if source.part != "all":
            examples = [item for item in examples if _is_in_part(item, source)]
        taken = _take(examples, source, random.Random(f"{seed}/{position}"))
        mixture += taken
        if uses is not None:
            uses.append(
                SourceUse(
                    source.path, tuple(sorted(names)), _asked(source), len(examples), len(taken)
                )
            )
    return mixture


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, dict):
        raise BadRow(
            "not an object",
            f"the row is {kind_of(value)}, not an object with keys.",
            'Write rows such as {"messages": [...]}.',
        )
    return value


def _asked(source: Source) -> str:
    rows = "rows" if source.part == "all" else f"{source.part} rows"
    if source.samples is not None:
        return f"{source.samples:,} {rows}"
    if source.fraction is not None:
        return f"{source.fraction:.4g} of the {rows}"
    if source.repeat is not None:
        return f"{source.repeat:g} times the {rows}"
    return f"all {rows}"


def _is_in_part(example: Dialogue | Pair | Rated | Prompt, source: Source) -> bool:
    turns = example.messages if isinstance(example, Dialogue | Prompt) else example.prompt
    text = example.text if isinstance(example, Dialogue) else None
    question = text or next(turn["content"] for turn in turns if turn["role"] == "user")
    digest = hashlib.blake2b(question.encode("utf-8"), digest_size=8).digest()
    is_held_out = int.from_bytes(digest, "big") < source.held_out_fraction * 2**64
    return is_held_out == (source.part == "held_out")


def _take(examples: list[Example], source: Source, draw: random.Random) -> list[Example]:
    """As many examples as the source asks for: a drawn subset, in the order of the rows."""
    if not examples:
        raise DataError(
            source.path,
            None,
            f"no row can be used (asked for {_asked(source)}).",
            "Set on_bad_row: error to see why at the first of them.",
        )
    number = len(examples)
    if source.samples is not None:
        if source.samples > number:
            raise DataError(
                source.path,
                None,
                f"samples: {source.samples:,} rows are asked for and {number:,} can be used.",
                f"Ask for fewer, or for repeat: {source.samples / number:.4g}.",
            )
        whole, rest = 0, source.samples
    else:
        share = source.fraction if source.fraction is not None else source.repeat or 1.0
        whole, rest = divmod(max(1, round(share * number)), number)
    drawn = sorted(draw.sample(range(number), rest))
    return examples * whole + [examples[index] for index in drawn]
