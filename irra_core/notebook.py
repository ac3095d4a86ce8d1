"""The parameters cell of a notebook → checked values."""

import ast
from collections.abc import Iterable
from typing import Any

from irra_core.settings import unknown


def notebook_parameters(without: Iterable[str] = ()) -> dict[str, Any]:
    """The checked parameters of the running notebook, name → value: its parameters cell, updated by papermill's values.

    papermill only warns about an unknown name, and ignores types; here both stop the notebook. `without` leaves out
    names that do not belong to the recipe. Raises ValueError for an unknown name, TypeError for a value
    that the annotation does not allow, RuntimeError outside a notebook.
    """
    return {name: value for name, value in _read_parameters().items() if name not in tuple(without)}


def _read_parameters() -> dict[str, Any]:
    """Declared defaults updated with injected values, both read from the cells that this kernel has run."""
    try:
        from IPython import get_ipython

        cells = get_ipython().user_ns["In"]
    except (ImportError, AttributeError, KeyError):
        raise RuntimeError("notebook_parameters() reads the cells of a notebook: call it in one") from None
    declared: dict[str, tuple[str, Any]] = {}
    values: dict[str, Any] = {}
    for cell in cells:
        try:
            body = ast.parse(cell).body
        except SyntaxError:  # cells with magics declare nothing
            continue
        if body and all(isinstance(line, ast.AnnAssign) for line in body):
            declared = {line.target.id: (ast.unparse(line.annotation), ast.literal_eval(line.value)) for line in body}
            values = {}
        elif cell.startswith("# Parameters") and all(isinstance(line, ast.Assign) for line in body):
            values |= {line.targets[0].id: _literal(line.value) for line in body}
    for name, value in values.items():
        if name not in declared:
            raise unknown("parameter", name, declared)
        _check_annotation(name, declared[name][0], value)
    return {name: values.get(name, default) for name, (_, default) in declared.items()}


def _literal(node) -> Any:
    """The value of an injected assignment; papermill writes nan and inf as float('nan')."""
    if isinstance(node, ast.Call):
        return float(node.args[0].value)
    return ast.literal_eval(node)


def _check_annotation(name: str, annotation: str, value: Any) -> None:
    """Raise TypeError unless the value is of the parameter's annotated type, or None."""
    types = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    wanted = types[annotation]
    if value is None or (isinstance(value, wanted) and not (isinstance(value, bool) and bool not in wanted)):
        return
    remedy = f"; write -r {name} {value} to pass it as text" if annotation == "str" else ""
    raise TypeError(f"parameter {name!r} is {value!r}: accepted is {annotation} or None{remedy}")
