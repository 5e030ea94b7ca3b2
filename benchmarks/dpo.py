"""Pairs per second and peak memory of preference tuning: ours and TRL's.

    python -m benchmarks.dpo [--cases hh_harmless rasbt_1100-bf16 …] [--seconds 10] [--threads 2]
    python -m benchmarks.dpo DATA [--bf16] [--vocab-size 8192]

The cases are real pairs and pairs of random ids (``lognormal``: prompts of 120 tokens, answers of
70, at most 512 in all). DATA is any file of pairs that a recipe takes. All candidates see the same
ids and train transformers' Olmo2 (256 wide, 6 layers) with the sigmoid loss against reference
log-probabilities that were computed before, without gradient checkpointing. Each runs in a process
of its own, in turns (``peers.py``).

"matmul rate" is the time that the matrix products of a step with shared prompts take by themselves.
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
from open_instruct.examples import DataConfig, Source, read_pairs
from open_instruct.lengths import encode_pairs
from open_instruct.loop import TrainConfig, Workers, steps_of
from open_instruct.pair_losses import LossConfig
from open_instruct.preference import loss_against
from open_instruct.reference import compute_reference

PROMPT_LENGTH, ANSWER_LENGTH, SIGMA = 120, 70, 0.6
CASES = cases_of(
    {
        "hh_harmless": str(DATA / "preferences" / "hh_harmless.jsonl.gz"),
        "rasbt_1100": str(DATA / "preferences" / "rasbt_1100.json"),
        "lognormal": None,
    }
)


def pairs(options: Namespace) -> list[tuple[Encoded, ...]]:
    """Those of a case, chosen first."""
    if options.data is None:
        return made_up_pairs(options.rows, options.vocab_size)
    source = Source(options.data)
    rows = read_pairs([source], seed=SEED, on_bad_row="drop", counts=ExampleCounts())
    rows = rows[: options.rows]
    texts = [
        message["content"] for row in rows for message in [*row.prompt, *row.chosen, *row.rejected]
    ]
    config = DataConfig(
        dataset_mixer=(source,),
        max_length=MAX_LENGTH,
        on_too_long="drop",
        on_bad_row="drop",
        max_too_long_fraction=1.0,
    )
    encoder = chat_encoder(texts, options.vocab_size)
    return [
        (pair.chosen, pair.rejected)
        for pair in encode_pairs(rows, encoder, config, ExampleCounts())
    ]


def made_up_pairs(number: int, vocab_size: int) -> list[tuple[Encoded, ...]]:
    """Random ids, of which those of the answers are learnt."""
    generator = np.random.default_rng(SEED)

    def lengths(mean: int) -> list[int]:
        drawn = generator.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, number)
        longest = MAX_LENGTH * mean // (PROMPT_LENGTH + ANSWER_LENGTH)
        return np.clip(drawn.round().astype(int), 4, longest).tolist()

    def answered(prompt: list[int], length: int) -> Encoded:
        ids = prompt + generator.integers(2, vocab_size, length).tolist()
        return Encoded(ids, [place >= len(prompt) for place in range(len(ids))])

    made: list[tuple[Encoded, ...]] = []
    for prompt_length, chosen, rejected in zip(
        lengths(PROMPT_LENGTH), lengths(ANSWER_LENGTH), lengths(ANSWER_LENGTH), strict=True
    ):
        prompt = generator.integers(2, vocab_size, prompt_length).tolist()
        made.append((answered(prompt, chosen), answered(prompt, rejected)))
    return made


def our_steps(
    options: Namespace, workers: Workers, examples: Examples, *, packs: bool = True
) -> Steps:
    """Steps as the dpo stage makes them."""
    config = TrainConfig(per_device_train_batch_size=options.batch_size, num_train_epochs=10**4)
    terms = np.ones(len(examples))
    return steps_of(
        examples, terms, config, seed=SEED, cost_of_cut=workers.cost_of_cut(packs=packs)
    )


def run_ours(options: Namespace, *, share_prompts: bool) -> None:
    """The step of the dpo stage."""
    workers = Workers(options.bf16)
    examples = Examples(read_rows(options))
    model = workers.place(small_olmo2(options.vocab_size), options.batching)
    if share_prompts:
        assert model.share_prompts(examples) is None
        examples = examples.sharing_prompts()
    steps = our_steps(options, workers, examples, packs=model.packs)
    reference_P2 = compute_reference(model, examples, workers, options.batch_size, lambda _: None)
    summed_loss = loss_against(reference_P2, LossConfig())
    train_ours(workers, model, steps, summed_loss, 1e-6, steps.num_terms)


def run_products(options: Namespace) -> None:
    """Only the matrix products of our steps."""
    workers = Workers(options.bf16)
    examples = Examples(read_rows(options)).sharing_prompts()
    steps = our_steps(options, workers, examples)

    def size(step: int) -> tuple[int, int, float]:
        numbers = steps.numbers(step)
        positions = int(examples.positions_N[numbers].sum())
        return positions, int(examples.num_labels_NW[numbers].sum()), len(numbers)

    multiply_only(options, map(size, count()), workers.device)


def run_trl(options: Namespace) -> None:
    """TRL's DPOTrainer on the same ids."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class OnIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # it would tokenise what is tokenised

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.num_pairs = len(inputs["input_ids"]) // 2
            return super().training_step(model, inputs, *args, **kwargs)

    rows = []
    for chosen, rejected in read_rows(options):
        length = chosen.is_learnt.index(True)  # the prompt's, of which nothing is learnt
        assert chosen.ids[:length] == rejected.ids[:length]
        rows.append(
            {
                "prompt_ids": chosen.ids[:length],
                "chosen_ids": chosen.ids[length:],
                "rejected_ids": rejected.ids[length:],
            }
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer = OnIds(
            model=small_olmo2(options.vocab_size),
            args=DPOConfig(precompute_ref_log_probs=True, **trl_settings(options, folder)),
            train_dataset=Dataset.from_list(rows),
            processing_class=no_text_tokenizer(options.vocab_size),
        )
        train_trl(trainer, lambda: trainer.num_pairs)


CANDIDATES: dict[str, Callable[[Namespace], None]] = {
    "matmul rate": run_products,
    "ours": lambda options: run_ours(options, share_prompts=True),
    "ours, prompts read twice": lambda options: run_ours(options, share_prompts=False),
    "TRL": run_trl,
}


if __name__ == "__main__":
    description = (__doc__ or "").split("\n")[0]
    main("benchmarks.dpo", description, "pairs", CASES, CANDIDATES, pairs, batch_size=8, rows=256)
