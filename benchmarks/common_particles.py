"""Estimators on the same particles against one alone: `python -m benchmarks.common_particles [--rounds N]`.

Prints the time of one replicate of `Measurement`, on the Gaussian mixture and the Gaussian toy, and its ratio to that
of the cheapest estimator alone.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from analysis.gradients import Measurement
from benchmarks.bounds import BATCH_SIZE, PARTICLES, TOY_PARTICLES
from benchmarks.timing import Work, machine, measure
from datasets.gaussian_mixture import GaussianMixtureData
from datasets.gaussian_toy import GaussianToyData
from estimators import get_estimator
from models import GaussianMixture, GaussianToy
from tasks.allocator import keep_freed_memory

CHEAP = (
    "reinforce",
    "vimco-arithmetic",
    "vimco-geometric",
    "ovis-gamma0",
    "ovis-gamma0.5",
    "ovis-gamma1",
    "ovis-arithmetic-gamma1",
    "ovis-geometric-gamma1",
    "wake-wake",
)
COMPARISONS = {
    "reinforce alone": CHEAP[:1],
    "ovis-gamma1 alone": ("ovis-gamma1",),
    "nine cheap ones": CHEAP,
    "and tvo-part5-beta2": (*CHEAP, "tvo-part5-beta2"),
    "and ovis-S10-exclusive": (*CHEAP, "tvo-part5-beta2", "ovis-S10-exclusive"),
}


def replicates(problem: str, ids: Sequence[str]) -> Work:
    """Return the work of drawing a block's worth of replicates."""
    model, x, num_particles, parameters = problems()[problem]
    estimators = [get_estimator(id, iw=num_particles) for id in ids]
    measurement = Measurement(estimators, model, x, 1000, parameters)
    return Work(f"{problem}, {len(ids)}, {ids[-1]}", lambda: measurement.block(0), measurement.block_size)


def problems() -> dict[str, tuple[nn.Module, Tensor, int, str]]:
    toy, dataset = GaussianToy(), GaussianToyData()
    toy.place_at_optimum(dataset, perturbation=0.01)
    mixture = GaussianMixture(), GaussianMixtureData().batch(0, BATCH_SIZE, seed=1)
    return {
        "mixture": (*mixture, PARTICLES, "inference_network"),
        "toy": (toy, dataset.points("train"), TOY_PARTICLES, "b"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.common_particles", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="turns whose median is taken (default: %(default)s)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    keep_freed_memory()  # as a job does
    torch.manual_seed(0)
    print(machine())
    for problem in problems():
        works = {name: replicates(problem, ids) for name, ids in COMPARISONS.items()}
        seconds = measure(list(works.values()), rounds)
        alone = seconds[works["reinforce alone"].name]
        print(f"\n{f'replicate, {problem}':32s} {'estimators':>10s} {'ms':>8s} {'ratio':>6s}")
        for name, work in works.items():
            count, time = len(COMPARISONS[name]), seconds[work.name]
            print(f"{name:32s} {count:10d} {1e3 * time:8.3f} {time / alone:6.2f}")


if __name__ == "__main__":
    main()
