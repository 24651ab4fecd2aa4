"""stl and dreg need log q with q's own parameters stopped: in a hierarchy, and in models that have a forward alone."""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributions as D
from torch.func import functional_call, grad, vmap

from estimators import get_estimator
from models import Template
from models.particles import densities_with_stopped_q, draw_particles
from models.template import LogDensities
from tests.simple_model import SimpleModel

IDS = ("stl", "dreg")
X = 0.8
SETTINGS: tuple[dict[str, float], ...] = ({}, {"alpha": 0.4}, {"beta": 0.7}, {"alpha": 0.4, "beta": 0.7})


# --- A hierarchy -----------------------------------------------------------------------------------------------------


class TwoLayers(Template):
    """z1 ~ N(a x, s1^2), z2|z1 ~ N(c z1, s2^2); p: z2 ~ N(mu, 1), z1|z2 ~ N(t z2, 1), x|z1 ~ N(z1, 1).

    Each row of the batch has its own copy of the parameters, and its noise eps [2, mc, iw, batch] may be given.
    """

    START = (("a", 0.4), ("log_s1", -0.7), ("c", 0.6), ("log_s2", -0.5), ("mu", 0.3), ("t", 0.5))
    NUM_PHI = 4
    a: nn.Parameter
    log_s1: nn.Parameter
    c: nn.Parameter
    log_s2: nn.Parameter
    mu: nn.Parameter
    t: nn.Parameter

    def __init__(self, num_copies: int = 1, eps: Tensor | None = None):
        super().__init__()
        for name, value in self.START:
            setattr(self, name, nn.Parameter(torch.full((num_copies,), value, dtype=torch.float64)))
        self.eps = eps

    def draw(self, x: Tensor, eps: Tensor) -> list[Tensor]:
        z1 = self.a * x.squeeze(-1) + self.log_s1.exp() * eps[0]
        return [z1, self.c * z1 + self.log_s2.exp() * eps[1]]

    def forward(self, x: Tensor, reparam: bool = False, sample_shape: Sequence[int] = (1, 1)) -> dict[str, Any]:
        eps = torch.randn(2, *sample_shape, len(x), dtype=x.dtype) if self.eps is None else self.eps
        z = self.draw(x, eps) if reparam else [layer.detach() for layer in self.draw(x, eps)]
        return {**self.log_prob(x, z)._asdict(), "z": z}

    def log_prob(self, x: Tensor, z: Sequence[Tensor], stop_phi: bool = False) -> LogDensities:
        phi = (self.a, self.log_s1, self.c, self.log_s2)
        a, log_s1, c, log_s2 = [value.detach() if stop_phi else value for value in phi]
        z1, z2 = z
        return LogDensities(
            normal(x.squeeze(-1), z1, torch.zeros(())),
            (normal(z1, self.t * z2, torch.zeros(())), normal(z2, self.mu, torch.zeros(()))),
            (normal(z1, a * x.squeeze(-1), log_s1), normal(z2, c * z1, log_s2)),
        )


def normal(value: Tensor, mean: Tensor, log_s: Tensor) -> Tensor:
    return -0.5 * ((value - mean) / log_s.exp()) ** 2 - log_s - 0.5 * math.log(2 * math.pi)


def rows(num_rows: int) -> Tensor:
    return torch.full((num_rows, 1), X, dtype=torch.float64)


def estimates(id: str, model: nn.Module, num_rows: int, **options) -> Tensor:
    """The estimate of the bound's gradient in each row, [rows, parameters]."""
    get_estimator(id, **options)(model, rows(num_rows))[0].backward()
    columns = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(columns) == len(TwoLayers.START)
    return -num_rows * torch.stack(columns, -1)


def gradient(scalar: Tensor, model: nn.Module) -> Tensor:
    parameters = list(model.parameters())
    return torch.cat(torch.autograd.grad(scalar, parameters, retain_graph=True, materialize_grads=True))


