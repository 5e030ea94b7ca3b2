"""Scoring: a reward model or a verifier judges answers, and the best of them become training data.

answers.jsonl of the sample stage -> a score for each answer -> scored.jsonl
    -> the best answers to each prompt -> sft.jsonl, which the sft stage reads
    -> good and bad answers to one prompt -> preferences.jsonl, which dpo and reward read
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from olmo_base.run.artefact import RunConfig, RunFolder, model_files
from olmo_base.run.errors import DataError, Stopped, UserError
from olmo_base.run.launch import stop_signals
from olmo_base.run.metrics import Progress
from olmo_base.run.recipe import RecipeError, setting
from open_instruct.batches import Examples, evaluation_batches
from open_instruct.causal_lm import AttentionName, ModelConfig
from open_instruct.encode import ChatEncoder, load_chat_encoder
from open_instruct.examples import BadRow, Message, read_rows
from open_instruct.loop import Workers
from open_instruct.reward import RowRewards, load_reward_model
from open_instruct.sample import KeptRows, write_rows
from open_instruct.turns import ASKING, Tools
from open_instruct.verifiers import VERIFIERS

__all__ = ["ScoreRecipe", "input_files", "plan", "run"]

SCORED, SFT, PREFERENCES = "scored.jsonl", "sft.jsonl", "preferences.jsonl"
PROMPTS_AT_ONCE = 64  # scored together and kept together


@dataclass(frozen=True)
class SelectionConfig:
    """Which answers become training data. Scores are the judge's own numbers."""

    num_best: int = setting(1, low=0, help="of each prompt's answers, into sft.jsonl")
    num_pairs: int = setting(
        1, low=0, help="of each prompt, into preferences.jsonl: best with worst, and so inwards"
    )
    min_score: float | None = setting(
        None, help="of an answer that is learnt or preferred; null: any"
    )
    max_rejected_score: float | None = setting(None, help="of a rejected answer; null: any")
    min_margin: float = setting(0.0, low=0, help="of a pair; the scores differ by more than this")
    use_cut_answers: bool = setting(
        False, help="also those cut at max_new_tokens, which teach not to end"
    )


@dataclass(frozen=True, kw_only=True)
class ScoreRecipe:
    """The keys of ``stage: score``."""

    stage: Literal["score"] = "score"
    answers: tuple[str, ...] = setting(help="files of the sample stage")
    reward_model_path: str | None = setting(None, help="the output_dir of a reward run")
    verifier: str | None = setting(None, help="in place of a reward model")
    verifier_metric: str | None = setting(None, help="null: the verifier's first")
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    max_length: int | None = setting(None, low=2, help="tokens; null: what the reward model reads")
    on_too_long: Literal["error", "drop"] = setting("error", help="for the reward model")
    per_device_eval_batch_size: int = setting(32, low=1, changes_result=False)
    attn_implementation: AttentionName = setting("auto")
    trust_remote_code: bool = setting(False, help="run Python code that the model folder brings")
    bf16: bool | Literal["auto"] = setting("auto", help="auto: on GPUs that compute in it")
    run: RunConfig

    def __post_init__(self) -> None:
        if not self.answers:
            raise RecipeError("answers", "names no file. List at least one answers.jsonl.")
        if (self.reward_model_path is None) == (self.verifier is None):
            raise RecipeError(
                "reward_model_path", "say this or verifier: one of the two judges the answers."
            )
        if self.verifier is not None and self.verifier not in VERIFIERS:
            raise RecipeError(
                "verifier", f"{self.verifier!r} must be one of {', '.join(VERIFIERS)}."
            )
        if self.verifier_metric is not None:
            metrics = () if self.verifier is None else VERIFIERS[self.verifier].metrics
            if self.verifier_metric not in metrics:
                known = ", ".join(metrics) or "none without a verifier"
                raise RecipeError(
                    "verifier_metric", f"{self.verifier_metric!r} must be one of {known}."
                )


def input_files(recipe: ScoreRecipe) -> list[Path]:
    """The files whose content decides the result. Errors: UserError naming one that is missing."""
    files = [Path(path) for path in recipe.answers]
    for path in files:
        if not path.is_file():
            raise UserError(f"answers: {path} does not exist. Run the sample stage that writes it.")
    judge = recipe.reward_model_path
    return files if judge is None else [*files, *model_files(judge)]


