"""Trackers: where the rows of metrics.jsonl go too, if ``report_to`` names one.

Nothing is imported and nothing is sent unless asked. TensorBoard writes files into the run folder;
wandb and trackio do as their own settings say (``WANDB_MODE=offline``, ``TRACKIO_SPACE_ID``).
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from olmo_base.run.errors import UserError

PROJECT = "open-instruct"  # unless WANDB_PROJECT or TRACKIO_PROJECT says another


class Session(NamedTuple):
    """What a tracker is told of a run when it starts or goes on."""

    folder: Path
    run_id: str  # the same after a resume
    recipe: Mapping[str, Any]
    resume_step: int  # later rows are written anew


class Tracker(Protocol):
    """Something that takes rows."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one row of numbers."""

    def close(self) -> None:
        """Everything is written when this returns."""


class TensorBoard:
    """Event files in the run folder's ``tensorboard``."""

    def __init__(self, session: Session) -> None:
        from torch.utils.tensorboard import SummaryWriter  # only there if tensorboard is

        purged = session.resume_step + 1 if session.resume_step else 0
        self._writer: Any = SummaryWriter(str(session.folder / "tensorboard"), purge_step=purged)
        lines = (f"    {key}: {value}" for key, value in session.recipe.items())
        self._writer.add_text("recipe", "\n".join(lines), 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """See Tracker."""
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, its files in the run folder."""

    def __init__(self, session: Session) -> None:
        import wandb  # an optional extra

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=session.folder.name,
            id=session.run_id,
            resume="allow",
            dir=str(session.folder),
            config=dict(session.recipe),
        )
        self._run.define_metric("*", step_metric="step")  # wandb's own counter refuses to go back

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


class Trackio:
    """A run of trackio, in its own folder (``TRACKIO_DIR``)."""

    def __init__(self, session: Session) -> None:
        import trackio  # an optional extra

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{session.folder.name}-{session.run_id}",
            resume="allow",
            config=dict(session.recipe),
            embed=False,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


TRACKERS: dict[str, Callable[[Session], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def tracker_names(report_to: str | tuple[str, ...]) -> tuple[str, ...]:
    """The trackers that a recipe's ``report_to`` asks for: one name, a list, or ``none``."""
    names = (report_to,) if isinstance(report_to, str) else report_to
    return () if names == ("none",) else tuple(dict.fromkeys(names))


def refuse_missing_trackers(report_to: str | tuple[str, ...]) -> None:
    """Errors: UserError for a tracker that is not installed."""
    for name in tracker_names(report_to):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"report_to: {name} is not installed. Install it with "
                "pip install 'open-instruct[tracking]', or leave it out: metrics.jsonl is always "
                "written."
            )


def open_trackers(report_to: str | tuple[str, ...], session: Session) -> list[Tracker]:
    """The trackers that were asked for, each at the start of the run or where it goes on."""
    refuse_missing_trackers(report_to)
    return [TRACKERS[name](session) for name in tracker_names(report_to)]
