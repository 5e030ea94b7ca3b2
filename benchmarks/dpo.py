"""Pairs per second and peak memory of preference tuning: ours and TRL's.

    python -m benchmarks.dpo [DATA] [--bf16] [--vocab-size 8192] [--seconds 40] [--threads 2]

DATA is any file of pairs that a recipe takes; without it pairs of random ids are made up, with
log-normal lengths (prompts of 120 tokens, answers of 70, at most 512 in all). Both sides see the
same ids and train transformers' Olmo2 (256 wide, 6 layers) with the sigmoid loss against reference
log-probabilities that were computed before, without gradient checkpointing. Each runs in a process
of its own, in turns (``peers.py``).
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
from benchmarks.sft import train_in_turns
from olmo_base.optim import OptimConfig, build_optimizer, clip_gradients
from olmo_base.run.artefact import ExampleCounts
from open_instruct.batches import Examples
from open_instruct.control_tokens import Encoded
from open_instruct.encode import EncodedPair
from open_instruct.examples import DataConfig, Source, read_pairs
from open_instruct.lengths import encode_pairs
from open_instruct.loop import Totals, TrainConfig, Workers, add_gradients, steps_of
from open_instruct.pair_losses import LossConfig
from open_instruct.preference import loss_against
from open_instruct.reference import compute_reference

PROMPT_LENGTH, ANSWER_LENGTH, SIGMA = 120, 70, 0.6


def pairs(options: Namespace) -> list[EncodedPair]:
    """The same for every candidate."""
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
    return encode_pairs(rows, chat_encoder(texts, options.vocab_size), config, ExampleCounts())


def made_up_pairs(number: int, vocab_size: int) -> list[EncodedPair]:
    """Random ids, of which those of the answers are learnt."""
    generator = np.random.default_rng(SEED)

    def lengths(mean: int) -> list[int]:
        drawn = generator.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, number)
        longest = MAX_LENGTH * mean // (PROMPT_LENGTH + ANSWER_LENGTH)
        return np.clip(drawn.round().astype(int), 4, longest).tolist()

    def answered(prompt: list[int], length: int) -> Encoded:
        ids = prompt + generator.integers(2, vocab_size, length).tolist()
        return Encoded(ids, [place >= len(prompt) for place in range(len(ids))])

    made = []
    for prompt_length, chosen, rejected in zip(
        lengths(PROMPT_LENGTH), lengths(ANSWER_LENGTH), lengths(ANSWER_LENGTH), strict=True
    ):
        prompt = generator.integers(2, vocab_size, prompt_length).tolist()
        made.append(
            EncodedPair(answered(prompt, chosen), answered(prompt, rejected), prompt_length)
        )
    return made


def run_ours(options: Namespace, *, share_prompts: bool) -> None:
    """The step of the dpo stage: gradients, clipping, update."""
    workers = Workers(options.bf16)
    examples = Examples([(pair.chosen, pair.rejected) for pair in pairs(options)])
    model = workers.place(small_olmo2(options.vocab_size))
    if share_prompts:
        assert model.share_prompts(examples) is None
        examples = examples.sharing_prompts()
    config = TrainConfig(per_device_train_batch_size=options.batch_size, num_train_epochs=10**4)
    steps = steps_of(
        examples,
        np.ones(len(examples)),
        config,
        seed=SEED,
        cost_of_cut=workers.cost_of_cut(),
    )
    reference_P2 = compute_reference(model, examples, workers, options.batch_size, lambda _: None)
    summed_loss = loss_against(reference_P2, LossConfig())
    optimizer = build_optimizer(model.model, OptimConfig(learning_rate=1e-6))
    model.train()
    turns = Turns(workers.device)
    step = 0
    while True:
        batches = steps.micro_batches(step, 0)
        add_gradients(workers, model, batches, steps.num_terms(step), summed_loss, Totals())
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not turns.end_step(steps.num_terms(step)):
            return
        step += 1


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
    for pair in pairs(options):
        length = pair.shared_prompt_length
        rows.append(
            {
                "prompt_ids": pair.chosen.ids[:length],
                "chosen_ids": pair.chosen.ids[length:],
                "rejected_ids": pair.rejected.ids[length:],
            }
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer = OnIds(
            model=small_olmo2(options.vocab_size),
            args=DPOConfig(precompute_ref_log_probs=True, **trl_settings(options, folder)),
            train_dataset=Dataset.from_list(rows),
            processing_class=no_text_tokenizer(options.vocab_size),
        )
        train_in_turns(trainer, lambda: trainer.num_pairs)


CANDIDATES: dict[str, Callable[[Namespace], None]] = {
    "ours": lambda options: run_ours(options, share_prompts=True),
    "ours, prompts read twice": lambda options: run_ours(options, share_prompts=False),
    "TRL": run_trl,
}


def main() -> None:
    """Measure and print; in a candidate's process, train."""
    parser = arguments((__doc__ or "").split("\n")[0], batch_size=8)
    parser.set_defaults(rows=512)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.candidate:
        CANDIDATES[options.candidate](options)
        return
    items = pairs(options)
    starts = [pair.shared_prompt_length for pair in items]
    answers = [len(one.ids) for pair in items for one in (pair.chosen, pair.rejected)]
    precision = "bf16" if options.bf16 else "fp32"
    print(
        f"{chosen_device()}, {torch.get_num_threads()} threads, {precision}, vocabulary "
        f"{options.vocab_size:,}; {options.data or 'made-up pairs'}: {len(items):,} of "
        f"{np.mean(answers):.0f} tokens an answer, {np.mean(starts):.0f} of them the prompt's; "
        f"batch {options.batch_size}"
    )
    found = measure("benchmarks.dpo", options.only or list(CANDIDATES), options.seconds)
    print_table(found, "ours", "pairs")


if __name__ == "__main__":
    main()
