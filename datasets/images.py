"""What the sets of images share: pixels kept as bytes, grey ones made binary, and the splits of one set in three."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets.base import Dataset, FiniteDataset, check_seed
from errors import near
from seeding import derive_seed

SIDE = 28
PIXELS = SIDE * SIDE
BINARIZATIONS = ("threshold", "draw", "none")
THRESHOLD = 128  # the first grey level of 0..255 above one half

CHUNK = 512  # images drawn at once

Images = NDArray[np.uint8]


class BinaryImages(FiniteDataset):
    """Images x [N, 1, 28, 28] of zeros and ones, float32 as they are given and bytes as they are kept."""

    def __init__(self, splits: Mapping[str, Images]):
        """Take the pixels of each split, [N, 784] or [N, 28, 28], each 0 or 1."""
        super().__init__({split: _as_tensor(images) for split, images in splits.items()})


class GreyImages(FiniteDataset):
    """Grey images, given as binary x [N, 1, 28, 28], or as they are.

    `binarization` says how a grey level g of 0..255 becomes a pixel: `threshold`, 1 where g/255 is above one half; or
    `draw`, 1 with probability g/255, drawn afresh for every training batch from (seed, step), and once for the fixed
    points, from the data set's own `seed` (Salakhutdinov and Murray 2008). The draws have 16 bits: a probability is off
    by less than 2^-16, that of white and black by nothing. With `none` a pixel is g/255 itself.
    """

    def __init__(self, splits: Mapping[str, Images], binarization: str, seed: int):
        """Take the grey levels of each split, [N, 784] or [N, 28, 28]."""
        check_seed(seed)
        if binarization not in BINARIZATIONS:
            raise ValueError(f"unknown binarization {binarization!r}{near(binarization, BINARIZATIONS)}")
        grey = {split: _as_tensor(images) for split, images in splits.items()}
        self._seed = seed
        self._grey = grey["train"] if binarization == "draw" else None
        self._scale = 255.0 if binarization == "none" else 1.0
        if binarization == "none":
            super().__init__(grey)
        elif binarization == "draw":
            super().__init__({split: _draw_points(levels, split, seed) for split, levels in grey.items()})
        else:
            super().__init__({split: (levels >= THRESHOLD).byte() for split, levels in grey.items()})

    def to(self, device: torch.device | str) -> Dataset:
        """Move the images, and the order in which training takes them, to a device; return the data set."""
        if self._grey is not None:
            self._grey = self._grey.to(device)
        return super().to(device)

    def points(self, split: str) -> Tensor:
        """Return the points [N, 1, 28, 28] of a split."""
        return super().points(split) / self._scale

    def _take(self, rows: Tensor, step: int, seed: int) -> Tensor:
        if self._grey is None:
            return super()._take(rows, step, seed) / self._scale
        return _draw(self._grey.index_select(0, rows), _bits("batch", self._seed, seed, step)).float()


def split_off(images: Images, num_last: int) -> tuple[Images, Images]:
    """Return images [N, ...] in two parts, the second of which has the last `num_last`."""
    return images[:-num_last], images[-num_last:]


def shuffled(images: Images, purpose: str) -> Images:
    """Return the images in an order that belongs to a purpose and to nothing else, whatever the release of NumPy."""
    return images[np.argsort(_bits(purpose).random_raw(len(images)))]


def _as_tensor(images: Images) -> Tensor:
    # A tensor needs memory that can be written, which what was read from a file may not have.
    return torch.from_numpy(np.require(images, requirements=("C", "W"))).view(-1, 1, SIDE, SIDE)


def _draw_points(levels: Tensor, split: str, seed: int) -> Tensor:
    """Return the fixed points of a split as bytes, drawn chunk by chunk, which is faster and needs less memory."""
    bits = _bits("points", split, seed)
    return torch.cat([_draw(chunk, bits).byte() for chunk in levels.split(CHUNK)])


def _draw(levels: Tensor, bits: np.random.PCG64) -> Tensor:
    """Return booleans, true with probability g/255, from bits that the CPU makes for every device.

    With u uniform on 0..2^16 - 1, u/2^16 < g/255 is u <= 257 g where g > 0, and never where g = 0. That is what
    max(u, 1) <= 257 g says, in whole numbers, which are the same on every device.
    """
    words: NDArray[np.uint64] = bits.random_raw(levels.numel() // 4)
    uniform = np.maximum(words.view(np.uint16), 1).astype(np.int32)
    return torch.from_numpy(uniform).to(levels.device).view(levels.shape) <= levels.int() * 257


def _bits(*stream: int | str) -> np.random.PCG64:
    """Return the source of 64-bit words of a stream; NumPy promises that it stays the same from release to release."""
    return np.random.PCG64(derive_seed(*stream))
