"""A Report -> report.html, report.md, and the table in the terminal.

What models wrote is untrusted: the template engine escapes it, `visible` shows characters that act
on text instead of being text, and the page allows no scripts and no network at all.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.report.charts import BarChart, LineChart, bar_chart, line_chart
from eval.report.gather import (
    NEAR_TIE,
    Comparison,
    ModelResult,
    Report,
    evaluation_time,
    subject_key,
)
from eval.report.training import Stage
from eval.scores import estimate, is_right, picked_option
from eval.statistics import CONFIDENCE, Estimate
from eval.tasks import LOWER_IS_BETTER

HERE = Path(__file__).parent
NUM_COLORS = 8  # of models, in page.css; the ninth starts again
MAX_CHARACTERS = 700  # of one text in a sample
# Each panel: its title, and metrics.jsonl keys with the name and style of their line.
PANELS: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    ("loss", (("loss", "training", "training"), ("eval_loss", "held out", "held-out"))),
    (
        "accuracy",
        (("accuracy", "training", "training"), ("eval_accuracy", "held out", "held-out")),
    ),
    ("bits per byte", (("eval_bits_per_byte", "held out", "held-out"),)),
)
METRIC_WORDS = {
    "exact_match": "right answers",
    "last_number": "right answers",
    "marked_number": "right answers, announced as the answer",
    "flexible_match": "right answers",
    "strict_match": "right answers, boxed or announced as the answer",
    "prompt_loose": "prompts with all instructions followed, loosely",
    "prompt_strict": "prompts with all instructions followed",
    "instruction_loose": "instructions followed, loosely",
    "instruction_strict": "instructions followed",
    "pass_at_1": "programs that pass their tests",
    "pass_at_10": "problems solved by one of 10 programs",
    "acc": "likeliest option right",
    "acc_per_token": "likeliest option right, per token",
    "acc_per_char": "likeliest option right, per character",
    "acc_per_byte": "likeliest option right, per byte",
    "acc_uncond": "likeliest option right, against its likelihood alone",
    "bits_per_byte": "bits per byte",
    "nats_per_token": "nats per token",
    "acc_best": "likeliest option right, in the better form",
    "word_perplexity": "perplexity per word",
    "byte_perplexity": "perplexity per byte",
    "acc_norm": "likeliest option right, per character",
    "acc_bytes": "likeliest option right, per byte",
    "acc_mutual_info": "likeliest option right, against its likelihood alone",
}


# ---------------------------------------------------------------- numbers and texts as words


def value_text(value: float, is_share: bool) -> str:
    """61.2 for a share of 0.612; three decimals for bits, fewer for large perplexities."""
    if is_share:
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if value < 100 else f"{value:,.1f}" if value < 1e6 else f"{value:.3g}"


def interval_text(item: Estimate, is_share: bool) -> str:
    """58.9-63.4, or nothing where there is no interval."""
    if item.low is None or item.high is None:
        return ""
    return f"{value_text(item.low, is_share)}–{value_text(item.high, is_share)}"


def difference_text(value: float, is_share: bool) -> str:
    """+58.1 or −0.8, with a real minus sign."""
    words = value_text(abs(value), is_share)
    sign = "" if not float(words.replace(",", "")) else "+" if value > 0 else "−"
    return sign + words


def duration_text(seconds: float | None) -> str:
    """45 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size_text(number: float | None) -> str:
    """3.4 M, 1.2 G: of parameters or bytes."""
    if number is None:
        return "–"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Text in which nothing acts: control and direction characters are shown by name.

    Half surrogate pairs, which cannot be written as UTF-8, become the replacement character.
    """
    text = "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs")
        else "\ufffd"
        if unicodedata.category(character) == "Cs"
        else f"⟨U+{ord(character):04X}⟩"
        for character in text
    )
    return _BIDI.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


@dataclass(frozen=True)
class Clipped:
    """A text cut to a readable length, with the number of characters left out."""

    text: str
    num_left_out: int


def clipped(text: str) -> Clipped:
    """The beginning of a long text; safe to show."""
    return Clipped(visible(text[:MAX_CHARACTERS]), max(0, len(text) - MAX_CHARACTERS))


# ---------------------------------------------------------------- the score table


@dataclass(frozen=True)
class Change:
    """A paired difference to another model: in which direction it is clear, if it is."""

    text: str
    direction: str  # better, worse, unclear
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
    change: Change | None


@dataclass(frozen=True)
class ScoreRow:
    """One task or group: a line of the table and a panel of bars."""

    name: str
    is_group: bool
    about: str
    unit: str
    n: str
    chance: str
    cells: Sequence[Cell | None]
    chart: BarChart


def _change(comparison: Comparison, is_share: bool, lower_is_better: bool) -> Change:
    difference, against = comparison.difference, comparison.against
    is_better = (difference.value < 0) == lower_is_better
    return Change(
        text=difference_text(difference.value, is_share),
        direction=("better" if is_better else "worse") if difference.is_separated else "unclear",
        is_near_tie=difference.is_near_tie(NEAR_TIE),
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
        change = None
        if index > 0:
            against = report.models[index - 1].name
            found = report.difference(model.name, against, subject, is_group)
            if found is not None:
                change = _change(found, is_share, lower_is_better)
        cells.append(
            Cell(
                value=value_text(scored.value, is_share),
                interval=interval_text(scored, is_share),
                is_best=report.best.get(subject_key(subject, is_group)) == model.name,
                change=change,
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
    words = " and ".join(METRIC_WORDS.get(metric, visible(metric)) for metric in metrics)
    task = report.tasks[members[0]]
    return ScoreRow(
        name=visible(subject),
        is_group=is_group,
        about="mean of " + ", ".join(members) if is_group and len(members) > 1 else task.about,
        unit=f"{words}{', %' if is_share else ', lower is better'}",
        n=f"{n:,} {'blocks' if task.predicts_text else 'questions'}",
        chance="" if chance is None or lower_is_better else value_text(chance, is_share),
        cells=cells,
        chart=bar_chart(
            bars, top=top, is_share=is_share, chance=None if lower_is_better else chance
        ),
    )


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
            if cell.change is None:
                continue
            pair = f"{visible(name)} and {visible(cell.change.against)}"
            if cell.change.is_near_tie:
                notes.append(f"{pair} are as good as equal")
            elif cell.change.direction == "unclear":
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


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class StagePanel:
    """One chart of one training run."""

    name: str
    facts: str
    chart: LineChart


def stage_panels(stages: Sequence[Stage]) -> list[StagePanel]:
    """Curves of every stage that logged any."""
    panels = []
    for stage in stages:
        tokens = stage.curve("tokens")
        facts = [stage.kind] if stage.kind != stage.name else []
        facts.append(duration_text(stage.manifest.get("wall_time_seconds")))
        facts += [f"{size_text(tokens[-1][1])} tokens"] if tokens else []
        for title, keys in PANELS:
            series = [
                (name, style, points) for key, name, style in keys if (points := stage.curve(key))
            ]
            if series and max(len(points) for *_, points in series) > 1:
                chart = line_chart(title, series)
                panels.append(StagePanel(visible(stage.name), ", ".join(facts), chart))
    return panels


# ---------------------------------------------------------------- sample answers


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
    first = rows[0][2]
    answers = []
    for model, color, row in rows:
        note = ""
        verdict: bool | None = None
        if "num_bytes" in row:
            bits = -row["logprob"] / row["num_bytes"] / 0.6931471805599453
            text = Clipped(f"{bits:.3f} bits per byte", 0)
        elif "options" in row:
            picked = picked_option(row, metric)
            verdict = is_right(row, metric)
            if picked is None:
                text, note = Clipped("", 0), "the question does not fit the model's context"
            else:
                text = clipped(row["options"][picked]["text"].strip())
        else:
            verdict = None if row["correct"] is None else bool(row["correct"])
            text = clipped(row["answer"] or "")
            if row.get("not_fitting"):
                note = "the question does not fit the model's context"
            elif row.get("is_cut"):
                note = "stopped at the longest answer allowed"
            elif "found" in row:
                note = clipped(row["found"]).text
        answers.append(Answer(model, color, text, verdict, note))
    target = first["target"]
    if isinstance(target, list):
        target = " or ".join(target)
    is_text = "num_bytes" in first
    return SampleCard(
        question=clipped(target.strip() if is_text else first["question"]),
        target=None if is_text else clipped(target.strip()),
        kind=kind,
        answers=answers,
    )


# ---------------------------------------------------------------- the three outputs


def _model_facts(report: Report) -> list[Sequence[str]]:
    rows = []
    for model in report.models:
        facts = model.facts
        shape = ""
        if facts is not None and facts.num_layers and facts.hidden_size:
            shape = f"{facts.num_layers} layers of {facts.hidden_size}"
        chats = any(result.record.get("uses_chat_template") for result in model.tasks.values())
        rows.append(
            [
                model.name,
                facts.architecture if facts else "–",
                size_text(facts.num_parameters) if facts else "–",
                shape or "–",
                f"{facts.vocab_size:,}" if facts and facts.vocab_size else "–",
                f"{facts.context_length:,}" if facts and facts.context_length else "–",
                "yes" if chats else "no",
                duration_text(model.seconds),
                model.path,
            ]
        )
    return [[visible(cell) for cell in row] for row in rows]


def _stage_facts(report: Report) -> list[Sequence[str]]:
    rows = []
    for stage in report.stages:
        examples = stage.manifest.get("examples", {})
        dropped = sum(examples.get("dropped", {}).values())
        rows.append(
            [
                stage.name,
                stage.kind,
                duration_text(stage.manifest.get("wall_time_seconds")),
                f"{examples.get('used', 0):,}",
                f"{examples.get('truncated', 0):,}",
                f"{dropped:,}",
                str(stage.path),
            ]
        )
    return [[visible(cell) for cell in row] for row in rows]


def _inputs(stage: Stage) -> list[Sequence[str]]:
    return [
        [visible(path), size_text(item.get("bytes")), str(item.get("sha256", ""))[:16]]
        for path, item in stage.manifest.get("inputs", {}).items()
    ]


def _problems(report: Report) -> list[str]:
    """What a reader must know before trusting a number."""
    lines = []
    for model in report.models:
        for name, result in model.tasks.items():
            number = result.record.get("not_fitting", 0)
            if number:
                lines.append(
                    f"{model.name}: {number:,} of {len(result.rows):,} questions of {name} do not "
                    "fit the model's context; they count as wrong."
                )
            number = result.record.get("context_cut", 0)
            if number:
                lines.append(
                    f"{model.name}: {number:,} of {len(result.rows):,} contexts of {name} lost "
                    "their beginning, because they are too long for the model."
                )
            if result.guessing is not None and result.guessing > 1 - CONFIDENCE:
                lines.append(
                    f"{model.name}: its score on {name} may be guessing "
                    f"(p = {result.guessing:.2g})."
                )
        if not Path(model.path).is_dir():
            lines.append(
                f"{model.name}: {model.path} is not a folder here, so its size and training are "
                "not shown."
            )
        missing = [name for name in report.tasks if name not in model.tasks]
        if missing:
            lines.append(f"{model.name}: not yet asked {', '.join(missing)}.")
    return [visible(line) for line in lines]


def title_of(report: Report) -> str:
    """base, sft and dpo on quickstart."""
    names = [model.name for model in report.models] or [stage.name for stage in report.stages]
    if len(names) > 4:
        listed = f"{len(names)} models"
    else:
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    subject = report.suite or ", ".join(report.tasks)
    return visible(f"{listed} on {subject}" if subject else f"Training of {listed}")


def html_page(report: Report) -> str:
    """The report as one self-contained page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = score_rows(report)
    page: str = environment.get_template("page.html.jinja").render(
        title=title_of(report),
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        started=evaluation_time(report),
        duration=duration_text(report.seconds) if report.models else None,
        num_questions=sum(
            max((len(m.tasks[name].rows) for m in report.models if name in m.tasks), default=0)
            for name, task in report.tasks.items()
            if not task.predicts_text and task.kind != "best_of"
        ),
        measures=[
            (name, measures)
            for name in report.tasks
            if len(measures := measure_rows(report, name)) > 1
        ],
        models=[
            {"name": visible(model.name), "color": index % NUM_COLORS}
            for index, model in enumerate(report.models)
        ],
        headlines=headlines(report, rows),
        problems=_problems(report),
        rows=rows,
        panels=stage_panels(report.stages),
        samples=[
            {
                "name": name,
                "about": task.about,
                "cards": cards,
            }
            for name, task in report.tasks.items()
            if (cards := sample_cards(report, name))
        ],
        model_facts=_model_facts(report),
        stage_facts=_stage_facts(report),
        documents=[
            {
                "name": visible(stage.name),
                "recipe": visible(yaml.safe_dump(stage.recipe, sort_keys=False, width=90)),
                "inputs": _inputs(stage),
            }
            for stage in [*report.stages, *report.evaluations]
        ],
        task_settings=[
            {
                "name": name,
                "settings": visible(yaml.safe_dump(_settings(task), sort_keys=False, width=90)),
                "prompts": [
                    (visible(model.name), clipped(prompt))
                    for model in report.models
                    if name in model.tasks and (prompt := model.tasks[name].rows[0]["prompt"])
                ],
            }
            for name, task in report.tasks.items()
        ],
        versions=_versions(report),
    )
    return page


