"""RELAX and LAX: the score function with a trained network as its control variate."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, OneHotCategorical

from estimators.nodes.base import Method, Sample, base_of, gradient_of_logits, with_gradient
from estimators.nodes.parts import beside, score_of, training_term, variance_objective
from estimators.nodes.pathwise import is_reparameterised
from estimators.nodes.rebar import check_temperature, control_gradient, relaxation_noise, relaxations
from estimators.nodes.relaxation import hard, relaxed


class Learnt(Method):
    """What RELAX and LAX have in common: the network c, from a point's `in_dim` numbers to one.

    in_dim: the numbers in one sample of one item of the plates: variables times categories. network: c, a module from
    [..., in_dim] to [..., 1], smooth if it is to be trained; by default one hidden layer of `hidden` tanh units whose
    output starts at zero, where the method is the score function.
    """

    def __init__(self, plate_name: str, in_dim: int, n_samples: int, hidden: int, network: nn.Module | None):
        super().__init__(plate_name, n_samples)
        if in_dim < 1:
            raise ValueError(f"{type(self).__name__}({plate_name!r}): in_dim = {in_dim}, expected at least 1")
        self.in_dim = in_dim
        self.network = _network(in_dim, hidden) if network is None else network

    def values(self, sample: Sample, x: Tensor) -> Tensor:
        """Return c of points x [n, *plates, ...], [n, *plates]; raise ValueError where they are not in_dim numbers."""
        flat = x.flatten(1 + sample.num_plates) if x.dim() > 1 + sample.num_plates else x.unsqueeze(-1)
        if flat.shape[-1] != self.in_dim:
            raise ValueError(
                f"node {self.plate_name!r}: {type(self).__name__} was given in_dim = {self.in_dim}, and a sample has "
                f"{flat.shape[-1]} numbers"
            )
        first = next(self.network.parameters(), flat)
        return self.network(flat.to(first.dtype)).squeeze(-1).to(x.dtype)

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{self.plate_name!r}, in_dim={self.in_dim}, n_samples={self.n_samples}"


class RELAX(Learnt):
    """(f(b) - c(z~)) grad log q(b) + grad c(z) - grad c(z~), c a network of relaxed(z) (Grathwohl et al. 2018).

    z and z~ are REBAR's (`coupled`: z~ = z, only its gradient differs); points [n, *plates, *rest, *event]: b alone.
    backward() gives the network's parameters the gradient of the variance, for an optimiser that has
    `method.parameters()`.

    Asks costs for their values at the samples, nothing else. Unbiased whatever the network. Proof:
    tests/estimators/nodes/test_enumeration.py, test_trained.py.
    """

    source = "Grathwohl et al. 2018"
    takes = (Bernoulli, OneHotCategorical, Categorical)

    def __init__(
        self,
        plate_name: str,
        in_dim: int,
        n_samples: int = 1,
        temperature: float = 0.5,
        coupled: bool = True,
        hidden: int = 16,
        network: nn.Module | None = None,
    ):
        super().__init__(plate_name, in_dim, n_samples, hidden, network)
        check_temperature(self, temperature)
        self.temperature, self.coupled = temperature, coupled

    def draw(self, distribution: Distribution, num_plates: int) -> Any:  # noqa: ARG002
        """Return the noise of z, and a uniform v for z~ unless it is coupled; each [n, *logits]."""
        return relaxation_noise(distribution, self.n_samples, self.coupled)

    def place(self, distribution: Distribution, num_plates: int, noise: Any) -> Sample:
        """Return b; `noise` of the sample is (z,) or (z, z~)."""
        z = relaxations(distribution, noise)
        b = hard(distribution, z[0])
        points = b.argmax(-1) if isinstance(base_of(distribution), Categorical) else b
        return Sample(distribution, num_plates, points, z)

    def control_variate(self, sample: Sample, cost: Tensor) -> Tensor | None:
        """Return zeros with the estimate, and the gradient of the network's parameters, as their gradient."""
        if not torch.is_grad_enabled():
            return None
        distribution, z = sample.distribution, sample.noise
        y = [relaxed(distribution, each, self.temperature).requires_grad_() for each in z]
        values = [self.values(sample, each) for each in y]
        slope = torch.autograd.grad(sum(values).sum(), y, create_graph=True)  # type: ignore[union-attr]
        score = score_of(distribution, sample.points).unsqueeze(-1)
        value = beside(sample, values[-1].unsqueeze(-1))
        pathwise = control_gradient(distribution, z, self.temperature, tuple(each.unsqueeze(-1) for each in slope))
        coefficient = ((beside(sample, cost.detach()) - value) * score + pathwise).mean(0)
        training = training_term(self.parameters(), variance_objective(coefficient, sample.num_plates))
        return gradient_of_logits(sample, coefficient.detach(), type(self).__name__) + training


