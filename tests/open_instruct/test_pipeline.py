import json
from pathlib import Path

import pytest
import yaml

from olmo_base.run.artefact import RunFolder, read_manifest
from olmo_base.run.errors import UserError
from open_instruct import pipeline, shipped_folder

STAGES = {
    "tokenizer.yaml": {
        "stage": "tokenizer",
        "dataset_mixer": [{"path": "${data}/text.jsonl"}],
        "vocab_size": 300,
        "output_dir": "${root}/tokenizer",
    },
    "tokenize.yaml": {
        "stage": "tokenize",
        "tokenizer_name_or_path": "${root}/tokenizer",
        "dataset_mixer": [{"path": "${data}/text.jsonl"}],
        "output_dir": "${root}/tokens",
    },
    "pipeline.yaml": {
        "stage": "pipeline",
        "output_dir": "runs/small",
        "vars": {"data": "data"},
        "stages": ["tokenizer.yaml", {"recipe": "tokenize.yaml", "name": "tokens"}],
    },
}


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A folder of recipes for two quick stages; the working directory holds their data."""
    monkeypatch.chdir(tmp_path)
    write_text(
        tmp_path, ["the quick brown fox jumps over the lazy dog while seven grey geese sleep"] * 8
    )
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name, content in STAGES.items():
        (folder / name).write_text(yaml.safe_dump(content))
    return folder


def write_text(folder: Path, texts: list[str]) -> None:
    (folder / "data").mkdir(exist_ok=True)
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "data" / "text.jsonl").write_text("".join(rows))


def change(recipes: Path, name: str, **keys) -> None:
    path = recipes / name
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}))


def run(recipes: Path, *overrides: str) -> list[RunFolder]:
    return pipeline.run(pipeline.load_pipeline(recipes / "pipeline.yaml", overrides)[1])


def states(recipes: Path, *overrides: str) -> list[str]:
    _, steps = pipeline.load_pipeline(recipes / "pipeline.yaml", overrides)
    return [pipeline.state_of(step) for step in steps]


def sessions(folder: str) -> list:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest["sessions"]


# ---------------------------------------------------------------- running


def test_stages_run_in_order_and_are_skipped_the_second_time(recipes, capsys):
    first = run(recipes)
    assert [folder.path for folder in first] == [
        Path("runs/small/tokenizer"),
        Path("runs/small/tokens"),
    ]
    written = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    capsys.readouterr()
    second = run(recipes)
    assert all(folder.is_finished for folder in second)
    assert written == {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    assert capsys.readouterr().err.count("finished before, skipped (") == 2


def test_a_changed_stage_and_those_after_it_run_again_and_nothing_is_deleted(recipes, capsys):
    run(recipes)
    before = Path("runs/small/tokenizer/tokenizer.json").read_bytes()
    run(recipes, "tokenizer.vocab_size=310")
    assert Path("runs/small/tokenizer/tokenizer.json").read_bytes() != before
    assert Path("runs/small/tokenizer.replaced-1/tokenizer.json").read_bytes() == before
    assert Path("runs/small/tokens.replaced-1/manifest.json").exists()
    assert "its old folder is now runs/small/tokenizer.replaced-1" in capsys.readouterr().err


def test_a_changed_stage_with_the_same_result_leaves_the_next_as_it_is(recipes):
    run(recipes)
    run(recipes, "tokenizer.min_frequency=3")  # every pair occurs 8 times
    assert Path("runs/small/tokenizer.replaced-1").exists()
    assert not Path("runs/small/tokens.replaced-1").exists()


def test_a_change_of_the_last_stage_leaves_the_first_alone(recipes):
    run(recipes)
    run(recipes, "tokens.tokens_per_shard=50")
    assert Path("runs/small/tokens.replaced-1").exists()
    assert not Path("runs/small/tokenizer.replaced-1").exists()


def test_changed_data_runs_again_and_the_old_folders_are_numbered(recipes):
    for number in range(3):
        write_text(
            recipes.parent, [f"text number {number}: many brown geese jump over lazy seals"] * 9
        )
        run(recipes)
    assert {path.name for path in Path("runs/small").glob("tokens*")} == {
        "tokens",
        "tokens.replaced-1",
        "tokens.replaced-2",
    }


def test_a_key_that_cannot_change_the_result_is_no_change(recipes):
    run(recipes)
    assert states(recipes, "tokens.num_proc=2") == ["finished", "finished"]


def test_an_unfinished_run_is_gone_on_with_in_its_own_folder(recipes, capsys):
    _, steps = pipeline.load_pipeline(recipes / "pipeline.yaml")
    step = steps[0]
    stopped = RunFolder.open(step.recipe, step.stage.input_files(step.recipe))
    stopped.release()  # as when its process ends
    assert states(recipes)[0] == "unfinished"
    run(recipes)
    assert states(recipes) == ["finished", "finished"]
    assert len(sessions("runs/small/tokenizer")) == 2
    assert "tokenizer: goes on where it stopped" in capsys.readouterr().err


def test_a_folder_in_use_is_not_moved_aside(recipes):
    _, steps = pipeline.load_pipeline(recipes / "pipeline.yaml")
    step = steps[0]
    busy = RunFolder.open(step.recipe, step.stage.input_files(step.recipe))
    with pytest.raises(UserError, match="in use by another process"):
        run(recipes, "tokenizer.vocab_size=310")
    busy.release()


def test_a_folder_that_holds_something_else_is_refused_and_kept(recipes):
    Path("runs/small/tokenizer").mkdir(parents=True)
    Path("runs/small/tokenizer/diary.txt").write_text("mine")
    with pytest.raises(UserError, match=r"diary\.txt"):
        run(recipes)
    assert Path("runs/small/tokenizer/diary.txt").read_text() == "mine"


# ---------------------------------------------------------------- variables and overrides


def test_one_override_moves_everything(recipes, tmp_path):
    for override in (f"root={tmp_path}/a", f"output_dir={tmp_path}/b"):
        run(recipes, override)
    assert (tmp_path / "a/tokens/manifest.json").exists()
    assert (tmp_path / "b/tokens/manifest.json").exists()
    assert not Path("runs").exists()


def test_a_variable_is_overridden_by_its_name(recipes, tmp_path):
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    for override in ("data=elsewhere", "vars.data=elsewhere"):
        _, steps = pipeline.load_pipeline(recipes / "pipeline.yaml", [override])
        assert steps[0].recipe.dataset_mixer[0].path == "elsewhere/text.jsonl"


def test_a_variable_may_use_the_root(recipes):
    change(recipes, "pipeline.yaml", vars={"data": "${root}/data"})
    _, steps = pipeline.load_pipeline(recipes / "pipeline.yaml", ["root=x"])
    assert steps[0].recipe.dataset_mixer[0].path == "x/data/text.jsonl"


def test_a_stage_recipe_runs_alone_with_variables_of_its_own(recipes):
    path = recipes / "tokenizer.yaml"
    with pytest.raises(UserError, match=r"\$\{data\} is not set.*data=VALUE"):
        pipeline.load_stage_recipe(path)
    _, recipe = pipeline.load_stage_recipe(path, ["root=x", "data=data"])
    assert recipe.run.output_dir == "x/tokenizer"
    change(recipes, "tokenizer.yaml", vars={"root": "runs/alone", "data": "data"})
    _, recipe = pipeline.load_stage_recipe(path)
    assert recipe.run.output_dir == "runs/alone/tokenizer"
    _, recipe = pipeline.load_stage_recipe(path, ["root=other", "vocab_size=400"])
    assert (recipe.run.output_dir, recipe.vocab_size) == ("other/tokenizer", 400)
    _, steps = pipeline.load_pipeline(recipes / "pipeline.yaml")
    assert steps[0].recipe.run.output_dir == "runs/small/tokenizer"  # the pipeline's win


def test_a_variable_may_not_be_called_like_a_key(recipes):
    change(recipes, "tokenizer.yaml", vars={"vocab_size": "300"})
    with pytest.raises(UserError, match="'vocab_size' is the name of a variable and of a key"):
        pipeline.load_pipeline(recipes / "pipeline.yaml")


def test_an_item_of_the_list_changes_keys_and_an_override_wins_over_it(recipes):
    items = [{"recipe": "tokenizer.yaml", "vocab_size": 320}, "tokenize.yaml"]
    change(recipes, "pipeline.yaml", stages=items)
    load = pipeline.load_pipeline
    assert load(recipes / "pipeline.yaml")[1][0].recipe.vocab_size == 320
    assert (
        load(recipes / "pipeline.yaml", ["tokenizer.vocab_size=330"])[1][0].recipe.vocab_size == 330
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["vocab_size=310"], r"no key or variable 'vocab_size' .*NAME\.vocab_size=310"),
        (["tokeniser.vocab_size=310"], "no stage is called 'tokeniser'. Stages: tokenizer, tokens"),
        (["tokenizer.vocab_sise=310"], "Did you mean 'vocab_size'"),
        (["tokenizer.vocab_size=many"], "'many' must be a whole number"),
        (["nonsense"], "not of the form key=value"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused_by_name(recipes, overrides, message):
    with pytest.raises(UserError, match=message):
        pipeline.load_pipeline(recipes / "pipeline.yaml", overrides)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stages": []}, "the list is empty"),
        ({"stages": ["missing.yaml"]}, r"line \d+: stages: .*missing.yaml does not exist"),
        ({"stages": [{"vocab_size": 5}]}, "names no recipe"),
        ({"stages": ["tokenizer.yaml", "tokenizer.yaml"]}, "two stages are called 'tokenizer'"),
        (
            {"stages": ["tokenizer.yaml", {"recipe": "tokenizer.yaml", "name": "again"}]},
            "both write to runs/small/tokenizer",
        ),
        ({"stages": [{"recipe": "tokenizer.yaml", "stage": "tokeniser"}]}, "'tokenizer'"),
        ({"vars": ["data"]}, "must be a map"),
        ({"asks": "Why?"}, "Did you mean 'ask'"),
    ],
)
def test_a_pipeline_that_cannot_be_used_is_refused(recipes, keys, message):
    change(recipes, "pipeline.yaml", **keys)
    with pytest.raises(UserError, match=message):
        pipeline.load_pipeline(recipes / "pipeline.yaml")


def test_a_typo_in_the_last_stage_is_found_before_the_first_runs(recipes):
    change(recipes, "tokenize.yaml", tokens_per_shart=5)
    with pytest.raises(UserError, match=r"tokenize\.yaml, line \d+: .*'tokens_per_shard'"):
        run(recipes)
    assert not Path("runs").exists()


# ---------------------------------------------------------------- planning


def test_a_plan_says_what_waits_for_what_and_touches_nothing(recipes):
    before = sorted(Path(".").rglob("*"))
    first, second = pipeline.plan(pipeline.load_pipeline(recipes / "pipeline.yaml")[1])
    assert (first.what, second.what) == ("would run", "waits for tokenizer")
    assert first.figures and second.figures is None
    assert sorted(Path(".").rglob("*")) == before


def test_a_plan_knows_finished_and_changed_stages(recipes):
    run(recipes)
    load = pipeline.load_pipeline
    done = pipeline.plan(load(recipes / "pipeline.yaml")[1])
    assert [planned.what for planned in done] == ["is finished and would be skipped"] * 2
    changed = pipeline.plan(load(recipes / "pipeline.yaml", ["tokenizer.vocab_size=310"])[1])
    assert changed[0].what.startswith("has changed and would run again")
    assert changed[1].what == "waits for tokenizer"


# ---------------------------------------------------------------- finding recipes


def test_a_shipped_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = sorted(shipped_folder("recipes").glob("[!a]*/**/*.yaml"))
    assert shipped
    for file in shipped:
        name = file.relative_to(shipped_folder("recipes")).as_posix()
        assert pipeline.find_recipe(f"recipes/{name}") == file
        assert pipeline.find_recipe(name.removesuffix(".yaml")) == file


def test_a_local_recipe_comes_before_a_shipped_one_of_the_same_name(recipes):
    (recipes / "quickstart").mkdir()
    (recipes / "quickstart" / "pipeline.yaml").write_text("stage: pipeline")
    name = "recipes/quickstart/pipeline.yaml"
    assert pipeline.find_recipe(name) == Path(name)


def test_an_unknown_recipe_suggests_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"Did you mean recipes/debug/pipeline\.yaml"):
        pipeline.find_recipe("recipes/debug/pipelne.yaml")
    with pytest.raises(UserError, match="is a folder"):
        pipeline.find_recipe(str(tmp_path))
