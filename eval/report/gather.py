"""What an evaluation left on disk -> one Report: scores, comparisons, training, sample answers.

evaluation.json + samples/<model>/<task>.jsonl -> scores with intervals -> groups -> differences;
each model's folder and those it came from -> stages with their curves.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.contamination import Contamination, Overlap, read_overlaps
from eval.report.training import ModelFacts, Stage, life_of, model_facts, read_stage
from eval.scores import chance_level, compare, estimate, guessing_p_value, is_right, measured
from eval.statistics import Difference, Estimate, holm, macro_average, macro_difference
from eval.tasks import LOWER_IS_BETTER, Task, best_of_task
from olmo_base.run.errors import DataError, UserError

EVALUATION = "evaluation.json"
SAMPLES = "samples"
COSTS = ("seconds", "computed", "reused", "prompt_tokens", "answer_tokens")  # as the harness notes
NEAR_TIE = 0.01  # a point of accuracy, or 0.01 bits: closer than this is as good as equal


@dataclass(frozen=True)
class TaskResult:
    """One model's answers to one task."""

    record: dict[str, Any]  # samples/<model>/<task>.json: how the samples were made
    rows: Sequence[dict[str, Any]]
    metrics: dict[str, Estimate]
    guessing: float | None = None  # p-value of the main metric against guessing
    overlap: Overlap | None = None  # with training text, where it was looked for
    clean: Estimate | None = None  # the main metric on the questions that do not overlap

    @property
    def cost(self) -> dict[str, float | int | None]:
        """Seconds, requests computed and found in the cache, and tokens read and written."""
        return {key: self.record.get(key) for key in COSTS}


@dataclass(frozen=True)
class ModelResult:
    """One model: what it is and what it scored."""

    name: str
    path: str
    facts: ModelFacts | None
    life: Sequence[Stage]
    tasks: dict[str, TaskResult]
    groups: dict[str, Estimate]

    @property
    def seconds(self) -> float:
        """How long its answers took."""
        return sum(float(result.record.get("seconds", 0)) for result in self.tasks.values())


@dataclass(frozen=True)
class Comparison:
    """One model against another on one task, or on the average of a group."""

    model: str
    against: str
    subject: str  # name of the task or group
    is_group: bool
    metric: str
    difference: Difference
    p_corrected: float | None = None  # for all comparisons of tasks (or of groups) in the report


