"""Task `dice_language_model`: a reward of whole sentences, and a penalty of each token that looks left only.

The loss is E[-adjectives + kl sum_t KL_t], KL_t the divergence of the model's next word from that of the model before
fine-tuning, given the words so far. KL_t depends on the words before t, and on no later one: with the penalty
attributed to prefixes a word's log-probability meets what its choice decides alone; attributed to the sequence, it
meets the penalty whole, with the same mean and more variance.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from datasets.sentences import BEGIN, STOP, TOKEN, WORDS, is_grammatical, num_adjectives, sentences, text_of
from errors import UserError, near
from estimators import dice
from models.transformer import Transformer
from seeding import derive_seed
from tasks.build import construct, options_of
from tasks.context import Context
from tasks.stepwise import StepwiseTask

PENALTIES = ("prefix", "sequence", "off")
BASELINES = ("leave-one-out", "none")
NUM_SENTENCES = 20_000  # to learn the language from
EVALUATED = 512  # sentences drawn at an evaluation


class Sampled:
    """Sentences that a model drew, and what it thinks of them: all by one pass with a gradient."""

    def __init__(self, model: Transformer, original: Transformer, tokens: Tensor):
        """Take tokens [batch, 1 + steps]; what comes after the first full stop was not drawn."""
        self.tokens = tokens
        logits = model(tokens[:, :-1])
        ended = (tokens[:, :-1] == TOKEN[STOP]).cummax(1).values
        self.logp = dice.logp_categorical(logits, tokens[:, 1:]).masked_fill(ended, 0.0)
        with torch.no_grad():
            before = original(tokens[:, :-1]).log_softmax(-1)
        now = logits.log_softmax(-1)
        self.kl = (now.exp() * (now - before)).sum(-1).masked_fill(ended, 0.0)  # [batch, steps]
        self.rewards = num_adjectives(tokens).to(logits.dtype)

    def reward_losses(self, baseline: bool) -> Tensor:
        """Return the rewards' surrogate [batch]."""
        losses = dice.cost_node(-self.rewards, [self.logp])
        return losses + dice.batch_baseline_term(-self.rewards, [self.logp]) if baseline else losses

    def prefix_losses(self, baseline: bool) -> Tensor:
        """Return the penalty's surrogate [batch]: the divergence at a word depends on those before it."""
        before = pad(self.logp.cumsum(1)[:, :-1], (1, 0))
        losses = dice.cost_node(self.kl, [before]).sum(1)
        if baseline:
            # What comes after a word is what its choice has a part in.
            kl = self.kl.detach()
            to_come = kl.flip(1).cumsum(1).flip(1) - kl
            losses = losses + dice.batch_baseline_term(to_come, [self.logp]).sum(1)
        return losses

    def sequence_losses(self, baseline: bool) -> Tensor:
        """Return the penalty's surrogate [batch], as if each word had a part in all of it."""
        total = self.kl.sum(1)
        losses = dice.cost_node(total, [self.logp])
        return losses + dice.batch_baseline_term(total.detach(), [self.logp]) if baseline else losses


