"""The evaluation that is the same for every estimator: the bound with a fixed number of particles."""

from collections import defaultdict
from functools import partial

import torch
from torch import Tensor, nn

from analysis.active_units import ActiveUnits
from estimators.bounds.diagnostics import Diagnostics
from models.particles import Particles, draw_particles

# What is drawn at once. Together with the shapes these fix which noise a point gets, on every machine the same.
MAX_PARTICLES = 2**18
MAX_VALUES = 2**22  # of p(x|z), one for each particle and value of x: 16 MiB of them, some ten times that in a network


@torch.no_grad()
def evaluate_bound(
    model: nn.Module, x: Tensor, iw: int, seed: int, units: ActiveUnits | None = None
) -> dict[str, float]:
    """Return loss/L_k and its companions, averaged over x [N, ...], with `iw` particles a point.

    The points are taken in chunks of bounded memory, as are the particles of a point that has very many. `units` takes
    in the particles (of such a point the first ones). Same seed, same numbers; the global random state and the model's
    training flag are left as they were.
    """
    training = model.training
    model.eval()
    sums: dict[str, Tensor] = defaultdict(partial(torch.zeros, (), dtype=torch.float64, device=x.device))
    most = max(1, min(MAX_PARTICLES, MAX_VALUES // max(1, x[:1].numel())))
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        for chunk in x.split(max(1, most // iw)):
            for name, value in Diagnostics(_draw(model, chunk, iw, most, units), iw).items():
                sums[name] += value.double() * len(chunk)
    model.train(training)
    return {name: total.item() / len(x) for name, total in sums.items()}


def _draw(model: nn.Module, x: Tensor, iw: int, most: int, units: ActiveUnits | None) -> Particles:
    """Draw `iw` particles for each row of x, at most `most` of them in one pass over the model."""
    first = draw_particles(model, x, mc=1, iw=min(iw, most))
    if units is not None:
        units.add(first)
    if iw <= most:
        return first
    rest = (min(most, iw - start) for start in range(most, iw, most))
    parts = [first, *(draw_particles(model, x, mc=1, iw=num)._replace(output={}) for num in rest)]
    return first._replace(
        log_px=torch.cat([part.log_px for part in parts], 1),
        log_pz=tuple(torch.cat(layers, 1) for layers in zip(*(part.log_pz for part in parts), strict=True)),
        log_qz=tuple(torch.cat(layers, 1) for layers in zip(*(part.log_qz for part in parts), strict=True)),
    )
