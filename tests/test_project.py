"""The house: imports go upwards only, the lists of packages agree, nothing names a host, notebooks keep their rules."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def modules_in_order() -> list[str]:
    """The modules as CONTRIBUTING lists them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.search(r"\(a test checks it\):\n\n((?:    .+\n)+)", text).group(1).split()


def test_contributing_lists_every_module():
    assert sorted(modules_in_order()) == sorted(
        p.stem for p in (ROOT / "irra_core").glob("*.py") if p.stem != "__init__"
    )


@pytest.mark.parametrize("place", range(len(modules_in_order())), ids=modules_in_order())
def test_a_module_imports_only_from_modules_above_it(place):
    order = modules_in_order()
    tree = ast.parse((ROOT / "irra_core" / f"{order[place]}.py").read_text())
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "irra_core":
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("irra_core."):
            used.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("irra_core") for alias in node.names)
    assert used <= set(order[:place])


def test_the_library_does_not_print():
    for file in (ROOT / "irra_core").glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if getattr(call.func, "id", "") == "print"], file.name


def locked() -> dict[str, str]:
    """Package → version in the lock."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    found = [re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def test_the_lock_holds_every_requirement_in_an_accepted_version():
    extras = [name for extra in ("test", "milvus") for name in PROJECT["optional-dependencies"].get(extra, [])]
    versions = locked()
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]:
        requirement = Requirement(line)
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, line
    assert extras


def test_what_the_environment_file_asks_for_is_what_pip_gets():
    lines = [line.strip(" -") for line in (ROOT / "environment.yml").read_text().splitlines()]
    assert f"python{PROJECT['requires-python']}" in lines
    pip = (ROOT / "environment.yml").read_text().split("- pip:")[1]
    assert re.findall(r"- (-\S+ \S+)", pip) == ["-r requirements.lock", "-e ."]


def test_the_lock_names_no_host():
    assert not re.search(r"://|--index-url|--find-links|--extra-index", (ROOT / "requirements.lock").read_text())


def test_continuous_integration_calls_the_test_command_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "set -eu",
        'cd "$(dirname "$0")/.."',
        "exec make test",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_rules(path):
    cells = nbformat.read(path, 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert "parameters" in code[0].metadata.get("tags", [])
    assert "notebook_parameters" in code[1].source
    for line in code[0].source.splitlines():  # what papermill shows in its help
        assert re.fullmatch(r'\w+: (int|float|str|bool) = (None|True|False|[\d.e-]+|"[^"#]*")  # [^=|]+', line), line
    for cell in code[1:]:
        assert len(cell.source.splitlines()) <= 16, cell.source
    for cell in code:
        kept = {"keep_output", "nbval-check-output"} <= set(cell.metadata.get("tags", []))
        assert bool(cell.outputs) == kept, cell.source
        assert (cell.execution_count is not None) == kept, cell.source  # nbval refuses outputs without a number


def test_the_help_of_train_shows_every_field_of_the_recipe():
    from irra_core.recipes import Recipe

    command = [sys.executable, "-m", "papermill", "--help-notebook", str(ROOT / "notebooks" / "train.ipynb")]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    for name in Recipe.__dataclass_fields__:
        assert re.search(rf"^  {name}: ", shown, re.M), name
