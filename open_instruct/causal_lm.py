"""A causal language model from its Hugging Face folder, and back into one as an artefact.

In: the weights as float32, whatever they are stored as. Out: a complete model folder, stored in
the precision that the model came in.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from olmo_base.run.artefact import RunFolder, atomic_folder, move_into, resolve_model
from olmo_base.run.errors import UserError
from olmo_base.run.recipe import setting
from open_instruct.encode import ChatEncoder, save_chat_files

FLOAT_BYTES = 4
transformers_logging.disable_progress_bar()  # ours tell what is long


@dataclass(frozen=True)
class ModelConfig:
    """Which model training starts from, and how it computes. The content of its files decides."""

    model_name_or_path: str = setting(changes_result=False)
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = (
        setting("sdpa")
    )
    gradient_checkpointing: bool = setting(
        False, changes_result=False, help="compute activations twice instead of keeping them"
    )
    trust_remote_code: bool = setting(False, help="run Python code that the model folder brings")


def load_config(config: ModelConfig) -> Any:
    """The model's architecture. Errors: UserError if this transformers does not know it."""
    folder = resolve_model(config.model_name_or_path)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (ValueError, OSError) as error:
        raise UserError(_cannot_load(folder, error)) from None


def load_causal_lm(config: ModelConfig) -> tuple[PreTrainedModel, torch.dtype]:
    """The model in float32 on the CPU, and the precision its files are in.

    float32 because Adam's small steps vanish in 16 bits. Errors: UserError if the folder holds
    no complete causal language model.
    """
    folder = resolve_model(config.model_name_or_path)
    stored_dtype = getattr(load_config(config), "dtype", None) or torch.float32
    load: Any = AutoModelForCausalLM.from_pretrained  # its type does not know of the report
    try:
        model, report = load(
            folder,
            dtype=torch.float32,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise UserError(_cannot_load(folder, error)) from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} weights of a {type(model).__name__} "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); they would start "
            "random. Give a complete model folder."
        )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, stored_dtype


def _cannot_load(folder: Path, error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [repr(error)])[0]
    return f"The model in {folder} cannot be loaded: {first_line}"


def check_lengths(longest: int, model_config: Any, model_name: str) -> None:
    """Errors: UserError if the longest sequence has more tokens than the model knows positions."""
    known = getattr(model_config, "max_position_embeddings", None)
    if known is not None and longest > known:
        raise UserError(
            f"The longest example has {longest:,} tokens, and {model_name} was made for at most "
            f"{known:,}. Set max_length: {known}, and say in on_too_long what becomes of longer "
            "examples (drop, truncate_left or truncate_right)."
        )


def save_causal_lm(
    folder: RunFolder, model: PreTrainedModel, encoder: ChatEncoder, dtype: torch.dtype
) -> None:
    """Write weights, config, tokenizer, template and generation settings into the run's folder.

    Everything is written beside it first and then moved in. Changes the model's precision.
    """
    generation = model.generation_config.to_diff_dict() if model.generation_config else {}
    with atomic_folder(folder.path / "model.tmp") as temporary:
        model.to(dtype)  # type: ignore[arg-type]
        model.config.use_cache = True
        model.save_pretrained(temporary)
        # Settings that transformers reads but refuses to write (temperature without do_sample).
        settings = GenerationConfig.from_dict(generation)
        (temporary / "generation_config.json").write_text(
            settings.to_json_string(use_diff=True), encoding="utf-8"
        )
        save_chat_files(encoder, temporary)
    move_into(folder.path / "model.tmp", folder.path)
    (folder.path / "model.tmp").rmdir()


# ---------------------------------------------------------------- memory


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model, from its architecture alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            load_config(config), trust_remote_code=config.trust_remote_code
        )
    return sum(weight.numel() for weight in model.parameters())


def training_memory(
    model_config: Any,
    num_parameters: int,
    *,
    num_positions: int,
    num_labels: int,
    gradient_checkpointing: bool,
    activation_bytes: int = FLOAT_BYTES,
) -> int:
    """Bytes at the peak of a step: weights, gradients, Adam's two moments, and activations.

    ``num_positions`` (padding included) and ``num_labels`` are those of the largest micro-batch.
    Activations are counted for a gated transformer: what each operation keeps for its gradient.
    """
    states = 4 * FLOAT_BYTES * num_parameters
    width = model_config.hidden_size
    inner = getattr(model_config, "intermediate_size", None) or 4 * width
    layers = model_config.num_hidden_layers
    # Kept per position and layer: inputs, normalised copies and statistics of the attention and
    # its projections (some 14 widths), and gate, its activation, up and their product.
    layer_floats = 14 * width + 4 * inner
    kept = layer_floats + layers * width if gradient_checkpointing else layers * layer_floats
    activations = activation_bytes * num_positions * (kept + 4 * width)
    # Logits, their float32 log-softmax and its gradient.
    head = 3 * FLOAT_BYTES * num_labels * math.ceil(model_config.vocab_size)
    return states + activations + head
