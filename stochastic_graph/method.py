"""The methods by which a node is sampled and its gradient estimated: `method.ScoreFunction("z")(distribution)`."""

from estimators.nodes.arm import ARM
from estimators.nodes.arms import ARMS
from estimators.nodes.base import Method
from estimators.nodes.bit_flip import BitFlip1
from estimators.nodes.disarm import U2G, DisARM
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
from estimators.nodes.relax import LAX, RELAX
from estimators.nodes.rodeo import RODEO
from estimators.nodes.score_function import ScoreFunction
from estimators.nodes.score_function_wor import ScoreFunctionWOR
from estimators.nodes.straight_through import StraightThrough
from estimators.nodes.unordered_set import UnorderedSetEstimator

__all__ = [
    "ARM",
    "ARMS",
    "LAX",
    "REBAR",
    "RELAX",
    "RODEO",
    "U2G",
    "BitFlip1",
    "DisARM",
    "DoubleCV",
    "Expect",
    "GumbelRao",
    "GumbelSoftmax",
    "ImportanceSampling",
    "Infer",
    "LocalExpectation",
    "MeasureValued",
    "Method",
    "MuProp",
    "RaoBlackwellSF",
    "ReinMax",
    "Reparameterization",
    "ScoreFunction",
    "ScoreFunctionWOR",
    "StraightThrough",
    "UnorderedSetEstimator",
]
