"""One replicate after another of the gradients of estimators, drawn from torch's random state as it is.

`Replicates` differentiates the loss of one estimator; `CommonReplicates` those of several on the same particles.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.parameter import is_lazy

from analysis.slopes import Losses, Slopes, densities_alone
from analysis.vectorise import LargestTensor, distributions_under_vmap
from errors import UserError
from estimators.bounds.base import BoundEstimator
from models.particles import Particles, densities_of, with_densities

# A block holds as many replicates as give its largest tensor this many bytes, and never more than the second number:
# smaller blocks pay for dispatch, larger ones leave the caches.
_BLOCK_BYTES = 2**22
_BLOCK_REPLICATES = 500


def evaluation_copy(estimator: nn.Module, model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy in evaluation mode; parameters that take their shapes from the first x have them."""
    clone = copy.deepcopy(estimator).eval()
    if any(is_lazy(parameter) for parameter in clone.parameters()):
        with torch.no_grad():
            clone(model, x)
    return clone


class _Loss(nn.Module):
    """The loss as a function of the parameters and buffers of both the model and the estimator."""

    def __init__(self, estimator: nn.Module, model: nn.Module):
        super().__init__()
        self.model = model
        self.estimator = estimator

    def forward(self, x: Tensor) -> Tensor:
        loss, _, _ = self.estimator(self.model, x)
        return loss


