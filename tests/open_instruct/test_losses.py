import math

import pytest
import torch
import torch.nn.functional as F

from open_instruct.losses import dpo_loss, implicit_rewards, sft_loss


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
