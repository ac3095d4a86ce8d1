"""The published results → one table, each row with its source (published.csv)."""

import importlib.resources

import pandas as pd
from pandas import DataFrame


def published() -> DataFrame:
    """The published results, ablations and transfer figures, each row with its source (published.csv).

    The rows of `table` "methods" are later papers' results. `second_hand` is "yes" for a figure that is quoted from
    another paper than its own; `selected_on` is the split on which the authors' code picks its epoch, where known.
    """
    with importlib.resources.files("irra_core.released").joinpath("published.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)
