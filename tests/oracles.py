"""Slow, obvious references: models small enough to enumerate, and every formula written out particle by particle.

A model of discrete z has V configurations. Its parameters carry a leading axis of copies, one for each row of the
batch, so that one backward pass gives the gradient of every row on its own; z is not drawn but assigned.
"""

from collections.abc import Sequence
from itertools import pairwise, product
from math import exp, inf, log
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from estimators.bounds.base import BoundEstimator
from models.template import Template


class Settings(NamedTuple):
    alpha: float = 0.0
    beta: float = 1.0
    freebits: float | None = None


class Tables(NamedTuple):
    """The log-densities of all configurations: [copies, V], those of z in a tuple over layers."""

    log_px: Tensor
    log_pz: tuple[Tensor, ...]
    log_qz: tuple[Tensor, ...]


class EnumerableModel(Template):
    """phi [copies, .] and theta [copies, .] in float64; forward gives the particles that `assign` has put there."""

    num_configurations: int
    start_phi: Sequence[float]
    start_theta: Sequence[float]

    def __init__(self, num_copies: int = 1):
        super().__init__()
        self.phi = nn.Parameter(torch.tensor([self.start_phi], dtype=torch.float64).repeat(num_copies, 1))
        self.theta = nn.Parameter(torch.tensor([self.start_theta], dtype=torch.float64).repeat(num_copies, 1))
        self.register_buffer("assignment", torch.empty(0, dtype=torch.int64))

    def tables(self) -> Tables:
        raise NotImplementedError

    def assign(self, assignment: Tensor) -> "EnumerableModel":
        """Let z be `assignment` [mc, iw, batch] in the next forward passes."""
        self.assignment = assignment
        return self

    def forward(self, x, reparam=False, sample_shape=(1, 1), **kwargs):
        assert self.assignment.shape == (*sample_shape, len(x))
        tables = self.tables()

        def look_up(table: Tensor) -> Tensor:
            index = self.assignment.flatten(0, 1).T
            return table.expand(len(x), -1).gather(1, index).T.view(*sample_shape, len(x))

        return {
            "log_px": look_up(tables.log_px),
            "log_pz": tuple(map(look_up, tables.log_pz)),
            "log_qz": tuple(map(look_up, tables.log_qz)),
            "z": [self.assignment for _ in tables.log_qz],
        }


class ThreeWay(EnumerableModel):
    """One categorical z of three values; theta: the logits of its prior and log p(x|z)."""

    num_configurations = 3
    start_phi = (0.3, -0.5, 0.9)
    start_theta = (-0.4, 0.8, 0.1, -1.2, -0.1, -2.3)

    def tables(self) -> Tables:
        prior, log_px = self.theta.chunk(2, dim=-1)
        return Tables(log_px, (prior.log_softmax(-1),), (self.phi.log_softmax(-1),))


class TwoBits(EnumerableModel):
    """One layer of two Bernoulli bits, of unequal weight; theta: the logits of their prior, then log p(x|z)."""

    num_configurations = 4
    start_phi = (0.4, -0.7)
    start_theta = (-0.5, 0.6, -1.1, 0.9, -1.7)

    def tables(self) -> Tables:
        prior, (c, first, second) = self.theta[:, :2], self.theta[:, 2:].unbind(-1)
        bits = list(product((0, 1), repeat=2))
        log_px = torch.stack([c + first * b1 + second * b2 - 0.3 * c * b1 * b2 for b1, b2 in bits], -1)
        log_pz = torch.stack([(logsigmoid(prior * _sign(b))).sum(-1) for b in bits], -1)
        log_qz = torch.stack([(logsigmoid(self.phi * _sign(b))).sum(-1) for b in bits], -1)
        return Tables(log_px, (log_pz,), (log_qz,))


class Hierarchy(EnumerableModel):
    """Two layers of one bit: z_1, then z_2 given z_1, in p and in q."""

    num_configurations = 4
    start_phi = (0.6, -0.3, 1.1)
    start_theta = (-0.4, 0.7, -0.9, -1.3, 1.2)

    def tables(self) -> Tables:
        c, slope = self.theta[:, 3:].unbind(-1)
        bits = list(product((0, 1), repeat=2))
        return Tables(
            torch.stack([c + slope * b2 - 0.4 * b1 for b1, b2 in bits], -1),
            _two_layers(self.theta[:, :3], bits),
            _two_layers(self.phi, bits),
        )


