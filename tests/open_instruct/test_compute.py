"""Compiled layers give what the layers give, and what cannot be compiled or computed is told."""

import shutil

import pytest
import torch
import torch._inductor.config
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from olmo_base.run.errors import UserError
from olmo_base.run.recipe import load_recipe
from open_instruct import sft
from open_instruct.adapters import AdapterConfig, add_adapter
from open_instruct.batches import Examples
from open_instruct.causal_lm import ModelConfig
from open_instruct.compute import compile_layers, refuse_uncompilable, take_liger_kernels
from open_instruct.control_tokens import Encoded
from open_instruct.logprobs import LabelLogprobs
from open_instruct.loop import Workers, seed_step
from open_instruct.reward import RowRewards
from tests.open_instruct.tiny import (
    assert_same_weights,
    save_tiny_model,
    tiny_olmo2,
    weights_of,
    write_dialogues,
    write_recipe,
)

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def one_compiling_process():
    with torch._inductor.config.patch(compile_threads=1):  # starting more takes longer
        yield


def tiny_llama(num_labels=None):
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    if num_labels is None:
        return LlamaForCausalLM(config)
    config.num_labels = num_labels
    return AutoModelForSequenceClassification.from_config(config)


def native():
    return LabelLogprobs(tiny_olmo2(num_hidden_layers=1))


def padded():
    return LabelLogprobs(tiny_llama(), packs=False)


def adapted():
    adapter = AdapterConfig(use_peft=True, lora_r=2, lora_dropout=0.0)
    placed = LabelLogprobs(add_adapter(tiny_llama(), adapter, "base", 0))
    assert placed.packs
    return placed


def rewards():
    return RowRewards(tiny_llama(num_labels=1))


def batches_of_unlike_lengths():
    generator = torch.Generator().manual_seed(0)
    rows = [
        (Encoded(torch.randint(3, 61, (length,), generator=generator).tolist(), [True] * length),)
        for length in (9, 23, 5, 17, 9, 12, 31)
    ]
    examples = Examples(rows)
    return [examples.batch(numbers) for numbers in ([0, 1, 2], [3, 4], [5, 6, 0, 2])]


def sums_and_gradients(model, batch):
    model.train()
    model.zero_grad()
    values = model(batch)
    (values * torch.linspace(0.5, 1.5, len(values))).sum().backward()
    found = {
        name: weight.grad.clone()
        for name, weight in model.model.named_parameters()
        if weight.grad is not None
    }
    return values.detach(), found


@pytest.mark.parametrize(
    ("make", "backend"),
    [
        pytest.param(native, "inductor", marks=needs_compiler),
        # Without C++, which takes half a minute each: what is captured is the same.
        (padded, "aot_eager"),
        (adapted, "aot_eager"),
        (rewards, "aot_eager"),
    ],
)
def test_compiled_layers_give_the_same_gradients_at_every_length(make, backend):
    first, *others = batches_of_unlike_lengths()
    plain, compiled = make(), make()
    names = list(compiled.model.state_dict())
    compile_layers(compiled, [first], torch.device("cpu"), backend=backend)
    assert list(compiled.model.state_dict()) == names
    assert all(weight.grad is None for weight in compiled.parameters())
    counters = torch._dynamo.utils.counters["stats"]
    num_compiled = counters["unique_graphs"]
    assert num_compiled > 0
    for batch in (first, *others):
        expected, expected_gradients = sums_and_gradients(plain, batch)
        found, gradients = sums_and_gradients(compiled, batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-5)
    assert counters["unique_graphs"] == num_compiled  # other lengths compile nothing


@needs_compiler
def test_a_compiled_run_that_is_killed_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "base", num_hidden_layers=1)
    write_dialogues(tmp_path / "dialogues.jsonl")

    def recipe_of(output_dir):
        path = write_recipe(
            tmp_path / f"{output_dir}.yaml",
            stage="sft",
            model_name_or_path="base",
            chat_template="tulu",
            dataset_mixer=[{"path": "dialogues.jsonl"}],
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            save_steps=1,
            torch_compile=True,
            output_dir=output_dir,
        )
        return load_recipe(sft.SftRecipe, path)

    class Killed(BaseException):
        """As SIGKILL: nobody cleans up."""

    steps = iter(range(9))

    def kill_at_the_fourth(*given):
        if next(steps) == 3:
            raise Killed
        seed_step(*given)

    with monkeypatch.context() as patch:
        patch.setattr("open_instruct.loop.seed_step", kill_at_the_fourth)
        with pytest.raises(Killed):
            sft.run(recipe_of("killed"))
    torch._dynamo.reset()  # another process
    sft.run(recipe_of("killed"))
    torch._dynamo.reset()
    sft.run(recipe_of("whole"))
    assert "going on from" in (tmp_path / "killed" / "train.log").read_text(encoding="utf-8")
    assert_same_weights(weights_of(tmp_path / "killed"), weights_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("key", "adapter"),
    [
        ("load_in_4bit", AdapterConfig(use_peft=True, load_in_4bit=True)),
        ("load_in_8bit", AdapterConfig(use_peft=True, load_in_8bit=True)),
    ],
)
def test_few_bits_are_not_compiled(key, adapter):
    config = ModelConfig("base", torch_compile=True)
    refuse_uncompilable(ModelConfig("base"), adapter, Workers(False))
    with pytest.raises(UserError, match=f"torch_compile does not go with {key}"):
        refuse_uncompilable(config, adapter, Workers(False))


def test_without_a_compiler_compiling_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="neither g\\+\\+ nor clang\\+\\+ is here"):
        refuse_uncompilable(
            ModelConfig("base", torch_compile=True), AdapterConfig(), Workers(False)
        )


def test_liger_on_a_cpu_is_left_out_or_refused():
    model, workers = tiny_llama(), Workers(False)
    assert take_liger_kernels(model, False, workers) is None
    if workers.device.type != "cpu":
        pytest.skip("a GPU is here")
    assert take_liger_kernels(model, "auto", workers) is None
    with pytest.raises(UserError, match=r"liger_kernel: true, but its kernels are for CUDA GPUs"):
        take_liger_kernels(model, True, workers)
