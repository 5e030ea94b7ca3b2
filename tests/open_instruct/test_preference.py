import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from olmo_base.run.artefact import ExampleCounts
from olmo_base.run.errors import UserError
from olmo_base.run.recipe import load_recipe
from open_instruct import preference
from open_instruct.batches import Examples
from open_instruct.control_tokens import Encoded
from open_instruct.encode import EncodedRated, find_template, load_chat_encoder
from open_instruct.logprobs import LabelLogprobs
from open_instruct.loop import Totals, Workers, add_gradients, settle
from open_instruct.losses import dpo_loss, odds_ratio_loss
from open_instruct.pair_losses import LossConfig, PairScores
from open_instruct.reference import REFERENCE_FILE, answer_logprobs
from open_instruct.tokenised import DataReport
from tests.open_instruct.tiny import (
    assert_same_weights,
    kill_after_step,
    random_step,
    rows_of,
    save_tiny_model,
    tiny_olmo2,
    weights_of,
    write_jsonl,
    write_pairs,
    write_rated,
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
            use_weighting=True,  # for WPO; each test says whether the loss takes the weights
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


SHARED_WITH_TRL = [  # our loss_type and keys, TRL's
    (dict(loss_type="sigmoid", beta=0.3), ["sigmoid"]),
    (dict(loss_type="dpo_norm", beta=5.0), ["sigmoid_norm"]),
    (dict(loss_type="ipo", beta=0.2), ["ipo"]),
    (dict(loss_type="hinge", beta=0.05), ["hinge"]),
    (dict(loss_type="robust", beta=0.3, label_smoothing=0.2), ["robust"]),
    (dict(loss_type="apo_zero", beta=0.1), ["apo_zero"]),
    (dict(loss_type="apo_down", beta=0.1), ["apo_down"]),
    (dict(loss_type="wpo", beta=0.3), ["sigmoid"]),
    (
        dict(loss_type=("hinge", "apo_zero"), beta=0.1, loss_weights=(0.7, 2.0)),
        ["hinge", "apo_zero"],
    ),
    (dict(loss_type="dpo_norm", beta=5.0, rpo_alpha=0.3), ["sigmoid_norm", "sft"]),
]


@pytest.mark.parametrize("keys, their_names", SHARED_WITH_TRL)
def test_loss_and_gradients_equal_trl_on_random_log_probabilities(
    trl_trainer, folder, keys, their_names
):
    loss = LossConfig(**keys)
    trl_trainer.loss_types, trl_trainer.beta = their_names, loss.beta_in_use
    trl_trainer.loss_weights = list(loss.loss_weights or [1.0])
    if loss.rpo_alpha is not None:
        trl_trainer.loss_weights.append(loss.rpo_alpha)
    trl_trainer.label_smoothing = loss.label_smoothing
    trl_trainer.use_weighting = "wpo" in loss.names

    recipe = recipe_of(folder)
    encoder = load_chat_encoder("model", "tulu")
    examples = preference.pair_examples(
        recipe.data.dataset_mixer, encoder, recipe, ExampleCounts(), DataReport()
    )
    # TRL adds the chosen answers' mean over all tokens: ours, where they are of one length.
    numbers = [3, 0, 9, 14] if loss.rpo_alpha is None else [0, 7, 14, 21]
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
    sums = preference.loss_against(reference_P2, loss)(LabelLogprobs(model), batch)
    (sums["loss"] / 4).backward()

    assert abs(their_loss.item()) > 0.01
    torch.testing.assert_close(sums["loss"] / 4, their_loss, atol=1e-6, rtol=1e-5)
    for (name, ours), (_, weight) in zip(
        model.named_parameters(), theirs.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, weight.grad, atol=1e-6, rtol=1e-4, msg=name)
    if loss.names == ("sigmoid",):
        latest = {name: values[-1] for name, values in trl_trainer._metrics["train"].items()}
        assert sums["accuracy"].item() / 4 == latest["rewards/accuracies"]
        assert sums["reward_margin"].item() / 4 == pytest.approx(
            latest["rewards/margins"], abs=1e-4
        )
        assert sums["reward_chosen"].item() / 4 == pytest.approx(latest["rewards/chosen"], abs=1e-4)


@pytest.mark.parametrize("is_whole_step", [True, False])
def test_kto_equals_trl_where_a_step_is_one_micro_batch(folder, is_whole_step):
    rows = [
        {"prompt": f"say {place}?", "completion": "ab" * (place + 1), "label": place % 3 != 0}
        for place in range(4)
    ]
    trainer = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained("model"),
        ref_model=tiny_olmo2(seed=9),  # another model, so that z_0 is not 0
        args=KTOConfig(
            output_dir="kto",
            beta=0.2,
            desirable_weight=1.5,
            undesirable_weight=0.7,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained("model"),
    )
    (inputs,) = trainer.get_train_dataloader()
    theirs = trainer.model
    assert theirs is not None
    theirs.train()
    their_loss = trainer.compute_loss(theirs, dict(inputs))
    their_loss.backward()

    def examples_of(prefix):
        lengths = inputs[f"{prefix}attention_mask"].sum(1).tolist()
        sides = (inputs[f"{prefix}input_ids"], inputs[f"{prefix}completion_mask"])
        return Examples(
            [
                (Encoded(ids[:length].tolist(), mask[:length].bool().tolist()),)
                for ids, mask, length in zip(*sides, lengths, strict=True)
            ]
        )

    is_desirable_P = torch.as_tensor(inputs["label"], dtype=torch.bool)
    rated = preference.RatedExamples(examples_of(""), examples_of("KL_"), is_desirable_P)
    reference = LabelLogprobs(tiny_olmo2(seed=9))
    with torch.no_grad():
        own, other = (
            answer_logprobs(reference, part.batch(range(4)), 1)[:, 0]
            for part in (rated.answers, rated.mismatched)
        )
    config = LossConfig(loss_type="kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.7)
    loss = preference.rated_loss_against(own, other, rated, config)
    model = LabelLogprobs(tiny_olmo2())
    cuts = [[0, 1, 2, 3]] if is_whole_step else [[0], [1, 2], [3]]  # z_0 is the step's, not theirs
    batches = [rated.answers.batch(numbers) for numbers in cuts]
    totals = Totals()
    workers = Workers(False)
    add_gradients(workers, model, batches, 4, settle(loss, model, batches, 4, workers), totals)

    assert totals.sums["kl"].item() / 4 == pytest.approx(
        trainer._metrics["train"]["kl"][-1], rel=1e-4
    )
    assert totals.sums["kl"] > 0.1
    assert totals.sums["loss"].item() / 4 == pytest.approx(their_loss.item(), abs=1e-6)
    for (name, ours), (_, weight) in zip(
        model.model.named_parameters(), theirs.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, weight.grad, atol=1e-6, rtol=1e-4, msg=name)


# ---------------------------------------------------------------- the family, from end to end


@pytest.mark.parametrize(
    "keys",
    [
        dict(loss_type="dpo_norm", beta=5.0, rpo_alpha=0.1),
        dict(loss_type="ipo"),
        dict(loss_type="hinge"),
        dict(loss_type="robust", label_smoothing=0.1),
        dict(loss_type="apo_zero"),
        dict(loss_type="apo_down"),
        dict(loss_type="wpo"),
        dict(loss_type="simpo", simpo_gamma=0.3),
        dict(loss_type="orpo"),
        dict(loss_type="cpo", cpo_alpha=0.5),
        dict(loss_type=["sigmoid", "hinge"], loss_weights=[1.0, 0.2]),
    ],
)
def test_every_loss_teaches_a_tiny_model_what_is_preferred(folder, keys):
    run = preference.run(recipe_of(folder, **(dict(beta=None, num_train_epochs=8) | keys)))
    rows = rows_of(run.path / "metrics.jsonl")
    assert rows[-1]["eval_accuracy"] > 0.8
    assert rows[-1]["eval_reward_margin"] > rows[0]["eval_reward_margin"]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    has_reference = keys["loss_type"] not in ("simpo", "orpo", "cpo")
    assert (run.path / REFERENCE_FILE).exists() == has_reference


def test_the_added_likelihood_is_the_mean_over_the_chosen_answers_tokens():
    policy_B2 = torch.tensor([[-8.0, -9.0], [-3.0, -1.0]])
    num_tokens_B2 = torch.tensor([[4.0, 2.0], [2.0, 5.0]])
    pairs = PairScores(policy_B2, num_tokens_B2, torch.zeros(2, 2))

    def total(**keys):
        return preference.preference_sums(pairs, LossConfig(**keys))["loss"].item()

    likelihood = 8 / 4 + 3 / 2
    plain = total(beta=0.5)
    assert total(beta=0.5, rpo_alpha=0.3) == pytest.approx(plain + 0.3 * likelihood)
    cpo = dpo_loss(policy_B2, torch.zeros(2, 2), 0.5).item()
    assert total(loss_type="cpo", beta=0.5) == pytest.approx(cpo + likelihood)
    assert total(loss_type="cpo", beta=0.5, cpo_alpha=0.0) == pytest.approx(cpo)
    odds = odds_ratio_loss(policy_B2 / num_tokens_B2, 0.5).item()
    assert total(loss_type="orpo", beta=0.5) == pytest.approx(odds + likelihood)


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(loss_type="sigmoi"), "loss_type.*Did you mean sigmoid"),
        (dict(loss_type="sigmoid_norm"), "loss_type.*Did you mean dpo_norm"),
        (dict(loss_type=[]), "at least one"),
        (dict(loss_type=["ipo", "ipo"]), "none of them twice"),
        (dict(loss_type=["kto", "ipo"]), "cannot be added"),
        (dict(loss_type="ipo", loss_weights=[1.0, 2.0]), "loss_weights.*2 weights for 1"),
        (dict(loss_type="ipo", loss_weights=[0.0]), "loss_weights.*above 0"),
        (dict(loss_type="ipo", label_smoothing=0.1), "label_smoothing.*ipo does not use it"),
        (dict(loss_type="sigmoid", simpo_gamma=0.0), "simpo_gamma.*sigmoid does not use it"),
        (dict(loss_type="orpo", rpo_alpha=1.0), "rpo_alpha.*orpo does not use it"),
        (dict(loss_type="sigmoid", cpo_alpha=1.0), "cpo_alpha.*cpo would"),
        (dict(loss_type="sigmoid", desirable_weight=1.0), "desirable_weight.*kto would"),
        (dict(loss_type="kto", label_smoothing=0.1), "label_smoothing.*kto does not use it"),
        (dict(loss_type="robust"), "label_smoothing.*robust needs"),
        (dict(loss_type=["sigmoid", "dpo_norm"], beta=None), "beta.*0.1 for sigmoid, 5 for"),
    ],
)
def test_a_key_that_the_loss_does_not_use_is_refused(folder, keys, words):
    with pytest.raises(UserError, match=words):
        recipe_of(folder, **keys)


