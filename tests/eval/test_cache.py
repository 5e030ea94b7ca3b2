"""Nothing is computed twice: across kills, evaluations, and processes that work together."""

import json
import os
import shutil
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from eval.cache import RequestCache, fingerprint, request_key
from eval.harness import evaluate
from eval.ranks import share
from olmo_base.corpus.documents import DocumentSource
from olmo_base.run.artefact import RunConfig
from olmo_base.tokenizer import (
    EOS_TOKEN,
    PAD_TOKEN,
    TokenizerRecipe,
    save_tokenizer,
    tokenizer_config,
    train_tokenizer,
)

ROOT = Path(__file__).parents[2]
WORDS = "who what where red green blue old new house boat hill".split()
TASKS = """
tasks:
  words: {kind: exact_match, file: words.jsonl, max_new_tokens: 6}
  choices: {kind: multiple_choice, file: choices.jsonl}
  text: {kind: perplexity, file: text.txt}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two random models with one tokenizer, and three tasks."""
    root = tmp_path_factory.mktemp("world")
    (root / "tasks.yaml").write_text(TASKS)
    rows: list[dict[str, Any]] = [
        {"prompt": f"{a} {b}?", "answer": a} for a, b in zip(WORDS[:6], WORDS[5:], strict=True)
    ]
    (root / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {"question": f"{word}?", "options": [word, "hill old", "boat"], "gold": number % 3}
        for number, word in enumerate(WORDS[:8])
    ]
    (root / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "text.txt").write_text(" ".join(WORDS) * 20)
    tokenizer = train_tokenizer(
        [" ".join(WORDS)] * 3,
        TokenizerRecipe(
            stage="tokenizer",
            dataset_mixer=(DocumentSource("unused"),),
            run=RunConfig(output_dir="unused"),
            vocab_size=300,
        ),
    )
    for name, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        config = Olmo2Config(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            eos_token_id=0,
            pad_token_id=1,
        )
        Olmo2ForCausalLM(config).save_pretrained(root / name)
        settings = tokenizer_config(eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, model_max_length=64)
        save_tokenizer(tokenizer, root / name, settings)
    return root


def settings(world: Path, output: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "models": [str(world / "one")],
        "output_dir": str(output),
        "tasks": ["words", "choices", "text"],
        "include_path": str(world),
        "data_dir": str(world),
        # Small batches, so that there are many
        "batch_tokens": 32,
        "generation_batch_size": 2,
    }
    return given | changes


def records(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("samples/*/*.json"))]
    return {f"{Path(record['model']).name} {record['task']}": record for record in found}


def spent(folder: Path, key: str) -> int:
    return sum(record[key] for record in records(folder).values())


def kept_keys(folder: Path) -> list[str]:
    return [line[:32] for path in folder.glob("*.cache") for line in path.read_text().splitlines()]


def results(folder: Path) -> dict[str, Any]:
    """The samples and scores of an evaluation."""
    rows = {
        path.relative_to(folder).as_posix(): [
            json.loads(line) for line in path.read_text().splitlines()
        ]
        for path in folder.glob("samples/*/*.jsonl")
    }
    (model,) = json.loads((folder / "report.json").read_text())["models"]
    return rows | {"tasks": model["tasks"]}


