"""The functions of log-weights in float32, where particles differ by more than it can add up."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from estimators import get_estimator
from estimators.bounds.base import ScoreFunction
from estimators.bounds.ovis_monte_carlo import mean_learning_signal
from estimators.bounds.weights import Terms, leave_one_out, weigh
from models import Template
from models.particles import Particles

CONTROL_VARIATES = (
    "vimco-arithmetic",
    "vimco-geometric",
    "ovis-gamma0",
    "ovis-gamma1",
    "ovis-arithmetic-gamma0",
    "ovis-arithmetic-gamma1",
    "ovis-geometric-gamma0",
    "ovis-geometric-gamma1",
)
BASELINES = ("reinforce", "reinforce-baseline", "nvil")
ELBOS = ("rloo", "vargrad")
TVOS = ("tvo-part3-beta1", "tvo-part5-right", "tvo-part5-config1-trapz", "tvo-part3-linear")
GAPS = (0.0, 1.0, 20.0, 50.0, 87.0, 88.0, 90.0)


def column(*log_w: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """One copy, one observation: [1, K, 1]."""
    return torch.tensor(log_w, dtype=dtype).view(1, -1, 1)


def exact_leave_one_out(log_w: Tensor) -> Tensor:
    """The sums over all others, one particle at a time, in float64."""
    others = [torch.cat([log_w[:, :k], log_w[:, k + 1 :]], 1) for k in range(log_w.shape[1])]
    return torch.stack([torch.logsumexp(rest.double(), 1) for rest in others], 1)


def control_variate(id: str, log_w: Tensor, alpha: float = 0.0) -> Tensor:
    """c_k in absolute terms."""
    estimator = get_estimator(id, iw=log_w.shape[1], alpha=alpha)
    assert isinstance(estimator, ScoreFunction)
    weights = weigh(log_w, alpha)
    return weights.shift + estimator.control_variate(weights, 1.0)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_leave_one_out_is_exact_at_every_gap(gap: float, alpha: float):
    for log_w in (
        column(0.0, -gap),
        column(-gap, 0.0, -gap - 1.0),
        column(-gap, -gap, 0.0, 0.0),
        column(3.0, 3.0 - gap),
    ):
        weights = weigh(log_w, alpha)
        actual = leave_one_out(weights) + (1 - alpha) * weights.shift
        torch.testing.assert_close(actual.double(), exact_leave_one_out((1 - alpha) * log_w), rtol=1e-6, atol=1e-6)


def test_leave_one_out_of_random_weights():
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 1.0, 10.0, 50.0):
        log_w = spread * torch.randn(3, 40, 5, generator=generator)
        weights = weigh(log_w, 0.0)
        actual = leave_one_out(weights) + weights.shift
        torch.testing.assert_close(actual.double(), exact_leave_one_out(log_w), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("id", CONTROL_VARIATES)
def test_control_variates_in_float32_agree_with_float64(id: str, gap: float):
    for log_w in ((0.0, -gap), (-gap, 0.0, -gap - 1.0), (-1.0, -gap, 0.0, 0.0)):
        actual = control_variate(id, column(*log_w))
        expected = control_variate(id, column(*log_w, dtype=torch.float64))
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("id", [*CONTROL_VARIATES, *BASELINES, *ELBOS, "wake-wake", "ovis-S1", *TVOS])
def test_estimates_in_float32_agree_with_float64(id: str, gap: float):
    """The bound, and the gradient of each log-weight and of each score."""
    for log_w in ((0.0, -gap), (-gap, 0.0, -gap - 1.0), (-1.0, -gap, 0.0, 0.0)):
        found = []
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(0)
            estimator, given = get_estimator(id, iw=len(log_w)), particles(column(*log_w, dtype=dtype))
            bound, surrogate = estimator.estimate(given, 0.0, 1.0)
            surrogate.sum().backward()
            found.append(
                torch.stack([bound[0].expand(len(log_w)), *(given.output[of].grad[0, :, 0] for of in ("theta", "phi"))])
            )
            assert found[-1].dtype == dtype
        torch.testing.assert_close(found[0].double(), found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gap", GAPS)
def test_auxiliary_particles_in_float32_agree_with_float64(gap: float):
    for own in (0.0, -gap, gap):
        found = []
        for dtype in (torch.float32, torch.float64):
            weights = weigh(column(0.0, -gap, -gap, dtype=dtype), 0.0)
            log_w = column(own, -1.0, dtype=dtype)
            found.append(mean_learning_signal(weights, Terms(log_w, log_w.unsqueeze(0), 1.0)).double())
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_mean_learning_signal_by_hand():
    """One main particle beside w = 1, one auxiliary of w = 3: L = log((1 + 3) / 2), v = 3/4."""
    weights = weigh(column(0.0, 0.0, dtype=torch.float64), 0.0)
    auxiliary = column(math.log(3), dtype=torch.float64)
    actual = mean_learning_signal(weights, Terms(auxiliary, auxiliary.unsqueeze(0), 0.5))
    torch.testing.assert_close(actual, column(*[math.log(2) - 0.5 * 0.75] * 2, dtype=torch.float64))


def particles(log_px: Tensor) -> Particles:
    """Particles whose log-weights are log_px, with a gradient for theta and phi."""
    theta, phi = (torch.zeros_like(log_px).requires_grad_() for _ in range(2))
    output = {"theta": theta, "phi": phi}
    x = torch.zeros(log_px.shape[-1], 1)
    return Particles(log_px + theta, (torch.zeros_like(log_px),), (phi * 1.0,), output, Template(), x)


@pytest.mark.parametrize(
    "id", [*CONTROL_VARIATES, *BASELINES, *ELBOS, "wake-wake", "ovis-S1", "ovis-S1-exclusive", *TVOS]
)
@pytest.mark.parametrize(
    "log_w",
    [(0.0, -math.inf, -1.0), (-math.inf, 0.0, -math.inf), (-math.inf, -5.0, 2.0), (1.0, 0.0, -math.inf)],
    ids=str,
)
def test_impossible_particles_leave_finite_gradients(id: str, log_w: tuple[float, ...]):
    estimator = get_estimator(id, iw=len(log_w))
    extra = [0.5] * estimator.num_extra
    given = particles(column(*log_w, *extra))
    bound, surrogate = estimator.estimate(given, 0.0, 1.0)
    surrogate.sum().backward()
    assert bound.item() == -math.inf if id in ELBOS else bound.isfinite().all()
    assert surrogate.isfinite().all()
    for name in ("theta", "phi"):
        assert given.output[name].grad.isfinite().all()
    impossible = column(*log_w, *extra) == -math.inf
    assert (given.output["theta"].grad[impossible].abs() < 1e-20).all()


@pytest.mark.parametrize(
    ("id", "log_w", "bound"),
    [
        ("ovis-S1", (-math.inf, 0.0), -math.log(2)),
        ("ovis-S3", (-math.inf, -math.inf, 0.0, -1.0, -2.0), math.log((1 + math.exp(-1) + math.exp(-2)) / 5)),
        *((id, (-math.inf,) * 3, -math.inf) for id in (*CONTROL_VARIATES, *BASELINES, *ELBOS, "wake-wake", *TVOS)),
    ],
)
def test_observations_whose_particles_are_all_impossible_leave_finite_gradients(id, log_w, bound):
    given = particles(column(*log_w))
    actual, surrogate = get_estimator(id, iw=len(log_w)).estimate(given, 0.0, 1.0)
    assert actual.item() == pytest.approx(bound)
    (surrogate.detach() - surrogate).sum().backward()
    for name in ("theta", "phi"):
        assert given.output[name].grad.isfinite().all()


@pytest.mark.parametrize("freebits", [None, 0.1])
@pytest.mark.parametrize(
    "id", [*CONTROL_VARIATES, *BASELINES, "wake-wake", "rloo", "ovis-S1", "ovis-S1-exclusive", *TVOS]
)
def test_a_prior_that_rules_out_a_particle_counts_for_nothing_at_beta_zero(id: str, freebits: float | None):
    """Warm-ups of beta start there."""
    freebits = None if id == "rloo" else freebits
    estimator = get_estimator(id, iw=3, beta=0.0, freebits=freebits).eval()
    size = estimator.num_particles + estimator.num_extra
    log_px = torch.arange(float(size)).view(1, size, 1)

    def estimate(log_pz: Tensor) -> tuple[Tensor, Tensor]:
        given = particles(log_px)._replace(log_pz=(log_pz.expand(1, size, 1),))
        bound, surrogate = estimator.estimate(given, 0.0, 0.0)
        surrogate.sum().backward()
        return bound, torch.cat([given.output[name].grad for name in ("theta", "phi")])

    impossible = torch.where(log_px == 1.0, -torch.inf, 0.0)
    for actual, expected in zip(estimate(impossible), estimate(torch.zeros(())), strict=True):
        torch.testing.assert_close(actual, expected)


class _LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return out


@pytest.mark.parametrize(
    ("id", "per_particle"),
    [
        *((id, 1) for id in (*CONTROL_VARIATES, *BASELINES, *ELBOS, "wake-wake")),
        ("ovis-S10-exclusive", 10),
        ("ovis-S10", 10),
        ("tvo-part5-beta2", 5),
        ("tvo-part5-config1-right", 5),
        ("tvo-part5-linear-trapz", 6),
    ],
)
def test_no_tensor_grows_faster_than_k(id: str, per_particle: int):
    num_particles, batch = 20_000, 2
    estimator = get_estimator(id, iw=num_particles)
    given = particles(torch.randn(1, num_particles + estimator.num_extra, batch))
    with _LargestTensor() as largest:
        estimator.estimate(given, 0.0, 1.0).surrogate.sum().backward()
    assert largest.num_elements <= per_particle * (num_particles + estimator.num_extra) * batch
