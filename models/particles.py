"""Draw particles from any model, and their log-densities in one shape: [mc, iw, batch]."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import Function
from torch.autograd.graph import get_gradient_edge
from torch.distributions import Bernoulli, Distribution, Transform
from torch.distributions.transforms import _InverseTransform

from models.template import Template

KEYS = ("px", "z", "qz", "pz")
GRADIENT_OPTIONS = ("reparam", "zgrads")


class Particles(NamedTuple):
    """Particles z ~ q(z|x): their log-densities, each [mc, iw, batch], z's layer by layer, and where they come from.

    model: what drew them; output: what its forward returned; x: the observations [batch, ...].
    """

    log_px: Tensor
    log_pz: tuple[Tensor, ...]
    log_qz: tuple[Tensor, ...]
    output: Mapping[str, Any]
    model: nn.Module
    x: Tensor

    @property
    def with_gradient(self) -> tuple[bool, ...]:
        """Whether each layer of z carries a gradient (a model whose z is costly says so of all under `reparam`)."""
        if "reparam" in self.output:
            return (self.output["reparam"],)
        return tuple(layer.requires_grad for layer in layers_of(self.output["z"]))

    @property
    def is_discrete(self) -> bool:
        """Whether some layer of z is made of integers, or of bits."""
        integers = not all(layer.is_floating_point() for layer in layers_of(self.output["z"]))
        families = layers_of(self.output["qz"]) if "qz" in self.output else ()
        return integers or any(isinstance(family, Bernoulli) for family in families)

    def first(self, num: int) -> "Particles":
        """Return the log-densities of the first `num` particles of each copy; `output` stays that of all of them."""
        if num == self.log_px.shape[1]:
            return self
        log_pz, log_qz = (tuple(layer[:, :num] for layer in layers) for layers in (self.log_pz, self.log_qz))
        return self._replace(log_px=self.log_px[:, :num], log_pz=log_pz, log_qz=log_qz)


def draw_particles(model: nn.Module, x: Tensor, mc: int, iw: int, reparam: bool = False) -> Particles:
    """Draw mc x iw particles for each row of x [batch, ...] and return their log-densities.

    A model whose forward names `sample_shape` sees x once; any other sees x repeated as [mc*iw*batch, ...] (the batch
    varies fastest). `reparam` is handed to the forward under the names that it takes: `zgrads`, `reparam`, or both
    where it takes **kwargs.

    Raises ValueError, naming the model's class, when its output lacks a key, a distribution that has a log_prob, or
    log-densities of the right shape.
    """
    leading: tuple[int, ...]
    names_sample_shape, options = _interface(type(model).forward)
    arguments: dict[str, Any] = dict.fromkeys(options, reparam)
    if names_sample_shape:
        output = model(x, sample_shape=(mc, iw), **arguments)
        if "log_px" in output:
            _check_densities(output, (mc, iw, x.shape[0]), type(model).__name__)
            return Particles(output["log_px"], output["log_pz"], output["log_qz"], output, model, x)
        values, leading = x.expand(mc, iw, *x.shape), (mc, iw, x.shape[0])
    else:
        values = x.expand(mc, iw, *x.shape).reshape(-1, *x.shape[1:])
        leading = (values.shape[0],)
        output = model(values, **arguments)

    name = type(model).__name__
    _check_output(output, name)
    shape = (mc, iw, x.shape[0])

    def by_layer(key: str) -> tuple[Tensor, ...]:
        pairs = zip(layers_of(output[key]), layers_of(output["z"]), strict=True)
        return tuple(
            log_prob_of(distribution, z, leading, f"{name}: {key}[{i}]").reshape(shape)
            for i, (distribution, z) in enumerate(pairs)
        )

    log_px = log_prob_of(output["px"], values, leading, f"{name}: px").reshape(shape)
    return Particles(log_px, by_layer("pz"), by_layer("qz"), output, model, x)


def densities_of(particles: Particles) -> list[Tensor]:
    """Return log p(x|z), log p(z) layer by layer, and log q layer by layer."""
    return [particles.log_px, *particles.log_pz, *particles.log_qz]


def with_densities(particles: Particles, densities: Sequence[Tensor]) -> Particles:
    """Return the particles with other log-densities, as `densities_of` lists them."""
    log_px, layers, num_layers = densities[0], densities[1:], len(particles.log_pz)
    return particles._replace(log_px=log_px, log_pz=tuple(layers[:num_layers]), log_qz=tuple(layers[num_layers:]))


def densities_with_stopped_q(particles: Particles, scale: Tensor | None = None) -> Particles:
    """Return the particles with log-densities in which q's own parameters are constants; z keeps its gradient.

    What is left of d log q(z|x) / d phi runs through z, between its layers too. With `scale` [mc, iw, batch], a
    constant, the gradient of a particle's log-densities by its z is multiplied by the particle's own: it reaches phi
    scaled and theta as it is. In a hierarchy that happens once on every way to phi, as the draw of a layer from the
    ones before it lies outside of what is scaled.

    A model of one layer whose forward returned `stopped` is asked for log p(z) and log q, and keeps its p(x|z).
    One whose `log_prob` takes `stop_phi` is asked for them: everything is evaluated anew at the z that were drawn.
    A model of one layer may have its forward alone: q is copied with every tensor in it detached, whatever its family.

    Raises ValueError, naming the model's class, where neither is possible: several layers, or densities without their
    distributions, and no such `log_prob`; a log q that still depends on more than z, as that of a distribution which
    hides its parameters in a function or a module; with `scale`, a p(x|z) of another tensor than the z returned.
    """
    model, name, shape = particles.model, type(particles.model).__name__, particles.log_px.shape
    names_sample_shape, _ = _interface(type(model).forward)
    layers = layers_of(particles.output["z"])
    if "stopped" in particles.output:
        log_pz, log_qz = particles.output["stopped"](lambda point: _alias(point[:, : shape[1]], scale))
        log_px = particles.log_px if scale is None else _scaled_by_z(particles.log_px, layers[0], scale, name)
        return particles._replace(log_px=log_px, log_pz=(log_pz,), log_qz=(log_qz,))
    log_prob = getattr(type(model), "log_prob", Template.log_prob)
    if _stops_phi(log_prob):
        mc, iw, batch = shape
        chosen = [z if names_sample_shape else z.unflatten(0, (mc, -1, batch)) for z in layers]
        aliases = [_alias(z[:, :iw], scale) for z in chosen]
        log_px, log_pz, log_qz = model.log_prob(particles.x, aliases, stop_phi=True)  # type: ignore[operator]
        for density in (log_px, *log_pz, *log_qz):
            if density.shape != shape:
                raise ValueError(f"{name}: log_prob returned {list(density.shape)}, expected {list(shape)} of each")
        if any(_depends_on_more(density, aliases) for density in log_qz):
            raise ValueError(f"{name}: log_prob(x, z, stop_phi=True) has log q of more than z; detach q's parameters")
        return particles._replace(log_px=log_px, log_pz=tuple(log_pz), log_qz=tuple(log_qz))

    lack = "which it lacks," if log_prob is Template.log_prob else "and its own takes no stop_phi,"
    lacking = f"{name}: only log_prob(x, z, stop_phi=False), {lack} tells q's own parameters from z"
    if len(layers) > 1:
        raise ValueError(f"{lacking} in a model of {len(layers)} layers")
    if missing := [key for key in ("qz", "pz") if key not in particles.output]:
        raise ValueError(f"{lacking} where forward returns no {' and no '.join(missing)}")
    (z,), (qz,), (pz,) = layers, layers_of(particles.output["qz"]), layers_of(particles.output["pz"])
    leading = tuple(shape) if names_sample_shape else (shape.numel(),)
    scale = None if scale is None else scale.reshape(leading)
    alias = _alias(z, scale)
    log_qz = log_prob_of(_with_constants(qz), alias, leading, f"{name}: qz[0]").reshape(shape)
    if _depends_on_more(log_qz, [alias]):
        raise ValueError(f"{lacking} where {type(qz).__name__} has other parameters than the tensors in it")
    if scale is None:
        return particles._replace(log_qz=(log_qz,))
    log_pz = log_prob_of(pz, alias, leading, f"{name}: pz[0]").reshape(shape)
    return particles._replace(log_px=_scaled_by_z(particles.log_px, z, scale, name), log_pz=(log_pz,), log_qz=(log_qz,))


@lru_cache
def _stops_phi(log_prob: Callable) -> bool:
    """Return whether a model's log_prob is its own and takes `stop_phi`."""
    return log_prob is not Template.log_prob and "stop_phi" in inspect.signature(log_prob).parameters


