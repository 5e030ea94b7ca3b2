"""The report in a real browser: Debian's chromium, driven by Playwright."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from eval.report import write_report
from tests.eval.conftest import write_json

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    "<div><b><svg onload='window.hacked = 1'> שלום \u202etxt.exe <!-- ]]> \x00 "
    "javascript:window.hacked=1 "
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def open_report(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a report from disk; what the page complains of, or fetches, is an error."""
    contexts = []
    complaints: list[str] = []

    def opened(path: Path, **settings: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | settings)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [text for text in complaints if not text.endswith("report.html")] == []


def cards(page: Page):
    return page.locator("#cards article")


def count(page: Page) -> int:
    """How many questions fit, as the page says."""
    return int(page.locator("#count").inner_text().split(" ")[0].replace(",", ""))


def verdicts(folder: Path, model: str, task: str) -> list[bool]:
    path = folder / "samples" / model / f"{task}.jsonl"
    return [json.loads(line)["correct"] for line in path.read_text().splitlines()]


def test_questions_are_searched_filtered_and_paged(make_evaluation, open_report):
    folder = make_evaluation()
    page = open_report(write_report([folder]))
    expect(cards(page)).to_have_count(20)
    expect(page.locator("#count")).to_have_text("120 of 120 questions, 1–20 shown")
    page.get_by_role("button", name="Next").click()
    expect(cards(page).first).to_contain_text("street 20?")
    page.get_by_label("Page", exact=True).fill("6")
    page.keyboard.press("Enter")
    expect(cards(page).last).to_contain_text("street 119?")
    assert page.get_by_role("button", name="Next").is_disabled()
    page.get_by_label("Search").fill("STREET 7?")
    expect(page.locator("#count")).to_have_text("1 of 120 questions, 1–1 shown")
    expect(page.locator("#cards mark").first).to_have_text("street 7?")
    page.get_by_label("Search").fill("no such words [")
    expect(page.locator("#count")).to_have_text("0 of 120 questions")
    page.get_by_label("Search").fill("")
    expect(cards(page)).to_have_count(20)

    page.get_by_label("Task").select_option("format")
    base, sft, dpo = (verdicts(folder, name, "format") for name in ("base", "sft", "dpo"))
    for label, expected in (
        (
            "changed between models",
            sum(len({*three}) > 1 for three in zip(base, sft, dpo, strict=True)),
        ),
        ("sft wrong", sft.count(False)),
        ("sft wrong, dpo right", sum(b > a for a, b in zip(sft, dpo, strict=True))),
        ("all wrong", sum(not any(three) for three in zip(base, sft, dpo, strict=True))),
    ):
        page.get_by_label("Show").select_option(label)
        assert count(page) == expected, label
        assert 0 < expected < 120, label


def test_a_card_shows_every_model_its_options_and_the_exact_prompt(make_evaluation, open_report):
    folder = make_evaluation(n=30)
    page = open_report(write_report([folder]))
    page.get_by_label("Task").select_option("choice")
    card = cards(page).nth(2)
    expect(card.locator(".answer")).to_have_count(3)
    assert card.locator(".who").all_inner_texts()[1].startswith("sft")
    left, middle, _ = [box.bounding_box() for box in card.locator(".answer").all()]
    assert left and middle and left["y"] == middle["y"] and left["x"] < middle["x"]
    card.locator(".answer summary").first.click()
    expect(card.locator(".options tr")).to_have_count(4)
    row = json.loads((folder / "samples/base/choice.jsonl").read_text().splitlines()[2])
    logprob = f"{row['options'][1]['logprob']:.3f}"
    expect(card.locator(".options tr").nth(1)).to_contain_text(logprob)
    card.get_by_text("Exact prompt").click()
    assert card.locator("pre").inner_text() == row["prompt"]
    expect(card).to_contain_text("Given to base, sft, dpo:")


