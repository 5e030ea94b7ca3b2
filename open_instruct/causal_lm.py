"""A causal language model from its Hugging Face folder, and back into one as an artefact.

In: the weights as float32, whatever they are stored as, with an adapter on them if the recipe or
the folder says so. Out: a complete model folder, stored in the precision that the model came in;
or an adapter's, which names the model it stands on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from olmo_base.run.artefact import (
    RunFolder,
    adapter_base,
    atomic_folder,
    move_into,
    resolve_base,
    resolve_model,
)
from olmo_base.run.errors import UserError
from olmo_base.run.recipe import setting
from open_instruct.adapters import (
    AdapterConfig,
    add_adapter,
    add_token_rows,
    is_adapted,
    is_reward_adapter,
    keep_gradients,
    merged,
    open_adapter,
    quantisation,
    refuse_other_settings,
    save_adapter,
)
from open_instruct.encode import (
    ChatEncoder,
    add_new_tokens,
    load_chat_encoder,
    load_chat_tokenizer,
    save_chat_files,
)

transformers_logging.disable_progress_bar()  # ours tell what is long


AttentionName = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]


@dataclass(frozen=True)
class ModelConfig:
    """Which model training starts from, and how it computes. The content of its files decides."""

    model_name_or_path: str = setting(changes_result=False)
    attn_implementation: AttentionName = setting(
        "auto",
        help="what computes attention; auto: on a GPU in bf16 FlashAttention-3 or -2 where it is "
        "installed, else torch's varlen kernel; sdpa anywhere else",
    )
    gradient_checkpointing: bool | Literal["auto"] = setting(
        "auto",
        changes_result=False,
        help="compute activations twice instead of keeping them; auto: where they would not fit",
    )
    torch_compile: bool = setting(False, help="compile each layer; the same to rounding")
    liger_kernel: bool | Literal["auto"] = setting(
        False, help="norms, rotation and feed-forward by liger's; auto: on a GPU where installed"
    )
    trust_remote_code: bool = setting(False, help="run Python code that the model folder brings")
    additional_special_tokens: tuple[str, ...] = setting(
        (), help="new tokens, such as markers of the chat template; trained, by an adapter too"
    )

    @property
    def layers_attention(self) -> str | None:
        """What transformers' layers call; None: its own choice, sdpa where the model knows it."""
        return None if self.attn_implementation == "auto" else self.attn_implementation


def whole_model_folder(name_or_path: str) -> Path:
    """The folder of the model itself; for an adapter that of its base."""
    folder = resolve_model(name_or_path)
    base = adapter_base(folder)
    return folder if base is None else resolve_base(folder, base)


def load_config(config: ModelConfig) -> Any:
    """The model's architecture. Errors: UserError if this transformers does not know it."""
    folder = whole_model_folder(config.model_name_or_path)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (ValueError, OSError) as error:
        raise UserError(_cannot_load(folder, error)) from None


