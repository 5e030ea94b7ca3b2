"""Tasks whose answers are verified, from local files to the report, with models that know them."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml

from eval.asking import ask
from eval.harness import evaluate, run
from eval.items import Question
from eval.questions import examples_file, read_items
from eval.recipe import EvalRecipe
from eval.scores import compare, estimate, is_right, measured
from eval.statistics import mean, wilson_interval
from eval.subject import Subject, load_subject
from eval.tasks import Task, load_catalogue, select
from olmo_base.run.errors import DataError, UserError
from olmo_base.run.recipe import load_recipe
from open_instruct.__main__ import main
from open_instruct.verifiers.sandbox import check_confinement
from tests.eval.knowing import save_knowing_models

SHARED = Path(__file__).parents[3] / "shared" / "data"
BOATS = {"Mila": 3, "Oren": 12, "Tess": 40, "Juno": 7}
QUESTIONS = {f"How many boats has {name}?": number for name, number in BOATS.items()}
FUNCTIONS = {
    "def one():\n": "    return 1\n",
    "def two():\n": "    return 2\n",
}
PLAIN = [
    f"Question: {question}\nAnswer: Count.\n#### {number}\n\nQuestion: and"
    for question, number in QUESTIONS.items()
]
DIALOGUES = [
    *((question, f"Count them: {number}") for question, number in QUESTIONS.items()),
    *((f"Write {prompt}", f"```python\n{prompt}{body}```") for prompt, body in FUNCTIONS.items()),
]
CONTEXT = 160


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with base (knows PLAIN and FUNCTIONS), chat (knows DIALOGUES) and blank."""
    return save_knowing_models(
        tmp_path_factory.mktemp("models"),
        PLAIN,
        DIALOGUES,
        vocab_size=350,
        context=CONTEXT,
        steps=120,
        # Read in two pieces, as when it is asked: a token may span the end of the prompt.
        more=lambda tokenizer: [
            tokenizer.encode(prompt).ids + tokenizer.encode(f"{body}\ndef more():\n    pass\n").ids
            for prompt, body in FUNCTIONS.items()
        ],
    )