# ---------------------------------------------------------------- rated answers


def test_kto_teaches_a_tiny_model_good_from_bad(folder):
    write_rated(folder / "train.jsonl")
    write_rated(folder / "held_out.jsonl", number=7)
    run = preference.run(recipe_of(folder, loss_type="kto", num_train_epochs=12))
    rows = rows_of(run.path / "metrics.jsonl")
    assert rows[0]["eval_loss"] == pytest.approx(0.5, abs=1e-5)  # nothing gained: 1 - 1/2
    assert rows[0]["eval_kl"] == pytest.approx(0.0, abs=1e-5)
    assert rows[-1]["eval_loss"] < 0.3 and rows[-1]["eval_accuracy"] == 1.0
    with safe_open(run.path / REFERENCE_FILE, framework="pt") as file:
        names = set(file.keys())
    assert names == {"train", "train, mismatched", "held out", "held out, mismatched"}
    assert "12 answers are good, 12 bad" in (run.path / "train.log").read_text()


def test_every_prompt_meets_the_answer_to_another_one():
    for number in (2, 3, 17):
        partners = preference.mismatched_partners(number, seed=1)
        assert sorted(partners) == list(range(number))
        assert all(place != partner for place, partner in enumerate(partners))
    assert preference.mismatched_partners(17, 1) != preference.mismatched_partners(17, 2)


