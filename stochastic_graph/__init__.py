"""Write a generative story with samples and costs; get the gradient of its expected cost.

>>> import stochastic_graph as storch
>>> x = storch.denote_independent(data, 0, "data")
>>> z = storch.method.ScoreFunction("z", n_samples=10, baseline_factory="batch_average")(Bernoulli(logits=encoder(x)))
>>> storch.add_cost(loss(decoder(z), x), "reconstruction")  # one number for each item of plates z and data
>>> storch.backward()
"""

from estimators.nodes.base import current_graph
from stochastic_graph import method
from stochastic_graph.functions import (
    add_cost,
    backward,
    costs,
    current,
    denote_independent,
    gather_samples,
    grad,
    log_prob,
    reduce_plates,
    reset,
    surrogate_loss,
    variance,
)
from stochastic_graph.graph import Graph, StochasticTensor
from stochastic_graph.layers import per_item
from stochastic_graph.plates import Plate
from stochastic_graph.replicates import replicates
from stochastic_graph.tensor import Tensor

current_graph.set(Graph())

__all__ = [
    "Graph",
    "Plate",
    "StochasticTensor",
    "Tensor",
    "add_cost",
    "backward",
    "costs",
    "current",
    "denote_independent",
    "gather_samples",
    "grad",
    "log_prob",
    "method",
    "per_item",
    "reduce_plates",
    "replicates",
    "reset",
    "surrogate_loss",
    "variance",
]
