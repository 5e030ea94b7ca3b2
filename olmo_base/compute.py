"""How the layers of a model compute: compiled, and in 8 bits."""

import importlib.util
import shutil
from typing import Any

import torch
from torch import nn

from olmo_base.model.transformer import Transformer
from olmo_base.parallel import Ranks
from olmo_base.run.errors import UserError

FLOAT8_CAPABILITY = (8, 9)  # Ada and Hopper, the first with 8-bit matrix products


def compile_layers(model: Transformer) -> None:
    """Let torch compile each layer, in place; all layers share what is compiled once.

    Errors: UserError where there is no C++ compiler for a CPU's code.
    """
    refuse_no_compiler(model.device)
    for layer in model.layers:
        layer.compile()


def compile_layers_for_rows(model: Transformer, *, backend: str = "inductor") -> None:
    """The same for rows of unlike lengths: compiled once for any number of positions.

    Attention stays as it is: it takes rows apart into groups, other ones in each batch.
    Errors: as in ``compile_layers``.
    """
    refuse_no_compiler(model.device)
    layer: Any
    for layer in model.layers:
        for name in ("mix", "mix_rows"):
            setattr(layer.attention, name, torch.compiler.disable(getattr(layer.attention, name)))
        layer.packed = torch.compile(layer.packed, dynamic=True, backend=backend)
        layer.compile(dynamic=True, backend=backend)


def refuse_no_compiler(device: torch.device) -> None:
    """Errors: UserError where there is no C++ compiler for a CPU's code."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise UserError(
            "torch_compile makes C++ for a CPU, and neither g++ nor clang++ is here. Install one, "
            "or leave torch_compile out."
        )


def refuse_float8(ranks: Ranks) -> None:
    """Errors: UserError if this machine cannot compute in 8 bits, saying what it lacks."""
    if ranks.config.tensor_parallel > 1:
        raise UserError("float8 does not go with tensor_parallel; leave one of them out.")
    if importlib.util.find_spec("torchao") is None:
        raise UserError("float8 needs torchao: pip install torchao. Or leave float8 out.")
    if (
        ranks.device.type != "cuda"
        or torch.cuda.get_device_capability(ranks.device) < FLOAT8_CAPABILITY
    ):
        raise UserError(
            f"float8 needs a GPU with 8-bit matrix products (L40S, H100, H200, B200); this is "
            f"{ranks.device.type}. Leave float8 out."
        )


def in_float8(model: Transformer) -> Transformer:
    """The same model, the layers' linear maps computing in 8 bits (torchao); the head does not."""
    from torchao.float8 import convert_to_float8_training  # an extra, and only if asked for

    def is_changed(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name.startswith("layers.")

    convert_to_float8_training(model, module_filter_fn=is_changed)
    return model
