"""The estimators of the ELBO's gradient by single methods: one class for each id of conf/estimator."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Distribution, OneHotCategorical
from torch.nn.parameter import is_lazy

from estimators.bounds.node import NodeEstimator
from estimators.nodes.arm import ARM
from estimators.nodes.arms import ARMS
from estimators.nodes.base import Method
from estimators.nodes.bit_flip import BitFlip1
from estimators.nodes.disarm import DisARM
from estimators.nodes.double_cv import DoubleCV
from estimators.nodes.expect import Expect
from estimators.nodes.gumbel_rao import GumbelRao
from estimators.nodes.gumbel_softmax import GumbelSoftmax
from estimators.nodes.importance_sampling import ImportanceSampling
from estimators.nodes.local_expectation import LocalExpectation
from estimators.nodes.measure_valued import MeasureValued
from estimators.nodes.muprop import MuProp
from estimators.nodes.pathwise import Infer, Reparameterization
from estimators.nodes.rao_blackwell import RaoBlackwellSF
from estimators.nodes.rebar import REBAR
from estimators.nodes.reinmax import ReinMax
from estimators.nodes.relax import LAX, RELAX, Learnt
from estimators.nodes.rodeo import RODEO
from estimators.nodes.score_function import ScoreFunction
from estimators.nodes.score_function_wor import ScoreFunctionWOR
from estimators.nodes.straight_through import StraightThrough
from estimators.nodes.unordered_set import UnorderedSetEstimator
from estimators.registry import spell


class ScoreFunctionNode(NodeEstimator):
    """K samples, no baseline."""

    id = "score-function"

    def method(self, name: str, num: int) -> Method:
        """Return ScoreFunction."""
        return ScoreFunction(name, num, baseline_factory="None")


class ScoreFunctionMovingAverage(NodeEstimator):
    """K samples, the costs of earlier batches for a baseline."""

    id = "score-function-moving-average"

    def method(self, name: str, num: int) -> Method:
        """Return ScoreFunction."""
        return ScoreFunction(name, num, baseline_factory="moving_average")


class ScoreFunctionBatchAverage(NodeEstimator):
    """K samples, each with the mean of the others for a baseline."""

    id = "score-function-batch-average"
    min_particles: ClassVar[int] = 2
    others: ClassVar[int] = 2

    def method(self, name: str, num: int) -> Method:
        """Return ScoreFunction."""
        return ScoreFunction(name, num, baseline_factory="batch_average")


class ExpectNode(NodeEstimator):
    """All values of z; K counts for nothing."""

    id = "expect"

    def method(self, name: str, num: int) -> Method:  # noqa: ARG002
        """Return Expect."""
        return Expect(name)


@dataclass(eq=False, repr=False)
class GumbelSoftmaxNode(NodeEstimator):
    """K relaxed samples at a temperature."""

    temperature: float = 1.0

    @property
    def id(self) -> str:
        """The canonical id."""
        return "gumbel-softmax" + _suffix("t", self.temperature, 1.0)

    def method(self, name: str, num: int) -> Method:
        """Return GumbelSoftmax."""
        return GumbelSoftmax(name, num, initial_temperature=self.temperature)


@dataclass(eq=False, repr=False)
class StraightThroughGumbel(NodeEstimator):
    """K samples with the Jacobian of their relaxation at a temperature."""

    temperature: float = 1.0

    @property
    def id(self) -> str:
        """The canonical id."""
        return "straight-through-gumbel" + _suffix("t", self.temperature, 1.0)

    def method(self, name: str, num: int) -> Method:
        """Return GumbelSoftmax."""
        return GumbelSoftmax(name, num, straight_through=True, initial_temperature=self.temperature)


class StraightThroughNode(NodeEstimator):
    """K samples with the Jacobian of their probabilities."""

    id = "straight-through"

    def method(self, name: str, num: int) -> Method:
        """Return StraightThrough."""
        return StraightThrough(name, num)


class ArmNode(NodeEstimator):
    """K antithetic pairs."""

    id = "arm"

    def method(self, name: str, num: int) -> Method:
        """Return ARM."""
        return ARM(name, num)


class DisarmNode(NodeEstimator):
    """K antithetic pairs."""

    id = "disarm"

    def method(self, name: str, num: int) -> Method:
        """Return DisARM."""
        return DisARM(name, num)


class ScoreFunctionWorNode(NodeEstimator):
    """K different samples, weighed by importance."""

    id = "score-function-wor"
    min_particles: ClassVar[int] = 2
    others: ClassVar[int] = 2

    def method(self, name: str, num: int) -> Method:
        """Return ScoreFunctionWOR."""
        return ScoreFunctionWOR(name, num)


class UnorderedSetNode(NodeEstimator):
    """K different samples, as a set."""

    id = "unordered-set"
    min_particles: ClassVar[int] = 2
    others: ClassVar[int] = 2

    def method(self, name: str, num: int) -> Method:
        """Return UnorderedSetEstimator."""
        return UnorderedSetEstimator(name, num)


class RaoBlackwellNode(NodeEstimator):
    """The K - 1 likeliest values and one sample of the rest."""

    id = "rao-blackwell"

    def method(self, name: str, num: int) -> Method:
        """Return RaoBlackwellSF."""
        return RaoBlackwellSF(name, num)


class ArmsNode(NodeEstimator):
    """K antithetic samples."""

    id = "arms"
    min_particles: ClassVar[int] = 2
    others: ClassVar[int] = 2

    def method(self, name: str, num: int) -> Method:
        """Return ARMS."""
        return ARMS(name, num)


class BitFlipNode(NodeEstimator):
    """K samples, one bit of each flipped."""

    id = "bit-flip"

    def method(self, name: str, num: int) -> Method:
        """Return BitFlip1."""
        return BitFlip1(name, num)


class LocalExpectationNode(NodeEstimator):
    """K samples, each variable enumerated in turn."""

    id = "local-expectation"

    def method(self, name: str, num: int) -> Method:
        """Return LocalExpectation."""
        return LocalExpectation(name, num)


class MeasureValuedNode(NodeEstimator):
    """K samples, each variable replaced by the two parts of its derivative in turn."""

    id = "measure-valued"

    def method(self, name: str, num: int) -> Method:
        """Return MeasureValued."""
        return MeasureValued(name, num)


class ReparameterizationNode(NodeEstimator):
    """K samples that carry the gradient."""

    id = "reparameterization"

    def method(self, name: str, num: int) -> Method:
        """Return Reparameterization."""
        return Reparameterization(name, num)


class InferNode(NodeEstimator):
    """K samples that carry the gradient where they can, else the score function with a moving average."""

    id = "infer"

    def method(self, name: str, num: int) -> Method:
        """Return Infer."""
        return Infer(name, num)


@dataclass(eq=False, repr=False)
class ImportanceSamplingNode(NodeEstimator):
    """K samples of a flatter distribution, q's logits divided by a temperature, weighed by importance."""

    temperature: float = 2.0

    @property
    def id(self) -> str:
        """The canonical id."""
        return "importance-sampling" + _suffix("t", self.temperature, 2.0)

    def method(self, name: str, num: int) -> Method:
        """Return ImportanceSampling."""
        if not self.temperature > 0:
            raise ValueError(f"{self.id}: temperature = {self.temperature}, expected a positive number")
        return ImportanceSampling(name, self._flatter, num)

    def _flatter(self, q: Distribution) -> Distribution:
        if not isinstance(q, Bernoulli | Categorical | OneHotCategorical):
            raise ValueError(f"node 'z': the proposal takes Bernoulli or categories, not {type(q).__name__}")
        return type(q)(logits=q.logits.detach() / self.temperature, validate_args=False)


