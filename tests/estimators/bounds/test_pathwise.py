"""Pathwise estimators on the conjugate Gaussian z ~ N(mu, 1), x|z ~ N(z, 1), q(z|x) = N(a x + b, s^2).

Each draw is held to the formula written out; the mean over all draws, taken by quadrature, to what is declared.
"""

import math
import re
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
from models.template import LogDensities

X = 1.3
SETTINGS: tuple[dict[str, float], ...] = (
    {},
    {"alpha": 0.4},
    {"beta": 0.7},
    {"freebits": 0.2},
    {"alpha": 0.4, "beta": 0.7, "freebits": 0.2},
)
NAMES = ("a", "b", "log_s", "mu")
NUM_PHI = 3
IDS = ("pathwise-iwae", "pathwise-vae", "stl", "dreg")
REFUSED = {"pathwise-vae": "alpha", "dreg": "freebits"}
CASES = [(id, options) for id in IDS for options in SETTINGS if REFUSED.get(id) not in options]
CASES += [("pathwise-vae", {"beta": 0.7, "freebits": 0.2}), ("dreg", {"alpha": 0.4, "beta": 0.7})]


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
        return {**self.log_prob(x, [z])._asdict(), "z": [z]}

    def log_prob(self, x: Tensor, z: Sequence[Tensor], stop_phi: bool = False) -> LogDensities:
        (layer,), phi = z, (self.a, self.b, self.log_s)
        a, b, log_s = [value.detach() if stop_phi else value for value in phi]
        qz = Normal(a * x.squeeze(-1) + b, log_s.exp(), validate_args=False)
        log_px = Normal(layer, 1.0, validate_args=False).log_prob(x.squeeze(-1))
        log_pz = Normal(self.mu, 1.0, validate_args=False).log_prob(layer)
        return LogDensities(log_px, (log_pz,), (qz.log_prob(layer),))


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


def gradient(scalar: Tensor, model: Gaussian) -> Tensor:
    return torch.cat(torch.autograd.grad(scalar, list(model.parameters()), retain_graph=True))


def log_weight(
    z: Tensor, eps: Tensor, m: Tensor, s: Tensor, mu: Tensor, beta: float = 1.0, freebits: float | None = None
) -> Tensor:
    """log w of z, where q is N(m, s^2) and (z - m) / s the noise eps, up to what the bound's gradient does not see."""
    log_ratio = -0.5 * eps**2 - s.log() + 0.5 * (z - mu) ** 2
    if freebits is not None:
        log_ratio = torch.where(log_ratio > freebits, log_ratio, freebits)
    return -0.5 * (X - z) ** 2 - beta * log_ratio


def written_out(id: str, eps: Tensor, alpha: float = 0.0, **options) -> Tensor:
    """The estimate of one draw eps [K] by its formula, particle by particle: [parameters]."""
    model = Gaussian()
    m, s = model.a * X + model.b, model.log_s.exp()
    z = m + s * eps
    stopped = log_weight(z, (z - m.detach()) / s.detach(), m.detach(), s.detach(), model.mu, **options)
    log_w = log_weight(z, eps, m, s, model.mu, **options)
    v = ((1 - alpha) * log_w.detach()).softmax(0)
    if id == "pathwise-vae":
        return gradient(log_w.mean(), model)
    if id == "pathwise-iwae":
        return gradient(v @ log_w, model)
    if id == "stl":
        return gradient(v @ stopped, model)
    share = options.get("beta", 1.0) * (1 - alpha)
    slopes = torch.autograd.grad(stopped.sum(), z, retain_graph=True)[0]
    phi = gradient((((1 - share) * v + share * v**2) * slopes) @ z + 0 * model.mu.sum(), model)
    theta = gradient(v @ log_w, model)
    return torch.cat([phi[:NUM_PHI], theta[NUM_PHI:]])


