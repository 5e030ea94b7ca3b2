"""The evaluation stage: models and a suite in, samples and a report out.

recipe -> tasks and their questions -> each model asked each task -> samples/<model>/<task>.jsonl
-> the report. A finished samples file is never made twice.
"""

import dataclasses
import gc
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from eval.asking import Subject, ask, load_encoders, load_subject
from eval.questions import Document, Item, data_file, read_items
from eval.report import write_report
from eval.report.gather import EVALUATION, SAMPLES
from eval.report.training import model_facts
from eval.tasks import Selection, Task, select
from olmo_base.run.artefact import (
    RunConfig,
    RunFolder,
    atomic_write,
    model_files,
    read_manifest,
    resolve_model,
)
from olmo_base.run.errors import Stopped
from olmo_base.run.launch import StopFlag, seed_everything, stop_signals
from olmo_base.run.metrics import Progress
from olmo_base.run.recipe import RecipeError, setting
from olmo_base.scorer import MAX_LOGITS

SAMPLES_VERSION = 1  # raise it when the same question would be asked or judged differently


@dataclass(frozen=True)
class EvalRecipe:
    """What one evaluation chooses."""

    stage: Literal["eval"]
    models: tuple[str, ...]  # folders, or names on the Hugging Face hub; the first is the baseline
    run: RunConfig = field(default_factory=RunConfig)
    suite: str | None = None
    tasks: tuple[str, ...] = ()  # of the suite, or any if there is none
    include_path: str | None = None  # a folder of further task files
    data_dir: str | None = setting(None, changes_result=False)  # where tasks find their files
    limit: int | None = setting(None, low=1)  # questions of each task, drawn with the seed
    max_new_tokens: int | None = setting(None, low=1)  # of an answer; the task's own if null
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: as the weights are stored
    batch_tokens: int = setting(8192, low=1, changes_result=False)
    generation_batch_size: int = setting(64, low=1, changes_result=False)

    def __post_init__(self) -> None:
        if not self.models:
            raise RecipeError("models", "the list is empty; name at least one model.")
        for model in self.models:
            if self.models.count(model) > 1:
                raise RecipeError("models", f"{model!r} is there twice.")
        if self.suite is None and not self.tasks:
            raise RecipeError("suite", "name a suite, or tasks.")


# ---------------------------------------------------------------- what there is to do


