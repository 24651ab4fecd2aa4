"""The points of the Gaussian toy, and the optimum that belongs to them (Rainforth et al. 2018)."""

import torch

from datasets.base import SPLITS, FiniteDataset, check_seed, generator


class GaussianToyData(FiniteDataset):
    """`num_points` points x [N, dim] a split, from z ~ N(m, I) and x|z ~ N(z, I), with one m ~ N(0, I) for all of them.

    The model's optimum belongs to the training points, and with them to `seed`: `mu` [dim] is their mean, and
    `A` [dim, dim] = I/2, `b` [dim] = mu/2 put the mean of q at the exact posterior's.
    """

    def __init__(self, dim: int = 20, num_points: int = 1024, seed: int = 0):
        if dim < 1 or num_points < 1:
            raise ValueError(f"dim and num_points must be at least 1, not {dim} and {num_points}")
        check_seed(seed)
        draws = generator("gaussian toy", seed)
        center = draws.standard_normal(dim)
        splits = {}
        for split in SPLITS:
            x = center + draws.standard_normal((2, num_points, dim)).sum(0)
            splits[split] = torch.from_numpy(x).float()
        super().__init__(splits)
        self.mu = splits["train"].mean(0)
        self.A = 0.5 * torch.eye(dim)
        self.b = 0.5 * self.mu
