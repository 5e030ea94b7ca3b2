"""Several ranks: each kind of parallelism gives one process's losses; what one wrote, all read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from olmo_base.pretrain import run
from tests.olmo_base import ranks
from tests.olmo_base.test_pretrain import recipe_for, rows_of, tokens

__all__ = ["tokens"]  # a fixture
STEPS = 20
KEYS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_steps": STEPS,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "z_loss": 1e-3,
    "max_ngram_repeats": 4,  # ranks lose different numbers of sequences
    "max_eval_tokens": 500,
    "per_device_train_batch_size": 3,  # divides neither a step nor a rank's part of it
    "global_batch_size": 8,
    "gradient_accumulation_steps": 1,
}


@pytest.fixture(scope="module")
def four():
    """Four ranks."""
    started = ranks.Ranks(4)
    yield started
    started.end()


@pytest.fixture(scope="module")
def alone(tokens, tmp_path_factory):
    """The folders of one process's runs, made when asked for."""
    made = {}

    def folder(**keys):
        name = json.dumps(keys, sort_keys=True)
        if name not in made:
            parent = tmp_path_factory.mktemp("alone")
            made[name] = run(recipe_for(tokens, parent, **{**KEYS, **keys})).path
        return made[name]

    return folder


def curve(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(folder) if "loss" in row]


def assert_same(found: Path, expected: Path) -> None:
    """Losses of every step, held-out losses, counts, and the weights at the end."""
    assert len(curve(expected)) == STEPS
    assert curve(found) == pytest.approx(curve(expected), abs=1e-5)
    ours, theirs = rows_of(found), rows_of(expected)
    for key in ("eval_loss", "grad_norm", "tokens", "sequences_left_out", "epoch"):
        values = [row[key] for row in theirs if key in row]
        assert values
        assert [row[key] for row in ours if key in row] == pytest.approx(values, rel=1e-4), key
    weights, whole = (load_file(path / "model.safetensors") for path in (found, expected))
    assert weights.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(weights[name], whole[name], rtol=0, atol=1e-4)


WAYS = {
    "ddp": {},
    "fsdp": {"data_parallel": "fsdp", "gradient_checkpointing": True},
    "hsdp": {"data_parallel": "hsdp", "data_parallel_shards": 2, "mask_documents": True},
    "tensor": {"data_parallel": "fsdp", "tensor_parallel": 2, "mask_documents": True},
    "context": {"context_parallel": 2, "mask_documents": True},
    "all": {"data_parallel": "fsdp", "tensor_parallel": 2, "context_parallel": 2},
}


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("way", WAYS)
def test_several_ranks_give_the_losses_of_one_process(tokens, tmp_path, four, alone, way, optim):
    keys = {**WAYS[way], "optim": optim}
    four.do(run, recipe_for(tokens, tmp_path, **{**KEYS, **keys}))
    shape = {key: keys[key] for key in ("optim", "mask_documents") if key in keys}
    assert_same(tmp_path / "run", alone(**shape))
