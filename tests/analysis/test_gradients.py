import itertools
import math
import warnings

import pytest
import torch
from torch import nn
from torch.distributions import Dirichlet, Distribution, Normal

import analysis.gradients
import analysis.replicates
from analysis.gradients import Measurement, gradient_statistics, select_parameters
from analysis.statistics import reduce_replicates
from errors import UserError
from estimators import get_estimator
from models import GaussianMixture, GaussianToy
from tests.analysis.problems import FAMILIES, Foreign, ImportanceWeighted, TwoBits, foreign, loop

FIELDS = ("mean", "variance", "snr", "mean_se", "variance_se", "snr_se")


def assert_same(a, b, rtol=0.0):
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=rtol, atol=0)
    assert a.summary() == pytest.approx(b.summary(), rel=rtol, nan_ok=True)


def enumerate_gradient(model, iw):
    """Exact mean and variance of the gradient for one x: every outcome of the 2 iw bits, with its probability."""
    logits = model.inference_network["logits"]
    probs = torch.sigmoid(logits.detach())
    first, second = torch.zeros_like(probs), torch.zeros_like(probs)
    for bits in itertools.product([0.0, 1.0], repeat=2 * iw):
        z = torch.tensor(bits, dtype=logits.dtype).view(iw, 2)
        log_q = (z * nn.functional.logsigmoid(logits) + (1 - z) * nn.functional.logsigmoid(-logits)).sum(-1)
        log_p = model.table[z[:, 0].long(), z[:, 1].long()]
        bound = torch.logsumexp(log_p - log_q, 0) - math.log(iw)
        (gradient,) = torch.autograd.grad(-bound - bound.detach() * log_q.sum(), logits)
        weight = torch.where(z == 1, probs, 1 - probs).prod()
        first, second = first + weight * gradient, second + weight * gradient.square()
    return first, second - first.square()


