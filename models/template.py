"""The base class of every model, and the mapping that a forward pass returns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.distributions import Distribution


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

    num_layers: int = 1  # of z
    has_units: ClassVar[bool] = True  # whether training counts the active units of z (layers of integers have none)
    # Whether the gradients of several losses by its log-densities cost less through torch.func.vmap than one by one.
    takes_gradients_at_once: ClassVar[bool] = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Draw z ~ q(z|x), one for each row of x [batch, ...], and return the distributions involved.

        The signature to write is `forward(self, x, reparam=False, **kwargs)`. `reparam`, or `zgrads`, asks for samples
        that carry the gradient of q's parameters (`rsample`). Returns a mapping with `px`, the distribution p(x|z), and
        the lists over layers `z`, the samples, `qz` and `pz`, the distributions that q and p give them. A prior with a
        batch of one broadcasts; log-probabilities are summed over every dimension after the batch.

        A forward that also names `sample_shape` gets (mc, iw), sees x once, and returns z as [mc, iw, batch, ...]; its
        mapping may carry the log-densities themselves, [mc, iw, batch]: `log_px`, and the tuples over layers `log_pz`
        and `log_qz`. Without it, x comes repeated, as [mc*iw*batch, ...].

        A model of one layer that gives its log-densities may add `stopped`, with which `stl` and `dreg` evaluate p(x|z)
        once: a function that calls its argument, a function of tensors [mc, iw, ...], on z (or on what log p(z) and log
        q are computed from) and returns log p(z) and log q(z|x) of what comes back, q's own parameters being constants.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward(x, reparam=False, **kwargs)")

    def sample_from_prior(self, bs: int) -> Mapping[str, Any]:
        """Draw `bs` z from the prior; return `px`, `z` and `pz` as `forward` does."""
        raise NotImplementedError(f"{type(self).__name__} has no sample_from_prior(bs)")

    def log_prob(self, x: Tensor, z: Sequence[Tensor], stop_phi: bool = False) -> LogDensities:
        """Return the log-densities of x [batch, ...] and of the given z, one [mc, iw, batch, ...] for each layer.

        With `stop_phi` q's own parameters are constants in log q, so that its gradient flows through z alone, between
        its layers too: what `stl` and `dreg` ask of a model of several layers.
        """
        raise NotImplementedError(f"{type(self).__name__} has no log_prob(x, z, stop_phi=False)")

    def layer_posterior(self, x: Tensor, z: Sequence[Tensor] = ()) -> Distribution:
        """Return q of the layer that follows those in z, of x [batch, ...]: what estimators of single nodes ask for.

        z: the layers so far, each [..., batch, *rest], the later ones with more dimensions in front. The batch shape of
        the first layer is [batch, *rest], that of any other begins as the last z does.
        """
        raise NotImplementedError(f"{type(self).__name__} has no layer_posterior(x, z)")

    def layer_likelihood(self, x: Tensor, z: Sequence[Tensor]) -> Tensor:
        """Return log p of what the last of z generates, [..., batch]: x where z has one layer, else the layer before.

        z need not be values of its distribution: relaxed ones carry their gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} has no layer_likelihood(x, z)")

    def layer_prior(self) -> Distribution:
        """Return p of the last layer of z, whose batch shape broadcasts to [batch, *rest]."""
        raise NotImplementedError(f"{type(self).__name__} has no layer_prior()")

    def adapt(self, x: Tensor) -> None:
        """Set what depends on the training points x [N, ...] before anything else; nothing unless a model says so."""

    def diagnostics(self, x: Tensor, dataset: Any) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the model's own metrics on the points x [batch, ...] of `dataset`, by name (`group/name`)."""
        return {}