def declared(id: str, num_particles: int, num_nodes: int, alpha: float = 0.0, **options) -> Tensor:
    """The expectation of an estimate: gradients of sums over a grid of nodes for every particle."""
    nodes, weights = quadrature(num_nodes)
    grid = torch.cartesian_prod(*[nodes] * num_particles).view(-1, num_particles)
    probabilities = torch.cartesian_prod(*[weights] * num_particles).view(-1, num_particles).prod(-1)
    model = Gaussian()
    m, s = model.a * X + model.b, model.log_s.exp()
    log_w = log_weight(m + s * grid, grid, m, s, model.mu, **options)
    if id == "pathwise-vae":
        return gradient(probabilities @ log_w.mean(-1), model)
    bound = ((1 - alpha) * log_w).logsumexp(-1) / (1 - alpha)
    expectation = gradient(probabilities @ bound, model)
    if id == "stl":
        z = (m + s * grid).detach()
        score = -0.5 * ((z - m) / s) ** 2 - s.log()
        counted = ((1 - alpha) * log_w.detach()).softmax(-1)
        if "freebits" in options:
            counted = counted * (-0.5 * grid**2 - s.log() + 0.5 * (z - model.mu) ** 2 > options["freebits"])
        surrogate = probabilities @ (counted.detach() * score).sum(-1) + 0 * model.mu.sum()
        expectation = expectation + options.get("beta", 1.0) * gradient(surrogate, model)
    return expectation


@pytest.mark.parametrize(("id", "mc"), [("pathwise-iwae", 1), ("pathwise-vae", 1), ("pathwise-vae", 2)])
@pytest.mark.parametrize("beta", [1.0, 0.7])
def test_the_mean_of_the_elbo_is_the_closed_form(id: str, beta: float, mc: int):
    """ELBO = E_q[log p(x|z) + beta log p(z)] + beta H(q), whose integrand is a quadratic: five nodes are exact."""
    nodes, weights = quadrature(5)
    pairs = torch.cartesian_prod(*[nodes] * mc).view(-1, mc).T.unsqueeze(0)
    probabilities = torch.cartesian_prod(*[weights] * mc).view(-1, mc).prod(-1)
    num_rows = len(probabilities)
    actual = probabilities @ estimates(id, Gaussian(num_rows, pairs), num_rows, mc=mc, iw=1, beta=beta)
    model = Gaussian()
    m, s = model.a * X + model.b, model.log_s.exp()
    elbo = -0.5 * ((X - m) ** 2 + s**2) - beta * 0.5 * ((m - model.mu) ** 2 + s**2) + beta * s.log()
    torch.testing.assert_close(actual, gradient(elbo.sum(), model), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("num_particles", [1, 2, 4])
@pytest.mark.parametrize(("id", "options"), CASES, ids=str)
def test_each_draw_is_the_formula(id: str, options: dict[str, float], num_particles: int):
    eps = torch.randn(num_particles, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual = estimates(id, Gaussian(20, eps.unsqueeze(0)), 20, iw=num_particles, **options)
    expected = torch.stack([written_out(id, row, **options) for row in eps.T])
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(("num_particles", "num_nodes"), [(1, 40), (2, 60), (3, 40)])
@pytest.mark.parametrize(("id", "options"), CASES, ids=str)
def test_the_mean_is_what_is_declared(id: str, options: dict[str, float], num_particles: int, num_nodes: int):
    nodes, weights = quadrature(num_nodes)
    eps = torch.cartesian_prod(*[nodes] * num_particles).view(-1, num_particles)
    probabilities = torch.cartesian_prod(*[weights] * num_particles).view(-1, num_particles).prod(-1)
    model = Gaussian(len(eps), eps.T.unsqueeze(0))
    actual = probabilities @ estimates(id, model, len(eps), iw=num_particles, **options)
    expected = declared(id, num_particles, num_nodes, **options)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("id", ["pathwise-iwae", "dreg"])
def test_a_biased_mean_does_not_pass_for_an_unbiased_one(id: str):
    assert (declared("stl", 2, 60) - declared(id, 2, 60))[:NUM_PHI].abs().max() > 1e-2


@pytest.mark.parametrize("id", ["stl", "dreg"])
def test_copies_are_averaged(id: str):
    eps = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = estimates(id, Gaussian(7, eps), 7, mc=2, iw=3, alpha=0.3)
    each = [estimates(id, Gaussian(7, copy.unsqueeze(0)), 7, iw=3, alpha=0.3) for copy in eps]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.4}], ids=str)
