"""Large tensors piece by piece: what a CPU's cache holds stays there from one pass over it to the next."""

import torch

PIECE = 2**16  # numbers


def is_cut(tensor: torch.Tensor) -> bool:
    """Return whether to work on a tensor piece by piece: on a CPU, where it has more than one piece."""
    return tensor.numel() > PIECE and tensor.device.type == "cpu"


def cut(shape: torch.Size) -> tuple[int, int]:
    """Return the dimension to cut a tensor of this shape along, the last one only where it is alone, and how far."""
    dim = max(range(max(1, len(shape) - 1)), key=lambda i: shape[i])
    return dim, max(1, shape[dim] * PIECE // shape.numel())
