"""A model as judge behind a real endpoint of this machine, with rules instead of a model inside."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

from eval.cache import RequestCache
from eval.harness import evaluate
from eval.judge import KEY_VARIABLE, Judge, JudgeError, open_judge
from eval.recipe import EvalRecipe
from eval.scores import compare, estimate, is_right, measured
from eval.statistics import length_controlled
from eval.tasks import select
from olmo_base.run.artefact import RunConfig
from olmo_base.run.errors import DataError, UserError
from olmo_base.run.recipe import RecipeError
from tests.open_instruct.chat.running import Running, save_chat_model

Rule = Callable[[dict, str, str | None], tuple[int, object]]


def reply(text: str, **more) -> tuple[int, object]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, **more}]}


def longer(body: dict, second: str, first: str | None) -> tuple[int, object]:
    """The longer answer is better; what holds "x" is harmful."""
    if first is None:
        return reply("A" if "x" in second else "B")
    return reply("B" if len(second) > len(first) else "A")


class Endpoint:
    """An OpenAI-compatible API whose verdicts are a rule."""

    def __init__(self) -> None:
        self.rule: Rule = longer
        self.prompts: list[str] = []
        self.keys: list[str | None] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                endpoint.keys.append(self.headers["Authorization"])
                endpoint.prompts.append(prompt)
                lines = prompt.splitlines()
                found = [
                    json.loads(line)
                    for line, above in zip(lines[1:], lines, strict=False)
                    if above.endswith("(as a JSON string):")
                ]
                status, content = endpoint.rule(
                    body, found[-1], found[0] if len(found) > 1 else None
                )
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *values) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.name = f"http://127.0.0.1:{self.server.server_address[1]}/v1#rule"
        threading.Thread(target=self.server.serve_forever, args=(0.01,)).start()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_chat_model(tmp_path_factory.mktemp("models") / "tiny", context=160)


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {"instruction": f"Say {n}.", "output": "w" * 3 * n, "dataset": "ab"[n % 2]}
        for n in range(1, 9)
    ]
    (folder / "wishes.json").write_text(json.dumps(rows))
    hate = [{"prompt": f"They are {n} and"} for n in range(4)]
    (folder / "hate.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hate))
    (folder / "plain.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n' * 3)
    tasks = {
        "wishes": {"kind": "judged", "file": "wishes.json", "max_new_tokens": 16},
        "hate": {
            "kind": "judged",
            "rubric": "harmless",
            "file": "hate.jsonl",
            "max_new_tokens": 8,
        },
        "plain": {"kind": "exact_match", "file": "plain.jsonl", "max_new_tokens": 4},
    }
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    return folder


def ask(model: str, data: Path, output: Path, judge: str | None, *tasks: str):
    return evaluate(
        [model],
        output_dir=str(output),
        tasks=tasks or ("wishes", "hate", "plain"),
        include_path=str(data),
        data_dir=str(data),
        judge=judge,
    ).path


def rows_of(folder: Path, task: str) -> list[dict]:
    lines = (folder / "samples" / "tiny" / f"{task}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------- end to end


def test_answers_are_judged_in_both_orders_and_reported(model, data, endpoint, tmp_path):
    folder = ask(model, data, tmp_path / "out", endpoint.name)
    rows = rows_of(folder, "wishes")
    longer_by = [len(row["answer"]) - len(row["target"][0]) for row in rows]
    # of two as long the rule takes what stands first: once the one, once the other
    expected = [1.0 if excess > 0 else 0.5 if excess == 0 else 0.0 for excess in longer_by]
    assert [row["scores"]["win_rate"] for row in rows] == expected
    assert 0 < sum(expected) < 8  # the rule tells them apart
    assert [row["excess_length"] for row in rows] == longer_by
    assert all(len(row["verdicts"]) == 2 for row in rows)
    assert {row["category"] for row in rows} == {"a", "b"}
    harmless = [float("x" not in row["answer"]) for row in rows_of(folder, "hate")]
    assert [row["scores"]["harmless"] for row in rows_of(folder, "hate")] == harmless
    # one to see that it is there, both orders of each pair, one for each answer by itself
    assert len(endpoint.prompts) == 1 + 2 * 8 + 4
    report = json.loads((folder / "report.json").read_text())
    found = report["models"][0]["tasks"]
    assert found["wishes"]["win_rate"]["value"] == sum(expected) / 8
    assert found["wishes"]["lc_win_rate"]["stderr"] > 0
    assert found["hate"]["harmless"]["value"] == sum(harmless) / 4
    assert report["tasks"]["wishes"]["metric"] == "lc_win_rate"
    record = json.loads((folder / "samples" / "tiny" / "wishes.json").read_text())
    assert (record["judge"], record["unclear"]) == (endpoint.name, 0)
    assert "won against the reference" in (folder / "report.html").read_text()


def test_without_a_judge_its_tasks_are_left_out_and_the_report_says_why(model, data, tmp_path):
    folder = ask(model, data, tmp_path / "out", None)
    report = json.loads((folder / "report.json").read_text())
    assert list(report["models"][0]["tasks"]) == ["plain"]
    assert set(report["skipped"]) == {"wishes", "hate"}
    assert "another model judges its answers" in (folder / "report.md").read_text()
    assert "--judge URL#MODEL" in (folder / "report.html").read_text()
    with pytest.raises(UserError, match=r"wishes: another model judges .*--judge"):
        ask(model, data, tmp_path / "none", None, "wishes")


def test_a_judge_that_dies_leaves_the_rest_and_a_rerun_asks_for_the_rest(
    model, data, endpoint, tmp_path
):
    def dying(body: dict, second: str, first: str | None):
        return longer(body, second, first) if len(endpoint.prompts) <= 9 else (501, {"no": "more"})

    endpoint.rule = dying
    with pytest.raises(UserError, match=r"status 501.*report shows everything else.*go on"):
        ask(model, data, tmp_path / "out", endpoint.name)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["models"][0]["tasks"]) == ["plain"]
    assert "not yet asked wishes, hate" in (tmp_path / "out" / "report.md").read_text()
    given = endpoint.prompts[1:9]  # after the first, which asks whether it is there
    endpoint.rule, endpoint.prompts = longer, []
    folder = ask(model, data, tmp_path / "out", endpoint.name)
    assert len(endpoint.prompts) == 1 + 2 * 8 + 4 - len(given)
    assert not {*given} & {*endpoint.prompts}
    assert len(rows_of(folder, "wishes")) == 8
    endpoint.prompts = []
    ask(model, data, tmp_path / "out", endpoint.name)
    assert endpoint.prompts == []


def test_a_judge_that_is_not_there_is_one_message(model, data, tmp_path):
    with pytest.raises(JudgeError, match=r"cannot be reached .*refused.* Start it"):
        ask(model, data, tmp_path / "out", "http://127.0.0.1:9/v1#none", "wishes", "plain")


def test_a_judge_that_writes_nonsense_is_one_message(model, data, endpoint, tmp_path):
    endpoint.rule = lambda body, second, first: reply("Both are nice.")
    with pytest.raises(JudgeError, match="follows instructions"):
        ask(model, data, tmp_path / "out", endpoint.name)
    endpoint.rule = lambda body, second, first: (200, ["no choices"])
    with pytest.raises(JudgeError, match="no chat completion"):
        ask(model, data, tmp_path / "out", endpoint.name)


def test_our_own_server_can_be_the_judge(tmp_path):
    model = save_chat_model(tmp_path / "tiny", context=900)
    running = Running([model])
    try:
        judge = open_judge(f"http://127.0.0.1:{running.port}/v1#{model}")
        choice = judge._choice("Which one?")  # a random model names no verdict
        assert isinstance(choice["message"]["content"], str)
        assert choice["logprobs"]["content"]
        with pytest.raises(JudgeError, match="follows instructions"):
            judge.check_ready()
    finally:
        running.stop()


# ---------------------------------------------------------------- verdicts


def test_few_unclear_replies_count_as_nothing_and_many_are_an_error(endpoint, tmp_path):
    judge = open_judge(endpoint.name)
    judge.open_cache(tmp_path)
    endpoint.rule = lambda body, second, first: reply("hm" if "number 3 " in str(body) else "B")
    prompts = [f'number {n} (as a JSON string):\n"{n}"' for n in range(20)]
    found = judge.shares(prompts)
    assert found == [None if n == 3 else 1.0 for n in range(20)]
    endpoint.rule = lambda body, second, first: reply("hm")
    others = [f"other {prompt}" for prompt in prompts]
    with pytest.raises(JudgeError, match="8 of its first 8 replies"):
        judge.shares(others)
    with pytest.raises(JudgeError):  # it is not asked again
        judge.shares(prompts)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("A", 0.0),
        (" **B**.\n", 1.0),
        ("Answer: b", 1.0),
        ("A or B", None),
        ("A boat is better", None),
        ("", None),
    ],
)
def test_a_reply_is_a_verdict_only_where_it_is_one_letter(endpoint, text, share):
    endpoint.rule = lambda body, second, first: reply(text)
    assert open_judge(endpoint.name).verdict('(as a JSON string):\n"a"') == share


def test_probabilities_of_the_letters_are_used_where_the_endpoint_tells_them(endpoint):
    top = [{"token": t, "logprob": math.log(p)} for t, p in (("B", 0.6), ("A", 0.2), ("C", 0.1))]
    endpoint.rule = lambda body, second, first: reply(
        "B", logprobs={"content": [{"token": "B", "logprob": math.log(0.6), "top_logprobs": top}]}
    )
    found = open_judge(endpoint.name).verdict('(as a JSON string):\n"a"')
    assert found == pytest.approx(0.75)


def test_an_endpoint_without_probabilities_is_asked_without_them(endpoint):
    def strict(body: dict, second: str, first: str | None):
        return (400, {"error": "no logprobs here"}) if "logprobs" in body else reply("A")

    endpoint.rule = strict
    judge = open_judge(endpoint.name)
    prompt = '(as a JSON string):\n"a"'
    assert [judge.verdict(prompt), judge.verdict(prompt)] == [0.0, 0.0]
    assert len(endpoint.prompts) == 3


def test_a_busy_endpoint_is_asked_again(endpoint, monkeypatch):
    monkeypatch.setattr("eval.judge.RETRIES_S", (0.0, 0.0))
    endpoint.rule = lambda body, second, first: (
        reply("A") if len(endpoint.prompts) == 3 else (429, {})
    )
    assert open_judge(endpoint.name).verdict('(as a JSON string):\n"a"') == 0.0
    endpoint.rule = lambda body, second, first: (503, {"why": "too many"})
    with pytest.raises(JudgeError, match=r"status 503.*too many"):
        open_judge(endpoint.name).verdict('(as a JSON string):\n"a"')


def test_the_key_comes_from_the_environment_and_never_travels_open(endpoint, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    open_judge(endpoint.name).verdict('(as a JSON string):\n"a"')
    assert endpoint.keys == ["Bearer secret"]
    with pytest.raises(UserError, match="not encrypted"):
        open_judge("http://example.com/v1#judge")
    assert open_judge("https://example.com/v1#judge").model == "judge"


@pytest.mark.parametrize(
    "named", ["http://127.0.0.1:8000/v1", "ftp://a#b", "judge", "http://a:b#c"]
)
def test_a_judge_is_an_address_and_a_name(named):
    with pytest.raises(RecipeError, match="URL#MODEL"):
        EvalRecipe(
            stage="eval",
            models=("a",),
            run=RunConfig(output_dir="out"),
            tasks=("b",),
            judge=named,
        )


def test_two_judges_share_no_verdict(tmp_path):
    paths = set()
    for name in ("one", "two"):
        judge = Judge("http://127.0.0.1:8000/v1", name)
        judge.open_cache(tmp_path)
        assert isinstance(judge.cache, RequestCache)
        paths.add(judge.cache.path)
        judge.cache.close()
    assert len(paths) == 2


def test_a_row_without_a_reference_is_named(data, model, endpoint, tmp_path):
    (data / "wishes.json").write_text('[{"instruction": "Say."}]')
    with pytest.raises(DataError, match="reference"):
        ask(model, data, tmp_path / "out", endpoint.name, "wishes")


@pytest.mark.parametrize("suite", ["tulu3", "olmo_adapted"])
def test_published_suites_have_tasks_for_a_judge(suite):
    judged = {task.name: task.rubric for task in select(suite).tasks if task.kind == "judged"}
    assert judged["alpaca_eval"] == "better"
    assert "harmless" in judged.values()


# ---------------------------------------------------------------- length control


def judged_rows(won: list[float], excess: list[int]) -> list[dict]:
    return [
        {
            "doc_id": str(n),
            "category": None,
            "scores": {"win_rate": share},
            "correct": share > 0.5,
            "excess_length": length,
        }
        for n, (share, length) in enumerate(zip(won, excess, strict=True))
    ]


def drawn(seed: int, intercept: float, slope: float, n: int = 300) -> tuple[list, list]:
    chance = np.random.default_rng(seed)
    excess = chance.normal(100, 400, n).astype(int)
    logits = intercept + slope * np.tanh(excess / excess.std())
    won = (chance.random(n) < 1 / (1 + np.exp(-logits))).astype(float)
    return won.tolist(), excess.tolist()


def test_length_control_agrees_with_another_logistic_regression():
    won, excess = drawn(0, -0.5, 1.5)
    won[:20] = [0.25] * 20  # shares between count as parts of a win and of a loss
    lengths = np.tanh(np.array(excess) / np.std(excess))[:, None]
    twice, labels = np.concatenate([lengths, lengths]), np.repeat([1, 0], len(won))
    weights = np.concatenate([won, 1 - np.array(won)])
    fit = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(twice, labels, weights)
    expected = 1 / (1 + math.exp(-fit.intercept_[0]))
    assert np.mean(length_controlled(won, excess)) == pytest.approx(expected, abs=1e-6)
    # a fit that answers of one length would win less than the longer ones did
    assert expected < np.mean(won)


def test_the_standard_error_of_length_control_is_that_of_resampled_questions():
    won, excess = drawn(1, 0.3, 1.0)
    found = estimate(judged_rows(won, excess), "lc_win_rate")
    chance = np.random.default_rng(0)
    values = []
    for _ in range(300):
        picked = chance.integers(len(won), size=len(won))
        resampled = [won[n] for n in picked], [excess[n] for n in picked]
        values.append(np.mean(length_controlled(*resampled)))
    assert found.stderr == pytest.approx(np.std(values), rel=0.12)
    assert found.low is not None and found.high is not None
    assert found.low < found.value < found.high


def test_answers_of_one_length_need_no_control():
    assert np.mean(length_controlled([1, 0, 0, 0.5], [7, 7, 7, 7])) == pytest.approx(0.375)


def test_what_wins_always_wins_at_any_length_too():
    rows = judged_rows([1.0] * 9, list(range(9)))
    found = estimate(rows, "lc_win_rate")
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low is not None and found.low < 0.8  # nine questions prove little
    assert measured("judged", rows) == ["lc_win_rate", "win_rate"]


def test_models_are_compared_with_their_lengths_controlled():
    won, excess = drawn(2, 0.0, 0.0)
    better = [max(share, float(n % 3 == 0)) for n, share in enumerate(won)]
    first, second = judged_rows(won, excess), judged_rows(better, excess)
    found = compare(first, second, "lc_win_rate")
    assert found is not None and found.is_separated
    values = [estimate(rows, "lc_win_rate").value for rows in (first, second)]
    assert found.value == pytest.approx(values[1] - values[0])
    same = compare(first, first, "lc_win_rate")
    assert same is not None and (same.value, same.low, same.high) == (0, 0, 0)
    assert is_right(second[0], "lc_win_rate")
