"""How variance and SNR of the gradients go with K, on the Gaussian toy in one dimension.

At A = 1/2, b = d, mu = 0 and s^2 = 2/3, q is the posterior N(x/2, 1/2) shifted by d and wider, so that the weights are
bounded and the asymptotic laws hold from moderate K on. All N and seeds are fixed; with N replicates a slope between
K_1 and K_2 is known to the standard error that each test computes.
"""

import math

import pytest
import torch

from analysis.gradients import gradient_statistics
from analysis.statistics import GradientStatistics
from estimators import get_estimator
from models import GaussianToy


def measure(id: str, num_particles: int, parameter: str, shift: float, num_replicates: int) -> GradientStatistics:
    model = GaussianToy(1, scale="variance").double()
    with torch.no_grad():
        model.A.fill_(0.5)
        model.b.fill_(shift)
    x = torch.full((1, 1), 0.6, dtype=torch.float64)
    estimator = get_estimator(id, iw=num_particles)
    return gradient_statistics(estimator, model, x, num_replicates, parameters=parameter, seed=num_particles)


def slope(first: tuple[int, float, float], second: tuple[int, float, float]) -> tuple[float, float]:
    """The slope of log value by log K between two (K, value, standard error), and its standard error."""
    (k_1, value_1, se_1), (k_2, value_2, se_2) = first, second
    distance = math.log(k_2 / k_1)
    return math.log(value_2 / value_1) / distance, math.hypot(se_1 / value_1, se_2 / value_2) / distance


@pytest.mark.parametrize(
    ("id", "expected"), [("pathwise-iwae", -1.0), ("wake-wake", -1.0), ("ovis-gamma0", -3.0), ("dreg", -3.0)]
)
def test_the_variance_of_the_encoder_gradient(id: str, expected: float):
    """K^-1 for the pathwise gradient and the wake phase, K^-3 with the score under control; 10,000 replicates."""
    points = []
    for num_particles in (64, 512):
        found = measure(id, num_particles, "b", shift=0.2, num_replicates=10_000)
        points.append((num_particles, found.variance.item(), found.variance_se.item()))
    actual, standard_error = slope(*points)
    assert standard_error < 0.05 / 4
    assert abs(actual - expected) < 0.05


@pytest.mark.parametrize(
    ("parameter", "shift", "expected", "tolerance"), [("b", 1.0, -0.5, 0.1), ("mu", 0.2, 0.5, 0.05)]
)
def test_the_snr_of_the_pathwise_gradient(parameter: str, shift: float, expected: float, tolerance: float):
    """K^-1/2 for the encoder, K^+1/2 for the decoder (Rainforth et al. 2018); 40,000 replicates."""
    points = []
    for num_particles in (16, 128):
        found = measure("pathwise-iwae", num_particles, parameter, shift, num_replicates=40_000)
        points.append((num_particles, found.snr.item(), found.snr_se.item()))
    actual, standard_error = slope(*points)
    assert standard_error < tolerance / 4
    assert abs(actual - expected) < tolerance
