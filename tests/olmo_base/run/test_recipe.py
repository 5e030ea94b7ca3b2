"""Recipes: what is read, what is refused, and in which words."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from olmo_base.run.errors import UserError
from olmo_base.run.recipe import (
    RecipeError,
    deciding_keys,
    load_recipe,
    read_stage,
    recipe_to_dict,
    recipe_to_yaml,
    setting,
)


@dataclass(frozen=True)
class Optim:
    learning_rate: float = setting(1e-3, above=0)
    warmup_ratio: float = setting(0.0, low=0, high=1)


@dataclass(frozen=True)
class Source:
    path: str
    samples: int | None = setting(None, low=1)


@dataclass(frozen=True)
class ExampleRecipe:
    stage: Literal["example"]
    dataset_mixer: tuple[Source, ...]
    optim: Optim = field(default_factory=Optim)
    max_steps: int = setting(10, low=1)
    bf16: bool = False
    logging_steps: int = setting(10, changes_result=False)
    note: str | None = None

    def __post_init__(self) -> None:
        if self.bf16 and self.max_steps > 100:
            raise RecipeError("max_steps", "is above 100, too many with bf16 in this example.")


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


BASE = "stage: example\ndataset_mixer:\n  - {path: a.jsonl, samples: 5}\n"


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(ExampleRecipe, write(folder, text), overrides)
    return str(caught.value)


def test_groups_are_flat_in_the_file_and_nested_in_python(tmp_path):
    recipe = load_recipe(ExampleRecipe, write(tmp_path, BASE + "learning_rate: 2e-5\n"))
    assert recipe.optim == Optim(learning_rate=2e-5)
    assert recipe.dataset_mixer == (Source("a.jsonl", 5),)


def test_an_override_wins_over_the_file(tmp_path):
    path = write(tmp_path, BASE + "max_steps: 3\n")
    assert load_recipe(ExampleRecipe, path, ["max_steps=7"]).max_steps == 7
    assert load_recipe(ExampleRecipe, path, ["--max-steps=7"]).max_steps == 7


def test_a_recipe_survives_the_way_to_yaml_and_back(tmp_path):
    recipe = load_recipe(ExampleRecipe, write(tmp_path, BASE + "note: 'yes'\nwarmup_ratio: 0.1\n"))
    again = load_recipe(ExampleRecipe, write(tmp_path, recipe_to_yaml(recipe)))
    assert again == recipe


def test_an_unknown_key_names_its_line_and_the_nearest_key(tmp_path):
    message = refusal(tmp_path, BASE + "learning_rte: 1e-5\n")
    assert "line 4" in message
    assert "Did you mean 'learning_rate'?" in message


def test_an_unknown_override_is_refused_too(tmp_path):
    message = refusal(tmp_path, BASE, "max_stps=3")
    assert "max_stps" in message
    assert "Did you mean 'max_steps'?" in message


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("max_steps: many", "a whole number"),
        ("max_steps: 1.5", "a whole number"),
        ("max_steps: true", "a whole number"),
        ("bf16: 1", "true or false"),
        ("learning_rate: fast", "a number"),
        ("learning_rate: 0", "above 0"),
        ("learning_rate: .nan", "finite"),
        ("warmup_ratio: 1.5", "at least 0 and at most 1"),
        ("note: 3", "text"),
        ("max_steps: 0", "at least 1"),
    ],
)
def test_a_wrong_type_or_range_names_key_value_allowed_and_line(tmp_path, line, allowed):
    message = refusal(tmp_path, BASE + line + "\n")
    assert line.split(":")[0] in message
    assert "line 4" in message
    assert allowed in message


def test_a_broken_item_of_a_list_is_named(tmp_path):
    message = refusal(tmp_path, "stage: example\ndataset_mixer:\n  - {pth: a.jsonl}\n")
    assert "line 2" in message
    assert "Did you mean 'path'?" in message
    message = refusal(tmp_path, "stage: example\ndataset_mixer:\n  - {path: a, samples: 0}\n")
    assert "samples" in message
    assert "at least 1" in message


def test_a_missing_key_is_named(tmp_path):
    assert "dataset_mixer: this key is missing" in refusal(tmp_path, "stage: example\n")


def test_a_key_said_twice_is_refused(tmp_path):
    message = refusal(tmp_path, BASE + "max_steps: 3\nmax_steps: 4\n")
    assert "line 5" in message
    assert "second time" in message


def test_a_rule_between_keys_gets_the_line_of_its_key(tmp_path):
    message = refusal(tmp_path, BASE + "bf16: true\nmax_steps: 200\n")
    assert "line 5: max_steps" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"stage: [\n", "broken YAML"),
        (b"- a\n- b\n", "a recipe is a map"),
        (b"stage: \xff\xfe\n", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_recipe_says_what_it_is(tmp_path, content, words):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_recipe(ExampleRecipe, path)


def test_a_missing_file_and_a_malformed_override_say_so(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_recipe(ExampleRecipe, tmp_path / "none.yaml")
    assert "not of the form key=value" in refusal(tmp_path, BASE, "max_steps")


def test_the_stage_is_read_without_the_rest(tmp_path):
    path = write(tmp_path, BASE + "anything: goes\n")
    assert read_stage(path) == "example"
    with pytest.raises(UserError, match="does not say its stage"):
        read_stage(write(tmp_path, "seed: 1\n"))


def test_keys_that_do_not_change_the_result_are_left_out_of_what_decides(tmp_path):
    recipe = load_recipe(ExampleRecipe, write(tmp_path, BASE))
    assert "logging_steps" in recipe_to_dict(recipe)
    assert "logging_steps" not in deciding_keys(recipe)
    assert "max_steps" in deciding_keys(recipe)


def test_variables_are_filled_in_and_an_override_sets_them(tmp_path):
    text = "vars: {data: here}\nstage: example\ndataset_mixer:\n  - {path: '${data}/a.jsonl'}\n"
    path = write(tmp_path, text)
    assert load_recipe(ExampleRecipe, path).dataset_mixer == (Source("here/a.jsonl"),)
    assert load_recipe(ExampleRecipe, path, ["data=/x"]).dataset_mixer == (Source("/x/a.jsonl"),)


def test_a_variable_that_nothing_sets_is_named(tmp_path):
    message = refusal(tmp_path, BASE + "note: ${where}\n")
    assert "line 4" in message
    assert "${where} is not set" in message
