"""Peak memory of a training step on the CPU: what a plan says beside what is measured.

    python -m benchmarks.memory [--cases packed LoRA …] [--shapes small wide] [--lengths short long]

Each case trains a model of random weights in a process of its own, of one thread: four times the
step with the largest micro-batch of the run. Measured is the most memory that the
process held while it trained, beyond what it had before the model was made; by then it has trained
a tiny model, so that libraries are loaded.
"""

import argparse
import ctypes
import gc
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.utils import logging as transformers_logging

from benchmarks.peers import SEED
from olmo_base.optim import OptimConfig, build_optimizer, clip_gradients
from olmo_base.run.heap import keep_freed_memory
from open_instruct.adapters import AdapterConfig, add_adapter, keep_gradients, quantisation
from open_instruct.batches import Examples
from open_instruct.causal_lm import ModelConfig
from open_instruct.control_tokens import Encoded
from open_instruct.loop import (
    Loss,
    Totals,
    TrainConfig,
    Workers,
    add_gradients,
    settle,
    steps_of,
)
from open_instruct.memory import count_parameters, training_memory
from open_instruct.pair_losses import LossConfig
from open_instruct.preference import RatedExamples, loss_against, rated_loss_against
from open_instruct.reward import RowRewards, reward_loss
from open_instruct.sft import SftLossConfig, summed_loss, training_loss

NUM_STEPS = 4
NUM_ROWS = 48
VOCAB_SIZE = 8192
TINY = (64, 1)
SHAPES = {"small": (256, 4), "wide": (512, 6)}  # width, layers
LENGTHS = {"short": (100, 256, 16), "long": (380, 1024, 8)}  # mean, longest; rows of a micro-batch


@dataclass(frozen=True)
class Case:
    """How a step is computed."""

    stage: str = "sft"
    batching: str = "packed"
    architecture: str = "olmo2"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    bf16: bool = False
    is_smoothed: bool = False
    gradient_checkpointing: bool = False


LORA = AdapterConfig(use_peft=True)
QLORA = AdapterConfig(use_peft=True, load_in_4bit=True)
CASES = {
    "packed": Case(),
    "grouped": Case(batching="grouped"),
    "packed, bf16": Case(bf16=True),
    "packed, checkpoints": Case(gradient_checkpointing=True),
    "packed, bf16, checkpoints": Case(bf16=True, gradient_checkpointing=True),
    "packed, label smoothing": Case(is_smoothed=True),
    "Llama, packed": Case(architecture="llama"),
    "Llama, grouped": Case(architecture="llama", batching="grouped"),
    "Llama, packed, bf16": Case(architecture="llama", bf16=True),
    "Llama, checkpoints": Case(architecture="llama", gradient_checkpointing=True),
    "Qwen2, packed": Case(architecture="qwen2"),
    "LoRA": Case(adapter=LORA),
    "LoRA, grouped": Case(adapter=LORA, batching="grouped"),
    "LoRA, bf16": Case(adapter=LORA, bf16=True),
    "LoRA, checkpoints": Case(adapter=LORA, gradient_checkpointing=True),
    "Llama, LoRA": Case(architecture="llama", adapter=LORA),
    "QLoRA": Case(adapter=QLORA),
    "QLoRA, bf16, checkpoints": Case(adapter=QLORA, bf16=True, gradient_checkpointing=True),
    "DPO": Case("dpo"),
    "DPO, LoRA": Case("dpo", adapter=LORA),
    "DPO, bf16": Case("dpo", bf16=True),
    "KTO": Case("kto"),
    "reward": Case("reward", batching="grouped", architecture="llama"),
    "reward, checkpoints": Case(
        "reward", batching="grouped", architecture="llama", gradient_checkpointing=True
    ),
}


