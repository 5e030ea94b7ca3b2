"""Served models beside folders: lm-eval's own backends against servers that really run."""

import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from eval.harness import evaluate
from eval.recipe import EvalRecipe, model_names
from olmo_base.run.artefact import RunConfig
from olmo_base.run.errors import UserError
from tests.open_instruct.chat.running import Running, save_chat_model

needs_clients = pytest.mark.skipif(
    importlib.util.find_spec("tenacity") is None,
    reason="lm-eval[api] is not installed: lm-eval asks servers with tenacity",
)
QUESTIONS = ("Is it red?", "Where do they live?", "How many?")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_chat_model(tmp_path_factory.mktemp("models") / "tiny", context=200)


@pytest.fixture(scope="module")
def server(model) -> Iterator[Running]:
    running = Running([model])
    yield running
    running.stop()


@pytest.fixture
def tasks(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"q": q, "options": ["yes", "no way"], "gold": 1} for q in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "rows.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    say = {
        "task": "say",
        "output_type": "generate_until",
        "doc_to_target": "yes",
        "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    }
    choose = {
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_target": "gold",
        "doc_to_choice": "options",
        "metric_list": [{"metric": "acc"}],
    }
    read = {
        "task": "read",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}} No way, they said, and went home.",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    for task in (say, choose, read):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


def ask(models: list[str], tasks: Path, output: Path, *names: str, **settings) -> Path:
    return evaluate(
        models,
        output_dir=str(output),
        tasks=names,
        include_path=str(tasks),
        **settings,
    ).path


def rows_of(folder: Path, name: str, task: str) -> list[dict]:
    lines = (folder / "samples" / name / f"{task}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def served(server: Running, model: str, backend: str, path: str, more: str = "") -> str:
    url = f"http://127.0.0.1:{server.port}/v1/{path}"
    return f"{backend}:base_url={url},model={model},max_retries=1{more}"


# ---------------------------------------------------------------- our own server


@needs_clients
def test_a_served_chat_model_says_what_its_folder_says(model, server, tasks, tmp_path):
    there = served(server, model, "local-chat-completions", "chat/completions")
    folder = ask([model, there], tasks, tmp_path / "out", "say", apply_chat_template=True)
    names = [item["name"] for item in json.loads((folder / "report.json").read_text())["models"]]
    assert len({*names}) == 2
    here, remote = (rows_of(folder, name, "say") for name in names)
    assert [row["answer"] for row in remote] == [row["answer"] for row in here]
    assert all(row["answer"] for row in here)
    assert QUESTIONS[0] in remote[0]["prompt"]
    record = json.loads((folder / "samples" / names[1] / "say.json").read_text())
    assert record["computed"] == 3 and "answer_tokens" not in record
    assert "served" not in (folder / "report.md").read_text().splitlines()[0]
    # What was said is not asked again, also where the samples were lost.
    (folder / "samples" / names[1] / "say.json").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    ask([model, there], tasks, tmp_path / "out", "say", apply_chat_template=True)
    record = json.loads((folder / "samples" / names[1] / "say.json").read_text())
    assert (record["computed"], record["reused"]) == (0, 3)


@needs_clients
def test_a_served_base_model_says_what_its_folder_says(model, server, tasks, tmp_path):
    there = served(server, model, "local-completions", "completions", f",tokenizer={model}")
    folder = ask([there], tasks, tmp_path / "there", "say")
    here = ask([model], tasks, tmp_path / "here", "say")
    remote, local = rows_of(folder, "tiny", "say"), rows_of(here, "tiny", "say")
    assert [row["answer"] for row in remote] == [row["answer"] for row in local]


@needs_clients
def test_options_and_texts_are_scored_by_our_server_as_by_the_folder(
    model, server, tasks, tmp_path
):
    there = served(server, model, "local-completions", "completions", f",tokenizer={model}")
    folder = ask([there], tasks, tmp_path / "there", "choose", "read")
    here = ask([model], tasks, tmp_path / "here", "choose", "read")
    remote, local = rows_of(folder, "tiny", "choose"), rows_of(here, "tiny", "choose")
    for row, expected in zip(remote, local, strict=True):
        found = [option["logprob"] for option in row["options"]]
        assert found == pytest.approx([o["logprob"] for o in expected["options"]], abs=1e-4)
        assert row["scores"] == expected["scores"]
    remote, local = rows_of(folder, "tiny", "read"), rows_of(here, "tiny", "read")
    found = [row["logprob"] for row in remote]
    assert found == pytest.approx([row["logprob"] for row in local], abs=1e-3)


@pytest.fixture
def refusing() -> Iterator[str]:
    """/v1/completions of somebody who does not score given words."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(400)
            self.send_header("Content-Length", "11")
            self.end_headers()
            self.wfile.write(b"echo? Never")

        def log_message(self, *values) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, args=(0.01,)).start()
    yield f"http://127.0.0.1:{made.server_address[1]}/v1/completions"
    made.shutdown()
    made.server_close()


@needs_clients
def test_an_endpoint_without_prompt_likelihoods_is_one_message(model, refusing, tasks, tmp_path):
    there = (
        f"local-completions:base_url={refusing},model={model},tokenizer={model},"
        "tokenizer_backend=huggingface,max_retries=1"
    )
    with pytest.raises(UserError, match=r"local-completions failed .*echo\? Never.*is kept"):
        ask([there], tasks, tmp_path / "out", "choose")


# ---------------------------------------------------------------- what cannot be asked


@pytest.mark.parametrize(
    ("there", "names", "settings", "problem"),
    [
        ("local-completions:base_url=u,model=m", ("say", "ours"), {}, "ours is ours"),
        ("local-chat-completions:base_url=u,model=m", ("say",), {}, "takes dialogues only"),
        (
            "local-chat-completions:base_url=u,model=m",
            ("choose",),
            {"apply_chat_template": True},
            "no likelihood of given words",
        ),
    ],
)
def test_what_a_backend_cannot_be_asked_is_said_first(
    tasks, tmp_path, there, names, settings, problem
):
    (tasks / "ours.yaml").write_text(
        yaml.safe_dump({"tasks": {"ours": {"kind": "exact_match", "file": str(tasks / "o.jsonl")}}})
    )
    (tasks / "o.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
    with pytest.raises(UserError, match=problem):
        ask([there], tasks, tmp_path / "out", *names, **settings)


@pytest.mark.parametrize(
    ("there", "problem"),
    [
        ("vllm:", "key=value"),
        ("vllm:pretrained", "key=value"),
        ("local-completions:base_url=u", "does not say which model"),
        ("local-completions:model=m,auth_token=secret", "OPENAI_API_KEY"),
        ("vllm:pretrained=m,trust_remote_code=True", "stays off"),
    ],
)
def test_arguments_of_a_backend_are_checked(there, problem):
    with pytest.raises(UserError, match=problem):
        EvalRecipe(stage="eval", models=(there,), run=RunConfig(output_dir="out"), tasks=("say",))


def test_a_served_model_is_called_by_its_name():
    models = ["runs/a", "local-completions:base_url=http://x/v1/completions,model=org/b"]
    assert model_names(models) == ["a", "b"]
