"""The sigmoid belief network: layers of Bernoulli variables over binary images (Neal 1992; Mnih & Rezende 2016)."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli
from torch.func import functional_call
from torch.nn import functional as F

from models.bernoulli import (
    bernoulli_draw,
    bernoulli_log_prob,
    draw_bernoulli,
    linear_bernoulli_draw,
    linear_bernoulli_log_prob,
)
from models.template import LogDensities, Output, Template

Activation = Literal["tanh", "elu"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "elu": F.elu}

# The output's bias is the logit of the data's mean, which is kept this far from 0 and 1 (a logit of 6.9).
_LEAST_MEAN = 1e-3


class BernoulliPrior(nn.Module):
    """p(z) of independent bits with learnt `logits` [size] that start at probability one half."""

    def __init__(self, size: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(size))


class BernoulliLayer(nn.Module):
    """p(v|h) of independent bits v [..., D]: logits = W f(h) + b, f a network of `hidden` layers, or h itself."""

    def __init__(self, num_inputs: int, num_outputs: int, hidden: Sequence[int], activation: Activation):
        super().__init__()
        sizes = (num_inputs, *hidden)
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.output = nn.Linear(sizes[-1], num_outputs)
        self._activate = _ACTIVATIONS[activation]

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits [..., D]."""
        return self.output(self._features(h))

    def log_prob(self, h: Tensor, value: Tensor) -> Tensor:
        """Return log p(value|h) [...]; the value broadcasts against the leading dimensions of h."""
        return linear_bernoulli_log_prob(self._features(h), self.output.weight, self.output.bias, value)

    def draw(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Draw v [..., D], without a gradient; return it and log p(v|h) [...]."""
        return linear_bernoulli_draw(self._features(h), self.output.weight, self.output.bias)

    def _features(self, h: Tensor) -> Tensor:
        for layer in self.hidden:
            h = self._activate(layer(h))
        return h


class SigmoidBeliefNetwork(Template):
    """q: x -> z_1 -> ... -> z_L, p: z_L -> ... -> z_1 -> x, each arrow a `BernoulliLayer`, p(z_L) learnt.

    Its defaults are the network of Masrani et al. (2019), "The Thermodynamic Variational Objective": L = 3 layers of
    200 bits, `latents` from the one next to x on, with linear arrows. `hidden` gives the widths of deterministic layers
    within each arrow, with `activation` "tanh" or "elu". Bits enter an arrow as -1 and +1, and x without its mean over
    the training points, which `adapt` takes; the logit of that mean is where the bias of the pixels starts.

    x is [batch, *shape] or [batch, pixels], its values in [0, 1]; z has L layers, 0 and 1 in the dtype of x,
    [mc, iw, batch, bits]. As they are discrete, `reparam` changes nothing: samples never carry a gradient.

    Proof: tests/models/test_sigmoid_belief_network.py.
    """

    mean_x: Tensor

    def __init__(
        self,
        shape: Sequence[int] = (1, 28, 28),
        latents: Sequence[int] = (200, 200, 200),
        hidden: Sequence[int] = (),
        activation: Activation = "tanh",
    ):
        super().__init__()
        self.shape, self.num_pixels = tuple(shape), prod(shape)
        if not latents or min(*self.shape, *latents, *hidden, 1) < 1:
            raise ValueError(
                "SigmoidBeliefNetwork needs at least one layer of latents, and sizes of at least 1: not "
                f"shape={list(shape)}, latents={list(latents)}, hidden={list(hidden)}"
            )
        if activation not in get_args(Activation):
            raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(get_args(Activation))}")
        sizes = (self.num_pixels, *latents)
        layer = partial(BernoulliLayer, hidden=tuple(hidden), activation=activation)
        pairs = list(pairwise(sizes))
        self.inference_network = nn.ModuleList(layer(below, above) for below, above in pairs)
        self.generative_model = nn.ModuleList(layer(above, below) for below, above in pairs)
        self.prior = BernoulliPrior(sizes[-1])
        nn.init.zeros_(_layers(self.generative_model)[0].output.bias)
        self.register_buffer("mean_x", torch.full((self.num_pixels,), 0.5))

    def adapt(self, x: Tensor) -> None:
        """Take the mean of the training points x [N, ...]: what x is centred by, and the pixels' bias as a logit."""
        with torch.no_grad():
            self.mean_x.copy_(self._rows(x).mean(0))
            _layers(self.generative_model)[0].output.bias.copy_(self.mean_x.logit(_LEAST_MEAN))

    def forward(self, x: Tensor, reparam: bool = False, sample_shape: tuple[int, int] = (1, 1)) -> Output:  # noqa: ARG002
        """Draw z layer by layer, each [mc, iw, batch, bits], with the log-densities; x [batch, ...] is seen once."""
        x = self._rows(x)
        first, *others = _layers(self.inference_network)
        first_logits = first(x - self.mean_x)
        drawn, log_q = bernoulli_draw(first_logits, sample_shape)
        z, log_qz, signs = [drawn], [log_q], [_signs(drawn)]
        for layer in others:
            drawn, log_q = layer.draw(signs[-1])
            z.append(drawn)
            log_qz.append(log_q)
            signs.append(_signs(drawn))
        log_px, log_pz = self._log_p(x, z, signs)
        return Output(
            {"log_px": log_px, "log_pz": log_pz, "log_qz": tuple(log_qz), "z": z, "reparam": False},
            {
                "px": lambda _: self._px(signs[0]),
                "pz": lambda _: [*self._pz(signs), _bernoulli(self.prior.logits)],
                "qz": lambda _: [
                    _bernoulli(first_logits),
                    *(_bernoulli(layer(h)) for layer, h in zip(others, signs[:-1], strict=True)),
                ],
            },
        )

    def sample_from_prior(self, bs: int) -> dict[str, Any]:
        """Draw `bs` z from the prior, from the last layer to the first; return `px` [bs, *shape], `z` and `pz`."""
        pz = [_bernoulli(self.prior.logits.expand(bs, -1))]
        z = [draw_bernoulli(pz[0].probs)]
        for layer in reversed(_layers(self.generative_model)[1:]):
            pz.insert(0, _bernoulli(layer(_signs(z[0]))))
            z.insert(0, draw_bernoulli(pz[0].probs))
        return {"px": self._px(_signs(z[0])), "z": z, "pz": pz}

    def log_prob(self, x: Tensor, z: Sequence[Tensor], stop_phi: bool = False) -> LogDensities:
        """Return the log-densities of x [batch, ...] and of the given z, each layer [mc, iw, batch, bits]."""
        x = self._rows(x)
        z = [layer.to(x.dtype) for layer in z]
        signs = [_signs(layer) for layer in z]
        inputs = [x - self.mean_x, *signs[:-1]]
        triples = list(zip(_layers(self.inference_network), inputs, z, strict=True))
        if stop_phi:
            log_qz = [bernoulli_log_prob(_call_detached(layer, h), value) for layer, h, value in triples]
        else:
            log_qz = [layer.log_prob(h, value) for layer, h, value in triples]
        log_px, log_pz = self._log_p(x, z, signs)
        return LogDensities(log_px, log_pz, tuple(log_qz))

    @property
    def num_layers(self) -> int:  # type: ignore[override]
        """The layers of z."""
        return len(self.inference_network)

    def layer_posterior(self, x: Tensor, z: Sequence[Tensor] = ()) -> Bernoulli:
        """Return q(z_1|x) [batch, bits], or q(z_{l+1}|z_l) [..., batch, bits] for the last of z."""
        h = _signs(z[-1]) if z else self._rows(x) - self.mean_x
        return _bernoulli(_layers(self.inference_network)[len(z)](h))

    def layer_likelihood(self, x: Tensor, z: Sequence[Tensor]) -> Tensor:
        """Return log p(x|z_1), or log p(z_{l-1}|z_l), for l layers z: [..., batch]."""
        value = z[-2] if len(z) > 1 else self._rows(x)
        return _layers(self.generative_model)[len(z) - 1].log_prob(_signs(z[-1]), value)

    def layer_prior(self) -> Bernoulli:
        """Return p(z_L), [bits]."""
        return _bernoulli(self.prior.logits)

    def _log_p(self, x: Tensor, z: Sequence[Tensor], signs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return log p(x|z_1), and log p(z_l|z_{l+1}) for every layer, of z and what it enters the arrows as."""
        triples = zip(_layers(self.generative_model), signs, [x, *z[:-1]], strict=True)
        log_p = [layer.log_prob(h, value) for layer, h, value in triples]
        return log_p[0], (*log_p[1:], bernoulli_log_prob(self.prior.logits, z[-1]))

    def _px(self, signs: Tensor) -> Bernoulli:
        return _bernoulli(_layers(self.generative_model)[0](signs).unflatten(-1, self.shape))

    def _pz(self, signs: Sequence[Tensor]) -> list[Bernoulli]:
        """Return p(z_l|z_{l+1}) for all but the last layer."""
        pairs = zip(_layers(self.generative_model)[1:], signs[1:], strict=True)
        return [_bernoulli(layer(h)) for layer, h in pairs]

    def _rows(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1:] not in (self.shape, (self.num_pixels,)):
            raise ValueError(
                f"SigmoidBeliefNetwork was given x of shape {list(x.shape)}, expected [batch, "
                f"{', '.join(map(str, self.shape))}] or [batch, {self.num_pixels}]"
            )
        return x.reshape(len(x), self.num_pixels)


def _layers(modules: nn.ModuleList) -> list[BernoulliLayer]:
    return list(modules)  # type: ignore[arg-type]


def _signs(bits: Tensor) -> Tensor:
    """Return -1 for 0 and +1 for 1, in one pass."""
    return torch.add(bits.new_full((), -1.0), bits, alpha=2)


def _bernoulli(logits: Tensor) -> Bernoulli:
    return Bernoulli(logits=logits, validate_args=False)


def _call_detached(module: nn.Module, *arguments: Tensor) -> Tensor:
    """Call a module with its parameters as constants."""
    return functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, arguments)
