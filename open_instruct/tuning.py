"""What the tuning stages share: how a run opens, what a plan says, the model's load and end."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from olmo_base.optim import OptimConfig
from olmo_base.run.artefact import (
    ExampleCounts,
    RunConfig,
    RunFolder,
    model_files,
    read_manifest,
)
from olmo_base.run.errors import UserError
from olmo_base.run.launch import seed_everything
from olmo_base.run.metrics import LogConfig
from olmo_base.run.resume import CheckpointConfig
from olmo_base.run.trackers import refuse_missing_trackers
from open_instruct.adapters import AdapterConfig, is_adapted
from open_instruct.batches import Examples, Steps
from open_instruct.causal_lm import (
    ModelConfig,
    check_lengths,
    count_parameters,
    load_causal_lm,
    load_config,
    save_causal_lm,
    training_memory,
)
from open_instruct.encode import ChatEncoder, find_template, load_chat_encoder
from open_instruct.examples import DataConfig, Source, SourceUse, source_files
from open_instruct.known_shapes import recorded_config
from open_instruct.logprobs import LabelLogprobs, Wrapped
from open_instruct.loop import HeldOut, Loss, TrainConfig, Workers, steps_of, train
from open_instruct.publish import HubConfig, push_if_asked, write_model_card
from open_instruct.sample_log import SampleLog, SampleLogConfig, first_prompts
from open_instruct.tokenised import DataReport, report_for

STEPS_LOOKED_AT = 200  # by a plan, for the largest micro-batch
NOT_HERE = "not_here"  # in the figures of a plan: what is missing on this machine


class TuningRecipe(Protocol):
    """The keys that every tuning stage has."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def checkpoints(self) -> CheckpointConfig: ...
    @property
    def log(self) -> LogConfig: ...
    @property
    def shown(self) -> SampleLogConfig: ...
    @property
    def hub(self) -> HubConfig: ...
    @property
    def run(self) -> RunConfig: ...


def input_files(recipe: TuningRecipe) -> list[Path]:
    """The files whose content decides the result.

    Errors: UserError naming one that is missing, or a tracker that is not installed.
    """
    refuse_missing_trackers(recipe.log.report_to)
    template = [] if recipe.chat_template is None else [find_template(recipe.chat_template)]
    sources = [*recipe.data.dataset_mixer, *recipe.data.eval_dataset_mixer]
    against = [Path(file) for file in recipe.data.decontaminate_against]
    model = model_files(recipe.model.model_name_or_path)
    return [*model, *template, *source_files(sources), *against]


# ---------------------------------------------------------------- how a run and a plan open

Recipe = TypeVar("Recipe", bound=TuningRecipe)
Loaded = TypeVar("Loaded")  # the examples of a mixture, as a stage learns from them
Load = Callable[[tuple[Source, ...], ChatEncoder, Recipe, ExampleCounts, DataReport], Loaded]


@dataclass(frozen=True)
class Opened(Generic[Loaded]):
    """A run that is to be worked on."""

    workers: Workers
    folder: RunFolder
    encoder: ChatEncoder
    train: Loaded
    held_out: Loaded | None
    uses: list[SourceUse]


def check_held_out(recipe: TuningRecipe) -> None:
    """Errors: UserError if something looks at held-out examples and there are none."""
    if recipe.data.eval_dataset_mixer:
        return
    asking = {
        "load_best_model_at_end": recipe.train.load_best_model_at_end,
        "early_stopping_patience": recipe.train.early_stopping_patience,
        "num_eval_samples": recipe.shown.num_eval_samples,
    }
    for key, value in asking.items():
        if value:
            raise UserError(
                f"{key}: {value}, but no examples are held out. Set eval_dataset_mixer."
            )


def encoder_of(recipe: TuningRecipe) -> ChatEncoder:
    """How the recipe's model writes dialogues. Errors: UserError."""
    return load_chat_encoder(
        recipe.model.model_name_or_path,
        recipe.chat_template,
        recipe.model.additional_special_tokens,
    )


