"""Dataset rows of any known format -> dialogues, preference pairs and rated answers.

    files, folders, hub names -> rows with their line -> one format -> checked turns -> the mixture

A row that cannot be used as it is stops the run with its file and line, or is dropped and counted.
"""

import gzip
import hashlib
import itertools
import json
import math
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypedDict, TypeVar

from olmo_base.run.artefact import ExampleCounts
from olmo_base.run.errors import DataError, UserError
from olmo_base.run.recipe import RecipeError, setting

# ---------------------------------------------------------------- what a recipe says about data

OnBadRow = Literal["error", "drop"]
OnTooLong = Literal["error", "drop", "truncate_left", "truncate_right"]


@dataclass(frozen=True)
class Source:
    """One item of a ``dataset_mixer``: where rows are and how many to take.

    At most one of ``samples`` (a count), ``fraction`` (a share, drawn by the seed) and ``repeat``
    (2.5: every row twice and half of them once more); none of them takes every row once.

    ``part`` shares one set between training and its held-out loss: the hash of a row's first
    question decides, so neither seed nor order nor a repeated question moves a row across.
    """

    path: str  # a file, a folder of files, or the name of a data set on the Hugging Face hub
    samples: int | None = setting(None, low=1)
    fraction: float | None = setting(None, above=0, high=1)
    repeat: float | None = setting(None, low=1)
    part: Literal["all", "train", "held_out"] = setting("all")
    held_out_fraction: float = setting(0.1, above=0, below=1)  # of all rows, where part is not all
    split: str = "train"  # of a data set on the hub

    def __post_init__(self) -> None:
        asked = [key for key in ("samples", "fraction", "repeat") if getattr(self, key) is not None]
        if len(asked) > 1:
            raise RecipeError(
                asked[1], f"{self.path} asks for {' and '.join(asked)}. Keep one of them."
            )


@dataclass(frozen=True)
class DataConfig:
    """The data keys of a post-training recipe."""

    dataset_mixer: tuple[Source, ...] = setting()
    eval_dataset_mixer: tuple[Source, ...] = ()  # held out; its loss is logged
    max_length: int = setting(2048, low=2, help="tokens")
    on_bad_row: OnBadRow = setting("error")
    on_too_long: OnTooLong = setting("error")
    max_too_long_fraction: float = setting(0.01, low=0, high=1)

    def __post_init__(self) -> None:
        if not self.dataset_mixer:
            raise RecipeError("dataset_mixer", "names no data. List at least one path.")


# ---------------------------------------------------------------- what comes out


class Message(TypedDict):
    """One turn of a dialogue."""

    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True)
class Dialogue:
    """Turns that end with the assistant's, and the row they came from."""

    messages: list[Message]
    source: str
    line: int


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first preferred, and the row they came from."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    source: str
    line: int
    margin: float = 0.0  # by how much the first is better, if the row says it


@dataclass(frozen=True)
class Rated:
    """One answer to a prompt, good or bad, and the row it came from."""

    prompt: list[Message]
    answer: list[Message]
    is_desirable: bool
    source: str
    line: int


@dataclass(frozen=True)
class Prompt:
    """Turns that end with the user's, and the row they came from."""

    messages: list[Message]
    source: str
    line: int


@dataclass(frozen=True)
class SourceUse:
    """One line of the mixture's table: what was asked of a source and what it gave."""

    path: str
    formats: tuple[str, ...]  # as recognised in its rows
    asked: str  # in words: "all rows", "500 train rows", "2.5 times the rows"
    available: int  # usable rows
    used: int


def mixture_lines(uses: Sequence[SourceUse]) -> list[str]:
    """The mixture, one line a source, for the log."""
    return [
        f"{use.path}: {use.used:,} used of {use.available:,} usable rows "
        f"(asked for {use.asked}; format {', '.join(use.formats)})"
        for use in uses
    ]


class BadRow(Exception):
    """A row that cannot be used. ``reason`` is what such rows are counted under."""

    def __init__(self, reason: str, problem: str, next_step: str = "") -> None:
        super().__init__(problem)
        self.reason = reason
        self.problem = problem
        self.next_step = next_step


# ---------------------------------------------------------------- files -> rows with their line

READABLE = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class Row:
    """A row as it stands in its source; ``value`` is a BadRow if it could not be parsed."""

    value: Any
    source: str
    line: int
    number: int | None = None  # of the row, where that is not its line


