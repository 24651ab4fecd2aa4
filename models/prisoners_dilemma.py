"""The iterated prisoner's dilemma between two players who remember one round: its exact value, and its rollouts.

A player is five logits theta: of cooperating in the first round, and after each outcome CC, CD, DC, DD of the last, his
own action first. The payoffs of a round are -1 each where both cooperate, -2 each where both defect, and 0 for who
defects alone, -3 for the other (Foerster et al. 2018). Proof: tests/models/test_prisoners_dilemma.py.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid

STATES = ("start", "CC", "CD", "DC", "DD")
PAYOFFS = (-1.0, -3.0, 0.0, -2.0)  # of a player after CC, CD, DC, DD
SWAPPED = (0, 1, 3, 2, 4)  # the states as the other player sees them


@dataclass(frozen=True)
class Rollouts:
    """Games that were played: states and both players' actions and payoffs, a row a game, a column a round.

    states: [..., games, rounds], numbers into STATES as the first player sees them. actions: 0 cooperates, 1 defects.
    rewards: payoffs.
    """

    states: Tensor
    actions: tuple[Tensor, Tensor]
    rewards: tuple[Tensor, Tensor]

    def states_of(self, player: int) -> Tensor:
        """Return the states as a player sees them."""
        return self.states if player == 0 else torch.tensor(SWAPPED)[self.states]

    def log_probabilities(self, policies: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return log pi(action | state) of each player's actions [..., games, rounds], under policies [..., 5]."""
        first, second = (
            _of_actions(policies[player], self.states_of(player), self.actions[player]) for player in (0, 1)
        )
        return first, second


def _of_actions(theta: Tensor, states: Tensor, actions: Tensor) -> Tensor:
    table = torch.stack([logsigmoid(theta), logsigmoid(-theta)], -1).flatten(-2)  # [..., 10]
    index = 2 * states + actions
    return table.expand(*index.shape[:-2], -1).gather(-1, index.flatten(-2)).view(index.shape)


def outcome_probabilities(policies: tuple[Tensor, Tensor]) -> Tensor:
    """Return the probabilities [..., 5, 4] of the outcomes CC, CD, DC, DD in each state, under policies [..., 5]."""
    first = policies[0].sigmoid()
    second = policies[1][..., list(SWAPPED)].sigmoid()
    both = [first * second, first * (1 - second), (1 - first) * second, (1 - first) * (1 - second)]
    return torch.stack(both, -1)


def values(policies: tuple[Tensor, Tensor], discount: float, rounds: int | None = None) -> Tensor:
    """Return both players' values [..., 2], sum_t discount^t E[payoff_t], of so many rounds, or of endless ones.

    With d the probabilities of the first outcome and P those of an outcome after another, it is d^T (1 - discount P)^-1
    payoffs; differentiable in the policies [..., 5], as often as one likes.
    """
    table = outcome_probabilities(policies)
    start, transition = table[..., 0, :], table[..., 1:, :]
    payoffs = torch.tensor(PAYOFFS, dtype=table.dtype)
    both = torch.stack([payoffs, payoffs[[0, 2, 1, 3]]], -1)
    if rounds is None:
        ahead = torch.linalg.solve(torch.eye(4, dtype=table.dtype) - discount * transition, both)
    else:
        ahead = both.expand(*table.shape[:-2], 4, 2)
        for _ in range(rounds - 1):
            ahead = both + discount * transition @ ahead
    return (start.unsqueeze(-2) @ ahead).squeeze(-2)


def action_values(policies: tuple[Tensor, Tensor], discount: float, rounds: int) -> tuple[Tensor, Tensor]:
    """Return the first player's values of a game of so many rounds, with r rounds to go.

    Q [rounds, 5, 4], of an outcome in a state, and V [rounds, 5], of a state, at index r - 1.
    """
    table = outcome_probabilities(policies)
    payoffs = torch.tensor(PAYOFFS, dtype=table.dtype)
    q, v = [], []
    after = torch.zeros(4, dtype=table.dtype)
    for _ in range(rounds):
        q.append((payoffs + discount * after).expand(5, 4))
        v.append((table * q[-1]).sum(-1))
        after = v[-1][1:]
    return torch.stack(q), torch.stack(v)


@torch.no_grad()
def play(policies: tuple[Tensor, Tensor], games: int, rounds: int, generator: Generator | None = None) -> Rollouts:
    """Let policies [..., 5] play: the actions of every state are drawn at once, a round is then one look-up."""
    lead = policies[0].shape[:-1]
    uniform = torch.rand(2, rounds, *lead, games, 1, dtype=policies[0].dtype, generator=generator)
    first = uniform[0] >= policies[0].sigmoid().unsqueeze(-2)
    second = uniform[1] >= policies[1][..., list(SWAPPED)].sigmoid().unsqueeze(-2)
    following = 1 + 2 * first.long() + second.long()  # [rounds, ..., games, 5]
    state = torch.zeros(*lead, games, 1, dtype=torch.long)
    visited = []
    for after in following.unbind(0):
        visited.append(state)
        state = after.gather(-1, state)
    states = torch.cat([*visited, state], -1)
    outcome = states[..., 1:] - 1
    payoffs = torch.tensor(PAYOFFS, dtype=policies[0].dtype)
    actions = outcome // 2, outcome % 2
    return Rollouts(states[..., :-1], actions, (payoffs[outcome], payoffs[[0, 2, 1, 3]][outcome]))


def discounted(rewards: Tensor, discount: float) -> Tensor:
    """Return discount^t rewards_t, of rewards [..., rounds]."""
    return rewards * discount ** torch.arange(rewards.shape[-1], dtype=rewards.dtype)


def to_go(rewards: Tensor) -> Tensor:
    """Return what is still to come from each round on, itself included: sum_{s >= t} rewards_s."""
    return rewards.flip(-1).cumsum(-1).flip(-1)
