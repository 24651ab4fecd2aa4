"""I-MLE and AIMLE as functions of batches: definitions, exact cases, counts of calls, and mistakes."""

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from estimators.imle import (
    AdaptiveTargetDistribution,
    BaseTargetDistribution,
    FenchelYoungLoss,
    GumbelNoiseDistribution,
    SumOfGammaNoiseDistribution,
    TargetDistribution,
    aimle,
    blackbox,
    imle,
    perturbed,
)
from models.solvers import subsets, top_k

TOP_2 = partial(top_k, k=2)
GUMBEL = GumbelNoiseDistribution()
NOTHING: Any = 3  # neither noise nor a target


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def theta():
    return torch.randn(3, 5, dtype=torch.float64, requires_grad=True)


def grad(leaf: torch.Tensor) -> torch.Tensor:
    """The gradient of a leaf, which is there."""
    assert leaf.grad is not None
    return leaf.grad


class Counting:
    """top-2 that counts its calls and keeps what it was given."""

    def __init__(self):
        self.scores = []

    def __call__(self, theta):
        self.scores.append(theta.clone())
        return top_k(theta, 2)


class FixedNoise:
    """A user's own noise: `sample(shape)` alone, always the same numbers, in float64 on the CPU."""

    def sample(self, shape):
        return torch.linspace(-1, 1, shape.numel(), dtype=torch.float64).sin().mul(3).reshape(shape)


class Doubled(BaseTargetDistribution):
    """A user's own target distribution."""

    def params(self, theta, dy):
        return 2 * theta - dy


def test_the_example_of_the_seed():
    # Seed 003's code, but for its import lines.
    from estimators.imle import SumOfGammaNoiseDistribution, TargetDistribution, imle

    k, input_noise_temperature, target_noise_temperature = 2, 1.0, 1.0

    def solver(w):
        y = np.zeros_like(w)
        y[np.argsort(-w)[:k]] = 1
        return y

    target_distribution = TargetDistribution(alpha=0.0, beta=10.0)
    noise_distribution = SumOfGammaNoiseDistribution(k=k, nb_iterations=100)

    def torch_solver(weights_batch):
        weights_batch = weights_batch.detach().cpu().numpy()
        y_batch = np.asarray([solver(w) for w in list(weights_batch)])
        return torch.tensor(y_batch, requires_grad=False)

    imle_solver = imle(
        torch_solver,
        target_distribution=target_distribution,
        noise_distribution=noise_distribution,
        nb_samples=10,
        input_noise_temperature=input_noise_temperature,
        target_noise_temperature=target_noise_temperature,
    )

    @imle(
        target_distribution=target_distribution,
        noise_distribution=noise_distribution,
        nb_samples=10,
        input_noise_temperature=input_noise_temperature,
        target_noise_temperature=target_noise_temperature,
    )
    def decorated(weights_batch):
        return torch_solver(weights_batch)

    assert decorated.__name__ == "decorated"
    gold = torch.tensor([1.0, 0.0, 0.0, 1.0])
    found = []
    for each in (imle_solver, decorated):
        torch.manual_seed(3)
        weights = torch.zeros(6, 4, requires_grad=True)
        y = each(weights)
        assert y.shape == (60, 4)
        assert (y.sum(1) == k).all()
        (y - gold).abs().mean().backward()
        found.append(grad(weights))
    assert torch.equal(*found)
    # Descent raises the scores of what the gold solution holds.
    assert torch.equal(found[0].mean(0) < 0, gold == 1)


@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.5])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])
def test_forward_and_backward_are_their_definitions(theta, alpha, temperatures):
    n, noise = 4, FixedNoise()
    solve = imle(TOP_2, TargetDistribution(alpha, 3.0), noise, n, *temperatures)
    y = solve(theta)
    scores = theta.detach().repeat_interleave(n, 0)  # an item's samples side by side
    eps = noise.sample(scores.shape)
    assert torch.equal(y, TOP_2(scores + temperatures[0] * eps))
    dy = torch.randn_like(y)
    y.backward(dy)
    target = TOP_2(alpha * scores - 3.0 * n * dy + temperatures[1] * eps)
    torch.testing.assert_close(grad(theta), (y - target).view(3, n, 5).mean(1))


