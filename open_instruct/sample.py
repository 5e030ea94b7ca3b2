"""Sampling: a model answers prompts several times, for a reward model or a verifier to choose from.

prompts of any rows, or a verifier's problems -> ids -> the chat engine's running batch -> answers,
kept as they end -> answers.jsonl, in the order of the prompts.
"""

import contextlib
import json
import os
import queue
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from olmo_base.model.generate import load_generator
from olmo_base.run.artefact import (
    ExampleCounts,
    RunConfig,
    RunFolder,
    atomic_write,
    model_files,
)
from olmo_base.run.errors import DataError, Stopped, UserError
from olmo_base.run.launch import stop_signals
from olmo_base.run.metrics import Progress
from olmo_base.run.recipe import RecipeError, setting
from open_instruct.causal_lm import ModelConfig as TunedModelConfig
from open_instruct.causal_lm import load_config
from open_instruct.chat.engine import Delta, Engine
from open_instruct.chat.rows import MAX_ROWS
from open_instruct.chat.sampling import Sampling
from open_instruct.encode import ChatEncoder, find_template, load_chat_encoder
from open_instruct.examples import (
    BadRow,
    Message,
    OnBadRow,
    Prompt,
    Source,
    SourceUse,
    mixture_lines,
    read_prompts,
    read_rows,
    source_files,
)
from open_instruct.turns import Tools
from open_instruct.verifiers import VERIFIERS
from open_instruct.verifiers.verdict import BadProblem

__all__ = ["SampleRecipe", "input_files", "plan", "run"]

ANSWERS = "answers.jsonl"
SECONDS_BETWEEN_LOOKS = 0.2  # for a signal, while nothing is delivered


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are drawn. Temperature 0 takes the likeliest token each time."""

    num_samples: int = setting(8, low=1, high=MAX_ROWS, help="answers to each prompt")
    temperature: float = setting(1.0, low=0)
    top_p: float = setting(1.0, above=0, high=1)
    top_k: int = setting(0, low=0, help="0: all tokens")
    min_p: float = setting(0.0, low=0, high=1)
    max_new_tokens: int = setting(512, low=1)
    stop: tuple[str, ...] = ()  # texts that end an answer, beside the end of its turn

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.num_samples > 1:
            raise RecipeError(
                "num_samples",
                f"{self.num_samples}, but at temperature 0 all answers to a prompt are the same. "
                "Raise temperature, or set num_samples: 1.",
            )


@dataclass(frozen=True, kw_only=True)
class SampleRecipe:
    """The keys of ``stage: sample``."""

    stage: Literal["sample"] = "sample"
    model_name_or_path: str = setting(changes_result=False)
    trust_remote_code: bool = setting(False, help="run Python code that the model folder brings")
    chat_template: str | None = None  # null: the template that the model carries
    dataset_mixer: tuple[Source, ...] = setting()
    verifier: str | None = setting(
        None, help="rows are this verifier's problems; their truth is kept beside the answers"
    )
    on_bad_row: OnBadRow = setting("error")
    on_too_long: Literal["error", "drop"] = setting("error", help="prompts without room to answer")
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_rows: int = setting(
        MAX_ROWS, low=1, high=MAX_ROWS, changes_result=False, help="answers written at once"
    )
    run: RunConfig

    def __post_init__(self) -> None:
        if not self.dataset_mixer:
            raise RecipeError("dataset_mixer", "names no data. List at least one path.")
        if self.verifier is not None and self.verifier not in VERIFIERS:
            raise RecipeError(
                "verifier", f"{self.verifier!r} must be one of {', '.join(VERIFIERS)}."
            )
        if self.max_rows < self.sampling.num_samples:
            raise RecipeError(
                "max_rows",
                f"{self.max_rows}, but the {self.sampling.num_samples} answers to a prompt are "
                "written together. Raise it, or lower num_samples.",
            )


def input_files(recipe: SampleRecipe) -> list[Path]:
    """The files whose content decides the result. Errors: UserError naming one that is missing."""
    template = [] if recipe.chat_template is None else [find_template(recipe.chat_template)]
    return [
        *model_files(recipe.model_name_or_path),
        *template,
        *source_files(recipe.dataset_mixer),
    ]


# ---------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Asked:
    """A prompt, as messages and as ids, and what a verifier will compare its answers with."""

    messages: list[Message]
    ids: list[int]
    source: str
    line: int
    tools: Tools | None = None
    truth: Any = None

    def as_row(self) -> dict[str, Any]:
        """For the file; keys that hold nothing are left out."""
        row: dict[str, Any] = {"prompt": self.messages, "num_prompt_tokens": len(self.ids)}
        row |= {"source": self.source, "line": self.line}
        more = {"tools": self.tools, "truth": self.truth}
        return row | {key: value for key, value in more.items() if value is not None}


def _problems(recipe: SampleRecipe, counts: ExampleCounts) -> Iterator[tuple[Prompt, Any]]:
    """The problems of a verifier's own files, with their truth."""
    assert recipe.verifier is not None
    read = VERIFIERS[recipe.verifier].read_problem
    for source in recipe.dataset_mixer:
        if source != Source(source.path):
            raise UserError(
                f"dataset_mixer: {source.path}: a verifier's problems are taken whole. Give the "
                "path alone."
            )
        files = source_files([source])
        if not files:
            raise UserError(f"{source.path} is not a file here, and a verifier reads files only.")
        for file in files:
            for row in read_rows(file):
                try:
                    if isinstance(row.value, BadRow):
                        raise BadProblem(row.value.problem)
                    if not isinstance(row.value, Mapping):
                        raise BadProblem("the row is not an object with keys.")
                    problem = read(row.value)
                except BadProblem as bad:
                    if recipe.on_bad_row == "error":
                        raise DataError(
                            row.source,
                            row.line,
                            str(bad),
                            f"The verifier {recipe.verifier} reads this file.",
                        ) from None
                    counts.drop("no problem of the verifier")
                    continue
                asked: Message = {"role": "user", "content": problem.prompt}
                yield Prompt([asked], row.source, row.line), problem.truth


