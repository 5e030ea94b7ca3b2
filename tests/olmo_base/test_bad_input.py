"""Damaged shards and full disks: one message each, and nothing that was finished is lost."""

import contextlib
import json
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from olmo_base.__main__ import main
from olmo_base.corpus.batches import read_split
from olmo_base.model.hf_weights import load_native
from tests.olmo_base.test_pretrain import (
    recipe_file,
    start,
    tokens,  # noqa: F401 - a fixture
    wait_for_step,
)


@contextlib.contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    """As on a full disk, the system refuses to write more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def cut_off(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-100])


def swap_bytes(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[::-1])


def say_uint32(shard: Path) -> None:
    description = shard.with_suffix(".json")
    content = json.loads(description.read_text())
    content["dtype"] = "uint32"
    description.write_text(json.dumps(content))


def make_empty(shard: Path) -> None:
    for file in shard.parent.iterdir():
        file.unlink()


@pytest.mark.parametrize("damage", [cut_off, swap_bytes, say_uint32, make_empty])
def test_a_damaged_shard_is_one_message_that_names_it(tokens, tmp_path, capfd, damage):  # noqa: F811
    shutil.copytree(tokens, tmp_path / "tokens")
    shard = tmp_path / "tokens/tokens/train/tokens_00000.bin"
    damage(shard)
    assert main([str(recipe_file(tmp_path / "tokens", tmp_path))]) == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and str(shard.parent) in message
    assert not (tmp_path / "run/model.safetensors").exists()


def test_a_disk_that_is_full_while_tokenizing_is_one_message_and_the_run_goes_on(
    tokens,  # noqa: F811
    tmp_path,
    capfd,
):
    settings = {
        "stage": "tokenize",
        "dataset_mixer": [{"path": str(tokens.parent / "documents.jsonl")}],
        "tokenizer_name_or_path": str(tokens.parent / "tokenizer"),
        "eval_fraction": 0.1,
        "num_proc": 1,
        "output_dir": str(tmp_path / "tokens"),
    }
    recipe = tmp_path / "tokenize.yaml"
    recipe.write_text(json.dumps(settings))
    with files_no_larger_than(8_000):
        assert main([str(recipe)]) == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert "The shards could not be written" in message and "File too large" in message
    assert not (tmp_path / "tokens/tokens").exists()
    assert main([str(recipe)]) == 0
    ours, theirs = (read_split([folder], "train")[0] for folder in (tmp_path / "tokens", tokens))
    assert ours.info == theirs.info


def test_a_disk_that_is_full_at_the_end_keeps_the_checkpoints(tokens, tmp_path, capfd):  # noqa: F811
    recipe = recipe_file(tokens, tmp_path, max_steps=40, save_steps=1000, logging_steps=1)
    process = start(recipe)
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    [checkpoint] = (tmp_path / "run/checkpoints").iterdir()
    with files_no_larger_than(30_000):
        assert main([str(recipe)]) == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert "The model could not be written" in message and "checkpoints are kept" in message
    assert checkpoint.is_dir() and not (tmp_path / "run/config.json").exists()
    assert main([str(recipe)]) == 0
    assert load_native(tmp_path / "run").config.hidden_size == 32
