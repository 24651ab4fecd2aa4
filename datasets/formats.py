"""The formats that images are published in: IDX and MATLAB. What is not the file expected is a ValueError."""

import gzip
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scipy.io
from numpy.typing import NDArray

from datasets.images import PIXELS, SIDE, Images

IDX_BYTES_3D = 0x803  # the first four bytes: unsigned bytes, in three dimensions
IDX_HEADER = struct.Struct(">4I")


def read_idx(path: Path, num_images: int) -> Images:
    """Return the grey levels [N, 784] of a compressed IDX file; ValueError unless it has `num_images` of 28 x 28."""
    expected = f"a gzip of {num_images:,} images of {SIDE} x {SIDE} bytes in IDX"
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(expected) from error
    size = IDX_HEADER.size + num_images * PIXELS
    if len(content) != size or IDX_HEADER.unpack_from(content) != (IDX_BYTES_3D, num_images, SIDE, SIDE):
        raise ValueError(expected)
    return np.frombuffer(content, dtype=np.uint8, offset=IDX_HEADER.size).reshape(num_images, PIXELS)


def read_matlab(path: Path, shapes: Mapping[str, tuple[int, int]]) -> dict[str, NDArray[np.float64]]:
    """Return arrays of a MATLAB file by name; ValueError unless each has its shape, and values from 0 to 1."""
    try:
        content = scipy.io.loadmat(path, variable_names=list(shapes))
    except Exception as error:  # what is no such file raises almost anything
        raise ValueError(f"a MATLAB file with {', '.join(shapes)}") from error
    arrays = {}
    for name, shape in shapes.items():
        array = content.get(name)
        # NaN fails both comparisons.
        if array is None or array.shape != shape or not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"a MATLAB file with {name} of shape {shape[0]} x {shape[1]} and values from 0 to 1")
        arrays[name] = array.astype(np.float64)
    return arrays


def upright(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return images [N, 784] that are stored column by column, as MATLAB stores them, row by row."""
    return columns.reshape(-1, SIDE, SIDE).transpose(0, 2, 1).reshape(-1, PIXELS)
