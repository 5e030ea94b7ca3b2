"""What a pretraining run keeps to go on from, whether of one process or of several ranks.

One process writes whole files (run/resume.py), several ranks their parts (run/sharded.py); each
reads what the other wrote, and so does another number of ranks.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from olmo_base.divided import copy_part
from olmo_base.model.transformer import Transformer
from olmo_base.optim import OptimConfig, StepGuard, parameter_groups, start_state
from olmo_base.parallel import Ranks
from olmo_base.pretrain_recipe import PretrainRecipe
from olmo_base.run.artefact import RunFolder
from olmo_base.run.errors import UserError
from olmo_base.run.resume import (
    Checkpoint,
    latest_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from olmo_base.run.sharded import ShardedCheckpoints, is_sharded, read_parts


@dataclass
class Position:
    """How far a run has come: what a checkpoint holds beside weights and optimizer."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # asked for so far
    left_out: int = 0  # sequences with repeated n-grams
    seconds: float = 0.0  # in steps, not in evaluations and checkpoints
    row_tokens: int = 0  # since the last row of metrics.jsonl, as the next two
    row_seconds: float = 0.0
    row_loss: float = 0.0  # summed


class Keeper:
    """Writes a run's checkpoints and finds the latest again."""

    def __init__(
        self,
        folder: RunFolder,
        recipe: PretrainRecipe,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        guard: StepGuard,
        ranks: Ranks,
    ) -> None:
        self._folder, self._recipe = folder, recipe
        self._model, self._optimizer, self._guard = model, optimizer, guard
        self._parts: ShardedCheckpoints | None = None
        if ranks.num_ranks > 1 or recipe.checkpoint_dir is not None:
            self._parts = ShardedCheckpoints(folder, recipe.checkpoints, recipe.checkpoint_dir)

    def resume(self) -> Position:
        """Put weights, optimizer, guard and generators where the latest checkpoint left them."""
        parts = self._parts
        checkpoint = latest_checkpoint(self._folder) if parts is None else parts.latest()
        if checkpoint is None:
            return Position()
        if is_sharded(checkpoint):
            start_state(self._optimizer)
            state = read_parts(checkpoint, self._tensors())
        else:
            state = self._read_whole(checkpoint)
        self._guard.load_state_dict(state["guard"])
        restore_random_state(state["random"])
        self._folder.log(f"going on from {checkpoint.path}, after step {checkpoint.step}")
        return Position(**state["position"])

    def _read_whole(self, checkpoint: Checkpoint) -> dict[str, Any]:
        weights, state = checkpoint.load()
        if self._parts is None:
            self._model.load_state_dict(weights)
            self._optimizer.load_state_dict(state["optimizer"])
            return state
        start_state(self._optimizer)
        targets = self._tensors()
        for name, whole in weights.items():
            copy_part(targets[f"model.{name}"], whole)
        names = names_in_order(self._model, self._recipe.optim)
        for number, values in state["optimizer"]["state"].items():
            for key, whole in values.items():
                copy_part(targets[f"optimizer.{names[number]}.{key}"], whole)
        return state

    def save(self, at: Position) -> None:
        """Write a checkpoint of this step; of several ranks, in the background."""
        state = {
            "position": asdict(at),
            "guard": self._guard.state_dict(),
            "random": random_state(),
        }
        if self._parts is not None:
            self._parts.begin(at.step, self._tensors(), state)
            return
        save_checkpoint(
            self._folder,
            at.step,
            weights=self._model.state_dict(),
            state={**state, "optimizer": self._optimizer.state_dict()},
            config=self._recipe.checkpoints,
        )

    @property
    def has_failed(self) -> bool:
        """Whether it is known that the one being written cannot be."""
        return self._parts is not None and self._parts.problem() is not None

    def finish(self, *, has_failed: bool = False) -> None:
        """Wait for the one being written. Errors: UserError if some rank could not write it."""
        if self._parts is not None:
            self._parts.finish()
        if has_failed:
            raise UserError("Another rank could not write its part of a checkpoint.")

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor that is kept, by a name that says no order and no division."""
        kept = {f"model.{name}": value.detach() for name, value in self._model.named_parameters()}
        for name, parameter in self._model.named_parameters():
            for key, value in self._optimizer.state[parameter].items():
                kept[f"optimizer.{name}.{key}"] = value
        return kept


def names_in_order(model: Transformer, config: OptimConfig) -> list[str]:
    """The parameters' names as one process's optimizer numbers them."""
    with torch.device("meta"):
        alone = Transformer(model.config)
    names = {id(parameter): name for name, parameter in alone.named_parameters()}
    groups = parameter_groups(alone, config)
    return [names[id(parameter)] for group in groups for parameter in group["params"]]
