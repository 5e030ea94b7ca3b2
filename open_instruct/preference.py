"""Preference tuning: pairs teach a model which of two answers to prefer (DPO and its family).

pairs -> ids of both answers -> log-probabilities under the starting weights, computed once and
kept -> optimizer steps -> log-probabilities under the weights as they change -> the loss between
the two -> a model folder. Losses without a reference leave the second step out. KTO learns from
single answers that are rated good or bad.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

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
from open_instruct.control_tokens import Encoded
from open_instruct.encode import ChatEncoder, EncodedRated
from open_instruct.examples import DataConfig, Source
from open_instruct.logprobs import LabelLogprobs
from open_instruct.loop import HeldOut, Loss, MeasuredLoss, SummedLoss, TrainConfig, Workers
from open_instruct.losses import chosen_nll, implicit_rewards, kto_kl, kto_loss
from open_instruct.pair_losses import LossConfig, PairScores, value_or
from open_instruct.publish import HubConfig
from open_instruct.reference import answer_logprobs, reference_logprobs
from open_instruct.sample_log import SampleLogConfig
from open_instruct.tokenised import DataReport, tokenised_pairs, tokenised_rated
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

__all__ = ["PreferenceRecipe", "input_files", "plan", "run"]

# P pairs (or rated answers) of a set, B of a micro-batch, 2 = (chosen answer, rejected answer)
# W answers of an example: 2 of a pair, 1 if rated

# Below this share of the tokens a mask may cost more than it saves; chosen, not measured.
LEAST_SAVED = 0.1


@dataclass(frozen=True)
class PreferenceOptim(OptimConfig):
    """Preference tuning wants smaller steps than fine-tuning."""

    learning_rate: float = setting(1e-6, above=0)


@dataclass(frozen=True, kw_only=True)
class PreferenceRecipe:
    """The keys of ``stage: dpo``."""

    stage: Literal["dpo"] = "dpo"
    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    chat_template: str | None = None  # null: the template that the model carries
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    share_prompts: bool | Literal["auto"] = setting(
        "auto",
        help="put both answers behind one copy of their prompt; auto: where the model computes the "
        "same and it saves tokens",
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: PreferenceOptim = field(default_factory=PreferenceOptim)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    shown: SampleLogConfig = field(default_factory=SampleLogConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    run: RunConfig

    def __post_init__(self) -> None:
        if self.loss.is_rated and self.share_prompts is True:
            raise RecipeError(
                "share_prompts",
                "true, but kto learns from single answers, and none of them has another one to "
                "share its prompt with. Remove the key.",
            )


# ---------------------------------------------------------------- pairs: data and loss


def pair_examples(
    sources: tuple[Source, ...],
    encoder: ChatEncoder,
    recipe: PreferenceRecipe,
    counts: ExampleCounts,
    report: DataReport,
) -> Examples:
    """The tokenised pairs of a mixture, chosen first. Errors: UserError if none is left."""
    encoded = tokenised_pairs(sources, encoder, recipe, counts, report)
    if not encoded:
        raise UserError(
            f"No pair is left of {', '.join(source.path for source in sources)}; "
            f"dropped: {dict(counts.dropped)}."
        )
    return Examples([(pair.chosen, pair.rejected) for pair in encoded])


def preference_sums(pairs: PairScores, loss: LossConfig) -> dict[str, Tensor]:
    """Sums over pairs: the loss, and what the policy has learnt to prefer.

    Rewards are those of the first loss of the recipe. A tie counts half in the accuracy, so that
    an unchanged policy scores exactly one half.
    """
    total = sum(weight * part.summed(pairs, loss) for weight, part in loss.weighted)
    assert isinstance(total, Tensor)
    if loss.rpo_alpha is not None:
        total = total + loss.rpo_alpha * chosen_nll(pairs.policy_mean_B2)
    first = loss.weighted[0][1]
    policy_B2 = pairs.policy_mean_B2 if first.compares_means else pairs.policy_B2
    reference_B2 = pairs.reference_mean_B2 if first.compares_means else pairs.reference_B2
    rewards_B2 = implicit_rewards(
        policy_B2.detach(), reference_B2 if first.has_reference else 0.0, loss.beta_in_use
    )
    margin_B = rewards_B2[:, 0] - rewards_B2[:, 1]
    return {
        "loss": total,
        "accuracy": (margin_B > 0).sum() + 0.5 * (margin_B == 0).sum(),
        "reward_margin": margin_B.sum(),
        "reward_chosen": rewards_B2[:, 0].sum(),
        "reward_rejected": rewards_B2[:, 1].sum(),
    }


def pair_scores(
    model: nn.Module, batch: Batch, reference_P2: Tensor | None, loss: LossConfig
) -> PairScores:
    """The pairs of a micro-batch under the model as it is, in one forward pass."""
    is_weighted = loss.is_weighted
    scores_L = model(batch, "log_sum_squares") if is_weighted else model(batch)
    logprobs_L = scores_L[:, 0] if is_weighted else scores_L
    policy_B2 = batch.sums_over_sequences(logprobs_L).view(-1, 2)
    num_tokens_B2 = batch.sums_over_sequences(torch.ones_like(logprobs_L)).view(-1, 2)
    log_weights_B2 = None
    if is_weighted:
        aligned_L = (scores_L[:, 0] - scores_L[:, 1]).detach()
        log_weights_B2 = batch.sums_over_sequences(aligned_L).view(-1, 2) / num_tokens_B2
    if reference_P2 is None:
        reference_B2 = torch.zeros_like(policy_B2)
    else:
        reference_B2 = reference_P2[batch.examples]
    return PairScores(policy_B2, num_tokens_B2, reference_B2, log_weights_B2)


def loss_against(reference_P2: Tensor | None, loss: LossConfig) -> SummedLoss:
    """The loop's summed loss, for the pairs that these reference log-probabilities are of.

    None: for losses without a reference.
    """

    def summed_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return preference_sums(pair_scores(model, batch, reference_P2, loss), loss)

    return summed_loss


# ---------------------------------------------------------------- rated answers: data and loss


class RatedExamples(NamedTuple):
    """Rated answers, each beside the same prompt with the answer to another one."""

    answers: Examples
    mismatched: Examples  # for KTO's z_0; never learnt
    is_desirable_P: Tensor


def rated_examples(
    sources: tuple[Source, ...],
    encoder: ChatEncoder,
    recipe: PreferenceRecipe,
    counts: ExampleCounts,
    report: DataReport,
) -> RatedExamples:
    """The tokenised rated answers of a mixture. Errors: UserError if fewer than two are left."""
    rated = tokenised_rated(sources, encoder, recipe, counts, report)
    if len(rated) < 2:
        raise UserError(
            f"{len(rated)} rated answers are left of "
            f"{', '.join(source.path for source in sources)}; dropped: {dict(counts.dropped)}. "
            "KTO compares each question with the answer to another one and needs at least 2."
        )
    partners = mismatched_partners(len(rated), recipe.run.seed)
    mismatched = [
        with_answer_of(item, rated[partner], recipe.data.max_length)
        for item, partner in zip(rated, partners, strict=True)
    ]
    return RatedExamples(
        Examples([(item.sequence,) for item in rated]),
        Examples([(sequence,) for sequence in mismatched]),
        torch.tensor([item.is_desirable for item in rated]),
    )


def mismatched_partners(number: int, seed: int) -> list[int]:
    """For each of ``number`` examples another one, every one once: a shuffled circle.

    Decided once for the whole set, not within a micro-batch or a step: so z_0 is the same however
    a step is cut, and the reference of the mismatched answers can be kept like that of the others.
    Shuffled, because two answers to one question often stand next to each other.
    """
    order = np.random.default_rng([seed, number]).permutation(number)
    partners = np.empty(number, dtype=np.int64)
    partners[order] = np.roll(order, 1)
    return partners.tolist()


def with_answer_of(item: EncodedRated, other: EncodedRated, max_length: int) -> Encoded:
    """The prompt of one with the answer of the other, cut on the right to ``max_length`` ids."""
    prompt, answer = item.prompt_length, other.prompt_length
    ids = item.sequence.ids[:prompt] + other.sequence.ids[answer:]
    is_learnt = item.sequence.is_learnt[:prompt] + other.sequence.is_learnt[answer:]
    return Encoded(ids[:max_length], is_learnt[:max_length])


def rated_sums(
    policy_B: Tensor, reference_B: Tensor, is_desirable_B: Tensor, kl: Tensor, loss: LossConfig
) -> dict[str, Tensor]:
    """Sums over rated answers: the loss, and whether the policy tells good from bad.

    An answer's reward counts with the sign of its rating; accuracy is the share of answers whose
    reward has that sign, a tie counting half.
    """
    beta = loss.beta_in_use
    sign_B = torch.where(is_desirable_B, 1.0, -1.0)
    signed_B = sign_B * (implicit_rewards(policy_B.detach(), reference_B, beta) - beta * kl)
    return {
        "loss": kto_loss(
            policy_B,
            reference_B,
            is_desirable_B,
            kl,
            beta,
            value_or(loss.desirable_weight, 1.0),
            value_or(loss.undesirable_weight, 1.0),
        ),
        "accuracy": (signed_B > 0).sum() + 0.5 * (signed_B == 0).sum(),
        "signed_reward": signed_B.sum(),
        "kl": kl * len(policy_B),
    }


def rated_loss_against(
    reference_P: Tensor,
    mismatched_reference_P: Tensor,
    rated: RatedExamples,
    loss: LossConfig,
) -> MeasuredLoss:
    """KTO's loss. Its z_0 is that of a whole step: of all its micro-batches on all ranks."""
    is_desirable_P = rated.is_desirable_P.to(reference_P.device)

    def measure(model: nn.Module, batch: Batch) -> Tensor:
        return (
            answer_logprobs(model, batch, 1)[:, 0] - mismatched_reference_P[batch.examples]
        ).sum()

    def given(mean_gain: Tensor) -> SummedLoss:
        kl = kto_kl(mean_gain)

        def summed_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            return rated_sums(
                answer_logprobs(model, batch, 1)[:, 0],
                reference_P[batch.examples],
                is_desirable_P[batch.examples],
                kl,
                loss,
            )

        return summed_loss

    return MeasuredLoss(rated.mismatched, measure, given)


