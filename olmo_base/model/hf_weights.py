"""Our weights <-> the Hugging Face folder of an OLMo model, without importing transformers.

Out: names -> shards of safetensors -> config.json and generation_config.json -> tokenizer files.
In: config.json -> ModelConfig -> an empty model -> each tensor to its place.
"""

import dataclasses
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from olmo_base.model.rope import Yarn
from olmo_base.model.transformer import (
    FULL,
    GENERATIONS,
    SLIDING,
    ModelConfig,
    Transformer,
    released_layer_types,
)
from olmo_base.run.artefact import move_into, resolve_model
from olmo_base.run.errors import UserError

ARCHITECTURES = {
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
}
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# The keys of config.json that only some generations have
OWN_KEYS = {
    "olmo": ("clip_qkv",),
    "olmo2": ("rms_norm_eps",),
    "olmo3": ("rms_norm_eps", "sliding_window", "layer_types"),
}
# Our module -> theirs, applied in this order to the part of the name that it matches.
HF_NAMES = (
    (r"^layers\.(\d+)\.attention_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^layers\.(\d+)\.feed_forward_norm\.", r"model.layers.\1.post_feedforward_layernorm."),
    (r"^layers\.(\d+)\.attention\.", r"model.layers.\1.self_attn."),
    (r"^layers\.(\d+)\.feed_forward\.", r"model.layers.\1.mlp."),
    (r"^embed_tokens\.", r"model.embed_tokens."),
    (r"^norm\.", r"model.norm."),
)


def hf_name(name: str) -> str:
    """What transformers calls the weight that we call ``name``."""
    for ours, theirs in HF_NAMES:
        renamed, count = re.subn(ours, theirs, name)
        if count:
            return renamed
    return name  # lm_head.weight


# ---------------------------------------------------------------- export


