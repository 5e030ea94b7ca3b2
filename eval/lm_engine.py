"""Tasks of lm-eval, asked of our models: YAML files in, rows of samples/<model>/<task>.jsonl out.

task files -> Task and its questions -> lm-eval's requests -> scorer and generator (ScoredModel)
-> lm-eval's own judgement -> rows. lm-eval writes the prompts and judges the answers; every token
is run by us.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM
from lm_eval.api.task import Task as LmTask
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from eval.asking import EXCERPT
from eval.items import Foreign
from eval.lm_backends import ServedModel
from eval.served import Served
from eval.subject import OnProgress, Subject, encode_pairs
from eval.tasks import LOWER_IS_BETTER, TEXT_METRICS, Task
from olmo_base.model.generate import Sampling, before_stop
from olmo_base.run.errors import UserError
from olmo_base.scorer import Score

FEWSHOT_SEED = 1234  # lm-eval's own, so that the same examples are shown
DEFAULT_NEW_TOKENS = 256  # of an answer where a task does not say; lm-eval's own
GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p"}
OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
IN_PERCENT = {"bleu", "chrf", "chrf++", "ter"}  # everything else that is a share is one of 1

# A task as it was read, by name and digest: reading one reads its data.
_read: dict[tuple[str, str | None], LmTask] = {}


# ---------------------------------------------------------------- task files


def read_tasks(
    folder: Path, names: Sequence[str], others: Iterable[str] = ()
) -> dict[str, list[Task]]:
    """The tasks of lm-eval that each name stands for: one, or those of a group or tag.

    Only files of ``folder`` are known; ``others`` are further names, for the message. Errors:
    UserError for an unknown name, a broken file, and what cannot be asked here.
    """
    state = tuple(
        (str(path), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".yaml", ".py")
    )
    return {name: list(_read_name(folder, name, state, tuple(others))) for name in names}


@functools.lru_cache(maxsize=256)
def _read_name(
    folder: Path, name: str, state: tuple[tuple[str, int], ...], others: tuple[str, ...]
) -> tuple[Task, ...]:
    manager = _manager(folder, state)
    if name not in manager.all_tasks:
        known = ", ".join(sorted({*manager.all_tasks, *others}))
        broken = "".join(f" {problem}" for problem in _broken_files(folder))
        raise UserError(f"There is no task {name!r}. Known: {known}.{broken}")
    datasets.disable_progress_bars()
    try:
        found = manager.load([name])["tasks"]
    except Exception as error:  # the file, its templates and its data are the user's
        raise UserError(
            f"lm-eval cannot read the task {name} of {folder}: {_short(error)}"
        ) from error
    return tuple(_described(manager, name, task) for name, task in found.items())


@functools.lru_cache(maxsize=4)
def _manager(folder: Path, state: tuple[tuple[str, int], ...]) -> TaskManager:
    """lm-eval's own 14,000 tasks are left out: listing them takes 10 seconds."""
    return TaskManager(include_path=str(folder), include_defaults=False)


def _broken_files(folder: Path) -> list[str]:
    """What lm-eval passes over in silence."""
    problems = []
    for path in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False, recursive=True)
        except Exception as error:
            problems.append(f"{path} cannot be read: {_short(error)}")
    return problems


def _short(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}"


def _described(manager: TaskManager, name: str, task: LmTask) -> Task:
    for problem, is_so in (
        ("runs code outside a sandbox; use a task of ours (humaneval)", "UNSAFE_CODE"),
        ("asks about pictures or sound, which our models cannot read", "MULTIMODAL"),
    ):
        if getattr(task, is_so, False):
            raise UserError(f"lm-eval's task {name} {problem}.")
    if task.OUTPUT_TYPE not in OUTPUT_TYPES:
        raise UserError(
            f"lm-eval's task {name} has the output_type {task.OUTPUT_TYPE!r}; "
            f"needed one of {', '.join(OUTPUT_TYPES)}."
        )
    better = task.higher_is_better()
    metrics = [metric for metric in task.aggregation() if metric != "bypass"]
    for metric in metrics:
        if (metric in LOWER_IS_BETTER) == better.get(metric, metric not in LOWER_IS_BETTER):
            wrong = "lower" if metric not in LOWER_IS_BETTER else "higher"
            raise UserError(
                f"lm-eval's task {name} says of its metric {metric} that {wrong} is better; "
                "the report cannot show that. Take it out of metric_list, or turn it round."
            )
    filters = [item.name for item in task._filters]
    measures = [_measure(metric, item, filters) for item in filters for metric in metrics]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":  # all follow from the same numbers
        measures += sorted(TEXT_METRICS - {"nats_per_token"} - {*measures})
    if not measures:
        raise UserError(f"lm-eval's task {name} measures nothing: give it a metric_list.")
    settings = task.dump_config()
    settings.pop("dataset_kwargs", None)  # where the data is; what is in it counts by itself
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    described = Task(
        name=name,
        kind="lm_eval",
        file=str(manager.task_index[name].yaml_path),
        about=f"lm-eval {lm_eval.__version__}: {task.OUTPUT_TYPE}.",
        # Bits have a paired difference, which perplexities have not.
        metric="bits_per_byte" if task.OUTPUT_TYPE == "loglikelihood_rolling" else None,
        measures=tuple(measures),
        definition=digest.hexdigest(),
    )
    _read[name, described.definition] = task
    return described


