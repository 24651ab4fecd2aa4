"""The bound estimators on the Gaussian mixture and the Gaussian toy: `python -m benchmarks.bounds [--rounds N]`.

Prints the times of a training step and of one replicate in `gradient_statistics`, in the primitives of
`benchmarks.timing` beside the speeds to reach, and how time and memory grow when the number of particles doubles.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from itertools import count, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from analysis.gradients import gradient_statistics
from benchmarks.timing import Work, machine, measure, primitives, repeated
from datasets.gaussian_mixture import GaussianMixtureData
from datasets.gaussian_toy import GaussianToyData
from estimators import get_estimator
from models import GaussianMixture, GaussianToy
from tasks.allocator import keep_freed_memory

BATCH_SIZE = 100
PARTICLES = 20
TOY_PARTICLES = 100
GROWTH = (2000, 4000, 8000)


class Target(NamedTuple):
    """A speed to reach: at most `limit` times the primitive."""

    work: Work
    primitive: str
    limit: float


def targets() -> list[Target]:
    return [
        Target(training_step("ovis-gamma1"), "Q", 0.6),
        Target(mixture_replicate("ovis-gamma1"), "Q", 0.06),
        Target(mixture_replicate("ovis-S10-exclusive"), "Q", 0.15),
        Target(toy_replicate("pathwise-iwae"), "N", 2.8),
        Target(toy_replicate("ovis-gamma1"), "N", 2.8),
    ]


def training_step(id: str) -> Work:
    """Return the work of a step on the mixture, with its data, its check of the loss and its optimiser."""
    dataset, model, estimator = GaussianMixtureData(), GaussianMixture(), get_estimator(id, iw=PARTICLES)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    steps = count()

    def step() -> None:
        loss, _, _ = estimator(model, dataset.batch(next(steps), BATCH_SIZE, seed=1))
        if not loss.isfinite():
            raise FloatingPointError("the loss is not finite")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return repeated(f"step, mixture, {id}, K={PARTICLES}", step, 100)


def mixture_replicate(id: str, num_replicates: int = 1000) -> Work:
    model, x = GaussianMixture(), GaussianMixtureData().batch(0, BATCH_SIZE, seed=1)
    estimator = get_estimator(id, iw=PARTICLES)
    return Work(
        f"replicate, mixture, {id}, K={PARTICLES}",
        lambda: gradient_statistics(estimator, model, x, num_replicates),
        num_replicates,
    )


def toy_replicate(id: str, num_replicates: int = 10) -> Work:
    dataset, model = GaussianToyData(), GaussianToy()
    model.place_at_optimum(dataset, perturbation=0.01)
    estimator = get_estimator(id, iw=TOY_PARTICLES)
    return Work(
        f"replicate, toy, {id}, K={TOY_PARTICLES}",
        lambda: gradient_statistics(estimator, model, dataset.points("train"), num_replicates, parameters="b"),
        num_replicates,
    )


def cost(id: str, num_particles: int, rounds: int) -> tuple[float, float]:
    """Return the seconds of a loss and its gradient on the mixture, and the MiB that it needs at its peak (Linux)."""
    torch.set_num_threads(1)
    model, x = GaussianMixture(), GaussianMixtureData().batch(0, BATCH_SIZE, seed=1)

    def evaluate(num_particles: int) -> None:
        get_estimator(id, iw=num_particles)(model, x)[0].backward()

    evaluate(2)  # libraries load on first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = resident_mebibytes("VmHWM")
    evaluate(num_particles)
    peak = resident_mebibytes("VmHWM")
    work = Work("", lambda: evaluate(num_particles))
    return measure([work], rounds)[""], peak - before


def resident_mebibytes(field: str) -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


def print_speeds(rounds: int) -> None:
    goals = targets()
    seconds = measure([*primitives(), *(goal.work for goal in goals)], rounds)
    print(f"Q = {1e3 * seconds['Q']:.2f} ms, N = {1e3 * seconds['N']:.2f} ms\n")
    print(f"{'work':48s} {'ms':>8s} {'ratio':>9s} {'to reach':>9s}")
    for work, primitive, limit in goals:
        milliseconds, ratio = 1e3 * seconds[work.name], seconds[work.name] / seconds[primitive]
        verdict = "" if ratio <= limit else "  missed"
        print(f"{work.name:48s} {milliseconds:8.3f} {ratio:7.3f} {primitive} {limit:7.2f} {primitive}{verdict}")


def print_growth(rounds: int) -> None:
    print(f"\n{'cost of K particles':30s} " + " ".join(f"{f'K={K}':>22s}" for K in GROWTH) + "   as K doubles")
    # A fresh process for each, whose memory is not already there from the one before.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for id in ("vimco-arithmetic", "vimco-geometric", "ovis-S10-exclusive"):
            costs = [pool.submit(cost, id, K, rounds).result() for K in GROWTH]
            cells = " ".join(f"{1e3 * seconds:9.2f} ms {mebibytes:5.0f} MiB" for seconds, mebibytes in costs)
            factors = [(after[0] / before[0], after[1] / before[1]) for before, after in pairwise(costs)]
            print(f"{id:30s} {cells}   " + ", ".join(f"time x{t:.2f} memory x{m:.2f}" for t, m in factors))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bounds", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="turns whose median is taken (default: %(default)s)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    keep_freed_memory()  # as a job does
    torch.manual_seed(0)
    print(machine())
    print_speeds(rounds)
    print_growth(rounds)


if __name__ == "__main__":
    main()
