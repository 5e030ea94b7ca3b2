"""Candidates of a benchmark, each in a process of its own, measured in turns.

A candidate trains in its process as it would alone and calls ``Turns.end_step`` after each step.
There it waits until the parent gives it a turn of some seconds. Turns rotate, so that whatever else
the machine does meets all alike, and the best turn of each counts. A process of its own makes peak
memory comparable; the parent tokenises for all of them, so that no peak is the tokenizer's.

Rates are per second, and per second of processor time, which other work on the machine touches
less; the two rank alike where nothing else runs.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from olmo_base.optim import OptimConfig, build_optimizer, clip_gradients
from olmo_base.run.heap import keep_freed_memory
from open_instruct.batches import Steps
from open_instruct.control_tokens import Encoded
from open_instruct.encode import ChatEncoder, find_template
from open_instruct.logprobs import LabelLogprobs
from open_instruct.loop import SummedLoss, Totals, Workers, add_gradients

SPECIAL = ["<|endoftext|>", "<|pad|>"]
WARM_UP_STEPS = 2
NUM_TURNS = 4
MAX_LENGTH = 512
SEED = 0
DATA = Path(__file__).parents[2] / "shared" / "data"


class Case(NamedTuple):
    """One line of the table: what is trained on, and in which numbers."""

    data: str | None  # a file; None: made up
    bf16: bool = False
    vocab_size: int = 8192

    def arguments(self) -> list[str]:
        """For a candidate."""
        given = [] if self.data is None else [self.data]
        return [*given, *(["--bf16"] if self.bf16 else []), "--vocab-size", str(self.vocab_size)]


def cases_of(data: dict[str, str | None]) -> dict[str, Case]:
    """Each data set in float32, in bfloat16, and with a large vocabulary."""
    return {
        f"{name}{suffix}": Case(file, bf16, vocab_size)
        for name, file in data.items()
        for suffix, bf16, vocab_size in (
            ("", False, 8192),
            ("-bf16", True, 8192),
            ("-50k", False, 50304),
        )
    }


# ---------------------------------------------------------------- in the candidate's process


class Turns:
    """What a candidate calls between its steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._warm_up = WARM_UP_STEPS
        self._amount = self._asked_s = self._started = self._started_cpu = 0.0
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
        peak = peak_bytes(self._device)
        return self._answer(
            {
                "rate": self._amount / (time.perf_counter() - self._started),
                "cpu_rate": self._amount / (time.process_time() - self._started_cpu),
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
        self._started, self._started_cpu = time.perf_counter(), time.process_time()
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


def train_ours(
    workers: Workers,
    model: LabelLogprobs,
    steps: Steps,
    summed_loss: SummedLoss,
    learning_rate: float,
    amount: Callable[[int], float],
) -> None:
    """The step of our loop: gradients, clipping, update."""
    if workers.device.type == "cpu":
        keep_freed_memory()
    optimizer = build_optimizer(model.model, OptimConfig(learning_rate=learning_rate))
    model.train()
    turns = Turns(workers.device)
    step = 0
    while True:
        batches = steps.micro_batches(step, 0)
        add_gradients(workers, model, batches, steps.num_terms(step), summed_loss, Totals())
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not turns.end_step(amount(step)):
            return
        step += 1


def train_trl(trainer: Any, amount: Callable[[], float]) -> None:
    """``trainer.train()``, waiting for a turn after each step."""
    from transformers import TrainerCallback

    turns = Turns(trainer.args.device)

    class Waiting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_training_stop = not turns.end_step(amount())
            return control

    trainer.add_callback(Waiting())
    trainer.train()


def multiply_only(
    options: argparse.Namespace, sizes: Iterable[tuple[int, int, float]], device: torch.device
) -> None:
    """Only a step's matrix products, forward and backward, attention left out.

    ``sizes`` of each step: positions in the layers, positions in the head, and what it counts for.
    """
    config = small_olmo2(options.vocab_size).config
    D, inner, V = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes = ([(D, D)] * 4 + [(D, inner)] * 2 + [(inner, D)]) * config.num_hidden_layers
    dtype = torch.bfloat16 if options.bf16 else torch.float32

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device, dtype=dtype)

    weights = [matrix(b, a) for a, b in shapes]
    head = matrix(V, D)
    turns = Turns(device)
    for num_positions, num_labels, amount in sizes:
        x = {width: matrix(num_positions, width) for width in (D, inner)}
        products = [(x[weight.shape[1]], weight, x[weight.shape[0]]) for weight in weights]
        products.append((matrix(num_labels, D), head, matrix(num_labels, V)))
        for inputs, weight, gradient in products:
            inputs @ weight.T
            gradient @ weight
            gradient.T @ inputs
        if not turns.end_step(amount):
            return


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


# ---------------------------------------------------------------- the rows, from the parent


def write_rows(path: Path, examples: Sequence[Sequence[Encoded]]) -> None:
    """Tokenised examples, each of one or two sequences, for every candidate."""
    rows = [[[row.ids, list(map(int, row.is_learnt))] for row in rows] for rows in examples]
    path.write_text(json.dumps(rows), encoding="utf-8")


def read_rows(options: argparse.Namespace) -> list[tuple[Encoded, ...]]:
    """What ``write_rows`` wrote."""
    return [
        tuple(Encoded(ids, list(map(bool, is_learnt))) for ids, is_learnt in rows)
        for rows in json.loads(Path(options.rows_file).read_text(encoding="utf-8"))
    ]


# ---------------------------------------------------------------- in the parent


class Measured(NamedTuple):
    """The best turn of a candidate."""

    rate: float  # a second
    cpu_rate: float  # a second of processor time
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


def measure(
    module: str, arguments: Sequence[str], names: Sequence[str], seconds: float
) -> dict[str, Measured]:
    """Run ``python -m module ARGUMENTS --candidate NAME`` for each name, in turns."""
    best: dict[str, Measured] = {}
    with contextlib.ExitStack() as ends:
        candidates = []
        for name in names:
            command = [sys.executable, "-m", module, *arguments, "--candidate", name]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"},
            )
            ends.callback(process.wait)
            ends.callback(process.kill)
            candidates.append(Candidate(name, process))
            candidates[-1].ask("")  # the next starts when this one has warmed up
        for _ in range(NUM_TURNS):
            for candidate in candidates:
                turn = candidate.ask(f"{seconds / NUM_TURNS}\n")
                found = Measured(
                    turn["rate"],
                    turn["cpu_rate"],
                    int(turn["peak_bytes"]),
                    int(turn["training_bytes"]),
                )
                if candidate.name not in best:
                    best[candidate.name] = found
                    continue
                before = best[candidate.name]
                best[candidate.name] = Measured(
                    max(found.rate, before.rate),
                    max(found.cpu_rate, before.cpu_rate),
                    max(found.peak_bytes, before.peak_bytes),
                    max(found.training_bytes, before.training_bytes),
                )
    return best


