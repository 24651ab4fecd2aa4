"""Task `dice_derivatives`: gradient, Hessian and third derivative by DiCE, beside the exact ones, as samples grow.

What is differentiated is the first player's discounted payoff in a prisoner's dilemma of a few rounds, in both players'
ten logits: the exact derivatives are those of the transition matrices' product. A sample is one game.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.func import jacfwd, jacrev

from errors import UserError, near
from estimators import dice
from models import prisoners_dilemma
from models.prisoners_dilemma import Rollouts, discounted, to_go
from seeding import derive_seed
from tasks.context import Context
from tasks.stepwise import StepwiseTask

ORDERS = ("gradient", "hessian", "third")  # derivatives, in order
MARKS = (1, 2, 5)  # of each power of ten: the batches after which is measured

Policies = tuple[Tensor, Tensor]


def policies_of(theta: Tensor) -> Policies:
    """Return both players' logits."""
    return theta[:5], theta[5:]


class Game:
    """What a surrogate is made of: one batch of games, under policies with a gradient."""

    def __init__(self, rollouts: Rollouts, policies: Policies, discount: float):
        self.rollouts, self.policies, self.discount = rollouts, policies, discount
        first, second = rollouts.log_probabilities(policies)
        self.logp = first + second  # [games, rounds]: both players' actions are one node a round
        self.costs = discounted(rollouts.rewards[0], discount)
        self.costs_to_go = to_go(self.costs)

    def surrogate(self) -> Tensor:
        """Return the costs' surrogate [games]: each cost depends on the rounds up to its own."""
        return dice.cost_node(self.costs, [self.logp.cumsum(1)]).sum(1)

    def mean_of_the_others(self) -> Tensor:
        """Return the mean costs to go of the other games, [games, rounds]."""
        return (self.costs_to_go.sum(0) - self.costs_to_go) / (len(self.costs_to_go) - 1)

    def advantages(self) -> Tensor:
        """Return the exact discounted advantage of each round's outcome [games, rounds]."""
        # Detached, since no_grad stops no forward differentiation: advantages are constants.
        first, second = (policy.detach() for policy in self.policies)
        rounds = self.costs.shape[1]
        q, v = prisoners_dilemma.action_values((first, second), self.discount, rounds)
        states, outcomes = self.rollouts.states, 2 * self.rollouts.actions[0] + self.rollouts.actions[1]
        left = rounds - 1 - torch.arange(rounds)  # their index
        return discounted(q[left, states, outcomes] - v[left, states], self.discount)


class MovingAverages(nn.Module):
    """An EMABaseline for the costs to go of each round."""

    def __init__(self, rounds: int):
        super().__init__()
        self.of_round = nn.ModuleList(dice.EMABaseline(decay=0.9) for _ in range(rounds)).double()

    def forward(self, game: Game) -> Tensor:
        """Return the baseline terms' sum [games]; the averages stay as they are."""
        means = torch.stack([cast(dice.EMABaseline, each).mean for each in self.of_round])
        return dice.baseline_term(means.expand_as(game.costs_to_go), [game.logp]).sum(1)

    def update(self, costs_to_go: Tensor) -> None:
        """Take costs to go [games, rounds] into the averages."""
        for each, costs in zip(self.of_round, costs_to_go.t(), strict=True):
            cast(dice.EMABaseline, each).update(costs)


def surrogates(averages: MovingAverages) -> dict[str, Callable[[Game], Tensor]]:
    """Return the surrogates [games] that a job may choose from, by the baseline."""
    return {
        "none": lambda game: game.surrogate(),
        "moving-average": lambda game: game.surrogate() + averages(game),
        "leave-one-out": lambda game: game.surrogate() + dice.batch_baseline_term(game.costs_to_go, [game.logp]).sum(1),
        "any-order": lambda game: (
            game.surrogate() + dice.any_order_baseline_term(game.mean_of_the_others().unbind(1), game.logp.unbind(1))
        ),
        "loaded": lambda game: dice.loaded_dice(game.logp, game.advantages()),
    }


