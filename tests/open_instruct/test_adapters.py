import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.subject import load_subject
from olmo_base.model.generate import load_generator
from olmo_base.optim import build_optimizer, learning_rate_at, set_learning_rate
from olmo_base.run.artefact import model_files
from olmo_base.run.errors import UserError
from olmo_base.run.recipe import load_recipe
from open_instruct import preference, sft
from open_instruct.__main__ import main
from open_instruct.adapters import AdapterConfig
from open_instruct.causal_lm import ModelConfig, load_causal_lm, load_config
from open_instruct.encode import find_template, load_chat_encoder
from open_instruct.loop import steps_of
from open_instruct.memory import count_parameters
from open_instruct.reference import REFERENCE_FILE
from open_instruct.tokenised import DataReport
from tests.open_instruct.tiny import (
    assert_same_weights,
    kill_after_step,
    rows_of,
    save_tiny_model,
    weights_of,
    write_dialogues,
    write_pairs,
    write_recipe,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a tiny base model, dialogues and pairs."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "base")
    write_dialogues(tmp_path / "train.jsonl")
    write_dialogues(tmp_path / "held_out.jsonl", number=6)
    write_pairs(tmp_path / "pairs.jsonl")
    return tmp_path


COMMON = dict(
    model_name_or_path="base",
    chat_template="tulu",
    max_length=64,
    per_device_train_batch_size=8,
    logging_steps=1,
    save_steps=5,
)
LORA = dict(use_peft=True, lora_r=4, lora_alpha=8, lora_dropout=0.0)


def sft_recipe(folder: Path, **changes) -> sft.SftRecipe:
    keys = COMMON | dict(
        stage="sft",
        dataset_mixer=[{"path": "train.jsonl"}],
        eval_dataset_mixer=[{"path": "held_out.jsonl"}],
        learning_rate=2e-2,
        num_train_epochs=4,
        output_dir="lora",
    )
    path = write_recipe(
        folder / f"{changes.get('output_dir', 'lora')}.yaml", **(keys | LORA | changes)
    )
    return load_recipe(sft.SftRecipe, path)


def dpo_recipe(folder: Path, **changes) -> preference.PreferenceRecipe:
    keys = COMMON | dict(
        stage="dpo",
        dataset_mixer=[{"path": "pairs.jsonl"}],
        eval_dataset_mixer=[{"path": "pairs.jsonl"}],
        beta=0.5,
        learning_rate=1e-2,
        num_train_epochs=4,
        output_dir="dpo",
    )
    path = write_recipe(
        folder / f"{changes.get('output_dir', 'dpo')}.yaml", **(keys | LORA | changes)
    )
    return load_recipe(preference.PreferenceRecipe, path)


IDS = torch.arange(40).view(2, 20) * 5 % 256


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def opened(folder: Path | str) -> Any:
    """As transformers opens it, and as anyone else who does not know of us."""
    return AutoModelForCausalLM.from_pretrained(folder)


def opened_by_peft(folder: Path | str) -> Any:
    """The base with the adapter in ``folder``."""
    return peft.PeftModel.from_pretrained(opened("base"), folder)


# ---------------------------------------------------------------- the artefact


def test_an_adapter_run_learns_and_leaves_a_folder_that_peft_and_transformers_read(folder):
    before = {file: file.read_bytes() for file in (folder / "base").iterdir()}
    run = sft.run(sft_recipe(folder))
    rows = rows_of(run.path / "metrics.jsonl")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.3
    assert {file: file.read_bytes() for file in (folder / "base").iterdir()} == before

    names = {file.name for file in run.path.iterdir()}
    assert names >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "manifest.json",
        "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "recipe.yaml",
    }  # fmt: skip
    assert not names & {"config.json", "model.safetensors", "model.tmp"}
    assert "made by the stage `sft`" in (run.path / "README.md").read_text()  # not peft's card
    settings = json.loads((run.path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / "base")  # from any folder
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 8, 0.0)
    projections = {f"{name}_proj" for name in "q k v o gate up down".split()}
    names = {name.rpartition(".")[2] for name in settings["target_modules"]}
    assert names == projections  # the head is none
    weights = load_file(run.path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in weights
    assert len(weights) == 2 * 7 * 2

    by_peft = opened_by_peft(run.path)
    by_us, _ = load_causal_lm(ModelConfig(str(run.path)))
    torch.testing.assert_close(logits_of(opened(run.path)), logits_of(by_peft))
    torch.testing.assert_close(logits_of(by_us), logits_of(by_peft), atol=1e-6, rtol=0)
    assert (logits_of(by_peft) - logits_of(opened("base"))).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(run.path).chat_template
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert "LoRA of rank 4, alpha 8" in (run.path / "train.log").read_text()


def test_training_an_adapter_equals_peft_and_a_loop_written_out(folder):
    recipe = sft_recipe(folder, max_steps=3)
    run = sft.run(recipe)
    base = opened("base")
    torch.manual_seed(recipe.run.seed)
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(run.path)
    optimizer = build_optimizer(model, recipe.optim)
    lines = (folder / "train.jsonl").read_text().splitlines()
    dialogues = [json.loads(line)["messages"] for line in lines]
    examples = sft.dialogue_examples(
        recipe.data.dataset_mixer,
        load_chat_encoder(run.path, None),
        recipe,
        run.counts,
        DataReport(),
    )
    steps = steps_of(examples, examples.num_labels_NW[:, 0], recipe.train, seed=recipe.run.seed)
    for step in range(3):
        set_learning_rate(optimizer, learning_rate_at(step, 3, recipe.optim))
        batch = tokenizer.apply_chat_template(
            [dialogues[number] for number in steps.numbers(step)],
            padding=True,
            padding_side="right",
            return_tensors="pt",
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        labels = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    ours = load_file(run.path / "adapter_model.safetensors")
    theirs = peft.get_peft_model_state_dict(model)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-5, rtol=0, msg=name)


def test_gradient_checkpointing_trains_an_adapter_all_the_same(folder):
    plain = sft.run(sft_recipe(folder, output_dir="plain", max_steps=3))
    frugal = sft.run(
        sft_recipe(folder, output_dir="frugal", max_steps=3, gradient_checkpointing=True)
    )
    expected = load_file(plain.path / "adapter_model.safetensors")
    for name, weight in load_file(frugal.path / "adapter_model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0, msg=name)


# ---------------------------------------------------------------- stopping and going on


def test_a_killed_adapter_run_with_dropout_ends_with_the_same_bits(folder):
    keys = dict(lora_dropout=0.3, num_train_epochs=30)
    sft.run(sft_recipe(folder, output_dir="whole", **keys))
    recipe = sft_recipe(folder, **keys)
    kill_after_step(
        folder / "lora.yaml", folder / "lora", step=random.Random("adapters").randrange(10, 50)
    )
    checkpoint = next((folder / "lora" / "checkpoints").glob("step_*"))
    assert all("lora_" in name for name in weights_of(checkpoint))  # the base is not copied
    sft.run(recipe)
    assert "going on from" in (folder / "lora" / "train.log").read_text()
    found, expected = (
        load_file(folder / name / "adapter_model.safetensors") for name in ("lora", "whole")
    )
    assert_same_weights(found, expected)


def test_dropout_changes_the_run_and_not_its_evaluation(folder):
    rows = [
        rows_of(sft.run(sft_recipe(folder, output_dir=name, **keys)).path / "metrics.jsonl")
        for name, keys in (("none", {}), ("some", dict(lora_dropout=0.5)))
    ]
    assert rows[0][0]["eval_loss"] == rows[1][0]["eval_loss"]
    assert rows[0][-1]["eval_loss"] != rows[1][-1]["eval_loss"]


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize(
    "keys, changes",
    [
        (dict(), dict()),
        (dict(use_rslora=True), dict()),
        (dict(use_dora=True), dict()),
        (dict(lora_dropout=0.4), dict(tie_word_embeddings=True)),
        (dict(lora_target_modules=["q_proj", "lm_head"]), dict()),
    ],
)
def test_the_merged_model_gives_the_adapters_logits(folder, capsys, keys, changes):
    save_tiny_model(folder / "base", **changes)
    sft.run(sft_recipe(folder, max_steps=6, **keys))
    assert main(["merge", "lora", "whole"]) == 0
    names = {file.name for file in (folder / "whole").iterdir()}
    assert names >= {"config.json", "model.safetensors", "chat_template.jinja", "tokenizer.json"}
    assert not any("adapter" in name for name in names)
    merged = logits_of(opened("whole"))
    # not transformers' own loader: in 5.23 it starts DoRA's magnitudes anew
    torch.testing.assert_close(merged, logits_of(opened_by_peft("lora")), atol=1e-5, rtol=0)
    assert (merged - logits_of(opened("base"))).abs().max() > 0.05
    is_tied = json.loads((folder / "whole" / "config.json").read_text())["tie_word_embeddings"]
    assert is_tied == changes.get("tie_word_embeddings", False)
    assert ("lm_head.weight" in weights_of(folder / "whole")) != is_tied


# ---------------------------------------------------------------- new tokens


def with_new_tokens(folder: Path, **changes) -> dict[str, Any]:
    """Keys of a recipe whose template opens answers with a token that the base does not have."""
    template = find_template("tulu").read_text(encoding="utf-8")
    path = folder / "marked.jinja"
    path.write_text(template.replace("<|assistant|>", "<|answer|>"), encoding="utf-8")
    keys = dict(chat_template=str(path), additional_special_tokens=["<|answer|>"], max_steps=6)
    return keys | changes


@pytest.mark.parametrize("is_tied", [False, True])
def test_new_tokens_are_trained_and_kept_by_an_adapter_and_its_merged_model(folder, is_tied):
    save_tiny_model(folder / "base", tie_word_embeddings=is_tied)
    run = sft.run(sft_recipe(folder, **with_new_tokens(folder)))
    tokenizer = AutoTokenizer.from_pretrained("lora")
    assert len(tokenizer) == 262 and tokenizer.convert_tokens_to_ids("<|answer|>") == 261
    rows = rows_of(run.path / "metrics.jsonl")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    kept = load_file("lora/adapter_model.safetensors")
    matrices = [weight for name, weight in kept.items() if "token_adapter" in name]
    assert [tuple(weight.shape) for weight in matrices] == [(1, 16)] * (1 if is_tied else 2)

    assert main(["merge", "lora", "whole"]) == 0
    whole = opened("whole")
    assert whole.config.vocab_size == 262
    base = opened("base")
    old_rows = base.get_input_embeddings().weight.detach()
    new_rows = whole.get_input_embeddings().weight.detach()
    assert torch.equal(new_rows[:261], old_rows)  # nothing else is changed
    assert (new_rows[261] - old_rows.mean(0)).abs().max() > 1e-3
    base.resize_token_embeddings(262, mean_resizing=False)
    by_peft = peft.PeftModel.from_pretrained(base, "lora")
    ids = torch.tensor([[261, 5, 80, 261, 7, 9]])
    with torch.no_grad():
        expected = by_peft.eval()(ids).logits
        torch.testing.assert_close(whole.eval()(ids).logits, expected, atol=1e-5, rtol=0)
        loaded = load_generator("lora").model(ids).logits
        torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=0)
    # It goes on from where it was, and says that it keeps its shape.
    keys = dict(model_name_or_path="lora", chat_template=None, output_dir="on")
    on = sft.run(sft_recipe(folder, **keys, max_steps=1))
    first = rows_of(on.path / "metrics.jsonl")[0]["eval_loss"]
    assert first == pytest.approx(rows[-1]["eval_loss"], abs=1e-5)


def test_new_tokens_of_a_whole_model_are_trained_and_read_again(folder):
    keys = with_new_tokens(folder, use_peft=False, output_dir="full") | dict.fromkeys(LORA)
    run = sft.run(sft_recipe(folder, **(keys | {"use_peft": False})))
    whole = opened("full")
    assert whole.config.vocab_size == 262
    for matrix in (whole.get_input_embeddings(), whole.get_output_embeddings()):
        before = opened("base").get_input_embeddings().weight.mean(0)
        assert matrix.weight.shape[0] == 262
        assert (matrix.weight[261] - before).abs().max() > 1e-3
    rows = rows_of(run.path / "metrics.jsonl")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    again = dict(model_name_or_path="full", chat_template=None, output_dir="again")
    first = rows_of(sft.run(sft_recipe(folder, **again, max_steps=1)).path / "metrics.jsonl")[0]
    assert first["eval_loss"] == pytest.approx(rows[-1]["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [(["<|user|>"], "is a token of this model already"), (["a b", "a b"], "twice")],
)
def test_a_new_token_that_is_none_is_refused(folder, tokens, words):
    with pytest.raises(UserError, match=words):
        sft.run(sft_recipe(folder, additional_special_tokens=tokens))


def test_a_merged_model_keeps_the_precision_of_its_base(folder):
    opened("base").to(torch.bfloat16).save_pretrained("base")
    sft.run(sft_recipe(folder, max_steps=1))
    adapter = load_file(folder / "lora" / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    assert main(["merge", "lora", "whole"]) == 0
    assert {weight.dtype for weight in weights_of(folder / "whole").values()} == {torch.bfloat16}


def test_what_cannot_be_merged_is_named(folder, capsys):
    assert main(["merge", "base", "whole"]) == 2
    assert "base is not an adapter" in capsys.readouterr().err
    sft.run(sft_recipe(folder, max_steps=1))
    capsys.readouterr()
    assert main(["merge", "lora", "base"]) == 2
    assert "base exists already" in capsys.readouterr().err


def test_an_adapter_on_another_base_than_it_was_trained_on_is_refused(folder):
    sft.run(sft_recipe(folder, max_steps=1))
    weights = weights_of(folder / "base")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="trained on other weights"):
        load_causal_lm(ModelConfig("lora"))


def test_a_base_that_is_gone_is_named_with_what_to_do(folder):
    sft.run(sft_recipe(folder, max_steps=1))
    (folder / "base").rename(folder / "moved")
    with pytest.raises(UserError, match=r"lora is an adapter on .*base, which cannot be found"):
        sft.run(sft_recipe(folder, model_name_or_path="lora", output_dir="next"))
    path = folder / "lora" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(folder / "base"), str(folder / "moved")))
    load_causal_lm(ModelConfig("lora"))


