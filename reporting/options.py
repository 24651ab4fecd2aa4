"""What a report shows: the `report:` section of an experiment file, each entry of which is also a flag of report.py.

report:
  keys: [dataset, estimator, iw]                          # what tells one curve from another; seeds are averaged over
  metrics: [test:gmm/posterior_mse, train:grads/snr]      # one figure of curves each
  detailed_metrics: [train:loss/ess]                      # the rows of one grid of small curves
  pivot_metrics: [min:test:gmm/posterior_mse]             # the columns of the table and the panels against K
  ylims: {"test:loss/L_k": [-94, -88]}                    # or, as the flag has it, test:loss/L_k:-94:-88
  include: [iwbound]                                      # keep these runs only (see aggregate.matches)
  exclude: [reinforce]
  ema: 0.9                                                # smoothing of the curves drawn, 0 to 1
  latex: true                                             # write the pivot as a LaTeX table too
  caption: A sentence about the study.
  figures: [curves, pivot, detailed]                      # the kinds to draw, beside these: together,
                                                          # asymptotics, distribution, league, frontier, efficiency,
                                                          # samples, returns, beside, against_p
  draw_individual: true                                   # single parameters against K; or how many, or their names

A list may also be given as the flags are, in one comma-separated string. Whatever is absent keeps its default.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from errors import UserError, near

SPLITS = ("train", "valid", "test")
AGGREGATIONS = ("min", "max", "mean", "median", "first", "last")
FIGURES = (
    "curves",
    "pivot",
    "detailed",
    "together",
    "asymptotics",
    "distribution",
    "league",
    "frontier",
    "efficiency",
    "against_p",
    "beside",
    "samples",
    "returns",
    "individual",
)
MOST_INDIVIDUAL = 25
FEW = 5


class Metric(NamedTuple):
    """A recorded quantity, written `split:group/name`."""

    split: str
    name: str

    def __str__(self) -> str:
        return f"{self.split}:{self.name}"


class PivotMetric(NamedTuple):
    """A number of a whole run: a metric over its steps, reduced; written `aggregation:split:group/name`."""

    aggregation: str
    metric: Metric

    def __str__(self) -> str:
        return f"{self.aggregation}:{self.metric}"


@dataclass(frozen=True)
class Options:
    """What to show; an empty `metrics` means every recorded one, an empty `pivot_metrics` the last of each metric.

    `draw_individual` is how many single parameters to draw, or the names of these.
    """

    keys: tuple[str, ...] = ("estimator", "iw")
    metrics: tuple[Metric, ...] = ()
    detailed_metrics: tuple[Metric, ...] = ()
    pivot_metrics: tuple[PivotMetric, ...] = ()
    ylims: tuple[tuple[Metric, tuple[float, float]], ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ema: float = 0.0
    latex: bool = False
    caption: str = ""
    figures: tuple[str, ...] = FIGURES[:3]
    draw_individual: int | tuple[str, ...] = 0


def parse(report: Mapping[str, Any] | None, where: str = "report") -> Options:
    """Read a `report:` section; `where` names its file in the errors.

    Raises:
        UserError: an unknown entry, or a value that its entry cannot hold.
    """
    if report is None:
        return Options()
    if not isinstance(report, Mapping):
        raise UserError(f"{where}: expected a mapping of entries such as `metrics`, not {report!r}")
    for key in report:
        if key not in READERS:
            raise UserError(f"{where}: unknown entry {key!r}{near(str(key), READERS)}")
    return Options(**{key: READERS[key](value, f"{where}: {key}") for key, value in report.items()})


def override(options: Options, flags: Mapping[str, Any]) -> Options:
    """Put the values of command-line flags in the place of the file's. Raises UserError, naming the flag."""
    return replace(options, **{name: READERS[name](value, f"--{name}") for name, value in flags.items()})


def parse_metric(text: str, where: str) -> Metric:
    """Read `split:group/name`."""
    split, colon, name = text.partition(":")
    if not colon or not name or ":" in name:
        raise UserError(f"{where}: {text!r} is not split:group/name, such as test:loss/L_k")
    return Metric(_choice(split, SPLITS, f"{where}: {text!r}: unknown split"), name)


