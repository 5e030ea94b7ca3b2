"""The charts of a report as files: plots/*.svg, and *.png where Pillow is installed."""

import importlib.util
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.report.charts import BarChart, LineChart
from eval.report.gather import Report
from eval.report.origins import stage_panels
from eval.report.page import HERE, environment
from eval.report.tables import score_rows
from olmo_base.run.artefact import atomic_write

PLOTS = "plots"
MARGIN, HEAD = 14.0, 44.0  # around a chart, and above it for its title
SCALE = 3  # pixels of a PNG for one unit of an SVG
PAPER, INK, QUIET, RULE, ACCENT = "#fcfcfa", "#1d2327", "#5f6b73", "#e1e4e3", "#0a6fb0"
COLORS = "#8a97a0 #2f80c2 #d9822b #2a9d74 #b05cc4 #c94f4f #8f8a2c #3aa6b9".split()


@dataclass(frozen=True)
class Plot:
    """One chart and what stands above it."""

    name: str  # of its files
    title: str
    note: str
    chart: BarChart | LineChart

    @property
    def is_bars(self) -> bool:
        """Whether it shows scores, and not curves."""
        return isinstance(self.chart, BarChart)

    @property
    def width(self) -> float:
        """Of the whole picture."""
        return self.chart.width + 2 * MARGIN

    @property
    def height(self) -> float:
        """Of the whole picture."""
        return self.chart.height + HEAD + MARGIN


def plots_of(report: Report) -> list[Plot]:
    """A plot for every row of the score table, then one for every curve of training."""
    titled: list[tuple[str, str, BarChart | LineChart]] = [
        (row.name, row.unit, row.chart) for row in score_rows(report)
    ]
    for panel in stage_panels(report.stages):
        keys = ", ".join(f"{line.name} {line.last}" for line in panel.chart.lines)
        titled.append((f"{panel.name}: {panel.chart.title}", keys, panel.chart))
    plots = []
    for number, (title, note, chart) in enumerate(titled):
        words = re.sub(r"[^A-Za-z0-9._-]+", "_", title).strip("_.")[:60]
        plots.append(Plot(f"{number:02d}_{words or 'plot'}", title, note, chart))
    return plots


def has_pillow() -> bool:
    """Whether PNG files can be drawn."""
    return importlib.util.find_spec("PIL") is not None


def write_plots(report: Report, folder: Path) -> None:
    """Write every plot into folder/plots, in place of those of an earlier report."""
    target = folder / PLOTS
    plots = plots_of(report)
    names = {plot.name for plot in plots}
    for old in target.glob("[0-9][0-9]*_*.*g"):
        if old.stem not in names:
            old.unlink()
    if not plots:
        return
    target.mkdir(exist_ok=True)
    template = environment().get_template("plot.svg.jinja")
    css = (HERE / "charts.css").read_text(encoding="utf-8")
    for plot in plots:
        svg = template.render(plot=plot, css=css, margin=MARGIN, head=HEAD)
        atomic_write(target / f"{plot.name}.svg", svg.lstrip())
        if has_pillow():
            atomic_write(target / f"{plot.name}.png", png_of(plot))


# ---------------------------------------------------------------- drawn as pixels


class _Canvas:
    """A Pillow image that is drawn on in the units of the SVG."""

    def __init__(self, width: float, height: float) -> None:
        from PIL import Image, ImageDraw  # optional

        self.image = Image.new("RGB", (round(width * SCALE), round(height * SCALE)), PAPER)
        self._draw = ImageDraw.Draw(self.image)
        self.x, self.y = 0.0, 0.0  # where the chart begins

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return (x + self.x) * SCALE, (y + self.y) * SCALE

    def line(self, points: list[tuple[float, float]], color: str, width: float = 1.0) -> None:
        """A line through points."""
        drawn = [self._at(*point) for point in points]
        self._draw.line(drawn, fill=color, width=max(1, round(width * SCALE)), joint="curve")

    def box(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """A filled box."""
        self._draw.rectangle((*self._at(x, y), *self._at(x + width, y + height)), fill=color)

    def text(self, x: float, y: float, words: str, *, anchor: str, size: float, color: str) -> None:
        """One line of text on a base line; ``anchor``: l, m or r."""
        from PIL import ImageFont

        font: Any = ImageFont.load_default(size * SCALE)
        self._draw.text(self._at(x, y), words, font=font, fill=color, anchor=f"{anchor}s")


def png_of(plot: Plot) -> bytes:
    """A plot as a PNG file, in light colours."""
    canvas = _Canvas(plot.width, plot.height)
    canvas.text(MARGIN, 20, plot.title, anchor="l", size=13, color=INK)
    canvas.text(MARGIN, 36, plot.note, anchor="l", size=10.5, color=QUIET)
    canvas.x, canvas.y = MARGIN, HEAD
    if isinstance(plot.chart, BarChart):
        _draw_bars(canvas, plot.chart)
    else:
        _draw_curves(canvas, plot.chart)
    file = io.BytesIO()
    canvas.image.save(file, format="PNG", optimize=True)
    return file.getvalue()


def _draw_bars(canvas: _Canvas, chart: BarChart) -> None:
    bottom = chart.height - 16
    for tick in chart.ticks:
        canvas.line([(tick.at, 4), (tick.at, bottom)], RULE)
        canvas.text(tick.at, chart.height - 3, tick.text, anchor="m", size=10.5, color=QUIET)
    if chart.chance is not None:
        for top in range(4, int(bottom), 6):
            canvas.line([(chart.chance, top), (chart.chance, min(top + 3, bottom))], QUIET)
    for bar in chart.bars:
        canvas.text(bar.x - 8, bar.y + 14, bar.label, anchor="r", size=11.5, color=INK)
        canvas.box(bar.x, bar.y + 2, bar.width, 16, COLORS[bar.color])
        if bar.low is not None and bar.high is not None:
            canvas.line([(bar.low, bar.y + 10), (bar.high, bar.y + 10)], INK, 1.2)
            for end in (bar.low, bar.high):
                canvas.line([(end, bar.y + 6), (end, bar.y + 14)], INK, 1.2)
        canvas.text(chart.width, bar.y + 14, bar.value, anchor="r", size=11.5, color=INK)


def _draw_curves(canvas: _Canvas, chart: LineChart) -> None:
    for tick in chart.y_ticks:
        canvas.line([(chart.left, tick.at), (chart.right, tick.at)], RULE)
        canvas.text(chart.left - 6, tick.at + 4, tick.text, anchor="r", size=10.5, color=QUIET)
    for tick in chart.x_ticks:
        canvas.text(tick.at, chart.height - 6, tick.text, anchor="m", size=10.5, color=QUIET)
    for line in chart.lines:
        pairs = [pair.split(",") for pair in line.points.split()]
        points = [(float(x), float(y)) for x, y in pairs]
        is_held_out = line.style == "held-out"
        canvas.line(points, ACCENT if is_held_out else QUIET, 2.0 if is_held_out else 1.6)
