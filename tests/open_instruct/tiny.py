"""Tiny random models with a byte tokenizer, and data for them, made on the spot."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the control tokens of the tulu template."""
    vocabulary = {token: number for number, token in enumerate(sorted(_alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>"
    )


def _alphabet() -> list[str]:
    return pre_tokenizers.ByteLevel.alphabet()


def tiny_olmo2(seed: int = 0, **changes: Any) -> Olmo2ForCausalLM:
    """A random OLMo-2 of 2 layers, 16 wide."""
    settings: dict[str, Any] = dict(
        vocab_size=256 + len(SPECIAL),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=256,
        pad_token_id=257,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return Olmo2ForCausalLM(Olmo2Config(**(settings | changes)))


def save_tiny_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A model folder as any artefact is, without a chat template."""
    tiny_olmo2(seed, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_dialogues(path: Path, number: int = 24) -> Path:
    """Dialogues of different lengths that a tiny model can learn by heart."""
    return write_jsonl(
        path,
        [
            {
                "messages": [
                    {"role": "user", "content": f"{'say ' * (place % 4)}{place % 7}?"},
                    {"role": "assistant", "content": "ab" * (place % 7 + 1)},
                ]
            }
            for place in range(number)
        ],
    )


def write_pairs(path: Path, number: int = 24) -> Path:
    """The chosen answer is letters, the rejected one digits."""
    return write_jsonl(
        path,
        [
            {
                "prompt": f"{'say ' * (place % 4)}{place % 7}?",
                "chosen": "ab" * (place % 7 + 1),
                "rejected": "12" * (place % 5 + 1),
            }
            for place in range(number)
        ],
    )


def write_rated(path: Path, number: int = 24) -> Path:
    """Letters are good answers, digits bad ones."""
    return write_jsonl(
        path,
        [
            {
                "prompt": f"{'say ' * (place % 4)}{place % 7}?",
                "completion": ("ab" if place % 2 else "12") * (place % 5 + 1),
                "label": bool(place % 2),
            }
            for place in range(number)
        ],
    )


def write_recipe(path: Path, **keys: Any) -> Path:
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, as far as it is written."""
    if not path.exists():
        return []
    complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


# ---------------------------------------------------------------- runs in processes of their own


def start_run(recipe: Path) -> "subprocess.Popen[bytes]":
    """``open-instruct run recipe`` as a user starts it."""
    command = [sys.executable, "-m", "open_instruct", "run", str(recipe)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_after_step(recipe: Path, folder: Path, step: int) -> None:
    """Start the run and SIGKILL it once it has logged this step and has a checkpoint."""
    process = start_run(recipe)
    try:
        while not (
            any(row["step"] >= step for row in rows_of(folder / "metrics.jsonl"))
            and any((folder / "checkpoints").glob("step_*"))
        ):
            assert process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.005)  # between two looks
    finally:
        process.kill()
        process.communicate()
    assert not (folder / "model.safetensors").exists(), "killed too late"


def random_step(name: str) -> int:
    """A step to kill a run at: any, and the same one each time for a name."""
    return random.Random(name).randrange(10, 50)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal to the last bit."""
    assert found.keys() == expected.keys() and expected
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
