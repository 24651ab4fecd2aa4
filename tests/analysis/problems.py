"""Small models and an estimator for the tests of gradient statistics, and the slow loop that they are held against."""

import math

import torch
from torch import Tensor, nn
from torch import distributions as D


class ImportanceWeighted(nn.Module):
    """-L_K with the gradient of the score function, or the pathwise one (`reparam`)."""

    def __init__(self, iw: int = 3, reparam: bool = False):
        super().__init__()
        self.iw, self.reparam = iw, reparam

    def forward(self, model, x, alpha=None, beta=None):
        values = x.expand(self.iw, *x.shape).reshape(-1, *x.shape[1:])
        output = model(values, reparam=self.reparam)
        (z,), (pz,), (qz,) = output["z"], output["pz"], output["qz"]
        log_px, log_pz, log_qz = (
            log_prob.reshape(self.iw, len(x), -1).sum(-1)
            for log_prob in (output["px"].log_prob(values), pz.log_prob(z), qz.log_prob(z))
        )
        bound = torch.logsumexp(log_px + log_pz - log_qz, 0) - math.log(self.iw)
        surrogate = bound
        if not self.reparam:
            score = bound.detach() * log_qz.sum(0)
            surrogate = bound + score - score.detach()
        return -surrogate.mean(), {}, output


def positive(t: Tensor) -> Tensor:
    return nn.functional.softplus(t) + 0.5


# By name: the family from a tensor of parameters [batch, 4], whether it has an rsample, how many numbers its z has.
FAMILIES = {
    "Normal": (lambda t: D.Normal(t[:, :2], positive(t[:, 2:])), True, 2),
    "LogNormal": (lambda t: D.LogNormal(t[:, :2], positive(t[:, 2:])), True, 2),
    "Laplace": (lambda t: D.Laplace(t[:, :2], positive(t[:, 2:])), True, 2),
    "Exponential": (lambda t: D.Exponential(positive(t)), True, 4),
    "Gamma": (lambda t: D.Gamma(positive(t[:, :2]), positive(t[:, 2:])), True, 2),
    "MultivariateNormal": (lambda t: D.MultivariateNormal(t[:, :2], torch.diag_embed(positive(t[:, 2:]))), True, 2),
    "RelaxedBernoulli": (lambda t: D.RelaxedBernoulli(torch.tensor(0.7), logits=t), True, 4),
    "RelaxedOneHotCategorical": (lambda t: D.RelaxedOneHotCategorical(torch.tensor(0.7), logits=t), True, 4),
    "Bernoulli": (lambda t: D.Bernoulli(logits=t), False, 4),
    "Categorical": (lambda t: D.Categorical(logits=t), False, 1),
    "OneHotCategorical": (lambda t: D.OneHotCategorical(logits=t), False, 4),
    "Independent": (lambda t: D.Independent(D.Normal(t[:, :2], positive(t[:, 2:])), 1), True, 2),
}


class Foreign(nn.Module):
    """A user's model: only torch.distributions, only forward, one sample for each row of x."""

    def __init__(self, family: str):
        super().__init__()
        self.build, _, features = FAMILIES[family]
        self.inference_network = nn.Linear(2, 4)
        self.generative_model = nn.Linear(features, 2)
        self.register_buffer("prior", torch.tensor([[0.3, -0.2, 0.1, 0.4]]))

    def forward(self, x, reparam=False, **kwargs):
        qz = self.build(self.inference_network(x))
        z = qz.rsample() if reparam else qz.sample()
        px = D.Normal(self.generative_model(z.reshape(len(x), -1).to(x.dtype)), 1.5)
        return {"px": px, "z": [z], "qz": [qz], "pz": [self.build(self.prior)]}


def foreign(family: str) -> tuple[Foreign, Tensor]:
    """Return a model and a batch for it, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Foreign(family), torch.randn(3, 2)


class TwoBits(nn.Module):
    """Two independent Bernoulli latents and a table of log p(x, z): everything can be enumerated."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.inference_network = nn.ParameterDict({"logits": nn.Parameter(torch.tensor([0.4, -0.9], dtype=dtype))})
        self.table: Tensor
        self.register_buffer("table", torch.tensor([[-1.0, 0.7], [0.2, -2.3]], dtype=dtype))

    def forward(self, x, reparam=False, **kwargs):
        qz = D.Bernoulli(logits=self.inference_network["logits"].expand(len(x), 2))
        return {"px": Constant(), "z": [qz.sample()], "qz": [qz], "pz": [Table(self.table)]}


class Constant:
    """log p(x|z) = 0: all of the joint is in the table."""

    def log_prob(self, x):
        return torch.zeros_like(x)


class Table:
    def __init__(self, table: Tensor):
        self.table = table

    def log_prob(self, z):
        first, second = z.unbind(-1)
        row = self.table[0] + first.unsqueeze(-1) * (self.table[1] - self.table[0])
        return row[:, 0] + second * (row[:, 1] - row[:, 0])


def loop(estimator, model, x, parameters, num_replicates, seed=0) -> Tensor:
    """Return gradients [replicates, parameters] by loss.backward(), one replicate after another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rows = []
        for _ in range(num_replicates):
            model.zero_grad()
            estimator(model, x)[0].backward()
            rows.append(torch.cat([p.grad.flatten() for p in parameters]))
        model.zero_grad()
    return torch.stack(rows)