def read_asked(
    recipe: SampleRecipe,
    encoder: ChatEncoder,
    context: int | None,
    counts: ExampleCounts,
    uses: list[SourceUse],
) -> list[Asked]:
    """The prompts of the recipe that fit into ``context`` tokens, each once.

    Errors: UserError if none is left, DataError.
    """
    if recipe.verifier is None:
        prompts = read_prompts(
            recipe.dataset_mixer,
            seed=recipe.run.seed,
            on_bad_row=recipe.on_bad_row,
            counts=counts,
            uses=uses,
        )
        rows: list[tuple[Prompt, Any]] = [(item, None) for item in prompts]
    else:
        rows = list(_problems(recipe, counts))
    asked: list[Asked] = []
    known: set[str] = set()
    for item, truth in rows:
        key = json.dumps([item.messages, item.tools])
        if key in known:
            counts.drop("asked before")
            continue
        known.add(key)
        ids = encoder.encode_prompt(item.messages, tools=item.tools)
        if context is not None and len(ids) >= context:
            if recipe.on_too_long == "error":
                raise DataError(
                    item.source,
                    item.line,
                    f"this prompt has {len(ids):,} tokens, and the model reads {context:,}, the "
                    "answer included.",
                    "Shorten it, or set on_too_long: drop.",
                )
            counts.drop("no room for an answer")
            continue
        asked.append(Asked(item.messages, ids, item.source, item.line, item.tools, truth))
    if not asked:
        paths = ", ".join(source.path for source in recipe.dataset_mixer)
        raise UserError(f"No prompt is left of {paths}; dropped: {dict(counts.dropped)}.")
    counts.used = len(asked)
    return asked


# ---------------------------------------------------------------- rows kept as they are made


