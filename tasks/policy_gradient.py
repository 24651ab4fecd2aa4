"""Task `policy_gradient`: the score function on a small tabular Markov decision process, whose gradient is known.

A policy softmax(theta[s]) acts for a horizon of steps from state 0; states and rewards are tables drawn once. The value
of the policy, and its gradient, follow from dynamic programming.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from errors import UserError, near
from estimators import dice
from seeding import derive_seed
from tasks.build import construct, options_of
from tasks.context import Context
from tasks.stepwise import StepwiseTask

CREDITS = ("whole-return", "to-go")
BASELINES = ("none", "batch-average", "value")


class Process(NamedTuple):
    """transitions: P(s'|s, a), [S, A, S]; rewards: [S, A], in [0, 1]; horizon: the steps of an episode."""

    transitions: Tensor
    rewards: Tensor
    horizon: int


class Episodes(NamedTuple):
    """states, actions: [replicates, episodes, horizon], integers; rewards: the same, in float64."""

    states: Tensor
    actions: Tensor
    rewards: Tensor


def make_process(num_states: int, num_actions: int, horizon: int, seed: int) -> Process:
    """Draw the tables: transitions proportional to u^4, rewards u^3, u uniform: few of them are large."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "Markov decision process"))
    weights = torch.rand(num_states, num_actions, num_states, generator=generator, dtype=torch.float64) ** 4
    rewards = torch.rand(num_states, num_actions, generator=generator, dtype=torch.float64) ** 3
    return Process(weights / weights.sum(-1, keepdim=True), rewards, horizon)


def values_of(process: Process, theta: Tensor) -> Tensor:
    """Return the value of each state with 0, 1, .. horizon steps to go, [horizon + 1, S]."""
    policy = theta.softmax(-1)
    values = [torch.zeros(len(theta), dtype=theta.dtype)]
    for _ in range(process.horizon):
        values.append((policy * (process.rewards + process.transitions @ values[-1])).sum(-1))
    return torch.stack(values)


def best_value(process: Process) -> float:
    """Return the value of state 0 under the best policy, which may act otherwise at each step."""
    value = torch.zeros(len(process.rewards), dtype=torch.float64)
    for _ in range(process.horizon):
        value = (process.rewards + process.transitions @ value).amax(-1)
    return value[0].item()


def play(process: Process, theta: Tensor, num: int) -> Episodes:
    """Play `num` episodes for each of the policies theta [replicates, S, A]."""
    probs, replicates = theta.detach().softmax(-1), torch.arange(len(theta)).unsqueeze(1)
    state = torch.zeros(len(theta), num, dtype=torch.long)
    states, actions = [], []
    for _ in range(process.horizon):
        action = _draw(probs[replicates, state])
        states.append(state)
        actions.append(action)
        state = _draw(process.transitions[state, action])
    s, a = torch.stack(states, -1), torch.stack(actions, -1)
    return Episodes(s, a, process.rewards[s, a])


def _draw(probs: Tensor) -> Tensor:
    """Draw categories [...] of probabilities [..., C]."""
    bounds = probs.cumsum(-1)[..., :-1]
    return (torch.rand(*bounds.shape[:-1], 1, dtype=bounds.dtype) >= bounds).sum(-1)


def surrogate(process: Process, theta: Tensor, episodes: Episodes, credit: str, baseline: str) -> Tensor:
    """Return estimates of the policies' values [replicates], whose gradients by theta [replicates, S, A] are estimates.

    credit: whole-return, every action for the sum of all rewards; to-go, for those that come after it, the others being
    no function of it. baseline, taken off what an action has credit for: none; batch-average, the mean of the other
    episodes' at the same step; value, the exact value of the state at that step.
    """
    replicates = torch.arange(len(theta)).reshape(-1, 1, 1)
    logp = theta.log_softmax(-1)[replicates, episodes.states, episodes.actions]
    rewards = episodes.rewards
    if credit == "to-go":
        returns = rewards.flip(-1).cumsum(-1).flip(-1)
        total = dice.cost_node(rewards, [logp.cumsum(-1)]).sum(-1)
    else:
        returns = rewards.sum(-1, keepdim=True).expand_as(rewards)
        total = dice.cost_node(rewards.sum(-1), [logp.sum(-1)])
    if baseline != "none":
        if baseline == "batch-average":
            level = (returns.sum(1, keepdim=True) - returns) / (returns.shape[1] - 1)
        else:
            tables = values_of(process, theta[0].detach()).flip(0)[:-1]  # [horizon, S], by step
            level = tables[torch.arange(process.horizon), episodes.states]
        total = total + dice.baseline_term(level, [logp]).sum(-1)
    return total.mean(-1)


class PolicyGradient(StepwiseTask):
    """Gradient ascent on the value; every `eval_every` steps the gradient of `batch_size` episodes is measured."""

    def __init__(self, config: DictConfig, context: Context):
        super().__init__(config, context)
        self.task = task = config.task
        self.process = make_process(task.states, task.actions, task.horizon, task.process_seed)
        self.theta = nn.Parameter(torch.zeros(task.states, task.actions, dtype=torch.float64))
        options = options_of(config.optimizer)
        options.pop("estimator_lr")
        self.optimizer = construct(options, [{"params": [self.theta]}])
        self.parts = {"policy": nn.ParameterDict({"theta": self.theta}), "optimizer": self.optimizer}
        self.best = best_value(self.process)

    def advance(self) -> None:
        """Measure where that is due, and take a step."""
        if self.step % self.config.eval_every == 0:
            self._measure()
        (-self._estimate(self.theta.unsqueeze(0))).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finish(self) -> None:
        """Measure after the last step."""
        self._measure()

    def _estimate(self, theta: Tensor) -> Tensor:
        episodes = play(self.process, theta, self.config.batch_size)
        return surrogate(self.process, theta, episodes, self.task.credit, self.task.baseline)

    def _measure(self) -> None:
        """Record the value, and variance and bias of the gradient over replicates, which change nothing."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "gradients", self.step))
            values = gradient_metrics(self.process, self.theta, self._estimate, self.config.analysis.num_replicates)
        values["policy/regret"] = self.best - values["policy/value"]
        self.record(self.step, "train", values)
        print(f"step {self.step:,}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)


def gradient_metrics(
    process: Process, theta: Tensor, estimate: Callable[[Tensor], Tensor], num: int
) -> dict[str, float]:
    """Return the exact value of a policy, and its gradient's variance, bias and cosine over `num` estimates.

    `grads/variance` and `grads/bias`, the distance of the mean from the exact gradient, are means over the entries of
    theta; `grads/bias_z` is the norm of that distance in units of what noise alone would make of it.
    """
    leaf = theta.detach().clone().requires_grad_()
    value = values_of(process, leaf)[-1, 0]
    (exact,) = torch.autograd.grad(value, leaf)
    copies = theta.detach().expand(num, *theta.shape).clone().requires_grad_()
    (found,) = torch.autograd.grad(estimate(copies).sum(), copies)
    mean = found.mean(0)
    squares = (found - mean).square().flatten(1).mean(1) * num / (num - 1)
    variance = squares.mean()
    return {
        "policy/value": value.item(),
        "grads/variance": variance.item(),
        "grads/variance_se": (squares.std() / num**0.5).item(),
        "grads/bias": (mean - exact).abs().mean().item(),
        "grads/bias_z": ((mean - exact).square().mean() * num / variance).sqrt().item(),
        "grads/cosine": torch.cosine_similarity(mean.flatten(), exact.flatten(), 0).item(),
    }


def run(config: DictConfig, context: Context) -> None:
    """Learn as `config` says; write metrics and checkpoints to the run directory.

    Raises Interrupted after a checkpoint where it is asked to stop.
    """
    PolicyGradient(config, context).run()


def check(config: DictConfig) -> None:
    """Raise UserError for options that no job can have."""
    for key, choices in (("credit", CREDITS), ("baseline", BASELINES)):
        if config.task[key] not in choices:
            raise UserError(f"task.{key}={config.task[key]}{near(str(config.task[key]), choices)}")
    for key, least in (("states", 1), ("actions", 2), ("horizon", 1)):
        if config.task[key] < least:
            raise UserError(f"task.{key}={config.task[key]}: expected at least {least}")
    if config.task.baseline == "batch-average" and config.batch_size < 2:
        raise UserError(f"batch_size={config.batch_size}: the batch average needs another episode; give at least 2")
