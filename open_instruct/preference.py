"""Preference tuning: pairs teach a model which of two answers to prefer (DPO and its family).

pairs -> ids of both answers -> log-probabilities under the starting weights, computed once and
kept -> optimizer steps -> log-probabilities under the weights as they change -> the loss between
the two -> a model folder. Losses without a reference leave the second step out. KTO learns from
single answers that are rated good or bad.
"""

import difflib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

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
from olmo_base.run.recipe import RecipeError, setting
from olmo_base.run.resume import CheckpointConfig
from open_instruct.adapters import AdapterConfig
from open_instruct.batches import Batch, Examples, evaluation_batches
from open_instruct.causal_lm import ModelConfig
from open_instruct.control_tokens import Encoded
from open_instruct.encode import (
    ChatEncoder,
    EncodedRated,
    encode_pairs,
    encode_rated,
    load_chat_encoder,
)
from open_instruct.examples import (
    DataConfig,
    Source,
    SourceUse,
    mixture_lines,
    read_pairs,
    read_rated,
)
from open_instruct.logprobs import LabelLogprobs
from open_instruct.loop import HeldOut, Loss, MeasuredLoss, SummedLoss, TrainConfig, Workers
from open_instruct.losses import (
    apo_down_loss,
    apo_zero_loss,
    chosen_nll,
    cpo_loss,
    dpo_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    kto_kl,
    kto_loss,
    odds_ratio_loss,
    robust_loss,
    simpo_loss,
    wpo_loss,
)
from open_instruct.tuning import Model, input_files, plan_figures, steps_for, train_and_finish

__all__ = ["PreferenceRecipe", "input_files", "plan", "run"]

# P pairs (or rated answers) of a set, B of a micro-batch, 2 = (chosen answer, rejected answer)
# W answers of an example: 2 of a pair, 1 if rated

# Below this share of the tokens a mask may cost more than it saves; chosen, not measured.
LEAST_SAVED = 0.1
# In a folder of its own: vLLM reads every *.safetensors file beside config.json as weights.
REFERENCE_FILE = "reference/logprobs.safetensors"


@dataclass(frozen=True)
class PreferenceOptim(OptimConfig):
    """Preference tuning wants smaller steps than fine-tuning."""

    learning_rate: float = setting(1e-6, above=0)


# ---------------------------------------------------------------- the family of losses


@dataclass(frozen=True)
class PairScores:
    """What the losses compare the pairs of a micro-batch by; log-probabilities of whole answers."""

    policy_B2: Tensor
    num_tokens_B2: Tensor
    reference_B2: Tensor  # zeros where no loss of the recipe has a reference
    log_weights_B2: Tensor | None = None  # of WPO

    @property
    def policy_mean_B2(self) -> Tensor:
        """Log-probability per token."""
        return self.policy_B2 / self.num_tokens_B2

    @property
    def reference_mean_B2(self) -> Tensor:
        """Log-probability per token under the reference."""
        return self.reference_B2 / self.num_tokens_B2


class PreferenceLoss(NamedTuple):
    """One word of ``loss_type``: how it is computed and what it needs."""

    summed: Callable[[PairScores, "LossConfig"], Tensor]
    has_reference: bool = True
    compares_means: bool = False  # log-probabilities per token, not per answer
    usual_beta: float = 0.1  # where the recipe does not say beta
    keys: tuple[str, ...] = ("rpo_alpha",)  # that it uses beside beta


def _wpo(scores: PairScores, keys: "LossConfig") -> Tensor:
    assert scores.log_weights_B2 is not None
    return wpo_loss(scores.policy_B2, scores.reference_B2, scores.log_weights_B2, keys.beta_in_use)


def _orpo(scores: PairScores, keys: "LossConfig") -> Tensor:
    likelihood = chosen_nll(scores.policy_mean_B2)
    return likelihood + odds_ratio_loss(scores.policy_mean_B2, keys.beta_in_use)


def _cpo(scores: PairScores, keys: "LossConfig") -> Tensor:
    preference = cpo_loss(scores.policy_B2, keys.beta_in_use, keys.label_smoothing)
    return preference + _or(keys.cpo_alpha, 1.0) * chosen_nll(scores.policy_mean_B2)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