# ---------------------------------------------------------------- what the sample stage wrote


@dataclass(frozen=True)
class Answered:
    """One row of a file of answers."""

    row: dict[str, Any]
    source: str
    line: int

    @property
    def prompt(self) -> list[Message]:
        """What was asked."""
        prompt: list[Message] = self.row["prompt"]
        return prompt

    @property
    def texts(self) -> list[str]:
        """The answers."""
        return [answer["text"] for answer in self.row["answers"]]


def read_answers(recipe: ScoreRecipe) -> list[Answered]:
    """All rows of all files. Errors: DataError with file and line."""
    found: list[Answered] = []
    for path in recipe.answers:
        for row in read_rows(Path(path)):
            problem = _problem(row.value, needs_truth=recipe.verifier is not None)
            if problem is not None:
                raise DataError(
                    row.source, row.line, problem, "Give a file that the sample stage wrote."
                )
            found.append(Answered(row.value, row.source, row.line))
    return found


def _problem(row: Any, *, needs_truth: bool) -> str | None:
    """What is wrong with a row, in words."""
    if isinstance(row, BadRow):
        return row.problem
    if not isinstance(row, dict) or not {"prompt", "answers"} <= row.keys():
        return "the row needs the keys 'prompt' and 'answers'."
    turns = row["prompt"]
    is_dialogue = isinstance(turns, list) and turns and all(map(_is_turn, turns))
    if not is_dialogue or turns[-1]["role"] not in ASKING:
        return "'prompt' is not a list of turns that ends with the user's."
    answers = row["answers"]
    if not isinstance(answers, list) or not all(
        isinstance(answer, dict) and isinstance(answer.get("text"), str) for answer in answers
    ):
        return "'answers' is not a list of objects with a 'text'."
    if needs_truth and "truth" not in row:
        return "there is no 'truth' for the verifier: set verifier in the sample stage too."
    return None


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
    )


# ---------------------------------------------------------------- the two kinds of judge

# Scores of each row's answers, in their order; None for one that could not be judged.
Scores = list[list[float | None]]
Judge = Callable[[Sequence[Answered]], Scores]


def verifier_judge(recipe: ScoreRecipe) -> Judge:
    """Scores by comparison with the truth; several at once, as programs take seconds to run."""
    assert recipe.verifier is not None
    verifier = VERIFIERS[recipe.verifier]
    verifier.check_ready()
    metric = recipe.verifier_metric or verifier.metrics[0]

    def judge(rows: Sequence[Answered]) -> Scores:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            verdicts = [
                [pool.submit(verifier.judge, text, row.row["truth"]) for text in row.texts]
                for row in rows
            ]
            return [[verdict.result().scores[metric] for verdict in row] for row in verdicts]

    return judge


def reward_judge(recipe: ScoreRecipe, workers: Workers) -> Judge:
    """Scores by a reward model. Errors: UserError if it is none."""
    assert recipe.reward_model_path is not None
    encoder = load_chat_encoder(recipe.reward_model_path)
    config = ModelConfig(
        recipe.reward_model_path,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
    )
    loaded = load_reward_model(config, encoder, seed=0)
    if loaded.has_new_head:
        raise UserError(
            f"{recipe.reward_model_path} has no head that gives rewards, so its numbers would be "
            "random. Give the output_dir of a reward run."
        )
    model = loaded.model.to(workers.device)
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (recipe.max_length, known) if limit is not None]
    longest = min(limits, default=None)
    rewards = RowRewards(model, workers.precision, 1.0 if workers.bf16 else 1e-3).eval()

    def judge(rows: Sequence[Answered]) -> Scores:
        scores: Scores = [[None] * len(row.texts) for row in rows]
        places: list[tuple[int, int]] = []
        sequences = []
        for place, encoded in _encoded(rows, encoder):
            if longest is not None and len(encoded.ids) > longest:
                row = rows[place[0]]
                if recipe.on_too_long == "error":
                    raise DataError(
                        row.source,
                        row.line,
                        f"an answer with its prompt has {len(encoded.ids):,} tokens, and the "
                        f"reward model is to read at most {longest:,}.",
                        "Set on_too_long: drop.",
                    )
                continue
            places.append(place)
            sequences.append((encoded,))
        if not sequences:
            return scores
        batches = evaluation_batches(
            Examples(sequences),
            max_examples=recipe.per_device_eval_batch_size,
            num_ranks=1,
            rank=0,
        )
        with torch.no_grad():
            for batch in batches:
                found = rewards(batch.to(workers.device)).tolist()
                for number, score in zip(batch.examples.tolist(), found, strict=True):
                    if not math.isfinite(score):
                        raise UserError(
                            f"The reward model in {recipe.reward_model_path} gives {score}: its "
                            "weights are damaged, or its training diverged."
                        )
                    row_number, answer = places[number]
                    scores[row_number][answer] = score
        return scores

    return judge