def _alias(z: Tensor, scale: Tensor | None) -> Tensor:
    """Return z under another name, whose gradient is multiplied by each particle's scale before it becomes z's."""
    alias = z.view_as(z)
    if scale is not None and alias.requires_grad:
        factor = _over(scale, z)
        alias.register_hook(lambda gradient: (factor * gradient).to(gradient.dtype))
    return alias


def _over(scale: Tensor, z: Tensor) -> Tensor:
    """Return one number a particle with as many dimensions as z."""
    return scale.reshape(scale.shape + (1,) * (z.dim() - scale.dim()))


def _scaled_by_z(log_px: Tensor, z: Tensor, scale: Tensor, name: str) -> Tensor:
    """Return log p(x|z) of the draw, whose graph cannot be entered, with its gradient by z multiplied.

    A hook on z itself would also reach what others make of z: further estimates from the same particles, a user's own
    term of the loss. So the way back through that graph is a step of its own. Where there is no such step, under
    torch.func or where p(x|z) sees q in another way than through z, the gradient by z is computed beforehand, and what
    it lacks is added: to rounding the same.
    """
    if not z.requires_grad:
        return log_px
    if not is_functorch_wrapped_tensor(log_px) and (leaves := _leaves_beside(log_px, z)) is not None:
        return _ScaledByZ.apply((log_px,), scale, z, *leaves)
    # Where log p(x|z) is -inf it has no gradient; clamp keeps out what autograd would make of it.
    total = log_px.clamp(min=torch.finfo(log_px.dtype).min).sum()
    by_z = None
    if total.requires_grad:
        (by_z,) = torch.autograd.grad(total, z, retain_graph=True, allow_unused=True)
    if by_z is None:
        raise ValueError(f"{name}: px does not depend on the z that forward returned; return the tensor that px is of")
    if scale.dim() == 3:  # of the first particles of each copy
        by_z, z = by_z[:, : log_px.shape[1]], z[:, : log_px.shape[1]]
    lacking = ((_over(scale, z) - 1) * by_z.detach() * z).reshape(*scale.shape, -1).sum(-1).reshape(log_px.shape)
    return log_px + (lacking - lacking.detach())


