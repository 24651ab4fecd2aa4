"""The score function of a discrete node, its likeliest values summed."""

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, OneHotCategorical

from estimators.dice import magic_box
from estimators.nodes.base import Method, Sample
from estimators.nodes.joint import check_k, likeliest, log_probs_of, num_values, points_of, without_replacement


class RaoBlackwellSF(Method):
    """sum_{x in T} grad q(x) f(x) + (1 - q(T)) f(b) grad log q(b), b drawn from q outside T (Liu et al. 2019).

    T: the k - 1 likeliest values of the node, joint ones where it has several variables. n_samples: how many b are
    drawn, independent of each other. Points [k - 1 + n, *plates, *rest, *event]: T, then the b; weights q(x) and
    (1 - q(T)) / n. With k = 1 it is the score function, with k the number of values it is exact.

    Unbiased, to any order. Proof: tests/estimators/nodes/test_enumeration.py.
    """

    source = "Liu et al. 2019"
    any_order = True
    takes = (Bernoulli, Categorical, OneHotCategorical)

    def __init__(self, plate_name: str, k: int, n_samples: int = 1):
        super().__init__(plate_name, n_samples)
        if k < 1:
            raise ValueError(f"RaoBlackwellSF({plate_name!r}): k = {k}, expected at least 1")
        self.k = k

    def propose(self, distribution: Distribution, num_plates: int) -> Sample:
        """Return the k - 1 likeliest values and n of the others; ValueError where there are fewer than k."""
        check_k(self, self.k, num_values(distribution, num_plates))
        return super().propose(distribution, num_plates)

    def draw(self, distribution: Distribution, num_plates: int) -> Tensor:
        """Return T and n samples from outside it as categories, [k - 1 + n, *plates, D].

        A sample is the first outside T of k drawn without replacement, at most k - 1 of which are in T.
        """
        log_probs = log_probs_of(distribution, num_plates)
        drawn = without_replacement(log_probs.expand(self.n_samples, *log_probs.shape), self.k)[0]  # [k, n, *plates, D]
        if self.k == 1:
            return drawn[0]
        top = likeliest(log_probs, self.k - 1)
        inside = (drawn.unsqueeze(1) == top.unsqueeze(1)).all(-1).any(1)  # [k, n, *plates]
        first = inside.to(torch.uint8).argmin(0, keepdim=True).unsqueeze(-1)
        outside = drawn.gather(0, first.expand(1, *drawn.shape[1:])).squeeze(0)
        return torch.cat([top, outside])

    def place(self, distribution: Distribution, num_plates: int, noise: Tensor) -> Sample:
        """Return T and the samples from outside it."""
        return Sample(distribution, num_plates, points_of(distribution, noise))

    def weigh(self, sample: Sample) -> Tensor:
        """Return q(x) for T and what is left, shared by the samples, [k - 1 + n, *plates]."""
        inside = sample.log_prob.detach()[: self.k - 1].exp()
        left = (1 - inside.sum(0)).clamp(min=0) / self.n_samples
        return torch.cat([inside, left.expand(self.n_samples, *left.shape)])

    def gradient(self, sample: Sample) -> Tensor:
        """Return magic_box(log q(x)), [k - 1 + n, *plates]: q(x) magic_box(log q(x)) is q(x) with all derivatives."""
        return magic_box(sample.log_prob)

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{self.plate_name!r}, k={self.k}, n_samples={self.n_samples}"
