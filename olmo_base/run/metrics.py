"""What a run tells while it works: rows in metrics.jsonl, and a progress bar or plain lines."""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from olmo_base.run.artefact import RunFolder, atomic_write
from olmo_base.run.curves import can_draw, draw_curves
from olmo_base.run.errors import Stopped, UserError
from olmo_base.run.recipe import RecipeError, nearest, recipe_to_dict, setting
from olmo_base.run.trackers import TRACKERS, Session, Tracker, open_trackers, tracker_names

SECONDS_BETWEEN_LINES = 5.0  # without a terminal
SECONDS_BETWEEN_CURVES = 60.0  # drawing takes a few tenths of one


@dataclass(frozen=True)
class LogConfig:
    """How often a step is written to metrics.jsonl, and where its rows go too."""

    logging_steps: int = setting(10, low=1, changes_result=False, help="steps between rows")
    report_to: str | tuple[str, ...] = setting(
        "none", changes_result=False, help="tensorboard, wandb or trackio; one or a list"
    )

    def __post_init__(self) -> None:
        for name in tracker_names(self.report_to):
            if name not in TRACKERS:
                raise RecipeError(
                    "report_to",
                    f"{name!r} is not known here; it must be none, {', '.join(TRACKERS)}, or a "
                    f"list of these.{nearest(name, TRACKERS)}",
                )


class MetricsLog:
    """Appends rows to metrics.jsonl, and to the trackers asked for; draws the curves at the end.

    After a resume, rows the lost steps had written are gone. Use it in a ``with``.
    """

    def __init__(self, folder: RunFolder, resume_step: int, log: LogConfig | None = None) -> None:
        """Errors: UserError for a tracker that is not installed."""
        self._folder = folder
        self._path = folder.path / "metrics.jsonl"
        self._is_main = folder.is_main
        self._trackers: list[Tracker] = []
        self._last_drawn = time.monotonic()
        if not self._is_main:
            return
        if log is not None and tracker_names(log.report_to):
            session = Session(
                folder.path, folder.run_id, recipe_to_dict(folder.recipe), resume_step
            )
            self._trackers = open_trackers(log.report_to, session)
        kept = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # the half line of a killed process
                if row["step"] <= resume_step and resume_step > 0:
                    kept.append(line + "\n")
        atomic_write(self._path, "".join(kept))

    def write(self, step: int, **values: Any) -> None:
        """Add one row. Numbers that JSON cannot hold (NaN, infinity) are written as null."""
        if not self._is_main:
            return
        row = {"step": step, **{key: _finite(value) for key, value in values.items()}}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        numbers = {
            key: float(value)
            for key, value in row.items()
            if isinstance(value, int | float) and key != "step"
        }
        for tracker in self._trackers:
            tracker.write(step, numbers)

    def note_saved(self) -> None:
        """A checkpoint was written: draw the curves, unless they were just drawn."""
        if time.monotonic() - self._last_drawn >= SECONDS_BETWEEN_CURVES:
            self._draw()

    def _draw(self) -> None:
        self._last_drawn = time.monotonic()
        if self._is_main and can_draw():
            try:
                draw_curves(self._folder.path)
            except OSError as error:  # a picture is no reason to lose a run
                self._folder.log(f"curves.png could not be written: {error.strerror}")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for tracker in self._trackers:
            tracker.close()
        if not self._is_main or not (kind is None or issubclass(kind, Stopped | UserError)):
            return
        if not can_draw():
            self._folder.log(
                "no curves.png: matplotlib is not installed (pip install 'open-instruct[tracking]')"
            )
        self._draw()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _words(values: dict[str, Any]) -> str:
    """``loss 1.234, 13,000 tokens/s`` for the bar and the lines."""
    parts = []
    for key, value in values.items():
        name = "tokens/s" if key == "tokens_per_second" else key.replace("_", " ")
        if isinstance(value, float) and abs(value) < 1000:
            parts.append(f"{name} {value:.4g}")
        elif isinstance(value, int | float):
            parts.append(f"{name} {value:,.0f}")
        else:
            parts.append(f"{name} {value}")
    return ", ".join(parts)


class Progress:
    """Progress of a long piece of work, with speed and time left.

    A bar on a terminal; plain lines, a few seconds apart, where there is none. The lines are kept
    in train.log either way.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        title: str,
        total: int,
        done: int = 0,
        unit: str = "steps",
    ) -> None:
        self._folder = folder
        self._title, self._total, self._unit = title, total, unit
        self._first, self._done = done, done
        self._values: dict[str, Any] = {}
        self._is_main = folder.is_main if folder else int(os.environ.get("RANK", "0")) == 0
        self._started = self._last_line = time.monotonic()
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "Progress":
        if self._is_main and sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self._unit),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._title, total=self._total, completed=self._done, shown=""
            )
        return self

    def update(self, done: int, **shown: Any) -> None:
        """Say how much is done in all; ``shown`` values replace those shown before."""
        self._done = done
        self._values.update(shown)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, shown=_words(self._values))
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._say(self._line(now))

    def _line(self, now: float) -> str:
        seconds = now - self._started
        rate = (self._done - self._first) / seconds if seconds > 0 else 0.0
        left = (self._total - self._done) / rate if rate > 0 else math.inf
        time_left = f"{left:.0f} s left" if math.isfinite(left) else "time left unknown"
        values = f", {_words(self._values)}" if self._values else ""
        return (
            f"{self._title}: {self._done:,}/{self._total:,} {self._unit}, "
            f"{rate:,.1f}/s, {time_left}{values}"
        )

    def _say(self, line: str) -> None:
        if not self._is_main:
            return
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        if self._folder is not None:
            self._folder.keep(line)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._done > self._first:
            self._say(self._line(time.monotonic()))
