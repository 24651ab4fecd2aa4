import copy
import warnings

import pytest
import torch
from torch import nn

import analysis.gradients
from analysis.gradients import (
    KeptBlocks,
    Measurement,
    compare_gradients,
    gradient_statistics,
    group_by_particles,
    parameter_labels,
    select_parameters,
)
from errors import UserError
from estimators import get_estimator
from estimators.bounds.reinforce import Reinforce
from estimators.bounds.weights import weigh
from models import GaussianMixture, GaussianToy
from tests.analysis.problems import ImportanceWeighted

IDS = (
    "reinforce",
    "vimco-arithmetic",
    "ovis-gamma0",
    "ovis-gamma1",
    "ovis-S3-exclusive",
    "wake-wake",
    "tvo-part3-beta1",
)


def estimators(ids=IDS, **settings):
    return [get_estimator(id, **{"iw": 4} | settings) for id in ids]


def mixture():
    model, x = GaussianMixture(num_components=5, hidden=3), torch.tensor([3.0, 31.0])
    for parameter in model.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    return model, x, "inference_network,prior"


def toy():
    model = GaussianToy(2)
    for parameter in model.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    return model, torch.ones(3, 2), "A,b,mu"


def one_at_a_time(estimator, most_extra, model, x, parameters):
    """The gradient of the estimator's own loss on particles drawn from torch's random state as it is."""
    particles = estimator.draw(model, x, most_extra)
    loss = estimator.loss(
        particles.first(estimator.num_particles + estimator.num_extra), estimator.alpha, estimator.beta
    )
    available = dict(model.named_parameters())
    names = select_parameters(model, parameters)
    gradients = torch.autograd.grad(
        loss, [available[name] for name in names], materialize_grads=True, allow_unused=True
    )
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("problem", [mixture, toy])
@pytest.mark.parametrize("settings", [{}, {"mc": 2, "beta": 0.7, "freebits": 0.1}])
def test_each_draw_is_that_of_the_estimator_on_the_same_particles(problem, settings):
    model, x, parameters = problem()
    several = estimators(**settings)
    measurement = Measurement(several, model, x, 5, parameters, block_size=1)
    for i in range(measurement.num_blocks):
        gradients = measurement.block(i)
        assert gradients.shape == (len(several), 1, measurement.num_parameters)
        for estimator, row in zip(several, gradients[:, 0], strict=True):
            with torch.random.fork_rng():
                analysis.gradients._seed([torch.default_generator], 0, i)
                torch.testing.assert_close(row, one_at_a_time(estimator, 3, model, x, parameters), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("problem", [mixture, toy])
def test_vectorised_blocks_are_those_of_each_alone(problem):
    """With as many particles drawn and the same size of blocks, the noise is the same."""
    model, x, parameters = problem()
    several = [estimator for estimator in estimators() if not estimator.num_extra]
    together = Measurement(several, model, x, 20, parameters, block_size=10)
    for i, estimator in enumerate(several):
        alone = Measurement([estimator], model, x, 20, parameters, block_size=10)
        torch.testing.assert_close(together.block(1)[i], alone.block(1)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 6])
