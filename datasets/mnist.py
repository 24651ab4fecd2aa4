"""The grey digits of MNIST (LeCun et al. 1998), made binary at a threshold or drawn afresh."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from datasets.download import RemoteFile
from datasets.formats import read_idx
from datasets.images import GreyImages, Images, split_off
from datasets.store import stored_images

URL = "https://ossci-datasets.s3.amazonaws.com/mnist"
NUM_TRAIN, NUM_TEST = 60_000, 10_000
NUM_VALID = 10_000  # the last of the 60,000
MD5 = {"train": "f68b3c2dcbeaaa9fbdd348bbdeb94873", "t10k": "9fb629c4189551a2d022fa330f9573f3"}


class MNIST(GreyImages):
    """50,000 training and 10,000 validation digits, which are the last of the published 60,000, and 10,000 for test."""

    def __init__(self, binarization: str = "threshold", seed: int = 0, url: str = URL, data_root: str = "data"):
        """Take the `binarization`, threshold or draw, the seed of what is drawn once, and where the data are."""
        super().__init__(stored_images("mnist", idx_files(MD5), url, data_root), binarization, seed)


def idx_files(md5: Mapping[str, str]) -> list[RemoteFile]:
    """Return the published files of MNIST, or of a set in its form: those of its images, with their checksums."""
    return [
        RemoteFile(f"{part}-images-idx3-ubyte.gz", read, f"md5:{md5[part]}")
        for part, read in (("train", partial(_read_train, NUM_TRAIN)), ("t10k", partial(_read_test, NUM_TEST)))
    ]


def _read_train(num_images: int, path: Path) -> dict[str, Images]:
    train, valid = split_off(read_idx(path, num_images), NUM_VALID)
    return {"train": train, "valid": valid}


def _read_test(num_images: int, path: Path) -> dict[str, Images]:
    return {"test": read_idx(path, num_images)}
