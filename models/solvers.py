"""Solvers of discrete problems, as `estimators.imle` takes them: argmax_y <theta, y> for scores theta [batch, ...].

Proof: tests/models/test_solvers.py.
"""

from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

LEAST_COST = 1e-6  # of a cell: where costs were negative, a path would gain by every cell that it visits
_STRAIGHT, _DIAGONAL = ((-1, 0), (0, -1), (0, 1), (1, 0)), ((-1, -1), (-1, 1), (1, -1), (1, 1))
STEPS = {4: _STRAIGHT, 8: (*_STRAIGHT, *_DIAGONAL)}  # to the neighbours of a cell


def top_k(theta: Tensor, k: int) -> Tensor:
    """Return ones at the k largest scores of theta [..., n], zeros elsewhere: the best of all k-subsets.

    Raises ValueError for a k that no subset of n has.
    """
    if not 1 <= k <= theta.shape[-1]:
        raise ValueError(f"top_k was given k={k} for scores {list(theta.shape)}, expected 1 to {theta.shape[-1]}")
    return torch.zeros_like(theta).scatter(-1, theta.topk(k, -1).indices, 1.0)


def subsets(n: int, k: int) -> Tensor:
    """Return all k-subsets of n, a row of zeros and ones each: [n! / (k! (n - k)!), n], float64."""
    if not 1 <= k <= n:
        raise ValueError(f"subsets of k={k} of n={n}, expected k from 1 to {n}")
    rows = torch.tensor(list(combinations(range(n), k)))
    return torch.zeros(len(rows), n, dtype=torch.float64).scatter(1, rows, 1.0)


def shortest_path(theta: Tensor, neighbours: int = 8) -> Tensor:
    """Return the cheapest path from the top left to the bottom right cell of each map, ones at its cells, by Dijkstra.

    theta [batch, height, width] are minus the costs of the cells; a path costs what its cells do, both ends included.
    Costs below LEAST_COST count as that. neighbours: 4, or 8 with diagonal steps. One call of scipy serves the batch,
    as one graph whose parts are the maps. Raises ValueError for another shape, for other neighbours, and for scores
    that are not finite.
    """
    if theta.dim() != 3 or neighbours not in STEPS:
        raise ValueError(
            f"shortest_path was given scores {list(theta.shape)} and neighbours={neighbours}, expected "
            f"[batch, height, width] and {' or '.join(map(str, STEPS))}"
        )
    if not theta.isfinite().all():
        raise ValueError(f"shortest_path was given scores {list(theta.shape)} that are not all finite")
    costs = (-theta.detach()).cpu().double().clamp(min=LEAST_COST).numpy()
    batch, height, width = costs.shape
    size = height * width
    starts, targets = _edges(height, width, neighbours)
    # An edge costs what the cell does that it leads to, so that the first cell, on all paths, is left out.
    weights = costs.reshape(batch, size)[:, targets].ravel()
    columns = (np.arange(batch)[:, None] * size + targets).ravel()
    rows = np.concatenate([[0], np.cumsum(np.tile(np.bincount(starts, minlength=size), batch))])
    graph = csr_array((weights, columns, rows), shape=(batch * size, batch * size))
    first = np.arange(batch) * size
    _, before, _ = dijkstra(graph, indices=first, min_only=True, return_predecessors=True)
    visited = np.zeros(batch * size)
    cells = first + size - 1
    while len(cells):  # one step back along all paths
        visited[cells] = 1
        cells = before[cells[before[cells] >= 0]]
    return torch.from_numpy(visited.reshape(costs.shape)).to(theta)


@lru_cache
def _edges(height: int, width: int, neighbours: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the cells that the edges of a map leave, in order, and those that they lead to."""
    row, column = np.divmod(np.arange(height * width), width)
    steps = np.array(STEPS[neighbours])
    to_row, to_column = row[:, None] + steps[:, 0], column[:, None] + steps[:, 1]
    inside = (to_row >= 0) & (to_row < height) & (to_column >= 0) & (to_column < width)
    starts = np.broadcast_to(np.arange(height * width)[:, None], inside.shape)
    return starts[inside], (to_row * width + to_column)[inside]
