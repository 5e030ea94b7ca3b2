"""Stages in order: every stage's name, a stage's recipe with its variables, a list of stages run.

recipe file -> variables filled in -> stage recipe; pipeline file -> one such recipe per stage ->
each stage skipped, resumed, run, or run again with its old folder moved aside.
"""

import fcntl
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

from olmo_base.run.artefact import RunFolder, describe_inputs, read_manifest, run_identity
from olmo_base.run.errors import UserError
from olmo_base.run.launch import Launch
from olmo_base.run.recipe import (
    Given,
    RecipeError,
    build_recipe,
    fill_variables,
    flat_fields,
    parse_override,
    read_filled_keys,
    read_keys,
    recipe_to_dict,
    setting,
    take_variables,
    texts_in,
)
from open_instruct import shipped_folder

# ---------------------------------------------------------------- every stage


class Stage(NamedTuple):
    """What a stage's module offers."""

    recipe_class: type
    input_files: Callable[[Any], list[Path]]
    plan: Callable[..., dict[str, object]]  # of a recipe; and of a Launch, where it spreads
    run: Callable[[Any], RunFolder]
    spreads: bool = False  # whether many processes train it together


# Each imports its module when it is called: a pipeline file with a typo, or `--help`, should not
# wait for torch and transformers.


def _tinyworld() -> Stage:
    from open_instruct import tinyworld as module

    return Stage(module.TinyworldRecipe, module.input_files, module.plan, module.run)


def _tokenizer() -> Stage:
    from olmo_base import tokenizer as module

    return Stage(module.TokenizerRecipe, module.input_files, module.plan, module.run)


def _tokenize() -> Stage:
    from olmo_base.corpus import tokenize as module

    return Stage(module.TokenizeRecipe, module.input_files, module.plan, module.run)


def _pretrain() -> Stage:
    from olmo_base import pretrain as module

    return Stage(module.PretrainRecipe, module.input_files, module.plan, module.run, spreads=True)


def _sft() -> Stage:
    from open_instruct import sft as module

    return Stage(module.SftRecipe, module.input_files, module.plan, module.run, spreads=True)


def _dpo() -> Stage:
    from open_instruct import preference as module

    return Stage(module.PreferenceRecipe, module.input_files, module.plan, module.run, spreads=True)


def _reward() -> Stage:
    from open_instruct import reward as module

    return Stage(module.RewardRecipe, module.input_files, module.plan, module.run, spreads=True)


def _sample() -> Stage:
    from open_instruct import sample as module

    return Stage(module.SampleRecipe, module.input_files, module.plan, module.run)


def _score() -> Stage:
    from open_instruct import score as module

    return Stage(module.ScoreRecipe, module.input_files, module.plan, module.run)


def _eval() -> Stage:
    from eval import harness as module

    return Stage(module.EvalRecipe, module.input_files, module.plan, module.run)


STAGES: dict[str, Callable[[], Stage]] = {
    "tinyworld": _tinyworld,
    "tokenizer": _tokenizer,
    "tokenize": _tokenize,
    "pretrain": _pretrain,
    "sft": _sft,
    "dpo": _dpo,
    "reward": _reward,
    "sample": _sample,
    "score": _score,
    "eval": _eval,
}
MODEL_STAGES = ("pretrain", "sft", "dpo")  # whose folder is a model that can be talked to


