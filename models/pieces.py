"""Large tensors piece by piece: what a CPU's cache holds stays there from one pass over it to the next."""

import torch

PIECE = 2**16  # numbers


def is_cut(tensor: torch.Tensor) -> bool:
    """Return whether to work on a tensor piece by piece: on a CPU, where it has rows, and more than a piece of them."""
    return tensor.numel() > PIECE and tensor.dim() > 1 and tensor.device.type == "cpu"


def cut(shape: torch.Size) -> tuple[int, int]:
    """Return the dimension, any but the last one, to cut a tensor of this shape along, and how far a piece reaches."""
    dim = max(range(len(shape) - 1), key=lambda i: shape[i])
    return dim, max(1, shape[dim] * PIECE // shape.numel())
