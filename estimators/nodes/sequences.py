"""Sequences of an autoregressive categorical model as one distribution, drawn with or without replacement."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from estimators.nodes.base import gumbels
from estimators.nodes.joint import with_maximum

Step = Callable[[Tensor, Tensor], Tensor]


class Sequences(Distribution):
    """Sequences b_1..b_L of symbols 0..C-1 with q(b) = prod_t softmax(step(context, b_<t))_(b_t), batch shape [*batch].

    step: a function of context [N, ...] and prefixes [N, t] of symbols, t from 0 on, which returns the logits [N, C] of
    the next symbol. context: [*batch, H], what the model is given; the batch's leading dimensions may be plates.
    end: the symbol after which a sequence is over, and which then fills it up: its log-probability counts the symbols
    up to the first `end`. max_length: L. Values: long tensors [..., L].

    `log_prob` has the gradient of the context and of what step holds, so ScoreFunction takes a node of sequences as any
    other; ScoreFunctionWOR and UnorderedSetEstimator draw without replacement, by a stochastic beam (Kool et al. 2019,
    "Stochastic beams and where to find them"). L calls of step each. Proof: tests/estimators/nodes/test_sequences.py.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"context": constraints.real_vector}
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, step: Step, context: Tensor, num_symbols: int, end: int, max_length: int):
        if not 0 <= end < num_symbols or max_length < 1:
            raise ValueError(
                f"Sequences was given num_symbols={num_symbols}, end={end}, max_length={max_length}, expected "
                "0 <= end < num_symbols and a length of at least 1"
            )
        if context.dim() < 1:
            raise ValueError("Sequences was given a context without dimensions, expected [*batch, H]")
        self.step, self.context = step, context
        self.num_symbols, self.end, self.max_length = num_symbols, end, max_length
        super().__init__(context.shape[:-1], torch.Size([max_length]), validate_args=False)

    @property
    def num_values(self) -> int:
        """How many different sequences there are."""
        return sum((self.num_symbols - 1) ** t for t in range(self.max_length + 1))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Sequences":
        """Return the distribution with an expanded context."""
        context = self.context.expand(*batch_shape, self.context.shape[-1])
        return Sequences(self.step, context, self.num_symbols, self.end, self.max_length)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw one symbol after the other, [*sample_shape, *batch, L]."""
        shape = (*sample_shape, *self.batch_shape)
        context = self.context.expand(*shape, -1).flatten(0, -2) if shape else self.context.unsqueeze(0)
        prefix = torch.zeros(len(context), 0, dtype=torch.long, device=context.device)
        for _ in range(self.max_length):
            following = self._following(context, prefix)
            symbol = (following + gumbels(following)).argmax(-1, keepdim=True)
            prefix = torch.cat([prefix, symbol], -1)
        return prefix.reshape(*shape, self.max_length)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q of sequences [..., *batch, L], [..., *batch]; -inf where something else follows `end`."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        context = self.context.expand(*shape, -1).reshape(-1, self.context.shape[-1])
        symbols = value.expand(*shape, -1).reshape(-1, self.max_length)
        total = context.new_zeros(len(context))
        for t in range(self.max_length):
            following = self._following(context, symbols[:, :t])
            total = total + following.gather(-1, symbols[:, t : t + 1]).squeeze(-1)
        return total.reshape(shape)

    @torch.no_grad()
    def without_replacement(self, k: int) -> tuple[Tensor, Tensor]:
        """Return k different sequences, [k, *batch, L], and their perturbed log-probabilities [k, *batch].

        As if log q + Gumbel noise were at hand for every sequence, and the k largest taken; the largest first. There
        are fewer than k where there are no more sequences; a sequence that cannot be has -inf.
        """
        context = self.context.reshape(-1, self.context.shape[-1])
        num, size, k = len(context), self.num_symbols, min(k, self.num_values)
        prefixes = torch.zeros(1, num, 0, dtype=torch.long, device=context.device)
        total = context.new_zeros(1, num)
        score: Tensor | None = None
        for t in range(self.max_length):
            width = len(total)
            repeated = context.expand(width, *context.shape).flatten(0, 1)
            following = self._following(repeated, prefixes.flatten(0, 1)).reshape(width, num, size).movedim(-1, 1)
            totals = total.unsqueeze(1) + following  # [width, C, num]
            scores = totals + gumbels(totals)
            if score is not None:
                scores = with_maximum(scores, score.unsqueeze(1))
            score, chosen = scores.flatten(0, 1).topk(min(k, width * size), 0)
            total = totals.flatten(0, 1).gather(0, chosen)
            parents = (chosen // size).unsqueeze(-1).expand(-1, -1, t)
            prefixes = torch.cat([prefixes.gather(0, parents), (chosen % size).unsqueeze(-1)], -1)
        assert score is not None
        shape = (len(score), *self.batch_shape)
        return prefixes.reshape(*shape, self.max_length), score.reshape(shape)

    def _following(self, context: Tensor, prefix: Tensor) -> Tensor:
        """Return the log-probabilities of the next symbol, [N, C]: after `end`, `end` alone."""
        logits = self.step(context, prefix).log_softmax(-1)
        is_over = (prefix == self.end).any(-1, keepdim=True)
        only = torch.full((self.num_symbols,), -torch.inf, dtype=logits.dtype, device=logits.device)
        only[self.end] = 0
        return torch.where(is_over, only, logits)
