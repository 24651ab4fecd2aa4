"""Enumeration: the expectation itself, and its derivatives of every order."""

import math

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Binomial, Categorical, Distribution, OneHotCategorical

from estimators.nodes.base import Method, Sample, base_of


class Expect(Method):
    """sum_x q(x) f(x) over all values x of the node; several independent variables give the product of their values.

    The values are the same for all items of a plate, so that what is computed from them alone is computed once.
    Exact, to any order. Raises ValueError for more than `budget` values and for a distribution without finite support.
    """

    declares = "exact"
    any_order = True
    takes = (Bernoulli, Categorical, OneHotCategorical, Binomial)

    def __init__(self, plate_name: str, budget: int = 10_000):
        super().__init__(plate_name)
        self.budget = budget

    def draw(self, distribution: Distribution, num_plates: int) -> Tensor:
        """Return all values, [n, *ones, *rest, *event]: nothing is random."""
        return self.values(distribution, num_plates)

    def weigh(self, sample: Sample) -> Tensor:
        """Return q(x_i), with its gradient, [n, *plates]."""
        return sample.log_prob.exp()

    def values(self, distribution: Distribution, num_plates: int) -> Tensor:
        """Return all values of a node, [n, *ones, *rest, *event]."""
        single = values_of_one(distribution)
        rest = distribution.batch_shape[num_plates:]
        own = base_of(distribution)
        reinterpreted = distribution.event_shape[: len(distribution.event_shape) - len(own.event_shape)]
        shape = (*rest, *reinterpreted)
        num_variables = torch.Size(shape).numel()
        if num_variables * math.log(len(single)) > math.log(self.budget) + 1e-9:  # before anything is built
            raise ValueError(
                f"node {self.plate_name!r}: Expect would enumerate {len(single)}^{num_variables} values, more than its "
                f"budget of {self.budget}; raise the budget or use a method that samples"
            )
        places = len(single) ** torch.arange(num_variables - 1, -1, -1, device=single.device)
        rows = torch.arange(len(single) ** num_variables, device=single.device).unsqueeze(-1) // places % len(single)
        return single[rows].reshape(len(rows), *(1,) * num_plates, *shape, *single.shape[1:])

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{self.plate_name!r}, budget={self.budget}"


def values_of_one(distribution: Distribution) -> Tensor:
    """Return the values that one variable of a distribution can take, [values, *event]."""
    base = base_of(distribution)
    values = base.enumerate_support(expand=False)
    return values.reshape(len(values), *base.event_shape)
