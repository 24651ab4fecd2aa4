"""The Gaussian toy model whose optimum is known (Rainforth et al. 2018, "Tighter variational bounds are not...")."""

from collections.abc import Sequence
from math import log, pi, sqrt
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn
from torch.autograd import Function
from torch.distributions import Normal
from torch.nn import functional as F

from datasets.gaussian_toy import GaussianToyData
from models.functions import known_signature, sum_of_squares
from models.template import LogDensities, Output, Template

Scale = Literal["std", "variance"]


class GaussianToy(Template):
    """z ~ N(mu, I), x|z ~ N(z, I), q(z|x) = N(A x + b, s^2 I), with x and z in R^D.

    The parameters `A` [D, D], `b` [D] and `mu` [D] start away from their optimum: A drawn with norm about one a row,
    b and mu zero. `place_at_optimum` puts them where the gradient studies measure.

    `scale` names which number of q is 2/3: "std" (s = 2/3, as the code behind OVIS's figure has it) or "variance"
    (s^2 = 2/3, as the text of Rainforth et al. has it).
    """

    has_units = False
    takes_gradients_at_once = True

    def __init__(self, dim: int = 20, scale: Scale = "std"):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, not {dim}")
        if scale not in get_args(Scale):
            raise ValueError(f"unknown scale {scale!r}; choose from {', '.join(get_args(Scale))}")
        self.dim = dim
        self.std = 2 / 3 if scale == "std" else sqrt(2 / 3)
        self.A = nn.Parameter(torch.randn(dim, dim) / sqrt(dim))
        self.b = nn.Parameter(torch.zeros(dim))
        self.mu = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, reparam: bool = False, sample_shape: tuple[int, int] = (1, 1)) -> Output:
        """Draw z [mc, iw, batch, D] for x [batch, D], with its log-densities; z itself is built when it is read.

        Each log-density is a quadratic form of z - mean_i. As z = m + s eps, and abs(s eps + d)^2 =
        s^2 abs(eps)^2 + 2 s eps.d + abs(d)^2 with d = m - mean_i, a batched product serves those of p, and another that
        of q, where d is 0: it is there for the gradient alone. So the backward pass goes over the particles for q only,
        unless mu or a reparameterised z has a gradient.
        """
        self._check(x)
        batch, (mc, iw) = len(x), sample_shape
        qz_mean = F.linear(x, self.A, self.b)
        z_mean = qz_mean if reparam else qz_mean.detach()
        eps = torch.randn(batch, mc * iw, self.dim, dtype=x.dtype, device=x.device)
        norms = self.std**2 * torch.linalg.vector_norm(eps, dim=-1).square().unsqueeze(1)

        def add_product(log_densities: Tensor, offsets: Tensor, std: float = 1.0) -> Tensor:
            return _AddProduct.apply(log_densities, offsets, eps, -self.std / std**2)

        offsets = torch.stack([z_mean - x, z_mean - self.mu], dim=1)
        log_p = add_product(self._log_normal(norms + offsets.square().sum(-1, keepdim=True)), offsets)
        log_q = self._log_normal(norms, self.std)
        if not reparam:  # otherwise z - qz_mean is s eps, whatever the parameters
            log_q = add_product(log_q, (z_mean - qz_mean).unsqueeze(1), self.std)
        # Taken apart before they are permuted, so that their gradients meet in the layout that bmm is fast with.
        log_px, log_pz, log_qz = (
            row.view(batch, mc, iw).permute(1, 2, 0) for row in (*log_p.unbind(1), log_q.squeeze(1))
        )

        return Output(
            {"log_px": log_px, "log_pz": (log_pz,), "log_qz": (log_qz,), "reparam": reparam},
            {
                "z": lambda _: [z_mean + self.std * eps.view(batch, mc, iw, self.dim).permute(1, 2, 0, 3)],
                "px": lambda output: Normal(output["z"][0], 1.0, validate_args=False),
                "pz": lambda _: [Normal(self.mu, 1.0, validate_args=False)],
                "qz": lambda _: [Normal(qz_mean, self.std, validate_args=False)],
            },
        )

    def sample_from_prior(self, bs: int) -> dict[str, Any]:
        """Draw `bs` z [bs, D] from the prior; return `px`, `z` and `pz`."""
        pz = Normal(self.mu.expand(bs, -1), 1.0, validate_args=False)
        z = pz.sample()
        return {"px": Normal(z, 1.0, validate_args=False), "z": [z], "pz": [pz]}

    def log_prob(self, x: Tensor, z: Sequence[Tensor], stop_phi: bool = False) -> LogDensities:
        """Return the log-densities of x [batch, D] and of the given z, one layer [mc, iw, batch, D]."""
        self._check(x)
        A, b = (self.A.detach(), self.b.detach()) if stop_phi else (self.A, self.b)
        (layer,) = z

        def distance(mean: Tensor) -> Tensor:
            return sum_of_squares(layer - mean)

        return LogDensities(
            self._log_normal(distance(x)),
            (self._log_normal(distance(self.mu)),),
            (self._log_normal(distance(F.linear(x, A, b)), self.std),),
        )

    def place_at_optimum(self, dataset: GaussianToyData, perturbation: float = 0.0, seed: int = 0) -> None:
        """Set A, b and mu to the data set's optimum plus N(0, perturbation^2) noise; the optimum itself stays as it is.

        Raises ValueError when the data set's points have another dimension.
        """
        self._check(dataset.points("train"))
        generator = Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter, optimum in ((self.A, dataset.A), (self.b, dataset.b), (self.mu, dataset.mu)):
                noise = torch.randn(optimum.shape, generator=generator)
                parameter.copy_(optimum + perturbation * noise)

    def diagnostics(self, x: Tensor, dataset: GaussianToyData) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the mean squared distances of A, b and mu to the data set's optimum."""
        self._check(dataset.points("train"))
        optima = {"A": (self.A, dataset.A), "b": (self.b, dataset.b), "mu": (self.mu, dataset.mu)}
        return {
            f"gaussian_toy/mse_{name}": (parameter.detach() - optimum.to(parameter)).square().mean()
            for name, (parameter, optimum) in optima.items()
        }

    def _log_normal(self, distance: Tensor, std: float = 1.0) -> Tensor:
        """Return the log-density of N(mean, std^2 I) where the squared distance to the mean is `distance`."""
        return -0.5 / std**2 * distance - self.dim * (log(std) + 0.5 * log(2 * pi))

    def _check(self, x: Tensor) -> None:
        if x.shape[1:] != (self.dim,):
            raise ValueError(
                f"GaussianToy was given x of shape {list(x.shape)}, expected [batch, {self.dim}] (its dim)"
            )


