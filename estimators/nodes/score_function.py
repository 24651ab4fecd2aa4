"""The score function, with the baselines that do not bias it."""

import torch
from torch import Tensor, nn

from estimators.dice import magic_box
from estimators.nodes.base import Method, Sample

BASELINES = ("None", "batch_average", "moving_average")


class ScoreFunction(Method):
    """sum_i w_i (f(x_i) - b_i) grad log q(x_i), to any order (Williams 1992; Foerster et al. 2018).

    baseline_factory: "None"; "batch_average", the mean of the node's other samples (Kool et al. 2019; two samples or
    more); "moving_average" of the costs of the past, free of the bias of its start and read before the present ones
    enter it. A baseline b enters as (1 - magic_box(log q(x_i))) b, so that no derivative of any order is biased.

    Unbiased. Proof: tests/estimators/nodes/test_enumeration.py.
    """

    source = "Williams 1992; Kool et al. 2019"
    any_order = True

    def __init__(
        self, plate_name: str, n_samples: int = 1, baseline_factory: str | None = "moving_average", decay: float = 0.95
    ):
        super().__init__(plate_name, n_samples)
        baseline = "None" if baseline_factory is None else baseline_factory
        if baseline not in BASELINES:
            raise ValueError(
                f"ScoreFunction({plate_name!r}): baseline_factory = {baseline!r}, expected one of "
                + ", ".join(BASELINES)
            )
        if baseline == "batch_average" and n_samples < 2:
            raise ValueError(
                f"ScoreFunction({plate_name!r}): the baseline batch_average is the mean of a node's other samples; "
                f"give n_samples of at least 2, not {n_samples}"
            )
        if not 0 <= decay < 1:
            raise ValueError(f"ScoreFunction({plate_name!r}): decay = {decay}, expected a number in [0, 1)")
        self.baseline, self.decay = baseline, decay
        self.averages = MovingAverages(decay)

    def gradient(self, sample: Sample) -> Tensor:
        """Return magic_box(log q(x_i)), [n, *plates]."""
        return magic_box(sample.log_prob)

    def control_variate(self, sample: Sample, cost: Tensor) -> Tensor | None:
        """Return sum_i w_i (1 - magic_box(log q(x_i))) b_i, [*plates, m]."""
        if self.baseline == "None":
            return None
        if self.baseline == "batch_average":
            baseline = (cost.sum(0) - cost) / (len(cost) - 1)
        else:
            baseline = self.averages(cost, sample.key)
        box = magic_box(sample.log_prob).unsqueeze(-1)
        return (self.weigh(sample).unsqueeze(-1) * (1 - box) * baseline).sum(0)

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{super().extra_repr()}, baseline_factory={self.baseline!r}"


class MovingAverages(nn.Module):
    """Exponential moving averages of costs, without the bias of their start; 0 before the first."""

    def __init__(self, decay: float):
        super().__init__()
        self.decay = decay
        self._sums: dict[str, tuple[Tensor, float]] = {}  # of costs and of their weights, by key

    def forward(self, cost: Tensor, key: str) -> Tensor:
        """Return a key's average over the calls so far, a scalar; in training mode, then take these costs into it."""
        total, weight = self._sums.get(key, (cost.new_zeros(()), 0.0))
        mean = total / weight if weight else total
        if self.training:
            present = cost.detach().mean()
            self._sums[key] = torch.lerp(present, total.to(present), self.decay), self.decay * weight + 1 - self.decay
        return mean.to(cost)

    def get_extra_state(self) -> dict[str, tuple[Tensor, float]]:
        """Return what `state_dict` keeps."""
        return dict(self._sums)

    def set_extra_state(self, state: dict[str, tuple[Tensor, float]]) -> None:
        """Put back what `get_extra_state` returned."""
        self._sums = dict(state)
