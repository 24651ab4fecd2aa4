"""The variational autoencoder of convolutional networks."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn

from models.image_vae import ImageVAE
from models.networks import ConvolutionalPixels, Style, check_sizes


class ConvVAE(ImageVAE):
    """A convolution of 4 x 4 and stride 2 for each of `channels`, a fully connected layer of `hidden`, and back.

    Each halves the height and the width of the image, which it must divide. The options are those of `ImageVAE`.
    """

    generative_model: ConvolutionalPixels

    def __init__(
        self,
        shape: Sequence[int] = (1, 28, 28),
        latent: str = "normal",
        latents: int = 200,
        categories: int = 10,
        temperature: float = 0.5,
        learn_prior: bool = False,
        keys: int = 0,
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        activation: str = "relu",
        normalization: str = "none",
        dropout: float = 0.0,
        chosen: int = 1,
    ):
        image, factor = check_sizes("shape", shape), 2 ** len(channels)
        self._channels, (self._hidden,) = check_sizes("channels", channels), check_sizes("hidden", [hidden])
        if len(image) != 3 or image[1] % factor or image[2] % factor or not channels:
            raise ValueError(
                f"shape = {list(shape)} with {len(channels)} channels, expected [channels, height, width], the last "
                f"two multiples of {factor}, and one entry of channels or more"
            )
        self._smallest = (self._channels[-1], image[1] // factor, image[2] // factor)
        style = Style(activation, normalization, dropout)
        super().__init__(shape, latent, latents, categories, temperature, learn_prior, keys, style, chosen)

    def _inference_network(self, style: Style) -> nn.Sequential:
        layers: list[nn.Module] = [nn.Unflatten(-1, self.shape)]
        for before, after in pairwise((self.shape[0], *self._channels)):
            layers += style.after(nn.Conv2d(before, after, 4, stride=2, padding=1), after, is_convolution=True)
        layers += [nn.Flatten(), *style.hidden_layers((prod(self._smallest), self._hidden))]
        return nn.Sequential(*layers, self._features(self._hidden))

    def _generative_model(self, style: Style) -> ConvolutionalPixels:
        layers = [
            *style.hidden_layers((prod(self.latents.shape), self._hidden, prod(self._smallest))),
            nn.Unflatten(-1, self._smallest),
        ]
        *inner, last = pairwise((*reversed(self._channels), self.shape[0]))
        for before, after in inner:
            layers += style.after(nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), after, is_convolution=True)
        # Each pixel has a bias of its own.
        layers.append(nn.ConvTranspose2d(*last, 4, stride=2, padding=1, bias=False))
        return ConvolutionalPixels(nn.Sequential(*layers), self.num_pixels)

    @property
    def _bias(self) -> Tensor:
        return self.generative_model.bias