def find_stage(word: str, place: str) -> Stage:
    """The stage a recipe's ``stage:`` names. Errors: UserError with the nearest known one."""
    if word in STAGES:
        return STAGES[word]()
    near = get_close_matches(word, [*STAGES, "pipeline"], n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UserError(
        f"{place}: stage: {word!r} is not a stage.{hint} "
        f"Stages: {', '.join([*STAGES, 'pipeline'])}."
    )


# ---------------------------------------------------------------- recipe files and their variables


def find_recipe(name: str) -> Path:
    """The recipe file of this name: a local path, or one that is shipped with the package.

    Errors: UserError that lists the nearest shipped recipes.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_folder("recipes")
    known = {f"recipes/{file.relative_to(shipped).as_posix()}": file for file in _yaml_in(shipped)}
    if path.is_dir():
        inside = [str(file) for file in _yaml_in(path)]
        listed = f" It holds {', '.join(inside[:8])}." if inside else ""
        raise UserError(f"{name} is a folder. Give the path of one recipe (YAML).{listed}")
    asked = path.as_posix().removeprefix("./")
    for spelled in (asked, f"{asked}.yaml", f"recipes/{asked}", f"recipes/{asked}.yaml"):
        if spelled in known:
            return known[spelled]
    near = get_close_matches(asked, known, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UserError(
        f"{name} does not exist.{hint} "
        f"Recipes that come with open-instruct: {', '.join(sorted(known)) or 'none'}."
    )


def _yaml_in(folder: Path) -> list[Path]:
    """The recipes in a folder; those in accelerate/ are for the launcher."""
    found = sorted(file for ending in ("*.yaml", "*.yml") for file in folder.rglob(ending))
    return [file for file in found if file.parent.name != "accelerate"]


def load_stage_recipe(
    path: Path,
    overrides: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    changes: Mapping[str, Given] | None = None,
) -> tuple[Stage, Any]:
    """A stage's recipe file, its ``vars:`` and overrides, as the stage and its frozen recipe.

    ``variables`` and ``changes`` are what a pipeline sets in it; ``overrides`` win over both. An
    override that names a variable, one of ``vars:`` or one that the recipe uses, sets it.
    Errors: UserError.
    """
    keys, values = read_filled_keys(path, overrides, variables, changes)
    if "stage" not in keys:
        raise UserError(
            f"{path} does not say its stage. Add a line such as 'stage: sft' "
            f"({', '.join([*STAGES, 'pipeline'])})."
        )
    stage = find_stage(str(keys["stage"].value), keys["stage"].place)
    both = sorted(values.keys() & flat_fields(stage.recipe_class).keys())
    if both:
        raise UserError(
            f"{path}: {both[0]!r} is the name of a variable and of a key of this stage. "
            "Rename the variable."
        )
    return stage, build_recipe(stage.recipe_class, keys, source=str(path))


# ---------------------------------------------------------------- the pipeline's own recipe


@dataclass(frozen=True)
class PipelineRecipe:
    """Stages to run in order.

    ``stages`` are paths of stage recipes, relative to the pipeline's file, or maps
    ``{recipe: path, name: word, key: value, …}`` that change keys of that recipe. In all of them
    ``${root}`` is ``output_dir`` and ``${name}`` the entry of ``vars``.
    """

    stage: Literal["pipeline"]
    output_dir: str
    stages: tuple[str | dict[str, Any], ...]
    vars: dict[str, str] = field(default_factory=dict)
    ask: str | None = setting(None, help="a question for the last model, when all is done")

    def __post_init__(self) -> None:
        if not self.stages:
            raise RecipeError("stages", "the list is empty; name at least one stage's recipe.")


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline, resolved."""

    name: str
    stage: Stage
    recipe: Any

    @property
    def folder(self) -> Path:
        """Where it keeps its run."""
        return Path(self.recipe.run.output_dir)


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> tuple[PipelineRecipe, list[Step]]:
    """A pipeline's file and the recipes of all its stages; nothing runs before all are valid.

    Overrides: ``root=FOLDER`` (or ``output_dir=``), ``VARIABLE=text``, a pipeline's key, or
    ``NAME.key=value`` for a key of the stage of that name. Errors: UserError.
    """
    keys = read_keys(path)
    place_of_stages = keys["stages"].place if "stages" in keys else str(path)
    values = take_variables(keys)
    of_stages: list[tuple[str, str]] = []  # (NAME.key, whole override)
    for text in overrides:
        key, value = parse_override(text)
        name = key.removeprefix("vars.")
        if name in values:
            values[name] = text.partition("=")[2]
        elif key == "root":
            keys["output_dir"] = Given(text.partition("=")[2], f"override {text!r}")
        elif "." in key:
            of_stages.append((key, text))
        elif key in flat_fields(PipelineRecipe):
            keys[key] = Given(value, f"override {text!r}")
        else:
            raise UserError(
                f"override {text!r}: a pipeline has no key or variable {key!r} "
                f"(variables: {', '.join(['root', *values])}). "
                f"To change a stage, write NAME.{text}, with the stage's name."
            )
    keys["vars"] = Given(values, str(path))
    recipe = build_recipe(PipelineRecipe, keys, source=str(path))
    variables = {"root": recipe.output_dir}
    for name, text in recipe.vars.items():
        variables[name] = fill_variables(text, variables, f"{path}: vars: {name}")

    steps: list[Step] = []
    items = [_read_item(item, path, place_of_stages) for item in recipe.stages]
    names = [name for name, _, _ in items]
    for key, text in of_stages:
        if key.partition(".")[0] not in names:
            raise UserError(
                f"override {text!r}: no stage is called {key.partition('.')[0]!r}. "
                f"Stages: {', '.join(names)}."
            )
    for name, file, changes in items:
        own = [
            f"{key.partition('.')[2]}={text.partition('=')[2]}"
            for key, text in of_stages
            if key.partition(".")[0] == name
        ]
        step = Step(name, *load_stage_recipe(file, own, variables, changes))
        for other in steps:
            if other.name == name:
                raise UserError(f"{path}: two stages are called {name!r}. Give one a 'name:'.")
            if _absolute(other.folder) == _absolute(step.folder):
                raise UserError(
                    f"{path}: the stages {other.name} and {name} both write to {step.folder}. "
                    "Give one another output_dir."
                )
        steps.append(step)
    return recipe, steps


def _read_item(item: Any, path: Path, place: str) -> tuple[str, Path, dict[str, Given]]:
    """An item of ``stages:`` -> (name, recipe file, changed keys)."""
    changes = {"recipe": item} if isinstance(item, str) else dict(item)
    named = changes.pop("recipe", None)
    if not isinstance(named, str):
        raise UserError(
            f"{place}: stages: the item {item!r} names no recipe. "
            "Write the path of a stage's recipe, or {recipe: path, key: value}."
        )
    file = path.parent / named
    if not file.is_file():
        raise UserError(
            f"{place}: stages: {file} does not exist. "
            "Paths of stages are relative to the pipeline's file."
        )
    name = str(changes.pop("name", file.stem)).replace("-", "_")
    return name, file, {key: Given(value, place) for key, value in changes.items()}


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))


