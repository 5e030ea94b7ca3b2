"""Supervised fine-tuning: dialogues teach a model to write the assistant's turns.

dialogues -> ids and which are learnt -> optimizer steps -> log-probabilities of the learnt ids ->
their negative sum -> a model folder that knows its chat template and where to stop.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from olmo_base.optim import OptimConfig
from olmo_base.run.artefact import ExampleCounts, RunConfig, RunFolder
from olmo_base.run.errors import UserError
from olmo_base.run.launch import Launch
from olmo_base.run.metrics import LogConfig
from olmo_base.run.recipe import RecipeError, setting
from olmo_base.run.resume import CheckpointConfig
from open_instruct.adapters import AdapterConfig
from open_instruct.batches import Batch, Examples
from open_instruct.causal_lm import ModelConfig
from open_instruct.encode import ChatEncoder
from open_instruct.examples import DataConfig, Source
from open_instruct.loop import HeldOut, SummedLoss, TrainConfig
from open_instruct.losses import dft_loss, sft_loss, smoothed_sft_loss
from open_instruct.publish import HubConfig
from open_instruct.sample_log import SampleLogConfig
from open_instruct.tokenised import DataReport, tokenised_dialogues
from open_instruct.tuning import (
    Model,
    expected_way,
    input_files,
    load_for_plan,
    open_run,
    plan_figures,
    plan_from_afar,
    steps_for,
    train_and_finish,
)

__all__ = ["SftRecipe", "input_files", "plan", "run"]


# R rows, T positions, D hidden width


@dataclass(frozen=True)
class SftLossConfig:
    """What is minimised. The held-out loss is always the plain likelihood per label token."""

    loss_type: Literal["nll", "dft"] = "nll"  # dft: weighted by the label's own probability
    label_smoothing_factor: float = setting(0.0, low=0, below=1)
    reduce_loss: Literal["mean", "sum"] = setting(
        "mean",
        help="mean: over a step's label tokens; sum: over each dialogue's, then the mean of those, "
        "so that a token weighs the same in every step",
    )
    neftune_noise_alpha: float | None = setting(
        None, above=0, help="noise on the embeddings while training (arXiv:2310.05914)"
    )

    def __post_init__(self) -> None:
        if self.loss_type == "dft" and self.label_smoothing_factor > 0:
            raise RecipeError(
                "label_smoothing_factor",
                f"{self.label_smoothing_factor}, but loss_type: dft does not use it. Remove it.",
            )

    @property
    def needs_distribution(self) -> bool:
        """Whether it asks for more than the labels' log-probabilities."""
        return self.label_smoothing_factor > 0


