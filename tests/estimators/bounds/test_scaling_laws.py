"""What single-sample objectives do when the log-weights are shifted or scaled.

rloo and vargrad are made of differences of log-weights: a number added to all of them changes no draw, a factor scales
each draw of phi. A learnt baseline takes up what is added.
"""

import pytest
import torch
from torch import Tensor

from estimators import get_estimator
from models import Template
from models.particles import Particles

NUM_MC, NUM_PARTICLES, BATCH = 2, 5, 40


def draws(id: str, transform, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The weight of each particle's score in phi's gradient and of its log-weight in theta's, [mc, iw, batch]."""
    generator = torch.Generator().manual_seed(0)
    log_w = 3 * torch.randn(NUM_MC, NUM_PARTICLES, BATCH, generator=generator, dtype=torch.float64)
    log_w = (transform(log_w)).to(dtype)
    theta, phi = (torch.zeros_like(log_w).requires_grad_() for _ in range(2))
    particles = Particles(
        log_w + theta, (torch.zeros_like(log_w),), (phi * 1.0,), {}, Template(), torch.zeros(BATCH, 1)
    )
    get_estimator(id, mc=NUM_MC, iw=NUM_PARTICLES).estimate(particles, 0.0, 1.0).surrogate.sum().backward()
    assert phi.grad is not None
    assert theta.grad is not None
    return phi.grad, theta.grad


@pytest.mark.parametrize("constant", [-700.0, 3.0, 1e4])
@pytest.mark.parametrize("id", ["rloo", "vargrad"])
def test_a_constant_changes_no_draw(id: str, constant: float):
    for actual, expected in zip(draws(id, lambda log_w: log_w + constant), draws(id, lambda log_w: log_w), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("id", ["rloo", "vargrad"])
def test_a_constant_changes_no_draw_in_float32_beyond_the_rounding_of_the_weights(id: str):
    """float32 holds 5000 + log w to 2.4e-4."""
    shifted, _ = draws(id, lambda log_w: log_w + 5000, torch.float32)
    torch.testing.assert_close(shifted.double(), draws(id, lambda log_w: log_w)[0], rtol=0.0, atol=5e-4)


@pytest.mark.parametrize("factor", [-2.0, 0.3, 50.0])
@pytest.mark.parametrize("id", ["rloo", "vargrad"])
def test_a_factor_scales_each_draw_of_phi(id: str, factor: float):
    (phi, theta), (plain, unscaled) = draws(id, lambda log_w: factor * log_w), draws(id, lambda log_w: log_w)
    torch.testing.assert_close(phi, factor * plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(theta, unscaled)


@pytest.mark.parametrize("id", ["rloo", "vargrad"])
def test_a_constant_weight_has_no_gradient_in_phi(id: str):
    phi, _ = draws(id, lambda log_w: torch.full_like(log_w, -123.4))
    assert phi.abs().max() == 0


def test_what_has_no_control_variate_changes_with_a_constant():
    """The law is one of leave-one-out methods: this is what fails it."""
    phi, _ = draws("reinforce", lambda log_w: log_w + 3)
    assert (phi - draws("reinforce", lambda log_w: log_w)[0]).abs().min() > 2.9


def test_vargrad_is_rloo_draw_by_draw():
    for vargrad, rloo in zip(draws("vargrad", lambda log_w: log_w), draws("rloo", lambda log_w: log_w), strict=True):
        torch.testing.assert_close(vargrad, rloo, rtol=1e-10, atol=1e-12)
