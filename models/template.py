"""The base class of every model, and the mapping that a forward pass returns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class LogDensities(NamedTuple):
    """The log-densities of chosen particles, each [mc, iw, batch], z's layer by layer."""

    log_px: Tensor
    log_pz: tuple[Tensor, ...]
    log_qz: tuple[Tensor, ...]


class Output(Mapping[str, Any]):
    """What a forward pass returns, with the parts that training seldom reads built when they are first read.

    `values` are the parts at hand, `lazy` maps the other keys to functions of the output. Building a distribution costs
    about as much as ten small tensor operations, so a model that already has its log-densities leaves it lazy.
    """

    def __init__(self, values: dict[str, Any], lazy: dict[str, Callable[["Output"], Any]]):
        self._values = values
        self._lazy = lazy

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            self._values[key] = self._lazy[key](self)
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values or key in self._lazy

    def __iter__(self) -> Iterator[str]:
        return iter(self._lazy | self._values)

    def __len__(self) -> int:
        return len(self._lazy | self._values)


class Template(nn.Module):
    """A latent variable model p(x, z) with its approximate posterior q(z|x). Subclass it and write `forward`.

    >>> class SimpleModel(Template):
    ...     def __init__(self, xdim, zdim):
    ...         super().__init__()
    ...         self.inference_network = nn.Linear(xdim, zdim)
    ...         self.generative_model = nn.Linear(zdim, xdim)
    ...         self.register_buffer("prior", torch.zeros(1, zdim))
    ...
    ...     def forward(self, x, reparam=False, **kwargs):
    ...         qz = Bernoulli(logits=self.inference_network(x))
    ...         z = qz.sample()
    ...         px = Bernoulli(logits=self.generative_model(z))
    ...         return {"px": px, "z": [z], "qz": [qz], "pz": [Bernoulli(logits=self.prior)]}
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Draw z ~ q(z|x), one for each row of x [batch, ...], and return the distributions involved.

        The signature to write is `forward(self, x, reparam=False, **kwargs)`. `reparam`, or `zgrads`, asks for samples
        that carry the gradient of q's parameters (`rsample`). Returns a mapping with `px`, the distribution p(x|z), and
        the lists over layers `z`, the samples, `qz` and `pz`, the distributions that q and p give them. A prior with a
        batch of one broadcasts; log-probabilities are summed over every dimension after the batch.

        A forward that also names `sample_shape` gets (mc, iw), sees x once, and returns z as [mc, iw, batch, ...]; its
        mapping may carry the log-densities themselves, [mc, iw, batch]: `log_px`, and the tuples over layers `log_pz`
        and `log_qz`. Without it, x comes repeated, as [mc*iw*batch, ...].
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward(x, reparam=False, **kwargs)")

    def sample_from_prior(self, bs: int) -> Mapping[str, Any]:
        """Draw `bs` z from the prior; return `px`, `z` and `pz` as `forward` does."""
        raise NotImplementedError(f"{type(self).__name__} has no sample_from_prior(bs)")

    def log_prob(self, x: Tensor, z: Sequence[Tensor], stop_phi: bool = False) -> LogDensities:
        """Return the log-densities of x [batch, ...] and of the given z, one [mc, iw, batch, ...] for each layer.

        With `stop_phi` q's own parameters are constants in log q, so that its gradient flows through z alone.
        """
        raise NotImplementedError(f"{type(self).__name__} has no log_prob(x, z, stop_phi=False)")

    def diagnostics(self, x: Tensor, dataset: Any) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the model's own metrics on the points x [batch, ...] of `dataset`, by name (`group/name`)."""
        return {}