@pytest.mark.parametrize("keys", [{}, {"use_dora": True}])
def test_chat_and_evaluation_open_an_adapter_as_a_model(folder, keys):
    sft.run(sft_recipe(folder, max_steps=6, **keys))
    generator = load_generator("lora", device="cpu")
    torch.testing.assert_close(
        logits_of(generator.model), logits_of(opened_by_peft("lora")), atol=1e-5, rtol=0
    )
    assert generator.eos_token_ids == {256} and generator.max_length == 128
    assert main(["chat", "lora", "-p", "3?", "--temperature", "0", "--max-new-tokens", "3"]) == 0
    subject = load_subject("lora", batch_tokens=256, batch_size=4)
    assert subject.encoder is not None and subject.window == 128


# ---------------------------------------------------------------- preference tuning


def reference_of(run: Path) -> torch.Tensor:
    return load_file(run / REFERENCE_FILE)["train"]


def test_the_reference_of_a_new_adapter_is_the_model_without_it(folder):
    one_way = {"attn_implementation": "eager"}  # with it transformers computes the whole model too
    keys = {**NO_ADAPTER, **one_way}
    whole = preference.run(dpo_recipe(folder, output_dir="all", max_steps=1, **keys))
    run = preference.run(dpo_recipe(folder, num_train_epochs=6, **one_way))
    assert torch.equal(reference_of(run.path), reference_of(whole.path))
    rows = rows_of(run.path / "metrics.jsonl")
    assert rows[0]["eval_accuracy"] == 0.5 and rows[0]["eval_reward_margin"] == 0.0
    assert rows[-1]["eval_accuracy"] == 1.0
    assert (run.path / "adapter_model.safetensors").exists()


