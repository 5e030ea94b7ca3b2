"""Tokens per second and peak memory of fine-tuning: ours, the matrix products alone, and TRL.

    python -m benchmarks.sft [--cases dolly lognormal-bf16 …] [--seconds 10] [--threads 2]
    python -m benchmarks.sft DATA [--bf16] [--vocab-size 8192]

The cases are real dialogues (``dolly``) and dialogues of random ids of log-normal length (mean 190
tokens, at most 512, the second half of each learnt), in fp32 and bf16, with 8,192 ids and 50,304.
DATA is any file of dialogues that a recipe takes. All candidates see the same ids and labels and
train transformers' Olmo2 (256 wide, 6 layers) without gradient checkpointing; counted are tokens
without padding. Each runs in a process of its own, in turns (``peers.py``).

"matmul rate" is the time that a step's matrix products take by themselves, forward and backward,
over its tokens without padding and with the head at its labels only; attention is left out.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np

from benchmarks.peers import (
    DATA,
    MAX_LENGTH,
    SEED,
    cases_of,
    chat_encoder,
    main,
    multiply_only,
    no_text_tokenizer,
    read_rows,
    small_olmo2,
    train_ours,
    train_trl,
    trl_settings,
)
from olmo_base.run.artefact import ExampleCounts
from open_instruct.batches import Examples, Steps
from open_instruct.control_tokens import Encoded
from open_instruct.examples import DataConfig, Source, read_dialogues
from open_instruct.lengths import encode_dialogues
from open_instruct.loop import TrainConfig, Workers, steps_of
from open_instruct.sft import summed_loss

MEAN_LENGTH, SIGMA = 190, 0.6
CASES = cases_of({"dolly": str(DATA / "dialogues" / "dolly.jsonl.gz"), "lognormal": None})


def dialogues(options: Namespace) -> list[tuple[Encoded, ...]]:
    """Those of a case."""
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
    encoder = chat_encoder(texts, options.vocab_size)
    return [(row,) for row in encode_dialogues(rows, encoder, config, ExampleCounts())]


def made_up_dialogues(number: int, vocab_size: int) -> list[tuple[Encoded, ...]]:
    """Random ids; the second half of each is learnt."""
    generator = np.random.default_rng(SEED)
    centre = np.log(MEAN_LENGTH) - SIGMA**2 / 2
    drawn = generator.lognormal(centre, SIGMA, number).round().astype(int)
    return [
        (
            Encoded(
                generator.integers(2, vocab_size, length).tolist(),
                [place >= length // 2 for place in range(length)],
            ),
        )
        for length in np.clip(drawn, 8, MAX_LENGTH).tolist()
    ]


def our_steps(options: Namespace, workers: Workers, *, packs: bool = True) -> Steps:
    """Steps as the sft stage makes them."""
    examples = Examples(read_rows(options))
    config = TrainConfig(per_device_train_batch_size=options.batch_size, num_train_epochs=10**4)
    terms = examples.num_labels_NW.sum(axis=1)
    cost = workers.cost_of_cut(packs=packs)
    return steps_of(examples, terms, config, seed=SEED, cost_of_cut=cost)


def run_ours(options: Namespace) -> None:
    """The step of the sft stage."""
    workers = Workers(options.bf16)
    model = workers.place(small_olmo2(options.vocab_size), options.batching)
    steps = our_steps(options, workers, packs=model.packs)
    train_ours(workers, model, steps, summed_loss, 1e-5, steps.num_tokens)


def run_products(options: Namespace) -> None:
    """Only the matrix products of our steps."""
    workers = Workers(options.bf16)
    steps = our_steps(options, workers)
    sizes = (
        (steps.num_tokens(step), steps.num_terms(step), steps.num_tokens(step)) for step in count()
    )
    multiply_only(options, sizes, workers.device)


def run_trl(options: Namespace, *, packing: bool) -> None:
    """TRL's SFTTrainer on the same ids."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.num_tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
            return super().training_step(model, inputs, *args, **kwargs)

    rows = [
        {"input_ids": row.ids, "completion_mask": [int(is_learnt) for is_learnt in row.is_learnt]}
        for (row,) in read_rows(options)
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
        train_trl(trainer, lambda: trainer.num_tokens)


CANDIDATES: dict[str, Callable[[Namespace], None]] = {
    "matmul rate": run_products,
    "ours": run_ours,
    "TRL": lambda options: run_trl(options, packing=False),
    "TRL, packing": lambda options: run_trl(options, packing=True),
}


if __name__ == "__main__":
    description = (__doc__ or "").split("\n")[0]
    main(
        "benchmarks.sft",
        description,
        "tokens",
        CASES,
        CANDIDATES,
        dialogues,
        batch_size=16,
        rows=2048,
    )
