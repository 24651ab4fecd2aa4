"""The prisoner's dilemma: exact values in closed form and by enumeration, and rollouts that agree with them."""

import itertools

import pytest
import torch

from models.prisoners_dilemma import (
    PAYOFFS,
    STATES,
    SWAPPED,
    action_values,
    discounted,
    outcome_probabilities,
    play,
    to_go,
    values,
)

GAMMA = 0.9
NEVER = torch.full((5,), -40.0, dtype=torch.float64)
ALWAYS = -NEVER
TIT_FOR_TAT = torch.tensor([40.0, 40.0, -40.0, 40.0, -40.0], dtype=torch.float64)  # after CC, CD, DC, DD


@pytest.fixture
def policies():
    torch.manual_seed(3)
    return torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("first", "second", "mine", "theirs"),
    [
        (ALWAYS, ALWAYS, -1 / (1 - GAMMA), -1 / (1 - GAMMA)),
        (NEVER, NEVER, -2 / (1 - GAMMA), -2 / (1 - GAMMA)),
        (ALWAYS, NEVER, -3 / (1 - GAMMA), 0.0),
        (TIT_FOR_TAT, TIT_FOR_TAT, -1 / (1 - GAMMA), -1 / (1 - GAMMA)),
        # Exploited once, and from then on both defect.
        (TIT_FOR_TAT, NEVER, -3 - 2 * GAMMA / (1 - GAMMA), 0 - 2 * GAMMA / (1 - GAMMA)),
    ],
)
def test_values_of_strategies_that_draw_nothing(first, second, mine, theirs):
    expected = torch.tensor([mine, theirs], dtype=torch.float64)
    torch.testing.assert_close(values((first, second), GAMMA), expected)
    torch.testing.assert_close(values((first, second), GAMMA, rounds=400), expected)
    swapped = values((second, first), GAMMA)
    torch.testing.assert_close(swapped.flip(0), expected)


def enumerated(policies, rounds):
    """The value of so many rounds as a sum over all games."""
    table = outcome_probabilities(policies)
    payoffs = torch.tensor([PAYOFFS, [PAYOFFS[i] for i in (0, 2, 1, 3)]], dtype=torch.float64)
    total = torch.zeros(2, dtype=torch.float64)
    for game in itertools.product(range(4), repeat=rounds):
        probability, gain = torch.ones((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for t, (state, outcome) in enumerate(zip((0, *(o + 1 for o in game)), game, strict=False)):
            probability, gain = probability * table[state, outcome], gain + GAMMA**t * payoffs[:, outcome]
        total = total + probability * gain
    return total


def test_values_of_few_rounds_are_the_sum_over_all_games(policies):
    for rounds in (1, 2, 4):
        torch.testing.assert_close(values(policies, GAMMA, rounds), enumerated(policies, rounds))


def test_values_of_batches_are_those_of_each(policies):
    stacked = torch.stack(policies), torch.stack(policies).flip(0)
    expected = torch.stack([values(policies, GAMMA), values(policies[::-1], GAMMA)])
    torch.testing.assert_close(values(stacked, GAMMA), expected)


def test_action_values_are_the_payoff_and_what_follows(policies):
    q, v = action_values(policies, GAMMA, 4)
    torch.testing.assert_close(v[-1, 0], values(policies, GAMMA, 4)[0])
    torch.testing.assert_close((outcome_probabilities(policies) * q).sum(-1), v)
    torch.testing.assert_close(q[0], torch.tensor(PAYOFFS, dtype=torch.float64).expand(5, 4))


def test_games_that_are_played_agree_with_the_exact_value(policies):
    games, rounds = 20_000, 6
    rollouts = play(policies, games, rounds, torch.Generator().manual_seed(0))
    for player in (0, 1):
        returns = discounted(rollouts.rewards[player], GAMMA).sum(1)
        error = (returns.mean() - values(policies, GAMMA, rounds)[player]).abs()
        assert error < 4 * returns.std() / games**0.5


def test_what_a_game_holds_fits_together(policies):
    rollouts = play(policies, 50, 8, torch.Generator().manual_seed(1))
    states, (first, second) = rollouts.states, rollouts.actions
    assert (states[:, 0] == 0).all()
    assert torch.equal(states[:, 1:], 1 + 2 * first[:, :-1] + second[:, :-1])
    assert torch.equal(rollouts.states_of(1), torch.tensor(SWAPPED)[states])
    names = [STATES[1 + 2 * int(a) + int(b)] for a, b in zip(first[0], second[0], strict=True)]
    assert rollouts.rewards[0][0].tolist() == [dict(zip(STATES[1:], PAYOFFS, strict=True))[name] for name in names]
    mine = {"CC": -1.0, "CD": 0.0, "DC": -3.0, "DD": -2.0}
    assert rollouts.rewards[1][0].tolist() == [mine[name] for name in names]
    for player, actions in enumerate(rollouts.actions):
        chance = policies[player].sigmoid()[rollouts.states_of(player)]
        expected = torch.where(actions == 0, chance, 1 - chance).log()
        torch.testing.assert_close(rollouts.log_probabilities(policies)[player], expected)


def test_games_of_batches_of_policies(policies):
    stacked = torch.stack(policies), torch.stack(policies).flip(0)
    rollouts = play(stacked, 10, 5, torch.Generator().manual_seed(1))
    assert rollouts.states.shape == (2, 10, 5)
    for i, pair in enumerate((policies, policies[::-1])):
        expected = rollouts.log_probabilities(stacked)[0][i]
        states, actions = rollouts.states[i], rollouts.actions[0][i]
        chance = pair[0].sigmoid()[states]
        torch.testing.assert_close(torch.where(actions == 0, chance, 1 - chance).log(), expected)


def test_sums_of_what_is_to_come():
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    assert to_go(rewards).tolist() == [[7, 6, 4]]
    assert discounted(rewards, 0.5).tolist() == [[1, 1, 1]]
