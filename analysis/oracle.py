"""The gradient that an estimator ought to have on average: exact where it can be, otherwise a reference.

Every objective has a side of theta, its gradient through log p(x|z) and log p(z), and one of phi, through q: an
estimator may name another objective for each. A parameter gets the sum of both sides, as a loss gives it.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import combinations, combinations_with_replacement, islice
from math import comb, inf, log, pi, prod
from operator import add
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal, OneHotCategorical
from torch.func import functional_call
from torch.nn import functional as F

from analysis.gradients import gradient_statistics, select_parameters
from analysis.statistics import Oracle
from errors import UserError
from estimators import get_estimator
from estimators.bounds.base import BoundEstimator, Objective
from estimators.bounds.weights import less_ratio
from models.gaussian_toy import GaussianToy
from models.particles import draw_particles
from models.template import LogDensities, Template
from seeding import derive_seed

__all__ = ["NoExactGradient", "Oracle", "Oracles", "oracle_gradient"]

# Beyond so many configurations x batch, of which the model's graph is kept, an expectation is not enumerated, nor
# beyond so many multisets of them x batch, which pass by in chunks: some seconds.
_CONFIGURATIONS, _MULTISETS = 2_000_000, 5_000_000
_CHUNK = 500_000  # numbers of the largest tensor on the way, multisets x their members x batch
_NODES = (12, 16, 24, 32, 48, 64)  # of a quadrature: more and more, compared with the rule before
_NODES_SUFFICE = 1e-5  # of the largest derivative: the difference at which no more are tried
_QUADRATURE_ERROR = 1e-4  # and the most at which the last rule is taken

# The particles of what is consistent only, at least and at most; between, as many as x of so many numbers allows.
_FEWEST_OF_MANY, _MANY_PARTICLES = 1_000, 10_000
_MANY_NUMBERS = 2**24
_METHODS = ("enumerated", "closed form", "quadrature", "reference")


def oracle_gradient(
    estimator: nn.Module,
    model: nn.Module,
    x: Tensor,
    parameters: str | Sequence[str] = "inference_network",
    seed: int = 0,
    num_reference: int = 1000,
) -> Oracle:
    """Return the gradient of the loss that the estimator's `objectives` stand for, mean over the batch, on x.

    It is flat, by the parameters that `select_parameters(model, parameters)` names; a frozen one has the gradient 0.
    alpha, beta and freebits are the estimator's. By the first method that applies to an objective:

    - "enumerated": z has few values (Categorical, OneHotCategorical or Bernoulli layers) and the model a `log_prob`.
      E[L_K^a] is a sum over the multisets of K configurations, up to 5,000,000 multisets x observations; the wake
      phase and the Riemann sum of `tvo` are sums over configurations.
    - "closed form": `GaussianToy` without freebits: the ELBO, the wake and the sleep phase, the Riemann sum of `tvo`.
    - "quadrature": E[L_K^a] of a one-dimensional Normal q whose model has a `log_prob`, without freebits: the same sum
      over multisets of 16 to 64 Gauss-Hermite nodes, until more change nothing.
    - "reference": the mean of `num_reference` gradients of an estimator of the same objective. It is unbiased for
      bounds (`dreg` or `pathwise-vae` where z is reparameterised, otherwise `ovis-gamma0` or `rloo`) and for the sleep
      phase. For the wake phase and `tvo` it is the estimator itself with 10,000 particles, consistent only, whose
      bias of order 1/10,000 its standard error does not show. Never with `num_reference=0`.

    The worst of the methods used is named. A reference tells sides apart by parameter: those that log q depends on get
    the gradient of phi's objective, the others that of theta's. Nothing is changed; the same seed gives the same.

    Raises NoExactGradient with `num_reference=0` where none of the exact methods applies, UserError for an estimator
    without objectives and as `select_parameters` does.
    """
    return Oracles(model, x, parameters, seed, num_reference).of(estimator)


class Oracles:
    """The oracles of several estimators on one model and x, as `oracle_gradient` gives them.

    What estimators have in common is computed once: an objective for the same alpha, beta, freebits and, of `tvo`,
    points and widths. The model must stand still meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        parameters: str | Sequence[str] = "inference_network",
        seed: int = 0,
        num_reference: int = 1000,
    ):
        self._names = select_parameters(model, parameters)
        self._model, self._x, self._seed, self._num_reference = model, x, seed, num_reference
        self._solved: dict[object, _Sides] = {}

    def of(self, estimator: nn.Module) -> Oracle:
        """Return the gradient of the loss that the estimator's `objectives` stand for."""
        if not isinstance(estimator, BoundEstimator):
            raise UserError(f"{type(estimator).__name__} has no objectives to compare with: expected a BoundEstimator")
        x = self._x
        problem = _Problem(estimator, self._model, x, self._names, self._seed, self._num_reference)
        of_theta, of_phi = estimator.objectives
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(derive_seed("oracle_gradient", self._seed))
            is_theta, is_phi = problem.sides()
            theta = self._solve(problem, of_theta) if is_theta.any() else None
            phi = self._solve(problem, of_phi) if is_phi.any() else None
        gradient = variance = torch.zeros(problem.num_parameters, dtype=torch.float64, device=x.device)
        if theta is not None:
            gradient, variance = gradient + theta.theta, variance + theta.theta_se.square()
        if phi is not None:
            gradient, variance = gradient + phi.phi, variance + phi.phi_se.square()
        methods = [sides.method for sides in (theta, phi) if sides is not None]
        method = max(methods, key=_METHODS.index, default="enumerated")
        return Oracle(-gradient, variance.sqrt(), method)

    def _solve(self, problem: "_Problem", objective: Objective) -> "_Sides":
        terms = _riemann(problem.estimator) if objective.kind == "thermodynamic" else ()
        key = (objective, problem.alpha, problem.beta, problem.freebits, *map(tuple, terms))
        if key not in self._solved:
            self._solved[key] = _solve(problem, objective)
        return self._solved[key]


