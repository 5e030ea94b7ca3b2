"""Tokens per second of one pretraining step: ours, the matrix products alone, and peers.

    python benchmarks/pretrain.py [--bf16] [--nanochat FOLDER] [--seconds 20] [--threads 2]
        [--apart]

All run in this process on the same batch, in turns, each turn long enough to settle; the best of
the turns counts, since whatever else the machine does can only slow a turn down. Printed as a
table with ratios. FOLDER is a checkout of nanochat, of which the model is taken and given AdamW.
The process keeps freed memory, as the pretraining loop's does: all candidates gain from it. With
``--apart`` each has a process of its own, and peers the memory that they have without us.

"matmul rate" is the time that the step's matrix products and attention take by themselves, forward
and backward, at the very shapes of the step: what a step without any other work would need.
"""

import argparse
import contextlib
import importlib
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from olmo_base.corpus.batches import Batch
from olmo_base.model.transformer import ModelConfig, Transformer, flops_per_token
from olmo_base.optim import OptimConfig, build_optimizer, clip_gradients
from olmo_base.pretrain_loop import add_gradients
from olmo_base.run.heap import keep_freed_memory

B, T = 8, 256
SHAPE = ModelConfig(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    eos_token_id=0,
    pad_token_id=0,
)
Step = Callable[[], object]
OURS = "open-instruct"
NUM_TURNS = 5


def our_step(device: torch.device, batch: Batch, *, bf16: bool, optim: str) -> Step:
    """The step of olmo_base.pretrain_loop: loss, gradients, clipping, update."""
    model = Transformer(SHAPE).to(device)
    config = OptimConfig(learning_rate=1e-3, optim=optim)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, config, bf16=bf16)

    def step() -> None:
        add_gradients(model, [batch], z_loss=0.0, bf16=bf16)
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_of(
    model: torch.nn.Module, loss_of: Callable[[], torch.Tensor], device: torch.device, *, bf16: bool
) -> Step:
    """The same step around another model, with torch's fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_step(device: torch.device, batch: Batch, *, bf16: bool) -> Step:
    """Olmo2ForCausalLM with its own loss and scaled-dot-product attention."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        num_hidden_layers=SHAPE.num_hidden_layers,
        num_attention_heads=SHAPE.num_attention_heads,
        max_position_embeddings=SHAPE.max_position_embeddings,
        use_cache=False,
    )
    model = Olmo2ForCausalLM(config).train()
    model.to(device)
    labels = torch.cat([batch.ids_BT[:, :1], batch.labels_BT], 1)[:, :T].to(device)
    ids = batch.ids_BT.to(device)
    return step_of(model, lambda: model(input_ids=ids, labels=labels).loss, device, bf16=bf16)


def nanochat_step(folder: str, device: torch.device, batch: Batch, *, bf16: bool) -> Step:
    """nanochat's GPT of the same width, depth and heads, with AdamW."""
    sys.path.insert(0, folder)
    gpt = importlib.import_module("nanochat.gpt")
    config = gpt.GPTConfig(
        sequence_len=T,
        vocab_size=SHAPE.vocab_size,
        n_layer=SHAPE.num_hidden_layers,
        n_head=SHAPE.num_attention_heads,
        n_kv_head=SHAPE.num_attention_heads,
        n_embd=SHAPE.hidden_size,
    )
    model = gpt.GPT(config).to(device)
    with contextlib.suppress(AttributeError):
        model.init_weights()
    if not bf16:
        model = model.float()
    ids, labels = batch.ids_BT.to(device), batch.labels_BT.to(device)
    return step_of(model, lambda: model(ids, labels), device, bf16=bf16)


