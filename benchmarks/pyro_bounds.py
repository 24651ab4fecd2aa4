"""Multi-sample bounds against Pyro 1.9: `python -m benchmarks.pyro_bounds [--rounds 9] [--peer PYTHON]`.

`--peer` is the Python of an environment with Pyro beside torch (without it, ours alone is measured):

    python -m venv peer
    peer/bin/pip install torch==2.13.0 numpy
    peer/bin/pip install --no-deps pyro-ppl==1.9.1 pyro-api opt_einsum tqdm packaging

The loss and its gradient, ten times: reweighted wake-sleep on the mixture of 20 Gaussians (batch 100, K = 20), and IWAE
on the Gaussian toy of 20 dimensions (batch 100, K = 100). Pyro runs its particles vectorised, without validation.
"""

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor, nn

from benchmarks import peer

REPEATS = 10
MIXTURE, TOY = "wake-wake, mixture, K=20", "pathwise-iwae, toy, K=100"
MIXTURE_PARTICLES, TOY_PARTICLES = 20, 100


def observations() -> dict[str, Tensor]:
    """Return x of each work."""
    torch.manual_seed(0)
    return {MIXTURE: 200 * torch.rand(100, 1), TOY: torch.randn(100, 20)}


def repeated(run: Callable[[], object]) -> Callable[[], object]:
    """Return what runs it ten times."""
    return lambda: [run() for _ in range(REPEATS)]


def ours() -> peer.Works:
    """Return our works."""
    from estimators import get_estimator
    from models import GaussianMixture, GaussianToy

    def work(id: str, model: nn.Module, num_particles: int, x: Tensor) -> Callable[[], object]:
        estimator = get_estimator(id, iw=num_particles)

        def evaluate() -> None:
            model.zero_grad()
            estimator(model, x)[0].backward()

        return repeated(evaluate)

    x = observations()
    return {
        MIXTURE: work("wake-wake", GaussianMixture(), MIXTURE_PARTICLES, x[MIXTURE]),
        TOY: work("pathwise-iwae", GaussianToy(), TOY_PARTICLES, x[TOY]),
    }


def theirs() -> peer.Works:
    """Return the same models and objectives, written for Pyro."""
    import pyro
    from pyro import distributions as dist
    from pyro.infer import RenyiELBO, ReweightedWakeSleep

    pyro.enable_validation(False)
    encoder = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 20))
    logits, means = nn.Parameter(torch.zeros(20)), 10.0 * torch.arange(20)

    def mixture(x: Tensor) -> None:
        pyro.param("logits", logits)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=logits))
            pyro.sample("x", dist.Normal(means[z], 5.0), obs=x[:, 0])

    def mixture_guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=encoder(x)))

    A, b, mu = (
        nn.Parameter(torch.randn(20, 20) / sqrt(20)),
        nn.Parameter(torch.zeros(20)),
        nn.Parameter(torch.zeros(20)),
    )

    def toy(x: Tensor) -> None:
        pyro.param("mu", mu)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def toy_guide(x: Tensor) -> None:
        pyro.param("A", A)
        pyro.param("b", b)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(nn.functional.linear(x, A, b), 2 / 3).to_event(1))

    vectorised = {"vectorize_particles": True, "max_plate_nesting": 1, "strict_enumeration_warning": False}
    wake = ReweightedWakeSleep(num_particles=MIXTURE_PARTICLES, model_has_params=True, **vectorised)
    iwae = RenyiELBO(alpha=0.0, num_particles=TOY_PARTICLES, **vectorised)

    def work(loss: Callable[[], object], parameters: list[nn.Parameter]) -> Callable[[], object]:
        def evaluate() -> None:
            for parameter in parameters:
                parameter.grad = None
            loss()

        return repeated(evaluate)

    x = observations()
    return {
        MIXTURE: work(lambda: wake.loss_and_grads(mixture, mixture_guide, x[MIXTURE]), [logits, *encoder.parameters()]),
        TOY: work(lambda: iwae.loss_and_grads(toy, toy_guide, x[TOY]), [A, b, mu]),
    }


if __name__ == "__main__":
    peer.main("pyro_bounds", __doc__, ours, theirs, rounds=9)
