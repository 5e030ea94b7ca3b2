"""The next-token loss: against torch's cross-entropy, in chunks, in bf16, with the z-loss."""

import math

import pytest
import torch
import torch.nn.functional as F

from olmo_base import losses
from olmo_base.losses import next_token_loss


def random_problem(num_positions=37, width=8, vocab=50, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(num_positions, width, generator=generator, dtype=dtype)
    head_VD = torch.randn(vocab, width, generator=generator, dtype=dtype)
    labels_N = torch.randint(vocab, (num_positions,), generator=generator)
    return hidden_ND.requires_grad_(), head_VD.requires_grad_(), labels_N


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def test_equal_logits_cost_the_log_of_the_vocabulary():
    loss, cross_entropy = next_token_loss(
        torch.zeros(3, 4), torch.zeros(10, 4), torch.tensor([1, 5, 9])
    )
    assert loss.item() == pytest.approx(3 * math.log(10))
    assert cross_entropy.item() == loss.item()


@pytest.mark.parametrize("max_logits", [1, 64 * 50 * 2, 2**21])
def test_value_and_gradients_are_those_of_torch_for_any_chunk(monkeypatch, max_logits):
    monkeypatch.setitem(losses.MAX_LOGITS, "cpu", max_logits)
    hidden_ND, head_VD, labels_N = random_problem(num_positions=200)
    expected = F.cross_entropy(hidden_ND @ head_VD.T, labels_N, reduction="sum")
    loss, cross_entropy = next_token_loss(hidden_ND, head_VD, labels_N)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(cross_entropy, expected.detach())
    assert not cross_entropy.requires_grad
    found = gradients(loss / 7, hidden_ND, head_VD)
    torch.testing.assert_close(found, gradients(expected / 7, hidden_ND, head_VD))


def test_the_z_loss_is_the_squared_log_of_the_denominator():
    hidden_ND, head_VD, labels_N = random_problem()
    logits_NV = hidden_ND @ head_VD.T
    plain = F.cross_entropy(logits_NV, labels_N, reduction="sum")
    expected = plain + 0.3 * logits_NV.logsumexp(-1).square().sum()
    loss, cross_entropy = next_token_loss(hidden_ND, head_VD, labels_N, z_loss=0.3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(cross_entropy, plain.detach())  # without the z-loss
    found = gradients(loss, hidden_ND, head_VD)
    torch.testing.assert_close(found, gradients(expected, hidden_ND, head_VD))


def test_large_logits_do_not_overflow():
    hidden_ND, head_VD = torch.full((2, 1), 1000.0), torch.tensor([[1.0], [-1.0], [0.5]])
    loss, _ = next_token_loss(hidden_ND, head_VD, torch.tensor([0, 2]))
    assert loss.item() == pytest.approx(500.0)


def test_under_autocast_it_is_near_fp32_and_gradients_keep_their_dtype():
    hidden_ND, head_VD, labels_N = random_problem(dtype=torch.float32)
    exact, _ = next_token_loss(hidden_ND, head_VD, labels_N)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = next_token_loss(hidden_ND, head_VD, labels_N)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2)
    assert rounded.item() != exact.item()
    for found, expected in zip(
        gradients(rounded, hidden_ND, head_VD), gradients(exact, hidden_ND, head_VD), strict=True
    ):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_without_gradients_the_value_is_the_same():
    hidden_ND, head_VD, labels_N = random_problem()
    loss, _ = next_token_loss(hidden_ND, head_VD, labels_N)
    with torch.no_grad():
        again, _ = next_token_loss(hidden_ND, head_VD, labels_N)
    assert again.item() == loss.item()
    assert not again.requires_grad


def test_a_frozen_head_still_lets_hidden_states_learn():
    hidden_ND, head_VD, labels_N = random_problem()
    loss, _ = next_token_loss(hidden_ND, head_VD.detach(), labels_N)
    expected = F.cross_entropy(hidden_ND @ head_VD.T, labels_N, reduction="sum")
    torch.testing.assert_close(gradients(loss, hidden_ND), gradients(expected, hidden_ND))