class NoExactGradient(UserError):
    """Raised where only a reference would be to be had, and none is wanted."""


class _Sides(NamedTuple):
    """The gradient of an objective through p and through q, flat in float64, and the standard errors of both."""

    theta: Tensor
    phi: Tensor
    theta_se: Tensor
    phi_se: Tensor
    method: str

    @classmethod
    def exact(cls, theta: Tensor, phi: Tensor, method: str) -> "_Sides":
        return cls(theta, phi, torch.zeros_like(theta), torch.zeros_like(phi), method)


class _LogProb(nn.Module):
    """A model's `log_prob` as its forward, so that it can be a function of the parameters."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model

    def forward(self, x: Tensor, z: Sequence[Tensor]) -> LogDensities:
        return self.model.log_prob(x, z)


class _Forward(nn.Module):
    """The q(z|x) and the samples that a model returns, if any, as a function of the parameters."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Any, Any]:
        output = draw_particles(self.model, x, 1, 1).output
        return (output["qz"], output["z"]) if "qz" in output else ([], [])


class _Problem:
    """What is asked for, with the model as a function of its parameters in float64."""

    def __init__(
        self, estimator: BoundEstimator, model: nn.Module, x: Tensor, names: list[str], seed: int, num_reference: int
    ):
        self.estimator, self.model, self.x, self.names = estimator, model, x, names
        self.seed, self.num_reference = seed, num_reference
        self.alpha, self.beta, self.freebits = estimator.alpha, estimator.beta, estimator.freebits
        available = dict(model.named_parameters())
        self._free = [available[name].requires_grad for name in names]
        self._shapes = [available[name].shape for name in names]
        self.num_parameters = sum(shape.numel() for shape in self._shapes)
        self.leaves = {name: available[name].detach().double().requires_grad_() for name in names}
        others = {name: p.detach().double() for name, p in available.items() if name not in self.leaves}
        self._parameters = {f"model.{name}": p for name, p in (self.leaves | others).items()}
        self.points = x.double() if x.is_floating_point() else x

    def call(self, module: nn.Module, *arguments: Any) -> Any:
        """Call a wrapper of the model on its parameters in float64; buffers are copies."""
        buffers = {
            name: (b.double() if b.is_floating_point() else b).detach().clone() for name, b in module.named_buffers()
        }
        return functional_call(module, (self._parameters, buffers), arguments)

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of the model by its name, a leaf where its gradient is asked for."""
        return self._parameters[f"model.{name}"]

    def log_prob(self, z: Sequence[Tensor]) -> LogDensities:
        """Return the log-densities of configurations, each [V, batch], given one [1, V, batch, ...] a layer."""
        log_px, log_pz, log_qz = self.call(_LogProb(self.model), self.points, z)
        return LogDensities(log_px[0], tuple(layer[0] for layer in log_pz), tuple(layer[0] for layer in log_qz))

    def log_w(self, densities: LogDensities) -> Tensor:
        """Return log p(x|z) - beta sum_l max(log q_l - log p_l, freebits), as the estimators have it."""
        log_w = densities.log_px
        for log_p, log_q in zip(densities.log_pz, densities.log_qz, strict=True):
            log_ratio = log_q - log_p
            floored = log_ratio if self.freebits is None else log_ratio.clamp(min=self.freebits)
            log_w = less_ratio(log_w, floored, self.beta)
        return log_w

    def gradient(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None) -> Tensor:
        """Return the flat gradient of outputs by the parameters, 0 for frozen ones."""
        pairs = [(o, None if cotangents is None else cotangents[i]) for i, o in enumerate(outputs) if o.requires_grad]
        if not pairs:
            return torch.zeros(self.num_parameters, dtype=torch.float64, device=self.x.device)
        gradients = torch.autograd.grad(
            [output for output, _ in pairs],
            list(self.leaves.values()),
            None if cotangents is None else [cotangent for _, cotangent in pairs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return torch.cat(
            [(g if free else torch.zeros_like(g)).flatten() for g, free in zip(gradients, self._free, strict=True)]
        )

    def layers(self) -> list[tuple[Any, torch.Size, torch.dtype]]:
        """Return q(z|x) of each layer, and shape and dtype of its z for one observation."""
        output = self.call(_Forward(self.model), self.points)
        qz, z = (value if isinstance(value, list | tuple) else [value] for value in output)
        leading = 3 if "sample_shape" in inspect.signature(type(self.model).forward).parameters else 1
        found = []
        for distribution, layer in zip(qz, z, strict=True):
            while isinstance(distribution, Independent):
                distribution = distribution.base_dist
            found.append((distribution, layer.shape[leading:], layer.dtype))
        return found

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return which numbers log p and log q depend on, [parameters] each; a frozen one on neither."""
        particles = draw_particles(self.model, self.x, 1, 1)
        available = dict(self.model.named_parameters())
        parameters = [available[name] for name in self.names]

        def reaches(densities: Sequence[Tensor]) -> Tensor:
            # At random, so that nothing cancels; a gradient of zeros is that of a graph which is shared.
            total = reduce(add, [(torch.rand_like(density) * density).sum() for density in densities])
            answers = [False] * len(parameters)
            if total.requires_grad:
                free = [parameter for parameter in parameters if parameter.requires_grad]
                found = iter(torch.autograd.grad(total, free, None, True, materialize_grads=True, allow_unused=True))
                answers = [parameter.requires_grad and bool(next(found).any()) for parameter in parameters]
            pieces = [torch.full((p.numel(),), answer) for p, answer in zip(parameters, answers, strict=True)]
            return torch.cat(pieces).to(self.x.device)

        return reaches([particles.log_px, *particles.log_pz]), reaches(particles.log_qz)