@pytest.mark.parametrize("noise", [None, GUMBEL, SumOfGammaNoiseDistribution(2)])
def test_no_gradient_of_the_loss_is_no_gradient(theta, noise):
    for nb_samples in (1, 7):
        for is_divided in (imle, aimle):
            solve = is_divided(TOP_2, TargetDistribution(1.0, 2.0), noise, nb_samples, 1.3, 1.3)
            (0 * solve(theta).sum()).backward()
    assert (grad(theta) == 0).all()


def test_unequal_temperatures_give_a_gradient_where_the_loss_has_none(theta):
    solve = imle(TOP_2, TargetDistribution(), GUMBEL, 20, 1.0, 3.0)
    (0 * solve(theta).sum()).backward()
    assert (grad(theta) != 0).any()


def mean_loss_gradient(nb_samples, scale_by_samples):
    """The gradient of a loss that is a mean over the samples, and hence the same for any number of them."""
    theta = torch.zeros(4000 // nb_samples, 5, requires_grad=True)
    torch.manual_seed(1)
    solve = imle(TOP_2, TargetDistribution(1.0, 1.0), GUMBEL, nb_samples, scale_by_samples=scale_by_samples)
    weights = torch.tensor([2.0, -1.0, 0.0, 0.5, -0.5])
    (solve(theta).view(-1, nb_samples, 5).mean(1) @ weights).sum().backward()
    return grad(theta)


def test_the_number_of_samples_does_not_change_the_gradient():
    # The noise of the 4,000 rows is the same: so is the gradient, to rounding.
    means = [mean_loss_gradient(nb_samples, True).mean(0) for nb_samples in (1, 10, 100)]
    torch.testing.assert_close(means[1], means[0])
    torch.testing.assert_close(means[2], means[0])
    assert means[0].norm() > 0.5


def test_the_scaling_of_the_original_shrinks_as_one_over_the_samples():
    norms = [mean_loss_gradient(nb_samples, False).mean(0).norm() for nb_samples in (1, 10, 100)]
    assert 6 < norms[0] / norms[1] < 20
    assert 6 < norms[1] / norms[2] < 25


def test_solver_calls(theta):
    cases: list = [
        (partial(imle, noise_distribution=GUMBEL, nb_samples=3), 1, 1),
        (partial(aimle, noise_distribution=GUMBEL), 1, 1),
        (partial(aimle, noise_distribution=GUMBEL, symmetric_perturbation=True), 1, 2),
        (blackbox, 1, 1),
        (partial(perturbed, num_samples=5), 1, 0),
    ]
    for make, forward, backward in cases:
        solver = Counting()
        y = make(solver)(theta)
        assert len(solver.scores) == forward
        y.square().sum().backward()
        assert len(solver.scores) == forward + backward


def test_further_arguments_reach_the_solver_in_both_passes(theta):
    seen = []

    def solver(scores, k, scale):
        seen.append((k, scale))
        return top_k(scale * scores, k)

    scale = torch.tensor(2.0, dtype=torch.float64)
    for make in (imle, aimle, blackbox, partial(perturbed, num_samples=2)):
        for y in (make(solver)(theta, 2, scale), make(solver)(theta, 2, scale=scale)):
            assert (y.sum(-1) == 2).all()
            y.square().sum().backward()
    loss = FenchelYoungLoss(solver, 3)
    (loss(theta, TOP_2(theta.detach()), 2, scale) + loss(theta, TOP_2(theta.detach()), k=2, scale=scale)).backward()
    assert seen == [(2, scale)] * 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", [None, GUMBEL, SumOfGammaNoiseDistribution(2.5), FixedNoise()])
def test_dtypes(dtype, noise):
    theta = torch.randn(3, 5).to(dtype).requires_grad_()
    dtypes = []

    def solver(scores):
        dtypes.append(scores.dtype)
        return TOP_2(scores)

    for make in (imle, aimle):
        y = make(solver, noise_distribution=noise, nb_samples=2)(theta)
        assert y.dtype == dtype
        y.square().sum().backward()
    assert grad(theta).dtype == dtype
    assert set(dtypes) == {dtype}


@pytest.mark.parametrize("noise", ["normal", "gumbel"])
def test_dtypes_of_perturbed_optimisers(noise):
    theta = torch.randn(3, 5).bfloat16().requires_grad_()
    assert perturbed(TOP_2, 4, noise=noise)(theta).dtype == torch.bfloat16
    (perturbed(TOP_2, 4, noise=noise)(theta).sum() + FenchelYoungLoss(TOP_2, 4, noise=noise)(theta, theta)).backward()
    assert grad(theta).isfinite().all()


def test_a_solver_may_answer_in_integers_or_booleans(theta):
    for kind in (torch.int64, torch.bool):
        y = imle(lambda scores, kind=kind: TOP_2(scores).to(kind))(theta)
        assert y.dtype == theta.dtype
        assert torch.equal(y, TOP_2(theta))


@pytest.mark.parametrize("make", [imle, aimle, blackbox, partial(perturbed, num_samples=3)])
def test_a_solver_that_works_in_place_leaves_the_scores_alone(make, theta):
    def solver(scores):
        return scores.copy_(TOP_2(scores))

    before = theta.detach().clone()
    torch.manual_seed(2)
    y = make(solver)(theta)
    y.square().sum().backward()
    found = grad(theta).clone()
    assert torch.equal(theta.detach(), before)
    theta.grad = None
    torch.manual_seed(2)
    make(TOP_2)(theta).square().sum().backward()
    assert torch.equal(found, grad(theta))


@pytest.mark.parametrize("make", [imle, aimle, blackbox, partial(perturbed, num_samples=3)])
def test_scores_that_are_not_contiguous(make):
    theta = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    gradients = []
    for scores in (theta.t(), theta.t().contiguous()):
        torch.manual_seed(2)
        solve = make(lambda scores: TOP_2(scores.view(-1, 5)))  # view needs a contiguous tensor
        solve(scores).square().sum().backward()
        gradients.append(grad(theta))
        theta.grad = None
    assert torch.equal(*gradients)


def test_maps_of_any_shape_are_solved():
    theta = torch.randn(2, 3, 4, requires_grad=True)
    y = imle(lambda scores: TOP_2(scores.flatten(1)).view_as(scores), nb_samples=3)(theta)
    assert y.shape == (6, 3, 4)
    y.square().sum().backward()
    assert grad(theta).shape == theta.shape


def test_a_target_distribution_of_ones_own(theta):
    y = imle(TOP_2, Doubled())(theta)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.equal(grad(theta), y - TOP_2(2 * theta.detach() - dy))


def test_a_linear_loss_points_from_its_best_solution(theta):
    """With alpha = 0 and no noise the target is the solution that the loss likes best, for all 2-subsets of 5."""
    weights = torch.randn(3, 5, dtype=torch.float64)
    y = imle(TOP_2, TargetDistribution(0.0, 1.0))(theta)
    (y * weights).sum().backward()
    best = subsets(5, 2)[(weights @ subsets(5, 2).t()).argmin(1)]
    assert torch.equal(grad(theta), y - best)


def test_the_mean_gradient_is_the_difference_of_exact_marginals():
    """k = 1 under Gumbel noise: MAP has the marginals softmax(theta), and that of the target softmax(theta')."""
    theta = torch.tensor([[0.3, -0.6, 1.1]], dtype=torch.float64, requires_grad=True)
    weights, n = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64), 40_000
    solve = imle(partial(top_k, k=1), TargetDistribution(1.0, 1.5), GUMBEL, n)
    y = solve(theta)
    (y.mean(0) @ weights).backward()
    p, target = theta.detach().softmax(-1), (theta.detach() - 1.5 * weights).softmax(-1)
    torch.testing.assert_close(y.mean(0), p[0], atol=4 * 0.5 / n**0.5, rtol=0)
    torch.testing.assert_close(grad(theta), p - target, atol=4 * 1.0 / n**0.5, rtol=0)


