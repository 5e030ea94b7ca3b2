"""The words of ``loss_type``: what each preference loss is computed from, and which keys it uses.

The arithmetic itself is ``losses.py``'s.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from olmo_base.run.recipe import RecipeError, setting
from open_instruct.losses import (
    apo_down_loss,
    apo_zero_loss,
    chosen_nll,
    cpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    odds_ratio_loss,
    robust_loss,
    simpo_loss,
    wpo_loss,
)

# B pairs of a micro-batch, 2 = (chosen answer, rejected answer)


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
    return preference + value_or(keys.cpo_alpha, 1.0) * chosen_nll(scores.policy_mean_B2)


def value_or(value: float | None, default: float) -> float:
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
            value_or(keys.simpo_gamma, 0.5),
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
    def is_weighted(self) -> bool:
        """Whether it asks for more than the labels' log-probabilities."""
        return "wpo" in self.names

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
        return value_or(self.beta, RATED_BETA if self.is_rated else self.weighted[0][1].usual_beta)
