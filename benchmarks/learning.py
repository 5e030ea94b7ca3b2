"""Held-out bits per byte against seconds of training: ours, transformers' Trainer, nanochat.

    python benchmarks/learning.py TEXT [TEXT ...] [--nanochat FOLDER] [--seconds 1200] [--threads 2]
        [--plot docs/images/learning.png]

TEXT are JSONL files (or .gz) of documents; the first --megabytes of their text are used, a
twentieth held out. A tokenizer is trained on it and all candidates read the same sequences in the
same order and batch size, in fp32 and this process, one after the other, for the same time.
Held-out text is scored at equal distances; that time does not count, nor does compiling. All
follow their rates' schedules over the part of the time that has passed.

- open-instruct: OLMo-2's shape, Muon, warmup_stable_decay; the embedding starts with numbers of
  size 1 and has 60 times the others' rate, the head starts near zero, Adam's first
  beta is 0.8 (as nanochat's; docs/decisions/2026-11-24-where-embedding-and-head-start.md)
- Trainer: the same shape, AdamW (0.9, 0.95), weight decay 0.1, cosine
- nanochat: its model of the same width, depth and heads, its optimizer with the rates, warmup,
  warmdown and momentum of its base_train.py; no weight decay, the default of setup_optimizer
"""

import argparse
import gzip
import importlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from olmo_base.corpus.batches import Batch, TokenSequences, read_split
from olmo_base.corpus.documents import DocumentSource
from olmo_base.corpus.tokenize import TokenizeRecipe
from olmo_base.corpus.tokenize import run as tokenize
from olmo_base.model.transformer import EndsInit, ModelConfig, Transformer
from olmo_base.optim import (
    OptimConfig,
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
)
from olmo_base.pretrain_loop import add_gradients, summed_loss
from olmo_base.run.artefact import RunConfig
from olmo_base.run.heap import keep_freed_memory
from olmo_base.tokenizer import TokenizerRecipe
from olmo_base.tokenizer import run as train_tokenizer

T = 256
WIDTH, LAYERS, HEADS, INNER = 256, 6, 4, 1024
VOCABULARY = 8192
PARTS = 10_000  # a schedule's steps: how finely the time that has passed is told
SEED = 0
Curve = list[tuple[float, float]]  # seconds, bits per byte


