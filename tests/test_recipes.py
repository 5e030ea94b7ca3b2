"""Every recipe that is shipped loads, and the debug ones run from end to end."""

from pathlib import Path

import pytest

from olmo_base.run.recipe import read_keys, read_stage
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
