"""The variational autoencoder of fully connected networks; by default the Gaussian one of Masrani et al. (2019)."""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from models.bernoulli import linear_bernoulli_log_prob
from models.image_vae import ImageVAE
from models.networks import Style, check_sizes


class VAE(ImageVAE):
    """x-H-...-H-q(z|x) and z-H-...-H-x with the widths `hidden`, in the generative network in reverse.

    The defaults are the Gaussian VAE of "The Thermodynamic Variational Objective": 200 normal latents, two hidden
    layers of 200 with tanh. The options are those of `ImageVAE`.
    """

    generative_model: nn.Sequential

    def __init__(
        self,
        shape: Sequence[int] = (1, 28, 28),
        latent: str = "normal",
        latents: int = 200,
        categories: int = 10,
        temperature: float = 0.5,
        learn_prior: bool = False,
        keys: int = 0,
        hidden: Sequence[int] = (200, 200),
        activation: str = "tanh",
        normalization: str = "none",
        dropout: float = 0.0,
        chosen: int = 1,
    ):
        self._hidden = check_sizes("hidden", hidden)
        style = Style(activation, normalization, dropout)
        super().__init__(shape, latent, latents, categories, temperature, learn_prior, keys, style, chosen)

    def _inference_network(self, style: Style) -> nn.Sequential:
        sizes = (self.num_pixels, *self._hidden)
        return nn.Sequential(*style.hidden_layers(sizes), self._features(sizes[-1]))

    def _generative_model(self, style: Style) -> nn.Sequential:
        sizes = (prod(self.latents.shape), *reversed(self._hidden))
        return nn.Sequential(*style.hidden_layers(sizes), nn.Linear(sizes[-1], self.num_pixels))

    def _log_px(self, z: Tensor, x: Tensor) -> Tensor:
        *hidden, last = self.generative_model
        h = z.flatten(-len(self.latents.shape))
        for module in hidden:
            h = module(h)
        return linear_bernoulli_log_prob(h, last.weight, last.bias, x)  # type: ignore[arg-type]

    @property
    def _bias(self) -> Tensor:
        return self.generative_model[-1].bias  # type: ignore[return-value]
