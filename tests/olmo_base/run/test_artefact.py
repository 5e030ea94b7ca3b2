"""The run folder: written whole, found again, never shared by two runs."""

import json
import multiprocessing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from olmo_base.run.artefact import (
    RunConfig,
    RunFolder,
    atomic_folder,
    atomic_write,
    model_files,
    read_manifest,
    resolve_model,
    sha256_file,
)
from olmo_base.run.errors import UserError
from olmo_base.run.recipe import setting


@dataclass(frozen=True)
class ExampleRecipe:
    run: RunConfig
    stage: Literal["example"] = "example"
    max_steps: int = setting(3)
    logging_steps: int = field(default=10, metadata={"changes_result": False})


def recipe_in(folder: Path, **changes: Any) -> ExampleRecipe:
    return ExampleRecipe(RunConfig(str(folder)), **changes)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    atomic_write(path, "first")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(path, "second \udcff")
    assert path.read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_a_folder_that_fails_half_way_leaves_the_old_one(tmp_path):
    target = tmp_path / "folder"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(target) as temporary:
        (temporary / "a").write_text("new")
        raise RuntimeError("the disk is full")
    assert (target / "a").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_the_digest_is_the_published_one_of_abc(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256_file(path).startswith("ba7816bf8f01cfea414140de5dae2223")


def test_a_new_run_writes_its_recipe_and_a_running_manifest(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    folder = RunFolder.open(recipe_in(tmp_path / "run"), [data])
    manifest = read_manifest(folder.path)
    assert manifest is not None
    assert manifest["status"] == "running"
    assert manifest["inputs"][str(data)] == {"sha256": sha256_file(data), "bytes": 3}
    assert {"torch", "python"} <= manifest["versions"].keys()
    assert manifest["hardware"]["cores"] >= 1
    assert "max_steps: 3" in (folder.path / "recipe.yaml").read_text()


def test_a_finished_run_is_recognised_and_carries_counts_and_results(tmp_path):
    folder = RunFolder.open(recipe_in(tmp_path / "run"), [])
    folder.counts.used = 7
    folder.counts.drop("no assistant turn", 2)
    folder.finish(loss=0.5)
    again = RunFolder.open(recipe_in(tmp_path / "run", logging_steps=1), [])
    assert again.is_finished
    manifest = read_manifest(again.path)
    assert manifest is not None
    assert manifest["examples"] == {
        "used": 7,
        "truncated": 0,
        "dropped": {"no assistant turn": 2},
    }
    assert manifest["results"] == {"loss": 0.5}
    assert manifest["wall_time_seconds"] >= 0


def start_with_a_row_of_metrics(folder: Path, *inputs: Path) -> None:
    run = RunFolder.open(recipe_in(folder), inputs)
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n')
    run.release()


def test_a_folder_of_another_run_is_refused_with_the_difference(tmp_path):
    start_with_a_row_of_metrics(tmp_path / "run")
    with pytest.raises(UserError, match="max_steps was 3 and is 4"):
        RunFolder.open(recipe_in(tmp_path / "run", max_steps=4), [])


def test_a_changed_input_makes_another_run(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("one")
    start_with_a_row_of_metrics(tmp_path / "run", data)
    data.write_text("two")
    with pytest.raises(UserError, match=r"content of .*data.jsonl has changed"):
        RunFolder.open(recipe_in(tmp_path / "run"), [data])


def test_a_run_that_failed_before_it_made_anything_gives_its_folder_up(tmp_path):
    RunFolder.open(recipe_in(tmp_path / "run"), []).release()
    folder = RunFolder.open(recipe_in(tmp_path / "run", max_steps=4), [])
    manifest = read_manifest(folder.path)
    assert manifest is not None
    assert manifest["recipe"]["max_steps"] == 4


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"found thesis\.tex"):
        RunFolder.open(recipe_in(tmp_path), [])


def _open_and_report(path: str, answers: Any) -> None:
    try:
        RunFolder.open(recipe_in(Path(path)), [])
        answers.put("opened")
    except UserError as error:
        answers.put(str(error))


def test_two_processes_cannot_write_one_run(tmp_path):
    RunFolder.open(recipe_in(tmp_path / "kept"), []).finish()
    held = RunFolder.open(recipe_in(tmp_path / "run"), [])
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_open_and_report, args=(str(tmp_path / "run"), answers))
    process.start()
    assert "in use by another process" in answers.get(timeout=60)
    process.join()
    held.release()


def test_a_missing_input_and_a_corrupt_manifest_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read"):
        RunFolder.open(recipe_in(tmp_path / "run"), [tmp_path / "none.jsonl"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"stage": ')
    with pytest.raises(UserError, match="is corrupt"):
        RunFolder.open(recipe_in(tmp_path / "run"), [])


def test_a_model_is_a_folder_with_config_and_weights(tmp_path):
    with pytest.raises(UserError, match="is not a folder here"):
        resolve_model(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no weights"):
        model_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "manifest.json").write_text(json.dumps({"status": "finished"}))
    assert [file.name for file in model_files(tmp_path)] == ["config.json", "model.safetensors"]


def test_an_unfinished_run_is_recognised_as_such_when_used_as_a_model(tmp_path):
    RunFolder.open(recipe_in(tmp_path / "run"), []).release()
    with pytest.raises(UserError, match="Its run has not finished"):
        resolve_model(str(tmp_path / "run"))
