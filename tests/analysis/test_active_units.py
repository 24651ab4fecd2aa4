import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal, RelaxedBernoulli

from analysis.active_units import ActiveUnits
from models import Template
from models.particles import draw_particles

NUM_POINTS = 2000


class Units(Template):
    """q(u|x) with given means at each x: unit i has E[u_i|x] = c_i x, so that Var_x is c_i^2 where Var(x) is 1."""

    def __init__(self, slopes: list[list[float]], kind: str):
        super().__init__()
        self.slopes, self.kind = slopes, kind

    def forward(self, x: Tensor, **kwargs):
        qz = [self._posterior(x, torch.tensor(slopes)) for slopes in self.slopes]
        z = [layer.sample() for layer in qz]
        px = Normal(torch.zeros_like(x), 1.0)
        prior = Normal(torch.zeros(1), 1.0)
        return {"px": px, "z": z, "qz": qz, "pz": [prior if self.kind == "normal" else layer for layer in qz]}

    def _posterior(self, x: Tensor, slopes: Tensor):
        means = x * slopes
        if self.kind == "normal":
            return Normal(means, 1.0)
        if self.kind == "bernoulli":
            return Bernoulli(0.5 + means)
        if self.kind == "relaxed":  # no mean in torch; E[u|x] differs from that of the bit, but is as constant in x
            return RelaxedBernoulli(torch.tensor(0.5), probs=0.5 + means)
        return Categorical(logits=means)


def points():
    """Return x [N, 1] of variance 1, exactly."""
    x = torch.linspace(-1, 1, NUM_POINTS).unsqueeze(1)
    return x / x.std()


def counted(kind, slopes, iw, chunk=NUM_POINTS):
    units = ActiveUnits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for x in points().split(chunk):
            units.add(draw_particles(Units(slopes, kind), x, mc=1, iw=iw))
    return units


@pytest.mark.parametrize("iw", [1, 7])
def test_a_unit_is_active_above_a_variance_of_a_hundredth(iw):
    # exact: means of q at standard deviations 0, just below a tenth and just above it; q's own noise has no part
    slopes = [[0.0, 0.0999, 0.1001, -0.1001, 5.0]]
    assert counted("normal", slopes, iw).counts() == [3]
    assert counted("bernoulli", [[0.0, 0.0999, 0.1001, -0.25]], iw).counts() == [2]


def test_chunks_are_as_one():
    slopes = [[0.0999, 0.1001, 0.3]]
    whole, parts = (counted("normal", slopes, 3, chunk)._layers[0].variance() for chunk in (NUM_POINTS, 77))
    assert torch.allclose(whole, parts, rtol=1e-12)
    assert torch.allclose(whole, torch.tensor([0.0999, 0.1001, 0.3]).double() ** 2, rtol=1e-5)


@pytest.mark.parametrize(("iw", "num_layers"), [(8, 1), (60, 2)])
def test_expectations_from_samples_have_no_bias(iw, num_layers):
    # Without the correction the noise of q adds 1/60 to each variance: every unit would count.
    kind = "normal" if num_layers > 1 else "relaxed"
    units = counted(kind, [[0.0] * 40] * num_layers, iw)
    assert units.counts() == [0] * num_layers
    for moments in units._layers.values():
        variance = moments.variance()
        noise = moments.noise / moments.num
        # of a variance from N normal means: sd noise sqrt(2/N); 40 units
        assert abs(variance.mean()) < 4 * noise.mean() * math.sqrt(2 / NUM_POINTS / len(variance))


def test_layers_are_counted_and_summed():
    units = counted("normal", [[0.0, 1.0, 1.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]], iw=60)
    assert units.counts() == [2, 1, 0]
    layers = {f"active_units/layer{i}": count for i, count in enumerate((2, 1, 0), start=1)}
    assert units.summary() == {"active_units/au": 3, **layers}
    assert counted("normal", [[0.0, 1.0]], iw=1).summary() == {"active_units/au": 1}


def test_what_has_no_mean_is_left_out():
    assert counted("categorical", [[0.0, 1.0, 2.0]], iw=5).summary() == {}
    assert counted("relaxed", [[0.0, 0.2]], iw=1).summary() == {}  # one sample tells no expectation
    assert ActiveUnits().summary() == {}
    one = ActiveUnits()
    one.add(draw_particles(Units([[1.0]], "normal"), points()[:1], mc=1, iw=5))
    assert one.summary() == {}


def test_a_layer_that_hangs_on_one_sample_is_left_out():
    assert counted("normal", [[1.0], [1.0]], iw=1).counts() == [1]
