"""Supervised fine-tuning: dialogues teach a model to write the assistant's turns.

dialogues -> ids and which are learnt -> optimizer steps -> log-probabilities of the learnt ids ->
their negative sum -> a model folder that knows its chat template and where to stop.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from olmo_base.optim import OptimConfig
from olmo_base.run.artefact import ExampleCounts, RunConfig, RunFolder
from olmo_base.run.errors import UserError
from olmo_base.run.launch import seed_everything
from olmo_base.run.metrics import LogConfig
from olmo_base.run.resume import CheckpointConfig
from open_instruct.adapters import AdapterConfig
from open_instruct.batches import Batch, Examples
from open_instruct.causal_lm import ModelConfig
from open_instruct.encode import ChatEncoder, encode_dialogues, load_chat_encoder
from open_instruct.examples import (
    DataConfig,
    Source,
    SourceUse,
    mixture_lines,
    read_dialogues,
)
from open_instruct.loop import HeldOut, TrainConfig, Workers
from open_instruct.losses import sft_loss
from open_instruct.tuning import Model, input_files, plan_figures, steps_for, train_and_finish

__all__ = ["SftRecipe", "input_files", "plan", "run"]


@dataclass(frozen=True, kw_only=True)
class SftRecipe:
    """The keys of ``stage: sft``."""

    stage: Literal["sft"] = "sft"
    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    chat_template: str | None = None  # a name in chat_templates/, a path, or null: the model's own
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig


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
    return plan_figures(recipe, examples, examples.num_labels_NW.sum(axis=1), counts)


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

    model = Model(recipe, workers, folder, longest=int(examples.lengths_NW.max()))
    steps = steps_for(recipe, workers, examples, examples.num_labels_NW.sum(axis=1))
    folder.log(
        f"{len(examples):,} dialogues, {examples.num_tokens:,} tokens, {examples.num_labels:,} of "
        f"them learnt; {steps.total:,} steps of {steps.per_step} dialogues; "
        f"log-probabilities from {model.logprobs.way}"
    )
    train_and_finish(recipe, workers, folder, model, encoder, steps, summed_loss, held_out)
    return folder