def load_causal_lm(
    config: ModelConfig,
    adapter: AdapterConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[PreTrainedModel, torch.dtype]:
    """The model in float32, and the precision its files are in.

    float32 because Adam's small steps vanish in 16 bits. What ``model_name_or_path`` is and
    ``use_peft`` decide what is trained:

        a model,    no use_peft   all its weights
        a model,    use_peft      a new adapter on it
        an adapter, no use_peft   all weights of its base, with the adapter merged into them
        an adapter, use_peft      that adapter, further, on the same base

    Only a quantised base goes to ``device`` at once, and computes in ``compute_dtype``. Errors:
    UserError if the folder holds no complete causal language model.
    """
    adapter = adapter or AdapterConfig()
    given = resolve_model(config.model_name_or_path)
    folder = whole_model_folder(config.model_name_or_path)
    if adapter.use_peft and folder != given:
        refuse_other_settings(adapter, given)
    stored_dtype = getattr(load_config(config), "dtype", None) or torch.float32
    model = _load_whole(folder, config, adapter, device, compute_dtype)
    if folder != given:
        if is_reward_adapter(given):
            raise UserError(
                f"{given} is the adapter of a reward model, which writes no text. Give the model "
                f"that it stands on, {folder}, or another one."
            )
        model = open_adapter(model, given, is_trainable=adapter.use_peft)
        if adapter.use_peft:
            if config.additional_special_tokens:
                raise UserError(
                    f"additional_special_tokens: {given} is an adapter that goes on being trained, "
                    "and it keeps its shape. Remove the key, or merge the adapter first: "
                    f"open-instruct merge {given} OUT."
                )
            return model, stored_dtype
        model = merged(model)
    new_ids = add_new_tokens(load_chat_tokenizer(given), config.additional_special_tokens)
    if new_ids:
        add_token_rows(model, new_ids)
    if adapter.use_peft:
        name = config.model_name_or_path
        base = str(Path(name).resolve()) if Path(name).is_dir() else name
        model = add_adapter(model, adapter, base, seed, new_ids=new_ids)
    return model, stored_dtype


def load_in_4bit(name_or_path: str, adapter: Path | None, device: torch.device) -> Any:
    """A model to ask, its frozen weights in 4 bits; an adapter stays beside them.

    ``adapter`` None is the one that ``name_or_path`` itself may be. Errors: UserError.
    """
    given = resolve_model(name_or_path)
    folder = whole_model_folder(name_or_path)
    bits = AdapterConfig(use_peft=True, load_in_4bit=True)
    compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = _load_whole(folder, ModelConfig(name_or_path), bits, device, compute_dtype)
    if adapter is None and folder != given:
        adapter = given
    if adapter is not None:
        model = open_adapter(model, adapter, is_trainable=False).get_base_model()
    return model.eval()


def _load_whole(
    folder: Path,
    config: ModelConfig,
    adapter: AdapterConfig,
    device: torch.device | str,
    compute_dtype: torch.dtype,
) -> PreTrainedModel:
    load: Any = AutoModelForCausalLM.from_pretrained  # its type does not know of the report
    bits = quantisation(adapter, compute_dtype)
    placed = {} if bits is None else {"quantization_config": bits, "device_map": {"": device}}
    try:
        model, report = load(
            folder,
            dtype=torch.float32,
            attn_implementation=config.layers_attention,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **placed,
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
    keep_gradients(model)
    loaded: PreTrainedModel = model
    return loaded


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

    Of an adapter its own files in place of weights and config: a config.json beside them would
    make transformers look for the whole model there. Everything is written beside it first and
    then moved in. Changes the model's precision.
    """
    with atomic_folder(folder.path / "model.tmp") as temporary:
        write_model_files(temporary, model, encoder, dtype)
    move_into(folder.path / "model.tmp", folder.path)
    (folder.path / "model.tmp").rmdir()


def write_model_files(
    folder: Path, model: PreTrainedModel, encoder: ChatEncoder, dtype: torch.dtype
) -> None:
    """The files that make ``folder`` a model, or an adapter (in float32, as it was trained)."""
    generation = model.generation_config.to_diff_dict() if model.generation_config else {}
    if is_adapted(model):
        save_adapter(model, folder)
    else:
        model.to(dtype)  # type: ignore[arg-type]
        model.config.use_cache = True
        model.save_pretrained(folder)
    # Settings that transformers reads but refuses to write (temperature without do_sample).
    settings = GenerationConfig.from_dict(generation)
    (folder / "generation_config.json").write_text(
        settings.to_json_string(use_diff=True), encoding="utf-8"
    )
    save_chat_files(encoder, folder)


def new_folder(name: str) -> Path:
    """A folder that is still to be made. Errors: UserError if something is there."""
    folder = Path(name)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists already. Name a new folder.")
    return folder


def merge_adapter(adapter: str, out: str) -> Path:
    """Write the model that an adapter makes of its base, as a whole, into the new folder ``out``.

    Merged in float32 and stored in the base's precision. Errors: UserError if ``adapter`` is none
    or ``out`` is not empty.
    """
    folder = resolve_model(adapter)
    if adapter_base(folder) is None:
        raise UserError(f"{folder} is not an adapter (no adapter_config.json): nothing to merge.")
    target = new_folder(out)
    encoder = load_chat_encoder(folder)
    model, dtype = load_causal_lm(ModelConfig(adapter))
    with atomic_folder(target) as temporary:
        write_model_files(temporary, model, encoder, dtype)
    return target
