"""The losses of post-training, as arithmetic: tensors in, one sum out.

The loop divides each sum once, by everything counted over micro-batches and ranks.
"""

# L label tokens of a micro-batch, B preference pairs, 2 = (chosen answer, rejected answer)

import torch.nn.functional as F
from torch import Tensor


def sft_loss(logprobs_L: Tensor) -> Tensor:
    """Negative log-likelihood in nats, summed over label tokens.

    Takes the log-probability of each label and of nothing else: a position without a label has no
    entry, so no mask can be forgotten.
    """
    return -logprobs_L.sum()


def implicit_rewards(policy_B2: Tensor, reference_B2: Tensor, beta: float) -> Tensor:
    """How much more likely the policy makes each answer than the reference does, times beta.

    The reward that DPO optimises without a reward model (arXiv:2305.18290, section 4; the term of
    eq. 5 that does not cancel). Entries are log-probabilities summed over the answer's tokens.
    """
    return beta * (policy_B2 - reference_B2)


def dpo_loss(
    policy_B2: Tensor, reference_B2: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Preference loss summed over pairs (arXiv:2305.18290, eq. 7).

    Column 0 is the chosen answer, column 1 the rejected one. Entries are log-probabilities summed
    over the answer's tokens. ``label_smoothing`` is the assumed share of pairs whose two answers
    are swapped (conservative DPO, eq. 3 of https://ericmitchell.ai/cdpo.pdf); 0 is plain DPO.
    """
    rewards_B2 = implicit_rewards(policy_B2, reference_B2, beta)
    margin_B = rewards_B2[:, 0] - rewards_B2[:, 1]
    as_labelled = F.logsigmoid(margin_B).sum()
    if label_smoothing == 0.0:
        return -as_labelled
    swapped = F.logsigmoid(-margin_B).sum()
    return -(1 - label_smoothing) * as_labelled - label_smoothing * swapped
