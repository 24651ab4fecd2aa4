"""Methods for single nodes as estimators of the ELBO: exact on models whose bits can be enumerated."""

import itertools
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from estimators import get_estimator, registry
from estimators.bounds.node import NodeEstimator
from models import VAE, GaussianMixture, SigmoidBeliefNetwork, Template
from tests.estimators.nodes.draws import Rule, outside_the_top, sets, uniforms, values

X = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


def bits() -> VAE:
    torch.manual_seed(1)
    return VAE(shape=(3,), latent="bernoulli", latents=2, hidden=(4,), learn_prior=True).double()


def categories() -> VAE:
    torch.manual_seed(2)
    return VAE(shape=(3,), latent="categorical", latents=2, categories=3, hidden=(4,), learn_prior=True).double()


def belief_network() -> SigmoidBeliefNetwork:
    torch.manual_seed(3)
    return SigmoidBeliefNetwork(shape=(3,), latents=(2, 2)).double()


def normals() -> VAE:
    return VAE(shape=(3,), latents=2, hidden=(4,)).double()


MODELS = {"bits": bits, "categories": categories, "belief network": belief_network}
FAMILIES = [family for family in registry.families() if "layer_posterior" in family.needs]


def enumerated(model: Template, beta: float) -> Tensor:
    """-ELBO, the mean over X, by all joint values of all layers, particle by particle."""
    if isinstance(model, SigmoidBeliefNetwork):
        single = list(itertools.product((0.0, 1.0), repeat=2))
        all_z = [list(map(torch.tensor, pair)) for pair in itertools.product(single, repeat=2)]
    elif model.latents.shape == (2,):
        all_z = [[torch.tensor(z)] for z in itertools.product((0.0, 1.0), repeat=2)]
    else:
        all_z = [[torch.eye(3)[list(z)]] for z in itertools.product(range(3), repeat=2)]
    total = torch.zeros(len(X), dtype=torch.float64)
    for z in all_z:
        layers = [layer.double().expand(1, 1, len(X), *layer.shape) for layer in z]
        log_px, log_pz, log_qz = model.log_prob(X, layers)
        log_q, log_p = torch.stack(log_qz).sum(0), torch.stack(log_pz).sum(0)
        total = total + (log_q.exp() * (beta * (log_q - log_p) - log_px)).flatten()
    return total.mean()


def flat_gradient(loss: Tensor, model: Template) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([each.flatten() for each in found])


@pytest.mark.parametrize("beta", [1.0, 0.6])
@pytest.mark.parametrize("kind", MODELS)
def test_enumeration_is_the_gradient_of_the_elbo(kind, beta):
    model = MODELS[kind]()
    truth = enumerated(model, beta)
    loss, _, _ = get_estimator("expect", mc=2, iw=1, beta=beta)(model, X)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(flat_gradient(loss, model), flat_gradient(truth, model))


DRAWS: dict[str, tuple[int, Rule]] = {
    "score-function": (1, values),
    "score-function-batch-average": (2, values),
    "score-function-moving-average": (1, values),
    "arm": (1, uniforms(2)),
    "disarm": (2, uniforms(1)),
    "unordered-set": (2, sets(1)),
    "score-function-wor": (2, sets(200)),
    "rao-blackwell": (2, lambda q, num_plates, _: outside_the_top(2)(q, num_plates, 1)),
}


