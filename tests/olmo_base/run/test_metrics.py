"""Metrics and progress: rows that survive a kill, lines where there is no terminal."""

import json

from olmo_base.run.metrics import MetricsLog, Progress
from tests.olmo_base.run.test_artefact import RunFolder, recipe_in


def rows(folder: RunFolder) -> list[dict]:
    text = (folder.path / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_rows_of_lost_steps_and_half_lines_are_gone_after_a_resume(tmp_path):
    folder = RunFolder.open(recipe_in(tmp_path / "run"), [])
    log = MetricsLog(folder, resume_step=0)
    for step in (10, 20, 30):
        log.write(step, loss=1.0 / step)
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')
    MetricsLog(folder, resume_step=20).write(30, loss=9.0)
    assert [(row["step"], row["loss"]) for row in rows(folder)] == [
        (10, 0.1),
        (20, 0.05),
        (30, 9.0),
    ]


def test_a_run_from_the_start_begins_with_no_rows(tmp_path):
    folder = RunFolder.open(recipe_in(tmp_path / "run"), [])
    MetricsLog(folder, resume_step=0).write(1, loss=1.0)
    MetricsLog(folder, resume_step=0)
    assert rows(folder) == []


def test_a_number_json_cannot_hold_becomes_null(tmp_path):
    folder = RunFolder.open(recipe_in(tmp_path / "run"), [])
    MetricsLog(folder, resume_step=0).write(1, loss=float("nan"))
    assert rows(folder) == [{"step": 1, "loss": None}]


def test_without_a_terminal_progress_ends_with_a_plain_line_kept_in_the_log(tmp_path, capsys):
    folder = RunFolder.open(recipe_in(tmp_path / "run"), [])
    with Progress(folder, "pretrain", total=4) as progress:
        progress.update(4, loss=1.25, tokens_per_second=12345.6)
    line = capsys.readouterr().err
    assert "pretrain: 4/4 steps" in line
    assert "loss 1.25, tokens/s 12,346" in line
    assert "pretrain: 4/4 steps" in (folder.path / "train.log").read_text()
