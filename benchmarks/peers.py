"""Candidates of a benchmark, each in a process of its own, measured in turns.

A candidate trains in its process as it would alone and calls ``Turns.end_step`` after each step.
There it waits until the parent gives it a turn of some seconds. Turns rotate, so that whatever else
the machine does meets all alike, and the best turn of each counts. A process of its own makes peak
memory comparable.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from open_instruct.encode import ChatEncoder, find_template

SPECIAL = ["<|endoftext|>", "<|pad|>"]
WARM_UP_STEPS = 2
NUM_TURNS = 4
MAX_LENGTH = 512
SEED = 0


# ---------------------------------------------------------------- in the candidate's process


class Turns:
    """What a candidate calls between its steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._warm_up = WARM_UP_STEPS
        self._amount = self._asked_s = self._started = 0.0
        # Libraries write to the standard output what the parent could not understand.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._before_bytes = peak_bytes(device)

    def end_step(self, amount: float) -> bool:
        """Count a step of so many tokens or pairs; False once the benchmark is over."""
        if self._warm_up:
            self._warm_up -= 1
            return bool(self._warm_up) or self._answer({})
        self._amount += amount
        if time.perf_counter() - self._started < self._asked_s:
            return True
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._started
        peak = peak_bytes(self._device)
        return self._answer(
            {
                "rate": self._amount / seconds,
                "peak_bytes": peak,
                "training_bytes": peak - self._before_bytes,
            }
        )

    def _answer(self, content: dict[str, float]) -> bool:
        print(json.dumps(content), file=self._answers, flush=True)
        line = sys.stdin.readline()
        if not line:
            return False
        self._asked_s, self._amount = float(line), 0.0
        self._started = time.perf_counter()
        return True


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: of the GPU where it computes on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def chosen_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def small_olmo2(vocab_size: int) -> Olmo2ForCausalLM:
    """transformers' OLMo-2, 256 wide, 6 layers; the same weights for every candidate."""
    torch.manual_seed(SEED)
    config = Olmo2Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        eos_token_id=0,
        pad_token_id=1,
        use_cache=False,
    )
    return Olmo2ForCausalLM(config)


def chat_encoder(texts: Sequence[str], vocab_size: int) -> ChatEncoder:
    """The tulu template over a byte-level BPE trained on ``texts``."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[1]
    )
    return ChatEncoder(tokenizer, find_template("tulu").read_text(encoding="utf-8"))


def no_text_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """What TRL asks for even where rows are ids already."""
    words = SPECIAL + [f"w{number}" for number in range(len(SPECIAL), vocab_size)]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[1]
    )


def trl_settings(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Keys of SFTConfig and DPOConfig: nothing computed twice, written or shown."""
    return dict(
        output_dir=folder,
        per_device_train_batch_size=options.batch_size,
        max_length=MAX_LENGTH,
        gradient_checkpointing=False,
        bf16=options.bf16,
        use_cpu=chosen_device().type == "cpu",
        max_steps=10**9,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=SEED,
    )


# ---------------------------------------------------------------- in the parent


class Measured(NamedTuple):
    """The best turn of a candidate."""

    rate: float  # a second
    peak_bytes: int
    training_bytes: int  # the peak beyond what it had before its first step


@dataclass
class Candidate:
    """A running process that waits for its turn."""

    name: str
    process: "subprocess.Popen[str]"

    def ask(self, line: str) -> dict[str, float]:
        """Give it a turn (or nothing, to hear that it is ready)."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended by itself with {self.process.wait()}; see above.")
        content: dict[str, float] = json.loads(answer)
        return content


def measure(module: str, names: Sequence[str], seconds: float) -> dict[str, Measured]:
    """Run ``python -m module --candidate NAME`` with this process's arguments, in turns."""
    best: dict[str, Measured] = {}
    with contextlib.ExitStack() as ends:
        candidates = []
        for name in names:
            command = [sys.executable, "-m", module, *sys.argv[1:], "--candidate", name]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            ends.callback(process.kill)
            candidates.append(Candidate(name, process))
            candidates[-1].ask("")  # the next starts when this one has warmed up
        for _ in range(NUM_TURNS):
            for candidate in candidates:
                turn = candidate.ask(f"{seconds / NUM_TURNS}\n")
                found = Measured(turn["rate"], int(turn["peak_bytes"]), int(turn["training_bytes"]))
                if candidate.name not in best or found.rate > best[candidate.name].rate:
                    best[candidate.name] = found
    return best


def print_table(found: dict[str, Measured], ours: str, unit: str) -> None:
    """Rates, how many times faster ours is, and memory."""
    for name, one in found.items():
        print(
            f"{name:<30}{one.rate:>10,.1f} {unit}/s   {ours} / this "
            f"{found[ours].rate / one.rate:5.2f}   peak {one.peak_bytes / 2**20:7,.0f} MiB, "
            f"training {one.training_bytes / 2**20:7,.0f} MiB"
        )


def arguments(description: str, batch_size: int) -> argparse.ArgumentParser:
    """What both benchmarks are asked."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", nargs="?", help="a file of dialogues or pairs; without: made up")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each candidate")
    parser.add_argument("--rows", type=int, default=2048, help="at most so many are read")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="candidates, instead of all")
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    return parser
