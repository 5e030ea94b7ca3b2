"""How many processes a plan is made for, and how they share weights: ``run --dry-run`` asks it."""

import os
from pathlib import Path
from typing import Any

import torch
import yaml

from olmo_base.run.errors import UserError
from olmo_base.run.launch import Launch
from open_instruct.loop import asked_sharding, asks_for_zero

# accelerate's words for what the loop trains with -> whether weights are divided
KINDS = {"NO": False, "MULTI_CPU": False, "MULTI_GPU": False, "FSDP": True, "DEEPSPEED": True}


def planned_launch(num_processes: int | None, accelerate_config: str | None) -> Launch | None:
    """What a plan is made for; None: this process alone, on this machine.

    Asked for by an option, or by the launcher that started this process. Errors: UserError.
    """
    if accelerate_config is not None:
        return _of_file(Path(accelerate_config), num_processes)
    if num_processes is not None:
        return Launch(num_processes)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return None
    plugin = asked_sharding()
    return Launch(
        started,
        device="cuda" if torch.cuda.is_available() else "cpu",
        divides=plugin is not None or asks_for_zero(),
        releases=plugin is None or bool(plugin.reshard_after_forward),
    )


def _of_file(path: Path, num_processes: int | None) -> Launch:
    """As a file of ``accelerate config`` says. Errors: UserError if it says something else."""
    try:
        keys: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as accelerate's configuration: {error}") from None
    if not isinstance(keys, dict):
        raise UserError(f"{path} is no configuration of accelerate: it holds no keys.")
    kind = str(keys.get("distributed_type", "NO"))
    if kind not in KINDS:
        raise UserError(
            f"{path}: distributed_type is {kind}; memory is planned for {', '.join(KINDS)}."
        )
    number = num_processes or keys.get("num_processes", 1)
    if not isinstance(number, int) or number < 1:
        raise UserError(f"{path}: num_processes is {number!r}; it must be a whole number above 0.")
    sharding = keys.get("fsdp_config") or {}
    return Launch(
        number,
        device="cpu" if keys.get("use_cpu") or kind == "MULTI_CPU" else "cuda",
        divides=KINDS[kind],
        releases=bool(sharding.get("fsdp_reshard_after_forward", True)),
    )
