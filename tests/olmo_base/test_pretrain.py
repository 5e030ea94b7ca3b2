"""Pretraining: against transformers, cut in many ways, killed at random steps, with bad input."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from olmo_base.__main__ import main
from olmo_base.corpus.batches import Mixture, micro_batches
from olmo_base.corpus.documents import DocumentSource
from olmo_base.corpus.tokenize import TokenizeRecipe
from olmo_base.corpus.tokenize import run as tokenize
from olmo_base.model.hf_weights import export_hf, load_native
from olmo_base.model.presets import ModelShape
from olmo_base.model.transformer import EndsInit, Transformer
from olmo_base.optim import learning_rate_at
from olmo_base.pretrain import computes_in_bf16, plan, run
from olmo_base.pretrain_loop import add_gradients
from olmo_base.pretrain_recipe import (
    PretrainRecipe,
    model_config,
    num_steps,
    open_corpus,
    read_in_step,
)
from olmo_base.run.artefact import RunConfig
from olmo_base.run.errors import UserError
from olmo_base.run.launch import seed_everything
from olmo_base.run.recipe import load_recipe, recipe_to_yaml
from olmo_base.tokenizer import TokenizerRecipe, load_tokenizer
from olmo_base.tokenizer import run as train_tokenizer

PROJECT = Path(__file__).parents[2]
TIMES = {"seconds", "tokens_per_second", "mfu"}  # what two equal runs may differ in


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """The output of a tokenize run over small documents, a tenth held out."""
    folder = tmp_path_factory.mktemp("tokens")
    generator = random.Random(1)
    words = ["red", "blue", "cat", "dog", "sees", "likes", "the", "a", "and", "été"]
    texts = [" ".join(generator.choices(words, k=generator.randrange(3, 40))) for _ in range(400)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "documents.jsonl").write_text(lines)
    source = (DocumentSource(str(folder / "documents.jsonl")),)
    tokenizer = RunConfig(str(folder / "tokenizer"))
    train_tokenizer(TokenizerRecipe("tokenizer", source, tokenizer, vocab_size=290))
    shards = RunConfig(str(folder / "tokens"))
    tokenize(TokenizeRecipe("tokenize", tokenizer.output_dir, source, shards, eval_fraction=0.1))
    return folder / "tokens"


def recipe_file(tokens, folder, **keys) -> Path:
    """A recipe of a model of 30,000 parameters, in a file of its own."""
    settings = {
        "stage": "pretrain",
        "dataset_mixer": [{"path": str(tokens)}],
        "output_dir": str(folder / "run"),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_length": 16,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "logging_steps": 4,
        "bf16": False,
        **keys,
    }
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))
    return path


def recipe_for(tokens, folder, **keys) -> PretrainRecipe:
    return load_recipe(PretrainRecipe, recipe_file(tokens, folder, **keys))


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(rows):
    return [{key: row[key] for key in row if key not in TIMES} for row in rows]


# ---------------------------------------------------------------- the arithmetic of a step


@pytest.mark.parametrize("mask", [False, True])
def test_a_step_cut_six_ways_gives_the_same_gradients(tokens, tmp_path, mask):
    recipe = recipe_for(tokens, tmp_path)
    corpus = open_corpus(recipe, verify=True)
    torch.manual_seed(0)
    model = Transformer(model_config(recipe, corpus))

    def gradients(size, accumulation):
        batches = micro_batches(
            corpus.train,
            range(3 * size * accumulation, 4 * size * accumulation),
            micro_batch_size=size,
            seed=5,
            mask=mask,
        )
        model.zero_grad()
        loss = add_gradients(model, batches, z_loss=1e-3, bf16=False)
        return loss, [
            parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
        ]

    whole_loss, whole = gradients(12, 1)
    scale = max(gradient.abs().max() for gradient in whole)
    for size, accumulation in ((6, 2), (4, 3), (3, 4), (2, 6), (1, 12)):
        loss, cut = gradients(size, accumulation)
        torch.testing.assert_close(loss, whole_loss)
        for one, other in zip(cut, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * max(1.0, float(scale)))


def test_the_whole_run_is_that_of_a_plain_loop_over_transformers(tokens, tmp_path):
    recipe = recipe_for(tokens, tmp_path, z_loss=1e-3, max_grad_norm=0.5, weight_decay=0.3)
    corpus = open_corpus(recipe, verify=True)
    seed_everything(recipe.run.seed)
    ours = Transformer(model_config(recipe, corpus))
    peer = AutoModelForCausalLM.from_pretrained(export_hf(ours, tmp_path / "start"))
    embedding = peer.get_input_embeddings().weight
    rest = [parameter for parameter in peer.parameters() if parameter is not embedding]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 0.3}, {"params": [embedding], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        foreach=False,
    )
    for step in range(12):
        (batch,) = micro_batches(
            corpus.train,
            range(8 * step, 8 * step + 8),
            micro_batch_size=8,
            seed=42,
            mask=False,
        )
        logits = peer(input_ids=batch.ids_BT).logits.flatten(0, 1)
        loss = F.cross_entropy(logits, batch.labels_BT.flatten())
        (loss + 1e-3 * logits.logsumexp(-1).square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, 12, recipe.optim)
        optimizer.step()
        optimizer.zero_grad()
    folder = run(recipe).path
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, expected in peer.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5, msg=name)


# ---------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def finished(tokens, tmp_path_factory):
    """A finished run of 60 steps, evaluated every 20."""
    recipe = recipe_for(tokens, tmp_path_factory.mktemp("run"), max_steps=60, eval_steps=20)
    run(recipe)
    return recipe


def test_the_loss_begins_at_chance_and_falls(finished, tokens):
    rows = rows_of(Path(finished.run.output_dir))
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in held_out] == [0, 20, 40, 60]
    assert [row["step"] for row in rows if "loss" in row] == list(range(4, 61, 4))
    vocab_size = json.loads((Path(finished.run.output_dir) / "config.json").read_text())[
        "vocab_size"
    ]
    assert vocab_size == 384  # 290 rounded up to a multiple of 128
    assert held_out[0]["eval_loss"] == pytest.approx(math.log(384), abs=0.1)
    bits = [row["eval_bits_per_byte"] for row in held_out]
    assert bits == sorted(bits, reverse=True)
    assert losses[-1] < 0.6 * losses[0]
    last = rows[-2]
    assert last["tokens"] == 60 * 8 * 16
    num_sequences = len(open_corpus(finished, verify=False).train)
    assert last["epoch"] == pytest.approx(60 * 8 / num_sequences, abs=1e-4)
    assert last["learning_rate"] == pytest.approx(learning_rate_at(59, 60, finished.optim))


def test_the_artefact_is_a_hugging_face_folder(finished):
    folder = Path(finished.run.output_dir)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 16
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    ids = torch.tensor([load_tokenizer(folder).encode("the cat sees a dog").ids])
    native = load_native(folder)
    with torch.no_grad():
        torch.testing.assert_close(
            native.logits(native(ids)), model(input_ids=ids).logits, rtol=0, atol=1e-5
        )
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["results"]["tokens"] == 60 * 8 * 16
    assert "held-out loss" in (folder / "README.md").read_text()


def test_held_out_figures_are_those_of_transformers(finished, tokens):
    folder = Path(finished.run.output_dir)
    model = AutoModelForCausalLM.from_pretrained(folder)
    corpus = open_corpus(finished, verify=False)
    assert corpus.held_out is not None
    batch = corpus.held_out.batch(range(len(corpus.held_out)), mask=False)
    with torch.no_grad():
        logits = model(input_ids=batch.ids_BT).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten()).item()
    row = rows_of(folder)[-1]
    assert row["eval_loss"] == pytest.approx(expected, rel=1e-5)
    sidecar = json.loads((tokens / "tokens" / "eval" / "tokens_00000.json").read_text())
    tokens_per_byte = sidecar["num_tokens"] / sidecar["num_bytes"]
    bits_per_byte = expected / math.log(2) * tokens_per_byte
    assert row["eval_bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-5)


def test_each_source_and_each_file_of_questions_is_scored_beside_the_whole(tokens, tmp_path):
    shutil.copytree(tokens, tmp_path / "other")
    question = {"context": "the red", "continuation": " cat"}
    row = {"doc_id": 0, "idx": 0, "label": 0, "request": question}
    (tmp_path / "likes.jsonl").write_text(json.dumps(row) + "\n")
    recipe = recipe_for(
        tokens,
        tmp_path,
        dataset_mixer=[{"path": str(tokens)}, {"path": str(tmp_path / "other")}],
        eval_requests=[str(tmp_path / "likes.jsonl")],
        eval_steps=4,
        max_steps=4,
    )
    run(recipe)
    first, last = (row for row in rows_of(tmp_path / "run") if "eval_loss" in row)
    for row in (first, last):  # the same text twice: each source's figures are those of the whole
        for key in ("eval_loss", "eval_bits_per_byte"):
            assert row[f"{key}/tokens"] == row[f"{key}/other"] == pytest.approx(row[key], rel=0.05)
        assert row["requests_accuracy/likes"] == 1.0  # of one answer
    assert last["requests_bits_per_byte/likes"] < first["requests_bits_per_byte/likes"]


def test_a_finished_run_is_not_done_again(finished):
    weights = Path(finished.run.output_dir) / "model.safetensors"
    time_written = weights.stat().st_mtime_ns
    assert run(finished).is_finished
    assert weights.stat().st_mtime_ns == time_written


def test_bf16_masked_documents_and_recomputation_learn_too(tokens, tmp_path, finished):
    recipe = recipe_for(
        tokens,
        tmp_path,
        max_steps=60,
        bf16=True,
        mask_documents=True,
        gradient_checkpointing=True,
        hidden_size=64,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    folder = run(recipe).path
    assert load_native(folder).dtype == torch.float32
    last = [row["loss"] for row in rows_of(folder) if "loss" in row][-1]
    assert last < 0.6 * math.log(384)


# ---------------------------------------------------------------- stopped and gone on


def start(recipe: Path, overrides=()) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "olmo_base", str(recipe), *overrides],
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Until metrics.jsonl tells of a step at or after this one."""
    while True:
        assert process.poll() is None, process.communicate()[1]
        path = folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.001)


