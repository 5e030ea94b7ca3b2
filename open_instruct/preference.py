"""Preference tuning: pairs teach a model which of two answers to prefer (DPO, arXiv:2305.18290).

pairs -> ids of both answers -> log-probabilities under the starting weights, computed once and
kept -> optimizer steps -> log-probabilities under the weights as they change -> the loss between
the two -> a model folder.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from olmo_base.optim import OptimConfig
from olmo_base.run.artefact import (
    ExampleCounts,
    RunConfig,
    RunFolder,
    atomic_write,
    describe_inputs,
    model_files,
)
from olmo_base.run.errors import UserError
from olmo_base.run.launch import seed_everything
from olmo_base.run.metrics import LogConfig, Progress
from olmo_base.run.recipe import setting
from olmo_base.run.resume import CheckpointConfig
from open_instruct.batches import Batch, Examples, evaluation_batches
from open_instruct.causal_lm import (
    ModelConfig,
    check_lengths,
    count_parameters,
    load_causal_lm,
    load_config,
    save_causal_lm,
    training_memory,
)
from open_instruct.encode import ChatEncoder, encode_pairs, find_template, load_chat_encoder
from open_instruct.examples import (
    DataConfig,
    Source,
    SourceUse,
    mixture_lines,
    read_pairs,
    source_files,
)
from open_instruct.logprobs import LabelLogprobs
from open_instruct.loop import HeldOut, SummedLoss, TrainConfig, Workers, steps_of, train
from open_instruct.losses import dpo_loss, implicit_rewards

# P pairs of a set, B pairs of a micro-batch, 2 = (chosen answer, rejected answer)

STEPS_LOOKED_AT = 200  # by plan(), for the largest micro-batch
# In a folder of its own: vLLM reads every *.safetensors file beside config.json as weights.
REFERENCE_FILE = "reference/logprobs.safetensors"


@dataclass(frozen=True)
class PreferenceOptim(OptimConfig):
    """Preference tuning wants smaller steps than fine-tuning."""

    learning_rate: float = setting(1e-6, above=0)


@dataclass(frozen=True, kw_only=True)
class PreferenceRecipe:
    """The keys of ``stage: dpo``."""

    stage: Literal["dpo"] = "dpo"
    model: ModelConfig
    chat_template: str | None = None  # null: the template that the model carries
    data: DataConfig
    loss_type: Literal["sigmoid"] = "sigmoid"
    beta: float = setting(0.1, above=0)  # how strongly the reference holds the policy back
    label_smoothing: float = setting(0.0, low=0, below=0.5)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: PreferenceOptim = field(default_factory=PreferenceOptim)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig


def input_files(recipe: PreferenceRecipe) -> list[Path]:
    """The files whose content decides the result. Errors: UserError naming one that is missing."""
    template = [] if recipe.chat_template is None else [find_template(recipe.chat_template)]
    sources = [*recipe.data.dataset_mixer, *recipe.data.eval_dataset_mixer]
    return [*model_files(recipe.model.model_name_or_path), *template, *source_files(sources)]


# ---------------------------------------------------------------- data and loss


def pair_examples(
    sources: tuple[Source, ...],
    encoder: ChatEncoder,
    recipe: PreferenceRecipe,
    counts: ExampleCounts,
    uses: list[SourceUse],
) -> Examples:
    """The tokenised pairs of a mixture, chosen first. Errors: UserError if none is left."""
    pairs = read_pairs(
        sources,
        seed=recipe.run.seed,
        on_bad_row=recipe.data.on_bad_row,
        counts=counts,
        uses=uses,
    )
    encoded = encode_pairs(pairs, encoder, recipe.data, counts)
    if not encoded:
        raise UserError(
            f"No pair is left of {', '.join(source.path for source in sources)}; "
            f"dropped: {dict(counts.dropped)}."
        )
    return Examples([(pair.chosen, pair.rejected) for pair in encoded])


def preference_sums(
    policy_B2: Tensor, reference_B2: Tensor, beta: float, label_smoothing: float
) -> dict[str, Tensor]:
    """Sums over pairs: the loss, and what the policy has learnt to prefer.

    A tie counts half in the accuracy, so that an unchanged policy scores exactly one half.
    """
    rewards_B2 = implicit_rewards(policy_B2.detach(), reference_B2, beta)
    margin_B = rewards_B2[:, 0] - rewards_B2[:, 1]
    return {
        "loss": dpo_loss(policy_B2, reference_B2, beta, label_smoothing),
        "accuracy": (margin_B > 0).sum() + 0.5 * (margin_B == 0).sum(),
        "reward_margin": margin_B.sum(),
        "reward_chosen": rewards_B2[:, 0].sum(),
        "reward_rejected": rewards_B2[:, 1].sum(),
    }


def answer_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probability of each answer, summed over its tokens: (B, 2)."""
    return batch.sums_over_rows(model(batch)).view(-1, 2)


def loss_against(reference_P2: Tensor, beta: float, label_smoothing: float) -> SummedLoss:
    """The loop's summed loss, for the pairs that these reference log-probabilities are of."""

    def summed_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        policy_B2 = answer_logprobs(model, batch)
        return preference_sums(policy_B2, reference_P2[batch.examples], beta, label_smoothing)

    return summed_loss


