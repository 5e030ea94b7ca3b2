"""The evaluation stage: models and a suite in, samples and a report out.

recipe -> tasks and their questions -> each model asked each task -> samples/<model>/<task>.jsonl
-> the report. A finished samples file is never made twice, and nor is a request of an unfinished
one: the cache has it. Under torchrun or accelerate launch the processes share the requests.
"""

import dataclasses
import gc
import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.asking import ask
from eval.cache import RequestCache, fingerprint
from eval.contamination import note_overlaps, question_texts, refuse_unreadable
from eval.items import Document, Foreign, Item
from eval.judge import Judge, JudgeError, open_judge
from eval.ranks import end_ranks, gathered, is_first, start_ranks, wait_for_all
from eval.recipe import EvalRecipe, data_files, named_models, read_questions, selected
from eval.report import write_report
from eval.report.gather import EVALUATION, SAMPLES, read_samples
from eval.report.training import model_facts
from eval.served import Served, is_served, refuse_unanswerable
from eval.subject import OnProgress, Subject, load_encoders, load_subject
from eval.tasks import IN_WORDS, Selection, Task, lm_engine, select
from olmo_base.run.artefact import (
    RunConfig,
    RunFolder,
    atomic_write,
    model_files,
    read_manifest,
    resolve_model,
)
from olmo_base.run.errors import Stopped, UserError
from olmo_base.run.launch import StopFlag, pick_device, seed_everything, stop_signals
from olmo_base.run.metrics import Progress
from olmo_base.scorer import MAX_LOGITS
from open_instruct.verifiers import VERIFIERS

CACHE = "cache"  # folder of the computed requests in an evaluation's own
SPENT = ("computed", "reused", "prompt_tokens", "answer_tokens")
SAMPLES_VERSION = 2  # raise it when the same question would be asked or judged differently


# ---------------------------------------------------------------- what there is to do


def input_files(recipe: EvalRecipe) -> list[Path]:
    """The models' files, the tasks' data and their definitions. Errors: UserError if one lacks."""
    selection = selected(recipe)
    files = [path for task in selection.tasks for path in data_files(recipe, selection, task)]
    for model in recipe.models:
        files += [] if is_served(model) else model_files(model)
    return list(dict.fromkeys([*files, *selection.sources]))


def plan(recipe: EvalRecipe) -> dict[str, object]:
    """How much an evaluation asks; reads the questions and the sizes of the models."""
    selection = selected(recipe)
    questions = read_questions(recipe, selection)
    facts = [model_facts(resolve_model(m)) for m in recipe.models if not is_served(m)]
    largest = max((item.num_parameters for item in facts if item), default=0)
    return {
        "models": len(recipe.models),
        "questions": {name: len(items) for name, items in questions.items()},
        "questions_in_all": sum(map(len, questions.values())) * len(recipe.models),
        "memory_bytes": 4 * largest + 3 * 4 * MAX_LOGITS,
    }


# ---------------------------------------------------------------- doing it


def run(recipe: EvalRecipe) -> RunFolder:
    """Ask every model every task and write the report; prints the score table and its path.

    After a kill the same call makes only the samples that are missing. Errors: UserError,
    DataError; Stopped on Ctrl-C or SIGTERM.
    """
    has_joined = start_ranks()
    try:
        return _run(recipe)
    finally:
        if has_joined:
            end_ranks()


def _run(recipe: EvalRecipe) -> RunFolder:
    if not is_first():
        wait_for_all()  # the first process makes the folder
    folder = RunFolder.open(recipe, input_files(recipe))
    if is_first():
        wait_for_all()
    if folder.is_finished:
        if is_first():
            _note_overlaps(recipe, folder)
            write_report([folder.path], show=True)
        return folder
    try:
        _evaluate(recipe, folder)
    finally:
        folder.release()
    return folder


