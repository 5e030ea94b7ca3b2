"""A finished run for others: the card says what was done, and nothing is uploaded unasked."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.utils import filter_repo_objects

from olmo_base.run.artefact import read_manifest
from olmo_base.run.errors import UserError
from olmo_base.run.recipe import load_recipe
from open_instruct import reward, sft
from open_instruct.__main__ import main
from open_instruct.publish import NOT_PUBLISHED, curves
from tests.open_instruct.tiny import (
    rows_of,
    save_tiny_model,
    write_dialogues,
    write_jsonl,
    write_pairs,
    write_recipe,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a tiny model and dialogues, one of them of no use."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    write_dialogues(tmp_path / "train.jsonl")
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"messages": []}\n')
    return tmp_path


KEYS = dict(
    stage="sft",
    model_name_or_path="model",
    chat_template="tulu",
    dataset_mixer=[{"path": "train.jsonl", "samples": 20}],
    eval_dataset_mixer=[{"path": "train.jsonl", "samples": 4}],
    on_bad_row="drop",
    max_length=64,
    per_device_train_batch_size=8,
    logging_steps=1,
    output_dir="run",
)


def recipe_of(folder: Path, **changes: Any) -> sft.SftRecipe:
    return load_recipe(sft.SftRecipe, write_recipe(folder / "run.yaml", **(KEYS | changes)))


def card_of(run: Path) -> tuple[dict[str, Any], str]:
    """The head and the rest."""
    _, head, body = (run / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_was_read_done_and_reached(folder):
    run = sft.run(recipe_of(folder))
    head, body = card_of(run.path)
    assert head == {
        "base_model": "model",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["open-instruct", "sft"],
    }
    assert "| train.jsonl | messages | 20 rows | 24 | 20 |" in body
    assert "Left out, by reason: empty dialogue: 1." in body
    rows = rows_of(run.path / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    for step, loss in enumerate(losses, start=1):
        assert f"| {step} | {loss:.4g} |" in body
    assert f"| eval_loss | {rows[-1]['eval_loss']:.4g} |" in body
    recipe = body.split("```yaml\n")[1].split("```")[0]
    (folder / "again.yaml").write_text(recipe, encoding="utf-8")
    assert load_recipe(sft.SftRecipe, folder / "again.yaml") == run.recipe


def test_cards_of_adapters_and_reward_models_say_so(folder):
    run = sft.run(recipe_of(folder, use_peft=True, max_steps=1))
    head, body = card_of(run.path)
    assert head["library_name"] == "peft" and "An adapter on `model`" in body
    write_pairs(folder / "pairs.jsonl")
    keys = KEYS | dict(stage="reward", max_steps=1, output_dir="rm", eval_dataset_mixer=[])
    keys |= dict(dataset_mixer=[{"path": "pairs.jsonl"}])
    recipe = load_recipe(reward.RewardRecipe, write_recipe(folder / "rm.yaml", **keys))
    head, body = card_of(reward.run(recipe).path)
    assert head["pipeline_tag"] == "text-classification"
    assert "No examples were held out." in body


def test_an_upload_that_fails_leaves_a_finished_run_and_says_how_to_go_on(folder):
    recipe = recipe_of(folder, max_steps=1, push_to_hub=True, hub_model_id="someone/model")
    with pytest.raises(UserError, match=r"open-instruct push run someone/model"):
        sft.run(recipe)  # the tests are offline
    manifest = read_manifest("run")
    assert manifest is not None and manifest["status"] == "finished"
    # Asked for or not: it is the same run.
    assert sft.run(recipe_of(folder, max_steps=1)).is_finished


def test_what_is_uploaded_names_no_place_on_this_machine(folder):
    held_out = [{"path": "train.jsonl", "samples": 4}]
    changes = dict(max_steps=1, num_eval_samples=2, eval_dataset_mixer=held_out)
    run = sft.run(recipe_of(folder, **changes))
    files = [str(file.relative_to(run.path)) for file in run.path.rglob("*") if file.is_file()]
    uploaded = set(filter_repo_objects(files, ignore_patterns=NOT_PUBLISHED))
    assert set(files) > {"manifest.json", "train.log", "samples.jsonl"}
    assert not uploaded & {"manifest.json", "train.log", "samples.jsonl"}
    assert uploaded >= {"config.json", "model.safetensors", "README.md", "recipe.yaml"}
    here = str(folder).encode()
    assert not [name for name in uploaded if here in (run.path / name).read_bytes()]


def test_what_cannot_be_pushed_is_named(folder, capsys):
    assert main(["push", "model", "name"]) == 2
    assert "Needed: owner/name" in capsys.readouterr().err
    (folder / "empty").mkdir()
    assert main(["push", "empty", "a/b"]) == 2
    assert "holds no model" in capsys.readouterr().err
    (folder / "model" / "manifest.json").write_text('{"status": "running"}')
    assert main(["push", "model", "a/b"]) == 2
    assert "is not finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(push_to_hub=True), "push_to_hub needs it"),
        (dict(hub_model_id="a/b"), "push_to_hub is not true"),
    ],
)
def test_a_recipe_that_half_asks_for_an_upload_is_refused(folder, keys, words):
    with pytest.raises(UserError, match=words):
        recipe_of(folder, **keys)


# ---------------------------------------------------------------- GGUF

STAND_IN = """
import sys
source, out, kind = sys.argv[1], sys.argv[3], sys.argv[5]
if "broken" in source:
    sys.exit("Model architecture not supported")
