"""A model whose weights, gradients and moments are divided over ranks (FSDP2), and whole again.

Each layer is gathered for its forward and backward pass and let go afterwards (arXiv:2304.11277).
Which module is gathered is which module is called: of an OLMo that ``olmo_base`` computes, the
native layers, whose weights transformers' layers then share.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    StateDictType,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from olmo_base.divided import copy_part, local_tensor, whole_tensor
from olmo_base.model.hf_weights import hf_name
from olmo_base.optim import start_state
from olmo_base.run.errors import UserError
from open_instruct.adapters import is_adapted
from open_instruct.logprobs import Wrapped
from open_instruct.zero import is_divided, numbers_held, whole_parameter


def refuse_other_settings(plugin: Any) -> None:
    """Errors: UserError naming a key of accelerate's FSDP plugin that would not be followed."""
    if plugin.fsdp_version != 2:
        raise UserError("fsdp_version: 1, and weights are divided by FSDP2 here. Set it to 2.")
    # key -> whether it says what is done here, and what to set in its place
    settings = {
        "fsdp_auto_wrap_policy": (
            plugin.auto_wrap_policy is transformer_auto_wrap_policy,
            "Set it to TRANSFORMER_BASED_WRAP: each layer is gathered by itself",
        ),
        "fsdp_transformer_layer_cls_to_wrap": (
            plugin.transformer_cls_names_to_wrap is None,
            "Remove it: the layers are found",
        ),
        "fsdp_state_dict_type": (
            plugin.state_dict_type == StateDictType.FULL_STATE_DICT,
            "Set it to FULL_STATE_DICT: checkpoints are gathered",
        ),
        "fsdp_offload_params": (
            not isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "Set it to false: weights stay on the device",
        ),
        "fsdp_cpu_ram_efficient_loading": (
            not plugin.cpu_ram_efficient_loading,
            "Set it to false: every process reads the weights",
        ),
        "fsdp_activation_checkpointing": (
            not plugin.activation_checkpointing,
            "Set it to false, and gradient_checkpointing to true in the recipe",
        ),
        "fsdp_ignored_modules": (plugin.ignored_modules is None, "Remove it"),
    }
    for key, (is_followed, advice) in settings.items():
        if not is_followed:
            raise UserError(f"{key} in accelerate's configuration is not what happens. {advice}.")


def shard(model: Wrapped, device: torch.device, num_ranks: int, *, releases: bool) -> None:
    """Divide ``model`` in place over all ranks; every rank must hold the same weights.

    ``releases``: a layer is gathered again for its backward pass. Errors: UserError for quantised
    weights, and for a model that does not name its layers.
    """
    whole: Any = model.model
    if getattr(whole, "is_quantized", False):
        raise UserError(
            "Weights in 4 or 8 bits cannot be divided over ranks. Launch with "
            "recipes/accelerate/ddp.yaml, or leave load_in_4bit and load_in_8bit out."
        )
    mesh = init_device_mesh(device.type, (num_ranks,), mesh_dim_names=("shards",))
    divided: set[nn.Parameter] = set()
    native = model.native
    if native is None:
        for layer in layers_of(whole):
            fully_shard(layer, mesh=mesh, reshard_after_forward=releases)
    else:
        model.computing = native  # a part of the module, so that all its layers have one root
        for index, layer in enumerate(native.layers):
            fully_shard(layer, mesh=mesh, reshard_after_forward=releases)
            register_fsdp_forward_method(layer, "packed")
            for name, parameter in layer.named_parameters():
                owner, _, leaf = hf_name(f"layers.{index}.{name}").rpartition(".")
                setattr(whole.get_submodule(owner), leaf, parameter)
                divided.add(parameter)
    fully_shard(model, mesh=mesh, ignored_params=divided)


def layers_of(model: Any) -> list[nn.Module]:
    """The modules that transformers never splits. Errors: UserError if it names none."""
    base = model.get_base_model() if is_adapted(model) else model
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"{type(base).__name__} does not say what its layers are, so they can be neither "
            "divided over ranks nor compiled. Launch with recipes/accelerate/ddp.yaml, and leave "
            "torch_compile out."
        )
    return layers


def release(model: Wrapped) -> None:
    """Let go of what an evaluation left gathered: parameters are this rank's parts again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def part_held(model: Wrapped) -> tuple[int, int]:
    """Numbers in this rank's parts of the parameters, and in all of them."""
    parameters = list(model.model.parameters())
    if is_divided(parameters[0]):
        held = [numbers_held(parameter) for parameter in parameters]
        return sum(here for here, _ in held), sum(everywhere for _, everywhere in held)
    here = sum(local_tensor(parameter.detach()).numel() for parameter in parameters)
    return here, sum(parameter.numel() for parameter in parameters)


# ---------------------------------------------------------------- whole again


def gathered(tensor: Tensor, *, keeps: bool) -> Tensor:
    """All of a divided tensor, on the CPU of a rank that ``keeps`` it; others get nothing.

    All ranks must ask. What is not divided is returned as it is.
    """
    if is_divided(tensor):
        whole = whole_parameter(tensor)
    elif isinstance(tensor, DTensor):
        whole = whole_tensor(tensor.detach())
    else:
        return tensor
    return whole.cpu() if keeps else whole.new_empty(0)


def gathered_state(optimizer: torch.optim.Optimizer, *, keeps: bool) -> dict[str, Any]:
    """``optimizer.state_dict()`` of one process. All ranks must ask."""
    state = optimizer.state_dict()
    whole = {
        number: {
            name: gathered(value, keeps=keeps) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": whole}


@torch.no_grad()
def restore_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put the state of one process into an optimizer, each rank taking its parts."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        optimizer.load_state_dict(dict(state))
        return
    start_state(optimizer)
    assert len(state["state"]) == len(parameters), "the checkpoint is of another model"
    for number, parameter in enumerate(parameters):
        for name, value in state["state"][number].items():
            copy_part(optimizer.state[parameter][name], value)


def make_whole(model: Wrapped, *, keeps: bool) -> None:
    """After the last step: an ordinary model, on the CPU, on a rank that ``keeps`` it.

    All ranks must ask. Nothing is computed with it any more; it is there to be written.
    """
    whole: dict[int, nn.Parameter] = {}
    modules: list[Any] = list(model.model.modules())
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not (isinstance(parameter, DTensor) or is_divided(parameter)):
                continue
            if id(parameter) not in whole:
                value = gathered(parameter, keeps=keeps)
                whole[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
            if keeps:
                module._parameters[name] = whole[id(parameter)]
    for module in modules:
        if keeps and isinstance(module, FSDPModule):  # would refuse parameters that are whole
            module.__class__ = type(module).__bases__[1]
