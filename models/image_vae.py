"""What the variational autoencoders of binary images share: everything but their two networks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution
from torch.nn import functional as F

from models.bernoulli import bernoulli_log_prob
from models.latents import CategoricalLatents, latents_of
from models.networks import KeyQuery, Style, check_sizes
from models.template import LogDensities, Output, Template

# The logit of a pixel that is the same in all training points is that of this probability, or of one minus it.
_LEAST_MEAN = 1e-3


class Prior(nn.Module):
    """The learnt `features` of p(z), a row as the inference network gives of q(z|x); they start at zero."""

    def __init__(self, num_features: int):
        super().__init__()
        self.features = nn.Parameter(torch.zeros(num_features))


class ImageVAE(Template, ABC):
    """p(z) p(x|z) on binary images x of a `shape`, with one layer of N = `latents` latents z of one kind.

    x is [batch, *shape] or [batch, D]. The inference network maps x - mean_x, `mean_x` [D] being the mean of the
    training points, to the features of q(z|x); it runs once for each observation. z has one layer [mc, iw, batch, N],
    for categories one-hot [mc, iw, batch, N, C]; the generative network sees it flat.

    latent: "normal", "bernoulli", "categorical" (`categories` is C) or "subset" (`chosen` is k); what each is, and what
    `reparam` makes of the discrete ones, in models.latents. `temperature` is that of relaxations: a number that
    training may change.
    learn_prior: p(z) has parameters, `prior`, and not N(0, I), Bernoulli(1/2) or uniform categories.
    keys: 0, or the dimension in which q's logits of categories are inner products of a query and learnt keys.
    activation, normalization, dropout: inside of the networks, as models.networks.Style says.

    Dropout has one mask for each observation in the inference network, which all its particles share, and one for each
    particle in the generative one. `log_prob` draws masks of its own.

    Raises ValueError for options that make no model. Proof: tests/models/test_vae.py.
    """

    mean_x: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        latent: str,
        latents: int,
        categories: int,
        temperature: float,
        learn_prior: bool,
        keys: int,
        style: Style,
        chosen: int = 1,
    ):
        super().__init__()
        self.shape = check_sizes("shape", shape)
        if not temperature > 0:
            raise ValueError(f"temperature = {temperature}, expected a number above 0")
        if keys < 0:
            raise ValueError(f"keys = {keys}, expected a dimension, or 0 for none")
        if keys and latent != "categorical":
            raise ValueError(f"keys = {keys}: only categorical latents have keys, not {latent} ones; use keys=0")
        self.latents = latents_of(latent, latents, categories, chosen)
        self.temperature = temperature
        self.num_pixels, self._num_keys = prod(self.shape), keys
        self.register_buffer("mean_x", torch.zeros(self.num_pixels))
        self.inference_network = self._inference_network(style)
        self.generative_model = self._generative_model(style)
        self.prior = Prior(self.latents.num_features) if learn_prior else None

    @abstractmethod
    def _inference_network(self, style: Style) -> nn.Module:
        """Return a network from x [batch, D] to features [batch, num_features], ending in `_features`."""

    @abstractmethod
    def _generative_model(self, style: Style) -> nn.Module:
        """Return a network from z [..., prod(latents.shape)] to the logits of x, [..., D]."""

    @property
    @abstractmethod
    def _bias(self) -> Tensor:
        """The bias of the logits of x, [D]."""

    def _features(self, in_features: int) -> nn.Module:
        """Return the last layer of the inference network."""
        if self._num_keys and isinstance(self.latents, CategoricalLatents):
            return KeyQuery(in_features, self.latents.num_latents, self.latents.num_categories, self._num_keys)
        return nn.Linear(in_features, self.latents.num_features)

    def adapt(self, x: Tensor) -> None:
        """Centre the inference network's input at the mean of x [N, ...]; let z = 0 give about that mean."""
        with torch.no_grad():
            self.mean_x.copy_(self._flat(x).mean(0))
            self._bias.copy_(self.mean_x.clamp(_LEAST_MEAN, 1 - _LEAST_MEAN).logit())

    def forward(self, x: Tensor, reparam: bool = False, sample_shape: tuple[int, int] = (1, 1)) -> Output:
        """Draw z [mc, iw, batch, ...] with its log-densities; under `reparam` discrete latents are relaxed."""
        x, prior = self._flat(x), self._prior_features
        features = self.inference_network(x - self.mean_x)
        z, log_pz, log_qz, point = self.latents.draw(features, prior, sample_shape, reparam, self.temperature)
        temperature = self.temperature if reparam else None

        def stopped(alias: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
            at = alias(point)
            log_pz, log_qz = (self.latents.density(row, at, temperature) for row in (prior, features.detach()))
            return log_pz, log_qz

        return Output(
            {
                "log_px": self._log_px(z, x),
                "log_pz": (log_pz,),
                "log_qz": (log_qz,),
                "z": [z],
                "reparam": reparam,
            },
            {
                "stopped": lambda _: stopped,
                "px": lambda _: self._px(z),
                "pz": lambda _: [self.latents.distribution(self._or_zeros(prior, x), temperature)],
                "qz": lambda _: [self.latents.distribution(features, temperature)],
            },
        )

    def log_prob(self, x: Tensor, z: Sequence[Tensor], stop_phi: bool = False) -> LogDensities:
        """Return the log-densities of x and of the given z, one layer [mc, iw, batch, ...], relaxed or not."""
        (layer,), x = z, self._flat(x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not stop_phi):
            features = self.inference_network(x - self.mean_x)
        return LogDensities(
            self._log_px(layer, x),
            (self.latents.log_prob(self._prior_features, layer, self.temperature),),
            (self.latents.log_prob(features, layer, self.temperature),),
        )

    def sample_from_prior(self, bs: int) -> dict[str, Any]:
        """Draw `bs` z [bs, ...] from the prior; return `px` (over x [bs, *shape]), `z` and `pz`."""
        pz = self.latents.distribution(self._or_zeros(self._prior_features, self.mean_x).expand(bs, -1))
        z = pz.sample()
        return {"px": self._px(z), "z": [z], "pz": [pz]}

    def layer_posterior(self, x: Tensor, z: Sequence[Tensor] = ()) -> Distribution:  # noqa: ARG002 (one layer)
        """Return q(z|x), [batch, N]."""
        return self.latents.distribution(self.inference_network(self._flat(x) - self.mean_x))

    def layer_likelihood(self, x: Tensor, z: Sequence[Tensor]) -> Tensor:
        """Return log p(x|z) [..., batch] for z [..., batch, *shape], or [..., 1, *shape] where all x share it."""
        (layer,), x = z, self._flat(x)
        logits = self._logits(layer)
        if logits.shape[-2] == 1 < len(x):  # a product in place of as many logits as values and observations
            return torch.matmul(logits.squeeze(-2), x.t()) - F.softplus(logits).sum(-1)
        return bernoulli_log_prob(logits, x)

    def layer_prior(self) -> Distribution:
        """Return p(z), [N]."""
        return self.latents.distribution(self._or_zeros(self._prior_features, self.mean_x))

    @property
    def _prior_features(self) -> Tensor | None:
        return None if self.prior is None else self.prior.features

    def _or_zeros(self, prior: Tensor | None, like: Tensor) -> Tensor:
        return like.new_zeros(self.latents.num_features) if prior is None else prior

    def _logits(self, z: Tensor) -> Tensor:
        return self.generative_model(z.flatten(-len(self.latents.shape)))

    def _log_px(self, z: Tensor, x: Tensor) -> Tensor:
        """Return log p(x|z) [mc, iw, batch] of x [batch, D]."""
        return bernoulli_log_prob(self._logits(z), x)

    def _px(self, z: Tensor) -> Bernoulli:
        return Bernoulli(logits=self._logits(z).unflatten(-1, self.shape), validate_args=False)

    def _flat(self, x: Tensor) -> Tensor:
        """Return x as [batch, D]; raise ValueError where it has another shape than the model's."""
        if x.shape[1:] not in (self.shape, (self.num_pixels,)) or x.dim() < 2:
            raise ValueError(
                f"{type(self).__name__} was given x of shape {list(x.shape)}, expected [batch, "
                f"{', '.join(map(str, self.shape))}] or [batch, {self.num_pixels}]"
            )
        return x.reshape(len(x), self.num_pixels)
