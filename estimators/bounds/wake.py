"""Reweighted wake-sleep."""

from estimators.bounds.base import Coefficients, LinearEstimator, Objective
from estimators.bounds.weights import Terms, weigh


class WakeWake(LinearEstimator):
    """Reweighted wake-sleep with the wake-phase update of q (Bornschein & Bengio 2015; Le et al. 2019).

    theta: grad_theta L^a, unbiased. phi: sum_k v_k h_k, descent on the inclusive divergence KL(p | q): at alpha = 0,
    beta = 1 the self-normalised importance sampling estimate of E_{p(z|x)}[grad_phi log q(z|x)], consistent for it as K
    grows. Heated weights are those of another posterior: at beta = 1 the normalised q^a p(x, z)^{1-a}. Proof: the rows
    of `wake-wake` in tests/estimators/test_bounds_enumeration.py.
    """

    copies_are_independent = True
    id = "wake-wake"
    min_particles = 1

    @property
    def objectives(self) -> tuple[Objective, Objective]:
        """The bound for theta, the wake phase for phi."""
        return Objective("bound", self.num_particles), Objective("wake")

    def coefficients(self, terms: Terms, alpha: float, beta: float) -> Coefficients:  # noqa: ARG002
        """Return the bound L^a and v_k, for both updates."""
        weights = weigh(terms.log_w, alpha)
        return Coefficients(weights.bound, weights.w_norm, weights.w_norm)