@pytest.mark.parametrize("id", DRAWS)
def test_the_mean_over_all_draws_is_the_gradient_of_the_elbo(id, monkeypatch):
    """The copies `mc` are given the draws, one each."""
    iw, rule = DRAWS[id]
    model, x = bits(), X[:1]
    single = model.layer_posterior(x)
    noise, weight = rule(single, 1, iw)
    estimator = get_estimator(id, mc=len(weight), iw=iw)
    assert isinstance(estimator, NodeEstimator)
    monkeypatch.setattr(estimator.first, "draw", lambda q, num_plates: noise)
    mean = (weight.detach() * estimator.surrogate(model, x)).sum()
    truth = get_estimator("expect", iw=1)(model, x)[0]
    torch.testing.assert_close(mean, truth, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(flat_gradient(mean, model), flat_gradient(truth, model), rtol=1e-7, atol=1e-8)


def unbiased(family: registry.Family) -> bool:
    return family.declares.startswith("unbiased") and family.name != "lax"


@pytest.mark.slow
@pytest.mark.parametrize("id", [family.examples[0] for family in FAMILIES if unbiased(family)])
@pytest.mark.parametrize("kind", ["categories", "belief network"])
def test_the_mean_gradient_is_that_of_the_elbo_within_its_error(id, kind):
    """In hierarchies too; thirty means of 60 copies each."""
    model = MODELS[kind]()
    least = 2 if registry.parse(id).family in LEAST_TWO else 1
    estimator = get_estimator(id, mc=60, iw=least)
    torch.manual_seed(4)
    try:
        estimator(model, X)
    except ValueError as error:
        assert re.search("takes .*Bernoulli, not OneHotCategorical|cannot be reparam", str(error))  # noqa: PT017
        return
    estimator.eval()
    means = torch.stack([flat_gradient(estimator(model, X)[0], model) for _ in range(30)])
    off = means.mean(0) - flat_gradient(enumerated(model, 1.0), model)
    se = means.std(0) / len(means) ** 0.5
    assert (off.abs() / (se + 1e-9)).max() < 5
    assert off.norm() < 3 * se.norm()


LEAST_TWO = {family.name for family in FAMILIES if family.limits.startswith("K >= 2")}


@pytest.mark.parametrize("id", [family.examples[-1] for family in FAMILIES])
def test_what_cannot_be_handled_is_refused_in_one_line(id):
    for options, words in (({"alpha": 0.5}, "alpha"), ({"freebits": 0.1}, "freebits"), ({"iw": 0}, "iw = 0")):
        with pytest.raises(ValueError, match=f"^{id}: {words}"):
            get_estimator(id, **options)
    estimator = get_estimator(id, iw=2)
    refused = [model for model in (bits(), normals()) if not takes(estimator, model)]
    family = registry.parse(id).family
    if family in ("infer", "measure-valued") or (
        family.startswith("score-function") and family != "score-function-wor"
    ):
        assert not refused
    else:
        assert len(refused) == 1


def takes(estimator: torch.nn.Module, model: Template) -> bool:
    try:
        estimator(model, X)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert str(error).startswith(f"{estimator.id}: node 'z': ")  # noqa: PT017
        return False
    return True


def test_a_model_that_does_not_say_what_its_layers_are_is_refused():
    class Silent(Template):
        pass

    with pytest.raises(ValueError, match="disarm: Silent does not say what its layers are"):
        get_estimator("disarm")(Silent(), X)


def test_diagnostics_and_output_are_drawn_when_they_are_read_and_disturb_nothing():
    model, estimator = bits(), get_estimator("disarm", iw=3)
    torch.manual_seed(0)
    _, diagnostics, output = estimator(model, X)
    state = torch.get_rng_state()
    assert output["z"][0].shape == (1, 3, 2, 2)
    assert diagnostics["loss/elbo"] <= diagnostics["loss/L_k"]
    assert torch.equal(torch.get_rng_state(), state)


def test_indices_of_categories_have_layers_too():
    torch.manual_seed(0)
    model, x = GaussianMixture(4), torch.tensor([3.0, 17.0, 40.0])
    z = torch.arange(4).reshape(4, 1, 1).expand(4, 1, 3)
    log_px, (log_pz,), (log_qz,) = model.log_prob(x, [z.transpose(0, 1)])
    truth = (log_qz.exp() * (log_qz - log_px - log_pz)).sum(1).mean()
    for id in ("expect", "unordered-set"):
        loss, _, _ = get_estimator(id, iw=4)(model, x)
        torch.testing.assert_close(loss, truth)


def test_a_moving_average_stands_still_in_evaluation_mode():
    estimator = get_estimator("score-function-moving-average", iw=1)
    run: Callable[[], Tensor] = lambda: estimator(bits(), X)[0]  # noqa: E731
    run()
    kept = str(estimator.state_dict())
    estimator.eval()
    run()
    assert str(estimator.state_dict()) == kept