def test_a_mismatched_answer_is_scored_behind_the_prompt_it_does_not_belong_to():
    one = EncodedRated(Encoded([1, 2, 3, 4], [False, False, True, True]), 2, True)
    two = EncodedRated(Encoded([5, 6, 7, 8, 9], [False] * 3 + [True] * 2), 3, False)
    assert preference.with_answer_of(one, two, 9) == Encoded([1, 2, 8, 9], [False] * 2 + [True] * 2)
    assert preference.with_answer_of(two, one, 4) == Encoded([5, 6, 7, 3], [False] * 3 + [True])


def test_pairs_are_refused_where_ratings_are_needed(folder):
    with pytest.raises(UserError, match="missing key 'completion', 'label'"):
        preference.run(recipe_of(folder, loss_type="kto"))


def test_one_rated_answer_is_not_enough(folder):
    write_rated(folder / "train.jsonl", number=1)
    with pytest.raises(UserError, match="at least 2"):
        preference.run(recipe_of(folder, loss_type="kto"))


# ---------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize("share_prompts", [True, False])
def test_a_killed_run_ends_with_the_same_bits_as_one_never_killed(folder, share_prompts):
    keys = dict(num_train_epochs=30, share_prompts=share_prompts, gradient_accumulation_steps=2)
    preference.run(recipe_of(folder, output_dir="whole", **keys))
    recipe = recipe_of(folder, **keys)
    kill_after_step(
        folder / "run.yaml", folder / "run", step=random.Random("preference").randrange(10, 50)
    )
    # Even if the reference is lost: it comes from the starting weights, not the checkpoint's.
    (folder / "run" / REFERENCE_FILE).unlink()
    preference.run(recipe)
    log = (folder / "run" / "train.log").read_text()
    assert "going on from" in log
    assert_same_weights(weights_of(folder / "run"), weights_of(folder / "whole"))
    assert_same_weights(reference_file(folder / "run")[0], reference_file(folder / "whole")[0])