def export_hf(
    model: Transformer,
    folder: str | Path,
    *,
    tokenizer_files: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the model as a folder that transformers, vLLM and lm-eval open as it is.

    Other files of ``folder`` stay. Everything is written in a temporary folder beside it and then
    moved file by file, config.json last: a folder with a config.json is whole. Weights keep their
    dtype. ``tokenizer_files`` is a folder whose tokenizer is copied along.
    Errors: UserError if that folder has no tokenizer, or one with more ids than the model.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        temporary = Path(name)
        if tokenizer_files is not None:
            copy_tokenizer(tokenizer_files, temporary, vocab_size=model.config.vocab_size)
        _write_weights(model, temporary, max_shard_bytes)
        _write_json(temporary / "generation_config.json", _generation_config(model.config))
        written = {file.name for file in temporary.iterdir()}
        _remove_old_model(folder, keep=written)
        move_into(temporary, folder)
        _write_json(temporary / "config.json", hf_config(model.config, model.dtype))
        move_into(temporary, folder)
    return folder


def copy_tokenizer(source: str | Path, target: str | Path, *, vocab_size: int) -> None:
    """Copy the tokenizer (and chat template, if there is one) of one model folder to another.

    Errors: UserError if there is none, or if it has ids that ``vocab_size`` rows cannot hold.
    """
    source, target = Path(source), Path(target)
    if not (source / "tokenizer.json").is_file():
        raise UserError(
            f"{source} has no tokenizer.json. Give the output_dir of a tokenizer run, or the "
            "folder of a model with a tokenizer."
        )
    largest = _largest_id(source / "tokenizer.json")
    if largest >= vocab_size:
        raise UserError(
            f"The tokenizer in {source} has ids up to {largest}, the model rows for {vocab_size}. "
            f"Set vocab_size to at least {largest + 1}, or use the tokenizer the model was made "
            "with."
        )
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _largest_id(tokenizer_json: Path) -> int:
    content = _read_json(tokenizer_json)
    vocab = content.get("model", {}).get("vocab", {})
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    ids += [token["id"] for token in content.get("added_tokens", [])]
    return max(ids, default=-1)


def _write_weights(model: Transformer, folder: Path, max_shard_bytes: int) -> None:
    metadata = {"format": "pt"}  # transformers refuses a file that does not say it
    shards = list(_shards(model, max_shard_bytes))
    if len(shards) == 1:
        save_file(_loaded(shards[0]), folder / WEIGHTS, metadata=metadata)
        return
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(_loaded(shard), folder / file_name, metadata=metadata)
        weight_map |= dict.fromkeys(shard, file_name)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(folder / WEIGHTS_INDEX, index)


def _shards(model: Transformer, max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in model.state_dict().items():
        if shard and num_bytes + tensor.nbytes > max_bytes:
            yield shard
            shard, num_bytes = {}, 0
        shard[hf_name(name)] = tensor
        num_bytes += tensor.nbytes
    yield shard


def _loaded(shard: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in shard.items()}


def _remove_old_model(folder: Path, keep: set[str]) -> None:
    """Take away what an earlier export of another size left: config first, then its shards."""
    (folder / "config.json").unlink(missing_ok=True)
    for old in (*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS, folder / WEIGHTS_INDEX):
        if old.name not in keep:
            old.unlink(missing_ok=True)


def hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json."""
    shape = dataclasses.asdict(config)
    own = {
        "clip_qkv": shape.pop("clip_qkv"),
        "rms_norm_eps": shape.pop("rms_norm_eps"),
        "sliding_window": shape.pop("sliding_window"),
        "layer_types": list(config.layer_types or released_layer_types(config.num_hidden_layers)),
    }
    for key in ("layer_types", "rope_scaling", "rope_theta", "model_type"):
        del shape[key]
    return {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        **shape,
        **{key: own[key] for key in OWN_KEYS[config.model_type]},
        **_hf_rope(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _hf_rope(config: ModelConfig) -> dict[str, Any]:
    """Positions as transformers 5 reads them, and beside it as older readers do."""
    plain: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.model_type != "olmo3":
        return {"rope_parameters": plain, "rope_theta": config.rope_theta}
    yarn = config.rope_scaling
    scaling = None
    if yarn is not None:
        scaling = {
            **dataclasses.asdict(yarn),
            "rope_type": "yarn",
            "attention_factor": yarn.scale,
        }
    return {
        "rope_parameters": {FULL: plain | (scaling or {}), SLIDING: plain},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
    }


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    ids = {"bos": config.bos_token_id, "eos": config.eos_token_id, "pad": config.pad_token_id}
    return {f"{name}_token_id": value for name, value in ids.items() if value is not None}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- import


def load_native(
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Transformer:
    """The model of any OLMo folder (or hub name), in the dtype it was saved in unless told.

    Errors: UserError if there is no config.json, no or damaged weights, another architecture, or
    weights that are missing, unknown or of another shape than the config says.
    """
    folder = resolve_model(str(folder))
    config = read_model_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {hf_name(name): (name, tensor) for name, tensor in model.state_dict().items()}
    loaded: dict[str, Tensor] = {}
    tied_head = None
    for file in weight_files(folder):
        for name, tensor in _read_tensors(file):
            if name == "lm_head.weight" and config.tie_word_embeddings:
                tied_head = tensor.to(device=device, dtype=dtype)  # some writers keep it too
                continue
            if name not in wanted:
                raise UserError(
                    f"{file} holds the weight {name}, which an "
                    f"{ARCHITECTURES[config.model_type]} of this config.json does not have. "
                    "The file belongs to another model."
                )
            ours, empty = wanted[name]
            if tensor.shape != empty.shape:
                raise UserError(
                    f"{file}: {name} has the shape {tuple(tensor.shape)}, config.json asks for "
                    f"{tuple(empty.shape)}. The two belong to different models."
                )
            loaded[ours] = tensor.to(device=device, dtype=dtype)
    missing = [name for name, (ours, _) in wanted.items() if ours not in loaded]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(wanted)} weights, the first being "
            f"{missing[0]}. Copy or download the folder again."
        )
    if tied_head is not None and not torch.equal(tied_head, loaded["embed_tokens.weight"]):
        raise UserError(
            f"{folder}: config.json ties the head to the embedding (tie_word_embeddings), but the "
            "two differ. Set it to false if the head is to be used."
        )
    model.load_state_dict(loaded, assign=True)
    return model.requires_grad_(True)


def is_native(folder: str | Path) -> bool:
    """Whether ``load_native`` reads this folder: an OLMo with nothing that we do not build."""
    content = _read_json(Path(folder) / "config.json")
    return content.get("model_type") in GENERATIONS and not _not_built(content)


def read_model_config(folder: str | Path) -> ModelConfig:
    """The shape that a folder's config.json states. Errors: UserError as in ``load_native``."""
    path = Path(folder) / "config.json"
    return model_config_of(_read_json(path), str(path))


def model_config_of(content: dict[str, Any], path: str) -> ModelConfig:
    """The shape that a config.json's content states; ``path`` is what errors call it.

    Errors: UserError for another architecture, or for something that we do not build.
    """
    generation = content.get("model_type")
    if generation not in GENERATIONS:
        named = ", ".join(content.get("architectures") or []) or "an unnamed architecture"
        raise UserError(
            f"{path} describes {named} (model_type {generation!r}); the native models are "
            f"OLMo-1 to OLMo-3 (model_type {', '.join(map(repr, GENERATIONS))})."
        )
    if reason := _not_built(content):
        raise UserError(f"{path}: {reason}, which the native {GENERATIONS[generation]} lacks.")
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    others = {key for keys in OWN_KEYS.values() for key in keys} - set(OWN_KEYS[generation])
    given = {
        key: value
        for key, value in content.items()
        if key in fields.keys() - others - {"rope_scaling"} and value is not None
    }
    given["rope_theta"] = _rope(content)[FULL]["rope_theta"]
    given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    # transformers' defaults for a config that is silent
    if generation != "olmo":
        given.setdefault("rms_norm_eps", 1e-5)
    given.setdefault("eos_token_id", 0)
    if isinstance(given["eos_token_id"], list):
        given["eos_token_id"] = given["eos_token_id"][0]
    given.setdefault("pad_token_id", given["eos_token_id"])
    required = {name for name, field in fields.items() if _has_no_default(field)}
    if missing := sorted(required - given.keys()):
        raise UserError(f"{path} does not say {', '.join(missing)}.")
    if generation == "olmo3":
        given.setdefault("sliding_window", 4096)
        given["layer_types"] = _layer_types(content)
        given["rope_scaling"] = _yarn(content)
    return ModelConfig(**given)


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING


def _not_built(content: dict[str, Any]) -> str | None:
    """What this config.json asks for that the native model lacks, in words."""
    if content.get("attention_bias"):
        return "it has biases in attention (attention_bias)"
    if content.get("hidden_act", "silu") != "silu":
        return f"its activation is {content['hidden_act']} (hidden_act)"
    heads = content.get("num_attention_heads") or 1
    if content.get("head_dim") not in (None, content.get("hidden_size", 0) // heads):
        return f"its heads have {content['head_dim']} channels (head_dim)"
    rope = _rope(content)
    kind = rope[FULL]["rope_type"]
    if content.get("model_type") != "olmo3":
        return None if kind == "default" else f"its rotary positions are scaled ({kind})"
    if "sliding_window" in content and content["sliding_window"] is None:
        return "its windowed layers have no window (sliding_window)"
    if kind not in ("default", "yarn"):
        return f"its rotary positions are scaled ({kind})"
    if kind == "yarn" and (unknown := sorted(rope[FULL].keys() - YARN_KEYS)):
        return f"its YaRN has {unknown[0]}"
    if (kind := rope[SLIDING]["rope_type"]) != "default":
        return f"the rotary positions of its windowed layers are scaled ({kind})"
    if rope[FULL]["rope_theta"] != rope[SLIDING]["rope_theta"]:
        return "its windowed layers have another rope_theta than the others"
    return None


YARN_KEYS = {field.name for field in dataclasses.fields(Yarn)} | {"rope_type", "type", "rope_theta"}


def _rope(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """How positions turn in layers that see all and in those with a window.

    transformers 5 writes rope_parameters, nested for OLMo-3; 4 wrote rope_theta and rope_scaling,
    and scaled only the layers that see all.
    """
    written = content.get("rope_parameters") or {}
    scaling = content.get("rope_scaling") or {}
    if FULL in written or SLIDING in written:
        kinds = {kind: dict(written.get(kind) or {}) for kind in (FULL, SLIDING)}
        kinds[FULL] |= scaling
    else:
        full = dict(written or scaling)
        kinds = {
            FULL: full,
            SLIDING: {"rope_theta": full["rope_theta"]} if "rope_theta" in full else {},
        }
    # transformers' defaults for a config that is silent
    default = 500_000.0 if content.get("model_type") == "olmo3" else 10_000.0
    for rope in kinds.values():
        rope.setdefault("rope_theta", content.get("rope_theta") or default)
        rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return kinds


def _yarn(content: dict[str, Any]) -> Yarn | None:
    rope = _rope(content)[FULL]
    if rope["rope_type"] == "default":
        return None
    names = {field.name for field in dataclasses.fields(Yarn)}
    given = {key: value for key, value in rope.items() if key in names and value is not None}
    given.setdefault("original_max_position_embeddings", content.get("max_position_embeddings"))
    if "factor" not in given:
        raise UserError("config.json asks for YaRN (rope_type) and does not say its factor.")
    yarn = Yarn(**given)
    own = dataclasses.replace(yarn, attention_factor=None)
    return own if math.isclose(own.scale, yarn.scale, rel_tol=1e-9) else yarn


def _layer_types(content: dict[str, Any]) -> tuple[str, ...] | None:
    """None for the pattern of the released models."""
    num_layers = content["num_hidden_layers"]
    types = content.get("layer_types")
    if types is None:  # transformers' default, whose last layer is nothing special
        types = [FULL if index % 4 == 3 else SLIDING for index in range(num_layers)]
    return None if tuple(types) == released_layer_types(num_layers) else tuple(types)


def weight_files(folder: Path) -> list[Path]:
    """The files of safetensors that a folder's weights are in. Errors: UserError if they lack."""
    if (folder / WEIGHTS_INDEX).is_file():
        index = _read_json(folder / WEIGHTS_INDEX)
        names = sorted(set(index.get("weight_map", {}).values()))
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        names = []
    if not names:
        raise UserError(
            f"{folder} holds no weights: it needs {WEIGHTS} or {WEIGHTS_INDEX} beside config.json. "
            "Weights in another format (pytorch_model.bin) must be saved as safetensors first."
        )
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(
                f"{folder / WEIGHTS_INDEX} names {name}, which is not in the folder. "
                "Copy or download the folder again."
            )
    return [folder / name for name in names]


def _read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                yield name, tensors.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}). Copy or download it again.") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, so this is not a model folder.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; a JSON object is needed.")
    return content