def log_weight(model: TwoLayers, z: Sequence[Tensor], beta: float, q: TwoLayers | None = None) -> Tensor:
    """log w of z, each layer [...], with the parameters of q from another model where one is given."""
    densities, q = model.log_prob(rows(1), z), q or model
    log_ratio = sum(q.log_prob(rows(1), z).log_qz) - sum(densities.log_pz)
    return densities.log_px - beta * log_ratio


def written_out(id: str, eps: Tensor, alpha: float = 0.0, beta: float = 1.0) -> Tensor:
    """The estimate of one draw eps [2, K] by its formula: [parameters]."""
    model, constant = TwoLayers(), TwoLayers().requires_grad_(False)
    z = model.draw(rows(1), eps)
    v = ((1 - alpha) * log_weight(model, z, beta).detach()).softmax(0)
    if id == "stl":
        return gradient(v @ log_weight(model, z, beta, q=constant), model)
    share = beta * (1 - alpha)
    leaves = [layer.detach().requires_grad_() for layer in z]
    slopes = torch.autograd.grad(log_weight(constant, leaves, beta).sum(), leaves)
    coefficients = (1 - share) * v + share * v**2
    phi = gradient((coefficients * slopes[0]) @ z[0] + (coefficients * slopes[1]) @ z[1], model)
    theta = gradient(v @ log_weight(model, [layer.detach() for layer in z], beta), model)
    return torch.cat([phi[: TwoLayers.NUM_PHI], theta[TwoLayers.NUM_PHI :]])