@pytest.mark.parametrize("id", ["stl", "dreg"])
def test_every_draw_of_phi_is_zero_at_the_exact_posterior(id: str, options: dict[str, float]):
    """p(z|x) = N((x + mu) / 2, 1/2)."""
    model = Gaussian(50)
    with torch.no_grad():
        model.a.fill_(0.5)
        model.b.copy_(model.mu / 2)
        model.log_s.fill_(math.log(0.5) / 2)
    draws = estimates(id, model, 50, iw=4, **options)
    assert draws[:, :NUM_PHI].abs().max() < 1e-12
    assert draws[:, NUM_PHI:].abs().min() > 1e-6


@pytest.mark.parametrize("id", ["pathwise-iwae", "dreg", "reinforce", "ovis-gamma0", "ovis-S2-exclusive"])
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


@pytest.mark.parametrize(("id", "name"), [("pathwise-iwae", "loss/L_k"), ("pathwise-vae", "loss/elbo")])
def test_copies_become_particles(id: str, name: str):
    eps = torch.randn(1, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    folded = get_estimator(id, mc=2, iw=3)
    loss, diagnostics, _ = folded(Gaussian(3, eps), rows(3))
    expected, of_all, _ = get_estimator(id, mc=1, iw=6)(Gaussian(3, eps), rows(3))
    assert loss.item() == expected.item()
    assert diagnostics[name].item() == pytest.approx(-loss.item())
    assert diagnostics["loss/ess"] == of_all["loss/ess"]


def test_what_each_descends():
    of_all, elbo = ("bound", 6), ("bound", 1)
    assert get_estimator("pathwise-iwae", mc=2, iw=3).objectives == (of_all, of_all)
    assert get_estimator("pathwise-vae", mc=2, iw=3).objectives == (elbo, elbo)
    assert get_estimator("stl", mc=2, iw=6).objectives == get_estimator("dreg", iw=6).objectives == (of_all, of_all)


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


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Detached(), "; use rsample()"),
        (Bits(), ": its distribution has no rsample()"),
        (GaussianMixture(), ": it is discrete; score function estimators take it"),
    ],
    ids=["Detached", "Bits", "GaussianMixture"],
)
def test_a_z_without_gradient_is_refused(model: Template, reason: str, id: str):
    x = rows(1).to(next(model.parameters()).dtype)
    with pytest.raises(ValueError, match=rf"^{id}: needs z .* {type(model).__name__} has none{re.escape(reason)}"):
        get_estimator(id, iw=2)(model, x)


class Loss(nn.Module):
    def __init__(self, model: Template, id: str):
        super().__init__()
        self.model = model
        self.estimator = get_estimator(id, iw=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.estimator(self.model, x)[0]


def vectorised_gradients(model: Template, id: str) -> dict[str, Tensor]:
    """Three replicates of the gradient of each parameter."""
    whole = Loss(model, id)

    def loss(parameters: dict[str, Tensor], _: Tensor) -> Tensor:
        return functional_call(whole, parameters, (rows(1),))

    parameters = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    return vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, torch.zeros(3))


@pytest.mark.parametrize("id", IDS)
def test_replicates_are_vectorised(id: str):
    for gradients in vectorised_gradients(Gaussian(), id).values():
        assert gradients.shape == (3, 1)
        assert gradients.unique().numel() == 3


