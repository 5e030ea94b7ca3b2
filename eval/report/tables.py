"""A Report -> its tables: scores with differences, every measure, overlap, and cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.report.charts import BarChart, bar_chart
from eval.report.gather import NEAR_TIE, Comparison, ModelResult, Report, TaskResult, subject_key
from eval.report.words import (
    METRIC_WORDS,
    NUM_COLORS,
    difference_text,
    duration_text,
    interval_text,
    listed,
    value_text,
    visible,
)
from eval.scores import estimate
from eval.statistics import CONFIDENCE, Estimate
from eval.tasks import LOWER_IS_BETTER


@dataclass(frozen=True)
class Change:
    """A paired difference to another model: in which direction it is clear, if it is."""

    text: str
    direction: str  # better, worse, unclear
    mark: str  # the same for eyes that tell no colours apart
    is_near_tie: bool
    against: str
    interval: str
    p_value: str


@dataclass(frozen=True)
class Cell:
    """One model's score in a row."""

    value: str
    interval: str
    is_best: bool
    may_be_guessing: bool
    change: Change | None  # to the first model
    step: Change | None  # to the model before it


@dataclass(frozen=True)
class ScoreRow:
    """One task or group: a line of the table and a panel of bars."""

    name: str
    is_group: bool
    task: str | None  # whose section says more
    about: str
    unit: str
    n: str
    chance: str
    cells: Sequence[Cell | None]
    chart: BarChart


def change_of(comparison: Comparison, lower_is_better: bool) -> Change:
    """A comparison in words. Clear is what stays so when corrected for all comparisons."""
    difference, against, is_share = comparison.difference, comparison.against, not lower_is_better
    is_better = (difference.value < 0) == lower_is_better
    is_near_tie = difference.is_near_tie(NEAR_TIE)
    p_value = comparison.p_corrected
    is_clear = difference.is_separated and (p_value is None or p_value < 1 - CONFIDENCE)
    if is_clear:
        mark = "▲" if is_better else "▼"
    elif is_near_tie:
        mark = "≈"
    else:
        mark = ("△" if is_better else "▽") if difference.is_separated else ""
    return Change(
        text=difference_text(difference.value, is_share),
        direction=("better" if is_better else "worse") if is_clear else "unclear",
        mark=mark,
        is_near_tie=is_near_tie,
        against=against,
        interval=(
            ""
            if difference.low is None or difference.high is None
            else f"{difference_text(difference.low, is_share)} to "
            f"{difference_text(difference.high, is_share)}"
        ),
        p_value=(
            ""
            if difference.p_value is None or comparison.p_corrected is None
            else f"p = {difference.p_value:.2g}, "
            f"{comparison.p_corrected:.2g} when corrected for all comparisons"
        ),
    )


def _score_row(report: Report, subject: str, is_group: bool) -> ScoreRow:
    members = report.groups[subject] if is_group else (subject,)
    lower_is_better = report.lower_is_better(members[0])
    is_share = not lower_is_better
    metrics = list(dict.fromkeys(report.tasks[member].main_metric for member in members))
    cells: list[Cell | None] = []
    bars: list[tuple[str, int, float, float | None, float | None, str]] = []
    n = 0
    for index, model in enumerate(report.models):
        scored = _estimate(report, model, subject, is_group)
        if scored is None:
            cells.append(None)
            continue
        n = max(n, scored.n)
        change, step = (
            None if found is None else change_of(found, lower_is_better)
            for place in (0, max(0, index - 1))
            for found in [
                report.difference(model.name, report.models[place].name, subject, is_group)
            ]
        )
        cells.append(
            Cell(
                value=value_text(scored.value, is_share),
                interval=interval_text(scored, is_share),
                is_best=report.best.get(subject_key(subject, is_group)) == model.name,
                may_be_guessing=len(members) == 1
                and members[0] in model.tasks
                and may_be_guessing(model.tasks[members[0]]),
                change=change,
                step=step,
            )
        )
        bars.append(
            (
                visible(model.name),
                index % NUM_COLORS,
                scored.value,
                scored.low,
                scored.high,
                value_text(scored.value, is_share),
            )
        )
    levels = [report.chance[member] for member in members if member in report.chance]
    chance = sum(levels) / len(levels) if levels and len(levels) == len(members) else None
    top = 1.0 if is_share else 1.1 * max((bar[4] or bar[2] for bar in bars), default=1.0)
    words = _words_of(metrics)
    task = report.tasks[members[0]]
    return ScoreRow(
        name=visible(subject),
        is_group=is_group,
        task=members[0] if len(members) == 1 else None,
        about="mean of " + ", ".join(members) if is_group and len(members) > 1 else task.about,
        unit=f"{words}{', %' if is_share else ', lower is better'}",
        n=f"{n:,} {'blocks' if task.predicts_text else 'questions'}",
        chance="" if chance is None or lower_is_better else value_text(chance, is_share),
        cells=cells,
        chart=bar_chart(
            bars, top=top, is_share=is_share, chance=None if lower_is_better else chance
        ),
    )


