"""The silhouettes of the objects of Caltech 101 (Marlin et al. 2010), in 28 x 28."""

from pathlib import Path

import numpy as np

from datasets.download import RemoteFile
from datasets.formats import read_matlab, upright
from datasets.images import PIXELS, BinaryImages, Images
from datasets.store import stored_images

URL = "https://people.cs.umass.edu/~marlin/data"
ARRAYS = {"train": "train_data", "valid": "val_data", "test": "test_data"}
SIZES = {"train": 4_100, "valid": 2_264, "test": 2_307}


class CaltechSilhouettes(BinaryImages):
    """4,100 training, 2,264 validation and 2,307 test silhouettes, their pixels 0 and 1 as in the published file.

    No checksum of the file is known: its arrays are held to their shapes and values.
    """

    def __init__(self, url: str = URL, data_root: str = "data"):
        """Take where the file is published, and the folder that holds all data."""
        files = [RemoteFile("caltech101_silhouettes_28_split1.mat", _read)]
        super().__init__(stored_images("caltech_silhouettes", files, url, data_root))


def _read(path: Path) -> dict[str, Images]:
    arrays = read_matlab(path, {ARRAYS[split]: (size, PIXELS) for split, size in SIZES.items()})
    if any(((array != 0) & (array != 1)).any() for array in arrays.values()):
        raise ValueError("pixels that are 0 or 1")
    return {split: upright(arrays[name]).astype(np.uint8) for split, name in ARRAYS.items()}
