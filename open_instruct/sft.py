"""Supervised fine-tuning: dialogues teach a model to write the assistant's turns.

dialogues -> ids and which are learnt -> optimizer steps -> log-probabilities of the learnt ids ->
their negative sum -> a model folder that knows its chat template and where to stop.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from olmo_base.optim import OptimConfig
from olmo_base.run.artefact import ExampleCounts, RunConfig, RunFolder, model_files
from olmo_base.run.errors import UserError
from olmo_base.run.launch import seed_everything
from olmo_base.run.metrics import LogConfig
from olmo_base.run.resume import CheckpointConfig
from open_instruct.batches import Batch, Examples
from open_instruct.causal_lm import (
    ModelConfig,
    check_lengths,
    count_parameters,
    load_causal_lm,
    load_config,
    save_causal_lm,
    training_memory,
)
from open_instruct.encode import ChatEncoder, encode_dialogues, find_template, load_chat_encoder
from open_instruct.examples import (
    DataConfig,
    Source,
    SourceUse,
    mixture_lines,
    read_dialogues,
    source_files,
)
from open_instruct.loop import HeldOut, TrainConfig, Workers, steps_of, train
from open_instruct.losses import sft_loss

STEPS_LOOKED_AT = 200  # by plan(), for the largest micro-batch


@dataclass(frozen=True, kw_only=True)
class SftRecipe:
    """The keys of ``stage: sft``."""

    stage: Literal["sft"] = "sft"
    model: ModelConfig
    chat_template: str | None = None  # a name in chat_templates/, a path, or null: the model's own
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig


def input_files(recipe: SftRecipe) -> list[Path]:
    """The files whose content decides the result. Errors: UserError naming one that is missing."""
    template = [] if recipe.chat_template is None else [find_template(recipe.chat_template)]
    sources = [*recipe.data.dataset_mixer, *recipe.data.eval_dataset_mixer]
    return [*model_files(recipe.model.model_name_or_path), *template, *source_files(sources)]


# ---------------------------------------------------------------- data and loss


def dialogue_examples(
    sources: tuple[Source, ...],
    encoder: ChatEncoder,
    recipe: SftRecipe,
    counts: ExampleCounts,
    uses: list[SourceUse],
) -> Examples:
    """The tokenised dialogues of a mixture. Errors: UserError if none is left."""
    dialogues = read_dialogues(
        sources,
        seed=recipe.run.seed,
        on_bad_row=recipe.data.on_bad_row,
        counts=counts,
        uses=uses,
    )
    encoded = encode_dialogues(dialogues, encoder, recipe.data, counts)
    if not encoded:
        raise UserError(
            f"No dialogue is left of {', '.join(source.path for source in sources)}; "
            f"dropped: {dict(counts.dropped)}."
        )
    return Examples([(dialogue,) for dialogue in encoded])


def summed_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Sums over the label tokens of a micro-batch."""
    return {"loss": sft_loss(model(batch))}


# ---------------------------------------------------------------- plan and run


def plan(recipe: SftRecipe) -> dict[str, object]:
    """What a run would do, for --dry-run; touches nothing. Errors: as in ``run``."""
    encoder = load_chat_encoder(recipe.model.model_name_or_path, recipe.chat_template)
    counts = ExampleCounts()
    examples = dialogue_examples(recipe.data.dataset_mixer, encoder, recipe, counts, [])
    model_config = load_config(recipe.model)
    check_lengths(int(examples.lengths_NW.max()), model_config, recipe.model.model_name_or_path)
    steps = steps_of(
        examples, examples.num_labels_NW.sum(axis=1), recipe.train, seed=recipe.run.seed
    )
    num_positions, num_labels = steps.largest_micro_batch(STEPS_LOOKED_AT)
    num_parameters = count_parameters(recipe.model)
    return {
        "examples": counts.as_dict(),
        "tokens": examples.num_tokens,
        "label_tokens": examples.num_labels,
        "longest_example": int(examples.lengths_NW.max()),
        "steps": steps.total,
        "examples_per_step": steps.per_step,
        "parameters": num_parameters,
        "memory_bytes": training_memory(
            model_config,
            num_parameters,
            num_positions=num_positions,
            num_labels=num_labels,
            gradient_checkpointing=recipe.model.gradient_checkpointing,
        ),
    }


def run(recipe: SftRecipe) -> RunFolder:
    """Fine-tune and write the model folder; goes on where an earlier run of it was stopped.

    Errors: UserError, DataError for what the user can mend; Stopped after a signal.
    """
    workers = Workers(recipe.train.bf16)
    with workers.main_first():
        folder = RunFolder.open(recipe, input_files(recipe))
    if folder.is_finished:
        return folder
    seed_everything(recipe.run.seed)

    encoder = load_chat_encoder(recipe.model.model_name_or_path, recipe.chat_template)
    uses: list[SourceUse] = []
    examples = dialogue_examples(recipe.data.dataset_mixer, encoder, recipe, folder.counts, uses)
    held_out = None
    if recipe.data.eval_dataset_mixer:
        held_out_examples = dialogue_examples(
            recipe.data.eval_dataset_mixer, encoder, recipe, ExampleCounts(), uses
        )
        held_out = HeldOut(held_out_examples, held_out_examples.num_labels, summed_loss)
    for line in mixture_lines(uses):
        folder.log(line)

    language_model, stored_dtype = load_causal_lm(recipe.model)
    longest = int(examples.lengths_NW.max())
    check_lengths(longest, language_model.config, recipe.model.model_name_or_path)
    model = workers.place(language_model)
    steps = steps_of(
        examples,
        examples.num_labels_NW.sum(axis=1),
        recipe.train,
        seed=recipe.run.seed,
        num_ranks=workers.num_ranks,
        cost_of_cut=workers.cost_of_cut(),
    )
    folder.log(
        f"{len(examples):,} dialogues, {examples.num_tokens:,} tokens, {examples.num_labels:,} of "
        f"them learnt; {steps.total:,} steps of {steps.per_step} dialogues; "
        f"log-probabilities from {model.way}"
    )
    results = train(
        folder,
        workers,
        model,
        steps,
        summed_loss,
        held_out,
        seed=recipe.run.seed,
        config=recipe.train,
        optim=recipe.optim,
        checkpoints=recipe.checkpoints,
        log=recipe.log,
    )
    if workers.rank == 0:
        save_causal_lm(folder, language_model, encoder, stored_dtype)
        folder.finish(**results)
    workers.wait()
    return folder
