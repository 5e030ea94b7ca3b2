"""The report from what is on disk: its numbers, its pages, and hostile text in them."""

import base64
import gzip
import hashlib
import html.parser
import json
import re

import pytest
from rich.console import Console

from eval.harness import without_texts
from eval.report import write_report
from eval.report.answers import pack_of, sample_cards
from eval.report.gather import gather
from eval.report.markdown import markdown, print_summary
from eval.report.words import clipped, difference_text, duration_text, visible
from eval.statistics import wilson_interval
from olmo_base.run.errors import DataError, UserError


class Page(html.parser.HTMLParser):
    """What a browser would find: elements, their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script" and self.cdata_elem == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        else:
            self.text += data


def test_report_json_has_the_agreed_shape(make_evaluation):
    folder = make_evaluation()
    write_report([folder])
    report = json.loads((folder / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["base", "sft", "dpo"]
    for model in report["models"]:
        assert set(model["tasks"]) == {"recall", "sort", "format", "choice", "text"}
        for metrics in model["tasks"].values():
            for score in metrics.values():
                assert {"value", "stderr", "low", "high", "n"} == score.keys()
                assert score["low"] <= score["value"] <= score["high"]
    assert report["seconds"] == pytest.approx(3 * 5 * 4.2)
    pairs = {(item["model"], item["against"]) for item in report["comparisons"]}
    assert pairs == {("sft", "base"), ("dpo", "base"), ("dpo", "sft")}
    assert report["models"][0]["num_parameters"] == 800


def test_scores_are_those_of_the_samples(make_evaluation):
    folder = make_evaluation(n=50)
    rows = [
        json.loads(line)
        for line in (folder / "samples" / "sft" / "sort.jsonl").read_text().splitlines()
    ]
    num_correct = sum(row["correct"] for row in rows)
    score = gather([folder]).as_dict()["models"][1]["tasks"]["sort"]["exact_match"]
    low, high = wilson_interval(num_correct, 50)
    assert (score["value"], score["low"], score["high"]) == (num_correct / 50, low, high)


def test_a_group_is_the_mean_of_its_tasks(make_evaluation):
    report = gather([make_evaluation()])
    model = report.models[1]
    values = [model.tasks[name].metrics["exact_match"].value for name in ("recall", "sort")]
    assert model.groups["accuracy"].value == pytest.approx(sum(values) / 2)


def test_best_is_marked_only_where_a_model_is_clearly_above_all_others(make_evaluation):
    report = gather([make_evaluation()])
    assert report.best["group instruction following"] == "dpo"  # 78 % against 50 % and 1 %
    assert "group accuracy" not in report.best  # sft and dpo differ by chance
    assert report.best["group text prediction"] == "dpo"  # fewest bits


def test_p_values_are_corrected_for_the_number_of_comparisons(make_evaluation):
    folder = make_evaluation()
    page = Page(write_report([folder]).read_text())
    comparisons = json.loads((folder / "report.json").read_text())["comparisons"]
    tasks = [item for item in comparisons if "task" in item]
    assert len(tasks) == 3 * 5
    smallest = min(tasks, key=lambda item: item["p_value"])
    assert smallest["p_corrected"] == pytest.approx(min(1.0, 15 * smallest["p_value"]))
    for item in comparisons:
        assert item["p_value"] <= item["p_corrected"] <= 1.0
        assert item["detectable"] > 0
    titles = [attributes.get("title") or "" for _, attributes in page.elements]
    assert any("when corrected for all comparisons" in title for title in titles)
    (head,) = [
        line for line in (folder / "report.md").read_text().splitlines() if "corrected p |" in line
    ]
    assert head.count("|") == 12


def test_models_that_answer_nearly_alike_are_as_good_as_equal(make_evaluation):
    folder = make_evaluation(n=1500, names=("sft", "dpo"))
    rows = (folder / "samples" / "sft" / "format.jsonl").read_text()
    (folder / "samples" / "dpo" / "format.jsonl").write_text(rows)
    page = Page(write_report([folder]).read_text())
    assert "dpo and sft are as good as equal." in page.text
    near = {
        item.get("task"): item["is_near_tie"]
        for item in json.loads((folder / "report.json").read_text())["comparisons"]
    }
    assert near["format"] and not near["choice"]


def test_a_score_that_guessing_reaches_is_said_to_be_one(make_evaluation):
    folder = make_evaluation()
    page = Page(write_report([folder]).read_text())
    values = {
        model["name"]: model["guessing_p_value"]["choice"]
        for model in json.loads((folder / "report.json").read_text())["models"]
    }
    for name, value in values.items():
        assert (f"{name}: its score on choice may be guessing" in page.text) == (value > 0.05)
    assert values["base"] > 0.05 > values["dpo"]


def test_one_model_alone_is_reported_without_comparisons(make_evaluation):
    folder = make_evaluation(names=("base",))
    page = write_report([folder]).read_text()
    assert "base on quickstart" in page
    assert json.loads((folder / "report.json").read_text())["comparisons"] == []


def test_training_runs_are_found_through_the_models_they_led_to(make_evaluation):
    report = gather([make_evaluation(names=("dpo",))])
    assert [stage.name for stage in report.stages] == ["base", "sft", "dpo"]
    assert report.stages[0].curve("eval_loss")[0][0] == 200
    assert report.stages[2].curve("eval_accuracy")[-1][1] == pytest.approx(0.9)


def test_evaluations_stand_side_by_side_with_names_of_their_own(make_evaluation, tmp_path):
    folder = make_evaluation(names=("sft",))
    other = folder.rename(folder.parent / "eval2")
    (folder.parent / "base").rename(tmp_path / "away")
    again = json.loads((other / "evaluation.json").read_text())
    assert [model.name for model in gather([other, other]).models] == ["sft", "eval2/sft"]
    again["tasks"][0]["answer_rule"] = "as_written"
    third = folder.parent / "eval3"
    third.mkdir()
    (third / "evaluation.json").write_text(json.dumps(again))
    with pytest.raises(UserError, match="recall is defined in two ways"):
        gather([other, third])


def test_a_model_that_was_moved_away_is_said_to_be_missing(make_evaluation):
    folder = make_evaluation(names=("base",))
    (folder.parent / "base").rename(folder.parent / "moved")
    page = Page(write_report([folder]).read_text())
    assert "is not a folder here, so its size and training are not shown" in page.text


def test_training_runs_alone_make_a_report_of_their_curves(make_evaluation):
    runs = make_evaluation().parent
    path = write_report([runs / "sft"])
    assert path == runs / "sft" / "report.html"
    page = Page(path.read_text())
    assert "Training of base and sft" in page.text
    assert sum(tag == "polyline" for tag, _ in page.elements) == 4


def test_an_unfinished_evaluation_says_what_is_missing(make_evaluation):
    folder = make_evaluation()
    (folder / "samples" / "dpo" / "sort.jsonl").unlink()
    page = write_report([folder]).read_text()
    assert "dpo: not yet asked sort." in page


# ---------------------------------------------------------------- the pages


def test_the_page_needs_nothing_but_itself(make_evaluation):
    text = write_report([make_evaluation()]).read_text()
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "iframe", "img", "object", "embed", "form", "base"}
    for tag, attributes in page.elements:
        assert not {"src", "onload", "onclick", "onerror"} & attributes.keys(), tag
        assert (attributes.get("href") or "#").startswith("#")
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|https?://", text)
    assert len(text) < 300_000


def own_script_only(page: Page, text: str) -> bool:
    """Whether the page's policy allows one script, which is the last, and all others are data."""
    *packs, (own, code) = page.scripts
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return (
        f"script-src 'sha256-{digest}'" in text
        and own == {}
        and all(attributes["type"] == "text/plain" for attributes, _ in packs)
        and all(re.fullmatch(r"[A-Za-z0-9+/=]+", content) for _, content in packs)
    )


