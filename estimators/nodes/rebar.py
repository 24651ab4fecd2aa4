"""REBAR: the score function with the relaxed cost as its control variate."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, OneHotCategorical

from estimators.nodes.base import Method, Sample, gradient_of_logits, uniforms
from estimators.nodes.parts import (
    beside,
    differentiable,
    score_of,
    slopes,
    training_term,
    variance_objective,
    weights_of,
)
from estimators.nodes.relaxation import conditional, hard, held, noise_of, perturbed, pulled_back, relaxed


class REBAR(Method):
    """(f(b) - c(z~)) grad log q(b) + grad c(z) - grad c(z~), with c(z) = eta f(relaxed(z)) (Tucker et al. 2017).

    z is the relaxation of the sample b and z~ drawn from the law of z given b (estimators/nodes/relaxation.py).
    `coupled`: z~ is drawn with the very noise that made z, so that z~ = z and only its gradient differs: two costs a
    sample; else with noise of its own: three costs. Points [2n or 3n, *plates, *rest, *event]: all b, the relaxed z and
    the relaxed z~, the latter with weight 0.

    eta and, with `train_temperature`, the temperature are parameters of the method: backward() gives them the gradient
    of the variance, for an optimiser that has `method.parameters()`. The latter needs a second derivative of the cost.

    Needs costs that are differentiable in the samples, and defined between their values. Unbiased, for any eta and
    temperature. Proof: tests/estimators/nodes/test_enumeration.py, test_trained.py.
    """

    source = "Tucker et al. 2017"
    takes = (Bernoulli, OneHotCategorical)

    def __init__(
        self,
        plate_name: str,
        n_samples: int = 1,
        temperature: float = 0.5,
        eta: float = 1.0,
        coupled: bool = True,
        train_temperature: bool = False,
    ):
        super().__init__(plate_name, n_samples)
        check_temperature(self, temperature)
        self.coupled, self.train_temperature = coupled, train_temperature
        self.eta = nn.Parameter(torch.tensor(float(eta)))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=train_temperature)

    def draw(self, distribution: Distribution, num_plates: int) -> Any:  # noqa: ARG002
        """Return the noise of z, and a uniform v for z~ unless it is coupled; each [n, *logits]."""
        return relaxation_noise(distribution, self.n_samples, self.coupled)

    def place(self, distribution: Distribution, num_plates: int, noise: Any) -> Sample:
        """Return b and the relaxed points; `noise` of the sample is (z,) or (z, z~)."""
        z = relaxations(distribution, noise)
        points = [hard(distribution, z[0]), *(relaxed(distribution, each, self._temperature) for each in z)]
        joined = torch.cat(points)
        return Sample(distribution, num_plates, joined if joined.requires_grad else differentiable(joined), z)

    def weigh(self, sample: Sample) -> Tensor:
        """Return 1 / n for b and 0 for the relaxed points."""
        return weights_of(sample, self.n_samples)

    def control_variate(self, sample: Sample, cost: Tensor) -> Tensor | None:
        """Return zeros with the estimate, and the gradients of eta and the temperature, as their gradient."""
        if not torch.is_grad_enabled():
            return None
        distribution, z, temperature = sample.distribution, sample.noise, self._temperature
        slope = slopes(self, sample, cost, create_graph=self.train_temperature)
        costs = beside(sample, cost).split(self.n_samples)
        by_relaxed = slope.split(self.n_samples)[1:]
        value = costs[-1] if self.train_temperature else costs[-1].detach()
        score = score_of(distribution, sample.points[: self.n_samples]).unsqueeze(-1)
        correction = control_gradient(distribution, z, temperature, by_relaxed) - value * score
        coefficient = (costs[0].detach() * score + self.eta * correction).mean(0)
        training = training_term(self.parameters(), variance_objective(coefficient, sample.num_plates))
        return gradient_of_logits(sample, coefficient.detach(), type(self).__name__) + training

    @property
    def _temperature(self) -> Tensor:
        return self.log_temperature.exp()

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{super().extra_repr()}, temperature={self._temperature.item():g}, eta={self.eta.item():g}"


def check_temperature(method: Method, temperature: float) -> None:
    """Raise ValueError, naming the node, for a temperature that is not positive."""
    if not temperature > 0:
        raise ValueError(
            f"{type(method).__name__}({method.plate_name!r}): temperature = {temperature}, expected a positive number"
        )


def relaxation_noise(distribution: Distribution, n: int, coupled: bool) -> Any:
    """Return the noise of z, [n, *logits]; with a uniform v for z~ beside it unless they are coupled."""
    noise = noise_of(distribution, n)
    return noise if coupled else (noise, uniforms(distribution, n))


def relaxations(distribution: Distribution, noise: Any) -> tuple[Tensor, ...]:
    """Return (z,) of coupled noise, (z, z~) of other, each [n, *logits], without a gradient."""
    with torch.no_grad():
        if isinstance(noise, Tensor):
            return (perturbed(distribution, noise),)
        z = perturbed(distribution, noise[0])
        return z, conditional(distribution, hard(distribution, z), noise[1])


def control_gradient(
    distribution: Distribution, z: tuple[Tensor, ...], temperature: float | Tensor, slope: tuple[Tensor, ...]
) -> Tensor:
    """Return grad c(z) - grad c(z~) by the logits, [n, *logits, m], from the slopes of c by relaxed z (and z~)."""
    remains = held(distribution, z[-1])
    if len(z) == 1:
        return pulled_back(distribution, z[0], temperature, slope[0], remains)
    return pulled_back(distribution, z[0], temperature, slope[0]) - pulled_back(
        distribution, z[1], temperature, slope[1], 1 - remains
    )
