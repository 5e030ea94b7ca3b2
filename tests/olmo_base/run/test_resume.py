"""Checkpoints: complete or absent, the latest good one is found, nothing random is lost."""

import random

import numpy as np
import pytest
import torch

from olmo_base.run.errors import UserError
from olmo_base.run.resume import (
    CheckpointConfig,
    latest_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from tests.olmo_base.run.test_artefact import RunFolder, recipe_in


@pytest.fixture
def folder(tmp_path):
    return RunFolder.open(recipe_in(tmp_path / "run"), [])


def save(folder: RunFolder, step: int, keep: int = 2) -> None:
    weights = {"w": torch.full((2, 3), float(step))}
    kept = CheckpointConfig(save_total_limit=keep)
    save_checkpoint(folder, step, weights=weights, state={"tokens": step * 10}, config=kept)


def test_what_was_saved_is_loaded(folder):
    assert latest_checkpoint(folder) is None
    save(folder, 5)
    found = latest_checkpoint(folder)
    assert found is not None
    assert found.step == 5
    weights, state = found.load()
    torch.testing.assert_close(weights["w"], torch.full((2, 3), 5.0))
    assert state == {"tokens": 50}


def test_only_the_latest_ones_are_kept(folder):
    for step in (1, 2, 3):
        save(folder, step)
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert names == ["step_000002", "step_000003"]


def test_a_corrupt_checkpoint_is_passed_over_for_the_one_before(folder, capsys):
    save(folder, 1)
    save(folder, 2)
    file = folder.checkpoints / "step_000002" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = latest_checkpoint(folder)
    assert found is not None
    assert found.step == 1
    assert "step_000002 is corrupt" in capsys.readouterr().err


def test_a_half_written_checkpoint_is_removed(folder):
    save(folder, 1)
    half = folder.checkpoints / ".step_000002.abc.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    found = latest_checkpoint(folder)
    assert found is not None
    assert found.step == 1
    assert not half.exists()


def test_only_corrupt_checkpoints_stop_the_run(folder):
    save(folder, 1)
    (folder.checkpoints / "step_000001" / "state.pt").unlink()
    with pytest.raises(UserError, match="Every checkpoint"):
        latest_checkpoint(folder)


def test_generators_go_on_where_they_were(folder):
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    save_checkpoint(
        folder, 1, weights={}, state={"random": random_state()}, config=CheckpointConfig()
    )
    expected = draw()
    draw()
    found = latest_checkpoint(folder)
    assert found is not None
    restore_random_state(found.load()[1]["random"])
    assert draw() == expected
