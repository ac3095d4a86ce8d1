"""The published results → one table, each row with its source (published.csv)."""

import importlib.resources

import pandas as pd
from pandas import DataFrame


def published() -> DataFrame:
    """The published results, ablations and transfer figures, each row with its source (published.csv)."""
    with importlib.resources.files("irra_core.released").joinpath("published.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)
