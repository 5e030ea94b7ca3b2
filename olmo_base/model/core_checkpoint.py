"""Checkpoints of OLMo-core, the trainer of OLMo-2 32B and OLMo-3 <-> our model.

In: configuration, of which nothing may be left unread -> ModelConfig; a distributed checkpoint or a
single file -> our names. Out: the same backwards.
"""

import contextlib
import json
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from olmo_base.model.olmo_checkpoint import Named, assembled, read_checkpoint_file, read_json, whole
from olmo_base.model.rope import Yarn
from olmo_base.model.transformer import (
    FULL,
    SLIDING,
    ModelConfig,
    Transformer,
    released_layer_types,
)
from olmo_base.run.errors import UserError

CORE_NAMES = (
    ("embed_tokens.", "embeddings."),
    ("norm.", "lm_head.norm."),
    ("lm_head.", "lm_head.w_out."),
    ("attention.q_proj.", "attention.w_q."),
    ("attention.k_proj.", "attention.w_k."),
    ("attention.v_proj.", "attention.w_v."),
    ("attention.o_proj.", "attention.w_out."),
    ("attention.q_norm.", "attention.q_norm."),
    ("attention.k_norm.", "attention.k_norm."),
    ("attention_norm.", "attention_norm."),
    ("feed_forward.gate_proj.", "feed_forward.w1."),
    ("feed_forward.down_proj.", "feed_forward.w2."),
    ("feed_forward.up_proj.", "feed_forward.w3."),
    ("feed_forward_norm.", "feed_forward_norm."),
)
CORE_WEIGHTS = "model_and_optim"
# What a configuration may say beside the shape, because it is what OLMo-2 and OLMo-3 have or
# because it only decides how they are trained. Anything else is refused.
CORE_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "model": {
        "name": ("default",),
        "embed_scale": (None,),
        "embedding_norm": (None,),
        "freeze_params": (None,),
    },
    "block": {"name": ("reordered_norm",), "dropout": (0, 0.0, None), "feed_forward_moe": (None,)},
    "attention": {
        "name": ("default",),
        "type": ("attention",),
        "bias": (False,),
        "clip_qkv": (None,),
        "dropout": (0, 0.0, None),
        "use_head_qk_norm": (False, None),
        "scalable_softmax": (False, None),
        "attention_sinks": (False, None),
        "gate": (None,),
        "softmax_scale": (None,),
    },
    "rope": {
        "name": ("default",),
        "full_precision": (True,),
        "no_global_rope": (False, None),
        "partial_rotary_factor": (1, 1.0),
    },
    "feed_forward": {"name": ("default",), "bias": (False,), "activation": ("silu",)},
    "norm": {
        "name": ("rms", "fused_rms"),
        "bias": (False,),
        "elementwise_affine": (True, None),
        "full_precision": (True, None),
    },
    "lm_head": {"name": ("default",), "bias": (False,)},
}
CORE_SHAPE_KEYS = {
    "model": set("d_model vocab_size n_layers block lm_head tie_word_embeddings".split())
    | {"block_overrides"},
    "block": {"sequence_mixer", "attention", "layer_norm", "feed_forward"},
    "attention": {"n_heads", "n_kv_heads", "head_dim", "rope", "qk_norm", "sliding_window"},
    "rope": {"theta", "scaling"},
    "feed_forward": {"hidden_size"},
    "norm": {"eps"},
    "lm_head": {"layer_norm"},
}
CORE_TRAINING_KEYS = {
    "model": {"dtype", "init_method", "init_seed", "init_std", "float8_config", "dp_config"}
    | {"compile", "tp_config", "cp_config", "pp_config", "ac_config", "embedding_init_std"},
    "block": set(),
    "attention": {"dtype", "backend", "use_flash"},
    "rope": set(),
    "feed_forward": {"dtype"},
    "norm": {"dtype"},
    "lm_head": {"dtype", "loss_implementation"},
}


def _checked(part: str, content: Any, path: Path) -> dict[str, Any]:
    """One part of OLMo-core's configuration, once it holds nothing that we do not build."""
    if not isinstance(content, dict):
        raise UserError(f"{path} does not say the model's {part}.")
    known = CORE_SHAPE_KEYS[part] | CORE_TRAINING_KEYS[part] | {"_CLASS_"}
    for key, value in content.items():
        allowed = CORE_FIXED[part].get(key)
        if allowed is not None and value not in allowed:
            raise UserError(
                f"{path}: {part} {key} is {value!r}; only {allowed[0]!r} is built here."
            )
        if allowed is None and key not in known and value is not None:
            raise UserError(f"{path}: {part} {key} is not a key that this conversion knows.")
    return content


