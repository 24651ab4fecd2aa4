"""The tutorial of the discrete VAE, its code as published but for the import line and the data."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributions import OneHotCategorical

import stochastic_graph as storch

# fmt: off


class DiscreteVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(784, 512)
        self.fc2 = nn.Linear(512, 256)
        self.fc3 = nn.Linear(256, 2 * 10)
        self.fc4 = nn.Linear(2 * 10, 256)
        self.fc5 = nn.Linear(256, 512)
        self.fc6 = nn.Linear(512, 784)

    def encode(self, x):
        h1 = self.fc1(x).relu()
        h2 = self.fc2(h1).relu()
        return self.fc3(h2)

    def decode(self, z):
        h3 = self.fc4(z).relu()
        h4 = self.fc5(h3).relu()
        return self.fc6(h4).sigmoid()


def generative_story(method: storch.method.Method, model: DiscreteVAE, data: torch.Tensor):
    x = storch.denote_independent(data.view(-1, 784), 0, "data")

    # Encode data. Shape: (data, 2 * 10)
    q_logits = model.encode(x)
    # Shape: (data, 2, 10)
    q_logits = q_logits.reshape(-1, 2, 10)
    # Define variational posterior
    q = OneHotCategorical(probs=q_logits.softmax(dim=-1))
    # Sample from variational posterior. Shape: (amt_samples, data, 2, 10)
    z = method(q)

    prior = OneHotCategorical(probs=torch.ones_like(q.probs) / 10.0)
    # Shape: (data)
    KL_div = torch.distributions.kl_divergence(q, prior).sum(-1)
    storch.add_cost(KL_div, "kl-div")

    z_in = z.reshape(z.shape[:-2] + (2 * 10,))  # noqa: RUF005
    # Shape: (amt_samples, data, 784)
    reconstruction = model.decode(z_in)
    bce = torch.nn.BCELoss(reduction="none")(reconstruction, x).sum(-1)
    storch.add_cost(bce, "reconstruction")

    return z


def train(method: storch.method.Method, train_loader, evaluate: Any):
    model = DiscreteVAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(5):
        print("Epoch:" + str(epoch + 1))
        for i, (data, _) in enumerate(train_loader):
            optimizer.zero_grad()

            generative_story(method, model, data)
            storch.backward()
            optimizer.step()
            if i % 300 == 0:
                evaluate(method, model, data, optimizer)


def evaluate(method: storch.method.Method, model: DiscreteVAE, data, optimizer, number=100):
    gradients: Any = []
    for _ in range(number):
        optimizer.zero_grad()

        z = generative_story(method, model, data)
        elbo = storch.backward()
        gradients.append(z.param_grads["probs"])
    gradients = storch.gather_samples(gradients, "gradients")

    print(
        "Training ELBO "
        + str(elbo.item())
        + ". Gradient variance "
        + str(storch.variance(gradients, "gradients")._tensor.item())
    )


def evaluate_bias(method: storch.method.Method, model: DiscreteVAE, data, optimizer, number=100):
    # Compute expected gradient
    optimizer.zero_grad()

    z = generative_story(storch.method.Expect("z"), model, data)
    storch.backward()
    expected_gradient = z.param_grads["probs"]

    # Collect gradient samples
    gradients: Any = []
    for _ in range(number):
        optimizer.zero_grad()

        z = generative_story(method, model, data)
        elbo = storch.backward()
        gradients.append(z.param_grads["probs"])

    gradients = storch.gather_samples(gradients, "gradients")
    mean_gradient = storch.reduce_plates(gradients, "gradients")
    bias_gradient: Any = (
        storch.reduce_plates((mean_gradient - expected_gradient) ** 2)
    ).sum()
    print(
        "Training ELBO "
        + str(elbo.item())
        + " Gradient variance "
        + str(storch.variance(gradients, "gradients")._tensor.item())
        + " Gradient bias "
        + str(bias_gradient._tensor.item())
    )

# fmt: on


def images(number: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(number, 28, 28, generator=torch.Generator().manual_seed(seed)).round()


METHODS = {
    "score function": lambda: storch.method.ScoreFunction("z", n_samples=1, baseline_factory="None"),
    "batch average": lambda: storch.method.ScoreFunction("z", n_samples=10, baseline_factory="batch_average"),
    "Gumbel-softmax": lambda: storch.method.GumbelSoftmax("z", n_samples=1),
    "straight-through": lambda: storch.method.GumbelSoftmax("z", straight_through=True),
    "expect": lambda: storch.method.Expect("z"),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_tutorial_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both forms of evaluate; fewer gradients than there."""
    torch.manual_seed(0)
    loader = [(images(4, seed), None) for seed in range(2)]

    def both(*given: Any) -> None:
        each: Any
        for each in (evaluate, evaluate_bias):
            each(*given, 2)

    train(METHODS[name](), loader, both)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 5
    for with_variance, with_bias in zip(lines[1::3], lines[2::3], strict=True):
        words = with_bias.split()
        elbo, variance, bias = float(words[2]), float(words[5]), float(words[8])
        assert 100 < elbo < 600
        assert float(with_variance.split()[-1]) >= 0
        assert (variance < 1e-8 and bias < 1e-8) if name == "expect" else variance > 0