def _encoded(
    rows: Sequence[Answered], encoder: ChatEncoder
) -> Iterator[tuple[tuple[int, int], Any]]:
    """((row, answer), ids of the whole dialogue) of every answer that is not empty."""
    places = [
        (number, answer)
        for number, row in enumerate(rows)
        for answer, text in enumerate(row.texts)
        if text.strip()
    ]
    dialogues: list[list[Message]] = []
    tools: list[Tools | None] = []
    for number, answer in places:
        turn: Message = {"role": "assistant", "content": rows[number].texts[answer]}
        dialogues.append([*rows[number].prompt, turn])
        tools.append(rows[number].row.get("tools"))
    yield from zip(places, encoder.encode_many(dialogues, tools), strict=True)


# ---------------------------------------------------------------- the best, and the pairs


def usable(answers: Sequence[dict[str, Any]], config: SelectionConfig, why: Counter[str]) -> list:
    """The answers of one prompt that may be chosen or rejected, the best first.

    Equal scores keep the order in which they were drawn; why the others are left out is counted.
    """
    kept: list[dict[str, Any]] = []
    texts: set[str] = set()
    for answer in answers:
        if not answer["text"].strip():
            why["empty"] += 1
        elif answer.get("finish_reason") == "length" and not config.use_cut_answers:
            why["cut at the limit"] += 1
        elif answer["score"] is None:
            why["too long for the reward model"] += 1
        elif answer["text"] in texts:
            why["same as another answer"] += 1
        else:
            texts.add(answer["text"])
            kept.append(answer)
    return sorted(kept, key=lambda answer: -answer["score"])


def best_of(answers: Sequence[dict[str, Any]], config: SelectionConfig) -> list[dict[str, Any]]:
    """The answers of ``usable`` that are learnt."""
    good = [answer for answer in answers if _is_good(answer, config)]
    return good[: config.num_best]


