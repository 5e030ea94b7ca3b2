"""What the tuning stages share: how a run opens, what a plan says, the model's load and end."""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from olmo_base.optim import OptimConfig
from olmo_base.run.artefact import (
    ExampleCounts,
    RunConfig,
    RunFolder,
    model_files,
    read_manifest,
)
from olmo_base.run.errors import UserError
from olmo_base.run.launch import Launch, seed_everything
from olmo_base.run.metrics import LogConfig
from olmo_base.run.resume import CheckpointConfig
from olmo_base.run.trackers import refuse_missing_trackers
from open_instruct.adapters import AdapterConfig, is_adapted
from open_instruct.batches import MICRO_BATCH_COST, Examples, MicroBatchSize, Steps
from open_instruct.causal_lm import (
    ModelConfig,
    check_lengths,
    load_causal_lm,
    load_config,
    save_causal_lm,
)
from open_instruct.compute import (
    compile_layers,
    refuse_uncompilable,
    take_liger_kernels,
    uncompiled,
)
from open_instruct.encode import ChatEncoder, find_template, load_chat_encoder
from open_instruct.examples import DataConfig, Source, SourceUse, source_files
from open_instruct.known_shapes import recorded_config
from open_instruct.logprobs import (
    AT_LABELS,
    HEAD_AT_LABELS,
    NATIVE,
    PACKED,
    PACKED_HEAD,
    PACKED_LABELS,
    PACKING_WAYS,
    LabelLogprobs,
    Wrapped,
    native_over,
    not_to_be_cut,
)
from open_instruct.loop import NEVER, HeldOut, Loss, TrainConfig, Workers, steps_of, train
from open_instruct.measured_batching import settle_batching
from open_instruct.memory import Sizes, count_parameters, memory_at_hand, training_memory
from open_instruct.packed_attention import TAKEN_OVER, reach_of
from open_instruct.publish import HubConfig, push_if_asked, write_model_card
from open_instruct.sample_log import SampleLog, SampleLogConfig, first_prompts
from open_instruct.tokenised import DataReport, report_for

STEPS_LOOKED_AT = 200  # by a plan, for the largest micro-batch
LARGEST_SHARE = 0.85  # of the memory here that an estimate may come to
NOT_HERE = "not_here"  # in the figures of a plan: what is missing on this machine


class TuningRecipe(Protocol):
    """The keys that every tuning stage has."""

    @property
    def stage(self) -> str: ...
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


def check_context_parallel(recipe: TuningRecipe) -> None:
    """Errors: UserError for a recipe whose rows cannot be cut over processes."""
    number = recipe.train.context_parallel
    if number == 1:
        return
    if recipe.stage != "sft":
        raise UserError(
            f"context_parallel: {number}, but stage: {recipe.stage} needs all labels of an answer "
            "on one process; only stage: sft adds up over them. Leave it out."
        )
    if recipe.train.batching == "packed":
        raise UserError(
            f"context_parallel: {number} cuts padded rows, and batching is packed. Set batching: "
            "auto or grouped."
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
    check_context_parallel(recipe)
    tokenise_before_ranks_meet(recipe, load)
    workers = Workers(recipe.train.bf16, context_parallel=recipe.train.context_parallel)
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
    check_context_parallel(recipe)
    encoder = encoder_of(recipe)
    counts = ExampleCounts()
    return load(recipe.data.dataset_mixer, encoder, recipe, counts, DataReport()), counts


def plan_figures(
    recipe: "AdaptableRecipe",
    examples: Examples,
    terms_per_example: np.ndarray,
    counts: ExampleCounts,
    way: str,
    *,
    needs_distribution: bool = False,
    launch: Launch | None = None,
) -> dict[str, object]:
    """What a run over these examples would do, for --dry-run. Errors: UserError, as in the run.

    ``way``, ``needs_distribution`` and ``launch`` as in ``training_memory``.
    """
    refuse_missing_trackers(recipe.log.report_to)
    if recipe.train.context_parallel > 1 and way != NATIVE:
        raise not_to_be_cut(recipe.model.model_name_or_path, way)
    model_config = load_config(recipe.model)
    check_lengths(int(examples.lengths_NW.max()), model_config, recipe.model.model_name_or_path)
    steps = steps_of(
        examples,
        terms_per_example,
        recipe.train,
        seed=recipe.run.seed,
        num_ranks=1 if launch is None else data_processes(recipe, launch),
        cost_of_cut=NEVER if way in PACKING_WAYS else MICRO_BATCH_COST["cpu"],
    )
    micro_batches = steps.micro_batch_sizes(STEPS_LOOKED_AT, packs=way in PACKING_WAYS)
    sizes = count_parameters(recipe.model, recipe.adapter)
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
        **_planned_memory(
            recipe, model_config, sizes, micro_batches, way, needs_distribution, launch
        ),
    }


