"""Active units: how many of the latent units tell one observation from another."""

import torch
from torch import Tensor

from models.particles import Particles, layers_of

THRESHOLD = 0.01  # of the variance over x
MANY_SAMPLES = 50  # tell enough in a model of several layers, where the means of q take a pass over the network


class ActiveUnits:
    """Counts, layer by layer, the units u with Var_x(E_{q(u|x)}[u]) > 0.01 (Burda et al. 2016, section 5.2).

    `add` takes particles of some observations at a time. The expectation given x is the mean of q. In a model of
    several layers it is the mean of 50 samples or more, or of q's means given fewer; and where q has no mean (a
    relaxation) it is that of any number of samples. A mean of S numbers of variance s^2 adds s^2/S to the variance over
    x in expectation, which is taken off again: so the variance is unbiased, and units that are noise do not count.
    Layers of integers, which have no mean, are left out, and so is an expectation that one sample alone would have to
    tell. Proof: tests/analysis/test_active_units.py.
    """

    def __init__(self) -> None:
        self._layers: dict[int, _Moments] = {}

    def add(self, particles: Particles) -> None:
        """Take in the particles [mc, iw, batch] of more observations."""
        for index, z in enumerate(layers_of(particles.output["z"])):
            found = _expectations(particles, index, z)
            if found is not None:
                self._layers.setdefault(index, _Moments()).add(*found)

    def counts(self) -> list[int]:
        """Return the number of active units of each layer that is not left out."""
        variances = (moments.variance() for moments in self._layers.values())
        return [int((variance > THRESHOLD).sum()) for variance in variances if variance is not None]

    def summary(self) -> dict[str, float]:
        """Return `active_units/au`, over all layers, with several also `active_units/layer1` and on; or nothing."""
        counts = self.counts()
        layers = {f"active_units/layer{i}": float(count) for i, count in enumerate(counts, start=1)}
        return {"active_units/au": float(sum(counts)), **(layers if len(counts) > 1 else {})} if counts else {}


class _Moments:
    """Sums over observations, in float64."""

    def __init__(self) -> None:
        self.num = 0
        self.mean = self.square = self.noise = torch.zeros((), dtype=torch.float64)

    def add(self, means: Tensor, noise: Tensor) -> None:
        """Add the means [batch, units] and the variance of each, [batch, units]."""
        self.num += len(means)
        self.mean = self.mean.to(means.device) + means.sum(0)
        self.square = self.square.to(means.device) + means.square().sum(0)
        self.noise = self.noise.to(means.device) + noise.sum(0)

    def variance(self) -> Tensor | None:
        """Return the variance over observations [units], None where there are fewer than two of them."""
        if self.num < 2:
            return None
        of_means = (self.square - self.mean.square() / self.num) / (self.num - 1)
        return of_means - self.noise / self.num


def _expectations(particles: Particles, index: int, z: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return E_q[u|x] of a layer's units and the variance of its estimate, each [batch, units]; None where unknown."""
    mc, iw, batch = particles.log_px.shape
    num_samples = mc * iw
    if not z.is_floating_point() or not z.numel() or z.numel() % (num_samples * batch):
        return None
    num_units = z.numel() // (num_samples * batch)
    has_layers = len(layers_of(particles.output["z"])) > 1
    values, means = z, None
    if num_samples < MANY_SAMPLES or not has_layers:
        means = _means(particles, index)
    if means is not None and means.numel() == batch * num_units and (num_samples > 1 or index == 0):
        exact = means.reshape(batch, num_units).double()  # the same for all particles
        return exact, torch.zeros_like(exact)
    if num_samples == 1:
        return None
    if means is not None and means.numel() == z.numel():
        values = means
    variance, mean = torch.var_mean(values.detach().reshape(num_samples, batch, num_units), dim=0)
    return mean.double(), variance.double() / num_samples


def _means(particles: Particles, index: int) -> Tensor | None:
    """Return the means of q in a layer, None where it has none."""
    try:
        mean = layers_of(particles.output["qz"])[index].mean
    except (KeyError, NotImplementedError, AttributeError):
        return None
    return mean.detach() if isinstance(mean, Tensor) else None
