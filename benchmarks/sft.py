"""Tokens per second and peak memory of fine-tuning: ours, the matrix products alone, and TRL.

    python -m benchmarks.sft [DATA] [--bf16] [--vocab-size 8192] [--seconds 40] [--threads 2]

DATA is any file of dialogues that a recipe takes; without it dialogues of random ids are made up,
their lengths log-normal (mean 190 tokens, at most 512), one half of each learnt. All candidates
see the same ids and labels and train transformers' Olmo2 (256 wide, 6 layers) without gradient
checkpointing; counted are tokens without padding. Each runs in a process of its own, in turns
(``peers.py``).

"matmul rate" is the time that a step's matrix products take by themselves, forward and backward,
over its tokens without padding and with the head at its labels only; attention is left out.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.peers import (
    MAX_LENGTH,
    SEED,
    Turns,
    arguments,
    chat_encoder,
    chosen_device,
    measure,
    no_text_tokenizer,
    print_table,
    small_olmo2,
    trl_settings,
)
from olmo_base.optim import OptimConfig, build_optimizer, clip_gradients
from olmo_base.run.artefact import ExampleCounts
from open_instruct.batches import Examples, Steps
from open_instruct.control_tokens import Encoded
from open_instruct.examples import DataConfig, Source, read_dialogues
from open_instruct.lengths import encode_dialogues
from open_instruct.loop import Totals, TrainConfig, Workers, add_gradients, steps_of
from open_instruct.sft import summed_loss

MEAN_LENGTH, SIGMA = 190, 0.6


def dialogues(options: Namespace) -> list[Encoded]:
    """The same for every candidate."""
    if options.data is None:
        return made_up_dialogues(options.rows, options.vocab_size)
    source = Source(options.data)
    rows = read_dialogues([source], seed=SEED, on_bad_row="drop", counts=ExampleCounts())
    rows = rows[: options.rows]
    texts = [message["content"] for row in rows for message in row.messages]
    config = DataConfig(
        dataset_mixer=(source,),
        max_length=MAX_LENGTH,
        on_too_long="truncate_right",
        on_bad_row="drop",
        max_too_long_fraction=1.0,
    )
    return encode_dialogues(rows, chat_encoder(texts, options.vocab_size), config, ExampleCounts())


def made_up_dialogues(number: int, vocab_size: int) -> list[Encoded]:
    """Random ids; the second half of each is learnt."""
    generator = np.random.default_rng(SEED)
    centre = np.log(MEAN_LENGTH) - SIGMA**2 / 2
    drawn = generator.lognormal(centre, SIGMA, number).round().astype(int)
    return [
        Encoded(
            generator.integers(2, vocab_size, length).tolist(),
            [place >= length // 2 for place in range(length)],
        )
        for length in np.clip(drawn, 8, MAX_LENGTH).tolist()
    ]


def our_steps(options: Namespace, workers: Workers) -> Steps:
    """Steps as the sft stage makes them."""
    examples = Examples([(dialogue,) for dialogue in dialogues(options)])
    config = TrainConfig(per_device_train_batch_size=options.batch_size, num_train_epochs=10**4)
    terms = examples.num_labels_NW.sum(axis=1)
    return steps_of(examples, terms, config, seed=SEED, cost_of_cut=workers.cost_of_cut())


def run_ours(options: Namespace) -> None:
    """The step of the sft stage: gradients, clipping, update."""
    workers = Workers(options.bf16)
    steps = our_steps(options, workers)
    model = workers.place(small_olmo2(options.vocab_size))
    optimizer = build_optimizer(model.model, OptimConfig(learning_rate=1e-5))
    model.train()
    turns = Turns(workers.device)
    step = 0
    while True:
        batches = steps.micro_batches(step, 0)
        add_gradients(workers, model, batches, steps.num_terms(step), summed_loss, Totals())
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not turns.end_step(steps.num_tokens(step)):
            return
        step += 1


def run_trl(options: Namespace, *, packing: bool) -> None:
    """TRL's SFTTrainer on the same ids."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Counting(SFTTrainer):
        turns: Turns

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.num_tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
            return super().training_step(model, inputs, *args, **kwargs)

    rows = [
        {"input_ids": row.ids, "completion_mask": [int(is_learnt) for is_learnt in row.is_learnt]}
        for row in dialogues(options)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Counting(
            model=small_olmo2(options.vocab_size),
            args=SFTConfig(
                packing=packing, completion_only_loss=True, **trl_settings(options, folder)
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=no_text_tokenizer(options.vocab_size),
        )
        train_in_turns(trainer, lambda: trainer.num_tokens)


def train_in_turns(trainer: Any, amount: Callable[[], float]) -> None:
    """``trainer.train()``, waiting for a turn after each step."""
    from transformers import TrainerCallback

    turns = Turns(trainer.args.device)

    class Waiting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_training_stop = not turns.end_step(amount())
            return control

    trainer.add_callback(Waiting())
    trainer.train()


def run_products(options: Namespace) -> None:
    """Only the matrix products of our steps."""
    workers = Workers(options.bf16)
    steps = our_steps(options, workers)
    config = small_olmo2(options.vocab_size).config
    D, inner, V = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes = ([(D, D)] * 4 + [(D, inner)] * 2 + [(inner, D)]) * config.num_hidden_layers
    dtype = torch.bfloat16 if options.bf16 else torch.float32

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=workers.device, dtype=dtype)

    weights = [matrix(b, a) for a, b in shapes]
    head = matrix(V, D)
    turns = Turns(workers.device)
    step = 0
    while True:
        num_tokens, num_labels = steps.num_tokens(step), steps.num_terms(step)
        x = {width: matrix(num_tokens, width) for width in (D, inner)}
        products = [(x[weight.shape[1]], weight, x[weight.shape[0]]) for weight in weights]
        products.append((matrix(num_labels, D), head, matrix(num_labels, V)))
        for inputs, weight, gradient in products:
            inputs @ weight.T
            gradient @ weight
            gradient.T @ inputs
        if not turns.end_step(num_tokens):
            return
        step += 1


CANDIDATES: dict[str, Callable[[Namespace], None]] = {
    "matmul rate": run_products,
    "ours": run_ours,
    "TRL": lambda options: run_trl(options, packing=False),
    "TRL, packing": lambda options: run_trl(options, packing=True),
}


def main() -> None:
    """Measure and print; in a candidate's process, train."""
    options = arguments((__doc__ or "").split("\n")[0], batch_size=16).parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.candidate:
        CANDIDATES[options.candidate](options)
        return
    lengths = [len(row.ids) for row in dialogues(options)]
    precision = "bf16" if options.bf16 else "fp32"
    print(
        f"{chosen_device()}, {torch.get_num_threads()} threads, {precision}, vocabulary "
        f"{options.vocab_size:,}; {options.data or 'made-up dialogues'}: {len(lengths):,} of "
        f"{np.mean(lengths):.0f} tokens, the longest {max(lengths)}; batch {options.batch_size}"
    )
    found = measure("benchmarks.sft", options.only or list(CANDIDATES), options.seconds)
    print_table(found, "ours", "tokens")


if __name__ == "__main__":
    main()
