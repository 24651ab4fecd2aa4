"""wake-sleep on a model of two bits of z and three values of x, all pairs of which are dreamt."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal

from analysis.gradients import gradient_statistics
from estimators import get_estimator
from models import GaussianMixture, GaussianToy, Template
from models.template import LogDensities
from tests.simple_model import SimpleModel

NUM_X = 3
BITS = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
PAIRS = torch.cartesian_prod(torch.arange(4), torch.arange(NUM_X))  # of an index of BITS and an x


class Dreamt(Categorical):
    """A p(x|z) whose sample is given."""

    def __init__(self, logits: Tensor, x: Tensor):
        super().__init__(logits=logits)
        self.x = x

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.x


class Enumerable(Template):
    """z: two bits; x: one of three values. Every row of the batch has its own copy of phi; forward draws from q."""

    def __init__(self, num_copies: int = 1):
        super().__init__()
        phi = torch.tensor([[0.4, -0.7, 0.3], [0.9, 0.1, -0.6]], dtype=torch.float64)
        self.phi = nn.Parameter(phi.repeat(num_copies, 1, 1))
        self.prior = nn.Parameter(torch.tensor([-0.5, 0.6], dtype=torch.float64))
        self.decoder = nn.Parameter(torch.tensor([[0.2, -1.0, 0.5], [0.8, 0.1, -0.3]], dtype=torch.float64))
        self.num_asked = 0

    def q(self, x: Tensor) -> Bernoulli:
        index = x.long().reshape(-1, 1, 1).expand(-1, 2, 1)
        return Bernoulli(logits=self.phi.expand(len(index), -1, -1).gather(2, index).squeeze(-1))

    def p(self, z: Tensor) -> Tensor:
        return (z @ self.decoder).log_softmax(-1)

    def forward(self, x: Tensor, reparam: bool = False) -> dict[str, Any]:
        qz = self.q(x)
        z = qz.sample()
        return {"px": Categorical(logits=self.p(z)), "z": [z], "qz": [qz], "pz": [Bernoulli(logits=self.prior[None])]}

    def sample_from_prior(self, bs: int) -> dict[str, Any]:
        """All pairs, one after another; p(x|z) keeps its gradient, as a user's may."""
        self.num_asked = bs
        pairs = PAIRS[torch.arange(bs) % len(PAIRS)]
        z = BITS[pairs[:, 0]] + 0 * self.prior
        return {"px": Dreamt(self.p(z), pairs[:, 1].double()), "z": [z]}


class WithLogProb(Enumerable):
    """The same, with a log_prob to be asked, and a forward whose q would be another."""

    def log_prob(self, x, z, stop_phi=False):
        (z,) = z
        log_px = Categorical(logits=self.p(z)).log_prob(x)
        return LogDensities(log_px, (), (self.q(x).log_prob(z).sum(-1),))


def log_joint(model: Enumerable) -> Tensor:
    """log p(z, x) of all pairs."""
    z = BITS[PAIRS[:, 0]]
    log_pz = Bernoulli(logits=model.prior).log_prob(z).sum(-1)
    return log_pz + model.p(z).gather(1, PAIRS[:, 1:]).squeeze(1)


@pytest.mark.parametrize("kind", [Enumerable, WithLogProb])
@pytest.mark.parametrize("mc", [1, 2])
def test_phi_gets_the_mean_score_of_all_dreams(kind: type[Enumerable], mc: int):
    model = kind()
    probabilities = log_joint(model).exp().detach()
    assert probabilities.sum().item() == pytest.approx(1.0)
    z, x = BITS[PAIRS[:, 0]], PAIRS[:, 1]
    truth = torch.autograd.grad((probabilities * model.q(x).log_prob(z).sum(-1)).sum(), model.phi)[0][0]
    assert truth.abs().min() > 1e-3

    num = len(PAIRS)
    each = kind(mc * num)  # the copies of phi are those of the dreams
    estimator = get_estimator("wake-sleep", mc=mc, iw=1, alpha=0.5, beta=0.7, freebits=0.1)
    estimator(each, torch.zeros(num, dtype=torch.float64))[0].backward()
    assert each.num_asked == mc * num
    assert each.phi.grad is not None
    estimates = -mc * num * each.phi.grad
    torch.testing.assert_close(probabilities.repeat(mc) @ estimates.flatten(1) / mc, truth.flatten())


