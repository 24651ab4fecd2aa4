"""Surrogates of any order against dice-mc 0.1.1: `python -m benchmarks.dice [--rounds 15] [--peer PYTHON]`.

`--peer` is the Python of an environment with dice-mc beside torch (without it, ours alone is measured):

    python -m venv peer
    peer/bin/pip install torch==2.13.0 numpy
    peer/bin/pip install --no-deps dice-mc==0.1.1

A batch of 64 walks of 50 draws from 16 categories, one policy for all, the baseline of each the mean of the others: the
draws with their surrogate, its gradient, and a product with its Hessian.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import peer

BATCH, STEPS, CATEGORIES = 64, 50, 16


def works(dice: Any) -> dict[str, Callable[[], object]]:
    """Return the works, written for either library."""
    torch.manual_seed(0)
    policy = torch.randn(CATEGORIES, requires_grad=True)

    def surrogate() -> Tensor:
        logp, actions = dice.sample_categorical(policy.expand(BATCH, STEPS, CATEGORIES))
        costs = actions.float().mean(1)
        return (dice.cost_node(costs, [logp]) + dice.batch_baseline_term(costs, [logp])).mean()

    def hessian_product() -> Tensor:
        (gradient,) = torch.autograd.grad(surrogate(), policy, create_graph=True)
        return torch.autograd.grad(gradient.sum(), policy)[0]

    def many(run: Callable[[], object]) -> Callable[[], object]:
        return lambda: [run() for _ in range(20)]

    return {
        "20 surrogates": many(surrogate),
        "20 gradients": many(lambda: torch.autograd.grad(surrogate(), policy)),
        "20 products with the Hessian": many(hessian_product),
    }


def ours() -> peer.Works:
    """Return our works."""
    from estimators import dice

    return works(dice)


def theirs() -> peer.Works:
    """Return those of dice-mc."""
    import dice_mc.torch

    return works(dice_mc.torch)


if __name__ == "__main__":
    peer.main("dice", __doc__, ours, theirs, rounds=15)
