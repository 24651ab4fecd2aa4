"""pathwise-iwae on the conjugate Gaussian z ~ N(mu, 1), x|z ~ N(z, 1), q(z|x) = N(a x + b, s^2), in closed form."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal
from torch.func import functional_call, grad, vmap

from estimators import get_estimator
from models import GaussianMixture, GaussianToy, Template
from tests import oracles

X = 1.3
SETTINGS: tuple[dict[str, float], ...] = (
    {},
    {"alpha": 0.4},
    {"beta": 0.7},
    {"freebits": 0.2},
    {"alpha": 0.4, "beta": 0.7, "freebits": 0.2},
)
NAMES = ("a", "b", "log_s", "mu")


class Gaussian(Template):
    """Each row of the batch has its own copy of the parameters; its noise eps [mc, iw, batch] may be given."""

    def __init__(self, num_copies: int = 1, eps: Tensor | None = None):
        super().__init__()
        self.a, self.b, self.log_s, self.mu = (
            nn.Parameter(torch.full((num_copies,), value, dtype=torch.float64)) for value in (0.3, -0.2, -0.6, 0.4)
        )
        self.eps = eps

    def forward(self, x: Tensor, reparam: bool = False, sample_shape: Sequence[int] = (1, 1)) -> dict[str, Any]:
        qz = Normal(self.a * x.squeeze(-1) + self.b, self.log_s.exp(), validate_args=False)
        eps = torch.randn(*sample_shape, len(x), dtype=x.dtype) if self.eps is None else self.eps
        z = qz.loc + qz.scale * eps
        z = z if reparam else z.detach()
        log_px = Normal(z, 1.0, validate_args=False).log_prob(x.squeeze(-1))
        log_pz = Normal(self.mu, 1.0, validate_args=False).log_prob(z)
        return {"log_px": log_px, "log_pz": (log_pz,), "log_qz": (qz.log_prob(z),), "z": [z]}


def rows(num_rows: int) -> Tensor:
    return torch.full((num_rows, 1), X, dtype=torch.float64)


def estimates(id: str, model: Gaussian, num_rows: int, **options) -> Tensor:
    """The estimate of the bound's gradient in each row, [rows, parameters]."""
    loss, _, _ = get_estimator(id, **options)(model, rows(num_rows))
    loss.backward()
    columns = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(columns) == len(NAMES)
    return -num_rows * torch.stack(columns, -1)