def print_header(unit: str) -> None:
    """Of the table."""
    print(
        f"{'case':<20}{'candidate':<26}{unit + '/s':>10}{'ours/this':>10}"
        f"{unit + '/cpu s':>14}{'ours/this':>10}{'peak MiB':>10}{'training':>10}"
    )


def print_case(case: str, found: dict[str, Measured], ours: str) -> None:
    """Rates, how many times faster ours is, and memory."""
    for name, one in found.items():
        mine = found.get(ours)
        ratios = (
            ("", "")
            if mine is None
            else (f"{mine.rate / one.rate:.2f}", f"{mine.cpu_rate / one.cpu_rate:.2f}")
        )
        print(
            f"{case:<20}{name:<26}{one.rate:>10,.1f}{ratios[0]:>10}{one.cpu_rate:>14,.1f}"
            f"{ratios[1]:>10}{one.peak_bytes / 2**20:>10,.0f}{one.training_bytes / 2**20:>10,.0f}",
            flush=True,
        )


def main(
    module: str,
    description: str,
    unit: str,
    cases: dict[str, Case],
    candidates: dict[str, Callable[[argparse.Namespace], None]],
    examples: Callable[[argparse.Namespace], list[tuple[Encoded, ...]]],
    *,
    batch_size: int,
    rows: int,
) -> None:
    """Measure every case and print one table; in a candidate's process, train."""
    parser = _arguments(description, list(cases), batch_size, rows)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.candidate:
        candidates[options.candidate](options)
        return
    chosen = {name: cases[name] for name in options.cases}
    if options.data:
        name = Path(options.data).name.partition(".")[0]
        chosen = {name: Case(options.data, options.bf16, options.vocab_size)}
    print(
        f"{chosen_device()}, {torch.get_num_threads()} threads, batch {options.batch_size}, "
        f"at most {options.rows:,} examples of {MAX_LENGTH} tokens"
    )
    passed = ["--batch-size", str(options.batch_size), "--batching", options.batching]
    if options.threads:
        passed += ["--threads", str(options.threads)]
    print_header(unit)
    for name, case in chosen.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            given = parser.parse_args([*case.arguments(), "--rows", str(options.rows)])
            write_rows(file, examples(given))
            arguments = [*case.arguments(), *passed, "--rows-file", str(file)]
            found = measure(module, arguments, options.only or list(candidates), options.seconds)
        print_case(name, found, "ours")


def _arguments(
    description: str, cases: list[str], batch_size: int, rows: int
) -> argparse.ArgumentParser:
    """What both benchmarks are asked."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", nargs="?", help="a file of dialogues or pairs, instead of cases")
    parser.add_argument(
        "--cases", nargs="+", choices=cases, default=cases, metavar="CASE", help=", ".join(cases)
    )
    parser.add_argument("--bf16", action="store_true", help="with data")
    parser.add_argument("--vocab-size", type=int, default=8192, help="with data")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each candidate")
    parser.add_argument("--rows", type=int, default=rows, help="at most so many are read")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="candidates, instead of all")
    parser.add_argument("--batching", choices=("auto", "packed", "grouped"), default="auto")
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    parser.add_argument("--rows-file", help=argparse.SUPPRESS)
    return parser
