"""Conditional relaxations: they agree with the sample, have the right law, and the right derivatives."""

import pytest
import torch
from torch.distributions import Bernoulli, OneHotCategorical

from estimators.nodes.relaxation import conditional, hard, held, noise_of, perturbed, pulled_back, relaxed
from tests.estimators.nodes.draws import legendre

N = 20_000
LOGITS = {"rare": [-3.0, 0.2, 2.5], "extreme": [-30.0, 30.0, 0.0], "impossible": [-torch.inf, 0.3, 1.0]}


def distribution_of(kind: str, logits: torch.Tensor) -> Bernoulli | OneHotCategorical:
    return Bernoulli(logits=logits) if kind == "bernoulli" else OneHotCategorical(logits=logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("kind", ["bernoulli", "one-hot"])
def test_what_is_drawn_given_the_sample_agrees_with_it_always(kind, logits, dtype):
    if kind == "bernoulli" and logits == "impossible":
        pytest.skip("a Bernoulli's logits are finite")
    torch.manual_seed(1)
    q = distribution_of(kind, torch.tensor(LOGITS[logits], dtype=dtype))
    b = q.sample(torch.Size([N]))
    limits = torch.finfo(dtype)
    v = torch.rand(N, 3, dtype=dtype).clamp(limits.tiny, 1 - limits.eps / 2)
    v[:50], v[50:100] = limits.tiny, 1 - limits.eps / 2
    again = conditional(q, b, v)
    assert torch.equal(hard(q, again), b)
    assert not again.isnan().any()


@pytest.mark.parametrize("kind", ["bernoulli", "one-hot"])
def test_the_sample_is_the_largest_of_the_perturbed(kind):
    """Its frequencies are the probabilities: 4.5 standard errors."""
    torch.manual_seed(2)
    q = distribution_of(kind, torch.tensor(LOGITS["rare"], dtype=torch.float64))
    b = hard(q, perturbed(q, noise_of(q, N)))
    error = (q.mean * (1 - q.mean) / N).sqrt()
    assert ((b.mean(0) - q.mean).abs() < 4.5 * error).all()


def test_a_bernoulli_relaxed_given_its_sample_has_the_law_of_its_part_of_the_logistic():
    """Exactly: P(z~ <= t | b) of the v that leads to t."""
    logit = torch.tensor([-1.3, 0.0, 0.8], dtype=torch.float64)
    q = Bernoulli(logits=logit)
    v = torch.linspace(0.01, 0.99, 99, dtype=torch.float64).unsqueeze(-1).expand(-1, 3)
    up, down = (conditional(q, torch.full_like(v, b), v) for b in (1.0, 0.0))
    at_zero = torch.sigmoid(-logit)  # P(z <= 0)
    torch.testing.assert_close((torch.sigmoid(up - logit) - at_zero) / (1 - at_zero), v)
    torch.testing.assert_close(torch.sigmoid(down - logit) / at_zero, v)


def test_categories_relaxed_given_their_sample_have_the_law_of_gumbels_below_the_largest():
    """Exactly, v for v: the largest is a standard Gumbel, the others Gumbels of location log p truncated at it."""
    q = OneHotCategorical(logits=torch.tensor([-1.0, 0.4, 0.1], dtype=torch.float64))
    torch.manual_seed(3)
    v = torch.rand(500, 3, dtype=torch.float64)
    for k in range(3):
        b = torch.eye(3, dtype=torch.float64)[k].expand(500, 3)
        z = conditional(q, b, v)
        largest = z[:, k : k + 1]
        torch.testing.assert_close((-(-largest).exp()).exp(), v[:, k : k + 1])
        below = (-q.probs * (-z).exp()).exp() / (-q.probs * (-largest).exp()).exp()
        others = [i for i in range(3) if i != k]
        torch.testing.assert_close(below[:, others], v[:, others])


def test_the_marginal_is_that_of_the_perturbed():
    """E[g(z~)] over b and v is E[g(z)]: exact for a Bernoulli, by quadrature over both."""
    logit = torch.tensor(0.7, dtype=torch.float64)
    q, (v, w) = Bernoulli(logits=logit), legendre(40)
    ours = sum(
        q.log_prob(torch.tensor(b)).exp() * (w * relaxed(q, conditional(q, torch.full_like(v, b), v), 0.5)).sum()
        for b in (0.0, 1.0)
    )
    torch.testing.assert_close(ours, (w * relaxed(q, perturbed(q, v), 0.5)).sum())


@pytest.mark.parametrize("kind", ["bernoulli", "one-hot"])
def test_slopes_pulled_back_are_those_of_autograd(kind):
    """z moves with the logits by 1, z~ at its v by 1 - held(z~)."""
    torch.manual_seed(4)
    logits = torch.tensor([[-1.0, 0.4, 0.1], [0.3, 2.0, -0.7]], dtype=torch.float64, requires_grad=True)
    q = distribution_of(kind, logits)
    noise, v, slope = noise_of(q, 5), torch.rand(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 3, 2).double()
    z = perturbed(q, noise)
    again = conditional(q, hard(q, z.detach()), v)
    for each, follows in ((z, 1.0), (again, 1 - held(q, again.detach()))):
        ours = pulled_back(q, each.detach(), 0.6, slope, follows).detach()
        for m in range(2):
            (expected,) = torch.autograd.grad((relaxed(q, each, 0.6) * slope[..., m]).sum(), logits, retain_graph=True)
            torch.testing.assert_close(ours[..., m].sum(0), expected)


@pytest.mark.parametrize("kind", ["bernoulli", "one-hot"])
def test_an_impossible_value_leaves_every_gradient_finite(kind):
    logits = torch.tensor([-torch.inf if kind == "one-hot" else -100.0, 0.3, 1.0], requires_grad=True)
    q = distribution_of(kind, logits)
    torch.manual_seed(5)
    z = conditional(q, q.sample(torch.Size([50])), torch.rand(50, 3))
    y = relaxed(q, z, 0.5)
    (gradient,) = torch.autograd.grad((y * torch.arange(3)).sum(), logits)
    assert gradient.isfinite().all()
    assert y.isfinite().all()