def test_the_others_do_not_matter(block_size):
    model, x, parameters = mixture()
    few, many = (
        Measurement(estimators(ids), model, x, 12, parameters, block_size=block_size)
        for ids in (("ovis-S3-exclusive", "reinforce"), ("reinforce", "wake-wake", "ovis-S3-exclusive", "ovis-gamma1"))
    )
    torch.testing.assert_close(few.block(1)[0], many.block(1)[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(few.block(1)[1], many.block(1)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ids", [("pathwise-iwae", "dreg", "stl"), ("pathwise-iwae", "stl")])
@pytest.mark.parametrize("block_size", [1, 5])
def test_losses_that_depend_on_more_than_densities(ids, block_size):
    """z carries gradients: the losses are differentiated whole."""
    model, x, parameters = toy()
    several = estimators(ids)
    together = Measurement(several, model, x, 10, parameters, block_size=block_size)
    for i, estimator in enumerate(several):
        alone = Measurement([estimator], model, x, 10, parameters, block_size=block_size)
        torch.testing.assert_close(together.block(1)[i], alone.block(1)[0], rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_each_alone():
    """Within 4.5 standard errors, as the draws are others."""
    model, x, parameters = mixture()
    several = estimators()
    for estimator, stats in zip(several, compare_gradients(several, model, x, 800, parameters, seed=1), strict=True):
        alone = gradient_statistics(estimator, model, x, 800, parameters, seed=2)
        for name in ("mean", "variance"):
            spread = (getattr(stats, f"{name}_se") ** 2 + getattr(alone, f"{name}_se") ** 2).sqrt()
            assert ((getattr(stats, name) - getattr(alone, name)).abs() <= 4.5 * spread + 1e-6).all(), estimator


def test_groups():
    several = [
        get_estimator("reinforce", iw=4),
        get_estimator("reinforce", iw=5),
        ImportanceWeighted(),
        get_estimator("pathwise-iwae", iw=4),
        get_estimator("ovis-S2-exclusive", iw=4),
        get_estimator("wake-wake", mc=2, iw=4),
        get_estimator("wake-sleep", iw=4),
        get_estimator("ovis-gamma1", iw=5, alpha=0.5),
    ]
    assert group_by_particles(several) == [[0, 4], [1, 7], [2], [3], [5], [6]]
    with pytest.raises(ValueError, match="one group"):
        Measurement(several[:2], GaussianToy(2), torch.ones(1, 2), 10, "b")


def test_all_groups_come_back_in_order():
    model, x, parameters = toy()
    several = estimators(("reinforce", "pathwise-iwae", "ovis-gamma1"))
    stats = compare_gradients(several, model, x, 20, parameters, block_size=5)
    for estimator, found in zip(several, stats, strict=True):
        alone = gradient_statistics(estimator, model, x, 20, parameters, block_size=5)
        torch.testing.assert_close(found.mean, alone.mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [None, 1, 4])
def test_blocks_are_pure(block_size):
    model, x, parameters = mixture()
    first = Measurement(estimators(), model, x, 10, parameters, seed=3, block_size=block_size)
    second = Measurement(estimators(), model, x, 10, parameters, seed=3, block_size=block_size)
    torch.randn(3)
    before = [first.block(i) for i in range(first.num_blocks)]
    for i in reversed(range(second.num_blocks)):
        torch.randn(3)
        assert torch.equal(second.block(i), before[i])
    assert sum(block.shape[1] for block in before) == 10
    with pytest.raises(IndexError):
        first.block(first.num_blocks)


@pytest.mark.parametrize("block_size", [1, 4])
def test_kept_or_drawn_again_is_the_same(monkeypatch, block_size):
    model, x, parameters = mixture()
    kept = compare_gradients(estimators(), model, x, 10, parameters, block_size=block_size)
    monkeypatch.setattr(analysis.gradients, "KEPT_BYTES", 0)
    for a, b in zip(
        kept, compare_gradients(estimators(), model, x, 10, parameters, block_size=block_size), strict=True
    ):
        assert torch.equal(a.mean, b.mean)
        assert a.summary() == pytest.approx(b.summary(), rel=0, nan_ok=True)


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize(
    ("problem", "ids"),
    [(mixture, IDS), (toy, IDS), (toy, ("pathwise-iwae", "stl", "dreg")), (mixture, ("rloo", "vargrad", "nvil"))],
)
def test_nothing_changes(problem, ids, block_size):
    model, x, parameters = problem()
    several = estimators(ids)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = dict(model.named_parameters())
    state = torch.get_rng_state()
    compare_gradients(several, model, x, 8, parameters, block_size=block_size)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {
        name: id(parameter) for name, parameter in held.items()
    }
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(estimator.training for estimator in several)
    copy.deepcopy(several[0])(copy.deepcopy(model), x)[0].backward()


class Branching(GaussianMixture):
    """Looks at a sampled value, which vmap refuses."""

    def forward(self, x, reparam=False, sample_shape=(1, 1)):
        output = super().forward(x, reparam, sample_shape)
        assert output["z"][0].sum() >= 0
        return output


def test_what_vmap_refuses_is_looped_over_with_a_warning():
    model, x, parameters = mixture()
    model.__class__ = Branching
    with pytest.warns(UserWarning, match="Reinforce, Vimco.* on Branching .* as with block_size=1"):
        stats = compare_gradients(estimators(), model, x, 9, parameters, block_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single = compare_gradients(estimators(), model, x, 9, parameters, block_size=1)
    assert all(torch.equal(a.mean, b.mean) for a, b in zip(stats, single, strict=True))


def test_frozen_parameters_are_constant():
    model, x, parameters = mixture()
    model.prior.logits.requires_grad_(False)
    for stats in compare_gradients(estimators(), model, x, 10, parameters):
        assert (stats.mean[-5:] == 0).all()
        assert not stats.constant[:-5].all()


@pytest.mark.parametrize("block_size", [1, 4])
def test_parameters_without_influence_are_constant(block_size):
    model, x, _ = mixture()
    model.unused = nn.Linear(2, 1)
    for stats in compare_gradients(estimators(), model, x, 8, "unused", block_size=block_size):
        assert stats.constant.all()
        assert (stats.mean == 0).all()


class LazyBaseline(Reinforce):
    """Takes its shapes from the first x."""

    def __post_init__(self):
        super().__post_init__()
        self.network = nn.LazyLinear(1)

    def loss(self, particles, alpha, beta):
        return super().loss(particles, alpha, beta) + 0 * self.network(particles.x.view(len(particles.x), -1)).sum()


class Doubled(Reinforce):
    """A loss of its own, of which the coefficients know nothing."""

    def loss(self, particles, alpha, beta):
        return 2 * super().loss(particles, alpha, beta)


class Mixing(Reinforce):
    """Its control variate is the mean bound of all copies."""

    def control_variate(self, weights, beta):
        return (weights.shift + weights.relative_bound).mean(0) - weights.shift


class Lenient(Reinforce):
    """Takes what the model returned where there is something."""

    def loss(self, particles, alpha, beta):
        penalty = sum(parameter.square().sum() for parameter in particles.model.parameters())
        return super().loss(particles, alpha, beta) + (penalty if "z" in particles.output else 0)


class Looking(Reinforce):
    """The same by a method that has a default."""

    def loss(self, particles, alpha, beta):
        log_pz = particles.output.get("log_pz", [torch.zeros(())])
        return super().loss(particles, alpha, beta) + log_pz[0].mean()


class OfTheOldStyle(torch.autograd.Function):
    """The identity in numpy, by a Function that torch.func does not take."""

    @staticmethod
    def forward(ctx, value):
        return torch.from_numpy(value.detach().numpy().copy())

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Numpy(Reinforce):
    """Has operations that work on plain tensors alone."""

    def loss(self, particles, alpha, beta):
        return 2 * OfTheOldStyle.apply(super().loss(particles, alpha, beta))


@pytest.mark.filterwarnings("ignore:.*torch.func.vmap refuses")
@pytest.mark.parametrize("block_size", [1, 5])
@pytest.mark.parametrize("kind", [Doubled, Mixing, Lenient, Looking, Numpy])
def test_what_a_subclass_changes_is_measured(kind, block_size):
    model, x, parameters = mixture()
    several = [kind(mc=2, iw=4), *estimators(("reinforce",), mc=2)]
    together = Measurement(several, model, x, 10, parameters, block_size=block_size)
    alone = Measurement(several[:1], model, x, 10, parameters, block_size=block_size)
    torch.testing.assert_close(together.block(1)[0], alone.block(1)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together.block(1)[0], together.block(1)[1], rtol=0.1)


class Refusing(Reinforce):
    """Raises an error of its own."""

    def loss(self, particles, alpha, beta):
        raise ValueError("not today")


def test_nothing_is_shared_any_longer_after_an_error():
    model, x, parameters = mixture()
    several = [*estimators(("reinforce",)), Refusing(iw=4)]
    with pytest.raises(ValueError, match="not today") as error:
        compare_gradients(several, model, x, 4, parameters)
    log_w = torch.zeros(1, 2, 3)
    assert weigh(log_w, 0.0) is not weigh(log_w, 0.0)
    del error  # and with it all that was on the stack


def test_lazy_parameters_are_built_on_a_copy():
    model, x, parameters = mixture()
    several = [LazyBaseline(iw=4), *estimators(("reinforce",))]
    for block_size in (1, 4):
        stats = compare_gradients(several, model, x, 8, parameters, block_size=block_size)
        torch.testing.assert_close(stats[0].mean, stats[1].mean)
    assert isinstance(several[0].network.weight, nn.UninitializedParameter)


def test_labels():
    model = GaussianToy(2)
    assert parameter_labels(model, "b,A") == ["A[0,0]", "A[0,1]", "A[1,0]", "A[1,1]", "b[0]", "b[1]"]
    model.scale = nn.Parameter(torch.zeros(()))
    assert parameter_labels(model, "scale") == ["scale"]
    with pytest.raises(UserError, match="matches none"):
        parameter_labels(model, "c")


def test_kept_blocks_lie_in_one_tensor_and_can_be_put_back():
    """Small tensors kept one by one would hold on to the memory around them."""
    model, x, parameters = mixture()
    measurement = Measurement(estimators(), model, x, 10, parameters, block_size=4)
    kept, again = KeptBlocks(measurement), KeptBlocks(measurement)
    for i in range(2):
        kept.extend(measurement.block(i))
    assert torch.equal(kept.joined(), torch.cat([measurement.block(0), measurement.block(1)], 1))
    again.extend(kept.joined())
    assert len(again) == 2
    again.extend(measurement.block(2))
    assert [block.shape[1] for block in again] == [4, 4, 2]
    assert all(torch.equal(block, measurement.block(i)) for i, block in enumerate(again))
    assert len({block.untyped_storage().data_ptr() for block in again}) == 1


@pytest.mark.parametrize(
    ("several", "options", "message"),
    [
        (["rloo", "stl"], {}, "estimators: 'rloo' is no estimator; get_estimator"),
        ({"rloo": None}, {}, "estimators: 'rloo' is no estimator"),
        (estimators(), {"oracles": [None]}, "oracles: 1 of them for 7 estimators"),
    ],
)
def test_what_cannot_be_compared_is_refused(several, options, message):
    model, x, parameters = mixture()
    with pytest.raises(UserError, match=message):
        compare_gradients(several, model, x, 8, parameters, **options)


@pytest.mark.parametrize(("x", "what"), [(torch.zeros(0), "no observation"), (torch.tensor([1.0, torch.nan]), "NaN")])
def test_an_x_without_numbers_is_refused(x, what):
    model, _, parameters = mixture()
    with pytest.raises(UserError, match=f"x of shape .* has {what}"):
        gradient_statistics(get_estimator("rloo", iw=3), model, x, 8, parameters)
