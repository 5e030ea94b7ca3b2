"""Checkpoints of the OLMo trainers <-> Hugging Face folders, verified before anything is kept.

A folder -> its layout -> our model -> a folder of another layout -> both opened and compared.

Layouts:
    hf         config.json, *.safetensors: what transformers opens, and what our runs write
    olmo       config.yaml, model.pt or model.safetensors: the trainer of OLMo-1, early OLMo-2
    hf_olmo    config.json, model.safetensors: the same weights behind remote code (read only)
    olmo_core  config.json, model_and_optim/: OLMo-core, the trainer of OLMo-2 32B and OLMo-3
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmo_base.model.core_checkpoint import read_core, write_core
from olmo_base.model.hf_weights import (
    TOKENIZER_FILES,
    copy_tokenizer,
    export_hf,
    is_native,
    load_native,
    read_model_config,
)
from olmo_base.model.olmo_checkpoint import read_hf_olmo, read_json, read_olmo, write_olmo
from olmo_base.model.transformer import GENERATIONS, ModelConfig, Transformer
from olmo_base.run.artefact import atomic_folder
from olmo_base.run.errors import UserError

# Largest difference from transformers, as part of the largest value of a layer. Rounding in fp32
# stays below 1e-5 in deep models; halves of a matrix in the wrong order give about 1.
TOLERANCE = 1e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Converted:
    """What a conversion did, for people."""

    layout_from: str
    layout_to: str
    config: ModelConfig
    difference: float  # from transformers, see TOLERANCE
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    tokenizer_files: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> Converted:
    """Write the model in ``source`` to the new folder ``target`` in another layout.

    ``to`` None: hf for a trainer's checkpoint; a Hugging Face folder goes to the trainer that made
    its generation, olmo for OLMo-1 and olmo_core for the others. ``tokenizer_files`` None takes the
    tokenizer of ``source``, if there is one. ``dtype`` None keeps what the weights are saved in.

    The result is opened again: every weight must be the same bit for bit, and the hidden states of
    every layer and the logits those that transformers computes from the Hugging Face folder of the
    two. Otherwise nothing is written. No code that a checkpoint may hold is run.
    Errors: UserError for an unknown layout, a model that we do not build, a target that is there.
    """
    source, target = Path(source), Path(target)
    layout = find_layout(source)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{target} is there already. Name a new folder.")
    notes: list[str] = []
    model = READERS[layout](source, notes)
    to = to or _usual_target(layout, model.config)
    if (layout == "hf") == (to == "hf") or to not in WRITERS:
        others = "hf" if layout != "hf" else "olmo or olmo_core"
        raise UserError(f"{source} is of the layout {layout}; it can be converted to {others}.")
    model.to(dtype or model.dtype)
    tokenizer = _tokenizer_folder(source, tokenizer_files, notes)
    with atomic_folder(target) as temporary:
        WRITERS[to](model, temporary)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, temporary, vocab_size=model.config.vocab_size)
        again = READERS[to](temporary, [])
        _refuse_another_model(model, again, target, notes)
        del again
        hf_folder = temporary if to == "hf" else source
        difference = difference_from_transformers(model, hf_folder)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{source} was converted, but transformers computes something else from "
                f"{'the result' if to == 'hf' else 'it'}: states differ by {difference:.2g} of "
                f"their size, rounding explains {TOLERANCE:.0e}. Nothing was written. "
                "Please report it together with the configuration file."
            )
    return Converted(layout, to, model.config, difference, notes)


def find_layout(folder: Path) -> str:
    """The layout of a folder. Errors: UserError if it is none of them."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the folder of a model or a checkpoint.")
    if (folder / "config.json").is_file():
        content = read_json(folder / "config.json")
        if content.get("model_type") in GENERATIONS:
            return "hf"
        if content.get("model_type") == "hf_olmo":
            return "hf_olmo"
        if isinstance(content.get("model"), dict) and "d_model" in content["model"]:
            return "olmo_core"
    if (folder / "config.yaml").is_file():
        return "olmo"
    raise UserError(
        f"{folder} holds no model that can be converted: a Hugging Face folder of an OLMo "
        "(config.json), a checkpoint of the OLMo trainer (config.yaml with model.pt) or one of "
        "OLMo-core (config.json with model_and_optim/)."
    )


