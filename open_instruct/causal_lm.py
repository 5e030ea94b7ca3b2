"""A causal language model from its Hugging Face folder, and back into one as an artefact.

In: the weights as float32, whatever they are stored as. Out: a complete model folder, stored in
the precision that the model came in.
"""

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
from open_instruct.logprobs import MAX_LOGITS

FLOAT_BYTES = 4
KERNELS_BYTES = 40 * 10**6  # what torch's kernels take when they first run
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
    known = getattr(model_config.get_text_config(), "max_position_embeddings", None)
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
) -> int:
    """Bytes at the peak of a float32 step, beside the program itself.

    Weights, gradients, Adam's two moments, and activations. ``num_positions`` (padding included)
    and ``num_labels`` are those of the largest micro-batch.
    """
    text_config = model_config.get_text_config()
    width = text_config.hidden_size
    inner = getattr(text_config, "intermediate_size", None) or 4 * width
    layers = text_config.num_hidden_layers
    # A gated layer keeps 15 widths (norms' inputs and outputs, queries, keys, values, the
    # attention's output, the residuals) and 4 inner widths (gate, its activation, up, product).
    # Peaks measured on a CPU were those of 19 and 5, to 4 %: 192-512 wide, 4-8 layers.
    per_layer = 19 * width + 5 * inner
    kept = per_layer + layers * width if gradient_checkpointing else layers * per_layer
    # Logits, their log-softmax and its gradient; the head works in pieces above MAX_LOGITS.
    logits = min(num_labels * text_config.vocab_size, MAX_LOGITS)
    floats = 4 * num_parameters + num_positions * kept + 3 * logits
    return FLOAT_BYTES * floats + KERNELS_BYTES
