"""Task `top_k`: scores of k-subsets that learn to hold what a target asks for, and the bias of each gradient.

The synthetic study of Niepert et al. 2021: minimise L(theta) = E[||y - b||^2] over y of p(y) = exp(<theta, y>) / Z
on the k-subsets of n, which are few enough for L, its gradient and its least value to be exact sums. The numbers of
`problem_seed` 0 are those of the published code: n normal numbers of NumPy's generator of old for the first scores,
and the absolute values of the next n for b.
"""

from functools import partial
from math import comb

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributions import Categorical

from errors import UserError
from estimators.imle import BaseTargetDistribution, aimle
from models.solvers import subsets, top_k
from tasks.build import prepare_torch
from tasks.context import Context
from tasks.solver_learning import SolverLearning, check_method, differentiable, noise_of

METHODS = ("imle", "aimle", "straight-through", "score-function", "exact")
MOST_SUBSETS = 100_000


class Scores(nn.Module):
    """theta [n], and the target b [n]."""

    b: Tensor

    def __init__(self, n: int, seed: int):
        super().__init__()
        draws = np.random.RandomState(seed)
        self.theta = nn.Parameter(torch.from_numpy(draws.randn(n)).float())
        self.register_buffer("b", torch.from_numpy(np.abs(draws.randn(n))).float())


class RowsTarget(BaseTargetDistribution):
    """The target of aimle at a beta that stays, with a step for each row, as if each were a batch of its own."""

    def __init__(self, beta: float):
        self.beta = beta

    def step(self, theta: Tensor, dy: Tensor) -> Tensor:
        """Return beta norm(theta) / norm(dy) of each row, [rows, 1]; 0 where dy is zero."""
        norms = torch.linalg.vector_norm(dy, dim=-1, keepdim=True)
        steps = self.beta * torch.linalg.vector_norm(theta, dim=-1, keepdim=True) / norms
        return torch.where(norms > 0, steps, torch.zeros_like(steps))

    def params(self, theta: Tensor, dy: Tensor) -> Tensor:
        """Return theta - lambda dy."""
        return theta - self.step(theta, dy) * dy


class TopK(SolverLearning):
    """One run of the study."""

    network: Scores

    def make_network(self) -> nn.Module:
        """Return the scores."""
        task = self.task
        check(self.config)
        self.solver = partial(top_k, k=task.k)
        self.noise = noise_of(task.noise, task.k)
        self.subsets = subsets(task.n, task.k).float().to(self.device)
        return Scores(task.n, task.problem_seed)

    def loss(self) -> Tensor:
        """Return the mean of the samples' losses."""
        return self._surrogate(self.network.theta.unsqueeze(0), self.target).mean()

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return the gap of the exact expectation to its least value, and how gradients differ from the exact one."""
        theta = self.network.theta.detach().requires_grad_()
        expectation = self._expectation(theta)
        (exact,) = torch.autograd.grad(expectation, theta)
        gap = expectation.item() - self._values().min().item()
        values = {"top_k/gap": gap, "loss/expectation": expectation.item()}
        return {"train": values | self._compare(exact)}

    def _compare(self, exact: Tensor) -> dict[str, float]:
        """Return how the method's gradient differs from the exact one; I-MLE's is divided by lambda, as AIMLE's is."""
        num, task = self.task.replicates, self.task
        theta = self.network.theta.detach().expand(num, -1).clone().requires_grad_()
        target = RowsTarget(self.target.beta)
        (gradient,) = torch.autograd.grad(self._surrogate(theta, target).sum() / task.nb_samples, theta)
        gradient = gradient / (task.lambda_ if task.method == "imle" else 1)
        mean = gradient.mean(0)
        # A gradient that is zero throughout, as I-MLE's at the end, has no direction.
        cosine = torch.cosine_similarity(mean, exact, dim=0).item() if mean.any() else float("nan")
        values = {"grads/cosine": cosine, "grads/magnitude": mean.abs().mean().item()}
        if task.method == "aimle":
            values["top_k/relative_step"] = self.target.beta
        if task.method != "exact":  # whose rounding errors would stretch the axes of figures
            values["grads/bias"] = (mean - exact).abs().mean().item()
            values["grads/variance"] = gradient.var(0).mean().item()
        return values

    def _surrogate(self, theta: Tensor, target: BaseTargetDistribution) -> Tensor:
        """Return losses [rows * nb_samples] of scores [rows, n] whose gradient is the method's."""
        task = self.task
        if task.method == "exact":
            return self._expectation(theta).repeat_interleave(task.nb_samples, 0)
        if task.method == "score-function":
            scores = theta.repeat_interleave(task.nb_samples, 0)
            law = Categorical(logits=scores @ self.subsets.t(), validate_args=False)
            drawn = law.sample()
            losses = self._values()[drawn]
            return losses + losses * (law.log_prob(drawn) - law.log_prob(drawn).detach())
        if task.method == "aimle":
            options = {"noise_distribution": self.noise, "nb_samples": task.nb_samples}
            return self._losses(aimle(self.solver, target, symmetric_perturbation=True, **options)(theta))
        return self._losses(differentiable(task, self.solver, self.noise, self.target)(theta))

    def _expectation(self, theta: Tensor) -> Tensor:
        """Return L of scores [..., n]: a sum over all subsets."""
        return (theta @ self.subsets.t()).softmax(-1) @ self._values()

    def _values(self) -> Tensor:
        return self._losses(self.subsets)

    def _losses(self, y: Tensor) -> Tensor:
        return (y - self.network.b).square().sum(-1)


def run(config: DictConfig, context: Context) -> None:
    """Learn as `config` says; write metrics, checkpoints and TensorBoard events to the run directory.

    Raises Interrupted after a checkpoint where it is asked to stop, UserError for wrong options.
    """
    TopK(config, context).run()


def check(config: DictConfig) -> None:
    """Raise UserError for options of the task that no job can have."""
    task = config.task
    prepare_torch(config)
    check_method(task, METHODS)
    noise_of(task.noise, 1)
    if not 1 <= task.k <= task.n:
        raise UserError(f"task.k={task.k}: expected 1 to task.n={task.n}")
    if comb(task.n, task.k) > MOST_SUBSETS:
        raise UserError(f"task.n={task.n}: {comb(task.n, task.k):,} subsets, expected at most {MOST_SUBSETS:,}")
