"""The published suites: their tasks, their normalisations, and the better of two forms."""

import gzip
import json
import math
from pathlib import Path

import pytest

from eval.harness import input_files
from eval.items import Choice, Question
from eval.questions import data_file, read_items
from eval.recipe import EvalRecipe
from eval.report.gather import gather
from eval.scores import compare, estimate, is_right, measured, picked_option
from eval.tasks import Task, load_catalogue, select
from olmo_base.run.artefact import RunConfig
from olmo_base.run.errors import DataError, UserError

DATA = Path(__file__).parents[3] / "shared" / "data"


def test_core_tasks_are_normalised_as_in_the_olmo_paper():
    metrics = {task.name: task.metric for task in select("olmo_core8").tasks}
    by_metric = {
        "acc_uncond": {"arc_challenge", "arc_easy", "openbookqa"},
        "acc_per_token": {"hellaswag", "piqa", "winogrande"},
        "acc": {"boolq", "sciq"},
    }
    assert metrics == {
        f"core_{name}": metric for metric, names in by_metric.items() for name in names
    }


def test_olmes_counts_the_better_of_two_forms_of_each_task():
    selection = select("olmes")
    (members,) = selection.groups.values()
    assert set(members) == set(selection.best_of)
    for name in members:
        assert selection.best_of[name] == (f"olmes_{name}_rc", f"olmes_{name}_mc")
    metrics = {task.name: task.metric for task in selection.tasks}
    assert len(members) == 10
    assert {metrics[f"olmes_{name}_mc"] for name in {*members} - {"mmlu"}} == {"acc"}
    assert (metrics["olmes_mmlu_rc"], metrics["olmes_mmlu_mc"]) == (
        "acc_per_char_macro",
        "acc_macro",
    )
    names = ("arc_challenge", "csqa", "openbookqa")
    assert {name for name in members if metrics[f"olmes_{name}_rc"] == "acc_uncond"} == set(names)


def test_a_suite_narrowed_to_one_form_has_no_best_of_it():
    selection = select("olmes", ["arc_easy", "olmes_piqa_rc"])
    assert selection.groups == {"OLMES": ("arc_easy", "olmes_piqa_rc")}
    assert list(selection.best_of) == ["arc_easy"]
    assert len(selection.tasks) == 3


def test_paloma_averages_bits_per_byte_of_eleven_sources():
    (members,) = select("paloma").groups.values()
    tasks = {task.name: task for task in select("paloma").tasks}
    assert len(members) == 11
    assert {tasks[name].main_metric for name in members} == {"bits_per_byte"}


@pytest.mark.parametrize(
    ("metric", "picked"),
    [
        ("acc", 0),  # -4 is the largest
        ("acc_per_token", 3),  # -4, -5/2, -6/3, -9/6: the last is -1.5
        ("acc_per_char", 1),  # -4/2, -5/8, -6/6, -9/12 : -0.625 is the largest
        ("acc_per_byte", 2),  # -4/2, -5/8, -6/11, -9/12: -0.55
        ("acc_uncond", 2),  # -4+4, -5+5.5, -6+8, -9+9
    ],
)
def test_normalisations_are_hand_worked(metric, picked):
    texts = (" a", " abcdefg", " ééééé", " abcdefghijk")
    rows = zip(texts, (-4, -5, -6, -9), (-4, -5.5, -8, -9), (1, 2, 3, 6), strict=True)
    options = [
        {"text": text, "logprob": given, "logprob_alone": alone, "num_tokens": number}
        for text, given, alone, number in rows
    ]
    assert len(texts[2]) == 6 and len(texts[2].encode()) == 11
    assert picked_option({"options": options}, metric) == picked


# ---------------------------------------------------------------- the better of two forms


def write_rows(folder: Path, model: str, task: str, right: str, gold: int = 0) -> None:
    """One row for each letter: "r" is answered right, "w" wrong."""
    rows = []
    for number, letter in enumerate(right):
        logprobs = (-1.0, -2.0) if (letter == "r") == (gold == 0) else (-2.0, -1.0)
        options = [
            {"text": text, "logprob": value, "logprob_alone": None, "num_tokens": 1}
            for text, value in zip((" yes", " no"), logprobs, strict=True)
        ]
        rows.append(
            {
                "doc_id": str(number),
                "category": None,
                "question": "Well?",
                "prompt": "Well?",
                "target": " yes",
                "gold": gold,
                "options": options,
                "correct": letter == "r",
            }
        )
    path = folder / "samples" / model / f"{task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.with_suffix(".json").write_text(json.dumps({"seconds": 1.0}))