class DiceLanguageModel(StepwiseTask):
    """Pretraining, then fine-tuning: the steps of both are those of the job."""

    def __init__(self, config: DictConfig, context: Context):
        super().__init__(config, context)
        self.options = task = config.task
        self.batch_size, self.baseline = config.batch_size, task.baseline == "leave-one-out"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "parameters"))
            self.model = Transformer(len(WORDS), task.length, task.width, task.layers, task.heads).to(self.device)
        self.original = copy.deepcopy(self.model).requires_grad_(False)
        self.text = sentences(NUM_SENTENCES, task.length, seed=0).to(self.device)
        self.pretraining = torch.optim.Adam(self.model.parameters(), task.pretrain_lr)
        options = options_of(config.optimizer)
        options.pop("estimator_lr")
        self.optimizer = construct(options, list(self.model.parameters()))
        self.parts: Mapping[str, Any] = {
            "model": self.model,
            "original": self.original,
            "pretraining": self.pretraining,
            "optimizer": self.optimizer,
        }
        self.total = task.pretrain_steps + config.steps

    def advance(self) -> None:
        """Take a step of pretraining, or of fine-tuning; `step` of the metrics counts those of fine-tuning."""
        tuned = self.step - self.options.pretrain_steps
        if tuned < 0:
            self._pretrain()
            return
        if tuned == 0:
            self.original.load_state_dict(self.model.state_dict())
        if tuned % self.config.eval_every == 0:
            self._evaluate(tuned)
        self.optimizer.zero_grad()
        self._losses(self._draw(self.batch_size))["grads"].backward()
        self.optimizer.step()

    def finish(self) -> None:
        """Evaluate after the last step."""
        self._evaluate(self.config.steps)

    def _pretrain(self) -> None:
        rows = torch.randint(len(self.text), (self.options.pretrain_batch,)).to(self.device)
        tokens = self.text[rows]
        # One full stop is learnt, those after it are there to fill.
        ended = (tokens[:, :-1] == TOKEN[STOP]).cummax(1).values
        loss = cross_entropy(self.model(tokens[:, :-1])[~ended], tokens[:, 1:][~ended])
        self.pretraining.zero_grad()
        loss.backward()
        self.pretraining.step()
        if self.step % 100 == 0:
            print(f"pretraining {self.step:,}  {loss.item():.3f} nats a word", flush=True)

    def _draw(self, number: int) -> Tensor:
        first = torch.full((number,), TOKEN[BEGIN], device=self.device)
        return self.model.generate(first, self.options.length, end=TOKEN[STOP])

    def _losses(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return the loss, and the penalty's part of it where there is one: means over sentences."""
        drawn = Sampled(self.model, self.original, tokens)
        losses = {"grads": drawn.reward_losses(self.baseline).mean()}
        if self.options.penalty != "off":
            penalty = drawn.prefix_losses if self.options.penalty == "prefix" else drawn.sequence_losses
            losses["penalty"] = self.options.kl * penalty(self.baseline).mean()
            losses["grads"] = losses["grads"] + losses["penalty"]
        return losses

    def _evaluate(self, tuned: int) -> None:
        """Measure the sentences that the model draws, and its gradient; training goes on as if none had been drawn."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "evaluation", tuned))
            tokens = self._draw(EVALUATED)
            with torch.no_grad():
                drawn = Sampled(self.model, self.original, tokens)
            found = {
                "language/reward": drawn.rewards.mean().item(),
                "language/kl": drawn.kl.sum(1).mean().item(),
                "language/grammatical": is_grammatical(tokens).float().mean().item(),
            }
            self.record(tuned, "test", found)
            variances = self._variances()
            if tuned == 0:
                variances.pop("penalty/variance", None)  # the penalty is at its least: its gradient is rounding
            self.record(tuned, "train", variances)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
        print(f"step {tuned:,}  {shown}  {text_of(tokens[0])!r}", flush=True)

    def _variances(self) -> dict[str, float]:
        """Return the mean over parameters of a gradient's variance, over replicates of a batch.

        `grads/variance` is that of the loss, `penalty/variance` that of the penalty alone.
        """
        parameters = list(self.model.parameters())
        means: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        for count in range(1, self.options.replicates + 1):
            for name, loss in self._losses(self._draw(self.batch_size)).items():
                found = torch.autograd.grad(loss, parameters, retain_graph=True)
                gradient = nn.utils.parameters_to_vector(found).double()
                difference = gradient - means.get(name, torch.zeros_like(gradient))
                means[name] = means.get(name, 0.0) + difference / count
                squares[name] = squares.get(name, 0.0) + difference * (gradient - means[name])
        return {f"{name}/variance": (each.mean() / (count - 1)).item() for name, each in squares.items()}


def run(config: DictConfig, context: Context) -> None:
    """Train and fine-tune as `config` says; write metrics and checkpoints to the run directory.

    Raises Interrupted after a checkpoint where it is asked to stop.
    """
    DiceLanguageModel(config, context).run()


def check(config: DictConfig) -> None:
    """Raise UserError for options of the task that no job can have."""
    for name, choices in (("penalty", PENALTIES), ("baseline", BASELINES)):
        if (given := config.task[name]) not in choices:
            raise UserError(f"task.{name}={given}{near(str(given), choices)}")
    if config.batch_size < 2:
        raise UserError(f"batch_size={config.batch_size}: expected two sentences or more: one has no others")
    sentences(1, config.task.length, seed=0)
    Transformer(len(WORDS), config.task.length, config.task.width, config.task.layers, config.task.heads)
