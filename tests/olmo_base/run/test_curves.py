"""Training curves: which rows become lines, and a picture that opens."""

import json
from typing import Any

import pytest

from olmo_base.run.curves import draw_curves, lines_of


def test_a_key_gathers_its_own_points_and_those_of_its_sources():
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": 5.0, "eval_loss": 6.0, "eval_loss/web": 7.0, "loss_of_other": 1.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 4.0},
    ]
    assert lines_of(rows, ("loss", "eval_loss")) == {
        "loss": [[1, 3], [5.0, 4.0]],
        "eval_loss": [[1], [6.0]],
        "eval_loss/web": [[1], [7.0]],
    }


def test_curves_are_a_png_that_opens_and_one_point_is_none(tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 1, "loss": 3.0}) + "\n")
    assert draw_curves(tmp_path) is None
    with open(metrics, "a") as file:
        file.write(json.dumps({"step": 2, "loss": 2.0, "grad_norm": 1.0}) + "\n" + '{"step": 3')
    assert draw_curves(tmp_path) == tmp_path / "curves.png"
    pixels = image.imread(tmp_path / "curves.png")
    assert pixels.shape[1] == 990 and pixels.std() > 0.01
