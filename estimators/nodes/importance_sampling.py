"""Samples from another distribution than the node's."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from estimators.dice import magic_box
from estimators.nodes.base import Method, Sample, base_of
from estimators.nodes.expect import values_of_one

Proposal = Distribution | Callable[[Distribution], Distribution]


class ImportanceSampling(Method):
    """1/n sum_i q(x_i) / r(x_i) f(x_i) with x_i from a proposal r, and its derivatives by q, of any order.

    proposal: a distribution whose batch shape broadcasts to that of the node [*plates, *rest] and whose event shape is
    the node's, or a function that makes it of the node's distribution. Its parameters get no gradient. Weights
    [n, *plates], which are not normalised.

    Unbiased where r is positive wherever q f is. Proof: tests/estimators/nodes/test_enumeration.py.
    """

    source = "Kahn & Marshall 1953"
    any_order = True

    def __init__(self, plate_name: str, proposal: Proposal, n_samples: int = 1):
        super().__init__(plate_name, n_samples)
        self.proposal = proposal

    def check(self, distribution: Distribution) -> None:
        """Raise ValueError for a proposal that gives other values than the node has."""
        proposal = self._proposed(distribution)
        if _num_values(proposal) != _num_values(distribution):
            raise ValueError(
                f"node {self.plate_name!r}: the proposal {type(proposal).__name__} and {type(distribution).__name__} "
                "do not have the same values"
            )

    def draw(self, distribution: Distribution, num_plates: int) -> Tensor:  # noqa: ARG002
        """Return samples of the proposal, [n, *plates, *rest, *event]."""
        return self._proposed(distribution).sample(torch.Size([self.n_samples]))

    def weigh(self, sample: Sample) -> Tensor:
        """Return q(x_i) / (n r(x_i)), [n, *plates]."""
        proposed = sample.sum_rest(self._proposed(sample.distribution).log_prob(sample.points))
        return (sample.log_prob - proposed).detach().exp() / sample.size

    def gradient(self, sample: Sample) -> Tensor:
        """Return magic_box(log q(x_i)), [n, *plates]."""
        return magic_box(sample.log_prob)

    def _proposed(self, distribution: Distribution) -> Distribution:
        proposal = self.proposal if isinstance(self.proposal, Distribution) else self.proposal(distribution)
        batch = distribution.batch_shape
        try:
            fits = proposal.event_shape == distribution.event_shape and (
                torch.broadcast_shapes(proposal.batch_shape, batch) == batch
            )
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"node {self.plate_name!r}: the proposal has batch shape {list(proposal.batch_shape)} and event shape "
                f"{list(proposal.event_shape)}, which do not fit the node's {list(batch)} and "
                f"{list(distribution.event_shape)}"
            )
        return proposal if proposal.batch_shape == batch else proposal.expand(batch)


def _num_values(distribution: Distribution) -> float:
    """Return how many values one variable has: 0 where there is a density, inf where they are countless."""
    base = base_of(distribution)
    if base.has_enumerate_support:
        return len(values_of_one(base))
    return math.inf if base.support is not None and base.support.is_discrete else 0
