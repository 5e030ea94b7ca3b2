"""The training curves of a run, drawn from its metrics.jsonl into curves.png.

Drawn with matplotlib, which the extra ``tracking`` brings; a run without it says so at its end.
"""

import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmo_base.run.artefact import atomic_write

# Each panel: its title, and the keys of metrics.jsonl in it, each with those that follow after "/".
PANELS = {
    "loss, nats": ("loss", "eval_loss"),
    "learning rate": ("learning_rate",),
    "gradient norm": ("grad_norm",),
    "tokens per second": ("tokens_per_second",),
    "held-out bits per byte": ("eval_bits_per_byte",),
    "accuracy": ("accuracy", "eval_accuracy", "requests_accuracy"),
    "bits per byte of right answers": ("requests_bits_per_byte",),
}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def read_rows(metrics: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without the half line of a killed process."""
    rows = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def lines_of(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, list[list[float]]]:
    """Steps and values of each key of ``keys``, and of each ``key/part``."""
    lines: dict[str, list[list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            is_wanted = any(name == key or name.startswith(f"{key}/") for key in keys)
            if is_wanted and isinstance(value, int | float):
                steps, values = lines.setdefault(name, [[], []])
                steps.append(row["step"])
                values.append(value)
    return lines


def draw_curves(folder: Path) -> Path | None:
    """Draw ``curves.png``; None if no curve has two points yet."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # an optional extra
    from matplotlib.figure import Figure

    rows = read_rows(folder / "metrics.jsonl")
    found = {title: lines_of(rows, keys) for title, keys in PANELS.items()}
    found = {title: lines for title, lines in found.items() if lines}
    if all(len(steps) < 2 for lines in found.values() for steps, _ in lines.values()):
        return None
    num_rows = -(-len(found) // 2)
    figure = Figure(figsize=(11, 2.8 * num_rows), dpi=90)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(0.07, 0.45 / (2.8 * num_rows), 0.98, 1 - 0.3 / (2.8 * num_rows), 0.15)
    for number, (title, lines) in enumerate(found.items(), start=1):
        panel = figure.add_subplot(num_rows, 2, number)
        panel.set_title(title, fontsize=10)
        for name, (steps, values) in lines.items():
            panel.plot(
                steps, values, linewidth=1, marker="." if len(steps) < 30 else "", label=name
            )
        if len(lines) > 1:
            panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
    figure.supxlabel("step", fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    path = folder / "curves.png"
    atomic_write(path, content.getvalue())
    return path