PAIR_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(
        lambda pairs, keys: dpo_loss(
            pairs.policy_B2, pairs.reference_B2, keys.beta_in_use, keys.label_smoothing
        ),
        keys=("label_smoothing", "rpo_alpha"),
    ),
    "dpo_norm": PreferenceLoss(
        lambda pairs, keys: dpo_loss(
            pairs.policy_mean_B2, pairs.reference_mean_B2, keys.beta_in_use, keys.label_smoothing
        ),
        compares_means=True,
        usual_beta=5.0,
        keys=("label_smoothing", "rpo_alpha"),
    ),
    "ipo": PreferenceLoss(
        lambda pairs, keys: ipo_loss(
            pairs.policy_mean_B2, pairs.reference_mean_B2, keys.beta_in_use
        ),
        compares_means=True,
    ),
    "hinge": PreferenceLoss(
        lambda pairs, keys: hinge_loss(pairs.policy_B2, pairs.reference_B2, keys.beta_in_use)
    ),
    "robust": PreferenceLoss(
        lambda pairs, keys: robust_loss(
            pairs.policy_B2, pairs.reference_B2, keys.beta_in_use, keys.label_smoothing
        ),
        keys=("label_smoothing", "rpo_alpha"),
    ),
    "apo_zero": PreferenceLoss(
        lambda pairs, keys: apo_zero_loss(pairs.policy_B2, pairs.reference_B2, keys.beta_in_use)
    ),
    "apo_down": PreferenceLoss(
        lambda pairs, keys: apo_down_loss(pairs.policy_B2, pairs.reference_B2, keys.beta_in_use)
    ),
    "wpo": PreferenceLoss(_wpo),
    "simpo": PreferenceLoss(
        lambda pairs, keys: simpo_loss(
            pairs.policy_mean_B2,
            keys.beta_in_use,
            _or(keys.simpo_gamma, 0.5),
            keys.label_smoothing,
        ),
        has_reference=False,
        compares_means=True,
        usual_beta=2.0,
        keys=("label_smoothing", "simpo_gamma", "rpo_alpha"),
    ),
    "orpo": PreferenceLoss(_orpo, has_reference=False, compares_means=True, keys=()),
    "cpo": PreferenceLoss(_cpo, has_reference=False, keys=("label_smoothing", "cpo_alpha")),
}
NAMES_OF_TRL = {"sigmoid_norm": "dpo_norm"}  # nearer to another word by spelling
RATED_LOSS = "kto"  # the one that learns from single answers
RATED_KEYS = ("desirable_weight", "undesirable_weight")
RATED_BETA = 0.1