@pytest.mark.parametrize("is_symmetric", [False, True])
def test_aimle_tends_to_the_exact_gradient(is_symmetric):
    """A linear loss of one-hot y under Gumbel noise: the gradient by theta is J softmax times the weights."""
    theta = torch.tensor([[0.3, -0.6, 1.1]], dtype=torch.float64, requires_grad=True)
    weights, n, step = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64), 100_000, 0.2
    solve = aimle(partial(top_k, k=1), TargetDistribution(1.0, step), GUMBEL, n, symmetric_perturbation=is_symmetric)
    (solve(theta).mean(0) @ weights).backward()
    p = theta.detach()[0].softmax(-1)
    exact = p * (weights - p @ weights)
    # The bias is of order step (one-sided) or step^2; a row's entries are of size 1 / step, with chance of order step.
    allowed = 4 * (1 / step) ** 0.5 / n**0.5 + (0.02 * step if is_symmetric else 0.3 * step)
    torch.testing.assert_close(grad(theta)[0], exact, atol=allowed, rtol=0)


def test_aimle_divides_by_its_step(theta):
    noise, step = FixedNoise(), 0.7
    dy = torch.randn(3, 5, dtype=torch.float64)
    for is_symmetric in (False, True):
        y = aimle(TOP_2, TargetDistribution(1.0, step), noise, symmetric_perturbation=is_symmetric)(theta)
        (gradient,) = torch.autograd.grad(y, theta, dy)
        at = theta.detach() + noise.sample(theta.shape)
        one, other = TOP_2(at + step * dy if is_symmetric else at), TOP_2(at - step * dy)
        torch.testing.assert_close(gradient, (one - other) / ((2 if is_symmetric else 1) * step))


