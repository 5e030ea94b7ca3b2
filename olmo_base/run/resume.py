"""Checkpoints: everything a loop needs to go on as if it had never stopped.

    checkpoints/step_000100/
        model.safetensors   weights
        state.pt            optimizer, random generators, counters; read with weights_only=True
        index.json          size and SHA-256 of the two

A checkpoint gets its name only when it is complete, and the one before is deleted only after.
Those of several ranks are written by sharded.py.
"""

import json
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from olmo_base.run.artefact import RunFolder, atomic_folder, sha256_file
from olmo_base.run.errors import UserError
from olmo_base.run.recipe import RecipeError, setting

CHECKPOINT_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class CheckpointConfig:
    """How often a checkpoint is written, and how many of the latest stay."""

    save_steps: int = setting(500, low=1, changes_result=False, help="steps between checkpoints")
    save_total_limit: int = setting(2, low=1, changes_result=False, help="checkpoints kept")
    permanent_save_steps: int = setting(
        0, low=0, changes_result=False, help="checkpoints of such steps are never deleted; 0: none"
    )

    def __post_init__(self) -> None:
        if self.permanent_save_steps % self.save_steps:
            raise RecipeError(
                "permanent_save_steps",
                f"{self.permanent_save_steps} is no multiple of save_steps {self.save_steps}, so "
                "some of those steps have no checkpoint.",
            )


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and state, on the CPU."""
        weights = load_file(self.path / "model.safetensors")
        state = torch.load(self.path / "state.pt", map_location="cpu", weights_only=True)
        return weights, state


def save_checkpoint(
    folder: RunFolder,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    config: CheckpointConfig,
) -> Path:
    """Write ``checkpoints/step_N`` whole, then delete the outdated ones.

    ``state`` may hold tensors, numbers, text, lists and dicts: what torch reads back with
    ``weights_only=True``. Tensors that share memory (tied weights) are written once each. Errors:
    UserError if it cannot be written; those before it are kept.
    """
    path = folder.checkpoints / f"step_{step:06d}"
    try:
        _write_checkpoint(path, step, weights, state)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises the second
        raise unwritable(step, error) from error
    folder.note_time()
    for old in outdated((path.name for path in folder.checkpoints.iterdir()), config):
        shutil.rmtree(folder.checkpoints / old)
    return path


def unwritable(step: int, error: BaseException) -> UserError:
    """What to tell of a checkpoint that could not be written."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"The checkpoint of step {step} could not be written: {lines[-1].rstrip('.')}. Those "
        "before it are kept. Make room where checkpoints go and run again; the run goes on from "
        "the last one."
    )


def _write_checkpoint(
    path: Path, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    with atomic_folder(path) as temporary:
        separate = {name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}
        save_file(separate, temporary / "model.safetensors")
        torch.save(dict(state), temporary / "state.pt")
        files = {
            name: {
                "bytes": (temporary / name).stat().st_size,
                "sha256": sha256_file(temporary / name),
            }
            for name in ("model.safetensors", "state.pt")
        }
        index = {"step": step, "files": files}
        (temporary / "index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def outdated(names: Iterable[str], config: CheckpointConfig) -> list[str]:
    """Which of these checkpoints may go: neither of the latest ones nor permanent."""
    steps = {
        int(match.group(1)): match.group(0)
        for match in map(CHECKPOINT_NAME.fullmatch, names)
        if match
    }
    every = config.permanent_save_steps
    return [
        steps[step]
        for step in sorted(steps)[: -config.save_total_limit]
        if every == 0 or step % every
    ]


def latest_checkpoint(folder: RunFolder) -> Checkpoint | None:
    """The newest checkpoint whose files are as they were written; None if there is none yet.

    Half-written ones have no name and are removed. A corrupt one is named in the log and the one
    before it is used. Errors: UserError if there are checkpoints and all of them are corrupt.
    """
    if folder.is_main and folder.checkpoints.is_dir():
        for leftover in folder.checkpoints.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)
    found = _named_checkpoints(folder.checkpoints)
    for step, path in reversed(found):
        problem = checkpoint_problem(path)
        if problem is None:
            return Checkpoint(path, step)
        folder.log(f"checkpoint {path} is corrupt ({problem}); looking for the one before it")
    if found:
        raise UserError(
            f"Every checkpoint in {folder.checkpoints} is corrupt. Move the folder "
            f"{folder.path} away to start from the beginning."
        )
    return None


def checkpoint_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if they are as written."""
    try:
        index = json.loads((path / "index.json").read_text(encoding="utf-8"))
        for name, expected in index["files"].items():
            file = path / name
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, {expected['bytes']} were written"
            if sha256_file(file) != expected["sha256"]:
                return f"the content of {name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError):
        return "index.json cannot be read"
    return None


def _named_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    if not checkpoints.is_dir():
        return []
    matches = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in checkpoints.iterdir())
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators, in a form ``state.pt`` can hold."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put every generator back to where ``random_state`` found it."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
