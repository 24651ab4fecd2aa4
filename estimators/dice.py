"""DiCE: surrogates whose derivatives of every order estimate those of an expected cost (Foerster et al. 2018).

The surrogate of costs c that depend on samples with log-probabilities tau is

    magic_box(tau) c,   magic_box(tau) = exp(tau - stop_gradient(tau)),

whose value is c and whose n-th derivative is an unbiased estimate of the n-th derivative of E[c]. Terms whose value is
zero reduce the variance of the derivatives. Proof: tests/estimators/dice, by enumeration, to the third derivative.

>>> logits = torch.zeros(8, 3, requires_grad=True)  # one stochastic node a batch item
>>> logp, actions = sample_categorical(logits)
>>> costs = actions.float()
>>> losses = cost_node(costs, [logp]) + batch_baseline_term(costs, [logp])
>>> losses.mean().backward()

Shapes meet from the left: a cost [batch] and a log-probability [batch, steps] belong together, the latter summed over
steps; where one has size 1, or no dimension, it is shared. Items of a batch that are independent of each other keep
their own costs, and the mean is taken last: an item's samples then have no part in the others' costs, and the variance
falls as the batch grows.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add

import torch
from torch import Generator, Tensor, nn

__all__ = [
    "EMABaseline",
    "any_order_baseline_term",
    "baseline_term",
    "batch_baseline_term",
    "cost_node",
    "loaded_dice",
    "logp_categorical",
    "magic_box",
    "sample_categorical",
]


def magic_box(tau: Tensor) -> Tensor:
    """Return exp(tau - stop_gradient(tau)): ones, whose derivatives are those of exp(tau) / exp(tau).

    Where tau is -inf, as of an action that cannot be taken, the one is a constant: such an outcome adds nothing to an
    expectation, and must not add a nan to its estimate.
    """
    tau = torch.where(tau == -torch.inf, 0.0, tau)
    return torch.exp(tau - tau.detach())


def cost_node(cost: Tensor, logps: Iterable[Tensor]) -> Tensor:
    """Return the surrogate of costs, in their shape: magic_box(sum of logps) cost (Foerster et al. 2018, eq. 9).

    `logps`: the log-probabilities of the samples that the costs depend on, each meeting the cost's shape from the left.
    One that has no influence on the cost adds variance, no bias. For steps that a cost looks back on, give the
    cumulative sum: `cost_node(kl, [logp.cumsum(1)])` with kl and logp [batch, steps] lets the cost of each step depend
    on the samples up to it.

    Raises ValueError where the shapes cannot meet, and for a tensor in the place of a list of them.
    """
    return magic_box(_sum_of(logps, cost)) * cost


def baseline_term(baseline: Tensor, logps: Iterable[Tensor]) -> Tensor:
    """Return sum over logps of (1 - magic_box(logp)) baseline: zeros in the baseline's shape, to be added to the costs.

    Their gradient subtracts the baseline from the cost in the score function estimator. The mean of any derivative
    stays what it is as long as the baseline does not depend on the samples in `logps` (Foerster et al. 2018, eq. 10).
    Second derivatives keep the variance of their mixed terms; `any_order_baseline_term` reduces those too.

    Raises ValueError where the shapes cannot meet.
    """
    terms = ((1 - magic_box(_meet(logp, baseline))) * baseline for logp in _listed(logps))
    return sum(terms, torch.zeros_like(baseline))


def any_order_baseline_term(baselines: Tensor | Sequence[Tensor], logps: Iterable[Tensor]) -> Tensor:
    """Return sum_w magic_box(sum of the logps before w) (1 - magic_box(logp_w)) b_w (Mao et al. 2019).

    Zeros, to be added to the costs, which reduce the variance of derivatives of any order. `logps`: the samples'
    log-probabilities in the order in which they were drawn, as `logp.unbind(1)` of logp [batch, steps]. `baselines`:
    one for each, which may depend on the samples before it, not on itself or later ones; a tensor serves them all.
    Where the baseline is the constant that the cost is, every derivative vanishes in each draw.

    Raises ValueError where shapes cannot meet, for baselines of several shapes, where there are not as many of them as
    logps, and for a tensor in the place of a list of logps.
    """
    logps = list(_listed(logps))
    if isinstance(baselines, Tensor):
        baselines = [baselines] * len(logps)
    if len(baselines) != len(logps) or not logps:
        raise ValueError(
            f"any_order_baseline_term was given {len(baselines)} baselines and {len(logps)} logps, expected as many"
        )
    if len(shapes := {baseline.shape for baseline in baselines}) > 1:
        raise ValueError(
            f"any_order_baseline_term was given baselines of {sorted(map(list, shapes))}, expected one shape"
        )
    met = [_meet(logp, baseline).expand_as(baseline) for baseline, logp in zip(baselines, logps, strict=True)]
    own = torch.stack(met)
    own = torch.where(own == -torch.inf, 0.0, own)
    before = torch.cat([torch.zeros_like(own[:1]), own[:-1].cumsum(0)])
    return (magic_box(before) * (1 - magic_box(own)) * torch.stack(list(baselines))).sum(0)


def batch_baseline_term(cost: Tensor, logps: Iterable[Tensor]) -> Tensor:
    """Return the baseline term of costs [batch, ...], each with the mean of the other items' as its baseline.

    The items of the batch have to be independent of each other (Kool et al. 2019). Raises ValueError for fewer than two
    items and where shapes cannot meet.
    """
    if cost.dim() == 0 or len(cost) < 2:
        raise ValueError(
            f"batch_baseline_term was given costs of shape {list(cost.shape)}, expected [batch, ...] of at least two "
            "items: each one's baseline is the mean of the others"
        )
    return baseline_term((cost.sum(0) - cost) / (len(cost) - 1), logps)


class EMABaseline(nn.Module):
    """An exponential moving average of past costs as a baseline; its state belongs in a checkpoint.

    mean = sum_i decay^(n-i) (1 - decay) mean(cost_i) / (1 - decay^n), free of the bias of its start at zero, over the n
    calls so far. It is read before the present costs enter it: a baseline that contains them would bias the gradient.
    The first call has no baseline.
    """

    sum_of_costs: Tensor
    sum_of_weights: Tensor

    def __init__(self, decay: float = 0.99):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"EMABaseline was given decay={decay}, expected a number in [0, 1)")
        self.decay = decay
        self.register_buffer("sum_of_costs", torch.zeros(()))
        self.register_buffer("sum_of_weights", torch.zeros(()))

    @property
    def mean(self) -> Tensor:
        """The moving average, a scalar; 0 before the first cost."""
        return self.sum_of_costs / self.sum_of_weights.clamp(min=torch.finfo(self.sum_of_weights.dtype).tiny)

    @torch.no_grad()
    def update(self, cost: Tensor) -> None:
        """Take the mean of these costs into the average."""
        weight = 1 - self.decay
        self.sum_of_costs.mul_(self.decay).add_(cost.detach().to(self.sum_of_costs).mean(), alpha=weight)
        self.sum_of_weights.mul_(self.decay).add_(weight)

    def forward(self, cost: Tensor, logps: Iterable[Tensor]) -> Tensor:
        """Return the baseline term for `cost`, zeros in its shape, then update the average."""
        mean = self.mean.to(cost.device, cost.dtype if cost.is_floating_point() else None)
        term = baseline_term(mean.expand_as(cost), logps)
        self.update(cost)
        return term

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"decay={self.decay:g}"


def loaded_dice(logp: Tensor, advantages: Tensor, discount: float = 1.0, decay: float = 1.0) -> Tensor:
    """Return the Loaded DiCE surrogate [...] of advantages [..., steps] (Farquhar et al. 2019, algorithm 1).

    With w_t = sum_{s <= t} decay^(t-s) logp_s and v_t = w_t - logp_t it is

        sum_t discount^t (magic_box(w_t) - magic_box(v_t)) advantage_t,

    whose value is zero. `logp` [..., steps]: the log-probabilities of the actions; advantages: of the cost, estimates
    of Q(s_t, a_t) - V(s_t), constants. Derivatives of every order are unbiased at decay = 1 where the advantages are; a
    decay below 1 lets actions long past count less in the higher derivatives: less variance, some bias.

    Raises ValueError for different shapes, none of steps, and a discount or decay outside [0, 1].
    """
    if logp.shape != advantages.shape or logp.dim() == 0:
        raise ValueError(
            f"loaded_dice was given logp {list(logp.shape)} and advantages {list(advantages.shape)}, expected "
            "[..., steps] of both"
        )
    for name, value in (("discount", discount), ("decay", decay)):
        if not 0 <= value <= 1:
            raise ValueError(f"loaded_dice was given {name}={value}, expected a number in [0, 1]")
    logp = torch.where(logp == -torch.inf, 0.0, logp)
    past, exclusive = torch.zeros_like(logp[..., 0]), []
    for own in logp.unbind(-1):
        exclusive.append(decay * past)
        past = decay * past + own
    before = torch.stack(exclusive, -1)
    factors = discount ** torch.arange(logp.shape[-1], device=logp.device, dtype=logp.dtype)
    return (factors * (magic_box(before + logp) - magic_box(before)) * advantages).sum(-1)


def logp_categorical(logits: Tensor, actions: Tensor) -> Tensor:
    """Return the log-probabilities [...] of actions [...] (integers) under logits [..., categories]: a stochastic node.

    Half-precision logits are normalised in float32, in which the log-probabilities are returned.
    Raises ValueError where the shapes do not fit.
    """
    if logits.dim() == 0 or actions.shape != logits.shape[:-1]:
        raise ValueError(
            f"logp_categorical was given logits {list(logits.shape)} and actions {list(actions.shape)}, expected "
            "[..., categories] and [...]"
        )
    return logits.to(_precise(logits)).log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def sample_categorical(logits: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw actions [...] from logits [..., categories]; return their log-probabilities, a stochastic node, and them.

    By inverting cumulative sums of the probabilities, which takes one uniform number a draw: the probabilities in
    float32 for half-precision logits, their sums and the uniform numbers in float64. An action whose logit is -inf is
    never drawn; where logits are nan, so is the log-probability.
    """
    logp = logits.to(_precise(logits)).log_softmax(-1)
    cumulative = logp.detach().exp().cumsum(-1, dtype=torch.float64)
    u = torch.rand((*logits.shape[:-1], 1), dtype=torch.float64, device=logits.device, generator=generator)
    # The last sum, which rounding leaves a little off one, counts as one: it is above every u.
    actions = (cumulative[..., :-1] / cumulative[..., -1:] <= u).sum(-1)
    return logp.gather(-1, actions.unsqueeze(-1)).squeeze(-1), actions