class KeptRows:
    """Rows of a JSONL file that are made in any order, each kept as soon as it is made.

    Until all are there they stand in ``<name>.partial``, each with its number; then the file is
    written whole, in the order of the numbers.
    """

    def __init__(self, path: Path) -> None:
        """Finds what an earlier run left; half a line of a killed process is cut off."""
        self.path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self.rows: dict[int, dict[str, Any]] = {}
        if self._partial.exists():
            whole = self._partial.read_bytes().rpartition(b"\n")[0]
            for line in whole.splitlines():
                number, row = json.loads(line)
                self.rows[number] = row
            lines = (_json([number, row]) + "\n" for number, row in self.rows.items())
            atomic_write(self._partial, "".join(lines))

    def add(self, number: int, row: dict[str, Any]) -> None:
        """Keep one row."""
        self.rows[number] = row
        with open(self._partial, "a", encoding="utf-8") as file:
            file.write(_json([number, row]) + "\n")

    def finish(self) -> list[dict[str, Any]]:
        """Write the file; its rows, in order."""
        rows = [self.rows[number] for number in sorted(self.rows)]
        write_rows(self.path, rows)
        self._partial.unlink(missing_ok=True)
        return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row a line, whole or not at all."""
    atomic_write(path, "".join(_json(row) + "\n" for row in rows))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- answers


@dataclass
class Writing:
    """The answers to one prompt, as they come."""

    texts: list[str]
    num_tokens: list[int]
    finish_reasons: list[str | None]

    @classmethod
    def of(cls, number: int) -> "Writing":
        """Of ``number`` answers."""
        return cls([""] * number, [0] * number, [None] * number)

    def take(self, delta: Delta) -> None:
        """Add what became known."""
        self.texts[delta.index] += delta.text
        if delta.finish_reason is not None:
            self.finish_reasons[delta.index] = delta.finish_reason
            self.num_tokens[delta.index] = delta.num_tokens

    @property
    def is_whole(self) -> bool:
        """Whether all have ended."""
        return None not in self.finish_reasons

    def as_list(self) -> list[dict[str, Any]]:
        """For the file."""
        columns = zip(self.texts, self.num_tokens, self.finish_reasons, strict=True)
        return [
            {"text": text, "num_tokens": number, "finish_reason": reason}
            for text, number, reason in columns
        ]


def prompt_seed(seed: int, number: int) -> int:
    """The seed of the answers to one prompt: whatever else is asked, and in which order."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def answers_to(
    engine: Engine,
    prompts: Mapping[int, Sequence[int]],
    config: SamplingConfig,
    seed: int,
    is_stopped: Any = lambda: False,
) -> Iterator[tuple[int, Writing]]:
    """The answers to each prompt by its number, as soon as all of one prompt's have ended.

    The engine always has as many prompts waiting as it can take next. Leaves early once
    ``is_stopped``. Errors: UserError if the model fails.
    """
    delivered: queue.SimpleQueue[tuple[int, Delta]] = queue.SimpleQueue()
    writing: dict[int, Writing] = {}
    waiting = iter(prompts.items())
    at_once = 2 * -(-engine.max_rows // config.num_samples)

    def submit(number: int, ids: Sequence[int]) -> None:
        sampling = Sampling(
            max_tokens=min(config.max_new_tokens, engine.max_length - len(ids)),
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            stop=config.stop,
            seed=prompt_seed(seed, number),
        )
        writing[number] = Writing.of(config.num_samples)
        engine.submit(
            ids, sampling, lambda delta: delivered.put((number, delta)), config.num_samples
        )

    while True:
        while len(writing) < at_once and (item := next(waiting, None)) is not None:
            submit(*item)
        if not writing or is_stopped():
            return
        with contextlib.suppress(queue.Empty):
            number, delta = delivered.get(timeout=SECONDS_BETWEEN_LOOKS)
            if delta.error is not None:
                raise UserError(delta.error)
            writing[number].take(delta)
            if writing[number].is_whole:
                yield number, writing.pop(number)


# ---------------------------------------------------------------- plan and run


def plan(recipe: SampleRecipe) -> dict[str, object]:
    """What a run would do, for --dry-run; touches nothing. Errors: as in ``run``."""
    encoder = load_chat_encoder(recipe.model_name_or_path, recipe.chat_template)
    known = load_config(
        TunedModelConfig(recipe.model_name_or_path, trust_remote_code=recipe.trust_remote_code)
    ).get_text_config()
    counts = ExampleCounts()
    context = getattr(known, "max_position_embeddings", None)
    asked = read_asked(recipe, encoder, context, counts, [])
    num_answers = len(asked) * recipe.sampling.num_samples
    return {
        "prompts": counts.as_dict(),
        "prompt_tokens": sum(len(item.ids) for item in asked),
        "answers": num_answers,
        "tokens_at_most": num_answers * recipe.sampling.max_new_tokens,
    }


def run(recipe: SampleRecipe) -> RunFolder:
    """Answer every prompt; goes on where an earlier run of it was stopped, and redoes no prompt.

    Errors: UserError, DataError for what the user can mend; Stopped after a signal.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "stage: sample runs in one process. Give each process a part of the prompts and a "
            "folder of its own, and list all answers.jsonl in the score stage."
        )
    folder = RunFolder.open(recipe, input_files(recipe))
    if folder.is_finished:
        return folder
    encoder = load_chat_encoder(recipe.model_name_or_path, recipe.chat_template)
    generator = load_generator(
        recipe.model_name_or_path, trust_remote_code=recipe.trust_remote_code
    )
    uses: list[SourceUse] = []
    asked = read_asked(recipe, encoder, generator.max_length, folder.counts, uses)
    for line in mixture_lines(uses):
        folder.log(line)
    config = recipe.sampling
    kept = KeptRows(folder.path / ANSWERS)
    folder.log(
        f"{len(asked):,} prompts, {config.num_samples} answers to each, of at most "
        f"{config.max_new_tokens:,} tokens"
        + (f"; {len(kept.rows):,} prompts were answered before" if kept.rows else "")
    )
    to_do = {number: item.ids for number, item in enumerate(asked) if number not in kept.rows}
    engine = Engine(
        generator,
        stop_ids=encoder.end_of_turn_ids,
        max_rows=recipe.max_rows,
        max_waiting=3 * MAX_ROWS,
    )
    title = f"sample {folder.path.name}"
    try:
        with (
            Progress(folder, title, len(asked), len(kept.rows), "prompts") as progress,
            stop_signals() as stop,
        ):
            for number, writing in answers_to(
                engine, to_do, config, recipe.run.seed, lambda: stop.requested
            ):
                kept.add(number, asked[number].as_row() | {"answers": writing.as_list()})
                progress.update(len(kept.rows))
            if stop.requested:
                folder.note_time()
                where = f"after {len(kept.rows):,} of {len(asked):,} prompts"
                raise Stopped(stop.signal_number, where)
    finally:
        engine.close()
    answers = [answer for row in kept.finish() for answer in row["answers"]]
    reasons = Counter(answer["finish_reason"] for answer in answers)
    num_tokens = sum(answer["num_tokens"] for answer in answers)
    folder.log(
        f"{len(answers):,} answers, {num_tokens:,} tokens; {reasons['stop']:,} ended by "
        f"themselves, {reasons['length']:,} were cut at the limit"
    )
    folder.finish(
        prompts=len(asked), answers=len(answers), tokens=num_tokens, finish_reasons=dict(reasons)
    )
    return folder
