"""Gradients through solvers of discrete problems: I-MLE, AIMLE, perturbed optimisers, blackbox differentiation.

A solver is a plain function that maximises: for scores theta [batch, ...] it returns argmax_y <theta, y>, of the same
shape. It may take further arguments, by place or by name, which are handed through unchanged.

>>> def best(theta):
...     return torch.nn.functional.one_hot(theta.argmax(-1), theta.shape[-1]).to(theta)
>>> solve = imle(best, noise_distribution=SumOfGammaNoiseDistribution(k=1), nb_samples=10)
>>> y = solve(theta)  # [batch * nb_samples, ...], an item's samples side by side
"""

from estimators.imle.blackbox import blackbox
from estimators.imle.implicit import aimle, imle
from estimators.imle.noise import GumbelNoiseDistribution, NoiseDistribution, SumOfGammaNoiseDistribution
from estimators.imle.perturbed import FenchelYoungLoss, perturbed
from estimators.imle.target import AdaptiveTargetDistribution, BaseTargetDistribution, TargetDistribution

__all__ = [
    "AdaptiveTargetDistribution",
    "BaseTargetDistribution",
    "FenchelYoungLoss",
    "GumbelNoiseDistribution",
    "NoiseDistribution",
    "SumOfGammaNoiseDistribution",
    "TargetDistribution",
    "aimle",
    "blackbox",
    "imle",
    "perturbed",
]
