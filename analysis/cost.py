"""What computations cost, such as an estimator's loss and gradient: their time, and the memory that they need."""

import copy
import gc
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LEAST_REPETITIONS = 20
MOST_REPETITIONS = 1000
PROCESS = Path("/proc/self")


class Cost(NamedTuple):
    """The cost of one evaluation: the least `milliseconds` of many, and the most `nbytes` of tensors alive in one."""

    milliseconds: float
    milliseconds_se: float
    nbytes: int


def evaluation_cost(estimator: nn.Module, model: nn.Module, x: Tensor, seconds: float = 1.0, seed: int = 0) -> Cost:
    """Measure the loss of `estimator(model, x)` and its gradient by all parameters, of the estimator's own too.

    The time is the least one over the evaluations of `seconds`, never fewer than 20 or more than 1000: what else runs
    on the machine only adds to it. Its `milliseconds_se` is that of the mean of ten such minima, each over a tenth of
    the evaluations, so it also shows a load that comes and goes, not one that never ends. The first evaluations,
    in which libraries load and the estimator builds what depends on x, are not counted. The bytes are those of
    `peak_nbytes`, in one evaluation. Both are measured on copies, in the mode in which they are; torch's random state
    is left as it was.
    """
    model, estimator = copy.deepcopy(model), copy.deepcopy(estimator)

    def evaluate() -> None:
        estimator(model, x)[0].backward()

    def forget() -> None:
        for module in (model, estimator):
            module.zero_grad(set_to_none=True)

    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.enable_grad():
        torch.manual_seed(seed)
        for _ in range(3):
            evaluate()
            forget()
        nbytes = peak_nbytes(evaluate, x.device)
        forget()
        times: list[float] = []
        while len(times) < LEAST_REPETITIONS or (sum(times) < seconds and len(times) < MOST_REPETITIONS):
            times.append(seconds_of(evaluate, x.device))
            forget()
    least, se = least_of(times)
    return Cost(1e3 * least, 1e3 * se, nbytes)


def least_of(times: Sequence[float]) -> tuple[float, float]:
    """Return the least of at least ten times, and the standard error of the mean of ten minima, one of each tenth.

    What else runs on the machine only adds to a time, so the least is nearest to what the work itself takes. Raises
    ValueError for fewer than ten.

    >>> least_of([1.0, 2.0] * 10)
    (1.0, 0.0)
    """
    minima = [min(times[i * len(times) // 10 : (i + 1) * len(times) // 10]) for i in range(10)]
    return min(times), statistics.stdev(minima) / len(minima) ** 0.5


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return how long `work` takes; on CUDA from a synchronised device until it is so again."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_nbytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors, of those that `work` makes, that are alive at one time.

    On CUDA it is what the caching allocator handed out at its peak. On the CPU every tensor that an operation of torch
    returns is followed from its making to its end, also those that wait for the backward pass: the number depends on
    the operations alone, and leaves out what an operation needs for itself while it runs.
    """
    with _collected_garbage():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            work()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        with LiveTensors() as live:
            work()
        return live.peak


def peak_resident_nbytes(work: Callable[[], object]) -> int | None:
    """Return the most bytes that this process has in RAM while `work` runs, None where the system does not tell.

    All of it counts: the libraries, what operations need for themselves while they run, and what is kept after use.
    """
    try:
        (PROCESS / "clear_refs").write_text("5")  # the peak is the present size from here on: proc(5)
        tells = True
    except OSError:
        tells = False
    work()
    if not tells:
        return None
    (peak,) = (line for line in (PROCESS / "status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(peak.split()[1])


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations in its scope make: those alive, `nbytes`, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            # What is neither followed nor new came from outside: a view of a parameter, say.
            if storage._cdata not in given and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.nbytes += storage.nbytes()
                self.peak = max(self.peak, self.nbytes)
                weakref.finalize(storage, self._free, storage._cdata).atexit = False
        return result

    def _free(self, key: int) -> None:
        self.nbytes -= self._sizes.pop(key)


def _storages(tree: Any) -> Iterator[UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@contextmanager
def _collected_garbage() -> Iterator[None]:
    """Collect cyclic garbage before, and none during: what is alive at a moment must not depend on the collector."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