def story_up_to_reconstruction() -> tuple[storch.Tensor, storch.Tensor]:
    torch.manual_seed(0)
    model = DiscreteVAE()
    x = storch.denote_independent(images(4).view(-1, 784), 0, "data")
    q = OneHotCategorical(probs=model.encode(x).reshape(-1, 2, 10).softmax(dim=-1))
    z = storch.method.ScoreFunction("z", n_samples=3)(q)
    assert z.shape == (3, 4, 2, 10)
    return model.decode(z.reshape(*z.shape[:-2], 2 * 10)), x


@pytest.mark.parametrize("what", ["reduction", "mean"])
def test_its_two_mistakes_are_refused_where_they_are_made(what: str) -> None:
    """The error names plate, dimension and remedy."""
    with storch.Graph():
        reconstruction, x = story_up_to_reconstruction()
        bce = torch.nn.BCELoss(reduction="none")(reconstruction, x).sum(-1)
        mistake = (lambda: torch.nn.BCELoss(reduction="sum")(reconstruction, x), lambda: torch.mean(bce))[
            what == "mean"
        ]
        with pytest.raises(ValueError, match=r"2 plate dimensions.*reduce_plates\(tensor, 'z'\)") as caught:
            mistake()
    assert "'z' of size 3, dimension 0" in str(caught.value)


def test_replicates_are_what_passes_one_by_one_give() -> None:
    """With Expect exactly; with the score function in mean, and in variance, of 100 passes and 400 replicates."""
    torch.manual_seed(0)
    model, data = DiscreteVAE(), images(3)
    z = generative_story(storch.method.Expect("z"), model, data)
    storch.backward()
    exact = z.param_grads["probs"]
    model.zero_grad()
    with storch.replicates(7, "gradients"):
        z = generative_story(storch.method.Expect("z"), model, data)
        assert storch.backward().item() == pytest.approx(543, rel=0.1)
    many = z.param_grads["probs"]
    assert [plate.name for plate in many.plates] == ["gradients", "data"]
    torch.testing.assert_close((many - exact)._tensor, torch.zeros(7, 3, 2, 10), atol=1e-3, rtol=0)
    assert all(parameter.grad is None for parameter in model.parameters())

    method = storch.method.ScoreFunction("z", n_samples=5, baseline_factory="batch_average")
    gradients = []
    for _ in range(100):
        z = generative_story(method, model, data)
        storch.backward()
        gradients.append(z.param_grads["probs"])
    apart = storch.gather_samples(gradients, "gradients")._tensor.flatten(1)
    with storch.replicates(400, "gradients"):
        z = generative_story(method, model, data)
        storch.backward()
    together = z.param_grads["probs"]._tensor.flatten(1)
    error = (apart.var(0) / 100 + together.var(0) / 400).sqrt()
    assert ((apart.mean(0) - together.mean(0)).abs() < 5 * error).all()
    assert together.var(0).sum().item() == pytest.approx(apart.var(0).sum().item(), rel=0.4)