NO_ADAPTER: dict[str, Any] = dict(use_peft=False, lora_r=None, lora_alpha=None, lora_dropout=None)


def test_an_adapter_with_use_peft_is_trained_further_against_what_it_was(folder):
    sft.run(sft_recipe(folder))
    run = preference.run(
        dpo_recipe(folder, model_name_or_path="lora", chat_template=None, lora_dropout=None)
    )
    rows = rows_of(run.path / "metrics.jsonl")
    assert rows[0]["eval_accuracy"] == 0.5 and rows[0]["eval_reward_margin"] == 0.0
    settings = json.loads((run.path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / "base")
    before, after = (
        load_file(folder / name / "adapter_model.safetensors") for name in ("lora", "dpo")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    on_the_base = preference.run(dpo_recipe(folder, output_dir="other", max_steps=1))
    assert not torch.equal(reference_of(run.path), reference_of(on_the_base.path))


def test_an_adapter_without_use_peft_is_merged_and_all_weights_are_trained(folder):
    sft.run(sft_recipe(folder))
    main(["merge", "lora", "whole"])
    runs = [
        preference.run(
            dpo_recipe(
                folder,
                model_name_or_path=start,
                output_dir=f"dpo_{start}",
                chat_template=None,
                max_steps=2,
                **NO_ADAPTER,
            )
        )
        for start in ("lora", "whole")
    ]
    found, expected = (weights_of(run.path) for run in runs)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0, msg=name)


def test_an_adapter_that_goes_on_keeps_its_shape(folder):
    sft.run(sft_recipe(folder, max_steps=1))
    recipe = sft_recipe(folder, model_name_or_path="lora", output_dir="next", lora_r=8)
    with pytest.raises(UserError, match=r"lora_r: 8, but .*lora is an adapter with 4"):
        sft.run(recipe)


def test_an_adapters_inputs_are_its_own_files_and_its_bases(folder):
    sft.run(sft_recipe(folder, max_steps=1))
    found = {(file.parent.name, file.name) for file in model_files("lora")}
    assert {("lora", "adapter_model.safetensors"), ("base", "model.safetensors")} <= found
    assert ("base", "config.json") in found and ("lora", "manifest.json") not in found


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    "keys, words",
    [
        (NO_ADAPTER | dict(lora_r=8), "lora_r: 8, but use_peft is not true"),
        (NO_ADAPTER | dict(load_in_4bit=True), "load_in_4bit: True, but use_peft"),
        (NO_ADAPTER | dict(lora_dropout=0.0), "lora_dropout: 0.0, but use_peft"),
        (dict(load_in_4bit=True, load_in_8bit=True), "Keep one"),
        (dict(bnb_4bit_quant_type="fp4"), "load_in_4bit is not true"),
        (dict(use_dora=True, load_in_8bit=True), "use_dora.*load_in_4bit"),
        (dict(lora_dropout=1.0), "below 1"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(folder, keys, words):
    with pytest.raises(UserError, match=words):
        sft_recipe(folder, **keys)


def test_unknown_target_modules_are_named_beside_the_known_ones(folder):
    with pytest.raises(UserError, match=r"query.*Names that this model has: .*q_proj"):
        sft.run(sft_recipe(folder, lora_target_modules=["query"]))


def test_a_tied_head_cannot_carry_an_adapter(folder):
    save_tiny_model(folder / "base", tie_word_embeddings=True)
    with pytest.raises(UserError, match="tied"):
        sft.run(sft_recipe(folder, lora_target_modules=["q_proj", "lm_head"]))


def test_a_plan_counts_what_is_trained_and_needs_less_memory(folder):
    whole = sft.plan(sft_recipe(folder, **NO_ADAPTER))
    adapter = sft.plan(sft_recipe(folder))
    # per layer: 4 projections of 16 x 16 and 3 of 16 x 32, with rank 4
    expected = 2 * 4 * (4 * (16 + 16) + 3 * (16 + 32))
    assert adapter["trained_parameters"] == expected
    assert adapter["parameters"] == int(str(whole["parameters"])) + expected
    assert int(str(adapter["memory_bytes"])) < int(str(whole["memory_bytes"]))
    assert "trained_parameters" not in whole
    sft.run(sft_recipe(folder, max_steps=1))
    further = sft.plan(sft_recipe(folder, model_name_or_path="lora", output_dir="next"))
    assert further["trained_parameters"] == expected


@pytest.mark.parametrize("more", [None, {}, {"use_dora": True}, {"load_in_4bit": True}])
def test_a_shape_alone_has_the_sizes_of_its_model(folder, more):
    config = ModelConfig("base")
    adapter = AdapterConfig() if more is None else AdapterConfig(**(LORA | more))
    shape = load_config(config)
    assert count_parameters(config, adapter, shape) == count_parameters(config, adapter)


def test_few_bits_take_less_room(folder):
    sizes = [
        count_parameters(ModelConfig("base"), config).weight_bytes
        for config in (
            AdapterConfig(use_peft=True),
            AdapterConfig(use_peft=True, load_in_8bit=True),
            AdapterConfig(use_peft=True, load_in_4bit=True),
        )
    ]
    assert sizes[0] > sizes[1] > sizes[2]
