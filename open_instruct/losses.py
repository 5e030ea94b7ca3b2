"""The losses of post-training, as arithmetic: tensors in, one sum out.

The loop divides each sum once, by everything counted over micro-batches and ranks.
"""

# L label tokens of a micro-batch, B preference pairs (or rated answers), 2 = (chosen, rejected)
#
# Of an answer two numbers may enter: the sum of its tokens' log-probabilities, or their mean. Which
# one a loss takes stands in its docstring; a beta that suits the one is some 50 times off for the
# other.

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------- supervised fine-tuning


def sft_loss(logprobs_L: Tensor) -> Tensor:
    """Negative log-likelihood in nats, summed over label tokens.

    Takes the log-probability of each label and of nothing else: a position without a label has no
    entry, so no mask can be forgotten.
    """
    return -logprobs_L.sum()


def smoothed_sft_loss(
    logprobs_L: Tensor, mean_logprobs_L: Tensor, label_smoothing: float
) -> Tensor:
    """Cross-entropy against softened labels, summed over label tokens (arXiv:1512.00567, sec. 7).

    Each label has 1 - ``label_smoothing`` of the weight, and the whole vocabulary shares the rest
    equally. ``mean_logprobs_L`` is the mean log-probability over the vocabulary at each label.
    """
    return -((1 - label_smoothing) * logprobs_L + label_smoothing * mean_logprobs_L).sum()


def dft_loss(logprobs_L: Tensor) -> Tensor:
    """Each label's surprise weighted by its probability, summed over label tokens (DFT).

    arXiv:2508.05629. The weight takes no gradient. It undoes the 1/p that makes unlikely labels
    pull the hardest.
    """
    return -(logprobs_L.detach().exp() * logprobs_L).sum()


# ---------------------------------------------------------------- pairs, against a reference


def implicit_rewards(policy_B2: Tensor, reference_B2: Tensor | float, beta: float) -> Tensor:
    """How much more likely the policy makes each answer than the reference does, times beta.

    The reward that DPO optimises without a reward model (arXiv:2305.18290, section 4; the term of
    eq. 5 that does not cancel). Entries are log-probabilities summed over the answer's tokens, or
    their means where the loss compares means. Without a reference (0) it is the policy's own.
    """
    return beta * (policy_B2 - reference_B2)


def _margins(policy_B2: Tensor, reference_B2: Tensor, beta: float) -> Tensor:
    rewards_B2 = implicit_rewards(policy_B2, reference_B2, beta)
    return rewards_B2[:, 0] - rewards_B2[:, 1]


def _logistic(margin_B: Tensor, label_smoothing: float) -> Tensor:
    as_labelled = F.logsigmoid(margin_B).sum()
    if label_smoothing == 0.0:
        return -as_labelled
    swapped = F.logsigmoid(-margin_B).sum()
    return -(1 - label_smoothing) * as_labelled - label_smoothing * swapped