def grid(num_particles: int, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes [rows, 2, K] of the noise of K particles and the weight of each row."""
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(num_nodes))
    points = torch.cartesian_prod(*[nodes] * (2 * num_particles)).view(-1, 2, num_particles)
    weights = torch.cartesian_prod(*[weights / math.sqrt(2 * math.pi)] * (2 * num_particles))
    return points, weights.prod(-1)


def declared(id: str, num_particles: int, num_nodes: int, alpha: float = 0.0, beta: float = 1.0) -> Tensor:
    """grad L, for stl plus beta E[sum_k v_k h_k], by sums over the grid."""
    points, probabilities = grid(num_particles, num_nodes)
    model = TwoLayers()
    z = model.draw(rows(1), points.movedim(1, 0))
    log_w = log_weight(model, z, beta)
    expectation = gradient(probabilities @ ((1 - alpha) * log_w).logsumexp(-1) / (1 - alpha), model)
    if id == "stl":
        v = ((1 - alpha) * log_w.detach()).softmax(-1)
        log_q = sum(model.log_prob(rows(1), [layer.detach() for layer in z]).log_qz)
        expectation = expectation + beta * gradient(probabilities @ (v * log_q).sum(-1), model)
    return expectation


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("id", IDS)
def test_each_draw_of_a_hierarchy_is_the_formula(id: str, options: dict[str, float]):
    eps = torch.randn(2, 1, 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual = estimates(id, TwoLayers(9, eps), 9, iw=3, **options)
    expected = torch.stack([written_out(id, row, **options) for row in eps.squeeze(1).unbind(-1)])
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(("num_particles", "num_nodes"), [(1, 40), (2, 20)])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("id", IDS)
def test_the_mean_of_a_hierarchy_is_what_is_declared(
    id: str, options: dict[str, float], num_particles: int, num_nodes: int
):
    points, probabilities = grid(num_particles, num_nodes)
    model = TwoLayers(len(points), points.permute(1, 2, 0).unsqueeze(1))
    actual = probabilities @ estimates(id, model, len(points), iw=num_particles, **options)
    expected = declared(id, num_particles, num_nodes, **options)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-6)


def test_freebits_of_a_hierarchy_stop_the_layers_one_by_one():
    """pathwise-iwae - stl = - beta sum_{k,l} v_k m_{k,l} h_{k,l} in each draw."""
    eps = torch.randn(2, 1, 3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"beta": 0.7, "freebits": 0.1, "alpha": 0.3}
    difference = torch.sub(*(estimates(id, TwoLayers(40, eps), 40, iw=3, **options) for id in ("pathwise-iwae", "stl")))
    model = TwoLayers(40)
    z = [layer.detach() for layer in model.draw(rows(40), eps)]
    densities = model.log_prob(rows(40), z)
    ratio = torch.stack(densities.log_qz).detach() - torch.stack(densities.log_pz)
    v = (0.7 * (densities.log_px - 0.7 * ratio.clamp(min=0.1).sum(0))).softmax(-2)
    active = (ratio > 0.1).double()
    assert 0 < active.mean() < 1
    scores = (-0.7 * (v.detach() * active) * torch.stack(densities.log_qz)).sum()
    by_parameter = torch.autograd.grad(scores, list(model.parameters()), materialize_grads=True, allow_unused=True)
    torch.testing.assert_close(difference, torch.stack(by_parameter, -1), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("id", IDS)
def test_vectorised_estimates_of_a_hierarchy_are_those_of_a_loop(id: str):
    eps = torch.randn(5, 2, 1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = Loss(TwoLayers(2), get_estimator(id, iw=3))
    assert_vectorised(whole, "eps", eps, rows(2))


class Loss(nn.Module):
    def __init__(self, model: nn.Module, estimator: nn.Module):
        super().__init__()
        self.model, self.estimator = model, estimator

    def forward(self, x: Tensor) -> Tensor:
        return self.estimator(self.model, x)[0]


def assert_vectorised(whole: Loss, attribute: str, noise: Tensor, x: Tensor) -> None:
    """vmap of grad over the model's noise [replicates, ...] equals a loop."""
    parameters = {name: parameter.detach() for name, parameter in whole.named_parameters()}

    def loss(parameters: dict[str, Tensor], noise: Tensor) -> Tensor:
        setattr(whole.model, attribute, noise)
        return functional_call(whole, parameters, (x,))

    vectorised = vmap(grad(loss), in_dims=(None, 0))(parameters, noise)
    for i, each in enumerate(noise):
        for name, expected in grad(loss)(parameters, each).items():
            torch.testing.assert_close(vectorised[name][i], expected, rtol=0.0, atol=1e-12)


# --- Models of one layer with a forward alone ------------------------------------------------------------------------


def positive(t: Tensor) -> Tensor:
    return nn.functional.softplus(t) + 0.3


def triangular(t: Tensor) -> Tensor:
    return torch.diag_embed(positive(t)) + 0.3 * torch.ones(2, 2, dtype=t.dtype).tril(-1)


# q from a tensor [batch, 4] that holds its parameters: its location and its scale, where it has these.
FAMILIES: dict[str, Callable[[Tensor], D.Distribution]] = {
    "Normal": lambda t: D.Normal(t[:, :2], positive(t[:, 2:])),
    "LogNormal": lambda t: D.LogNormal(t[:, :2], positive(t[:, 2:])),
    "Laplace": lambda t: D.Laplace(t[:, :2], positive(t[:, 2:])),
    "Independent": lambda t: D.Independent(D.Normal(t[:, :2], positive(t[:, 2:])), 1),
    "MultivariateNormal": lambda t: D.MultivariateNormal(t[:, :2], scale_tril=triangular(t[:, 2:])),
    "LowRank": lambda t: D.LowRankMultivariateNormal(t[:, :2], t[:, 2:].unsqueeze(-1), positive(t[:, :2])),
    "StudentT": lambda t: D.StudentT(5.0, t[:, :2], positive(t[:, 2:])),
    "Gumbel": lambda t: D.Gumbel(t[:, :2], positive(t[:, 2:])),
    "Gamma": lambda t: D.Gamma(1 + positive(t[:, :2]), positive(t[:, 2:])),
    "Beta": lambda t: D.Beta(1 + positive(t[:, :2]), 1 + positive(t[:, 2:])),
    "Kumaraswamy": lambda t: D.Kumaraswamy(1 + positive(t[:, :2]), 1 + positive(t[:, 2:])),
    "RelaxedBernoulli": lambda t: D.RelaxedBernoulli(torch.tensor(0.7, dtype=t.dtype), logits=t[:, 2:]),
    "Transformed": lambda t: D.TransformedDistribution(
        D.Normal(torch.zeros_like(t[:, :2]), 1.0),
        [
            D.AffineTransform(t[:, :2], positive(t[:, 2:]), cache_size=1),
            D.AffineTransform(0.1 * t[:, 2:], 2.0).inv,
            D.ComposeTransform([D.TanhTransform(), D.AffineTransform(t[:, :2], 1.5)]),
        ],
    ),
}


class Foreign(Template):
    """A user's model: x comes repeated, there is no log_prob, and all of q is learnt."""

    def __init__(self, build: Callable[[Tensor], D.Distribution]):
        super().__init__()
        self.build = build
        self.inference_network = nn.Linear(3, 4)
        self.generative_model = nn.Linear(2, 3)
        self.prior_logits = nn.Parameter(torch.tensor([[0.3, -0.2, 0.1, 0.4]]))

    def forward(self, x: Tensor, reparam: bool = False, **kwargs) -> dict[str, Any]:
        qz = self.build(self.inference_network(x))
        z = qz.rsample() if reparam else qz.sample()
        return {"px": self.px(z), "z": [z], "qz": [qz], "pz": [self.build(self.prior_logits)]}

    def px(self, z: Tensor) -> D.Distribution:
        return D.Normal(self.generative_model(z), 1.0)


def foreign(family: str, kind: type[Foreign] = Foreign) -> tuple[Foreign, Tensor]:
    torch.manual_seed(3)
    return kind(FAMILIES[family]).double(), torch.randn(2, 3, dtype=torch.float64)


def log_densities(model: Foreign, values: Tensor, z: Tensor, qz: D.Distribution, beta: float) -> Tensor:
    """log w [rows], written out."""
    log_px = model.px(z).log_prob(values).sum(-1)
    log_pz, log_qz = model.build(model.prior_logits).log_prob(z), qz.log_prob(z)
    return log_px - beta * (log_qz - log_pz).reshape(len(values), -1).sum(-1)


def foreign_gradients(id: str, model: Foreign, x: Tensor, iw: int, alpha: float, beta: float) -> list[Tensor]:
    """The gradient of the loss by each parameter, from the formula and the same random numbers."""
    values = x.expand(iw, *x.shape).reshape(-1, 3)
    parameters = list(model.parameters())
    numbers = model.inference_network(values)
    torch.manual_seed(7)
    z = model.build(numbers).rsample()
    log_w = log_densities(model, values, z, model.build(numbers), beta).view(iw, -1)
    v = ((1 - alpha) * log_w.detach()).softmax(0).flatten() / len(x)
    stopped = model.build(numbers.detach())
    if id == "stl":
        surrogate = v @ log_densities(model, values, z, stopped, beta)
    else:
        leaf = z.detach().requires_grad_()
        log_w = log_densities(model, values, leaf, stopped, beta)
        (slopes,) = torch.autograd.grad(log_w.sum(), leaf, retain_graph=True)
        v_norm, share = v * len(x), beta * (1 - alpha)
        coefficients = v * ((1 - share) + share * v_norm)
        surrogate = (coefficients.unsqueeze(-1) * slopes * z).sum() + v @ log_w
    return [-g for g in torch.autograd.grad(surrogate, parameters)]


@pytest.mark.parametrize("options", [{"alpha": 0.0, "beta": 1.0}, {"alpha": 0.4, "beta": 0.7}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("id", IDS)
def test_any_distribution_keeps_all_its_parameters_as_constants(id: str, family: str, options: dict[str, float]):
    model, x = foreign(family)
    expected = foreign_gradients(id, model, x, 3, **options)
    torch.manual_seed(7)
    get_estimator(id, iw=3, alpha=options["alpha"], beta=options["beta"])(model, x)[0].backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("id", IDS)
def test_copies_and_sample_shapes(id: str):
    """x repeated as [mc iw batch, ...] and a forward that names sample_shape give the same."""

    class Shaped(Foreign):
        def forward(self, x, reparam=False, sample_shape=(1, 1)):  # type: ignore[override]
            return super().forward(x.expand(*sample_shape, *x.shape), reparam)

    found = []
    for kind in (Foreign, Shaped):
        model, x = foreign("Normal", kind)
        model.build = lambda t: D.Normal(t[..., :2], positive(t[..., 2:]))
        torch.manual_seed(7)
        get_estimator(id, mc=2, iw=3, alpha=0.2)(model, x)[0].backward()
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*found, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("id", IDS)
def test_vectorised_estimates_of_a_users_model_are_those_of_a_loop(id: str):
    class Given(Foreign):
        noise: Tensor

        def forward(self, x: Tensor, reparam: bool = False, **kwargs) -> dict[str, Any]:
            t = self.inference_network(x)
            qz = D.Normal(t[:, :2], positive(t[:, 2:]), validate_args=False)
            z = qz.loc + qz.scale * self.noise
            pz = D.Normal(self.prior_logits[:, :2], 1.0, validate_args=False)
            return {"px": D.Normal(self.generative_model(z), 1.0, validate_args=False), "z": z, "qz": qz, "pz": pz}

    model, x = foreign("Normal", Given)
    noise = torch.randn(5, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model.prior_logits = nn.Parameter(model.prior_logits.detach())
    assert_vectorised(Loss(model, get_estimator(id, iw=3)), "noise", noise, x)


@pytest.mark.parametrize("family", FAMILIES)
def test_stopping_changes_gradients_alone(family: str):
    model, x = foreign(family)
    particles = draw_particles(model, x, 2, 3, reparam=True)
    for scale in (None, torch.rand(2, 3, 2, dtype=torch.float64)):
        stopped = densities_with_stopped_q(particles, scale)
        for name in ("log_px", "log_pz", "log_qz"):
            torch.testing.assert_close(getattr(stopped, name), getattr(particles, name), rtol=0.0, atol=1e-9)


def test_what_others_make_of_the_same_particles_stays_as_it_is():
    """The gradients of pathwise-iwae before and after dreg has used the particles."""
    model, x = foreign("Normal")
    pathwise, dreg = get_estimator("pathwise-iwae", iw=3), get_estimator("dreg", iw=3)
    particles = pathwise.draw(model, x, 0)

    def by_phi() -> Tensor:
        loss = pathwise.loss(particles, 0.0, 1.0)
        return torch.autograd.grad(loss, model.inference_network.weight, retain_graph=True)[0]

    before = by_phi()
    dreg.loss(particles, 0.0, 1.0)
    assert torch.equal(by_phi(), before)


def test_estimates_of_the_same_particles_add_up():
    model, x = foreign("Normal")
    losses = [get_estimator(id, iw=3) for id in ("dreg", "pathwise-iwae", "dreg")]
    particles = losses[0].draw(model, x, 0)
    values = [each.loss(particles, alpha, 1.0) for each, alpha in zip(losses, (0.0, 0.0, 0.5), strict=True)]
    parameters = list(model.parameters())

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, parameters, retain_graph=True))

    alone = [gradients(value) for value in values]
    for together, *each in zip(gradients(torch.stack(values).sum()), *alone, strict=True):
        torch.testing.assert_close(together, torch.stack(each).sum(0), rtol=0.0, atol=1e-12)


class Passing(torch.autograd.Function):
    """Counts the passes back through it, and has a token that lives as long as its node."""

    passes = 0
    last: Callable[[], Any]

    class Token:
        pass

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.token = Passing.Token()
        Passing.last = weakref.ref(ctx.token)
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        Passing.passes += 1
        return gradients[0]


class Counted(Foreign):
    def px(self, z: Tensor) -> D.Distribution:
        return D.Normal(Passing.apply(self.generative_model(z)), 1.0)


def test_dreg_goes_back_through_the_decoder_once_and_leaves_no_graph_behind():
    model, x = foreign("Normal", Counted)
    before = Passing.passes
    loss, diagnostics, output = get_estimator("dreg", iw=3)(model, x)
    del diagnostics, output
    assert Passing.last() is not None
    loss.backward()
    assert Passing.passes == before + 1
    assert loss.grad_fn is not None
    assert Passing.last() is None


@pytest.mark.parametrize("at", ["before", "after"], ids="hooks registered {} the loss".format)
def test_hooks_see_each_gradient_once_and_whole(at: str):
    """Of a leaf of the decoder, of z itself, and what z retains."""
    model, x = foreign("Normal")
    dreg, weight = get_estimator("dreg", iw=3), model.generative_model.weight
    torch.manual_seed(7)
    particles = dreg.draw(model, x, 0)
    (z,), seen = particles.output["z"], []
    plain = torch.autograd.grad(dreg.loss(particles, 0.0, 1.0), [weight, z, model.inference_network.weight])

    torch.manual_seed(7)
    particles = dreg.draw(model, x, 0)
    (z,) = particles.output["z"]

    def register() -> list[Any]:
        z.retain_grad()
        return [weight.register_hook(lambda g: 2 * g), z.register_hook(lambda g: seen.append(g))]

    handles = register() if at == "before" else []
    loss = dreg.loss(particles, 0.0, 1.0)
    handles = handles or register()
    loss.backward()
    for handle in handles:
        handle.remove()
    (of_z,) = seen
    of_weight, of_phi = (parameter.grad for parameter in (weight, model.inference_network.weight))
    for got, wanted in zip((of_weight, of_z, of_phi), (2 * plain[0], *plain[1:]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.0, atol=1e-12)
    assert torch.equal(z.grad, of_z)
    assert weight._backward_hooks == {}


class Split(Foreign):
    """z is one of two outputs of one operation, of which p(x|z) sees both."""

    def forward(self, x: Tensor, reparam: bool = False, **kwargs) -> dict[str, Any]:
        qz = D.Normal(self.inference_network(x)[:, :2], 1.0)
        draw = qz.rsample() if reparam else qz.sample()
        z, self.other = torch.stack((draw, 2 * draw)).unbind()
        return {"px": self.px(z), "z": [z], "qz": [qz], "pz": [D.Normal(self.prior_logits[:, :2], 1.0)]}

    def px(self, z: Tensor) -> D.Distribution:
        return D.Normal(self.generative_model(z) + self.other.sum(-1, keepdim=True), 1.0)


def test_another_output_of_the_operation_that_gave_z_keeps_its_gradient():
    model, x = foreign("Normal", Split)
    torch.manual_seed(7)
    particles = draw_particles(model, x, 1, 3, reparam=True)
    scale = torch.rand(1, 3, 2, dtype=torch.float64)
    log_px = densities_with_stopped_q(particles, scale).log_px
    (got,) = torch.autograd.grad(log_px.sum(), model.inference_network.bias, retain_graph=True)
    (through_z, through_other) = torch.autograd.grad(particles.log_px.sum(), [particles.output["z"][0], model.other])
    wanted = (scale.reshape(-1, 1) * through_z + 2 * through_other).sum(0)
    torch.testing.assert_close(got[:2], wanted, rtol=0.0, atol=1e-12)


def test_scaled_gradients_can_be_differentiated_again():
    model, x = foreign("LogNormal")
    torch.manual_seed(7)
    particles = draw_particles(model, x, 1, 3, reparam=True)
    scale, (z,), weight = torch.rand(1, 3, 2, dtype=torch.float64), particles.output["z"], model.generative_model.weight
    log_px = densities_with_stopped_q(particles, scale).log_px
    first = torch.autograd.grad(log_px.sum(), z, create_graph=True)
    unscaled = torch.autograd.grad(particles.log_px.sum(), z, create_graph=True)
    got, wanted = (
        torch.autograd.grad(of_z.square().sum(), (weight, z), retain_graph=True)
        for of_z in (first[0], scale.reshape(-1, 1) * unscaled[0])
    )
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=0.0, atol=1e-12)


class Gate(torch.autograd.Function):
    """z and a parameter that has no part in the gradient."""

    @staticmethod
    def forward(z: Tensor, unused: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Gated(Foreign):
    def px(self, z: Tensor) -> D.Distribution:
        return D.Normal(self.generative_model(Gate.apply(z, self.prior_logits)), 1.0)


class Beside(Foreign):
    """p(x|z) sees the parameters of q beside z."""

    values: Tensor

    def forward(self, x: Tensor, reparam: bool = False, **kwargs) -> dict[str, Any]:
        self.values = x
        return super().forward(x, reparam)

    def px(self, z: Tensor) -> D.Distribution:
        return D.Normal(self.generative_model(z) + self.inference_network(self.values)[:, 1:], 1.0)


@pytest.mark.parametrize("is_functional", [False, True])
@pytest.mark.parametrize("kind", [Foreign, Beside, Gated])
def test_z_is_scaled_whatever_else_the_decoder_sees_and_under_torch_func(kind: type[Foreign], is_functional: bool):
    model, x = foreign("Normal", kind)
    if kind is Beside:
        model.values = x.expand(3, *x.shape).reshape(-1, 3)
    expected = foreign_gradients("dreg", model, x, 3, 0.0, 1.0)
    whole = Loss(model, get_estimator("dreg", iw=3))
    torch.manual_seed(7)
    if is_functional:
        parameters = {name: parameter.detach() for name, parameter in whole.named_parameters()}
        found = list(grad(lambda parameters: functional_call(whole, parameters, (x,)))(parameters).values())
    else:
        found = list(torch.autograd.grad(whole(x), list(model.parameters())))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


# --- Errors of published code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", IDS)
def test_a_learnt_scale_is_kept(id: str):
    """q rebuilt from logits alone, or from a location, was a unit Normal."""
    model, x = foreign("Normal")
    torch.manual_seed(7)
    particles = densities_with_stopped_q(draw_particles(model, x, 1, 3, reparam=True))
    (qz,), (z,) = particles.output["qz"], particles.output["z"]
    assert (qz.scale - 1).abs().min() > 1e-2
    expected = D.Normal(qz.loc, qz.scale).log_prob(z).sum(-1).view(1, 3, 2)
    torch.testing.assert_close(particles.log_qz[0], expected)


@pytest.mark.parametrize("id", IDS)
def test_a_discrete_q_is_refused_clearly(id: str):
    """It was a TypeError."""
    with pytest.raises(ValueError, match=f"^{id}: needs z to carry .* of SimpleModel has none: .* no rsample"):
        get_estimator(id, iw=2)(SimpleModel(4, 3), torch.ones(2, 4))


@pytest.mark.parametrize("id", IDS)
def test_lower_layers_are_reparameterised(id: str):
    """The gradient of z1's parameters runs through q(z2|z1) as well: with a p of z2 alone there is no other way."""
    eps = torch.randn(2, 1, 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class TopOnly(TwoLayers):
        def log_prob(self, x: Tensor, z: Sequence[Tensor], stop_phi: bool = False) -> LogDensities:
            whole = super().log_prob(x, z, stop_phi)
            return LogDensities(0 * whole.log_px, (0 * whole.log_pz[0], whole.log_pz[1]), (0 * z[0], 0 * z[1]))

    model = TopOnly(1, eps)
    get_estimator(id, iw=3, alpha=0.2)(model, rows(1))[0].backward()
    for parameter in (model.a, model.log_s1):
        assert parameter.grad is not None
        assert parameter.grad.abs() > 1e-3


@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_alpha_does_not_scale_the_gradient_of_theta(alpha: float):
    """dreg's was (1 - alpha) times what it should be."""
    eps = torch.randn(2, 1, 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dreg, pathwise = (
        estimates(id, TwoLayers(9, eps), 9, iw=3, alpha=alpha)[:, TwoLayers.NUM_PHI :]
        for id in ("dreg", "pathwise-iwae")
    )
    torch.testing.assert_close(dreg, pathwise, rtol=0.0, atol=1e-12)


# --- What is refused -------------------------------------------------------------------------------------------------


class TwoNormals(Foreign):
    def forward(self, x: Tensor, reparam: bool = False, **kwargs) -> dict[str, Any]:
        output = super().forward(x, reparam)
        return {**output, **{key: output[key] * 2 for key in ("z", "qz", "pz")}}


class NoDistributions(Foreign):
    def forward(self, x, reparam=False, sample_shape=(1, 1)):  # type: ignore[override]
        output = super().forward(x.expand(*sample_shape, *x.shape).reshape(-1, 3), reparam)
        log_q = output["qz"][0].log_prob(output["z"][0]).sum(-1).view(*sample_shape, len(x))
        return {"log_px": log_q, "log_pz": (log_q,), "log_qz": (log_q,), "z": output["z"]}


class Hidden(Foreign):
    """Its q keeps the parameters in a function."""

    def forward(self, x: Tensor, reparam: bool = False, **kwargs) -> dict[str, Any]:
        output = super().forward(x, reparam)
        (qz,) = output["qz"]

        class Closure(D.Distribution):
            batch_shape, event_shape = qz.batch_shape, qz.event_shape

            def __init__(self) -> None:
                pass

            def log_prob(self, value: Tensor) -> Tensor:
                return qz.log_prob(value)

        return {**output, "qz": [Closure()]}


class Forgetful(TwoLayers):
    def log_prob(self, x: Tensor, z: Sequence[Tensor], stop_phi: bool = False) -> LogDensities:
        return super().log_prob(x, z)


class Unstoppable(TwoLayers):
    def log_prob(self, x: Tensor, z: Sequence[Tensor]) -> LogDensities:  # type: ignore[override]
        return super().log_prob(x, z)


class Misshapen(TwoLayers):
    def log_prob(self, x: Tensor, z: Sequence[Tensor], stop_phi: bool = False) -> LogDensities:
        densities = super().log_prob(x, z, stop_phi)
        return densities._replace(log_px=densities.log_px.sum(1)) if stop_phi else densities


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TwoNormals(FAMILIES["Normal"]), "TwoNormals: only log_prob(x, z, stop_phi=False), which it lacks, tells q's"),
        (TwoNormals(FAMILIES["Normal"]), "in a model of 2 layers"),
        (NoDistributions(FAMILIES["Normal"]), "where forward returns no qz and no pz"),
        (Hidden(FAMILIES["Normal"]), "where Closure has other parameters than the tensors in it"),
        (Forgetful(2), "Forgetful: log_prob(x, z, stop_phi=True) has log q of more than z; detach q's parameters"),
        (Unstoppable(2), "log_prob(x, z, stop_phi=False), and its own takes no stop_phi, tells q's own parameters"),
        (Misshapen(2), "Misshapen: log_prob returned [1, 2], expected [1, 3, 2] of each"),
    ],
)
@pytest.mark.parametrize("id", IDS)
def test_what_cannot_be_stopped_is_refused_by_name(id: str, model: Template, message: str):
    x = torch.ones(2, 3) if isinstance(model, Foreign) else rows(2)
    with pytest.raises(ValueError, match=f"^{id}: {type(model).__name__}: ") as refusal:
        get_estimator(id, iw=3)(model, x)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


class Returned(Foreign):
    """p(x|z) is of another tensor than the z that is returned."""

    def forward(self, x: Tensor, reparam: bool = False, **kwargs) -> dict[str, Any]:
        output = super().forward(x, reparam)
        return {**output, "z": [output["z"][0].clone()]}


def test_a_z_that_the_decoder_did_not_read_is_refused_where_it_would_be_wrong():
    model, x = foreign("Normal", Returned)
    with pytest.raises(ValueError, match=r"^dreg: Returned: px does not depend on the z that forward returned"):
        get_estimator("dreg", iw=3)(model, x)
    expected = foreign_gradients("stl", model, x, 3, 0.0, 1.0)
    torch.manual_seed(7)
    get_estimator("stl", iw=3)(model, x)[0].backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-11)