# ---------------------------------------------------------------- prompts read once


def saved_by_sharing(pairs: Examples) -> float:
    """The share of all tokens that is read once less where answers share their prompt."""
    return 1 - int(pairs.sharing_prompts().positions_N.sum()) / pairs.num_tokens


def worth_sharing(pairs: Examples, recipe: PreferenceRecipe) -> bool:
    """Whether a run shares prompts if the model can."""
    if recipe.share_prompts == "auto":
        return saved_by_sharing(pairs) >= LEAST_SAVED
    return recipe.share_prompts


def with_shared_prompts(
    sets: dict[str, Examples | RatedExamples],
    recipe: PreferenceRecipe,
    workers: Workers,
    model: LabelLogprobs,
    folder: RunFolder,
) -> dict[str, Examples | RatedExamples]:
    """The sets as the model is to read them; says in the log what ``share_prompts`` came to.

    Errors: UserError if the recipe insists and the model cannot.
    """
    pairs = {name: items for name, items in sets.items() if isinstance(items, Examples)}
    if not pairs or recipe.share_prompts is False:
        return sets
    shared = {name: examples.sharing_prompts() for name, examples in pairs.items()}
    apart_positions = pairs["train"].num_tokens
    positions = int(shared["train"].positions_N.sum())
    if not worth_sharing(pairs["train"], recipe):
        saved = saved_by_sharing(pairs["train"])
        folder.log(f"prompts are read twice: to share them would save {saved:.0%} of the tokens")
        return sets
    farthest = max(pairs, key=lambda name: int(shared[name].positions_N.max()))
    reason = model.share_prompts(pairs[farthest])
    if workers.any_rank(reason is not None):
        reason = reason or "another rank found that it cannot"
        if recipe.share_prompts is True:
            raise UserError(
                f"share_prompts: true, but two answers cannot share their prompt: {reason}. "
                "Set share_prompts: auto, which reads each prompt twice where it must."
            )
        folder.log(f"prompts are read twice: {reason}")
        return sets
    folder.log(
        f"both answers share their prompt: {positions:,} tokens are read in place of "
        f"{apart_positions:,}"
    )
    return {**sets, **shared}