def test_a_killed_run_of_kto_on_an_adapter_ends_with_the_same_bits(folder):
    write_rated(folder / "train.jsonl")
    write_rated(folder / "held_out.jsonl", number=6)
    keys = dict(loss_type="kto", num_train_epochs=30, gradient_accumulation_steps=2)
    keys |= dict(use_peft=True, lora_r=4, lora_dropout=0.2, learning_rate=1e-2)
    preference.run(recipe_of(folder, output_dir="whole", **keys))
    recipe = recipe_of(folder, **keys)
    kill_after_step(folder / "run.yaml", folder / "run", step=random_step("kto"))
    preference.run(recipe)
    assert "going on from" in (folder / "run" / "train.log").read_text()
    found, expected = (load_file(f"{name}/adapter_model.safetensors") for name in ("run", "whole"))
    assert_same_weights(found, expected)


# ---------------------------------------------------------------- prompts read once


def log_of(run: Path) -> str:
    return (run / "train.log").read_text()


def test_shared_prompts_change_what_is_read_and_nothing_else(folder):
    runs = {
        word: preference.run(recipe_of(folder, output_dir=str(word), share_prompts=word)).path
        for word in ("auto", True, False)
    }
    assert_same_weights(weights_of(runs["auto"]), weights_of(runs[True]))
    assert "both answers share their prompt" in log_of(runs["auto"])
    assert "prompts are" not in log_of(runs[False])
    assert "share their prompt" not in log_of(runs[False])
    shared, apart = (rows_of(runs[word] / "metrics.jsonl") for word in (True, False))
    assert len(shared) == len(apart) > 10
    for ours, theirs in zip(shared, apart, strict=True):
        for key in ("loss", "eval_loss", "reward_margin", "eval_accuracy", "tokens", "grad_norm"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-3), key
    kept, _ = reference_file(runs[True])
    twice, _ = reference_file(runs[False])
    for name in twice:
        torch.testing.assert_close(kept[name], twice[name], atol=1e-4, rtol=0)


