"""Training steps of the models of images: `python -m benchmarks.image_models [--rounds N] [--threads 1,2]`.

Prints the times of a loss, its gradient and the optimiser's step on binary images of 28 x 28, in the primitives of
`benchmarks.timing` beside the speeds to reach: on one thread, then on two, each in a process of its own.
"""

import argparse
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch

from benchmarks.timing import Work, machine, primitives, repeated, turns
from estimators import get_estimator
from models import VAE, SigmoidBeliefNetwork
from models.template import Template
from tasks.allocator import keep_freed_memory

BATCH_SIZE = 24
NUM_POINTS = 2000
STEPS = 5  # a turn takes at least as many in a row, as training does


class Row(NamedTuple):
    """A training step, and the most Q that it may take on one thread where there is such a number."""

    name: str
    model: Callable[[], Template]
    id: str
    num_particles: int
    limit: float | None = None


ROWS = (
    *(
        Row("SBN 200-200-200", SigmoidBeliefNetwork, id, num_particles, limit)
        for num_particles, limit in ((5, None), (50, 11.0))
        for id in ("ovis-gamma1", "vimco-arithmetic", "tvo-part2-config1")
    ),
    *(
        Row("Gaussian VAE", VAE, id, num_particles, limit)
        for num_particles, limit in ((5, None), (50, 11.0))
        for id in ("pathwise-iwae", "dreg", "stl", "ovis-gamma1")
    ),
)


def images() -> torch.Tensor:
    """Return NUM_POINTS binary images [N, 1, 28, 28] whose pixels are as bright as those of a blurred disk."""
    axis = torch.linspace(-1, 1, 28)
    brightness = (3 - 8 * (axis.square().unsqueeze(0) + axis.square().unsqueeze(1))).sigmoid()
    return (torch.rand(NUM_POINTS, 1, 28, 28) < brightness).float()


def training_step(row: Row, x: torch.Tensor) -> Work:
    """Return the work of a step, with its batch, its check of the loss and its optimiser."""
    torch.manual_seed(0)
    model, estimator = row.model(), get_estimator(row.id, iw=row.num_particles)
    model.adapt(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        loss, _, _ = estimator(model, x[torch.randint(len(x), (BATCH_SIZE,))])
        if not loss.isfinite():
            raise FloatingPointError("the loss is not finite")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    work = repeated(f"{row.name}, {row.id}, K={row.num_particles}", step, max(STEPS, 50 // row.num_particles))
    return work._replace(before=step)  # it finds the caches full of what others have computed


def print_steps(rounds: int, num_threads: int) -> None:
    """Print the times on `num_threads` threads; what is to be reached is said of one."""
    torch.set_num_threads(num_threads)
    keep_freed_memory()  # as a job does
    torch.manual_seed(0)
    x = images()
    works = [training_step(row, x) for row in ROWS]
    seconds = turns([*primitives(), *works], rounds)
    quickest, median = ({name: of(values) for name, values in seconds.items()} for of in (min, statistics.median))
    print(f"{machine()}\nQ = {1e3 * quickest['Q']:.2f} ms at best, {1e3 * median['Q']:.2f} ms in the median\n")
    print(
        f"{'step, batch ' + str(BATCH_SIZE):48s} {'at best':>10s} {'ratio':>9s} {'median':>10s} {'ratio':>9s} to reach"
    )
    for row, work in zip(ROWS, works, strict=True):
        cells = [
            f"{1e3 * times[work.name]:7.2f} ms {times[work.name] / times['Q']:7.2f} Q" for times in (quickest, median)
        ]
        print(f"{work.name:48s} {' '.join(cells)} {verdict(row, quickest[work.name] / quickest['Q'], num_threads)}")
    print()


def verdict(row: Row, ratio: float, num_threads: int) -> str:
    if row.limit is None or num_threads > 1:
        return ""
    return f"{row.limit:6.1f} Q{'' if ratio <= row.limit else '  missed'}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.image_models", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="turns that each step takes (default: %(default)s)")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, by comma (default: %(default)s)")
    arguments = parser.parse_args()
    for num_threads in map(int, arguments.threads.split(",")):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(print_steps, arguments.rounds, num_threads).result()


if __name__ == "__main__":
    main()