@pytest.mark.parametrize("id", IDS)
def test_vectorised_estimates_are_those_of_a_loop(id: str):
    eps = torch.randn(6, 1, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Gaussian()
    whole = Loss(model, id)
    parameters = {name: parameter.detach() for name, parameter in whole.named_parameters()}

    def loss(parameters: dict[str, Tensor], eps: Tensor) -> Tensor:
        model.eps = eps
        return functional_call(whole, parameters, (rows(1),))

    vectorised = vmap(grad(loss), in_dims=(None, 0))(parameters, eps)
    for i, each in enumerate(eps):
        for name, expected in grad(loss)(parameters, each).items():
            torch.testing.assert_close(vectorised[name][i], expected, rtol=0.0, atol=1e-12)


def test_a_z_without_gradient_is_refused_inside_torch_func():
    with pytest.raises(ValueError, match="pathwise-iwae: needs z"):
        vectorised_gradients(Detached(), "pathwise-iwae")


@pytest.mark.parametrize("id", IDS)
def test_a_z_without_gradient_is_fine_where_none_is_asked_for(id: str):
    estimator = get_estimator(id, iw=2)
    with torch.no_grad():
        assert estimator(Detached(), rows(1))[0].isfinite()
    frozen = Gaussian()
    for name in ("a", "b", "log_s"):
        getattr(frozen, name).requires_grad_(False)
    estimator(frozen, rows(1))[0].backward()
    assert frozen.mu.grad is not None


@pytest.mark.parametrize("id", IDS)
def test_the_toy_model_is_reparameterised(id: str):
    """Its z is built when it is read, and its forward never needs it; here against the same as plain distributions."""
    torch.manual_seed(0)
    model, x = GaussianToy(dim=3).double(), torch.randn(2, 3, dtype=torch.float64)

    class Plain(Template):
        def __init__(self) -> None:
            super().__init__()
            self.toy = model

        def forward(self, x: Tensor, reparam: bool = False) -> dict[str, Any]:
            qz = Normal(x @ model.A.T + model.b, model.std)
            # The toy's noise lies as [batch, mc iw, D].
            eps = torch.randn(2, len(x) // 2, 3, dtype=x.dtype).transpose(0, 1).reshape(-1, 3)
            z = qz.loc + qz.scale * eps
            return {"px": Normal(z, 1.0), "z": [z], "qz": [qz], "pz": [Normal(model.mu, 1.0)]}

    found = []
    for kind in (model, Plain()):
        torch.manual_seed(1)
        model.zero_grad()
        get_estimator(id, mc=2, iw=4, beta=0.7)(kind, x)[0].backward()
        found.append([None if p.grad is None else p.grad.clone() for p in (model.A, model.b, model.mu)])
    torch.testing.assert_close(*found, rtol=0.0, atol=1e-10)


class Ladder(Template):
    """K particles at the same z = phi whose log-weights lie `gaps` [K] apart; their slopes by z and theta differ."""

    def __init__(self, gaps: Tensor):
        super().__init__()
        self.phi, self.theta = (nn.Parameter(torch.tensor(value, dtype=gaps.dtype)) for value in (0.0, 0.5))
        self.gaps = gaps
        self.slopes = torch.linspace(-1, 2, len(gaps), dtype=gaps.dtype)

    def forward(self, x: Tensor, reparam: bool = False, sample_shape: Sequence[int] = (1, 1)) -> dict[str, Any]:
        z = self.phi.expand(*sample_shape, len(x))
        return {**self.log_prob(x, [z])._asdict(), "z": [z]}

    def log_prob(self, x: Tensor, z: Sequence[Tensor], stop_phi: bool = False) -> LogDensities:
        phi = self.phi.detach() if stop_phi else self.phi
        log_px = self.gaps.view(1, -1, 1) + self.slopes.view(1, -1, 1) * (z[0] + self.theta - 0.5)
        return LogDensities(log_px, (0 * z[0],), (z[0] - phi - (z[0] - phi) ** 2,))


def ladder_gradient(id: str, gaps: Sequence[float], dtype: torch.dtype) -> Tensor:
    model = Ladder(torch.tensor(gaps, dtype=dtype))
    get_estimator(id, iw=len(gaps))(model, torch.zeros(1, 1, dtype=dtype))[0].backward()
    assert model.phi.grad is not None
    assert model.theta.grad is not None
    return torch.stack([model.phi.grad, model.theta.grad]).double()


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize("gap", [20.0, 40.0, 60.0, 90.0])
def test_float32_agrees_with_float64_at_large_gaps(id: str, gap: float):
    for gaps in ([0.0, -gap, -gap - 1, -2 * gap], [-gap, -gap, 0.0, 0.0], [gap, 0.0, 0.5, 1.0]):
        single, double = (ladder_gradient(id, gaps, dtype) for dtype in (torch.float32, torch.float64))
        torch.testing.assert_close(single, double, rtol=1e-5, atol=1e-5 * double.abs().max().item())


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize("gaps", [[0.0, -math.inf, -1.0], [-math.inf, -math.inf, 3.0], [-math.inf] * 3])
def test_weights_of_zero_leave_finite_gradients(id: str, gaps: list[float]):
    assert ladder_gradient(id, gaps, torch.float64).isfinite().all()