def _words_of(metrics: Sequence[str]) -> str:
    """Of one measure, or of those that a group's tasks are measured in."""
    words = [METRIC_WORDS.get(metric, visible(metric)) for metric in metrics]
    kind = "likeliest option right"
    if len(words) > 1 and all(word.startswith(kind) for word in words):
        return f"{kind}, each task by its own measure"
    return " and ".join(words)


def may_be_guessing(result: TaskResult) -> bool:
    """Whether guessing would score as much in one of twenty cases or more."""
    return result.guessing is not None and result.guessing > 1 - CONFIDENCE


def _estimate(report: Report, model: ModelResult, subject: str, is_group: bool) -> Estimate | None:
    if is_group:
        return model.groups.get(subject)
    result = model.tasks.get(subject)
    return result.metrics.get(report.tasks[subject].main_metric) if result else None


def score_rows(report: Report) -> list[ScoreRow]:
    """Each group followed by its tasks (unless it is a single task), then the tasks of no group."""
    rows: list[ScoreRow] = []
    for group, members in report.groups.items():
        rows.append(_score_row(report, group, is_group=True))
        if len(members) > 1:
            rows += [_score_row(report, member, is_group=False) for member in members]
    grouped = {member for members in report.groups.values() for member in members}
    rows += [_score_row(report, name, False) for name in report.tasks if name not in grouped]
    return rows


def headlines(report: Report, rows: Sequence[ScoreRow]) -> list[str]:
    """What changed from model to model, one sentence for each group (or task without one)."""
    sentences = []
    for row in rows:
        if not (row.is_group or not report.groups):
            continue
        scored = [
            (model.name, cell)
            for model, cell in zip(report.models, row.cells, strict=True)
            if cell is not None
        ]
        if not scored:
            continue
        is_share = not row.unit.endswith("better")
        parts = [f"{visible(name)} {cell.value}{' %' if is_share else ''}" for name, cell in scored]
        sentence = f"{row.name[:1].upper()}{row.name[1:]}: {', '.join(parts)}"
        sentence += "." if is_share else f" ({row.unit})."
        notes = []
        names = tuple(visible(name) for name, _ in scored)  # written as they are
        for name, cell in scored:
            if cell.step is None:
                continue
            pair = f"{visible(name)} and {visible(cell.step.against)}"
            if cell.step.is_near_tie:
                notes.append(f"{pair} are as good as equal")
            elif cell.step.direction == "unclear":
                notes.append(f"the difference between {pair} may be chance")
        is_all_unclear = all(note.endswith("may be chance") for note in notes)
        if len(notes) > 1 and len(notes) == len(scored) - 1 and is_all_unclear:
            sentence += " All differences from one to the next may be chance."
        elif notes:
            text = "; ".join(notes)
            sentence += f" {text if text.startswith(names) else text[:1].upper() + text[1:]}."
        sentences.append(sentence)
    return sentences


def measure_rows(report: Report, task: str) -> list[list[str]]:
    """Name, number and one cell a model: for every metric, and for every kind of question."""
    results = [model.tasks.get(task) for model in report.models]
    rows = []
    for metric in report.tasks[task].metrics:
        found = [result.metrics.get(metric) if result else None for result in results]
        if any(found):
            words = METRIC_WORDS.get(metric, visible(metric))
            rows.append(_measure_row(words, found, metric not in LOWER_IS_BETTER))
    main = report.tasks[task].main_metric
    by_kind: dict[str, list[Estimate | None]] = {}
    for index, result in enumerate(results):
        kinds: dict[str, list[dict[str, Any]]] = {}
        for row in result.rows if result else ():
            if row.get("category"):
                kinds.setdefault(row["category"], []).append(row)
        for kind, members in kinds.items():
            found = by_kind.setdefault(kind, [None] * len(results))
            found[index] = estimate(members, main)
    rows += [
        _measure_row(visible(kind), by_kind[kind], main not in LOWER_IS_BETTER)
        for kind in sorted(by_kind)
    ]
    return rows