@dataclass(frozen=True)
class LossConfig:
    """Which loss, or which sum of losses, and its numbers.

    ``loss_type`` is one of ``PAIR_LOSSES`` or ``kto``; a list adds several, weighted by
    ``loss_weights``. A key that none of them uses is refused.
    """

    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None  # null: each counts once
    beta: float | None = setting(
        None, above=0, help="null: 0.1; 5 for dpo_norm and 2 for simpo, which compare means"
    )
    label_smoothing: float = setting(0.0, low=0, below=0.5)
    rpo_alpha: float | None = setting(
        None, above=0, help="weight of the chosen answers' likelihood, which is added to the loss"
    )
    simpo_gamma: float | None = setting(None, low=0, help="null: 0.5")
    cpo_alpha: float | None = setting(
        None, low=0, help="weight of the chosen answers' likelihood in CPO; null: 1"
    )
    desirable_weight: float | None = setting(None, above=0, help="null: 1")
    undesirable_weight: float | None = setting(None, above=0, help="null: 1")

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in PAIR_LOSSES and name != RATED_LOSS:
                known = [*PAIR_LOSSES, RATED_LOSS]
                near = [NAMES_OF_TRL[name]] if name in NAMES_OF_TRL else []
                near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise RecipeError("loss_type", f"{name!r} must be one of {', '.join(known)}.{hint}")
        if not self.names or len(set(self.names)) < len(self.names):
            raise RecipeError("loss_type", "must name at least one loss, and none of them twice.")
        if self.is_rated and len(self.names) > 1:
            raise RecipeError(
                "loss_type",
                "kto learns from rated answers and the others from pairs; they cannot be added.",
            )
        if self.loss_weights is not None:
            if len(self.loss_weights) != len(self.names):
                raise RecipeError(
                    "loss_weights",
                    f"{len(self.loss_weights)} weights for {len(self.names)} losses "
                    f"({', '.join(self.names)}). Give one for each.",
                )
            if min(self.loss_weights) <= 0:
                raise RecipeError("loss_weights", "each must be above 0.")
        self._refuse_unused_keys()
        if "robust" in self.names and self.label_smoothing == 0:
            raise RecipeError(
                "label_smoothing",
                "0, and robust needs to know which share of the pairs is swapped. Set it, or take "
                "loss_type: sigmoid.",
            )
        usual = {name: PAIR_LOSSES[name].usual_beta for name in self.names if not self.is_rated}
        if self.beta is None and len(set(usual.values())) > 1:
            words = ", ".join(f"{value:g} for {name}" for name, value in usual.items())
            raise RecipeError(
                "beta", f"must be said: the losses of loss_type usually differ in it ({words})."
            )

    def _refuse_unused_keys(self) -> None:
        used_by: dict[str, list[str]] = {key: [RATED_LOSS] for key in RATED_KEYS}
        for name, loss in PAIR_LOSSES.items():
            for key in loss.keys:
                used_by.setdefault(key, []).append(name)
        for key, users in used_by.items():
            value = getattr(self, key)
            is_set = value != 0.0 if key == "label_smoothing" else value is not None
            if is_set and not set(users) & set(self.names):
                raise RecipeError(
                    key,
                    f"{value}, but {', '.join(self.names)} does not use it "
                    f"({', '.join(users)} would). Remove the key.",
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The losses that are added."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type

    @property
    def is_rated(self) -> bool:
        """Whether rows are rated answers, not pairs."""
        return RATED_LOSS in self.names

    @property
    def weighted(self) -> list[tuple[float, PreferenceLoss]]:
        """The losses of pairs, each with its weight."""
        weights = self.loss_weights or (1.0,) * len(self.names)
        losses = [PAIR_LOSSES[name] for name in self.names]
        return list(zip(weights, losses, strict=True))

    @property
    def has_reference(self) -> bool:
        """Whether anything is compared with the starting weights."""
        return self.is_rated or any(loss.has_reference for _, loss in self.weighted)

    @property
    def beta_in_use(self) -> float:
        """``beta``, or what is usual for the loss."""
        return _or(self.beta, RATED_BETA if self.is_rated else self.weighted[0][1].usual_beta)


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


def answer_logprobs(model: nn.Module, batch: Batch, width: int = 2) -> Tensor:
    """Log-probability of each answer, summed over its tokens: (B, W)."""
    return batch.sums_over_sequences(model(batch)).view(-1, width)


def pair_scores(
    model: nn.Module, batch: Batch, reference_P2: Tensor | None, loss: LossConfig
) -> PairScores:
    """The pairs of a micro-batch under the model as it is, in one forward pass."""
    is_weighted = "wpo" in loss.names
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
    uses: list[SourceUse],
) -> RatedExamples:
    """The tokenised rated answers of a mixture. Errors: UserError if fewer than two are left."""
    rows = read_rated(
        sources,
        seed=recipe.run.seed,
        on_bad_row=recipe.data.on_bad_row,
        counts=counts,
        uses=uses,
    )
    rated = encode_rated(rows, encoder, recipe.data, counts)
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
            _or(loss.desirable_weight, 1.0),
            _or(loss.undesirable_weight, 1.0),
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


# ---------------------------------------------------------------- reference log-probabilities


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
    saved = 1 - positions / apart_positions
    if recipe.share_prompts == "auto" and saved < LEAST_SAVED:
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