def products_step(device: torch.device, *, bf16: bool) -> Step:
    """Only the step's matrix products and attention, forward and backward."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    D, inner, V, N = SHAPE.hidden_size, SHAPE.intermediate_size, SHAPE.vocab_size, B * T
    shapes = [(D, D)] * 4 + [(D, inner)] * 2 + [(inner, D)]
    products = [
        (
            torch.randn(N, a, device=device, dtype=dtype),
            torch.randn(b, a, device=device, dtype=dtype),
        )
        for a, b in shapes
    ]
    head = (
        torch.randn(N, D, device=device, dtype=dtype),
        torch.randn(V, D, device=device, dtype=dtype),
    )
    outputs = {b: torch.randn(N, b, device=device, dtype=dtype) for b in {D, inner, V}}
    heads = SHAPE.num_attention_heads
    q, k, v = (
        torch.randn(B, heads, T, D // heads, device=device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    )
    given = torch.randn(B, heads, T, D // heads, device=device, dtype=dtype)

    def product(x: torch.Tensor, weight: torch.Tensor) -> None:
        gradient = outputs[weight.shape[0]]
        x @ weight.T
        gradient @ weight
        gradient.T @ x

    def step() -> None:
        for _ in range(SHAPE.num_hidden_layers):
            for x, weight in products:
                product(x, weight)
            F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(given)
        product(*head)

    return step


def turn(step: Step, seconds: float, device: torch.device) -> float:
    """Tokens per second over so many seconds and at least two steps."""
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds or count < 2:
        step()
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count * B * T / (time.perf_counter() - started)


def best_turns(turns: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The best turn of each, the turns taken in rotation."""
    best = dict.fromkeys(turns, 0.0)
    for _ in range(NUM_TURNS):
        for name, take_turn in turns.items():
            best[name] = max(best[name], take_turn())
    return best


class OwnProcess:
    """One candidate in a process of its own, which waits between its turns."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, *sys.argv, "--candidate", name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def turn(self) -> float:
        """Tokens per second."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def end(self) -> None:
        """Let it go."""
        self._process.communicate()


def candidates(options: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Step]]:
    """What is measured, each to be built when it is wanted."""
    torch.manual_seed(0)
    ids = torch.randint(1, SHAPE.vocab_size, (B, T + 1))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None).to(device)
    bf16 = options.bf16
    found: dict[str, Callable[[], Step]] = {
        "matmul rate": lambda: products_step(device, bf16=bf16),
        OURS: lambda: our_step(device, batch, bf16=bf16, optim="adamw"),
        f"{OURS}, muon": lambda: our_step(device, batch, bf16=bf16, optim="muon"),
        "transformers": lambda: transformers_step(device, batch, bf16=bf16),
    }
    if options.nanochat:
        found["nanochat"] = lambda: nanochat_step(options.nanochat, device, batch, bf16=bf16)
    return found


def warmed(build: Callable[[], Step]) -> Step:
    """A candidate after its first steps."""
    step = build()
    for _ in range(2):
        step()
    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--nanochat", metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each candidate")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--apart", action="store_true", help="each in a process of its own")
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = options.seconds / NUM_TURNS
    builders = candidates(options, device)
    if options.candidate:
        if device.type == "cpu" and options.candidate.startswith((OURS, "matmul")):
            keep_freed_memory()
        step = warmed(builders[options.candidate])
        for _ in sys.stdin:
            print(turn(step, seconds, device), flush=True)
        return
    if options.apart:
        processes = {name: OwnProcess(name) for name in builders}
        found = best_turns({name: process.turn for name, process in processes.items()})
        for process in processes.values():
            process.end()
    else:
        if device.type == "cpu":
            keep_freed_memory()
        steps = {name: warmed(build) for name, build in builders.items()}
        found = best_turns(
            {name: partial(turn, step, seconds, device) for name, step in steps.items()}
        )
    ours = found[OURS]
    precision = "bf16" if options.bf16 else "fp32"
    where = "each in its own process" if options.apart else "in one process"
    print(f"{device}, {torch.get_num_threads()} threads, {precision}, {B} x {T} tokens, {where}")
    for name, rate in found.items():
        print(f"{name:<22}{rate:>10,.0f} tokens/s   ours / this {ours / rate:.2f}")
    print(f"ours: {ours * flops_per_token(SHAPE, T) / 1e9:,.0f} GFLOP/s")


if __name__ == "__main__":
    main()
