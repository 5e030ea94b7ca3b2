"""Every recipe that is shipped loads, and the debug ones run from end to end."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, Olmo2ForCausalLM, Olmo3ForCausalLM, OlmoForCausalLM

from olmo_base.corpus.documents import DocumentSource
from olmo_base.corpus.tokenize import TokenizeRecipe
from olmo_base.corpus.tokenize import run as tokenize
from olmo_base.model.hf_weights import hf_config, load_native
from olmo_base.model.presets import PRESETS
from olmo_base.model.transformer import Transformer, num_parameters
from olmo_base.optim import learning_rate_at
from olmo_base.pretrain import plan
from olmo_base.pretrain_recipe import model_config, open_corpus
from olmo_base.run.artefact import RunConfig, read_manifest
from olmo_base.run.recipe import read_keys, read_stage
from olmo_base.tokenizer import TokenizerRecipe
from olmo_base.tokenizer import run as train_tokenizer
from open_instruct.__main__ import main
from open_instruct.known_shapes import recorded_config
from open_instruct.pipeline import STAGES, load_pipeline, load_stage_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
LAUNCHED_BY = RECIPES / "accelerate"  # for accelerate launch, and no recipes
FILES = sorted(
    path
    for ending in ("*.yaml", "*.yml")
    for path in RECIPES.rglob(ending)
    if path.parent != LAUNCHED_BY
)
PIPELINES = [path for path in FILES if read_stage(path) == "pipeline"]


def test_recipes_are_found():
    assert FILES
    assert PIPELINES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_the_recipe_loads(path):
    if path in PIPELINES:
        recipe, steps = load_pipeline(path)
        assert len(steps) == len(recipe.stages)
        return
    variables = {"root": "runs"}
    for pipeline in PIPELINES:
        if pipeline.parent == path.parent:  # what it sets in the recipes beside it
            own = read_keys(pipeline).get("vars")
            variables |= own.value if own else {}
    _, recipe = load_stage_recipe(path, variables=variables)
    assert recipe.stage in STAGES


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a small corpus of tokens, where published recipes look for theirs."""
    folder = tmp_path_factory.mktemp("published")
    lines = (json.dumps({"text": f"The {n}th text says {n * n}. " * 9}) + "\n" for n in range(500))
    (folder / "texts.jsonl").write_text("".join(lines))
    source = (DocumentSource(str(folder / "texts.jsonl")),)
    tokenizer = RunConfig(str(folder / "tokenizer"))
    train_tokenizer(TokenizerRecipe("tokenizer", source, tokenizer, vocab_size=280))
    tokenize(
        TokenizeRecipe("tokenize", tokenizer.output_dir, source, RunConfig(str(folder / "tokens")))
    )
    return folder


PUBLISHED = {
    "olmo1/1b": (3.05e12, "olmo_1b_0724"),
    "olmo1/7b": (2.75e12, "olmo_7b_0724"),
    "olmo2/1b": (4.0e12, "olmo2_1b"),
    "olmo2/7b": (3.9e12, "olmo2_7b"),
    "olmo2/13b": (5.0e12, "olmo2_13b"),
    "olmo2/32b": (6.06e12, "olmo2_32b"),
    "olmo3/7b": (5.93e12, "olmo3_7b"),
    "olmo3/32b": (5.5e12, "olmo3_32b"),
}


STAGE_2 = {  # tokens, and the rate that falls to zero
    "olmo2/1b": (50e9, 7.4487e-5),
    "olmo2/7b": (50e9, 6.1499e-5),
    "olmo2/13b": (100e9, 9.0e-5),
    "olmo2/32b": (100e9, 6.6230e-5),
    "olmo3/7b": (100e9, 2.0712e-4),
    "olmo3/32b": (100e9, 2.0712e-4),
}


def test_every_recipe_of_a_published_model_is_checked():
    found = [path for path in FILES if path.relative_to(RECIPES).parts[0].startswith("olmo")]
    known = [RECIPES / name / "pretrain.yaml" for name in PUBLISHED]
    known += [RECIPES / name / "stage2.yaml" for name in STAGE_2]
    assert sorted(known) == sorted(set(found) - set(TUNINGS))


