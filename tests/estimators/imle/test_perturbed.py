"""Perturbed optimisers and blackbox differentiation against their closed forms."""

from functools import partial

import pytest
import torch
from torch.distributions import Normal

from estimators.imle import FenchelYoungLoss, blackbox, perturbed
from models.solvers import subsets, top_k

ARGMAX = partial(top_k, k=1)
THETA = torch.tensor([[0.3, -0.6, 1.1]], dtype=torch.float64)
N = 100_000


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def grad(leaf: torch.Tensor) -> torch.Tensor:
    """The gradient of a leaf, which is there."""
    assert leaf.grad is not None
    return leaf.grad


def gumbel_mean(theta, sigma):
    """E[argmax(theta + sigma Z)] under Gumbel noise."""
    return (theta / sigma).softmax(-1)


def normal_mean(theta, sigma):
    """The same of two items under normal noise: P(theta_1 + sigma Z_1 > theta_2 + sigma Z_2)."""
    first = Normal(0, 1).cdf((theta[:, :1] - theta[:, 1:]) / (sigma * 2**0.5))
    return torch.cat([first, 1 - first], 1)


CLOSED_FORMS = [("gumbel", THETA, gumbel_mean), ("normal", THETA[:, :2], normal_mean)]


@pytest.mark.parametrize("sigma", [0.5, 2.0])
@pytest.mark.parametrize(("noise", "theta", "mean"), CLOSED_FORMS)
def test_mean_and_jacobian_are_those_of_the_closed_form(noise, theta, mean, sigma):
    solve = perturbed(ARGMAX, N, sigma, noise)
    se = 0.5 / N**0.5
    torch.testing.assert_close(solve(theta), mean(theta, sigma), atol=4 * se, rtol=0)
    found = torch.autograd.functional.jacobian(lambda theta: solve(theta)[0], theta)
    exact = torch.autograd.functional.jacobian(lambda theta: mean(theta, sigma)[0], theta)
    torch.testing.assert_close(found, exact, atol=4 * 2 * se / sigma, rtol=0)


def test_the_gradient_of_few_samples_is_unbiased():
    """The mean of the others as a baseline leaves the mean where it is; 2 samples a row, 50,000 rows."""
    rows = THETA.expand(50_000, -1).clone().requires_grad_()
    weights = torch.tensor([1.0, -0.5, 3.0], dtype=torch.float64)
    (perturbed(ARGMAX, 2, 1.0, "gumbel")(rows) @ weights + 100).sum().backward()
    exact = torch.autograd.functional.jacobian(lambda theta: (gumbel_mean(theta, 1.0) @ weights).sum(), THETA)
    se = grad(rows).std(0) / len(rows) ** 0.5
    assert ((grad(rows).mean(0) - exact[0]).abs() < 4 * se).all()


def test_a_constant_solution_has_no_gradient():
    theta = THETA.clone().requires_grad_()
    perturbed(lambda scores: torch.ones_like(scores), 10)(theta).sum().backward()
    assert (grad(theta) == 0).all()


@pytest.mark.parametrize("noise", ["normal", "gumbel"])
def test_the_fenchel_young_gradient_is_the_mean_solution_less_the_target(noise):
    theta = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y = subsets(5, 2)[:3]
    solver = partial(top_k, k=2)
    torch.manual_seed(1)
    loss = FenchelYoungLoss(solver, 50, 0.7, noise)(theta, y)
    loss.backward()
    torch.manual_seed(1)
    torch.testing.assert_close(grad(theta), (perturbed(solver, 50, 0.7, noise)(theta.detach()) - y) / 3)


def test_the_fenchel_young_loss_under_gumbel_noise():
    """Its value is sigma (logsumexp(theta / sigma) + Euler's constant) - <theta, y>."""
    y = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    for sigma in (0.5, 2.0):
        loss = FenchelYoungLoss(ARGMAX, N, sigma, "gumbel")(THETA, y)
        exact = sigma * ((THETA / sigma).logsumexp(-1) + 0.5772156649).sum() - (THETA * y).sum()
        torch.testing.assert_close(loss, exact, atol=4 * sigma * 1.3 / N**0.5, rtol=0)


def test_the_fenchel_young_loss_is_least_where_the_mean_solution_is_the_target():
    y = torch.tensor([[0.2, 0.5, 0.3]])
    theta = torch.zeros(1, 3, requires_grad=True)
    loss = FenchelYoungLoss(ARGMAX, 2000, 1.0, "gumbel")
    optimizer = torch.optim.SGD([theta], lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        loss(theta, y).backward()
        optimizer.step()
    torch.testing.assert_close(theta.detach().softmax(-1), y, atol=0.04, rtol=0)


def test_a_target_that_is_learnt_has_its_gradient_too():
    y = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64, requires_grad=True)
    FenchelYoungLoss(ARGMAX, 3)(THETA, y).backward()
    torch.testing.assert_close(grad(y), -THETA)


def test_blackbox_is_the_gradient_of_the_interpolated_loss():
    """f_lambda(theta) = <dy, y_lambda> - (<theta, y> - <theta, y_lambda>) / lambda, y_lambda = MAP(theta - lambda dy).

    (Vlastelica et al. 2020, section 3.2, for solvers that maximise.) Piecewise linear, so that differences are exact.
    """
    solver, lambda_, step = partial(top_k, k=2), 5.0, 1e-6
    theta = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    dy = theta.detach() + 0.1 * torch.randn(1, 5, dtype=torch.float64)

    def interpolated(theta):
        y, moved = solver(theta), solver(theta - lambda_ * dy)
        return ((dy * moved).sum() + (theta * (y - moved)).sum() / lambda_).item()

    blackbox(solver, lambda_)(theta).backward(dy)
    at = theta.detach()
    steps = step * torch.eye(5, dtype=torch.float64)
    difference = [(interpolated(at + row) - interpolated(at - row)) / (2 * step) for row in steps]
    torch.testing.assert_close(grad(theta)[0], torch.tensor(difference, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (grad(theta) != 0).any()


def test_blackbox_as_a_decorator():
    @blackbox(lambda_=5.0)
    def best(theta):
        return ARGMAX(theta)

    theta = THETA.clone().requires_grad_()
    best(theta).backward(torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64))
    assert best.__name__ == "best"
    torch.testing.assert_close(grad(theta), torch.tensor([[-0.2, 0.0, 0.2]], dtype=torch.float64))
