"""The chat page in a real browser: Debian's chromium, driven by Playwright."""

import json
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from olmo_base.run.artefact import ExampleCounts
from open_instruct.encode import load_chat_encoder, save_chat_files
from open_instruct.examples import Source, read_dialogues, read_pairs
from tests.open_instruct.chat.running import Running
from tests.open_instruct.tiny import save_tiny_model, tiny_olmo2

if TYPE_CHECKING:
    from playwright.sync_api import Page

playwright_api: Any = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed"
)
expect = playwright_api.expect
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")

GREEDY = {"temperature": 0, "max_tokens": 400}
HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">
[click](javascript:window.hacked=1) <a href="javascript:window.hacked=1">x</a>
**bold** `code` [safe](https://example.org/?q=1)

```html
<iframe srcdoc="<script>parent.hacked=1</script>"></iframe>
```
<style>body { display: none }</style>"""


def save_rambler(folder, seed: int) -> str:
    """A model that at temperature 0 never ends an answer, and says one letter after the other."""
    shape = {"hidden_size": 32, "max_position_embeddings": 1000}
    save_tiny_model(folder, seed, **shape)
    model = tiny_olmo2(seed, **shape)
    with torch.no_grad():
        model.lm_head.weight[256:] = 0  # a logit of 0; some letter is always above it
        letters = [place for place in range(261) if not 32 <= place < 90]  # printable ASCII stays
        model.lm_head.weight[letters] = 0
    model.save_pretrained(folder)
    save_chat_files(load_chat_encoder(folder, "tulu"), folder)
    return str(folder)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("page")
    made = Running(
        [save_rambler(folder / name, seed) for seed, name in enumerate("ab")],
        votes=folder / "pairs.jsonl",
    )
    yield made
    made.stop()


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser, running) -> "Iterator[Page]":
    """The page, opened for the first time; what it complains of on its console is an error."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, accept_downloads=True)
    context.set_default_timeout(20_000)
    made = context.new_page()
    complaints: list[str] = []
    made.on("console", lambda message: complaints.append(message.text))
    made.on("pageerror", lambda error: complaints.append(str(error)))
    open_page(made, running)
    yield made
    context.close()
    assert complaints == []


def open_page(page: "Page", running: Running, **settings: Any) -> None:
    page.goto(f"http://127.0.0.1:{running.port}/")
    expect(page.locator("#model option")).to_have_count(2)
    page.evaluate(
        "settings => localStorage.setItem('open-instruct-settings', JSON.stringify(settings))",
        GREEDY | settings,
    )
    page.reload()
    expect(page.locator("#model option")).to_have_count(2)


def ask(page: "Page", text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: "Page"):
    return page.locator("article.assistant")


def wait_for_end(page: "Page") -> None:
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#status")).to_have_text("The answer is complete.")


def keep(page: "Page", **settings: Any) -> None:
    """Change settings of the page as it is."""
    for name, value in settings.items():
        page.evaluate(
            """([name, value]) => {
                const slider = document.getElementById(`slider-${name}`);
                slider.value = value;
                slider.dispatchEvent(new Event("input"));
            }""",
            [name, value],
        )


# ---------------------------------------------------------------- talking


def test_an_answer_streams_and_can_be_stopped(page):
    ask(page, "Hello?")
    body = answers(page).locator(".body")
    expect(body).not_to_be_empty()
    early = body.inner_text()
    expect(body).not_to_have_text(early)
    page.keyboard.press("Escape")
    expect(page.locator("#stop")).to_be_hidden()
    expect(answers(page).locator(".facts")).to_contain_text("stopped")
    assert len(body.inner_text()) >= len(early)
    expect(page.locator("article.user .body")).to_have_text("Hello?")


def test_what_the_page_shows_is_what_the_api_says(page, running):
    keep(page, max_tokens=30)
    ask(page, "Hello?")
    wait_for_end(page)
    said = running.client().chat.completions.create(
        model=running.name, messages=[{"role": "user", "content": "Hello?"}], temperature=0,
        max_tokens=30,
    )  # fmt: skip
    kept = page.evaluate("JSON.parse(localStorage.getItem('open-instruct-conversations'))")
    assert kept[0]["nodes"][1]["content"] == said.choices[0].message.content
    expect(answers(page).locator(".facts")).to_contain_text("30 tokens · ")
    expect(answers(page).locator(".facts")).to_contain_text("tokens/s")
    usage = said.usage
    expect(page.locator("#context")).to_contain_text(f"{usage.total_tokens} of 1000 tokens")


def test_regenerating_and_editing_make_branches(page):
    keep(page, max_tokens=10, temperature=1)
    ask(page, "First?")
    wait_for_end(page)
    first = answers(page).locator(".body").inner_text()
    page.get_by_label("Ask for another answer").click()
    wait_for_end(page)
    expect(answers(page).locator(".tools")).to_contain_text("2/2")
    page.get_by_label("The branch before").click()
    assert answers(page).locator(".body").inner_text() == first
    page.get_by_label("Edit this message").click()
    page.get_by_label("Edit the message").fill("Second?")
    page.keyboard.press("Enter")
    wait_for_end(page)
    expect(page.locator("article.user .body")).to_have_text("Second?")
    page.locator("article.user").get_by_label("The branch before").click()
    expect(page.locator("article.user .body")).to_have_text("First?")
    assert answers(page).locator(".body").inner_text() == first


def test_a_system_prompt_and_the_exact_prompt(page, running):
    page.get_by_label("Settings").first.click()
    page.get_by_label("System prompt").fill("Be loud.")
    page.get_by_label("Message", exact=True).fill("Say <|assistant|> to me")
    page.get_by_role("button", name="Prompt").click()
    expect(page.locator("#prompt-text")).to_have_text(
        "<|system|>\nBe loud.\n<|user|>\nSay <|assistant|> to me\n<|assistant|>\n"
    )
    expect(page.locator("#prompt-text .control")).to_have_text(
        ["<|system|>", "<|user|>", "<|assistant|>"]
    )


def test_two_models_are_compared_and_the_vote_is_a_pair(page, running):
    keep(page, max_tokens=12)
    page.get_by_label("Compare with another model").select_option(index=2)
    ask(page, "Which?")
    wait_for_end(page)
    expect(answers(page)).to_have_count(2)
    texts = answers(page).locator(".body").all_inner_texts()
    expect(page.locator("#send")).to_be_disabled()  # first the vote
    page.get_by_role("button", name="This one is better ▶").click()
    expect(page.locator("#status")).to_contain_text("Your vote was added to")
    expect(answers(page)).to_have_count(1)
    expect(answers(page).locator(".body")).to_have_text(texts[1])
    (pair,) = read_pairs(
        [Source(str(running.server.settings.votes))],
        seed=0, on_bad_row="error", counts=ExampleCounts(),
    )  # fmt: skip
    assert pair.prompt == [{"role": "user", "content": "Which?"}]
    kept = page.evaluate("JSON.parse(localStorage.getItem('open-instruct-conversations'))")
    left, right = (node["content"] for node in kept[0]["nodes"][1:])
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == (right, left)
    row = json.loads(running.server.settings.votes.read_text())
    assert [row["chosen_model"], row["rejected_model"]] == [*running.server.models][::-1]


def test_a_token_shows_its_probability_and_the_alternatives(page):
    page.get_by_role("button", name="Tokens").click()
    keep(page, max_tokens=6)
    ask(page, "Hi")
    wait_for_end(page)
    tokens = page.locator(".token")
    expect(tokens).to_have_count(6)
    tokens.nth(2).hover()
    tip = page.locator("#tip")
    expect(tip).to_be_visible()
    lines = tip.inner_text().splitlines()
    assert lines[0].startswith("taken: ") and len(lines) == 2 + 5
    assert lines[0].split(": ")[1] == lines[2].strip()  # greedy takes the likeliest
    tokens.nth(2).focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(3)).to_be_focused()


