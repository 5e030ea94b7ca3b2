"""Adapters beside their base say what the merged models say, and share its weights."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from olmo_base.model.generate import load_generator
from olmo_base.run.errors import UserError
from open_instruct.__main__ import main
from open_instruct.chat.engine import Delta, Engine
from open_instruct.chat.sampling import Sampling
from open_instruct.chat.server import load_models
from open_instruct.chat.voices import Sampling as ChatSampling
from open_instruct.chat.voices import open_local
from tests.open_instruct.chat.running import save_chat_model
from tests.open_instruct.tiny import byte_tokenizer

PROMPTS = ("Hello?", "Once upon a time", "x" * 100)


def save_base(folder: Path, kind: str, width: int = 32) -> str:
    """A tiny model: ours, or one that transformers runs."""
    save_chat_model(folder, width=width)
    if kind == "llama":
        torch.manual_seed(1)
        shape: dict[str, Any] = json.loads((folder / "config.json").read_text())
        shape["intermediate_size"] = 2 * width
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        more: dict[str, Any] = dict(
            num_attention_heads=2, max_position_embeddings=640, eos_token_id=256
        )
        LlamaForCausalLM(
            LlamaConfig(**{name: shape[name] for name in names}, **more)
        ).save_pretrained(folder)
    return str(folder)


def save_adapter(folder: Path, base: str, seed: int, **settings: Any) -> str:
    """An adapter that changes what its base says: both of its matrices are random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    shape: dict[str, Any] = dict(r=4, lora_alpha=8, target_modules="all-linear")
    config = peft.LoraConfig(task_type="CAUSAL_LM", **(shape | settings))
    made = peft.get_peft_model(model, config)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    made.save_pretrained(str(folder))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(base) / file, folder)
    return str(folder)


def texts(engine: Engine) -> list[str]:
    """Greedy answers to all prompts at once."""
    pieces: dict[int, list[str]] = {number: [] for number in range(len(PROMPTS))}
    left = threading.Semaphore(0)

    def deliver_to(number: int) -> Any:
        def deliver(delta: Delta) -> None:
            pieces[number].append(delta.text)
            if delta.finish_reason or delta.error:
                left.release()

        return deliver

    for number, prompt in enumerate(PROMPTS):
        sampling = Sampling(max_tokens=20, temperature=0)
        engine.submit(byte_tokenizer().encode(prompt), sampling, deliver_to(number))
    for _ in PROMPTS:
        assert left.acquire(timeout=60)
    return ["".join(pieces[number]) for number in pieces]


@pytest.fixture
def chosen_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["olmo2", "llama"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_adapters_beside_their_base_say_what_the_merged_models_say(
    tmp_path, kind, settings, chosen_threads
):
    base = save_base(tmp_path / "base", kind)
    names = [save_adapter(tmp_path / n, base, seed, **settings) for seed, n in enumerate("ab")]
    models = load_models([base, *names])
    try:
        said = {name: texts(models[name].engine) for name in models}
        for name in (base, *names):
            generator = load_generator(name)  # of an adapter: merged into its base
            ends = models[name].engine.stop_ids
            for prompt, text in zip(PROMPTS, said[name], strict=True):
                ids = byte_tokenizer().encode(prompt)
                (answer,) = generator.generate([ids], max_new_tokens=20, stop_token_ids=tuple(ends))
                assert byte_tokenizer().decode(answer, skip_special_tokens=True) == text
        assert len({tuple(one) for one in said.values()}) == 3
        places = [
            {p.data_ptr() for p in models[name].engine.generator.model.parameters()}
            for name in (base, *names)
        ]
        assert places[0] < places[1] and places[0] < places[2]
    finally:
        for served in models.values():
            served.engine.close()
            served.encoding.shutdown()


def test_an_adapter_that_cannot_be_served_beside_its_base_is_refused(tmp_path):
    base = save_base(tmp_path / "base", "olmo2")
    whole = save_adapter(tmp_path / "whole", base, 0, modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"has modules_to_save.*open-instruct merge"):
        load_models([base, whole])
    name = save_adapter(tmp_path / "foreign", base, 0)
    weights = load_file(f"{name}/adapter_model.safetensors")
    first = sorted(weights)[0]
    save_file(
        {key.replace("layers.0", "layers.9") if key == first else key: item
         for key, item in weights.items()},
        f"{name}/adapter_model.safetensors",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"holds .*layers\.9.* no such linear layer"):
        load_models([base, name])


# ---------------------------------------------------------------- in the terminal


def test_an_adapter_is_put_on_the_model_that_one_talks_with(tmp_path, capsys):
    base = save_base(tmp_path / "base", "olmo2")
    adapter = save_adapter(tmp_path / "a", base, 0)
    words = ["-p", "Hello?", "--temperature", "0", "--max-new-tokens", "12"]

    def said(*more: str) -> str:
        assert main(["chat", *more, *words]) == 0
        return capsys.readouterr().out

    merged = said(adapter)
    assert said(base, "--adapter", adapter) == said("--adapter", adapter) == merged
    both = said(base, "--adapter", adapter, "--compare", base)
    assert both == f"[{base} with {adapter}]\n{merged}[{base}]\n{said(base)}"
    assert main(["chat", "--adapter", base, *words]) == 2
    assert "is no adapter" in capsys.readouterr().err
    assert main(["chat", "x", "--adapter", adapter, "--url", "http://127.0.0.1:1", *words]) == 2
    assert "--adapter is for a model here" in capsys.readouterr().err


def test_one_talks_with_a_model_in_4_bits_and_an_adapter_on_it(tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = save_base(tmp_path / "base", "llama", width=128)  # bitsandbytes packs by 64
    adapter = save_adapter(tmp_path / "a", base, 0)
    for name, on in ((base, None), (base, adapter), (adapter, None)):
        voice = open_local(name, on, in_4bit=True)
        kinds = {type(module).__name__ for module in voice.generator.model.modules()}
        assert "Linear4bit" in kinds
        layers = [place for place, _ in voice.generator.model.named_modules() if "lora_A" in place]
        assert bool(layers) == (adapter in (name, on))
        sampling = ChatSampling(temperature=0.0, max_new_tokens=12)
        pieces = voice.answer([{"role": "user", "content": "Hello?"}], sampling, 0)
        model = voice.generator.model
        prompt = voice.encoder.encode_prompt([{"role": "user", "content": "Hello?"}])
        with torch.no_grad():
            output = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=sorted(voice.encoder.end_of_turn_ids | voice.generator.eos_token_ids),
                pad_token_id=257,
            )
        expected = byte_tokenizer().decode(output[0, len(prompt) :], skip_special_tokens=True)
        assert "".join(pieces) == expected
    assert main(["chat", base, "--load-in-4bit", "-p", "Hello?", "--max-new-tokens", "3"]) == 0
