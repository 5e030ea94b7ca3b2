"""Folders that go out to transformers and folders that come in from it."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from olmo_base.model.hf_weights import export_hf, hf_config, is_native, load_native
from olmo_base.model.presets import PRESETS
from olmo_base.model.rope import Yarn
from olmo_base.model.transformer import FULL, SLIDING, ModelConfig, Transformer
from olmo_base.run.errors import UserError

SMALL = ModelConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=64,
    eos_token_id=2,
    pad_token_id=3,
    rope_theta=1234.5,
)
TIED = dataclasses.replace(SMALL, tie_word_embeddings=True)
OLMO1 = dataclasses.replace(TIED, model_type="olmo", clip_qkv=0.5)
OLMO3 = dataclasses.replace(
    SMALL,
    model_type="olmo3",
    num_hidden_layers=5,
    sliding_window=7,
    rope_scaling=Yarn(factor=4.0, original_max_position_embeddings=16),
)
ANY_ORDER = dataclasses.replace(
    OLMO3,
    layer_types=(FULL, SLIDING, FULL, FULL, SLIDING),
    rope_scaling=Yarn(factor=2.0, original_max_position_embeddings=16, attention_factor=1.5),
)
CONFIGS = {"olmo2": SMALL, "tied": TIED, "olmo": OLMO1, "olmo3": OLMO3, "any order": ANY_ORDER}
CLASSES = {"olmo": OlmoForCausalLM, "olmo2": Olmo2ForCausalLM, "olmo3": Olmo3ForCausalLM}
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def drawn(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def write_tokenizer(folder: Path, num_ids: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(num_ids)}, unk_token="w0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2"}'
    )
    return folder


def logits_of(model: Transformer, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(ids_BT))


@EVERY_CONFIG
def test_an_exported_model_opens_in_transformers_with_equal_logits(
    config: ModelConfig, tmp_path: Path
):
    model = drawn(config)
    export_hf(model, tmp_path / "m")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert isinstance(other, CLASSES[config.model_type])
    ids_BT = torch.randint(50, (3, 40))
    with torch.no_grad():
        theirs = other(ids_BT).logits
    torch.testing.assert_close(logits_of(model, ids_BT), theirs, atol=1e-5, rtol=1e-5)
    assert other.generation_config.eos_token_id == 2
    assert other.generation_config.pad_token_id == 3
    assert other.dtype == torch.float32


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_model_saved_by_transformers_is_read_with_equal_logits(is_tied: bool, tmp_path: Path):
    torch.manual_seed(1)
    config = Olmo2Config(
        vocab_size=40,
        hidden_size=30,
        intermediate_size=17,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=50,
        rope_parameters={"rope_theta": 777.0, "rope_type": "default"},
        rms_norm_eps=1e-4,
        eos_token_id=[7, 8],
        pad_token_id=None,
        tie_word_embeddings=is_tied,
        initializer_range=0.3,
    )
    other = Olmo2ForCausalLM(config).eval()
    other.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()  # really in several files
    model = load_native(tmp_path)
    assert (model.config.eos_token_id, model.config.rope_theta) == (7, 777.0)
    ids_BT = torch.randint(40, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(model, ids_BT), other(ids_BT).logits, atol=1e-5, rtol=1e-5
        )


@EVERY_CONFIG
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 5_000])
def test_out_and_in_again_gives_the_same_bits(
    config: ModelConfig, max_shard_bytes: int, tmp_path: Path
):
    model = drawn(config)
    export_hf(model, tmp_path, max_shard_bytes=max_shard_bytes)
    again = load_native(tmp_path)
    assert again.config == config
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert all(weight.requires_grad for weight in again.parameters())


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_olmo_1_saved_by_transformers_is_read_with_equal_logits(is_tied: bool, tmp_path: Path):
    torch.manual_seed(1)
    config = OlmoConfig(
        vocab_size=40,
        hidden_size=30,
        intermediate_size=17,
        num_hidden_layers=3,
        num_attention_heads=5,
        max_position_embeddings=50,
        clip_qkv=0.3,
        eos_token_id=7,
        pad_token_id=1,
        tie_word_embeddings=is_tied,
        initializer_range=0.3,
    )
    other = OlmoForCausalLM(config).eval()
    other.save_pretrained(tmp_path)
    model = load_native(tmp_path)
    assert (model.config.clip_qkv, model.config.rope_theta) == (0.3, 10_000.0)
    ids_BT = torch.randint(40, (2, 50))
    with torch.no_grad():
        theirs_BTV = other(ids_BT).logits
    torch.testing.assert_close(logits_of(model, ids_BT), theirs_BTV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("has_yarn", [False, True])
def test_an_olmo_3_saved_by_transformers_is_read_with_equal_logits(has_yarn: bool, tmp_path: Path):
    torch.manual_seed(1)
    plain = {"rope_theta": 777.0, "rope_type": "default"}
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 10}
    config = Olmo3Config(
        vocab_size=40,
        hidden_size=30,
        intermediate_size=17,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=80,
        sliding_window=9,
        rope_parameters={FULL: plain | yarn if has_yarn else dict(plain), SLIDING: dict(plain)},
        eos_token_id=7,
        pad_token_id=1,
        initializer_range=0.3,
    )
    other = Olmo3ForCausalLM(config).eval()
    other.save_pretrained(tmp_path)
    model = load_native(tmp_path)
    # transformers' own pattern ends with a window where the layers are no multiple of four
    assert model.windows == (9, 9, 9, None, 9, 9)
    ids_BT = torch.randint(40, (2, 80))
    with torch.no_grad():
        theirs_BTV = other(ids_BT).logits
    torch.testing.assert_close(logits_of(model, ids_BT), theirs_BTV, atol=1e-5, rtol=1e-5)


def test_an_olmo_3_config_of_transformers_4_is_read(tmp_path: Path):
    """rope_theta and rope_scaling stand outside, and the scaling is meant for full layers only."""
    export_hf(drawn(OLMO3), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    config["rope_scaling"]["attention_factor"] = 0.1 * math.log(4.0) + 1
    path.write_text(json.dumps(config))
    assert load_native(tmp_path).config == OLMO3


def test_a_long_context_preset_is_written_as_the_released_model_says():
    config = hf_config(PRESETS["olmo3_7b_64k"], torch.bfloat16)
    assert config["rope_scaling"] == {
        "attention_factor": pytest.approx(1.2079441541679836),
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    }
    assert (config["sliding_window"], config["max_position_embeddings"]) == (4096, 65536)
    assert config["layer_types"][:8] == [SLIDING, SLIDING, SLIDING, FULL] * 2


def test_shards_are_named_in_an_index_that_transformers_reads(tmp_path: Path):
    model = drawn(SMALL)
    export_hf(model, tmp_path, max_shard_bytes=5_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in model.parameters())
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids_BT = torch.randint(50, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(model, ids_BT), other(ids_BT).logits, atol=1e-5, rtol=1e-5
        )


def test_exporting_again_leaves_nothing_of_the_old_model_and_all_other_files(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("stage: pretrain\n")
    export_hf(drawn(SMALL), tmp_path, max_shard_bytes=5_000)
    export_hf(drawn(TIED), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "recipe.yaml",
    ]
    assert load_native(tmp_path).config == TIED


def test_bf16_weights_stay_bf16_unless_another_dtype_is_asked_for(tmp_path: Path):
    export_hf(drawn(SMALL).to(torch.bfloat16), tmp_path)
    assert load_native(tmp_path).dtype == torch.bfloat16
    assert load_native(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_the_tokenizer_and_chat_template_come_along(tmp_path: Path):
    source = write_tokenizer(tmp_path / "tokenizer", 50)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "train.log").write_text("not a tokenizer file")
    export_hf(drawn(SMALL), tmp_path / "m", tokenizer_files=source)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert (tokenizer.eos_token_id, tokenizer.chat_template) == (2, "{{ messages }}")
    assert not (tmp_path / "m" / "train.log").exists()


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path: Path):
    source = write_tokenizer(tmp_path / "tokenizer", 51)
    with pytest.raises(UserError, match=r"ids up to 50, the model rows for 50.*at least 51"):
        export_hf(drawn(SMALL), tmp_path / "m", tokenizer_files=source)
    assert not (tmp_path / "m" / "config.json").exists()


def test_exporting_from_a_folder_without_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        export_hf(drawn(SMALL), tmp_path / "m", tokenizer_files=tmp_path)


def test_loading_does_not_import_transformers(tmp_path: Path):
    export_hf(drawn(SMALL), tmp_path)
    code = (
        "import sys; from olmo_base.model.generate import load_generator; "
        "load_generator(sys.argv[1]).generate([[1]], max_new_tokens=2); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# ---------------------------------------------------------------- folders that are no such model


def damaged_export(folder: Path) -> Path:
    export_hf(drawn(SMALL), folder)
    return folder


def test_a_folder_without_config_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_native(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    (damaged_export(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights: it needs model\.safetensors"):
        load_native(tmp_path)


def test_another_architecture_is_named_in_the_refusal(tmp_path: Path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10)).save_pretrained(
        tmp_path
    )
    assert not is_native(tmp_path)
    with pytest.raises(UserError, match=r"GPT2LMHeadModel \(model_type 'gpt2'\)"):
        load_native(tmp_path)


def test_damaged_weights_are_refused(tmp_path: Path):
    file = damaged_export(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_native(tmp_path)


def test_a_missing_an_unknown_and_a_misshapen_weight_are_each_named(tmp_path: Path):
    file = damaged_export(tmp_path) / "model.safetensors"
    weights = load_file(file)
    norm = weights.pop("model.norm.weight")
    save_file(weights, file)
    with pytest.raises(UserError, match=r"lacks 1 of 25 weights.*model\.norm\.weight"):
        load_native(tmp_path)
    save_file({**weights, "model.norm.weight": norm[:-1]}, file)
    with pytest.raises(UserError, match=r"model\.norm\.weight has the shape \(23,\).*\(24,\)"):
        load_native(tmp_path)
    save_file({**weights, "model.norm.weight": norm, "extra": norm.clone()}, file)
    with pytest.raises(UserError, match="holds the weight extra"):
        load_native(tmp_path)


def test_a_tied_head_kept_twice_is_read_and_one_that_differs_is_refused(tmp_path: Path):
    file = export_hf(drawn(TIED), tmp_path) / "model.safetensors"
    weights = load_file(file)
    embedding = weights["model.embed_tokens.weight"]
    save_file({**weights, "lm_head.weight": embedding.clone()}, file)
    assert load_native(tmp_path).config.tie_word_embeddings
    save_file({**weights, "lm_head.weight": embedding + 1}, file)
    with pytest.raises(UserError, match="ties the head to the embedding"):
        load_native(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path):
    export_hf(drawn(SMALL), tmp_path, max_shard_bytes=5_000)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=f"names {gone.name}, which is not in the folder"):
        load_native(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": True}, "biases in attention"),
        ({"hidden_act": "gelu"}, "activation is gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "scaled \\(yarn\\)"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "scaled \\(linear\\)"),
        ({"head_dim": 16}, "heads have 16 channels"),
    ],
)
def test_what_the_native_model_does_not_build_is_refused(
    changes: dict[str, object], words: str, tmp_path: Path
):
    path = damaged_export(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert not is_native(tmp_path)
    with pytest.raises(UserError, match=words):
        load_native(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": None}, "no window"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "scaled \\(linear\\)"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "YaRN has mscale"),
        (
            {"rope_parameters": {FULL: {"rope_theta": 9.0}, SLIDING: {"rope_theta": 8.0}}},
            "another rope_theta",
        ),
        (
            {
                "rope_parameters": {
                    FULL: {"rope_theta": 9.0},
                    SLIDING: {"rope_theta": 9.0, "rope_type": "linear", "factor": 2.0},
                }
            },
            "windowed layers are scaled",
        ),
    ],
)
def test_what_the_native_olmo_3_does_not_build_is_refused(
    changes: dict[str, object], words: str, tmp_path: Path
):
    export_hf(drawn(OLMO3), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_scaling": None} | changes))
    assert not is_native(tmp_path)
    with pytest.raises(UserError, match=words):
        load_native(tmp_path)


def test_a_config_of_transformers_4_is_read(tmp_path: Path):
    path = damaged_export(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | {"rope_scaling": None, "torch_dtype": "float32"}))
    assert load_native(tmp_path).config == SMALL


def test_a_config_that_is_not_json_or_lacks_a_key_is_refused(tmp_path: Path):
    path = damaged_export(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    del config["hidden_size"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json does not say hidden_size"):
        load_native(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_native(tmp_path)