def test_the_page_runs_one_script_known_by_its_hash(make_evaluation):
    text = write_report([make_evaluation()]).read_text()
    assert own_script_only(Page(text), text)


def test_every_answer_is_packed_into_the_page(make_evaluation):
    folder = make_evaluation(n=30)
    page = Page(write_report([folder]).read_text())
    packs = {a["data-task"]: content for a, content in page.scripts if "data-task" in a}
    assert list(packs) == ["recall", "sort", "format", "choice", "text"]
    content = json.loads(gzip.decompress(base64.b64decode(packs["choice"])))
    assert [name for name, _ in content["models"]] == ["base", "sft", "dpo"]
    assert len(content["questions"]) == 30
    rows = [
        json.loads(line)
        for line in (folder / "samples" / "sft" / "choice.jsonl").read_text().splitlines()
    ]
    for question, row in zip(content["questions"], rows, strict=True):
        doc_id, _, words, target, overlaps, ((head, rest),), answers = question
        assert (doc_id, words, target) == (row["doc_id"], row["question"], row["target"].strip())
        assert overlaps is None
        assert content["heads"][head] + rest == row["prompt"]
        _, verdict, _, _, options, more = answers[1]
        assert verdict == row["correct"] and more == []
        assert [option[0] for option in options] == ["red", "green", "dark blue", "yellow"]
        assert [option[3] for option in options].index(True) == row["gold"]
        best = max(range(4), key=lambda number: row["options"][number]["logprob"])
        assert [option[2] for option in options].index(True) == best


