"""What is worth knowing of the particles behind a step, computed when it is first read."""

from collections.abc import Iterator, Mapping
from functools import cached_property, reduce
from math import log
from operator import add

import torch
from torch import Tensor

from models.particles import Particles

NAMES = ("loss/L_k", "loss/elbo", "loss/kl", "loss/nll", "loss/kl_q_p", "loss/ess")


class Diagnostics(Mapping[str, Tensor]):
    """Scalars without gradient, means over mc and the batch, all of the plain weights (alpha = 0, beta = 1).

    In nats: L_k, the importance-weighted bound; elbo, the mean of log w; kl, of log q(z|x) - log p(z); nll, of
    -log p(x|z); kl_q_p = L_k - elbo, which tends to KL(q(z|x) | p(z|x)) as K grows. In particles: ess, the effective
    sample size 1 / sum_k v_k^2, from 1 to K.
    """

    def __init__(self, particles: Particles, num_particles: int):
        """Describe the first `num_particles` of the particles."""
        self._log_px = particles.log_px.detach()[..., :num_particles, :]
        self._log_pz = [log_pz.detach()[..., :num_particles, :] for log_pz in particles.log_pz]
        self._log_qz = [log_qz.detach()[..., :num_particles, :] for log_qz in particles.log_qz]

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)

    @cached_property
    def _values(self) -> dict[str, Tensor]:
        kl = reduce(add, self._log_qz) - reduce(add, self._log_pz)
        log_w = self._log_px - kl
        bound = (torch.logsumexp(log_w, -2) - log(log_w.shape[-2])).mean()
        ess = log_w.softmax(-2).square().sum(-2).reciprocal().mean()
        elbo = log_w.mean()
        return dict(zip(NAMES, (bound, elbo, kl.mean(), -self._log_px.mean(), bound - elbo, ess), strict=True))