@dataclass(frozen=True)
class Report:
    """Everything the pages show."""

    suite: str | None
    tasks: dict[str, Task]
    groups: dict[str, tuple[str, ...]]
    models: Sequence[ModelResult]
    comparisons: Sequence[Comparison]
    best: dict[str, str]  # "task recall" or "group accuracy" -> the model above all others
    stages: Sequence[Stage]
    evaluations: Sequence[Stage]  # the evaluations' own folders
    chance: dict[str, float] = field(default_factory=dict)
    contamination: Sequence[Contamination] = ()  # of the evaluations that looked for it
    skipped: dict[str, str] = field(default_factory=dict)  # tasks not asked, and why

    @property
    def seconds(self) -> float:
        """How long all answers took."""
        return sum(model.seconds for model in self.models)

    def lower_is_better(self, task: str) -> bool:
        """Whether a task counts surprise instead of right answers."""
        return self.tasks[task].main_metric in LOWER_IS_BETTER

    def difference(
        self, model: str, against: str, subject: str, is_group: bool
    ) -> Comparison | None:
        """The comparison of two models, if one was made."""
        for item in self.comparisons:
            if (item.model, item.against) == (model, against) and (
                item.subject,
                item.is_group,
            ) == (subject, is_group):
                return item
        return None

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "suite": self.suite,
            "seconds": round(self.seconds, 3),
            "models": [
                {
                    "name": model.name,
                    "path": model.path,
                    "num_parameters": model.facts.num_parameters if model.facts else None,
                    "seconds": round(model.seconds, 3),
                    "tasks": {
                        name: {
                            key: dataclasses.asdict(value) for key, value in result.metrics.items()
                        }
                        for name, result in model.tasks.items()
                    },
                    "groups": {
                        name: dataclasses.asdict(value) for name, value in model.groups.items()
                    },
                    "forms": {
                        name: result.record["form"]
                        for name, result in model.tasks.items()
                        if "form" in result.record
                    },
                    "guessing_p_value": {
                        name: result.guessing
                        for name, result in model.tasks.items()
                        if result.guessing is not None
                    },
                    "without_overlap": {
                        name: dataclasses.asdict(result.clean)
                        for name, result in model.tasks.items()
                        if result.clean is not None
                    },
                    "cost": {name: result.cost for name, result in model.tasks.items()},
                    "not_fitting": {
                        name: result.record["not_fitting"]
                        for name, result in model.tasks.items()
                        if result.record.get("not_fitting")
                    },
                }
                for model in self.models
            ],
            "tasks": {
                name: {**dataclasses.asdict(task), "metric": task.main_metric}
                | {"chance": self.chance.get(name)}
                for name, task in self.tasks.items()
            },
            "groups": {name: list(members) for name, members in self.groups.items()},
            "best": self.best,
            "comparisons": [
                {
                    "model": item.model,
                    "against": item.against,
                    "group" if item.is_group else "task": item.subject,
                    "metric": item.metric,
                    **dataclasses.asdict(item.difference),
                    "p_corrected": item.p_corrected,
                    "is_separated": item.difference.is_separated,
                    "is_near_tie": item.difference.is_near_tie(NEAR_TIE),
                    "detectable": item.difference.detectable,
                }
                for item in self.comparisons
            ],
            "skipped": self.skipped,
            "contamination": [item.as_dict() for item in self.contamination],
            "training": [
                {
                    "name": stage.name,
                    "stage": stage.kind,
                    "path": str(stage.path),
                    "wall_time_seconds": stage.manifest.get("wall_time_seconds"),
                    "results": stage.manifest.get("results", {}),
                }
                for stage in self.stages
            ],
        }


# ---------------------------------------------------------------- from the folders


def gather(runs: Iterable[Path]) -> Report:
    """Read evaluation folders (their models side by side) and training folders (their curves).

    Errors: UserError for a folder that is neither; DataError for broken files in it.
    """
    models: list[ModelResult] = []
    tasks: dict[str, Task] = {}
    groups: dict[str, tuple[str, ...]] = {}
    evaluations: list[Stage] = []
    extra_stages: list[Stage] = []
    suites: list[str] = []
    contamination: list[Contamination] = []
    skipped: dict[str, str] = {}
    for folder in runs:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder. Give evaluation or training run folders.")
        stage = read_stage(folder)
        if not (folder / EVALUATION).is_file():
            if stage is None:
                raise UserError(
                    f"{folder} holds no run (no manifest.json). "
                    "Give the output_dir of an evaluation or of a training stage."
                )
            extra_stages += life_of(folder)
            continue
        content = _read_json(folder / EVALUATION)
        if stage is not None:
            evaluations.append(stage)
        suites += [content["suite"]] if content.get("suite") else []
        found = {item["name"]: Task.from_json(item) for item in content["tasks"]}
        for name, task in found.items():
            if name in tasks and tasks[name] != task:
                raise UserError(
                    f"The task {name} is defined in two ways in these evaluations, so their "
                    f"scores cannot stand side by side. Evaluate again with one definition."
                )
        best_of = {name: tuple(of) for name, of in content.get("best_of", {}).items()}
        tasks |= {
            name: best_of_task(name, [found[member] for member in members])
            for name, members in best_of.items()
        } | found
        groups |= {name: tuple(members) for name, members in content["groups"].items()}
        taken = {model.name for model in models}
        skipped |= content.get("skipped", {})
        overlaps = read_overlaps(folder)
        contamination += [] if overlaps is None else [overlaps]
        for item in content["models"]:
            name = item["name"]
            while name in taken:
                name = f"{folder.name}/{name}"
            model = _read_model(folder, item["name"], name, item["path"], found, groups, best_of)
            models.append(model if overlaps is None else _with_overlaps(model, tasks, overlaps))
            taken.add(name)
    comparisons = _comparisons(models, tasks, groups)
    stages: dict[Path, Stage] = {}
    for stage in [*(stage for model in models for stage in model.life), *extra_stages]:
        stages.setdefault(stage.path.resolve(), stage)
    return Report(
        suite=", ".join(dict.fromkeys(suites)) or None,
        tasks=tasks,
        groups=groups,
        models=models,
        comparisons=comparisons,
        best=_best(models, tasks, groups),
        stages=list(stages.values()),
        evaluations=evaluations,
        contamination=contamination,
        skipped={name: reason for name, reason in skipped.items() if name not in tasks},
        chance={
            name: level
            for name in tasks
            for model in models[:1]
            if name in model.tasks and (level := chance_level(model.tasks[name].rows)) is not None
        },
    )