def source_files(sources: Iterable[Source]) -> list[Path]:
    """The files behind a mixture; names of data sets on the hub have none.

    Errors: UserError for a path that does not exist.
    """
    return [file for source in sources for file in _files(source)]


def _files(source: Source) -> list[Path]:
    path = Path(source.path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(READABLE))
        if not files:
            raise DataError(
                path,
                None,
                "this folder holds no data file.",
                f"Files that can be read end in {', '.join(READABLE)}.",
            )
        return files
    if path.exists():
        return [path]
    if _may_be_on_the_hub(source.path):
        return []
    raise UserError(
        f"{path} does not exist. Give a file ({', '.join(READABLE)}), a folder of them, or the "
        "name of a data set on the Hugging Face hub; paths are relative to the working directory."
    )


def _may_be_on_the_hub(name: str) -> bool:
    has_form = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None
    return has_form and not name.endswith(READABLE)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one JSON Lines file or JSON list, plain or gzipped.

    A line that cannot be parsed is a row whose value is a BadRow. Errors: DataError if the file
    as a whole cannot be read.
    """
    if not path.name.endswith(READABLE):
        raise DataError(
            path,
            None,
            "this kind of file is not read.",
            f"Convert it to JSON lines; files that can be read end in {', '.join(READABLE)}.",
        )
    content = _read_bytes(path).removeprefix(b"\xef\xbb\xbf")  # Windows editors write this mark
    start = content.lstrip()[:1]
    if not start:
        raise DataError(path, None, "this file is empty.", "Remove it or write one row a line.")
    yield from _list_rows(path, content) if start == b"[" else _line_rows(path, content)


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            path, None, f"broken gzip file ({error}).", "Copy or download it again."
        ) from None
    except OSError as error:
        raise DataError(path, None, f"cannot be read ({error.strerror}).") from None


def _line_rows(path: Path, content: bytes) -> Iterator[Row]:
    for line, text in enumerate(content.split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError as error:
            value = _not_utf8(text, error)
        except (ValueError, RecursionError) as error:
            value = _broken_json(error, "Each line must hold one whole JSON object.")
        yield Row(value, str(path), line)


def _list_rows(path: Path, content: bytes) -> Iterator[Row]:
    """The items of a JSON list, with the line each begins in."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = _not_utf8(content, error)
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(path, line, bad.problem, bad.next_step) from None
    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\r\n]*")

    def skip(position: int) -> int:
        return space.match(text, position).end()  # type: ignore[union-attr]  # matches anywhere

    position = skip(skip(0) + 1)  # behind the bracket
    line, counted = 1, 0
    for number in itertools.count(1):
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]" and number == 1:
            raise DataError(path, line, "this JSON list is empty.", "Write rows into it.")
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            bad = _broken_json(error, f"This is row {number} of a JSON list.")
            raise DataError(path, line, bad.problem, bad.next_step) from None
        yield Row(value, str(path), line, number)
        position = skip(position)
        if text[position : position + 1] == "]":
            rest = skip(position + 1)
            if rest == len(text):
                return
            line = text.count("\n", 0, rest) + 1
            raise DataError(path, line, "text after the end of the JSON list.", "Remove it.")
        if text[position : position + 1] != ",":
            line = text.count("\n", 0, position) + 1
            raise DataError(
                path, line, f"broken JSON: a comma or ] must follow row {number}.", "Mend the list."
            )
        position = skip(position + 1)


def _broken_json(error: Exception, next_step: str) -> BadRow:
    if isinstance(error, json.JSONDecodeError):
        detail = f"{error.msg} at column {error.colno}"
    else:
        detail = "nested too deep" if isinstance(error, RecursionError) else str(error)
    return BadRow("broken JSON", f"broken JSON: {detail}.", next_step)


def _not_utf8(text: bytes, error: UnicodeDecodeError) -> BadRow:
    return BadRow(
        "not UTF-8",
        f"not UTF-8: byte 0x{text[error.start]:02x} ({error.reason}).",
        "Save the file as UTF-8.",
    )


def _hub_rows(source: Source) -> Iterator[Row]:
    """The rows of a data set on the Hugging Face hub; the line is the row's number."""
    looked = f"There is no file or folder {source.path} here"
    try:
        from datasets import load_dataset  # optional, and slow to import
    except ImportError:
        raise UserError(
            f"{looked}, and to fetch a data set of that name from the Hugging Face hub the "
            "package datasets is needed: pip install 'open-instruct[data]'."
        ) from None
    try:
        dataset = load_dataset(source.path, split=source.split)
    except Exception as error:  # hub, network, file and split errors have no common base
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(
            f"{looked}, and as a data set of the Hugging Face hub (split {source.split}) it could "
            f"not be loaded: {first_line}"
        ) from error
    for number, value in enumerate(dataset, start=1):
        yield Row(value, f"{source.path} ({source.split})", number, number)


