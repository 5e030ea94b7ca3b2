"""Checkpoints of the trainer that made OLMo-1 and the first OLMo-2 <-> our model.

In: configuration -> ModelConfig; weights, query, key and value in one matrix and the two branches
of the feed-forward in another -> our names. Out: the same backwards.
"""

import base64
import binascii
import dataclasses
import io
import json
import pickle
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from olmo_base.model.hf_weights import WEIGHTS, WEIGHTS_INDEX, weight_files
from olmo_base.model.transformer import GENERATIONS, RMS_NORM_EPS, ModelConfig, Transformer
from olmo_base.run.errors import UserError

Named = Iterable[tuple[str, Tensor]]
# What configurations leave out has these values.
OLMO_DEFAULTS: dict[str, Any] = {
    "n_kv_heads": None,
    "multi_query_attention": None,
    "clip_qkv": None,
    "mlp_ratio": 4,
    "mlp_hidden_size": None,
    "activation_type": "swiglu",
    "block_type": "sequential",
    "alibi": False,
    "rope": False,
    "rope_theta": 10_000,
    "rope_full_precision": True,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "embedding_layer_norm": False,
    "layer_norm_type": "default",
    "layer_norm_with_affine": True,
    "layer_norm_eps": 1e-5,
    "bias_for_layer_norm": None,
    "include_bias": True,
    "norm_after": False,
    "scale_logits": False,
    "embedding_size": 50304,
    "weight_tying": True,
    "max_sequence_length": 1024,
    "eos_token_id": 50256,
    "pad_token_id": 50256,
}
OLMO_REQUIRED = ("d_model", "n_heads", "n_layers", "vocab_size")
# Keys that change how a model is trained or kept, not what it computes.
OLMO_TRAINING_KEYS = set(
    "block_group_size alibi_bias_max flash_attention attention_dropout residual_dropout "
    "embedding_dropout init_device init_fn init_std init_cutoff_factor precision scale_emb_init "
    "emb_init_std low_cpu_fsdp".split()
)
# Keys that transformers adds to the configuration of the remote code.
HF_KEYS = set(
    "architectures auto_map model_type transformers_version use_cache torch_dtype dtype "
    "_name_or_path tokenizer_class bos_token_id return_dict".split()
)
OLMO_FIXED = {
    "activation_type": "swiglu",
    "block_type": "sequential",
    "alibi": False,
    "rope": True,
    "embedding_layer_norm": False,
    "include_bias": False,
    "scale_logits": False,
}
# The norms of the two generations that this trainer made
OLMO_NORMS: dict[str, dict[str, Any]] = {
    "olmo": {
        "layer_norm_type": "default",
        "layer_norm_with_affine": False,
        "attention_layer_norm": False,
        "norm_after": False,
        "layer_norm_eps": 1e-5,
    },
    "olmo2": {
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "attention_layer_norm": True,
        "attention_layer_norm_with_affine": True,
        "norm_after": True,
        "clip_qkv": None,
    },
}
OLMO1_TOKENIZER = "gpt-neox-olmo-dolma-v1_5"


def read_olmo(folder: Path, notes: list[str]) -> Transformer:
    """The model of a checkpoint; what was changed goes to ``notes``. Errors: UserError."""
    path = folder / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}.") from None
    shape = content.get("model") if isinstance(content, dict) else None
    if not isinstance(shape, dict):
        raise UserError(f"{path} has no 'model:' section; it is not a configuration of OLMo's.")
    config = _olmo_config(shape, path, notes)
    tokenizer = content.get("tokenizer")
    name = str(tokenizer.get("identifier", "")) if isinstance(tokenizer, dict) else ""
    if OLMO1_TOKENIZER in name and config.eos_token_id == 0:
        # In this tokenizer 0 stands for an address; in its predecessor the two ids were swapped.
        config = dataclasses.replace(config, eos_token_id=50279)
        notes.append(f"eos_token_id 0 of config.yaml became 50279, the end of text in {name}")
    weights = read_checkpoint_file(folder)
    return assembled(config, _from_olmo(weights.items(), config), folder)


def read_hf_olmo(folder: Path, notes: list[str]) -> Transformer:
    """The model of the old folders whose code came along. Errors: UserError."""
    path = folder / "config.json"
    content = {key: value for key, value in read_json(path).items() if key not in HF_KEYS}
    config = _olmo_config(content, path, notes)
    weights = read_checkpoint_file(folder)
    return assembled(config, _from_olmo(weights.items(), config), folder)