def dpo_loss(
    policy_B2: Tensor, reference_B2: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Preference loss summed over pairs (arXiv:2305.18290, eq. 7).

    Column 0 is the chosen answer, column 1 the rejected one. Entries are log-probabilities summed
    over the answer's tokens. ``label_smoothing`` is the assumed share of pairs whose two answers
    are swapped (conservative DPO, eq. 3 of https://ericmitchell.ai/cdpo.pdf); 0 is plain DPO.

    With means in place of sums it is the length-normalised DPO of Tülu 3 (arXiv:2411.15124).
    """
    return _logistic(_margins(policy_B2, reference_B2, beta), label_smoothing)


def robust_loss(
    policy_B2: Tensor, reference_B2: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    """DPO freed of the bias of swapped labels, summed over pairs (rDPO, arXiv:2403.00409).

    ``label_smoothing`` is the share of swapped pairs; below 1/2, or nothing can be told from them.
    Entries are sums over tokens. Single pairs may cost less than nothing; the mean does not.
    """
    margin_B = _margins(policy_B2, reference_B2, beta)
    as_labelled = (1 - label_smoothing) * F.logsigmoid(margin_B)
    swapped = label_smoothing * F.logsigmoid(-margin_B)
    return -(as_labelled - swapped).sum() / (1 - 2 * label_smoothing)


def ipo_loss(policy_B2: Tensor, reference_B2: Tensor, beta: float) -> Tensor:
    """Squared distance of the margin from 1 / (2 beta), summed over pairs.

    arXiv:2310.12036, eq. 17; ``beta`` is the paper's tau. Entries are means over tokens, which its
    authors use although the equation does not show it.
    """
    difference_B2 = policy_B2 - reference_B2
    margin_B = difference_B2[:, 0] - difference_B2[:, 1]
    return (margin_B - 1 / (2 * beta)).square().sum()


def hinge_loss(policy_B2: Tensor, reference_B2: Tensor, beta: float) -> Tensor:
    """What a margin lacks to 1, summed over pairs (the normalised hinge loss of arXiv:2309.06657).

    SLiC's loss (arXiv:2305.10425) against a reference. Entries are sums over tokens.
    """
    return F.relu(1 - _margins(policy_B2, reference_B2, beta)).sum()


def apo_zero_loss(policy_B2: Tensor, reference_B2: Tensor, beta: float) -> Tensor:
    """Chosen answers up, rejected ones down, summed over pairs (arXiv:2408.06266, eq. 7).

    For answers that are better than the model's own. Entries are sums over tokens.
    """
    rewards_B2 = implicit_rewards(policy_B2, reference_B2, beta)
    return (torch.sigmoid(-rewards_B2[:, 0]) + torch.sigmoid(rewards_B2[:, 1])).sum()


def apo_down_loss(policy_B2: Tensor, reference_B2: Tensor, beta: float) -> Tensor:
    """Chosen answers down, rejected ones further down (arXiv:2408.06266, eq. 8), summed over pairs.

    For answers that are all worse than the model's own. Entries are sums over tokens.
    """
    rewards_B2 = implicit_rewards(policy_B2, reference_B2, beta)
    margin_B = rewards_B2[:, 0] - rewards_B2[:, 1]
    return (torch.sigmoid(rewards_B2[:, 0]) + torch.sigmoid(-margin_B)).sum()


def wpo_loss(
    policy_B2: Tensor, reference_B2: Tensor, log_weights_B2: Tensor, beta: float
) -> Tensor:
    """DPO with each pair weighted by how likely the policy is to write it, summed over pairs.

    arXiv:2406.11827, eq. 2.
    ``log_weights_B2`` is the mean over an answer's tokens of log p(token) - log sum_v p(v)^2 (the
    paper's sampled alignment); no gradient goes through it. Other entries are sums over tokens.
    """
    weight_B = log_weights_B2.detach().sum(dim=1).exp()
    return -(weight_B * F.logsigmoid(_margins(policy_B2, reference_B2, beta))).sum()


# ---------------------------------------------------------------- pairs, without a reference


def simpo_loss(
    policy_B2: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """A margin that has to exceed ``gamma``, summed over pairs (arXiv:2405.14734, eq. 6).

    Entries are means over tokens. ``label_smoothing`` as in ``dpo_loss``.
    """
    margin_B = beta * (policy_B2[:, 0] - policy_B2[:, 1]) - gamma
    return _logistic(margin_B, label_smoothing)


def cpo_loss(policy_B2: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO against a uniform reference, summed over pairs (arXiv:2401.08417, eq. 3, L_prefer).

    Entries are sums over tokens. The paper adds the likelihood of the chosen answer:
    ``chosen_nll``. ``label_smoothing`` as in ``dpo_loss``.
    """
    return _logistic(beta * (policy_B2[:, 0] - policy_B2[:, 1]), label_smoothing)


def odds_ratio_loss(policy_B2: Tensor, beta: float) -> Tensor:
    """The odds of the chosen answer against those of the rejected one, summed over pairs.

    arXiv:2403.07691, eq. 7, multiplied by ``beta`` (the paper's lambda). Entries are means over
    tokens. ORPO (eq. 6) adds the likelihood of the chosen answer: ``chosen_nll``.
    """
    log_odds_B2 = policy_B2 - log_one_minus_exp(policy_B2)
    return -beta * F.logsigmoid(log_odds_B2[:, 0] - log_odds_B2[:, 1]).sum()


def log_one_minus_exp(logprobs: Tensor) -> Tensor:
    """log(1 - p) of log p, exact near both ends.

    A p that rounding made 1 counts as 1 - 1e-7, so that neither value nor gradient is infinite.
    """
    logprobs = logprobs.clamp(max=-1e-7)
    is_likely = logprobs > -math.log(2)
    # each branch sees only what it is exact for: the other's infinite gradient would become nan
    likely = torch.where(is_likely, logprobs, -1.0)
    unlikely = torch.where(is_likely, -1.0, logprobs)
    return torch.where(is_likely, (-torch.expm1(likely)).log(), torch.log1p(-unlikely.exp()))


def chosen_nll(mean_logprobs_B2: Tensor) -> Tensor:
    """Negative log-likelihood per token of each chosen answer, summed over pairs.

    The term that CPO (arXiv:2401.08417), ORPO (arXiv:2403.07691, eq. 6) and iterative RPO
    (arXiv:2404.19733, eq. 1) add so that the chosen answer itself stays likely. Every pair weighs
    the same, however long its answer: TRL's mean over all tokens of a micro-batch depends on how
    the step was cut (and its ORPO counts the tokens of the prompt too).
    """
    return -mean_logprobs_B2[:, 0].sum()


# ---------------------------------------------------------------- rewards of pairs


def bradley_terry_loss(rewards_B2: Tensor, margins_B: Tensor) -> Tensor:
    """The chosen answer's reward has to exceed the rejected one's by the margin; summed over pairs.

    arXiv:2307.09288, eq. 2; with margins of 0 the loss of arXiv:2203.02155, eq. 1.
    """
    return -F.logsigmoid(rewards_B2[:, 0] - rewards_B2[:, 1] - margins_B).sum()


def centering_loss(rewards_B2: Tensor) -> Tensor:
    """The square of each pair's added rewards, summed over pairs (arXiv:2312.09244)."""
    return rewards_B2.sum(dim=1).square().sum()


# ---------------------------------------------------------------- single answers, rated


def kto_loss(
    policy_B: Tensor,
    reference_B: Tensor,
    is_desirable_B: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Prospect-theoretic loss of rated answers, summed over them (arXiv:2402.01306, section 4.1).

    Entries are sums over tokens. ``kl`` is the paper's z_0, one number for the whole step without
    a gradient: what the policy gains on answers to other questions. ``kto_kl`` makes it.
    """
    gain_B = policy_B - reference_B
    desirable_B = torch.sigmoid(-beta * (gain_B - kl))
    undesirable_B = torch.sigmoid(-beta * (kl - gain_B))
    return torch.where(
        is_desirable_B, desirable_weight * desirable_B, undesirable_weight * undesirable_B
    ).sum()


def kto_kl(mean_gain: Tensor) -> Tensor:
    """KTO's z_0 from the mean gain on mismatched answers (arXiv:2402.01306, section 4.1)."""
    return mean_gain.clamp(min=0)
