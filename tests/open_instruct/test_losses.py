import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.trainer_pt_utils import LabelSmoother
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from open_instruct.losses import (
    apo_down_loss,
    apo_zero_loss,
    chosen_nll,
    cpo_loss,
    dft_loss,
    dpo_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    kto_kl,
    kto_loss,
    log_one_minus_exp,
    odds_ratio_loss,
    robust_loss,
    sft_loss,
    simpo_loss,
    smoothed_sft_loss,
    wpo_loss,
)

LN3 = math.log(3)


def test_sft_loss_is_the_sum_of_surprises():
    logprobs_L = torch.tensor([0.5, 0.25, 0.125]).log()
    torch.testing.assert_close(sft_loss(logprobs_L), torch.tensor(6 * math.log(2)))


def test_sft_loss_of_no_label_is_zero():
    assert sft_loss(torch.zeros(0)) == 0


def test_policy_equal_to_reference_costs_log_two_per_pair():
    same_B2 = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    loss = dpo_loss(same_B2, same_B2, beta=0.1)
    torch.testing.assert_close(loss, torch.tensor(5 * math.log(2)))


def test_dpo_loss_by_hand():
    # The policy gained ln 9 on the chosen answer and lost ln 1 on the rejected one; with beta 1/2
    # the margin is ln 3, and -ln sigmoid(ln 3) = -ln(3/4).
    policy_B2 = torch.tensor([[-2.0 + math.log(9), -5.0]])
    reference_B2 = torch.tensor([[-2.0, -5.0]])
    loss = dpo_loss(policy_B2, reference_B2, beta=0.5)
    torch.testing.assert_close(loss, torch.tensor(math.log(4 / 3)))


def test_label_smoothing_mixes_in_the_swapped_pair():
    # Margin ln 3 again: ln(4/3) as labelled, ln 4 swapped.
    policy_B2 = torch.tensor([[math.log(3), 0.0]])
    loss = dpo_loss(policy_B2, torch.zeros(1, 2), beta=1.0, label_smoothing=0.25)
    torch.testing.assert_close(loss, torch.tensor(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))


def test_dpo_gradient_raises_the_chosen_answer_and_lowers_the_rejected_one():
    policy_B2 = torch.zeros(1, 2, requires_grad=True)
    dpo_loss(policy_B2, torch.zeros(1, 2), beta=0.1).backward()
    # d/dx -log sigmoid(x) = -1/2 at 0 (eq. 7's gradient: weight sigmoid(0) times beta)
    torch.testing.assert_close(policy_B2.grad, torch.tensor([[-0.05, 0.05]]))


def test_implicit_rewards_are_beta_times_the_log_ratio():
    rewards = implicit_rewards(torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.0]]), 0.5)
    torch.testing.assert_close(rewards, torch.tensor([[0.5, -0.5]]))


@pytest.mark.parametrize("num_pairs", [1, 7])
def test_cutting_the_pairs_does_not_change_the_sum(num_pairs):
    generator = torch.Generator().manual_seed(1)
    policy_B2, reference_B2 = torch.randn(2, 12, 2, generator=generator).unbind(0)
    whole = dpo_loss(policy_B2, reference_B2, beta=0.3, label_smoothing=0.1)
    parts = zip(policy_B2.split(num_pairs), reference_B2.split(num_pairs), strict=True)
    torch.testing.assert_close(sum(dpo_loss(p, r, 0.3, 0.1) for p, r in parts), whole)


def test_far_apart_answers_neither_overflow_nor_lose_their_gradient():
    policy_B2 = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    loss = dpo_loss(policy_B2, torch.zeros(1, 2), beta=1.0)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(2e4))
    torch.testing.assert_close(policy_B2.grad, torch.tensor([[-1.0, 1.0]]))
    assert F.logsigmoid(torch.tensor(-2e4)) == -2e4


# ---------------------------------------------------------------- the others, by hand

# The policy gained ln 3 on the chosen answer and lost ln 3 on the rejected one.
POLICY_B2 = torch.tensor([[LN3 - 4.0, -LN3 - 6.0]])
REFERENCE_B2 = torch.tensor([[-4.0, -6.0]])