def _rows(source: Source) -> Iterator[Row]:
    files = _files(source)
    if not files:
        return _hub_rows(source)
    return itertools.chain.from_iterable(read_rows(file) for file in files)


# ---------------------------------------------------------------- turns

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",  # ShareGPT
    "assistant": "assistant",
    "gpt": "assistant",  # ShareGPT
}
NOT_YET = {
    "function_call": "tool calls",
    "observation": "tool calls",
    "tool": "tool calls",
    "tool_call": "tool calls",
    "tool_response": "tool calls",
    "function": "tool calls",
    "ipython": "tool calls",
    "developer": "developer turns",
}


def _not_supported(what: str, found: str) -> BadRow:
    return BadRow(
        f"{what} not supported yet",
        f"{found}: {what} are not supported yet.",
        "Remove such rows, or set on_bad_row: drop.",
    )


def _text(value: Any, what: str) -> str:
    """A text that is not empty and can be encoded."""
    if not isinstance(value, str):
        raise BadRow(
            "content is not text", f"{what} is {_kind(value)}, not text.", "Write it as one string."
        )
    if not value.strip():
        raise BadRow("empty content", f"{what} is empty.", "Fill it in or remove the row.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(
            "content is not text",
            f"{what} holds half a surrogate pair (\\ud800 to \\udfff), which is no character.",
            "Remove it.",
        ) from None
    return value


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")


