"""Statistics of estimators' gradients over independent replicates, vectorised with torch.func."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from math import ceil

import torch
from torch import Tensor, nn

from analysis.replicates import CommonReplicates, Replicates, evaluation_copy
from analysis.statistics import GradientStatistics, Oracle, reduce_together
from errors import UserError, near
from estimators.bounds.base import BoundEstimator
from seeding import derive_seed

# The gradients of all replicates are kept between the passes over them while they take no more memory than this.
KEPT_BYTES = 2**28


def gradient_statistics(
    estimator: nn.Module,
    model: nn.Module,
    x: Tensor,
    num_replicates: int = 1000,
    parameters: str | Sequence[str] = "inference_network",
    seed: int = 0,
    block_size: int | None = None,
    oracle: Oracle | None = None,
) -> GradientStatistics:
    """Measure the gradient of the loss of `estimator(model, x)` over independent replicates.

    It is the gradient by the parameters that `select_parameters(model, parameters)` names, flattened one after another
    in that order; a frozen one has the gradient 0. With an `oracle`, the summary compares the mean with it.

    Replicates are drawn in blocks, as `Measurement` does. Gradients are kept for the later passes up to 256 MiB, and
    drawn anew from their seeds above.

    Nothing is changed: no parameter, buffer, `.grad`, training flag, attribute or random state of torch. The estimator
    is measured on a copy in evaluation mode, where what it carries from batch to batch stands still; the model in the
    mode in which it is. Noise has to come from torch: a block's replicates would share what NumPy draws.

    Raises UserError for a filter that leaves nothing to measure, fewer than two replicates, a block size below one, and
    an x without observations or with NaN.
    """
    measurement = Measurement([estimator], model, x, num_replicates, parameters, seed, block_size)
    (statistics,) = measurement.statistics([oracle])
    return statistics


def compare_gradients(
    estimators: Sequence[nn.Module],
    model: nn.Module,
    x: Tensor,
    num_replicates: int = 1000,
    parameters: str | Sequence[str] = "inference_network",
    seed: int = 0,
    block_size: int | None = None,
    oracles: Sequence[Oracle | None] | None = None,
) -> list[GradientStatistics]:
    """Measure several estimators as `gradient_statistics` does, on the same particles where they can share them.

    Each group of `group_by_particles(estimators)` is one `Measurement`. Differences between estimators of a group are
    known better than their standard errors say: the draws are common.

    Raises UserError as `gradient_statistics` does, for what is no estimator, and for oracles of another number.
    """
    oracles = [None] * len(estimators) if oracles is None else oracles
    if len(oracles) != len(estimators):
        raise UserError(
            f"oracles: {len(oracles)} of them for {len(estimators)} estimators; give one, or None, for each"
        )
    for estimator in estimators:
        if not isinstance(estimator, nn.Module):
            raise UserError(f"estimators: {estimator!r} is no estimator; get_estimator(id, ...) builds one")
    statistics: dict[int, GradientStatistics] = {}
    for group in group_by_particles(estimators):
        chosen = [estimators[i] for i in group]
        measurement = Measurement(chosen, model, x, num_replicates, parameters, seed, block_size)
        statistics |= zip(group, measurement.statistics([oracles[i] for i in group]), strict=True)
    return [statistics[i] for i in range(len(estimators))]


def group_by_particles(estimators: Sequence[nn.Module]) -> list[list[int]]:
    """Return which of the estimators can be measured on the same particles, as lists of positions.

    Those that draw as `BoundEstimator` does, of the same num_mc and num_particles, with or without reparameterisation;
    `num_extra` may differ. What draws for itself (another forward, or dreams beside the particles) is alone.
    """
    groups: dict[object, list[int]] = {}
    for i, estimator in enumerate(estimators):
        groups.setdefault(_particles_of(estimator) or i, []).append(i)
    return list(groups.values())


def _particles_of(estimator: nn.Module) -> tuple[int, int, bool] | None:
    """Return what estimators that share particles have in common, None for one that draws for itself."""
    if not isinstance(estimator, BoundEstimator):
        return None
    kind = type(estimator)
    draws_alike = kind.forward is BoundEstimator.forward and kind.draw is BoundEstimator.draw
    dreams = any(objective.kind == "sleep" for objective in estimator.objectives)
    return (
        (estimator.num_mc, estimator.num_particles, estimator.reparameterises) if draws_alike and not dreams else None
    )


class Measurement:
    """Replicates of the gradients of one or several estimators on the same particles, block by block.

    Several must be of one group of `group_by_particles`. Each replicate draws particles once, as many as the estimator
    with the most `num_extra` asks for, and gives every estimator its first num_particles + num_extra. What an estimator
    makes of given particles is its own; so its gradients depend on the others only through the largest `num_extra`,
    which decides how many particles a seed is spent on, and, without a `block_size`, through the size of blocks. Where
    neither differs they are, to rounding, those of the estimator measured alone.

    Replicates come in blocks of `block_size`, the last one smaller where it does not divide `num_replicates`, and each
    block seeds torch's generators from (seed, block). Without a `block_size` it follows from the shapes in one
    evaluation. So memory decides nothing about the numbers: they depend on the arguments alone, and those of full
    blocks not on `num_replicates`. Blocks of more than one replicate are vectorised; what torch.func.vmap refuses (a
    branch on a sampled value, say) is measured as with `block_size=1`, after a warning.

    What is changed and what is refused is said by `gradient_statistics`.

    num_blocks, num_parameters, num_replicates, block_size: numbers of what there is.
    dtype: that of the gradients; nbytes: what all of them take.
    """

    def __init__(
        self,
        estimators: Sequence[nn.Module],
        model: nn.Module,
        x: Tensor,
        num_replicates: int = 1000,
        parameters: str | Sequence[str] = "inference_network",
        seed: int = 0,
        block_size: int | None = None,
    ):
        if num_replicates < 2:
            raise UserError(f"num_replicates={num_replicates}: statistics over replicates need at least 2")
        if block_size is not None and block_size < 1:
            raise UserError(
                f"block_size={block_size}: a block holds at least 1 replicate (None: chosen from the shapes)"
            )
        if not len(x) or x.isnan().any():
            what = "no observation" if not len(x) else "NaN"
            raise UserError(f"x of shape {list(x.shape)} has {what}: statistics need observations of numbers")
        if len(group_by_particles(estimators)) != 1:
            raise ValueError("a Measurement takes the estimators of one group of group_by_particles(estimators)")
        names = select_parameters(model, parameters)
        self.num_replicates, self._seed, self._model, self._x = num_replicates, seed, model, x
        self._is_refused = False
        with _unchanged(model), _forked_generators(model, x) as generators:
            _seed(generators, seed, "lazy parameters")
            copies = [evaluation_copy(estimator, model, x) for estimator in estimators]
            bounds = [clone for clone in copies if isinstance(clone, BoundEstimator)]
            self._replicates = (
                CommonReplicates(bounds, model, x, names) if len(copies) > 1 else Replicates(copies, model, x, names)
            )
            _seed(generators, seed, "first evaluation")
            fitting = self._replicates.evaluate_once()
        self.block_size = block_size or fitting
        self.num_blocks = ceil(num_replicates / self.block_size)
        self.num_estimators, self.num_parameters = len(copies), self._replicates.num_parameters
        self.dtype = self._replicates.dtype
        self.nbytes = num_replicates * self.num_estimators * self._replicates.nbytes

    def block(self, i: int) -> Tensor:
        """Return the gradients of block i, [estimators, replicates in it, parameters], as a pure function of i."""
        if not 0 <= i < self.num_blocks:
            raise IndexError(f"block {i} of {self.num_blocks}")
        start = i * self.block_size
        count = min(self.block_size, self.num_replicates - start)
        with _unchanged(self._model), _forked_generators(self._model, self._x) as generators:
            if self.block_size > 1 and not self._is_refused:
                try:
                    _seed(generators, self._seed, i)
                    return self._replicates.vectorised(count).transpose(0, 1)
                except Exception:
                    # Where vmap takes two replicates, it was no refusal: too little memory, say, which must not change
                    # numbers.
                    if self._replicates.can_be_vectorised():
                        raise
                    self._is_refused = True
            singles = []
            for replicate in range(start, start + count):
                _seed(generators, self._seed, replicate)
                singles.append(self._replicates.single())
            return torch.stack(singles, 1)

    def statistics(self, oracles: Sequence[Oracle | None] | None = None) -> list[GradientStatistics]:
        """Return the statistics of all blocks, estimator by estimator."""

        def draw() -> Iterator[Tensor]:
            return (self.block(i) for i in range(self.num_blocks))

        blocks: Callable[[], Iterator[Tensor]] = draw
        if self.nbytes <= KEPT_BYTES:
            kept = KeptBlocks(self)
            for block in draw():
                kept.extend(block)
            blocks = lambda: iter(kept)  # noqa: E731
        return reduce_together(blocks, self.dtype, oracles or [None] * self.num_estimators)


class KeptBlocks:
    """The first blocks of a measurement, in order, in one tensor that has room for all of them.

    Each in a tensor of its own would stay in memory between the large and passing ones of its evaluation, and divide
    what these leave free: at 80 MB an evaluation, thousands of small blocks would hold gigabytes.
    """

    def __init__(self, measurement: Measurement):
        self._size = measurement.block_size
        self._shape = (measurement.num_estimators, measurement.num_replicates, measurement.num_parameters)
        self._gradients = torch.zeros(0)
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(self._num))

    def __getitem__(self, i: int) -> Tensor:
        """Return block i, [estimators, replicates in it, parameters]."""
        return self._gradients[:, i * self._size : (i + 1) * self._size]

    def extend(self, gradients: Tensor) -> None:
        """Keep one more block, or several in a row, [estimators, replicates in them, parameters]."""
        if not self._num:
            self._gradients = gradients.new_zeros(self._shape)
        start, count = self._num * self._size, gradients.shape[1]
        self._gradients[:, start : start + count] = gradients
        self._num += ceil(count / self._size)

    def joined(self) -> Tensor:
        """Return the gradients of all blocks kept, [estimators, replicates, parameters]."""
        return self._gradients[:, : self._num * self._size].clone()


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


def parameter_labels(model: nn.Module, parameters: str | Sequence[str]) -> list[str]:
    """Return the name of each number of a flat gradient: "b[3]", "A[0,1]", "prior.logits[2]"; "scale" for a scalar."""
    available = dict(model.named_parameters())
    return [
        f"{name}[{','.join(map(str, index))}]" if index else name
        for name in select_parameters(model, parameters)
        for index in product(*map(range, available[name].shape))
    ]


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Give each module of the model back the attributes it had: a forward may store what it computed."""
    held = ("_parameters", "_buffers", "_modules")
    attributes = [
        (module, dict(vars(module)), {name: dict(vars(module)[name]) for name in held}) for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, before, contents in attributes:
            vars(module).clear()
            vars(module).update(before)
            for name, content in contents.items():
                vars(module)[name].clear()
                vars(module)[name].update(content)


@contextmanager
def _forked_generators(model: nn.Module, x: Tensor) -> Iterator[list[torch.Generator]]:
    """Yield torch's global generators of the devices in use, to be seeded at will, and restore them at the end."""
    devices = sorted({tensor.device.index for tensor in (x, *model.parameters()) if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        yield [torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)]


def _seed(generators: Sequence[torch.Generator], seed: int, block: int | str) -> None:
    for generator in generators:
        generator.manual_seed(derive_seed("gradient_statistics", seed, block))
