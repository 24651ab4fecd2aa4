"""A model as its users write it: plain distributions, one layer, nothing of sample shapes."""

from torch import Tensor, nn, zeros
from torch.distributions import Bernoulli

from models import Template


class SimpleModel(Template):
    """p(z) = Bernoulli(1/2), p(x|z) and q(z|x) Bernoulli with linear logits."""

    prior: Tensor

    def __init__(self, xdim: int, zdim: int):
        super().__init__()
        self.inference_network = nn.Linear(xdim, zdim)
        self.generative_model = nn.Linear(zdim, xdim)
        self.register_buffer("prior", zeros((1, zdim)))

    def forward(self, x: Tensor, zgrads: bool = False, **kwargs):
        qz = Bernoulli(logits=self.inference_network(x))
        z = qz.rsample() if zgrads else qz.sample()
        pz = Bernoulli(logits=self.prior)
        px = Bernoulli(logits=self.generative_model(z))
        return {"px": px, "z": [z], "qz": [qz], "pz": [pz]}

    def sample_from_prior(self, bs: int, **kwargs):
        pz = Bernoulli(logits=self.prior.expand(bs, *self.prior.shape[1:]))
        z = pz.sample()
        return {"px": Bernoulli(logits=self.generative_model(z)), "z": [z], "pz": [pz]}
