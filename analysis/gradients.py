"""Statistics of an estimator's gradient over independent replicates, vectorised with torch.func."""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from analysis.statistics import GradientStatistics, reduce_replicates
from analysis.vectorise import LargestTensor, distributions_under_vmap
from errors import UserError, near
from seeding import derive_seed

# A block holds as many replicates as give its largest tensor this many bytes, and never more than the second number:
# smaller blocks pay for dispatch, larger ones leave the caches.
_BLOCK_BYTES = 2**22
_BLOCK_REPLICATES = 500

# The gradients of all replicates are kept between the passes over them while they take no more memory than this.
_KEPT_BYTES = 2**28


def gradient_statistics(
    estimator: nn.Module,
    model: nn.Module,
    x: Tensor,
    num_replicates: int = 1000,
    parameters: str | Sequence[str] = "inference_network",
    seed: int = 0,
    block_size: int | None = None,
) -> GradientStatistics:
    """Measure the gradient of the loss of `estimator(model, x)` over independent replicates.

    It is the gradient by the parameters that `select_parameters(model, parameters)` names, flattened one after another
    in that order; a frozen one has the gradient 0.

    Replicates are drawn in blocks of `block_size`, the last one smaller where it does not divide `num_replicates`, and
    each block seeds torch's generators from (seed, block). Without a `block_size` it follows from the shapes in one
    evaluation. So memory decides nothing about the numbers: they depend on the arguments alone, and those of full
    blocks not on `num_replicates`. Blocks of more than one replicate are vectorised; what torch.func.vmap refuses (a
    branch on a sampled value, say) is measured as with `block_size=1`, after a warning. Gradients are kept for the
    later passes up to 256 MiB, and drawn anew from their seeds above.

    Nothing is changed: no parameter, buffer, `.grad`, training flag, attribute or random state of torch. The estimator
    is measured on a copy in evaluation mode, where what it carries from batch to batch stands still; the model in the
    mode in which it is. Noise has to come from torch: a block's replicates would share what NumPy draws.

    Raises UserError for a filter that leaves nothing to measure, fewer than two replicates, and a block size below one.
    """
    if num_replicates < 2:
        raise UserError(f"num_replicates={num_replicates}: statistics over replicates need at least 2")
    if block_size is not None and block_size < 1:
        raise UserError(f"block_size={block_size}: a block holds at least 1 replicate (None: chosen from the shapes)")
    names = select_parameters(model, parameters)
    with _unchanged(model), _forked_generators(model, x) as generators:
        replicates = _Replicates(estimator, model, x, names)
        _seed(generators, seed, "first evaluation")
        fitting = replicates.evaluate_once()

        def measure(size: int) -> GradientStatistics:
            counts = [min(size, num_replicates - start) for start in range(0, num_replicates, size)]

            def draw() -> Iterator[Tensor]:
                for block, count in enumerate(counts):
                    _seed(generators, seed, block)
                    yield replicates.vectorised(count) if size > 1 else replicates.single()

            if num_replicates * replicates.nbytes > _KEPT_BYTES:
                return reduce_replicates(draw, replicates.dtype)
            kept = list(draw())
            return reduce_replicates(lambda: iter(kept), replicates.dtype)

        block_size = block_size or fitting
        try:
            return measure(block_size)
        except Exception:
            # Where vmap takes two replicates, it was no refusal: too little memory, say, which must not change numbers.
            if block_size == 1 or replicates.can_be_vectorised():
                raise
        return measure(1)


def select_parameters(model: nn.Module, parameters: str | Sequence[str]) -> list[str]:
    """Return the names of the model's parameters under some prefixes, in the order of `named_parameters()`.

    `parameters`: names or dotted prefixes made of whole components, several as a list or separated by commas: "prior"
    stands for "prior" and "prior.logits", not for "prior_net.weight". Raises UserError where one of them matches
    nothing, with the near names, and where all that they match is frozen (`requires_grad` false).
    """
    available = dict(model.named_parameters())
    text = parameters if isinstance(parameters, str) else ",".join(parameters)
    selected: set[str] = set()
    for prefix in (part.strip() for part in text.split(",")):
        matches = {name for name in available if f"{name}.".startswith(f"{prefix}.")}
        if not matches:
            components = [name.split(".") for name in available]
            prefixes = {".".join(parts[:depth]) for parts in components for depth in range(1, len(parts) + 1)}
            raise UserError(f"parameters: {prefix!r} matches none of {type(model).__name__}{near(prefix, prefixes)}")
        selected |= matches
    if not any(available[name].requires_grad for name in selected):
        raise UserError(
            f"parameters: all that {text!r} matches of {type(model).__name__} is frozen (requires_grad=False)"
        )
    return [name for name in available if name in selected]


