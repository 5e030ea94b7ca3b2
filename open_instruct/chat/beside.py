"""Adapters served beside their base: one base in memory, and for each adapter its small matrices.

A generator of the base -> a model of the same tensors, whose adapted layers add what the adapter
says -> a generator of its own, with an engine and a thread of its own.
"""

import copy
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from olmo_base.model.generate import Generator
from olmo_base.model.hf_weights import hf_name
from olmo_base.run.artefact import adapter_base, refuse_changed_base
from olmo_base.run.errors import UserError

PREFIX = "base_model.model."  # how peft begins the names of an adapter's tensors


def beside(base: Generator, folder: Path, eos_token_ids: set[int]) -> Generator:
    """A generator of the adapter in ``folder``, which shares the weights of its base's.

    Errors: UserError if the two do not fit, or the adapter changes more than linear layers.
    """
    if adapter_base(folder) is None:
        raise UserError(f"{folder} is no adapter: it has no adapter_config.json, or is a model.")
    refuse_changed_base(folder, str(base.source))
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return Generator(
        adapted(base, folder),
        eos_token_ids=eos_token_ids or base.eos_token_ids,
        max_length=base.max_length,
        source=folder if has_tokenizer else base.source,
    )


def adapted(base: Generator, folder: Path) -> Any:
    """The base's model with the adapter in its layers; the base itself stays as it is."""
    try:
        import peft as library  # optional, and slow to import
    except ImportError:
        raise UserError(
            f"{folder} is an adapter. Adapters need the package peft: "
            "pip install 'open-instruct[adapters]'."
        ) from None
    peft: Any = library
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder} holds no {weights.name}. Copy or train the adapter again.")
    # A copy of the structure: every tensor is the base's own.
    kept = {id(tensor): tensor for tensor in chain(base.model.parameters(), base.model.buffers())}
    model: nn.Module = copy.deepcopy(base.model, kept)
    ours = {
        hf_name(f"{place}.weight").removesuffix(".weight") if base.is_native else place: place
        for place, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    try:
        settings: Any = peft.PeftConfig.from_pretrained(folder)
        _refuse_more_than_layers(folder, settings)
        renamed, places = {}, set()
        for key, tensor in load_file(weights).items():
            place, _, rest = key.removeprefix(PREFIX).partition(".lora_")
            if not rest or place not in ours:
                raise UserError(f"{weights} holds {key}, and its base has no such linear layer.")
            places.add(ours[place])
            renamed[f"{ours[place]}.lora_{rest}"] = tensor
        settings.target_modules = sorted(places)
        settings.inference_mode = True
        peft.inject_adapter_in_model(settings, model)
        report = peft.set_peft_model_state_dict(model, renamed)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(
            f"The adapter in {folder} cannot be put on its base: {first_line}"
        ) from None
    missing = [key for key in report.missing_keys if "lora_" in key]
    if missing or report.unexpected_keys:
        key = (missing or report.unexpected_keys)[0]
        raise UserError(f"{weights} does not fit its adapter_config.json: see {key}.")
    return model.eval()


def _refuse_more_than_layers(folder: Path, settings: Any) -> None:
    reason = None
    if str(getattr(settings.peft_type, "value", settings.peft_type)) != "LORA":
        reason = f"is of the kind {settings.peft_type}"
    for name in ("modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices"):
        if getattr(settings, name, None):
            reason = f"has {name}"
    if getattr(settings, "bias", "none") != "none":
        reason = "changes biases"
    if reason:
        raise UserError(
            f"{folder} {reason}, so it cannot share its base's weights. Merge it and serve the "
            f"result: open-instruct merge {folder} OUT."
        )
