"""The unordered set estimator."""

import functools
import itertools
import math

import torch
from torch import Tensor
from torch.distributions import Distribution

from estimators.nodes.base import Sample
from estimators.nodes.without_replacement import WithoutReplacement

MOST_ENUMERATED = 8  # sets of more samples are integrated


class UnorderedSetEstimator(WithoutReplacement):
    """sum_{s in S} q(s) R(S, s) (f(s) - b_s) grad log q(s), S a set of k values without order (Kool et al. 2020).

    R(S, s) = P(S | s is drawn first) / P(S) is the leave-one-out ratio. The weights q(s) R(S, s) sum to 1: they are the
    probability that s was the first of S, so the estimate is the mean of one sample's over the orders of S. The
    baseline, with the leave-two-out ratios, is the same mean over a second sample with replacement,

        b_s = q(s) f(s) + sum_{s' != s} q(s') P(S | s, s' are drawn first) / P(S | s is drawn first) f(s'),

    so that a constant added to f changes no draw. Ratios are exact, by a sum over the subsets of S, up to k = 8, and by
    a numerical integral beyond, with an error of rounding. Points [k, *plates, *rest, *event], weights [k, *plates].

    Unbiased, to any order; without variance where k is the number of values. Proof:
    tests/estimators/nodes/test_enumeration.py, and tests/estimators/nodes/test_joint.py for the ratios.
    """

    source = "Kool et al. 2020"

    def place(self, distribution: Distribution, num_plates: int, noise: tuple[Tensor, Tensor]) -> Sample:
        """Return the points; the sample's noise is their weights, and those of their costs in the baselines."""
        sample = super().place(distribution, num_plates, noise)
        log_prob = sample.log_prob.detach()
        sample.noise = tuple(each.to(log_prob.dtype) for each in leave_out_ratios(log_prob.double().exp()))
        return sample

    def weigh(self, sample: Sample) -> Tensor:
        """Return q(s) R(S, s), [k, *plates]."""
        return sample.noise[0]

    def baseline(self, sample: Sample, cost: Tensor) -> Tensor:
        """Return b, [k, *plates, m]."""
        return (sample.noise[1].unsqueeze(-1) * cost).sum(1)


def leave_out_ratios(prob: Tensor) -> tuple[Tensor, Tensor]:
    """Return q(s) R(S, s), [k, ...], and the weights of f(s') in b_s, [k (s), k (s'), ...], for q(s), [k, ...].

    A probability of 0 counts as one too small to matter.
    """
    prob = prob.clamp(min=1e-200)
    if len(prob) == 1:
        return torch.ones_like(prob), torch.ones_like(prob).unsqueeze(0)
    first, both = (_enumerated if len(prob) <= MOST_ENUMERATED else _integrated)(prob)
    diagonal = torch.eye(len(prob), dtype=torch.bool, device=prob.device).reshape(
        len(prob), -1, *(1,) * (prob.dim() - 1)
    )
    return first, torch.where(diagonal, prob.unsqueeze(0), both)


@functools.cache
def _levels(k: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Return how subsets of k elements lead to larger ones: which element follows, and where the larger set stands.

    One pair [sets, missing elements] for each size from k - 1 to 0, sets in lexical order among those of a size. Also
    where the set of elements i and j stands, [k, k]; 0 where they are the same.
    """
    levels, place = [], {tuple(range(k)): 0}
    for size in range(k - 1, -1, -1):
        sets = list(itertools.combinations(range(k), size))
        missing = [[i for i in range(k) if i not in chosen] for chosen in sets]
        larger = [
            [place[tuple(sorted((*chosen, i)))] for i in each] for chosen, each in zip(sets, missing, strict=True)
        ]
        levels.append((torch.tensor(missing), torch.tensor(larger)))
        place |= {chosen: i for i, chosen in enumerate(sets)}
    pairs = torch.tensor([[place[tuple(sorted((i, j)))] if i != j else 0 for j in range(k)] for i in range(k)])
    return levels, pairs


def _enumerated(prob: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ratios by the chance that the rest of S follows, once a subset T has been drawn, for every T.

    B(S) = 1, B(T) = sum_{s in S outside T} q(s) / (1 - q(T)) B(T + s).
    """
    levels, pairs = _levels(len(prob))
    left = (1 - prob.sum(0)).clamp(min=0)
    chances = [torch.ones_like(prob[:1])]  # by the size of T, from k to 0
    for missing, larger in levels:
        steps = prob[missing]  # [sets, missing, ...]
        chances.append((steps * chances[-1][larger]).sum(1) / (left + steps.sum(1)))
    two, one, none = chances[-3:]
    return prob * one / none, prob.unsqueeze(0) * two[pairs] / one.unsqueeze(1)


def _integrated(prob: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ratios by P(S | C first) = integral c exp(-c t) prod_{s in S outside C} (1 - exp(-q(s) t)) dt.

    c = 1 - q(S), t the time of the first exponential clock outside S. In log t the integrand falls off on both sides,
    on the left as t^(k-1) at least, on the right as t^k exp(-c t) at most, and the trapezoidal rule converges
    exponentially in the number of nodes. The peak is as wide as k^(-1/2).
    """
    k, left = len(prob), (1 - prob.sum(0)).clamp(min=1e-14)
    least, most = -40 / (k - 1), ((40 + 4 * k) / left).log()
    num_nodes = 64 * math.ceil(math.sqrt(k)) + 1
    grid = torch.linspace(0, 1, num_nodes, dtype=prob.dtype, device=prob.device).reshape(-1, *(1,) * left.dim())
    log_t = least + (most - least) * grid
    t = log_t.exp()
    rates = -torch.expm1(-prob * t.unsqueeze(1)) / prob  # (1 - exp(-q t)) / q, [nodes, k, ...]
    log_weight = rates.log().sum(1) + log_t - left * t
    weight = log_weight.sub(log_weight.amax(0)).exp()
    one = torch.einsum("n...,nk...->k...", weight, 1 / rates)
    two = torch.einsum("n...,ni...,nj...->ij...", weight, 1 / rates, 1 / rates)
    return one / weight.sum(0), two / one.unsqueeze(1)
