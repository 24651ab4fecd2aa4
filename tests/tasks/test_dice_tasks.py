"""The tasks of DiCE: what they record, that they go on where they stopped, and what they refuse."""

import math

import pytest
import torch

from errors import UserError
from estimators import dice
from models import prisoners_dilemma
from orchestration.execution import resolve
from orchestration.run_directory import RunDirectory
from tasks import dice_derivatives, dice_language_model
from tasks.context import Context
from tasks.dice_derivatives import Game, MovingAverages, derivatives, policies_of, surrogates
from tasks.prisoners_dilemma import MOMENTUM, PrisonersDilemma, Values
from tests.tasks.stepwise import configured, interrupted_rows, rows, work

DERIVATIVES = ["task=dice_derivatives", "batch_size=20", "steps=6", "task.rounds=3", "task.orders=2"]
GAME = ["task=prisoners_dilemma", "batch_size=8", "steps=6", "task.rounds=10", "optimizer.lr=0.2"]
LANGUAGE = ["task=dice_language_model", "batch_size=4", "steps=4", "eval_every=2", "task.pretrain_steps=3"]
LANGUAGE += ["task.width=8", "task.layers=1", "task.heads=2", "task.replicates=2", "task.length=8"]
JOBS = {
    "moving average": [*DERIVATIVES, "task.baseline=moving-average"],
    "loaded": [*DERIVATIVES, "task.baseline=loaded"],
    "lola": [*GAME, "task.learner=lola-2", "task.gradients=values"],
    "any order": [*GAME, "task.gradients=any-order"],
    "exact": [*GAME, "task.gradients=exact"],
    "prefix": LANGUAGE,
    "sequence": [*LANGUAGE, "task.penalty=sequence", "task.baseline=none"],
}


@pytest.fixture(autouse=True)
def _few_sentences(monkeypatch):
    monkeypatch.setattr(dice_language_model, "NUM_SENTENCES", 50)
    monkeypatch.setattr(dice_language_model, "EVALUATED", 20)


@pytest.mark.parametrize("name", JOBS)
def test_an_interrupted_job_ends_with_the_same_numbers(tmp_path, name):
    expected = interrupted_rows(tmp_path, *JOBS[name], stops=(1, 3, 5))
    assert all(math.isfinite(row["value"]) for row in expected)


def test_derivatives_are_measured_at_marks_of_samples(tmp_path):
    work(tmp_path, *DERIVATIVES)
    found = rows(tmp_path)
    assert {row["step"] for row in found} == {20, 40, 100, 120}
    names = {f"{order}/{measure}" for order in ("gradient", "hessian") for measure in ("error", "correlation")}
    assert {row["name"] for row in found} == names


def test_derivatives_of_a_polynomial():
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64)
    first, second, third = derivatives(lambda t: t[0] ** 2 * t[1], theta, 3)
    assert first.tolist() == [4, 1]
    assert second.tolist() == [[4, 2], [2, 0]]
    assert third.tolist() == [[[0, 2], [2, 0]], [[2, 0], [0, 0]]]


@pytest.mark.parametrize("baseline", list(surrogates(MovingAverages(1))))
def test_each_surrogate_has_the_exact_derivatives_as_its_mean(baseline):
    """Games of two rounds, all sixteen of them weighed by their probabilities, beside others that were drawn."""
    torch.manual_seed(0)
    theta, rounds, gamma = torch.randn(10, dtype=torch.float64), 2, 0.9
    averages = MovingAverages(rounds)
    averages.update(torch.randn(4, rounds, dtype=torch.float64))
    others = prisoners_dilemma.play(policies_of(theta), 3, rounds)
    outcomes = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    weights = []

    def mean(theta):
        total = torch.zeros((), dtype=theta.dtype)
        for outcome in outcomes:
            rollouts = with_game(others, outcome)
            game = Game(rollouts, policies_of(theta), gamma)
            weight = game.logp[0].sum().exp().detach()
            weights.append(weight)
            total = total + weight * surrogates(averages)[baseline](game)[0]
        return total

    found = derivatives(mean, theta, 2)
    assert torch.stack(weights[:16]).sum().item() == pytest.approx(1)
    exact = derivatives(lambda t: prisoners_dilemma.values(policies_of(t), gamma, rounds)[0], theta, 2)
    for ours, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def joined(mine, others):
    """Put both players' row before those of others."""
    first, second = (torch.cat([row[None], rest]) for row, rest in zip(mine, others, strict=True))
    return first, second


