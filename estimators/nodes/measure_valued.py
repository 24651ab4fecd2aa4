"""Measure-valued gradients: the derivative of a density as the difference of two others."""

import math

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Exponential, Normal, Poisson

from estimators.nodes.base import Method, Sample, base_of, with_gradient
from estimators.nodes.parts import weights_of


class MeasureValued(Method):
    """c (f(x+) - f(x-)) for each variable and parameter, the other variables as drawn (Mohamed et al. 2020, section 6).

    x+ and x- are drawn from the positive and the negative part of d q / d parameter, coupled by the noise they share:

        Normal, loc       c = 1 / (scale sqrt(2 pi)),  x+- = loc +- scale w,  w Weibull(sqrt 2, 2)
        Normal, scale     c = 1 / scale,  x+ = loc + scale m,  m double-sided Maxwell;  x- = loc + scale m u,  u uniform
        Exponential, rate c = 1 / rate,  x+ = e / rate,  x- = (e + e') / rate
        Poisson, rate     c = 1,  x+ = x + 1,  x- = x
        Bernoulli, probs  c = 1,  x+ = 1,  x- = 0

    D variables take n (1 + 2 D) costs, of a Normal n (1 + 4 D). Points in this number: all x, then, with weight 0,
    those with one variable replaced, [parts, D, n]. Asks costs for their values at possible samples, nothing else.
    Unbiased. Proof: tests/estimators/nodes/test_trained.py.
    """

    source = "Mohamed et al. 2020"
    takes = (Normal, Exponential, Poisson, Bernoulli)

    def draw(self, distribution: Distribution, num_plates: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return x and the replacements, [parts, n, *batch], two parts a parameter: positive, negative."""
        x = distribution.sample(torch.Size([self.n_samples]))
        return x, _parts(base_of(distribution), x)

    def place(self, distribution: Distribution, num_plates: int, noise: tuple[Tensor, Tensor]) -> Sample:
        """Return x, and x with each variable replaced by each part."""
        x, parts = noise
        kept = 1 + num_plates
        flat = x.reshape(*x.shape[:kept], -1)
        flat_parts = parts.reshape(len(parts), *flat.shape)
        eye = torch.eye(flat.shape[-1], dtype=torch.bool, device=x.device)
        eye = eye.reshape(-1, *(1,) * kept, flat.shape[-1])
        replaced = torch.where(eye, flat_parts.unsqueeze(1), flat)  # [parts, D, n, *plates, D]
        points = torch.cat([x, replaced.reshape(-1, *x.shape[1:])])
        return Sample(distribution, num_plates, points)

    def weigh(self, sample: Sample) -> Tensor:
        """Return 1 / n for x and 0 for the others."""
        return weights_of(sample, self.n_samples)

    def control_variate(self, sample: Sample, cost: Tensor) -> Tensor:
        """Return zeros with the estimate as their gradient, [*plates, m]."""
        base = base_of(sample.distribution)
        parameters = _parameters(base)
        plates, num_plates = sample.points.shape[1 : 1 + sample.num_plates], sample.num_plates
        num = sample.points.shape[1 + num_plates :].numel()
        cost = cost.detach().expand(-1, *plates, -1)[self.n_samples :]
        costs = cost.unflatten(0, (len(parameters), 2, num, self.n_samples))
        difference = (costs[:, 0] - costs[:, 1]).mean(2).movedim(1, -2)  # [parameters, *plates, D, m]
        total = cost.new_zeros(())
        for (parameter, factor), each in zip(parameters, difference, strict=True):
            slope = factor.detach().unsqueeze(-1) * each.reshape(*parameter.shape, -1)
            zeros = with_gradient(parameter.unsqueeze(-1), slope, type(self).__name__)
            total = total + (zeros.flatten(num_plates, -2).sum(-2) if zeros.dim() > num_plates + 1 else zeros)
        return total


def _parameters(base: Distribution) -> list[tuple[Tensor, Tensor]]:
    """Return the parameters by which the parts are taken, and the factors c, [*batch] each."""
    if isinstance(base, Normal):
        return [(base.loc, 1 / (base.scale * math.sqrt(2 * math.pi))), (base.scale, 1 / base.scale)]
    if isinstance(base, Exponential):
        return [(base.rate, 1 / base.rate)]
    parameter = base.rate if isinstance(base, Poisson) else base.probs  # type: ignore[attr-defined]
    return [(parameter, torch.ones_like(parameter))]


@torch.no_grad()
def _parts(base: Distribution, x: Tensor) -> Tensor:
    """Return draws from the positive and the negative part of each parameter, [2 parameters, *shape of x]."""
    if isinstance(base, Normal):
        weibull = (2 * torch.empty_like(x).exponential_()).sqrt()
        # The norm of three standard Normals has the density of |m|.
        maxwell = torch.randn(3, *x.shape, dtype=x.dtype, device=x.device).norm(dim=0)
        maxwell = torch.where(torch.rand_like(x) < 0.5, maxwell, -maxwell)
        offsets = torch.stack([weibull, -weibull, maxwell, maxwell * torch.rand_like(x)])
        return base.loc + base.scale * offsets
    if isinstance(base, Exponential):
        first, second = torch.empty(2, *x.shape, dtype=x.dtype, device=x.device).exponential_()
        return torch.stack([first, first + second]) / base.rate
    if isinstance(base, Poisson):
        return torch.stack([x + 1, x])
    return torch.stack([torch.ones_like(x), torch.zeros_like(x)])
