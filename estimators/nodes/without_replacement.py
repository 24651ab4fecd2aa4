"""What the methods that sample without replacement have in common."""

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, OneHotCategorical

from estimators.dice import magic_box
from estimators.nodes.base import Method, Sample
from estimators.nodes.joint import check_k, log_probs_of, num_values, points_of, without_replacement
from estimators.nodes.sequences import Sequences


class WithoutReplacement(Method):
    """k different values of a discrete node, joint ones where it has several variables, by Gumbel top-k.

    The estimate is sum_i w_i f(x_i) grad log q(x_i), less sum_i w_i b_i grad log q(x_i) with a baseline. Points
    [k, *plates, *rest, *event]; the sample's `noise` is the threshold, [*plates]: the largest perturbed log-probability
    of the values that were not drawn, -inf where all were.
    """

    any_order = True
    takes = (Bernoulli, Categorical, OneHotCategorical, Sequences)

    def __init__(self, plate_name: str, k: int, use_baseline: bool = True):
        name = type(self).__name__
        if k < 1:
            raise ValueError(f"{name}({plate_name!r}): k = {k}, expected at least 1")
        if use_baseline and k < 2:
            raise ValueError(
                f"{name}({plate_name!r}): the baseline is made of the other samples; give k of at least 2, or "
                "use_baseline=False"
            )
        super().__init__(plate_name, k)
        self.k, self.use_baseline = k, use_baseline

    def propose(self, distribution: Distribution, num_plates: int) -> Sample:
        """Return k different values; ValueError where there are fewer."""
        if isinstance(distribution, Sequences):
            check_k(self, self.k, distribution.num_values)
        else:
            check_k(self, self.k, num_values(distribution, num_plates))
        return super().propose(distribution, num_plates)

    def draw(self, distribution: Distribution, num_plates: int) -> tuple[Tensor, Tensor]:
        """Return k joint values as categories, or sequences, [k, *plates, D], and the threshold, [*plates]."""
        if isinstance(distribution, Sequences):
            categories, perturbed = distribution.without_replacement(self.k + 1)
        else:
            categories, perturbed = without_replacement(log_probs_of(distribution, num_plates), self.k + 1)
        threshold = perturbed[self.k] if len(perturbed) > self.k else torch.full_like(perturbed[0], -torch.inf)
        return categories[: self.k], threshold

    def place(self, distribution: Distribution, num_plates: int, noise: tuple[Tensor, Tensor]) -> Sample:
        """Return the points; the threshold is the sample's noise."""
        categories, threshold = noise
        points = categories if isinstance(distribution, Sequences) else points_of(distribution, categories)
        return Sample(distribution, num_plates, points, threshold)

    def gradient(self, sample: Sample) -> Tensor:
        """Return magic_box(log q(x_i)), [k, *plates]."""
        return magic_box(sample.log_prob)

    def control_variate(self, sample: Sample, cost: Tensor) -> Tensor | None:
        """Return sum_i w_i (1 - magic_box(log q(x_i))) b_i, [*plates, m]."""
        if not self.use_baseline:
            return None
        factor = self.weigh(sample) * (1 - magic_box(sample.log_prob))
        return (factor.unsqueeze(-1) * self.baseline(sample, cost)).sum(0)

    def baseline(self, sample: Sample, cost: Tensor) -> Tensor:
        """Return b, [k, *plates, m]."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{self.plate_name!r}, k={self.k}, use_baseline={self.use_baseline}"
