"""What a data set is to the tasks, and the finite sets that are shuffled once an epoch."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from seeding import derive_seed

SPLITS = ("train", "valid", "test")


class Dataset(ABC):
    """Fixed evaluation points, and training batches that (seed, step) alone decide: resuming needs no state."""

    @abstractmethod
    def points(self, split: str) -> Tensor:
        """Return the fixed points [N, ...] of "train", "valid" or "test". Raises ValueError for another split."""

    @abstractmethod
    def batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Return the training batch [batch_size, ...] of a step, the same whenever and in whatever order it is asked.

        Raises ValueError for a batch_size that is not positive or that the data set cannot fill.
        """


class FiniteDataset(Dataset):
    """Splits held in memory. Training shuffles them once an epoch, by (seed, epoch).

    Every batch is full: what does not fill a last one is left out of that epoch, other points each time.
    """

    def __init__(self, splits: dict[str, Tensor]):
        """Take the points of each split, [N, ...]."""
        self._splits = splits
        self._epoch: tuple[tuple[int, int], Tensor] | None = None

    def points(self, split: str) -> Tensor:
        """Return the points [N, ...] of a split."""
        check_split(split)
        return self._splits[split]

    def batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Return the batch of a step; ValueError where batch_size exceeds the training points."""
        check_batch(step, batch_size, seed)
        train = self._splits["train"]
        if batch_size > len(train):
            raise ValueError(
                f"batch_size {batch_size} exceeds the {len(train)} training points; give at most that many"
            )
        epoch, index = divmod(step, len(train) // batch_size)
        order = self._order(seed, epoch)
        return train[order[index * batch_size : (index + 1) * batch_size]]

    def _order(self, seed: int, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            order = generator("epoch order", seed, epoch).permutation(len(self._splits["train"]))
            self._epoch = ((seed, epoch), torch.from_numpy(order))
        return self._epoch[1]


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """Return the random generator that belongs to a purpose and these numbers."""
    return np.random.default_rng(derive_seed(purpose, *map(int, numbers)))


def check_split(split: str) -> None:
    """Raise ValueError for a split that is not one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")


def check_seed(seed: int) -> None:
    """Raise ValueError for a negative seed."""
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")


def check_batch(step: int, batch_size: int, seed: int) -> None:
    """Raise ValueError for a step, batch size or seed that no batch has."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if step < 0:
        raise ValueError(f"step must not be negative, not {step}")
    check_seed(seed)
