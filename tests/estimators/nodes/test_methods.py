"""What the methods refuse, what is known of their variances, and numbers at the ends of what float32 holds."""

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, Normal, OneHotCategorical, Poisson

from estimators.nodes.arm import ARM
from estimators.nodes.disarm import U2G, DisARM
from estimators.nodes.expect import Expect
from estimators.nodes.gumbel_softmax import GumbelSoftmax
from estimators.nodes.importance_sampling import ImportanceSampling
from estimators.nodes.rao_blackwell import RaoBlackwellSF
from estimators.nodes.score_function import ScoreFunction
from estimators.nodes.score_function_wor import ScoreFunctionWOR
from estimators.nodes.straight_through import StraightThrough
from estimators.nodes.unordered_set import UnorderedSetEstimator
from tests.estimators.nodes.test_enumeration import METHODS, NODES, Costs, Row, each_draw, outcomes, plates_of

BIT = Bernoulli(logits=torch.zeros(4))
ONE_HOT = OneHotCategorical(logits=torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ScoreFunction("z", 1, "batch_average"),
            r"ScoreFunction\('z'\): the baseline batch_average is the mean",
        ),
        (
            lambda: ScoreFunction("z", 2, "batch"),
            r"\('z'\): baseline_factory = 'batch', expected one of None, batch_av",
        ),
        (lambda: ScoreFunction("z", 0), r"ScoreFunction\('z'\): n_samples = 0, expected at least 1"),
        (lambda: ScoreFunctionWOR("z", 1), r"ScoreFunctionWOR\('z'\): the baseline is made of the other samples"),
        (lambda: UnorderedSetEstimator("z", 1), r"UnorderedSetEstimator\('z'\): the baseline is made of the other"),
        (lambda: UnorderedSetEstimator("z", 0, False), r"UnorderedSetEstimator\('z'\): k = 0, expected at least 1"),
        (lambda: RaoBlackwellSF("z", 0), r"RaoBlackwellSF\('z'\): k = 0, expected at least 1"),
        (
            lambda: GumbelSoftmax("z", initial_temperature=0),
            r"GumbelSoftmax\('z'\): temperature = 0, expected a positive",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "distribution", "message"),
    [
        (ARM("z"), ONE_HOT, "node 'z': ARM takes Bernoulli, not OneHotCategorical"),
        (DisARM("z"), Normal(0.0, 1.0), "node 'z': DisARM takes Bernoulli, not Normal"),
        (
            GumbelSoftmax("z"),
            Categorical(logits=torch.zeros(3)),
            "GumbelSoftmax takes Bernoulli, OneHotCategorical, not",
        ),
        (
            StraightThrough("z"),
            Categorical(logits=torch.zeros(3)),
            "StraightThrough takes Bernoulli, OneHotCategorical",
        ),
        (RaoBlackwellSF("z", 2), Normal(0.0, 1.0), "node 'z': RaoBlackwellSF takes Bernoulli, Categorical, OneHot"),
        (ScoreFunctionWOR("z", 2), Poisson(1.0), "node 'z': ScoreFunctionWOR takes Bernoulli, Categorical, OneHot"),
        (UnorderedSetEstimator("z", 2), Normal(0.0, 1.0), "node 'z': UnorderedSetEstimator takes Bernoulli, Categ"),
        (Expect("z"), Poisson(1.0), "node 'z': Expect takes Bernoulli, Categorical, OneHotCategorical, Binomial, not"),
        (ImportanceSampling("z", Normal(0.0, 1.0)), BIT, "node 'z': the proposal Normal and Bernoulli do not have the"),
        (
            ImportanceSampling("z", Categorical(logits=torch.zeros(3))),
            Categorical(logits=torch.zeros(4)),
            "do not have",
        ),
        (
            ImportanceSampling("z", Bernoulli(logits=torch.zeros(3))),
            BIT,
            r"the proposal has batch shape \[3\] and event",
        ),
        (
            ImportanceSampling("z", Independent(BIT, 1)),
            BIT,
            r"event shape \[4\], which do not fit the node's \[4\] and \[\]",
        ),
    ],
)
def test_distributions_that_a_method_cannot_handle_are_refused(method, distribution, message):
    with pytest.raises(ValueError, match=message):
        method.check(distribution)


@pytest.mark.parametrize("method", [RaoBlackwellSF, ScoreFunctionWOR, UnorderedSetEstimator])
def test_more_different_values_than_there_are_is_refused(method):
    with pytest.raises(ValueError, match=f"node 'z': {method.__name__} with k = 4 wants as many.*the node has 3"):
        method("z", 4).propose(ONE_HOT, 1)
    assert method("z", 4).propose(ONE_HOT, 0).size == 4


def test_an_enumeration_of_too_many_values_is_refused_before_it_is_built():
    with pytest.raises(
        ValueError, match=r"node 'z': Expect would enumerate 10\^20 values, more than its budget of 10000"
    ):
        Expect("z").propose(OneHotCategorical(logits=torch.zeros(5, 20, 10)), 1)
    with pytest.raises(ValueError, match=r"2\^100000 values"):
        Expect("z").propose(Bernoulli(logits=torch.zeros(100_000)), 0)
    assert Expect("z").propose(OneHotCategorical(logits=torch.zeros(4, 10)), 0).size == 10_000