def _olmo_config(shape: dict[str, Any], path: Path, notes: list[str]) -> ModelConfig:
    known = OLMO_DEFAULTS.keys() | OLMO_TRAINING_KEYS | set(OLMO_REQUIRED)
    if unknown := sorted(shape.keys() - known):
        raise UserError(f"{path}: model.{unknown[0]} is not a key that this conversion knows.")
    if missing := [key for key in OLMO_REQUIRED if shape.get(key) is None]:
        raise UserError(f"{path} does not say model.{missing[0]}.")
    given = OLMO_DEFAULTS | shape
    if given["layer_norm_type"] == "low_precision":
        notes.append("norms were computed in low precision; here they are in fp32")
        given["layer_norm_type"] = "default"
    if not given["rope_full_precision"]:
        notes.append("rotary positions were computed in low precision; here they are in fp32")
    for key, value in OLMO_FIXED.items():
        if given[key] != value:
            raise UserError(f"{path}: model.{key} is {given[key]!r}; only {value!r} is built here.")
    generation = "olmo2" if given["norm_after"] else "olmo"
    for key, value in OLMO_NORMS[generation].items():
        if given[key] != value:
            raise UserError(
                f"{path}: model.{key} is {given[key]!r}; {GENERATIONS[generation]} has {value!r}."
            )
    if generation == "olmo2" and given["bias_for_layer_norm"]:
        raise UserError(f"{path}: model.bias_for_layer_norm is true; no OLMo has such biases.")
    heads, kv_heads = given["n_heads"], given["n_kv_heads"]
    if kv_heads is None:
        kv_heads = 1 if given["multi_query_attention"] else heads
    fused = given["mlp_hidden_size"] or given["mlp_ratio"] * given["d_model"]
    return ModelConfig(
        model_type=generation,
        vocab_size=max(given["embedding_size"] or 0, given["vocab_size"]),
        hidden_size=given["d_model"],
        intermediate_size=fused // 2,
        num_hidden_layers=given["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=given["max_sequence_length"],
        rope_theta=float(given["rope_theta"]),
        tie_word_embeddings=given["weight_tying"],
        rms_norm_eps=given["layer_norm_eps"] if generation == "olmo2" else RMS_NORM_EPS,
        clip_qkv=given["clip_qkv"],
        eos_token_id=given["eos_token_id"],
        pad_token_id=given["pad_token_id"],
    )


# Ours -> theirs, for the weights that are the same in both
OLMO_NAMES = (
    ("embed_tokens.weight", "transformer.wte.weight"),
    ("norm.weight", "transformer.ln_f.weight"),
    ("lm_head.weight", "transformer.ff_out.weight"),
    ("attention.o_proj.", "attn_out."),
    ("attention.q_norm.", "q_norm."),
    ("attention.k_norm.", "k_norm."),
    ("attention_norm.", "attn_norm."),
    ("feed_forward.down_proj.", "ff_out."),
    ("feed_forward_norm.", "ff_norm."),
)


def _from_olmo(weights: Named, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    kv_size = config.num_key_value_heads * config.head_dim
    whole = {theirs: ours for ours, theirs in OLMO_NAMES[:3]}
    parts = {theirs + "weight": ours + "weight" for ours, theirs in OLMO_NAMES[3:]}
    for name, tensor in weights:
        name = name.removeprefix("model.")
        block = re.fullmatch(r"transformer\.blocks\.(\d+)\.(.+)", name)
        if block is None:
            yield whole.get(name, name), tensor
            continue
        ours = f"layers.{block[1]}."
        if block[2] == "att_proj.weight" and tensor.shape[0] == config.hidden_size + 2 * kv_size:
            fused = tensor.split([config.hidden_size, kv_size, kv_size])
            for letter, part in zip("qkv", fused, strict=True):
                yield f"{ours}attention.{letter}_proj.weight", part
        elif block[2] == "ff_proj.weight" and tensor.shape[0] == 2 * config.intermediate_size:
            # The second half is the gate: silu(second) * first
            up, gate = tensor.chunk(2)
            yield f"{ours}feed_forward.up_proj.weight", up
            yield f"{ours}feed_forward.gate_proj.weight", gate
        else:
            yield ours + parts.get(block[2], block[2]), tensor


def _to_olmo(model: Transformer) -> dict[str, Tensor]:
    ours = model.state_dict()
    weights = {theirs: ours[name] for name, theirs in OLMO_NAMES[:3] if name in ours}
    for layer in range(model.config.num_hidden_layers):
        old, new = f"layers.{layer}.", f"transformer.blocks.{layer}."
        weights[f"{new}att_proj.weight"] = torch.cat(
            [ours[f"{old}attention.{letter}_proj.weight"] for letter in "qkv"]
        )
        weights[f"{new}ff_proj.weight"] = torch.cat(
            [ours[f"{old}feed_forward.{which}_proj.weight"] for which in ("up", "gate")]
        )
        for name, theirs in OLMO_NAMES[3:]:
            if f"{old}{name}weight" in ours:
                weights[f"{new}{theirs}weight"] = ours[f"{old}{name}weight"]
    return weights


def write_olmo(model: Transformer, folder: Path) -> None:
    """config.yaml and model.pt. Errors: UserError for a generation the trainer does not know."""
    config = model.config
    if config.model_type not in OLMO_NORMS:
        raise UserError(
            f"The OLMo trainer has no {GENERATIONS[config.model_type]}; convert to olmo_core."
        )
    shape = OLMO_DEFAULTS | OLMO_FIXED | OLMO_NORMS[config.model_type]
    shape |= {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_layers": config.num_hidden_layers,
        "mlp_hidden_size": 2 * config.intermediate_size,
        "clip_qkv": config.clip_qkv,
        "rope_theta": whole(config.rope_theta),
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "weight_tying": config.tie_word_embeddings,
        "max_sequence_length": config.max_position_embeddings,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "bias_for_layer_norm": False,
    }
    if config.model_type == "olmo2":
        shape["layer_norm_eps"] = config.rms_norm_eps
    text = yaml.safe_dump({"model": shape}, sort_keys=False)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    torch.save(_to_olmo(model), folder / "model.pt")


# ---------------------------------------------------------------- weights from disk


def assembled(config: ModelConfig, weights: Named, folder: Path) -> Transformer:
    """Our model with these weights, which have our names. Errors: UserError if they do not fit."""
    with torch.device("meta"):
        model = Transformer(config)
    wanted = model.state_dict()
    loaded: dict[str, Tensor] = {}
    tied_head = None
    for name, tensor in weights:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            tied_head = tensor  # some writers keep it a second time
            continue
        if name not in wanted:
            raise UserError(
                f"{folder} holds a weight that this configuration does not have: {name}"
            )
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{folder}: {name} has the shape {tuple(tensor.shape)}, its configuration asks for "
                f"{tuple(wanted[name].shape)}. The two belong to different models."
            )
        loaded[name] = tensor.contiguous()
    if missing := [name for name in wanted if name not in loaded]:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(wanted)} weights, the first being "
            f"{missing[0]}. Copy or download it again."
        )
    if tied_head is not None and not torch.equal(tied_head, loaded["embed_tokens.weight"]):
        raise UserError(
            f"{folder}: the configuration ties the head to the embedding, but the two differ."
        )
    model.load_state_dict(loaded, assign=True)
    return model