def with_game(others, outcome):
    """Put the game of these outcomes before others."""
    payoffs = torch.tensor(prisoners_dilemma.PAYOFFS, dtype=torch.float64)
    state = torch.tensor([[0, 1 + int(outcome[0])]])
    rewards = payoffs[outcome], payoffs[[0, 2, 1, 3]][outcome]
    return prisoners_dilemma.Rollouts(
        torch.cat([state, others.states]),
        joined((outcome // 2, outcome % 2), others.actions),
        joined(rewards, others.rewards),
    )


@pytest.mark.parametrize("baseline", ["values", "any-order"])
def test_a_sampled_look_ahead_has_the_exact_one_as_its_mean(tmp_path, monkeypatch, baseline):
    """Where the look-ahead is large: the mean of sampled gradients is the exact one, and far from the naive one.

    A gradient is a product of two estimates from games of their own but for the policies that they meet at: the bias is
    of the order of the first one's variance, which many games make small.
    """

    def gradients(count, *more):
        config = configured(*GAME, "task.discount=0.7", "task.rounds=25", "batch_size=5000", *more)
        task = PrisonersDilemma(config, Context(RunDirectory(tmp_path)))
        with torch.no_grad():
            task.theta.copy_(torch.tensor([[0.5, -1.0, 0.3, 0.8, -0.2], [-0.4, 0.6, 1.0, -0.7, 0.1]]))
        seen: list = []

        def keep():
            assert task.theta.grad is not None
            seen.append(task.theta.grad.clone())

        monkeypatch.setattr(task.optimizer, "step", keep)
        monkeypatch.setattr(task, "_measure", lambda: None)
        torch.manual_seed(1)
        for _ in range(count):
            task.advance()
        return torch.stack(seen)

    lola = ["task.learner=lola-1", "task.inner_lr=1.0"]
    exact = gradients(1, *lola, "task.gradients=exact")[0]
    naive = gradients(1, "task.learner=naive", "task.gradients=exact")[0]
    sampled = gradients(9, *lola, f"task.gradients={baseline}")[1:]
    error = sampled.std(0) / len(sampled) ** 0.5
    assert ((sampled.mean(0) - exact).abs() < 5 * error + 0.005).all()
    assert ((naive - exact).abs() > 10 * error + 0.05).any()


def test_a_baseline_has_the_values_of_the_player_whose_costs_it_is_for(tmp_path):
    task = PrisonersDilemma(configured(*GAME, "task.discount=0.5"), Context(RunDirectory(tmp_path)))
    task.values.sums, task.values.weights = torch.arange(10.0).view(2, 5), torch.ones(2, 5)
    # One game of two rounds for each learner: the start, then CD as he sees it, which is DC for the other.
    states = torch.tensor([[[0, 2]], [[0, 2]]])
    nothing = torch.zeros(2, 1, 2)
    rollouts = prisoners_dilemma.Rollouts(states, (nothing.long(), nothing.long()), (nothing, nothing))
    assert task._baseline(rollouts, player=0).tolist() == [[[0, 2 / 2]], [[5, 7 / 2]]]
    assert task._baseline(rollouts, player=1).tolist() == [[[5, 8 / 2]], [[0, 3 / 2]]]


def test_values_are_means_of_returns_to_go_free_of_the_bias_of_their_start():
    values = Values()
    values.update(torch.tensor([[[0, 1]], [[0, 0]]]), torch.tensor([[[4.0, 2.0]], [[1.0, 3.0]]]))
    assert values.means()[:, :3].tolist() == [[4, 2, 0], [2, 0, 0]]
    values.update(torch.tensor([[[0, 0]], [[0, 0]]]), torch.tensor([[[8.0, 8.0]], [[2.0, 2.0]]]))
    assert values.means()[:, :2].tolist() == [
        pytest.approx([(MOMENTUM * 4 + 8) / (MOMENTUM + 1), 2]),
        pytest.approx([2, 0]),
    ]


def test_the_result_of_the_game_is_the_mean_of_the_last_iterations(tmp_path):
    work(tmp_path, *GAME, "steps=25")
    found = rows(tmp_path)
    returns = [row["value"] for row in found if row["name"] == "game/return"]
    assert len(returns) == 25
    (final,) = (row["value"] for row in found if row["name"] == "game/final_return")
    assert final == pytest.approx(sum(returns[-20:]) / 20)


def test_both_attributions_of_a_penalty_have_the_same_mean_and_prefixes_less_variance(tmp_path):
    """Gradients of many small batches at one model: the means agree, the variance of prefixes is the smaller."""
    torch.manual_seed(0)
    config = configured(*LANGUAGE, "task.pretrain_steps=1")
    task = dice_language_model.DiceLanguageModel(config, Context(RunDirectory(tmp_path)))
    with torch.no_grad():
        task.model.readout.bias.add_(0.5 * torch.randn_like(task.model.readout.bias))
    found: dict = {"prefix": [], "sequence": []}
    weight = task.model.readout.bias
    for _ in range(150):
        drawn = dice_language_model.Sampled(task.model, task.original, task._draw(16))
        for name, losses in (("prefix", drawn.prefix_losses(False)), ("sequence", drawn.sequence_losses(False))):
            found[name].append(torch.autograd.grad(losses.mean(), weight, retain_graph=True)[0])
    prefix, sequence = (torch.stack(each) for each in found.values())
    difference = prefix - sequence
    assert (difference.mean(0).abs() < 4.5 * difference.std(0) / len(difference) ** 0.5 + 1e-7).all()
    assert prefix.var(0).sum() < 0.8 * sequence.var(0).sum()


@pytest.mark.parametrize(
    ("job", "override", "message"),
    [
        (DERIVATIVES, "task.baseline=leave-one-ot", "task.baseline=leave-one-ot; did you mean 'leave-one-out'"),
        (DERIVATIVES, "batch_size=1", "batch_size=1: expected two games or more"),
        (GAME, "task.learner=lola-4", "task.learner=lola-4; did you mean 'lola-"),
        (GAME, "task.gradients=exat", "task.gradients=exat; did you mean 'exact'"),
        (LANGUAGE, "task.penalty=prefx", "task.penalty=prefx; did you mean 'prefix'"),
        (LANGUAGE, "batch_size=1", "batch_size=1: expected two sentences or more"),
    ],
)
def test_what_no_job_can_have_is_refused(job, override, message):
    config = configured(*job, override)
    with pytest.raises(UserError, match=message):
        resolve(config.task.target.replace(".run", ".check"))(config)


def test_shipped_surrogates_keep_the_value_of_the_costs():
    torch.manual_seed(0)
    theta = torch.randn(10, dtype=torch.float64)
    game = Game(prisoners_dilemma.play(policies_of(theta), 5, 4), policies_of(theta), 0.9)
    for name, surrogate in surrogates(MovingAverages(4)).items():
        expected = torch.zeros(5).double() if name == "loaded" else game.costs.sum(1)
        torch.testing.assert_close(surrogate(game), expected)
    assert dice_derivatives.ORDERS == ("gradient", "hessian", "third")
    assert dice.magic_box(game.logp).eq(1).all()
