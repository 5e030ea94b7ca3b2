import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from olmo_base.run.errors import UserError
from olmo_base.run.recipe import load_recipe
from open_instruct import preference, reward, sft
from open_instruct.__main__ import main
from open_instruct.adapters import AdapterConfig
from open_instruct.causal_lm import ModelConfig, load_causal_lm
from open_instruct.encode import find_template
from open_instruct.logprobs import LabelLogprobs
from open_instruct.reference import REFERENCE_FILE
from open_instruct.sharding import shard
from tests.open_instruct.tiny import (
    assert_same_weights,
    kill_after_step,
    rows_of,
    save_tiny_model,
    write_dialogues,
    write_pairs,
    write_recipe,
)

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

BITS = {"load_in_4bit": "Linear4bit", "load_in_8bit": "Linear8bitLt"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a small base model, dialogues and pairs."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "base", hidden_size=64, intermediate_size=128)
    write_dialogues(tmp_path / "dialogues.jsonl")
    write_pairs(tmp_path / "pairs.jsonl")
    return tmp_path


def test_weights_in_few_bits_are_not_divided_over_ranks(folder):
    model, _ = load_causal_lm(ModelConfig("base"), AdapterConfig(use_peft=True, load_in_4bit=True))
    with pytest.raises(UserError, match=r"4 or 8 bits cannot be divided.*ddp\.yaml"):
        shard(LabelLogprobs(model), torch.device("cpu"), 2, releases=True)


RECIPES: dict[str, Any] = {
    "sft": sft.SftRecipe,
    "dpo": preference.PreferenceRecipe,
    "reward": reward.RewardRecipe,
}


def recipe_of(folder, stage="sft", **changes):
    data = {"sft": "dialogues.jsonl"}.get(stage, "pairs.jsonl")
    keys = dict(
        stage=stage,
        model_name_or_path="base",
        chat_template="tulu",
        dataset_mixer=[{"path": data}],
        eval_dataset_mixer=[{"path": data}],
        max_length=64,
        learning_rate=5e-3,
        per_device_train_batch_size=8,
        num_train_epochs=4,
        logging_steps=1,
        save_steps=5,
        use_peft=True,
        lora_r=4,
        lora_dropout=0.1,
        output_dir=stage,
    )
    keys |= changes
    path = write_recipe(folder / f"{keys['output_dir']}.yaml", **keys)
    return load_recipe(RECIPES[stage], path)


@pytest.mark.parametrize("bits", BITS)
def test_the_base_is_kept_in_few_bits_and_the_adapter_in_full_precision(folder, bits):
    model: Any
    adapter = recipe_of(folder, **{bits: True}).adapter
    model, _ = load_causal_lm(ModelConfig("base"), adapter)
    layer = model.get_decoder().layers[0].self_attn.q_proj
    assert type(layer.base_layer).__name__ == BITS[bits]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert trained and all(weight.dtype == torch.float32 for weight in trained)
    assert model.get_output_embeddings().weight.dtype == torch.float32


def test_gradients_through_4_bit_weights_are_those_of_the_same_weights_in_full(folder):
    """After an evaluation, which on some processors changes how the weights are kept."""
    model, twin = (
        load_causal_lm(ModelConfig("base"), recipe_of(folder, lora_dropout=0.0, **keys).adapter)[0]
        for keys in ({"load_in_4bit": True}, {})
    )
    parts = dict(model.named_modules())
    for name, module in twin.named_modules():
        if type(parts.get(f"{name}.base_layer")).__name__ == "Linear4bit":
            weight: Any = parts[f"{name}.base_layer"].weight
            full = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            module.base_layer.weight.data = full.float()
    ids = torch.arange(30)[None] * 7 % 256
    found = []
    for each in (model, twin):
        with torch.no_grad():
            each.eval()(ids)
            for name, weight in each.named_parameters():
                if "lora_B" in name:  # zero at first, and then no gradient passes
                    weight.fill_(0.02)
        each.train()(ids, labels=ids).loss.backward()
        found.append({n: w.grad for n, w in each.named_parameters() if w.requires_grad})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[1].items():
        assert gradient is not None and gradient.abs().max() > 1e-6
        torch.testing.assert_close(found[0][name], gradient, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_run_learns_and_its_adapter_opens_on_the_base(folder, bits):
    run = sft.run(recipe_of(folder, **{bits: True}))
    rows = rows_of(run.path / "metrics.jsonl")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.1
    settings = json.loads((run.path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / "base")
    assert main(["merge", "sft", "whole"]) == 0
    assert (folder / "whole" / "model.safetensors").exists()


def test_dora_stands_on_a_4_bit_base_too(folder):
    run = sft.run(recipe_of(folder, use_dora=True, load_in_4bit=True))
    rows = rows_of(run.path / "metrics.jsonl")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.1


def test_a_quantised_policy_starts_from_its_own_reference(folder):
    run = preference.run(recipe_of(folder, "dpo", load_in_4bit=True, num_train_epochs=1))
    first = rows_of(run.path / "metrics.jsonl")[0]
    assert first["eval_accuracy"] == 0.5 and first["eval_reward_margin"] == 0.0
    whole = preference.run(recipe_of(folder, "dpo", output_dir="full", num_train_epochs=1))
    found, expected = (load_file(item.path / REFERENCE_FILE) for item in (run, whole))
    assert not torch.allclose(found["train"], expected["train"], atol=1e-3)


def test_an_adapter_goes_on_over_a_quantised_base(folder):
    sft.run(recipe_of(folder, load_in_4bit=True))
    run = preference.run(
        recipe_of(
            folder,
            "dpo",
            model_name_or_path="sft",
            chat_template=None,
            load_in_4bit=True,
            lora_r=None,
            lora_dropout=None,
        )
    )
    rows = rows_of(run.path / "metrics.jsonl")
    assert rows[0]["eval_reward_margin"] == 0.0 and rows[-1]["eval_reward_margin"] > 0
    settings = json.loads((run.path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / "base")


@pytest.mark.parametrize("bits", BITS)
def test_a_reward_model_stands_on_a_quantised_base(folder, bits):
    run = reward.run(recipe_of(folder, "reward", **{bits: True}))
    rows = rows_of(run.path / "metrics.jsonl")
    assert rows[-1]["eval_accuracy"] > 0.9 and rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.1
    kept = load_file(run.path / "adapter_model.safetensors")
    (head,) = [weight for name, weight in kept.items() if "score" in name]
    assert head.shape == (1, 64) and head.dtype == torch.float32


@pytest.mark.parametrize("bits", BITS)
def test_new_tokens_are_trained_beside_a_quantised_base(folder, bits):
    template = find_template("tulu").read_text(encoding="utf-8")
    (folder / "marked.jinja").write_text(template.replace("<|assistant|>", "<|answer|>"))
    keys = dict(chat_template="marked.jinja", additional_special_tokens=["<|answer|>"])
    run = sft.run(recipe_of(folder, **keys, **{bits: True}))
    rows = rows_of(run.path / "metrics.jsonl")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.1
    assert main(["merge", "sft", "whole"]) == 0
    embedding = load_file("whole/model.safetensors")["model.embed_tokens.weight"]
    assert embedding.shape == (262, 64)


def test_a_killed_quantised_run_ends_with_the_same_bits(folder):
    keys = dict(load_in_4bit=True, num_train_epochs=30)
    sft.run(recipe_of(folder, output_dir="whole", **keys))
    recipe = recipe_of(folder, **keys)
    kill_after_step(folder / "sft.yaml", folder / "sft", step=13)
    sft.run(recipe)
    found, expected = (
        load_file(folder / name / "adapter_model.safetensors") for name in ("sft", "whole")
    )
    assert_same_weights(found, expected)


def test_fp4_and_nested_scales_are_other_models(folder):
    references = []
    for name, keys in (
        ("nf4", {}),
        ("fp4", {"bnb_4bit_quant_type": "fp4"}),
        ("nested", {"use_bnb_nested_quant": True}),
    ):
        run = preference.run(
            recipe_of(folder, "dpo", load_in_4bit=True, output_dir=name, max_steps=1, **keys)
        )
        references.append(load_file(run.path / REFERENCE_FILE)["train"])
    assert not torch.equal(references[0], references[1])
    assert not torch.equal(references[0], references[2])


def test_quantised_weights_cannot_be_trained(folder):
    with pytest.raises(UserError, match="use_peft is not true"):
        recipe_of(folder, use_peft=False, lora_r=None, lora_dropout=None, load_in_4bit=True)
