"""LoRA and its kin through peft, on a base in full precision or quantised through bitsandbytes.

recipe keys -> a base model with small trained matrices beside its frozen ones -> a folder in
peft's format, which names its base -> the same opened again, or merged into the base's weights.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from olmo_base.run.artefact import (
    ADAPTER_CONFIG,
    adapter_base,
    adapter_vocabulary,
    refuse_changed_base,
)
from olmo_base.run.errors import UserError
from olmo_base.run.recipe import RecipeError, setting

WEIGHTS = "adapter_model.safetensors"
HEAD = "score"  # of a sequence classifier, as transformers names it


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter keys of a recipe, named as TRL does. Without ``use_peft`` none may be set."""

    use_peft: bool = setting(
        False, help="train an adapter and leave the model's weights as they are"
    )
    lora_r: int | None = setting(None, low=1, help="rank; null: 16")
    lora_alpha: int | None = setting(None, low=1, help="null: 32")
    lora_dropout: float | None = setting(None, low=0, below=1, help="null: 0.05")
    lora_target_modules: str | tuple[str, ...] | None = setting(
        None, help="names of modules; null: all-linear, every linear layer but the output head"
    )
    use_rslora: bool = setting(False, help="scale by alpha / sqrt(r) (arXiv:2312.03732)")
    use_dora: bool = setting(False, help="train each column's length by itself (arXiv:2402.09353)")
    load_in_4bit: bool = setting(False, help="the frozen weights in 4 bits (arXiv:2305.14314)")
    load_in_8bit: bool = setting(False, help="the frozen weights in 8 bits (arXiv:2208.07339)")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = setting(None, help="null: nf4")
    use_bnb_nested_quant: bool = setting(False, help="quantise the 4-bit scales too")

    def __post_init__(self) -> None:
        if not self.use_peft:
            for key, value in self.given.items():
                raise RecipeError(
                    key, f"{value}, but use_peft is not true. Set it, or remove the key."
                )
        if self.load_in_4bit and self.load_in_8bit:
            raise RecipeError("load_in_8bit", "load_in_4bit is true too. Keep one of them.")
        if self.load_in_8bit and self.use_dora:
            # bitsandbytes 0.50's forward pass finds no scales once peft 0.21 has looked at them.
            raise RecipeError("use_dora", "does not work on 8-bit weights. Take load_in_4bit.")
        for key in ("bnb_4bit_quant_type", "use_bnb_nested_quant"):
            if key in self.given and not self.load_in_4bit:
                raise RecipeError(key, "set, but load_in_4bit is not true. Remove the key.")

    @property
    def given(self) -> dict[str, Any]:
        """The keys beside ``use_peft`` that the recipe sets."""
        keys = {key: value for key, value in vars(self).items() if key != "use_peft"}
        return {
            key: value for key, value in keys.items() if value is not None and value is not False
        }

    @property
    def rank(self) -> int:
        """``lora_r``, or what is usual."""
        return self.lora_r or 16

    @property
    def is_quantised(self) -> bool:
        """Whether the frozen weights are kept in few bits."""
        return self.load_in_4bit or self.load_in_8bit


def _peft() -> Any:
    try:
        import peft  # optional, and slow to import
    except ImportError:
        raise UserError(
            "Adapters need the package peft: pip install 'open-instruct[adapters]'."
        ) from None
    return peft


# ---------------------------------------------------------------- the frozen base


def quantisation(
    config: AdapterConfig, compute_dtype: torch.dtype, skipped: list[str] | None = None
) -> BitsAndBytesConfig | None:
    """How transformers shall quantise the base while it loads it; None for full precision.

    ``skipped`` modules stay as they are; None: the output head. Errors: UserError if bitsandbytes
    is not installed.
    """
    if not config.is_quantised:
        return None
    try:
        import bitsandbytes  # noqa: F401 - optional, and slow to import
    except ImportError:
        raise UserError(
            "load_in_4bit and load_in_8bit need the package bitsandbytes: "
            "pip install 'open-instruct[adapters]'."
        ) from None
    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type or "nf4",
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skipped,
    )