open(out, "w").write(f"{source} {sys.argv[2]} {kind}")
"""


def test_llama_cpps_converter_is_called_where_it_is_installed(folder, monkeypatch, capsys):
    (folder / "llama.cpp").mkdir()
    (folder / "llama.cpp" / "convert_hf_to_gguf.py").write_text(STAND_IN)
    monkeypatch.setenv("LLAMA_CPP", str(folder / "llama.cpp"))
    assert main(["convert", "model", "out/model.gguf", "--dtype", "bfloat16"]) == 0
    assert (folder / "out" / "model.gguf").read_text() == "model --outfile bf16"
    assert main(["convert", "model", "out/model.gguf"]) == 2
    assert "exists already" in capsys.readouterr().err
    save_tiny_model(folder / "broken")
    assert main(["convert", "broken", "out/b.gguf"]) == 2
    assert "could not convert broken: Model architecture not" in capsys.readouterr().err
    assert [file.name for file in (folder / "out").iterdir()] == ["model.gguf"]
    assert main(["convert", "model", "out/b", "--to", "gguf"]) == 2
    assert "ends in .gguf" in capsys.readouterr().err


def test_without_llama_cpp_the_message_says_where_to_get_it(folder, monkeypatch, capsys):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert main(["convert", "model", "model.gguf"]) == 2
    assert "set LLAMA_CPP to its folder" in capsys.readouterr().err
    monkeypatch.setenv("LLAMA_CPP", str(folder))
    assert main(["convert", "model", "model.gguf"]) == 2
    assert "there is no convert_hf_to_gguf.py in it" in capsys.readouterr().err


def test_an_adapter_is_merged_before_it_becomes_a_gguf(folder, capsys):
    sft.run(recipe_of(folder, use_peft=True, max_steps=1))
    assert main(["convert", "run", "model.gguf"]) == 2
    assert "open-instruct merge run OUT" in capsys.readouterr().err


def test_rows_of_metrics_are_thinned_and_the_last_one_stays(folder):
    write_jsonl(folder / "metrics.jsonl", [{"step": n, "loss": 1.0 / n} for n in range(1, 101)])
    (table,) = curves(folder)
    steps = [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]
    assert len(steps) <= 13 and steps[0] == "1" and steps[-1] == "100"
