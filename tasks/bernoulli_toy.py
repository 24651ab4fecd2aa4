"""Task `bernoulli_toy`: the gradient of E(b - p0)^2 by the logit of b ~ Bernoulli(p), measured for p from 0 to 1.

The toy problem of Tucker et al. (2017) and Grathwohl et al. (2018): its gradient (1 - 2 p0) p (1 - p) is small beside
the costs, whose minimum lies at b = 0.
"""

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributions import Bernoulli

from errors import UserError
from estimators.bounds.node import NodeEstimator, estimate
from estimators.nodes.base import Method
from seeding import derive_seed
from tasks.build import build_estimator, construct, options_of
from tasks.context import Context
from tasks.stepwise import StepwiseTask

QUANTILES = 2**16  # of a uniform, in exact variances
MOST_BITS = 10  # that are enumerated for them


class BernoulliToy(StepwiseTask):
    """First `steps` steps of training from p = 1/2, `batch_size` gradients each; then the variance at every p.

    Metrics of split train, at the steps: `toy/p` and `toy/loss`, the expected cost. Of split test, where the step is
    1000 p: `toy/variance` and `toy/bias` of a gradient by the logit over `analysis.num_replicates` draws, with standard
    errors; `toy/exact_variance` and `toy/exact_bias` of methods that draw bits, or one uniform for each gradient.
    """

    def __init__(self, config: DictConfig, context: Context):
        super().__init__(config, context)
        self.p0: float = config.task.p0
        self.method = method_of(config)
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))
        groups = [{"params": [self.theta, *self.method.parameters()]}]
        options = options_of(config.optimizer)
        options.pop("estimator_lr")
        self.optimizer = construct(options, groups)
        self.model = nn.ParameterDict({"theta": self.theta})
        self.parts = {"model": self.model, "method": self.method, "optimizer": self.optimizer}

    def advance(self) -> None:
        """Record how far training is, and take a step."""
        if self.step % self.config.eval_every == 0:
            self._record_training()
        logits = self.theta.expand(self.config.batch_size)
        surrogate(self.method, logits, self.p0).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finish(self) -> None:
        """Record where training ended, and the variance against p."""
        self._record_training()
        self.method.eval()
        torch.manual_seed(derive_seed(self.seed, "variance"))
        for place in range(self.config.task.spacing, 1000, self.config.task.spacing):
            self.record(place, "test", moments(self.method, place / 1000, self.p0, self.config.analysis.num_replicates))
        self.method.train()

    def _record_training(self) -> None:
        p = self.theta.detach().sigmoid()
        loss = p * (1 - self.p0) ** 2 + (1 - p) * self.p0**2
        self.record(self.step, "train", {"toy/p": p.item(), "toy/loss": loss.item()})


def cost_of(b: Tensor, p0: float) -> Tensor:
    """Return (b - p0)^2."""
    return (b - p0) ** 2


def surrogate(method: Method, logits: Tensor, p0: float) -> Tensor:
    """Return the method's surrogate for each of the logits [R]."""
    q = Bernoulli(logits=logits, validate_args=False)
    sample = method.propose(q, 1)
    return estimate(method, sample, cost_of(sample.points, p0))


def gradients(method: Method, p: float, p0: float, num: int) -> Tensor:
    """Return gradients by the logit [num], in one evaluation."""
    leaf = torch.full((num,), p, dtype=torch.float64).logit().requires_grad_()
    return torch.autograd.grad(surrogate(method, leaf, p0).sum(), leaf)[0]


def moments(method: Method, p: float, p0: float, num: int) -> dict[str, float]:
    """Return the variance and the bias of the gradient at p, measured and, where they are known, exact."""
    found, truth = gradients(method, p, p0, num), exact_gradient(p, p0)
    squares = (found - found.mean()) ** 2
    values = {
        "toy/variance": found.var().item(),
        "toy/variance_se": (squares.std() / num**0.5).item(),
        "toy/bias": (found.mean() - truth).item(),
        "toy/bias_se": (found.std() / num**0.5).item(),
    }
    exact = exact_moments(method, p, p0)
    if exact is not None:
        values |= {"toy/exact_variance": exact[1], "toy/exact_bias": exact[0] - truth}
    return values


def exact_gradient(p: float, p0: float) -> float:
    """Return d/dl E(b - p0)^2 = (1 - 2 p0) p (1 - p)."""
    return (1 - 2 * p0) * p * (1 - p)


def exact_moments(method: Method, p: float, p0: float) -> tuple[float, float] | None:
    """Return mean and variance of the gradient at p.

    The noise that `draw` would return is replaced by all that it may be: bits by 0 and 1 with their probabilities, a
    uniform by its quantiles. None for a method that draws something else.
    """
    probe = method.draw(Bernoulli(logits=torch.zeros(1, dtype=torch.float64), validate_args=False), 1)
    is_bits = type(method).draw is Method.draw
    if not isinstance(probe, Tensor) or probe.dim() != 2 or len(probe) > (MOST_BITS if is_bits else 1):
        return None
    if is_bits:
        noise = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * len(probe)).reshape(-1, len(probe)).t()
        weight = (noise * p + (1 - noise) * (1 - p)).prod(0)
    else:
        noise = (torch.arange(QUANTILES, dtype=torch.float64).unsqueeze(0) + 0.5) / QUANTILES
        weight = torch.full((QUANTILES,), 1 / QUANTILES, dtype=torch.float64)
    leaf = torch.full(noise.shape[1:], p, dtype=torch.float64).logit().requires_grad_()
    sample = method.place(Bernoulli(logits=leaf, validate_args=False), 1, noise)
    value = estimate(method, sample, cost_of(sample.points, p0))
    (found,) = torch.autograd.grad(value.sum(), leaf)
    mean = (weight * found).sum()
    return mean.item(), (weight * (found - mean) ** 2).sum().item()


def method_of(config: DictConfig) -> Method:
    """Return the method that the estimator names, for one node; raise UserError for an estimator that is none."""
    torch.manual_seed(derive_seed(config.seed, "estimator"))
    estimator = build_estimator(config, torch.device("cpu"))
    if not isinstance(estimator, NodeEstimator):
        raise UserError(
            f"estimator={config.estimator.id}: task bernoulli_toy takes methods for single nodes, such as disarm"
        )
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    q = Bernoulli(logits=logits, validate_args=False)
    method = estimator.method_of(0, q, 1)
    method.check(q)
    surrogate(method.eval(), logits, 0.4)  # networks take their sizes
    return method.train()


def run(config: DictConfig, context: Context) -> None:
    """Measure as `config` says; write metrics and checkpoints to the run directory.

    Raises Interrupted after a checkpoint where it is asked to stop.
    """
    BernoulliToy(config, context).run()


def check(config: DictConfig) -> None:
    """Raise what a job would raise: for an estimator that is no method for Bernoulli nodes."""
    try:
        method_of(config)
    except ValueError as error:
        raise UserError(f"estimator={config.estimator.id}: {error}") from error