def _precise(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _sum_of(logps: Iterable[Tensor], cost: Tensor) -> Tensor:
    return reduce(add, (_meet(logp, cost) for logp in _listed(logps)), torch.zeros_like(cost))


def _listed(logps: Iterable[Tensor]) -> Iterable[Tensor]:
    """Return what is a collection of log-probabilities; one tensor would be taken for as many as it has rows."""
    if isinstance(logps, Tensor):
        raise ValueError(f"logps is a tensor of shape {list(logps.shape)}, expected a list of them, such as [logp]")
    return logps


def _meet(logp: Tensor, cost: Tensor) -> Tensor:
    """Return logp summed to the cost's shape, or to one that broadcasts to it, dimensions matched from the left."""
    dims = cost.dim()
    shape = (*logp.shape[:dims], *(1,) * (dims - logp.dim()))
    if any(1 not in (own, other) and own != other for own, other in zip(shape, cost.shape, strict=True)):
        raise ValueError(
            f"a cost of shape {list(cost.shape)} and a log-probability of shape {list(logp.shape)} cannot meet: "
            "matched from the left, their sizes are to be equal or 1"
        )
    summed = logp.flatten(dims).sum(-1) if logp.dim() > dims else logp.reshape(shape)
    kept = tuple(1 if other == 1 else own for own, other in zip(shape, cost.shape, strict=True))
    return summed.sum_to_size(kept)