# ---------------------------------------------------------------- keeping


def test_conversations_outlive_a_reload_and_go_out_and_in(page, tmp_path):
    keep(page, max_tokens=8)
    ask(page, "Hello there?")
    wait_for_end(page)
    said = answers(page).locator(".body").inner_text()
    page.reload()
    expect(answers(page).locator(".body")).to_have_text(said)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export", exact=True).click()
    path = tmp_path / "conversations.jsonl"
    download.value.save_as(path)
    (dialogue,) = read_dialogues(
        [Source(str(path))], seed=0, on_bad_row="error", counts=ExampleCounts()
    )
    assert [turn["role"] for turn in dialogue.messages] == ["user", "assistant"]
    assert dialogue.messages[0]["content"] == "Hello there?"
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_label("Delete Hello there?").click()
    expect(page.locator("article")).to_have_count(0)
    page.locator("#file").set_input_files(path)
    expect(answers(page).locator(".body")).to_have_text(said)
    path.write_text('{"messages": [{"role": "king", "content": "x"}]}\n')
    page.locator("#file").set_input_files(path)
    expect(page.locator("#status")).to_contain_text('line 1: message 1 has the role "king"')


# ---------------------------------------------------------------- hostile text


def test_hostile_answers_and_messages_stay_text(page, running, tmp_path):
    path = tmp_path / "hostile.jsonl"
    messages = [{"role": role, "content": HOSTILE} for role in ("user", "assistant")]
    path.write_text(json.dumps({"messages": messages}))
    page.locator("#file").set_input_files(path)
    body = answers(page).locator(".body")
    expect(body.locator("strong")).to_have_text("bold")
    assert page.evaluate("window.hacked") is None
    for name in ("script", "img", "iframe", "style"):
        expect(page.locator(f"#messages {name}")).to_have_count(0)
    links = body.locator("a").evaluate_all("all => all.map(a => [a.getAttribute('href'), a.rel])")
    assert links == [["https://example.org/?q=1", "noopener noreferrer"]]
    expect(body.locator("pre code")).to_contain_text("<iframe srcdoc=")
    expect(page.locator("article.user .body")).to_have_text(HOSTILE)