def by_hand(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_robust_loss_by_hand():
    # with beta 1/2 the margin is ln 3: -(3/4 ln 3/4 - 1/4 ln 1/4) / (1 - 1/2)
    expected = -(0.75 * math.log(0.75) - 0.25 * math.log(0.25)) / 0.5
    by_hand(robust_loss(POLICY_B2, REFERENCE_B2, 0.5, 0.25), expected)


def test_robust_loss_is_unbiased_over_swapped_labels():
    # A pair is swapped with probability 0.2; on average it costs what the true pair costs in DPO.
    swapped = torch.flip(POLICY_B2, [1]), torch.flip(REFERENCE_B2, [1])
    mean = 0.8 * robust_loss(POLICY_B2, REFERENCE_B2, 0.3, 0.2) + 0.2 * robust_loss(
        *swapped, 0.3, 0.2
    )
    torch.testing.assert_close(mean, dpo_loss(POLICY_B2, REFERENCE_B2, 0.3))


def test_ipo_loss_by_hand():
    by_hand(ipo_loss(POLICY_B2, REFERENCE_B2, 0.25), (2 * LN3 - 2) ** 2)


def test_hinge_loss_by_hand():
    by_hand(hinge_loss(POLICY_B2, REFERENCE_B2, 0.25), 1 - LN3 / 2)
    by_hand(hinge_loss(POLICY_B2, REFERENCE_B2, 1.0), 0.0)  # a margin of 2.2 is enough


def test_apo_losses_by_hand():
    # rewards with beta 1: ln 3 and -ln 3, whose sigmoids are 3/4 and 1/4; margin ln 9
    by_hand(apo_zero_loss(POLICY_B2, REFERENCE_B2, 1.0), 0.25 + 0.25)
    by_hand(apo_down_loss(POLICY_B2, REFERENCE_B2, 1.0), 0.75 + 0.1)


def test_wpo_loss_by_hand_and_no_gradient_through_the_weight():
    log_weights_B2 = torch.tensor([[math.log(0.5), math.log(0.2)]], requires_grad=True)
    policy_B2 = POLICY_B2.clone().requires_grad_()
    loss = wpo_loss(policy_B2, REFERENCE_B2, log_weights_B2, 0.5)
    by_hand(loss.detach(), 0.1 * math.log(4 / 3))
    loss.backward()
    assert log_weights_B2.grad is None
    torch.testing.assert_close(policy_B2.grad, torch.tensor([[-0.0125, 0.0125]]))  # 0.1 * 1/4 * 1/2


def test_simpo_loss_by_hand():
    # 2 (-1 - -2) - (2 - ln 3) = ln 3
    means_B2 = torch.tensor([[-1.0, -2.0]])
    by_hand(simpo_loss(means_B2, 2.0, 2.0 - LN3), math.log(4 / 3))
    smoothed = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    by_hand(simpo_loss(means_B2, 2.0, 2.0 - LN3, 0.1), smoothed)


def test_cpo_loss_by_hand():
    by_hand(cpo_loss(torch.tensor([[-2.0, -2.0 - 2 * LN3]]), 0.5), math.log(4 / 3))


def test_odds_ratio_loss_by_hand():
    # probabilities 3/4 and 1/4 have odds 3 and 1/3; the ratio is 9, its sigmoid of the log 9/10
    means_B2 = torch.tensor([[0.75, 0.25]]).log()
    by_hand(odds_ratio_loss(means_B2, 0.1), -0.1 * math.log(0.9))


def test_log_one_minus_exp_is_exact_near_both_ends_and_has_finite_gradients():
    logprobs = torch.tensor([-1e-6, -0.1, -math.log(2), -5.0, -100.0], requires_grad=True)
    found = log_one_minus_exp(logprobs)
    expected = [math.log(-math.expm1(float(value))) for value in logprobs.detach().double()]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-6)
    found.sum().backward()
    assert logprobs.grad is not None and torch.isfinite(logprobs.grad).all()


def test_a_certain_answer_has_a_finite_odds_ratio_and_gradient():
    means_B2 = torch.tensor([[0.0, -1.0], [-1.0, 0.0]], requires_grad=True)
    loss = odds_ratio_loss(means_B2, 1.0)
    loss.backward()
    assert means_B2.grad is not None
    assert torch.isfinite(loss) and torch.isfinite(means_B2.grad).all()


