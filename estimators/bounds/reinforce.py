"""The score function estimator without a control variate."""

from torch import Tensor

from estimators.bounds.base import ScoreFunction
from estimators.bounds.weights import Weights


class Reinforce(ScoreFunction):
    """REINFORCE: sum_k d_k h_k, that is c_k = 0 (Williams 1992; Mnih & Rezende 2016 for L_K).

    Unbiased for grad L^a. Its variance grows with the bound's distance from zero. Proof: the row of `reinforce` in
    tests/estimators/test_bounds_enumeration.py.
    """

    copies_are_independent = True
    id = "reinforce"
    min_particles = 1

    def control_variate(self, weights: Weights, beta: float) -> Tensor:  # noqa: ARG002
        """Return c_k - shift for c_k = 0, [mc, 1, batch]."""
        return -weights.shift
