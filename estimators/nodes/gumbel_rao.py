"""Gumbel-Rao: straight-through Gumbel-softmax with its Jacobian averaged, given the hard sample."""

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, OneHotCategorical

from estimators.nodes.base import Method, Sample, logits_of, uniforms
from estimators.nodes.rebar import check_temperature
from estimators.nodes.relaxation import conditional, relaxed


class GumbelRao(Method):
    """grad f(b) E[dy/dl | b], y = relaxed(z~), the mean over `num_relaxed` draws of z~ given b (Paulus et al. 2021).

    dy/dl is the Jacobian of softmax((l + g) / temperature), or of its sigmoid, at l + g = z~. The cost is evaluated at
    the hard samples alone, points [n, *plates, *rest, *event], whose gradient carries the mean Jacobian: as many costs
    as GumbelSoftmax with `straight_through` has, the same expectation, less variance.

    Needs costs that are differentiable in the samples. Biased: the value is exact, the gradient E[grad f(b) dy/dl].
    Proof: tests/estimators/nodes/test_enumeration.py.
    """

    declares = "biased"
    source = "Paulus et al. 2021"
    takes = (Bernoulli, OneHotCategorical)

    def __init__(self, plate_name: str, n_samples: int = 1, temperature: float = 1.0, num_relaxed: int = 10):
        super().__init__(plate_name, n_samples)
        check_temperature(self, temperature)
        if num_relaxed < 1:
            raise ValueError(f"GumbelRao({plate_name!r}): num_relaxed = {num_relaxed}, expected at least 1")
        self.temperature, self.num_relaxed = temperature, num_relaxed

    def draw(self, distribution: Distribution, num_plates: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return b [n, *logits] and the uniform noise of its z~, [num_relaxed, n, *logits]."""
        b = distribution.sample(torch.Size([self.n_samples]))
        v = uniforms(distribution, self.num_relaxed * self.n_samples)
        return b, v.unflatten(0, (self.num_relaxed, self.n_samples))

    def place(self, distribution: Distribution, num_plates: int, noise: tuple[Tensor, Tensor]) -> Sample:
        """Return b, with the gradient of the mean relaxed sample."""
        b, v = noise
        logits = logits_of(distribution)
        with torch.no_grad():
            z = conditional(distribution, b.expand_as(v), v)
        y = relaxed(distribution, z + zero_of(logits), self.temperature).mean(0)
        return Sample(distribution, num_plates, b + (y - y.detach()))

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{super().extra_repr()}, temperature={self.temperature:g}, num_relaxed={self.num_relaxed}"


def zero_of(logits: Tensor) -> Tensor:
    """Return zeros whose gradient is that of the logits; logits of -inf have none."""
    finite = logits.clamp(min=torch.finfo(logits.dtype).min / 8)
    return finite - finite.detach()
