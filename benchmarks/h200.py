"""Pretraining on one GPU: tokens per second, MFU and peak memory of OLMo-2 1B at 4,096 tokens.

    python benchmarks/h200.py [--steps 200] [--batch 4] [--tokens FOLDER] [--json FILE]
    python benchmarks/h200.py --device cpu --tiny          the same path, at the size of a test

bf16, compiled, AdamW: plainly, with documents masked, and in 8 bits where torchao is installed;
each kind in a process of its own, so that its peak of memory is its own. The first steps, which
compile and warm up, are not timed. FOLDER is the output_dir of a tokenize run with the model's
tokenizer; without it ids are drawn at random, with a document's end every 512 tokens on average.

MFU counts 6 N + 12 L D T operations per token (model/transformer.py) against the chip's dense bf16
peak, 989 TFLOP/s on an H100 or H200 of the SXM kind.
"""

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch

from olmo_base.compute import compile_layers, in_float8
from olmo_base.corpus.batches import Batch, TokenSequences, read_split
from olmo_base.model.presets import PRESETS
from olmo_base.model.transformer import ModelConfig, Transformer, flops_per_token
from olmo_base.optim import OptimConfig, StepGuard, build_optimizer, clip_gradients
from olmo_base.pretrain_loop import add_gradients
from olmo_base.run.peaks import peak_flops

WARMUP_STEPS = 5
TINY_STEPS = 3
MEAN_DOCUMENT = 512  # tokens
KINDS = {  # name -> documents masked, 8 bits
    "bf16": (False, False),
    "bf16, documents masked": (True, False),
    "float8": (False, True),
}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """What the command line chooses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help="rows of 4,096 tokens in a step")
    parser.add_argument("--tokens", metavar="FOLDER", help="the output_dir of a tokenize run")
    parser.add_argument("--json", metavar="FILE", help="keep the figures here too")
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here. --device cpu --tiny tries the same code on a CPU.")
    if options.device == "cpu" and not options.tiny:
        parser.error("OLMo-2 1B on a CPU takes hours. Say --tiny.")
    return options


def shape_of(options: argparse.Namespace) -> tuple[ModelConfig, int]:
    """The model, and the tokens of a row."""
    config = PRESETS["olmo2_1b"]
    if not options.tiny:
        return config, 4096
    tiny = dataclasses.replace(
        config,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=0,
        pad_token_id=0,
    )
    return tiny, 64


def batch_at(step: int, options: argparse.Namespace, *, mask: bool) -> Batch:
    """The rows of a step."""
    config, length = shape_of(options)
    if options.tokens is not None:
        sequences = TokenSequences(read_split([options.tokens], "train"), length)
        first = step * options.batch
        return sequences.batch(
            [number % len(sequences) for number in range(first, first + options.batch)], mask=mask
        )
    drawn = torch.Generator().manual_seed(step)
    ids_BT1 = torch.randint(config.vocab_size, (options.batch, length + 1), generator=drawn)
    is_end_BT = torch.rand(options.batch, length, generator=drawn) < 1 / MEAN_DOCUMENT
    documents_BT = is_end_BT.long().cumsum(1) if mask else None
    return Batch(ids_BT1[:, :-1].contiguous(), ids_BT1[:, 1:].contiguous(), documents_BT)


def measured(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second, MFU and peak memory of one kind."""
    mask, is_float8 = KINDS[kind]
    device = torch.device(options.device)
    config, length = shape_of(options)
    torch.manual_seed(0)
    with device:
        model = Transformer(config)
    if is_float8:
        model = in_float8(model)
    if not options.tiny:
        compile_layers(model)
    optimizer = build_optimizer(model, OptimConfig(learning_rate=4e-4, weight_decay=0.1))
    guard = StepGuard(device, 6.0)
    num_steps = TINY_STEPS if options.tiny else options.steps
    num_warmup = 1 if options.tiny else WARMUP_STEPS
    num_tokens, started, loss = options.batch * length, 0.0, torch.zeros(())
    for step in range(num_warmup + num_steps):
        if step == num_warmup:
            _wait_for(device)
            started = time.perf_counter()
        batch = batch_at(step, options, mask=mask)
        loss = add_gradients(model, [batch], z_loss=1e-5, bf16=True) / num_tokens
        guard.watch(optimizer, loss, clip_gradients(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
    _wait_for(device)
    seconds = time.perf_counter() - started
    rate = num_steps * num_tokens / seconds
    peak = peak_flops(device, bf16=True)
    is_gpu = device.type == "cuda"
    return {
        "kind": kind,
        "device": torch.cuda.get_device_name(device) if is_gpu else device.type,
        "steps": num_steps,
        "tokens_per_second": rate,
        "mfu": None if peak is None else rate * flops_per_token(config, length) / peak,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if is_gpu else None,
        "loss": float(loss),
    }


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(rows: list[dict[str, Any]]) -> str:
    """For people; the last column is the speed beside that of the first row."""
    lines = ["| | tokens/s | MFU | peak memory | beside bf16 |", "|---|---|---|---|---|"]
    for row in rows:
        mfu = "unknown" if row["mfu"] is None else f"{row['mfu']:.1%}"
        memory = row["peak_memory_bytes"]
        held = "not measured" if memory is None else f"{memory / 2**30:.1f} GiB"
        ratio = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        lines.append(
            f"| {row['kind']} | {row['tokens_per_second']:,.0f} | {mfu} | {held} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Measure each kind and print the table."""
    options = arguments(words)
    kinds = list(KINDS)
    if options.device == "cpu" or importlib.util.find_spec("torchao") is None:
        kinds.remove("float8")
        print("float8 is left out: it needs torchao and a GPU.", file=sys.stderr)
    rows = []
    for kind in kinds:
        if options.tiny:
            rows.append(measured(kind, options))
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measured, (kind, options)))
        print(rows[-1], file=sys.stderr)
    print(table(rows))
    if options.json is not None:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
