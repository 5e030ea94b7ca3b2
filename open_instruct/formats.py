"""The formats of rows: the keys that tell each one, and how its turns are read.

a row -> the first format whose keys it has -> a dialogue, a pair or a rated answer
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from open_instruct.turns import (
    ASKING,
    BadRow,
    Message,
    assistant_turn,
    check_dialogue,
    check_order,
    checked_text,
    field,
    kind_of,
    listed_keys,
    read_turns,
    user_turn,
    with_article,
)

ScoredPairs = Literal["best_worst", "best_each", "all"]

# ---------------------------------------------------------------- formats of dialogues


def _with_system(row: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The turns behind the row's own ``system`` text, if it has one."""
    system = row.get("system")
    if system is None or system == "":
        return messages
    return [{"role": "system", "content": checked_text(system, "'system'")}, *messages]


def _instruction(row: dict[str, Any], extra_key: str) -> Message:
    """The instruction, and below it the text it is about, if there is one."""
    instruction = checked_text(field(row, "instruction"), "'instruction'")
    extra = row.get(extra_key)
    if extra is None or (isinstance(extra, str) and not extra.strip()):
        return user_turn(instruction)
    extra_text = checked_text(extra, repr(extra_key))
    return user_turn(f"{instruction}\n\n{extra_text}")


def _from_messages(row: dict[str, Any]) -> list[Message]:
    if isinstance(row.get("label"), bool):
        raise BadRow(
            "rated answer",
            "the row holds 'messages' and a 'label': it says of an answer whether it is a good "
            "one, and a bad one must not be learnt by heart.",
            "Train on such rows with stage: dpo and loss_type: kto.",
        )
    return read_turns(field(row, "messages"), "'messages'")


def _from_sharegpt(row: dict[str, Any]) -> list[Message]:
    messages = read_turns(field(row, "conversations"), "'conversations'")
    return _with_system(row, messages)


def _from_alpaca(row: dict[str, Any]) -> list[Message]:
    if row.get("history"):
        raise BadRow(
            "earlier turns in 'history'",
            "the row holds 'history', earlier turns that this format does not read.",
            "Write them as messages, or set on_bad_row: drop.",
        )
    answer = assistant_turn(checked_text(field(row, "output"), "'output'"))
    return _with_system(row, [_instruction(row, "input"), answer])


def _from_prompt_completion(row: dict[str, Any]) -> list[Message]:
    return _prompt(field(row, "prompt")) + _answer(field(row, "completion"), "'completion'")


def _from_instruction_response(row: dict[str, Any]) -> list[Message]:
    answer = assistant_turn(checked_text(field(row, "response"), "'response'"))
    return _with_system(row, [_instruction(row, "context"), answer])


def _prompt(value: Any) -> list[Message]:
    if isinstance(value, str):
        return [user_turn(checked_text(value, "'prompt'"))]
    return read_turns(value, "'prompt'")


def _answer(value: Any, what: str) -> list[Message]:
    if isinstance(value, str):
        return [assistant_turn(checked_text(value, what))]
    return read_turns(value, what)


# ---------------------------------------------------------------- formats of pairs