def pairs_of(
    answers: Sequence[dict[str, Any]], config: SelectionConfig
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(chosen, rejected) of ``usable``: the best with the worst, the second with the second last.

    No answer is in two pairs.
    """
    pairs = []
    for chosen, rejected in zip(answers, reversed(answers), strict=True):
        is_apart = chosen["score"] - rejected["score"] > config.min_margin
        is_bad = config.max_rejected_score is None or rejected["score"] <= config.max_rejected_score
        if is_apart and is_bad and _is_good(chosen, config):
            pairs.append((chosen, rejected))
    return pairs[: min(config.num_pairs, len(answers) // 2)]


def _is_good(answer: dict[str, Any], config: SelectionConfig) -> bool:
    return config.min_score is None or answer["score"] >= config.min_score


@dataclass
class Selected:
    """What becomes training data, and what became of the rest."""

    dialogues: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    left_out: Counter[str]  # of answers, by reason
    without: Counter[str]  # of prompts, by what they did not give


def select(rows: Sequence[dict[str, Any]], config: SelectionConfig) -> Selected:
    """Dialogues and pairs from scored rows."""
    selected = Selected([], [], Counter(), Counter())
    for row in rows:
        answers = usable(row["answers"], config, selected.left_out)
        prompt = row["prompt"]
        tools = {key: row[key] for key in ("tools",) if key in row}
        best, pairs = best_of(answers, config), pairs_of(answers, config)
        for answer in best:
            turn = {"role": "assistant", "content": answer["text"]}
            selected.dialogues.append(
                {"messages": [*prompt, turn], **tools, "score": answer["score"]}
            )
        for chosen, rejected in pairs:
            selected.pairs.append(
                {
                    "prompt": prompt,
                    **tools,
                    "chosen": chosen["text"],
                    "rejected": rejected["text"],
                    "score_chosen": chosen["score"],
                    "score_rejected": rejected["score"],
                }
            )
        selected.without["no usable answer"] += not answers
        selected.without["no answer good enough to learn"] += bool(answers and not best)
        selected.without["no two answers that make a pair"] += not pairs
    return selected


# ---------------------------------------------------------------- plan and run


def plan(recipe: ScoreRecipe) -> dict[str, object]:
    """What a run would do, for --dry-run; touches nothing. Errors: as in ``run``."""
    input_files(recipe)
    rows = read_answers(recipe)
    return {"prompts": len(rows), "answers": sum(len(row.texts) for row in rows)}


def run(recipe: ScoreRecipe) -> RunFolder:
    """Score all answers and write the files; goes on where an earlier run of it was stopped.

    Errors: UserError, DataError for what the user can mend; Stopped after a signal.
    """
    workers = Workers(recipe.bf16)
    if workers.num_ranks > 1:
        raise UserError("stage: score runs in one process. Launch it without accelerate.")
    folder = RunFolder.open(recipe, input_files(recipe))
    if folder.is_finished:
        return folder
    rows = read_answers(recipe)
    judge = reward_judge(recipe, workers) if recipe.verifier is None else verifier_judge(recipe)
    kept = KeptRows(folder.path / SCORED)
    title = f"score {folder.path.name}"
    with (
        Progress(folder, title, len(rows), len(kept.rows), "prompts") as progress,
        stop_signals() as stop,
    ):
        # A part that was kept by half is scored again: its batches decide the last digits.
        first = len(kept.rows) // PROMPTS_AT_ONCE * PROMPTS_AT_ONCE
        for start in range(first, len(rows), PROMPTS_AT_ONCE):
            if stop.requested:
                folder.note_time()
                raise Stopped(stop.signal_number, f"after {start:,} of {len(rows):,} prompts")
            part = rows[start : start + PROMPTS_AT_ONCE]
            for number, (row, scores) in enumerate(zip(part, judge(part), strict=True), start):
                answers = [
                    answer | {"score": score}
                    for answer, score in zip(row.row["answers"], scores, strict=True)
                ]
                kept.add(number, row.row | {"answers": answers})
            progress.update(len(kept.rows))
    return _finish(recipe, folder, kept.finish())


def _finish(recipe: ScoreRecipe, folder: RunFolder, rows: list[dict[str, Any]]) -> RunFolder:
    """Write what was selected, and say what became of every answer and every prompt."""
    selected = select(rows, recipe.selection)
    num_answers = sum(len(row["answers"]) for row in rows)
    folder.counts.used = num_answers - selected.left_out.total()
    for reason, number in selected.left_out.items():
        folder.counts.drop(reason, number)
    scores = [
        answer["score"] for row in rows for answer in row["answers"] if answer["score"] is not None
    ]
    mean = sum(scores) / len(scores) if scores else math.nan
    folder.log(
        f"{len(rows):,} prompts, {num_answers:,} answers, {len(scores):,} scored, on the mean "
        f"{mean:.4g}; left out: {_listed(selected.left_out)}"
    )
    folder.log(
        f"{len(selected.dialogues):,} dialogues into {SFT}, {len(selected.pairs):,} pairs into "
        f"{PREFERENCES}; prompts with {_listed(+selected.without)}"
    )
    asked = (
        (SFT, selected.dialogues, recipe.selection.num_best),
        (PREFERENCES, selected.pairs, recipe.selection.num_pairs),
    )
    for name, made, number in asked:
        if number > 0 and not made:
            folder.log(f"{name} is empty: no answer passed. Look at {SCORED}, or ask for less.")
        if number > 0:
            write_rows(folder.path / name, made)
    folder.finish(
        prompts=len(rows),
        answers=num_answers,
        scored=len(scores),
        mean_score=mean if scores else None,
        dialogues=len(selected.dialogues),
        pairs=len(selected.pairs),
        prompts_without=dict(+selected.without),
    )
    return folder


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{reason}: {number:,}" for reason, number in counts.items()) or "none"