def model_names(models: Sequence[str]) -> list[str]:
    """A short name for each model: the last part of its path, and more where that is not enough."""
    parts = [[part for part in Path(model).parts if part not in ("/", "..")] for model in models]
    names = ["model"] * len(models)
    for length in range(1, max(map(len, parts)) + 1):
        names = ["-".join(item[-length:]) or "model" for item in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{number}" for number, name in enumerate(names, start=1)]


def _selection(recipe: EvalRecipe) -> Selection:
    return select(recipe.suite, recipe.tasks, recipe.include_path)


def input_files(recipe: EvalRecipe) -> list[Path]:
    """The models' files, the tasks' data and their definitions. Errors: UserError if one lacks."""
    selection = _selection(recipe)
    files = [_data_file(recipe, selection, task) for task in selection.tasks]
    for model in recipe.models:
        files += model_files(model)
    return list(dict.fromkeys([*files, *selection.sources]))


def plan(recipe: EvalRecipe) -> dict[str, object]:
    """How much an evaluation asks; reads the questions and the sizes of the models."""
    selection = _selection(recipe)
    questions = _read_questions(recipe, selection)
    facts = [model_facts(resolve_model(model)) for model in recipe.models]
    largest = max((item.num_parameters for item in facts if item), default=0)
    return {
        "models": len(recipe.models),
        "questions": {name: len(items) for name, items in questions.items()},
        "questions_in_all": sum(map(len, questions.values())) * len(recipe.models),
        "memory_bytes": 4 * largest + 3 * 4 * MAX_LOGITS,
    }


def _read_questions(recipe: EvalRecipe, selection: Selection) -> dict[str, list[Item]]:
    return {
        task.name: read_items(
            task,
            _data_file(recipe, selection, task),
            limit=recipe.limit,
            seed=recipe.run.seed,
        )
        for task in selection.tasks
    }


def _data_file(recipe: EvalRecipe, selection: Selection, task: Task) -> Path:
    return data_file(task, recipe.data_dir or selection.data_dir)


def _weight(items: Sequence[Item]) -> int:
    """Progress counts questions, and a document as many as it has thousands of characters."""
    return sum(1 + len(item.text) // 1000 if isinstance(item, Document) else 1 for item in items)


# ---------------------------------------------------------------- doing it


def run(recipe: EvalRecipe) -> RunFolder:
    """Ask every model every task and write the report; prints the score table and its path.

    After a kill the same call makes only the samples that are missing. Errors: UserError,
    DataError; Stopped on Ctrl-C or SIGTERM.
    """
    folder = RunFolder.open(recipe, input_files(recipe))
    if folder.is_finished:
        if folder.is_main:
            write_report([folder.path], show=True)
        return folder
    try:
        _evaluate(recipe, folder)
    finally:
        folder.release()
    return folder


def _evaluate(recipe: EvalRecipe, folder: RunFolder) -> None:
    selection = _selection(recipe)
    for model in recipe.models:
        load_encoders(model)  # a folder without a tokenizer is found before hours of work
    questions = _read_questions(recipe, selection)
    names = model_names(recipe.models)
    content = selection.as_dict() | {
        "models": [
            {"name": name, "path": model} for name, model in zip(names, recipe.models, strict=True)
        ]
    }
    atomic_write(folder.path / EVALUATION, json.dumps(content, indent=2) + "\n")
    seed_everything(recipe.run.seed)
    total = len(recipe.models) * sum(map(_weight, questions.values()))
    with (
        stop_signals() as stop,
        Progress(folder, "evaluation", total, unit="questions") as progress,
    ):
        done = 0
        for name, model in zip(names, recipe.models, strict=True):
            done = _ask_model(
                recipe, folder, selection, questions, name, model, stop, progress, done
            )
    folder.note_time()
    path = write_report([folder.path], show=True)
    scores = json.loads((folder.path / "report.json").read_text(encoding="utf-8"))
    folder.counts.used = sum(map(len, questions.values()))
    folder.finish(
        report=str(path),
        scores={
            item["name"]: {group: score["value"] for group, score in item["groups"].items()}
            for item in scores["models"]
        },
    )


def _ask_model(
    recipe: EvalRecipe,
    folder: RunFolder,
    selection: Selection,
    questions: dict[str, list[Item]],
    name: str,
    model: str,
    stop: StopFlag,
    progress: Progress,
    done: int,
) -> int:
    """One model's tasks, those with finished samples skipped; returns what is done then."""
    subject: Subject | None = None
    for task in selection.tasks:
        weight = _weight(questions[task.name])
        samples = folder.path / SAMPLES / name / f"{task.name}.jsonl"
        key = _samples_key(recipe, folder, selection, task, model)
        if not _is_finished(samples, key):
            if subject is None:
                subject = load_subject(
                    model,
                    batch_tokens=recipe.batch_tokens,
                    batch_size=recipe.generation_batch_size,
                    dtype=None if recipe.dtype == "auto" else getattr(torch, recipe.dtype),
                )
            started = time.monotonic()
            scale = weight / len(questions[task.name])

            def on_progress(count: float, before: int = done, scale: float = scale) -> None:
                progress.update(before + int(count * scale))
                if stop.requested:
                    raise Stopped(stop.signal_number, "finished tasks are kept")

            rows = ask(
                subject,
                task,
                questions[task.name],
                max_new_tokens=recipe.max_new_tokens,
                on_progress=on_progress,
            )
            record = {
                "key": key,
                "task": task.name,
                "model": model,
                "seconds": round(time.monotonic() - started, 3),
                "uses_chat_template": subject.encoder is not None and task.kind == "exact_match",
                "not_fitting": sum(bool(row.get("not_fitting")) for row in rows),
                "context_cut": sum(bool(row.get("context_cut")) for row in rows),
            }
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            atomic_write(samples, lines)
            # Written last: samples count as finished once their record is there.
            atomic_write(samples.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
            _warn(folder, name, record, len(rows))
        done += weight
        progress.update(done)
    del subject
    gc.collect()
    return done


def _warn(folder: RunFolder, name: str, record: dict[str, Any], number: int) -> None:
    if record["not_fitting"]:
        folder.log(
            f"{name}: {record['not_fitting']:,} of {number:,} questions of {record['task']} do "
            "not fit the model's context; they count as wrong."
        )
    if record["context_cut"]:
        folder.log(
            f"{name}: {record['context_cut']:,} of {number:,} contexts of {record['task']} lost "
            "their beginning, because they are too long for the model."
        )


def _samples_key(
    recipe: EvalRecipe, folder: RunFolder, selection: Selection, task: Task, model: str
) -> str:
    """What decides a samples file: the model's files, the questions, and how they are asked."""
    hashes = {
        path: item["sha256"]
        for path, item in (read_manifest(folder.path) or {}).get("inputs", {}).items()
    }
    content = {
        "version": SAMPLES_VERSION,
        "model": sorted((path.name, hashes[str(path)]) for path in model_files(model)),
        "data": hashes[str(_data_file(recipe, selection, task))],
        "task": dataclasses.asdict(task) | {"file": None, "about": None},
        "limit": recipe.limit,
        "seed": recipe.run.seed,
        "max_new_tokens": recipe.max_new_tokens,
        "dtype": recipe.dtype,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_finished(samples: Path, key: str) -> bool:
    """Whether the samples are there and were made from the same things."""
    try:
        record = json.loads(samples.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return samples.is_file() and isinstance(record, dict) and record.get("key") == key


# ---------------------------------------------------------------- the verb


def evaluate(
    models: Sequence[str],
    *,
    output_dir: str,
    suite: str | None = None,
    tasks: Sequence[str] = (),
    data_dir: str | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    batch_tokens: int = 8192,
    generation_batch_size: int = 64,
    seed: int = 42,
) -> RunFolder:
    """Compare models on a suite or on tasks: the verb ``open-instruct eval``.

    Prints the score table and the report's path. Errors: UserError.
    """
    if suite is None and not tasks:
        select(None)  # says which suites there are
    recipe = EvalRecipe(
        stage="eval",
        models=tuple(models),
        run=RunConfig(output_dir=output_dir, seed=seed),
        suite=suite,
        tasks=tuple(tasks),
        data_dir=data_dir,
        include_path=include_path,
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        generation_batch_size=generation_batch_size,
    )
    return run(recipe)
