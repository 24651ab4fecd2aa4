"""The discrete variational autoencoder of the tutorial on stochastic graphs (van Krieken et al. 2021)."""

from collections.abc import Sequence

from torch import Tensor

from models.vae import VAE


class DiscreteVAE(VAE):
    """Two categorical latents of ten values, 784-512-256 in the encoder and in reverse in the decoder, with ReLU.

    It starts as torch.nn.Linear does, from pixels of probability about one half (784 ln 2 nats), whatever the training
    points are: `adapt` changes nothing. x may be grey, in [0, 1]: log p(x|z) is then minus the cross-entropy.
    """

    def __init__(
        self,
        shape: Sequence[int] = (1, 28, 28),
        latents: int = 2,
        categories: int = 10,
        hidden: Sequence[int] = (512, 256),
    ):
        super().__init__(shape, "categorical", latents, categories, hidden=hidden, activation="relu")

    def adapt(self, x: Tensor) -> None:
        """Change nothing."""
