"""Rows of the proof by enumeration: control variates that are relaxed, learnt, local or expanded, and their draws."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, OneHotCategorical

from estimators.nodes.arms import ARMS
from estimators.nodes.base import Method, base_of, logits_of
from estimators.nodes.bit_flip import BitFlip1
from estimators.nodes.double_cv import DoubleCV
from estimators.nodes.gumbel_rao import GumbelRao
from estimators.nodes.local_expectation import LocalExpectation
from estimators.nodes.muprop import MuProp
from estimators.nodes.rebar import REBAR
from estimators.nodes.reinmax import ReinMax
from estimators.nodes.relax import LAX, RELAX
from estimators.nodes.rodeo import RODEO
from tests.estimators.nodes.draws import (
    Rule,
    gumbel_nodes,
    legendre,
    normals,
    product,
    relaxations,
    uniform_nodes,
    values,
)
from tests.estimators.nodes.frame import BERNOULLI, CATEGORICAL, ONE_HOT, Costs, Node, Row, first_order, squashed


def crossed(first: Tensor, second: Tensor, weight: Tensor, other: Tensor, at: int, other_at: int) -> tuple:
    """All pairs of two rules' outcomes, which lie along `at` of the first and `other_at` of the second."""
    r, s = len(weight), len(other)
    first, second = first.repeat_interleave(s, at), torch.cat([second] * r, other_at)
    return first, second, weight.repeat_interleave(s, 0) * torch.cat([other] * r)


def relaxed_twice(num_nodes: int) -> Rule:
    """The uniform noise u of one Bernoulli variable, and v beside it."""

    def rule(distribution: Distribution, num_plates: int, n: int) -> tuple[object, Tensor]:
        u, weight = uniform_nodes(distribution, num_nodes)
        v, v_weight = legendre(num_nodes)
        ones = (1,) * (u.dim() - 1)
        v, v_weight = (each.reshape(-1, *ones).expand(-1, *u.shape[1:]) for each in (v, v_weight))
        u, v, weight = crossed(u, v, weight, v_weight, 0, 0)
        assert n == 1
        assert weight.dim() == 1 + num_plates
        return (u.unsqueeze(0), v.unsqueeze(0)), weight

    return rule


def given_the_sample(num_nodes: int) -> Rule:
    """Every value of one variable, and the uniform noise that relaxes it, up to a common factor of its exponentials."""

    def rule(distribution: Distribution, num_plates: int, n: int) -> tuple[object, Tensor]:
        b, weight = values(distribution, num_plates, n)
        if isinstance(base_of(distribution), Bernoulli):
            v, v_weight = legendre(num_nodes)
            v = v.reshape(-1, *(1,) * num_plates)
        else:
            flat = OneHotCategorical(logits=torch.zeros(logits_of(distribution).shape[-1], dtype=torch.float64))
            gumbel, v_weight = gumbel_nodes(flat, num_nodes)
            v = (-(-gumbel).exp()).exp().reshape(-1, *(1,) * num_plates, gumbel.shape[-1])
        shape = b.shape[2:]
        v = v.expand(-1, *shape).reshape(1, 1, -1, *shape)  # [num_relaxed, n, R, ...]
        v_weight = v_weight.reshape(-1, *(1,) * num_plates).expand(-1, *weight.shape[1:])
        b, v, weight = crossed(b, v, weight.detach(), v_weight, 1, 2)
        return (b, v), weight

    return rule


def flipped(distribution: Distribution, num_plates: int, n: int) -> tuple[object, Tensor]:
    """Every value of bits, and every bit that may be flipped, for each of n draws."""
    b, weight = values(distribution, num_plates, n)
    size = b.shape[2 + num_plates :].numel()
    index = torch.tensor(list(itertools.product(range(size), repeat=n))).T  # [n, I]
    index = index.reshape(n, -1, *(1,) * num_plates).expand(-1, -1, *weight.shape[1:])
    uniform = torch.full(index.shape[1:], 1 / index.shape[1], dtype=torch.float64)
    b, index, weight = crossed(b, index, weight, uniform, 1, 1)
    return (b, index), weight


def antithetic(distribution: Distribution, num_plates: int, n: int) -> tuple[Tensor, Tensor]:
    """Every pattern of n bits of which m are rare together with probability max(0, 1 - m t)^(n-1)."""
    logits = logits_of(distribution).detach()
    t = 1 - (-logits.abs()).sigmoid() ** (1 / (n - 1))
    patterns = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=torch.float64)

    def exactly(rare: int) -> Tensor:
        terms = range(n - rare + 1)
        return sum((-1) ** j * math.comb(n - rare, j) * (1 - (rare + j) * t).clamp(min=0) ** (n - 1) for j in terms)

    weights = torch.stack([exactly(round(each.sum().item())) for each in patterns])
    rare = patterns.reshape(len(patterns), *(1,) * logits.dim(), n)
    bits = torch.where(logits.unsqueeze(-1) > 0, 1 - rare, rare)  # the n of a variable as its event
    noise, weight = product(bits, weights, num_plates, 1, 1)
    return noise[0].movedim(-1, 0), weight


def rao(temperature: float) -> Callable[[Tensor, Node, Costs], Tensor]:
    """E[f(b)], with the gradient E[grad f(b) dy/dl] of samples and Jacobians that belong together."""

    def stated(parameter: Tensor, node: Node, costs: Costs) -> Tensor:
        q = node.build(parameter)
        noise, weight = relaxations(40)(q, node.num_plates, 1)
        y = squashed(q, noise, temperature)
        hard = y.detach().round() if isinstance(base_of(q), Bernoulli) else (y == y.max(-1, keepdim=True)[0]).double()
        return first_order(hard[0], y[0], weight, node, costs)

    return stated


