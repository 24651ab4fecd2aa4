"""Task `prisoners_dilemma`: naive learners and LOLA-DiCE in the iterated prisoner's dilemma (Foerster et al. 2018).

A learner with k look-ahead steps takes its gradient after the other has taken k naive steps, and through them: what it
does changes what the other learns. Both players learn at once, each in the belief that the other is naive.
"""

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from errors import UserError, near
from estimators import dice
from models import prisoners_dilemma
from models.prisoners_dilemma import STATES, Rollouts, discounted, to_go
from tasks.build import construct, options_of
from tasks.context import Context
from tasks.stepwise import StepwiseTask

LEARNERS = ("naive", "lola-1", "lola-2", "lola-3")  # by their look-ahead steps
GRADIENTS = ("any-order", "values", "none", "exact")  # DiCE with this baseline; or exact ones
LAST = 20  # the iterations whose mean return is the result
MOMENTUM = 0.5  # of the moving averages that are the values: players change fast


class Values:
    """Each player's return to go from each state [2, 5], a moving average over the games seen, as a baseline."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, len(STATES))
        self.weights = torch.zeros(2, len(STATES))

    def means(self) -> Tensor:
        """Return the averages, 0 for a state that was never seen."""
        return self.sums / self.weights.clamp(min=torch.finfo(self.weights.dtype).tiny)

    def update(self, states: Tensor, returns: Tensor) -> None:
        """Take the returns to go [2, games, rounds] from these states into the averages."""
        states, returns = states.flatten(1), returns.flatten(1)
        sums = torch.zeros_like(self.sums).scatter_add_(1, states, returns)
        counts = torch.zeros_like(self.weights).scatter_add_(1, states, torch.ones_like(returns))
        seen = counts > 0
        fresh = sums / counts.clamp(min=1)
        self.sums = torch.where(seen, MOMENTUM * self.sums + (1 - MOMENTUM) * fresh, self.sums)
        self.weights = torch.where(seen, MOMENTUM * self.weights + (1 - MOMENTUM), self.weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages' sums and weights."""
        return {"sums": self.sums, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self.sums, self.weights = state["sums"], state["weights"]


class Returns:
    """The return a round after each iteration."""

    def __init__(self) -> None:
        self.of_iteration: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the returns so far."""
        return {"of_iteration": self.of_iteration}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self.of_iteration = list(state["of_iteration"])


class PrisonersDilemma(StepwiseTask):
    """Two learners; tensors have a first dimension for who learns: policies are (his own, the other's), [2, 5] each."""

    def __init__(self, config: DictConfig, context: Context):
        super().__init__(config, context)
        self.options = config.task
        self.games, self.lookaheads = config.batch_size, LEARNERS.index(config.task.learner)
        self.players = nn.ParameterDict({"theta": nn.Parameter(torch.zeros(2, len(STATES)))})
        options = options_of(config.optimizer)
        options.pop("estimator_lr")
        self.optimizer = construct(options, list(self.players.parameters()))
        self.values, self.returns = Values(), Returns()
        self.parts = {
            "players": self.players,
            "optimizer": self.optimizer,
            "values": self.values,
            "returns": self.returns,
        }

    @property
    def theta(self) -> Tensor:
        """Both players' logits, [2, 5]."""
        return self.players["theta"]

    def advance(self) -> None:
        """Let both players learn once, and measure how they play."""
        mine, theirs = self.theta, self.theta.detach().flip(0).requires_grad_()
        for _ in range(self.lookaheads):
            (gradient,) = torch.autograd.grad(self._loss((mine, theirs), player=1), theirs, create_graph=True)
            theirs = theirs - self.options.inner_lr * gradient
        self._loss((mine, theirs), player=0, fits=True).backward(inputs=[self.theta])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._measure()

    def _loss(self, policies: tuple[Tensor, Tensor], player: int, fits: bool = False) -> Tensor:
        """Return minus the discounted returns of one player of the pair, summed over who learns.

        `fits`: the games enter the averages, after they were used.
        """
        discount = self.options.discount
        if self.options.gradients == "exact":
            return -prisoners_dilemma.values(policies, discount)[:, player].sum()
        rollouts = prisoners_dilemma.play((policies[0].detach(), policies[1].detach()), self.games, self.options.rounds)
        first, second = rollouts.log_probabilities(policies)
        costs = -discounted(rollouts.rewards[player], discount)
        joint = first + second
        losses = dice.cost_node(costs, [joint.cumsum(-1)]).sum(-1)
        if self.options.gradients != "none":
            baseline = -self._baseline(rollouts, player)
            if self.options.gradients == "values":
                losses = losses + dice.baseline_term(baseline, [joint]).sum(-1)
            else:
                losses = losses + dice.any_order_baseline_term(baseline.unbind(-1), joint.unbind(-1))
        if fits:
            ahead = to_go(-costs) / discounted(torch.ones_like(costs), discount)
            self.values.update(rollouts.states_of(player), ahead)
        return losses.mean(-1).sum()

    def _baseline(self, rollouts: Rollouts, player: int) -> Tensor:
        """Return discount^t V(state_t) of one player of the pair, [2, games, rounds]."""
        means = self.values.means()
        means = means if player == 0 else means.flip(0)
        states = rollouts.states_of(player)
        return discounted(means.gather(1, states.flatten(1)).view(states.shape), self.options.discount)

    @torch.no_grad()
    def _measure(self) -> None:
        policies = self.theta[0], self.theta[1]
        rollouts = prisoners_dilemma.play(policies, self.games, self.options.rounds)
        found = torch.stack(rollouts.rewards).mean().item()
        self.returns.of_iteration.append(found)
        discount = self.options.discount
        exact = (1 - discount) * prisoners_dilemma.values(policies, discount).mean().item()
        chances = self.theta.sigmoid().mean(0).tolist()
        values = {"game/return": found, "game/exact_return": exact}
        values |= {f"cooperation/{state}": chance for state, chance in zip(STATES, chances, strict=True)}
        self.record(self.step + 1, "test", values)
        if (self.step + 1) % self.config.eval_every == 0:
            print(f"iteration {self.step + 1:,}  return a round {found:.3f}  exact, discounted {exact:.3f}", flush=True)

    def finish(self) -> None:
        """Record the mean return of the last iterations."""
        last = self.returns.of_iteration[-LAST:]
        self.record(self.total, "test", {"game/final_return": sum(last) / len(last)})


def run(config: DictConfig, context: Context) -> None:
    """Let two learners play and learn as `config` says; write metrics and checkpoints to the run directory.

    Raises Interrupted after a checkpoint where it is asked to stop.
    """
    PrisonersDilemma(config, context).run()


def check(config: DictConfig) -> None:
    """Raise UserError for options of the task that no job can have."""
    for name, choices in (("learner", LEARNERS), ("gradients", GRADIENTS)):
        if (given := config.task[name]) not in choices:
            raise UserError(f"task.{name}={given}{near(str(given), choices)}")