def _solve(problem: _Problem, objective: Objective) -> _Sides:
    """Return the gradient of an objective by the first method that applies."""
    for method in (_enumerated, _closed_form, _quadrature):
        sides = method(problem, objective)
        if sides is not None:
            return sides
    if problem.num_reference == 0:
        model, estimator = type(problem.model).__name__, problem.estimator.id
        raise NoExactGradient(f"{estimator}: no exact gradient of its objective ({objective.kind}) on {model}")
    return _reference(problem, objective)


# --- Sums over configurations -----------------------------------------------------------------------------------------


def _enumerated(problem: _Problem, objective: Objective) -> _Sides | None:
    """Sum over all values of z; each side is the derivative by the log-densities of p, or of q."""
    if objective.kind == "sleep" or not _has_log_prob(problem.model):
        return None
    layers = _supports(problem)
    if layers is None:
        return None
    batch, num_values = len(problem.x), prod(len(layer) for layer in layers)
    num_multisets = comb(num_values + objective.num_particles - 1, objective.num_particles)
    too_many = objective.kind == "bound" and num_multisets * batch > _MULTISETS
    if too_many or num_values * batch > _CONFIGURATIONS:
        return None
    index = torch.cartesian_prod(*(torch.arange(len(layer)) for layer in layers)).view(num_values, -1)
    z = [
        layer[index[:, i]].unsqueeze(1).expand(-1, batch, *layer.shape[1:]).unsqueeze(0).to(problem.x.device)
        for i, layer in enumerate(layers)
    ]
    densities = problem.log_prob(z)
    constants = LogDensities(*_detached(densities))
    log_w, log_q = problem.log_w(constants), reduce(add, constants.log_qz)
    on_log_w, on_log_q = _derivatives(problem, objective, log_w.detach(), log_q.detach())
    px, pz, qz = densities.log_px, densities.log_pz, densities.log_qz
    inputs = [constants.log_px, *constants.log_pz, *constants.log_qz]
    by_density = torch.autograd.grad(
        [log_w, log_q], inputs, [on_log_w, on_log_q], materialize_grads=True, allow_unused=True
    )
    num_of_p = 1 + len(pz)
    theta = problem.gradient([px, *pz], by_density[:num_of_p])
    return _Sides.exact(theta, problem.gradient(qz, by_density[num_of_p:]), "enumerated")