class LAX(Learnt):
    """(f(x) - c(x)) grad log q(x) + grad c(x(eps, phi)), c a network, for nodes that can be reparameterised.

    (Grathwohl et al. 2018.) Points [n, *plates, *rest, *event], without the pathwise gradient. backward() gives the
    network's parameters the gradient of the variance, for an optimiser that has `method.parameters()`.

    Asks costs for their values at the samples, nothing else. Unbiased whatever the network. Proof:
    tests/estimators/nodes/test_enumeration.py, test_trained.py.
    """

    source = "Grathwohl et al. 2018"

    def __init__(
        self, plate_name: str, in_dim: int, n_samples: int = 1, hidden: int = 16, network: nn.Module | None = None
    ):
        super().__init__(plate_name, in_dim, n_samples, hidden, network)

    def check(self, distribution: Distribution) -> None:
        """Raise ValueError for a distribution without rsample."""
        if not is_reparameterised(distribution):
            raise ValueError(
                f"node {self.plate_name!r}: LAX takes what can be reparameterised, not {type(distribution).__name__}; "
                "use RELAX for a discrete node"
            )

    def draw(self, distribution: Distribution, num_plates: int) -> Tensor:  # noqa: ARG002
        """Draw x, with its gradient."""
        return distribution.rsample(torch.Size([self.n_samples]))

    def place(self, distribution: Distribution, num_plates: int, noise: Tensor) -> Sample:
        """Return x without its gradient, which `noise` of the sample keeps."""
        return Sample(distribution, num_plates, noise.detach(), noise)

    def control_variate(self, sample: Sample, cost: Tensor) -> Tensor | None:
        """Return zeros with the estimate, and the gradient of the network's parameters, as their gradient."""
        if not torch.is_grad_enabled():
            return None
        log_prob = sample.log_prob
        if not log_prob.requires_grad:
            return None
        x = sample.points.requires_grad_() if not sample.points.requires_grad else sample.points
        value = self.values(sample, x)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        factor = cost.detach() - value.unsqueeze(-1)
        name, n = type(self).__name__, self.n_samples
        objective = self._variance(sample, log_prob, factor, slope)
        pathwise = sample.sum_rest(with_gradient(sample.noise, slope.detach(), name))
        score = with_gradient(log_prob.unsqueeze(-1), factor.detach(), name)
        return (score + pathwise.unsqueeze(-1)).sum(0) / n + training_term(self.parameters(), objective)

    def _variance(self, sample: Sample, log_prob: Tensor, factor: Tensor, slope: Tensor) -> Tensor:
        """Return the squared norm of the gradient by the distribution's own parameters, the mean over plates."""
        parameters = [each for each in _parameters(sample.distribution) if each.requires_grad]
        total = slope.new_zeros(())
        if not parameters:
            return total
        for each in factor.unbind(-1):
            surrogate = ((each * log_prob).sum() + (slope * sample.noise).sum()) / self.n_samples
            found = torch.autograd.grad(surrogate, parameters, create_graph=True, allow_unused=True)
            total = total + sum(grad.square().sum() for grad in found if grad is not None)
        return total / max(1, sample.distribution.batch_shape[: sample.num_plates].numel())


def _parameters(distribution: Distribution) -> Iterator[Tensor]:
    """Yield the parameters that a distribution was built of, and those of the distributions that it is made of."""
    held = vars(distribution)
    yield from (held[name] for name in distribution.arg_constraints if isinstance(held.get(name), Tensor))
    for part in held.values():
        if isinstance(part, Distribution):
            yield from _parameters(part)


def _network(in_dim: int, hidden: int) -> nn.Module:
    last = nn.Linear(hidden, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(in_dim, hidden), nn.Tanh(), last)
