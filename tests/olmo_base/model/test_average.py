"""The average of models: weights against a sum by hand, and what is refused."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from olmo_base.model.average import average_models
from olmo_base.model.hf_weights import export_hf
from olmo_base.model.transformer import ModelConfig, Transformer
from olmo_base.run.errors import UserError

SHAPE: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@pytest.fixture
def models(tmp_path):
    """Three random models of one shape, with a made-up tokenizer file."""
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        folder = tmp_path / f"model{seed}"
        export_hf(Transformer(ModelConfig(**SHAPE)), folder)
        (folder / "tokenizer.json").write_text("{}")
        folders.append(folder)
    return folders


def test_the_average_is_the_mean_of_every_weight_and_opens_as_a_model(models, tmp_path):
    names = [str(folder) for folder in models]
    out = average_models(names, tmp_path / "mean")
    weights = [load_file(folder / "model.safetensors") for folder in models]
    found = load_file(out / "model.safetensors")
    assert found.keys() == weights[0].keys()
    for name, tensor in found.items():
        mean = sum(one[name].double() for one in weights) / 3
        torch.testing.assert_close(tensor.double(), mean, atol=1e-7, rtol=0)
    opened = AutoModelForCausalLM.from_pretrained(out)
    assert opened.config.hidden_size == 8
    assert (out / "tokenizer.json").read_text() == "{}"
    assert all(name in (out / "README.md").read_text() for name in names)


def test_weights_in_several_files_are_averaged_file_by_file(models, tmp_path):
    sharded = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(models[0])
    model.save_pretrained(sharded, max_shard_size="3KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    for name in ("config.json", "tokenizer.json"):
        (sharded / name).write_bytes((models[0] / name).read_bytes())
    out = average_models([str(sharded), str(models[1])], tmp_path / "mean")
    whole = average_models([str(models[0]), str(models[1])], tmp_path / "whole")
    pieces = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
    expected = load_file(whole / "model.safetensors")
    assert pieces.keys() == expected.keys()
    assert all(torch.equal(pieces[name], expected[name]) for name in expected)
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 16


def test_the_first_models_precision_is_kept(models, tmp_path):
    path = models[0] / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path, {"format": "pt"})
    out = average_models([str(models[0]), str(models[1])], tmp_path / "mean")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_models_that_do_not_fit_together_are_refused_and_nothing_is_written(models, tmp_path):
    names = [str(folder) for folder in models]
    with pytest.raises(UserError, match="at least two"):
        average_models(names[:1], tmp_path / "mean")
    (models[1] / "tokenizer.json").write_text("{ }")
    with pytest.raises(UserError, match="different tokenizers"):
        average_models(names, tmp_path / "mean")
    (models[1] / "tokenizer.json").write_text("{}")
    config = json.loads((models[2] / "config.json").read_text())
    (models[2] / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match="num_hidden_layers is 2 and 3"):
        average_models(names, tmp_path / "mean")
    (models[1] / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"model1/model\.safetensors is damaged"):
        average_models(names[:2], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
    with pytest.raises(UserError, match="exists already"):
        average_models([names[0], names[0]], models[1])


def test_the_verb_merge_averages(models, tmp_path, capsys):
    from open_instruct.__main__ import main

    names = [str(folder) for folder in models[:2]]
    assert main(["merge", *names, str(tmp_path / "mean")]) == 2
    assert "Several models are merged with --average" in capsys.readouterr().err
    assert main(["merge", "--average", *names, str(tmp_path / "mean")]) == 0
    assert (tmp_path / "mean" / "model.safetensors").is_file()
