"""Draws from the Gaussian mixture of Le et al. 2019, as many as training asks for."""

import numpy as np
import torch
from torch import Tensor

from datasets.base import SPLITS, Dataset, check_batch, check_seed, check_split, generator

SPACING = 10.0
STD = 5.0
BLOCK_POINTS = 2**15


class GaussianMixtureData(Dataset):
    """x [N, 1] with z ~ p*(z) proportional to 5 + z for z = 0..C-1 (C = 20: (5 + z)/290) and x|z ~ N(10 z, 5^2).

    Training batches are fresh draws, evaluation points the `num_points` of each split that `seed` fixes. `true_prior`
    [C] is p*.
    """

    def __init__(self, num_components: int = 20, num_points: int = 10_000, seed: int = 0):
        if num_components < 2 or num_points < 1:
            raise ValueError(
                f"num_components must be at least 2 and num_points 1, not {num_components} and {num_points}"
            )
        check_seed(seed)
        weights = 5.0 + np.arange(num_components)
        self.true_prior = torch.from_numpy(weights / weights.sum())
        self._cumulative = weights.cumsum() / weights.sum()
        self._seed = seed
        self._points = {split: self._draw(generator(f"{split} points", seed), num_points) for split in SPLITS}
        self._block: tuple[tuple[int, int, int], Tensor] | None = None

    def points(self, split: str) -> Tensor:
        """Return the fixed points [num_points, 1] of a split."""
        check_split(split)
        return self._points[split]

    def batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Return the fresh draws [batch_size, 1] of a step, cut from a block that serves many steps in a row."""
        check_batch(step, batch_size, seed)
        steps = max(1, BLOCK_POINTS // batch_size)
        block, index = divmod(step, steps)
        key = (batch_size, seed, block)
        if self._block is None or self._block[0] != key:
            draws = self._draw(generator("training stream", self._seed, seed, block), steps * batch_size)
            self._block = (key, draws.view(steps, batch_size, 1))
        return self._block[1][index]

    def _draw(self, generator: np.random.Generator, num_points: int) -> Tensor:
        z = np.searchsorted(self._cumulative, generator.random(num_points), side="right")
        x = SPACING * z + STD * generator.standard_normal(num_points)
        return torch.from_numpy(x).float().unsqueeze(-1)
