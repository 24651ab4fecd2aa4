"""The evaluation that is the same for every estimator: the bound with a fixed number of particles."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from estimators.bounds.diagnostics import Diagnostics
from models.particles import draw_particles

MAX_PARTICLES = 2**18  # particles drawn at once; together with the shapes it fixes which noise a point gets


@torch.no_grad()
def evaluate_bound(model: nn.Module, x: Tensor, iw: int, seed: int) -> dict[str, float]:
    """Return loss/L_k and its companions, averaged over x [N, ...], with `iw` particles a point.

    Same seed, same numbers; the global random state and the model's training flag are left as they were.
    """
    training = model.training
    model.eval()
    sums: dict[str, float] = defaultdict(float)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        for chunk in x.split(max(1, MAX_PARTICLES // iw)):
            for name, value in Diagnostics(draw_particles(model, chunk, mc=1, iw=iw), iw).items():
                sums[name] += value.item() * len(chunk)
    model.train(training)
    return {name: total / len(x) for name, total in sums.items()}