def _core_config(content: dict[str, Any], path: Path, notes: list[str]) -> ModelConfig:
    model = _checked("model", content.get("model"), path)
    block = _checked("block", model.get("block"), path)
    if "name" not in block:
        raise UserError(f"{path}: the blocks have no name; OLMo-2 has reordered_norm.")
    attention = _checked("attention", block.get("sequence_mixer") or block.get("attention"), path)
    rope = _checked("rope", attention.get("rope"), path)
    feed_forward = _checked("feed_forward", block.get("feed_forward"), path)
    head = _checked("lm_head", model.get("lm_head"), path)
    norms = [
        _checked("norm", norm, path)
        for norm in (block.get("layer_norm"), attention.get("qk_norm"), head.get("layer_norm"))
    ]
    if len({norm.get("eps") for norm in norms}) > 1:
        raise UserError(f"{path}: the norms differ in their eps; an OLMo has one for all.")
    heads, width, num_layers = attention["n_heads"], model["d_model"], model["n_layers"]
    if attention.get("head_dim") not in (None, width // heads):
        raise UserError(f"{path}: heads of {attention['head_dim']} channels are not built here.")
    window, types = _core_windows(attention.get("sliding_window"), num_layers, path)
    yarn = _core_yarn(model, block, attention, types, path)
    tokenizer = (content.get("dataset") or {}).get("tokenizer") or {}
    if "eos_token_id" not in tokenizer:
        raise UserError(f"{path} does not say dataset.tokenizer.eos_token_id.")
    pad_token_id = tokenizer.get("pad_token_id")
    length = (content.get("train_module") or {}).get("max_sequence_length") or (
        content.get("dataset") or {}
    ).get("sequence_length")
    if length is None:
        raise UserError(
            f"{path} does not say how long a text may be: train_module.max_sequence_length."
        )
    if model.get("float8_config"):
        notes.append("trained with float8 matrix products; here they are in the weights' dtype")
    config = ModelConfig(
        model_type="olmo2" if window is None else "olmo3",
        vocab_size=model["vocab_size"],
        hidden_size=width,
        intermediate_size=feed_forward["hidden_size"],
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=attention.get("n_kv_heads") or heads,
        max_position_embeddings=length,
        rope_theta=float(rope.get("theta", 500_000)),
        rms_norm_eps=norms[0].get("eps") or 1e-5,  # their default
        tie_word_embeddings=bool(model.get("tie_word_embeddings")),
        eos_token_id=tokenizer["eos_token_id"],
        pad_token_id=tokenizer["eos_token_id"] if pad_token_id is None else pad_token_id,
        bos_token_id=tokenizer.get("bos_token_id"),
        sliding_window=window,
        layer_types=None if types == released_layer_types(num_layers) else types,
        rope_scaling=yarn,
    )
    _refuse_another_ramp(config)
    return config


def _refuse_another_ramp(config: ModelConfig) -> None:
    """OLMo-core ends YaRN's ramp at the last pair at most, transformers at the last channel."""
    yarn = config.rope_scaling
    if yarn is None:
        return
    last = yarn.ramp(config.head_dim, config.rope_theta)[1]
    if last > config.head_dim // 2 - 1:
        raise UserError(
            f"With heads of {config.head_dim} channels, rope_theta {config.rope_theta:g} and an "
            f"original length of {yarn.original_max_position_embeddings}, OLMo-core and "
            "transformers stretch positions (YaRN) differently; no conversion would be right."
        )


def _core_windows(
    sliding: dict[str, Any] | None, num_layers: int, path: Path
) -> tuple[int | None, tuple[str, ...] | None]:
    """How many tokens windowed layers see, and which layers they are."""
    if sliding is None:
        return None, None
    forced_first, forced_last = (
        f"force_full_attention_on_{end}_layer" for end in ("first", "last")
    )
    if unknown := sorted(sliding.keys() - {"pattern", forced_first, forced_last, "_CLASS_"}):
        raise UserError(
            f"{path}: sliding_window {unknown[0]} is not a key that this conversion knows."
        )
    pattern = sliding["pattern"]
    skips_first, skips_last = sliding.get(forced_first, True), sliding.get(forced_last, True)
    sizes = []
    for layer in range(num_layers):
        forced = (skips_first and layer == 0) or (skips_last and layer == num_layers - 1)
        sizes.append(-1 if forced else pattern[(layer - skips_first) % len(pattern)])
    # OLMo-core and transformers count alike: the token itself is in the window.
    windows = sorted(set(sizes) - {-1})
    if len(windows) > 1:
        raise UserError(
            f"{path}: windows of {windows[0]} and {windows[1]} tokens; an OLMo has one."
        )
    if not windows:
        return None, None
    return windows[0], tuple(FULL if size == -1 else SLIDING for size in sizes)


def _core_yarn(
    model: dict[str, Any],
    block: dict[str, Any],
    attention: dict[str, Any],
    types: tuple[str, ...] | None,
    path: Path,
) -> Yarn | None:
    """The scaling of the layers that see all, which overrides those layers' blocks."""
    if attention["rope"].get("scaling") is not None:
        raise UserError(f"{path}: rotary positions are scaled in all layers, not built here.")
    overrides = model.get("block_overrides") or {}
    if not overrides:
        return None
    scalings = []
    for other in overrides.values():
        mixer = "sequence_mixer" if "sequence_mixer" in other else "attention"
        rope = other[mixer].get("rope") or {}
        scalings.append(rope.get("scaling"))
        plain = {**other, mixer: {**other[mixer], "rope": {**rope, "scaling": None}}}
        own = {**block, mixer: {**attention, "rope": {**attention["rope"], "scaling": None}}}
        if plain != own:
            raise UserError(f"{path}: block_overrides change more than the scaling of positions.")
    full = {str(layer) for layer, kind in enumerate(types or ()) if kind == FULL}
    if {str(layer) for layer in overrides} != full or any(s != scalings[0] for s in scalings):
        raise UserError(f"{path}: positions are scaled in other layers than those that see all.")
    scaling = dict(scalings[0] or {})
    if not str(scaling.pop("_CLASS_", "YaRN")).rpartition(".")[2].startswith("YaRN"):
        raise UserError(f"{path}: positions are scaled, but not by YaRN, which is not built here.")
    yarn = Yarn(
        factor=float(scaling.pop("factor")),
        original_max_position_embeddings=scaling.pop("old_context_len"),
        beta_fast=float(scaling.pop("beta_fast", 32)),
        beta_slow=float(scaling.pop("beta_slow", 1)),
    )
    if scaling:
        raise UserError(f"{path}: scaling {min(scaling)} is not a key that this conversion knows.")
    return yarn


def read_core(folder: Path, notes: list[str]) -> Transformer:
    """The model of a checkpoint; what was changed goes to ``notes``. Errors: UserError."""
    path = folder / "config.json"
    try:
        config = _core_config(read_json(path), path, notes)
    except KeyError as error:
        raise UserError(f"{path} does not say the model's {error.args[0]}.") from None
    weights = (
        _read_distributed(folder / CORE_WEIGHTS)
        if (folder / CORE_WEIGHTS).is_dir()
        else read_checkpoint_file(folder)
    )
    return assembled(config, _from_core(weights.items()), folder)


def _from_core(weights: Named) -> Iterator[tuple[str, Tensor]]:
    names = {theirs + "weight": ours + "weight" for ours, theirs in CORE_NAMES}
    for name, tensor in weights:
        name = name.removeprefix("model.")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if block is None:
            yield names.get(name, name), tensor
        else:
            yield f"layers.{block[1]}." + names.get(block[2], block[2]), tensor


def _read_distributed(folder: Path) -> dict[str, Tensor]:
    """The weights, and not the optimizer's state, of a distributed checkpoint."""
    try:
        reader = _Reader(folder)
        described = reader.read_metadata().state_dict_metadata
        weights: dict[str, Any] = {
            name: torch.empty(item.size, dtype=item.properties.dtype)
            for name, item in described.items()
            if name.startswith("model.") and isinstance(item, TensorStorageMetadata)
        }
        with _in_one_process():
            distributed.load(weights, storage_reader=reader, no_dist=True)
    except (OSError, pickle.UnpicklingError, EOFError, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        raise UserError(
            f"The checkpoint in {folder} is damaged or of another kind: {reason}. "
            "Copy or download it again."
        ) from None
    return weights


@contextlib.contextmanager
def _in_one_process() -> Iterator[None]:
    """torch warns that it takes a process without ranks for a single one, which it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Reader(distributed.FileSystemReader):
    """torch's reader, which takes OLMo-core's description too and runs no code from it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds and where."""
        with open(Path(self.path) / ".metadata", "rb") as file:
            found: Metadata = _Description(file).load()
        found.storage_meta = None
        return found


DESCRIPTION_CLASSES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in "Metadata MetadataIndex ChunkStorageMetadata TensorProperties StorageMeta "
        "TensorStorageMetadata BytesStorageMetadata _MEM_FORMAT_ENCODING".split()
    ),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
}


class _Description(pickle.Unpickler):
    """Reads the classes that describe a checkpoint and no other."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """OLMo-core has a class of its own for the place of a tensor, made like torch's."""
        if global_name == "_StorageInfo" and module_name in (
            "olmo_core.distributed.checkpoint.filesystem",
            "torch.distributed.checkpoint.filesystem",
        ):
            return _StorageInfo
        is_described = (module_name, global_name) in DESCRIPTION_CLASSES or (
            module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        )
        if not is_described:
            raise pickle.UnpicklingError(f"its .metadata asks for {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def write_core(model: Transformer, folder: Path) -> None:
    """config.json and a distributed checkpoint without optimizer. Errors: UserError for OLMo-1."""
    config = model.config
    if config.model_type == "olmo":
        raise UserError("OLMo-core has no OLMo-1; convert to olmo.")
    _refuse_another_ramp(config)
    (folder / "config.json").write_text(json.dumps(_core_content(config), indent=2) + "\n", "utf-8")
    names = dict(CORE_NAMES)
    weights = {}
    for name, tensor in model.state_dict().items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        inner = layer[2] if layer else name
        prefix = f"blocks.{layer[1]}." if layer else ""
        weights[f"model.{prefix}{names[inner.removesuffix('weight')]}weight"] = tensor
    if config.tie_word_embeddings:
        weights["model.lm_head.w_out.weight"] = model.output_weight.detach()
    writer = distributed.FileSystemWriter(folder / CORE_WEIGHTS)
    with _in_one_process():
        distributed.save(weights, storage_writer=writer, no_dist=True)


def _core_content(config: ModelConfig) -> dict[str, Any]:
    norm = {
        "name": "rms",
        "eps": config.rms_norm_eps,
        "bias": False,
        "dtype": "float32",
        "_CLASS_": "olmo_core.nn.layer_norm.LayerNormConfig",
    }
    attention: dict[str, Any] = {
        "name": "default",
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "bias": False,
        "rope": {
            "name": "default",
            "theta": whole(config.rope_theta),
            "full_precision": True,
            "_CLASS_": "olmo_core.nn.rope.RoPEConfig",
        },
        "qk_norm": norm,
        "dtype": "float32",
        "_CLASS_": "olmo_core.nn.attention.AttentionConfig",
    }
    if config.model_type == "olmo3":
        sizes = [-1 if window is None else window for window in config.windows]
        attention["sliding_window"] = {
            "pattern": [*[config.sliding_window] * 3, -1] if config.layer_types is None else sizes,
            "force_full_attention_on_first_layer": False,
            "force_full_attention_on_last_layer": config.layer_types is None,
            "_CLASS_": "olmo_core.nn.attention.SlidingWindowAttentionConfig",
        }
    block = {
        "name": "reordered_norm",
        "sequence_mixer": attention,
        "layer_norm": norm,
        "feed_forward": {
            "hidden_size": config.intermediate_size,
            "name": "default",
            "bias": False,
            "dtype": "float32",
            "_CLASS_": "olmo_core.nn.feed_forward.FeedForwardConfig",
        },
        "_CLASS_": "olmo_core.nn.transformer.config.TransformerBlockConfig",
    }
    model: dict[str, Any] = {
        "d_model": config.hidden_size,
        "vocab_size": config.vocab_size,
        "n_layers": config.num_hidden_layers,
        "block": block,
        "lm_head": {
            "name": "default",
            "layer_norm": norm,
            "bias": False,
            "dtype": "float32",
            "_CLASS_": "olmo_core.nn.lm_head.LMHeadConfig",
        },
        "name": "default",
        "dtype": "float32",
        "tie_word_embeddings": config.tie_word_embeddings,
        "_CLASS_": "olmo_core.nn.transformer.config.TransformerConfig",
    }
    if config.rope_scaling is not None:
        model["block_overrides"] = _core_overrides(config, block, attention, config.rope_scaling)
    return {
        "model": model,
        "dataset": {
            "sequence_length": config.max_position_embeddings,
            "tokenizer": {
                "vocab_size": config.vocab_size,
                "eos_token_id": config.eos_token_id,
                "pad_token_id": config.pad_token_id,
                "bos_token_id": config.bos_token_id,
                "_CLASS_": "olmo_core.data.tokenizer.TokenizerConfig",
            },
        },
        "train_module": {"max_sequence_length": config.max_position_embeddings},
    }


def _core_overrides(
    config: ModelConfig, block: dict[str, Any], attention: dict[str, Any], yarn: Yarn
) -> dict[str, Any]:
    """Blocks with scaled positions, for the layers that see all."""
    if yarn.attention_factor is not None:
        raise UserError(
            f"YaRN with attention_factor {yarn.attention_factor} is not to be said in OLMo-core."
        )
    scaling = {
        "factor": yarn.factor,
        "beta_fast": whole(yarn.beta_fast),
        "beta_slow": whole(yarn.beta_slow),
        "old_context_len": yarn.original_max_position_embeddings,
        "_CLASS_": "olmo_core.nn.rope.YaRNRoPEScalingConfig",
    }
    scaled = {**attention, "rope": {**attention["rope"], "scaling": scaling}}
    return {
        str(layer): {**block, "sequence_mixer": scaled}
        for layer, window in enumerate(config.windows)
        if window is None
    }
