import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from olmo_base.model import products
from olmo_base.model.products import linear, product

HAS_ONEDNN = products.IS_X86 and torch.backends.mkldnn.is_available()
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="torch has oneDNN's products on x86 only")


def gradients_of(function, shape: tuple[int, ...], columns: int) -> list[Tensor]:
    """Result and gradients of a linear map, drawn from one seed."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=random).requires_grad_()
    weight = torch.randn(columns, shape[-1], generator=random).requires_grad_()
    result = function(x, weight)
    given = torch.randn(result.shape, generator=random)
    return [result.detach(), *torch.autograd.grad(result, (x, weight), given)]


@needs_onednn
@pytest.mark.parametrize(
    ("shape", "columns"), [((512, 96), 200), ((4, 128, 64), 257), ((3, 1, 999), 1501)]
)
def test_result_and_gradients_are_those_of_torch(shape: tuple[int, ...], columns: int) -> None:
    ours, torchs = gradients_of(linear, shape, columns), gradients_of(F.linear, shape, columns)
    for mine, other in zip(ours, torchs, strict=True):
        assert mine.shape == other.shape and mine.is_contiguous()
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-4)


class OneDnnCalls(TorchDispatchMode):
    """Counts the products that oneDNN computes."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "mkldnn" in str(func)
        return func(*args, **(kwargs or {}))


@needs_onednn
def test_training_takes_the_other_library_and_only_training_does() -> None:
    x, weight = torch.randn(512, 128), torch.randn(128, 128, requires_grad=True)
    with OneDnnCalls() as calls:
        linear(x, weight).sum().backward()
    assert calls.count == 1  # x needs no gradient
    with OneDnnCalls() as calls:
        linear(x.requires_grad_(), weight).sum().backward()
    assert calls.count == 2
    with OneDnnCalls() as calls:
        linear(x.double(), weight.double()).sum().backward()
        linear(x[:2], weight).sum().backward()
        with torch.no_grad():
            assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert calls.count == 0


def test_a_frozen_weight_passes_the_gradient_on_and_gets_none() -> None:
    x, weight = torch.randn(512, 128, requires_grad=True), torch.randn(128, 128)
    linear(x, weight).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(512, 128), rtol=1e-5, atol=1e-4)


def test_the_bare_product_takes_a_transposed_matrix_too() -> None:
    x, weight = torch.randn(512, 128), torch.randn(128, 200)
    torch.testing.assert_close(product(x, weight.T), x @ weight, rtol=2e-5, atol=2e-4)
    torch.testing.assert_close(product(x[:2], weight.T), x[:2] @ weight, rtol=2e-5, atol=2e-4)