def _read_model(
    folder: Path,
    folder_name: str,
    name: str,
    path: str,
    tasks: dict[str, Task],
    groups: dict[str, tuple[str, ...]],
    best_of: dict[str, tuple[str, ...]],
) -> ModelResult:
    results: dict[str, TaskResult] = {}
    for task in tasks.values():
        samples = folder / SAMPLES / folder_name / f"{task.name}.jsonl"
        if not samples.is_file():
            continue  # an evaluation that was stopped
        rows = read_samples(samples)
        record = _read_json(samples.with_suffix(".json"))
        metrics = {metric: estimate(rows, metric) for metric in measured(task.kind, rows)}
        for metric, value in record.get("whole", {}).items():
            metrics[metric] = Estimate(value, None, None, None, len(rows))
        results[task.name] = TaskResult(
            record=record,
            rows=rows,
            metrics=metrics,
            guessing=guessing_p_value(rows, task.main_metric),
        )
    for best, members in best_of.items():
        if all(member in results for member in members):
            asked = {member: (tasks[member].main_metric, results[member]) for member in members}
            task = best_of_task(best, [tasks[member] for member in members])
            results[best] = _best_result(folder, asked, task.main_metric)
            tasks = tasks | {best: task}
    averages = {
        group: macro_average(
            [results[member].metrics[tasks[member].main_metric] for member in members]
        )
        for group, members in groups.items()
        if all(member in results for member in members)
    }
    model_folder = Path(path)
    return ModelResult(
        name=name,
        path=path,
        facts=model_facts(model_folder) if model_folder.is_dir() else None,
        life=life_of(model_folder),
        tasks=results,
        groups=averages,
    )


def _with_overlaps(
    model: ModelResult, tasks: dict[str, Task], contamination: Contamination
) -> ModelResult:
    """Its tasks with what training text holds of them, and their scores without that."""
    results = {}
    for name, result in model.tasks.items():
        overlap = contamination.tasks.get(result.record.get("form", name))
        clean = None
        if overlap is not None:
            rows = [row for row in result.rows if str(row["doc_id"]) not in overlap.overlapping]
            metric = tasks[name].main_metric
            is_told = bool(rows) and metric not in result.record.get("whole", {})
            clean = estimate(rows, metric) if is_told else None
        results[name] = dataclasses.replace(result, overlap=overlap, clean=clean)
    return dataclasses.replace(model, tasks=results)


