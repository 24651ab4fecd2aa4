"""Task `discrete_vae`: train a model of few discrete latents by a method for single nodes, and measure its gradients.

The tutorial of van Krieken et al. (2021, "Storchastic") on any method that takes the model's latents.
"""

from collections.abc import Iterator

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.distributions import Distribution, OneHotCategorical

from analysis.replicates import evaluation_copy
from errors import UserError
from estimators.bounds.node import NodeEstimator
from estimators.bounds.node_methods import ExpectNode
from models.template import Template
from seeding import derive_seed
from tasks.build import build_dataset, build_estimator, build_model, build_networks, build_optimizer, prepare_torch
from tasks.context import Context
from tasks.stepwise import StepwiseTask

BLOCK_VALUES = 2**14  # samples, times observations and replicates, that go through the decoder at once
ROUNDING_EPSILONS = 256  # a spread of so many, relative to the gradient, is rounding
LEAST_PROBABILITY = 1.2e-7  # torch.distributions takes smaller probabilities for this, with no gradient


class DiscreteVaeTraining(StepwiseTask):
    """One training run. A step takes one batch; every `eval_every` steps, and after the last, it is evaluated."""

    def __init__(self, config: DictConfig, context: Context):
        super().__init__(config, context)
        self.dataset = build_dataset(config).to(self.device)
        self.model = build_model(config, self.device, self.dataset)
        self.estimator = checked(build_estimator(config, self.device), self.model)
        build_networks(config, self.estimator, self.model, self._batch(0))
        self.optimizer = build_optimizer(config, self.model, self.estimator)
        self.parts = {"model": self.model, "estimator": self.estimator, "optimizer": self.optimizer}
        self.expect = ExpectNode(iw=1)
        num = config.evaluation.points
        self.points = {split: self.dataset.points(split)[:num].to(self.device) for split in ("train", "test")}

    def _batch(self, step: int) -> Tensor:
        return self.dataset.batch(step, self.config.batch_size, self.seed).to(self.device)

    def advance(self) -> None:
        """Evaluate where that is due, then train on the batch of this step."""
        if self.step % self.config.eval_every == 0:
            self._evaluate()
        loss, _, _ = self.estimator(self.model, self._batch(self.step))
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step + 1:,}")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finish(self) -> None:
        """Evaluate after the last step."""
        self._evaluate()

    def _evaluate(self) -> None:
        """Record the losses, and the gradient on the batch of this step. Training goes on as if it had not been."""
        estimator = evaluation_copy(self.estimator, self.model, self.points["train"][:1])
        assert isinstance(estimator, NodeEstimator)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, "evaluation", self.step))
            losses = {split: self._losses(estimator, x) for split, x in self.points.items()}
            gradients = gradient_metrics(
                estimator, self.model, self._batch(self.step), self.config.analysis.num_replicates
            )
        for split, values in losses.items():
            self.record(self.step, split, values)
        self.record(self.step, "train", gradients)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in (losses["train"] | gradients).items())
        print(f"step {self.step:,}  {shown}", flush=True)

    def _losses(self, estimator: NodeEstimator, x: Tensor) -> dict[str, float]:
        """Return -ELBO, enumerated, and the method's own estimate: that of a relaxed model for relaxed methods."""
        found = dict.fromkeys(("loss/neg_elbo", "loss/objective"), 0.0)
        for chunk in x.split(256):
            for name, method in zip(found, (self.expect, estimator), strict=True):
                found[name] += method.surrogate(self.model, chunk).detach().sum().item() / len(x)
        return found