# ---------------------------------------------------------------- plan and run


def load_set(
    sources: tuple[Source, ...],
    encoder: ChatEncoder,
    recipe: PreferenceRecipe,
    counts: ExampleCounts,
    report: DataReport,
) -> Examples | RatedExamples:
    """The examples that the recipe's loss learns from. Errors: as in ``run``."""
    read = rated_examples if recipe.loss.is_rated else pair_examples
    return read(sources, encoder, recipe, counts, report)


def compared(name: str, items: Examples | RatedExamples) -> dict[str, Examples]:
    """What needs reference log-probabilities, by the names they are kept under."""
    if isinstance(items, Examples):
        return {name: items}
    return {name: items.answers, f"{name}, mismatched": items.mismatched}


def loss_of(
    name: str, items: Examples | RatedExamples, references: dict[str, Tensor], loss: LossConfig
) -> Loss:
    """The loop's loss over one set."""
    if isinstance(items, Examples):
        return loss_against(references.get(name), loss)
    own, mismatched = (references[key][:, 0] for key in compared(name, items))
    return rated_loss_against(own, mismatched, items, loss)


def learnt(items: Examples | RatedExamples) -> Examples:
    """The examples that steps are made of."""
    return items if isinstance(items, Examples) else items.answers


def plan(recipe: PreferenceRecipe, launch: Launch | None = None) -> dict[str, object]:
    """What a run would do, for --dry-run; touches nothing. Errors: as in ``run``."""
    figures = plan_from_afar(recipe, 1 if recipe.loss.is_rated else 2, launch=launch)
    if figures is not None:
        return figures
    items, counts = load_for_plan(recipe, load_set)
    examples = learnt(items)
    read = {}
    if isinstance(items, Examples) and worth_sharing(items, recipe):
        examples = items.sharing_prompts()
        read = {"tokens_with_shared_prompts": int(examples.positions_N.sum())}
    terms = np.ones(len(examples))
    is_weighted = recipe.loss.is_weighted
    way = expected_way(recipe)
    figures = plan_figures(
        recipe, examples, terms, counts, way, needs_distribution=is_weighted, launch=launch
    )
    return figures | read


