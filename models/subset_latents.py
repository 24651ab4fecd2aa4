"""One layer of N bits of which k are 1: q(z) = exp(<theta, z>) / e_k(exp theta) on the k-subsets of N.

e_k, the k-th elementary symmetric polynomial, is the normaliser: with E(i, j) = log e_j of the first i weights,

    E(i, j) = logaddexp(E(i - 1, j), theta_i + E(i - 1, j - 1)),

so that densities are exact and draws are too: from the last bit down, bit i is 1 with probability
exp(theta_i + E(i - 1, j - 1) - E(i, j)), j being how many are still to be chosen.

Proof: tests/models/test_subset_latents.py.
"""

from collections.abc import Sequence
from functools import partial
from math import comb, log

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from estimators.imle import BaseTargetDistribution, SumOfGammaNoiseDistribution, aimle
from models.latents import Draw, Latents
from models.solvers import top_k

STEP = 1.0  # of the scores, root mean square, in units of the noise


class SubsetLatents(Latents):
    """z in {0, 1}^N with k ones; the prior of zeros is uniform.

    Under `reparam` z is top-k of the scores under sum-of-gamma noise, which has q for its law but nearly, and its
    gradient is that of implicit maximum likelihood estimation, with a symmetric step of root mean square STEP. Biased.
    """

    def __init__(self, num_latents: int, num_chosen: int):
        if not 1 <= num_chosen <= num_latents:
            raise ValueError(f"chosen = {num_chosen} of latents = {num_latents}, expected 1 to {num_latents}")
        self.num_latents = self.num_features = num_latents
        self.num_chosen = num_chosen
        self.shape = (num_latents,)
        self._solver, self._target = partial(top_k, k=num_chosen), _Step(STEP)
        self._noise = SumOfGammaNoiseDistribution(num_chosen)

    def draw(
        self,
        features: Tensor,
        prior: Tensor | None,
        num: tuple[int, int],
        reparam: bool,
        temperature: float,  # noqa: ARG002
    ) -> Draw:
        """Draw z exactly, or under `reparam` by perturbation with the gradient of I-MLE."""
        mc, iw = num
        if reparam:
            solve = aimle(self._solver, self._target, self._noise, mc * iw, symmetric_perturbation=True)
            z = solve(features).unflatten(0, (len(features), mc, iw)).movedim(0, 2)
        else:
            z = draw_subsets(features.detach(), self.num_chosen, num)
        return Draw(z, self.density(prior, z), self.density(features, z), z)

    def density(self, features: Tensor | None, point: Tensor, temperature: float | None = None) -> Tensor:  # noqa: ARG002
        """Return log q(z), or the log-probability of one of all subsets; no temperature changes it."""
        if features is None:
            return point.new_full(point.shape[:-1], -log(comb(self.num_latents, self.num_chosen)))
        return (point * features).sum(-1) - log_polynomials(features, self.num_chosen)[-1][..., -1]

    def log_prob(self, features: Tensor | None, z: Tensor, temperature: float) -> Tensor:  # noqa: ARG002
        """Return the same."""
        return self.density(features, z)

    def distribution(self, features: Tensor, temperature: float | None = None) -> Distribution:  # noqa: ARG002
        """Return the distribution over subsets."""
        return Subset(features, self.num_chosen)


class Subset(Distribution):
    """The distribution of k-subsets by scores [..., N]."""

    arg_constraints = {"scores": constraints.real_vector}  # noqa: RUF012 (as torch.distributions has it)

    def __init__(self, scores: Tensor, k: int):
        self.scores, self.k = scores, k
        super().__init__(scores.shape[:-1], scores.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The probability of each bit: the gradient of the log-normaliser by the scores."""
        with torch.enable_grad():
            scores = self.scores.detach().requires_grad_()
            total = log_polynomials(scores, self.k)[-1][..., -1].sum()
            return torch.autograd.grad(total, scores)[0]

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw z [*sample_shape, ..., N]."""
        return draw_subsets(self.scores.detach(), self.k, tuple(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q(z) of subsets [..., N]."""
        return (value * self.scores).sum(-1) - log_polynomials(self.scores, self.k)[-1][..., -1]


class _Step(BaseTargetDistribution):
    """theta' = theta - lambda dy with lambda so that the step has a given root mean square over all scores."""

    def __init__(self, size: float):
        self.size = size

    def step(self, theta: Tensor, dy: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(dy)
        return torch.where(norm > 0, self.size * theta.numel() ** 0.5 / norm, torch.zeros_like(norm))

    def params(self, theta: Tensor, dy: Tensor) -> Tensor:
        return theta - self.step(theta, dy) * dy


def log_polynomials(theta: Tensor, k: int) -> list[Tensor]:
    """Return E(i, 0..k), [..., k + 1] each, for i = 0..N of scores theta [..., N]."""
    least = torch.finfo(theta.dtype).min / 4  # in place of -inf, whose gradients are nan
    rows = [
        torch.cat(
            [torch.zeros_like(theta[..., :1]), torch.full_like(theta[..., :1], least).expand(*theta.shape[:-1], k)], -1
        )
    ]
    for score in theta.unbind(-1):
        last = rows[-1]
        taken = torch.logaddexp(last[..., 1:], score.unsqueeze(-1) + last[..., :-1])
        rows.append(torch.cat([last[..., :1], taken], -1))
    return rows


def draw_subsets(theta: Tensor, k: int, num: tuple[int, ...]) -> Tensor:
    """Draw z [*num, ..., N] of scores theta [..., N]."""
    tables = log_polynomials(theta, k)
    left = torch.full((*num, *theta.shape[:-1], 1), k, device=theta.device)
    uniform = torch.rand(*num, *theta.shape, dtype=theta.dtype, device=theta.device)
    bits = []
    for i in range(theta.shape[-1], 0, -1):
        after, before = (tables[j].expand(*num, *tables[j].shape) for j in (i, i - 1))
        log_chance = theta[..., i - 1 : i] + before.gather(-1, (left - 1).clamp(min=0)) - after.gather(-1, left)
        # Where as many bits are left as must still be 1, the chance is 1 and not 1 to rounding.
        bit = (left > 0) & ((left >= i) | (uniform[..., i - 1 : i].log() < log_chance))
        left = left - bit.long()
        bits.append(bit)
    return torch.cat(bits[::-1], -1).to(theta.dtype)