# ---------------------------------------------------------------- reference log-probabilities


def reference_key(recipe: PreferenceRecipe, workers: Workers, sets: dict[str, Examples]) -> str:
    """What decides the reference log-probabilities: the model's files, every id and every label.

    Tokenizer, template, data and settings all end in the ids, so a change of any is seen there.
    """
    files = describe_inputs(model_files(recipe.model.model_name_or_path)).values()
    content = {
        "model": sorted(str(item["sha256"]) for item in files),
        "attention": recipe.model.attn_implementation,
        "bf16": workers.bf16,
        "examples": {name: examples.fingerprint() for name, examples in sets.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_reference(path: Path, key: str) -> dict[str, Tensor] | None:
    """The log-probabilities kept in a file, if they are the ones of this key."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


@torch.no_grad()
def compute_reference(
    model: LabelLogprobs,
    examples: Examples,
    workers: Workers,
    batch_size: int,
    update: Callable[[int], None],
) -> Tensor:
    """Log-probability of every answer under the model as it is: (P, 2), on every rank.

    Batches are those of the held-out evaluation, so that an unchanged policy gives the same
    numbers to the last bit.
    """
    reference_P2 = torch.zeros(len(examples), 2, device=workers.device)
    model.eval()
    done = 0
    for batch in evaluation_batches(
        examples, max_examples=batch_size, num_ranks=workers.num_ranks, rank=workers.rank
    ):
        batch = batch.to(workers.device)
        reference_P2[batch.examples] = answer_logprobs(model, batch)
        done += len(batch.examples) * workers.num_ranks
        update(min(done, len(examples)))
    return workers.sum_over_ranks(reference_P2)


def reference_logprobs(
    folder: RunFolder,
    recipe: PreferenceRecipe,
    workers: Workers,
    model: LabelLogprobs,
    sets: dict[str, Examples],
) -> dict[str, Tensor]:
    """Each set's reference log-probabilities: those kept in the run's folder, or computed now.

    ``model`` must hold the starting weights: this comes before the loop loads a checkpoint.
    """
    path = folder.path / REFERENCE_FILE
    key = reference_key(recipe, workers, sets)
    kept = read_reference(path, key)
    if kept is None:
        kept = {}
        for name, examples in sets.items():
            with Progress(folder, f"reference, {name}", len(examples), unit="pairs") as progress:
                kept[name] = compute_reference(
                    model,
                    examples,
                    workers,
                    recipe.train.per_device_eval_batch_size,
                    progress.update,
                )
        if workers.rank == 0:
            on_cpu = {name: values.cpu().contiguous() for name, values in kept.items()}
            atomic_write(path, save(on_cpu, metadata={"key": key}))
    else:
        folder.log(f"reference log-probabilities read from {path}")
    workers.wait()
    return {name: values.to(workers.device) for name, values in kept.items()}


# ---------------------------------------------------------------- plan and run


def plan(recipe: PreferenceRecipe) -> dict[str, object]:
    """What a run would do, for --dry-run; touches nothing. Errors: as in ``run``."""
    encoder = load_chat_encoder(recipe.model.model_name_or_path, recipe.chat_template)
    counts = ExampleCounts()
    examples = pair_examples(recipe.data.dataset_mixer, encoder, recipe, counts, [])
    model_config = load_config(recipe.model)
    check_lengths(int(examples.lengths_NW.max()), model_config, recipe.model.model_name_or_path)
    steps = steps_of(examples, np.ones(len(examples)), recipe.train, seed=recipe.run.seed)
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


def run(recipe: PreferenceRecipe) -> RunFolder:
    """Tune and write the model folder; goes on where an earlier run of it was stopped.

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
    sets = {"train": pair_examples(recipe.data.dataset_mixer, encoder, recipe, folder.counts, uses)}
    if recipe.data.eval_dataset_mixer:
        sets["held out"] = pair_examples(
            recipe.data.eval_dataset_mixer, encoder, recipe, ExampleCounts(), uses
        )
    for line in mixture_lines(uses):
        folder.log(line)

    language_model, stored_dtype = load_causal_lm(recipe.model)
    longest = max(int(examples.lengths_NW.max()) for examples in sets.values())
    check_lengths(longest, language_model.config, recipe.model.model_name_or_path)
    model = workers.place(language_model)
    references = reference_logprobs(folder, recipe, workers, model, sets)
    losses = {
        name: loss_against(reference_P2, recipe.beta, recipe.label_smoothing)
        for name, reference_P2 in references.items()
    }
    held_out = None
    if "held out" in sets:
        held_out = HeldOut(sets["held out"], len(sets["held out"]), losses["held out"])
    examples = sets["train"]
    steps = steps_of(
        examples,
        np.ones(len(examples)),
        recipe.train,
        seed=recipe.run.seed,
        num_ranks=workers.num_ranks,
        cost_of_cut=workers.cost_of_cut(),
    )
    folder.log(
        f"{len(examples):,} pairs, {examples.num_tokens:,} tokens; {steps.total:,} steps of "
        f"{steps.per_step} pairs; log-probabilities from {model.way}"
    )
    results = train(
        folder,
        workers,
        model,
        steps,
        losses["train"],
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