def _settings(task: Any) -> dict[str, Any]:
    return {
        key: value
        for key, value in dataclasses.asdict(task).items()
        if key not in ("name", "about") and value not in (None, ())
    }


def _versions(report: Report) -> str:
    """What the first run that says so was made with."""
    for stage in [*report.evaluations, *report.stages]:
        manifest = stage.manifest
        parts = [f"{name} {version}" for name, version in manifest.get("versions", {}).items()]
        if not parts:
            continue
        hardware, commit = manifest.get("hardware", {}), manifest.get("git_commit")
        parts += [str(hardware["processor"])] if hardware.get("processor") else []
        parts += [f"{hardware['cores']} cores"] if hardware.get("cores") else []
        parts += [str(name) for name in hardware.get("gpus", [])]
        parts += [f"commit {commit}"] if commit else []
        return visible(", ".join(parts))
    return ""


def markdown(report: Report) -> str:
    """The report for pull requests and terminals: the table, differences, a few answers."""
    rows = score_rows(report)
    names = [_plain(model.name) for model in report.models]
    lines = [f"# {_plain(title_of(report))}", ""]
    lines += [f"- {_plain(sentence)}" for sentence in headlines(report, rows)]
    lines += [f"- **Note:** {_plain(problem)}" for problem in _problems(report)]
    if report.models:
        lines += ["", "## Scores", ""]
        lines.append("| | asked | " + " | ".join(names) + " |")
        lines.append("|---|---:|" + "---:|" * len(names))
        for row in rows:
            name = f"**{_plain(row.name)}**" if row.is_group else _plain(row.name)
            cells = []
            for cell in row.cells:
                if cell is None:
                    cells.append("–")
                    continue
                value = f"**{cell.value}**" if cell.is_best else cell.value
                cells.append(f"{value} ({cell.interval})" if cell.interval else value)
            unit = "" if row.unit.endswith("%") else f" ({row.unit})"
            lines.append(f"| {name}{unit} | {row.n} | " + " | ".join(cells) + " |")
        lines += [
            "",
            "Scores in percent with 95 % intervals. Bold: better than every other model, judged "
            "question by question.",
        ]
    if report.comparisons:
        lines += ["", "## Differences on the same questions", ""]
        lines.append(
            "| | model | against | difference | 95 % interval | p | corrected p | detectable "
            "| won | lost | tied |"
        )
        lines.append("|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
        for item in report.comparisons:
            first = report.groups[item.subject][0] if item.is_group else item.subject
            lower = report.lower_is_better(first)
            change = _change(item, not lower, lower)
            tested = [item.difference.p_value, item.p_corrected]
            least = item.difference.detectable
            mark = "**" if change.direction != "unclear" else ""
            lines.append(
                f"| {_plain(item.subject)} | {_plain(item.model)} | "
                f"{_plain(item.against)} | {mark}{change.text}{mark} | {change.interval} | "
                + "".join(f"{'' if p is None else f'{p:.2g}'} | " for p in tested)
                + f"{'' if least is None else value_text(least, not lower)} | "
                f"{item.difference.wins} | {item.difference.losses} | {item.difference.ties} |"
            )
        lines += [
            "",
            "Bold: the interval excludes zero. Corrected: by Holm's method, for the number of "
            "comparisons. Detectable: the least true difference that this many questions would "
            "show in 80 % of cases.",
        ]
    for name in report.tasks:
        cards = sample_cards(report, name)
        if not cards:
            continue
        lines += ["", f"## Sample answers: {_plain(name)}", ""]
        for card in cards[:4]:
            lines += _block(f"{card.kind}: question", card.question.text)
            if card.target is not None:
                lines += _block("expected", card.target.text)
            for answer in card.answers:
                verdict = {True: "right", False: "wrong", None: ""}[answer.is_right]
                words = ", ".join(word for word in (answer.model, verdict, answer.note) if word)
                lines += _block(words, answer.text.text)
            lines.append("---")
    if report.stages:
        lines += ["", "## Training", ""]
        lines.append("| stage | kind | wall time | examples | last loss | last held-out loss |")
        lines.append("|---|---|---:|---:|---:|---:|")
        for stage in report.stages:
            loss, held_out = stage.curve("loss"), stage.curve("eval_loss")
            lines.append(
                f"| {_plain(stage.name)} | {stage.kind} | "
                f"{duration_text(stage.manifest.get('wall_time_seconds'))} | "
                f"{stage.manifest.get('examples', {}).get('used', 0):,} | "
                f"{f'{loss[-1][1]:.4g}' if loss else '–'} | "
                f"{f'{held_out[-1][1]:.4g}' if held_out else '–'} |"
            )
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """One line in which Markdown and HTML see no markup."""
    return re.sub(r"([\\`*_\[\]<>#|&~])", r"\\\1", " ".join(visible(text).split()))


def _block(label: str, text: str) -> list[str]:
    """A labelled fenced block, its fence longer than any in the text."""
    longest = max((len(found) for found in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [_plain(label), "", f"{fence}text", text, fence, ""]


def print_summary(report: Report, console: Console | None = None) -> None:
    """The score table in the terminal."""
    table = Table(
        title=Text(title_of(report)),
        title_justify="left",
        caption="Percent right with 95 % intervals. Bold: clearly above every other model.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("")
    for model in report.models:
        table.add_column(Text(visible(model.name)), justify="right", no_wrap=True)
    for row in score_rows(report):
        unit = "" if row.unit.endswith("%") else f" ({row.unit.partition(',')[0]})"
        indent = "" if row.is_group or not report.groups else "  "
        cells = [Text(indent + row.name + unit, style="bold" if row.is_group else "")]
        for cell in row.cells:
            words = "–" if cell is None else cell.value
            if cell is not None and cell.interval:
                words += f" ({cell.interval})"
            is_best = cell is not None and cell.is_best
            cells.append(Text(words, style="bold" if is_best else ""))
        table.add_row(*cells)
    (console or Console()).print(table)
