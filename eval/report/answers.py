"""A Report -> the questions with every model's answer: a chosen few, and all of them, packed.

The chosen few are read without a script. All of them are packed, a task at a time, and the page's
script unpacks the task that is looked at; packed text cannot act on the page that holds it.
"""

import base64
import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from eval.report.gather import Report
from eval.report.words import NUM_COLORS, Clipped, clipped, visible
from eval.scores import is_right, picked_option

LOG_TWO = 0.6931471805599453
MAX_BROWSED = 20_000  # questions of a task in the page; all are in samples/
MAX_BROWSED_CHARACTERS = 4000  # of one text there
MIN_SHARED = 200  # characters that prompts begin with, to be kept once


@dataclass(frozen=True)
class Answer:
    """What one model answered."""

    model: str
    color: int
    text: Clipped
    is_right: bool | None  # None where there is no right or wrong
    note: str


@dataclass(frozen=True)
class SampleCard:
    """One question with every model's answer."""

    question: Clipped
    target: Clipped | None
    kind: str  # why it is shown
    answers: Sequence[Answer]


# Which questions are worth showing: a pattern over right and wrong, how many, and what to call it.
Pattern = Callable[[Sequence[bool]], bool]
PATTERNS: tuple[tuple[str, int, Pattern], ...] = (
    ("learnt", 2, lambda right: not right[0] and right[-1]),
    ("lost", 2, lambda right: right[0] and not right[-1]),
    ("changed", 1, lambda right: right[0] == right[-1] and len(set(right)) > 1),
    ("all wrong", 2, lambda right: not any(right)),
    ("all right", 1, lambda right: all(right)),
)