class Replicates:
    """Draws gradients of the loss by the named parameters, flat, from torch's random state as it is."""

    def __init__(self, estimators: Sequence[nn.Module], model: nn.Module, x: Tensor, names: Sequence[str]):
        parameters = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
        self._estimators, self._model = estimators, model
        self._loss = _Loss(estimators[0], model)
        self._x = x
        self._selected = {name: parameters[name].detach() for name in (f"model.{name}" for name in names)}
        self._variables = {name: p for name, p in self._selected.items() if parameters[name].requires_grad}
        self.dtype = reduce(torch.promote_types, (p.dtype for p in self._selected.values()))
        self.num_parameters = sum(p.numel() for p in self._selected.values())
        self.nbytes = self.num_parameters * self.dtype.itemsize

    def evaluate_once(self) -> int:
        """Return the block size that fits the shapes of one evaluation.

        The user's own errors show here as they are, and what an estimator builds on its first x is built.
        """
        with LargestTensor() as largest:
            loss = self._evaluate(self._leaves())
        _check_scalar(loss, self._estimators[0])
        return min(max(_BLOCK_BYTES // max(largest.nbytes, self.nbytes), 1), _BLOCK_REPLICATES)

    def can_be_vectorised(self) -> bool:
        """Return whether torch.func.vmap takes the estimator and the model, with a warning where it does not."""
        try:
            self.vectorised(2)
        except Exception as error:  # vmap's refusals have no type of their own
            model = type(self._model).__name__
            estimator = ", ".join(type(estimator).__name__ for estimator in self._estimators)
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"the gradient of {estimator} on {model} is drawn one replicate at a time, as with block_size=1: "
                f"torch.func.vmap refuses it ({reason})",
                stacklevel=3,
            )
            return False
        return True

    def vectorised(self, count: int) -> Tensor:
        """Return `count` independent replicates, [count, estimators, parameters]."""

        def replicate(index: Tensor) -> Tensor:
            with distributions_under_vmap(index):
                return self._gradients()

        with warnings.catch_warnings():
            # vmap runs an operation that it does not know once for each replicate: slower, and no user's concern.
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            return vmap(replicate, randomness="different")(torch.zeros(count, device=self._x.device))

    def single(self) -> Tensor:
        """Return one replicate, [estimators, parameters], without vmap."""
        leaves = self._leaves()
        return self._backward([self._evaluate(leaves)], leaves).unsqueeze(0)

    def _gradients(self) -> Tensor:
        """Return the gradients [estimators, parameters] of one replicate by torch.func."""
        return self._flat(grad(self._evaluate)(self._variables)).unsqueeze(0)

    def _leaves(self) -> dict[str, Tensor]:
        return {name: p.detach().requires_grad_() for name, p in self._variables.items()}

    def _evaluate(self, variables: Mapping[str, Tensor]) -> Tensor:
        """Return the loss as a function of the variables alone."""
        return _call(self._loss, variables, self._x)

    def _backward(
        self, outputs: Sequence[Tensor], leaves: Mapping[str, Tensor], cotangents: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Return the flat gradient of the outputs that have one, whose graph is kept."""
        if not any(output.requires_grad for output in outputs):
            return self._flat({})
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), cotangents, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return self._flat(dict(zip(leaves, gradients, strict=True)))

    def _flat(self, gradients: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([gradients.get(name, torch.zeros_like(p)).flatten() for name, p in self._selected.items()])


def _call(module: nn.Module, variables: Mapping[str, Tensor], *arguments: Any) -> Any:
    """Call a module as a function of the variables alone; what it writes to a buffer goes to a copy."""
    fixed = {name: p.detach() for name, p in module.named_parameters() if name not in variables}
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    return functional_call(module, (dict(variables), fixed, buffers), arguments)


def _check_scalar(loss: Tensor, estimator: nn.Module) -> None:
    if loss.dim() > 0:
        shape, name = list(loss.shape), type(estimator).__name__
        raise UserError(f"{name} returned a loss of shape {shape}; statistics need a scalar, the batch's mean")


class _Drawing(nn.Module):
    """Particles for several estimators, as a function of the parameters and buffers of the model."""

    def __init__(self, estimators: Sequence[BoundEstimator], model: nn.Module):
        super().__init__()
        self.model = model
        most = max(estimator.num_extra for estimator in estimators)
        self._draw = partial(estimators[0].draw, num_extra=most)

    def forward(self, x: Tensor) -> Particles:
        return self._draw(self.model, x)


class _JointLosses(nn.Module):
    """Both: the losses on common particles."""

    def __init__(self, drawing: _Drawing, losses: Losses):
        super().__init__()
        self.model, self.losses = drawing.model, losses
        # In a tuple, where it is no submodule: functional_call does not give a model back that it meets twice.
        self._drawing = (drawing,)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.losses(self._drawing[0](x))


class CommonReplicates(Replicates):
    """The same for the losses of several estimators on common particles.

    Where all of them are functions of the particles' log-densities alone, those are computed once, each estimator says
    how its loss depends on them, and the model's own backward pass takes each derivative on. A loss that also depends
    on the model's parameters in another way (through z, say) is differentiated whole.
    """

    def __init__(self, estimators: Sequence[BoundEstimator], model: nn.Module, x: Tensor, names: Sequence[str]):
        super().__init__(estimators, model, x, names)
        self._drawing = _Drawing(estimators, model)
        self._losses, self._slopes = Losses(estimators), Slopes(estimators)
        self._joint = _JointLosses(self._drawing, self._losses)
        self._by_densities = False
        self._connected: list[bool] = []

    def evaluate_once(self) -> int:
        """Return the block size that fits the shapes of one evaluation of each."""
        leaves = self._leaves()
        with LargestTensor() as largest:
            losses = _call(self._joint, leaves, self._x)
        for loss, estimator in zip(losses, self._estimators, strict=True):
            _check_scalar(loss, estimator)
        self._by_densities = self._depend_on_densities_alone(leaves)
        nbytes = max(largest.nbytes, self.nbytes * len(self._estimators))
        return min(max(_BLOCK_BYTES // nbytes, 1), _BLOCK_REPLICATES)

    def single(self) -> Tensor:
        """Return one replicate, [estimators, parameters], without vmap."""
        leaves = self._leaves()
        if not self._by_densities:
            return torch.stack([self._backward([loss], leaves) for loss in _call(self._joint, leaves, self._x)])
        particles = _call(self._drawing, leaves, self._x)
        outputs = list(compress(densities_of(particles), self._connected))
        rows = _call(self._slopes, {}, _as_numbers(particles), self._connected)
        gradients = self._pulled_back(rows, lambda row: self._backward(outputs, leaves, row), _stacked)
        return gradients / -_num_rows(particles)

    def _gradients(self) -> Tensor:
        if not self._by_densities:
            losses, pull_back = vjp(lambda variables: _call(self._joint, variables, self._x), self._variables)[:2]
            zeros = [torch.zeros_like(loss) for loss in losses]
            return torch.stack(
                [
                    self._flat(pull_back([*zeros[:i], torch.ones_like(loss), *zeros[i + 1 :]])[0])
                    for i, loss in enumerate(losses)
                ]
            )
        if not any(self._connected):
            return torch.stack([self._flat({}) for _ in self._estimators])
        drawn: list[Particles] = []

        def draw(variables: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            drawn.append(_call(self._drawing, variables, self._x))
            densities = densities_of(drawn[0])
            return list(compress(densities, self._connected)), densities

        _, pull_back, densities = vjp(draw, self._variables, has_aux=True)  # type: ignore[misc]
        alone = _as_numbers(with_densities(drawn[0], densities))
        rows = _call(self._slopes, {}, alone, self._connected)
        gradients = self._pulled_back(rows, lambda row: self._flat(pull_back(list(row))[0]), torch.stack)
        return gradients / -_num_rows(alone)

    def _pulled_back(
        self,
        rows: Sequence[Sequence[Tensor]],
        pull_back: Callable[[Sequence[Tensor]], Tensor],
        stack: Callable[[tuple[Tensor, ...]], Tensor],
    ) -> Tensor:
        """Return the gradients [estimators, parameters] of rows of derivatives, one row an estimator."""
        if any(self._connected) and getattr(self._model, "takes_gradients_at_once", False):
            return vmap(lambda *row: pull_back(row))(*map(stack, zip(*rows, strict=True)))
        return torch.stack([pull_back(row) for row in rows])

    def _depend_on_densities_alone(self, leaves: Mapping[str, Tensor]) -> bool:
        """Return whether the losses reach the variables through the log-densities alone, and need nothing else."""
        particles = _call(self._drawing, leaves, self._x)
        self._connected = [density.requires_grad for density in densities_of(particles)]
        try:
            losses = _call(self._losses, {}, _as_numbers(particles))
        except Exception:  # an estimator that reads what the model returned
            return False
        direct = [
            torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
            for loss in losses
            if loss.requires_grad
        ]
        return all(gradient is None for gradients in direct for gradient in gradients)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape as one, each in the layout of the first."""
    like = torch.empty_like(values[0])
    stack = like.new_empty_strided((len(values), *like.shape), (like.numel(), *like.stride()))
    for part, value in zip(stack, values, strict=True):
        part.copy_(value)
    return stack


def _num_rows(particles: Particles) -> int:
    """Return mc x batch."""
    num_mc, _, batch = particles.log_px.shape
    return num_mc * batch


def _as_numbers(particles: Particles) -> Particles:
    """Return particles that are nothing but log-densities without gradient."""
    densities = [density.detach() for density in densities_of(particles)]
    return densities_alone(densities, len(particles.log_pz), particles.x)
