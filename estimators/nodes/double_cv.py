"""Double control variates: leave-one-out, on costs whose first-order expansions are taken out."""

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, OneHotCategorical

from estimators.nodes.base import Method, Sample, gradient_of_logits
from estimators.nodes.muprop import by_mean, summed
from estimators.nodes.parts import beside, differentiable, score_of, slopes, training_term, variance_objective


class DoubleCV(Method):
    """Leave-one-out with the gradients of the other samples' costs (Titsias & Shi 2022, "Double control variates").

    With c_k = f(b_k) - alpha s_k (b_k - mu) and s_k the mean of f'(b_j) over the other samples,

        1/n sum_k (c_k - mean of the other c_j) grad log q(b_k) + alpha (mean f') grad mu.

    s_k (b_k - mu) taken out of the cost of the sample is one control variate, which has the mean s_k grad mu; taken out
    of the costs of the baseline, where its mean is 0, the other. n samples (two or more) take n costs, points
    [n, *plates, *rest, *event], and one pass backwards.

    alpha is a parameter of the method, 0 at first, where it is the score function with the leave-one-out baseline:
    backward() gives it the gradient of the variance, for an optimiser that has `method.parameters()`.

    Needs costs that are differentiable in the samples. Unbiased for any alpha; each draw is the same for f + c.
    Proof: tests/estimators/nodes/test_enumeration.py.
    """

    source = "Titsias & Shi 2022"
    takes = (Bernoulli, OneHotCategorical)

    def __init__(self, plate_name: str, n_samples: int = 2, alpha: float = 0.0):
        super().__init__(plate_name, n_samples)
        check_others(self)
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def place(self, distribution: Distribution, num_plates: int, noise: Tensor) -> Sample:
        """Return b."""
        return Sample(distribution, num_plates, differentiable(noise))

    def control_variate(self, sample: Sample, cost: Tensor) -> Tensor | None:
        """Return zeros with the estimate, and the gradient of alpha, as their gradient."""
        if not torch.is_grad_enabled():
            return None
        slope = slopes(self, sample, cost)
        score = score_of(sample.distribution, sample.points).unsqueeze(-1)
        linear = self.alpha * summed(sample, mean_of_others(slope) * score)  # b - mu is the score itself
        costs = beside(sample, cost.detach()) - linear
        coefficient = ((costs - mean_of_others(costs)) * score).mean(0)
        coefficient = coefficient + self.alpha * by_mean(sample, slope.mean(0))
        training = training_term(self.parameters(), variance_objective(coefficient, sample.num_plates))
        return gradient_of_logits(sample, coefficient.detach(), type(self).__name__) + training

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{super().extra_repr()}, alpha={self.alpha.item():g}"


def check_others(method: Method) -> None:
    """Raise ValueError, naming the node, for a leave-one-out method of one sample."""
    if method.n_samples < 2:
        raise ValueError(
            f"{type(method).__name__}({method.plate_name!r}): n_samples = {method.n_samples}, expected at least 2: "
            "each sample needs others"
        )


def mean_of_others(values: Tensor) -> Tensor:
    """Return the mean over the other samples, [n, ...]."""
    return (values.sum(0) - values) / (len(values) - 1)
