"""Task files: those that are shipped load, and a mistake in one is named with its place."""

import pytest

from eval.tasks import LOWER_IS_BETTER, load_catalogue, select
from olmo_base.run.errors import UserError


def test_every_shipped_suite_names_tasks_that_exist():
    catalogue = load_catalogue()
    assert {"quickstart", "real_small"} <= catalogue.suites.keys()
    for suite_name, suite in catalogue.suites.items():
        selection = select(suite_name)
        members = {
            member
            for group in suite.groups.values()
            for name in group
            for member in suite.best_of.get(name, (name,))
        }
        assert {task.name for task in selection.tasks} == members
        assert selection.groups == suite.groups
    for task in catalogue.tasks.values():
        assert task.main_metric in task.metrics


def test_quickstart_averages_accuracy_without_instruction_following():
    groups = select("quickstart").groups
    assert groups["accuracy"] == ("recall", "reverse", "sort", "copy", "compare", "arithmetic")
    assert groups["instruction following"] == ("format",)


def test_format_answers_are_judged_as_they_are_written():
    tasks = {task.name: task for task in select("quickstart").tasks}
    assert tasks["format"].answer_rule == "as_written"
    assert tasks["recall"].answer_rule == "as_words"


def test_a_suite_narrowed_to_some_tasks_keeps_their_groups():
    selection = select("quickstart", ["sort", "recall"])
    assert [task.name for task in selection.tasks] == ["recall", "sort"]
    assert selection.groups == {"accuracy": ("recall", "sort")}


@pytest.mark.parametrize(
    ("suite", "tasks", "message"),
    [
        ("quickstrat", (), "no suite 'quickstrat'. Did you mean 'quickstart'?"),
        (None, ("recal",), "no task 'recal'. Did you mean 'recall'?"),
        ("quickstart", ("arc_easy",), "no task of suite quickstart 'arc_easy'"),
        (
            None,
            (),
            "Say what to ask: a suite .base_models, generation, olmes, .*quickstart, real_small.",
        ),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(suite, tasks, message):
    with pytest.raises(UserError, match=message):
        select(suite, tasks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: {a: {kind: exact, file: f}}", "a.yaml, task a.*one of exact_match.*exact_match"),
        ("tasks: {a: {kind: perplexity}}", "task a.*file: this key is missing"),
        ("tasks: {a: {kind: perplexity, file: f, answr_rule: x}}", "Did you mean 'answer_rule'"),
        ("tasks: {a: {kind: perplexity, file: f, metric: acc}}", "'acc' is not measured.*bits_per"),
        ("tasks: {a: {kind: exact_match, file: f, plain_prompt: Q}}", "must contain {prompt}"),
        ("tasks: {a: 3}", "task a: must be a map"),
        ("tasks: {a: {kind: verified, file: f}}", "verifier: None must be one of gsm8k, math"),
        (
            "tasks: {a: {kind: verified, file: f, verifier: gsm8k, metric: acc}}",
            "'acc' is not measured.*last_number, marked_number",
        ),
        (
            "tasks: {a: {kind: verified, file: f, verifier: code, metric: pass_at_10}}",
            "'pass_at_10' is not measured.*pass_at_1",
        ),
        (
            "tasks: {a: {kind: verified, file: f, verifier: gsm8k, num_samples: 4}}",
            "temperature: 0 makes all samples of a question the same",
        ),
        (
            "tasks: {a: {kind: verified, file: f, verifier: gsm8k, num_examples: 4}}",
            "num_examples: goes together with examples_file",
        ),
        (
            "tasks: {a: {kind: verified, file: f, verifier: math, examples_file: f,"
            " num_examples: 4}}",
            "examples_file: is the file of the questions",
        ),
        (
            "tasks: {a: {kind: verified, file: f, verifier: gsm8k, answer_rule: as_written}}",
            "answer_rule: the verifier decides",
        ),
        ("tasks: {a: {kind: exact_match, file: f, stop: [x]}}", "stop: tasks of kind exact_match"),
        (
            "tasks: {a: {kind: multiple_choice, file: f, system_prompt: x}}",
            "system_prompt: is read with apply_chat_template only",
        ),
        (
            "tasks: {a: {kind: multiple_choice, file: f, apply_chat_template: true,"
            " fewshot_as_multiturn: true}}",
            "fewshot_as_multiturn: needs apply_chat_template and num_examples",
        ),
        ("tasks: {a: {kind: requests, file: f, apply_chat_template: true}}", "do not read it"),
        ("tasks:\n  a: {kind: [\n", r"a.yaml, line \d: broken YAML"),
        ("", "a.yaml is empty"),
        ("suites: {s: {groups: {}}}", "suite s.*at least one group"),
        ("file: hellaswag\nkind: requests", "holds file, kind"),
        ("tasks: {a: {kind: lm_eval, file: f}}", "a task of lm-eval has a file of its own"),
    ],
)
def test_a_broken_task_file_is_named(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_catalogue(str(tmp_path))


def test_a_task_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.yaml").write_bytes("tasks: {größe: {}}".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.yaml: byte \d+ is not UTF-8"):
        load_catalogue(str(tmp_path))


def test_a_folder_of_ones_own_adds_and_replaces_tasks(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "tasks:\n"
        "  capitals: {kind: exact_match, file: capitals.jsonl, answer_rule: as_written}\n"
        "  recall: {kind: exact_match, file: other.jsonl}\n"
        "suites:\n"
        "  mine: {groups: {all: [capitals, recall]}}\n"
    )
    selection = select("mine", include_path=str(tmp_path))
    assert [task.file for task in selection.tasks] == ["capitals.jsonl", "other.jsonl"]
    assert selection.sources == (tmp_path / "mine.yaml",)
    with pytest.raises(UserError, match="is not a folder"):
        select("mine", include_path=str(tmp_path / "no"))


def test_a_group_cannot_average_accuracy_with_perplexity(tmp_path):
    (tmp_path / "mine.yaml").write_text("suites: {mine: {groups: {all: [arc_easy, wikitext2]}}}")
    with pytest.raises(UserError, match="averages accuracies with perplexities"):
        select("mine", include_path=str(tmp_path))
    assert "bits_per_byte" in LOWER_IS_BETTER
