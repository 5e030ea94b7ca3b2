"""A model whose weights, gradients and moments DeepSpeed divides over ranks (ZeRO-3).

DeepSpeed's engine stands where DDP's wrapper does: it averages gradients over the ranks, clips them
and steps the optimizer over this rank's parts (arXiv:1910.02054). What is written and read is
whole, in the form that one process writes.
"""

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from olmo_base.optim import OptimConfig, build_optimizer, set_learning_rate, start_of_adamw
from olmo_base.run.errors import UserError
from open_instruct.logprobs import Wrapped

KEPT_WHOLE = 100_000  # numbers up to which a parameter (a norm's) stays gathered; DeepSpeed's own
BUCKET = 50_000_000  # gradients that are exchanged at once, numbers


def refuse_other_zero(plugin: Any) -> None:
    """Errors: UserError naming a key of accelerate's DeepSpeed plugin that would not be followed.

    Also if DeepSpeed is not installed.
    """
    # key -> whether it says what is done here, and what to set in its place
    settings = {
        "deepspeed_config_file": (
            plugin.hf_ds_config.config.get("train_batch_size") == "auto",
            "Remove it, and start from recipes/accelerate/deepspeed_zero3.yaml",
        ),
        "zero_stage": (plugin.zero_stage == 3, "Set it to 3"),
        "offload_optimizer_device": (
            plugin.offload_optimizer_device in (None, "none"),
            "Set it to none: moments stay on the device",
        ),
        "offload_param_device": (
            plugin.offload_param_device in (None, "none"),
            "Set it to none: weights stay on the device",
        ),
        "zero3_init_flag": (
            not plugin.zero3_init_flag,
            "Set it to false: every process reads the weights",
        ),
        "gradient_accumulation_steps": (
            plugin.gradient_accumulation_steps in (1, "auto"),
            "Set it to 1: the recipe's decides",
        ),
        "gradient_clipping": (
            plugin.gradient_clipping in (None, "auto"),
            "Remove it: the recipe's max_grad_norm decides",
        ),
    }
    for key, (is_followed, advice) in settings.items():
        if not is_followed:
            raise UserError(f"{key} in accelerate's configuration is not what happens. {advice}.")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "accelerate was configured for DeepSpeed, which is not installed. Run "
            "pip install 'open-instruct[deepspeed]', or launch with recipes/accelerate/fsdp2.yaml, "
            "which divides the same things and needs nothing more."
        )


class ZeroEngine:
    """The model over all ranks, and its optimizer."""

    def __init__(self, model: Wrapped, config: OptimConfig, num_ranks: int) -> None:
        """Divide ``model`` in place; every rank must hold the same weights.

        Errors: UserError for quantised weights and for an optimizer that needs whole matrices.
        """
        import deepspeed

        whole: Any = model.model
        if getattr(whole, "is_quantized", False):
            raise UserError(
                "Weights in 4 or 8 bits cannot be divided over ranks. Launch with "
                "recipes/accelerate/ddp.yaml, or leave load_in_4bit and load_in_8bit out."
            )
        if config.optim != "adamw":
            raise UserError(
                f"optim: {config.optim}, which needs whole matrices, and ZeRO-3 lays each rank's "
                "parts end to end. Set optim: adamw, or launch with recipes/accelerate/fsdp2.yaml."
            )
        assert model.native is None, "ZeRO-3 gathers the modules that transformers calls"
        deepspeed.utils.logger.setLevel(logging.WARNING)
        self.optimizer = build_optimizer(whole, config)
        self._num_ranks = num_ranks
        groups = self.optimizer.param_groups
        self._parameters: list[nn.Parameter] = [one for group in groups for one in group["params"]]
        self._groups = self.optimizer.state_dict()["param_groups"]
        # Some versions of the engine begin with an empty step: at this rate it moves nothing.
        set_learning_rate(self.optimizer, 0.0)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # counted by us: the loss is divided once
                "gradient_accumulation_steps": 1,
                "gradient_clipping": config.max_grad_norm,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {
                    "stage": 3,
                    "reduce_bucket_size": BUCKET,
                    "stage3_param_persistence_threshold": KEPT_WHOLE,
                },
            },
        )
        self._parts: list[Tensor] = self.engine.optimizer.fp32_partitioned_groups_flat
        for part in self._parts:
            self.optimizer.state[part] = start_of_adamw(part)

    def meet(self, *, is_last: bool) -> None:
        """Say before a micro-batch whether it is a step's last."""
        self.engine.set_gradient_accumulation_boundary(is_last)

    def backward(self, loss: Tensor) -> None:
        """Add to the step's gradients."""
        self.engine.backward(loss)

    def step(self) -> Tensor:
        """Clip, step and forget the gradients; their norm before clipping."""
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def state(self, *, keeps: bool) -> dict[str, Any]:
        """``optimizer.state_dict()`` of one process, on a rank that ``keeps`` it. All must ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        # Every part has taken the same steps.
        num_steps = self.optimizer.state[self._parts[0]]["step"]
        state: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(self._parameters):
            moments = {}
            for name in ("exp_avg", "exp_avg_sq"):
                value = safe_get_full_optimizer_state(parameter, name)
                moments[name] = value.cpu().clone() if keeps else value.new_empty(0)
            state[number] = {"step": num_steps.cpu().clone(), **moments}
        return {"state": state, "param_groups": self._groups}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put the state of one process into the optimizer, each rank taking its parts."""
        from deepspeed.utils import safe_set_local_optimizer_state

        assert len(state["state"]) == len(self._parameters), "the checkpoint is of another model"
        for number, parameter in enumerate(self._parameters):
            for name in ("exp_avg", "exp_avg_sq"):
                part = self._part(state["state"][number][name], parameter)
                safe_set_local_optimizer_state(parameter, part, name)
        for part in self._parts:
            self.optimizer.state[part]["step"].fill_(float(state["state"][0]["step"]))

    def put(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Put this rank's part of a whole weight into ``parameter``."""
        from deepspeed.utils import safe_set_local_fp32_param

        divided: Any = parameter
        part = self._part(whole, parameter)
        safe_set_local_fp32_param(parameter, part)  # what the optimizer steps
        divided.ds_tensor.data.copy_(part)  # what is gathered
        if divided.data.numel() == divided.ds_numel:  # a small one, which stays gathered
            divided.data.copy_(whole)

    def _part(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        divided: Any = parameter
        size = divided.ds_tensor.numel()
        filled = torch.nn.functional.pad(
            whole.flatten(), (0, size * self._num_ranks - whole.numel())
        )
        rank = torch.distributed.get_rank()
        return filled[rank * size : (rank + 1) * size].to(divided.ds_tensor)


def is_divided(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds a part of it on each rank."""
    return hasattr(parameter, "ds_id")


def whole_parameter(parameter: Tensor) -> Tensor:
    """A copy of all of it, on every rank; all must ask."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def numbers_held(parameter: Tensor) -> tuple[int, int]:
    """Numbers in this rank's part, and in all of it."""
    divided: Any = parameter
    return divided.ds_tensor.numel(), divided.ds_numel