def _best_result(
    folder: Path, asked: dict[str, tuple[str, TaskResult]], best_metric: str
) -> TaskResult:
    """The answers in the form in which a model scores best. Errors: DataError.

    The forms must put the same questions under the same numbers, or models that do best in
    different ones could not be compared question by question.
    """
    golds = [
        {row["doc_id"]: row.get("gold") for row in result.rows} for _, result in asked.values()
    ]
    if any(gold != golds[0] for gold in golds):
        names = " and ".join(asked)
        raise DataError(
            folder / SAMPLES, None, f"{names} do not ask the same questions.", "Ask them apart."
        )
    values = {name: result.metrics[metric].value for name, (metric, result) in asked.items()}
    form = max(values, key=lambda name: values[name])
    metric, result = asked[form]
    rows = [
        {**row, "scores": {"acc_best": float(is_right(row, metric))}, "form": form}
        for row in result.rows
    ]
    return TaskResult(
        record={"form": form},
        rows=rows,
        metrics={best_metric: estimate(rows, best_metric)},
        guessing=guessing_p_value(rows, "acc_best"),
    )


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rows of a samples file. Errors: DataError."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise DataError(
                    path, number, f"broken JSON ({error}).", "Delete the file and evaluate again."
                ) from None
    if not rows:
        raise DataError(path, None, "the file is empty.", "Delete it and evaluate again.")
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(path, None, "the file is missing.", "Evaluate again.") from None
    except ValueError as error:
        raise DataError(path, None, f"broken JSON ({error}).", "Evaluate again.") from None
    if not isinstance(content, dict):
        raise DataError(path, None, "needed a JSON object.", "Evaluate again.")
    return content


# ---------------------------------------------------------------- models against models


def _comparisons(
    models: Sequence[ModelResult], tasks: dict[str, Task], groups: dict[str, tuple[str, ...]]
) -> list[Comparison]:
    """Each model against the first and against the one before it."""
    found: list[Comparison] = []
    for index in range(1, len(models)):
        for other in sorted({0, index - 1}):
            found += _compare_models(models[index], models[other], tasks, groups)
    corrected: list[Comparison] = []
    for is_group in (True, False):  # a group repeats what its tasks say, so each is a family
        family = [item for item in found if item.is_group == is_group]
        p_values = holm(item.difference.p_value for item in family)
        corrected += [
            dataclasses.replace(item, p_corrected=p_value)
            for item, p_value in zip(family, p_values, strict=True)
        ]
    return corrected


def _compare_models(
    model: ModelResult,
    against: ModelResult,
    tasks: dict[str, Task],
    groups: dict[str, tuple[str, ...]],
) -> list[Comparison]:
    by_task: dict[str, Comparison] = {}
    for name, task in tasks.items():
        if name in model.tasks and name in against.tasks:
            difference = compare(against.tasks[name].rows, model.tasks[name].rows, task.main_metric)
            if difference is not None:
                by_task[name] = Comparison(
                    model.name, against.name, name, False, task.main_metric, difference
                )
    by_group = [
        Comparison(
            model.name,
            against.name,
            group,
            True,
            "mean of " + ", ".join(dict.fromkeys(tasks[member].main_metric for member in members)),
            macro_difference([by_task[member].difference for member in members]),
        )
        for group, members in groups.items()
        if all(member in by_task for member in members)
    ]
    return [*by_group, *by_task.values()]


def _best(
    models: Sequence[ModelResult], tasks: dict[str, Task], groups: dict[str, tuple[str, ...]]
) -> dict[str, str]:
    """Where one model is better than every other by a difference whose interval excludes zero."""
    best: dict[str, str] = {}
    for model in models:
        wins: dict[str, int] = {}
        for other in models:
            if other is model:
                continue
            for item in _compare_models(model, other, tasks, groups):
                first_task = groups[item.subject][0] if item.is_group else item.subject
                sign = -1 if tasks[first_task].main_metric in LOWER_IS_BETTER else 1
                if item.difference.is_separated and sign * item.difference.value > 0:
                    key = subject_key(item.subject, item.is_group)
                    wins[key] = wins.get(key, 0) + 1
        best |= {key: model.name for key, number in wins.items() if number == len(models) - 1}
    return best


def subject_key(subject: str, is_group: bool) -> str:
    """A task and a group may have the same name."""
    return f"{'group' if is_group else 'task'} {subject}"


def evaluation_time(report: Report) -> str | None:
    """When the (first) evaluation started, as its manifest says."""
    for stage in report.evaluations:
        for session in stage.manifest.get("sessions", []):
            return str(session.get("started"))
    return None