def reference_key(recipe: PreferenceRecipe, workers: Workers, sets: dict[str, Examples]) -> str:
    """What decides the reference log-probabilities: the weights, every id and every label.

    Weights by their content: the files of the model and, of an adapter, of its base.

    Tokenizer, template, data and settings all end in the ids, so a change of any is seen there.
    """
    files = describe_inputs(model_files(recipe.model.model_name_or_path)).values()
    bits = (recipe.adapter.load_in_4bit, recipe.adapter.load_in_8bit)
    content = {
        "model": sorted(str(item["sha256"]) for item in files),
        "quantised": [*bits, recipe.adapter.given] if any(bits) else None,
        "attention": recipe.model.attn_implementation,
        "bf16": workers.bf16,
        "shared": [examples.shares_prompts for examples in sets.values()],
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
    """Log-probability of every answer under the model as it is: (P, W), on every rank.

    Batches are those of the held-out evaluation, so that an unchanged policy gives the same
    numbers to the last bit.
    """
    reference_PW = torch.zeros(len(examples), examples.width, device=workers.device)
    model.eval()
    done = 0
    for batch in evaluation_batches(
        examples, max_examples=batch_size, num_ranks=workers.num_ranks, rank=workers.rank
    ):
        batch = batch.to(workers.device)
        reference_PW[batch.examples] = answer_logprobs(model, batch, examples.width)
        done += len(batch.examples) * workers.num_ranks
        update(min(done, len(examples)))
    return workers.sum_over_ranks(reference_PW)


def reference_logprobs(
    folder: RunFolder,
    recipe: PreferenceRecipe,
    workers: Workers,
    model: LabelLogprobs,
    sets: dict[str, Examples],
) -> dict[str, Tensor]:
    """Each set's reference log-probabilities: those kept in the run's folder, or computed now.

    ``model`` must hold the starting weights: this comes before the loop loads a checkpoint. Those
    of a new adapter are the model without it; those of an earlier one are what it was then.
    """
    path = folder.path / REFERENCE_FILE
    key = reference_key(recipe, workers, sets)
    kept = read_reference(path, key)
    if kept is None:
        kept = {}
        for name, examples in sets.items():
            with Progress(folder, f"reference, {name}", len(examples), unit="examples") as progress:
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


def load_set(
    sources: tuple[Source, ...],
    encoder: ChatEncoder,
    recipe: PreferenceRecipe,
    counts: ExampleCounts,
    uses: list[SourceUse],
) -> Examples | RatedExamples:
    """The examples that the recipe's loss learns from. Errors: as in ``run``."""
    read = rated_examples if recipe.loss.is_rated else pair_examples
    return read(sources, encoder, recipe, counts, uses)


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


def plan(recipe: PreferenceRecipe) -> dict[str, object]:
    """What a run would do, for --dry-run; touches nothing. Errors: as in ``run``."""
    encoder = load_chat_encoder(recipe.model.model_name_or_path, recipe.chat_template)
    counts = ExampleCounts()
    examples = learnt(load_set(recipe.data.dataset_mixer, encoder, recipe, counts, []))
    return plan_figures(recipe, examples, np.ones(len(examples)), counts, recipe.adapter)


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
    sets = {"train": load_set(recipe.data.dataset_mixer, encoder, recipe, folder.counts, uses)}
    if recipe.data.eval_dataset_mixer:
        sets["held out"] = load_set(
            recipe.data.eval_dataset_mixer, encoder, recipe, ExampleCounts(), uses
        )
    for line in mixture_lines(uses):
        folder.log(line)

    longest = max(
        int(examples.lengths_NW.max())
        for name, items in sets.items()
        for examples in compared(name, items).values()
    )
    model = Model(recipe, workers, folder, longest)
    sets = with_shared_prompts(sets, recipe, workers, model.logprobs, folder)
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
    examples = learnt(sets["train"])
    steps = steps_for(
        recipe, workers, examples, np.ones(len(examples)), packs=model.logprobs.packs
    )
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
        lambda: model.save(folder, encoder),
        steps,
        losses["train"],
        held_out,
    )
    return folder