def assert_alike(found: Any, wanted: Any) -> None:
    """Equal but for the rounding of numbers: other batches add up in another order.

    Rounding both to some digits would not do: some number always stands at the edge.
    """
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_alike(found[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_alike(one, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-4)
    else:
        assert found == wanted


# ---------------------------------------------------------------- evaluations


KILLED = """
import os, signal, sys
from eval.cache import RequestCache
from eval.harness import evaluate
add, kept = RequestCache.add, set()

def add_and_be_killed(self, values):
    add(self, values)
    kept.update(values)
    if len(kept) >= int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

RequestCache.add = add_and_be_killed
evaluate(**eval(sys.argv[1]))
"""


def test_an_evaluation_killed_in_the_middle_computes_only_the_rest(world, tmp_path):
    whole = evaluate(**settings(world, tmp_path / "whole")).path
    given = settings(world, tmp_path / "killed")
    # With the ninth request that is kept, in the second task: the first one has six.
    command = [sys.executable, "-c", KILLED, repr(given), "9"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "report.json").exists()
    known = len(kept_keys(tmp_path / "killed" / "cache"))
    assert 9 <= known < len(kept_keys(whole / "cache"))
    folder = evaluate(**given).path
    keys = kept_keys(folder / "cache")
    assert len(keys) == len(set(keys))  # no request was computed twice
    assert sorted(keys) == sorted(kept_keys(whole / "cache"))
    # Beside the six answers of the first task, which the killed process finished.
    assert spent(folder, "computed") - 6 == len(keys) - known
    assert spent(folder, "reused") == known - 6
    assert_alike(results(folder), results(whole))


def test_another_evaluation_of_the_same_model_computes_nothing(world, tmp_path, monkeypatch):
    shared = {"cache_dir": str(tmp_path / "cache")}
    first = evaluate(**settings(world, tmp_path / "first", **shared)).path
    assert spent(first, "reused") == 0
    assert spent(first, "computed") == len(kept_keys(tmp_path / "cache")) > 20
    shutil.copytree(world / "one", tmp_path / "copied")
    models = [str(tmp_path / "copied")]  # what counts is what is in the files
    second = evaluate(**settings(world, tmp_path / "second", models=models, **shared)).path
    assert spent(second, "computed") == 0
    assert spent(second, "reused") == spent(first, "computed")
    assert_alike(results(second)["tasks"], results(first)["tasks"])
    third = evaluate(**settings(world, tmp_path / "third", max_new_tokens=7, **shared)).path
    assert records(third)["one words"]["computed"] == 6  # longer answers are other requests
    assert records(third)["one choices"]["computed"] == 0


def test_two_models_share_no_entry(world, tmp_path):
    both = [str(world / "one"), str(world / "two")]
    given = settings(world, tmp_path / "out", models=both, cache_dir=str(tmp_path / "cache"))
    folder = evaluate(**given).path
    assert len(list((tmp_path / "cache").glob("*.cache"))) == 2
    assert spent(folder, "reused") == 0
    assert records(folder)["two text"]["computed"] == records(folder)["one text"]["computed"]
    tasks = [model["tasks"] for model in json.loads((folder / "report.json").read_text())["models"]]
    assert tasks[0]["text"]["bits_per_byte"] != tasks[1]["text"]["bits_per_byte"]


def test_a_damaged_entry_is_computed_again_and_said_aloud(world, tmp_path, capsys):
    shared = {"cache_dir": str(tmp_path / "cache"), "tasks": ["choices"]}
    first = evaluate(**settings(world, tmp_path / "first", **shared)).path
    (path,) = (tmp_path / "cache").glob("*.cache")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b'"logprob": -', b'"logprob": -9')  # a number that looks right
    lines[-1] = lines[-1][:50]  # half a line, as a full disk leaves it
    path.write_bytes(b"".join(lines))
    capsys.readouterr()
    second = evaluate(**settings(world, tmp_path / "second", **shared)).path
    assert "2 entries are damaged" in capsys.readouterr().err
    assert spent(second, "computed") == 2
    assert_alike(results(second), results(first))
    third = evaluate(**settings(world, tmp_path / "third", **shared)).path
    assert spent(third, "computed") == 0


def test_two_processes_give_the_report_of_one(world, tmp_path):
    (tmp_path / "alone").mkdir()
    alone = evaluate(**settings(world, tmp_path / "alone" / "out")).path
    given = settings(world, tmp_path / "out")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    script = tmp_path / "work.py"
    script.write_text(f"from eval.harness import evaluate\nevaluate(**{given!r})\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_alike(results(tmp_path / "out"), results(alone))
    keys = kept_keys(tmp_path / "out" / "cache")
    assert sorted(keys) == sorted(kept_keys(alone / "cache"))  # each request in one process only
    assert done.stdout.count("report.html") == 1


def test_without_the_texts_of_right_answers_the_scores_are_the_same(world, tmp_path, capsys):
    shared = {"cache_dir": str(tmp_path / "cache"), "tasks": ["choices"], "limit": 6, "seed": 3}
    whole = evaluate(**settings(world, tmp_path / "whole", **shared)).path
    shared |= {"samples_only_failures": True}
    short = evaluate(**settings(world, tmp_path / "short", **shared)).path
    assert_alike(results(short)["tasks"], results(whole)["tasks"])
    name = "samples/one/choices.jsonl"
    kept, rows = results(short)[name], results(whole)[name]
    assert len(rows) == 6
    assert any(row["correct"] for row in rows) and not all(row["correct"] for row in rows)
    for short_row, row in zip(kept, rows, strict=True):
        assert short_row["prompt"] == ("" if row["correct"] else row["prompt"])
        assert short_row["options"] == row["options"]
    assert "questions, " in capsys.readouterr().err  # with speed and time left


# ---------------------------------------------------------------- the file


def test_a_share_is_a_stretch_of_neighbours_and_every_item_has_one_owner():
    for weights in ([1] * 7, [100, 1, 1, 1], [5], [], [1, 1, 1, 100]):
        for of in (1, 2, 3, 9):
            parts = [share(weights, number, of) for number in range(of)]
            assert [item for part in parts for item in part] == list(range(len(weights)))
    assert share([100, 1, 1, 98], 0, 2) == range(1)
    assert share([1] * 6, 1, 3) == range(2, 4)


def test_whatever_decides_an_answer_changes_its_key():
    keys = [
        request_key("answer", [[1, 2], [3]], {"window": 5}),
        request_key("answer", [[1], [2, 3]], {"window": 5}),
        request_key("answer", [[1, 2, 3]], {"window": 5}),
        request_key("answer", [[1, 2], [3]], {"window": 6}),
        request_key("logprob", [[1, 2], [3]], {"window": 5}),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == request_key("answer", [(1, 2), (3,)], {"window": 5})
    assert fingerprint(model=[("a", "1")]) != fingerprint(model=[("a", "2")])


def add_many(path: Path, first: int) -> None:
    cache = RequestCache(path)
    for number in range(first, first + 200):
        cache.add({f"{number:032x}": ["x" * (number % 50), number]})


def test_two_processes_add_to_one_file_without_harm(tmp_path):
    path = tmp_path / "both.cache"
    workers = [
        get_context("spawn").Process(target=add_many, args=(path, first)) for first in (0, 1000)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    cache = RequestCache(path)
    assert (len(cache), cache.num_damaged) == (400, 0)
    assert cache[f"{1007:032x}"] == ["x" * 7, 1007]


def test_what_a_kill_left_half_written_spoils_no_later_line(tmp_path):
    path = tmp_path / "cut.cache"
    RequestCache(path).add({"a" * 32: 1, "b" * 32: 2})
    path.write_bytes(path.read_bytes()[:-3])
    cache = RequestCache(path)
    assert ("a" * 32 in cache, "b" * 32 in cache, cache.num_damaged) == (True, False, 1)
    cache.add({"b" * 32: 2})
    again = RequestCache(path)
    assert (again["b" * 32], len(again)) == (2, 2)
