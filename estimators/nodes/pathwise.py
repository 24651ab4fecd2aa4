"""Pathwise derivatives of nodes that can be reparameterised, and the choice between them and the score function."""

import torch
from torch.distributions import Distribution

from estimators.nodes.base import Method, Sample
from estimators.nodes.score_function import ScoreFunction


class Reparameterization(Method):
    """grad f(x(eps, phi)): the samples carry the gradient of the distribution's parameters (Kingma & Welling 2014).

    Unbiased where f is differentiable, to any order. Raises ValueError for a distribution without rsample.
    """

    source = "Kingma & Welling 2014"
    any_order = True

    def check(self, distribution: Distribution) -> None:
        """Raise ValueError for a distribution without rsample."""
        if not is_reparameterised(distribution):
            raise ValueError(
                f"node {self.plate_name!r}: {type(distribution).__name__} cannot be reparameterised; use "
                "ScoreFunction, or Expect where its values are few"
            )

    def draw(self, distribution: Distribution, num_plates: int) -> torch.Tensor:  # noqa: ARG002
        """Draw points that carry the gradient."""
        return distribution.rsample(torch.Size([self.n_samples]))


class Infer(Method):
    """Reparameterization where the distribution has it, else the score function with a moving average.

    Unbiased in both cases, to any order.
    """

    any_order = True

    def __init__(self, plate_name: str, n_samples: int = 1):
        super().__init__(plate_name, n_samples)
        self.pathwise, self.score = Reparameterization(plate_name, n_samples), ScoreFunction(plate_name, n_samples)

    def draw(self, distribution: Distribution, num_plates: int) -> torch.Tensor:
        """Draw points, with the gradient where that is possible."""
        return self._chosen(distribution).draw(distribution, num_plates)

    def estimate(self, sample: Sample, cost: torch.Tensor) -> torch.Tensor:
        """Return the chosen method's surrogate, [*plates, m]."""
        return self._chosen(sample.distribution).estimate(sample, cost)

    def _chosen(self, distribution: Distribution) -> Method:
        return self.pathwise if is_reparameterised(distribution) else self.score


def is_reparameterised(distribution: Distribution) -> bool:
    """Return whether rsample gives an unbiased gradient; that of a discrete distribution is a straight-through one."""
    support = distribution.support
    return bool(distribution.has_rsample) and not (support is not None and support.is_discrete)
