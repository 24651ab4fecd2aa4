"""Pictures of a map: costs, paths, gradients; and animations of pictures."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image
from torch import Tensor

DPI = 100
GOLD = "#111111"


def draw_map(cost: Tensor, gold: Tensor, learnt: Tensor, marginals: Tensor, gradient: Tensor, step: int) -> bytes:
    """Return a PNG file: true costs, learnt costs, marginals of the path, gradient of the loss by costs.

    Each [height, width]; dots mark the gold path.
    """
    fig = Figure(figsize=(12.4, 3.3), layout="constrained", dpi=DPI)
    reach = max(gradient.abs().max().item(), 1e-12)
    panels = [
        ("true cost, cheapest path", cost, "viridis", None),
        (f"learnt cost, step {step:,}", learnt, "viridis", None),
        ("share of perturbed paths", marginals, "magma", (0, 1)),
        ("mean gradient of the Hamming loss\nby the costs", gradient, "RdBu_r", (-reach, reach)),
    ]
    for ax, (title, values, colours, limits) in zip(fig.subplots(1, len(panels)), panels, strict=True):
        image = _show(ax, values, gold, colours, limits)
        ax.set_title(title, fontsize=10)
        fig.colorbar(image, ax=ax, shrink=0.8)
    return _png(fig)


def draw_paths(cost: Tensor, paths: Tensor) -> list[bytes]:
    """Return a PNG file of the map for each of some paths [num, height, width], its cells marked."""
    frames = []
    for place, path in enumerate(paths, start=1):
        fig = Figure(figsize=(3.4, 3.6), layout="constrained", dpi=DPI)
        ax = fig.subplots()
        _show(ax, cost, path, "viridis", None)
        ax.set_title(f"path {place} under perturbation", fontsize=10)
        frames.append(_png(fig))
    return frames


def animation(frames: Sequence[bytes], milliseconds: int) -> bytes:
    """Return PNG files as a GIF file that repeats them, each for so long."""
    images = [Image.open(io.BytesIO(frame)).convert("P", palette=Image.Palette.ADAPTIVE) for frame in frames]
    content = io.BytesIO()
    images[0].save(content, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    return content.getvalue()


def _show(ax: Axes, values: Tensor, path: Tensor, colours: str, limits: tuple[float, float] | None) -> AxesImage:
    low, high = limits or (None, None)
    image = ax.imshow(values.detach().cpu().numpy(), cmap=colours, vmin=low, vmax=high)
    rows, columns = np.nonzero(path.cpu().numpy())
    ax.plot(columns, rows, "o", color=GOLD, markersize=4, markeredgecolor="white", markeredgewidth=0.6)
    ax.set_xticks([])
    ax.set_yticks([])
    return image


def _png(fig: Figure) -> bytes:
    content = io.BytesIO()
    fig.savefig(content, format="png")
    return content.getvalue()