@pytest.fixture
def data(tmp_path) -> Path:
    """Task files and their data, with problems the models know."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows: dict[str, list[dict]] = {
        "boats": [
            {"question": question, "answer": f"Count.\n#### {number}"}
            for question, number in QUESTIONS.items()
        ],
        "latex": [
            {"problem": question, "solution": rf"So \boxed{{{number}.0}}."}
            for question, number in QUESTIONS.items()
        ],
        "functions": [
            {
                "prompt": prompt,
                "entry_point": prompt[4:-4],
                "test": f"def check(candidate):\n    assert candidate() == {body.split()[-1]}\n",
            }
            for prompt, body in FUNCTIONS.items()
        ],
        "instructions": [
            {
                "prompt": question,
                "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
                "kwargs": [{}, {}],
            }
            for question in QUESTIONS
        ],
    }
    for name, content in rows.items():
        write(folder / f"{name}.jsonl", content)
    tasks = {
        "boats": {"verifier": "gsm8k", "file": "boats.jsonl", "stop": ["Question:"]},
        "latex": {"verifier": "math", "file": "latex.jsonl", "stop": ["Question:"]},
        "functions": {
            "verifier": "code",
            "file": "functions.jsonl",
            "plain_prompt": "{prompt}",
            "chat_prompt": "Write {prompt}",
            "stop": ["\ndef "],
        },
        "instructions": {"verifier": "ifeval", "file": "instructions.jsonl", "stop": ["####"]},
    }
    given = {
        name: {"kind": "verified", "max_new_tokens": 100, **task} for name, task in tasks.items()
    }
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": given}))
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def can_confine() -> bool:
    try:
        check_confinement()
    except UserError:
        return False
    return True


def evaluated(models: Path, data: Path, output: Path, *tasks: str) -> dict:
    evaluate(
        [str(models / "base"), str(models / "chat")],
        output_dir=str(output),
        tasks=tasks,
        data_dir=str(data),
        include_path=str(data),
    )
    report = json.loads((output / "report.json").read_text())
    return {
        (model["name"], task, metric): score["value"]
        for model in report["models"]
        for task, metrics in model["tasks"].items()
        for metric, score in metrics.items()
    }


def sample(output: Path, model: str, task: str) -> dict:
    return json.loads((output / "samples" / model / f"{task}.jsonl").read_text().splitlines()[0])


def subject(models: Path, name: str) -> Subject:
    return load_subject(str(models / name), batch_tokens=512, batch_size=3)


def test_models_that_know_the_numbers_get_them_right(models, data, tmp_path):
    output = tmp_path / "out"
    scores = evaluated(models, data, output, "boats", "latex")
    assert scores["base", "boats", "last_number"] == 1.0
    assert scores["base", "boats", "marked_number"] == 1.0
    assert scores["chat", "boats", "last_number"] == 1.0
    assert scores["chat", "boats", "marked_number"] == 0.0  # it never says "####"
    assert scores["base", "latex", "flexible_match"] == 1.0
    assert scores["base", "latex", "strict_match"] == 0.0
    first = sample(output, "base", "boats")
    assert first["answer"] == " Count.\n#### 3\n\n"  # cut where the next question begins
    assert (first["found"], first["correct"], first["is_cut"]) == ("3", True, False)
    assert first["target"] == ["3"]
    assert sample(output, "chat", "boats")["prompt"].startswith("<|user|>\nHow many boats")
    page = (output / "report.html").read_text()
    assert "right answers, announced as the answer" in page
    assert json.loads((output / "samples/chat/boats.json").read_text())["uses_chat_template"]


@pytest.mark.skipif(not can_confine(), reason="this machine cannot confine programs")
def test_models_that_know_the_programs_pass_their_tests(models, data, tmp_path):
    scores = evaluated(models, data, tmp_path / "out", "functions")
    assert scores["base", "functions", "pass_at_1"] == 1.0
    assert scores["chat", "functions", "pass_at_1"] == 1.0
    assert ("base", "functions", "pass_at_10") not in scores
    assert sample(tmp_path / "out", "base", "functions")["answer"] == "    return 1\n"
    assert sample(tmp_path / "out", "chat", "functions")["answer"].startswith("```python")


def test_instructions_are_counted_by_prompt_and_by_instruction(models, data, tmp_path):
    items = read_items(task_of(data, "instructions"), data / "instructions.jsonl")
    rows = ask(subject(models, "base"), task_of(data, "instructions"), items)
    assert measured("verified", rows) == [
        *("prompt_loose", "prompt_strict", "instruction_loose", "instruction_strict")
    ]
    assert estimate(rows, "prompt_loose").value == 0.0
    assert estimate(rows, "instruction_loose").value == 0.5  # no comma, and no quotation marks
    assert rows[0]["found"] == "not followed: startend:quotation"


def test_ifeval_without_langdetect_is_refused_before_anything_is_asked(
    models, data, tmp_path, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="langdetect"):
        evaluated(models, data, tmp_path / "out", "instructions")
    assert not (tmp_path / "out" / "samples").exists()


def test_the_command_fails_with_code_one_when_a_model_has_become_worse(models, data, tmp_path):
    def given(model: str, output: str) -> list[str]:
        options = {"--tasks": "boats", "--data-dir": data, "--include-path": data}
        words = [str(word) for pair in options.items() for word in pair]
        return ["eval", str(models / model), "--output-dir", str(tmp_path / output), *words]

    rows = [
        {"question": question, "answer": f"#### {number}"} for question, number in QUESTIONS.items()
    ]
    write(data / "boats.jsonl", rows * 4)
    assert main(given("base", "before")) == 0
    gate = ["--baseline", str(tmp_path / "before" / "report.json"), "--fail-if-worse", "0.02"]
    assert main([*given("base", "same"), *gate]) == 0
    assert main([*given("blank", "after"), *gate]) == 1


# ---------------------------------------------------------------- how answers are written


def task_of(data: Path, name: str, **changes) -> Task:
    settings = yaml.safe_load((data / "tasks.yaml").read_text())["tasks"][name] | changes
    return Task(name=name, **(settings | {"stop": tuple(settings.get("stop", ()))}))


def test_examples_come_first_as_text_or_as_turns(models, data):
    shutil.copy(data / "boats.jsonl", data / "shown.jsonl")
    task = task_of(data, "boats", examples_file="shown.jsonl", num_examples=2)
    (item, *_) = read_items(task, data / "boats.jsonl", examples_file(task, str(data)))
    (row,) = ask(subject(models, "base"), task, [item], max_new_tokens=1)
    assert row["prompt"] == (
        "Question: How many boats has Mila?\nAnswer: Count.\n#### 3\n\n"
        "Question: How many boats has Oren?\nAnswer: Count.\n#### 12\n\n"
        "Question: How many boats has Mila?\nAnswer:"
    )
    (row,) = ask(subject(models, "chat"), task, [item], max_new_tokens=1)
    assert row["prompt"].count("<|user|>") == 3
    assert row["prompt"].count("<|assistant|>\nCount.") == 2


def test_an_answer_ends_before_a_text_to_stop_at(models, data):
    items = read_items(task_of(data, "boats"), data / "boats.jsonl")
    base = subject(models, "base")
    wholes = ask(base, task_of(data, "boats", stop=[]), items)
    stopped = ask(base, task_of(data, "boats"), items)
    for whole, row in zip(wholes, stopped, strict=True):
        assert row["answer"] == whole["answer"].partition("Question:")[0]
        assert row["num_answer_tokens"] <= whole["num_answer_tokens"]
        assert row["is_cut"] == (row["answer"] == whole["answer"] and whole["is_cut"])
    assert any(row["num_answer_tokens"] < 64 for row in stopped)


def test_an_answer_that_reaches_the_limit_is_marked_as_cut(models, data):
    items = read_items(task_of(data, "boats"), data / "boats.jsonl")
    rows = ask(subject(models, "base"), task_of(data, "boats"), items, max_new_tokens=2)
    assert {row["is_cut"] for row in rows} == {True}
    assert {row["num_answer_tokens"] for row in rows} == {2}


def test_samples_of_verified_questions_name_what_they_share(models, data):
    items = [
        dataclasses.replace(item, cluster="shore")
        for item in read_items(task_of(data, "boats"), data / "boats.jsonl")
        if isinstance(item, Question)
    ]
    rows = ask(subject(models, "base"), task_of(data, "boats"), items, max_new_tokens=2)
    assert {row["cluster"] for row in rows} == {"shore"}


def test_sampled_answers_differ_and_are_the_same_again_with_the_same_seed(models, data):
    task = task_of(data, "boats", num_samples=4, temperature=3.0)
    items = read_items(task, data / "boats.jsonl")
    base = subject(models, "base")
    rows = ask(base, task, items, max_new_tokens=12, seed=1)
    assert [row["answers"] for row in rows] == [
        row["answers"] for row in ask(base, task, items, max_new_tokens=12, seed=1)
    ]
    for row in rows:
        assert len(set(row["answers"])) > 1
        assert row["scores"]["last_number"] in (0, 0.25, 0.5, 0.75, 1)
    (alone,) = ask(base, task, items[1:2], max_new_tokens=12, seed=1)
    assert alone["answers"] == rows[1]["answers"]  # whatever else is asked


@pytest.mark.skipif(not can_confine(), reason="this machine cannot confine programs")
def test_pass_at_ten_comes_from_the_samples_of_each_question(models, data):
    task = task_of(data, "functions", num_samples=10, temperature=1.5, metric="pass_at_10")
    items = read_items(task, data / "functions.jsonl")
    rows = ask(subject(models, "base"), task, items, max_new_tokens=12)
    for row in rows:
        passed = row["scores"]["pass_at_1"]
        assert row["scores"]["pass_at_10"] == (1.0 if passed > 0 else 0.0)
        assert passed == pytest.approx(round(10 * passed) / 10)
    assert any(0 < row["scores"]["pass_at_1"] < 1 for row in rows)


def test_a_problem_longer_than_the_context_counts_as_wrong(models, data):
    write(data / "boats.jsonl", [{"question": "why " * 300, "answer": "#### 3"}])
    task = task_of(data, "boats")
    (row,) = ask(subject(models, "base"), task, read_items(task, data / "boats.jsonl"))
    assert row["not_fitting"]
    assert row["scores"] == {"last_number": 0.0, "marked_number": 0.0}
    assert (row["answer"], row["correct"]) == (None, False)


# ---------------------------------------------------------------- scores


def row_of(doc_id: int, followed: int, asked: int) -> dict:
    share = followed / asked
    scores = {"prompt_loose": float(share == 1.0), "instruction_loose": share}
    return {"doc_id": str(doc_id), "scores": scores, "num_parts": asked}


def test_scores_between_right_and_wrong_have_intervals_by_resampling():
    rows = [
        {"doc_id": str(n), "scores": {"pass_at_1": n % 5 / 4}, "num_parts": 1} for n in range(50)
    ]
    found = estimate(rows, "pass_at_1")
    normal = mean([n % 5 / 4 for n in range(50)])
    assert (found.value, found.stderr) == (normal.value, normal.stderr)
    assert found.low == pytest.approx(normal.low, abs=0.01)
    assert found.high == pytest.approx(normal.high, abs=0.01)
    same = compare(rows, rows, "pass_at_1")
    assert same is not None and (same.value, same.p_value, same.ties) == (0.0, 1.0, 50)


def test_no_instruction_followed_at_all_still_has_an_interval():
    rows = [row_of(n, 0, 2) for n in range(10)]
    assert estimate(rows, "instruction_loose").high == wilson_interval(0, 10)[1]


def test_instruction_level_scores_weigh_each_prompt_by_its_instructions():
    rows = [row_of(0, 3, 3), row_of(1, 0, 1)]
    assert estimate(rows, "instruction_loose").value == pytest.approx(3 / 4)
    assert estimate(rows, "prompt_loose").value == 0.5
    assert is_right(rows[0], "prompt_loose") and not is_right(rows[1], "prompt_loose")
    better = [row_of(0, 3, 3), row_of(1, 1, 1)]
    difference = compare(rows, better, "instruction_loose")
    assert difference is not None
    assert difference.value == pytest.approx(1 / 4)
    assert (difference.wins, difference.losses, difference.ties) == (1, 0, 1)
    by_prompt = compare(rows, better, "prompt_loose")
    assert by_prompt is not None and by_prompt.p_value == 1.0  # McNemar's, of one change


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("boats", {"question": "?", "answer": "many"}, "boats.jsonl, line 1: .*needed one number"),
        ("latex", {"problem": "?", "solution": "two"}, "latex.jsonl, line 1: .*boxes no answer"),
        ("functions", {"prompt": "x"}, "functions.jsonl, line 1: found neither 'entry_point'"),
        ("boats", {"question": "\ud83d", "answer": "3"}, "line 1: it holds half a surrogate pair"),
    ],
)
def test_a_row_that_the_verifier_cannot_read_is_named(data, name, row, problem):
    write(data / f"{name}.jsonl", [row])
    with pytest.raises(DataError, match=problem):
        read_items(task_of(data, name), data / f"{name}.jsonl")


def test_too_few_examples_are_an_error_and_not_fewer_examples(data):
    task = task_of(data, "boats", examples_file="shown.jsonl", num_examples=9)
    with pytest.raises(DataError, match="it holds 4 problems; the task boats shows 9"):
        read_items(task, data / "boats.jsonl", data / "boats.jsonl")
    with pytest.raises(UserError, match=r"no\.jsonl does not exist"):
        examples_file(task_of(data, "boats", examples_file="no.jsonl", num_examples=1), str(data))


def test_changed_examples_make_it_another_run(models, data, tmp_path):
    path = tmp_path / "recipe.yaml"
    content = yaml.safe_load((data / "tasks.yaml").read_text())
    content["tasks"]["boats"] |= {"examples_file": "shown.jsonl", "num_examples": 1}
    (data / "tasks.yaml").write_text(yaml.safe_dump(content))
    write(data / "shown.jsonl", [{"question": "How many?", "answer": "Count.\n#### 5"}])
    path.write_text(
        yaml.safe_dump(
            {
                "stage": "eval",
                "models": [str(models / "base")],
                "tasks": ["boats"],
                "include_path": str(data),
                "data_dir": str(data),
                "output_dir": str(tmp_path / "out"),
            }
        )
    )
    run(load_recipe(EvalRecipe, path))
    write(data / "shown.jsonl", [{"question": "How many?", "answer": "Count.\n#### 6"}])
    with pytest.raises(UserError, match="holds another run"):
        run(load_recipe(EvalRecipe, path))


def test_the_shipped_generation_tasks_read_the_public_files():
    catalogue = load_catalogue()
    assert {"gsm8k", "ifeval", "humaneval", "humaneval_10", "math"} <= catalogue.tasks.keys()
    if not (SHARED / "verifiable").is_dir():
        pytest.skip("the shared data is not here")
    sizes = {}
    for task in (*select("generation").tasks, catalogue.tasks["humaneval_10"]):
        items = read_items(task, SHARED / task.file, examples_file(task, str(SHARED)))
        sizes[task.name] = len(items)
        if task.name == "gsm8k":
            assert len(items[0].messages) == 17  # type: ignore[union-attr]
    assert sizes == {"gsm8k": 1319, "ifeval": 541, "humaneval": 164, "humaneval_10": 164}
