"""A size of the studies → what they are given unless their caller says otherwise. Imports no torch."""

from typing import Any

from irra_core.settings import unknown

# What a study is given unless its caller says otherwise. `full` answers; `small` shows all of it within an hour.
SIZES: dict[str, dict[str, Any]] = {
    "full": {"dataset": "synthetic-study", "seeds": 5},
    "small": {"dataset": "synthetic", "seeds": 1, "epochs": 1, "max_steps": 150},  # of 253 that an epoch has
}
SECONDARY = dict.fromkeys(("released", "selection", "plugins", "noise"), 3)  # no primary hypothesis → seeds at most

# Seeds that both sides of a primary comparison get on top if its interval is wider than planned (docs/study_design.md).
MORE_SEEDS = {"full": 3}


def sized(size: str, study: str = "", **given: Any) -> dict[str, Any]:
    """The arguments of `plan` in a size of SIZES: what is given (and not None) wins. Raises ValueError for a name."""
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    seeds = min(SIZES[size]["seeds"], SECONDARY.get(study, SIZES[size]["seeds"]))
    return SIZES[size] | {"seeds": seeds} | {name: value for name, value in given.items() if value is not None}


def domains(size: str = "full") -> tuple[str, ...]:
    """The three rendered data sets of the study of transfer in a size of SIZES."""
    return tuple(f"{sized(size)['dataset']}{domain}" for domain in ("", "-night", "-campus"))
