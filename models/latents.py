"""One layer of independent latent variables of one kind: draws, relaxed draws, and log-densities of q and of p.

A network, or a learnt prior, describes a layer of N latents by a row of `features`; q has one row for each observation,
p one for all of them. Samples are [mc, iw, batch, *shape], densities [mc, iw, batch], summed over the N latents.

    NormalLatents       features: means, then log-variances; shape (N,)
    BernoulliLatents    features: logits; shape (N,), samples 0 or 1
    CategoricalLatents  features: logits [N, C] in a row; shape (N, C), samples one-hot
    SubsetLatents       (models.subset_latents) features: scores; shape (N,), k of the N are 1

Each kind of discrete latent also has a relaxation at a temperature t > 0 (Maddison et al. 2017, Jang et al. 2017): with
logistic or Gumbel noise g,

    Bernoulli    y = (logits + g) / t,                 z = sigmoid(y) in (0, 1)
    categorical  y = log_softmax((logits + g) / t),    z = exp(y) inside the simplex

Proof: tests/models/test_latents.py.
"""

from abc import ABC, abstractmethod
from math import lgamma, log, pi
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Distribution,
    Normal,
    OneHotCategorical,
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
)
from torch.nn import functional as F

from errors import near
from models.bernoulli import bernoulli_log_prob, draw_bernoulli
from models.functions import sum_of_squares
from models.gaussian_mixture import draw_categorical

KINDS = ("normal", "bernoulli", "categorical", "subset")

# The least relaxed z: its inverse, a factor of gradients, and what they are multiplied with are finite in float32.
_LEAST = 1e-30


class Draw(NamedTuple):
    """Samples z [mc, iw, batch, *shape] with log p(z) and log q(z|x), each [mc, iw, batch].

    point: what `Latents.density` is a function of: z itself, or the y of a relaxed z.
    """

    z: Tensor
    log_pz: Tensor
    log_qz: Tensor
    point: Tensor


class Latents(ABC):
    """A layer of `num_latents` latents. `prior` is p's row of features [num_features], None for the one of zeros."""

    num_features: int
    shape: tuple[int, ...]

    @abstractmethod
    def draw(
        self, features: Tensor, prior: Tensor | None, num: tuple[int, int], reparam: bool, temperature: float
    ) -> Draw:
        """Draw num = (mc, iw) samples for each row of q's features [batch, num_features].

        With `reparam` they carry the gradient of the features, those of a discrete kind being relaxed.
        """

    @abstractmethod
    def density(self, features: Tensor | None, point: Tensor, temperature: float | None) -> Tensor:
        """Return the log-density, with p's or q's features, of a draw's point, relaxed at a temperature: [...]."""

    @abstractmethod
    def log_prob(self, features: Tensor | None, z: Tensor, temperature: float) -> Tensor:
        """Return the log-density of z [mc, iw, batch, *shape], with p's or q's features: [mc, iw, batch]."""

    @abstractmethod
    def distribution(self, features: Tensor, temperature: float | None = None) -> Distribution:
        """Return the distribution over z [..., *shape]; of relaxed samples where a temperature is given."""


class NormalLatents(Latents):
    """z ~ N(mean, exp(log_var)); the prior of zeros is N(0, I)."""

    def __init__(self, num_latents: int):
        self.num_latents = num_latents
        self.num_features = 2 * num_latents
        self.shape = (num_latents,)
        self._constant = -0.5 * num_latents * log(2 * pi)

    def draw(
        self,
        features: Tensor,
        prior: Tensor | None,
        num: tuple[int, int],
        reparam: bool,
        temperature: float,  # noqa: ARG002
    ) -> Draw:
        """Draw z = mean + std eps, all eps at once.

        In q's density at a reparameterised z the mean drops out, as (z - mean) / std is eps whatever the parameters.
        """
        mean, log_var = features.chunk(2, -1)
        eps = torch.randn(*num, *mean.shape, dtype=features.dtype, device=features.device)
        z = torch.addcmul(mean, (0.5 * log_var).exp(), eps)
        if not reparam:
            z = z.detach()
            return Draw(z, self.density(prior, z), self.density(features, z), z)
        log_qz = -0.5 * (sum_of_squares(eps) + log_var.sum(-1)) + self._constant
        return Draw(z, self.density(prior, z), log_qz, z)

    def log_prob(self, features: Tensor | None, z: Tensor, temperature: float) -> Tensor:  # noqa: ARG002
        """Return the density of z, which no temperature changes."""
        return self.density(features, z)

    def density(self, features: Tensor | None, point: Tensor, temperature: float | None = None) -> Tensor:  # noqa: ARG002
        """Return sum_n log N(z_n; mean_n, exp(log_var_n)) at the point z."""
        if features is None:
            return -0.5 * sum_of_squares(point) + self._constant
        mean, log_var = features.chunk(2, -1)
        standardised = (point - mean) * (-0.5 * log_var).exp()
        return -0.5 * (sum_of_squares(standardised) + log_var.sum(-1)) + self._constant

    def distribution(self, features: Tensor, temperature: float | None = None) -> Distribution:  # noqa: ARG002
        """Return a normal over z, which is relaxed by no temperature."""
        mean, log_var = features.chunk(2, -1)
        return Normal(mean, (0.5 * log_var).exp(), validate_args=False)


