"""Averages of diagnostics over the steps of a training loop."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class Averages:
    """Weighted means of named scalars, one number a name, kept on the device where the scalars are.

    >>> averages = Averages()
    >>> averages.update({"loss/L_k": torch.tensor(-3.0)})
    >>> averages.update({"loss/L_k": -1.0, "loss/ess": 4.0}, weight=3)
    >>> averages.means()
    {'loss/L_k': -1.5, 'loss/ess': 4.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, float] = {}

    def update(self, diagnostics: Mapping[str, Tensor | float], weight: float = 1.0) -> None:
        """Add scalars by name, those of a last and smaller batch with a `weight` of their own.

        Waits for no device. A name may be missing from some updates: its mean is over the others. Raises ValueError
        for what is no scalar, naming it, and for a weight that is not positive; then nothing is added.
        """
        if not weight > 0:
            raise ValueError(f"weight = {weight}, expected a positive number")
        values = {name: _double(name, value) for name, value in diagnostics.items()}
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + weight * value
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def means(self) -> dict[str, float]:
        """Return the mean of each name since the last reset, in the order in which they came."""
        return {name: float(total) / self._weights[name] for name, total in self._sums.items()}

    def log(self, writer: SummaryWriter, step: int, prefix: str = "") -> None:
        """Write the means to TensorBoard as `name`, or `prefix/name` where there is a prefix."""
        for name, mean in self.means().items():
            writer.add_scalar(f"{prefix}/{name}" if prefix else name, mean, step)

    def reset(self) -> None:
        """Forget all that was added."""
        self._sums.clear()
        self._weights.clear()


def _double(name: str, value: Tensor | float) -> Tensor | float:
    """Return a scalar in float64, in which a long sum loses nothing, without its graph."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.numel() != 1:
        raise ValueError(f"{name} has the shape {list(value.shape)}, expected a scalar; give its mean")
    return value.detach().reshape(()).to(torch.float64)
