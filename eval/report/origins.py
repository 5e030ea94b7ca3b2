"""A Report -> where it comes from: models, training runs and their curves, settings, versions."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.report.charts import LineChart, line_chart
from eval.report.gather import Report
from eval.report.training import Stage
from eval.report.words import Clipped, clipped, duration_text, size_text, visible

# Each panel: its title, and metrics.jsonl keys with the name and style of their line.
PANELS: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    ("loss", (("loss", "training", "training"), ("eval_loss", "held out", "held-out"))),
    (
        "accuracy",
        (("accuracy", "training", "training"), ("eval_accuracy", "held out", "held-out")),
    ),
    ("bits per byte", (("eval_bits_per_byte", "held out", "held-out"),)),
)


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


PROMPTS_SHOWN = 4  # of those that a run answers while it is trained


@dataclass(frozen=True)
class Answered:
    """What a run said to one held-out prompt after its first and its last evaluation."""

    prompt: Clipped
    target: Clipped
    answers: list[dict[str, Any]]  # step, text, is_cut


def answers_while_trained(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """The first prompts of every stage that answered any."""
    shown = []
    for stage in stages:
        by_prompt: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in stage.answers:
            key = (str(row.get("prompt", "")), str(row.get("target", "")))
            by_prompt.setdefault(key, []).append(row)
        cards = [
            Answered(
                clipped(prompt),
                clipped(target),
                [
                    {
                        "step": visible(str(row.get("step", "?"))),
                        "text": clipped(str(row.get("answer", ""))),
                        "is_cut": row.get("finish_reason") == "length",
                    }
                    for row in (rows if len(rows) == 1 else [rows[0], rows[-1]])
                ],
            )
            for (prompt, target), rows in list(by_prompt.items())[:PROMPTS_SHOWN]
        ]
        if cards:
            num_left_out = len(by_prompt) - len(cards)
            shown.append(
                {"name": visible(stage.name), "cards": cards, "num_left_out": num_left_out}
            )
    return shown


def model_facts(report: Report) -> list[Sequence[str]]:
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


def stage_facts(report: Report) -> list[Sequence[str]]:
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


def inputs(stage: Stage) -> list[Sequence[str]]:
    return [
        [visible(path), size_text(item.get("bytes")), str(item.get("sha256", ""))[:16]]
        for path, item in stage.manifest.get("inputs", {}).items()
    ]


def settings(task: Any) -> dict[str, Any]:
    return {
        key: value
        for key, value in dataclasses.asdict(task).items()
        if key not in ("name", "about") and value not in (None, ())
    }


def versions(report: Report) -> str:
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
