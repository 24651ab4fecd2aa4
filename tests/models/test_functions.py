"""Functions that know their own derivative."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, vmap

from models.functions import sum_of_squares


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (3, 0), (0, 5)])
def test_the_sum_of_squares_has_all_derivatives(shape):
    value = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.testing.assert_close(sum_of_squares(value), (value * value).sum(-1))
    assert torch.autograd.gradcheck(sum_of_squares, value)
    assert torch.autograd.gradgradcheck(sum_of_squares, value)


def test_zeros_have_a_gradient():
    value = torch.zeros(3, requires_grad=True)
    sum_of_squares(value).backward()
    assert value.grad is not None
    assert not value.grad.any()


def test_it_runs_under_torch_func():
    rows = torch.randn(4, 5)
    torch.testing.assert_close(vmap(grad(sum_of_squares))(rows), 2 * rows)


def test_it_has_derivatives_in_forward_mode():
    value = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(jacfwd(sum_of_squares)(value), 2 * value)
    torch.testing.assert_close(hessian(sum_of_squares)(value), 2 * torch.eye(5, dtype=torch.float64))