def _planned_memory(
    recipe: "AdaptableRecipe",
    model_config: Any,
    sizes: Sizes,
    micro_batches: Sequence[MicroBatchSize],
    way: str,
    needs_distribution: bool,
    launch: Launch | None,
) -> dict[str, object]:
    """The figures of a plan that say how much memory a step takes, in each process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if launch is not None:
        device = torch.device(launch.device)
    bf16 = recipe.train.bf16
    needed = {
        recomputes: training_memory(
            model_config,
            sizes,
            micro_batches,
            way=way,
            gradient_checkpointing=recomputes,
            needs_distribution=needs_distribution,
            adapter=recipe.adapter,
            device=device.type,
            bf16=device.type == "cuda" if bf16 == "auto" else bf16,
            launch=launch,
        )
        for recomputes in (False, True)
    }
    chosen = recipe.model.gradient_checkpointing
    if launch is not None:
        spread = f"divided over {launch.shards}" if launch.divides else "a copy in each"
        asked: dict[str, object] = {"processes": launch.num_processes, "weights": spread}
        if chosen != "auto":
            return asked | {"memory_bytes_of_each": needed[chosen]}
        names = {False: "memory_bytes_of_each", True: "with_gradient_checkpointing_bytes"}
        return asked | {names[recomputes]: needed[recomputes] for recomputes in names}
    if chosen != "auto":
        return {"memory_bytes": needed[chosen]}
    recomputes = not fits(needed[False], device)
    return {"gradient_checkpointing": recomputes, "memory_bytes": needed[recomputes]}


def data_processes(recipe: TuningRecipe, launch: Launch) -> int:
    """Processes that read different dialogues. Errors: UserError if they cannot be cut so."""
    parts = recipe.train.context_parallel
    if launch.num_processes % parts:
        raise UserError(
            f"context_parallel {parts} does not divide {launch.num_processes} processes. Plan for "
            f"a multiple of {parts}."
        )
    return launch.num_processes // parts


def fits(needed: int, device: torch.device) -> bool:
    """Whether a step of this estimate can be trusted to fit the device."""
    return needed <= LARGEST_SHARE * memory_at_hand(device)


def plan_from_afar(
    recipe: "AdaptableRecipe",
    rows_per_example: int,
    *,
    way: str | None = None,
    launch: Launch | None = None,
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
    sizes = count_parameters(recipe.model, recipe.adapter, architecture)
    rows = recipe.train.per_device_train_batch_size * rows_per_example
    length = recipe.data.max_length
    largest = MicroBatchSize(0, rows * length, rows * length**2, length, labels=rows * length)
    num_ranks = 1 if launch is None else data_processes(recipe, launch)
    trained = {"trained_parameters": sizes.trained} if sizes.trained < sizes.all else {}
    return {
        NOT_HERE: f"{name} is not on this machine: its recorded shape is used, and rows, tokens "
        "and steps are not counted",
        "examples_per_step": recipe.train.examples_per_step(num_ranks),
        "parameters": sizes.all,
        **trained,
        **_planned_memory(
            recipe,
            architecture,
            sizes,
            [largest],
            way or expected_way(recipe, architecture),
            needs_distribution=False,
            launch=launch,
        ),
    }


class AdaptableRecipe(TuningRecipe, Protocol):
    """The keys of a stage that trains a causal language model, whole or by an adapter."""

    @property
    def adapter(self) -> AdapterConfig: ...


# Keys of configurations of models that change their logits after the head.
CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def expected_way(recipe: AdaptableRecipe, architecture: Any | None = None) -> str:
    """How a run is expected to come to log-probabilities; found without loading any weight.

    ``architecture`` None is the one in the model's folder.
    """
    architecture = architecture or load_config(recipe.model)
    packs = recipe.train.batching != "grouped" and recipe.train.context_parallel == 1
    attention = recipe.model.attn_implementation
    if not recipe.adapter.use_peft and attention in ("auto", "sdpa"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                architecture, trust_remote_code=recipe.model.trust_remote_code
            )
        if native_over(model) is not None:
            return PACKED if packs else NATIVE
    text_config = architecture.get_text_config()
    is_changed = any(getattr(text_config, key, None) is not None for key in CHANGED_LOGITS)
    reach = reach_of(text_config)
    is_seen_whole = reach is None or recipe.data.max_length <= reach
    if packs and is_seen_whole and attention in ("auto", *TAKEN_OVER):
        return PACKED_LABELS if is_changed else PACKED_HEAD
    return AT_LABELS if is_changed else HEAD_AT_LABELS


class Model:
    """The model of a run: what the loop trains, and how it is kept afterwards."""

    def __init__(self, recipe: AdaptableRecipe, workers: Workers, folder: RunFolder, longest: int):
        """Errors: UserError if the model cannot be trained, or is too short for the examples."""
        refuse_uncompilable(recipe.model, recipe.adapter, workers)
        self.language_model: Any
        self.language_model, self._stored_dtype = load_causal_lm(
            recipe.model,
            recipe.adapter,
            device=workers.device,
            compute_dtype=torch.bfloat16 if workers.bf16 else torch.float32,
            seed=recipe.run.seed,
        )
        name = recipe.model.model_name_or_path
        if workers.context is not None:
            longest = workers.context.padded(longest)
        check_lengths(longest, self.language_model.config, name)
        if is_adapted(self.language_model):
            folder.log(about_adapter(self.language_model))
        note_liger_kernels(self.language_model, recipe, workers, folder)
        self.logprobs: LabelLogprobs = workers.place(
            self.language_model, recipe.train.batching, longest, recipe.model.attn_implementation
        )
        if self.logprobs.kernel is not None:
            folder.log(f"attention over rows end to end: {self.logprobs.kernel.name}")
        elif self.logprobs.wrong_kernel is not None:
            name = self.logprobs.wrong_kernel.name
            folder.log(f"attention over rows end to end: SDPA, as {name} computes something else")
        if self.logprobs.why_padded is not None:
            folder.log(f"rows are grouped by length and padded: {self.logprobs.why_padded}")

    def settle_batching(
        self,
        recipe: "AdaptableRecipe",
        workers: Workers,
        folder: RunFolder,
        examples: Examples,
        terms_per_example: np.ndarray,
        needs_distribution: bool,
    ) -> None:
        """Under ``batching: auto``, choose the faster way of ``examples`` by the clock.

        Where only one way is possible, or memory does not allow to keep what layers compute,
        nothing is measured.
        """
        if recipe.train.batching != "auto" or not self.logprobs.packs:
            return

        def steps(packs: bool) -> Steps:
            return steps_for(recipe, workers, examples, terms_per_example, packs=packs)

        def keeps_all(model: LabelLogprobs, steps: Steps) -> bool:
            if recipe.model.gradient_checkpointing is True:
                return False
            needed = memory_without_recomputing(
                recipe, workers, model.way, steps, needs_distribution
            )
            return not workers.any_rank(not fits(needed, workers.device))

        def padded() -> LabelLogprobs | None:
            attention = recipe.model.attn_implementation
            other = workers.place(self.language_model, "grouped", attention=attention)
            is_other = examples.shares_prompts and other.share_prompts(examples) is not None
            return None if workers.any_rank(is_other) else other

        self.logprobs = settle_batching(folder, workers, self.logprobs, padded, steps, keeps_all)

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
        refuse_divided_answers(
            recipe.shown.num_eval_samples, workers.kind if workers.divides else None
        )
        prompts = first_prompts(held_out.examples, recipe.shown.num_eval_samples)
        precision = workers.precision
        if recipe.model.torch_compile:
            precision = functools.partial(uncompiled, workers.precision)
        return SampleLog(folder, self.language_model, encoder, prompts, recipe.shown, precision)

    def save(self, folder: RunFolder, encoder: ChatEncoder) -> None:
        """Write the run's model folder. Changes the model's precision."""
        save_causal_lm(folder, self.language_model, encoder, self._stored_dtype)


def refuse_divided_answers(num_eval_samples: int, divided_by: str | None) -> None:
    """Errors: UserError if someone is to answer who does not hold all weights."""
    if num_eval_samples and divided_by is not None:
        raise UserError(
            f"num_eval_samples: {num_eval_samples}, but the first rank answers them, and under "
            f"{divided_by} it holds a part of the weights. Set it to 0, or launch with "
            "recipes/accelerate/ddp.yaml."
        )


def note_liger_kernels(
    model: Any, recipe: AdaptableRecipe, workers: Workers, folder: RunFolder
) -> None:
    """Take liger's kernels if the recipe asks for them, and say in the log which.

    Errors: UserError if it insists and cannot have them.
    """
    taken = take_liger_kernels(model, recipe.model.liger_kernel, workers)
    if taken is not None:
        folder.log(f"liger's kernels compute {taken}")


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
        num_ranks=workers.num_data,
        cost_of_cut=workers.cost_of_cut(packs=packs),
    )


def memory_without_recomputing(
    recipe: AdaptableRecipe,
    workers: Workers,
    way: str,
    steps: Steps,
    needs_distribution: bool = False,
) -> int:
    """Bytes of a step in which layers keep what they compute, in each process."""
    return training_memory(
        load_config(recipe.model),
        count_parameters(recipe.model, recipe.adapter),
        steps.micro_batch_sizes(STEPS_LOOKED_AT, packs=way in PACKING_WAYS),
        way=way,
        gradient_checkpointing=False,
        needs_distribution=needs_distribution,
        adapter=recipe.adapter,
        device=workers.device.type,
        bf16=workers.bf16,
        launch=workers.launch,
    )


def settle_checkpointing(
    recipe: AdaptableRecipe,
    workers: Workers,
    folder: RunFolder,
    model: Wrapped,
    steps: Steps,
    needs_distribution: bool,
) -> None:
    """Let layers be computed again in the backward pass, if the recipe says so or memory does.

    ``auto`` compares the estimate with the memory of the device, not with what is free of it, so
    that a run that goes on chooses as before. The result is the same either way.
    """
    recomputes = recipe.model.gradient_checkpointing
    if recomputes == "auto":
        way: Any = model.way
        needed = memory_without_recomputing(recipe, workers, way, steps, needs_distribution)
        recomputes = workers.any_rank(not fits(needed, workers.device))
        folder.log(
            f"gradient checkpointing is {'on' if recomputes else 'off'}: without it a step takes "
            f"about {needed / 2**30:.1f} GiB, and {memory_at_hand(workers.device) / 2**30:.1f} GiB "
            "are here"
        )
    if recomputes:
        anything: Any = model.model
        anything.gradient_checkpointing_enable({"use_reentrant": False})


def train_and_finish(
    recipe: AdaptableRecipe,
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
    needs_distribution: bool = False,
) -> None:
    """Go through all steps, ``save`` the model folder and mark the run as finished.

    ``uses`` is what was read of each source, for the model card. Errors: UserError if the recipe
    asks for an upload and that fails; the run is finished all the same.
    """
    settle_checkpointing(recipe, workers, folder, model, steps, needs_distribution)
    if recipe.model.torch_compile:
        first = steps.micro_batches(0, workers.data_rank)
        compile_layers(model, [batch for batch in first if batch.num_sequences], workers.device)
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
