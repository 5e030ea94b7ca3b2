"""A Report -> what a reader must know before trusting a number."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from eval.report.gather import Report
from eval.report.tables import may_be_guessing
from eval.report.words import listed, visible

NUM_LISTED = 3  # more findings than these are counted in the sentence, and listed below it
SET_APART = {
    "not_fitting": ("questions", "do not fit the model's context; they count as wrong"),
    "context_cut": ("contexts", "lost their beginning, because they are too long for the model"),
    "unclear": ("questions", "have a verdict that could not be read; it counts as half"),
}


class Problem(NamedTuple):
    """A sentence, and what it sums up, if that would be too long for one."""

    sentence: str
    details: tuple[str, ...] = ()


def problems(report: Report) -> list[Problem]:
    """Models that have the same one share a sentence."""
    found = [
        *_questions_apart(report),
        *_guesses(report),
        *_models_apart(report),
        *_left_out(report),
        *_overlaps(report),
    ]
    return [
        Problem(visible(one.sentence), tuple(visible(line) for line in one.details))
        for one in dict.fromkeys(found)
    ]


def _questions_apart(report: Report) -> list[Problem]:
    """Questions that were not asked or judged as they are."""
    found = []
    for key, what, reason in (
        ("not_fitting", "questions", "do not fit the model's context; they count as wrong"),
        (
            "context_cut",
            "contexts",
            "lost their beginning, because they are too long for the model",
        ),
        ("unclear", "questions", "have a verdict that could not be read; it counts as half"),
    ):
        models: dict[tuple[tuple[str, int, int], ...], list[str]] = {}
        for model in report.models:
            counts = tuple(
                (name, number, len(result.rows))
                for name, result in model.tasks.items()
                if (number := result.record.get(key, 0))
            )
            if counts:
                models.setdefault(counts, []).append(model.name)
        for counts, names in models.items():
            each = [f"{number:,} of {of:,} {what} of {task}" for task, number, of in counts]
            if len(each) <= NUM_LISTED:
                found.append(Problem(f"{listed(names)}: {', '.join(each)} {reason}."))
                continue
            number, of = sum(count[1] for count in counts), sum(count[2] for count in counts)
            total = f"{number:,} of {of:,} {what} of {len(counts)} tasks"
            found.append(Problem(f"{listed(names)}: {total} {reason}.", tuple(each)))
    return found


def _guesses(report: Report) -> list[Problem]:
    meaning = "guessing would score as much in more than one of twenty cases"
    found, many = [], []
    for model in report.models:
        guessed = [name for name, result in model.tasks.items() if may_be_guessing(result)]
        if len(guessed) > NUM_LISTED:
            many.append((model.name, len(model.tasks), guessed))
        elif guessed:
            scores = "score on" if len(guessed) == 1 else "scores on"
            found.append(
                Problem(
                    f"{model.name}: its {scores} {', '.join(guessed)} may be guessing: {meaning}."
                )
            )
    if many:
        each = [f"{len(guessed)} of {of} scores of {name}" for name, of, guessed in many]
        details = (f"{name}: {', '.join(guessed)}" for name, _, guessed in many)
        found.append(Problem(f"{listed(each)} may be guessing: {meaning}.", tuple(details)))
    return found


def _models_apart(report: Report) -> Iterable[Problem]:
    for model in report.models:
        if not Path(model.path).is_dir():
            yield Problem(
                f"{model.name}: {model.path} is not a folder here, so its size and training are "
                "not shown."
            )
        missing = [name for name in report.tasks if name not in model.tasks]
        if missing:
            yield Problem(f"{model.name}: not yet asked {', '.join(missing)}.")


def _left_out(report: Report) -> list[Problem]:
    each = [
        f"{name} was left out, also of averages: {reason}"
        for name, reason in report.skipped.items()
    ]
    if len(each) <= NUM_LISTED:
        return [Problem(line) for line in each]
    names = listed(list(report.skipped))
    return [Problem(f"{names} were left out, also of averages.", tuple(each))]


def _overlaps(report: Report) -> Iterable[Problem]:
    for contamination in report.contamination:
        each = [f"{o.words} of {name}" for name, o in contamination.tasks.items() if o.overlapping]
        where = f"In the training text ({contamination.ngram} words in a row)"
        if len(each) > NUM_LISTED:
            yield Problem(f"{where}: questions of {len(each)} tasks.", tuple(each))
        elif each:
            yield Problem(f"{where}: {', '.join(each)}.")