def quadrature(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E_{N(0, 1)}, exact for polynomials of degree 2 num_nodes - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    return torch.from_numpy(nodes), torch.from_numpy(weights / math.sqrt(2 * math.pi))


def bound_at(
    eps: Tensor, alpha: float = 0.0, beta: float = 1.0, freebits: float | None = None
) -> tuple[Tensor, Gaussian]:
    """The bound of the particles eps [K] written out, with graph."""
    model = Gaussian()
    m, s = model.a * X + model.b, model.log_s.exp()
    z = m + s * eps
    log_px = -0.5 * (X - z) ** 2 - 0.5 * math.log(2 * math.pi)
    log_ratio = -0.5 * ((z - m) / s) ** 2 - s.log() + 0.5 * (z - model.mu) ** 2
    if freebits is not None:
        log_ratio = torch.where(log_ratio > freebits, log_ratio, freebits)
    return oracles.renyi_bound(log_px - beta * log_ratio, alpha), model


def gradient(scalar: Tensor, model: Gaussian) -> Tensor:
    return torch.cat(torch.autograd.grad(scalar, list(model.parameters())))


def test_the_mean_for_one_particle_is_the_closed_form():
    """ELBO = E_q[log p(x|z) + log p(z)] + H(q), whose integrand is a quadratic: five nodes are exact."""
    nodes, weights = quadrature(5)
    actual = weights @ estimates("pathwise-iwae", Gaussian(5, nodes.view(1, 1, -1)), 5, iw=1)
    model = Gaussian()
    m, s = model.a * X + model.b, model.log_s.exp()
    elbo = -0.5 * ((X - m) ** 2 + s**2) - 0.5 * ((m - model.mu) ** 2 + s**2) + s.log()
    torch.testing.assert_close(actual, gradient(elbo.sum(), model), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_each_draw_is_the_gradient_through_the_samples(options: dict[str, float]):
    eps = torch.randn(4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual = estimates("pathwise-iwae", Gaussian(20, eps.unsqueeze(0)), 20, iw=4, **options)
    expected = torch.stack([gradient(*bound_at(row, **options)) for row in eps.T])
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("id", ["pathwise-iwae", "reinforce", "ovis-gamma0", "ovis-S2-exclusive"])
def test_two_particles_are_unbiased_for_a_continuous_z(id: str):
    """Against quadrature over both particles; 40,000 draws, within 4.5 standard errors in each parameter."""
    nodes, weights = quadrature(40)
    model = Gaussian()
    m, s = model.a * X + model.b, model.log_s.exp()
    z = m + s * nodes
    log_w = -0.5 * (X - z) ** 2 - 0.5 * (z - model.mu) ** 2 + 0.5 * nodes**2 + s.log()
    pairs = torch.logaddexp(log_w[:, None], log_w[None, :]) - math.log(2)
    truth = gradient(weights @ pairs @ weights, model)

    torch.manual_seed(1)
    num_rows = 40_000
    draws = estimates(id, Gaussian(num_rows), num_rows, iw=2)
    standard_error = draws.std(0) / math.sqrt(num_rows)
    assert (((draws.mean(0) - truth) / standard_error).abs() < 4.5).all()


def test_copies_become_particles():
    eps = torch.randn(1, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    folded = get_estimator("pathwise-iwae", mc=2, iw=3)
    loss, diagnostics, _ = folded(Gaussian(3, eps), rows(3))
    expected, of_all, _ = get_estimator("pathwise-iwae", mc=1, iw=6)(Gaussian(3, eps), rows(3))
    assert loss.item() == expected.item()
    assert diagnostics["loss/L_k"].item() == pytest.approx(-loss.item())
    assert diagnostics["loss/ess"] == of_all["loss/ess"]


class Detached(Gaussian):
    """A model that draws well, but never lets the gradient through."""

    def forward(self, x, reparam=False, sample_shape=(1, 1)):
        return super().forward(x, False, sample_shape)


class Bits(Template):
    """Bernoulli latents have no rsample."""

    def __init__(self) -> None:
        super().__init__()
        self.inference_network = nn.Linear(1, 2)

    def forward(self, x: Tensor, zgrads: bool = False, **kwargs) -> dict[str, Any]:
        qz = Bernoulli(logits=self.inference_network(x))
        z = qz.rsample() if zgrads else qz.sample()
        px = Normal(z.sum(-1, keepdim=True), 1.0)
        return {"px": px, "z": [z], "qz": [qz], "pz": [Bernoulli(logits=torch.zeros(1, 2))]}


@pytest.mark.parametrize("model", [Detached(), Bits(), GaussianMixture()], ids=lambda model: type(model).__name__)
def test_a_z_without_gradient_is_refused(model: Template):
    x = rows(1).to(next(model.parameters()).dtype)
    with pytest.raises(ValueError, match=rf"^pathwise-iwae: needs z .* {type(model).__name__} has none"):
        get_estimator("pathwise-iwae", iw=2)(model, x)


class Loss(nn.Module):
    def __init__(self, model: Template):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return get_estimator("pathwise-iwae", iw=2)(self.model, x)[0]


def vectorised_gradients(model: Template) -> dict[str, Tensor]:
    """Three replicates of the gradient of each parameter."""
    whole = Loss(model)

    def loss(parameters: dict[str, Tensor], _: Tensor) -> Tensor:
        return functional_call(whole, parameters, (rows(1),))

    parameters = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    return vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, torch.zeros(3))


def test_replicates_are_vectorised():
    for gradients in vectorised_gradients(Gaussian()).values():
        assert gradients.shape == (3, 1)
        assert gradients.unique().numel() == 3


def test_a_z_without_gradient_is_refused_inside_torch_func():
    with pytest.raises(ValueError, match="pathwise-iwae: needs z"):
        vectorised_gradients(Detached())


def test_a_z_without_gradient_is_fine_where_none_is_asked_for():
    estimator = get_estimator("pathwise-iwae", iw=2)
    with torch.no_grad():
        assert estimator(Detached(), rows(1))[0].isfinite()
    frozen = Gaussian()
    for name in ("a", "b", "log_s"):
        getattr(frozen, name).requires_grad_(False)
    estimator(frozen, rows(1))[0].backward()
    assert frozen.mu.grad is not None


def test_the_toy_model_is_reparameterised():
    model = GaussianToy(dim=3)
    get_estimator("pathwise-iwae", iw=4)(model, torch.ones(2, 3))[0].backward()
    assert model.b.grad is not None