def evaluation(folder: Path) -> Path:
    tasks = [
        {"name": name, "kind": "multiple_choice", "file": f"{name}.jsonl"} for name in ("rc", "mc")
    ]
    content = {
        "suite": "s",
        "tasks": tasks,
        "groups": {"all": ["best"]},
        "best_of": {"best": ["rc", "mc"]},
        "models": [{"name": name, "path": str(folder / name)} for name in ("one", "two")],
    }
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def test_the_better_form_counts_for_each_model_and_is_compared_question_by_question(tmp_path):
    folder = evaluation(tmp_path / "e")
    for model, task, right in (
        ("one", "rc", "rrww"),
        ("one", "mc", "rwww"),
        ("two", "rc", "rwww"),
        ("two", "mc", "rrrw"),
    ):
        write_rows(folder, model, task, right)
    report = gather([folder]).as_dict()
    one, two = report["models"]
    assert (one["forms"], two["forms"]) == ({"best": "rc"}, {"best": "mc"})
    assert one["tasks"]["best"]["acc_best"]["value"] == one["groups"]["all"]["value"] == 0.5
    assert two["tasks"]["best"]["acc_best"]["value"] == 0.75
    (comparison,) = [item for item in report["comparisons"] if item.get("task") == "best"]
    assert (comparison["wins"], comparison["losses"], comparison["ties"]) == (1, 0, 3)
    assert report["tasks"]["best"]["chance"] == 0.5


def test_forms_that_ask_other_questions_are_refused(tmp_path):
    folder = evaluation(tmp_path / "e")
    for model in ("one", "two"):
        write_rows(folder, model, "rc", "rr")
        write_rows(folder, model, "mc", "rr", gold=1)
    with pytest.raises(DataError, match="rc and mc do not ask the same questions"):
        gather([folder])


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ("{groups: {g: [b]}, best_of: {b: [core_boolq]}}", "b needs at least two tasks"),
        (
            "{groups: {g: [core_boolq]}, best_of: {b: [core_boolq, core_sciq]}}",
            "b is in no group",
        ),
        ("{groups: {g: [b]}, best_of: {b: [core_boolq, nothing]}}", "no task 'nothing'"),
        ("{groups: {g: [b]}, best_of: {b: [core_boolq, paloma_ptb]}}", "told by a perplexity"),
    ],
)
def test_a_best_that_cannot_be_told_is_refused(tmp_path, suite, message):
    (tmp_path / "a.yaml").write_text(f"suites: {{s: {suite}}}")
    with pytest.raises(UserError, match=message):
        select("s", include_path=str(tmp_path))


def test_a_suite_without_some_tasks_averages_the_others():
    selection = select("olmes").without({"olmes_mmlu_rc": "why", "olmes_csqa_rc": "not"})
    (members,) = selection.groups.values()
    assert len(members) == 10 and "mmlu" not in members and "olmes_mmlu_mc" in members
    assert set(selection.best_of) == {*members} - {"olmes_mmlu_mc", "olmes_csqa_mc"}
    assert selection.skipped == {"olmes_mmlu_rc": "why", "olmes_csqa_rc": "not"}


# ---------------------------------------------------------------- MMLU

SUBJECTS = ("high_school_biology", "law")


def write_mmlu(folder: Path) -> None:
    """Two subjects with five examples each; three questions of the first, one of the second."""
    (folder / "mmlu").mkdir()
    for name, numbers in (("dev", (5, 5)), ("test", (3, 1))):
        rows = [
            {
                "question": f"{name} {subject} {number}?",
                "subject": subject,
                "choices": ["one", "two", "three", "four"],
                "answer": (number + 1) % 4,
            }
            for subject, count in zip(SUBJECTS, numbers, strict=True)
            for number in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "mmlu" / f"{name}.jsonl").write_text(text)


def test_mmlu_shows_five_examples_of_the_questions_subject_in_both_forms(tmp_path):
    write_mmlu(tmp_path)
    tasks = load_catalogue().tasks
    for name, answer, options in (
        ("olmes_mmlu_rc", " two", (" one", " two", " three", " four")),
        ("olmes_mmlu_mc", " B", (" A", " B", " C", " D")),
    ):
        task = tasks[name]
        item = read_items(task, tmp_path / task.file, tmp_path / "mmlu" / "dev.jsonl")[0]
        assert isinstance(item, Choice)
        first, *examples, last = item.contexts[0].split("\n\n")
        assert first == (
            "The following are multiple choice questions (with answers) about high school biology."
        )
        listed = "" if options[0] == " one" else "\n A. one\n B. two\n C. three\n D. four"
        assert examples[0] == f"Question: dev high_school_biology 0?{listed}\nAnswer:{answer}"
        assert len(examples) == 5 and all("biology" in example for example in examples)
        assert last == f"Question: test high_school_biology 0?{listed}\nAnswer:"
        assert (item.options, item.gold, item.category) == (options, 1, "high_school_biology")


