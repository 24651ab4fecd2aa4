"""Relaxations of discrete samples: z whose largest entry is the sample, and z drawn again given the sample.

A Bernoulli b with logit l is 1[z > 0] of z = l + logit u, u uniform; a category is the largest of z = log p + g, g
Gumbel noise. relaxed(z) = sigmoid(z / temperature) or softmax(z / temperature) tends to b as the temperature falls.

Given b, z~ has the law of z given b, from uniform noise v (Tucker et al. 2017, appendix C):

    Bernoulli     z~ = softplus(l + log v) - log(1 - v)  for b = 1,   -softplus(-l + log(1 - v)) + log v  for b = 0;
    category k    z~_k = -log E_k,   z~_i = -log(E_i / p_i + E_k),   E = -log v.

Every z~ agrees with its b, in floating point too. Held at its v, z~ moves with the log-probabilities by

    dz~_i / d log p_i = 1 - r_i,   r = exp(z~ - max z~)  for categories;
    dz~ / dl = 1 - r,   r = 1 - P(b) (1 - exp(-|z~|))  for a Bernoulli,

whatever v was; dz / dl = 1. Shapes: z, z~ and v as the noise, [n, *logits]; slopes by them [n, *logits, m]. Proof:
tests/estimators/nodes/test_relaxation.py.
"""

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution
from torch.nn.functional import one_hot, softplus

from estimators.nodes.base import base_of, gumbels, logits_of, uniforms
from estimators.nodes.parts import probs_of


def is_binary(distribution: Distribution) -> bool:
    """Return whether the node's variables are Bernoulli."""
    return isinstance(base_of(distribution), Bernoulli)


def noise_of(distribution: Distribution, n: int) -> Tensor:
    """Draw uniforms for a Bernoulli, Gumbels for categories, [n, *logits]."""
    if is_binary(distribution):
        return uniforms(distribution, n)
    logits = logits_of(distribution).detach()
    return gumbels(logits.expand(n, *logits.shape))


def perturbed(distribution: Distribution, noise: Tensor) -> Tensor:
    """Return z = l + logit u or log p + g, [n, *logits], with the gradient of the logits."""
    logits = logits_of(distribution)
    return logits + torch.logit(noise) if is_binary(distribution) else _log_probs(logits) + noise


def hard(distribution: Distribution, z: Tensor) -> Tensor:
    """Return b, [n, *logits]: 1[z > 0], or the largest entry as a one-hot."""
    if is_binary(distribution):
        return (z > 0).to(z.dtype)
    return one_hot(z.argmax(-1), z.shape[-1]).to(z.dtype)


def conditional(distribution: Distribution, b: Tensor, v: Tensor) -> Tensor:
    """Return z~ given b [n, *logits] (one-hot for categories), with the gradient of the logits."""
    logits = logits_of(distribution)
    if is_binary(distribution):
        up = softplus(logits + v.log()) - torch.log1p(-v)
        down = v.log() - softplus(torch.log1p(-v) - logits)
        return torch.where(b > 0, up, down)
    log_noise = (-v.log()).log()
    own = (b * log_noise).sum(-1, keepdim=True)
    others = -torch.logaddexp(log_noise - _log_probs(logits), own)
    below = torch.nextafter(-own.detach(), torch.full_like(own, -torch.inf))  # a difference too small to tell is one
    return torch.where(b > 0, -own, torch.minimum(others, below))


def relaxed(distribution: Distribution, z: Tensor, temperature: float | Tensor) -> Tensor:
    """Return sigmoid(z / temperature) or softmax(z / temperature), [n, *logits]."""
    return (z / temperature).sigmoid() if is_binary(distribution) else (z / temperature).softmax(-1)


def held(distribution: Distribution, z: Tensor) -> Tensor:
    """Return r, [n, *logits]: what of a move of the log-probabilities z~ does not follow."""
    if is_binary(distribution):
        logits = logits_of(distribution).detach()
        chosen = torch.where(z > 0, logits, -logits).sigmoid()
        return 1 + chosen * torch.expm1(-z.abs())
    return (z - z.amax(-1, keepdim=True)).exp()


def pulled_back(
    distribution: Distribution, z: Tensor, temperature: float | Tensor, slope: Tensor, follows: Tensor | float = 1.0
) -> Tensor:
    """Return slopes by relaxed(z) [n, *logits, m] as slopes by the logits, where z follows them by `follows`."""
    y = relaxed(distribution, z, temperature).unsqueeze(-1)
    factor = follows.unsqueeze(-1) if isinstance(follows, Tensor) else follows
    if is_binary(distribution):
        return factor * y * (1 - y) / temperature * slope
    moved = factor * y * (slope - (y * slope).sum(-2, keepdim=True)) / temperature
    return moved - probs_of(distribution).unsqueeze(-1) * moved.sum(-2, keepdim=True)


def _log_probs(logits: Tensor) -> Tensor:
    """Normalised, and finite where a category is impossible."""
    return logits.log_softmax(-1).clamp(min=torch.finfo(logits.dtype).min / 8)