def test_the_adaptive_step_is_relative_to_the_norms(theta):
    target = AdaptiveTargetDistribution(initial_beta=0.5)
    dy = torch.randn(3, 5, dtype=torch.float64)
    step = target.step(theta, dy)
    torch.testing.assert_close((step * dy).norm(), 0.5 * theta.norm())
    torch.testing.assert_close(target.params(theta, dy), theta - step * dy)
    assert target.step(theta, 0 * dy) == 0
    assert torch.equal(target.params(theta, 0 * dy), theta)


def test_the_adaptive_step_rises_until_gradients_are_as_many_as_wanted(theta):
    target = AdaptiveTargetDistribution(initial_grad_norm=0.0, beta_update_step=0.01, grad_norm_decay_rate=0.5)
    solve = aimle(TOP_2, target, GUMBEL, nb_samples=30, symmetric_perturbation=True)
    betas, norms = [], []
    for _ in range(200):
        (solve(theta) * torch.arange(5.0)).mean().backward()
        betas.append(target.beta)
        norms.append(target.grad_norm)
    assert betas[:3] == pytest.approx([0.01, 0.02, 0.03])
    assert target.beta > 0.05
    assert np.mean(norms[-80:]) == pytest.approx(1.0, abs=0.1)


def test_the_update_of_beta_by_hand():
    target = AdaptiveTargetDistribution(1.0, 0.5, 1.0, 0.1, beta_update_momentum=0.5, grad_norm_decay_rate=0.8)
    target.update(torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 0.0]]))  # two non-zero entries an item: too many
    assert target.grad_norm == pytest.approx(0.8 * 1.0 + 0.2 * 2)
    assert target.beta == pytest.approx(0.5 - 0.05)
    target.update(torch.zeros(2, 3))
    assert target.grad_norm == pytest.approx(0.8 * 1.2)  # below 1
    assert target.beta == pytest.approx(0.45 + (0.5 * -0.05 + 0.5 * 0.1))
    for _ in range(10):
        target.update(torch.ones(2, 3))
    assert target.beta == 0