def _measure_row(name: str, found: Sequence[Estimate | None], is_share: bool) -> list[str]:
    cells = []
    for item in found:
        interval = interval_text(item, is_share) if item else ""
        value = value_text(item.value, is_share) if item else "–"
        cells.append(f"{value} ({interval})" if interval else value)
    return [name, f"{max(item.n for item in found if item):,}", *cells]


@dataclass(frozen=True)
class ComparisonRow:
    """One model against another on one task or group."""

    subject: str
    is_group: bool
    model: str
    change: Change
    p_values: tuple[str, str]  # as it is, and corrected
    detectable: str
    counts: tuple[int, int, int]  # won, lost, tied

    def cells(self) -> list[str]:
        """For a table of one subject."""
        difference = f"{self.change.mark} {self.change.text}".strip()
        counts = [f"{count:,}" for count in self.counts]
        tested = [*self.p_values, self.detectable]
        head = [self.model, self.change.against, difference, self.change.interval]
        return [visible(cell) for cell in [*head, *tested, *counts]]


COMPARISON_HEAD = [
    "model",
    "against",
    "difference",
    "95 % interval",
    "p",
    "corrected p",
    "detectable",
    "won",
    "lost",
    "tied",
]


def comparison_rows(report: Report, task: str | None = None) -> list[ComparisonRow]:
    """All comparisons, or those on one task."""
    rows = []
    for item in report.comparisons:
        if task is not None and (item.is_group or item.subject != task):
            continue
        first = report.groups[item.subject][0] if item.is_group else item.subject
        lower = report.lower_is_better(first)
        difference = item.difference
        p_value, p_corrected = (
            "" if p is None else f"{p:.2g}" for p in (difference.p_value, item.p_corrected)
        )
        least = difference.detectable
        rows.append(
            ComparisonRow(
                subject=item.subject,
                is_group=item.is_group,
                model=item.model,
                change=change_of(item, lower),
                p_values=(p_value, p_corrected),
                detectable="" if least is None else value_text(least, not lower),
                counts=(difference.wins, difference.losses, difference.ties),
            )
        )
    return rows


def overlap_rows(report: Report) -> list[list[str]]:
    """Task, questions, those in training text, those too short to tell; each model's two scores."""
    rows = []
    for name in report.tasks:
        results = [model.tasks.get(name) for model in report.models]
        overlap = next((item.overlap for item in results if item and item.overlap), None)
        if overlap is None:
            continue
        is_share = not report.lower_is_better(name)
        cells = [name, f"{overlap.n:,}", f"{len(overlap.overlapping):,}"]
        cells.append(f"{len(overlap.too_short):,}")
        for result in results:
            if result is None or result.overlap is None:
                cells.append("–")
                continue
            whole = result.metrics.get(report.tasks[name].main_metric)
            shown = "–" if whole is None else value_text(whole.value, is_share)
            clean = "–" if result.clean is None else value_text(result.clean.value, is_share)
            cells.append(shown if not overlap.overlapping else f"{shown} → {clean}")
        rows.append([visible(cell) for cell in cells])
    return rows


COST_HEAD = ["model", "task", "time", "questions/s", "computed", "from cache", "read", "written"]


def cost_rows(report: Report) -> list[list[str]]:
    """What each task took of each model: as COST_HEAD says, the last two in tokens."""
    rows = []
    for model in report.models:
        for name, result in model.tasks.items():
            seconds, *counts = result.cost.values()
            if seconds is None:
                continue  # the better of several tasks costs nothing of its own
            speed = f"{len(result.rows) / seconds:,.1f}" if seconds else "–"
            numbers = ["–" if count is None else f"{count:,}" for count in counts]
            cells = [model.name, name, duration_text(seconds), speed, *numbers]
            rows.append([visible(cell) for cell in cells])
    return rows


def title_of(report: Report) -> str:
    """base, sft and dpo on quickstart."""
    names = [model.name for model in report.models] or [stage.name for stage in report.stages]
    models = f"{len(names)} models" if len(names) > 4 else listed(names)
    subject = report.suite or ", ".join(report.tasks)
    return visible(f"{models} on {subject}" if subject else f"Training of {models}")