def keep_gradients(model: nn.Module) -> None:
    """Keep 4-bit weights in the layout that gradients pass through.

    On a CPU with AVX512-BF16 bitsandbytes 0.50 packs them anew at the first evaluation, for a
    product in bfloat16 without a backward pass; training after it would silently lose every
    gradient that comes through a frozen layer.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


# ---------------------------------------------------------------- a new adapter, or an earlier one


def add_adapter(
    model: PreTrainedModel,
    config: AdapterConfig,
    base: str,
    seed: int,
    *,
    task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM",
    new_ids: Sequence[int] = (),
) -> Any:
    """The model with a fresh adapter, the only thing that is trained; of a classifier its head too.

    Of new tokens (``new_ids``) their rows in embedding and output head are trained and kept. At
    first it changes nothing. Its random half depends on ``seed`` alone. Errors: UserError for
    target modules that the model does not have, or that share their weights.
    """
    peft = _peft()
    targets: Any = config.lora_target_modules or "all-linear"
    settings = peft.LoraConfig(
        task_type=task,
        modules_to_save=[HEAD] if task == "SEQ_CLS" else None,
        trainable_token_indices=_token_rows(model, new_ids) if new_ids else None,
        base_model_name_or_path=base,
        r=config.rank,
        lora_alpha=config.lora_alpha or 32,
        lora_dropout=0.05 if config.lora_dropout is None else config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )
    model.name_or_path = base  # peft writes it into adapter_config.json
    try:
        with _seeded(seed):
            adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(
            f"lora_target_modules: {targets}: {first_line} "
            f"Names that this model has: {', '.join(_linear_names(model))}."
        ) from None
    _refuse_tied(adapted)
    return adapted


def _token_rows(model: PreTrainedModel, new_ids: Sequence[int]) -> dict[str, list[int]]:
    """Name of each matrix with a row per token -> the rows to train; tied ones count once."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if model.config.get_text_config().tie_word_embeddings or ends[1] is None:
        ends = ends[:1]
    return {
        name.rpartition(".")[2]: list(new_ids)
        for name, module in model.named_modules()
        if any(module is end for end in ends)
    }


def add_token_rows(model: PreTrainedModel, new_ids: Sequence[int]) -> None:
    """Make room for new tokens; each starts as the mean of the tokens that were there before."""
    first, needed = min(new_ids), max(new_ids) + 1
    embedding: Any = model.get_input_embeddings()
    if needed > embedding.num_embeddings:
        model.resize_token_embeddings(needed, mean_resizing=False)
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for end in ends:
            if end is not None:
                end.weight[list(new_ids)] = end.weight[:first].mean(0)


def _fit_vocabulary(model: PreTrainedModel, folder: Path) -> None:
    """As many rows as the adapter in ``folder`` needs; it brings those it trained."""
    embedding: Any = model.get_input_embeddings()
    if adapter_vocabulary(folder) > embedding.num_embeddings:
        model.resize_token_embeddings(adapter_vocabulary(folder), mean_resizing=False)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _linear_names(model: nn.Module) -> list[str]:
    linear = {name.rpartition(".")[2] for name, part in model.named_modules() if _is_linear(part)}
    return sorted(linear)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _refuse_tied(adapted: Any) -> None:
    """An adapter on one of two tied matrices would change the other one too once it is merged."""
    if not adapted.config.get_text_config().tie_word_embeddings:
        return
    ends = (adapted.get_input_embeddings(), adapted.get_output_embeddings())
    if any(hasattr(module, "lora_A") for module in ends):
        raise UserError(
            "lora_target_modules: this model's output head is its embedding (tied), so neither can "
            "carry an adapter. Leave both out; all-linear does."
        )


def open_adapter(model: PreTrainedModel, folder: Path, is_trainable: bool) -> Any:
    """The base with the adapter in ``folder``. Errors: UserError if they do not fit together."""
    base = adapter_base(folder)
    assert base is not None
    refuse_changed_base(folder, base)
    model.name_or_path = base
    _fit_vocabulary(model, folder)
    try:
        return _peft().PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(f"The adapter in {folder} cannot be put on {base}: {first_line}") from None


def new_adapter_like(model: PreTrainedModel, folder: Path) -> Any:
    """The model with an adapter of the shape of the one in ``folder``, without its weights."""
    peft = _peft()
    settings = peft.PeftConfig.from_pretrained(folder)
    settings.inference_mode = False  # as it was written
    _fit_vocabulary(model, folder)
    return peft.get_peft_model(model, settings)


def is_reward_adapter(folder: Path) -> bool:
    """Whether the adapter in ``folder`` makes its base a reward model."""
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return bool(settings.get("task_type") == "SEQ_CLS")


def refuse_other_settings(config: AdapterConfig, folder: Path) -> None:
    """An adapter that goes on being trained keeps its shape. Errors: UserError naming the key."""
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    names = {"lora_r": "r", "lora_target_modules": "target_modules"}
    shape = (
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "use_rslora",
        "use_dora",
    )
    for key in shape:
        if key not in config.given:
            continue
        asked, own = config.given[key], settings.get(names.get(key, key))
        is_same = asked == own or (
            isinstance(asked, tuple) and isinstance(own, list) and set(asked) == set(own)
        )
        if not is_same:
            raise UserError(
                f"{key}: {asked}, but {folder} is an adapter with {own}, and with use_peft it is "
                "that adapter which is trained further. Remove the key; or merge the adapter first "
                f"(open-instruct merge {folder} OUT) and start a new one on OUT."
            )


def is_adapted(model: Any) -> bool:
    """Whether the model carries an adapter that is not merged."""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")


def merged(adapted: Any) -> PreTrainedModel:
    """The base with the adapter added into its weights. Errors: UserError for infinite weights."""
    try:
        model: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"The adapter cannot be merged: {error}") from None
    return model.requires_grad_(True)


def save_adapter(adapted: Any, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as peft and vLLM read them."""
    # "auto" would look for the base on the hub; rows of new tokens are kept all the same.
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
