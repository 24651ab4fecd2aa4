"""The tasks of methods for single nodes: exact references, exact resuming, and what they refuse."""

import itertools

import pytest
import torch
from torch.distributions import Bernoulli

from errors import UserError
from estimators import get_estimator, registry
from estimators.bounds.node import NodeEstimator
from estimators.nodes.arm import ARM
from estimators.nodes.disarm import DisARM
from estimators.nodes.score_function import ScoreFunction
from models import VAE
from orchestration.experiment import expand, load
from tasks import bernoulli_toy, discrete_vae, policy_gradient
from tasks.policy_gradient import Episodes, make_process, play, surrogate, values_of
from tests.tasks.stepwise import configured, interrupted_rows

VAES = ["task=discrete_vae", "model=discrete_vae", "dataset=shapes", "model.hidden=[8]", "batch_size=6", "steps=6"]
VAES += ["model.categories=3", "analysis.num_replicates=7", "evaluation.points=10", "eval_every=3"]
TOY = ["task=bernoulli_toy", "batch_size=2", "steps=6", "eval_every=3", "analysis.num_replicates=50"]
POLICY = ["task=policy_gradient", "batch_size=4", "steps=6", "eval_every=3", "analysis.num_replicates=20"]
POLICY += ["task.horizon=4", "optimizer=sgd"]
JOBS = {
    "vae": [*VAES, "estimator=score-function-moving-average", "estimator.iw=1"],
    "vae, relax": [*VAES, "estimator=relax", "estimator.iw=1"],
    "toy": [*TOY, "estimator=rebar", "estimator.iw=1"],
    "policy": [*POLICY, "task.credit=whole-return", "task.baseline=batch-average"],
}


@pytest.mark.parametrize("name", JOBS)
def test_an_interrupted_job_ends_with_the_same_numbers(tmp_path, name):
    assert interrupted_rows(tmp_path, *JOBS[name], stops=(1, 4))


def node_estimator(id: str, iw: int) -> NodeEstimator:
    estimator = get_estimator(id, iw=iw)
    assert isinstance(estimator, NodeEstimator)
    return estimator


def small_vae():
    torch.manual_seed(0)
    model = VAE(shape=(5,), latent="categorical", latents=2, categories=3, hidden=(4,)).double()
    return model, (torch.rand(4, 5) > 0.5).double()


def test_enumeration_has_no_bias_and_nothing_that_varies():
    model, x = small_vae()
    found = discrete_vae.gradient_metrics(node_estimator("expect", iw=1), model, x, 5)
    assert found["grads/bias"] < 1e-15
    assert found["grads/cosine"] == pytest.approx(1)
    assert "grads/variance" not in found


@pytest.mark.parametrize("id", ["unordered-set", "rao-blackwell"])
def test_as_many_samples_as_values_leave_nothing_to_chance(id):
    model, x = small_vae()
    found = discrete_vae.gradient_metrics(node_estimator(id, iw=9), model, x, 5)
    assert found["grads/bias"] < 1e-12
    assert found.get("grads/variance", 0.0) < 1e-24


def test_metrics_tell_biased_from_unbiased():
    model, x = small_vae()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    torch.manual_seed(1)
    unbiased = discrete_vae.gradient_metrics(node_estimator("score-function", iw=2), model, x, 20_000)
    biased = discrete_vae.gradient_metrics(node_estimator("gumbel-softmax", iw=2), model, x, 20_000)
    assert 0.5 < unbiased["grads/bias_z"] < 1.6
    assert biased["grads/bias_z"] > 10


def test_the_tutorials_numbers_are_those_of_the_probabilities():
    """By the definition: one draw after the other, differentiated by probs, the loss being the mean over x."""
    model, x = small_vae()
    logits = model.layer_posterior(x).logits.detach()
    estimator = node_estimator("score-function", iw=1)
    torch.manual_seed(3)
    found = discrete_vae.gradient_metrics(estimator, model, x, 6)
    torch.manual_seed(3)
    singles = []
    copies = discrete_vae.gradients(estimator, model, x, logits.expand(6, *logits.shape))
    for each in copies:
        # By probs, whose sum is one: the gradient g by l = log(p / sum p) is g / p, as g sums to zero.
        assert each.sum(-1).abs().max() < 1e-12
        singles.append(each / logits.softmax(-1) / len(x))
    stacked = torch.stack(singles)
    variance = (stacked - stacked.mean(0)).square().mean(0).sum((-2, -1)).mean()
    assert found["grads/probs_variance"] == pytest.approx(variance.item())


@pytest.mark.parametrize("p", [0.3, 0.8])
def test_exact_variances_of_the_toy_are_those_of_the_closed_forms(p):
    p0 = 0.45
    difference = (1 - p0) ** 2 - p0**2  # f(1) - f(0)
    truth = difference * p * (1 - p)
    # f(b) (b - p); difference (u - 1/2) where u is not between p and 1 - p; the mean of that given the pair.
    score = p * ((1 - p0) ** 2 * (1 - p)) ** 2 + (1 - p) * (p0**2 * p) ** 2 - truth**2
    rarer = min(p, 1 - p)
    arm = difference**2 * 2 * ((0.125 - (0.5 - rarer) ** 3) / 3) - truth**2
    disarm = 2 * rarer * (difference * (1 - rarer) / 2) ** 2 - truth**2
    expected = {ScoreFunction("z", 1, "None"): score, ARM("z"): arm, DisARM("z"): disarm}
    for method, variance in expected.items():
        found = bernoulli_toy.exact_moments(method, p, p0)
        assert found is not None
        assert found[0] == pytest.approx(truth, rel=1e-4)
        assert found[1] == pytest.approx(variance, rel=1e-3)
        torch.manual_seed(0)
        measured = bernoulli_toy.moments(method, p, p0, 20_000)
        assert abs(measured["toy/variance"] - variance) < 5 * measured["toy/variance_se"]
        assert abs(measured["toy/bias"]) < 5 * measured["toy/bias_se"]