def read_checkpoint_file(folder: Path) -> dict[str, Tensor]:
    """The weights of an unsharded checkpoint, under their own names."""
    try:
        if any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
            shards = [load_file(file) for file in weight_files(folder)]
            return {_plain_name(name): shard[name] for shard in shards for name in shard}
        for name in ("model.pt", "pytorch_model.bin"):
            if (folder / name).is_file():
                return dict(torch.load(folder / name, map_location="cpu", weights_only=True))
    except UserError:
        raise
    except Exception as error:  # torch and safetensors have many, all of which say: damaged
        raise UserError(f"The weights in {folder} cannot be read: {error}.") from None
    raise UserError(
        f"{folder} holds no weights: it needs model.pt or model.safetensors. A sharded checkpoint "
        "must be unsharded first, with the tools of the trainer that made it."
    )


def _plain_name(name: str) -> str:
    """A weight's name; the trainer's own safetensors files keep it pickled and base64-encoded."""
    if "." in name:
        return name
    try:
        keys, _ = _NamesOnly(io.BytesIO(base64.urlsafe_b64decode(name))).load()
        return ".".join(keys)
    except (binascii.Error, pickle.UnpicklingError, ValueError, TypeError, EOFError):
        return name


class _NamesOnly(pickle.Unpickler):
    """Reads tuples of text and nothing that could run code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Refuse every class."""
        raise pickle.UnpicklingError(f"{module_name}.{global_name}")


def whole(number: float) -> float:
    """As an int where it is one: the trainers write whole numbers so."""
    return int(number) if number == int(number) else number


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Errors: UserError if the file holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; a JSON object is needed.")
    return content