def sample_cards(report: Report, task: str) -> list[SampleCard]:
    """A few questions of a task, chosen to show each pattern of right and wrong answers."""
    if report.tasks[task].kind == "best_of":
        return []  # its members show them
    present = [(index, model) for index, model in enumerate(report.models) if task in model.tasks]
    if not present:
        return []
    by_id = [{row["doc_id"]: row for row in model.tasks[task].rows} for _, model in present]
    shared = [doc_id for doc_id in by_id[0] if all(doc_id in rows for rows in by_id)]
    metric = report.tasks[task].judging_metric
    if report.tasks[task].predicts_text:
        chosen = _hardest_and_easiest(by_id, shared)
    else:
        verdicts = {doc_id: [is_right(rows[doc_id], metric) for rows in by_id] for doc_id in shared}
        chosen = []
        for kind, number, fits in PATTERNS:
            found = [doc_id for doc_id in shared if fits(verdicts[doc_id])]
            # Spread over the file, whose neighbours are often alike.
            step = max(1, len(found) // number)
            chosen += [(kind, doc_id) for doc_id in found[::step][:number]]
    return [
        _sample_card(
            kind,
            metric,
            [
                (visible(model.name), index % NUM_COLORS, rows[doc_id])
                for (index, model), rows in zip(present, by_id, strict=True)
            ],
        )
        for kind, doc_id in chosen
    ]


def _hardest_and_easiest(
    by_id: Sequence[dict[str, Any]], shared: Sequence[str]
) -> list[tuple[str, str]]:
    ranked = sorted(
        shared, key=lambda doc_id: by_id[-1][doc_id]["logprob"] / by_id[-1][doc_id]["num_bytes"]
    )
    if len(ranked) < 2:
        return [("text", doc_id) for doc_id in ranked]
    return [("hardest text", ranked[0]), ("easiest text", ranked[-1])]


def _sample_card(
    kind: str, metric: str, rows: Sequence[tuple[str, int, dict[str, Any]]]
) -> SampleCard:
    question, target = _asked(_told([row for *_, row in rows]))
    answers = []
    for model, color, row in rows:
        text, verdict, note = _answered(row, metric)
        answers.append(Answer(model, color, clipped(text), verdict, clipped(note).text))
    return SampleCard(
        question=clipped(question),
        target=None if target is None else clipped(target),
        kind=kind,
        answers=answers,
    )


def _told(rows: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """One model's row of a question, if possible one whose texts were kept."""
    found = [row for row in rows if row is not None]
    return next((row for row in found if not row.get("left_out")), found[0])


def _asked(row: dict[str, Any]) -> tuple[str, str | None]:
    """A question and what is expected; of text that is predicted, its beginning alone."""
    target = row["target"]
    if isinstance(target, list):
        target = " or ".join(target)
    return (target.strip(), None) if "num_bytes" in row else (row["question"], target.strip())


def _answered(row: dict[str, Any], metric: str) -> tuple[str, bool | None, str]:
    """What a model answered, whether it is right (None: neither), and what to know of it."""
    if "num_bytes" in row:
        bits = -row["logprob"] / row["num_bytes"] / LOG_TWO
        return f"{bits:.3f} bits per byte", None, ""
    if "options" in row:
        picked = picked_option(row, metric)
        if picked is None:
            return "", is_right(row, metric), "the question does not fit the model's context"
        return row["options"][picked]["text"].strip(), is_right(row, metric), ""
    note = str(row.get("found") or "")
    if row.get("left_out"):
        note = "the texts of right answers were not kept (samples_only_failures)"
    elif row.get("not_fitting"):
        note = "the question does not fit the model's context"
    elif row.get("is_cut"):
        note = "stopped at the longest answer allowed"
    return row["answer"] or "", None if row["correct"] is None else bool(row["correct"]), note


# ---------------------------------------------------------------- all of them, packed


@dataclass(frozen=True)
class Pack:
    """All answers to one task, for the page's script."""

    task: str
    num_questions: int
    num_left_out: int
    base64: str  # gzipped JSON


def pack_of(report: Report, task: str) -> Pack | None:
    """Every question of a task with every model's answer; None if there is nothing to browse.

    Cut texts are [beginning, characters left out].
    """
    if report.tasks[task].kind == "best_of":
        return None  # its members show them
    present = [(index, model) for index, model in enumerate(report.models) if task in model.tasks]
    if not present:
        return None
    by_id = [{row["doc_id"]: row for row in model.tasks[task].rows} for _, model in present]
    doc_ids = list(dict.fromkeys(doc_id for rows in by_id for doc_id in rows))
    metric = report.tasks[task].judging_metric
    overlap = next((m.tasks[task].overlap for _, m in present if m.tasks[task].overlap), None)
    heads = [_shared_beginnings(rows.values()) for rows in by_id]
    all_heads = list(dict.fromkeys(head for of_model in heads for head in of_model.values()))
    questions = []
    for doc_id in doc_ids[:MAX_BROWSED]:
        rows = [found.get(doc_id) for found in by_id]
        first = _told(rows)
        question, target = _asked(first)
        prompts: dict[tuple[int, str], int] = {}
        answers: list[Any] = []
        for row, of_model in zip(rows, heads, strict=True):
            if row is None:
                answers.append(None)
                continue
            head = of_model[row.get("category")]
            prompt = all_heads.index(head), row["prompt"][len(head) :]
            place = prompts.setdefault(prompt, len(prompts))
            text, verdict, note = _answered(row, metric)
            answers.append(
                [_cut(text), verdict, _cut(note), place, _options(row, metric), _more(row)]
            )
        questions.append(
            [
                visible(str(doc_id)),
                visible(first.get("category") or ""),
                _cut(question),
                None if target is None else _cut(target),
                None if overlap is None else str(doc_id) in overlap.overlapping,
                [[head, _cut(rest)] for head, rest in prompts],
                answers,
            ]
        )
    content = {
        "models": [[visible(model.name), index % NUM_COLORS] for index, model in present],
        "heads": [visible(head) for head in all_heads],
        "questions": questions,
    }
    data = json.dumps(content, separators=(",", ":")).encode()
    return Pack(
        task=visible(task),
        num_questions=len(questions),
        num_left_out=len(doc_ids) - len(questions),
        base64=base64.b64encode(gzip.compress(data, 6, mtime=0)).decode(),
    )


def _shared_beginnings(rows: Iterable[dict[str, Any]]) -> dict[str | None, str]:
    """What all prompts of a category begin with: their instructions and examples."""
    by_kind: dict[str | None, list[str]] = {}
    for row in rows:
        by_kind.setdefault(row.get("category"), []).append(row["prompt"])
    shared = {kind: _beginning_of_all(prompts) for kind, prompts in by_kind.items()}
    return {kind: head if len(head) >= MIN_SHARED else "" for kind, head in shared.items()}


def _beginning_of_all(texts: Sequence[str]) -> str:
    """What several texts begin with; of one alone, nothing."""
    least, greatest = min(texts), max(texts)  # these two have no more in common than all have
    pairs = enumerate(zip(least, greatest, strict=False))
    differing = (place for place, (one, other) in pairs if one != other)
    return "" if len(texts) == 1 else least[: next(differing, min(len(least), len(greatest)))]


def _cut(text: str) -> str | list[str | int]:
    shown = clipped(text, MAX_BROWSED_CHARACTERS)
    return [shown.text, shown.num_left_out] if shown.num_left_out else shown.text


def _options(row: dict[str, Any], metric: str) -> list[list[Any]] | None:
    """[text, log-probability, whether it was picked, whether it is right] of each option."""
    if "options" not in row:
        return None
    picked = picked_option(row, metric)
    return [
        [
            _cut(option["text"].strip()),
            None if option["logprob"] is None else round(option["logprob"], 3),
            number == picked,
            number == row["gold"],
        ]
        for number, option in enumerate(row["options"])
    ]


def _more(row: dict[str, Any]) -> list[Any]:
    """Further answers to the same question, where a task asks for several."""
    return [_cut(text) for text in row.get("answers", ())[1:]]