@pytest.mark.parametrize("name", STAGE_2)
def test_the_second_stage_of_a_published_model_is_planned_from_its_first(
    name, root, tmp_path, capsys
):
    shutil.copytree(root / "tokens", tmp_path / "stage2_tokens")
    shutil.copytree(root / "tokenizer", tmp_path / "base")
    _, first = load_stage_recipe(RECIPES / name / "pretrain.yaml", [f"root={root}"])
    config = model_config(first, open_corpus(first, verify=False))
    content = json.dumps(hf_config(config, torch.bfloat16))
    (tmp_path / "base" / "config.json").write_text(content)
    (tmp_path / "base" / "model.safetensors").touch()  # a plan reads no weights
    path = RECIPES / name / "stage2.yaml"
    assert main(["run", str(path), f"root={tmp_path}", "--dry-run"]) == 0
    assert "# memory_bytes" in capsys.readouterr().out
    _, recipe = load_stage_recipe(path, [f"root={tmp_path}"])
    tokens, rate = STAGE_2[name]
    planned: dict[str, Any] = plan(recipe)
    assert planned["tokens"] == pytest.approx(tokens, rel=0.001)
    assert planned["parameters"] == num_parameters(config)
    steps = planned["steps"]
    assert learning_rate_at(0, steps, recipe.optim) == pytest.approx(rate, rel=1e-4)
    assert learning_rate_at(steps - 1, steps, recipe.optim) < rate / 1000


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipe_of_a_published_model_is_planned_with_its_shape(name, root, capsys):
    path = RECIPES / name / "pretrain.yaml"
    assert main(["run", str(path), f"root={root}", "--dry-run"]) == 0
    assert "# memory_bytes" in capsys.readouterr().out
    _, recipe = load_stage_recipe(path, [f"root={root}"])
    tokens, preset = PUBLISHED[name]
    assert plan(recipe)["tokens"] == pytest.approx(tokens, rel=0.005)
    config = model_config(recipe, open_corpus(recipe, verify=False))
    ids: dict[str, Any] = {"vocab_size": config.vocab_size, "bos_token_id": None}
    ids |= {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    assert config == dataclasses.replace(PRESETS[preset], **ids)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(weight.numel() for weight in model.parameters()) == num_parameters(config)


@pytest.mark.parametrize(
    "path",
    [
        RECIPES / name / f"{stage}.yaml"
        for stage in ("pretrain", "stage2")
        for name in PUBLISHED
        if stage == "pretrain" or name in STAGE_2
    ],
    ids=lambda path: str(path.relative_to(RECIPES)),
)
def test_a_published_pretraining_is_planned_without_its_text(path, tmp_path, capsys):
    assert main(["run", str(path), f"root={tmp_path}", "--dry-run"]) == 0
    out = capsys.readouterr().out
    name = "/".join(path.relative_to(RECIPES).parts[:2])
    preset = PRESETS[PUBLISHED[name][1]]
    assert "is not on this machine: the vocabulary is that of " in out
    assert f"{num_parameters(preset):,}" in out
    assert "# memory_bytes" in out
    # However many processes share a step, it reads the published number of tokens.
    step = next(line for line in out.splitlines() if line.startswith("# tokens_per_step"))
    many = ["--dry-run", "--num-processes", "64"]
    assert main(["run", str(path), f"root={tmp_path}", *many]) == 0
    assert step.split()[-1] in capsys.readouterr().out


def test_a_run_without_its_text_is_refused_all_the_same(tmp_path, capsys):
    path = RECIPES / "olmo2/1b/pretrain.yaml"
    assert main(["run", str(path), f"root={tmp_path}"]) == 2
    assert "holds no token shards" in capsys.readouterr().err
    small = [f"root={tmp_path}", "model=olmo2_2m", "--dry-run"]
    assert main(["run", str(path), *small]) == 2  # a wrong path is more likely than a plan


def test_accelerate_reads_the_files_of_its_launcher_and_the_loop_trains_with_their_kind():
    files = sorted(LAUNCHED_BY.glob("*.yaml"))
    kinds = {
        "ddp": DistributedType.MULTI_GPU,
        "deepspeed_zero3": DistributedType.DEEPSPEED,
        "fsdp2": DistributedType.FSDP,
    }
    assert [path.stem for path in files] == sorted(kinds)
    for path in files:
        config = load_config_from_file(str(path))
        assert config.distributed_type == kinds[path.stem]
        # The launcher passes each on by its own option; one without an option would be lost.
        options = {f"--{key}" for key in (config.fsdp_config | config.deepspeed_config)}
        assert options <= set(launch_command_parser()._option_string_actions)
        assert config.num_processes > 1 and config.mixed_precision == "no"
        known = {field.name for field in dataclasses.fields(config)}
        assert yaml.safe_load(path.read_text(encoding="utf-8")).keys() <= known


def test_documents_are_tokenized_by_their_own_verb_too(root, tmp_path, capsys):
    recipe = tmp_path / "tokenize.yaml"
    keys = {"stage": "tokenize", "tokenizer_name_or_path": str(root / "tokenizer")}
    keys |= {"output_dir": str(tmp_path / "out")}
    recipe.write_text(yaml.safe_dump(keys | {"dataset_mixer": [{"path": f"{root}/texts.jsonl"}]}))
    assert main(["data", "tokenize", str(recipe), "--dry-run"]) == 0
    assert "# tokens" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(["data", "tokenize", str(recipe), "eval_fraction=0.1"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and manifest["status"] == "finished"
    other = RECIPES / "olmo2/1b/pretrain.yaml"
    assert main(["data", "tokenize", str(other)]) == 2
    assert "says 'stage: pretrain'" in capsys.readouterr().err


# ---------------------------------------------------------------- published tunings

# Examples of a step, and parameters in thousands of millions.
TUNED = {
    "tulu2/7b": (128, 32, 6.74),
    "tulu2/13b": (128, 32, 13.02),
    "tulu2/70b": (128, 32, 68.98),
    "olmo1/7b": (128, 32, 6.89),
    "tulu3/8b": (128, 128, 8.03),
    "tulu3/70b": (128, 128, 70.55),
    "olmo2/1b": (128, 128, 1.485),
    "olmo2/7b": (128, 128, 7.30),
    "olmo2/13b": (64, 128, 13.72),
    "olmo2/32b": (256, 128, 32.23),
    "olmo3/7b": (128, 128, 7.30),
    "olmo3/32b": (512, 128, 32.23),
}
TUNINGS = [
    path
    for path in FILES
    if path.relative_to(RECIPES).parts[0] not in ("debug", "quickstart", "real_small")
    and read_stage(path) in ("sft", "dpo", "reward")
]


def test_every_published_tuning_is_checked_in_full_and_as_an_adapter():
    assert {str(path.parent.relative_to(RECIPES)) for path in TUNINGS} == TUNED.keys()
    for name in TUNED:
        stages = {path.stem for path in TUNINGS if str(path.parent.relative_to(RECIPES)) == name}
        assert stages >= {"sft", "sft_qlora", "dpo", "dpo_qlora"}
        assert ("reward" in stages) == ("reward_qlora" in stages) == name.startswith("tulu3")


@pytest.mark.parametrize("path", TUNINGS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_a_published_tuning_is_planned_without_its_model(path, capsys):
    assert main(["run", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "is not on this machine: its recorded shape is used" in out
    assert "# memory_bytes" in out
    text = path.read_text(encoding="utf-8")
    assert "Figures" in text or "None was published" in text
    stage, recipe = load_stage_recipe(path)
    of_sft, of_pairs, billions = TUNED[str(path.parent.relative_to(RECIPES))]
    per_step = recipe.train.examples_per_step(8)
    assert per_step == (of_sft if recipe.stage == "sft" else of_pairs) or "qlora" in path.stem
    assert recorded_config(recipe.model.model_name_or_path) is not None
    if "qlora" in path.stem:
        assert recipe.adapter.load_in_4bit and "# trained_parameters" in out
    else:
        figures = stage.plan(recipe)
        assert figures["parameters"] == pytest.approx(billions * 1e9, rel=0.002)


@pytest.mark.parametrize(
    ("name", "architecture", "changes"),
    [
        ("olmo1/7b", OlmoForCausalLM, ["max_tokens=-1", "clip_qkv=0.5"]),
        ("olmo2/32b", Olmo2ForCausalLM, []),
        ("olmo3/32b", Olmo3ForCausalLM, ["sliding_window=16"]),
    ],
)
def test_a_published_recipe_made_small_trains_a_model_that_transformers_opens(
    name, architecture, changes, root, tmp_path
):
    small = (
        "hidden_size=32 intermediate_size=48 num_hidden_layers=4 num_attention_heads=4 "
        "num_key_value_heads=2 max_length=64 per_device_train_batch_size=2 max_steps=3 "
        "global_batch_size=4 warmup_steps=1 bf16=false"
    ).split()
    folder = tmp_path / "base"
    path = RECIPES / name / "pretrain.yaml"
    places = [f"root={root}", f"output_dir={folder}"]
    assert main(["run", str(path), *places, *small, *changes]) == 0
    other = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(other, architecture)
    model = load_native(folder)
    ids_BT = torch.randint(model.config.vocab_size, (2, 64))
    with torch.no_grad():
        theirs_BTV = other(ids_BT).logits
        torch.testing.assert_close(model.logits(model(ids_BT)), theirs_BTV, atol=1e-5, rtol=1e-5)


def test_the_debug_recipes_run_from_text_to_an_answered_question(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["run", "recipes/debug/pipeline.yaml", "root=life"]
    assert main([*command, "--dry-run"]) == 0
    assert not list(tmp_path.iterdir())
    capsys.readouterr()
    assert main(command) == 0
    first = capsys.readouterr()
    assert "life/report/report.html" in first.out
    assert "Question to life/dpo: Is this a question?\nAnswer:\n" in first.out
    for stage in ("world", "tokenizer", "tokens", "base", "sft", "dpo", "report"):
        manifest = read_manifest(f"life/{stage}")
        assert manifest is not None and manifest["status"] == "finished"
    scores = json.loads(Path("life/report/report.json").read_text(encoding="utf-8"))
    assert [model["name"] for model in scores["models"]] == ["base", "sft", "dpo"]

    weights = {path: path.stat().st_mtime_ns for path in Path("life").rglob("*.safetensors")}
    assert main(command) == 0
    again = capsys.readouterr()
    assert again.err.count("finished before, skipped (") == 7
    assert weights == {
        path: path.stat().st_mtime_ns for path in Path("life").rglob("*.safetensors")
    }
    assert again.out == first.out  # the same table, the same answer

    assert main([*command, "dpo.beta=0.2", "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert planned.count("is finished and would be skipped") == 5
    assert "# dpo: has changed and would run again" in planned
    assert "# eval: waits for dpo" in planned