@pytest.mark.parametrize("block_size", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_moments_are_those_of_enumeration(block_size):
    """Within four standard errors of the exact mean and variance (a batch of two: half the variance)."""
    model = TwoBits(torch.float64)
    num = 20_000 if block_size is None else 2_000
    stats = gradient_statistics(ImportanceWeighted(2), model, torch.zeros(2, 1), num, block_size=block_size)
    mean, variance = enumerate_gradient(model, 2)
    assert ((stats.mean - mean).abs() < 4 * stats.mean_se).all()
    assert ((stats.variance - variance / 2).abs() < 4 * stats.variance_se).all()
    assert (stats.variance_se < 0.1 * stats.variance).all()


@pytest.mark.parametrize(
    ("family", "reparam"),
    [(family, reparam) for family, (_, has, _) in FAMILIES.items() for reparam in ([False, True] if has else [False])],
)
def test_foreign_models_are_vectorised_and_agree_with_a_loop(family, reparam):
    """Mean and variance within 4.5 standard errors of 300 calls of backward(); a warning would be an error."""
    model, x = foreign(family)
    estimator = ImportanceWeighted(reparam=reparam)
    stats = gradient_statistics(estimator, model, x, 2000, seed=1)
    gradients = loop(estimator, model, x, list(model.inference_network.parameters()), 300)
    slow = reduce_replicates(lambda: iter([gradients]), gradients.dtype)
    assert not stats.constant.any()
    for name in ("mean", "variance"):
        spread = (getattr(stats, f"{name}_se") ** 2 + getattr(slow, f"{name}_se") ** 2).sqrt()
        assert ((getattr(stats, name) - getattr(slow, name)).abs() < 4.5 * spread).all(), name


def test_replicates_of_a_block_are_independent():
    """Were they not, the mean over a block would spread more than its standard error says (200 runs: to 5%)."""
    model, x = foreign("Normal")
    runs = [gradient_statistics(ImportanceWeighted(), model, x, 50, seed=seed) for seed in range(200)]
    spread = torch.stack([run.mean for run in runs]).std(0)
    reported = torch.stack([run.mean_se for run in runs]).square().mean(0).sqrt()
    torch.testing.assert_close(spread / reported, torch.ones_like(spread), rtol=0, atol=0.2)


@pytest.mark.slow
def test_standard_errors_of_the_averages_are_the_spread_over_seeds():
    """200 seeds: the empirical spread is known to 5% (for normal values); four of them allowed."""
    model, x = foreign("Bernoulli")
    runs = [gradient_statistics(ImportanceWeighted(), model, x, 400, seed=seed) for seed in range(200)]
    for name in ("grads/snr", "grads/dsnr", "grads/variance", "grads/magnitude"):
        values = torch.tensor([run.summary()[name] for run in runs])
        reported = torch.tensor([run.summary()[f"{name}_se"] for run in runs]).mean()
        assert reported / values.std() == pytest.approx(1, abs=0.2), name


def test_same_seed_same_numbers():
    model, x = foreign("Normal")
    first = gradient_statistics(ImportanceWeighted(), model, x, 120, seed=3)
    torch.randn(7)
    assert_same(first, gradient_statistics(ImportanceWeighted(), model, x, 120, seed=3))
    assert not torch.equal(first.mean, gradient_statistics(ImportanceWeighted(), model, x, 120, seed=4).mean)


def test_full_blocks_do_not_depend_on_the_number_of_replicates():
    model, x = foreign("Normal")
    short, long = (Measurement([ImportanceWeighted()], model, x, num, block_size=10) for num in (25, 30))
    assert [short.block(i).shape for i in range(short.num_blocks)] == [(1, 10, 12), (1, 10, 12), (1, 5, 12)]
    assert [long.block(i).shape for i in range(long.num_blocks)] == [(1, 10, 12)] * 3
    assert all(torch.equal(short.block(i), long.block(i)) for i in range(2))
    assert not torch.equal(long.block(0), long.block(1))


@pytest.mark.parametrize("block_size", [None, 1, 7])
def test_kept_or_drawn_again_is_the_same(monkeypatch, block_size):
    model, x = foreign("Gamma")
    kept = gradient_statistics(ImportanceWeighted(), model, x, 50, block_size=block_size)
    monkeypatch.setattr(analysis.gradients, "KEPT_BYTES", 0)
    assert_same(kept, gradient_statistics(ImportanceWeighted(), model, x, 50, block_size=block_size))


def test_block_size_follows_shapes():
    sizes = []

    class Counting(ImportanceWeighted):
        def forward(self, model, x, alpha=None, beta=None):
            sizes.append(torch._C._functorch.maybe_current_level() is not None)
            return super().forward(model, x)

    model, x = foreign("Normal")
    gradient_statistics(Counting(), model, x, 1000)
    assert sizes == [False, True, True]  # an evaluation, two blocks of 500
    sizes.clear()
    gradient_statistics(Counting(iw=2**18), model, x, 2)
    assert sizes == [False] * 3  # an evaluation, two single replicates: samples of 2^18 x 3 x 2 floats


class Stateful(ImportanceWeighted):
    """Keeps a running mean in training and builds a baseline on its first x."""

    def __init__(self):
        super().__init__()
        self.running: torch.Tensor
        self.register_buffer("running", torch.zeros(()))
        self.baseline: nn.Module | None = None
        self.calls = 0

    def forward(self, model, x, alpha=None, beta=None):
        if self.baseline is None:
            self.baseline = nn.Linear(x.shape[-1], 1)
        self.calls += 1
        loss, diagnostics, output = super().forward(model, x)
        if self.training:
            self.running.lerp_(loss.detach(), 0.5)
        return loss + 0 * self.baseline(x).sum() + self.running, diagnostics, output


class Remembering(Foreign):
    """Counts its calls in a buffer and stores its output."""

    def __init__(self):
        super().__init__("Normal")
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros(()))
        self.last = None

    def forward(self, x, reparam=False, **kwargs):
        self.calls += 1
        self.last = super().forward(x, reparam)
        return self.last


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("block_size", [None, 1, 4])
def test_nothing_changes(failing, block_size):
    class Failing(Stateful):
        def forward(self, model, x, alpha=None, beta=None):
            result = super().forward(model, x)
            if failing:
                raise ZeroDivisionError("on purpose")
            return result

    model, estimator, x = Remembering(), Failing(), torch.ones(3, 2)
    model.inference_network.eval()
    model.inference_network.weight.grad = torch.ones(4, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in (*model.modules(), *estimator.modules())]
    state, validate = torch.get_rng_state(), Distribution._validate_args
    try:
        gradient_statistics(estimator, model, x, 10, block_size=block_size)
        assert not failing
    except ZeroDivisionError:
        assert failing
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in (*model.modules(), *estimator.modules())] == modes
    assert Distribution._validate_args is validate
    assert torch.equal(model.inference_network.weight.grad, torch.ones(4, 2))
    assert all(p.requires_grad for p in model.parameters())
    assert model.inference_network.bias.grad is None
    assert model.last is None
    assert (estimator.baseline, estimator.calls, estimator.running.item()) == (None, 0, 0)