def derivatives(function: Callable[[Tensor], Tensor], theta: Tensor, orders: int) -> tuple[Tensor, ...]:
    """Return the derivatives of a scalar function at theta [n] up to an order, of the shapes [n], [n, n], [n, n, n].

    The function runs once; forward differentiation of its gradient costs a tenth of more passes backward.
    """

    def gradient(theta: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        found = jacrev(function)(theta)
        return found, (found,)

    highest = gradient
    for _ in range(orders - 1):
        highest = _derived(highest)
    return highest(theta.detach())[1]


def _derived(lower: Callable) -> Callable:
    def higher(theta: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        found, below = jacfwd(lower, has_aux=True)(theta)
        return found, (*below, found)

    return higher


class Sums:
    """The sums over batches of each derivative."""

    def __init__(self, size: int, orders: int):
        self.of_order = [torch.zeros((size,) * order, dtype=torch.float64) for order in range(1, orders + 1)]

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return {"of_order": self.of_order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the sums back."""
        self.of_order = list(state["of_order"])


class DiceDerivatives(StepwiseTask):
    """One surrogate's estimates, `batch_size` games a step."""

    def __init__(self, config: DictConfig, context: Context):
        super().__init__(config, context)
        self.options = task = config.task
        draws = torch.Generator().manual_seed(derive_seed(task.policy_seed, "policies"))
        # The policies are the problem, the same for every seed of the samples.
        theta = torch.randn(10, dtype=torch.float64, generator=draws)
        self.theta = theta
        self.exact = derivatives(self._value, theta, task.orders)
        self.averages, self.sums = MovingAverages(task.rounds), Sums(10, task.orders)
        self.surrogate = surrogates(self.averages)[task.baseline]
        self.parts = {"sums": self.sums, "averages": self.averages}
        marks = {mark * 10**power for mark in MARKS for power in range(12)}
        self.marks = {mark for mark in marks if mark < self.total} | {self.total}

    def _value(self, theta: Tensor) -> Tensor:
        return prisoners_dilemma.values(policies_of(theta), self.options.discount, self.options.rounds)[0]

    def advance(self) -> None:
        """Add one batch's derivatives, and measure their mean where that is due: `step` of the metrics counts games."""
        task = self.options
        rollouts = prisoners_dilemma.play(policies_of(self.theta), self.config.batch_size, task.rounds)

        def loss(theta: Tensor) -> Tensor:
            return self.surrogate(Game(rollouts, policies_of(theta), task.discount)).mean()

        for total, found in zip(self.sums.of_order, derivatives(loss, self.theta, task.orders), strict=True):
            total += found
        self.averages.update(to_go(discounted(rollouts.rewards[0], task.discount)))
        if (batches := self.step + 1) in self.marks:
            values = self._measure(batches)
            self.record(batches * self.config.batch_size, "train", values)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"{batches * self.config.batch_size:,} games  {shown}", flush=True)

    def _measure(self, batches: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, total, exact in zip(ORDERS, self.sums.of_order, self.exact, strict=False):
            mean = total / batches
            found[f"{name}/error"] = ((mean - exact).norm() / exact.norm()).item()
            found[f"{name}/correlation"] = torch.corrcoef(torch.stack([mean.flatten(), exact.flatten()]))[0, 1].item()
        return found


def run(config: DictConfig, context: Context) -> None:
    """Estimate as `config` says; write metrics and checkpoints to the run directory.

    Raises Interrupted after a checkpoint where it is asked to stop.
    """
    DiceDerivatives(config, context).run()


def check(config: DictConfig) -> None:
    """Raise UserError for options of the task that no job can have."""
    names = list(surrogates(MovingAverages(1)))
    if config.task.baseline not in names:
        raise UserError(f"task.baseline={config.task.baseline}{near(str(config.task.baseline), names)}")
    if config.batch_size < 2:
        raise UserError(f"batch_size={config.batch_size}: expected two games or more: one has no others")