@known_signature
class _AddProduct(Function):
    """(terms [batch, m, n], offsets [batch, m, D], eps [batch, n, D], scale) -> terms + scale offsets eps^T."""

    generate_vmap_rule = True

    @staticmethod
    def forward(terms: Tensor, offsets: Tensor, eps: Tensor, scale: float) -> Tensor:
        return torch.baddbmm(terms, offsets, eps.transpose(1, 2), alpha=scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, _, eps, ctx.scale = inputs
        ctx.save_for_backward(eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (eps,) = gradients, ctx.saved_tensors
        by_offsets = ctx.scale * _Product.apply(gradient, eps) if ctx.needs_input_grad[1] else None
        return gradient, by_offsets, None, None


@known_signature
class _Product(Function):
    """(gradient [batch, m, n], eps [batch, n, D]) -> gradient eps, [batch, m, D]: several gradients in one product."""

    @staticmethod
    def forward(gradient: Tensor, eps: Tensor) -> Tensor:
        return torch.bmm(gradient, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (eps,) = ctx.saved_tensors
        return torch.bmm(gradients[0], eps.transpose(1, 2)), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], gradient: Tensor, eps: Tensor) -> tuple[Tensor, int]:
        of_gradient, of_eps = in_dims
        if of_gradient is not None and of_eps is None:
            several = gradient.movedim(of_gradient, 1)
            product = _Product.apply(several.flatten(1, 2), eps)
            return product.unflatten(1, several.shape[1:3]), 1
        pair = ((gradient, of_gradient), (eps, of_eps))
        rows = [
            each.expand(info.batch_size, *each.shape) if dim is None else each.movedim(dim, 0) for each, dim in pair
        ]
        product = _Product.apply(*(each.flatten(0, 1) for each in rows))
        return product.unflatten(0, rows[0].shape[:2]), 0