def test_the_adaptive_target_is_restored():
    targets = [AdaptiveTargetDistribution(beta_update_step=0.1, beta_update_momentum=0.3) for _ in range(2)]
    targets[0].update(torch.zeros(2, 3))
    targets[1].load_state_dict(targets[0].state_dict())
    for target in targets:
        target.update(torch.zeros(2, 3))
    assert targets[0].state_dict() == targets[1].state_dict()
    assert targets[0].beta > 0


@pytest.mark.parametrize("noise", [None, GUMBEL, SumOfGammaNoiseDistribution(2)])
def test_replicates_by_vmap_are_a_longer_batch(noise):
    weights = torch.tensor([2.0, -1.0, 0.0, 0.5, -0.5])

    def gradient(theta):
        solve = imle(TOP_2, TargetDistribution(1.0, 2.0), noise, 3)
        return torch.func.grad(lambda theta: (solve(theta) @ weights).sum())(theta)

    theta = torch.randn(4, 2, 5)
    torch.manual_seed(5)
    found = torch.func.vmap(gradient, randomness="different")(theta)
    torch.manual_seed(5)
    torch.testing.assert_close(found, gradient(theta.flatten(0, 1)).view_as(theta))
    shared = torch.func.vmap(lambda _: gradient(theta[0]), randomness="different")(torch.zeros(6))
    assert shared.shape == (6, 2, 5)


@pytest.mark.parametrize("make", [imle, aimle, blackbox, partial(perturbed, num_samples=3)])
def test_second_derivatives_are_refused(make, theta):
    y = make(TOP_2)(theta)
    (gradient,) = torch.autograd.grad(y.square().sum(), theta, create_graph=True)
    with pytest.raises(ValueError, match="first derivatives alone"):
        (gradient * theta).sum().backward()


def test_second_derivatives_of_the_fenchel_young_loss_are_refused(theta):
    loss = FenchelYoungLoss(TOP_2, 3)(theta, TOP_2(theta.detach()))
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    with pytest.raises(ValueError, match="FenchelYoungLoss has first derivatives alone"):
        gradient.sum().backward()


ALL = [imle, aimle, blackbox, partial(perturbed, num_samples=3)]


