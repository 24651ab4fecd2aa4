import gc
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import analysis.cost
from analysis.cost import LiveTensors, evaluation_cost, least_of, peak_nbytes, peak_resident_nbytes
from datasets.base import Dataset
from datasets.gaussian_mixture import GaussianMixtureData
from datasets.gaussian_toy import GaussianToyData
from estimators import get_estimator
from estimators.registry import families
from models import GaussianMixture, GaussianToy

SOURCE = Path(__file__).parents[2]
CPU = torch.device("cpu")
# S0.3 replaces each of K particles by 0.3 K others.
# Methods for single nodes take samples of samples, and know other models than these.
LINEAR = [
    id for family in families() for id in family.examples if "S0." not in id and "layer_posterior" not in family.needs
]


def test_the_peak_of_a_known_computation_is_exact():
    def work():
        a = torch.zeros(100)  # 400 bytes alive
        b = a + 1  # 800
        del a  # 400
        c = b.view(10, 10)  # a view makes nothing
        c.add_(1)  # nor does what happens in place
        d = torch.zeros(50)  # 600
        del b, c  # 200
        torch.zeros(75) + d.sum()  # 200 + 300 + 4 + 300: the second highest

    assert peak_nbytes(work, CPU) == 804


def test_what_waits_for_the_backward_pass_counts_and_what_was_there_before_does_not():
    w = torch.zeros(100, requires_grad=True)

    def work():
        # exp and sin keep 400 bytes each, the sum and its gradient 4 each; cos and the product are 400 each.
        w.exp().sin().sum().backward()

    # The output of sin is freed before the backward pass: the peak is exp, cos, their product and the two scalars.
    assert peak_nbytes(work, CPU) == 3 * 400 + 2 * 4


def test_the_peak_is_the_same_each_time_and_garbage_waits_until_it_is_measured():
    model, x = GaussianToy(), GaussianToyData().batch(0, 20, seed=1)
    estimator = get_estimator("ovis-gamma1", iw=8)

    def work():
        estimator(model, x)[0].backward()
        model.zero_grad()

    assert len({peak_nbytes(work, CPU) for _ in range(5)}) == 1
    assert gc.isenabled()


@pytest.mark.parametrize("id", LINEAR)
def test_memory_is_linear_in_the_number_of_particles(id):
    is_pathwise = get_estimator(id, iw=64).reparameterises
    model: nn.Module = GaussianToy() if is_pathwise else GaussianMixture()
    dataset: Dataset = GaussianToyData() if is_pathwise else GaussianMixtureData()
    x = dataset.batch(0, 20, seed=1)

    def peak(num_particles):
        estimator = get_estimator(id, iw=num_particles)
        estimator(model, x)  # what an estimator builds on its first x is built
        with LiveTensors() as live:
            estimator(model, x)[0].backward()
        model.zero_grad()
        return live.peak

    once, twice, four_times = map(peak, (64, 128, 256))
    # What does not depend on K cancels in the differences.
    assert four_times - twice == pytest.approx(2 * (twice - once), rel=0.02)


def test_measuring_changes_nothing():
    model, x = GaussianMixture(), GaussianMixtureData().batch(0, 20, seed=1)
    estimator = get_estimator("vimco-arithmetic", iw=4)
    before, random = [p.clone() for p in model.parameters()], torch.get_rng_state()
    cost = evaluation_cost(estimator, model, x, seconds=0.0)
    assert cost.milliseconds > 0
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


def test_what_else_runs_on_the_machine_does_not_count(monkeypatch):
    """Evaluations of 1 s, of which three in four take 3 s and the last tenth 2 s at least."""
    times = iter([*([1.0, 3.0, 3.0, 3.0] * 5)[:18], 2.0, 3.0])
    monkeypatch.setattr(analysis.cost, "seconds_of", lambda work, device: next(times))
    x = GaussianMixtureData().batch(0, 20, seed=1)
    cost = evaluation_cost(get_estimator("reinforce", iw=2), GaussianMixture(), x, seconds=0.0)
    assert cost.milliseconds == 1e3
    minima = [1.0, 3.0] * 4 + [1.0, 2.0]
    assert cost.milliseconds_se == pytest.approx(1e3 * statistics.stdev(minima) / 10**0.5)


def test_fewer_than_ten_times_have_no_standard_error():
    assert least_of([3.0] * 9 + [1.0]) == (1.0, pytest.approx(0.2))
    with pytest.raises(ValueError, match="empty"):
        least_of([1.0] * 9)


PEAKS = """
import torch
from analysis.cost import peak_resident_nbytes

for megabytes in (0, 256, 64):
    print(peak_resident_nbytes(lambda: torch.ones(megabytes * 2**18)))
"""


def test_the_resident_peak_is_that_of_the_work_alone():
    # In a process of its own: this one may keep memory that earlier tests have freed, and use it again.
    command = [sys.executable, "-c", PEAKS]
    answer = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=True).stdout.split()
    if "None" in answer:
        pytest.skip("this system does not tell the resident peak")
    before, high, after = map(int, answer)
    assert high - before == pytest.approx(256 * 2**20, rel=0.05)
    assert after - before == pytest.approx(64 * 2**20, rel=0.2)


def test_where_the_system_does_not_tell_there_is_no_resident_peak(monkeypatch, tmp_path):
    monkeypatch.setattr(analysis.cost, "PROCESS", tmp_path / "none")
    done: list[bool] = []
    assert peak_resident_nbytes(lambda: done.append(True)) is None
    assert done == [True]