class DiscreteLatents(Latents):
    """What the discrete kinds share. Without `reparam` the samples are zeros and ones, and densities are probabilities.

    Under `reparam` q's density is that of the relaxed sample, and so is p's, at the same temperature: log p - log q are
    log-weights of a model whose prior is the relaxed one, unbiased for its bound (Maddison et al. 2017). It is another
    model than the discrete one, which it comes near at small temperatures. The densities given are those of y, the log
    or logit of z: log p - log q is the same for both, and that of y does not overflow where z rounds to 0 or 1.
    """

    def draw(
        self, features: Tensor, prior: Tensor | None, num: tuple[int, int], reparam: bool, temperature: float
    ) -> Draw:
        """Draw z: of zeros and ones, or relaxed, and then strictly between them."""
        if reparam:
            z, y = self._draw_relaxed(features, num, temperature)
            return Draw(_inside(z), self.density(prior, y, temperature), self.density(features, y, temperature), y)
        z = self._draw_discrete(features.detach(), num)
        return Draw(z, self.density(prior, z, None), self.density(features, z, None), z)

    def density(self, features: Tensor | None, point: Tensor, temperature: float | None) -> Tensor:
        """Return the log-probability of z, or the log-density of y at a temperature."""
        if temperature is None:
            return self._log_discrete(features, point)
        return self._log_relaxed(features, point, temperature).sum(-1)

    @abstractmethod
    def _draw_discrete(self, features: Tensor, num: tuple[int, int]) -> Tensor:
        """Return z [mc, iw, batch, *shape]."""

    @abstractmethod
    def _draw_relaxed(self, features: Tensor, num: tuple[int, int], temperature: float) -> tuple[Tensor, Tensor]:
        """Return z and y, each [mc, iw, batch, *shape]."""

    @abstractmethod
    def _log_discrete(self, features: Tensor | None, z: Tensor) -> Tensor:
        """Return log-probabilities of z, summed over the latents: [...]."""

    @abstractmethod
    def _log_relaxed(self, features: Tensor | None, y: Tensor, temperature: float) -> Tensor:
        """Return the log-densities of y, [..., N]."""


class BernoulliLatents(DiscreteLatents):
    """z_n ~ Bernoulli(logits_n); the prior of zeros is Bernoulli(1/2)."""

    def __init__(self, num_latents: int):
        self.num_latents = self.num_features = num_latents
        self.shape = (num_latents,)

    def log_prob(self, features: Tensor | None, z: Tensor, temperature: float) -> Tensor:
        """Return the probability of zeros and ones, and of any other number the density that a relaxed draw has.

        The y of a z is found to the z's own precision: in float32 there is none beyond y = 16.6, where z rounds to 1,
        nor a gradient.
        """
        is_discrete = (z == 0) | (z == 1)
        inside = _inside(z)
        relaxed = self._log_relaxed(features, inside.log() - (-inside).log1p(), temperature)
        logits = z.new_zeros(()) if features is None else features
        return torch.where(is_discrete, z * logits - _softplus(logits), relaxed).sum(-1)

    def distribution(self, features: Tensor, temperature: float | None = None) -> Distribution:
        """Return a (relaxed) Bernoulli over z; the density of y is that of the relaxed one's base distribution."""
        if temperature is None:
            return Bernoulli(logits=features, validate_args=False)
        return RelaxedBernoulli(features.new_tensor(temperature), logits=features, validate_args=False)

    def _draw_discrete(self, features: Tensor, num: tuple[int, int]) -> Tensor:
        return draw_bernoulli(features.sigmoid(), num)

    def _draw_relaxed(self, features: Tensor, num: tuple[int, int], temperature: float) -> tuple[Tensor, Tensor]:
        uniform = _uniform(num, features)
        y = (features + (uniform.log() - (-uniform).log1p())) / temperature
        return y.sigmoid(), y

    def _log_discrete(self, features: Tensor | None, z: Tensor) -> Tensor:
        if features is None:
            return z.new_full(z.shape[:-1], -self.num_latents * log(2))
        return bernoulli_log_prob(features, z)

    def _log_relaxed(self, features: Tensor | None, y: Tensor, temperature: float) -> Tensor:
        difference = -temperature * y if features is None else features - temperature * y
        return log(temperature) + difference - 2 * _softplus(difference)


