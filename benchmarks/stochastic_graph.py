"""Stochastic graphs against Storchastic 0.3.7: the tutorial of a discrete VAE, training, measuring, enumerating.

    python -m benchmarks.stochastic_graph [--rounds 5] [--peer PYTHON]

Storchastic replaces functions of torch in the whole process, so it runs in one of its own, which takes turns with this
one: `--peer` is the Python of an environment that has it beside torch (without it, ours alone is measured):

    python -m venv peer
    peer/bin/pip install torch==2.13.0 numpy
    peer/bin/pip install --no-deps storchastic==0.3.7 pyro-ppl pyro-api entmax opt_einsum tqdm packaging

Goals, as multiples of Storchastic's speed: a training step with ten samples 1.5, a hundred gradients 3, enumeration 5.
"""

import gc
import resource
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import OneHotCategorical

from benchmarks import peer

LOOP = 300  # steps of the long loop
GOALS = {"training step, 10 samples": 1.5, "100 gradients": 3.0, "enumeration": 5.0}


class DiscreteVAE(nn.Module):
    """784-512-256-(2 x 10)-256-512-784, as in the tutorial."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (784, 512, 256, 20, 256, 512, 784)
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(sizes))

    def encode(self, x: Tensor) -> Tensor:
        return self.layers[2](self.layers[1](self.layers[0](x).relu()).relu())

    def decode(self, z: Tensor) -> Tensor:
        return self.layers[5](self.layers[4](self.layers[3](z).relu()).relu()).sigmoid()


def works(storch: Any) -> dict[str, Callable[[], object]]:
    """Return the tutorial's pieces of work, written for either library."""
    torch.manual_seed(0)
    model, data = DiscreteVAE(), torch.rand(64, 784).round()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def story(method: Any) -> Any:
        x = storch.denote_independent(data, 0, "data")
        q = OneHotCategorical(probs=model.encode(x).reshape(-1, 2, 10).softmax(dim=-1))
        z = method(q)
        prior = OneHotCategorical(probs=torch.ones_like(q.probs) / 10.0)
        storch.add_cost(torch.distributions.kl_divergence(q, prior).sum(-1), "kl-div")
        reconstruction = model.decode(z.reshape((*z.shape[:-2], 2 * 10)))
        storch.add_cost(nn.BCELoss(reduction="none")(reconstruction, x).sum(-1), "reconstruction")
        return z

    batch_average = storch.method.ScoreFunction("z", n_samples=10, baseline_factory="batch_average")
    single = storch.method.ScoreFunction("z", n_samples=1, baseline_factory="None")
    expect = storch.method.Expect("z")

    def step(method: Any) -> None:
        optimizer.zero_grad()
        story(method)
        storch.backward()
        optimizer.step()

    def hundred() -> Any:
        if hasattr(storch, "replicates"):
            with storch.replicates(100, "gradients"):
                z = story(single)
                storch.backward()
            return storch.variance(z.param_grads["probs"], "gradients")
        gradients = []
        for _ in range(100):
            optimizer.zero_grad()
            z = story(single)
            storch.backward()
            gradients.append(z.param_grads["probs"])
        return storch.variance(storch.gather_samples(gradients, "gradients"), "gradients")

    def enumerate_all() -> None:
        optimizer.zero_grad()
        story(expect)
        storch.backward()

    return {
        "training step, 10 samples": lambda: step(batch_average),
        "100 gradients": hundred,
        "enumeration": enumerate_all,
        "training step, 1 sample": lambda: step(single),
    }


def ours() -> peer.Works:
    """Return our works."""
    import stochastic_graph

    return works(stochastic_graph)


def theirs() -> peer.Works:
    """Return those of Storchastic."""
    import storch

    return works(storch)


def memory(run: Callable[[], object], steps: int) -> tuple[int, int, int]:
    """Return how many tensors there are after `steps` runs more than after ten, and the peak memory of both in kB."""

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    for _ in range(10):
        run()
    first, before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, count()
    for _ in range(steps):
        run()
    return count() - before, first, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    done = peer.main("stochastic_graph", __doc__, ours, theirs, GOALS)
    more, first, last = memory(done["training step, 1 sample"], LOOP)
    print(f"after {LOOP} steps: {more} tensors more, peak memory {first} kB, then {last} kB")
