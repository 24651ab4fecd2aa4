"""The thermodynamic variational objective."""

from dataclasses import dataclass
from math import inf, log10
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from estimators.bounds.base import Coefficients, LinearEstimator, Objective
from estimators.bounds.weights import FLOOR, Terms, relative
from estimators.registry import spell
from models.pieces import PIECE

Partition = Literal["log", "config1", "config2", "linear"]
Rule = Literal["left", "right", "trapz"]
DEFAULT_EXPONENT = 10.0
_FIRST_POINTS = {"config1": (0.05, 0.2, 0.3), "config2": (0.01, 0.02, 0.03)}  # for K below 10, below 30, and more


@dataclass(eq=False, repr=False)
class Tvo(LinearEstimator):
    """TVO (Masrani et al. 2019, eq. 8 and 11): a Riemann sum of int_0^1 E_{pi_t}[log w] dt = log p(x).

    pi_t is proportional to q w^t: log pi_t = log q + t log w + const. The N intervals lie between 0 and N log-spaced
    points from the first, t_1, to 1: t_1 = 10^-exponent (`log`), or 0.05, 0.2, 0.3 (`config1`) or 0.01, 0.02, 0.03
    (`config2`) for K below 10, below 30, and more; or they are equal (`linear`). A term is taken at the left end of
    each interval (a lower bound), at the right end (an upper one), or half at each (`trapz`). With v^t the normalised
    w^t, a term E_{pi_t}[log w] is estimated by sum_k v^t_k log w_k, and its gradient by

        sum_k v^t_k grad log w_k + K/(K-1) sum_k v^t_k (log w_k - sum_j v^t_j log w_j) grad log pi_t(z_k)

    for theta and phi alike, with the particles held fixed. Consistent: its bias, that of self-normalised importance
    sampling, vanishes as 1/K; at t = 0, where the weights are uniform, it is unbiased. Particles of weight zero have no
    part in any pi_t, t > 0, and are left out of t = 0 as well. Proof: the rows of `tvo` in
    tests/estimators/test_bounds_enumeration.py.

    Its buffers `points` and `widths`, float64 [terms], are the t of each term and the width that it stands for.
    """

    copies_are_independent = True
    takes_alpha = False
    num_intervals: int = 5
    partition: Partition = "log"
    exponent: float = DEFAULT_EXPONENT
    rule: Rule = "left"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_intervals < 2:
            raise ValueError(f"{self.id}: N = {self.num_intervals}, expected 2 or more intervals")
        if not 0 < self.exponent < inf:
            raise ValueError(f"{self.id}: b = {self.exponent}, expected a positive number: the first point is 10^-b")
        for name, kind in (("partition", Partition), ("rule", Rule)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{self.id}: {name} = {getattr(self, name)!r}, expected {' or '.join(get_args(kind))}")
        ends = self._ends()
        before, after = (F.pad(ends.diff(), pad) for pad in ((1, 0), (0, 1)))
        widths = {"left": after, "right": before, "trapz": (before + after) / 2}[self.rule]
        self.register_buffer("points", ends[widths > 0], persistent=False)
        self.register_buffer("widths", widths[widths > 0], persistent=False)

    @property
    def id(self) -> str:
        """`tvo-part<num_intervals>[-beta<exponent>|-config1|-config2|-linear][-right|-trapz]`."""
        exponent = "" if self.exponent == DEFAULT_EXPONENT else f"-beta{spell(self.exponent)}"
        partition = exponent if self.partition == "log" else f"-{self.partition}"
        return f"tvo-part{self.num_intervals}{partition}{'' if self.rule == 'left' else f'-{self.rule}'}"

    @property
    def objectives(self) -> tuple[Objective, Objective]:
        """The Riemann sum for both."""
        return Objective("thermodynamic"), Objective("thermodynamic")

    def coefficients(self, terms: Terms, alpha: float, beta: float) -> Coefficients:  # noqa: ARG002
        """Return the Riemann sum and the coefficients, over as many terms at once as are a piece, or over one."""
        shift, log_w = relative(terms.log_w.detach(), alpha=0.0)
        is_alive = log_w > -torch.inf
        log_w = log_w.masked_fill(~is_alive, 0.0)

        relative_bound, to_log_w, to_log_pi = (torch.zeros_like(values) for values in (shift, log_w, log_w))
        unbiased = self.num_particles / (self.num_particles - 1)
        ends = (self.get_buffer(name).to(log_w).view(-1, 1, 1, 1) for name in ("points", "widths"))
        for t, width in zip(*(each.split(max(1, PIECE // log_w.numel())) for each in ends), strict=True):
            w = (t * log_w).clamp(min=FLOOR).exp_().mul_(is_alive)
            v = w.div_(w.sum(-2, keepdim=True).clamp(min=1.0))  # the largest is 1, unless all are zero
            mean = (v * log_w).sum(-2, keepdim=True)
            covariance = (log_w - mean).mul_(v).mul_(unbiased * width)
            relative_bound.add_((width * mean).sum(0))
            to_log_w.add_(v.mul_(width).add_(t * covariance).sum(0))
            to_log_pi.add_(covariance.sum(0))
        # log q_{k,l} is a part of log pi_t, and of log w.
        return Coefficients((shift + relative_bound).squeeze(-2), to_log_w, to_log_pi - terms.slope * to_log_w)

    def _ends(self) -> Tensor:
        """Return the ends of the intervals, from 0 to 1."""
        if self.partition == "linear":
            return torch.linspace(0.0, 1.0, self.num_intervals + 1, dtype=torch.float64)
        exponent = self.exponent
        if self.partition != "log":
            few, some, many = _FIRST_POINTS[self.partition]
            exponent = -log10(few if self.num_particles < 10 else some if self.num_particles < 30 else many)
        points = torch.logspace(-exponent, 0.0, self.num_intervals, dtype=torch.float64)
        return F.pad(points, (1, 0))
