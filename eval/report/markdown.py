"""A Report -> report.md, for pull requests, and the score table in the terminal."""

import re

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.report.answers import sample_cards
from eval.report.gather import Report
from eval.report.problems import problems
from eval.report.tables import (
    comparison_rows,
    headlines,
    overlap_rows,
    score_rows,
    title_of,
)
from eval.report.words import duration_text, visible


def markdown(report: Report) -> str:
    """The report for pull requests and terminals: the table, differences, a few answers."""
    rows = score_rows(report)
    names = [_plain(model.name) for model in report.models]
    lines = [f"# {_plain(title_of(report))}", ""]
    lines += [f"- {_plain(sentence)}" for sentence in headlines(report, rows)]
    for problem in problems(report):
        lines.append(f"- **Note:** {_plain(problem.sentence)}")
        lines += [f"  - {_plain(detail)}" for detail in problem.details]
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
        for item in comparison_rows(report):
            change, (p_value, p_corrected) = item.change, item.p_values
            marked = "**" if change.direction != "unclear" else "≈ " if change.is_near_tie else ""
            lines.append(
                f"| {_plain(item.subject)} | {_plain(item.model)} | {_plain(change.against)} | "
                f"{marked}{change.text}{marked.strip('≈ ')} | {change.interval} | {p_value} | "
                f"{p_corrected} | {item.detectable} | "
                + " | ".join(str(count) for count in item.counts)
                + " |"
            )
        lines += [
            "",
            "Bold: the interval excludes zero, and the corrected p is below 0.05. Corrected: by "
            f"Holm's method, for the {len(report.comparisons):,} comparisons here (tasks and "
            "groups apart). ≈: as good as equal, within a point or 0.01 bits. Detectable: the "
            "least true difference that this many questions would show in 80 % of cases.",
        ]
    if overlaps := overlap_rows(report):
        lines += ["", "## Overlap with training text", ""]
        lines.append(
            "| | asked | in training text | too short to tell | " + " | ".join(names) + " |"
        )
        lines.append("|---|---:|---:|---:|" + "---:|" * len(names))
        lines += ["| " + " | ".join(map(_plain, cells)) + " |" for cells in overlaps]
        lines += ["", "Scores of all questions → without those in training text."]
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
