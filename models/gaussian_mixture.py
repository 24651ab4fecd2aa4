"""The Gaussian mixture whose posterior is known, with a learnt prior (Le et al. 2019, "Revisiting reweighted...")."""

from collections.abc import Sequence
from math import log, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.nn import functional as F

from datasets.gaussian_mixture import SPACING, STD, GaussianMixtureData
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
        log_px, log_pz, log_qz = self._tables(x)
        z = draw_categorical(log_qz.detach().exp(), mc * iw)

        def look_up(table: Tensor) -> Tensor:
            return table.gather(1, z).view(-1, mc, iw).permute(1, 2, 0)

        z_mc_iw = z.view(-1, mc, iw).permute(1, 2, 0)
        return Output(
            {
                "log_px": look_up(log_px),
                "log_pz": (look_up(log_pz.expand_as(log_px)),),
                "log_qz": (look_up(log_qz),),
                "z": [z_mc_iw],
                "reparam": False,
            },
            {
                "px": lambda _: Normal(self.means[z_mc_iw].unsqueeze(-1), STD, validate_args=False),
                "pz": lambda _: [Categorical(logits=self.prior.logits, validate_args=False)],
                "qz": lambda _: [Categorical(logits=log_qz, validate_args=False)],
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
        log_px, log_pz, log_qz = self._tables(x)
        index = layer.permute(2, 0, 1).flatten(1)

        def look_up(table: Tensor) -> Tensor:
            return table.gather(1, index).view(-1, *layer.shape[:2]).permute(1, 2, 0)

        return LogDensities(
            look_up(log_px),
            (look_up(log_pz.expand_as(log_px)),),
            (look_up(log_qz.detach() if stop_phi else log_qz),),
        )

    def diagnostics(self, x: Tensor, dataset: GaussianMixtureData) -> dict[str, Tensor]:
        """Return the errors of q(z|x) (mean over x) and of p(z): L2 norms between probability vectors.

        The names are those of the published figures, which say "mse". Raises ValueError when the data set has another
        number of components.
        """
        true_prior = dataset.true_prior.to(self.means)
        if len(true_prior) != self.num_components:
            raise ValueError(f"GaussianMixture has {self.num_components} components, its data set {len(true_prior)}")
        with torch.no_grad():
            log_px, log_pz, log_qz = self._tables(x)
            posterior = (log_px + true_prior.log()).softmax(-1)
            return {
                "gmm/posterior_mse": torch.linalg.vector_norm(log_qz.exp() - posterior, dim=-1).mean(),
                "gmm/prior_mse": torch.linalg.vector_norm(log_pz.exp() - true_prior),
            }

    def _tables(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p(x|z) [batch, C], log p(z) [C] and log q(z|x) [batch, C] for all values of z."""
        if x.dim() > 2 or x.shape[1:].numel() != 1:
            raise ValueError(f"GaussianMixture was given x of shape {list(x.shape)}, expected [batch] or [batch, 1]")
        x = x.view(-1, 1)
        offsets = (x - self.means) / STD
        log_px = -0.5 * offsets.square() - (log(STD) + 0.5 * log(2 * pi))
        return log_px, self.prior(), F.log_softmax(self.inference_network(x), dim=-1)


def draw_categorical(probabilities: Tensor, num_samples: int) -> Tensor:
    """Draw indices [batch, num_samples] from the rows of `probabilities` [batch, C] by inverting their cumulative sums.

    A value of probability zero is never drawn: u < 1 times the last sum stays below it in floating point too.
    """
    cumulative = probabilities.cumsum(-1)
    u = torch.rand(len(probabilities), num_samples, dtype=cumulative.dtype, device=cumulative.device)
    z = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    # A NaN is above every sum; an index within range lets it show in the loss instead of failing a look-up.
    return z.clamp_(max=probabilities.shape[-1] - 1)