class ReinMaxNode(NodeEstimator):
    """K samples with the Jacobian of Heun's rule."""

    id = "reinmax"

    def method(self, name: str, num: int) -> Method:
        """Return ReinMax."""
        return ReinMax(name, num)


class MuPropNode(NodeEstimator):
    """K samples, the tangent at the mean for a baseline."""

    id = "muprop"

    def method(self, name: str, num: int) -> Method:
        """Return MuProp."""
        return MuProp(name, num)


class DoubleCvNode(NodeEstimator):
    """K samples with the gradients of the others' costs."""

    id = "double-cv"
    min_particles: ClassVar[int] = 2
    others: ClassVar[int] = 2

    def method(self, name: str, num: int) -> Method:
        """Return DoubleCV."""
        return DoubleCV(name, num)


class RodeoNode(NodeEstimator):
    """K samples with what a Stein operator makes of the others' costs; its networks are trained."""

    id = "rodeo"
    min_particles: ClassVar[int] = 2
    others: ClassVar[int] = 2

    def method(self, name: str, num: int) -> Method:
        """Return RODEO."""
        return RODEO(name, num)


class RebarNode(NodeEstimator):
    """K samples, the relaxed cost for a control variate; eta is trained."""

    id = "rebar"

    def method(self, name: str, num: int) -> Method:
        """Return REBAR."""
        return REBAR(name, num)


@dataclass(eq=False, repr=False)
class GumbelRaoNode(NodeEstimator):
    """K samples with the mean Jacobian of the relaxations that agree with them, at a temperature."""

    temperature: float = 1.0

    @property
    def id(self) -> str:
        """The canonical id."""
        return "gumbel-rao" + _suffix("t", self.temperature, 1.0)

    def method(self, name: str, num: int) -> Method:
        """Return GumbelRao."""
        return GumbelRao(name, num, self.temperature)


class Learning(NodeEstimator):
    """A method whose control variate is a network: each layer has its own, which takes its size from the first x."""

    def __post_init__(self) -> None:
        super().__post_init__()
        del self.first, self.rest
        self.layers = nn.ModuleList([self.method("z", self.iw)])

    def method_of(self, layer: int, q: Distribution, num_plates: int) -> Learnt:
        """Return the method of a layer; further layers than the first are made when they are first met."""
        if layer == len(self.layers):
            self.layers.append(self.method("z", self.others).train(self.training))
        method = self.layers[layer]
        assert isinstance(method, Learnt)
        sizes = (
            q.logits.shape if isinstance(q, Categorical) else q.batch_shape + q.event_shape
        )  # relaxed, it has as many
        method.in_dim = sizes[num_plates:].numel()
        if any(map(is_lazy, method.parameters())):
            # Here, not where costs are estimated: without gradients the control variate is not evaluated.
            device = q.mean.device
            method.to(device).network(torch.zeros(1, method.in_dim, device=device))
        return method


class RelaxNode(Learning):
    """K samples, a network of the relaxed sample for a control variate."""

    id = "relax"

    def method(self, name: str, num: int) -> Method:
        """Return RELAX."""
        return RELAX(name, 1, num, network=_network())


class LaxNode(Learning):
    """K samples, a network of the sample for a control variate."""

    id = "lax"

    def method(self, name: str, num: int) -> Method:
        """Return LAX."""
        return LAX(name, 1, num, network=_network())


def _network(hidden: int = 16) -> nn.Module:
    """Return a network of any number of inputs, whose output starts at zero."""
    last = nn.Linear(hidden, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.LazyLinear(hidden), nn.Tanh(), last)


def _suffix(letter: str, value: float, default: float) -> str:
    return "" if value == default else f"-{letter}{spell(value)}"
