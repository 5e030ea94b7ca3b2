import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from olmo_base.run.errors import UserError
from olmo_base.run.recipe import load_recipe
from open_instruct import preference
from open_instruct.logprobs import LabelLogprobs
from open_instruct.losses import dpo_loss
from tests.open_instruct.tiny import (
    assert_same_weights,
    kill_after_step,
    rows_of,
    save_tiny_model,
    tiny_olmo2,
    weights_of,
    write_pairs,
    write_recipe,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a tiny model and pairs."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    write_pairs(tmp_path / "train.jsonl")
    write_pairs(tmp_path / "held_out.jsonl", number=6)
    return tmp_path


KEYS = dict(
    stage="dpo",
    model_name_or_path="model",
    chat_template="tulu",
    dataset_mixer=[{"path": "train.jsonl"}],
    eval_dataset_mixer=[{"path": "held_out.jsonl"}],
    max_length=64,
    beta=0.5,
    learning_rate=2e-3,
    per_device_train_batch_size=8,
    num_train_epochs=4,
    logging_steps=1,
    save_steps=5,
    output_dir="run",
)


def recipe_of(folder: Path, **changes) -> preference.PreferenceRecipe:
    path = write_recipe(folder / f"{changes.get('output_dir', 'run')}.yaml", **(KEYS | changes))
    return load_recipe(preference.PreferenceRecipe, path)


def test_an_unchanged_policy_costs_log_two_and_prefers_neither(folder):
    run = preference.run(recipe_of(folder, num_train_epochs=1))
    first = rows_of(run.path / "metrics.jsonl")[0]
    assert first["step"] == 0
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["eval_accuracy"] == 0.5  # exactly: the same batches give the same bits
    assert first["eval_reward_margin"] == 0.0


def test_a_tiny_model_learns_what_is_preferred(folder):
    run = preference.run(recipe_of(folder, num_train_epochs=8))
    last = rows_of(run.path / "metrics.jsonl")[-1]
    assert last["eval_loss"] < 0.1
    assert last["eval_accuracy"] == 1.0
    assert last["eval_reward_margin"] > 2
    assert last["eval_reward_chosen"] - last["eval_reward_rejected"] == pytest.approx(
        last["eval_reward_margin"], abs=1e-4
    )
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["examples"]["used"] == 24 and manifest["status"] == "finished"
    generation = json.loads((run.path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [256]
    assert (run.path / "chat_template.jinja").exists()


def test_label_smoothing_holds_the_margin_back(folder):
    sharp = preference.run(recipe_of(folder, output_dir="sharp"))
    smooth = preference.run(recipe_of(folder, output_dir="smooth", label_smoothing=0.3))
    margins = [
        rows_of(run.path / "metrics.jsonl")[-1]["eval_reward_margin"] for run in (sharp, smooth)
    ]
    assert 0 < margins[1] < margins[0]


# ---------------------------------------------------------------- against TRL


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """TRL's own trainer on a tiny model, with its sigmoid loss."""
    folder = tmp_path_factory.mktemp("trl")
    save_tiny_model(folder / "model")
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=DPOConfig(
            output_dir=str(folder),
            beta=0.3,
            loss_type=["sigmoid"],
            precompute_ref_log_probs=True,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )


def test_loss_and_gradients_equal_trl_on_random_log_probabilities(trl_trainer, folder):
    recipe = recipe_of(folder)
    encoder = preference.load_chat_encoder("model", "tulu")
    examples = preference.pair_examples(
        recipe.data.dataset_mixer, encoder, recipe, preference.ExampleCounts(), []
    )
    numbers = [3, 0, 9, 14]
    batch = examples.batch(numbers)
    reference_42 = torch.randn(4, 2, generator=torch.Generator().manual_seed(3)) * 3 - 50

    # TRL's batches hold all chosen answers before all rejected ones.
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    is_label = torch.zeros_like(batch.ids_RT)
    is_label.view(-1)[batch.label_positions_L + 1] = 1
    positions_T = torch.arange(batch.ids_RT.shape[1])
    theirs = trl_trainer.model.train()
    theirs.zero_grad()
    their_loss = trl_trainer.compute_loss(
        theirs,
        {
            "input_ids": batch.ids_RT[order],
            "attention_mask": (positions_T < batch.lengths_R[order, None]).long(),
            "completion_mask": is_label[order],
            "ref_chosen_logps": reference_42[:, 0],
            "ref_rejected_logps": reference_42[:, 1],
        },
    )
    their_loss.backward()

    model = tiny_olmo2()
    reference_P2 = torch.zeros(len(examples), 2)
    reference_P2[numbers] = reference_42
    sums = preference.loss_against(reference_P2, 0.3, 0.0)(LabelLogprobs(model), batch)
    (sums["loss"] / 4).backward()

    assert their_loss.item() > 0.1
    torch.testing.assert_close(sums["loss"] / 4, their_loss, atol=1e-6, rtol=1e-5)
    for (name, ours), (_, weight) in zip(
        model.named_parameters(), theirs.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, weight.grad, atol=1e-6, rtol=1e-4, msg=name)
    latest = {name: values[-1] for name, values in trl_trainer._metrics["train"].items()}
    assert sums["accuracy"].item() / 4 == latest["rewards/accuracies"]
    assert sums["reward_margin"].item() / 4 == pytest.approx(latest["rewards/margins"], abs=1e-4)
    assert sums["reward_chosen"].item() / 4 == pytest.approx(latest["rewards/chosen"], abs=1e-4)


# ---------------------------------------------------------------- stopping and going on


def test_a_killed_run_ends_with_the_same_bits_as_one_never_killed(folder):
    preference.run(recipe_of(folder, output_dir="whole", num_train_epochs=30))
    recipe = recipe_of(folder, num_train_epochs=30)
    kill_after_step(folder / "run.yaml", folder / "run", step=13)
    # Even if the reference is lost: it comes from the starting weights, not the checkpoint's.
    (folder / "run" / preference.REFERENCE_FILE).unlink()
    preference.run(recipe)
    log = (folder / "run" / "train.log").read_text()
    assert "going on from" in log
    assert_same_weights(weights_of(folder / "run"), weights_of(folder / "whole"))
    assert_same_weights(reference_file(folder / "run")[0], reference_file(folder / "whole")[0])


# ---------------------------------------------------------------- reference log-probabilities


def reference_file(run: Path):
    """The log-probabilities kept in a run's folder, and their key."""
    with safe_open(run / preference.REFERENCE_FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["key"]  # noqa: SIM118


def test_reference_logprobs_are_those_of_the_starting_weights(folder):
    recipe = recipe_of(folder)
    run = preference.run(recipe)
    kept, _ = reference_file(run.path)
    encoder = preference.load_chat_encoder("model", "tulu")
    examples = preference.pair_examples(
        recipe.data.dataset_mixer, encoder, recipe, preference.ExampleCounts(), []
    )
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    for number in (0, 5, 23):
        for side in (0, 1):
            batch = examples.batch([number])
            length = int(batch.lengths_R[side])
            ids_T = batch.ids_RT[side, :length]
            with torch.no_grad():
                logprobs_TV = model(ids_T[None]).logits[0, :-1].log_softmax(-1)
            per_token = logprobs_TV.gather(-1, ids_T[1:, None]).squeeze(-1)
            places = batch.label_positions_L[batch.label_rows_L == side]
            expected = per_token[places - side * batch.ids_RT.shape[1]].sum()
            torch.testing.assert_close(kept["train"][number, side], expected, atol=1e-4, rtol=0)


def change_model(folder):
    weights = weights_of(folder / "model")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})


def change_data(folder):
    text = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(text.replace("abab", "abba", 1))


def change_held_out_data(folder):
    text = (folder / "held_out.jsonl").read_text()
    (folder / "held_out.jsonl").write_text(text.replace("abab", "abba", 1))


def change_template(folder):
    template = preference.find_template("tulu").read_text()
    (folder / "own.jinja").write_text(
        template.replace("'<|user|>", "'U<|user|>").replace(
            "'<|' + message['role']", "'U<|' + message['role']"
        )
    )
    return {"chat_template": "own.jinja"}


def change_tokenizer(folder):
    path = folder / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))