def held_bytes(what: str) -> int:
    """Of this process, VmRSS (now) or VmHWM (at most, since ``forget_peak``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status does not say what memory is held: Linux is needed.")


def forget_peak() -> None:
    """From now on VmHWM is the most since now."""
    Path("/proc/self/clear_refs").write_text("5")


def architecture_of(case: Case, shape: tuple[int, int], longest: int) -> Any:
    """The configuration of the model."""
    width, num_layers = shape
    return AutoConfig.for_model(
        case.architecture,
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=2 * longest,
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=1,
        use_cache=False,
    )


def made_up(length: str, answers: int) -> Examples:
    """Rows of random ids, of which the second half is learnt; ``answers`` begin alike."""
    mean, longest, _ = LENGTHS[length]
    generator = np.random.default_rng(SEED)
    drawn = generator.lognormal(np.log(mean) - 0.18, 0.6, NUM_ROWS).round().astype(int)

    def row(prompt: list[int], number: int) -> Encoded:
        ids = prompt + generator.integers(2, VOCAB_SIZE, number - len(prompt)).tolist()
        return Encoded(ids, [place >= len(prompt) for place in range(number)])

    examples = []
    for number in np.clip(drawn, 8, longest).tolist():
        prompt = generator.integers(2, VOCAB_SIZE, number // 2).tolist()
        examples.append(tuple(row(prompt, number) for _ in range(answers)))
    return Examples(examples)


def made_model(case: Case, architecture: Any) -> Any:
    """The model as its stage loads it."""
    torch.manual_seed(SEED)
    if case.stage == "reward":
        architecture.num_labels = 1
        return AutoModelForSequenceClassification.from_config(architecture)
    model: Any = AutoModelForCausalLM.from_config(architecture)
    if case.adapter.is_quantised:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                quantization_config=quantisation(case.adapter, torch.float32),
                device_map={"": "cpu"},
            )
        keep_gradients(model)
    if case.adapter.use_peft:
        model = add_adapter(model, case.adapter, "base", SEED)
    return model


def loss_of(case: Case, examples: Examples, embedding: Any) -> Loss:
    """What the stage minimises."""
    if case.stage == "dpo":
        return loss_against(torch.zeros(len(examples), 2), LossConfig())
    if case.stage == "kto":
        zeros_P = torch.zeros(len(examples))
        is_good_P = torch.arange(len(examples)) % 2 == 0
        rated = RatedExamples(examples, examples, is_good_P)
        return rated_loss_against(zeros_P, zeros_P, rated, LossConfig(loss_type=("kto",)))
    if case.stage == "reward":
        return reward_loss(torch.zeros(len(examples)), None)
    if case.is_smoothed:
        return training_loss(SftLossConfig(label_smoothing_factor=0.1), embedding)
    return summed_loss


def measured(name: str, shape: str, length: str) -> tuple[int, int]:
    """Bytes of one case: estimated, and measured. For a process of its own."""
    trained(CASES[name], TINY, "short")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free and kept would not be measured
    return trained(CASES[name], SHAPES[shape], length)


def trained(case: Case, shape: tuple[int, int], length: str) -> tuple[int, int]:
    """As ``measured``."""
    examples = made_up(length, 2 if case.stage in ("dpo", "reward") else 1)
    longest = LENGTHS[length][1]
    architecture = architecture_of(case, shape, longest)
    workers = Workers(case.bf16)
    before = held_bytes("VmRSS")
    model = made_model(case, architecture)
    embedding = model.get_input_embeddings()
    if case.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    placed: Any
    if case.stage == "reward":
        placed = RowRewards(model)
    else:
        placed = workers.place(model, case.batching, longest)  # type: ignore[arg-type]
    packs = getattr(placed, "packs", False)
    loss = loss_of(case, examples, embedding)
    if case.stage == "dpo":
        assert placed.share_prompts(examples) is None
        examples = examples.sharing_prompts()
    steps = steps_of(
        examples,
        np.ones(len(examples)),
        TrainConfig(per_device_train_batch_size=LENGTHS[length][2] // examples.width),
        seed=SEED,
        cost_of_cut=workers.cost_of_cut(packs=packs),
    )
    sizes = steps.micro_batch_sizes(steps.total, packs=packs)
    largest = max(sizes, key=lambda size: size.positions)
    optimizer = build_optimizer(model, OptimConfig(learning_rate=1e-5))
    placed.train()
    forget_peak()
    for _ in range(NUM_STEPS):
        batches = steps.micro_batches(largest.step, 0)
        add_gradients(
            workers, placed, batches, 1, settle(loss, placed, batches, 1, workers), Totals()
        )
        clip_gradients(placed.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    peak = held_bytes("VmHWM") - before
    estimate = training_memory(
        architecture,
        count_parameters(ModelConfig("base"), case.adapter, architecture),
        sizes,
        way=placed.way,
        gradient_checkpointing=case.gradient_checkpointing,
        needs_distribution=case.is_smoothed,
        adapter=case.adapter,
        bf16=case.bf16,
    )
    return estimate, peak


def main() -> int:
    """Measure each case and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small"], metavar="SHAPE")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=["short"], metavar="ROWS")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the loop does
    transformers_logging.set_verbosity_error()
    print(
        f"{'shape':<7}{'rows':<7}{'case':<27}{'estimate MiB':>14}{'measured MiB':>14}{'ratio':>7}"
    )
    ratios: dict[str, float] = {}
    one_process: Callable[..., Any] = multiprocessing.get_context("fork").Pool
    for shape in options.shapes:
        for length in options.lengths:
            for name in options.cases:
                with one_process(1) as pool:
                    estimate, peak = pool.apply(measured, (name, shape, length))
                ratios[f"{name} ({shape}, {length})"] = estimate / peak
                print(
                    f"{shape:<7}{length:<7}{name:<27}{estimate / 2**20:>14,.0f}"
                    f"{peak / 2**20:>14,.0f}{estimate / peak:>7.2f}",
                    flush=True,
                )
    outside = sum(abs(ratio - 1) > 0.15 for ratio in ratios.values())
    worst = max(ratios, key=lambda name: abs(ratios[name] - 1))
    print(f"{outside} further than 15 % from what is measured; worst: {worst}, {ratios[worst]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
