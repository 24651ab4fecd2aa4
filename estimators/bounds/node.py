"""The methods for single stochastic nodes (estimators/nodes) as estimators of the ELBO's gradient."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, OneHotCategorical, kl_divergence

from estimators.bounds.base import ElboEstimator, Estimate
from estimators.bounds.diagnostics import NAMES, Diagnostics
from estimators.nodes.base import Method, Sample
from models.particles import Particles, draw_particles
from models.template import Template


class NodeEstimator(ElboEstimator):
    """The gradient of the ELBO by a method for one stochastic node, applied to each layer of z.

    The layers are drawn one after the other, the first with K = iw samples for each observation, any other with
    `others`, the fewest that the method can do with, for each sample of the one before. A layer has credit for the
    costs that depend on it and for no others: with a_l the surrogate of all that follows the layers before l,

        a_l = beta (-H[q(z_l)]) + estimate(-log p(v_l | z_l) + a_{l+1}),    the loss being a_1,

    v_1 being x, v_l the layer z_{l-1}. Entropies, and in the last layer KL(q(z_L) | p(z_L)) in place of -H, are those
    of the distributions, not of samples. The parameters of p get the gradient of the costs at the sampled points.

    A model says what its layers are by `layer_posterior`, `layer_likelihood` and `layer_prior`; one that does not is
    refused, as are distributions that the method does not take. Proof: tests/estimators/test_node_estimators.py.
    """

    min_particles: ClassVar[int] = 1
    others: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.first, self.rest = self.method("z", self.iw), self.method("z", self.others)

    @abstractmethod
    def method(self, name: str, num: int) -> Method:
        """Return the method for a node of this name, with `num` samples."""

    def method_of(self, layer: int, q: Distribution, num_plates: int) -> Method:  # noqa: ARG002 (for those that learn)
        """Return the method of a layer, counted from 0, whose distribution q has the batch shape [*plates, *rest]."""
        return self.rest if layer else self.first

    def forward(
        self, model: nn.Module, x: Tensor, alpha: float | None = None, beta: float | None = None
    ) -> tuple[Tensor, Diagnostics, Mapping[str, Any]]:
        """Estimate the gradient of the ELBO of x [batch, ...]; what is returned is as for every estimator.

        The diagnostics and the model's output are of K particles drawn for them alone, when they are first read.

        Raises ValueError, naming the id, for a model or a distribution that the method cannot handle.
        """
        if alpha is not None:
            self._valid_alpha(alpha)
        beta = self.beta if beta is None else self._valid_beta(beta)
        if not isinstance(model, Template) or type(model).layer_posterior is Template.layer_posterior:
            raise ValueError(
                f"{self.id}: {type(model).__name__} does not say what its layers are (layer_posterior, "
                "layer_likelihood, layer_prior); score function estimators such as rloo take it"
            )
        try:
            loss = self.surrogate(model, x, beta).mean()
        except (ValueError, NotImplementedError) as error:
            message = str(error)
            raise ValueError(message if message.startswith(self.id) else f"{self.id}: {message}") from error
        later = Later(model, x, self.num_mc, self.num_particles)
        return loss, LaterDiagnostics(later), LaterOutput(later)

    def estimate(self, particles: Particles, alpha: float, beta: float) -> Estimate:
        """Raise NotImplementedError: the points of a method are no particles."""
        raise NotImplementedError(f"{self.id} draws for itself")

    def surrogate(self, model: Template, x: Tensor, beta: float = 1.0) -> Tensor:
        """Return the estimate of -ELBO for each observation, [mc, batch], whose gradient is that of the estimate."""
        first = model.layer_posterior(x)
        copies = first.expand(torch.Size([self.num_mc, *first.batch_shape]))
        return self.layer_surrogate(model, x, [], copies, beta)

    def layer_surrogate(
        self, model: Template, x: Tensor, z: list[Tensor], q: Distribution, beta: float = 1.0
    ) -> Tensor:
        """Return a_l, [*plates], for q(z_l) [*plates, *rest], the plates being the layers' samples, mc and batch."""
        num_plates = len(z) + 2
        method = self.method_of(len(z), q, num_plates)
        method.check(q)
        sample = method.propose(q, num_plates)
        sample.key = f"layer {len(z) + 1}"
        points = [*z, sample.points]
        cost = -model.layer_likelihood(x, points) * (beta if z else 1.0)
        if len(points) < model.num_layers:
            own = -q.entropy()
            cost = cost + self.layer_surrogate(model, x, points, model.layer_posterior(x, points), beta)
        else:
            own = divergence(q, model.layer_prior())
        own = own.flatten(num_plates).sum(-1) if own.dim() > num_plates else own
        return beta * own + estimate(method, sample, cost)


def estimate(method: Method, sample: Sample, cost: Tensor) -> Tensor:
    """Return a method's surrogate [*plates] of costs [n, *plates]."""
    return method.estimate(sample, cost.unsqueeze(-1)).squeeze(-1)


def divergence(q: Distribution, p: Distribution) -> Tensor:
    """Return KL(q | p) of each variable: the batch shape of q.

    That of Bernoulli and of categories by formulae without branches on values, which torch.func.vmap would refuse.
    """
    if isinstance(q, Bernoulli) and isinstance(p, Bernoulli):
        # log p(z) is linear in z, so its mean is that at the mean of z.
        return -q.entropy() - (p.logits * q.probs - nn.functional.softplus(p.logits))
    if isinstance(q, Categorical | OneHotCategorical) and isinstance(p, Categorical | OneHotCategorical):
        return (q.probs * (q.logits - p.logits)).sum(-1)
    return kl_divergence(q, p)


class Later:
    """Particles of a model that are drawn when they are first asked for; torch's random state is left as it is."""

    def __init__(self, model: nn.Module, x: Tensor, mc: int, iw: int):
        self._arguments = (model, x, mc, iw)
        self.num_particles = iw

    @cached_property
    def particles(self) -> Particles:
        """The particles, without a gradient."""
        x = self._arguments[1]
        with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            return draw_particles(*self._arguments)


class LaterDiagnostics(Diagnostics):
    """The diagnostics of particles that are not drawn yet."""

    def __init__(self, later: Later):
        self._later = later

    @cached_property
    def _values(self) -> dict[str, Tensor]:
        found = Diagnostics(self._later.particles, self._later.num_particles)
        return {name: found[name] for name in NAMES}


class LaterOutput(Mapping[str, Any]):
    """The output of a model that has not run yet."""

    def __init__(self, later: Later):
        self._later = later

    def __getitem__(self, key: str) -> Any:
        return self._later.particles.output[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._later.particles.output)

    def __len__(self) -> int:
        return len(self._later.particles.output)