def test_no_grad_around_makes_no_difference():
    model, x = foreign("Normal")
    expected = gradient_statistics(ImportanceWeighted(reparam=True), model, x, 20)
    with torch.no_grad():
        assert_same(expected, gradient_statistics(ImportanceWeighted(reparam=True), model, x, 20))
        assert not torch.is_grad_enabled()


class Branching(Foreign):
    """Looks at a sampled value, which vmap refuses."""

    def forward(self, x, reparam=False, **kwargs):
        output = super().forward(x, reparam)
        if output["z"][0].sum() > 0:
            output["px"] = Normal(output["px"].mean, 2.0)
        return output


class DirichletModel(Foreign):
    """Its sample is an autograd.Function that vmap does not take."""

    def __init__(self):
        super().__init__("Exponential")
        self.build = lambda t: Dirichlet(t.exp())


@pytest.mark.parametrize("kind", [lambda: Branching("Normal"), DirichletModel])
def test_what_vmap_refuses_is_looped_over_with_a_warning(kind):
    torch.manual_seed(0)
    model, x, estimator = kind(), torch.randn(3, 2), ImportanceWeighted()
    with pytest.warns(UserWarning, match=f"ImportanceWeighted on {kind().__class__.__name__} .* as with block_size=1"):
        stats = gradient_statistics(estimator, model, x, 300, block_size=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(stats, gradient_statistics(estimator, model, x, 300, block_size=1))
    gradients = loop(estimator, model, x, list(model.inference_network.parameters()), 300)
    slow = reduce_replicates(lambda: iter([gradients]), gradients.dtype)
    spread = (stats.mean_se**2 + slow.mean_se**2).sqrt()
    assert ((stats.mean - slow.mean).abs() < 4.5 * spread).all()


def test_memory_does_not_decide(monkeypatch):
    """A block that does not fit is an error, not a reason for other draws."""

    def vectorised(self, count):
        if count > 2:
            raise torch.OutOfMemoryError("no room")
        return torch.ones(count, 12)

    monkeypatch.setattr(analysis.replicates.Replicates, "vectorised", vectorised)
    model, x = foreign("Normal")
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        gradient_statistics(ImportanceWeighted(), model, x, 10)


def test_errors_of_a_model_come_through_as_they_are():
    model, _ = foreign("Normal")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradient_statistics(ImportanceWeighted(), model, torch.ones(3, 5), 10)


def test_a_loss_that_is_no_scalar_is_refused():
    class PerObservation(ImportanceWeighted):
        def forward(self, model, x, alpha=None, beta=None):
            loss, diagnostics, output = super().forward(model, x)
            return loss.expand(len(x)), diagnostics, output

    model, x = foreign("Normal")
    with pytest.raises(UserError, match=r"PerObservation returned a loss of shape \[3\]; statistics need a scalar"):
        gradient_statistics(PerObservation(), model, x, 10)


@pytest.mark.parametrize("name", ["reinforce", "vimco-geometric", "ovis-gamma1", "ovis-S2-exclusive", "wake-wake"])
def test_the_models_and_estimators_of_the_house_are_vectorised(name):
    """A warning, which would be an error here, would say that they are not."""
    estimator = get_estimator(name, mc=2, iw=3)
    for model, x in ((GaussianMixture(), torch.tensor([3.0, 90.0])), (GaussianToy(3), torch.ones(2, 3))):
        for parameter in model.parameters():
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        parts = "b,mu" if isinstance(model, GaussianToy) else "inference_network,prior"
        stats = gradient_statistics(estimator, model, x, 20, parameters=parts)
        assert stats.summary()["grads/num_constant"] < len(stats.mean)
        assert math.isfinite(stats.summary()["grads/snr"])


def test_a_gradient_that_varies_by_rounding_alone_is_constant():
    """Self-normalised weights sum to one: a component that no replicate draws has the same gradient each time."""
    torch.manual_seed(0)
    model, x = GaussianMixture(), 100 + 30 * torch.randn(50)
    dict(model.named_parameters())["inference_network.2.bias"].data[:3] = -40.0
    stats = gradient_statistics(get_estimator("wake-wake", iw=20), model, x, 300)
    assert stats.summary()["grads/num_constant"] >= 3
    assert stats.snr.nan_to_num().max() < 1000


def test_pathwise_gradient_of_the_generative_model_alone():
    model = GaussianToy(3)
    stats = gradient_statistics(get_estimator("pathwise-iwae", iw=3), model, torch.ones(2, 3), 20, parameters="mu")
    assert not stats.constant.any()


def test_parameters_in_their_order_and_dtype():
    model, x = foreign("Normal")
    stats = gradient_statistics(
        ImportanceWeighted(), model, x, 30, parameters="generative_model,inference_network.bias"
    )
    names = ["inference_network.bias", "generative_model.weight", "generative_model.bias"]
    assert select_parameters(model, "generative_model, inference_network.bias") == names
    assert select_parameters(model, ["generative_model", "inference_network.bias"]) == names
    parts = [gradient_statistics(ImportanceWeighted(), model, x, 30, parameters=name).mean for name in names]
    assert torch.equal(stats.mean, torch.cat(parts))
    assert stats.mean.dtype == torch.float32
    model.double()
    assert gradient_statistics(ImportanceWeighted(), model, x.double(), 30).mean.dtype == torch.float64


def test_float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        model, x = foreign("OneHotCategorical")
        stats = gradient_statistics(ImportanceWeighted(), model, x, 30)
    finally:
        torch.set_default_dtype(torch.float32)
    assert stats.mean.dtype == torch.float64
    assert stats.variance.min() > 0


def test_frozen_parameters_are_constant():
    model, x = foreign("Normal")
    free = gradient_statistics(ImportanceWeighted(), model, x, 30)
    model.inference_network.bias.requires_grad_(False)
    for block_size in (None, 1):
        stats = gradient_statistics(ImportanceWeighted(), model, x, 30, block_size=block_size)
        assert stats.constant.tolist() == [False] * 8 + [True] * 4
        assert (stats.mean[8:] == 0).all()
        assert stats.summary()["grads/num_constant"] == 4
    stats = gradient_statistics(ImportanceWeighted(), model, x, 30)
    assert torch.equal(stats.mean[:8], free.mean[:8])
    assert model.inference_network.bias.grad is None


@pytest.mark.parametrize("block_size", [None, 1])
def test_parameters_without_influence_are_constant(block_size):
    model, x = foreign("Normal")
    model.unused = nn.Linear(2, 1)
    stats = gradient_statistics(ImportanceWeighted(), model, x, 30, parameters="unused", block_size=block_size)
    assert stats.constant.all()
    assert (stats.mean == 0).all()


def test_filters_that_match_nothing_are_refused():
    model, _ = foreign("Normal")
    with pytest.raises(
        UserError, match=r"'inference_netwrk' matches none of Foreign; did you mean 'inference_network'"
    ):
        select_parameters(model, "inference_netwrk")
    with pytest.raises(UserError, match=r"'inference' matches none"):
        select_parameters(model, "inference,generative_model")
    with pytest.raises(UserError, match=r"'' matches none of Foreign; choose from generative_model, "):
        select_parameters(model, [])
    model.inference_network.requires_grad_(False)
    with pytest.raises(UserError, match=r"all that 'inference_network' matches of Foreign is frozen"):
        select_parameters(model, "inference_network")


def test_numbers_that_make_no_sense_are_refused():
    model, x = foreign("Normal")
    with pytest.raises(UserError, match=r"num_replicates=1: .* at least 2"):
        gradient_statistics(ImportanceWeighted(), model, x, 1)
    with pytest.raises(UserError, match=r"block_size=0: .* at least 1"):
        gradient_statistics(ImportanceWeighted(), model, x, 10, block_size=0)