@pytest.mark.parametrize("make", ALL)
def test_a_solver_that_returns_another_shape_or_nan(make, theta):
    def summed(scores):
        return scores.sum(-1)

    def undefined(scores):
        return 0 * scores / 0

    for solver, message in [
        (summed, r"solver summed returned a tensor \[\d+\] for scores \[\d+, 5\], expected their shape"),
        (undefined, r"solver undefined returned nan for scores \[\d+, 5\]"),
        (lambda scores: scores.tolist(), "returned list for scores"),
        (partial(top_k, k=6), r"k=6 for scores \[\d+, 5\], expected 1 to 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(solver)(theta)


@pytest.mark.parametrize("make", ALL)
def test_scores_that_are_nan_reach_no_solver(make, theta):
    with pytest.raises(ValueError, match=r"scores \[\d+, 5\] for the solver .* hold a nan"):
        make(TOP_2)(theta / 0 * 0)


def test_a_target_of_nan_reaches_no_solver(theta):
    y = imle(TOP_2)(theta)
    with pytest.raises(ValueError, match=r"scores \[3, 5\] for the solver .* hold a nan"):
        (y * torch.nan).sum().backward()


def test_a_solver_that_fails_in_the_backward_pass(theta):
    answers = itertools.chain([TOP_2(theta.detach())], itertools.repeat(torch.full((3, 5), torch.nan)))

    def solver(scores):
        return next(answers)

    y = imle(solver)(theta)
    with pytest.raises(ValueError, match="solver returned nan"):
        y.square().sum().backward()


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("scores", [torch.zeros(5), torch.zeros(2, 5, dtype=torch.int64)])
def test_scores_without_a_batch_or_of_integers(make, scores):
    with pytest.raises(ValueError, match=r"was given scores .* expected \[batch, ...\] of floating point"):
        make(TOP_2)(scores)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: imle(TOP_2, nb_samples=0), "nb_samples=0, expected at least 1"),
        (lambda: aimle(TOP_2, input_noise_temperature=-1.0), "temperatures"),
        (lambda: imle(TOP_2, noise_distribution=NOTHING), r"imle was given the noise 3, expected .* sample\(shape\)"),
        (lambda: aimle(TOP_2, NOTHING), "aimle was given the target 3, expected an instance of BaseTargetDistribution"),
        (lambda: TargetDistribution(beta=0.0), "beta=0.0, expected a number above 0"),
        (lambda: AdaptiveTargetDistribution(grad_norm_decay_rate=1.0), "grad_norm_decay_rate=1.0"),
        (lambda: AdaptiveTargetDistribution(initial_beta=-1.0), "initial_beta=-1.0"),
        (lambda: blackbox(TOP_2, 0.0), "lambda_=0.0"),
        (lambda: perturbed(TOP_2, noise="cauchy"), "noise='cauchy', expected one of normal, gumbel"),
        (lambda: perturbed(TOP_2, num_samples=0), "num_samples=0"),
        (lambda: FenchelYoungLoss(TOP_2, sigma=0.0), "sigma=0.0"),
        (lambda: FenchelYoungLoss(TOP_2)(torch.zeros(2, 3), torch.zeros(3)), r"\[2, 3\] and targets \[3\]"),
    ],
)
def test_options_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_noise_may_be_any_object_that_samples(theta):
    noise = SimpleNamespace(sample=FixedNoise().sample)
    assert torch.equal(
        imle(TOP_2, noise_distribution=noise)(theta), imle(TOP_2, noise_distribution=FixedNoise())(theta)
    )
    noise.sample = lambda shape: [0.0] * shape.numel()
    with pytest.raises(ValueError, match=r"SimpleNamespace.sample returned list, expected \[3, 5\]"):
        imle(TOP_2, noise_distribution=noise)(theta)


def test_a_target_of_another_shape(theta):
    class First(BaseTargetDistribution):
        def params(self, theta, dy):
            return (theta - dy)[:1]

    y = imle(TOP_2, First())(theta)
    with pytest.raises(ValueError, match=r"First.params returned \[1, 5\] for scores \[3, 5\], expected their shape"):
        y.sum().backward()


def test_noise_of_another_shape(theta):
    class Short:
        def sample(self, shape):
            return torch.zeros(1)

    with pytest.raises(ValueError, match=r"Short.sample returned \[1\], expected \[3, 5\]"):
        imle(TOP_2, noise_distribution=Short())(theta)


def test_vmap_over_further_arguments_is_refused():
    solve = imle(lambda scores, scale: TOP_2(scores * scale))
    with pytest.raises(ValueError, match="over the scores alone"):
        torch.func.vmap(solve)(torch.randn(4, 2, 5), torch.ones(4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("noise", [GUMBEL, SumOfGammaNoiseDistribution(2), FixedNoise()])
def test_noise_is_on_the_device_of_the_scores(noise):
    theta = torch.randn(3, 5, device="cuda", requires_grad=True)
    solver = Counting()
    y = imle(solver, noise_distribution=noise, nb_samples=2)(theta)
    y.square().sum().backward()
    assert y.device == theta.device == grad(theta).device == solver.scores[0].device
    perturbed(TOP_2, 3)(theta).sum().backward()
