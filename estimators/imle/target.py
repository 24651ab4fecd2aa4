"""Target distributions: the scores that a loss would rather have. One of your own subclasses BaseTargetDistribution."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class BaseTargetDistribution(ABC):
    """Makes target scores of theta and the loss's gradient dy by the solution y, both [n, ...]."""

    @abstractmethod
    def params(self, theta: Tensor, dy: Tensor) -> Tensor:
        """Return the target's scores theta', [n, ...]."""

    def step(self, theta: Tensor, dy: Tensor) -> float | Tensor:  # noqa: ARG002
        """Return lambda, the length of the step along -dy: what `aimle` divides the gradient by."""
        return 1.0

    def update(self, gradient: Tensor) -> None:  # noqa: B027 (most have nothing to note)
        """Take note of a gradient [n, ...] before it is divided."""


def check_target(name: str, target: object) -> None:
    """Raise ValueError for what is no target distribution."""
    if not isinstance(target, BaseTargetDistribution):
        raise ValueError(f"{name} was given the target {target!r}, expected an instance of BaseTargetDistribution")


def target_scores(target: BaseTargetDistribution, theta: Tensor, dy: Tensor) -> Tensor:
    """Return the target's scores theta', [n, ...]; ValueError where they have another shape than theta."""
    found = target.params(theta, dy)
    if found.shape != theta.shape:
        raise ValueError(
            f"{type(target).__name__}.params returned {list(found.shape)} for scores {list(theta.shape)}, expected "
            "their shape"
        )
    return found


class TargetDistribution(BaseTargetDistribution):
    """theta' = alpha theta - beta dy (Niepert et al. 2021, eq. 9).

    With alpha = 1 and equal temperatures of both noises, theta' = theta and the gradient is zero where dy is; with
    other values of either it is not.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 1.0):
        if beta <= 0:
            raise ValueError(f"TargetDistribution was given beta={beta}, expected a number above 0")
        self.alpha, self.beta = alpha, beta

    def params(self, theta: Tensor, dy: Tensor) -> Tensor:
        """Return alpha theta - beta dy."""
        return self.alpha * theta - self.beta * dy

    def step(self, theta: Tensor, dy: Tensor) -> float:  # noqa: ARG002
        """Return beta."""
        return self.beta

    def __repr__(self) -> str:
        return f"TargetDistribution(alpha={self.alpha}, beta={self.beta})"


class AdaptiveTargetDistribution(BaseTargetDistribution):
    """theta' = alpha theta - lambda dy, lambda = beta norm(theta) / norm(dy), beta adapted (Minervini et al. 2023).

    beta rises by `beta_update_step` while the moving average of the number of non-zero gradients an item is below
    `target_norm`, and falls by it otherwise, with momentum where that is given; it is never negative. Its state, `beta`
    and `grad_norm`, lies in this object: `state_dict` and `load_state_dict` are for checkpoints.
    """

    def __init__(
        self,
        initial_alpha: float = 1.0,
        initial_beta: float = 0.0,
        initial_grad_norm: float = 1.0,
        beta_update_step: float = 1e-4,
        beta_update_momentum: float = 0.0,
        grad_norm_decay_rate: float = 0.9,
        target_norm: float = 1.0,
    ):
        for name, value in (
            ("beta_update_momentum", beta_update_momentum),
            ("grad_norm_decay_rate", grad_norm_decay_rate),
        ):
            if not 0 <= value < 1:
                raise ValueError(f"AdaptiveTargetDistribution was given {name}={value}, expected a number in [0, 1)")
        if initial_beta < 0 or beta_update_step <= 0 or target_norm <= 0:
            raise ValueError(
                f"AdaptiveTargetDistribution was given initial_beta={initial_beta}, "
                f"beta_update_step={beta_update_step}, target_norm={target_norm}: expected the first at least 0 and "
                "the others above 0"
            )
        self.alpha, self.beta, self.grad_norm = initial_alpha, initial_beta, initial_grad_norm
        self.beta_update_step, self.beta_update_momentum = beta_update_step, beta_update_momentum
        self.grad_norm_decay_rate, self.target_norm = grad_norm_decay_rate, target_norm
        self.last_update = 0.0

    def step(self, theta: Tensor, dy: Tensor) -> Tensor:
        """Return lambda = beta norm(theta) / norm(dy), a scalar; 0 where dy is zero."""
        norm = torch.linalg.vector_norm(dy)
        scaled = self.beta * torch.linalg.vector_norm(theta) / norm
        return torch.where(norm > 0, scaled, torch.zeros_like(scaled))

    def params(self, theta: Tensor, dy: Tensor) -> Tensor:
        """Return alpha theta - lambda dy."""
        return self.alpha * theta - self.step(theta, dy) * dy

    def update(self, gradient: Tensor) -> None:
        """Adapt beta to how many components of a gradient [n, ...] are not zero, on average an item."""
        present = torch.count_nonzero(gradient).item() / len(gradient)
        decay = self.grad_norm_decay_rate
        self.grad_norm = decay * self.grad_norm + (1 - decay) * present
        direction = 1.0 if self.grad_norm < self.target_norm else -1.0
        momentum = self.beta_update_momentum
        self.last_update = momentum * self.last_update + (1 - momentum) * direction * self.beta_update_step
        self.beta = max(0.0, self.beta + self.last_update)

    def state_dict(self) -> dict[str, float]:
        """Return beta, the average number of non-zero gradients and the last update."""
        return {"beta": self.beta, "grad_norm": self.grad_norm, "last_update": self.last_update}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Put back what `state_dict` returned."""
        self.beta, self.grad_norm, self.last_update = (state[key] for key in ("beta", "grad_norm", "last_update"))
