"""A size of the studies → what they are given unless their caller says otherwise. Imports no torch."""

from typing import Any

from irra_core.settings import unknown

# What a study is given unless its caller says otherwise. `full` answers; `small` shows all of it within an hour.
SIZES: dict[str, dict[str, Any]] = {
    "full": {"dataset": "synthetic-study", "seeds": 3},
    "small": {"dataset": "synthetic", "seeds": 1, "epochs": 1, "max_steps": 150},  # of 254 that an epoch has
}

# Seeds that both sides of a primary comparison get on top: always, and if its interval is then wider than planned
# (docs/study_design.md).
MORE_SEEDS = {"full": (2, 3)}

DRAWS = 10_000  # of the bootstrap, in tables as in verdicts: the least p-value is 2 / 10,001


def sized(size: str, **given: Any) -> dict[str, Any]:
    """The arguments of `plan` in a size of SIZES: what is given (and not None) wins. Raises ValueError for a name."""
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    return SIZES[size] | {name: value for name, value in given.items() if value is not None}


def domains(size: str = "full") -> tuple[str, ...]:
    """The three rendered data sets of the study of transfer in a size of SIZES."""
    return tuple(f"{sized(size)['dataset']}{domain}" for domain in ("", "-night", "-campus"))
