"""A new evaluation against an earlier one: what fails, what passes, what cannot be compared."""

import json
import shutil
from pathlib import Path

import pytest

from eval.gate import compare_with, open_baseline, passes
from eval.report import write_report
from eval.report.gather import gather
from eval.statistics import mcnemar_p_value
from olmo_base.run.errors import UserError
from open_instruct.__main__ import main


def change(folder: Path, task: str, rights: list[bool]) -> None:
    """Make the answers of every model right or wrong."""
    for path in (folder / "samples").glob(f"*/{task}.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row, is_right in zip(rows, rights, strict=True):
            row["correct"] = is_right
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def two(make_evaluation, tmp_path) -> tuple[Path, Path]:
    """The same evaluation of one model twice, with 60 of 120 answers to sort right."""
    before = make_evaluation(names=("sft",))
    change(before, "sort", [True] * 60 + [False] * 60)
    after = tmp_path / "after"
    shutil.copytree(before, after)
    write_report([before])
    return before, after


def test_the_same_answers_pass_any_margin(two, capsys):
    before, after = two
    baseline = open_baseline(str(before / "report.json"), 0.0)
    assert baseline is not None
    assert passes(baseline, after, 0.0)
    assert "sft, sort: 0.0 exact_match on 120 questions, corrected p 1" in capsys.readouterr().out


def test_a_large_loss_fails_and_a_loss_below_the_margin_passes(two, capsys):
    before, after = two
    change(after, "sort", [True] * 40 + [False] * 80)  # 20 of 120 lost, none won
    baseline = gather([before])
    assert not passes(baseline, after, 0.02)
    assert "−16.7 exact_match on 120 questions" in capsys.readouterr().out
    assert passes(baseline, after, 0.2)
    assert passes(baseline, after, None)


def test_a_loss_that_may_be_chance_passes(two):
    before, after = two
    change(after, "sort", [True] * 55 + [False] * 5 + [False] * 58 + [True] * 2)  # 5 lost, 2 won
    assert passes(gather([before]), after, 0.02)


def test_the_significance_is_corrected_for_the_number_of_tasks(two):
    before, after = two
    change(after, "sort", [True] * 53 + [False] * 67)  # 7 lost: p = 2 / 2**7
    (verdict,) = [
        item for item in compare_with(gather([before]), gather([after])) if item.task == "sort"
    ]
    assert verdict.difference.p_value == mcnemar_p_value(0, 7) == 2 / 2**7
    assert verdict.p_corrected == pytest.approx(5 * 2 / 2**7)  # five tasks
    assert not verdict.is_worse(0.02)


def test_more_bits_per_byte_are_worse(two):
    before, after = two
    path = after / "samples" / "sft" / "text.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(row | {"logprob": row["logprob"] * 1.1}) + "\n" for row in rows)
    )
    assert not passes(gather([before]), after, 0.02)
    assert passes(gather([after]), before, 0.02)


def test_a_gain_is_never_a_failure(two):
    before, after = two
    change(after, "sort", [True] * 120)
    assert passes(gather([before]), after, 0.0)


# ---------------------------------------------------------------- what cannot be compared


def test_a_baseline_that_is_none_is_refused_at_once(two, tmp_path):
    with pytest.raises(UserError, match=r"report\.json does not exist"):
        open_baseline(str(tmp_path / "report.json"), 0.02)
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(two[0] / "report.json", lone)
    with pytest.raises(UserError, match="holds no evaluation"):
        open_baseline(str(lone / "report.json"), 0.02)
    with pytest.raises(UserError, match="compares with --baseline"):
        open_baseline(None, 0.02)
    assert open_baseline(None, None) is None


def test_other_questions_other_tasks_and_other_names_are_refused(two, make_evaluation):
    before, after = two
    baseline = gather([before])
    path = after / "samples" / "sft" / "sort.jsonl"
    path.write_text(path.read_text().replace("green", "blue", 1))
    with pytest.raises(UserError, match="Question 0 of sort is another than in the baseline"):
        passes(baseline, after, 0.02)
    content = json.loads((after / "evaluation.json").read_text())
    for task in content["tasks"]:
        task["max_new_tokens"] = 7
    (after / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="defined in another way"):
        passes(baseline, after, 0.02)
    for path in (after / "samples" / "sft").iterdir():
        if path.stem != "sort":
            path.unlink()
    (before / "samples" / "sft" / "sort.jsonl").unlink()
    with pytest.raises(UserError, match="Compare evaluations of the same tasks"):
        passes(gather([before]), after, 0.02)


def test_with_several_models_the_name_decides(make_evaluation, tmp_path):
    before = make_evaluation(names=("base", "sft"))
    after = tmp_path / "after"
    shutil.copytree(before, after)
    pairs = {(v.model, v.against) for v in compare_with(gather([before]), gather([after]))}
    assert pairs == {("base", "base"), ("sft", "sft")}
    content = json.loads((after / "evaluation.json").read_text())
    content["models"] = [content["models"][1] | {"name": "new"}]
    (after / "evaluation.json").write_text(json.dumps(content))
    (after / "samples" / "sft").rename(after / "samples" / "new")
    with pytest.raises(UserError, match="none of them called new"):
        compare_with(gather([before]), gather([after]))


def test_the_command_refuses_a_wrong_baseline_with_code_two_before_any_work(tmp_path, capsys):
    given = ["eval", "no-model", "--suite", "quickstart", "--output-dir", str(tmp_path / "out")]
    assert main([*given, "--baseline", str(tmp_path / "no.json")]) == 2
    assert "no.json does not exist" in capsys.readouterr().err
    assert main([*given, "--fail-if-worse", "0.02"]) == 2
    assert "give its report.json" in capsys.readouterr().err
