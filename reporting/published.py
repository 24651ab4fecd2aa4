"""Published numbers to draw beside ours: published.yaml, one entry a study."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import yaml

from errors import UserError
from reporting.aggregate import resolve_key

FILE = Path(__file__).with_name("published.yaml")


def published(runs: pd.DataFrame, metrics: Sequence[str], file: Path = FILE) -> pd.DataFrame:
    """Return the published values of the pivot metrics in the report, of the estimators and K that it has.

    Columns: metric, estimator, iw, value, source. A study counts only where all runs have its settings.
    """
    rows = []
    for study in yaml.safe_load(file.read_text()):
        if runs.empty or not _agree(runs, study["where"]):
            continue
        for metric in metrics:
            for estimator, values in study["values"].get(metric, {}).items():
                source = f"{study['source']} ({study['note']})"
                rows += [(metric, estimator, iw, value, source) for iw, value in zip(study["iw"], values, strict=True)]
    table = pd.DataFrame(rows, columns=["metric", "estimator", "iw", "value", "source"])
    if table.empty:
        return table
    cells = set(zip(runs["estimator"], runs["estimator.iw"], strict=True))
    ours = [cell in cells for cell in zip(table["estimator"], table["iw"], strict=True)]
    return table[ours].reset_index(drop=True)


def _agree(runs: pd.DataFrame, settings: dict[str, object]) -> bool:
    try:
        columns = {resolve_key(key, runs.columns): value for key, value in settings.items()}
    except UserError:
        return False
    return all((runs[column] == value).all() for column, value in columns.items())
