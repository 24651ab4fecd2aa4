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

    def to(self, device: torch.device | str) -> "Dataset":  # noqa: ARG002 (for those that hold points)
        """Move what the data set holds to a device, where it answers from then on; return the data set.

        Its numbers are the same on every device. One that draws on the CPU, as it is unless a data set says otherwise,
        stays there: who asks moves what comes.
        """
        return self

    def batches_per_epoch(self, batch_size: int) -> int:  # noqa: ARG002 (for finite sets)
        """Return how many batches an epoch has; ValueError for a stream, which has no epochs."""
        raise ValueError(f"{type(self).__name__} is a stream without end: epochs need a finite data set; give steps")


class FiniteDataset(Dataset):
    """Splits held in memory. Training shuffles them once an epoch, by (seed, epoch).

    Every batch is full: what does not fill a last one is left out of that epoch, other points each time. Points that
    are kept as bytes are given as float32.
    """

    def __init__(self, splits: dict[str, Tensor]):
        """Take the points of each split, [N, ...]."""
        self._splits = splits
        self._epoch: tuple[tuple[int, int], Tensor] | None = None

    def points(self, split: str) -> Tensor:
        """Return the points [N, ...] of a split."""
        check_split(split)
        return as_given(self._splits[split])

    def to(self, device: torch.device | str) -> "Dataset":
        """Move the points, and the order in which training takes them, to a device; return the data set."""
        self._splits = {split: points.to(device) for split, points in self._splits.items()}
        self._epoch = None
        return self

    def batches_per_epoch(self, batch_size: int) -> int:
        """Return how many full batches the training points fill; ValueError where they do not fill one."""
        num_points = len(self._splits["train"])
        if batch_size < 1 or batch_size > num_points:
            check_batch_size(batch_size)
            raise ValueError(
                f"batch_size {batch_size} exceeds the {num_points} training points; give at most that many"
            )
        return num_points // batch_size

    def batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Return the batch of a step; ValueError where batch_size exceeds the training points."""
        check_batch(step, batch_size, seed)
        epoch, index = divmod(step, self.batches_per_epoch(batch_size))
        order = self._order(seed, epoch)
        return self._take(order[index * batch_size : (index + 1) * batch_size], step, seed)

    def _take(self, rows: Tensor, step: int, seed: int) -> Tensor:  # noqa: ARG002 (for what is drawn afresh)
        """Return the training points of these rows as the batch of a step has them."""
        return as_given(self._splits["train"].index_select(0, rows))

    def _order(self, seed: int, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            train = self._splits["train"]
            order = generator("epoch order", seed, epoch).permutation(len(train))
            self._epoch = ((seed, epoch), torch.from_numpy(order).to(train.device))
        return self._epoch[1]


def as_given(points: Tensor) -> Tensor:
    """Return points as a data set gives them: bytes as float32, others as they are."""
    return points.float() if points.dtype == torch.uint8 else points


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


def check_batch_size(batch_size: int) -> None:
    """Raise ValueError for a batch size that is not positive."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")


def check_batch(step: int, batch_size: int, seed: int) -> None:
    """Raise ValueError for a step, batch size or seed that no batch has."""
    check_batch_size(batch_size)
    if step < 0:
        raise ValueError(f"step must not be negative, not {step}")
    check_seed(seed)