def test_the_policy_stops_what_a_hole_would_let_in(browser, running):
    """As if markup had got in: scripts, handlers, foreign pictures and requests stay dead."""
    page = browser.new_page()
    open_page(page, running)
    begun: list[str] = []
    stopped: list[tuple[str, str | None]] = []
    page.on("request", lambda request: begun.append(request.url))
    page.on("requestfailed", lambda request: stopped.append((request.url, request.failure)))
    blocked = page.evaluate(
        """async () => {
            const seen = new Set();
            const note = (event) => seen.add(event.effectiveDirective);
            document.addEventListener("securitypolicyviolation", note);
            const hole = document.createElement("div");
            hole.innerHTML = '<img src="http://example.org/a.png" onerror="window.hacked=1">'
                + '<iframe src="http://example.org/"></iframe>';
            document.body.append(hole);
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
            await fetch("http://example.org/").catch(() => {});
            for (let frame = 0; frame < 100 && seen.size < 5; frame++)
                await new Promise(requestAnimationFrame);
            return [...seen];
        }"""
    )
    assert page.evaluate("window.hacked") is None
    assert set(blocked) == {
        "img-src", "script-src-elem", "script-src-attr", "connect-src", "frame-src"
    }  # fmt: skip
    assert {failure for _, failure in stopped} == {"csp"}
    assert sorted(begun) == sorted(url for url, _ in stopped)
    page.close()


def test_markdown_becomes_elements(page):
    found = page.evaluate(
        """async () => {
            const { markdown } = await import("/page/markdown.js");
            const html = (text) => { const box = document.createElement("div");
                box.append(...markdown(text)); return box.innerHTML; };
            return [
                "# Title", "one *two* **three** ~~four~~", "- a\\n- b", "3. c\\n4. d", "> q",
                "| a | b |\\n|---|---|\\n| 1 | 2 |", "`<b>`", "[x](javascript:1)",
                "a\\n\\nb", "---",
                "2 * 3 * 4", "https://example.org/a.", "**not closed",
            ].map(html);
        }"""
    )
    link = '<a href="https://example.org/a" target="_blank" rel="noopener noreferrer">'
    assert found == [
        "<h3>Title</h3>",
        "<p>one <em>two</em> <strong>three</strong> <s>four</s></p>",
        "<ul><li>a</li><li>b</li></ul>",
        '<ol start="3"><li>c</li><li>d</li></ol>',
        "<blockquote>q</blockquote>",
        "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>",
        "<p><code>&lt;b&gt;</code></p>",
        "<p>x (javascript:1)</p>",
        "<p>a</p><p>b</p>",
        "<hr>",
        "<p>2 * 3 * 4</p>",
        f"<p>{link}https://example.org/a</a>.</p>",
        "<p>**not closed</p>",
    ]