def _measure(metric: str, filter_name: str, filters: Sequence[str]) -> str:
    """A metric's name in the report; the filter's too where answers pass through several."""
    return metric if len(filters) == 1 else f"{metric},{filter_name}"


def _read_task(task: Task) -> LmTask:
    return _read[task.name, task.definition]


def data_files(task: Task) -> list[Path]:
    """The local files that decide a task's questions: data, and Python beside its YAML file.

    Data that is read by other means (the hub, a loading function) is not among them.
    """
    settings = _read_task(task).dump_config()
    named = (settings.get("dataset_kwargs") or {}).get("data_files") or []
    found = [Path(path) for path in _leaves(named)]
    files = [path for path in found if path.is_file()]
    return [Path(task.file), *sorted(Path(task.file).parent.glob("*.py")), *files]


def _leaves(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value
    return [leaf for item in inner for leaf in _leaves(item)]


def read_questions(task: Task) -> list[Foreign]:
    """The questions of a task, which stay with lm-eval: their numbers. Errors: UserError."""
    number = len(list(_read_task(task).eval_docs))
    if number == 0:
        raise UserError(f"lm-eval's task {task.name} ({task.file}) has no question.")
    return [Foreign(str(index)) for index in range(number)]


# ---------------------------------------------------------------- the model


class ScoredModel(LM):
    """A Subject as lm-eval's language model.

    Differs from lm-eval's own HFLM where that loses something: a continuation that shares a token
    with its context is scored whole, control tokens spelt in a plain text are ordinary characters,
    and a rolling text is not scored for the token that begins it. Errors: UserError for a
    continuation longer than the model's context, an empty one, and unknown generation settings.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        is_chat: bool = False,
        max_new_tokens: int | None = None,
        seed: int = 0,
        on_progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        """``on_progress`` is told the share of the requests done."""
        super().__init__()
        self.subject = subject
        self.is_chat = is_chat
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.on_progress = on_progress
        self.scores: dict[tuple[str, ...], Score] = {}  # of every request, by its texts
        self.cut_prompts: set[str] = set()  # those that lost their beginning

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """See lm_eval.api.model.LM."""
        pairs = [request.args for request in requests]
        unique = list(dict.fromkeys(pairs))
        if any(not continuation for _, continuation in unique):
            raise UserError("A task of lm-eval has an empty option; nothing is always likely.")
        encoded = encode_pairs(self.subject, unique, is_templated=self.is_chat)
        longest = max(len(continuation) for _, continuation in encoded)
        if longest > self.subject.window:
            raise UserError(
                f"A continuation has {longest} tokens and the model reads {self.subject.window}: "
                "lm-eval's tasks cannot leave a question out. Choose another task or model."
            )
        found = self.subject.logprobs(
            encoded, on_progress=lambda done: self.on_progress(done / len(unique))
        )
        self.scores |= dict(zip(unique, found, strict=True))
        self.cut_prompts |= {
            pair[0] for pair, score in zip(unique, found, strict=True) if score.num_cut
        }
        return [(self.scores[pair].logprob, self.scores[pair].is_greedy) for pair in pairs]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """See lm_eval.api.model.LM."""
        texts = [request.args[0] for request in requests]
        encoded = self.subject.encode(texts)
        filled = [ids for ids in encoded if ids]
        found = iter(
            self.subject.document_logprobs(
                filled, on_progress=lambda done: self.on_progress(done / len(filled))
            )
        )
        scores = [next(found) if ids else Score(0.0, 0, True) for ids in encoded]
        self.scores |= {(text,): score for text, score in zip(texts, scores, strict=True)}
        return [score.logprob for score in scores]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """See lm_eval.api.model.LM."""
        groups: dict[str, list[int]] = {}  # of requests with the same settings
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers: dict[int, str] = {}
        for settings, numbers in groups.items():
            self._generate(requests, numbers, json.loads(settings), answers)
        return [answers[number] for number in range(len(requests))]

    def _generate(
        self,
        requests: Sequence[Instance],
        numbers: Sequence[int],
        settings: dict[str, Any],
        answers: dict[int, str],
    ) -> None:
        """Answers to the requests of these numbers, which have the same settings."""
        normal: dict[str, Any] = dict(normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS))
        if unknown := sorted(normal.keys() - GENERATION_KEYS):
            raise UserError(
                f"generation_kwargs holds {unknown[0]!r}, which our generator does not read; "
                f"it reads {', '.join(sorted(GENERATION_KEYS))}."
            )
        stops = [stop for stop in normal["until"] if stop]
        sampling = Sampling()
        if normal.get("do_sample"):
            names = ("temperature", "top_p", "top_k", "min_p")
            drawing = {"temperature": 1.0} | {key: normal[key] for key in names if key in normal}
            sampling = Sampling(**drawing, seed=self.seed)
        limit = self.max_new_tokens or normal["max_gen_toks"]
        generator = self.subject.generator
        room = generator.max_length - limit
        if room < 1:
            raise UserError(
                f"A task of lm-eval asks for answers of {limit} tokens and the model can hold "
                f"{generator.max_length}, the question included. Set max_new_tokens lower."
            )
        texts = [requests[number].args[0] for number in numbers]
        prompts: dict[int, list[int]] = {}
        encoded = self.subject.encode(texts, is_templated=self.is_chat)
        for number, text, ids in zip(numbers, texts, encoded, strict=True):
            prompt = self.subject.as_prompt(ids) or [self.subject.start_id]
            prompts[number] = prompt[-room:]
            if len(prompt) > room:
                self.cut_prompts.add(text)
        found = self.subject.answers(
            [prompts[number] for number in numbers],
            max_new_tokens=limit,
            sampling=sampling,
            places=numbers,
            stop_strings=stops,
            on_progress=lambda done: self.on_progress((len(answers) + done) / len(requests)),
        )
        for number, ids in zip(numbers, found, strict=True):
            text = self.subject.decode(ids, skip_special_tokens=True)
            answers[number] = before_stop(text, stops)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """See lm_eval.api.model.LM."""
        return str(
            self.subject.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    @property
    def tokenizer_name(self) -> str:
        """See lm_eval.api.model.LM."""
        return str(self.subject.tokenizer.name_or_path)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """See lm_eval.api.model.LM."""
        return self.subject.tokenizer.chat_template if chat_template else None


# ---------------------------------------------------------------- asking


def ask_theirs(
    subject: Subject | Served,
    task: Task,
    items: Sequence[Foreign],
    *,
    is_chat: bool = False,
    system_prompt: str | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    on_progress: OnProgress = lambda done: None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The sample rows of a task, and the metrics that only all its answers together have.

    ``is_chat`` puts questions and examples into the model's chat template. Errors: UserError.
    """
    theirs = _read_task(task)
    if theirs.get_config("num_fewshot") is None:
        theirs.set_config("num_fewshot", 0)
    theirs.set_fewshot_seed(FEWSHOT_SEED)
    model: ScoredModel | ServedModel
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "on_progress": lambda share: on_progress(share * len(items)),
    }
    if isinstance(subject, Served):
        model = ServedModel(subject, **settings)
    else:
        model = ScoredModel(subject, is_chat=is_chat, seed=seed, **settings)
    numbers = [int(item.doc_id) for item in items]
    is_whole = len(numbers) == len(list(theirs.eval_docs))
    results = evaluate(
        lm=model,
        task_dict={"tasks": {task.name: theirs}, "groups": {}},
        samples=None if is_whole else {task.name: numbers},
        bootstrap_iters=0,  # intervals are ours
        system_instruction=system_prompt,
        apply_chat_template=is_chat,
        fewshot_as_multiturn=is_chat,
    )
    by_doc: dict[int, list[dict[str, Any]]] = {}  # one sample for each filter
    for sample in results["samples"][task.name]:
        by_doc.setdefault(sample["doc_id"], []).append(sample)
    rows = [_row(task, theirs, model, by_doc[number]) for number in numbers]
    whole = _whole_metrics(task, theirs, results["results"][task.name], rows)
    measured = {**whole, **rows[0].get("scores", {})}
    if not task.predicts_text and task.main_metric not in measured:
        raise UserError(
            f"lm-eval's task {task.name} should measure {task.main_metric}, but its answers were "
            f"judged by {', '.join(measured) or 'nothing'}. Name one of these first in its "
            "metric_list."
        )
    return rows, whole


