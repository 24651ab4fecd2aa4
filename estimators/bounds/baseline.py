"""A baseline: a network c(x) that predicts the learning signal; REINFORCE with it."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from estimators.bounds.base import BoundEstimator, Estimate
from estimators.bounds.weights import Terms, Weights, learning_signal, log_terms, phi_surrogate, theta_surrogate, weigh
from models.particles import Particles

NUM_HIDDEN = 100


class Baseline(nn.Module):
    """c(x): x flattened, one hidden layer of 100 tanh units, one number (Mnih & Gregor 2014, section 2.3.1).

    It is built, and its parameters drawn, on the first x; until then they are lazy, and become what they are in place,
    so that an optimizer may be given them before or after. x enters standardised by the mean and standard deviation of
    all numbers of that first x, kept in the state: two numbers, so that pixels in [0, 1] and points in [0, 200] both
    arrive at the scale that tanh units resolve, while a pixel that happened to be constant is not blown up; fixed, so
    that c stays a function of x alone.
    """

    location: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.LazyLinear(NUM_HIDDEN)
        self.output = nn.LazyLinear(1)
        self.register_buffer("location", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return c(x) [batch] in `dtype` for x [batch, ...]; it is computed in the dtype of the network.

        Raises ValueError where a row of x has another size than in the first call.
        """
        weight = self.hidden.weight
        x = x.detach().reshape(len(x), -1).to(weight.dtype)
        if is_lazy(weight):
            self._build(x)
        elif x.shape[1] != weight.shape[1]:
            raise ValueError(
                f"the baseline was built for x of {weight.shape[1]} numbers a row, and was given {x.shape[1]}"
            )
        x = (x - self.location) / self.scale
        return self.output(self.hidden(x).tanh()).squeeze(-1).to(dtype)

    def _build(self, x: Tensor) -> None:
        with torch.no_grad():
            self.to(x.device)
            self.location.copy_(x.mean())
            scale = x.std(correction=0)
            self.scale.copy_(torch.where(scale > 0, scale, 1.0))
            self.output(self.hidden(x))


class ReinforceBaseline(BoundEstimator):
    """REINFORCE with a learnt baseline (Mnih & Gregor 2014): sum_{k,l} (d_{k,l} - c(x)) h_{k,l} for phi.

    c descends the squared error (d_{k,l} - c(x))^2, mean over particles, layers, mc and the batch; its gradient reaches
    c alone, and comes with that of the loss, whose value it leaves as it is. Unbiased for grad L^a whatever c is, as it
    knows nothing of z. Proof: the rows of `reinforce-baseline` in tests/estimators/test_bounds_enumeration.py.
    """

    id = "reinforce-baseline"
    min_particles = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.baseline = Baseline()

    def estimate(self, particles: Particles, alpha: float, beta: float) -> Estimate:
        """Return the bound L^a and the surrogates of theta, phi and c."""
        terms = log_terms(particles, beta, self.freebits, stop_q=True)
        weights = weigh(terms.log_w, alpha)
        c = self.baseline(particles.x, weights.log_w.dtype)
        signal = signal_less(c.detach(), weights, terms)
        theta = theta_surrogate(weights.w_norm, terms.log_w)
        return Estimate(weights.bound, theta + phi_surrogate(signal, terms.log_q) + regression(c, signal, terms))


def signal_less(constant: Tensor, weights: Weights, terms: Terms) -> Tensor:
    """Return d_{k,l} - constant, [mc, iw, batch], with layers in front under freebits; the constant [batch]."""
    return learning_signal(weights, terms.slope, constant - weights.shift)


def regression(c: Tensor, error: Tensor, terms: Terms) -> Tensor:
    """Return what has the gradient of -mean_{k,l} error_{k,l}^2 by c [batch], error = target - c: [mc, batch].

    The error is a number; its square is linearised, so that the surrogate stays as small as the errors.
    """
    return 2 * error.expand_as(terms.log_q).mean((0, -2)) * c