def _detached(densities: LogDensities) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    def leaf(density: Tensor) -> Tensor:
        return density.detach().requires_grad_()

    return leaf(densities.log_px), tuple(map(leaf, densities.log_pz)), tuple(map(leaf, densities.log_qz))


def _derivatives(problem: _Problem, objective: Objective, log_w: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives of an objective, mean over the batch, by the log w and log q of all z, [V, batch]."""
    if objective.kind == "bound":
        return _bound_derivatives(log_w, log_q, objective.num_particles, problem.alpha)
    log_w.requires_grad_()
    log_q.requires_grad_()
    if objective.kind == "wake":
        posterior = (log_q + (1 - problem.alpha) * log_w).softmax(0).detach()
        value = (posterior * log_q).sum(0).mean()
    else:
        points, widths = _riemann(problem.estimator)
        terms = [((log_q + t * log_w).softmax(0) * log_w).sum(0).mean() for t in points]
        value = reduce(add, [width * term for width, term in zip(widths, terms, strict=True)])
    by_w, by_q = torch.autograd.grad(value, [log_w, log_q], materialize_grads=True, allow_unused=True)
    return by_w, by_q


def _bound_derivatives(log_w: Tensor, log_p: Tensor, num_particles: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the derivatives of E[L_K^a], mean over the batch, by log w and the log-probabilities of V values.

    Each is [V, batch]. K independent values are n_v times value v with the multinomial probability P = K! prod_v
    p_v^n_v / n_v!, and their bound is L = (logsumexp_v (log n_v + (1 - a) log w_v) - log K) / (1 - a). The derivatives
    of the sum of P L over n are the sums of P n_v w_v^(1-a) / sum_u n_u w_u^(1-a) and of P L n_v.
    """
    (num_values, batch), heat = log_w.shape, 1 - alpha
    tempered, log_p = heat * log_w.detach(), log_p.detach().clamp(min=-1e30)  # 0 times -inf would be nan
    on_log_w, on_log_p = torch.zeros_like(tempered), torch.zeros_like(tempered)
    chunk = max(_CHUNK // (min(num_values, num_particles) * batch + num_values), 1)
    for counts, members, times in _multisets(num_values, num_particles, chunk):
        counts, members, times = counts.to(log_w), members.to(log_w.device), times.to(log_w)
        ways = torch.lgamma(counts.sum(1) + 1) - torch.lgamma(counts + 1).sum(1)
        probability = (ways.unsqueeze(1) + counts @ log_p).exp()
        terms = times.log().unsqueeze(-1) + tempered[members]  # [multisets, members, batch]
        total = torch.logsumexp(terms, 1)
        on_log_p += counts.T @ (probability * (total - log(num_particles)) / heat)
        shares = probability.unsqueeze(1) * (terms - total.unsqueeze(1)).exp()
        for i in range(members.shape[1]):
            on_log_w += F.one_hot(members[:, i], num_values).to(log_w).T @ shares[:, i]
    return on_log_w / batch, on_log_p / batch


def _multisets(num_values: int, size: int, chunk: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Iterate over all multisets of `size` out of `num_values`, at most `chunk` at once.

    Each is given by its counts of all values, and as members with how many times each counts: one by one, or all values
    where these are no more than `size`.
    """
    one_by_one = size < num_values
    bars = combinations(range(size + num_values - 1), num_values - 1)  # between one value's and the next value's
    drawn = combinations_with_replacement(range(num_values), size) if one_by_one else bars
    width = size if one_by_one else num_values - 1
    while rows := list(islice(drawn, chunk)):
        index = torch.from_numpy(np.array(rows, dtype=np.int64).reshape(len(rows), width))
        if one_by_one:
            ones = torch.ones_like(index)
            yield torch.zeros(len(rows), num_values, dtype=torch.int64).scatter_add_(1, index, ones), index, ones
        else:
            ends = torch.full((len(rows), 1), -1), torch.full((len(rows), 1), size + num_values - 1)
            counts = torch.cat([ends[0], index, ends[1]], 1).diff() - 1
            yield counts, torch.arange(num_values).expand_as(counts), counts


def _has_log_prob(model: nn.Module) -> bool:
    kind = type(model)
    return hasattr(kind, "log_prob") and getattr(kind, "log_prob", None) is not Template.log_prob


def _supports(problem: _Problem) -> list[Tensor] | None:
    """Return all values of each layer of z, [V_l, ...], None where they are not finitely many or far too many."""
    supports: list[Tensor] = []
    for distribution, shape, dtype in problem.layers():
        if isinstance(distribution, OneHotCategorical):
            values, num_variables = torch.eye(shape[-1], dtype=torch.float64), prod(shape[:-1])
        elif isinstance(distribution, Bernoulli | Categorical):
            num_values = 2 if isinstance(distribution, Bernoulli) else distribution.logits.shape[-1]
            values, num_variables = torch.arange(num_values, dtype=dtype), prod(shape)
        else:
            return None
        if len(values) ** num_variables > _CONFIGURATIONS:
            return None
        index = torch.cartesian_prod(*[torch.arange(len(values))] * num_variables).view(-1, num_variables)
        supports.append(values[index].view(-1, *shape))
    return supports or None


def _riemann(estimator: nn.Module) -> tuple[list[float], list[float]]:
    """Return the points t of the terms of the estimator's sum and the width that each stands for."""
    return estimator.get_buffer("points").tolist(), estimator.get_buffer("widths").tolist()


# --- The Gaussian toy -------------------------------------------------------------------------------------------------


def _closed_form(problem: _Problem, objective: Objective) -> _Sides | None:
    """Return the gradient of an expectation under Gaussians."""
    is_elbo = objective == Objective("bound", 1)
    if not isinstance(problem.model, GaussianToy) or problem.freebits is not None:
        return None
    if objective.kind == "bound" and not is_elbo:
        return None
    A, b, mu = (problem.parameter(name) for name in ("A", "b", "mu"))
    toy = _Toy(problem.points, problem.model.std, problem.beta)
    if is_elbo:
        terms = [(0.0, 1.0)]
    elif objective.kind == "thermodynamic":
        terms = list(zip(*_riemann(problem.estimator), strict=True))
    else:
        terms = [(1 - problem.alpha, 1.0)]

    def value(A: Tensor, b: Tensor, mu: Tensor) -> Tensor:
        if objective.kind == "sleep":
            return toy.sleep(A, b, mu.detach())
        if objective.kind == "wake":
            return toy.wake(A, b, mu.detach(), terms[0][0])
        return reduce(add, [width * toy.log_w(A, b, mu, t) for t, width in terms])

    if objective.kind != "sleep" and any(toy.precision(t) <= 0 for t, _ in terms):
        return None  # no such density
    theta = problem.gradient([value(A.detach(), b.detach(), mu)])
    return _Sides.exact(theta, problem.gradient([value(A, b, mu.detach())]), "closed form")


class _Toy(NamedTuple):
    """Expectations on the Gaussian toy, each the mean over x [batch, D].

    pi_t, proportional to q w^t with log w = log p(x|z) + beta (log p(z) - log q(z|x)), is N(mean, I / precision) with
    precision = (1 - t beta) / s^2 + t (1 + beta); mean x precision = (1 - t beta)(A x + b) / s^2 + t (x + beta mu).
    """

    x: Tensor
    std: float
    beta: float

    def precision(self, t: float) -> float:
        return (1 - t * self.beta) / self.std**2 + t * (1 + self.beta)

    def mean(self, A: Tensor, b: Tensor, mu: Tensor, t: float) -> Tensor:
        of_q = (1 - t * self.beta) / self.std**2 * F.linear(self.x, A, b)
        return (of_q + t * (self.x + self.beta * mu)) / self.precision(t)

    def log_w(self, A: Tensor, b: Tensor, mu: Tensor, t: float) -> Tensor:
        """E_{pi_t}[log w]."""
        mean, variance = self.mean(A, b, mu, t), 1 / self.precision(t)
        log_q = _log_normal(mean, variance, F.linear(self.x, A, b), self.std)
        log_p = _log_normal(mean, variance, mu, 1.0)
        return (_log_normal(mean, variance, self.x, 1.0) + self.beta * (log_p - log_q)).mean()

    def wake(self, A: Tensor, b: Tensor, mu: Tensor, t: float) -> Tensor:
        """E_{pi_t}[log q(z|x)] under a pi_t that is held fixed; pi_1 is p(z|x) at beta = 1."""
        mean = self.mean(A, b, mu, t).detach()
        return _log_normal(mean, 1 / self.precision(t), F.linear(self.x, A, b), self.std).mean()

    def sleep(self, A: Tensor, b: Tensor, mu: Tensor) -> Tensor:
        """E_{p(z, x)}[log q(z|x)]: z - A x - b is Gaussian of covariance (I - A)(I - A)^T + A A^T."""
        identity = torch.eye(len(b), dtype=b.dtype, device=b.device)
        variance = (identity - A).square().sum() + A.square().sum()
        distance = (mu - F.linear(mu, A, b)).square().sum() + variance
        return -0.5 / self.std**2 * distance - len(b) * _log_scale(self.std)


def _log_normal(mean: Tensor, variance: float, centre: Tensor, std: float) -> Tensor:
    """Return E[log N(z; centre, std^2 I)] for z ~ N(mean, variance I), [batch]."""
    dim = mean.shape[-1]
    return -0.5 / std**2 * ((mean - centre).square().sum(-1) + dim * variance) - dim * _log_scale(std)


def _log_scale(std: float) -> float:
    return log(std) + 0.5 * log(2 * pi)


def _quadrature(problem: _Problem, objective: Objective) -> _Sides | None:
    """Sum over the nodes of a Gauss-Hermite rule, z = loc + scale node, as if they were all values of z."""
    if objective.kind != "bound" or problem.freebits is not None or not _has_log_prob(problem.model):
        return None
    layers = problem.layers()
    if len(layers) != 1 or not isinstance(layers[0][0], Normal) or layers[0][1].numel() != 1:
        return None
    size, error, fine = objective.num_particles, inf, None
    for num_nodes in _NODES:
        if comb(num_nodes + size - 1, size) * len(problem.x) > _MULTISETS:
            break
        coarse, fine = fine, _by_nodes(problem, objective, num_nodes)
        if coarse is not None:
            error = max((a - b).abs().max().item() for a, b in zip(fine, coarse, strict=True))
            error /= max(side.abs().max().item() for side in fine) or 1.0
        if error <= _NODES_SUFFICE:
            break
    if fine is None or not error <= _QUADRATURE_ERROR:
        return None  # the integrand is too rough for so few nodes
    return _Sides.exact(*fine, "quadrature")


def _by_nodes(problem: _Problem, objective: Objective, num_nodes: int) -> tuple[Tensor, Tensor]:
    (distribution, shape, _), batch = problem.layers()[0], len(problem.x)
    nodes, weights = (torch.from_numpy(values).to(problem.x.device) for values in hermegauss(num_nodes))
    loc, scale = (value.reshape(-1).expand(batch) for value in (distribution.loc, distribution.scale))
    z = (loc + scale * nodes.unsqueeze(1)).view(1, num_nodes, batch, *shape)
    densities = problem.log_prob([z])
    log_w = problem.log_w(densities)
    log_weights = (weights / weights.sum()).log().unsqueeze(1).expand(-1, batch)
    on_log_w, _ = _bound_derivatives(log_w, log_weights, objective.num_particles, problem.alpha)
    fixed = problem.log_prob([z.detach()])
    constant_q = fixed._replace(log_qz=tuple(log_q.detach() for log_q in fixed.log_qz))
    theta = problem.gradient([problem.log_w(constant_q)], [on_log_w])
    return theta, problem.gradient([log_w], [on_log_w]) - theta


# --- References -------------------------------------------------------------------------------------------------------


def _reference(problem: _Problem, objective: Objective) -> _Sides:
    """Return the mean gradient of an estimator of the objective; a parameter of q is on phi's side alone."""
    many = max(min(_MANY_PARTICLES, _MANY_NUMBERS // problem.x.numel()), _FEWEST_OF_MANY)
    num_replicates = problem.num_reference
    if objective.kind == "bound":
        estimator = _of_bound(problem, objective.num_particles)
    elif objective.kind == "sleep":
        estimator = get_estimator("wake-sleep", iw=1)
    else:
        estimator = copy.deepcopy(problem.estimator)
        estimator.num_mc, estimator.num_particles = 1, many
        num_replicates = max(num_replicates // 10, 2)
    seed = derive_seed("oracle_gradient", problem.seed, *objective)
    statistics = gradient_statistics(estimator, problem.model, problem.x, num_replicates, problem.names, seed)
    is_phi = problem.sides()[1].double()
    gradient, se = -statistics.mean.double(), statistics.mean_se.double()
    return _Sides(gradient * (1 - is_phi), gradient * is_phi, se * (1 - is_phi), se * is_phi, "reference")


def _of_bound(problem: _Problem, num_particles: int) -> BoundEstimator:
    """Return the unbiased estimator of least variance that takes the model and the settings."""
    alpha = 0.0 if num_particles == 1 else problem.alpha  # L_1^a is log w for every alpha
    several = [("dreg", num_particles), ("pathwise-iwae", num_particles), ("ovis-gamma0", num_particles)]
    of_elbo = [("pathwise-vae", 16), ("rloo", 16), ("ovis-S16-exclusive", 1)]
    for id, iw in of_elbo if num_particles == 1 else several:
        try:
            estimator = get_estimator(id, 1, iw, alpha, problem.beta, problem.freebits)
            estimator(problem.model, problem.x)
        except ValueError:  # it needs another z, or has no form for the settings
            continue
        return estimator
    raise UserError(f"no unbiased estimator of {problem.estimator.id}'s bound takes {type(problem.model).__name__}")
