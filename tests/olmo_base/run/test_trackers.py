"""Trackers: what they hold is read back by their own readers, and nothing runs unasked."""

import contextlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from olmo_base.run.errors import UserError
from olmo_base.run.metrics import LogConfig, MetricsLog
from olmo_base.run.recipe import RecipeError
from olmo_base.run.trackers import refuse_missing_trackers, tracker_names
from tests.olmo_base.run.test_artefact import RunFolder, recipe_in


def train_a_little(path: Path, report_to: str | tuple[str, ...], resume_step: int = 0) -> None:
    folder = RunFolder.open(recipe_in(path), [])
    with MetricsLog(folder, resume_step, LogConfig(report_to=report_to)) as log:
        for step in range(resume_step + 1, resume_step + 4):
            log.write(step, loss=10.0 / step, learning_rate=0.5, note="words are no curve")
    folder.release()


def test_tensorboards_own_reader_finds_every_row_once_after_a_resume(tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    train_a_little(tmp_path / "run", "tensorboard")
    train_a_little(tmp_path / "run", ("tensorboard",), resume_step=2)
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["learning_rate", "loss"]
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(step, pytest.approx(10.0 / step)) for step in (1, 2, 3, 4, 5)]


def test_wandb_offline_keeps_a_run_in_the_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train_a_little(tmp_path / "run", ["wandb"])  # type: ignore[arg-type]
    [record] = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"learning_rate" in record.read_bytes()


def test_trackio_keeps_every_row_on_this_machine(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    program = (
        "import sys; from tests.olmo_base.run.test_trackers import train_a_little; "
        "from pathlib import Path; train_a_little(Path(sys.argv[1]), 'trackio'); "
        "train_a_little(Path(sys.argv[1]), ('trackio',), resume_step=3)"
    )
    # It reads where its files go when it is imported, and leaves threads behind.
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], check=True)
    [database] = (tmp_path / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as opened:
        rows = opened.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    found = {step: json.loads(metrics) for step, metrics in rows}
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5, 6]
    assert found[4] == {"loss": 2.5, "learning_rate": 0.5}


@pytest.mark.parametrize("given, names", [("none", ()), ((), ()), (("wandb", "wandb"), ("wandb",))])
def test_one_name_a_list_and_none_are_understood(given, names):
    assert tracker_names(given) == names


def test_an_unknown_tracker_is_refused_with_the_nearest_known():
    with pytest.raises(RecipeError, match=r"report_to: 'tensorbord' .* Did you mean 'tensorboard'"):
        LogConfig(report_to="tensorbord")


def test_a_tracker_that_is_not_installed_is_one_message_naming_the_extra(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(UserError, match=r"trackio is not installed.*open-instruct\[tracking\]"):
        refuse_missing_trackers("trackio")


def test_no_tracker_is_imported_unasked(tmp_path):
    program = (
        "import sys; from tests.olmo_base.run.test_trackers import train_a_little; "
        "from pathlib import Path; train_a_little(Path(sys.argv[1]), 'none'); "
        "assert not {'wandb', 'trackio', 'tensorboard'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], check=True)