def parse_pivot_metric(text: str, where: str) -> PivotMetric:
    """Read `aggregation:split:group/name`; `avg` is another name of `mean`."""
    aggregation, _, metric = text.partition(":")
    if metric.count(":") != 1:
        raise UserError(f"{where}: {text!r} is not aggregation:split:group/name, such as min:test:gmm/posterior_mse")
    aggregation = "mean" if aggregation == "avg" else aggregation
    aggregation = _choice(aggregation, AGGREGATIONS, f"{where}: {text!r}: unknown aggregation")
    return PivotMetric(aggregation, parse_metric(metric, where))


def _choice(value: str, choices: tuple[str, ...], complaint: str) -> str:
    if value not in choices:
        raise UserError(f"{complaint} {value!r}{near(value, choices)}")
    return value


def _figure(text: str, where: str) -> str:
    return _choice(text, FIGURES, f"{where}: unknown kind")


def _name(text: str, where: str) -> str:  # noqa: ARG001 (every item of a list is read with its place at hand)
    return text


def _list_of(read: Callable[[str, str], Any]) -> Callable[[Any, str], tuple]:
    def read_list(value: Any, where: str) -> tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise UserError(f"{where}: expected a list, or a comma-separated string, not {value!r}")
        stripped = [item.strip() for item in items]
        return tuple(dict.fromkeys(read(item, where) for item in stripped if item))

    return read_list


def _keys(value: Any, where: str) -> tuple[str, ...]:
    keys = _list_of(_name)(value, where)
    if not keys:
        raise UserError(f"{where}: name one at least, such as estimator,iw")
    return keys


def _limits(text: str, where: str) -> tuple[Metric, tuple[float, float]]:
    try:
        metric, low, high = text.rsplit(":", 2)
        limits = float(low), float(high)
    except ValueError:
        raise UserError(f"{where}: {text!r} is not split:group/name:low:high, such as test:loss/L_k:-94:-88") from None
    if not (math.isfinite(limits[0]) and math.isfinite(limits[1]) and limits[0] < limits[1]):
        raise UserError(f"{where}: {text!r}: the low limit must lie below the high one")
    return parse_metric(metric, where), limits


def _ylims(value: Any, where: str) -> tuple[tuple[Metric, tuple[float, float]], ...]:
    if isinstance(value, Mapping):
        for metric, limits in value.items():
            if not isinstance(limits, list | tuple) or len(limits) != 2:
                raise UserError(f"{where}: {metric}: expected [low, high], not {limits!r}")
        value = [f"{metric}:{low}:{high}" for metric, (low, high) in value.items()]
    return _list_of(_limits)(value, where)


def _ema(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"{where}: expected a number from 0 (no smoothing) to below 1, not {value!r}")
    return float(value)


def _latex(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{where}: expected true or false, not {value!r}")
    return value


def _caption(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: expected a text, not {value!r}")
    return value.strip()


def _individual(value: Any, where: str) -> int | tuple[str, ...]:
    """Read true (a few), a number, or parameters' names; the commas within A[0,1] part nothing."""
    expected = f"expected true, a number from 0 to {MOST_INDIVIDUAL}, or as many names such as b[0],A[0,1]"
    if isinstance(value, str):
        value = [name.strip() for name in re.split(r",(?![^\[]*\])", value) if name.strip()]
        value = int(value[0]) if len(value) == 1 and value[0].isdecimal() and len(value[0]) < 7 else value
    if isinstance(value, bool):
        return FEW if value else 0
    if isinstance(value, int) and 0 <= value <= MOST_INDIVIDUAL:
        return value
    if isinstance(value, list) and 0 < len(value) <= MOST_INDIVIDUAL and all(isinstance(name, str) for name in value):
        return tuple(dict.fromkeys(value))
    raise UserError(f"{where}: {expected}, not {value!r}")


READERS: dict[str, Callable[[Any, str], Any]] = {
    "keys": _keys,
    "metrics": _list_of(parse_metric),
    "detailed_metrics": _list_of(parse_metric),
    "pivot_metrics": _list_of(parse_pivot_metric),
    "ylims": _ylims,
    "include": _list_of(_name),
    "exclude": _list_of(_name),
    "ema": _ema,
    "latex": _latex,
    "caption": _caption,
    "figures": _list_of(_figure),
    "draw_individual": _individual,
}