def heun(parameter: Tensor, node: Node, costs: Costs) -> Tensor:
    """E[f(b)], with the gradient E[grad f(b) (2 J((p + b) / 2) - J(p) / 2)]."""
    q = node.build(parameter)
    hard, weight = values(q, node.num_plates, 1)
    p, logits = base_of(q).mean.detach(), logits_of(q)
    middle = (p + hard.detach()) / 2
    if isinstance(base_of(q), Bernoulli):
        soft = (2 * middle * (1 - middle) - p * (1 - p) / 2) * logits
    else:
        jacobians = [torch.diag_embed(each) - each.unsqueeze(-1) * each.unsqueeze(-2) for each in (middle, p)]
        soft = ((2 * jacobians[0] - jacobians[1] / 2) @ logits.unsqueeze(-1)).squeeze(-1)
    return first_order(hard[0], soft[0], weight.detach(), node, costs)


def randomly_set(method: Method) -> Method:
    """Give a method's parameters values that are not those of a start."""
    generator = torch.Generator().manual_seed(3)
    for each in method.parameters():
        nn.init.normal_(each, 0.0, 0.7, generator)
    return method.to(torch.float64)


class Quadratic(nn.Module):
    """A control variate whose expectation under a Normal is exact in a quadrature."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight[0] * x**2 + self.weight[1] * x).sum(-1, keepdim=True)


BINARY = ("bernoulli", "bernoulli probs")
CONTROLLED = {
    "REBAR": Row(lambda: REBAR("z"), relaxations(24), BINARY),
    "REBAR, two": Row(lambda: REBAR("z", 2, eta=0.6), relaxations(10), ("bernoulli",)),
    "REBAR, uncoupled": Row(lambda: REBAR("z", temperature=1.0, coupled=False), relaxed_twice(24), ("bernoulli",)),
    "REBAR, categories": Row(lambda: REBAR("z", eta=1.3), relaxations(14), ("one-hot",)),
    "REBAR, trained temperature": Row(
        lambda: REBAR("z", eta=1.3, train_temperature=True), relaxations(14), ("bernoulli", "one-hot")
    ),
    "RELAX": Row(lambda: randomly_set(RELAX("z", 2)), relaxations(24), ("bernoulli probs",), scales=False),
    "RELAX, two": Row(lambda: randomly_set(RELAX("z", 1, 2)), relaxations(10), ("bernoulli",), scales=False),
    "RELAX, categories": Row(
        lambda: randomly_set(RELAX("z", 3)), relaxations(20), ("one-hot", "categorical plates"), scales=False
    ),
    "RELAX, uncoupled": Row(
        lambda: randomly_set(RELAX("z", 1, temperature=1.0, coupled=False)),
        relaxed_twice(24),
        ("bernoulli",),
        scales=False,
    ),
    "LAX": Row(
        lambda: randomly_set(LAX("z", 1, network=Quadratic())),
        normals(60, pathwise=True),
        ("normal",),
        scales=False,
        draws_gradient=False,
    ),
    "GumbelRao": Row(lambda: GumbelRao("z", num_relaxed=1), given_the_sample(20), ("bernoulli", "one-hot"), rao(1.0)),
    "GumbelRao, cool": Row(
        lambda: GumbelRao("z", temperature=0.5, num_relaxed=1), given_the_sample(20), ("one-hot",), rao(0.5)
    ),
    "ReinMax": Row(lambda: ReinMax("z"), values, BERNOULLI + ONE_HOT, heun),
    "LocalExpectation": Row(
        lambda: LocalExpectation("z"), values, BERNOULLI + ONE_HOT + CATEGORICAL, leave_one_out=True
    ),
    "LocalExpectation, two": Row(lambda: LocalExpectation("z", 2), values, ("one-hot probs",), leave_one_out=True),
    "BitFlip1": Row(lambda: BitFlip1("z"), flipped, BERNOULLI, leave_one_out=True),
    "BitFlip1, two": Row(lambda: BitFlip1("z", 2), flipped, ("bernoulli probs",), leave_one_out=True),
    "ARMS": Row(lambda: ARMS("z"), antithetic, BERNOULLI, leave_one_out=True),
    "ARMS, three": Row(lambda: ARMS("z", 3), antithetic, BERNOULLI[:3], leave_one_out=True),
    "ARMS, four": Row(lambda: ARMS("z", 4), antithetic, ("bernoulli probs",), leave_one_out=True),
    "MuProp": Row(lambda: MuProp("z"), values, BERNOULLI + ONE_HOT, leave_one_out=True),
    "MuProp, two": Row(lambda: MuProp("z", 2), values, ("bernoulli probs",), leave_one_out=True),
    "DoubleCV": Row(lambda: DoubleCV("z", 2, 0.7), values, (*BINARY, *ONE_HOT[:2]), leave_one_out=True),
    "DoubleCV, three": Row(lambda: DoubleCV("z", 3, -0.4), values, ("bernoulli",), leave_one_out=True),
    "RODEO": Row(lambda: randomly_set(RODEO("z")), values, (*BINARY, "bernoulli three"), scales=False),
    "RODEO, three": Row(lambda: randomly_set(RODEO("z", 3)), values, ("bernoulli",), scales=False),
}