def open_run(recipe: Recipe, load: Load[Recipe, Loaded]) -> Opened[Loaded] | RunFolder:
    """The run's folder, seeds and examples; only its folder if it is finished already.

    Errors: UserError, DataError for what the user can mend.
    """
    check_held_out(recipe)
    tokenise_before_ranks_meet(recipe, load)
    workers = Workers(recipe.train.bf16)
    with workers.main_first():
        folder = RunFolder.open(recipe, input_files(recipe))
    if folder.is_finished:
        return folder
    seed_everything(recipe.run.seed)

    encoder = encoder_of(recipe)
    report = report_for(recipe)
    examples = load(recipe.data.dataset_mixer, encoder, recipe, folder.counts, report)
    held_out = None
    if recipe.data.eval_dataset_mixer:
        held_out = load(recipe.data.eval_dataset_mixer, encoder, recipe, ExampleCounts(), report)
    report.tell(folder)
    return Opened(workers, folder, encoder, examples, held_out, report.uses)


def tokenise_before_ranks_meet(recipe: Recipe, load: Load[Recipe, Loaded]) -> None:
    """Tokenise, in a run of several processes, before they form a group with its timeouts.

    One of them does it for all; each finds it kept when it loads its examples.
    """
    manifest = read_manifest(recipe.run.output_dir)
    is_finished = manifest is not None and manifest.get("status") == "finished"
    report = report_for(recipe)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or is_finished or report.kept_in is None:
        return
    encoder = encoder_of(recipe)
    for sources in (recipe.data.dataset_mixer, recipe.data.eval_dataset_mixer):
        if sources:
            load(sources, encoder, recipe, ExampleCounts(), report)


def load_for_plan(recipe: Recipe, load: Load[Recipe, Loaded]) -> tuple[Loaded, ExampleCounts]:
    """The examples that a run would learn from, for --dry-run. Errors: as in ``open_run``."""
    check_held_out(recipe)
    encoder = encoder_of(recipe)
    counts = ExampleCounts()
    return load(recipe.data.dataset_mixer, encoder, recipe, counts, DataReport()), counts


def plan_figures(
    recipe: TuningRecipe,
    examples: Examples,
    terms_per_example: np.ndarray,
    counts: ExampleCounts,
    adapter: AdapterConfig | None = None,
) -> dict[str, object]:
    """What a run over these examples would do, for --dry-run. Errors: UserError, as in the run."""
    refuse_missing_trackers(recipe.log.report_to)
    model_config = load_config(recipe.model)
    check_lengths(int(examples.lengths_NW.max()), model_config, recipe.model.model_name_or_path)
    steps = steps_of(examples, terms_per_example, recipe.train, seed=recipe.run.seed)
    num_positions, num_labels = steps.largest_micro_batch(STEPS_LOOKED_AT)
    sizes = count_parameters(recipe.model, adapter)
    is_part = sizes.trained < sizes.all
    trained = {"trained_parameters": sizes.trained} if is_part else {}
    return {
        "examples": counts.as_dict(),
        "tokens": examples.num_tokens,
        "label_tokens": examples.num_labels,
        "longest_example": int(examples.lengths_NW.max()),
        "steps": steps.total,
        "examples_per_step": steps.per_step,
        "parameters": sizes.all,
        **trained,
        "memory_bytes": training_memory(
            model_config,
            sizes,
            num_positions=num_positions,
            num_labels=num_labels,
            gradient_checkpointing=recipe.model.gradient_checkpointing,
        ),
    }


def plan_from_afar(
    recipe: TuningRecipe, rows_per_example: int, adapter: AdapterConfig
) -> dict[str, object] | None:
    """What is known of a run whose published model is not on this machine; None if it is here.

    Without its tokenizer no row can be read: the memory is that of examples of ``max_length``, all
    of them learnt. Errors: UserError, as in the run.
    """
    name = recipe.model.model_name_or_path
    architecture = recorded_config(name)
    if architecture is None:
        return None
    check_held_out(recipe)
    check_lengths(recipe.data.max_length, architecture, name)
    sizes = count_parameters(recipe.model, adapter, architecture)
    longest = recipe.train.per_device_train_batch_size * rows_per_example * recipe.data.max_length
    per_rank = recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps
    trained = {"trained_parameters": sizes.trained} if sizes.trained < sizes.all else {}
    return {
        NOT_HERE: f"{name} is not on this machine: its recorded shape is used, and rows, tokens "
        "and steps are not counted",
        "examples_per_step": per_rank,
        "parameters": sizes.all,
        **trained,
        "memory_bytes": training_memory(
            architecture,
            sizes,
            num_positions=longest,
            num_labels=longest,
            gradient_checkpointing=recipe.model.gradient_checkpointing,
        ),
    }