def _a(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"


def _field(row: dict[str, Any], key: str) -> Any:
    if key not in row:
        raise BadRow(
            "missing key",
            f"the key {key!r} is missing; found {_keys(row)}.",
            "Every row needs the keys of the first.",
        )
    return row[key]


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(repr(key) for key in row) or "no keys"


def _turns(value: Any, what: str) -> list[Message]:
    """Turns {role, content} or {from, value}, with our names of the roles."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadRow("turns are not a list", f"{what} is {_kind(value)}, not a list of turns.", "")
    if not value:
        raise BadRow("empty dialogue", f"{what} holds no turns.", "Remove the row.")
    messages: list[Message] = []
    for number, turn in enumerate(value, start=1):
        place = f"turn {number} of {what}"
        if not isinstance(turn, dict):
            raise BadRow("turns are not objects", f"{place} is {_kind(turn)}, not an object.", "")
        is_sharegpt = "from" in turn and "role" not in turn
        role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
        for key in (role_key, content_key):
            if key not in turn:
                raise BadRow("missing key", f"{place} has no key {key!r}; found {_keys(turn)}.", "")
        messages.append({"role": _role(turn[role_key], place), "content": ""})
        for key in ("tool_calls", "function_call", "tool_call_id", "function_calls"):
            if turn.get(key):
                raise _not_supported("tool calls", f"{place} holds {key!r}")
        messages[-1]["content"] = _text(turn[content_key], f"the content of {place}")
    return messages


def _role(value: Any, place: str) -> str:
    if isinstance(value, str) and value in ROLES:
        return ROLES[value]
    if isinstance(value, str) and value in NOT_YET:
        raise _not_supported(NOT_YET[value], f"{place} is of role {value!r}")
    raise BadRow(
        "unknown role", f"{place} has the role {value!r}.", f"Known roles: {', '.join(ROLES)}."
    )


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _check_order(messages: Sequence[Message], what: str) -> None:
    """System first if at all, then user and assistant in turn."""
    roles = [turn["role"] for turn in messages]
    if "system" in roles[1:]:
        number = roles.index("system", 1) + 1
        raise BadRow(
            "system turn not first",
            f"turn {number} of {what} is a system turn; only the first may be.",
            "Move or remove it.",
        )
    first = 1 if roles[:1] == ["system"] else 0
    for number, role in enumerate(roles[first:], start=first):
        needed = "user" if (number - first) % 2 == 0 else "assistant"
        if role == needed:
            continue
        if number == first:
            problem = f"{what} starts with the assistant; a user turn must come before."
        else:
            problem = f"turns {number} and {number + 1} of {what} are both {role} turns."
        raise BadRow("turns do not alternate", problem, "Join or remove turns.")


def _check_dialogue(messages: Sequence[Message], what: str = "the dialogue") -> None:
    roles = [turn["role"] for turn in messages]
    if "assistant" not in roles:
        raise BadRow(
            "no assistant turn",
            f"{what} has no assistant turn, so there is nothing to learn.",
            "Add the answer or remove the row.",
        )
    _check_order(messages, what)
    if roles[-1] != "assistant":
        raise BadRow(
            "ends without an answer",
            f"{what} ends with {_a(roles[-1])} turn that nobody answers.",
            "Add the answer or remove the turn.",
        )


# ---------------------------------------------------------------- formats of dialogues


def _with_system(row: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The turns behind the row's own ``system`` text, if it has one."""
    system = row.get("system")
    if system is None or system == "":
        return messages
    return [{"role": "system", "content": _text(system, "'system'")}, *messages]


def _instruction(row: dict[str, Any], extra_key: str) -> Message:
    """The instruction, and below it the text it is about, if there is one."""
    instruction = _text(_field(row, "instruction"), "'instruction'")
    extra = row.get(extra_key)
    if extra is None or (isinstance(extra, str) and not extra.strip()):
        return _user(instruction)
    extra_text = _text(extra, repr(extra_key))
    return _user(f"{instruction}\n\n{extra_text}")


def _refuse_tools(row: dict[str, Any]) -> None:
    if row.get("tools") not in (None, "", "[]", []):
        raise _not_supported("tool calls", "the row holds 'tools'")


def _from_messages(row: dict[str, Any]) -> list[Message]:
    if isinstance(row.get("label"), bool):
        raise BadRow(
            "rated answer",
            "the row holds 'messages' and a 'label': it says of an answer whether it is a good "
            "one, and a bad one must not be learnt by heart.",
            "Train on such rows with stage: dpo and loss_type: kto.",
        )
    _refuse_tools(row)
    return _turns(_field(row, "messages"), "'messages'")


def _from_sharegpt(row: dict[str, Any]) -> list[Message]:
    messages = _turns(_field(row, "conversations"), "'conversations'")
    _refuse_tools(row)
    return _with_system(row, messages)


def _from_alpaca(row: dict[str, Any]) -> list[Message]:
    if row.get("history"):
        raise _not_supported("earlier turns in 'history'", "the row holds 'history'")
    answer = _assistant(_text(_field(row, "output"), "'output'"))
    return _with_system(row, [_instruction(row, "input"), answer])


def _from_prompt_completion(row: dict[str, Any]) -> list[Message]:
    return _prompt(_field(row, "prompt")) + _answer(_field(row, "completion"), "'completion'")


def _from_instruction_response(row: dict[str, Any]) -> list[Message]:
    answer = _assistant(_text(_field(row, "response"), "'response'"))
    return _with_system(row, [_instruction(row, "context"), answer])


def _prompt(value: Any) -> list[Message]:
    if isinstance(value, str):
        return [_user(_text(value, "'prompt'"))]
    return _turns(value, "'prompt'")


def _answer(value: Any, what: str) -> list[Message]:
    if isinstance(value, str):
        return [_assistant(_text(value, what))]
    return _turns(value, what)


# ---------------------------------------------------------------- formats of pairs

Sides = tuple[list[Message], list[Message], list[Message]]  # prompt, chosen, rejected


def _from_prompt_pair(row: dict[str, Any]) -> Sides:
    prompt = _prompt(_field(row, "prompt"))
    sides = [_answer(_field(row, key), repr(key)) for key in ("chosen", "rejected")]
    if all(side[: len(prompt)] == prompt for side in sides):
        sides = [side[len(prompt) :] for side in sides]  # whole dialogues, the prompt in them
    elif all(side[0]["role"] != "assistant" for side in sides):
        return _split_shared(
            sides[0], sides[1]
        )  # whole dialogues with more before the answer than the prompt
    return prompt, sides[0], sides[1]


def _from_sharegpt_pair(row: dict[str, Any]) -> Sides:
    _refuse_tools(row)
    prompt = _with_system(row, _turns(_field(row, "conversations"), "'conversations'"))
    chosen, rejected = (_answer(_field(row, key), repr(key)) for key in ("chosen", "rejected"))
    return prompt, chosen, rejected


def _from_instruction_pair(row: dict[str, Any]) -> Sides:
    prompt = _with_system(row, [_instruction(row, "input")])
    chosen, rejected = (_answer(_field(row, key), repr(key)) for key in ("chosen", "rejected"))
    return prompt, chosen, rejected


def _from_whole_dialogues(row: dict[str, Any]) -> Sides:
    for key in ("chosen", "rejected"):
        if isinstance(_field(row, key), str):
            raise BadRow(
                "unknown format",
                f"{key!r} is one text and there is no 'prompt', so it cannot be told where the "
                "answer begins.",
                "Write {prompt, chosen, rejected}.",
            )
    return _split_shared(*(_turns(row[key], repr(key)) for key in ("chosen", "rejected")))


def _split_shared(chosen: list[Message], rejected: list[Message]) -> Sides:
    """Two whole dialogues, cut where they part."""
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    if length == len(chosen) == len(rejected):
        raise _same_answers()
    return chosen[:length], chosen[length:], rejected[length:]


def _same_answers() -> BadRow:
    return BadRow(
        "chosen and rejected are the same",
        "chosen and rejected are the same, so neither is preferred.",
        "Remove the row.",
    )


def _margin(row: dict[str, Any]) -> float:
    margin = row.get("margin", 0.0)
    is_number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if not is_number or not math.isfinite(margin):
        raise BadRow(
            "margin is not a number",
            f"'margin' is {margin!r}.",
            "It must be a number: by how much the chosen answer is better.",
        )
    return float(margin)


def _check_pair(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> None:
    if not prompt:
        raise BadRow("no shared prompt", "chosen and rejected share no prompt.", "Remove the row.")
    _check_order(prompt, "the prompt")
    if prompt[-1]["role"] != "user":
        raise BadRow(
            "prompt does not end with the user",
            f"the prompt ends with {_a(prompt[-1]['role'])} turn; an answer follows a user turn.",
            "Write whole dialogues in chosen and rejected, or end the prompt with a user turn.",
        )
    for what, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise BadRow("no answer", f"{what} holds no answer.", "Remove the row.")
        _check_dialogue([*prompt, *answer], f"the prompt with {what}")
    if chosen == rejected:
        raise _same_answers()


# ---------------------------------------------------------------- formats of rated answers

Rating = tuple[list[Message], list[Message], bool]  # prompt, answer, whether it is a good one


def _label(row: dict[str, Any]) -> bool:
    label = _field(row, "label")
    if not isinstance(label, bool):
        raise BadRow(
            "label is not true or false",
            f"'label' is {_kind(label)}.",
            "It must be true for a good answer and false for a bad one.",
        )
    return label


def _from_rated_completion(row: dict[str, Any]) -> Rating:
    prompt = _prompt(_field(row, "prompt"))
    return prompt, _answer(_field(row, "completion"), "'completion'"), _label(row)


def _from_rated_messages(row: dict[str, Any]) -> Rating:
    _refuse_tools(row)
    messages = _turns(_field(row, "messages"), "'messages'")
    return messages[:-1], messages[-1:], _label(row)


def _check_rated(prompt: list[Message], answer: list[Message]) -> None:
    if not prompt:
        raise BadRow("no prompt", "there is no turn before the answer.", "Add the question.")
    _check_order(prompt, "the prompt")
    if prompt[-1]["role"] != "user":
        raise BadRow(
            "prompt does not end with the user",
            f"the prompt ends with {_a(prompt[-1]['role'])} turn; an answer follows a user turn.",
            "End the prompt with a user turn.",
        )
    _check_dialogue([*prompt, *answer], "the prompt with its answer")


# ---------------------------------------------------------------- which format a row has


Made = TypeVar("Made")


@dataclass(frozen=True)
class Format(Generic[Made]):
    """A way to write a row: the keys that tell it, and how it is read."""

    name: str
    keys: frozenset[str]
    read: Callable[[dict[str, Any]], Made]


# In this order: the first whose keys a row has.
DIALOGUE_FORMATS: tuple[Format[list[Message]], ...] = (
    Format("messages", frozenset({"messages"}), _from_messages),
    Format("ShareGPT", frozenset({"conversations"}), _from_sharegpt),
    Format("Alpaca", frozenset({"instruction", "output"}), _from_alpaca),
    Format("prompt/completion", frozenset({"prompt", "completion"}), _from_prompt_completion),
    Format(
        "instruction/response", frozenset({"instruction", "response"}), _from_instruction_response
    ),
)
_SIDES = frozenset({"chosen", "rejected"})
PAIR_FORMATS: tuple[Format[Sides], ...] = (
    Format("prompt/chosen/rejected", _SIDES | {"prompt"}, _from_prompt_pair),
    Format("ShareGPT pairs", _SIDES | {"conversations"}, _from_sharegpt_pair),
    Format("instruction/chosen/rejected", _SIDES | {"instruction"}, _from_instruction_pair),
    Format("whole dialogues chosen/rejected", _SIDES, _from_whole_dialogues),
)
_LABEL = frozenset({"label"})
RATED_FORMATS: tuple[Format[Rating], ...] = (
    Format("prompt/completion/label", _LABEL | {"prompt", "completion"}, _from_rated_completion),
    Format("messages/label", _LABEL | {"messages"}, _from_rated_messages),
)


def _recognise(row: dict[str, Any], formats: Sequence[Format[Made]]) -> Format[Made]:
    for form in formats:
        if form.keys <= row.keys():
            return form
    known = "; ".join(f"{', '.join(sorted(form.keys))} ({form.name})" for form in formats)
    close = [form for form in formats if form.keys & row.keys()]
    if close:
        missing = ", ".join(repr(key) for key in sorted(close[0].keys - row.keys()))
        problem = f"missing key {missing} of the format {close[0].name}; found {_keys(row)}."
        raise BadRow("missing key", problem, f"Known formats: {known}.")
    raise BadRow(
        "unknown format", f"no known format has the keys {_keys(row)}.", f"Known formats: {known}."
    )


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

    def dialogue(row: Row, form: Format[list[Message]]) -> Dialogue:
        messages = form.read(row.value)
        _check_dialogue(messages)
        return Dialogue(messages, row.source, row.line)

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

    def pair(row: Row, form: Format[Sides]) -> Pair:
        prompt, chosen, rejected = form.read(row.value)
        _check_pair(prompt, chosen, rejected)
        margin = _margin(row.value) if with_margin else 0.0
        return Pair(prompt, chosen, rejected, row.source, row.line, margin)

    return _read(sources, PAIR_FORMATS, pair, seed, on_bad_row, counts, uses)


def read_rated(
    sources: Sequence[Source],
    *,
    seed: int,
    on_bad_row: OnBadRow,
    counts: ExampleCounts,
    uses: list[SourceUse] | None = None,
) -> list[Rated]:
    """The rated answers of a mixture; everything else as in ``read_dialogues``."""

    def rated(row: Row, form: Format[Rating]) -> Rated:
        prompt, answer, is_desirable = form.read(row.value)
        _check_rated(prompt, answer)
        return Rated(prompt, answer, is_desirable, row.source, row.line)

    return _read(sources, RATED_FORMATS, rated, seed, on_bad_row, counts, uses)


def _read(
    sources: Sequence[Source],
    formats: Sequence[Format[Made]],
    make: Callable[[Row, Format[Made]], Example],
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
        for row in _rows(source):
            if row.source != file:  # a folder's files may differ in format
                file, form = row.source, None
            try:
                content = _object(row.value)
                form = form or _recognise(content, formats)
                examples.append(make(row, form))
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
            f"the row is {_kind(value)}, not an object with keys.",
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
    question = next(turn["content"] for turn in turns if turn["role"] == "user")
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


# ---------------------------------------------------------------- prompts of any row


def _first_part(form: Format[Sides] | Format[Rating]) -> Format[list[Message]]:
    """The same rows, of which only the prompt is read."""
    return Format(form.name, form.keys, lambda row: form.read(row)[0])


PROMPT_FORMATS: tuple[Format[list[Message]], ...] = (
    *map(_first_part, (*PAIR_FORMATS, *RATED_FORMATS)),
    *DIALOGUE_FORMATS,
    Format("prompt", frozenset({"prompt"}), lambda row: _prompt(_field(row, "prompt"))),
    Format(
        "instruction",
        frozenset({"instruction"}),
        lambda row: _with_system(row, [_instruction(row, "input")]),
    ),
)


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

    def prompt(row: Row, form: Format[list[Message]]) -> Prompt:
        messages = form.read(row.value)
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        _check_order(messages, "the prompt")
        if not messages or messages[-1]["role"] != "user":
            raise BadRow(
                "prompt does not end with the user",
                "the prompt does not end with a user turn, and nothing else can be answered.",
                "End it with a user turn.",
            )
        return Prompt(messages, row.source, row.line)

    return _read(sources, PROMPT_FORMATS, prompt, seed, on_bad_row, counts, uses)
