"""Checkpoints of the trainers to Hugging Face folders and back, on made-up small weights.

The layouts were also compared once with the code of both trainers: see docs/decisions.
"""

import base64
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Olmo2ForCausalLM, Olmo3ForCausalLM, OlmoForCausalLM

from olmo_base.model.convert import convert, find_layout
from olmo_base.model.hf_weights import export_hf, load_native
from olmo_base.model.rope import Yarn
from olmo_base.model.transformer import ModelConfig, Transformer
from olmo_base.run.errors import UserError

D, F, HEADS, KV_HEADS, LAYERS, VOCAB, LENGTH = 24, 20, 6, 2, 3, 50, 40
HEAD = D // HEADS
OLMO1_SHAPE: dict[str, Any] = {
    "d_model": D,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "n_layers": LAYERS,
    "mlp_hidden_size": 2 * F,
    "clip_qkv": 0.6,
    "rope": True,
    "include_bias": False,
    "layer_norm_with_affine": False,
    "weight_tying": False,
    "max_sequence_length": LENGTH,
    "vocab_size": VOCAB - 3,
    "embedding_size": VOCAB,
    "eos_token_id": 5,
    "pad_token_id": 1,
    "flash_attention": True,  # of the training only
}


def olmo1_weights(is_tied: bool = False) -> dict[str, Tensor]:
    """Under the first trainer's names: query, key and value in one matrix, and so on."""
    torch.manual_seed(0)
    shapes = {"transformer.wte.weight": (VOCAB, D)}
    if not is_tied:
        shapes["transformer.ff_out.weight"] = (VOCAB, D)
    for layer in range(LAYERS):
        block = f"transformer.blocks.{layer}."
        shapes[block + "att_proj.weight"] = ((HEADS + 2 * KV_HEADS) * HEAD, D)
        shapes[block + "attn_out.weight"] = (D, D)
        shapes[block + "ff_proj.weight"] = (2 * F, D)
        shapes[block + "ff_out.weight"] = (D, F)
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def olmo1_logits(weights: dict[str, Tensor], ids_T: Tensor, clip: float) -> Tensor:
    """The original model written out plainly, one head and one position pair at a time."""

    def normed(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    def turned(x: Tensor) -> Tensor:
        out = x.clone()
        for position in range(len(x)):
            for pair in range(HEAD // 2):
                angle = position * 10_000 ** (-2 * pair / HEAD)
                one, two = x[position, pair], x[position, pair + HEAD // 2]
                out[position, pair] = one * math.cos(angle) - two * math.sin(angle)
                out[position, pair + HEAD // 2] = two * math.cos(angle) + one * math.sin(angle)
        return out

    x = weights["transformer.wte.weight"][ids_T]
    for layer in range(LAYERS):
        block = {
            name.split(".")[-2]: weight
            for name, weight in weights.items()
            if f".blocks.{layer}." in name
        }
        fused = (normed(x) @ block["att_proj"].T).clamp(-clip, clip)
        q, k, v = fused[:, :D], fused[:, D : D + KV_HEADS * HEAD], fused[:, D + KV_HEADS * HEAD :]
        mixed = []
        for head in range(HEADS):
            group = slice(head // (HEADS // KV_HEADS) * HEAD, None)
            q_h = turned(q[:, head * HEAD : (head + 1) * HEAD])
            k_h, v_h = turned(k[:, group][:, :HEAD]), v[:, group][:, :HEAD]
            scores = (q_h @ k_h.T / HEAD**0.5).masked_fill(
                torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf
            )
            mixed.append(scores.softmax(-1) @ v_h)
        x = x + torch.cat(mixed, -1) @ block["attn_out"].T
        first, second = (normed(x) @ block["ff_proj"].T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(second) * first) @ block["ff_out"].T
    head_weight = weights.get("transformer.ff_out.weight", weights["transformer.wte.weight"])
    return normed(x) @ head_weight.T


def write_olmo1(
    folder: Path, weights: dict[str, Tensor], file: str = "model.pt", **changes: Any
) -> Path:
    folder.mkdir(parents=True)
    content = {"model": OLMO1_SHAPE | changes, "seed": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    if file == "model.pt":
        torch.save(weights, folder / file)
    elif file == "encoded":  # how the trainer itself writes safetensors
        encoded = {
            base64.urlsafe_b64encode(pickle.dumps(((name,), False))).decode(): weight
            for name, weight in weights.items()
        }
        save_file(encoded, folder / "model.safetensors")
    else:
        save_file({f"model.{name}": w for name, w in weights.items()}, folder / file)
    return folder


def hf_logits(folder: Path, ids_T: Tensor) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(ids_T[None]).logits[0]


@pytest.mark.parametrize("file", ["model.pt", "model.safetensors", "encoded"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_an_olmo_1_checkpoint_becomes_a_folder_that_computes_the_same(
    file: str, is_tied: bool, tmp_path: Path
):
    weights = olmo1_weights(is_tied)
    source = write_olmo1(tmp_path / "src", weights, file, weight_tying=is_tied)
    done = convert(source, tmp_path / "hf")
    assert (done.layout_from, done.layout_to) == ("olmo", "hf")
    assert done.difference < 1e-5
    ids_T = torch.randint(VOCAB, (25,))
    expected = olmo1_logits(weights, ids_T, clip=0.6)
    torch.testing.assert_close(hf_logits(tmp_path / "hf", ids_T), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), OlmoForCausalLM)
    config = load_native(tmp_path / "hf").config
    assert (config.eos_token_id, config.pad_token_id, config.vocab_size) == (5, 1, VOCAB)
    assert config.tie_word_embeddings == is_tied


@pytest.mark.parametrize("is_in_shards", [False, True])
def test_an_old_folder_with_remote_code_is_read_too(is_in_shards: bool, tmp_path: Path):
    weights = olmo1_weights()
    source = write_olmo1(tmp_path / "src", weights, "model.safetensors")
    if is_in_shards:
        named = load_file(source / "model.safetensors")
        (source / "model.safetensors").unlink()
        places = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(named)}
        for file in set(places.values()):
            save_file({n: w for n, w in named.items() if places[n] == file}, source / file)
        index = json.dumps({"weight_map": places})
        (source / "model.safetensors.index.json").write_text(index)
    (source / "config.yaml").unlink()
    content = {"model_type": "hf_olmo", "architectures": ["OLMoForCausalLM"], **OLMO1_SHAPE}
    (source / "config.json").write_text(json.dumps(content))
    assert convert(source, tmp_path / "hf").layout_from == "hf_olmo"
    ids_T = torch.randint(VOCAB, (25,))
    torch.testing.assert_close(
        hf_logits(tmp_path / "hf", ids_T), olmo1_logits(weights, ids_T, 0.6), atol=1e-5, rtol=1e-5
    )


def test_an_olmo_1_comes_back_as_the_checkpoint_it_was(tmp_path: Path):
    weights = olmo1_weights()
    source = write_olmo1(tmp_path / "src", weights)
    convert(source, tmp_path / "hf")
    done = convert(tmp_path / "hf", tmp_path / "back")
    assert (done.layout_from, done.layout_to) == ("hf", "olmo")
    again = torch.load(tmp_path / "back" / "model.pt")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    shape = yaml.safe_load((tmp_path / "back" / "config.yaml").read_text())["model"]
    kept = OLMO1_SHAPE.keys() - {"vocab_size", "flash_attention"}  # the padded rows are known only
    assert {key: shape[key] for key in kept} == {key: OLMO1_SHAPE[key] for key in kept}


# ---------------------------------------------------------------- OLMo-core

OLMO2 = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=6,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    max_position_embeddings=64,
    eos_token_id=2,
    pad_token_id=3,
)
OLMO3 = ModelConfig(**{**OLMO2.__dict__, "model_type": "olmo3", "sliding_window": 8})
YARN = ModelConfig(
    **{
        **OLMO3.__dict__,
        "rope_scaling": Yarn(factor=4.0, original_max_position_embeddings=16),
    }
)
NORM = {"name": "rms", "eps": 1e-6, "bias": False, "dtype": "float32"}


def drawn(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def core_config(**attention: Any) -> dict[str, Any]:
    """As OLMo-core writes it."""
    return {
        "model": {
            "d_model": D,
            "vocab_size": VOCAB,
            "n_layers": 6,
            "name": "default",
            "init_method": "normal",
            "block": {
                "name": "reordered_norm",
                "sequence_mixer": {
                    "name": "default",
                    "type": "attention",
                    "n_heads": HEADS,
                    "n_kv_heads": KV_HEADS,
                    "bias": False,
                    "rope": {"name": "default", "theta": 500_000, "full_precision": True},
                    "qk_norm": NORM,
                    "backend": "flash_2",
                    **attention,
                },
                "feed_forward": {"hidden_size": F, "name": "default", "bias": False},
                "layer_norm": NORM,
            },
            "lm_head": {"name": "default", "layer_norm": NORM, "bias": False},
            "_CLASS_": "olmo_core.nn.transformer.config.TransformerConfig",
        },
        "dataset": {
            "sequence_length": 64,
            "tokenizer": {"vocab_size": VOCAB - 2, "eos_token_id": 2, "pad_token_id": 3},
        },
    }


SLIDING = {
    "pattern": [8, 8, 8, -1],
    "force_full_attention_on_first_layer": False,
    "force_full_attention_on_last_layer": True,
}


def core_weights(hf_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face names to OLMo-core's, as one finds them in both."""
    table = {
        "model.embed_tokens": "embeddings",
        "model.norm": "lm_head.norm",
        "lm_head": "lm_head.w_out",
        "self_attn.q_proj": "attention.w_q",
        "self_attn.k_proj": "attention.w_k",
        "self_attn.v_proj": "attention.w_v",
        "self_attn.o_proj": "attention.w_out",
        "self_attn.q_norm": "attention.q_norm",
        "self_attn.k_norm": "attention.k_norm",
        "post_attention_layernorm": "attention_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "post_feedforward_layernorm": "feed_forward_norm",
    }
    renamed = {}
    for name, weight in hf_weights.items():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, layer, part = module.split(".", 3)
            renamed[f"blocks.{layer}.{table[part]}.weight"] = weight
        else:
            renamed[f"{table[module]}.weight"] = weight
    return renamed


def write_core(
    folder: Path, config: ModelConfig, content: dict[str, Any], *, distributed_too: bool = True
) -> tuple[Path, Path]:
    """A checkpoint of OLMo-core, and the Hugging Face folder it was made from."""
    hf = export_hf(drawn(config), folder / "hf")
    weights = core_weights(load_file(hf / "model.safetensors"))
    source = folder / "src"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(content))
    if distributed_too:
        state: dict[str, Any] = {f"model.{name}": weight for name, weight in weights.items()}
        state["optim.step"] = torch.zeros(3)  # read past
        writer = distributed.FileSystemWriter(source / "model_and_optim")
        distributed.save(state, storage_writer=writer, no_dist=True)
    else:
        torch.save(weights, source / "model.pt")
    return source, hf


def with_yarn(content: dict[str, Any]) -> dict[str, Any]:
    """The layers that see all get their own block, with scaled positions."""
    block = content["model"]["block"]
    scaling = {
        "factor": 4.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "old_context_len": 16,
        "_CLASS_": "olmo_core.nn.rope.YaRNRoPEScalingConfig",
    }
    mixer = block["sequence_mixer"]
    scaled = {**mixer, "rope": {**mixer["rope"], "scaling": scaling}}
    content["model"]["block_overrides"] = {n: {**block, "sequence_mixer": scaled} for n in "35"}
    return content


CORE_CASES = {
    "olmo2": (OLMO2, core_config()),
    "olmo3": (OLMO3, core_config(sliding_window=SLIDING)),
    "olmo3 with yarn": (YARN, with_yarn(core_config(sliding_window=SLIDING))),
}


@pytest.mark.parametrize("case", CORE_CASES)
@pytest.mark.parametrize("distributed_too", [True, False])
def test_an_olmo_core_checkpoint_becomes_the_folder_it_was_made_from(
    case: str, distributed_too: bool, tmp_path: Path
):
    config, content = CORE_CASES[case]
    source, hf = write_core(tmp_path, config, content, distributed_too=distributed_too)
    done = convert(source, tmp_path / "new")
    assert (done.layout_from, done.layout_to) == ("olmo_core", "hf")
    assert (tmp_path / "new/config.json").read_text() == (hf / "config.json").read_text()
    old, new = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "new"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert isinstance(opened, Olmo2ForCausalLM if case == "olmo2" else Olmo3ForCausalLM)


@pytest.mark.parametrize("case", CORE_CASES)
def test_a_folder_goes_to_olmo_core_and_back_as_it_was(case: str, tmp_path: Path):
    config, content = CORE_CASES[case]
    export_hf(drawn(config), tmp_path / "hf")
    assert convert(tmp_path / "hf", tmp_path / "core").layout_to == "olmo_core"
    written = json.loads((tmp_path / "core/config.json").read_text())
    assert written["model"]["block"]["sequence_mixer"].get("sliding_window", {}).get(
        "pattern"
    ) == content["model"]["block"]["sequence_mixer"].get("sliding_window", {}).get("pattern")
    convert(tmp_path / "core", tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_an_olmo_2_may_go_to_the_first_trainer_and_back(tmp_path: Path):
    export_hf(drawn(OLMO2), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "olmo", to="olmo")
    shape = yaml.safe_load((tmp_path / "olmo/config.yaml").read_text())["model"]
    assert (shape["layer_norm_type"], shape["norm_after"], shape["clip_qkv"]) == ("rms", True, None)
    convert(tmp_path / "olmo", tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_description_that_would_run_code_is_refused(tmp_path: Path):
    source, _ = write_core(tmp_path, OLMO2, core_config())
    marker = tmp_path / "was_run"

    class Trap:
        def __reduce__(self) -> Any:
            return (marker.touch, ())

    (source / "model_and_optim/.metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="damaged or of another kind"):
        convert(source, tmp_path / "new")
    assert not marker.exists()


# ---------------------------------------------------------------- what comes along


def test_a_tokenizer_comes_along_and_its_absence_is_said(tmp_path: Path):
    source = write_olmo1(tmp_path / "src", olmo1_weights())
    assert convert(source, tmp_path / "one").notes == ["no tokenizer was there to copy"]
    tokenizer: dict[str, Any] = {
        "model": {"type": "WordLevel", "vocab": {"a": 0}},
        "added_tokens": [],
    }
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert convert(source, tmp_path / "two").notes == []
    assert (tmp_path / "two" / "tokenizer.json").is_file()
    tokenizer["model"]["vocab"] = {"a": VOCAB}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="has ids up to 50"):
        convert(source, tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_weights_are_kept_in_another_dtype_if_asked(tmp_path: Path):
    source = write_olmo1(tmp_path / "src", olmo1_weights())
    convert(source, tmp_path / "hf", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    export_hf(drawn(OLMO3), tmp_path / "olmo3")
    convert(tmp_path / "olmo3", tmp_path / "core", dtype=torch.bfloat16)
    convert(tmp_path / "core", tmp_path / "again")
    assert load_native(tmp_path / "again").dtype == torch.bfloat16


def test_a_tied_head_that_is_not_the_embedding_is_refused(tmp_path: Path):
    weights = olmo1_weights(is_tied=True)
    same = {**weights, "transformer.ff_out.weight": weights["transformer.wte.weight"].clone()}
    convert(write_olmo1(tmp_path / "same", same, weight_tying=True), tmp_path / "hf")
    other = {**weights, "transformer.ff_out.weight": torch.randn(VOCAB, D)}
    source = write_olmo1(tmp_path / "other", other, weight_tying=True)
    with pytest.raises(UserError, match="ties the head to the embedding"):
        convert(source, tmp_path / "new")


def test_the_swapped_end_of_text_of_olmo_1s_tokenizer_is_mended_and_said(tmp_path: Path):
    changes: dict[str, Any] = {"eos_token_id": 0, "vocab_size": 50280, "embedding_size": 50304}
    weights = olmo1_weights()
    for name in ("transformer.wte.weight", "transformer.ff_out.weight"):
        weights[name] = torch.randn(50304, D)
    source = write_olmo1(tmp_path / "src", weights, **changes)
    content = yaml.safe_load((source / "config.yaml").read_text())
    content["tokenizer"] = {"identifier": "tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"}
    (source / "config.yaml").write_text(yaml.safe_dump(content))
    done = convert(source, tmp_path / "hf")
    assert done.config.eos_token_id == 50279
    assert any("eos_token_id 0" in note for note in done.notes)


# ---------------------------------------------------------------- what is refused


def test_a_conversion_that_does_not_verify_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """transformers is made to compute something else, as a mistake of ours would."""
    source = write_olmo1(tmp_path / "src", olmo1_weights())
    monkeypatch.setattr(
        "transformers.models.olmo.modeling_olmo.OlmoMLP.forward",
        lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x)),
    )
    with pytest.raises(UserError, match="computes something else"):
        convert(source, tmp_path / "hf")
    assert [file.name for file in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alibi": True}, "model.alibi is True"),
        ({"include_bias": True}, "model.include_bias is True"),
        ({"block_type": "llama"}, "model.block_type is 'llama'"),
        ({"layer_norm_with_affine": True}, "model.layer_norm_with_affine is True; OLMo-1"),
        ({"attention_layer_norm": True}, "model.attention_layer_norm is True"),
        ({"norm_after": True}, "model.layer_norm_type is 'default'; OLMo-2"),
        ({"new_trick": 3}, "model.new_trick is not a key"),
        ({"d_model": None}, "does not say model.d_model"),
        ({"mlp_hidden_size": 60}, "ff_proj"),
    ],
)
def test_an_olmo_checkpoint_that_we_do_not_build_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
):
    source = write_olmo1(tmp_path / "src", olmo1_weights(), **changes)
    with pytest.raises(UserError, match=words):
        convert(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one value set."""
    content = json.loads(json.dumps(content))
    *parts, last = path.split(".")
    place = content
    for part in parts:
        place = place[part]
    place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.block.name", "default", "block name is 'default'"),
        ("model.block.sequence_mixer.use_head_qk_norm", True, "use_head_qk_norm is True"),
        ("model.block.sequence_mixer.gate", {"full": True}, "attention gate"),
        ("model.block.sequence_mixer.new_trick", 1, "attention new_trick is not a key"),
        ("model.block.sequence_mixer.rope.partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("model.block.layer_norm.eps", 1e-5, "differ in their eps"),
        ("model.block.sequence_mixer.sliding_window.pattern", [4, 8, -1], "windows of 4 and 8"),
        ("model.block.sequence_mixer.sliding_window.step", 2, "sliding_window step is not a key"),
        ("model.block.feed_forward", {"name": "default"}, "does not say the model's hidden_size"),
        ("model.embed_scale", 2.0, "model embed_scale is 2.0"),
        ("dataset.tokenizer", {}, "does not say dataset.tokenizer.eos_token_id"),
    ],
)
def test_an_olmo_core_checkpoint_that_we_do_not_build_is_refused(
    path: str, value: Any, words: str, tmp_path: Path
):
    content = changed(core_config(sliding_window=SLIDING), path, value)
    source, _ = write_core(tmp_path, OLMO3, content, distributed_too=False)
    with pytest.raises(UserError, match=words):
        convert(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_positions_that_olmo_core_would_stretch_otherwise_are_refused(tmp_path: Path):
    """A slow theta: the ramp would end beyond the last of a head's two pairs."""
    yarn = Yarn(factor=4.0, original_max_position_embeddings=16)
    config = ModelConfig(**{**YARN.__dict__, "rope_theta": 1.5, "rope_scaling": yarn})
    export_hf(drawn(config), tmp_path / "hf")
    with pytest.raises(UserError, match="stretch positions"):
        convert(tmp_path / "hf", tmp_path / "core")
    assert not (tmp_path / "core").exists()


def test_other_folders_and_targets_are_refused_in_words(tmp_path: Path):
    source = write_olmo1(tmp_path / "src", olmo1_weights())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="full is there already"):
        convert(source, tmp_path / "full")
    with pytest.raises(UserError, match="holds no model that can be converted"):
        find_layout(tmp_path / "full")
    with pytest.raises(UserError, match="is not a folder"):
        find_layout(tmp_path / "nowhere")
    with pytest.raises(UserError, match="can be converted to hf"):
        convert(source, tmp_path / "new", to="olmo_core")
    export_hf(drawn(OLMO3), tmp_path / "hf")
    with pytest.raises(UserError, match="olmo or olmo_core"):
        convert(tmp_path / "hf", tmp_path / "new", to="hf")
    with pytest.raises(UserError, match="no OLMo-3; convert to olmo_core"):
        convert(tmp_path / "hf", tmp_path / "new", to="olmo")
    (source / "model.pt").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be read"):
        convert(source, tmp_path / "new")
    (source / "model.pt").unlink()
    with pytest.raises(UserError, match=r"needs model\.pt or model\.safetensors"):
        convert(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()