def change_attention(folder):
    return {"attn_implementation": "eager"}


@pytest.mark.parametrize(
    "change",
    [
        change_model,
        change_data,
        change_held_out_data,
        change_template,
        change_tokenizer,
        change_attention,
    ],
)
def test_a_stale_reference_is_never_used(folder, change):
    preference.run(recipe_of(folder, max_steps=1))
    _, old_key = reference_file(folder / "run")

    changed = change(folder) or {}
    keys = dict(max_steps=1, output_dir="fresh") | changed
    preference.run(recipe_of(folder, **keys))
    expected, new_key = reference_file(folder / "fresh")
    assert new_key != old_key

    # The old file lies where the new run looks for its own.
    preference.run(
        recipe_of(folder, **(keys | dict(output_dir="other", max_steps=2, save_steps=1)))
    )
    unfinish(folder / "other")
    shutil.copy(
        folder / "run" / preference.REFERENCE_FILE, folder / "other" / preference.REFERENCE_FILE
    )
    preference.run(
        recipe_of(folder, **(keys | dict(output_dir="other", max_steps=2, save_steps=1)))
    )
    found, found_key = reference_file(folder / "other")
    assert found_key == new_key
    assert_same_weights(found, expected)


def unfinish(run: Path) -> None:
    """Put a finished run back to where it was before its last act."""
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_damaged_reference_file_is_computed_again(folder, content):
    recipe = recipe_of(folder, max_steps=1)
    preference.run(recipe)
    path = folder / "run" / preference.REFERENCE_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] if content is None else content)
    unfinish(folder / "run")
    preference.run(recipe)
    assert path.read_bytes() == whole