class CategoricalLatents(DiscreteLatents):
    """z_n one-hot ~ Categorical(logits_n) of C categories; the prior of zeros is uniform."""

    def __init__(self, num_latents: int, num_categories: int):
        self.num_latents, self.num_categories = num_latents, num_categories
        self.num_features = num_latents * num_categories
        self.shape = (num_latents, num_categories)

    def log_prob(self, features: Tensor | None, z: Tensor, temperature: float) -> Tensor:
        """Return the probability of one-hot rows, and of any others the density that a relaxed draw has.

        The y of a z is its logarithm, where z is above 1e-30; below, it has no gradient.
        """
        is_discrete = (z == 1).any(-1)
        relaxed = self._log_relaxed(features, _inside(z).log(), temperature)
        log_probs = z.new_full((), -log(self.num_categories)) if features is None else self._log_probs(features)
        return torch.where(is_discrete, (z * log_probs).sum(-1), relaxed).sum(-1)

    def distribution(self, features: Tensor, temperature: float | None = None) -> Distribution:
        """Return a (relaxed) one-hot categorical over z; the density of y is that of the relaxed one's base."""
        logits = self._logits(features)
        if temperature is None:
            return OneHotCategorical(logits=logits, validate_args=False)
        return RelaxedOneHotCategorical(features.new_tensor(temperature), logits=logits, validate_args=False)

    def _logits(self, features: Tensor) -> Tensor:
        return features.unflatten(-1, self.shape)

    def _log_probs(self, features: Tensor) -> Tensor:
        return self._logits(features).log_softmax(-1)

    def _draw_discrete(self, features: Tensor, num: tuple[int, int]) -> Tensor:
        probabilities = self._logits(features).softmax(-1).flatten(0, 1).t()
        index = draw_categorical(probabilities, num[0] * num[1]).view(*num, len(features), self.num_latents, 1)
        return (index == torch.arange(self.num_categories, device=index.device)).to(features.dtype)

    def _draw_relaxed(self, features: Tensor, num: tuple[int, int], temperature: float) -> tuple[Tensor, Tensor]:
        gumbel = -(-_uniform(num, features).log()).log()
        y = self._logits((features + gumbel) / temperature).log_softmax(-1)
        return y.exp(), y

    def _log_discrete(self, features: Tensor | None, z: Tensor) -> Tensor:
        if features is None:
            return z.new_full(z.shape[:-2], -self.num_latents * log(self.num_categories))
        return (z.flatten(-2) * self._log_probs(features).flatten(-2)).sum(-1)

    def _log_relaxed(self, features: Tensor | None, y: Tensor, temperature: float) -> Tensor:
        difference = -temperature * y if features is None else self._logits(features) - temperature * y
        constant = lgamma(self.num_categories) + (self.num_categories - 1) * log(temperature)
        return constant + difference.sum(-1) - self.num_categories * difference.logsumexp(-1)


def latents_of(kind: str, num_latents: int, num_categories: int, num_chosen: int = 1) -> Latents:
    """Return a layer by the name of its kind: normal, bernoulli, categorical or subset (num_chosen of num_latents).

    Raises ValueError for another name, for fewer than one latent or two categories, and where as many cannot be chosen.
    """
    if num_latents < 1:
        raise ValueError(f"latents = {num_latents}, expected at least 1")
    if kind == "normal":
        return NormalLatents(num_latents)
    if kind == "bernoulli":
        return BernoulliLatents(num_latents)
    if kind == "categorical":
        if num_categories < 2:
            raise ValueError(f"categories = {num_categories}, expected at least 2")
        return CategoricalLatents(num_latents, num_categories)
    if kind == "subset":
        from models.subset_latents import SubsetLatents  # which has the classes above for its own

        return SubsetLatents(num_latents, num_chosen)
    raise ValueError(f"unknown latent {kind!r}{near(kind, KINDS)}")


def _uniform(num: tuple[int, int], features: Tensor) -> Tensor:
    """Return uniform numbers [mc, iw, *features.shape] inside (0, 1), where zero is moved to."""
    uniform = torch.rand(*num, *features.shape, dtype=features.dtype, device=features.device)
    return uniform.clamp(min=torch.finfo(uniform.dtype).eps / 4)


def _softplus(x: Tensor) -> Tensor:
    # Above 20, where torch stops by default, there is more than x to it in float64.
    return F.softplus(x, threshold=40)


def _inside(z: Tensor) -> Tensor:
    """Return z with what is 0 or 1 to rounding moved inside of (0, 1), so far that a gradient by log z is finite."""
    return z.clamp(_LEAST, 1 - torch.finfo(z.dtype).eps / 2)