@dataclass(frozen=True, kw_only=True)
class SftRecipe:
    """The keys of ``stage: sft``."""

    stage: Literal["sft"] = "sft"
    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    chat_template: str | None = None  # a name in chat_templates/, a path, or null: the model's own
    data: DataConfig
    loss: SftLossConfig = field(default_factory=SftLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    shown: SampleLogConfig = field(default_factory=SampleLogConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    run: RunConfig


# ---------------------------------------------------------------- data and loss


def dialogue_examples(
    sources: tuple[Source, ...],
    encoder: ChatEncoder,
    recipe: SftRecipe,
    counts: ExampleCounts,
    report: DataReport,
) -> Examples:
    """The tokenised dialogues of a mixture. Errors: UserError if none is left."""
    encoded = tokenised_dialogues(sources, encoder, recipe, counts, report)
    if not encoded:
        raise UserError(
            f"No dialogue is left of {', '.join(source.path for source in sources)}; "
            f"dropped: {dict(counts.dropped)}."
        )
    return Examples([(dialogue,) for dialogue in encoded])


def summed_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The plain likelihood, summed over the label tokens of a micro-batch."""
    return {"loss": sft_loss(model(batch))}


def training_loss(config: SftLossConfig, embedding: nn.Module) -> SummedLoss:
    """The sum that the recipe minimises; ``embedding`` is the model's, for the noise."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if config.label_smoothing_factor > 0:
            scores_L2 = model(batch, "mean_logprob")
            return smoothed_sft_loss(
                scores_L2[:, 0], scores_L2[:, 1], config.label_smoothing_factor
            )
        return dft_loss(model(batch)) if config.loss_type == "dft" else sft_loss(model(batch))

    def summed(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if config.neftune_noise_alpha is None:
            return {"loss": loss(model, batch)}
        with noisy(embedding, batch, config.neftune_noise_alpha):
            return {"loss": loss(model, batch)}

    return summed


def terms_per_dialogue(config: SftLossConfig, examples: Examples) -> np.ndarray:
    """What the loop divides the sum by."""
    if config.reduce_loss == "sum":
        return np.ones(len(examples))
    return examples.num_labels_NW.sum(axis=1)


# ---------------------------------------------------------------- noise on the embeddings


@contextlib.contextmanager
def noisy(embedding: nn.Module, batch: Batch, alpha: float) -> Iterator[None]:
    """The embedding adds NEFTune's noise to ``batch`` for as long as the block lasts."""

    def add_noise(_: nn.Module, __: object, output_RTD: Tensor) -> Tensor:
        return output_RTD + neftune_noise(batch, output_RTD, alpha)

    handle = embedding.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def neftune_noise(batch: Batch, like_RTD: Tensor, alpha: float) -> Tensor:
    """Uniform noise within alpha / sqrt(length * D) for every row (arXiv:2310.05914, alg. 1).

    The length is the row's own, without padding, and each row draws from its example's seed of
    the step: so the noise does not depend on how the step is cut.
    """
    noise_RTD = torch.zeros_like(like_RTD)
    generator = torch.Generator(like_RTD.device)
    rows = zip(batch.examples.tolist(), batch.lengths_R.tolist(), strict=False)  # waits for a GPU
    for row, (example, length) in enumerate(rows):
        bound = alpha / math.sqrt(length * like_RTD.shape[-1])
        generator.manual_seed(row_seed(batch.seed, example))
        noise_RTD[row, :length].uniform_(-bound, bound, generator=generator)
    return noise_RTD


def row_seed(step_seed: int, example: int) -> int:
    """The seed of one example's noise in one step."""
    return int(np.random.SeedSequence([step_seed, example]).generate_state(1)[0])


def refuse_cut_noise(recipe: SftRecipe) -> None:
    """Errors: UserError for noise on embeddings of which a process has only a part."""
    if recipe.train.context_parallel > 1 and recipe.loss.neftune_noise_alpha is not None:
        raise UserError(
            "neftune_noise_alpha draws for whole dialogues, and context_parallel cuts them. Leave "
            "one of the two out."
        )


# ---------------------------------------------------------------- plan and run


def plan(recipe: SftRecipe, launch: Launch | None = None) -> dict[str, object]:
    """What a run would do, for --dry-run; touches nothing. Errors: as in ``run``."""
    refuse_cut_noise(recipe)
    figures = plan_from_afar(recipe, 1, launch=launch)
    if figures is not None:
        return figures
    examples, counts = load_for_plan(recipe, dialogue_examples)
    terms = terms_per_dialogue(recipe.loss, examples)
    return plan_figures(
        recipe,
        examples,
        terms,
        counts,
        expected_way(recipe),
        needs_distribution=recipe.loss.needs_distribution,
        launch=launch,
    )


def run(recipe: SftRecipe) -> RunFolder:
    """Fine-tune and write the model folder; goes on where an earlier run of it was stopped.

    Errors: UserError, DataError for what the user can mend; Stopped after a signal.
    """
    refuse_cut_noise(recipe)
    opened = open_run(recipe, dialogue_examples)
    if isinstance(opened, RunFolder):
        return opened
    workers, folder, examples = opened.workers, opened.folder, opened.train
    held_out = None
    if opened.held_out is not None:
        held_out = HeldOut(opened.held_out, opened.held_out.num_labels, summed_loss)

    sets = [examples] if opened.held_out is None else [examples, opened.held_out]
    longest = max(int(one.lengths_NW.max()) for one in sets)
    model = Model(recipe, workers, folder, longest)
    terms = terms_per_dialogue(recipe.loss, examples)
    needs_distribution = recipe.loss.needs_distribution
    model.settle_batching(recipe, workers, folder, examples, terms, needs_distribution)
    steps = steps_for(recipe, workers, examples, terms, packs=model.logprobs.packs)
    loss = training_loss(recipe.loss, model.language_model.get_input_embeddings())
    folder.log(
        f"{len(examples):,} dialogues, {examples.num_tokens:,} tokens, {examples.num_labels:,} of "
        f"them learnt; {steps.total:,} steps of {steps.per_step} dialogues; "
        f"log-probabilities from {model.logprobs.way}"
    )
    train_and_finish(
        recipe,
        workers,
        folder,
        model.logprobs,
        lambda: model.save(folder, opened.encoder),
        steps,
        loss,
        held_out,
        model.sample_log(recipe, folder, opened.encoder, held_out, workers),
        uses=opened.uses,
        needs_distribution=needs_distribution,
    )
    return folder