def test_code_and_messages_can_be_copied(page, tmp_path):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    code = 'if 1 < 2:\n    print("<b>")'
    answer = f"Try this:\n\n```python\n{code}\n```\n"
    messages = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": answer}]
    path = tmp_path / "code.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    page.locator("#file").set_input_files(path)
    button = page.get_by_label("Copy this code")
    button.click()
    expect(button).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == code
    answers(page).get_by_label("Copy this message").click()
    page.wait_for_function(
        "text => navigator.clipboard.readText().then(now => now === text)", arg=answer
    )


def test_long_hostile_text_does_not_hold_up_the_page(page):
    seconds = page.evaluate(
        """async () => {
            const { markdown } = await import("/page/markdown.js");
            const began = performance.now();
            for (const piece of ["**a", "*", "`", "[", "~~x", "https://", "| ", "a|-", "> ", "- "])
                for (const size of [3900, 100000]) markdown(piece.repeat(size / piece.length));
            return (performance.now() - began) / 1000;
        }"""
    )
    assert seconds < 3


# ---------------------------------------------------------------- keys


def test_a_server_with_a_key_asks_for_it_once(browser, running):
    guarded = Running([running.name], api_key="secret")
    page = browser.new_page()
    try:
        page.goto(f"http://127.0.0.1:{guarded.port}/")
        page.get_by_label("asks for its API key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#model option")).to_have_count(1)
        keep(page, max_tokens=5)
        ask(page, "Hello?")
        wait_for_end(page)
        expect(answers(page).locator(".facts")).to_contain_text("5 tokens")
    finally:
        page.close()
        guarded.stop()


# ---------------------------------------------------------------- screens and readers


def test_a_phone_shows_everything_without_scrolling_sideways(browser, running):
    context = browser.new_context(viewport={"width": 375, "height": 700}, color_scheme="dark")
    page = context.new_page()
    open_page(page, running, max_tokens=20)
    ask(page, "Hello?" + "x" * 200)
    wait_for_end(page)
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1]
    expect(page.locator("#list-panel")).to_be_hidden()
    page.get_by_label("Conversations").first.click()
    expect(page.locator("#list-panel")).to_be_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 26)"
    page.get_by_label("Light or dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    context.close()


def test_compared_answers_stand_side_by_side_and_on_a_phone_below_one_another(page):
    keep(page, max_tokens=40)
    page.get_by_label("Compare with another model").select_option(index=2)
    ask(page, "Which?")
    wait_for_end(page)
    expect(answers(page)).to_have_count(2)

    def boxes() -> list[Any]:
        return [answers(page).nth(side).bounding_box() for side in range(2)]

    left, right = boxes()
    assert left["x"] + left["width"] <= right["x"]
    assert left["y"] == right["y"]
    assert left["width"] == pytest.approx(right["width"], abs=1)
    page.set_viewport_size({"width": 375, "height": 700})
    above, below = boxes()
    assert above["y"] + above["height"] <= below["y"]
    assert above["x"] == below["x"] >= 0
    assert above["width"] == below["width"] and above["x"] + above["width"] <= 375


def test_every_control_has_a_name_for_screen_readers(page):
    page.get_by_label("Settings").first.click()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")]
            .filter((e) => !e.getAttribute("aria-label") && !e.labels?.length)
            .filter((e) => !e.textContent.trim())
            .map((e) => e.outerHTML)"""
    )
    assert nameless == []