def test_the_kept_reference_is_read_again(folder):
    recipe = recipe_of(folder, max_steps=1)
    preference.run(recipe)
    unfinish(folder / "run")
    preference.run(recipe)
    assert "reference log-probabilities read from" in (folder / "run" / "train.log").read_text()


# ---------------------------------------------------------------- before training


def test_a_plan_counts_both_answers_and_writes_nothing(folder):
    recipe = recipe_of(folder)
    before = sorted(folder.rglob("*"))
    figures = preference.plan(recipe)
    assert sorted(folder.rglob("*")) == before
    assert figures["examples"] == {"used": 24, "truncated": 0, "dropped": {}}
    assert figures["steps"] == 12
    encoder = preference.load_chat_encoder("model", "tulu")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    tokens = sum(
        len(
            encoder.encode_dialogue(
                [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row[side]},
                ]
            ).ids
        )
        for row in rows
        for side in ("chosen", "rejected")
    )
    assert figures["tokens"] == tokens


def test_a_model_without_template_says_what_to_do(folder):
    with pytest.raises(UserError, match="chat_template"):
        preference.run(recipe_of(folder, chat_template=None))


def test_sums_over_pairs_by_hand():
    # margins with beta 1/2: ln 3, 0 and -1
    policy_B2 = torch.tensor([[2 * math.log(3), 0.0], [1.0, 1.0], [0.0, 2.0]])
    sums = preference.preference_sums(policy_B2, torch.zeros(3, 2), 0.5, 0.0)
    assert sums["accuracy"].item() == 1.5
    assert sums["reward_margin"].item() == pytest.approx(math.log(3) - 1)
    assert sums["reward_chosen"].item() == pytest.approx(math.log(3) + 0.5)
    torch.testing.assert_close(sums["loss"], dpo_loss(policy_B2, torch.zeros(3, 2), 0.5))
