"""The solvers: the best of all solutions, listed."""

from math import comb

import pytest
import torch

from models.solvers import LEAST_COST, STEPS, shortest_path, subsets, top_k


def simple_paths(shape, neighbours):
    """Every path without a repeated cell from corner to corner, as ones on the map."""
    (height, width), found = shape, []

    def go(cell, path):
        if cell == (height - 1, width - 1):
            y = torch.zeros(height, width, dtype=torch.float64)
            y[tuple(zip(*path, strict=True))] = 1
            found.append(y)
            return
        for down, right in STEPS[neighbours]:
            to = (cell[0] + down, cell[1] + right)
            if 0 <= to[0] < height and 0 <= to[1] < width and to not in path:
                go(to, [*path, to])

    go((0, 0), [(0, 0)])
    return torch.stack(found)


@pytest.mark.parametrize("neighbours", [4, 8])
@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (1, 5), (1, 1)])
def test_the_path_is_the_best_of_all(neighbours, shape):
    theta = -torch.rand(40, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.01
    y = shortest_path(theta, neighbours)
    paths = simple_paths(shape, neighbours)
    best = torch.einsum("bhw,phw->bp", theta, paths).max(1)
    assert torch.equal(y, paths[best.indices])


def test_costs_below_zero_count_as_nearly_nothing():
    theta = torch.full((1, 3, 3), 5.0)
    theta[0, 1, 1] = -1.0
    y = shortest_path(theta, 4)
    assert y.sum() == 5
    assert y[0, 1, 1] == 0
    assert 0 < LEAST_COST * 9 < 1e-3


def test_dtype_and_strides_of_the_path():
    theta = -torch.rand(5, 4, 3, dtype=torch.bfloat16)
    y = shortest_path(theta.transpose(1, 2))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, shortest_path(theta.transpose(1, 2).contiguous()))


@pytest.mark.parametrize(
    ("theta", "neighbours", "message"),
    [
        (torch.ones(3, 3), 8, r"scores \[3, 3\].*expected \[batch, height, width\]"),
        (torch.ones(1, 3, 3), 6, "neighbours=6, expected .* and 4 or 8"),
        (torch.full((1, 3, 3), torch.nan), 8, "not all finite"),
    ],
)
def test_what_has_no_path_is_refused(theta, neighbours, message):
    with pytest.raises(ValueError, match=message):
        shortest_path(theta, neighbours)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_is_the_best_subset(k):
    theta = torch.randn(30, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    all_subsets = subsets(5, k)
    assert len(all_subsets) == comb(5, k)
    assert (all_subsets.sum(1) == k).all()
    assert len(all_subsets.unique(dim=0)) == comb(5, k)
    assert torch.equal(top_k(theta, k), all_subsets[(theta @ all_subsets.t()).argmax(1)])


@pytest.mark.parametrize("k", [0, 6])
def test_a_k_beyond_n_is_refused(k):
    with pytest.raises(ValueError, match=rf"k={k} for scores \[2, 5\], expected 1 to 5"):
        top_k(torch.zeros(2, 5), k)
    with pytest.raises(ValueError, match=f"k={k} of n=5"):
        subsets(5, k)