def _row(
    task: Task, theirs: LmTask, model: ScoredModel | ServedModel, samples: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """One question as a row of the samples file."""
    first = samples[0]
    arguments = [tuple(item) for item in first["arguments"]]
    prompt = arguments[0][0]  # or lm-eval's wrapping of a dialogue that a server is sent
    prompt = str(prompt[0] if isinstance(prompt, tuple) else prompt)
    row: dict[str, Any] = {"doc_id": str(first["doc_id"]), "category": None}
    if theirs.OUTPUT_TYPE == "loglikelihood_rolling":
        return row | _text_row(theirs, first, model.scores[arguments[0]])
    filters = [sample["filter"] for sample in samples]
    scores = {
        _measure(metric, sample["filter"], filters): float(sample[metric])
        for sample in samples
        for metric in sample["metrics"]
        if _is_mean(theirs, metric) and _is_number(sample[metric])
    }
    row |= {
        "question": prompt.rpartition("\n\n")[2],
        "prompt": prompt,
        "target": _words(first["target"]),
        "scores": scores,
        "correct": scores[task.judging_metric] == 1.0 if task.judging_metric in scores else None,
        "context_cut": any(item[0] in model.cut_prompts for item in arguments),
    }
    if theirs.OUTPUT_TYPE == "generate_until":
        answer = _words(first["resps"][0][0])
        return row | {"answer": answer, "found": _words(first["filtered_resps"][0])}
    if theirs.OUTPUT_TYPE == "loglikelihood":
        score = model.scores[arguments[0]]
        return row | {
            "answer": arguments[0][1] if score.is_greedy else None,
            "found": f"log-probability {score.logprob:.3f}",
            "target": arguments[0][1],
            "logprob": score.logprob,
        }
    return row | _options(theirs, first, arguments, model)


def _options(
    theirs: LmTask,
    sample: dict[str, Any],
    arguments: Sequence[tuple[str, str]],
    model: ScoredModel | ServedModel,
) -> dict[str, Any]:
    """The options of a question, named as the task names them, with their log-probabilities."""
    doc = sample["doc"]
    is_told = hasattr(theirs, "doc_to_choice")  # a task written in Python may not be
    texts = theirs.doc_to_choice(doc) if is_told else [item[1] for item in arguments]
    has_alone = len(arguments) == 2 * len(texts)
    alone = [
        model.scores[item].logprob if has_alone else None
        for item in (arguments[len(texts) :] if has_alone else arguments)
    ]
    gold = sample["target"]
    if getattr(theirs, "multiple_input", False):  # the options are contexts, and so is the target
        gold = theirs.doc_to_text(doc)
    if isinstance(gold, str):
        gold = texts.index(gold) if gold in texts else None
    if isinstance(gold, list):
        gold = gold[0] if gold and isinstance(gold[0], int) else None
    is_known = gold is not None and 0 <= gold < len(texts)
    return {
        "target": texts[gold] if is_known else _words(sample["target"]),
        "gold": gold,
        "options": [
            {
                "text": text,
                "logprob": model.scores[pair].logprob,
                "logprob_alone": by_itself,
                "num_tokens": model.scores[pair].num_tokens,
            }
            for text, pair, by_itself in zip(texts, arguments[: len(texts)], alone, strict=True)
        ],
    }


def _text_row(theirs: LmTask, sample: dict[str, Any], score: Score) -> dict[str, Any]:
    """A text that was predicted; a task may count words and bytes of another form of it."""
    text = str(sample["arguments"][0][0])
    of_words, of_bytes = sample.get("word_perplexity"), sample.get("bits_per_byte")
    of_bytes = of_bytes or sample.get("byte_perplexity")
    return {
        "prompt": "",
        "target": text[:EXCERPT],
        "logprob": score.logprob,
        "num_tokens": score.num_tokens,
        "num_bytes": of_bytes[1] if of_bytes else theirs.count_bytes(text),
        "num_words": of_words[1] if of_words else theirs.count_words(text),
        "correct": None,
    }


def _is_mean(theirs: LmTask, metric: str) -> bool:
    return theirs.aggregation().get(metric, mean) is mean


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " or ".join(map(str, value))
    return str(value)


def _whole_metrics(
    task: Task, theirs: LmTask, results: Mapping[str, Any], rows: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """What is no mean over questions, as lm-eval computes it: F1, BLEU, perplexity."""
    if "scores" not in rows[0]:
        return {}
    filters = [item.name for item in theirs._filters]
    whole = {}
    for key, value in results.items():
        metric, comma, filter_name = key.partition(",")
        name = _measure(metric, filter_name, filters)
        if comma and name in task.measures and name not in rows[0]["scores"]:
            whole[name] = float(value) / (100 if metric in IN_PERCENT else 1)
    return whole
