"""Omniglot (Lake et al. 2015), the characters of 50 alphabets, as Burda et al. 2016 published them in 28 x 28."""

from pathlib import Path

import numpy as np

from datasets.download import RemoteFile
from datasets.formats import read_matlab, upright
from datasets.images import PIXELS, GreyImages, Images, shuffled, split_off
from datasets.store import stored_images

URL = "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT"
NUM_TRAIN, NUM_TEST = 24_345, 8_070
NUM_VALID = 1_345  # of the 24,345


class Omniglot(GreyImages):
    """23,000 training and 1,345 validation characters, parted by one shuffle that no seed changes, and 8,070 for test.

    Drawn afresh for every batch, unless `binarization` says `threshold`. The published values of 0 to 1 are kept to a
    255th. No checksum of the file is known: its arrays are held to their shapes and values.
    """

    def __init__(self, binarization: str = "draw", seed: int = 0, url: str = URL, data_root: str = "data"):
        """Take the `binarization`, threshold or draw, the seed of what is drawn once, and where the data are."""
        super().__init__(
            stored_images("omniglot", [RemoteFile("chardata.mat", _read)], url, data_root), binarization, seed
        )


def _read(path: Path) -> dict[str, Images]:
    arrays = read_matlab(path, {"data": (PIXELS, NUM_TRAIN), "testdata": (PIXELS, NUM_TEST)})
    grey = {name: np.rint(255 * upright(columns.T)).astype(np.uint8) for name, columns in arrays.items()}
    train, valid = split_off(shuffled(grey["data"], "omniglot splits"), NUM_VALID)
    return {"train": train, "valid": valid, "test": grey["testdata"]}