class _Loss(nn.Module):
    """The loss as a function of the parameters and buffers of both the model and the estimator."""

    def __init__(self, estimator: nn.Module, model: nn.Module):
        super().__init__()
        self.model = model
        self.estimator = estimator

    def forward(self, x: Tensor) -> Tensor:
        loss, _, _ = self.estimator(self.model, x)
        return loss


class _Replicates:
    """Draws gradients of the loss by the named parameters, flat, from torch's random state as it is."""

    def __init__(self, estimator: nn.Module, model: nn.Module, x: Tensor, names: Sequence[str]):
        parameters = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
        self._loss = _Loss(copy.deepcopy(estimator).eval(), model)
        self._x = x
        self._selected = {name: parameters[name].detach() for name in (f"model.{name}" for name in names)}
        self._variables = {name: p for name, p in self._selected.items() if parameters[name].requires_grad}
        self.dtype = reduce(torch.promote_types, (p.dtype for p in self._selected.values()))
        self.nbytes = sum(p.numel() for p in self._selected.values()) * self.dtype.itemsize

    def evaluate_once(self) -> int:
        """Return the block size that fits the shapes of one evaluation.

        The user's own errors show here as they are, and what an estimator builds on its first x is built.
        """
        with LargestTensor() as largest:
            loss = self._evaluate(self._leaves())
        if loss.dim() > 0:
            shape, estimator = list(loss.shape), type(self._loss.estimator).__name__
            raise UserError(f"{estimator} returned a loss of shape {shape}; statistics need a scalar, the batch's mean")
        return min(max(_BLOCK_BYTES // max(largest.nbytes, self.nbytes), 1), _BLOCK_REPLICATES)

    def can_be_vectorised(self) -> bool:
        """Return whether torch.func.vmap takes the estimator and the model, with a warning where it does not."""
        try:
            self.vectorised(2)
        except Exception as error:  # vmap's refusals have no type of their own
            model, estimator = type(self._loss.model).__name__, type(self._loss.estimator).__name__
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"the gradient of {estimator} on {model} is drawn one replicate at a time, as with block_size=1: "
                f"torch.func.vmap refuses it ({reason})",
                stacklevel=3,
            )
            return False
        return True

    def vectorised(self, count: int) -> Tensor:
        """Return `count` independent replicates, [count, parameters]."""

        def replicate(index: Tensor) -> Tensor:
            with distributions_under_vmap(index):
                return self._flat(grad(self._evaluate)(self._variables))

        with warnings.catch_warnings():
            # vmap runs an operation that it does not know once for each replicate: slower, and no user's concern.
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            return vmap(replicate, randomness="different")(torch.zeros(count, device=self._x.device))

    def single(self) -> Tensor:
        """Return one replicate, [1, parameters], without vmap."""
        leaves = self._leaves()
        loss = self._evaluate(leaves)
        if not loss.requires_grad:
            return self._flat({}).unsqueeze(0)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return self._flat(dict(zip(leaves, gradients, strict=True))).unsqueeze(0)

    def _leaves(self) -> dict[str, Tensor]:
        return {name: p.detach().requires_grad_() for name, p in self._variables.items()}

    def _evaluate(self, variables: Mapping[str, Tensor]) -> Tensor:
        """Return the loss as a function of the variables alone; what it writes to a buffer goes to a copy."""
        fixed = {name: p.detach() for name, p in self._loss.named_parameters() if name not in variables}
        buffers = {name: buffer.detach().clone() for name, buffer in self._loss.named_buffers()}
        return functional_call(self._loss, (dict(variables), fixed, buffers), (self._x,))

    def _flat(self, gradients: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([gradients.get(name, torch.zeros_like(p)).flatten() for name, p in self._selected.items()])


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Give each module of the model back the attributes it had: a forward may store what it computed."""
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)


@contextmanager
def _forked_generators(model: nn.Module, x: Tensor) -> Iterator[list[torch.Generator]]:
    """Yield torch's global generators of the devices in use, to be seeded at will, and restore them at the end."""
    devices = sorted({tensor.device.index for tensor in (x, *model.parameters()) if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        yield [torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)]


def _seed(generators: Sequence[torch.Generator], seed: int, block: int | str) -> None:
    for generator in generators:
        generator.manual_seed(derive_seed("gradient_statistics", seed, block))