def test_the_chosen_answers_likelihood_weighs_every_pair_the_same():
    by_hand(chosen_nll(torch.tensor([[-2.0, -9.0], [-0.5, -7.0]])), 2.5)


def test_kto_loss_by_hand():
    # gains ln 3 and -ln 3 over a z_0 of 0; a good answer costs 1 - 3/4, a bad one 1 - 3/4
    policy_B, reference_B = torch.tensor([LN3, -LN3]), torch.zeros(2)
    is_desirable_B = torch.tensor([True, False])
    kl = kto_kl(torch.tensor(-0.3))
    assert kl == 0  # never below
    by_hand(kto_loss(policy_B, reference_B, is_desirable_B, kl, 1.0), 0.5)
    by_hand(kto_loss(policy_B, reference_B, is_desirable_B, kl, 1.0, 2.0, 4.0), 1.5)
    # z_0 of ln 3 makes the good answer no better than expected: 1 - 1/2; the bad one 1 - 9/10
    by_hand(kto_loss(policy_B, reference_B, is_desirable_B, torch.tensor(LN3), 1.0), 0.5 + 0.1)


# ---------------------------------------------------------------- against TRL and transformers


def random_logprobs(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(32, 2, generator=generator) * scale


# The trainers' loss methods read a handful of attributes and no model.


def cpo_trainer(name, beta, gamma, label_smoothing) -> Any:
    return SimpleNamespace(
        alpha=0.0,
        loss_type=name,
        beta=beta,
        simpo_gamma=gamma,
        label_smoothing=label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["simpo", "cpo"])
def test_reference_free_losses_equal_trl(name, label_smoothing):
    policy_B2 = random_logprobs(0, 3.0 if name == "simpo" else 100.0)
    trl_name = "simpo" if name == "simpo" else "sigmoid"
    losses, *_ = CPOTrainer.cpo_loss(
        cpo_trainer(trl_name, 0.7, 0.4, label_smoothing), policy_B2[:, 0], policy_B2[:, 1]
    )
    if name == "simpo":
        ours = simpo_loss(policy_B2, 0.7, 0.4, label_smoothing)
    else:
        ours = cpo_loss(policy_B2, 0.7, label_smoothing)
    torch.testing.assert_close(ours, losses.sum())


def test_the_odds_ratio_loss_equals_trl():
    policy_B2 = random_logprobs(1, 6.0)
    trainer: Any = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    ratios, *_ = ORPOTrainer.odds_ratio_loss(trainer, policy_B2[:, 0], policy_B2[:, 1])
    torch.testing.assert_close(odds_ratio_loss(policy_B2, 0.3), -ratios.sum())


def test_label_smoothing_of_fine_tuning_equals_transformers():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 7, 11, generator=generator) * 3
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, :4] = -100
    expected = LabelSmoother(epsilon=0.15)({"logits": logits}, labels, shift_labels=True)
    kept = labels[:, 1:] != -100
    logprobs_LV = logits[:, :-1][kept].log_softmax(-1)
    own_L = logprobs_LV.gather(-1, labels[:, 1:][kept][:, None])[:, 0]
    found = smoothed_sft_loss(own_L, logprobs_LV.mean(-1), 0.15)
    torch.testing.assert_close(found / kept.sum(), expected)


def test_label_smoothing_of_fine_tuning_by_hand():
    # a vocabulary of two with probabilities 3/4 and 1/4; half the weight goes to the uniform label
    logprobs_V = torch.tensor([0.75, 0.25]).log()
    expected = -(0.5 * math.log(0.75) + 0.5 * (math.log(0.75) + math.log(0.25)) / 2)
    by_hand(smoothed_sft_loss(logprobs_V[:1], logprobs_V.mean()[None], 0.5), expected)


def test_dft_loss_by_hand_and_its_gradient_is_the_probability():
    logprobs_L = torch.tensor([0.5, 0.25]).log().requires_grad_()
    loss = dft_loss(logprobs_L)
    by_hand(loss.detach(), 0.5 * math.log(2) + 0.25 * math.log(4))
    loss.backward()
    torch.testing.assert_close(logprobs_L.grad, torch.tensor([-0.5, -0.25]))
