"""What a report says before its numbers: short, and whole."""

import json

from eval.report.gather import gather
from eval.report.markdown import markdown
from eval.report.page import html_page
from eval.report.problems import problems

CUT = {"recall": 3, "sort": 2, "format": 1, "choice": 4}


def note(folder, name: str, key: str, numbers: dict[str, int]) -> None:
    """As if an evaluation had counted these."""
    for task, number in numbers.items():
        path = folder / "samples" / name / f"{task}.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {key: number}))


def test_models_with_the_same_problem_share_a_sentence(make_evaluation):
    folder = make_evaluation(n=50)
    for name in ("base", "sft"):
        note(folder, name, "context_cut", {"sort": 2})
    note(folder, "dpo", "context_cut", {"sort": 3})
    sentences = [problem.sentence for problem in problems(gather([folder]))]
    reason = "lost their beginning, because they are too long for the model."
    assert f"base and sft: 2 of 50 contexts of sort {reason}" in sentences
    assert f"dpo: 3 of 50 contexts of sort {reason}" in sentences


def test_what_happened_in_many_tasks_is_counted_and_each_is_listed(make_evaluation):
    folder = make_evaluation(n=50)
    for name in ("base", "sft", "dpo"):
        note(folder, name, "context_cut", CUT)
    report = gather([folder])
    found = [problem for problem in problems(report) if problem.details]
    assert [problem.sentence for problem in found] == [
        "base, sft and dpo: 10 of 200 contexts of 4 tasks lost their beginning, because they are "
        "too long for the model."
    ]
    assert set(found[0].details) == {
        f"{number} of 50 contexts of {task}" for task, number in CUT.items()
    }
    text, html = markdown(report), html_page(report)
    for task, number in CUT.items():
        assert f"\n  - {number} of 50 contexts of {task}\n" in text
        assert f"<li>{number} of 50 contexts of {task}</li>" in html
