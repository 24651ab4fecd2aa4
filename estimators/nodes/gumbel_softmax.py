"""The relaxed sample of a discrete node: Gumbel-softmax, or the concrete distribution."""

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, OneHotCategorical

from estimators.nodes.base import Method, Sample, base_of, gumbels, logits_of, uniforms


class GumbelSoftmax(Method):
    """grad f(y), y = softmax((l + g) / temperature) with Gumbel noise g, or sigmoid((l + logit u) / temperature).

    (Jang et al. 2017; Maddison et al. 2017.) The cost is evaluated at the relaxed y, which carries the gradient; with
    `straight_through` at the hard sample, the one of the largest y, with the Jacobian of y. `temperature` may be set
    between samples. Points [n, *plates, *rest, *event].

    Biased: value and derivatives are those of E[f(y)]; with `straight_through` the value is exact, the gradient
    E[grad f(hard) dy/dl]. Proof of both: tests/estimators/nodes/test_enumeration.py.
    """

    declares = "biased"
    source = "Jang et al. 2017; Maddison et al. 2017"
    takes = (Bernoulli, OneHotCategorical)

    def __init__(
        self, plate_name: str, n_samples: int = 1, straight_through: bool = False, initial_temperature: float = 1.0
    ):
        super().__init__(plate_name, n_samples)
        self.straight_through = straight_through
        self.temperature = initial_temperature

    @property
    def temperature(self) -> float:
        """The temperature, positive: the relaxed sample is the hard one at 0."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not value > 0:
            raise ValueError(f"GumbelSoftmax({self.plate_name!r}): temperature = {value}, expected a positive number")
        self._temperature = float(value)

    def draw(self, distribution: Distribution, num_plates: int) -> Tensor:  # noqa: ARG002
        """Return uniforms for a Bernoulli, Gumbels for categories, in the shape [n, *logits]."""
        if isinstance(base_of(distribution), Bernoulli):
            return uniforms(distribution, self.n_samples)
        logits = logits_of(distribution).detach()
        return gumbels(logits.expand(self.n_samples, *logits.shape))

    def place(self, distribution: Distribution, num_plates: int, noise: Tensor) -> Sample:
        """Return the relaxed samples, or the hard ones with their gradient."""
        logits = logits_of(distribution)
        if isinstance(base_of(distribution), Bernoulli):
            relaxed = ((logits + torch.logit(noise)) / self.temperature).sigmoid()
            hard = (relaxed > 0.5).to(relaxed.dtype)
        else:
            relaxed = ((logits + noise) / self.temperature).softmax(-1)
            hard = torch.zeros_like(relaxed).scatter(-1, relaxed.argmax(-1, keepdim=True), 1)
        return Sample(
            distribution, num_plates, hard + (relaxed - relaxed.detach()) if self.straight_through else relaxed
        )

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{super().extra_repr()}, straight_through={self.straight_through}, temperature={self.temperature:g}"
