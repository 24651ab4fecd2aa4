"""The joint values of the independent discrete variables of a node: the likeliest ones, and draws without replacement.

A node has D independent variables of C categories each, C^D joint values, of which none is enumerated: a beam of k
prefixes goes through the variables. Shapes: log-probabilities [*plates, D, C]; joint values as categories
[k, *plates, D].
"""

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, OneHotCategorical

from estimators.nodes.base import Method, base_of, gumbels, logits_of


def log_probs_of(distribution: Distribution, num_plates: int) -> Tensor:
    """Return the log-probabilities of each variable's categories, [*plates, D, C], without a gradient."""
    logits = logits_of(distribution).detach()
    if isinstance(base_of(distribution), Bernoulli):
        logits = torch.nn.functional.logsigmoid(torch.stack([-logits, logits], -1))
    size = logits.shape[-1]
    return logits.reshape(*logits.shape[:num_plates], -1, size)


def num_values(distribution: Distribution, num_plates: int) -> int:
    """Return C^D."""
    logits = logits_of(distribution)
    if isinstance(base_of(distribution), Bernoulli):
        return 2 ** logits.shape[num_plates:].numel()
    return logits.shape[-1] ** logits.shape[num_plates:-1].numel()


def check_k(method: Method, k: int, num: int) -> None:
    """Raise ValueError, naming the node, where a method wants more different values than the node has."""
    if k > num:
        raise ValueError(
            f"node {method.plate_name!r}: {type(method).__name__} with k = {k} wants as many different values, and the "
            f"node has {num}"
        )


def points_of(distribution: Distribution, categories: Tensor) -> Tensor:
    """Return categories [k, *plates, D] as points of the node, [k, *plates, *rest, *event]."""
    base, logits = base_of(distribution), logits_of(distribution)
    if isinstance(base, Bernoulli):
        return categories.reshape(len(categories), *logits.shape).to(logits.dtype)
    values = categories.reshape(len(categories), *logits.shape[:-1])
    if isinstance(base, OneHotCategorical):
        # torch.vmap does not know one_hot.
        return (values.unsqueeze(-1) == torch.arange(logits.shape[-1], device=values.device)).to(logits.dtype)
    return values


def likeliest(log_probs: Tensor, k: int) -> Tensor:
    """Return the k joint values of the greatest probability, [k, *plates, D], in order; all where they are fewer."""
    return _beam(log_probs, k, noisy=False)[0]


def without_replacement(log_probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return k joint values drawn one after the other without replacement, [k, *plates, D], and their perturbed ones.

    Gumbel top-k by a stochastic beam (Kool et al. 2019, "Stochastic beams and where to find them"): log-probabilities
    of all joint values plus independent Gumbel noise, of which only the k largest, [k, *plates], are ever made; the
    largest first.
    """
    return _beam(log_probs, k, noisy=True)


def _beam(log_probs: Tensor, k: int, noisy: bool) -> tuple[Tensor, Tensor]:
    plates, (num_variables, size) = log_probs.shape[:-2], log_probs.shape[-2:]
    categories = torch.zeros(1, *plates, 0, dtype=torch.long, device=log_probs.device)
    total = log_probs.new_zeros(1, *plates)  # log-probabilities of the prefixes
    score: Tensor | None = None  # the same, perturbed: the largest of the values that begin with a prefix
    for i in range(num_variables):
        totals = total.unsqueeze(1) + log_probs[..., i, :].movedim(-1, 0)  # [beam, C, *plates]
        scores = totals
        if noisy:
            scores = totals + gumbels(totals)
            if score is not None:
                scores = with_maximum(scores, score.unsqueeze(1))
        width = len(total)
        score, chosen = scores.flatten(0, 1).topk(min(k, width * size), 0)
        total = totals.flatten(0, 1).gather(0, chosen)
        parents = (chosen // size).unsqueeze(-1).expand(*chosen.shape, i)
        categories = torch.cat([categories.gather(0, parents), (chosen % size).unsqueeze(-1)], -1)
    return categories, total if score is None else score


def with_maximum(scores: Tensor, maximum: Tensor) -> Tensor:
    """Return Gumbel variables [beam, C, ...] given that the largest of each beam's is `maximum` [beam, 1, ...].

    -log(exp(-maximum) - exp(-z) + exp(-score)), z the largest as drawn, in a form that does not overflow (Kool et al.
    2019, appendix B).
    """
    largest = scores.amax(1, keepdim=True)
    gap = torch.log1p(-(scores - largest).exp())  # log(1 - exp(score - z)), -inf at the largest itself
    v = maximum - scores + gap
    found = maximum - v.relu() - (-v.abs()).exp().log1p()
    return torch.where(scores == -torch.inf, -torch.inf, found)