def _evaluate(recipe: EvalRecipe, folder: RunFolder) -> None:
    selection = selected(recipe)
    if recipe.apply_chat_template and not any(task.kind == "lm_eval" for task in selection.tasks):
        raise UserError(
            "apply_chat_template is for tasks of lm-eval, and there are none. Ours use a model's "
            "chat template by themselves; leave it out."
        )
    for model in recipe.models:
        # What cannot be asked is found before hours of work, as a folder without a tokenizer is.
        if is_served(model):
            refuse_unanswerable(model, selection.tasks, recipe.apply_chat_template)
            continue
        _, encoder = load_encoders(model)
        if recipe.apply_chat_template and encoder is None:
            raise UserError(
                f"{model} has no chat template, which apply_chat_template needs. Leave it out, or "
                "give a model that was tuned on dialogues."
            )
        in_chat = [task.name for task in selection.tasks if task.apply_chat_template]
        if in_chat and encoder is None:
            raise UserError(
                f"{model} has no chat template, in which {', '.join(in_chat[:5])} "
                f"{'is' if len(in_chat) == 1 else 'are'} asked (apply_chat_template). Leave "
                "that out with --tasks, or give a model that was tuned on dialogues."
            )
    for training_path in recipe.contamination:
        refuse_unreadable(Path(training_path))
    for task in selection.tasks:
        if task.verifier is not None:
            VERIFIERS[task.verifier].check_ready()
    jobs = _jobs(recipe, folder, selection)
    for name, reason in selection.skipped.items() if is_first() else ():
        folder.log(f"{name} is left out: {reason}")
    models = [{"name": name, "path": model} for name, model in named_models(recipe.models)]
    content = json.dumps(selection.as_dict() | {"models": models}, indent=2)
    if is_first():
        atomic_write(folder.path / EVALUATION, content + "\n")
    # The first process says what is finished: it may already be writing when the others look.
    is_finished = gathered(
        {number: job.is_finished() for number, job in enumerate(jobs)} if is_first() else {}
    )
    judge = None
    if any(job.task.kind == "judged" and not is_finished[n] for n, job in enumerate(jobs)):
        judge = open_judge(recipe.judge or "")
        judge.open_cache(Path(recipe.cache_dir) if recipe.cache_dir else folder.path / CACHE)
        judge.check_ready()
    judge_problems: list[JudgeError] = []
    seed_everything(recipe.run.seed)
    total = sum(job.weight for job in jobs)
    with (
        stop_signals() as stop,
        Progress(folder, "evaluation", total, unit="questions") as progress,
    ):
        done = 0
        numbered = enumerate(jobs)
        for model, of_model in itertools.groupby(numbered, key=lambda item: item[1].model):
            subject: Subject | Served | None = None
            for number, job in of_model:
                if not is_finished[number]:
                    subject = subject or _load(recipe, folder, model)
                    ticker = _Ticker(progress, stop, done, job)
                    try:
                        _ask(recipe, folder, job, subject, judge, ticker)
                    except JudgeError as error:  # all else can be asked without it
                        judge_problems.append(error)
                done += job.weight
                progress.update(done)
            if subject is not None and subject.cache is not None:
                subject.cache.close()
            del subject
            gc.collect()  # one model's weights, before the next one's are loaded
    if not is_first():
        return
    _note_overlaps(recipe, folder)
    folder.note_time()
    if judge_problems:
        write_report([folder.path], show=True)
        raise UserError(
            f"{judge_problems[0]} The report shows everything else. Answers and verdicts are kept: "
            "give the same command again to go on."
        )
    path = write_report([folder.path], show=True)
    report = json.loads((folder.path / "report.json").read_text(encoding="utf-8"))
    folder.counts.used = sum(len(job.items) for job in jobs if job.model == recipe.models[0])
    folder.finish(
        report=str(path),
        scores={
            item["name"]: {group: score["value"] for group, score in item["groups"].items()}
            for item in report["models"]
        },
    )


def _note_overlaps(recipe: EvalRecipe, folder: RunFolder) -> None:
    """Look for the questions in the training text that the recipe names, if it names any."""
    if not recipe.contamination:
        return
    selection = selected(recipe)
    first_model, _ = named_models(recipe.models)[0]
    texts = {}
    for name, items in read_questions(recipe, selection).items():
        theirs = any(isinstance(item, Foreign) for item in items)
        samples = folder.path / SAMPLES / first_model / f"{name}.jsonl"
        texts[name] = question_texts(items, read_samples(samples) if theirs else ())
    note_overlaps(folder.path, recipe.contamination, texts, folder.log)


