"""What a model of images looks like: samples from its prior, and observations beside their reconstructions."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.particles import draw_particles
from models.template import Template

ROWS = COLUMNS = 8
MARGIN = 2  # pixels between images


def is_image(x: Tensor) -> bool:
    """Return whether x is a batch of images, [batch, 1, height, width] or with three channels."""
    return x.dim() == 4 and x.shape[1] in (1, 3)


@torch.no_grad()
def draw_pictures(model: Template, x: Tensor, seed: int) -> dict[str, np.ndarray]:
    """Return the grids `prior`, means of p(x|z) with z from the prior, and `reconstruction`: one or none, or both.

    Rows of `reconstruction` alternate between observations, of x [batch, channels, height, width], and the means of
    p(x|z) with z drawn from q(z|x). A grid that the model has no method or no mean for is left out. Same seed, same
    pictures; the global random state and the model's training flag are left as they were.
    """
    training = model.training
    model.eval()
    grids: dict[str, np.ndarray] = {}
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        if (prior := _prior_means(model, x)) is not None:
            grids["prior"] = grid(prior)
        x = x[: ROWS // 2 * COLUMNS]
        if (means := _reconstructions(model, x)) is not None:
            pairs = [part for rows in zip(x.split(COLUMNS), means.split(COLUMNS), strict=True) for part in rows]
            grids["reconstruction"] = grid(torch.cat(pairs))
    model.train(training)
    return grids


def grid(images: Tensor) -> np.ndarray:
    """Return images [N, channels, height, width] of values in [0, 1] as one, uint8 [H, W, channels], 8 to a row."""
    num, channels, height, width = images.shape
    rows = -(-num // COLUMNS)
    canvas = np.full(
        (rows * (height + MARGIN) + MARGIN, COLUMNS * (width + MARGIN) + MARGIN, channels), 128, dtype=np.uint8
    )
    pixels = (images.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    for i, image in enumerate(pixels):
        row, column = divmod(i, COLUMNS)
        top, left = MARGIN + row * (height + MARGIN), MARGIN + column * (width + MARGIN)
        canvas[top : top + height, left : left + width] = image
    return canvas


def png(picture: np.ndarray) -> bytes:
    """Return a picture, uint8 [height, width, 1 or 3], as the content of a PNG file."""
    content = io.BytesIO()
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(content, "PNG")
    return content.getvalue()


def _prior_means(model: Template, x: Tensor) -> Tensor | None:
    try:
        return _as_images(model.sample_from_prior(ROWS * COLUMNS)["px"].mean, x)
    except (NotImplementedError, AttributeError):
        return None


def _reconstructions(model: nn.Module, x: Tensor) -> Tensor | None:
    try:
        return _as_images(draw_particles(model, x, mc=1, iw=1).output["px"].mean, x)
    except (NotImplementedError, AttributeError):
        return None


def _as_images(means: Tensor, x: Tensor) -> Tensor | None:
    """Return means of any leading shape as images of x's shape; None where their size is another."""
    size = x[0].numel()
    return None if means.numel() % size else means.reshape(-1, *x.shape[1:])
