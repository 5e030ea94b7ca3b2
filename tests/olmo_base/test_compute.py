"""Compiled layers give the same losses; what this machine cannot compute in is one message."""

import shutil

import pytest

from olmo_base.pretrain import run
from olmo_base.run.errors import UserError
from tests.olmo_base.test_pretrain import recipe_for, rows_of, tokens

__all__ = ["tokens"]  # a fixture


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_layers_give_the_same_losses(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # starting more takes longer
    losses = []
    for torch_compile in (False, True):
        (tmp_path / str(torch_compile)).mkdir()
        recipe = recipe_for(
            tokens,
            tmp_path / str(torch_compile),
            num_hidden_layers=1,
            max_steps=4,
            per_device_eval_batch_size=4,  # the shape of a micro-batch: less to compile
            max_eval_tokens=4 * 16,
            logging_steps=1,
            learning_rate=1e-3,
            mask_documents=True,
            torch_compile=torch_compile,
        )
        rows = rows_of(run(recipe).path)
        losses.append([row[key] for row in rows for key in ("loss", "eval_loss") if key in row])
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_without_a_compiler_compiling_is_one_message(tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="neither g\\+\\+ nor clang\\+\\+ is here"):
        run(recipe_for(tokens, tmp_path, torch_compile=True))


def test_float8_without_torchao_or_a_gpu_is_one_message(tokens, tmp_path):
    with pytest.raises(UserError, match=r"float8 needs (torchao: pip install|a GPU with 8-bit)"):
        run(recipe_for(tokens, tmp_path, float8=True))