class Text:
    """The sequences that all candidates read, and the held-out ones."""

    def __init__(self, folder: Path, batch_size: int, max_eval_tokens: int) -> None:
        self.train = TokenSequences(read_split([folder], "train"), T)
        self.held_out = TokenSequences(read_split([folder], "eval"), T)
        self.batch_size = batch_size
        self.num_eval = min(len(self.held_out), max(1, max_eval_tokens // T))
        self.vocab_size = -(-self.train.vocab_size // 128) * 128

    def batch(self, step: int) -> Batch:
        """What every candidate reads in step 0, 1, …"""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return self.train.batch(self.train.at(places, seed=SEED), mask=False)

    @torch.no_grad()
    def bits_per_byte(self, summed: Callable[[Batch], torch.Tensor]) -> float:
        """From the loss in nats summed over a batch."""
        nats = 0.0
        for first in range(0, self.num_eval, 16):
            indices = range(first, min(first + 16, self.num_eval))
            nats += float(summed(self.held_out.batch(indices, mask=False)))
        tokens_per_byte = self.held_out.num_tokens / self.held_out.num_bytes
        return nats / (self.num_eval * T) / math.log(2) * tokens_per_byte


class Clock:
    """The seconds of one candidate, and when it is scored."""

    def __init__(self, seconds: float, num_scores: int, score: Callable[[], float]) -> None:
        self.seconds, self._score = seconds, score
        self._due = [seconds * number / num_scores for number in range(num_scores + 1)]
        self._used, self._started = 0.0, time.perf_counter()
        self.curve: Curve = []

    def elapsed(self) -> float:
        """Seconds of training so far."""
        return self._used + time.perf_counter() - self._started

    def part(self) -> int:
        """How many of PARTS have passed."""
        return min(PARTS - 1, int(self.elapsed() / self.seconds * PARTS))

    def goes_on(self) -> bool:
        """Between two steps: scores where it is due; False once the time is over."""
        used = self.elapsed()
        is_over = used >= self.seconds
        if used >= self._due[len(self.curve)]:
            self.curve.append((used, self._score()))
            while len(self.curve) < len(self._due) - 1 and used >= self._due[len(self.curve)]:
                self._due.pop(len(self.curve))  # steps longer than the distance of two scores
            print(f"    {used:8.1f} s   {self.curve[-1][1]:.4f} bits per byte", flush=True)
            self._used, self._started = used, time.perf_counter()
        return not is_over


# ---------------------------------------------------------------- the candidates


def our_curve(text: Text, options: argparse.Namespace) -> Curve:
    """olmo_base's model, loss and Muon."""
    torch.manual_seed(SEED)
    model = Transformer(
        ModelConfig(
            vocab_size=text.vocab_size,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=T,
            eos_token_id=0,
            pad_token_id=0,
        ),
        EndsInit(embedding_init_std=options.embedding_std, head_init_std=options.head_std),
    )
    optim = OptimConfig(
        optim="muon",
        learning_rate=options.muon_rate,
        lr_scheduler_type="warmup_stable_decay",
        decay_ratio=0.6,
        warmup_ratio=0.02,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.95,
        muon_momentum=0.9,
        embedding_lr_ratio=options.embedding_ratio,
    )
    optimizer = build_optimizer(model, optim)
    clock = Clock(
        options.seconds,
        options.scores,
        lambda: text.bits_per_byte(lambda batch: summed_loss(model, batch, z_loss=0.0)[1]),
    )
    step = 0
    while clock.goes_on():
        set_learning_rate(optimizer, learning_rate_at(clock.part(), PARTS, optim))
        add_gradients(model, [text.batch(step)], z_loss=0.0, bf16=False)
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    print(f"    {step:,} steps of {text.batch_size * T:,} tokens")
    return clock.curve


def trainer_curve(text: Text, options: argparse.Namespace) -> Curve:
    """transformers' Olmo2ForCausalLM, Trainer and AdamW."""
    from transformers import (
        Olmo2Config,
        Olmo2ForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Rows(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            step = 0
            while True:
                for ids_T in text.batch(step).ids_BT:
                    yield {"input_ids": ids_T, "labels": ids_T}
                step += 1

    torch.manual_seed(SEED)
    model = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=text.vocab_size,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=T,
            use_cache=False,
            eos_token_id=0,
            pad_token_id=None,
        )
    )

    def summed(batch: Batch) -> torch.Tensor:
        logits_BTV = model(input_ids=batch.ids_BT).logits
        return F.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum")

    optim = OptimConfig(
        learning_rate=options.adamw_rate,
        lr_scheduler_type="cosine",
        min_lr_ratio=0.1,
        warmup_ratio=0.02,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    clock = Clock(options.seconds, options.scores, lambda: text.bits_per_byte(summed))

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = not clock.goes_on()
            return control

    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda _: learning_rate_at(clock.part(), PARTS, optim)
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=10**9,
            per_device_train_batch_size=text.batch_size,
            max_grad_norm=1.0,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=SEED,
        )
        trainer = Trainer(
            model=model,
            args=settings,
            train_dataset=Rows(),
            optimizers=(optimizer, schedule),
            callbacks=[Watch()],
        )
        clock.goes_on()
        trainer.train()
    print(f"    {trainer.state.global_step:,} steps of {text.batch_size * T:,} tokens")
    return clock.curve


def nanochat_curve(text: Text, options: argparse.Namespace) -> Curve:
    """nanochat's GPT, MuonAdamW and schedules of rate, momentum and decay."""
    sys.path.insert(0, options.nanochat)
    gpt: Any = importlib.import_module("nanochat.gpt")
    config = gpt.GPTConfig(
        sequence_len=T,
        vocab_size=text.vocab_size,
        n_layer=LAYERS,
        n_head=HEADS,
        n_kv_head=HEADS,
        n_embd=WIDTH,
    )

    def new_model() -> tuple[Any, Any]:
        torch.manual_seed(SEED)
        model = gpt.GPT(config)
        model.init_weights()
        return model, model.setup_optimizer()

    def step(model: Any, optimizer: Any, batch: Batch) -> None:
        model(batch.ids_BT, batch.labels_BT).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    model, optimizer = new_model()
    for number in range(2):  # its optimizer is compiled in its first step
        step(model, optimizer, text.batch(number))
    model, optimizer = new_model()
    clock = Clock(
        options.seconds,
        options.scores,
        lambda: text.bits_per_byte(
            lambda batch: model(batch.ids_BT, batch.labels_BT, loss_reduction="sum")
        ),
    )
    done = 0
    while clock.goes_on():
        # The defaults of its base_train.py: 40 steps of warmup, the last 65 % of warmdown to 5 %
        left = min(1.0, (1.0 - clock.part() / PARTS) / 0.65)
        rate = min((done + 1) / 40, left + (1.0 - left) * 0.05)
        momentum = min(0.85 + 0.12 * done / 400, 0.97 * left + 0.90 * (1.0 - left))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
            if group["kind"] == "muon":
                group["momentum"] = momentum
        step(model, optimizer, text.batch(done))
        done += 1
    print(f"    {done:,} steps of {text.batch_size * T:,} tokens")
    return clock.curve


# ---------------------------------------------------------------- text in, picture out


def make_corpus(paths: Sequence[str], megabytes: float, folder: Path) -> Path:
    """Train a tokenizer on the text and write its shards."""
    left = int(megabytes * 1e6)
    documents = folder / "documents.jsonl"
    with open(documents, "w", encoding="utf-8") as out:
        for name in paths:
            path = Path(name)
            opened = gzip.open if path.suffix == ".gz" else open
            with opened(path, "rt", encoding="utf-8") as file:
                for line in file:
                    text = json.loads(line)["text"]
                    for start in range(0, len(text), 100_000):  # a whole novel is no held-out text
                        piece = text[start : start + 100_000]
                        if left <= 0:
                            break
                        left -= len(piece.encode())
                        out.write(json.dumps({"text": piece}) + "\n")
    source = (DocumentSource(str(documents)),)
    tokenizer = RunConfig(str(folder / "tokenizer"))
    train_tokenizer(TokenizerRecipe("tokenizer", source, tokenizer, vocab_size=VOCABULARY))
    shards = RunConfig(str(folder / "tokens"))
    tokenize(TokenizeRecipe("tokenize", tokenizer.output_dir, source, shards, eval_fraction=0.05))
    return folder / "tokens"


def plot(curves: dict[str, Curve], path: Path) -> None:
    """Bits per byte against seconds; the first score, of random weights, is left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, curve in curves.items():
        axes.plot(*zip(*curve[1:], strict=True), marker=".", label=f"{name}: {curve[-1][1]:.3f}")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("held-out bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    print(f"{path} is written")


def main() -> None:
    """Train, score, print and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("text", nargs="+")
    parser.add_argument("--nanochat", metavar="FOLDER")
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=1200.0, help="of each candidate")
    parser.add_argument("--scores", type=int, default=20, help="of each candidate, over its time")
    parser.add_argument("--eval-tokens", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--muon-rate", type=float, default=1e-2)
    parser.add_argument("--embedding-ratio", type=float, default=60.0)
    parser.add_argument("--embedding-std", type=float, default=1.0)
    parser.add_argument("--head-std", type=float, default=0.002)
    parser.add_argument("--adamw-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # for all: they share a process
    candidates = {"open-instruct": our_curve, "Trainer, AdamW": trainer_curve}
    if options.nanochat:
        candidates["nanochat"] = nanochat_curve
    curves: dict[str, Curve] = {}
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_corpus(options.text, options.megabytes, Path(folder))
        text = Text(tokens, options.batch_size, options.eval_tokens)
        for name, run_candidate in candidates.items():
            print(name, flush=True)
            curves[name] = run_candidate(text, options)
    for name, curve in curves.items():
        print(f"{name:<16}{curve[-1][1]:.4f} bits per byte after {curve[-1][0]:,.0f} s")
    if options.plot:
        plot(curves, options.plot)


if __name__ == "__main__":
    main()