@pytest.mark.parametrize("options", [{}, {"alpha": 0.5, "beta": 0.7, "freebits": 0.1}], ids=str)
def test_theta_gets_what_it_gets_in_the_wake_phase(options: dict[str, float]):
    """The dreams give nothing to p, not even those of a sample_from_prior that keeps gradients."""
    found = []
    for id in ("wake-sleep", "wake-wake"):
        torch.manual_seed(0)
        model = Enumerable()
        get_estimator(id, mc=2, iw=3, **options)(model, torch.tensor([0.0, 2.0], dtype=torch.float64))[0].backward()
        found.append((model.prior.grad, model.decoder.grad))
    for wake_sleep, wake_wake in zip(*found, strict=True):
        assert wake_wake is not None
        torch.testing.assert_close(wake_sleep, wake_wake, rtol=0.0, atol=0.0)


class Renamed(SimpleModel):
    """The documentation says `bs`; published code called it by another name."""

    def sample_from_prior(self, number_of_dreams: int):  # type: ignore[override]
        return super().sample_from_prior(number_of_dreams)


def test_the_number_of_dreams_has_no_name():
    get_estimator("wake-sleep", iw=2)(Renamed(4, 2), torch.ones(3, 4))[0].backward()


class Images(SimpleModel):
    """x [batch, 1, 2, 3], q of it flattened, p(x|z) over the flattened."""

    def forward(self, x: Tensor, zgrads: bool = False, **kwargs):
        return super().forward(x.flatten(1), zgrads)


def test_dreams_have_the_shape_of_the_observations():
    model = Images(6, 2)
    get_estimator("wake-sleep", iw=2)(model, torch.ones(3, 1, 2, 3))[0].backward()
    assert model.inference_network.weight.grad is not None


class NoPrior(Template):
    def forward(self, x: Tensor, reparam: bool = False):
        return SimpleModel.forward(SimpleModel(x.shape[1], 2), x)


class TwoLayers(SimpleModel):
    def forward(self, x: Tensor, zgrads: bool = False, **kwargs):
        output = super().forward(x)
        return {**output, **{key: output[key] * 2 for key in ("z", "qz", "pz")}}

    def sample_from_prior(self, bs: int):  # type: ignore[override]
        output = super().sample_from_prior(bs)
        return {**output, "z": output["z"] * 2}


class OneDream(SimpleModel):
    def sample_from_prior(self, bs: int):  # type: ignore[override]
        return super().sample_from_prior(1)


class OtherX(SimpleModel):
    def sample_from_prior(self, bs: int):  # type: ignore[override]
        return {**super().sample_from_prior(bs), "px": Normal(torch.zeros(bs, 5), 1.0)}


class Keyless(SimpleModel):
    def sample_from_prior(self, bs: int):  # type: ignore[override]
        return {"px": Normal(torch.zeros(bs, 4), 1.0)}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (NoPrior(), "wake-sleep: NoPrior: dreams need sample_from_prior(bs), which it has not"),
        (TwoLayers(4, 2), "wake-sleep: TwoLayers: dreams of several layers (2) need log_prob(x, z), which it has not"),
        (OneDream(4, 2), "wake-sleep: OneDream: sample_from_prior(3) gave z and x of shapes [[1, 2], [1, 4]]"),
        (OtherX(4, 2), "wake-sleep: OtherX: sample_from_prior(3) gave z and x of shapes [[3, 2], [3, 5]]"),
        (Keyless(4, 2), "wake-sleep: Keyless: sample_from_prior returned no mapping with 'px' and 'z'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_that_cannot_dream_is_refused_in_one_line(model: Template, message: str):
    with pytest.raises(ValueError, match="wake-sleep") as refusal:
        get_estimator("wake-sleep", iw=2)(model, torch.ones(3, 4))
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("model", "x", "parameters"),
    [
        (GaussianMixture(), torch.tensor([[3.0], [50.0]]), "inference_network"),
        (GaussianMixture(), torch.tensor([3.0, 50.0]), "inference_network"),
        (GaussianToy(dim=2), torch.ones(2, 2), "b"),
        (SimpleModel(4, 2), torch.ones(2, 4), "inference_network"),
    ],
    ids=["GaussianMixture", "GaussianMixture of [batch]", "GaussianToy", "SimpleModel"],
)
def test_its_replicates_are_vectorised_and_have_dreams_of_their_own(model: Template, x: Tensor, parameters: str):
    """A warning, as where vmap refuses it, would be an error here. Vectorised or one by one: the same moments."""
    estimator = get_estimator("wake-sleep", mc=2, iw=3)
    together = gradient_statistics(estimator, model, x, num_replicates=2000, parameters=parameters, block_size=500)
    one_by_one = gradient_statistics(estimator, model, x, num_replicates=200, parameters=parameters, block_size=1)
    assert (together.variance > 0).any()
    error = (together.mean_se**2 + one_by_one.mean_se**2).sqrt()
    assert ((together.mean - one_by_one.mean).abs() <= 5 * error + 1e-9).all()