def test_what_all_prompts_begin_with_is_packed_once(make_evaluation):
    folder = make_evaluation(n=30, names=("base",))
    path = folder / "samples" / "base" / "sort.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    prompts = ["An example. " * 5000 + row["prompt"] for row in rows]
    lines = [json.dumps(row | {"prompt": p}) for row, p in zip(rows, prompts, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    pack = pack_of(gather([folder]), "sort")
    assert pack is not None
    content = json.loads(gzip.decompress(base64.b64decode(pack.base64)))
    assert len(json.dumps(content)) < 100_000 < len(path.read_text())
    for question, prompt in zip(content["questions"], prompts, strict=True):
        (head, rest) = question[5][0]
        assert content["heads"][head] + rest == prompt


def test_the_page_shows_table_bars_curves_answers_and_settings(make_evaluation):
    page = Page(write_report([make_evaluation()]).read_text())
    words = " ".join(page.text.split())
    for expected in (
        "base, sft and dpo on quickstart",
        "Scores",
        "instruction following",
        "guessing: 25.0",
        "The difference between dpo and sft may be chance",
        "expected green",
        "✓ right",
        "✗ wrong",
        "Question: What colour",  # the exact prompt
        "learning_rate: 0.001",
        "abababababababab",  # the hash of an input file
        "1 min 24 s",
        "commit 0123abc",
    ):
        assert expected in words, expected
    bars = [attributes for tag, attributes in page.elements if tag == "rect"]
    assert len(bars) == 3 * 6  # models, and rows of the table
    errors = [a for tag, a in page.elements if tag == "path" and a.get("class") == "error"]
    assert len(errors) == len(bars)


HOSTILE = (
    "</p></div></body><script>alert(1)</script><img src=x onerror=alert(1)>"
    "<svg onload=alert(1)> {{ 7*7 }} &lt;b&gt; \u202egnp.exe \x00\x1b[31m "
    "<!-- | ``` [x](javascript:1)"
)


def test_hostile_answers_stay_inert_in_the_page(make_evaluation):
    text = write_report([make_evaluation(n=30, answer=HOSTILE)]).read_text()
    page = Page(text)
    assert "img" not in {tag for tag, _ in page.elements}
    assert own_script_only(page, text)
    assert all("onload" not in attributes for _, attributes in page.elements)
    assert "<script>alert(1)</script>" in page.text  # shown as text
    assert "{{ 7*7 }}" in page.text
    assert "⟨U+202E⟩gnp.exe" in page.text
    assert "⟨U+0000⟩⟨U+001B⟩[31m" in page.text


def test_what_a_run_answered_while_it_was_trained_is_shown_and_stays_inert(make_evaluation):
    run = make_evaluation().parent / "sft"
    rows = [
        {"step": step, "prompt": f"ask {place}", "answer": answer, "target": "yes"}
        | {"finish_reason": "length" if step else "stop"}
        for step, answer in ((0, "first words"), (5, "between"), (9, HOSTILE))
        for place in range(6)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report([run]).read_text()
    page = Page(text)
    assert own_script_only(page, text)
    assert "img" not in {tag for tag, _ in page.elements}
    assert "What sft answered while it was trained" in page.text
    assert page.text.count("first words") == page.text.count("<script>alert(1)</script>") == 4
    assert page.text.count("cut at the longest length") == 4
    assert "after step 0" in page.text and "after step 9" in page.text
    assert "between" not in page.text and "ask 4" not in page.text
    assert "2 more prompts" in page.text


def test_hostile_answers_stay_inside_their_block_in_markdown(make_evaluation):
    text = markdown(gather([make_evaluation(n=30, answer=HOSTILE)]))
    blocks = re.findall(r"^````text\n(.*?)\n````$", text, flags=re.S | re.M)
    assert any("<script>" in block for block in blocks)
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", text, flags=re.S | re.M)
    assert "<script>" not in outside
    assert "javascript:" not in outside


def test_hostile_names_stay_inert_everywhere(make_evaluation, capsys):
    folder = make_evaluation(names=("base",))
    content = json.loads((folder / "evaluation.json").read_text())
    content["suite"] = "<script>x</script>[red]"
    (folder / "evaluation.json").write_text(json.dumps(content))
    text = write_report([folder], show=True).read_text()
    assert own_script_only(Page(text), text)
    assert "[red]" in capsys.readouterr().out  # not taken for a colour


def test_an_answer_of_a_megabyte_is_cut_and_says_so(make_evaluation):
    page = write_report([make_evaluation(n=10, answer="word " * 200_000)]).read_text()
    assert len(page) < 300_000
    assert "and 999,300 more characters" in Page(page).text


def test_half_a_surrogate_pair_can_be_written(make_evaluation):
    page = write_report([make_evaluation(n=10, answer="a\ud83db")]).read_text(encoding="utf-8")
    assert "a\ufffdb" in page
    assert clipped("\u2067abc").text == "⟨U+2067⟩abc"


def test_markdown_table_has_a_column_for_each_model(make_evaluation):
    text = markdown(gather([make_evaluation()]))
    (head,) = [line for line in text.splitlines() if line.startswith("| | asked")]
    assert head == "| | asked | base | sft | dpo |"
    (row,) = [line for line in text.splitlines() if line.startswith("| **instruction following**")]
    assert row.count("|") == head.count("|")
    assert re.search(r"\*\*\d\d\.\d\*\* \(\d\d\.\d–\d\d\.\d\) \|$", row)  # dpo's, which is best


def test_the_terminal_table_shows_every_score(make_evaluation):
    console = Console(width=100, record=True)
    report = gather([make_evaluation()])
    print_summary(report, console)
    text = console.export_text()
    assert "base, sft and dpo on quickstart" in text
    for model in report.models:
        assert f"{100 * model.groups['accuracy'].value:.1f}" in text


def test_samples_show_every_pattern_of_right_and_wrong(make_evaluation):
    report = gather([make_evaluation()])
    kinds = {card.kind for card in sample_cards(report, "format")}
    assert {"learnt", "all wrong"} <= kinds
    for card in sample_cards(report, "format"):
        assert [answer.model for answer in card.answers] == ["base", "sft", "dpo"]
        verdicts = [answer.is_right for answer in card.answers]
        if card.kind == "learnt":
            assert (verdicts[0], verdicts[-1]) == (False, True)


def test_numbers_are_written_for_people():
    assert difference_text(-0.0149, True) == "−1.5"
    assert difference_text(0.0, True) == "0.0"
    assert difference_text(0.25, False) == "+0.250"
    assert duration_text(59.4) == "59 s"
    assert duration_text(3720) == "1 h 2 min"
    assert visible("tab\tline\nend") == "tab\tline\nend"


def test_answers_whose_texts_were_not_kept_are_told_from_empty_ones(make_evaluation):
    folder = make_evaluation(n=20, tasks=("sort",))
    for name in ("base", "sft", "dpo"):
        path = folder / "samples" / name / "sort.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [without_texts(row) if row["correct"] else row for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    cards = sample_cards(gather([folder]), "sort")
    (learnt, *_) = [card for card in cards if card.kind == "learnt"]
    assert learnt.question.text.startswith("What colour")  # from a model that was wrong
    assert "were not kept" in learnt.answers[-1].note
    assert "were not kept" in write_report([folder]).read_text()


def test_cost_is_shown_as_the_harness_noted_it(make_evaluation):
    folder = make_evaluation(n=20, tasks=("sort",), names=("base",))
    record = folder / "samples" / "base" / "sort.json"
    costs = {"computed": 18, "reused": 2, "prompt_tokens": 12345, "answer_tokens": 678}
    record.write_text(json.dumps(json.loads(record.read_text()) | costs))
    page = Page(write_report([folder]).read_text())
    assert "basesort4 s4.818212,345678" in page.text  # one cell after the other
    (model,) = json.loads((folder / "report.json").read_text())["models"]
    assert model["cost"]["sort"] == {"seconds": 4.2, **costs}


# ---------------------------------------------------------------- what can be wrong on disk


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        write_report([tmp_path])
    with pytest.raises(UserError, match="is not a folder"):
        write_report([tmp_path / "no"])


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("samples/sft/sort.jsonl", '{"doc_id": "0"}\n{"doc', "sort.jsonl, line 2: broken JSON"),
        ("samples/sft/sort.jsonl", "", "the file is empty"),
        ("samples/sft/sort.json", "{", "sort.json: broken JSON"),
        ("evaluation.json", "[]", "needed a JSON object"),
        ("../sft/metrics.jsonl", '{"step": 1\n{"step": 2}\n', "metrics.jsonl, line 1: broken"),
        ("../sft/recipe.yaml", "a: [", "recipe.yaml: broken YAML"),
    ],
)
def test_a_broken_file_is_named(make_evaluation, file, content, problem):
    folder = make_evaluation(n=5)
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=problem):
        write_report([folder])


def test_the_half_line_of_a_killed_run_is_passed_over(make_evaluation):
    folder = make_evaluation(n=5)
    with open(folder.parent / "sft" / "metrics.jsonl", "a") as file:
        file.write('{"step": 610, "lo')
    assert gather([folder]).stages[1].curve("loss")[-1][0] == 600
