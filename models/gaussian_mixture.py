"""The Gaussian mixture whose posterior is known, with a learnt prior (Le et al. 2019, "Revisiting reweighted...")."""

from collections.abc import Sequence
from math import log, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributions import Categorical, Normal

from datasets.gaussian_mixture import SPACING, STD, GaussianMixtureData
from models.functions import known_signature
from models.pieces import cut, is_cut
from models.template import LogDensities, Output, Template


class CategoricalPrior(nn.Module):
    """p(z) over `num_components` values, with learnt `logits` that start uniform."""

    def __init__(self, num_components: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_components))

    def forward(self) -> Tensor:
        """Return log p(z) [C]."""
        return self.logits.log_softmax(-1)


class GaussianMixture(Template):
    """z ~ Categorical(prior), x|z ~ N(10 z, 5^2), q(z|x) a 1-H-C network with tanh, on C = `num_components` values.

    x is [batch] or [batch, 1]; z has one layer, the index of the component, int64 [mc, iw, batch]. As it is discrete,
    `reparam` changes nothing: its samples never carry a gradient.
    """

    takes_gradients_at_once = True
    means: Tensor

    def __init__(self, num_components: int = 20, hidden: int = 16):
        super().__init__()
        if num_components < 2 or hidden < 1:
            raise ValueError(f"num_components must be at least 2 and hidden 1, not {num_components} and {hidden}")
        self.num_components = num_components
        self.inference_network = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, num_components))
        self.prior = CategoricalPrior(num_components)
        self.register_buffer("means", SPACING * torch.arange(num_components), persistent=False)

    def forward(self, x: Tensor, reparam: bool = False, sample_shape: tuple[int, int] = (1, 1)) -> Output:  # noqa: ARG002
        """Draw z [mc, iw, batch] with its log-densities, which are looked up in tables of all C values."""
        mc, iw = sample_shape
        log_px, log_pz, logits = self._tables(x)
        z = draw_categorical(logits.detach().softmax(-1).t(), mc * iw).view(mc, iw, -1)
        densities = _look_up(log_px, log_pz, logits, z)
        return Output(
            {**densities._asdict(), "z": [z], "reparam": False},
            {
                "px": lambda _: Normal(self.means[z].unsqueeze(-1), STD, validate_args=False),
                "pz": lambda _: [Categorical(logits=self.prior.logits, validate_args=False)],
                "qz": lambda _: [Categorical(logits=logits, validate_args=False)],
            },
        )

    def sample_from_prior(self, bs: int) -> dict[str, Any]:
        """Draw `bs` z [bs] from the prior; return `px` (over x [bs, 1]), `z` and `pz`."""
        pz = Categorical(logits=self.prior.logits.expand(bs, -1), validate_args=False)
        z = pz.sample()
        return {"px": Normal(self.means[z].unsqueeze(-1), STD, validate_args=False), "z": [z], "pz": [pz]}

    def log_prob(self, x: Tensor, z: Sequence[Tensor], stop_phi: bool = False) -> LogDensities:
        """Return the log-densities of x [batch] or [batch, 1] and of the given indices z, one layer [mc, iw, batch]."""
        (layer,) = z
        if layer.shape[-1] != len(x):
            raise ValueError(f"GaussianMixture was given z of shape {list(layer.shape)}, expected [mc, iw, {len(x)}]")
        log_px, log_pz, logits = self._tables(x)
        return _look_up(log_px, log_pz, logits.detach() if stop_phi else logits, layer)

    def layer_posterior(self, x: Tensor, z: Sequence[Tensor] = ()) -> Categorical:  # noqa: ARG002 (one layer)
        """Return q(z|x), [batch]."""
        return Categorical(logits=self._tables(x)[2], validate_args=False)

    def layer_likelihood(self, x: Tensor, z: Sequence[Tensor]) -> Tensor:
        """Return log p(x|z) for indices z [..., batch], or [..., 1] where all x share them: [..., batch]."""
        table, (layer,) = self._tables(x)[0].t(), z
        index = layer.expand(*layer.shape[:-1], len(x)).unsqueeze(-1)
        return table.expand(*index.shape[:-1], -1).gather(-1, index).squeeze(-1)

    def layer_prior(self) -> Categorical:
        """Return p(z)."""
        return Categorical(logits=self.prior.logits, validate_args=False)

    def diagnostics(self, x: Tensor, dataset: GaussianMixtureData) -> dict[str, Tensor]:
        """Return the errors of q(z|x) (mean over x) and of p(z): L2 norms between probability vectors.

        The names are those of the published figures, which say "mse". Raises ValueError when the data set has another
        number of components.
        """
        true_prior = dataset.true_prior.to(self.means)
        if len(true_prior) != self.num_components:
            raise ValueError(f"GaussianMixture has {self.num_components} components, its data set {len(true_prior)}")
        with torch.no_grad():
            log_px, log_pz, logits = self._tables(x)
            posterior = (log_px + true_prior.log().unsqueeze(1)).softmax(0)
            return {
                "gmm/posterior_mse": torch.linalg.vector_norm(logits.softmax(-1).t() - posterior, dim=0).mean(),
                "gmm/prior_mse": torch.linalg.vector_norm(log_pz.exp().squeeze(1) - true_prior),
            }

    def _tables(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p(x|z) [C, batch] and log p(z) [C, 1] for all z, and the logits of q(z|x) [batch, C]."""
        if x.dim() not in (1, 2) or x.shape[1:].numel() != 1:
            raise ValueError(f"GaussianMixture was given x of shape {list(x.shape)}, expected [batch] or [batch, 1]")
        x = x.reshape(-1, 1)
        offsets = (x.t() - self.means.unsqueeze(1)) / STD
        log_px = -0.5 * offsets.square() - (log(STD) + 0.5 * log(2 * pi))
        return log_px, self.prior().unsqueeze(1), self.inference_network(x)


@known_signature
class _NormalisedLookUp(Function):
    """(logits [batch, C], index [n, batch]) -> log softmax(logits) at the indices, [n, batch].

    d / d logits of sum_k g_k log p(z_k) = sum_k g_k onehot(z_k) - p sum_k g_k: one pass over [batch, C] and one over g.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, index: Tensor) -> Tensor:
        return logits.log_softmax(-1).t().gather(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (logits, index) = gradients, ctx.saved_tensors
        by_normaliser = logits.softmax(-1) * -gradient.sum(0).unsqueeze(-1)
        return by_normaliser.scatter_add(-1, index.t(), gradient.t()), None


@known_signature
class _Inversion(Function):
    """(u [..., n, batch], boundaries [..., C - 1, 1, batch]) -> how many of these are at most u, [..., n, batch].

    C - 1 comparisons take half the time of `searchsorted`, whose branches no processor can predict.
    """

    @staticmethod
    def forward(u: Tensor, boundaries: Tensor) -> Tensor:
        if not is_cut(u):
            dtype = torch.uint8 if boundaries.shape[-3] < 256 else torch.int64
            return (u.unsqueeze(-3) >= boundaries).view(torch.uint8).sum(-3, dtype=dtype).long()
        index = torch.empty(u.shape, dtype=torch.int64)
        dim, size = cut(u.shape)
        boundaries = boundaries.expand(*u.shape[:-2], *boundaries.shape[-3:])
        for start in range(0, u.shape[dim], size):
            piece = u.narrow(dim, start, min(size, u.shape[dim] - start))
            own = boundaries.narrow(dim, start, piece.shape[dim]) if dim < u.dim() - 2 else boundaries
            # Counted as floats, into which comparisons are written without a detour.
            total = torch.zeros_like(piece, dtype=torch.promote_types(u.dtype, torch.float32))
            is_above = torch.empty_like(piece)
            for boundary in own.unbind(-3):
                total += torch.ge(piece, boundary, out=is_above)
            index.narrow(dim, start, piece.shape[dim]).copy_(total)
        return index

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], u: Tensor, boundaries: Tensor) -> tuple[Tensor, int]:
        of_u, of_boundaries = in_dims
        u = u.expand(info.batch_size, *u.shape) if of_u is None else u.movedim(of_u, 0)
        boundaries = boundaries.unsqueeze(0) if of_boundaries is None else boundaries.movedim(of_boundaries, 0)
        return _Inversion.apply(u, boundaries), 0


def _look_up(log_px: Tensor, log_pz: Tensor, logits: Tensor, z: Tensor) -> LogDensities:
    """Return the entries at z [mc, iw, batch] of tables [C, batch], and of the log-softmax of logits [batch, C]."""
    index = z.flatten(0, 1)
    px, pz = (table.expand_as(log_px).gather(0, index) for table in (log_px, log_pz))
    px, pz, qz = (each.view(z.shape) for each in (px, pz, _NormalisedLookUp.apply(logits, index)))
    return LogDensities(px, (pz,), (qz,))


def draw_categorical(probabilities: Tensor, num_samples: int) -> Tensor:
    """Draw indices [num_samples, batch] from the columns of `probabilities` [C, batch], by inverting cumulative sums.

    An index of probability zero is never drawn. Where the probabilities are nan, the index is 0.
    """
    cumulative = probabilities.cumsum(0)
    # The last sum, which rounding leaves a little off one, is above every u in [0, 1).
    boundaries = (cumulative[:-1] / cumulative[-1]).contiguous().unsqueeze(1)
    u = torch.rand(num_samples, probabilities.shape[1], dtype=boundaries.dtype, device=boundaries.device)
    return _Inversion.apply(u, boundaries)
