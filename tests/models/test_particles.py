import gc
import weakref

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from models import GaussianToy, Template
from models.particles import draw_particles
from tests.simple_model import SimpleModel

MC, IW, BATCH = 2, 3, 4


class Hierarchy(nn.Module):
    """Two layers, z2 - z1 - x, of different families, widths and event dimensions; no Template either."""

    def __init__(self):
        super().__init__()
        self.q1, self.q2 = nn.Linear(5, 3), nn.Linear(3, 2)
        self.p1, self.px = nn.Linear(2, 3), nn.Linear(3, 5)

    def forward(self, x, reparam=False):
        qz1 = Normal(self.q1(x), 0.7)
        z1 = qz1.rsample() if reparam else qz1.sample()
        qz2 = Independent(Normal(self.q2(z1), 0.9), 1)
        z2 = qz2.rsample() if reparam else qz2.sample()
        pz1, pz2 = Normal(self.p1(z2), 1.0), Normal(0.0, 1.0)
        return {"px": Normal(self.px(z1), 0.5), "z": [z1, z2], "qz": [qz1, qz2], "pz": [pz1, pz2]}


class Sampler(Distribution):
    """What torch has for a distribution that says no more than how to draw from it."""

    arg_constraints = {}  # noqa: RUF012 (as torch declares it)

    def sample(self, sample_shape=()):
        return torch.zeros(sample_shape)


def returning(**changes):
    """Return a model of N(0, 1) everywhere whose output is changed so; None takes a key away."""

    class Odd(nn.Module):
        def forward(self, x, **kwargs):
            qz = Normal(torch.zeros(len(x), 2), 1.0)
            output = {"px": Normal(torch.zeros_like(x), 1.0), "z": [qz.sample()], "qz": [qz], "pz": [Normal(0.0, 1.0)]}
            output |= changes
            return {key: value for key, value in output.items() if value is not None}

    return Odd()


def test_the_readme_model_gets_one_row_a_particle_and_a_summed_density_for_each():
    torch.manual_seed(0)
    model, x = SimpleModel(10, 6), Bernoulli(0.5).sample((BATCH, 10))
    particles = draw_particles(model, x, MC, IW)
    z = particles.output["z"][0]
    assert z.shape == (MC * IW * BATCH, 6)
    z = z.view(MC, IW, BATCH, 6)
    for m in range(MC):
        for k in range(IW):
            for i in range(BATCH):
                z_mki = z[m, k, i]
                px = Bernoulli(logits=model.generative_model(z_mki)).log_prob(x[i]).sum()
                qz = Bernoulli(logits=model.inference_network(x[i])).log_prob(z_mki).sum()
                torch.testing.assert_close(particles.log_px[m, k, i], px)
                torch.testing.assert_close(particles.log_qz[0][m, k, i], qz)
                torch.testing.assert_close(particles.log_pz[0][m, k, i], torch.tensor(-6 * 0.6931472))
    assert not any(particles.with_gradient)


def test_the_readme_model_is_told_of_zgrads():
    with pytest.raises(NotImplementedError):
        draw_particles(SimpleModel(10, 6), torch.ones(BATCH, 10), MC, IW, reparam=True)


@pytest.mark.parametrize("reparam", [False, True])
def test_a_hierarchy_gives_the_densities_of_each_layer(reparam):
    torch.manual_seed(0)
    model, x = Hierarchy(), torch.randn(BATCH, 5)
    particles = draw_particles(model, x, MC, IW, reparam=reparam)
    z1, z2 = (layer.view(MC, IW, BATCH, -1) for layer in particles.output["z"])
    torch.testing.assert_close(particles.log_px, Normal(model.px(z1), 0.5).log_prob(x).sum(-1))
    torch.testing.assert_close(particles.log_pz[0], Normal(model.p1(z2), 1.0).log_prob(z1).sum(-1))
    torch.testing.assert_close(particles.log_pz[1], Normal(0.0, 1.0).log_prob(z2).sum(-1))
    torch.testing.assert_close(particles.log_qz[0], Normal(model.q1(x), 0.7).log_prob(z1).sum(-1))
    torch.testing.assert_close(particles.log_qz[1], Normal(model.q2(z1), 0.9).log_prob(z2).sum(-1))
    assert all(particles.with_gradient) == any(particles.with_gradient) == reparam


def test_each_forward_gets_the_options_that_it_takes():
    class Recording(nn.Module):
        def answer(self, x):
            normal = Normal(torch.zeros_like(x), 1.0)
            return {"px": normal, "z": [torch.zeros_like(x)], "qz": [normal], "pz": [normal]}

    class Zgrads(Recording):
        def forward(self, x, zgrads=None):
            assert zgrads is True
            return self.answer(x)

    class Reparam(Recording):
        def forward(self, x, reparam=None):
            assert reparam is True
            return self.answer(x)

    class Anything(Recording):
        def forward(self, x, **kwargs):
            assert kwargs == {"reparam": True, "zgrads": True}
            return self.answer(x)

    class Nothing(Recording):
        def forward(self, x):
            return self.answer(x)

    class SampleShape(Recording):
        def forward(self, x, sample_shape=None, **kwargs):
            assert sample_shape == (MC, IW)
            assert x.shape == (BATCH, 2)
            return self.answer(x.expand(*sample_shape, *x.shape))

    x = torch.arange(2.0 * BATCH).view(BATCH, 2)
    expected = Normal(0.0, 1.0).log_prob(x).sum(-1).expand(MC, IW, BATCH)
    for model in (Zgrads(), Reparam(), Anything(), Nothing(), SampleShape()):
        torch.testing.assert_close(draw_particles(model, x, MC, IW, reparam=True).log_px, expected)


