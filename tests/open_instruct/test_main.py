import contextlib
import errno
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import yaml
from safetensors.torch import load_file

from open_instruct import shipped_folder
from open_instruct.__main__ import _stop_now, cli, main
from tests.open_instruct.tiny import (
    rows_of,
    save_tiny_model,
    write_dialogues,
    write_recipe,
)


def verbs(command: click.Command = cli, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every verb, and every verb's verbs: (), (run,), (data, inspect), …"""
    inner = command.commands if isinstance(command, click.Group) else {}
    return [words, *itertools.chain(*(verbs(inner[word], (*words, word)) for word in inner))]


def start(*words: str, **options) -> subprocess.Popen[str]:
    """The command in a process of its own, as a person would start it."""
    command = [sys.executable, "-m", "open_instruct", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A tokenizer recipe with its data, in the working directory."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": "the quick brown fox jumps over the lazy dog"}) + "\n"] * 9
    Path("text.jsonl").write_text("".join(rows))
    keys = {
        "stage": "tokenizer",
        "dataset_mixer": [{"path": "text.jsonl"}],
        "vocab_size": 280,
        "output_dir": "runs/tokenizer",
    }
    Path("tokenizer.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path


# ---------------------------------------------------------------- help and mistyped words


def test_help_of_every_verb_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from open_instruct.__main__ import main\n"
        f"for words in {verbs()!r}:\n"
        "    assert main([*words, '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'tokenizers', 'matplotlib', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: open-instruct") == len(verbs())