def gradient_metrics(estimator: NodeEstimator, model: Template, x: Tensor, num_replicates: int) -> dict[str, float]:
    """Compare the gradients of -ELBO by the logits of q(z|x), for each x, with the enumerated ones.

    Means over the entries, which are the observations' logits: `grads/variance`; `grads/bias`, of abs(mean - exact).
    `grads/cosine` is that of the angle between the two, `grads/bias_z` the norm of mean - exact in units of what noise
    alone would make of it, sqrt(sum of the squared standard errors): about 1 where there is no bias. No variance and no
    `bias_z` where nothing varies but by rounding. And the tutorial's, for probabilities in place of logits and the mean
    over x for the loss: `grads/probs_variance`, the sum over an observation's entries of mean_r (g_r - mean)^2, and
    `grads/probs_bias`, that of (mean - exact)^2, both the mean over x.
    """
    q = model.layer_posterior(x)
    assert isinstance(q, OneHotCategorical)
    logits = q.logits.detach()
    (exact,) = gradients(ExpectNode(iw=1), model, x, logits.unsqueeze(0))
    size = max(1, BLOCK_VALUES // (len(x) * estimator.iw))
    found = torch.cat([gradients(estimator, model, x, copies) for copies in copies_of(logits, num_replicates, size)])
    mean = found.mean(0)
    values = {
        "grads/bias": (mean - exact).abs().mean().item(),
        "grads/cosine": torch.cosine_similarity(mean.flatten(), exact.flatten(), 0).item(),
    }
    probs = logits.softmax(-1)
    factor = torch.where(probs > LEAST_PROBABILITY, 1 / (probs * len(x)), 0)
    values["grads/probs_bias"] = _total(((mean - exact) * factor) ** 2)
    squares = ((found - mean) ** 2).double().flatten(1).mean(1) * num_replicates / (num_replicates - 1)
    variance = squares.mean().item()
    if variance > (ROUNDING_EPSILONS * torch.finfo(found.dtype).eps) ** 2 * mean.double().square().mean().item():
        values["grads/variance"] = variance
        values["grads/variance_se"] = squares.std().item() / num_replicates**0.5
        values["grads/bias_z"] = ((mean - exact).double().square().mean().item() * num_replicates / variance) ** 0.5
        values["grads/probs_variance"] = _total((((found - mean) * factor) ** 2).mean(0))
    return values


def copies_of(logits: Tensor, num: int, size: int) -> Iterator[Tensor]:
    """Yield `num` copies of logits in blocks of at most `size`."""
    for start in range(0, num, size):
        yield logits.expand(min(size, num - start), *logits.shape)


def gradients(estimator: NodeEstimator, model: Template, x: Tensor, logits: Tensor) -> Tensor:
    """Return the gradients by the logits of q [replicates, batch, N, C], each copy with noise of its own."""
    leaf = logits.clone().requires_grad_()
    q: Distribution = OneHotCategorical(logits=leaf, validate_args=False)
    (found,) = torch.autograd.grad(estimator.layer_surrogate(model, x, [], q).sum(), leaf)
    return found


def _total(values: Tensor) -> float:
    """Return values [batch, ...] summed over all but the batch, its mean."""
    return values.double().flatten(1).sum(1).mean().item()


def checked(estimator: object, model: Template) -> NodeEstimator:
    """Return the estimator; raise UserError where the task knows nothing of it or of the model."""
    if not isinstance(estimator, NodeEstimator):
        id = getattr(estimator, "id", type(estimator).__name__)
        raise UserError(f"estimator={id}: task discrete_vae takes methods for single nodes, such as score-function")
    if type(model).layer_posterior is Template.layer_posterior or model.num_layers != 1:
        raise UserError(
            f"task discrete_vae needs a model of one layer that says what it is, not {type(model).__name__}"
        )
    return estimator


def run(config: DictConfig, context: Context) -> None:
    """Train as `config` says; write metrics and checkpoints to the run directory.

    Raises Interrupted after a checkpoint where it is asked to stop, FloatingPointError where the loss is not finite.
    """
    DiscreteVaeTraining(config, context).run()


def check(config: DictConfig) -> None:
    """Build everything once and take one gradient; raise what a job would raise."""
    device = prepare_torch(config)
    dataset = build_dataset(config)
    model = build_model(config, device, dataset)
    estimator = checked(build_estimator(config, device), model)
    x = dataset.batch(0, config.batch_size, config.seed).to(device)[:2]
    build_networks(config, estimator, model, x)
    q = model.layer_posterior(x)
    if not isinstance(q, OneHotCategorical):
        raise UserError(f"task discrete_vae needs categorical latents, not {type(q).__name__} ones")
    estimator(model, x)
    gradient_metrics(estimator, model, x, 2)
