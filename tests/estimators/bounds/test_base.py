"""What all estimators share: what they refuse, what they return, and where they can be called."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal
from torch.func import functional_call, grad, vmap

from estimators import get_estimator
from models import Template
from tests import oracles
from tests.oracles import Hierarchy, Settings
from tests.simple_model import SimpleModel

IDS = (
    "reinforce",
    "vimco-arithmetic",
    "vimco-geometric",
    "ovis-gamma1",
    "ovis-S1",
    "ovis-S2-exclusive",
    "wake-wake",
    "tvo-part5-beta2",
    "tvo-part5-config1-right",
    "tvo-part5-linear-trapz",
    "rloo",
    "vargrad",
    "ovis-arithmetic-gamma0.4",
    "ovis-geometric-gamma1",
    "reinforce-baseline",
    "nvil",
)
REFUSED = {
    "rloo": {"alpha", "freebits"},
    "vargrad": {"alpha", "beta", "freebits"},
}


def taken(id: str, **options: float | None) -> dict[str, Any]:
    """The options that an id does not refuse."""
    return {name: value for name, value in options.items() if name not in REFUSED.get(id, ())}


def gradients(model: nn.Module) -> list[Tensor]:
    """The gradient of each parameter; every one must have one."""
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(found) == len(list(model.parameters()))
    return found


def make(id: str, **options) -> Callable:
    return lambda: get_estimator(id, **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (make("reinforce", mc=0), "reinforce: mc = 0, expected 1 or more"),
        (make("reinforce", iw=0), "reinforce: iw = 0, expected 1 or more"),
        (make("reinforce", iw=2.5), "reinforce: iw = 2.5, expected 1 or more"),
        (make("reinforce", mc=True), "reinforce: mc = True, expected 1 or more"),
        (make("pathwise-iwae", iw=0), "pathwise-iwae: iw = 0, expected 1 or more"),
        (make("wake-wake", iw=-3), "wake-wake: iw = -3, expected 1 or more"),
        (make("vimco-arithmetic", iw=1), "vimco-arithmetic: iw = 1, expected 2 or more"),
        (make("vimco-geometric", iw=1), "vimco-geometric: iw = 1, expected 2 or more"),
        (make("ovis-gamma0.5", iw=1), "ovis-gamma0.5: iw = 1, expected 2 or more"),
        (make("tvo-part5-beta2", iw=1), "tvo-part5-beta2: iw = 1, expected 2 or more"),
        (make("tvo-part1-beta2"), "tvo-part1-beta2: N = 1, expected 2 or more intervals"),
        (make("tvo-part5-beta0"), "tvo-part5-beta0: b = 0.0, expected a positive number"),
        (make("tvo-part1"), "tvo-part1: N = 1, expected 2 or more intervals"),
        (make("tvo-part1-linear-right"), "tvo-part1-linear-right: N = 1, expected 2 or more intervals"),
        (make("tvo-part0-config1"), "tvo-part0-config1: N = 0, expected 2 or more intervals"),
        (make("rloo", iw=1), "rloo: iw = 1, expected 2 or more"),
        (make("vargrad", iw=1), "vargrad: iw = 1, expected 2 or more"),
        (make("ovis-geometric-gamma1", iw=1), "ovis-geometric-gamma1: iw = 1, expected 2 or more"),
        (make("rloo", alpha=0.5), "rloo: alpha = 0.5, expected 0"),
        (make("rloo", freebits=0.1), "rloo: freebits = 0.1, expected None"),
        (make("vargrad", alpha=0.5), "vargrad: alpha = 0.5, expected 0"),
        (make("vargrad", beta=0.5), "vargrad: beta = 0.5, expected 1"),
        (make("vargrad", freebits=0.1), "vargrad: freebits = 0.1, expected None"),
        (make("stl", iw=0), "stl: iw = 0, expected 1 or more"),
        (make("pathwise-vae", alpha=0.5), "pathwise-vae: alpha = 0.5, expected 0"),
        (make("dreg", freebits=0.1), "dreg: freebits = 0.1, expected None"),
        (make("tvo-part5-linear", alpha=0.5), "tvo-part5-linear: alpha = 0.5, expected 0"),
        (make("ovis-S0"), "ovis-S0: S = 0, expected 1 or more"),
        (make("ovis-S0.0-exclusive"), "ovis-S0-exclusive: S = 0.0, expected 1 or more"),
        (make("ovis-S1", iw=1), "ovis-S1: iw = 1, expected 2 or more"),
        (make("ovis-S10", iw=10), "ovis-S10: iw = 10, expected more than S = 10; with ovis-S10-exclusive"),
        (make("reinforce", alpha=1.0), r"reinforce: alpha = 1.0, expected a number in [0, 1)"),
        (make("reinforce", alpha=-0.1), "reinforce: alpha = -0.1, expected"),
        (make("reinforce", alpha=math.nan), "reinforce: alpha = nan, expected"),
        (make("tvo-part5-beta2", alpha=0.5), "tvo-part5-beta2: alpha = 0.5, expected 0"),
        (make("wake-wake", beta=-1.0), "wake-wake: beta = -1.0, expected"),
        (make("wake-wake", beta=math.inf), "wake-wake: beta = inf, expected"),
        (make("ovis-gamma1", freebits=math.nan), "ovis-gamma1: freebits = nan, expected"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(build: Callable, message: str):
    with pytest.raises(ValueError, match="expected") as refusal:
        build()
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    "id",
    [
        "reinforce",
        "reinforce-baseline",
        "nvil",
        "wake-wake",
        "wake-sleep",
        "ovis-S3-exclusive",
        "pathwise-iwae",
        "pathwise-vae",
        "stl",
        "dreg",
    ],
)
def test_one_particle_is_enough_for(id: str):
    assert get_estimator(id, iw=1).num_particles == 1


@pytest.mark.parametrize(
    ("share", "iw", "expected"), [("0.3", 10, 3), ("0.29", 100, 29), ("0.1", 5, 1), ("10", 64, 10)]
)
def test_auxiliary_particles_are_a_number_or_a_share_of_k(share: str, iw: int, expected: int):
    assert get_estimator(f"ovis-S{share}", iw=iw).num_auxiliary == expected
    assert get_estimator(f"ovis-S{share}-exclusive", iw=iw).num_extra == expected


@pytest.mark.parametrize("options", [{"alpha": 1.0}, {"alpha": -1.0}, {"beta": -1.0}, {"beta": math.nan}])
def test_a_call_refuses_what_the_constructor_refuses(options: dict[str, float]):
    (name,) = options
    with pytest.raises(ValueError, match=f"^ovis-gamma1: {name} = "):
        get_estimator("ovis-gamma1", iw=3)(SimpleModel(4, 3), torch.ones(2, 4), **options)


@pytest.mark.parametrize("id", ["reinforce", "ovis-gamma1", "ovis-S1", "wake-wake"])
def test_alpha_and_beta_of_a_call_replace_the_constructed_ones(id: str):
    assignments = torch.tensor([0, 3, 1, 2]).view(1, -1, 1)
    x = torch.zeros(1, 1, dtype=torch.float64)

    def gradient(estimator, *arguments) -> Tensor:
        model = Hierarchy().assign(assignments)
        loss, _, _ = estimator(model, x, *arguments)
        loss.backward()
        return torch.cat([loss.detach().view(1, 1), *gradients(model)], -1)

    constructed = gradient(get_estimator(id, iw=4, alpha=0.5, beta=0.7))
    assert torch.equal(gradient(get_estimator(id, iw=4, alpha=0.1), 0.5, 0.7), constructed)
    assert not torch.allclose(gradient(get_estimator(id, iw=4)), constructed)
    once = get_estimator(id, iw=4, alpha=0.5, beta=0.7)
    gradient(once, 0.2, 0.3)
    assert torch.equal(gradient(once), constructed)


@pytest.mark.parametrize("id", [*IDS, "wake-sleep"])
@pytest.mark.parametrize("freebits", [None, 0.1])
def test_a_users_model_trains(id: str, freebits: float | None):
    torch.manual_seed(0)
    model, estimator = SimpleModel(10, 4), get_estimator(id, mc=2, iw=3, **taken(id, freebits=freebits))
    loss, _, output = estimator(model, torch.ones(5, 10))
    assert loss.shape == ()
    assert set(output) == {"px", "z", "qz", "pz"}
    loss.backward()
    for gradient in gradients(model):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("id", [*IDS, "wake-sleep"])
def test_a_float64_model_gives_float64_estimates(id: str):
    estimator = get_estimator(id, iw=3, **taken(id, beta=0.7, freebits=0.2))
    loss, diagnostics, _ = estimator(SimpleModel(6, 3).double(), torch.ones(2, 6, dtype=torch.float64))
    assert loss.dtype == diagnostics["loss/ess"].dtype == torch.float64


class Loss(nn.Module):
    """The loss of an estimator on a model, as a function of their parameters."""

    def __init__(self, estimator: nn.Module, model: nn.Module):
        super().__init__()
        self.estimator = estimator
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.estimator(self.model, x)[0]


@pytest.mark.parametrize("freebits", [None, 0.2])
@pytest.mark.parametrize("id", IDS)
def test_vectorised_estimates_are_those_of_a_loop(id: str, freebits: float | None):
    estimator = get_estimator(id, mc=2, iw=3, **taken(id, beta=0.7, freebits=freebits)).double().eval()
    generator = torch.Generator().manual_seed(0)
    shape = (7, 2, estimator.num_particles + estimator.num_extra, 5)
    assignments = torch.randint(Hierarchy.num_configurations, shape, generator=generator)
    model, x = Hierarchy(), torch.zeros(5, 1, dtype=torch.float64)
    estimator(model.assign(assignments[0]), x)  # what is built on the first x is built
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], assignment: Tensor) -> Tensor:
        whole = Loss(estimator, model)
        values = {f"model.{name}": value for name, value in parameters.items()}
        return functional_call(whole, {**values, "model.assignment": assignment}, (x,))

    vectorised = vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, assignments)
    for i, assignment in enumerate(assignments):
        single = grad(loss)(parameters, assignment)
        for name, expected in single.items():
            torch.testing.assert_close(vectorised[name][i], expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("id", IDS)
def test_without_gradients_the_loss_is_still_the_bound(id: str):
    assignments = torch.tensor([0, 3, 1, 2, 2]).view(1, -1, 1)
    estimator = get_estimator(id, iw=3)
    model = Hierarchy().assign(assignments[:, : 3 + estimator.num_extra])
    x = torch.zeros(1, 1, dtype=torch.float64)
    with torch.no_grad():
        loss, _, _ = estimator(model, x)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, estimator(model, x)[0].detach(), rtol=0.0, atol=0.0)


class TwoNormals(Template):
    """A hierarchy of two Gaussian layers, x repeated for each particle."""

    def __init__(self) -> None:
        super().__init__()
        self.inference_network = nn.Linear(3, 2)
        self.second_inference_network = nn.Linear(2, 2)
        self.generative_model = nn.Linear(2, 3)

    def forward(self, x: Tensor, reparam: bool = False):
        first = Normal(self.inference_network(x), 0.8)
        z1 = first.rsample() if reparam else first.sample()
        second = Normal(self.second_inference_network(z1), 0.5)
        z2 = second.rsample() if reparam else second.sample()
        one = torch.ones(1, 2)
        pz = [Normal(z2, one), Normal(0 * one, one)]
        return {"px": Normal(self.generative_model(z1), 1.0), "z": [z1, z2], "qz": [first, second], "pz": pz}


@pytest.mark.parametrize("id", IDS)
def test_a_score_function_refuses_a_z_that_carries_a_gradient(id: str):
    class AlwaysReparameterised(TwoNormals):
        def forward(self, x: Tensor, reparam: bool = False):
            return super().forward(x, reparam=True)

    with pytest.raises(ValueError, match=rf"^{id}: needs z without a gradient, and that of AlwaysReparameterised"):
        get_estimator(id, iw=3)(AlwaysReparameterised(), torch.ones(4, 3))


@pytest.mark.parametrize("id", [*IDS, "pathwise-iwae", "pathwise-vae"])
@pytest.mark.parametrize("freebits", [None, 0.1])
def test_several_layers_and_copies(id: str, freebits: float | None):
    torch.manual_seed(0)
    model = TwoNormals()
    get_estimator(id, mc=3, iw=4, **taken(id, freebits=freebits))(model, torch.ones(2, 3))[0].backward()
    assert all(gradient.abs().sum() > 0 for gradient in gradients(model))


class Implicit(TwoNormals):
    """q is a sampler: it has no log q(z|x)."""

    def forward(self, x: Tensor, reparam: bool = False):
        return {**super().forward(x, reparam), "qz": [self.inference_network, self.second_inference_network]}


@pytest.mark.parametrize("id", [*IDS, "pathwise-iwae", "stl", "dreg"])
def test_a_model_without_log_q_is_refused_by_name(id: str):
    with pytest.raises(ValueError, match=rf"^{id}: Implicit: qz\[0\] is a Linear, which has no log_prob"):
        get_estimator(id, iw=3)(Implicit(), torch.ones(4, 3))


def test_plain_distributions_and_looked_up_densities_agree():
    """The same particles, once as a user's distributions and once as the oracle's tables."""
    bits = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assignments = torch.tensor([3, 0, 2]).view(1, 3, 1)

    class Assigned(Bernoulli):
        def sample(self, sample_shape=()):
            return torch.tensor([bits[i] for i in assignments.flatten()], dtype=torch.float64)

    class Plain(oracles.TwoBits):
        def forward(self, x, reparam=False):  # type: ignore[override]
            (c, first, second), qz = self.theta[0, 2:], Assigned(logits=self.phi.expand(len(x), -1))
            z = qz.sample()
            mean = c + z @ torch.stack([first, second]) - 0.3 * c * z.prod(-1)
            px = Tabled(mean)
            return {"px": px, "z": z, "qz": qz, "pz": Bernoulli(logits=self.theta[:, :2])}

    class Tabled:
        def __init__(self, log_px: Tensor):
            self.log_px = log_px

        def log_prob(self, value: Tensor) -> Tensor:
            return self.log_px

    for id in ("ovis-gamma1", "vimco-geometric", "wake-wake", "tvo-part3-beta1"):
        estimator, found = get_estimator(id, 1, 3, *Settings(beta=0.7, freebits=0.2)), []
        for model in (Plain(), oracles.TwoBits().assign(assignments)):
            estimator(model, torch.zeros(1, 1, dtype=torch.float64))[0].backward()
            found.append(torch.cat(gradients(model), -1))
        torch.testing.assert_close(*found, rtol=0.0, atol=1e-12)
