"""Maps to find a way on: smooth random hills, how they look, and the cheapest path over them."""

from math import pi

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from datasets.base import SPLITS, FiniteDataset, check_seed, generator
from models.solvers import shortest_path

COLOURS = 3  # channels of what is seen
SMOOTHNESS = 1.2  # cells
COSTS = (0.5, 10.0)  # of the lowest and the highest cell


class GridMaps(FiniteDataset):
    """`num_points` training maps and a quarter as many each for validation and test: x [N, 5, side, side].

    The height u in [0, 1] of a cell is the rank, among those of its map, of smoothed normal noise. Three channels are
    what is seen of it, (u, sin(pi u), 1 - u) and normal noise of standard deviation `noise`. Then come the cost,
    0.5 + 9.5 u^2, which is not to be seen, and the cheapest path by it from the top left to the bottom right.
    """

    def __init__(self, side: int = 12, neighbours: int = 8, noise: float = 0.2, num_points: int = 400, seed: int = 0):
        if side < 2 or num_points < 4 or noise < 0:
            raise ValueError(
                f"side={side}, num_points={num_points}, noise={noise}: expected at least 2, at least 4 and no "
                "noise below 0"
            )
        check_seed(seed)
        sizes = {split: num_points if split == "train" else num_points // 4 for split in SPLITS}
        super().__init__(
            {split: _draw(generator(f"{split} maps", seed), n, side, neighbours, noise) for split, n in sizes.items()}
        )


def _draw(draws: np.random.Generator, num: int, side: int, neighbours: int, noise: float) -> Tensor:
    """Return maps [num, 5, side, side]."""
    smooth = gaussian_filter(draws.standard_normal((num, side, side)), (0, SMOOTHNESS, SMOOTHNESS)).reshape(num, -1)
    height = (smooth.argsort(1).argsort(1) / (side * side - 1)).reshape(num, 1, side, side)
    seen = np.concatenate([height, np.sin(pi * height), 1 - height], 1)
    seen += noise * draws.standard_normal(seen.shape)
    cost = COSTS[0] + (COSTS[1] - COSTS[0]) * height**2
    x = torch.from_numpy(np.concatenate([seen, cost], 1)).float()
    return torch.cat([x, shortest_path(-x[:, COLOURS], neighbours).unsqueeze(1)], 1)