@dataclass(frozen=True)
class Job:
    """One task that one model is asked."""

    name: str  # of the model
    model: str
    task: Task
    items: Sequence[Item]
    samples: Path
    key: str  # what decides the samples

    @property
    def record(self) -> Path:
        """The file beside the samples that says how they were made."""
        return self.samples.with_suffix(".json")

    @property
    def weight(self) -> int:
        """For the progress: questions; of a document, thousands of characters."""
        return sum(
            1 + len(item.text) // 1000 if isinstance(item, Document) else 1 for item in self.items
        )

    def is_finished(self) -> bool:
        """Whether the samples are there and were made from the same things."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        is_same = isinstance(record, dict) and record.get("key") == self.key
        return is_same and self.samples.is_file()


def _jobs(recipe: EvalRecipe, folder: RunFolder, selection: Selection) -> list[Job]:
    questions = read_questions(recipe, selection)
    inputs = (read_manifest(folder.path) or {}).get("inputs", {})
    jobs = []
    for name, model in named_models(recipe.models):
        weights = _weights(folder, model)
        for task in selection.tasks:
            content = {
                "version": SAMPLES_VERSION,
                "model": weights,
                "data": [
                    inputs[str(path)]["sha256"] for path in data_files(recipe, selection, task)
                ],
                "task": dataclasses.asdict(task)
                | {"file": None, "about": None, "hub": None, "hub_examples": None},
                "limit": recipe.limit,
                "seed": recipe.run.seed,
                "max_new_tokens": recipe.max_new_tokens,
                "samples_only_failures": recipe.samples_only_failures,
                "dtype": recipe.dtype,
            }
            if task.kind == "lm_eval":
                content |= {
                    "apply_chat_template": recipe.apply_chat_template,
                    "system_prompt": recipe.system_prompt,
                }
            if task.kind == "judged":
                content["judge"] = recipe.judge
            key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
            samples = folder.path / SAMPLES / name / f"{task.name}.jsonl"
            jobs.append(Job(name, model, task, questions[task.name], samples, key))
    return jobs


def _weights(folder: RunFolder, model: str) -> list[tuple[str, str]]:
    """What a model is: the names and digests of its weights, tokenizer, template and settings."""
    if is_served(model):
        return [("served", model)]
    inputs = (read_manifest(folder.path) or {}).get("inputs", {})
    return sorted((path.name, inputs[str(path)]["sha256"]) for path in model_files(model))


def _load(recipe: EvalRecipe, folder: RunFolder, model: str) -> Subject | Served:
    if is_served(model):
        # Not where other evaluations look: another model may stand behind the same name by then.
        return Served(
            model, RequestCache(folder.path / CACHE / f"{fingerprint(served=model)}.cache")
        )
    subject = load_subject(
        model,
        batch_tokens=recipe.batch_tokens,
        batch_size=recipe.generation_batch_size,
        dtype=None if recipe.dtype == "auto" else getattr(torch, recipe.dtype),
    )
    cache_dir = Path(recipe.cache_dir) if recipe.cache_dir else folder.path / CACHE
    name = fingerprint(
        model=_weights(folder, model),
        dtype=str(next(subject.model.parameters()).dtype),
        device=pick_device().type,
    )
    subject.cache = RequestCache(cache_dir / f"{name}.cache")
    if subject.cache.num_damaged:
        folder.log(
            f"{subject.cache.path}: {subject.cache.num_damaged:,} entries are damaged; what they "
            "held is computed again."
        )
    return subject


@dataclass(frozen=True)
class _Ticker:
    """Told how many questions of a job are done; moves the bar, and ends the job on a signal."""

    progress: Progress
    stop: StopFlag
    done_before: int
    job: Job

    def __call__(self, count: float) -> None:
        share = count / len(self.job.items)
        self.progress.update(self.done_before + int(share * self.job.weight))
        if self.stop.requested:
            raise Stopped(self.stop.signal_number, "what was computed is kept")


def _ask(
    recipe: EvalRecipe,
    folder: RunFolder,
    job: Job,
    subject: Subject | Served,
    judge: Judge | None,
    on_progress: OnProgress,
) -> None:
    """Ask one task and keep the samples."""
    started = time.monotonic()
    subject.spent.clear()
    settings: dict[str, Any] = {
        "max_new_tokens": recipe.max_new_tokens,
        "seed": recipe.run.seed,
        "on_progress": on_progress,
    }
    whole: dict[str, float] = {}
    if job.task.kind == "lm_eval":
        theirs = [item for item in job.items if isinstance(item, Foreign)]
        rows, whole = lm_engine().ask_theirs(
            subject,
            job.task,
            theirs,
            is_chat=recipe.apply_chat_template,
            system_prompt=recipe.system_prompt,
            **settings,
        )
        is_chat = recipe.apply_chat_template
    else:
        assert isinstance(subject, Subject)
        rows = ask(subject, job.task, job.items, judge=judge, **settings)
        is_chat = job.task.apply_chat_template
        is_chat |= subject.encoder is not None and job.task.kind in IN_WORDS
    if not is_first():
        return
    record = {
        "key": job.key,
        "task": job.task.name,
        "model": job.model,
        "seconds": round(time.monotonic() - started, 3),
        "uses_chat_template": is_chat,
        "not_fitting": sum(bool(row.get("not_fitting")) for row in rows),
        "context_cut": sum(bool(row.get("context_cut")) for row in rows),
        # Requests computed and found in the cache; tokens of prompts and answers, cached or not.
        **{key: subject.spent[key] for key in SPENT if _is_counted(subject, key)},
    }
    if job.task.kind == "judged" and judge is not None:
        record |= {"judge": judge.name, "unclear": sum(row["unclear"] > 0 for row in rows)}
    if whole:
        record["whole"] = whole
    if recipe.samples_only_failures:
        rows = [without_texts(row) if row["correct"] else row for row in rows]
    atomic_write(job.samples, "".join(json.dumps(row) + "\n" for row in rows))
    # Written last: samples count as finished once their record is there.
    atomic_write(job.record, json.dumps(record, indent=2) + "\n")
    if record["not_fitting"]:
        folder.log(
            f"{job.name}: {record['not_fitting']:,} of {len(rows):,} questions of "
            f"{job.task.name} do not fit the model's context; they count as wrong."
        )
    if record["context_cut"]:
        folder.log(
            f"{job.name}: {record['context_cut']:,} of {len(rows):,} contexts of {job.task.name} "
            "lost their beginning, because they are too long for the model."
        )


def _is_counted(subject: Subject | Served, key: str) -> bool:
    return isinstance(subject, Subject) or not key.endswith("_tokens")  # a server does not tell


def without_texts(row: dict[str, Any]) -> dict[str, Any]:
    """A sample with all that is counted, but not what was asked and answered."""
    texts: dict[str, Any] = {"prompt": "", "question": "", "answer": "", "answers": [], "found": ""}
    return row | {key: text for key, text in texts.items() if key in row} | {"left_out": True}


# ---------------------------------------------------------------- the verb


def evaluate(
    models: Sequence[str],
    *,
    output_dir: str,
    suite: str | None = None,
    tasks: Sequence[str] = (),
    data_dir: str | None = None,
    include_path: str | None = None,
    cache_dir: str | None = None,
    skip_missing: bool = False,
    limit: int | None = None,
    samples_only_failures: bool = False,
    max_new_tokens: int | None = None,
    apply_chat_template: bool = False,
    system_prompt: str | None = None,
    judge: str | None = None,
    batch_tokens: int = 8192,
    generation_batch_size: int = 64,
    seed: int = 42,
    contamination: Sequence[str] = (),
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
        cache_dir=cache_dir,
        skip_missing=skip_missing,
        limit=limit,
        samples_only_failures=samples_only_failures,
        max_new_tokens=max_new_tokens,
        apply_chat_template=apply_chat_template,
        system_prompt=system_prompt,
        judge=judge,
        batch_tokens=batch_tokens,
        generation_batch_size=generation_batch_size,
        contamination=tuple(contamination),
    )
    return run(recipe)
