"""Dream: draw (z, x) from the model's own joint, and ask how likely q finds that z for that x."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.particles import draw_particles, layers_of, log_prob_of
from models.template import Template


def log_q_of_dreams(model: nn.Module, num: int, like: Tensor) -> Tensor:
    """Draw `num` pairs z ~ p(z), x ~ p(x|z) and return log q(z|x), [num]: with q's gradient, the pairs being constants.

    `like`, observations [batch, ...], gives the x that is dreamt its shape. The pairs come from the model's
    `sample_from_prior(bs)`. A model that has `log_prob` is asked for log q. Of one with a single layer, which may have
    its forward alone, the q(z|x) of the dreamt x is asked.

    Raises ValueError, naming the model's class, where it lacks what is needed, or returns what is no batch of `num`.
    """
    name = type(model).__name__
    if not _overrides(model, "sample_from_prior"):
        raise ValueError(f"{name}: dreams need sample_from_prior(bs), which it has not")
    with torch.no_grad():
        dream = model.sample_from_prior(num)  # type: ignore[operator]
        if not isinstance(dream, Mapping) or not {"px", "z"} <= dream.keys():
            raise ValueError(f"{name}: sample_from_prior returned no mapping with 'px' and 'z'")
        z, x = [layer.detach() for layer in layers_of(dream["z"])], dream["px"].sample()
    shapes = [list(part.shape) for part in (*z, x)]
    if any(shape[:1] != [num] for shape in shapes) or x.numel() != num * like.shape[1:].numel():
        raise ValueError(
            f"{name}: sample_from_prior({num}) gave z and x of shapes {shapes}, expected [{num}, ...] for each, and x "
            f"[{num}, {', '.join(map(str, like.shape[1:]))}]"
        )
    x = x.reshape(num, *like.shape[1:]).to(like.dtype)
    if _overrides(model, "log_prob"):
        densities = model.log_prob(x, [layer[None, None] for layer in z])  # type: ignore[operator]
        return torch.stack(tuple(densities.log_qz)).sum(0).reshape(num)
    if len(z) > 1:
        raise ValueError(f"{name}: dreams of several layers ({len(z)}) need log_prob(x, z), which it has not")
    output = draw_particles(model, x, 1, 1).output
    if "qz" not in output:
        raise ValueError(f"{name}: dreams need log_prob(x, z), or 'qz' in what forward returns, and it has neither")
    (qz,) = layers_of(output["qz"])
    # A q of a forward that names sample_shape may have two more dimensions in front.
    has_sample_shape = len(qz.batch_shape) > 1 and qz.batch_shape[:3] == (1, 1, num)
    leading = (1, 1, num) if has_sample_shape else (num,)
    return log_prob_of(qz, z[0].reshape(*leading, *z[0].shape[1:]), leading, f"{name}: qz[0]").reshape(num)


def _overrides(model: nn.Module, method: str) -> bool:
    found = getattr(type(model), method, None)
    return found is not None and found is not getattr(Template, method)
