"""Published numbers to draw beside ours: published.yaml, one entry a study."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from matplotlib.ticker import EngFormatter

from errors import UserError
from reporting.aggregate import resolve_key

FILE = Path(__file__).with_name("published.yaml")
COLUMNS = ["metric", "estimator", "iw", "value", "source", "unlike"]


def published(runs: pd.DataFrame, metrics: Sequence[str], keys: Sequence[str] = (), file: Path = FILE) -> pd.DataFrame:
    """Return the published values of the pivot metrics in the report, of the estimators and K that it has.

    A row for each value and each cell of `keys`, columns of `runs`, that it belongs to: metric, estimator, iw, value,
    source, unlike, and the keys. A study counts only where all runs have its settings, and beside those runs only that
    have its own. `unlike` says which settings were others than those of some run, as "4M steps"; empty where none was.
    """
    tables = []
    for study in yaml.safe_load(file.read_text()):
        by = study.get("by", "estimator")
        if runs.empty or by not in runs or not _having(runs, study["where"]).all():
            continue
        ours = runs[_having(runs, study.get("of", {}))]
        unlike = _unlike(runs, study.get("though", {}))
        note = "; ".join(filter(None, [study["note"], unlike and f"there {unlike}"]))
        theirs = [
            (metric, estimator, iw, value, f"{study['source']} ({note})", unlike)
            for metric in metrics
            for estimator, values in study["values"].get(metric, {}).items()
            for iw, value in zip(study["iw"], values, strict=True)
            if value is not None
        ]
        named = list(dict.fromkeys(["estimator", "iw", *keys]))
        cells = ours.assign(iw=ours["estimator.iw"], estimator=ours[by])[named].drop_duplicates().astype(object)
        # A metric's own order, that of the file, is kept.
        table = pd.DataFrame(theirs, columns=COLUMNS).astype({"iw": object}).merge(cells, on=["estimator", "iw"])
        tables.append(table.infer_objects())
    found = [table for table in tables if len(table)]
    return (
        pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=list(dict.fromkeys([*COLUMNS, *keys])))
    )


def legend(table: pd.DataFrame) -> str:
    """Return the legend's entry for published values: what in their settings differs from ours stands behind."""
    unlike = "; ".join(filter(None, table["unlike"].unique())) if "unlike" in table else ""
    return f"published ({unlike})" if unlike else "published"


def _having(runs: pd.DataFrame, settings: Mapping[str, Any]) -> pd.Series:
    """Return which runs have all of these settings; a run has null where it lacks the key, or its value is null."""
    having = pd.Series(True, index=runs.index)
    for key, value in settings.items():
        try:
            column = runs[resolve_key(key, runs.columns)]
        except UserError:
            column = pd.Series(None, index=runs.index, dtype=object)
        having &= column.isna() if value is None else column == value
    return having


def _unlike(runs: pd.DataFrame, settings: Mapping[str, Any]) -> str:
    """Return the settings that some run does not share, in words."""
    unlike = {key: value for key, value in settings.items() if not _having(runs, {key: value}).all()}
    return ", ".join(
        f"{EngFormatter(sep='')(value)} steps" if key == "steps" else f"{key} {value}" for key, value in unlike.items()
    )
