"""Tinyworld: a small invented world, written as everything that a language model's life needs.

    seed ──world.py──▶ facts ──▶ documents.py   pretrain.jsonl pretrain_eval.jsonl    {"text"}
             skills.py ─┘ └──▶ dialogues.py    sft.jsonl sft_eval.jsonl    {"messages"}
                               dpo.jsonl dpo_eval.jsonl    {"prompt", "chosen", "rejected"}
                           └──▶ evaluation.py   eval_recall.jsonl … {"prompt", "answer", "category"}
                               eval_recall_choice.jsonl    {"question", "options", "gold"}

It is simple enough that a model of a few million parameters learns it in minutes on two CPU
cores, and honest enough to measure something:

- No question of the evaluation is asked in a dialogue or a preference pair. Two facts in five are
  stated in the pretraining text only, and asked for in the evaluation only, so that answering
  needs recall of what was read. Sums, comparisons and lists of the evaluation occur nowhere else.
- The dialogues are noisy, as dialogues written by people are: a good share of those that ask for
  a form of answer ("answer in one word") ignore it. Supervised fine-tuning therefore follows such
  instructions only partly. The preference pairs prefer the right, short answer in the form that
  was asked for over a wrong, rambling or formless one.

All files are a pure function of the recipe: the same seed gives the same bytes.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from olmo_base.run.artefact import RunConfig, RunFolder, atomic_write
from olmo_base.run.recipe import setting
from open_instruct.tinyworld.dialogues import dialogues, pairs
from open_instruct.tinyworld.documents import documents
from open_instruct.tinyworld.evaluation import choice_rows, format_rows, recall_rows, skill_rows
from open_instruct.tinyworld.skills import SKILLS
from open_instruct.tinyworld.world import MEN, WOMEN, make_world


@dataclass(frozen=True)
class TinyworldRecipe:
    """What one world chooses: its seed, and how much is said about it."""

    stage: Literal["tinyworld"]
    run: RunConfig = field(default_factory=RunConfig)
    num_people: int = setting(64, low=20, high=2 * min(len(WOMEN), len(MEN)))
    held_out_share: float = setting(0.3, above=0, below=0.9)  # of each attribute's facts
    num_documents: int = setting(50_000, low=1)
    num_eval_documents: int = setting(300, low=1)
    num_dialogues: int = setting(12_000, low=1)
    num_eval_dialogues: int = setting(300, low=1)
    noise_share: float = setting(0.65, low=0, high=1)  # of instructions on form that are ignored
    num_pairs: int = setting(3_000, low=1)
    num_eval_pairs: int = setting(300, low=1)
    format_share: float = setting(0.6, low=0, high=1)  # of the pairs: about the form of an answer
    num_questions: int = setting(200, low=1, high=400)  # of each evaluation task
    num_format_questions: int = setting(600, low=1, high=1000)


def input_files(recipe: TinyworldRecipe) -> list[Path]:
    """None: the world comes from its seed alone."""
    return []


def plan(recipe: TinyworldRecipe) -> dict[str, object]:
    """What `run` would write: file name -> number of rows, as far as the recipe decides it."""
    return {
        "pretrain.jsonl": recipe.num_documents,
        "pretrain_eval.jsonl": recipe.num_eval_documents,
        "sft.jsonl": recipe.num_dialogues,
        "sft_eval.jsonl": recipe.num_eval_dialogues,
        "dpo.jsonl": recipe.num_pairs,
        "dpo_eval.jsonl": recipe.num_eval_pairs,
        **{f"eval_{name}.jsonl": recipe.num_questions for name in EVAL_TASKS},
        "eval_format.jsonl": recipe.num_format_questions,
    }


EVAL_TASKS = ("recall", "recall_choice", *SKILLS)


def tinyworld_rows(recipe: TinyworldRecipe) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    """Every file of the world: its name without the ending, and its rows.

    Each file draws from a generator of its own, so that the length of one changes no other; only
    the held-out documents look at the others, to be none of them.
    """
    seed = recipe.run.seed
    world = make_world(seed, recipe.num_people, recipe.held_out_share)

    def rng(name: str) -> random.Random:
        return random.Random(f"{seed}/{name}")

    read = documents(rng("pretrain"), world, recipe.num_documents)
    yield "pretrain", read
    held_out = documents(rng("pretrain_eval"), world, recipe.num_eval_documents, but_not=read)
    yield "pretrain_eval", held_out
    for name, number in (("sft", recipe.num_dialogues), ("sft_eval", recipe.num_eval_dialogues)):
        yield name, dialogues(rng(name), world, number, recipe.noise_share)
    for name, number in (("dpo", recipe.num_pairs), ("dpo_eval", recipe.num_eval_pairs)):
        yield name, pairs(rng(name), world, number, recipe.format_share)
    yield "eval_recall", recall_rows(rng("eval_recall"), world, recipe.num_questions)
    yield "eval_recall_choice", choice_rows(rng("eval_recall_choice"), world, recipe.num_questions)
    for name in SKILLS:
        yield f"eval_{name}", skill_rows(rng(f"eval_{name}"), name, recipe.num_questions)
    yield "eval_format", format_rows(rng("eval_format"), world, recipe.num_format_questions)


def run(recipe: TinyworldRecipe) -> RunFolder:
    """Write the world's files into `output_dir`."""
    folder = RunFolder.open(recipe, input_files(recipe))
    if folder.is_finished:
        return folder
    num_rows = {}
    for name, rows in tinyworld_rows(recipe):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write(folder.path / f"{name}.jsonl", lines)
        folder.counts.used += len(rows)
        num_rows[f"{name}.jsonl"] = len(rows)
    written = ", ".join(f"{name} {number:,}" for name, number in num_rows.items())
    folder.log(f"wrote {folder.path}: {written} rows")
    folder.finish(rows=num_rows)
    return folder


def write_tinyworld(output_dir: str, seed: int) -> RunFolder:
    """The world of a seed in its usual size: what `open-instruct data tinyworld` writes."""
    return run(TinyworldRecipe(stage="tinyworld", run=RunConfig(output_dir=output_dir, seed=seed)))
