"""Every recipe that is shipped loads, and the debug ones run from end to end."""

import json
from pathlib import Path

import pytest

from olmo_base.run.artefact import read_manifest
from olmo_base.run.recipe import read_keys, read_stage
from open_instruct.__main__ import main
from open_instruct.pipeline import STAGES, load_pipeline, load_stage_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FILES = sorted(path for ending in ("*.yaml", "*.yml") for path in RECIPES.rglob(ending))
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


def test_the_debug_recipes_run_from_text_to_an_answered_question(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["run", "recipes/debug/pipeline.yaml", "root=life"]
    assert main([*command, "--dry-run"]) == 0
    assert not list(tmp_path.iterdir())
    capsys.readouterr()
    assert main(command) == 0
    first = capsys.readouterr()
    assert "life/report/report.html" in first.out
    assert "Question to life/dpo: Is this a question?\nAnswer: " in first.out
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