class AdaptableRecipe(TuningRecipe, Protocol):
    """The keys of a stage that trains a causal language model, whole or by an adapter."""

    @property
    def adapter(self) -> AdapterConfig: ...


class Model:
    """The model of a run: what the loop trains, and how it is kept afterwards."""

    def __init__(self, recipe: AdaptableRecipe, workers: Workers, folder: RunFolder, longest: int):
        """Errors: UserError if the model cannot be trained, or is too short for the examples."""
        self.language_model: Any
        self.language_model, self._stored_dtype = load_causal_lm(
            recipe.model,
            recipe.adapter,
            device=workers.device,
            compute_dtype=torch.bfloat16 if workers.bf16 else torch.float32,
            seed=recipe.run.seed,
        )
        name = recipe.model.model_name_or_path
        check_lengths(longest, self.language_model.config, name)
        if is_adapted(self.language_model):
            folder.log(about_adapter(self.language_model))
        self.logprobs: LabelLogprobs = workers.place(self.language_model, recipe.train.batching)

    def sample_log(
        self,
        recipe: TuningRecipe,
        folder: RunFolder,
        encoder: ChatEncoder,
        held_out: HeldOut | None,
        workers: Workers,
    ) -> SampleLog | None:
        """What answers held-out prompts while training goes on; None where nobody asks.

        Errors: UserError where weights are divided over ranks.
        """
        if held_out is None or recipe.shown.num_eval_samples == 0:
            return None
        if workers.divides:
            raise UserError(
                f"num_eval_samples: {recipe.shown.num_eval_samples}, but the first rank answers "
                "them, and under FSDP2 it holds a part of the weights. Set it to 0, or launch with "
                "recipes/accelerate/ddp.yaml."
            )
        prompts = first_prompts(held_out.examples, recipe.shown.num_eval_samples)
        return SampleLog(
            folder, self.language_model, encoder, prompts, recipe.shown, workers.precision
        )

    def save(self, folder: RunFolder, encoder: ChatEncoder) -> None:
        """Write the run's model folder. Changes the model's precision."""
        save_causal_lm(folder, self.language_model, encoder, self._stored_dtype)


def about_adapter(adapted: Any) -> str:
    """An adapter in words, for the log."""
    settings = adapted.peft_config["default"]
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    targets = {name.rpartition(".")[2] for name in settings.target_modules}
    kind = "DoRA" if settings.use_dora else "rsLoRA" if settings.use_rslora else "LoRA"
    return (
        f"{kind} of rank {settings.r}, alpha {settings.lora_alpha}, dropout "
        f"{settings.lora_dropout} on {', '.join(sorted(targets))} of "
        f"{settings.base_model_name_or_path}; {trained:,} parameters are trained"
    )


def steps_for(
    recipe: TuningRecipe,
    workers: Workers,
    examples: Examples,
    terms_per_example: np.ndarray,
    *,
    packs: bool = False,
) -> Steps:
    """The optimizer steps of a run over these examples; ``packs``: whether its model does."""
    return steps_of(
        examples,
        terms_per_example,
        recipe.train,
        seed=recipe.run.seed,
        num_ranks=workers.num_ranks,
        cost_of_cut=workers.cost_of_cut(packs=packs),
    )


def train_and_finish(
    recipe: TuningRecipe,
    workers: Workers,
    folder: RunFolder,
    model: Wrapped,
    save: Callable[[], None],
    steps: Steps,
    loss: Loss,
    held_out: HeldOut | None,
    samples: SampleLog | None = None,
    *,
    uses: Sequence[SourceUse],
) -> None:
    """Go through all steps, ``save`` the model folder and mark the run as finished.

    ``uses`` is what was read of each source, for the model card. Errors: UserError if the recipe
    asks for an upload and that fails; the run is finished all the same.
    """
    results = train(
        folder,
        workers,
        model,
        steps,
        loss,
        held_out,
        seed=recipe.run.seed,
        config=recipe.train,
        optim=recipe.optim,
        checkpoints=recipe.checkpoints,
        log=recipe.log,
        samples=samples,
    )
    workers.unite(model)
    if workers.rank == 0:
        save()
        write_model_card(folder, uses, results)
        folder.finish(**results)
        address = push_if_asked(folder.path, recipe.hub)
        if address is not None:
            folder.log(f"uploaded to {address}")
    workers.wait()