def test_one_layer_may_come_without_a_list():
    normal = Normal(torch.zeros(MC * IW * BATCH, 2), 1.0)
    particles = draw_particles(returning(z=normal.sample(), qz=normal, pz=normal), torch.zeros(BATCH, 2), MC, IW)
    assert torch.equal(particles.log_pz[0], particles.log_qz[0])


def test_scalar_latents_need_no_event_dimension():
    qz = Categorical(logits=torch.tensor([0.3, -0.2, 0.1]).expand(MC * IW * BATCH, 3))
    z = qz.sample()
    particles = draw_particles(
        returning(z=[z], qz=[qz], pz=[Categorical(torch.ones(3))]), torch.zeros(BATCH, 2), MC, IW
    )
    torch.testing.assert_close(particles.log_qz[0], qz.log_prob(z).view(MC, IW, BATCH))


def test_images_are_flattened_for_a_flat_p_of_x():
    x = torch.rand(BATCH, 1, 3, 3).round()
    px = Bernoulli(logits=torch.linspace(-1, 1, 9).expand(MC * IW * BATCH, 9))
    particles = draw_particles(returning(px=px), x, MC, IW)
    expected = Bernoulli(logits=torch.linspace(-1, 1, 9)).log_prob(x.view(BATCH, 9)).sum(-1)
    torch.testing.assert_close(particles.log_px, expected.expand(MC, IW, BATCH))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pz": None}, r"Odd: forward's output lacks 'pz'; it has \['px', 'qz', 'z'\]"),
        ({"px": None, "z": None}, "Odd: forward's output lacks 'px', 'z'"),
        ({"pz": [Normal(0.0, 1.0)] * 2}, "Odd: forward returned 1 z, 1 qz, 2 pz"),
        ({"z": [torch.zeros(5, 2)]}, r"Odd: pz\[0\].log_prob of a value \[5, 2\] is \[5, 2\], expected \[24\]"),
        ({"qz": [Sampler()]}, r"Odd: qz\[0\] is a Sampler, which has no log_prob\(value\)"),
        ({"pz": [Normal(torch.zeros(24, 1, 1), 1.0)]}, r"Odd: pz\[0\].log_prob .* is \[24, 24, 2\], expected \[24\]"),
    ],
)
def test_an_output_of_the_wrong_form_is_refused_by_the_name_of_the_model(changes, message):
    with pytest.raises(ValueError, match=message):
        draw_particles(returning(**changes), torch.zeros(BATCH, 2), MC, IW)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_qz": None}, r"Given: forward returned log_px and no log_qz; it has \['log_px', 'log_pz', 'z'\]"),
        ({"log_pz": None, "z": None}, "Given: forward returned log_px and no log_pz, no z; it has"),
        ({"log_qz": (torch.zeros(MC, IW),)}, r"Given: forward returned log-densities \[2, 3\], expected \[2, 3, 4\]"),
    ],
)
def test_log_densities_that_lack_something_are_refused_by_the_name_of_the_model(changes, message):
    class Given(nn.Module):
        def forward(self, x, sample_shape=(1, 1)):
            density = torch.zeros(*sample_shape, len(x))
            output = {"log_px": density, "log_pz": (density,), "log_qz": (density,), "z": [density]} | changes
            return {key: value for key, value in output.items() if value is not None}

    with pytest.raises(ValueError, match=message):
        draw_particles(Given(), torch.zeros(BATCH, 2), MC, IW)


def test_an_output_that_is_no_mapping_is_refused():
    class Tuple(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ValueError, match="Tuple: forward returned tuple, expected a dict with px, z, qz, pz"):
        draw_particles(Tuple(), torch.zeros(BATCH, 2), MC, IW)


def test_what_a_template_leaves_out_is_refused_by_the_name_of_the_model():
    class Unfinished(Template):
        pass

    model, x = Unfinished(), torch.zeros(BATCH, 2)
    with pytest.raises(NotImplementedError, match="Unfinished has no forward"):
        model(x)
    with pytest.raises(NotImplementedError, match="Unfinished has no log_prob"):
        model.log_prob(x, [x])
    with pytest.raises(NotImplementedError, match="Unfinished has no sample_from_prior"):
        model.sample_from_prior(3)
    assert model.diagnostics(x, None) == {}


def test_a_lazy_output_is_a_mapping_of_all_its_keys_and_dies_with_its_last_reference():
    output = GaussianToy(dim=2)(torch.zeros(BATCH, 2))
    keys = {"log_px", "log_pz", "log_qz", "reparam", "z", "px", "pz", "qz"}
    assert set(output) == keys
    assert len(output) == len(keys)
    assert set(dict(output)) == keys
    assert len(output) == len(keys)
    assert "w" not in output
    with pytest.raises(KeyError):
        output["w"]
    alive = weakref.ref(output)
    gc.disable()
    try:
        del output
        assert alive() is None
    finally:
        gc.enable()
