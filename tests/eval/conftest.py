"""Evaluation folders made by hand, as the harness leaves them, and the runs of their models."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

SKILLS = {"recall": (0.02, 0.55, 0.53), "sort": (0.0, 0.8, 0.81), "format": (0.01, 0.5, 0.78)}
PEOPLE = ("Mila", "Oren", "Tess", "Juno", "Pavel", "Rana")


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(folder: Path, stage: str, parent: Path | None, rows: list[dict]) -> None:
    """A finished training run with a tiny model."""
    folder.mkdir(parents=True)
    recipe = {"stage": stage, "learning_rate": 1e-3, "output_dir": str(folder)}
    if parent is not None:
        recipe["model_name_or_path"] = str(parent)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    write_json(
        folder / "manifest.json",
        {
            "stage": stage,
            "status": "finished",
            "wall_time_seconds": 83.5,
            "examples": {"used": 4000, "truncated": 3, "dropped": {"too long": 2}},
            "inputs": {"data/text.jsonl": {"sha256": "ab" * 32, "bytes": 123456}},
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "hardware": {"processor": "A processor", "cores": 2},
            "git_commit": "0123abc",
            "results": {},
        },
    )
    write_json(
        folder / "config.json",
        {
            "architectures": ["Olmo2ForCausalLM"],
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "vocab_size": 50,
            "max_position_embeddings": 64,
        },
    )
    save_file({"weight": torch.zeros(50, 16)}, folder / "model.safetensors")
    write_rows(folder / "metrics.jsonl", rows)


def training_rows(start: float, end: float, steps: int, with_accuracy: bool = False) -> list[dict]:
    chance = random.Random(steps)
    rows = []
    for step in range(10, steps + 1, 10):
        level = end + (start - end) * math.exp(-4 * step / steps)
        rows.append({"step": step, "loss": level + chance.gauss(0, 0.04), "tokens": step * 4096})
        if step % (steps // 10) == 0:
            row = {"step": step, "eval_loss": level + 0.05}
            rows.append(
                row | ({"eval_accuracy": 0.5 + 0.4 * step / steps} if with_accuracy else {})
            )
    return rows


@pytest.fixture
def make_evaluation(tmp_path: Path) -> Callable[..., Path]:
    """Builds runs/{base,sft,dpo} and an evaluation of them; ``answer`` may replace every answer."""

    def make(
        n: int = 120,
        names=("base", "sft", "dpo"),
        answer: str | None = None,
        tasks=("recall", "sort", "format", "choice", "text"),
    ) -> Path:
        runs = tmp_path / "runs"
        parent = None
        for name, stage, rows in (
            ("base", "pretrain", training_rows(6.2, 1.4, 2000)),
            ("sft", "sft", training_rows(2.0, 0.6, 600)),
            ("dpo", "dpo", training_rows(0.69, 0.2, 300, with_accuracy=True)),
        ):
            write_run(runs / name, stage, parent, rows)
            parent = runs / name
        known = [
            {
                "name": name,
                "kind": "exact_match",
                "file": f"eval_{name}.jsonl",
                "about": f"Questions of the kind {name}.",
            }
            for name in SKILLS
        ]
        known[2]["answer_rule"] = "as_written"
        known.append({"name": "choice", "kind": "multiple_choice", "file": "eval_choice.jsonl"})
        known.append({"name": "text", "kind": "perplexity", "file": "text.txt"})
        asked = [task for task in known if task["name"] in tasks]
        groups = {
            "accuracy": ["recall", "sort"],
            "instruction following": ["format"],
            "choosing among options": ["choice"],
            "text prediction": ["text"],
        }
        folder = runs / "eval"
        write_json(
            folder / "evaluation.json",
            {
                "suite": "quickstart",
                "tasks": asked,
                "groups": {group: of for group, of in groups.items() if {*of} <= {*tasks}},
                "models": [{"name": name, "path": str(runs / name)} for name in names],
            },
        )
        write_json(
            folder / "manifest.json",
            {
                "stage": "eval",
                "status": "finished",
                "sessions": [{"started": "2026-01-02T03:04:05+00:00", "seconds": 60.0}],
                "inputs": {},
            },
        )
        for number, name in enumerate(names):
            for task in asked:
                rows = samples(task, number, n, answer)
                write_rows(folder / "samples" / name / f"{task['name']}.jsonl", rows)
                write_json(
                    folder / "samples" / name / f"{task['name']}.json",
                    {"seconds": 4.2, "uses_chat_template": number > 0, "not_fitting": 0},
                )
        return folder

    return make


def samples(task: dict, model: int, n: int, answer: str | None) -> list[dict]:
    chance = random.Random(f"{task['name']} {model}")
    luck = random.Random(task["name"])  # the same for every model: a hard question stays hard
    rows: list[dict] = []
    for index in range(n):
        person, level = PEOPLE[index % len(PEOPLE)], luck.random()
        row: dict = {"doc_id": str(index), "category": None}
        if task["kind"] == "exact_match":
            right = level + chance.gauss(0, 0.05) < SKILLS[task["name"]][min(model, 2)]
            question = f"What colour is the boat of {person}, the baker of street {index}?"
            row |= {
                "question": question,
                "prompt": f"Question: {question}\nAnswer:",
                "target": ["green"],
                "answer": answer or ("green" if right else chance.choice(["red", "blue", ""])),
                "correct": right,
            }
        elif task["kind"] == "multiple_choice":
            values = [chance.gauss(0, 1) - 5 for _ in range(4)]
            values[index % 4] += 0.8 * model
            texts = (" red", " green", " dark blue", " yellow")
            row |= {
                "question": f"What colour is boat {index}?",
                "prompt": f"Question: What colour is boat {index}?\nAnswer:",
                "target": texts[index % 4],
                "gold": index % 4,
                "options": [
                    {"text": text, "logprob": value, "logprob_alone": None, "num_tokens": 2}
                    for text, value in zip(texts, values, strict=True)
                ],
                "correct": values.index(max(values)) == index % 4,
            }
        else:
            row |= {
                "prompt": "",
                "target": f"The boat of {person} sails past the harbour again. " * 5,
                "logprob": -900 * (1.0 - 0.1 * model) + chance.gauss(0, 30),
                "num_tokens": 250,
                "num_bytes": 1000,
                "num_words": 180,
                "correct": None,
            }
        rows.append(row)
    return rows