def test_too_few_examples_of_a_subject_are_an_error(tmp_path):
    write_mmlu(tmp_path)
    dev = tmp_path / "mmlu" / "dev.jsonl"
    dev.write_text("\n".join(dev.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match=r"holds 4 examples of the category law.*shows 5"):
        read_items(load_catalogue().tasks["olmes_mmlu_mc"], tmp_path / "mmlu" / "test.jsonl", dev)


def test_every_subject_counts_the_same():
    """Three right of four biology questions, none of two law questions: 37.5 %, and not 50 %."""
    options = [
        {"text": text, "logprob": value, "logprob_alone": None, "num_tokens": 1}
        for text, value in ((" A", -1.0), (" B", -2.0))
    ]

    def row(number: int, subject: str, gold: int) -> dict:
        return {"doc_id": str(number), "category": subject, "options": options, "gold": gold}

    golds = [0, 0, 0, 1, 1, 1]
    rows = [row(n, SUBJECTS[n > 3], gold) for n, gold in enumerate(golds)]
    whole, macro = estimate(rows, "acc"), estimate(rows, "acc_macro")
    assert (whole.value, macro.value, macro.n) == (0.5, 0.375, 6)
    # Standard errors: sqrt(3/4 * 1/4 / 3) = 1/4 for biology, 0 for law; half of it for the mean.
    assert macro.stderr == pytest.approx(0.125)
    better = [row(n, SUBJECTS[n > 3], 0) for n in range(6)]
    difference = compare(rows, better, "acc_macro")
    assert difference is not None
    assert difference.value == pytest.approx((0.25 + 1.0) / 2)
    assert (difference.wins, difference.losses, difference.ties) == (3, 0, 3)
    assert "acc_macro" not in measured(
        "multiple_choice", [row | {"category": None} for row in rows]
    )


# ---------------------------------------------------------------- other sets, as the hub has them


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_problem_is_shown_the_examples_of_its_category(tmp_path):
    def row(task: str, number: int) -> dict:
        return {"task": task, "input": f"{task} {number}", "target": f"({number})"}

    write_lines(
        tmp_path / "e.jsonl", [row(task, n) for n in range(5) for task in ("dates", "hats")]
    )
    write_lines(tmp_path / "t.jsonl", [row("hats", 9), row("dates", 9)])
    task = load_catalogue().tasks["bbh"]
    hats, dates = read_items(task, tmp_path / "t.jsonl", tmp_path / "e.jsonl")
    assert isinstance(hats, Question) and isinstance(dates, Question)
    contents = [turn["content"] for turn in hats.messages]
    assert contents == ["hats 0", "(0)", "hats 1", "(1)", "hats 2", "(2)", "hats 9"]
    assert dates.messages[0]["content"] == "dates 0"
    write_lines(tmp_path / "t.jsonl", [row("cats", 9)])
    with pytest.raises(DataError, match=r"problem 0 is of the category cats; .* of dates, hats"):
        read_items(task, tmp_path / "t.jsonl", tmp_path / "e.jsonl")


def test_truthfulqa_counts_the_probability_of_all_true_answers(tmp_path):
    targets = {"choices": ["yes", "no", "maybe", "no"], "labels": [0, 1, 1, 1]}
    write_lines(tmp_path / "t.jsonl", [{"question": "Is it?", "mc2_targets": targets}])
    task = load_catalogue().tasks["truthfulqa_mc2"]
    (item,) = read_items(task, tmp_path / "t.jsonl")
    assert isinstance(item, Choice)
    assert (item.options, item.golds) == ((" yes", " no", " maybe"), (1, 2))

    def answered(*shares: float) -> dict:
        options = [
            {"text": text, "logprob": math.log(share), "num_tokens": 1}
            for text, share in zip(item.options, shares, strict=True)
        ]
        return {"doc_id": "0", "category": None, "gold": 1, "golds": [1, 2], "options": options}

    rows = [answered(0.1, 0.2, 0.1), answered(0.5, 0.3, 0.2)]  # 3/4 and 1/2
    assert estimate(rows, "mc2").value == pytest.approx(0.625)
    assert [is_right(row, "mc2") for row in rows] == [True, False]
    assert "mc2" in measured("multiple_choice", rows)
    difference = compare(rows[:1], rows[1:], "mc2")
    assert difference is not None and difference.value == pytest.approx(-0.25)
    write_lines(
        tmp_path / "t.jsonl",
        [{"question": "?", "mc2_targets": {"choices": ["a", "b"], "labels": [1, 1]}}],
    )
    with pytest.raises(DataError, match="'labels' must be 0 or 1"):
        read_items(task, tmp_path / "t.jsonl")


def test_questions_about_one_passage_are_one_cluster(tmp_path):
    rows = [
        {
            "doc_id": number,
            "idx": index,
            "label": 0,
            "request": {
                "context": f"Other -- x.\nQuestion: e?\nAnswer: no\n\n{passage}.\n"
                f"Question: q{number}?\nAnswer:",
                "continuation": option,
            },
        }
        for number, passage in enumerate(["Boats -- wood", "Boats -- wood", "Snow -- white"])
        for index, option in enumerate((" yes", " no"))
    ]
    write_lines(tmp_path / "b.jsonl", rows)
    items = read_items(load_catalogue().tasks["core_boolq"], tmp_path / "b.jsonl")
    first, second, third = (item.cluster for item in items if isinstance(item, Choice))
    assert first == second != third
    other = read_items(Task("x", "requests", "b.jsonl"), tmp_path / "b.jsonl")
    assert [item.cluster for item in other if isinstance(item, Choice)] == [None] * 3


def test_blocks_of_a_document_vary_together():
    """30 documents of two equal blocks tell as much as 30 blocks, and not as 60."""

    def row(doc_id: str, bits: float) -> dict:
        nats = -bits * math.log(2) * 100
        return {"doc_id": doc_id, "logprob": nats, "num_bytes": 100, "num_tokens": 9}

    bits = [1.0 + (number % 7) / 10 for number in range(30)]
    single = [row(f"{n}:0", value) for n, value in enumerate(bits)]
    double = [row(f"{n}:{b}", value) for n, value in enumerate(bits) for b in (0, 1)]
    one, two = estimate(single, "bits_per_byte"), estimate(double, "bits_per_byte")
    assert two.value == pytest.approx(one.value) and two.n == 60
    assert two.stderr == pytest.approx(one.stderr)
    few = estimate([r for r in double if int(r["doc_id"].split(":")[0]) < 5], "bits_per_byte")
    assert few.stderr == pytest.approx(ratio_stderr([1.0, 1.1, 1.2, 1.3, 1.4] * 2))


def ratio_stderr(values: list[float]) -> float:
    middle = sum(values) / len(values)
    spread = sum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(spread / len(values))


@pytest.mark.parametrize("suite", sorted(load_catalogue().suites))
def test_every_suite_names_what_it_lacks(suite, tmp_path):
    settings = {"stage": "eval", "models": ("nowhere",), "suite": suite}
    recipe = EvalRecipe(**settings, run=RunConfig(output_dir="x"), data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"does not exist; the task .* asks its questions from it"):
        input_files(recipe)


def test_a_missing_file_is_fetched_and_then_read_from_disk(tmp_path, capsys):
    pytest.importorskip("datasets")
    source = tmp_path / "set"
    rows = [{"question": "q", "choices": ["a", "b"], "answer": 1}]
    write_lines(source / "test.jsonl", rows)
    task = Task("t", "multiple_choice", "mine/t.jsonl.gz", hub=f"{source} - test")
    path = data_file(task, str(tmp_path))
    assert "Fetching" in capsys.readouterr().err
    with gzip.open(path, "rt") as file:
        assert [json.loads(line) for line in file] == rows
    (source / "test.jsonl").unlink()
    assert data_file(task, str(tmp_path)) == path
    lost = Task("t", "multiple_choice", "x.jsonl", hub="cais/mmlu all test")
    with pytest.raises(UserError, match="the split test of cais/mmlu on the hub, and HF_HUB_OFF"):
        data_file(lost, str(tmp_path))
    with pytest.raises(UserError, match="could not be read"):
        data_file(Task("t", "perplexity", "y.jsonl", hub=f"{tmp_path} - no"), str(tmp_path))


# ---------------------------------------------------------------- request files


def test_a_file_without_the_options_by_themselves_cannot_be_judged_against_them(tmp_path):
    row = {"doc_id": 0, "label": 0, "request": {"context": "Answer:", "continuation": " yes"}}
    rows = [{**row, "idx": 0}, {**row, "idx": 1}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    task = load_catalogue().tasks["core_arc_easy"]
    with pytest.raises(DataError, match="question 0 has no second copy without its text"):
        read_items(task, tmp_path / "r.jsonl")


@pytest.mark.parametrize("suite", ["olmo_core8", "olmes"])
def test_the_official_request_files_are_read_as_they_are(suite):
    if not (DATA / "olmes_requests").is_dir():
        pytest.skip("no official request files on this machine")
    read = 0
    for task in select(suite).tasks:
        path = DATA / task.file
        if not path.is_file():
            continue
        items = read_items(task, path)
        with gzip.open(path, "rt") as file:
            first = json.loads(next(file))
        item = items[0]
        assert isinstance(item, Choice)
        assert item.contexts[0] == first["request"]["context"]
        assert item.options[0] == first["request"]["continuation"]
        assert item.gold == first["label"]
        read += 1
    assert read >= {"olmo_core8": 6, "olmes": 18}[suite]
