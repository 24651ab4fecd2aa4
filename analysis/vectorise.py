"""What lets a model written with torch.distributions run under torch.func.vmap."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode

_ALLOCATIONS = (torch.empty, torch.empty_like, Tensor.new_empty, Tensor.new)


class _ReplicateOperations(TorchFunctionMode):
    """Answers in vmap's terms the calls of torch.distributions that vmap refuses, or runs one replicate at a time.

    torch.distributions draws normal, uniform and exponential noise by filling a newly allocated tensor in place. vmap
    cannot fill a tensor that all replicates share, so every replicate gets new tensors of its own. `one_hot`, which
    reads its input's values, becomes a comparison with the classes, and `clamp_` its two halves.
    """

    def __init__(self, replicate: Tensor):
        self.replicate = replicate

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is one_hot:
            return _one_hot(*args, **kwargs)
        if func is Tensor.clamp_:
            return _clamp_(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _ALLOCATIONS and not result.requires_grad and "out" not in kwargs:
            # Tensor.new also copies given values: only sizes ask for an empty tensor.
            if func is Tensor.new and not all(isinstance(size, int | Size) for size in args[1:]):
                return result
            return self.replicate.new_empty(result.shape, dtype=result.dtype, device=result.device)
        return result


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:
        return one_hot(tensor, num_classes)
    return (tensor.unsqueeze(-1) == torch.arange(num_classes, device=tensor.device)).long()


def _clamp_(tensor: Tensor, min: Any = None, max: Any = None) -> Tensor:
    if min is not None:
        tensor.clamp_min_(min)
    return tensor if max is None else tensor.clamp_max_(max)


@contextmanager
def distributions_under_vmap(replicate: Tensor) -> Iterator[None]:
    """Let torch.distributions run inside a function that vmap maps, with independent noise a replicate.

    `replicate`: any argument of that function over which vmap maps. Argument validation, which branches on values, is
    off inside and as it was afterwards. In-place writes to new tensors become possible too.
    """
    validate = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        with _ReplicateOperations(replicate):
            yield
    finally:
        Distribution.set_default_validate_args(validate)


class LargestTensor(TorchFunctionMode):
    """Notes the bytes of the largest tensor that any call in its scope returns, as `nbytes`."""

    def __init__(self) -> None:
        self.nbytes = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            # Inside __torch_function__ the mode is off: reading the size does not come back here.
            self.nbytes = max(self.nbytes, result.nbytes)
        return result