def _usual_target(layout: str, config: ModelConfig) -> str:
    if layout != "hf":
        return "hf"
    return "olmo" if config.model_type == "olmo" else "olmo_core"


def _tokenizer_folder(source: Path, given: str | Path | None, notes: list[str]) -> Path | None:
    if given is not None:
        return Path(given)
    if (source / "tokenizer.json").is_file():
        return source
    if any((source / name).is_file() for name in TOKENIZER_FILES):
        notes.append(f"the tokenizer in {source} has no tokenizer.json and was not copied")
    else:
        notes.append("no tokenizer was there to copy")
    return None


# ---------------------------------------------------------------- comparing


def _refuse_another_model(
    model: Transformer, again: Transformer, target: Path, notes: list[str]
) -> None:
    config = model.config
    if config.bos_token_id is not None and again.config.bos_token_id is None:
        notes.append(f"bos_token_id {config.bos_token_id} has no place in the new configuration")
        config = replace(config, bos_token_id=None)
    ours, theirs = model.state_dict(), again.state_dict()
    wrong = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    if wrong or again.config != config:
        what = wrong[0] if wrong else f"{again.config} and not {config}"
        raise UserError(
            f"What was written for {target} reads back as something else ({what}). Nothing was "
            "kept. Please report it together with the configuration file."
        )


@torch.no_grad()
def difference_from_transformers(model: Transformer, hf_folder: Path) -> float:
    """The largest difference of any layer's states or the logits, as part of their largest value.

    Both have their weights in the dtype of ``model`` and compute in fp32, on random ids. Only one
    of the two is in memory beside the other's states, and ``model`` is gone afterwards.
    """
    from transformers import AutoModelForCausalLM  # heavy, and only for verifying
    from transformers.utils import logging

    config = model.config
    longest_window = max((window or 0 for window in config.windows), default=0)
    length = min(config.max_position_embeddings, max(48, min(longest_window, 240) + 16))
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(config.vocab_size, (2, length), generator=generator)
    dtype = model.dtype
    ours = _states(model.float().eval(), ids_BT)
    model.to("meta")
    logging.disable_progress_bar()
    load: Any = AutoModelForCausalLM.from_pretrained  # its type does not know of the report
    other, report = load(hf_folder, dtype=dtype, output_loading_info=True)
    if wrong := [*report["missing_keys"], *report["unexpected_keys"]]:
        raise UserError(f"transformers does not find its way in {hf_folder}: {sorted(wrong)[0]}.")
    found = other.float().eval()(ids_BT, output_hidden_states=True)
    theirs = [*found.hidden_states, found.logits]
    assert len(ours) == len(theirs)
    return max(
        float((mine - yours).abs().max() / yours.abs().max())
        for mine, yours in zip(ours, theirs, strict=True)
    )


def _states(model: Transformer, ids_BT: Tensor) -> list[Tensor]:
    """As transformers lists them: the embedding, every layer but the last, the norm, the logits."""
    states: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: states.append(output))
        for module in (model.embed_tokens, *model.layers)
    ]
    final_BTD = model(ids_BT)
    for hook in hooks:
        hook.remove()
    return [*states[:-1], final_BTD, model.logits(final_BTD)]


# ---------------------------------------------------------------- the layouts


def _read_hf(folder: Path, notes: list[str]) -> Transformer:
    if not is_native(folder):
        read_model_config(folder)  # says why
    ends = read_json(folder / "config.json").get("eos_token_id")
    if isinstance(ends, list) and len(ends) > 1:
        notes.append(f"of the eos_token_id {ends} only the first was kept")
    return load_native(folder)


def _write_hf(model: Transformer, folder: Path) -> None:
    export_hf(model, folder)


READERS: dict[str, Callable[[Path, list[str]], Transformer]] = {
    "hf": _read_hf,
    "olmo": read_olmo,
    "hf_olmo": read_hf_olmo,
    "olmo_core": read_core,
}
WRITERS: dict[str, Callable[[Transformer, Path], None]] = {
    "hf": _write_hf,
    "olmo": write_olmo,
    "olmo_core": write_core,
}