class Sides(NamedTuple):
    """Two answers to one prompt, the first preferred."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def _from_prompt_pair(row: dict[str, Any]) -> list[Sides]:
    prompt = _prompt(field(row, "prompt"))
    sides = [_answer(field(row, key), repr(key)) for key in ("chosen", "rejected")]
    if all(side[: len(prompt)] == prompt for side in sides):
        sides = [side[len(prompt) :] for side in sides]  # whole dialogues, the prompt in them
    elif all(side[0]["role"] != "assistant" for side in sides):  # whole ones that begin earlier
        return _split_shared(sides[0], sides[1])
    return [Sides(prompt, sides[0], sides[1])]


def _from_sharegpt_pair(row: dict[str, Any]) -> list[Sides]:
    prompt = _with_system(row, read_turns(field(row, "conversations"), "'conversations'"))
    chosen, rejected = (_answer(field(row, key), repr(key)) for key in ("chosen", "rejected"))
    return [Sides(prompt, chosen, rejected)]


def _from_instruction_pair(row: dict[str, Any]) -> list[Sides]:
    prompt = _with_system(row, [_instruction(row, "input")])
    chosen, rejected = (_answer(field(row, key), repr(key)) for key in ("chosen", "rejected"))
    return [Sides(prompt, chosen, rejected)]


def _from_whole_dialogues(row: dict[str, Any]) -> list[Sides]:
    for key in ("chosen", "rejected"):
        if isinstance(field(row, key), str):
            raise BadRow(
                "unknown format",
                f"{key!r} is one text and there is no 'prompt', so it cannot be told where the "
                "answer begins.",
                "Write {prompt, chosen, rejected}, or transcripts that begin with 'Human:'.",
            )
    return _split_shared(*(read_turns(row[key], repr(key)) for key in ("chosen", "rejected")))


_SPEAKER = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):")


def _is_transcript(row: dict[str, Any]) -> bool:
    sides = [row["chosen"], row["rejected"]]
    return all(isinstance(side, str) and side.lstrip().startswith("Human:") for side in sides)


def _from_transcripts(row: dict[str, Any]) -> list[Sides]:
    chosen, rejected = (_transcript(row[key], repr(key)) for key in ("chosen", "rejected"))
    return _split_shared(chosen, rejected)


def _transcript(value: Any, what: str) -> list[Message]:
    """The turns of "Human: … Assistant: …", without the blanks around each."""
    pieces = _SPEAKER.split(checked_text(value, what))
    turn = {"Human": user_turn, "Assistant": assistant_turn}
    return [
        turn[speaker](checked_text(text, f"turn {number} of {what}").strip())
        for number, (speaker, text) in enumerate(
            zip(pieces[1::2], pieces[2::2], strict=True), start=1
        )
    ]


def _split_shared(chosen: list[Message], rejected: list[Message]) -> list[Sides]:
    """Two whole dialogues, cut where they part."""
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    if length == len(chosen) == len(rejected):
        raise _same_answers()
    return [Sides(chosen[:length], chosen[length:], rejected[length:])]


# Where one of several answers to a prompt keeps its text, and what it was given for it.
_ANSWER_KEYS = ("text", "content", "completion", "response", "answer")
_SCORE_KEYS = ("score", "overall_score", "rating", "reward")


def _from_scored(row: dict[str, Any], prompt_key: str, answers_key: str) -> list[Sides]:
    """Every two answers with different scores, those of the best answer first."""
    prompt = _prompt(row[prompt_key]) if prompt_key == "prompt" else [_instruction(row, "input")]
    prompt = _with_system(row, prompt)
    answers = row[answers_key]
    if not isinstance(answers, list) or len(answers) < 2:
        raise BadRow(
            "fewer than two answers",
            f"{answers_key!r} must list at least 2 answers to compare.",
            "Remove the row.",
        )
    scores = row.get("scores", [None] * len(answers))
    if not isinstance(scores, list) or len(scores) != len(answers):
        raise BadRow(
            "scores do not match the answers",
            f"'scores' must list one number for each of the {len(answers)} answers.",
            "Mend or remove the row.",
        )
    scored = []
    for number, (answer, score) in enumerate(zip(answers, scores, strict=True), start=1):
        place = f"answer {number} of {answers_key!r}"
        if isinstance(answer, dict):
            if score is None:
                score = _first_of(answer, _SCORE_KEYS, place)
            answer = _first_of(answer, _ANSWER_KEYS, place)
        scored.append((_number(score, f"the score of {place}"), _answer(answer, place)))
    scored.sort(key=lambda item: -item[0])  # stable: of equal ones the earlier answer comes first
    sides = [
        Sides(prompt, better, worse)
        for place, (high, better) in enumerate(scored)
        for low, worse in scored[place + 1 :]
        if high > low
    ]
    if not sides:
        raise BadRow(
            "all answers have one score",
            "all answers have the same score, so none is preferred.",
            "Remove the row.",
        )
    return sides


def _first_of(item: dict[str, Any], keys: Sequence[str], place: str) -> Any:
    for key in keys:
        if item.get(key) is not None:
            return item[key]
    needed = " or ".join(map(repr, keys))
    raise BadRow("missing key", f"{place} has no key {needed}; found {listed_keys(item)}.", "")


def _number(value: Any, what: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise BadRow("score is not a number", f"{what} is {value!r}, not a number.", "Mend it.")
    return float(value)


def select_pairs(sides: list[Sides], scored_pairs: ScoredPairs) -> list[Sides]:
    """Of the pairs that ``_from_scored`` made of one row, those to learn from."""
    best, worst = sides[0].chosen, sides[-1].rejected
    if scored_pairs == "best_worst":
        return [next(pair for pair in sides if pair.chosen is best and pair.rejected is worst)]
    if scored_pairs == "best_each":
        return [pair for pair in sides if pair.chosen is best]
    return sides


def _same_answers() -> BadRow:
    return BadRow(
        "chosen and rejected are the same",
        "chosen and rejected are the same, so neither is preferred.",
        "Remove the row.",
    )


def margin_of(row: dict[str, Any]) -> float:
    margin = row.get("margin", 0.0)
    is_number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if not is_number or not math.isfinite(margin):
        raise BadRow(
            "margin is not a number",
            f"'margin' is {margin!r}.",
            "It must be a number: by how much the chosen answer is better.",
        )
    return float(margin)


def _check_prompt(prompt: list[Message], next_step: str) -> None:
    check_order(prompt, "the prompt")
    if prompt[-1]["role"] not in ASKING:
        raise BadRow(
            "prompt does not end with the user",
            f"the prompt ends with {with_article(prompt[-1]['role'])} turn; an answer follows a "
            "user turn.",
            next_step,
        )


def check_pair(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> None:
    if not prompt:
        raise BadRow("no shared prompt", "chosen and rejected share no prompt.", "Remove the row.")
    _check_prompt(
        prompt, "Write whole dialogues in chosen and rejected, or end the prompt with a user turn."
    )
    for what, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise BadRow("no answer", f"{what} holds no answer.", "Remove the row.")
        check_dialogue([*prompt, *answer], f"the prompt with {what}")
    if chosen == rejected:
        raise _same_answers()


# ---------------------------------------------------------------- formats of rated answers

Rating = tuple[list[Message], list[Message], bool]  # prompt, answer, whether it is a good one


def _label(row: dict[str, Any]) -> bool:
    label = field(row, "label")
    if not isinstance(label, bool):
        raise BadRow(
            "label is not true or false",
            f"'label' is {kind_of(label)}.",
            "It must be true for a good answer and false for a bad one.",
        )
    return label


def _from_rated_completion(row: dict[str, Any]) -> Rating:
    prompt = _prompt(field(row, "prompt"))
    return prompt, _answer(field(row, "completion"), "'completion'"), _label(row)


def _from_rated_messages(row: dict[str, Any]) -> Rating:
    messages = read_turns(field(row, "messages"), "'messages'")
    return messages[:-1], messages[-1:], _label(row)


def check_rated(prompt: list[Message], answer: list[Message]) -> None:
    if not prompt:
        raise BadRow("no prompt", "there is no turn before the answer.", "Add the question.")
    _check_prompt(prompt, "End the prompt with a user turn.")
    check_dialogue([*prompt, *answer], "the prompt with its answer")


# ---------------------------------------------------------------- which format a row has


Made = TypeVar("Made")


@dataclass(frozen=True)
class Format(Generic[Made]):
    """A way to write a row: the keys that tell it, and how it is read."""

    name: str
    keys: frozenset[str]
    read: Callable[[dict[str, Any]], Made]
    fits: Callable[[dict[str, Any]], bool] = lambda row: True  # asked of a row with these keys


# A document, learnt from its first token to its last, without any turns.
TEXT_FORMAT: Format[list[Message]] = Format("text", frozenset({"text"}), lambda row: [])
# In this order: the first whose keys a row has.
DIALOGUE_FORMATS: tuple[Format[list[Message]], ...] = (
    Format("messages", frozenset({"messages"}), _from_messages),
    Format("ShareGPT", frozenset({"conversations"}), _from_sharegpt),
    Format("Alpaca", frozenset({"instruction", "output"}), _from_alpaca),
    Format("prompt/completion", frozenset({"prompt", "completion"}), _from_prompt_completion),
    Format(
        "instruction/response", frozenset({"instruction", "response"}), _from_instruction_response
    ),
    TEXT_FORMAT,
)
_SIDES = frozenset({"chosen", "rejected"})
PAIR_FORMATS: tuple[Format[list[Sides]], ...] = (
    Format("prompt/chosen/rejected", _SIDES | {"prompt"}, _from_prompt_pair),
    Format("ShareGPT pairs", _SIDES | {"conversations"}, _from_sharegpt_pair),
    Format("instruction/chosen/rejected", _SIDES | {"instruction"}, _from_instruction_pair),
    Format("Anthropic HH transcripts", _SIDES, _from_transcripts, _is_transcript),
    Format("whole dialogues chosen/rejected", _SIDES, _from_whole_dialogues),
    *(
        Format(
            f"{prompt}/{answers} with scores",
            frozenset({prompt, answers}),
            functools.partial(_from_scored, prompt_key=prompt, answers_key=answers),
            lambda row: not _SIDES & row.keys(),
        )
        for prompt, answers in (
            ("prompt", "completions"),
            ("instruction", "completions"),
            ("prompt", "responses"),
            ("prompt", "answers"),
        )
    ),
)
_LABEL = frozenset({"label"})
RATED_FORMATS: tuple[Format[Rating], ...] = (
    Format("prompt/completion/label", _LABEL | {"prompt", "completion"}, _from_rated_completion),
    Format("messages/label", _LABEL | {"messages"}, _from_rated_messages),
)


def _prompts_of_sides(form: Format[list[Sides]]) -> Format[list[Message]]:
    """The same rows, of which only the prompt is read."""
    return Format(form.name, form.keys, lambda row: form.read(row)[0].prompt, form.fits)


def _prompt_of_rating(form: Format[Rating]) -> Format[list[Message]]:
    return Format(form.name, form.keys, lambda row: form.read(row)[0], form.fits)


# What is asked in a row of any kind.
PROMPT_FORMATS: tuple[Format[list[Message]], ...] = (
    *map(_prompts_of_sides, PAIR_FORMATS),
    *map(_prompt_of_rating, RATED_FORMATS),
    *(form for form in DIALOGUE_FORMATS if form is not TEXT_FORMAT),
    Format("prompt", frozenset({"prompt"}), lambda row: _prompt(field(row, "prompt"))),
    Format(
        "instruction",
        frozenset({"instruction"}),
        lambda row: _with_system(row, [_instruction(row, "input")]),
    ),
)
_ALL_FORMATS: tuple[Format[Any], ...] = (*DIALOGUE_FORMATS, *PAIR_FORMATS, *RATED_FORMATS)
# What ``columns`` of a source may name.
COLUMNS = {"system", "input", "context", "tools", "margin", "scores"}.union(
    *(form.keys for form in _ALL_FORMATS)
)


def recognise(row: dict[str, Any], formats: Sequence[Format[Made]]) -> Format[Made]:
    for form in formats:
        if form.keys <= row.keys() and form.fits(row):
            return form
    known = "; ".join(f"{', '.join(sorted(form.keys))} ({form.name})" for form in formats)
    close = [form for form in formats if form.keys & row.keys()]
    if close:
        missing = ", ".join(repr(key) for key in sorted(close[0].keys - row.keys()))
        problem = f"missing key {missing} of the format {close[0].name}; found {listed_keys(row)}."
        raise BadRow("missing key", problem, f"Known formats: {known}.")
    raise BadRow(
        "unknown format",
        f"no known format has the keys {listed_keys(row)}.",
        f"Known formats: {known}.",
    )