class _ScaledByZ(Function):
    """(log_px,), scale, z, *leaves -> log_px, differentiated by z and the leaves through the graph that it has.

    The gradient by z is multiplied by `scale`, one number for each of the first particles of each copy.
    """

    @staticmethod
    def forward(ctx: Any, drawn: tuple[Tensor], scale: Tensor, z: Tensor, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*drawn, scale, z, *leaves)
        return drawn[0].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        log_px, scale, z, *leaves = ctx.saved_tensors
        with _unseen_by_hooks(z, leaves):
            by_z, *others = torch.autograd.grad(
                log_px,
                [z, *leaves],
                gradients,
                retain_graph=True,
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        if by_z is None:
            return None, None, None, *others
        if scale.dim() == 3:  # the gradient by particles beyond the first is zero
            scale = nn.functional.pad(scale, (0, 0, 0, z.shape[1] - scale.shape[1]))
        return None, None, _over(scale, z) * by_z, *others


@contextmanager
def _unseen_by_hooks(z: Tensor, leaves: Sequence[Tensor]) -> Iterator[None]:
    """Keep gradients that are one part of z's and of the leaves' from their hooks and from z.grad: the whole comes."""
    suspended = [(hooks, dict(hooks)) for tensor in (z, *leaves) if (hooks := tensor._backward_hooks)]
    for hooks, _ in suspended:
        hooks.clear()
    retained = z.grad if z.retains_grad else None
    try:
        yield
    finally:
        for hooks, own in suspended:
            hooks.update(own)
        if z.retains_grad:
            z.grad = retained


def _leaves_beside(log_px: Tensor, z: Tensor) -> list[Tensor] | None:
    """Return what log_px depends on beside z; None where it does not depend on z, or on anything of z's making."""
    edge = get_gradient_edge(z)
    inner = _nodes(log_px.grad_fn, {edge.node}) - {edge.node}
    outputs = {number for node in inner for end, number in node.next_functions if end is edge.node}
    leaves = {node for node in inner if not node.next_functions}
    if outputs != {edge.output_nr} or not leaves.isdisjoint(_nodes(edge.node)):
        return None
    return [leaf.variable for leaf in leaves]


def _with_constants(part: Any) -> Any:
    """Return a copy of a distribution, or of a part of one, with every tensor in it detached."""
    if isinstance(part, Tensor):
        return part.detach()
    if isinstance(part, list):
        return [_with_constants(each) for each in part]
    if isinstance(part, tuple) and not isinstance(part, torch.Size):
        return tuple(_with_constants(each) for each in part)
    if isinstance(part, _InverseTransform):
        return _with_constants(part.inv).inv  # copied by itself it would lose the transform that it inverts
    if not isinstance(part, Distribution | Transform):
        return part
    constant = copy.copy(part)
    vars(constant).update({name: _with_constants(value) for name, value in vars(constant).items()})
    return constant


def _depends_on_more(value: Tensor, known: Sequence[Tensor]) -> bool:
    """Return whether `value` has a gradient that comes through none of the known tensors."""
    ends = {tensor.grad_fn for tensor in known}
    return any(not node.next_functions for node in _nodes(value.grad_fn, ends) - ends)


def _nodes(start: Any, ends: Set[Any] = frozenset()) -> set[Any]:
    """Return the nodes of a graph from `start` on; what lies behind the `ends` is left out."""
    found: set[Any] = set()
    remaining = [start]
    while remaining:
        node = remaining.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if node not in ends:
            remaining += [following for following, _ in node.next_functions]
    return found


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
    layers = [len(layers_of(output[key])) for key in ("z", "qz", "pz")]
    if len(set(layers)) > 1:
        raise ValueError(
            f"{model}: forward returned {layers[0]} z, {layers[1]} qz, {layers[2]} pz; one of each a layer"
        )


def _check_densities(output: Mapping[str, Any], shape: tuple[int, int, int], model: str) -> None:
    missing = [key for key in ("log_pz", "log_qz", "z") if key not in output]
    if missing:
        raise ValueError(f"{model}: forward returned log_px and no {', no '.join(missing)}; it has {sorted(output)}")
    for density in (output["log_px"], *output["log_pz"], *output["log_qz"]):
        if density.shape != shape:
            raise ValueError(f"{model}: forward returned log-densities {list(density.shape)}, expected {list(shape)}")


def layers_of(value: Any) -> Sequence[Any]:
    """Return the layers of z, qz or pz; a model of one layer may give it without a list."""
    return value if isinstance(value, list | tuple) else (value,)


def log_prob_of(distribution: Distribution, value: Tensor, leading: tuple[int, ...], name: str) -> Tensor:
    """Return log p(value), summed over all dimensions after `leading`."""
    dims = len(leading)
    shape = (*getattr(distribution, "batch_shape", ()), *getattr(distribution, "event_shape", ()))
    if value.shape != shape and shape[:dims] == leading and value.numel() == prod(shape):
        value = value.reshape(shape)  # images given as [batch, 1, 28, 28] to a p(x|z) over [batch, 784]
    if not hasattr(distribution, "log_prob"):
        raise ValueError(f"{name} is a {type(distribution).__name__}, which has no log_prob(value)")
    try:
        log_prob = distribution.log_prob(value)
    except NotImplementedError as error:
        raise ValueError(f"{name} is a {type(distribution).__name__}, which has no log_prob(value)") from error
    # More log-densities than values: two batches that were meant to be one have been broadcast against each other.
    if log_prob.shape[:dims] != leading or log_prob.numel() > value.numel():
        raise ValueError(
            f"{name}.log_prob of a value {list(value.shape)} is {list(log_prob.shape)}, expected {list(leading)} "
            f"followed by what is summed over; the distribution's own shape is {list(shape)}"
        )
    return log_prob.flatten(dims).sum(-1) if log_prob.dim() > dims else log_prob
