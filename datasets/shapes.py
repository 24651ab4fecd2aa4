"""Squares, triangles and discs, drawn on request: binary images that need neither a file nor a network."""

import numpy as np
from numpy.typing import NDArray

from datasets.base import check_seed, generator
from datasets.images import SIDE, BinaryImages, Images, split_off

NUM_SHAPES = 2  # in an image
CENTRES = (7.0, 20.0)  # pixels
RADII = (3.0, 7.0)  # pixels
ROUND = 1024  # images drawn at once


class Shapes(BinaryImages):
    """`num_points` training images, and a tenth as many each for validation and test, fixed by `seed`.

    An image is the union of two shapes. Each is a square, a disc or an upright triangle with equal chances; its centre
    (c_x, c_y) is uniform on [7, 20]^2 and its radius r, half its height, on [3, 7]. A pixel (x, y) is 1 where it lies
    in a shape: where |x - c_x| <= w(y - c_y), with half the width w(d) at a height |d| <= r being r for a square,
    (r^2 - d^2)^(1/2) for a disc and (d + r)/2 for a triangle. An image that came before is left out: no two are equal,
    be it in one split or in two.
    """

    def __init__(self, num_points: int = 10_000, seed: int = 0):
        """Raise ValueError for fewer than ten points, which leave none to the other splits."""
        if num_points < 10:
            raise ValueError(f"num_points must be at least 10, not {num_points}")
        check_seed(seed)
        num_held_out = num_points // 10
        images = _distinct(generator("shapes", seed), num_points + 2 * num_held_out)
        rest, test = split_off(images, num_held_out)
        train, valid = split_off(rest, num_held_out)
        super().__init__({"train": train, "valid": valid, "test": test})


def _distinct(draws: np.random.Generator, num_images: int) -> Images:
    """Return images [N, 28, 28] of which no two are equal."""
    found: dict[bytes, Images] = {}
    while len(found) < num_images:
        for image in _draw(draws, ROUND):
            found.setdefault(image.tobytes(), image)
    return np.stack(list(found.values())[:num_images])


def _draw(draws: np.random.Generator, num_points: int) -> Images:
    """Return images [N, 28, 28]."""
    size = (num_points, NUM_SHAPES, 1)
    kind = draws.integers(3, size=size)
    center_x, center_y = (draws.uniform(*CENTRES, size=size) for _ in range(2))
    radius = draws.uniform(*RADII, size=size)
    height = np.arange(SIDE) - center_y
    widths: list[NDArray[np.float64]] = [
        np.broadcast_to(radius, height.shape),
        np.sqrt(np.maximum(radius**2 - height**2, 0)),
        (height + radius) / 2,
    ]
    width = np.where(np.abs(height) <= radius, np.choose(kind, widths), -1.0)
    distance = np.abs(np.arange(SIDE) - center_x)
    images: Images = np.any(distance[..., None, :] <= width[..., :, None], axis=1).astype(np.uint8)
    return images