def test_questions_in_training_text_can_be_told_apart(make_evaluation, open_report):
    folder = make_evaluation(n=40)
    note = {"overlapping": ["3", "5"], "too_short": [], "n": 40}
    source = {"path": "train.jsonl", "texts": 7, "characters": 99}
    write_json(
        folder / "contamination.json",
        {"key": "", "ngram": 13, "sources": [source], "tasks": {"recall": note}},
    )
    page = open_report(write_report([folder]))
    expect(page.locator(".short")).to_contain_text("2 of 40 questions of recall")
    expect(page.locator("#contamination")).to_contain_text("train.jsonl (7 texts, 99 characters)")
    page.get_by_label("Show").select_option("in training text")
    expect(page.locator("#cards .tag.overlap")).to_have_count(2)
    page.get_by_label("Show").select_option("not in training text")
    assert count(page) == 38


def test_everything_can_be_reached_by_keyboard(make_evaluation, open_report):
    page = open_report(write_report([make_evaluation()]))
    expect(cards(page)).to_have_count(20)
    page.keyboard.press("n")
    expect(cards(page).first).to_contain_text("street 20?")
    page.keyboard.press("p")
    expect(cards(page).first).to_contain_text("street 0?")
    page.keyboard.press("/")
    page.keyboard.type("Oren n")  # n and p are letters here
    assert page.locator("#search").input_value() == "Oren n"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") != "search"
    page.locator("a[href='#task-1']").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#task-1")).to_have_attribute("open", "")
    browse = page.locator("#task-1 button.browse")
    browse.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#search")).to_be_focused()
    assert page.locator("#task option:checked").inner_text() == "sort"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(make_evaluation, open_report, scheme):
    folder = make_evaluation(n=25, answer="a" * 500)  # one word without end
    phone = {"width": 360, "height": 740}
    page = open_report(write_report([folder]), viewport=phone, color_scheme=scheme)
    expect(cards(page)).to_have_count(20)
    for details in page.locator("details").all():
        details.evaluate("element => { element.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(int(part) for part in background[4:-1].split(","))
    assert (lightness < 150) == (scheme == "dark")


def test_hostile_answers_are_text_and_nothing_else(make_evaluation, open_report):
    folder = make_evaluation(n=12, answer=HOSTILE + "word " * 200_000)
    path = write_report([folder])
    assert path.stat().st_size < 400_000
    page = open_report(path)
    expect(cards(page)).to_have_count(12)
    page.get_by_label("Search").fill("</script><script>")
    expect(page.locator("#cards mark").first).to_have_text("</script><script>")
    answer = cards(page).first.locator(".answer .text").first
    expect(answer).to_contain_text("<img src=x onerror='window.hacked = 1'>")
    expect(answer).to_contain_text("⟨U+202E⟩txt.exe <!-- ]]> ⟨U+0000⟩")
    expect(answer).to_contain_text("more characters")
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main iframe, #cards svg").count() == 0
    assert page.locator("h2").last.inner_text() == "How it was made"  # nothing was swallowed


def test_without_scripts_the_chosen_answers_are_there(make_evaluation, open_report):
    page = open_report(write_report([make_evaluation(n=30)]), java_script_enabled=False)
    expect(page.locator("#browsing")).to_be_hidden()
    assert "need scripts" in page.locator("#browser").inner_text()
    assert page.locator("#task-0 article").count() >= 3
    expect(page.locator("#task-0 button.browse")).to_be_hidden()


def test_ten_thousand_questions_are_shown_twenty_at_a_time(make_evaluation, open_report):
    folder = make_evaluation(n=10_000, names=("base", "sft"), tasks=("recall",))
    page = open_report(write_report([folder]))
    expect(page.locator("#count")).to_have_text("10,000 of 10,000 questions, 1–20 shown")
    assert cards(page).count() == 20  # the page holds no more than it shows
    page.get_by_label("Search").fill("street 9999?")
    page.get_by_label("Show").select_option("everything")
    expect(page.locator("#count")).to_have_text("1 of 10,000 questions, 1–1 shown")
