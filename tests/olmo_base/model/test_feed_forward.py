"""The feed-forward makes its own gradients on a CPU; torch's are what they must equal."""

import pytest
import torch
import torch.nn.functional as F

from olmo_base.model import feed_forward
from olmo_base.model.feed_forward import FeedForward


def as_torch_computes(layer, x):
    gate = F.linear(x, layer.gate_proj.weight)
    return F.linear(F.silu(gate) * F.linear(x, layer.up_proj.weight), layer.down_proj.weight)


def gradients(forward, layer, x, grad):
    x = x.clone().requires_grad_()
    out = forward(x)
    out.backward(grad)
    found = [out.detach(), x.grad, *(weight.grad.clone() for weight in layer.parameters())]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 24)])
def test_its_gradients_are_those_of_torchs_own_steps(shape, monkeypatch):
    monkeypatch.setattr(feed_forward, "FLOATS_IN_CACHE", 3 * 40)  # pieces of 3 rows
    torch.manual_seed(0)
    layer = FeedForward(24, 40, init_std=0.3, out_init_std=0.3)
    x, grad = torch.randn(shape), torch.randn(shape)
    ours = gradients(layer, layer, x, grad)
    theirs = gradients(lambda x: as_torch_computes(layer, x), layer, x, grad)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient_and_the_input_still_does():
    torch.manual_seed(0)
    layer = FeedForward(24, 40)
    layer.requires_grad_(False)
    layer.up_proj.requires_grad_(True)
    x = torch.randn(4, 24, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.up_proj.weight.grad is not None
    assert layer.gate_proj.weight.grad is None and layer.down_proj.weight.grad is None


def test_it_keeps_gate_and_up_and_nothing_else_of_their_width():
    torch.manual_seed(0)
    layer = FeedForward(24, 40)
    kept = []

    def note(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.randn(6, 24, requires_grad=True))
    assert kept.count((6, 40)) == 2