# ---------------------------------------------------------------- what stands in a stage's folder

State = Literal["new", "unfinished", "finished", "changed"]


def state_of(step: Step) -> State:
    """What the step's folder holds: nothing, this run (stopped or finished), or another run.

    Errors: UserError if an input is missing.
    """
    manifest = read_manifest(step.folder)
    if manifest is None:
        return "new"
    inputs = describe_inputs(step.stage.input_files(step.recipe))
    hashes = {name: item["sha256"] for name, item in inputs.items()}
    if manifest.get("identity") != run_identity(step.recipe, hashes):
        return "changed"
    return "finished" if manifest.get("status") == "finished" else "unfinished"


def _needs(step: Step, others: Sequence[Step]) -> list[Step]:
    """Those of the other steps whose folder this step's recipe names."""

    keys = {key: value for key, value in recipe_to_dict(step.recipe).items() if key != "output_dir"}
    named = [_absolute(text) for text in texts_in(keys)]
    return [
        other
        for other in others
        if any(path.is_relative_to(_absolute(other.folder)) for path in named)
    ]


def move_aside(folder: Path) -> Path:
    """Rename a run's folder to ``<folder>.replaced-N`` with the first free N.

    Errors: UserError if a process is still working in it.
    """
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder} is in use by another process. Wait for it, or stop it first."
            ) from None
        number = 1
        while (aside := folder.with_name(f"{folder.name}.replaced-{number}")).exists():
            number += 1
        folder.rename(aside)
    return aside


# ---------------------------------------------------------------- planning and running


class Planned(NamedTuple):
    """What a pipeline would do with one step."""

    step: Step
    what: str  # a sentence
    figures: dict[str, object] | None  # the stage's own plan; None while it waits for others


def plan_stage(stage: Stage, recipe: Any, launch: Launch | None = None) -> dict[str, object]:
    """What a run of one stage would do. Errors: UserError, for an input that is missing too."""
    if launch is not None and not stage.spreads:
        raise UserError(f"stage: {recipe.stage} is not trained by many processes: plan it alone.")
    figures = stage.plan(recipe) if launch is None else stage.plan(recipe, launch)
    if "not_here" not in figures:  # the plan of a published model that is not downloaded
        stage.input_files(recipe)
    return figures


def plan(steps: Sequence[Step]) -> list[Planned]:
    """What running the steps would do now; touches nothing. Errors: UserError."""
    planned: list[Planned] = []
    to_run: list[Step] = []
    for step in steps:
        waits_for = [other.name for other in _needs(step, to_run)]
        if waits_for:
            to_run.append(step)
            planned.append(Planned(step, f"waits for {' and '.join(waits_for)}", None))
            continue
        state = state_of(step)
        if state != "finished":
            to_run.append(step)
        words = {
            "new": "would run",
            "unfinished": "would go on where it was stopped",
            "finished": "is finished and would be skipped",
            "changed": f"has changed and would run again; {step.folder} would be moved aside",
        }
        planned.append(Planned(step, words[state], step.stage.plan(step.recipe)))
    return planned


def run(steps: Sequence[Step]) -> list[RunFolder]:
    """Run the steps in order, each as its folder's state asks for; says what it does on stderr.

    A step whose recipe and inputs (by hash) are those of its finished run is skipped; an
    interrupted one goes on; a changed one runs again, its old folder moved aside, never deleted.
    Errors: UserError; Stopped, after which the same call goes on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "A pipeline runs in one process; this one is one of several. "
            "Launch its stages one by one: accelerate launch -m open_instruct run STAGE.yaml."
        )
    folders: list[RunFolder] = []
    rows: list[tuple[str, str, float]] = []
    for number, step in enumerate(steps, start=1):
        title = f"[{number}/{len(steps)}] {step.name}"
        started = time.monotonic()
        state = state_of(step)
        if state == "changed":
            aside = move_aside(step.folder)
            _say(f"{title}: changed since its last run; its old folder is now {aside}")
        words = {"finished": "finished before, skipped", "unfinished": "goes on where it stopped"}
        _say(f"{title}: {words.get(state, 'starts')} ({step.folder})")
        folders.append(step.stage.run(step.recipe))
        gc.collect()  # the last stage's model, before the next stage loads its own
        rows.append((step.name, words.get(state, "ran"), time.monotonic() - started))
    width = max(len(name) for name, _, _ in rows)
    _say("Stages:")
    for name, what, seconds in rows:
        _say(f"  {name:<{width}}  {seconds:8.1f} s  {what}")
    _say(f"  {'total':<{width}}  {sum(row[2] for row in rows):8.1f} s")
    return folders


def last_model(steps: Sequence[Step]) -> Path | None:
    """The folder of the last step that makes a model."""
    made = [step.folder for step in steps if step.recipe.stage in MODEL_STAGES]
    return made[-1] if made else None


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
