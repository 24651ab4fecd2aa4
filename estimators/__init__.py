"""Gradient estimators by their ids. Importing this package does not import torch; building an estimator does."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from errors import UserError
from estimators import registry

if TYPE_CHECKING:
    from estimators.bounds.base import BoundEstimator

__all__ = ["get_config", "get_estimator"]


def get_config(id: str) -> tuple[type["BoundEstimator"], dict[str, Any]]:
    """Return the class that an id stands for and the keyword arguments which make it that estimator.

    >>> Estimator, config = get_config("ovis-gamma1")
    >>> Estimator(mc=1, iw=16, **config)
    OvisGamma(ovis-gamma1, mc=1, iw=16, alpha=0.0, beta=1.0, freebits=None)
    """
    parsed = registry.parse(id)
    module, _, name = parsed.target.rpartition(".")
    try:
        return getattr(import_module(module), name), parsed.parameters
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"estimator {id!r}: target {parsed.target!r} cannot be imported: {error}") from error


def get_estimator(
    id: str, mc: int = 1, iw: int = 16, alpha: float = 0.0, beta: float = 1.0, freebits: float | None = None
) -> "BoundEstimator":
    """Build the estimator of an id.

    Args:
        id: such as "ovis-gamma1"; conf/estimator holds the grammar, `estimators.registry` reads it.
        mc: M, independent copies of the estimate that are averaged.
        iw: K, the number of particles of the bound.
        alpha: order of the Rényi bound, in [0, 1).
        beta: weight of the log-ratio log q(z|x) - log p(z).
        freebits: floor of the log-ratio of each observation, particle and layer, in nats; None for no floor.

    Raises:
        UserError: no family holds the id (near names are offered).
        ValueError: a value that this estimator refuses; the message names the id, what came and what would be right.
    """
    Estimator, config = get_config(id)
    return Estimator(mc=mc, iw=iw, alpha=alpha, beta=beta, freebits=freebits, **config)