def test_a_model_that_cannot_share_is_named_or_refused(folder):
    shape: dict[str, Any] = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config = MistralConfig(
        **shape, vocab_size=261, num_key_value_heads=2, eos_token_id=256, sliding_window=8
    )
    MistralForCausalLM(config).save_pretrained(folder / "model")
    run = preference.run(recipe_of(folder, max_steps=1))
    assert "prompts are read twice: its attention reaches back 8 tokens" in log_of(run.path)
    with pytest.raises(UserError, match=r"share_prompts: true.*reaches back 8 tokens.*auto"):
        preference.run(recipe_of(folder, output_dir="other", max_steps=1, share_prompts=True))


def test_prompts_are_shared_by_themselves_only_where_that_saves_enough(folder):
    rows = [
        {"prompt": "?", "chosen": "ab" * 50, "rejected": "12" * (50 + place)} for place in range(4)
    ]
    write_jsonl(folder / "train.jsonl", rows)
    keys = dict(max_steps=1, max_length=256, eval_dataset_mixer=[])
    save_tiny_model(folder / "model", max_position_embeddings=512)
    run = preference.run(recipe_of(folder, **keys))
    assert "to share them would save" in log_of(run.path)
    run = preference.run(recipe_of(folder, output_dir="other", share_prompts=True, **keys))
    assert "both answers share their prompt" in log_of(run.path)


def test_single_answers_have_no_prompt_to_share(folder):
    write_rated(folder / "train.jsonl")
    keys = dict(loss_type="kto", eval_dataset_mixer=[])
    with pytest.raises(UserError, match=r"share_prompts.*single answers"):
        recipe_of(folder, share_prompts=True, **keys)
    run = preference.run(recipe_of(folder, max_steps=1, **keys))
    assert "share" not in log_of(run.path)


# ---------------------------------------------------------------- reference log-probabilities


def reference_file(run: Path):
    """The log-probabilities kept in a run's folder, and their key."""
    with safe_open(run / REFERENCE_FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["key"]  # noqa: SIM118


def test_reference_logprobs_are_those_of_the_starting_weights(folder):
    recipe = recipe_of(folder)
    run = preference.run(recipe)
    kept, _ = reference_file(run.path)
    encoder = load_chat_encoder("model", "tulu")
    examples = preference.pair_examples(
        recipe.data.dataset_mixer, encoder, recipe, ExampleCounts(), DataReport()
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
            places = batch.label_positions_L[batch.label_sequences_L == side]
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
    template = find_template("tulu").read_text()
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


def change_sharing(folder):
    return {"share_prompts": False}


@pytest.mark.parametrize(
    "change",
    [
        change_model,
        change_data,
        change_held_out_data,
        change_template,
        change_tokenizer,
        change_attention,
        change_sharing,
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
    shutil.copy(folder / "run" / REFERENCE_FILE, folder / "other" / REFERENCE_FILE)
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
    path = folder / "run" / REFERENCE_FILE
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
    encoder = load_chat_encoder("model", "tulu")
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
    read = figures["tokens_with_shared_prompts"]
    assert isinstance(read, int) and tokens / 2 < read < tokens
    apart = preference.plan(recipe_of(folder, share_prompts=False))
    assert "tokens_with_shared_prompts" not in apart and apart["tokens"] == tokens
    assert int(str(figures["memory_bytes"])) < int(str(apart["memory_bytes"]))


def test_a_model_without_template_says_what_to_do(folder):
    with pytest.raises(UserError, match="chat_template"):
        preference.run(recipe_of(folder, chat_template=None))


def test_sums_over_pairs_by_hand():
    # margins with beta 1/2: ln 3, 0 and -1
    policy_B2 = torch.tensor([[2 * math.log(3), 0.0], [1.0, 1.0], [0.0, 2.0]])
    pairs = PairScores(policy_B2, torch.ones(3, 2), torch.zeros(3, 2))
    sums = preference.preference_sums(pairs, LossConfig(beta=0.5))
    assert sums["accuracy"].item() == 1.5
    assert sums["reward_margin"].item() == pytest.approx(math.log(3) - 1)
    assert sums["reward_chosen"].item() == pytest.approx(math.log(3) + 0.5)
    torch.testing.assert_close(sums["loss"], dpo_loss(policy_B2, torch.zeros(3, 2), 0.5))