def test_without_replacement_in_a_space_too_large_to_enumerate():
    distribution = Bernoulli(logits=torch.linspace(-2, 2, 300).reshape(2, 150).requires_grad_())
    for method in (RaoBlackwellSF("z", 3), ScoreFunctionWOR("z", 3), UnorderedSetEstimator("z", 3)):
        sample = method.propose(distribution, 1)
        assert sample.points.shape == (3, 2, 150)
        assert len(sample.points[:, 0].unique(dim=0)) == 3
        assert method.estimate(sample, sample.points.mean(-1, keepdim=True)).isfinite().all()


def variance(row: Row, node: str) -> float:
    """The variance of the gradient, by all outcomes, summed."""
    estimate, weight, copies = outcomes(row, NODES[node], Costs(plates_of(NODES[node])), NODES[node].leaf())
    draws = each_draw(estimate, copies).reshape(len(weight), *weight.shape[1:], -1)
    mean = (weight.unsqueeze(-1) * draws).sum(0)
    return (weight.unsqueeze(-1) * (draws - mean) ** 2).sum().item()


def test_the_variance_is_what_is_known_of_it():
    found = {name: variance(METHODS[name], "bernoulli") for name in METHODS if "bernoulli" in METHODS[name].nodes}
    assert found["ScoreFunction, two"] == pytest.approx(found["ScoreFunction"] / 2)
    assert found["ARM, two"] == pytest.approx(found["ARM"] / 2)
    assert found["DisARM, two"] == pytest.approx(found["DisARM"] / 2)
    assert found["DisARM"] < 0.9 * found["ARM"] < found["ScoreFunction"]
    for name in ("Expect", "RaoBlackwellSF, all", "UnorderedSetEstimator", "ScoreFunctionWOR"):
        assert found[name] == pytest.approx(0, abs=1e-20), "all values of the node were drawn"
    one_hot = {name: variance(METHODS[name], "one-hot") for name in METHODS if "one-hot" in METHODS[name].nodes}
    assert one_hot["UnorderedSetEstimator, three"] == pytest.approx(0, abs=1e-20)
    assert one_hot["UnorderedSetEstimator"] < one_hot["ScoreFunction, batch_average"]
    assert one_hot["RaoBlackwellSF"] < one_hot["ScoreFunction"]


def test_arm_and_disarm_have_the_variance_of_their_formulas():
    """One bit: b != b~ where u is within m = min(p, 1 - p) of 0 or 1, with probability 2 m.

    There the estimate of DisARM is (f(1) - f(0)) sigmoid(|l|) / 2, that of ARM (f(1) - f(0)) |u - 1/2|.
    """
    logit, costs = torch.tensor(0.4, dtype=torch.float64), Costs(torch.Size([]))
    f = costs(torch.tensor([0.0, 1.0]).double(), 1)
    jump = (torch.tensor([0.5, 1.5]).double() * (f[1] - f[0])).sum() * logit.sigmoid() / 2
    chance = 2 * (1 - logit.sigmoid())
    assert variance(METHODS["DisARM"], "bernoulli") == pytest.approx((jump**2 * chance * (1 - chance)).item())
    square = 2 / 3 * (0.5**3 - (0.5 - chance / 2) ** 3) * (2 * jump / logit.sigmoid()) ** 2
    assert variance(METHODS["ARM"], "bernoulli") == pytest.approx((square - (jump * chance) ** 2).item())


def test_u2g_is_disarm():
    assert U2G is DisARM


def test_the_temperature_can_be_set():
    method = GumbelSoftmax("z", initial_temperature=2.0)
    noise = torch.full((1, 4), 0.7)
    warm = method.place(BIT, 0, noise).points
    method.temperature = 0.1
    assert (method.place(BIT, 0, noise).points > warm).all()
    with pytest.raises(ValueError, match="temperature = -1"):
        method.temperature = -1


def test_the_same_proposal_may_serve_all_items():
    proposal = Bernoulli(probs=torch.tensor([0.5, 0.9]))
    sample = ImportanceSampling("z", proposal, 3).propose(Bernoulli(logits=torch.zeros(5, 2)), 1)
    assert sample.points.shape == (3, 5, 2)
    assert sample.points.unique(dim=1).shape[1] > 1, "each item has draws of its own"


EXTREMES = {
    "bernoulli": (-95.0, 95.0, 20.0),
    "one-hot": (-torch.inf, 80.0, -20.0),
    "categorical": (0.5, -torch.inf, 60),
}
TAKEN = [
    (name, node)
    for name, row in METHODS.items()
    for node in row.nodes
    if node.split()[0] in EXTREMES and "probs" not in node
]


@pytest.mark.parametrize(("name", "node"), TAKEN)
def test_extreme_logits_give_finite_estimates(name, node):
    """Also categories without probability."""
    values, method = EXTREMES[node.split()[0]], METHODS[name].make()
    shape, num_plates = NODES[node].leaf().shape, NODES[node].num_plates
    torch.manual_seed(1)
    logits = torch.tensor([values[i % 3] for i in range(shape.numel())]).reshape(shape).requires_grad_()
    sample = method.propose(NODES[node].build(logits), num_plates)
    points = sample.points.float()
    points = points.flatten(1 + num_plates).sum(-1) if points.dim() > 1 + num_plates else points
    estimate = method.estimate(sample, points.unsqueeze(-1))
    assert estimate.isfinite().all()
    (gradient,) = torch.autograd.grad(estimate.sum(), logits)
    assert gradient.isfinite().all()
