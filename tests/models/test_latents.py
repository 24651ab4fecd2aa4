"""Draws and densities of each kind of latents, against torch.distributions."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, OneHotCategorical
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from models.latents import BernoulliLatents, CategoricalLatents, Latents, NormalLatents, latents_of

NUM = (2, 3)  # mc, iw
BATCH = 4
TEMPERATURE = 0.7
KINDS: dict[str, Any] = {
    "normal": NormalLatents(3),
    "bernoulli": BernoulliLatents(3),
    "categorical": CategoricalLatents(2, 3),
}
DISCRETE = ("bernoulli", "categorical")


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return request.param


def features_of(latents: Latents, *leading: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*leading, latents.num_features, dtype=dtype).requires_grad_()


def reference(kind: str, features: Tensor, z: Tensor, relaxed: bool = False) -> Tensor:
    """The log-density by torch.distributions, where z is that of the draw (its graph included)."""
    latents, t = KINDS[kind], torch.tensor(TEMPERATURE, dtype=z.dtype)
    if kind == "normal":
        mean, log_var = features.split(latents.num_latents, -1)
        return Normal(mean, log_var.exp().sqrt()).log_prob(z).sum(-1)
    if kind == "bernoulli":
        if relaxed:
            return LogitRelaxedBernoulli(t, logits=features).log_prob(z.logit()).sum(-1)
        return Bernoulli(logits=features).log_prob(z).sum(-1)
    logits = features.unflatten(-1, latents.shape)
    if relaxed:
        return ExpRelaxedCategorical(t, logits=logits).log_prob(z.log()).sum(-1)
    return OneHotCategorical(logits=logits).log_prob(z).sum(-1)


def assert_same(got: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    """Values, and gradients by the inputs under random weights."""
    assert got.shape == (*NUM, BATCH)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    weights = torch.randn_like(got)
    gradients = [
        torch.autograd.grad(
            (weights * value).sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        if value.requires_grad
        else [torch.zeros_like(each) for each in inputs]
        for value in (got, wanted)
    ]
    for g, w in zip(*gradients, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("learnt", [False, True], ids=["fixed prior", "learnt prior"])
@pytest.mark.parametrize("reparam", [False, True], ids=["score", "reparam"])
def test_densities_and_their_gradients_are_those_of_torch_distributions(kind, reparam, learnt):
    torch.manual_seed(0)
    latents = KINDS[kind]
    q, p = features_of(latents, BATCH), features_of(latents)
    prior = p if learnt else None
    row = p if learnt else torch.zeros(latents.num_features, dtype=torch.float64)
    z, log_pz, log_qz, _ = latents.draw(q, prior, NUM, reparam, TEMPERATURE)
    assert z.shape == (*NUM, BATCH, *latents.shape)
    assert z.requires_grad == reparam
    assert_same(log_pz, reference(kind, row, z, relaxed=reparam), [q, p])
    assert_same(log_qz, reference(kind, q, z, relaxed=reparam), [q, p])
    leaf = z.detach().requires_grad_()
    inputs = [q, p, leaf] if reparam else [q, p]
    assert_same(latents.log_prob(prior, leaf, TEMPERATURE), reference(kind, row, leaf, relaxed=reparam), inputs)
    assert_same(latents.log_prob(q, leaf, TEMPERATURE), reference(kind, q, leaf, relaxed=reparam), inputs)


def test_the_distribution_is_that_of_the_densities(kind):
    torch.manual_seed(1)
    latents = KINDS[kind]
    q = features_of(latents, BATCH)
    z, _, log_qz, _ = latents.draw(q, None, NUM, False, TEMPERATURE)
    log_prob = latents.distribution(q).log_prob(z)
    torch.testing.assert_close(log_prob.flatten(3).sum(-1), log_qz)
    z, _, log_qz, point = latents.draw(q, None, NUM, True, TEMPERATURE)
    relaxed: Any = latents.distribution(q, TEMPERATURE)
    if kind == "normal":
        torch.testing.assert_close(relaxed.log_prob(z).sum(-1), log_qz)
    else:  # the densities are those of y, of which z is a function
        torch.testing.assert_close(relaxed.base_dist.log_prob(point).sum(-1), log_qz)
        assert relaxed.log_prob(z).isfinite().all()


def test_normal_latents_are_drawn_with_their_mean_and_variance():
    torch.manual_seed(2)
    latents, num = KINDS["normal"], 100_000
    q = features_of(latents, 1)
    for reparam in (False, True):
        z = latents.draw(q, None, (1, num), reparam, TEMPERATURE).z.detach().flatten(0, 2)
        mean, log_var = q.detach()[0].chunk(2)
        std = (log_var / 2).exp()
        assert ((z.mean(0) - mean).abs() < 4.5 * std / num**0.5).all()
        assert ((z.std(0) / std - 1).abs() < 4.5 / (2 * num) ** 0.5).all()


@pytest.mark.parametrize("kind", DISCRETE)
@pytest.mark.parametrize("temperature", [None, 1e-3, 0.5, 5.0])
def test_values_come_as_often_as_q_says_and_the_largest_of_relaxed_ones_too(kind, temperature):
    torch.manual_seed(3)
    latents, num = KINDS[kind], 50_000
    q = features_of(latents, BATCH).detach()
    z = latents.draw(q, None, (2, num // 2), temperature is not None, temperature or 1.0).z.flatten(0, 1)
    values = z.unsqueeze(-1) if kind == "bernoulli" else z
    if kind == "bernoulli":
        values = torch.cat([1 - values, values], -1)
        probabilities = torch.stack([(-q).sigmoid(), q.sigmoid()], -1)
    else:
        probabilities = q.unflatten(-1, latents.shape).softmax(-1)
    if temperature is None:
        assert ((values == 0) | (values == 1)).all()
        assert (values.sum(-1) == 1).all()
    elif temperature == 1e-3:
        assert (values.amax(-1) > 0.999).double().mean() > 0.995
    else:
        assert ((values > 0) & (values < 1)).all()
        torch.testing.assert_close(values.sum(-1), torch.ones_like(values[..., 0]))
    largest = (values == values.amax(-1, keepdim=True)).double().mean(0)
    assert ((largest - probabilities).abs() < 4.5 * (probabilities * (1 - probabilities) / num).sqrt()).all()


@pytest.mark.parametrize("kind", DISCRETE)
def test_relaxed_draws_have_the_distribution_whose_density_is_given(kind):
    """E_q[p(y) / q(y)] = 1 for densities p and q of y."""
    torch.manual_seed(4)
    latents, num = KINDS[kind], 200_000
    q, p = (0.5 * features_of(latents, *leading).detach() for leading in ((1,), ()))
    _, log_p, log_q, _ = latents.draw(q, p, (1, num), True, TEMPERATURE)
    ratio = (log_p - log_q).exp().flatten()
    assert (ratio.mean() - 1).abs() < 4.5 * ratio.std() / num**0.5
    assert ratio.std() > 0.1


@pytest.mark.parametrize("temperature", [0.02, 0.5, 10.0])
@pytest.mark.parametrize("size", [1.0, 40.0, 1000.0])
def test_extreme_features_and_temperatures_leave_everything_finite_in_float32(kind, size, temperature):
    torch.manual_seed(5)
    latents = KINDS[kind]
    scale = min(size, 40.0) if kind == "normal" else size  # exp(1000) is no variance
    q = (scale * features_of(latents, BATCH, dtype=torch.float32)).detach().requires_grad_()
    for reparam in (False, True):
        z, log_pz, log_qz, _ = latents.draw(q, None, (10, 50), reparam, temperature)
        leaf = z.detach().requires_grad_()
        again = latents.log_prob(q, leaf, temperature)
        for value in (z, log_pz, log_qz, again):
            assert value.isfinite().all()
        for value, by in ((log_qz, q), (again, q), (again, leaf)):
            (gradient,) = torch.autograd.grad(value.sum(), by, retain_graph=True)
            assert gradient.isfinite().all()


def test_a_uniform_zero_is_a_draw_like_any_other(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.zeros(shape, **options))
    for kind in DISCRETE:
        latents = KINDS[kind]
        q = torch.zeros(BATCH, latents.num_features, requires_grad=True)
        for part in latents.draw(q, None, NUM, True, 0.5):
            assert part.isfinite().all()


@pytest.mark.parametrize("kind", DISCRETE)
def test_nan_features_give_nan_densities_and_no_error(kind):
    q = torch.full((BATCH, KINDS[kind].num_features), torch.nan)
    for reparam in (False, True):
        assert KINDS[kind].draw(q, None, NUM, reparam, 0.5).log_qz.isnan().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("foo", 3, 2), r"^unknown latent 'foo'; choose from bernoulli, categorical, normal, subset$"),
        (("bernouli", 3, 2), r"^unknown latent 'bernouli'; did you mean 'bernoulli'\?$"),
        (("categorical", 3, 1), r"^categories = 1, expected at least 2$"),
        (("normal", 0, 2), r"^latents = 0, expected at least 1$"),
    ],
)
def test_what_is_no_kind_is_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        latents_of(*arguments)
