"""Draw particles from any model, and their log-densities in one shape: [mc, iw, batch]."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributions import Distribution

KEYS = ("px", "z", "qz", "pz")
GRADIENT_OPTIONS = ("reparam", "zgrads")


class Particles(NamedTuple):
    """Particles z ~ q(z|x): their log-densities, each [mc, iw, batch], z's layer by layer, and the model's output."""

    log_px: Tensor
    log_pz: tuple[Tensor, ...]
    log_qz: tuple[Tensor, ...]
    output: Mapping[str, Any]

    @property
    def with_gradient(self) -> tuple[bool, ...]:
        """Whether each layer of z carries a gradient (a model whose z is costly says so of all under `reparam`)."""
        if "reparam" in self.output:
            return (self.output["reparam"],)
        return tuple(layer.requires_grad for layer in _layers(self.output["z"]))


def draw_particles(model: nn.Module, x: Tensor, mc: int, iw: int, reparam: bool = False) -> Particles:
    """Draw mc x iw particles for each row of x [batch, ...] and return their log-densities.

    A model whose forward names `sample_shape` sees x once; any other sees x repeated as [mc*iw*batch, ...] (the batch
    varies fastest). `reparam` is handed to the forward under the names that it takes: `zgrads`, `reparam`, or both
    where it takes **kwargs.

    Raises ValueError, naming the model's class, when its output lacks a key or has log-densities of a wrong shape.
    """
    leading: tuple[int, ...]
    names_sample_shape, options = _interface(type(model).forward)
    arguments: dict[str, Any] = dict.fromkeys(options, reparam)
    if names_sample_shape:
        output = model(x, sample_shape=(mc, iw), **arguments)
        if "log_px" in output:
            return Particles(output["log_px"], output["log_pz"], output["log_qz"], output)
        values, leading = x.expand(mc, iw, *x.shape), (mc, iw, x.shape[0])
    else:
        values = x.expand(mc, iw, *x.shape).reshape(-1, *x.shape[1:])
        leading = (values.shape[0],)
        output = model(values, **arguments)

    name = type(model).__name__
    _check_output(output, name)
    shape = (mc, iw, x.shape[0])

    def by_layer(key: str) -> tuple[Tensor, ...]:
        pairs = zip(_layers(output[key]), _layers(output["z"]), strict=True)
        return tuple(
            _log_prob(distribution, z, leading, f"{name}: {key}[{i}]").reshape(shape)
            for i, (distribution, z) in enumerate(pairs)
        )

    log_px = _log_prob(output["px"], values, leading, f"{name}: px").reshape(shape)
    return Particles(log_px, by_layer("pz"), by_layer("qz"), output)


@lru_cache
def _interface(forward: Callable) -> tuple[bool, tuple[str, ...]]:
    """Return whether `forward` names `sample_shape`, and which of the gradient options it takes."""
    parameters = inspect.signature(forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return "sample_shape" in parameters, GRADIENT_OPTIONS
    return "sample_shape" in parameters, tuple(option for option in GRADIENT_OPTIONS if option in parameters)


def _check_output(output: Any, model: str) -> None:
    if not isinstance(output, Mapping):
        raise ValueError(f"{model}: forward returned {type(output).__name__}, expected a dict with {', '.join(KEYS)}")
    missing = [key for key in KEYS if key not in output]
    if missing:
        raise ValueError(f"{model}: forward's output lacks {', '.join(map(repr, missing))}; it has {sorted(output)}")
    layers = [len(_layers(output[key])) for key in ("z", "qz", "pz")]
    if len(set(layers)) > 1:
        raise ValueError(
            f"{model}: forward returned {layers[0]} z, {layers[1]} qz, {layers[2]} pz; one of each a layer"
        )


def _layers(value: Any) -> Sequence[Any]:
    """Return the layers of z, qz or pz; a model of one layer may give it without a list."""
    return value if isinstance(value, list | tuple) else (value,)


def _log_prob(distribution: Distribution, value: Tensor, leading: tuple[int, ...], name: str) -> Tensor:
    """Return log p(value), summed over all dimensions after `leading`."""
    dims = len(leading)
    shape = (*getattr(distribution, "batch_shape", ()), *getattr(distribution, "event_shape", ()))
    if value.shape != shape and shape[:dims] == leading and value.numel() == prod(shape):
        value = value.reshape(shape)  # images given as [batch, 1, 28, 28] to a p(x|z) over [batch, 784]
    log_prob = distribution.log_prob(value)
    # More log-densities than values: two batches that were meant to be one have been broadcast against each other.
    if log_prob.shape[:dims] != leading or log_prob.numel() > value.numel():
        raise ValueError(
            f"{name}.log_prob of a value {list(value.shape)} is {list(log_prob.shape)}, expected {list(leading)} "
            f"followed by what is summed over; the distribution's own shape is {list(shape)}"
        )
    return log_prob.flatten(dims).sum(-1) if log_prob.dim() > dims else log_prob
