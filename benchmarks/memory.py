"""Peak memory of a training step on the CPU: what a plan says beside what is measured.

    python -m benchmarks.memory [--cases packed lora …] [--shapes small wide] [--batch 16]

Each case trains a transformers Olmo2 of random weights in a fresh process of one thread: three
steps, all of them the step with the largest micro-batch of the run. Measured is how far the
process's peak grew, from before the model was made.
"""

import argparse
import multiprocessing
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from benchmarks.dpo import made_up_pairs
from benchmarks.peers import SEED, peak_bytes
from benchmarks.sft import made_up_dialogues
from olmo_base.optim import OptimConfig, build_optimizer, clip_gradients
from open_instruct.adapters import AdapterConfig, add_adapter
from open_instruct.batches import Examples
from open_instruct.causal_lm import ModelConfig
from open_instruct.loop import SummedLoss, Totals, TrainConfig, Workers, add_gradients, steps_of
from open_instruct.memory import count_parameters, training_memory
from open_instruct.pair_losses import LossConfig
from open_instruct.preference import loss_against
from open_instruct.sft import SftLossConfig, summed_loss, training_loss

NUM_STEPS = 3
NUM_ROWS = 256
VOCAB_SIZE = 8192
SHAPES = {"small": (256, 6), "wide": (512, 8)}  # width, layers


@dataclass(frozen=True)
class Case:
    """How a step is computed."""

    batching: str = "grouped"
    is_adapted: bool = False
    is_preference: bool = False
    is_smoothed: bool = False
    gradient_checkpointing: bool = False


CASES = {
    "grouped": Case(),
    "packed": Case("packed"),
    "packed, checkpoints": Case("packed", gradient_checkpointing=True),
    "packed, label smoothing": Case("packed", is_smoothed=True),
    "LoRA": Case("auto", is_adapted=True),
    "LoRA, checkpoints": Case("auto", is_adapted=True, gradient_checkpointing=True),
    "DPO, shared prompts": Case("packed", is_preference=True),
}


def measured(name: str, shape: str, batch_size: int) -> tuple[int, int]:
    """Bytes of one case: estimated, and measured. For a process of its own."""
    torch.set_num_threads(1)
    case, (width, num_layers) = CASES[name], SHAPES[shape]
    made_up = made_up_pairs if case.is_preference else made_up_dialogues
    examples = Examples(made_up(NUM_ROWS, VOCAB_SIZE))
    before = peak_bytes(torch.device("cpu"))
    torch.manual_seed(SEED)
    architecture = Olmo2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=1024,
        eos_token_id=0,
        pad_token_id=1,
        use_cache=False,
    )
    model: Any = Olmo2ForCausalLM(architecture)
    adapter = AdapterConfig(use_peft=case.is_adapted)
    if case.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    embedding = model.get_input_embeddings()
    if case.is_adapted:
        model = add_adapter(model, adapter, "base", SEED)
    workers = Workers(False)
    placed = workers.place(model, case.batching)  # type: ignore[arg-type]
    loss: SummedLoss = summed_loss
    if case.is_preference:
        assert placed.share_prompts(examples) is None
        examples = examples.sharing_prompts()
        loss = loss_against(torch.zeros(len(examples), 2), LossConfig())
    if case.is_smoothed:
        loss = training_loss(SftLossConfig(label_smoothing_factor=0.1), embedding)
    steps = steps_of(
        examples,
        np.ones(len(examples)),
        TrainConfig(per_device_train_batch_size=batch_size),
        seed=SEED,
        cost_of_cut=workers.cost_of_cut(packs=placed.packs),
    )
    sizes = steps.micro_batch_sizes(steps.total, packs=placed.packs)
    largest = max(sizes, key=lambda size: size.positions)
    optimizer = build_optimizer(model, OptimConfig(learning_rate=1e-5))
    placed.train()
    for _ in range(NUM_STEPS):
        batches = steps.micro_batches(largest.step, 0)
        add_gradients(workers, placed, batches, 1, loss, Totals())
        clip_gradients(placed.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    peak = peak_bytes(torch.device("cpu")) - before
    estimate = training_memory(
        architecture,
        count_parameters(ModelConfig("base"), adapter, architecture),
        sizes,
        way=placed.way,
        gradient_checkpointing=case.gradient_checkpointing,
        needs_distribution=case.is_smoothed,
        adapter=adapter,
    )
    return estimate, peak


def main() -> int:
    """Measure each case and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small"], metavar="SHAPE")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    print(f"{'shape':<8}{'case':<26}{'estimate MiB':>14}{'measured MiB':>14}{'ratio':>8}")
    for shape in options.shapes:
        for name in options.cases:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                estimate, peak = pool.apply(measured, (name, shape, options.batch))
            print(
                f"{shape:<8}{name:<26}{estimate / 2**20:>14,.0f}{peak / 2**20:>14,.0f}"
                f"{estimate / peak:>8.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