def run(recipe: PreferenceRecipe) -> RunFolder:
    """Tune and write the model folder; goes on where an earlier run of it was stopped.

    Errors: UserError, DataError for what the user can mend; Stopped after a signal.
    """
    opened = open_run(recipe, load_set)
    if isinstance(opened, RunFolder):
        return opened
    workers, folder = opened.workers, opened.folder
    sets = {"train": opened.train}
    if opened.held_out is not None:
        sets["held out"] = opened.held_out

    longest = max(
        int(examples.lengths_NW.max())
        for name, items in sets.items()
        for examples in compared(name, items).values()
    )
    model = Model(recipe, workers, folder, longest)
    sets = with_shared_prompts(sets, recipe, workers, model.logprobs, folder)
    examples = learnt(sets["train"])
    terms = np.ones(len(examples))
    is_weighted = recipe.loss.is_weighted
    model.settle_batching(recipe, workers, folder, examples, terms, is_weighted)
    parts: dict[str, Examples] = {}
    for name, items in sets.items():
        parts |= compared(name, items)
    references: dict[str, Tensor] = {}
    if recipe.loss.has_reference:
        references = reference_logprobs(folder, recipe, workers, model.logprobs, parts)
    losses = {name: loss_of(name, items, references, recipe.loss) for name, items in sets.items()}
    held_out = None
    if "held out" in sets:
        held_out_examples = learnt(sets["held out"])
        held_out = HeldOut(held_out_examples, len(held_out_examples), losses["held out"])
    steps = steps_for(recipe, workers, examples, terms, packs=model.logprobs.packs)
    kind = "rated answers" if recipe.loss.is_rated else "pairs"
    folder.log(
        f"{len(examples):,} {kind}, {examples.num_tokens:,} tokens; {steps.total:,} steps of "
        f"{steps.per_step}; {' + '.join(recipe.loss.names)} with beta {recipe.loss.beta_in_use:g}; "
        f"log-probabilities from {model.logprobs.way}"
    )
    if isinstance(sets["train"], RatedExamples):
        num_good = int(sets["train"].is_desirable_P.sum())
        folder.log(f"{num_good:,} answers are good, {len(examples) - num_good:,} bad")
    train_and_finish(
        recipe,
        workers,
        folder,
        model.logprobs,
        lambda: model.save(folder, opened.encoder),
        steps,
        losses["train"],
        held_out,
        model.sample_log(recipe, folder, opened.encoder, held_out, workers),
        uses=opened.uses,
        needs_distribution=is_weighted,
    )
    return folder
