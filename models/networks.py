"""The parts that the image models' networks are made of, chosen by option."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor, nn

from errors import near

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}
NORMALIZATIONS = ("none", "layer")


class Style:
    """What follows a linear layer or a convolution inside of a network: normalisation, activation, dropout.

    normalization: "none", or "layer", over the features of an observation (its channels and places in a convolution).
    "batch" is refused: it would make one observation's density depend on the others'.

    Raises ValueError for an activation or a normalisation of another name, and for a dropout outside of [0, 1).
    """

    def __init__(self, activation: str, normalization: str, dropout: float):
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}{near(activation, ACTIVATIONS)}")
        if normalization not in NORMALIZATIONS:
            why = " (over the batch, the densities of an observation would depend on the others)"
            raise ValueError(
                f"unknown normalization {normalization!r}; choose from {', '.join(NORMALIZATIONS)}"
                + (why if "batch" in normalization else "")
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout}, expected a number in [0, 1)")
        self.activation, self.normalization, self.dropout = activation, normalization, dropout

    def after(self, layer: nn.Module, num_features: int, is_convolution: bool = False) -> list[nn.Module]:
        """Return a layer of `num_features` outputs (channels) and what follows it."""
        modules = [layer]
        if self.normalization == "layer":
            modules.append(nn.GroupNorm(1, num_features) if is_convolution else nn.LayerNorm(num_features))
        modules.append(ACTIVATIONS[self.activation]())
        if self.dropout:
            modules.append(nn.Dropout(self.dropout))
        return modules

    def hidden_layers(self, sizes: Sequence[int]) -> nn.Sequential:
        """Return the fully connected layers between consecutive sizes."""
        layers = [self.after(nn.Linear(before, after), after) for before, after in pairwise(sizes)]
        return nn.Sequential(*(module for layer in layers for module in layer))


class KeyQuery(nn.Module):
    """Logits of N categorical variables of C values: logit_nc = <query_n(x), key_nc> / sqrt(D), with learnt `keys`.

    The inner products of attention (Vaswani et al. 2017). The query is linear in what comes in, [..., in_features].
    """

    def __init__(self, in_features: int, num_variables: int, num_categories: int, dim: int):
        super().__init__()
        self.query = nn.Linear(in_features, num_variables * dim)
        self.keys = nn.Parameter(torch.randn(num_variables, num_categories, dim))

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits [..., N * C]."""
        num_variables, _, dim = self.keys.shape
        query = self.query(h).unflatten(-1, (num_variables, dim))
        return torch.einsum("...nd,ncd->...nc", query, self.keys).flatten(-2) / sqrt(dim)


class ConvolutionalPixels(nn.Module):
    """The logits of pixels: what `network` makes of z [rows, z], plus a `bias` each.

    network: returns images [rows, channels, height, width].
    """

    def __init__(self, network: nn.Sequential, num_pixels: int):
        super().__init__()
        self.network = network
        self.bias = nn.Parameter(torch.zeros(num_pixels))

    def forward(self, z: Tensor) -> Tensor:
        """Return the logits [..., D] for z [..., z]."""
        images = self.network(z.reshape(-1, z.shape[-1]))
        return images.view(*z.shape[:-1], -1) + self.bias


def check_sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return sizes as a tuple; raise ValueError, by the option's name, where one is no positive integer."""
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ValueError(f"{name} = {list(sizes)}, expected sizes of at least 1")
    return tuple(sizes)