LONG = {
    "max_steps": 140,
    "logging_steps": 1,
    "save_steps": 7,
    "eval_steps": 50,
    "per_device_train_batch_size": 16,
    "max_eval_tokens": 500,
}


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_killed_and_stopped_at_random_steps_the_weights_are_bit_identical(tokens, tmp_path, optim):
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = run(recipe_for(tokens, tmp_path / "whole", optim=optim, **LONG)).path
    recipe = recipe_file(tokens, tmp_path / "broken", optim=optim, **LONG)
    folder = tmp_path / "broken" / "run"
    generator = random.Random(optim)
    first, second = generator.randrange(10, 40), generator.randrange(45, 80)

    process = start(recipe)
    wait_for_step(process, folder, first)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    process = start(recipe)
    wait_for_step(process, folder, second)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 0
    assert "stopped by SIGTERM after step" in said
    assert "Traceback" not in said
    assert "going on from" in said
    stopped_at = int(said.split("after step ")[-1].split(",")[0])
    assert (folder / "checkpoints" / f"step_{stopped_at:06d}").is_dir()

    again = run(load_recipe(PretrainRecipe, recipe)).path
    expected = load_file(whole / "model.safetensors")
    found = load_file(again / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert without_times(rows_of(again)) == without_times(rows_of(whole))


def test_a_loss_that_stays_no_number_is_an_error_that_names_step_and_text(tokens, tmp_path, capsys):
    path = recipe_file(
        tokens,
        tmp_path,
        learning_rate=1e30,
        warmup_steps=0,
        lr_scheduler_type="constant",
        save_steps=1,
        logging_steps=1,
        max_grad_norm=0,
        z_loss=1.0,
        max_skipped_steps=2,
    )
    assert main([str(path)]) == 2
    message = capsys.readouterr().err
    assert "3 steps in a row were left out: loss or gradient was no finite number." in message
    found = re.search(r"Step (\d+) read (.*?) and \d+ more", message)
    assert found is not None
    step, read = int(found.group(1)), found.group(2)
    places = re.findall(r"\S+documents.jsonl, line (\d+)", read)
    assert len(places) == 3
    assert f"open-instruct data inspect {tmp_path / 'run'} --step {step}" in message
    rows = rows_of(tmp_path / "run")
    assert [row.get("skipped_steps") for row in rows if "grad_norm" in row][-2:] == [1, 2]
    kept = sorted(item.name for item in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept[-1] == f"step_{step - 1:06d}"
    assert kept[-1] in message
    weights = load_file(tmp_path / "run" / "checkpoints" / kept[-1] / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_what_a_step_read_is_what_its_batches_hold(tokens, tmp_path):
    recipe = recipe_for(tokens, tmp_path)
    corpus = open_corpus(recipe, verify=False)
    lines = (tokens.parent / "documents.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    tokenizer = load_tokenizer(tokens)
    batches = micro_batches(corpus.train, range(32, 40), micro_batch_size=8, seed=42, mask=False)
    for (_, places), ids in zip(
        read_in_step(recipe, corpus, 5), batches[0].ids_BT.tolist(), strict=True
    ):
        read = [texts[(place.line or 0) - 1] for place in places]
        whole = "\n".join(read)  # every end of text is a line's end here
        seen = tokenizer.decode(ids, skip_special_tokens=False).replace("<|endoftext|>", "\n")
        assert seen.strip("\n�") in whole


def test_batches_and_rows_that_begin_small_read_every_token_once_and_resume(tokens, tmp_path):
    warmup = {
        "batch_size_warmup_steps": 5,
        "batch_size_warmup_start": 2,
        "length_warmup_steps": 6,
        "length_warmup_start": 4,
    }
    recipe = recipe_for(tokens, tmp_path, **warmup, logging_steps=1, save_steps=4, max_steps=9)
    sizes = [2, 3, 4, 5, 6, 8, 8, 8, 8]  # 2 + 6 * step / 5, and whole from step 5 on
    corpus = open_corpus(recipe, verify=False)
    steps = [[index for index, _ in read_in_step(recipe, corpus, n)] for n in range(1, 10)]
    assert [len(step) for step in steps] == sizes
    in_order = corpus.train.at(range(sum(sizes)), seed=42).tolist()
    assert [index for step in steps for index in step] == in_order
    run(recipe)
    rows = [row for row in rows_of(tmp_path / "run") if "loss" in row]
    assert [row["tokens"] for row in rows] == [16 * sum(sizes[: n + 1]) for n in range(9)]
    (tmp_path / "again").mkdir()
    again = recipe_file(
        tokens, tmp_path / "again", **warmup, logging_steps=1, save_steps=4, max_steps=9
    )
    process = start(again)
    wait_for_step(process, tmp_path / "again/run", 5)
    process.kill()
    process.wait()
    run(load_recipe(PretrainRecipe, again))
    ours, theirs = (
        load_file(tmp_path / place / "model.safetensors") for place in ("run", "again/run")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"length_warmup_steps": 3}, "length_warmup_start: give"),
        ({"length_warmup_steps": 3, "length_warmup_start": 5}, "does not become max_length 16"),
        ({"batch_size_warmup_steps": 3, "batch_size_warmup_start": 9}, "9 is more than the 8"),
    ],
    ids=["one key of two", "no doubling", "more than the whole"],
)
def test_a_warmup_that_cannot_be_is_refused(tokens, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        recipe_for(tokens, tmp_path, **keys)


def test_gradients_may_be_larger_in_the_first_steps(tokens, tmp_path):
    settings = {"max_grad_norm": 0.5, "clip_warmup_steps": 2, "clip_warmup_factor": 4.0}
    optim = recipe_for(tokens, tmp_path, **settings).optim
    assert [optim.max_grad_norm_at(step) for step in range(4)] == [2.0, 2.0, 0.5, 0.5]
    free = recipe_for(tokens, tmp_path, max_grad_norm=0.0, clip_warmup_steps=2).optim
    assert free.max_grad_norm_at(0) == 0.0  # never clips


def test_a_run_mixes_its_sources_and_says_how(tokens, tmp_path, capsys):
    mixer = [
        {"path": str(tokens), "ratio": 0.75},
        {"path": f"{tokens}/.", "ratio": 0.25, "max_repeats": 2},
    ]
    recipe = recipe_for(tokens, tmp_path, dataset_mixer=mixer)
    assert "asked 75.00%" in str(plan(recipe)["mixture"])
    folder = run(recipe).path
    said = capsys.readouterr().err
    assert re.search(
        r"asked 75\.00%, available [\d,]+ tokens, used 1,152, each 0\.\d\d times", said
    )
    assert re.search(r"asked 25\.00%, available [\d,]+ tokens, used 384, ", said)
    assert len([row for row in rows_of(folder) if "loss" in row]) == 3


def test_sequences_left_out_are_counted_and_not_in_the_tokens(tokens, tmp_path):
    (tmp_path / "all").mkdir()
    every = rows_of(run(recipe_for(tokens, tmp_path / "all")).path)
    some = rows_of(run(recipe_for(tokens, tmp_path, max_ngram_repeats=3)).path)
    last = [[row for row in rows if "grad_norm" in row][-1] for rows in (every, some)]
    assert "sequences_left_out" not in last[0]
    assert 0 < last[1]["sequences_left_out"] < 12 * 8
    assert last[0]["tokens"] - last[1]["tokens"] == 16 * last[1]["sequences_left_out"]


def test_a_step_of_which_nothing_is_left_changes_nothing(tokens, tmp_path):
    finished = run(recipe_for(tokens, tmp_path, max_ngram_repeats=1, weight_decay=0.0)).path
    results = json.loads((finished / "manifest.json").read_text())["results"]
    assert results["tokens"] == 0 and results["sequences_left_out"] == 12 * 8
    losses = [row["eval_loss"] for row in rows_of(finished) if "eval_loss" in row]
    assert losses[0] == losses[-1]


@pytest.mark.parametrize(
    ("mixer", "keys", "message"),
    [
        ([{"ratio": 1.0}, {}], {}, "every item a ratio, or none"),
        ([{"ratio": 1.0}], {"max_steps": -1}, "ratios need max_tokens or max_steps"),
        ([{"max_repeats": 2.0}], {}, "max_repeats needs a ratio"),
        ([{"ratio": 1.0}], {"max_steps": 1000}, "each would be read"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(tokens, tmp_path, mixer, keys, message):
    sources = [{"path": str(tokens), **item} for item in mixer]
    with pytest.raises(UserError, match=message):
        open_corpus(recipe_for(tokens, tmp_path, dataset_mixer=sources, **keys), verify=False)


# ---------------------------------------------------------------- shards of other tools


def test_shards_of_other_tools_are_learnt_from_as_they_are(tokens, tmp_path):
    ours, theirs, foreign = tmp_path / "ours", tmp_path / "theirs", tmp_path / "foreign"
    for folder in (ours, theirs, foreign):
        folder.mkdir()
    shutil.copy(tokens / "tokens" / "train" / "tokens_00000.bin", foreign / "part-0.npy")
    shutil.copy(tokens / "tokenizer.json", foreign / "bare.json")
    source = {"path": str(foreign), "tokenizer_name_or_path": str(foreign / "bare.json")}
    recipe = recipe_for(tokens, theirs, dataset_mixer=[source], mask_documents=True)
    planned, expected = plan(recipe), plan(recipe_for(tokens, ours, mask_documents=True))
    assert planned.pop("held_out_tokens") == 0 and expected.pop("held_out_tokens") != 0
    assert planned == expected
    run(recipe)
    run(recipe_for(tokens, ours, mask_documents=True))
    weights = [load_file(folder / "run" / "model.safetensors") for folder in (ours, theirs)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    tokenizer = AutoTokenizer.from_pretrained(theirs / "run")
    assert (
        tokenizer.eos_token_id
        == json.loads((theirs / "run/config.json").read_text())["eos_token_id"]
    )
    # beside our own in a mixture
    sources = [{**source, "ratio": 1}, {"path": str(tokens), "ratio": 1}]
    mixed = recipe_for(tokens, tmp_path, dataset_mixer=sources, max_steps=4)
    mixture = open_corpus(mixed, verify=True).train
    assert isinstance(mixture, Mixture)
    assert [share.used for share in mixture.shares] == [16, 16]


def test_a_source_is_told_what_it_does_not_say_and_nothing_else(tokens, tmp_path):
    shutil.copy(tokens / "tokens" / "train" / "tokens_00000.bin", tmp_path / "part-0.npy")
    for source, message in (
        ({"path": str(tmp_path)}, "does not say which tokenizer"),
        ({"path": str(tokens), "dtype": "uint16"}, "says its own dtype. Leave the key out"),
        ({"path": str(tmp_path / "nothing")}, "holds no token shards"),
    ):
        with pytest.raises(UserError, match=message):
            plan(recipe_for(tokens, tmp_path, dataset_mixer=[source]))


# ---------------------------------------------------------------- going on from a model


def test_a_model_is_annealed_from_the_weights_of_another_run(tokens, tmp_path):
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    base = run(recipe_for(tokens, tmp_path / "first", max_steps=20)).path
    shape = {"model", "hidden_size", "intermediate_size", "num_hidden_layers"}
    shape |= {"num_attention_heads", "max_position_embeddings"}

    def annealed(folder, **changes):
        path = recipe_file(tokens, folder, init_from=str(base), max_steps=8, **changes)
        content = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if k not in shape}))
        return load_recipe(PretrainRecipe, path)

    still = run(annealed(tmp_path / "second", learning_rate=1e-12, weight_decay=0.0)).path
    before, after = (load_file(folder / "model.safetensors") for folder in (base, still))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)

    linear = {"lr_scheduler_type": "linear", "min_lr_ratio": 0.0, "warmup_ratio": 0.0}
    recipe = annealed(tmp_path / "third", **linear)
    assert plan(recipe)["parameters"] == sum(tensor.numel() for tensor in before.values())
    rows = [row for row in rows_of(run(recipe).path) if "eval_loss" in row]
    assert rows[0]["eval_loss"] == pytest.approx(
        [row for row in rows_of(base) if "eval_loss" in row][-1]["eval_loss"], rel=1e-5
    )
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]


def test_a_shape_beside_a_model_to_go_on_from_is_refused(tokens, tmp_path):
    with pytest.raises(UserError, match="hidden_size: the shape is that of init_from"):
        recipe_for(tokens, tmp_path, init_from="somewhere")


def test_an_embedding_is_not_drawn_where_there_is_one_nor_where_the_head_would_share_it(
    tokens, tmp_path
):
    with pytest.raises(UserError, match="embedding_init_std: the weights are those of init_from"):
        dataclasses.replace(
            recipe_for(tokens, tmp_path),
            init_from="somewhere",
            shape=ModelShape("olmo2_4m"),
            ends=EndsInit(embedding_init_std=1.0),
        )
    tied = recipe_for(tokens, tmp_path, tie_word_embeddings=True, embedding_init_std=1.0)
    with pytest.raises(UserError, match=r"embedding_init_std is 1\.0, but head and embedding are"):
        plan(tied)


def test_a_model_of_another_tokenizer_is_refused(tokens, tmp_path):
    base = run(recipe_for(tokens, tmp_path)).path
    with open(base / "tokenizer.json", "a") as file:
        file.write(" ")
    corpus = open_corpus(recipe_for(tokens, tmp_path), verify=False)
    recipe = dataclasses.replace(
        recipe_for(tokens, tmp_path), init_from=str(base), shape=ModelShape()
    )
    with pytest.raises(UserError, match="is not the tokenizer that"):
        model_config(recipe, corpus)


def test_a_model_to_go_on_from_must_be_of_the_shape_named_beside_it(tokens, tmp_path):
    base = run(recipe_for(tokens, tmp_path)).path
    recipe = dataclasses.replace(
        recipe_for(tokens, tmp_path), init_from=str(base), shape=ModelShape("olmo2_4m")
    )
    with pytest.raises(UserError, match="is no olmo2_4m: its hidden_size is"):
        model_config(recipe, open_corpus(recipe, verify=False))


# ---------------------------------------------------------------- recipes, plans, bad input


def test_the_plan_says_what_a_run_would_do_and_touches_nothing(tokens, tmp_path):
    recipe = recipe_for(tokens, tmp_path, max_steps=-1, num_train_epochs=2.0)
    planned = plan(recipe)
    corpus = open_corpus(recipe, verify=False)
    assert planned["steps"] == 2 * len(corpus.train) // 8
    assert planned["tokens_per_step"] == 8 * 16
    model = Transformer(model_config(recipe, corpus))
    assert planned["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert isinstance(planned["memory_bytes"], int)
    assert planned["memory_bytes"] > 16 * sum(p.numel() for p in model.parameters())
    assert not (tmp_path / "run").exists()


def test_how_long_a_run_is_can_be_said_in_three_ways(tokens, tmp_path):
    assert num_steps(recipe_for(tokens, tmp_path, max_steps=7), 100) == 7
    by_tokens = recipe_for(tokens, tmp_path, max_steps=-1, max_tokens=8 * 16 * 3 + 1)
    assert num_steps(by_tokens, 100) == 4
    by_epochs = recipe_for(tokens, tmp_path, max_steps=-1, num_train_epochs=0.5)
    assert num_steps(by_epochs, 100) == 6
    assert num_steps(by_epochs, 3) == 1
    with pytest.raises(UserError, match="max_steps already says how long"):
        recipe_for(tokens, tmp_path, max_tokens=5)


def test_the_resolved_recipe_is_read_back_as_it_was(finished, tmp_path):
    path = tmp_path / "again.yaml"
    path.write_text(recipe_to_yaml(finished))
    assert load_recipe(PretrainRecipe, path) == finished


def test_rows_longer_than_the_model_reads_are_refused(tokens, tmp_path):
    with pytest.raises(UserError, match="8 is less than max_length 16"):
        recipe_for(tokens, tmp_path, max_position_embeddings=8)
    corpus_recipe = recipe_for(tokens, tmp_path, max_position_embeddings=32)
    corpus = open_corpus(corpus_recipe, verify=False)
    assert model_config(corpus_recipe, corpus).max_position_embeddings == 32


def test_another_tokenizer_beside_the_shards_is_refused(tokens, tmp_path):
    copy = tmp_path / "tokens"
    subprocess.run(["cp", "-r", str(tokens), str(copy)], check=True)
    content = json.loads((copy / "tokenizer.json").read_text())
    content["version"] = "1.0 "
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not the tokenizer that the shards beside it"):
        run(recipe_for(copy, tmp_path))


def test_mistakes_are_one_message_and_exit_code_2(tokens, tmp_path, capsys):
    path = recipe_file(tokens, tmp_path, max_stpes=3)
    assert main([str(path)]) == 2
    message = capsys.readouterr().err
    assert "recipe.yaml, line" in message
    assert "Did you mean 'max_steps'?" in message
    path = recipe_file(tmp_path / "nowhere", tmp_path)
    assert main([str(path)]) == 2
    assert "nowhere/tokens/train holds no token shards" in capsys.readouterr().err
    path = recipe_file(tokens, tmp_path, stage="sft")
    assert main([str(path)]) == 2
    assert "open-instruct run" in capsys.readouterr().err
    assert main([str(path), "--dry"]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0


def test_a_dry_run_prints_recipe_and_plan(tokens, tmp_path, capsys):
    assert main([str(recipe_file(tokens, tmp_path)), "max_steps=5", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "max_steps: 5\n" in shown
    assert "steps: 5\n" in shown
    assert not (tmp_path / "run").exists()


def test_bf16_is_chosen_where_it_pays():
    able = torch.cpu.get_capabilities()
    has_bf16 = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    cpu = torch.device("cpu")
    assert computes_in_bf16("auto", cpu, 256) == has_bf16
    assert not computes_in_bf16("auto", cpu, 32)
    assert computes_in_bf16(True, cpu, 32)
    assert not computes_in_bf16(False, cpu, 256)
