"""All that a method may draw, with its probability: sums and quadratures that are exact for the smooth pieces.

A rule takes a distribution [*plates, *rest], how many of its dimensions are plates and the n of a method, and returns

    noise [n, R, *plates, ...], what `draw` of the method could return for R copies of the distribution, and
    weight [R, *plates], with which the R outcomes count in an expectation; it carries the gradient of the law.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, OneHotCategorical

from estimators.nodes.base import base_of

Rule = Callable[[Distribution, int, int], tuple[Any, Tensor]]


def product(nodes: Tensor, weights: Tensor, num_plates: int, n: int, event_dims: int) -> tuple[Tensor, Tensor]:
    """The rule for n draws of all variables, from one for each: nodes [r, *plates, *rest, *event], weights as that."""
    r, plates = weights.shape[0], weights.shape[1 : 1 + num_plates]
    rest = weights.shape[1 + num_plates :]
    event = nodes.shape[nodes.dim() - event_dims :]
    nodes, weights = nodes.reshape(r, *plates, -1, *event), weights.reshape(r, *plates, -1)
    size = weights.shape[-1]
    grid = torch.tensor(list(itertools.product(range(r), repeat=n * size))).reshape(-1, n, size)
    variables = nodes.unbind(1 + num_plates)
    noise = torch.stack(
        [torch.stack([variables[d][grid[:, i, d]] for d in range(size)], 1 + num_plates) for i in range(n)]
    )
    weight = torch.stack([weights[grid[:, i, d]][..., d] for i in range(n) for d in range(size)]).prod(0)
    return noise.reshape(n, len(grid), *plates, *rest, *event), weight


def support_of(distribution: Distribution) -> Tensor:
    """The values of one variable, [V, *event]."""
    base = base_of(distribution)
    if isinstance(base, Bernoulli):
        return torch.tensor([0.0, 1.0], dtype=torch.float64)
    size = base.logits.shape[-1]  # type: ignore[attr-defined]
    return torch.eye(size, dtype=torch.float64) if isinstance(base, OneHotCategorical) else torch.arange(size)


def values(distribution: Distribution, num_plates: int, n: int) -> tuple[Tensor, Tensor]:
    """Every value of a discrete node: the noise is the sample itself."""
    base, support = base_of(distribution), support_of(distribution)
    ones = (1,) * len(base.batch_shape)
    at = support.reshape(len(support), *ones, *support.shape[1:])
    weights = base.log_prob(at).exp()
    nodes = at.expand(*weights.shape, *support.shape[1:])
    return product(nodes, weights, num_plates, n, support.dim() - 1)


def legendre(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [0, 1]: exact for polynomials of degree 2 num_nodes - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2)


def uniform_nodes(distribution: Distribution, num_nodes: int) -> tuple[Tensor, Tensor]:
    """A rule on (0, 1) for each Bernoulli, [3 nodes, *batch], its pieces bounded by p and 1 - p."""
    base = base_of(distribution)
    assert isinstance(base, Bernoulli)
    p = base.probs.detach()
    zero = torch.zeros_like(p)
    bounds = [zero, torch.minimum(p, 1 - p), torch.maximum(p, 1 - p), zero + 1]
    x, w = (each.reshape(-1, *(1,) * p.dim()) for each in legendre(num_nodes))
    pieces = [(low + (high - low) * x, (high - low) * w) for low, high in itertools.pairwise(bounds)]
    return torch.cat([each[0] for each in pieces]), torch.cat([each[1] for each in pieces])


def uniforms(num_nodes: int) -> Rule:
    """The uniform noise of Bernoulli variables, [n, R, *plates, *rest]; smooth where u is not p or 1 - p."""

    def rule(distribution: Distribution, num_plates: int, n: int) -> tuple[Tensor, Tensor]:
        return product(*uniform_nodes(distribution, num_nodes), num_plates, n, 0)

    return rule


def gumbel_nodes(distribution: Distribution, num_nodes: int) -> tuple[Tensor, Tensor]:
    """A rule for the Gumbel noise of each categorical variable, [r, *batch, C], up to what is common to its categories.

    With exponentials E_i = exp(-g_i) and T_i = E_i / p_i, the categories lie in the order of the T_i. For each order,
    the ratios s_j = T_(j) / T_(j+1) in [0, 1] have the density
    (C-1)! prod_i p_i prod_j s_j^(j-1) / (sum_i p_(i) T_(i))^C at T_(C) = 1, smooth on the closed cube.
    """
    base = base_of(distribution)
    assert isinstance(base, Categorical | OneHotCategorical)
    p = base.probs.detach()
    size = p.shape[-1]
    x, w = legendre(num_nodes)
    ratios = torch.cartesian_prod(*[x] * (size - 1)).reshape(-1, size - 1)
    weight = torch.cartesian_prod(*[w] * (size - 1)).reshape(-1, size - 1).prod(-1)
    ordered = torch.cat([ratios.flip(-1).cumprod(-1).flip(-1), torch.ones(len(ratios), 1, dtype=ratios.dtype)], -1)
    jacobian = (ratios ** torch.arange(size - 1)).prod(-1) * math.factorial(size - 1) * weight
    shape = (-1, *(1,) * (p.dim() - 1))
    nodes, weights = [], []
    for order in itertools.permutations(range(size)):
        times = torch.empty_like(ordered)
        times[:, list(order)] = ordered
        times = times.reshape(*shape, size)
        total = (p * times).sum(-1)
        nodes.append(-(p * times).log())
        weights.append(jacobian.reshape(shape) * p.prod(-1) / total**size)
    return torch.cat(nodes), torch.cat(weights)


def gumbels(num_nodes: int) -> Rule:
    """The Gumbel noise of categorical variables, [n, R, *plates, *rest, C], where only its differences count."""

    def rule(distribution: Distribution, num_plates: int, n: int) -> tuple[Tensor, Tensor]:
        return product(*gumbel_nodes(distribution, num_nodes), num_plates, n, 1)

    return rule


def relaxations(num_nodes: int) -> Rule:
    """Uniform noise for a Bernoulli, Gumbel noise for categories."""

    def rule(distribution: Distribution, num_plates: int, n: int) -> tuple[Any, Tensor]:
        chosen = uniforms if isinstance(base_of(distribution), Bernoulli) else gumbels
        return chosen(num_nodes)(distribution, num_plates, n)

    return rule


def normals(num_nodes: int, pathwise: bool) -> Rule:
    """The draws of Normal variables, by Gauss-Hermite; with their gradient, or with the gradient in the law."""

    def rule(distribution: Distribution, num_plates: int, n: int) -> tuple[Tensor, Tensor]:
        base = base_of(distribution)
        eps, w = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(num_nodes))
        ones = (1,) * len(base.batch_shape)
        nodes = base.loc + base.scale * eps.reshape(-1, *ones)  # type: ignore[attr-defined]
        weights = (w / w.sum()).reshape(-1, *ones).expand_as(nodes)
        if not pathwise:
            weights = weights * (base.log_prob(nodes.detach()) - base.log_prob(nodes.detach()).detach()).exp()
            nodes = nodes.detach()
        return product(nodes, weights, num_plates, n, 0)

    return rule


def categories_of(distribution: Distribution, num_plates: int) -> tuple[Tensor, Tensor]:
    """The joint values of a discrete node as categories, [V, D], and their probabilities, [V, *plates]."""
    size = len(support_of(distribution))
    weight = values(distribution, num_plates, 1)[1].detach()
    num_variables = round(math.log(len(weight), size))
    return torch.tensor(list(itertools.product(range(size), repeat=num_variables))), weight


def outside_the_top(k: int) -> Rule:
    """The k - 1 likeliest joint values and n draws from the others, as categories [k - 1 + n, R, *plates, D]."""

    def rule(distribution: Distribution, num_plates: int, n: int) -> tuple[Tensor, Tensor]:
        categories, prob = categories_of(distribution, num_plates)
        order = prob.argsort(0, descending=True)
        top, rest = order[: k - 1], order[k - 1 :]  # [., *plates]
        law = prob.gather(0, rest) / prob.gather(0, rest).sum(0)
        draws = torch.tensor(list(itertools.product(range(len(rest)), repeat=n)))  # [R, n]
        weight = torch.stack([law[draws[:, i]] for i in range(n)]).prod(0)
        noise = torch.cat(
            [
                categories[top].unsqueeze(1).expand(-1, len(draws), *(-1,) * (num_plates + 1)),
                torch.stack([categories[rest[draws[:, i]]] for i in range(n)]),
            ]
        )
        return noise, weight

    return rule


def sets(num_nodes: int) -> Rule:
    """k different joint values and the threshold: categories [k, R, *plates, D] and [R, *plates].

    With an exponential clock of rate q(x) for each joint value x, S rings before all others, the first of which rings
    at a time t, with density c exp(-c t) prod_{x in S} (1 - exp(-q(x) t)), c = 1 - q(S); the threshold is -log t.
    The integral is taken in log t, where the integrand falls off on both sides. With one node, the threshold is left
    out, of which the mean over the orders of S knows nothing.
    """

    def rule(distribution: Distribution, num_plates: int, k: int) -> tuple[Any, Tensor]:
        categories, prob = categories_of(distribution, num_plates)
        if num_nodes == 1:
            chosen = torch.tensor(list(itertools.combinations(range(len(prob)), k)))
            orders = itertools.permutations(range(k))
            weight = torch.stack([in_order(prob[chosen[:, list(order)]]) for order in orders]).sum(0)
            noise = torch.stack([categories[chosen[:, i]] for i in range(k)])  # [k, R, D]
            noise = noise.reshape(k, -1, *(1,) * num_plates, noise.shape[-1])
            return (noise.expand(k, *weight.shape, -1), torch.full_like(weight, torch.nan)), weight
        if k == len(prob):
            noise = categories.reshape(k, 1, *(1,) * num_plates, -1).expand(k, 1, *prob.shape[1:], -1)
            return (noise, torch.full_like(prob[:1], -torch.inf)), torch.ones_like(prob[:1])
        parts = []
        for members in itertools.combinations(range(len(prob)), k):
            inside = prob[list(members)]
            left = 1 - inside.sum(0)
            grid = torch.linspace(0, 1, num_nodes, dtype=prob.dtype).reshape(-1, *(1,) * num_plates)
            low, high = -30.0, (40 / left).log()
            log_t = low + (high - low) * grid
            t = log_t.exp()
            weight = left * (-left * t).exp() * (1 - (-inside.unsqueeze(1) * t).exp()).prod(0) * t
            weight = weight * (high - low) / (num_nodes - 1)
            noise = categories[list(members)].reshape(k, 1, *(1,) * num_plates, -1).expand(k, *weight.shape, -1)
            parts.append((noise, -log_t, weight))
        noise, threshold, weight = (
            torch.cat(each, i) for i, each in zip((1, 0, 0), zip(*parts, strict=True), strict=True)
        )
        return (noise, threshold), weight

    return rule


def in_order(prob: Tensor) -> Tensor:
    """The probability that values of these probabilities [R, k, ...] are drawn in this order without replacement."""
    before = prob.cumsum(1) - prob
    return (prob / (1 - before)).prod(1)


def proposed(proposal: Callable[[Distribution], Distribution]) -> Rule:
    """Every value, with the probability that a proposal gives it."""

    def rule(distribution: Distribution, num_plates: int, n: int) -> tuple[Tensor, Tensor]:
        noise, weight = values(proposal(distribution), num_plates, n)
        return noise, weight.detach()

    return rule