def test_the_toys_gradient_is_that_of_the_expected_cost():
    logit = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    p = logit.sigmoid()
    loss = sum(Bernoulli(p).log_prob(b).exp() * (b - 0.49) ** 2 for b in torch.tensor([0.0, 1.0]).double())
    (found,) = torch.autograd.grad(loss, logit)
    assert bernoulli_toy.exact_gradient(p.item(), 0.49) == pytest.approx(found.item(), rel=1e-6)


def every_episode(process, theta):
    """All ways that an episode may go, [1, episodes, horizon], and their probabilities, without a gradient."""
    num_states, num_actions = theta.shape
    policy, ways, weight = theta.softmax(-1), [], []
    for actions in itertools.product(range(num_actions), repeat=process.horizon):
        for later in itertools.product(range(num_states), repeat=process.horizon - 1):
            states, prob = (0, *later), torch.tensor(1.0, dtype=torch.float64)
            for t, (state, action) in enumerate(zip(states, actions, strict=True)):
                prob = prob * policy[state, action]
                if t + 1 < process.horizon:
                    prob = prob * process.transitions[state, action, states[t + 1]]
            ways.append((states, actions))
            weight.append(prob)
    s, a = torch.tensor(ways).unbind(1)
    episodes = Episodes(s.unsqueeze(0), a.unsqueeze(0), process.rewards[s, a].unsqueeze(0))
    return episodes, torch.stack(weight)


def test_the_exact_value_and_gradient_of_a_policy_are_those_of_all_episodes():
    process = make_process(2, 2, 3, seed=0)
    theta = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = values_of(process, theta)[-1, 0]
    episodes, weight = every_episode(process, theta)
    torch.testing.assert_close(weight.sum().item(), 1.0)
    direct = (weight * episodes.rewards[0].sum(-1)).sum()
    torch.testing.assert_close(value, direct)
    (truth,) = torch.autograd.grad(value, theta, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(direct, theta, retain_graph=True)[0], truth)
    for credit, baseline in itertools.product(policy_gradient.CREDITS, ("none", "value")):
        # One episode a policy, so that each can be weighed.
        single = Episodes(*(part.transpose(0, 1) for part in episodes))
        copies = theta.expand(len(weight), 2, 2)
        mean = (weight.detach() * surrogate(process, copies, single, credit, baseline)).sum()
        torch.testing.assert_close(torch.autograd.grad(mean, theta)[0], truth)


def test_credit_and_baselines_lower_the_variance_and_leave_the_mean():
    process = make_process(4, 3, 6, seed=0)
    theta = torch.zeros(4, 3, dtype=torch.float64)
    variance = {}
    for credit, baseline in itertools.product(policy_gradient.CREDITS, policy_gradient.BASELINES):
        torch.manual_seed(0)

        def estimate(copies, credit=credit, baseline=baseline):
            return surrogate(process, copies, play(process, copies, 8), credit, baseline)

        found = policy_gradient.gradient_metrics(process, theta, estimate, 1000)
        assert found["grads/bias_z"] < 1.8
        variance[credit, baseline] = found["grads/variance"]
    for baseline in policy_gradient.BASELINES:
        assert variance["to-go", baseline] < variance["whole-return", baseline]
    assert variance["to-go", "value"] < variance["to-go", "batch-average"] < variance["to-go", "none"]
    assert max(variance["whole-return", each] for each in ("value", "batch-average")) < variance["whole-return", "none"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*VAES, "estimator=rloo"], "estimator=rloo: task discrete_vae takes methods for single nodes"),
        ([*VAES, "estimator=disarm"], "disarm: node 'z': DisARM takes Bernoulli"),
        ([*VAES, "model=sbn", "estimator=disarm"], "."),
        ([*TOY, "estimator=rloo"], "estimator=rloo: task bernoulli_toy takes methods"),
        ([*TOY, "estimator=lax"], "estimator=lax: .*LAX"),
        ([*POLICY, "task.credit=to_go"], "task.credit=to_go; did you mean 'to-go'"),
        ([*POLICY, "task.baseline=batch-average", "batch_size=1"], "batch_size=1"),
        ([*POLICY, "task.actions=1"], "task.actions=1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(overrides, words):
    if "model=sbn" in overrides:
        overrides = [each for each in overrides if not each.startswith("model.")]
    config = configured(*overrides)
    module = {"discrete_vae": discrete_vae, "bernoulli_toy": bernoulli_toy, "policy_gradient": policy_gradient}
    with pytest.raises((UserError, ValueError), match=words):
        module[config.task.target.split(".")[1]].check(config)


def test_every_method_for_categories_is_in_the_study_of_discrete_vaes():
    found = {registry.parse(job.config["estimator"]["id"]).family for job in expand(load("discrete-vae"))}
    kinds = ("categorical", "one-hot", "any distribution")
    nodes = [family for family in registry.families() if "layer_posterior" in family.needs]
    # infer is the score function with a moving average there.
    assert found == {family.name for family in nodes if any(kind in family.needs for kind in kinds)} - {"infer"}
