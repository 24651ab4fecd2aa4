"""The statically binarized MNIST of Salakhutdinov and Murray 2008, as Larochelle published it."""

from functools import partial
from pathlib import Path

import numpy as np

from datasets.download import RemoteFile
from datasets.images import PIXELS, BinaryImages, Images
from datasets.store import stored_images

URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"
SIZES = {"train": 50_000, "valid": 10_000, "test": 10_000}
SHA256 = {
    "train": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    "valid": "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    "test": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}


class BinarizedMNIST(BinaryImages):
    """50,000 training, 10,000 validation and 10,000 test digits, whose pixels were drawn once and for all."""

    def __init__(self, url: str = URL, data_root: str = "data"):
        """Take where the three files are published, and the folder that holds all data."""
        super().__init__(stored_images("binarized_mnist", files(), url, data_root))


def files() -> list[RemoteFile]:
    """Return the published files: a line an image, a digit and a blank or line end a pixel."""
    return [
        RemoteFile(f"binarized_mnist_{split}.amat", partial(_read, split, SIZES[split]), f"sha256:{SHA256[split]}")
        for split in SIZES
    ]


def _read(split: str, num_images: int, path: Path) -> dict[str, Images]:
    text = np.fromfile(path, dtype=np.uint8)
    if text.size != num_images * 2 * PIXELS:
        raise ValueError(f"{num_images:,} lines of {PIXELS} digits")
    images = text.reshape(num_images, 2 * PIXELS)[:, ::2] - ord("0")
    if images.max() > 1:  # what lies below the digit 0 has wrapped around
        raise ValueError("digits that are 0 or 1")
    return {split: images}