def test_the_verbs_of_the_readme_are_there():
    assert {"run", "chat", "eval", "report", "data", "convert"} <= set(cli.commands)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rnu"], "Did you mean 'run'"),
        (["data", "inspekt"], "Did you mean 'inspect'"),
        (["chat", "m", "--temprature", "0"], "'--temperature'"),
        (["run", "r.yaml", "--dryrun"], "Did you mean '--dry-run'"),
        (["run", "r.yaml", "--max-steps", "5"], "max_steps=VALUE"),
        (["chat", "m", "--top-p", "2"], "0<x<=1"),
        (["chat"], "Name a model to talk with"),
    ],
)
def test_mistyped_words_exit_with_2_and_suggest_the_nearest(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- convert


def test_a_model_is_converted_and_comes_back(tmp_path, capsys):
    save_tiny_model(tmp_path / "hf")
    there, back = str(tmp_path / "core"), str(tmp_path / "back")
    assert main(["convert", str(tmp_path / "hf"), there]) == 0
    assert "hf to olmo_core" in capsys.readouterr().err
    assert main(["convert", there, back, "--to", "hf"]) == 0
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    old, new = (tmp_path / name / "model.safetensors" for name in ("hf", "back"))
    weights, again = load_file(old), load_file(new)
    assert weights.keys() == again.keys()
    assert all(weights[name].equal(again[name]) for name in weights)
    assert main(["convert", str(tmp_path / "hf"), back]) == 2
    assert "back is there already" in capsys.readouterr().err


# ---------------------------------------------------------------- run


def test_a_dry_run_prints_a_recipe_that_loads_and_touches_nothing(small, capsys):
    before = sorted(small.rglob("*"))
    assert main(["run", "tokenizer.yaml", "vocab_size=290", "--dry-run"]) == 0
    assert sorted(small.rglob("*")) == before
    printed = capsys.readouterr().out
    resolved = yaml.safe_load(printed)
    assert (resolved["vocab_size"], resolved["seed"]) == (290, 42)
    assert "# documents" in printed
    Path("resolved.yaml").write_text(printed)
    assert main(["run", "resolved.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out == printed


def test_a_run_makes_its_folder_and_is_not_done_twice(small, capsys):
    assert main(["run", "tokenizer.yaml"]) == 0
    assert capsys.readouterr().err.endswith("runs/tokenizer is finished\n")
    manifest = Path("runs/tokenizer/manifest.json").read_bytes()
    assert main(["run", "tokenizer.yaml"]) == 0
    assert Path("runs/tokenizer/manifest.json").read_bytes() == manifest
    assert capsys.readouterr().err == "runs/tokenizer was finished before; nothing was done\n"


def test_a_shipped_pipeline_dry_runs_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "recipes/debug/pipeline.yaml", "root=here", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "# tinyworld: would run" in printed
    assert "# tokenizer: waits for tinyworld" in printed
    documents = list(yaml.safe_load_all(printed))
    assert documents[0]["output_dir"] == "here/world"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stage: tokeniser", "line 1: stage: 'tokeniser' is not a stage. Did you mean 'tokenizer'"),
        ("vocab_size: 300", "does not say its stage"),
        ("stage: tokenizer\nvocab_sise: 300", "line 2: vocab_sise: .*Did you mean 'vocab_size'"),
        ("stage: tokenizer\nvocab_size: [", "line 2: broken YAML"),
        ("", "is empty"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_one_message_and_exit_code_2(
    small, content, message, capsys
):
    Path("bad.yaml").write_text(content)
    assert main(["run", "bad.yaml"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert error.count("\n") == 1


GOOD_ROW = (
    b'{"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]}\n'
)


@pytest.fixture
def sft_recipe(tmp_path, monkeypatch):
    """sft.yaml with a tiny model and good data, in the working directory."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "base")
    Path("rows.jsonl").write_bytes(GOOD_ROW * 4)
    return write_recipe(
        tmp_path / "sft.yaml",
        stage="sft",
        model_name_or_path="base",
        chat_template="tulu",
        dataset_mixer=[{"path": "rows.jsonl"}],
        max_length=64,
        max_steps=1,
        output_dir="run",
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"messages": [\n', "rows.jsonl, line 3: .*JSON"),
        (b'{"message": []}\n', "rows.jsonl, line 3: .*messages"),
        (b'{"messages": []}\n', "rows.jsonl, line 3: .*(empty|no turn|no message)"),
        (
            b'{"messages": [{"role": "user", "content": "1?"}]}\n',
            "rows.jsonl, line 3: .*assistant",
        ),
        (b'{"messages": [{"role": "robot", "content": "1"}]}\n', "rows.jsonl, line 3: .*robot"),
        (b'{"messages": "\xff"}\n', "rows.jsonl, line 3: .*UTF-8"),
    ],
)
def test_a_bad_row_is_one_message_with_file_and_line(sft_recipe, row, message, capsys):
    Path("rows.jsonl").write_bytes(GOOD_ROW * 2 + row + GOOD_ROW)
    assert_refused(["run", "sft.yaml"], message, capsys)
    assert_refused(["run", "sft.yaml", "--dry-run"], message, capsys)
    assert_refused(["data", "inspect", "sft.yaml"], message, capsys)


def assert_refused(words: list[str], message: str, capsys) -> None:
    """The command ends with exit code 2, and its last line is the message."""
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error.splitlines()[-1]), error
    assert "Traceback" not in error


def test_an_empty_file_a_missing_file_and_a_folder_without_tokenizer_are_refused(
    sft_recipe, capsys
):
    Path("rows.jsonl").write_bytes(b"")
    assert_refused(["run", "sft.yaml"], r"rows\.jsonl.*(empty|no rows|no row)", capsys)
    Path("rows.jsonl").unlink()
    assert_refused(["run", "sft.yaml"], r"rows\.jsonl", capsys)
    Path("rows.jsonl").write_bytes(GOOD_ROW)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("base", name).unlink()
    words = ["run", "sft.yaml", "output_dir=another"]
    assert_refused(words, "base holds no tokenizer", capsys)


def test_a_folder_of_another_run_is_refused_and_left_as_it_is(sft_recipe, capsys):
    assert main(["run", "sft.yaml"]) == 0
    before = Path("run/manifest.json").read_bytes()
    message = "run holds another run .*learning_rate was"
    assert_refused(["run", "sft.yaml", "learning_rate=0.5"], message, capsys)
    assert Path("run/manifest.json").read_bytes() == before


def test_data_inspect_shows_what_is_learnt(sft_recipe, capsys):
    assert main(["data", "inspect", "sft.yaml", "-n", "1"]) == 0
    printed = capsys.readouterr().out
    assert "<|user|>\n1?\n<|assistant|>\n⟦2<|endoftext|>⟧" in printed
    assert not Path("run").exists()


def test_data_inspect_lists_the_documents_of_a_step_of_pretraining(small, capsys):
    mixer = [{"path": "text.jsonl"}]
    write_recipe(
        small / "tokenize.yaml",
        stage="tokenize",
        tokenizer_name_or_path="runs/tokenizer",
        dataset_mixer=mixer,
        output_dir="runs/tokens",
    )
    write_recipe(
        small / "pretrain.yaml",
        stage="pretrain",
        dataset_mixer=[{"path": "runs/tokens"}],
        model="olmo2_1m",
        max_length=16,
        per_device_train_batch_size=2,
        max_steps=3,
        output_dir="runs/base",
    )
    assert main(["run", "tokenizer.yaml"]) == main(["run", "tokenize.yaml"]) == 0
    capsys.readouterr()
    assert main(["data", "inspect", "pretrain.yaml", "--step", "2"]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^sequence \d+$", printed, re.M)) == 2
    assert re.search(r"^  text\.jsonl, line [1-9]$", printed, re.M)
    refused = ["data", "inspect", "pretrain.yaml", "--step", "4"]
    assert_refused(refused, "the run has 3 steps; there is no step 4", capsys)
    refused = ["data", "inspect", "tokenize.yaml", "--step", "1"]
    assert_refused(refused, "--step is for pretrain recipes, not tokenize", capsys)


def test_a_full_disk_is_one_message_and_exit_code_2(small):
    def allow_small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    process = start("run", "tokenizer.yaml", preexec_fn=allow_small_files_only)
    _, error = process.communicate()
    assert process.returncode == 2, error
    assert os.strerror(errno.EFBIG) in error.splitlines()[-1]
    assert "Traceback" not in error


def stop_when_training(process: subprocess.Popen[str], number: signal.Signals, rows: int) -> str:
    """Send a signal once metrics.jsonl has more rows than that; what the process said."""
    while len(rows_of(Path("life/sft/metrics.jsonl"))) <= rows:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)  # between two looks
    process.send_signal(number)
    return process.communicate()[1]


def test_a_stopped_pipeline_says_how_to_go_on_and_the_same_command_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "base")
    write_dialogues(tmp_path / "dialogues.jsonl")
    write_recipe(
        tmp_path / "sft.yaml",
        stage="sft",
        model_name_or_path="base",
        chat_template="tulu",
        dataset_mixer=[{"path": "dialogues.jsonl"}],
        max_length=64,
        max_steps=1_000_000,
        logging_steps=1,
        save_steps=100_000,
        output_dir="${root}/sft",
    )
    write_recipe(tmp_path / "life.yaml", stage="pipeline", output_dir="life", stages=["sft.yaml"])

    process = start("run", "life.yaml")
    said = stop_when_training(process, signal.SIGINT, rows=3)
    assert process.returncode == 130, said
    assert re.search(r"Stopped: .*step \d+.*The same command goes on from there\.\n$", said), said
    assert "Traceback" not in said

    num_rows = len(rows_of(Path("life/sft/metrics.jsonl")))
    process = start("run", "life.yaml")
    said = stop_when_training(process, signal.SIGTERM, rows=num_rows)
    assert process.returncode == 0, said
    assert "[1/1] sft: goes on where it stopped" in said
    steps = [row["step"] for row in rows_of(Path("life/sft/metrics.jsonl"))]
    assert steps == list(range(1, len(steps) + 1))


@pytest.fixture
def verb():
    """Adds a verb to the command line for one test."""
    yield lambda function: cli.command("extra")(function)
    cli.commands.pop("extra", None)


def test_sigterm_outside_a_loop_is_one_message_and_exit_code_143(verb, capsys):
    def terminated() -> None:
        previous = signal.signal(signal.SIGTERM, _stop_now)
        try:
            with contextlib.suppress(Exception):  # code that goes on after any error
                os.kill(os.getpid(), signal.SIGTERM)
        finally:
            signal.signal(signal.SIGTERM, previous)

    verb(terminated)
    assert main(["extra"]) == 143
    assert capsys.readouterr().err == "Stopped. The same command goes on from there.\n"


def test_ctrl_c_outside_a_loop_is_one_message_and_exit_code_130(verb, capsys):
    verb(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main(["extra"]) == 130
    assert capsys.readouterr().err.strip() == "Interrupted."


def test_a_bug_of_ours_keeps_its_traceback(verb):
    verb(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["extra"])


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_python_m_open_instruct_is_the_same_command():
    process = start("--version")
    output, _ = process.communicate()
    assert process.returncode == 0
    assert output.startswith("open-instruct, version")


def test_shipped_folders_are_found():
    assert list(shipped_folder("recipes").rglob("*.yaml"))
    assert list(shipped_folder("chat_templates").glob("*.jinja"))