MODELS = (ThreeWay, TwoBits, Hierarchy)


def _sign(bits: Sequence[int]) -> Tensor:
    return 2.0 * torch.tensor(bits, dtype=torch.float64) - 1.0


def _two_layers(logits: Tensor, bits: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    first = torch.stack([logsigmoid(logits[:, 0] * (2 * b1 - 1)) for b1, _ in bits], -1)
    second = torch.stack([logsigmoid(logits[:, 1 + b1] * (2 * b2 - 1)) for b1, b2 in bits], -1)
    return first, second


class Enumerated(NamedTuple):
    """An estimator's output for every assignment of its particles."""

    assignments: Tensor  # [mc, drawn, assignments]
    probabilities: Tensor  # [assignments]
    estimates: Tensor  # of the bound's gradient by phi and theta: [assignments, parameters]
    loss: Tensor  # the mean over all assignments, as if each were as likely


def enumerate_estimates(estimator: BoundEstimator, kind: type[EnumerableModel]) -> Enumerated:
    """Call the estimator once, with a row of the batch for every way in which its particles can come out."""
    shape = (estimator.num_mc, estimator.num_particles + estimator.num_extra)
    values = torch.arange(kind.num_configurations)
    assignments = torch.cartesian_prod(*[values] * (shape[0] * shape[1])).view(-1, *shape).permute(1, 2, 0)
    return estimates_of(estimator, kind, assignments)


def estimates_of(estimator: BoundEstimator, kind: type[EnumerableModel], assignments: Tensor) -> Enumerated:
    """Call the estimator on given assignments [mc, drawn, batch]."""
    num_rows = assignments.shape[-1]
    model = kind(num_rows).assign(assignments)
    log_q = torch.stack(kind().tables().log_qz).sum(0).detach()[0]
    probabilities = log_q[assignments].sum((0, 1)).exp()
    loss, _, _ = estimator(model, torch.zeros(num_rows, 1, dtype=torch.float64))
    loss.backward()
    assert model.phi.grad is not None
    assert model.theta.grad is not None
    estimates = -num_rows * torch.cat([model.phi.grad, model.theta.grad], -1)
    return Enumerated(assignments, probabilities, estimates, loss.detach())


# --- Exact expectations ----------------------------------------------------------------------------------------------


class Values(NamedTuple):
    """The numbers of every configuration z: with graph, [V]; those of a layer in a list."""

    log_w: Tensor
    log_q: Tensor
    log_q_layers: list[Tensor]
    unclamped: list[Tensor]


def values(model: EnumerableModel, settings: Settings) -> Values:
    """log w = log p(x|z) - beta sum_l max(log q_l - log p_l, freebits)."""
    log_px, log_pz, log_qz = model.tables()
    log_w, unclamped = log_px[0], []
    for log_p, log_q in zip(log_pz, log_qz, strict=True):
        log_ratio = log_q[0] - log_p[0]
        floor = -inf if settings.freebits is None else settings.freebits
        unclamped.append(log_ratio > floor)
        log_w = log_w - settings.beta * torch.where(unclamped[-1], log_ratio, floor)
    layers = [log_q[0] for log_q in log_qz]
    return Values(log_w, torch.stack(layers).sum(0), layers, unclamped)


def renyi_bound(log_w: Tensor, alpha: float) -> Tensor:
    """log mean w^{1-a} / (1 - a)."""
    return ((1 - alpha) * log_w).exp().mean().log() / (1 - alpha)


def gradient(scalar: Tensor, model: EnumerableModel) -> Tensor:
    """By phi, then theta: [parameters]."""
    gradients = torch.autograd.grad(scalar, [model.phi, model.theta], materialize_grads=True, retain_graph=True)
    return torch.cat(gradients, -1)[0]


def expected_bound(model: EnumerableModel, num_particles: int, settings: Settings) -> Tensor:
    """E[L_K^a] over every outcome of K particles, with graph."""
    log_w, log_q = values(model, settings)[:2]
    total = torch.zeros((), dtype=torch.float64)
    for particles in product(range(model.num_configurations), repeat=num_particles):
        z = list(particles)
        total = total + log_q[z].sum().exp() * renyi_bound(log_w[z], settings.alpha)
    return total


def expected_weighted_score(model: EnumerableModel, num_particles: int, settings: Settings) -> Tensor:
    """E[sum_k v_k grad log q(z_k)], [parameters]."""
    log_w, log_q = values(model, settings)[:2]
    surrogate = torch.zeros((), dtype=torch.float64)
    for particles in product(range(model.num_configurations), repeat=num_particles):
        z = list(particles)
        v = ((1 - settings.alpha) * log_w[z]).softmax(0)
        surrogate = surrogate + log_q[z].sum().exp().detach() * (v.detach() * log_q[z]).sum()
    return gradient(surrogate, model)


class RiemannTerms(NamedTuple):
    """The terms of a Riemann sum over [0, 1]: at which t, and how wide."""

    points: list[float]
    widths: list[float]


def riemann_terms(ends: Sequence[float], rule: str = "left") -> RiemannTerms:
    """One term at the left or the right end of each interval, or half of one at both."""
    terms = []
    for left, right in pairwise(ends):
        width = right - left
        terms += {"left": [(left, width)], "right": [(right, width)]}.get(rule, [(left, width / 2), (right, width / 2)])
    return RiemannTerms([point for point, _ in terms], [width for _, width in terms])


def expected_thermodynamic_gradient(
    model: EnumerableModel, num_particles: int, settings: Settings, terms: RiemannTerms
) -> Tensor:
    """E of Masrani et al.'s estimator: sum_t width_t (E_v[grad f] + K/(K-1) Cov_v[grad log pi_t, f]), f = log w."""
    log_w, log_q = values(model, settings)[:2]
    grad_f = torch.stack([gradient(log_w[z], model) for z in range(model.num_configurations)])
    score = torch.stack([gradient(log_q[z], model) for z in range(model.num_configurations)])
    log_w, log_q = log_w.detach(), log_q.detach()
    total = torch.zeros_like(grad_f[0])
    for particles in product(range(model.num_configurations), repeat=num_particles):
        z = list(particles)
        for t, width in zip(*terms, strict=True):
            v = (t * log_w[z]).softmax(0)
            grad_log_pi = score[z] + t * grad_f[z]
            covariance = v @ (grad_log_pi * log_w[z, None]) - (v @ grad_log_pi) * (v @ log_w[z])
            term = v @ grad_f[z] + num_particles / (num_particles - 1) * covariance
            total = total + log_q[z].sum().exp() * width * term
    return total


def thermodynamic_integral(model: EnumerableModel, settings: Settings, terms: RiemannTerms) -> Tensor:
    """The Riemann sum of E_{pi_t}[log w] under the exact pi_t, with graph: what K -> inf tends to."""
    log_w, log_q = values(model, settings)[:2]
    total = torch.zeros((), dtype=torch.float64)
    for t, width in zip(*terms, strict=True):
        total = total + width * (log_q + t * log_w).softmax(0) @ log_w
    return total


# --- Single draws, particle by particle ------------------------------------------------------------------------------


class Configurations(NamedTuple):
    """The numbers of every configuration and their gradients, [V, parameters]; those of a layer in a list."""

    log_w: list[float]
    grad_theta: Tensor
    unclamped: list[list[bool]]
    scores: list[Tensor]


def configurations(model: EnumerableModel, settings: Settings) -> Configurations:
    numbers, num_phi = values(model, settings), model.phi.shape[-1]
    grad_theta = torch.stack([gradient(log_w, model) for log_w in numbers.log_w])
    grad_theta[:, :num_phi] = 0.0
    return Configurations(
        numbers.log_w.tolist(),
        grad_theta,
        [unclamped.tolist() for unclamped in numbers.unclamped],
        [torch.stack([gradient(log_q, model) for log_q in layer]) for layer in numbers.log_q_layers],
    )


def score_function_estimate(
    of: Configurations, z: Sequence[int], settings: Settings, control_variate: "ControlVariate"
) -> Tensor:
    """grad_theta L^a + sum_{k,l} (d_{k,l} - c_{k,l}) h_{k,l} of the particles z, [parameters].

    `control_variate(log_w, k, unclamped)` is c_{k,l} for the log-weights of all particles; `unclamped` tells of each
    configuration whether layer l counts.
    """
    log_w = [of.log_w[i] for i in z]
    v, bound = softmax(log_w, settings.alpha), renyi(log_w, settings.alpha)
    total = torch.zeros_like(of.grad_theta[0])
    for k, i in enumerate(z):
        total += v[k] * of.grad_theta[i]
        for scores, unclamped in zip(of.scores, of.unclamped, strict=True):
            signal = bound - settings.beta * unclamped[i] * v[k]
            total += (signal - control_variate(log_w, k, unclamped)) * scores[i]
    return total


class ControlVariate:
    """c_{k,l}, each formula as its paper prints it, with what alpha and beta make of it."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def __call__(self, log_w: list[float], k: int, unclamped: list[bool]) -> float:
        raise NotImplementedError


class NoControlVariate(ControlVariate):
    def __call__(self, log_w, k, unclamped):
        return 0.0


class VimcoArithmetic(ControlVariate):
    def __call__(self, log_w, k, unclamped):
        heat = 1 - self.settings.alpha
        others = [exp(heat * log_w[j]) for j in range(len(log_w)) if j != k]
        return log((sum(others) + sum(others) / len(others)) / len(log_w)) / heat


class VimcoGeometric(ControlVariate):
    def __call__(self, log_w, k, unclamped):
        heat = 1 - self.settings.alpha
        others = [heat * log_w[j] for j in range(len(log_w)) if j != k]
        return log((sum(map(exp, others)) + exp(sum(others) / len(others))) / len(log_w)) / heat


class OvisGamma(ControlVariate):
    def __init__(self, settings: Settings, gamma: float):
        super().__init__(settings)
        self.gamma = gamma

    def __call__(self, log_w, k, unclamped):
        alpha, beta, _ = self.settings
        v = softmax(log_w, alpha)[k]
        log_ratio = log(1 - v) - self.gamma * log(1 - 1 / len(log_w))
        return renyi(log_w, alpha) + log_ratio / (1 - alpha) - self.gamma * beta * v


class OvisVimco(ControlVariate):
    def __init__(self, vimco: ControlVariate, gamma: float):
        super().__init__(vimco.settings)
        self.vimco = vimco
        self.gamma = gamma

    def __call__(self, log_w, k, unclamped):
        alpha, beta, _ = self.settings
        constant = (1 - self.gamma) * log(1 - 1 / len(log_w)) / (1 - alpha)
        return self.vimco(log_w, k, unclamped) - self.gamma * beta * softmax(log_w, alpha)[k] + constant


class Constant(ControlVariate):
    """A baseline: a number that knows nothing of the particles."""

    def __init__(self, settings: Settings, value: float):
        super().__init__(settings)
        self.value = value

    def __call__(self, log_w, k, unclamped):
        return self.value


def leave_one_out_elbo_estimate(of: "Configurations", z: Sequence[int]) -> Tensor:
    """1/K sum_k (grad_theta log w_k + (log w_k - mean_{j != k} log w_j) h_k) of the particles z, [parameters]."""
    num_particles, scores = len(z), torch.stack(of.scores).sum(0)
    total = torch.zeros_like(of.grad_theta[0])
    for k, i in enumerate(z):
        others = [of.log_w[j] for at, j in enumerate(z) if at != k]
        total += (of.grad_theta[i] + (of.log_w[i] - sum(others) / len(others)) * scores[i]) / num_particles
    return total


class OvisMonteCarlo(ControlVariate):
    """The mean learning signal of auxiliary configurations put in the place of particle k."""

    def __init__(self, settings: Settings, auxiliary: Sequence[int], log_w_of: list[float]):
        super().__init__(settings)
        self.auxiliary = auxiliary
        self.log_w_of = log_w_of

    def __call__(self, log_w, k, unclamped):
        alpha, beta, _ = self.settings
        signals = []
        for i in self.auxiliary:
            replaced = [*log_w[:k], self.log_w_of[i], *log_w[k + 1 :]]
            signals.append(renyi(replaced, alpha) - beta * unclamped[i] * softmax(replaced, alpha)[k])
        return sum(signals) / len(signals)


def renyi(log_w: Sequence[float], alpha: float) -> float:
    """L^a of a few log-weights of moderate size."""
    return log(sum(exp((1 - alpha) * value) for value in log_w) / len(log_w)) / (1 - alpha)


def softmax(log_w: Sequence[float], alpha: float) -> list[float]:
    """v_k of a few log-weights of moderate size."""
    w = [exp((1 - alpha) * value) for value in log_w]
    return [value / sum(w) for value in w]
