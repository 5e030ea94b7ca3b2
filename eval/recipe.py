"""What one evaluation chooses, and the tasks, files and questions that follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from eval.items import Item
from eval.judge import open_judge
from eval.questions import data_file, drawn, examples_file, read_items
from eval.served import is_served, served_arguments, served_name
from eval.tasks import NEEDS_JUDGE, Selection, Task, lm_engine, select
from olmo_base.run.artefact import RunConfig
from olmo_base.run.errors import UserError
from olmo_base.run.recipe import RecipeError, setting


@dataclass(frozen=True)
class EvalRecipe:
    """What one evaluation chooses."""

    stage: Literal["eval"]
    # Folders, names on the Hugging Face hub, or BACKEND:key=value,... for one that is served; the
    # first is the baseline.
    models: tuple[str, ...]
    run: RunConfig = field(default_factory=RunConfig)
    suite: str | None = None
    tasks: tuple[str, ...] = ()  # of the suite, or any if there is none
    include_path: str | None = None  # a folder of further task files
    data_dir: str | None = setting(None, changes_result=False)  # where tasks find their files
    # Where requests are kept: in output_dir if null; evaluations may share a folder.
    cache_dir: str | None = setting(None, changes_result=False)
    skip_missing: bool = False  # tasks without their files are left out, and the report says so
    limit: int | None = setting(None, low=1)  # questions of each task, drawn with the seed
    samples_only_failures: bool = False  # the texts of right answers are not kept
    max_new_tokens: int | None = setting(None, low=1)  # of an answer; the task's own if null
    # Of lm-eval's tasks; ours use a model's chat template wherever it answers in words.
    apply_chat_template: bool = False
    system_prompt: str | None = None
    # URL#MODEL of an OpenAI-compatible endpoint, up to and with /v1, that judges answers; its key
    # is read from OPEN_INSTRUCT_JUDGE_KEY. Tasks that need a judge are left out without one.
    judge: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: as the weights are stored
    batch_tokens: int = setting(8192, low=1, changes_result=False)
    generation_batch_size: int = setting(64, low=1, changes_result=False)
    # Training files or token shards, in which the questions are looked for.
    contamination: tuple[str, ...] = setting((), changes_result=False)

    def __post_init__(self) -> None:
        if not self.models:
            raise RecipeError("models", "the list is empty; name at least one model.")
        for model in self.models:
            if self.models.count(model) > 1:
                raise RecipeError("models", f"{model!r} is there twice.")
            if is_served(model):
                served_arguments(model)
        if self.suite is None and not self.tasks:
            raise RecipeError("suite", "name a suite, or tasks.")
        if self.system_prompt is not None and not self.apply_chat_template:
            raise RecipeError("system_prompt", "is read with apply_chat_template only.")
        if self.judge is not None:
            open_judge(self.judge)


# ---------------------------------------------------------------- what there is to do


def model_names(models: Sequence[str]) -> list[str]:
    """A short name for each model: the last part of its path, and more where that is not enough."""
    paths = [Path(served_name(model) if is_served(model) else model) for model in models]
    parts = [[part for part in path.parts if part not in ("/", "..")] for path in paths]
    names = ["model"] * len(models)
    for length in range(1, max(map(len, parts)) + 1):
        names = ["-".join(item[-length:]) or "model" for item in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{number}" for number, name in enumerate(names, start=1)]


def named_models(models: Sequence[str]) -> list[tuple[str, str]]:
    """(short name, model) of each."""
    return list(zip(model_names(models), models, strict=True))


def selected(recipe: EvalRecipe) -> Selection:
    """What is asked: without a judge, nothing that needs one.

    Errors: UserError naming all tasks whose files are missing, unless skipped.
    """
    selection = select(recipe.suite, recipe.tasks, recipe.include_path)
    if recipe.judge is None:
        judged = [task.name for task in selection.tasks if task.kind == "judged"]
        if len(judged) == len(selection.tasks):
            raise UserError(f"{judged[0]}: {NEEDS_JUDGE}")
        selection = selection.without(dict.fromkeys(judged, NEEDS_JUDGE))
    missing: dict[str, str] = {}
    for task in selection.tasks:
        if task.kind == "lm_eval":
            continue
        try:
            data_files(recipe, selection, task)
        except UserError as error:
            missing[task.name] = str(error)
    if not missing:
        return selection
    first = next(iter(missing.values()))
    if len(missing) == len(selection.tasks):
        raise UserError(first)
    if not recipe.skip_missing:
        raise UserError(
            f"{first} {len(missing)} of {len(selection.tasks)} tasks lack their files "
            f"({', '.join(missing)}); skip_missing (--skip-missing) leaves them out."
        )
    return selection.without(missing)


def read_questions(recipe: EvalRecipe, selection: Selection) -> dict[str, list[Item]]:
    """The questions of each task. Errors: UserError, DataError."""
    return {task.name: _read_items(recipe, selection, task) for task in selection.tasks}


def _read_items(recipe: EvalRecipe, selection: Selection, task: Task) -> list[Item]:
    if task.kind == "lm_eval":
        return drawn(lm_engine().read_questions(task), recipe.limit, recipe.run.seed)
    files = data_files(recipe, selection, task)
    return read_items(task, *files, limit=recipe.limit, seed=recipe.run.seed)


def data_files(recipe: EvalRecipe, selection: Selection, task: Task) -> list[Path]:
    """A task's questions, and the examples that it shows, if any."""
    if task.kind == "lm_eval":
        files: list[Path] = lm_engine().data_files(task)
        return files
    data_dir = recipe.data_dir or selection.data_dir
    examples = examples_file(task, data_dir)
    return [data_file(task, data_dir), *([] if examples is None else [examples])]
