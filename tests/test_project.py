"""The house: import rules, sizes, what imports load, packages, notebooks."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "irra_core"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# The core's files in reading order: each imports only those before it.
CORE = [
    "settings",
    "recipes",
    "notebook",
    "annotations",
    "images",
    "augmentation",
    "text",
    "batches",
    "transformer",
    "interaction",
    "model",
    "backbone",
    "losses",
    "metrics",
    "checkpoints",
    "objective",
    "evaluation",
    "runs",
    "training",
    "retrieval",
]
SEAMS = {  # core file → rooms that it may import, inside functions only
    "settings": ["scale"],
    "recipes": ["hub"],
    "annotations": ["datasets"],
    "images": ["datasets", "synthetic"],
    "batches": ["scale", "variants"],
    "interaction": ["variants"],
    "model": ["variants"],
    "backbone": ["hub", "variants"],
    "losses": ["variants"],
    "checkpoints": ["hub", "released", "variants"],
    "objective": ["scale"],
    "evaluation": ["synthetic"],
    "runs": ["hub"],
    "training": ["scale", "variants"],
    "retrieval": ["search"],
}
ROOMS = {  # room → other rooms that it may import
    "datasets": [],
    "synthetic": [],
    "variants": [],
    "scale": [],
    "search": [],
    "released": [],
    "analysis": ["datasets", "synthetic"],
    "studies": ["analysis", "hub", "released", "synthetic"],
    "explorer": ["analysis", "hub", "search"],
    "benchmark": ["released", "scale", "synthetic"],
    "hub": ["analysis", "released"],
    "command": ["explorer", "hub", "scale", "search", "studies"],
}
# What a room may import of the core, where that is not all of it.
OF_THE_CORE = {"synthetic": ["settings"], "synthetic/pretraining.py": CORE}
VARIANT_LINES = 80  # of a file of variants/: a switch is read at once
OLDER_VARIANTS = ["adapters.py"]  # written before that limit
MOST = {"files": 20, "lines": 4500, "lines of a file": 400, "lines of a function": 40, "lines of a class": 200}


def imports(source: str) -> Iterator[tuple[str, bool, int]]:
    """The core files and rooms that a source imports: name, True inside a function, line.

    Any other import from the package is given by its text, which is the name of nothing.
    """

    def within(node: ast.AST, inside: bool) -> Iterator[tuple[ast.stmt, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, inside
            yield from within(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    for node, inside in within(ast.parse(source), False):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "irra_core"]
        elif node.level:
            names = [ast.unparse(node)]
        elif node.module == "irra_core":
            names = [alias.name for alias in node.names]
        else:
            package, _, rest = node.module.partition(".")
            names = [rest.split(".")[0]] if package == "irra_core" else []
        for name in names:
            yield name, inside, node.lineno


def wrong_imports(package: Path) -> list[str]:
    """Every import between core files and rooms that the tables above do not allow."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        room = name.partition("/")[0] if "/" in name else None
        for target, inside, line in imports(path.read_text(encoding="utf-8")):
            if room:
                of_the_core = OF_THE_CORE.get(name, OF_THE_CORE.get(room, CORE))
                allowed = target in {room, *ROOMS.get(room, []), *of_the_core}
            elif path.stem == "__init__":
                allowed = target == "settings"
            else:
                above = CORE[: CORE.index(path.stem)] if path.stem in CORE else []
                allowed = target in above or (inside and target in SEAMS.get(path.stem, []))
            if not allowed:
                found.append(f"{name}, line {line}: imports {target} {'inside a function' if inside else 'at the top'}")
    return found


def too_large(package: Path) -> list[str]:
    """Everything in the core that is beyond `MOST`: the core as a whole, its files, its functions and classes."""
    paths = sorted(path for path in package.glob("*.py") if path.stem != "__init__")
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    sizes = [("files", "the core", len(paths)), ("lines", "the core", sum(lines.values()))]
    sizes += [("lines of a file", name, count) for name, count in lines.items()]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                kind = "lines of a class" if isinstance(node, ast.ClassDef) else "lines of a function"
                sizes.append((kind, f"{path.name}: {node.name}", node.end_lineno - node.lineno + 1))
    return [f"{name}: {size:,} {kind}, at most {MOST[kind]:,}" for kind, name, size in sizes if size > MOST[kind]]


def long_variants(package: Path) -> list[str]:
    """Every file of variants/ that is beyond VARIANT_LINES, but for the older ones."""
    paths = sorted((package / "variants").glob("*.py"))
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    return [
        f"variants/{name}: {count} lines, at most {VARIANT_LINES}"
        for name, count in lines.items()
        if count > VARIANT_LINES and name not in OLDER_VARIANTS
    ]


def prints(package: Path) -> list[str]:
    """Every call of print outside the room of the console script."""
    return [
        f"{path.relative_to(package)}, line {node.lineno}: calls print"
        for path in sorted(package.rglob("*.py"))
        if path.parent != package / "command"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]


def test_the_core_is_these_files_and_all_else_is_in_these_rooms():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", *CORE}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)
    folders = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*/*.py")}
    assert folders == set(ROOMS)


def test_a_core_file_imports_from_files_above_it_and_rooms_only_inside_functions_at_the_seams():
    assert wrong_imports(PACKAGE) == []


def test_the_core_is_small():
    assert too_large(PACKAGE) == []


def test_a_file_of_the_variants_is_short():
    assert long_variants(PACKAGE) == []


def test_the_library_does_not_print():
    assert prints(PACKAGE) == []


PLANTED = [
    ("losses.py", "from irra_core.training import train", wrong_imports, "losses.py, line 1: imports training at the"),
    ("losses.py", "def f():\n    from irra_core import runs", wrong_imports, "line 2: imports runs inside a function"),
    ("losses.py", "from irra_core.variants.x import y", wrong_imports, "imports variants at the top"),
    ("losses.py", "class A:\n    import irra_core.variants", wrong_imports, "imports irra_core.variants at the top"),
    ("losses.py", "def f():\n    from irra_core.search import x", wrong_imports, "imports search inside a function"),
    ("losses.py", "from irra_core import recipe", wrong_imports, "imports recipe at the top"),
    ("losses.py", "from . import recipes", wrong_imports, "imports from . import recipes at the top"),
    ("__init__.py", "from irra_core.recipes import recipe", wrong_imports, "__init__.py, line 1: imports recipes"),
    ("extra.py", "from irra_core.recipes import recipe", wrong_imports, "extra.py, line 1: imports recipes"),
    (
        "explorer/deep/x.py",
        "from irra_core.studies import y",
        wrong_imports,
        "explorer/deep/x.py, line 1",
    ),
    ("synthetic/x.py", "def f():\n    from irra_core import images", wrong_imports, "imports images inside a function"),
    ("new/x.py", "from irra_core import analysis", wrong_imports, "new/x.py, line 1: imports analysis"),
    ("losses.py", "x = 1\n" * 401, too_large, "losses.py: 401 lines of a file, at most 400"),
    ("losses.py", "@f\ndef g():\n" + "    x = 1\n" * 40, too_large, "losses.py: g: 41 lines of a function, at most 40"),
    ("losses.py", "class A:\n" + "    x = 1\n" * 200, too_large, "losses.py: A: 201 lines of a class, at most 200"),
    ("variants/x.py", "x = 1\n" * 81, long_variants, "variants/x.py: 81 lines, at most 80"),
    ("search/x.py", "def f():\n    print('found')", prints, "search/x.py, line 2: calls print"),
]


@pytest.mark.parametrize(("name", "source", "rule", "said"), PLANTED)
def test_each_rule_finds_what_breaks_it(name, source, rule, said, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(source)
    (found,) = rule(tmp_path)
    assert said in found


def test_the_core_as_a_whole_is_counted(tmp_path):
    for number in range(22):
        (tmp_path / f"file{number}.py").write_text("x = 1\n" * 205)
    assert too_large(tmp_path) == ["the core: 22 files, at most 20", "the core: 4,510 lines, at most 4,500"]


def test_contributing_lists_the_core_in_order_and_the_rooms_with_what_may_import_them():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert re.search(r"\n\n((?:    [a-z ]+\n)+)", text).group(1).split() == CORE
    for room, others in ROOMS.items():
        core = [name for name in CORE if room in SEAMS.get(name, [])]
        line = f"| `{room}/` | {', '.join(core) or '–'} | {', '.join(others) or '–'} |"
        assert line in text, line


HEAVY = {"open_clip", "torchvision", "timm", "resvg_py", "faiss", "matplotlib"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("irra_core", {"torch", "pandas", "numpy", *HEAVY}),
        ("irra_core.recipes", {"torch", *HEAVY}),
        ("irra_core.released.published", {"torch", *HEAVY}),
        ("irra_core.model", HEAVY),
    ],
)
def test_an_import_does_not_load(module, unwanted):
    source = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    loaded = set(ended.stdout.split())
    assert "irra_core" in loaded
    assert not loaded & unwanted


# Names that were public before the package had rooms: they stay attributes of `irra`, wherever they live.
PUBLIC = """
    Evaluation Features Gallery IRRA LOSSES PRESETS QueryExplorer RECIPES Recipe build_model check_annotations
    cmpc_loss cmpm_loss evaluate id_loss itc_loss load_annotations load_checkpoint load_images load_official
    make_synthetic mlm_loss notebook_parameters open_annotations published recipe retrieval_metrics save_checkpoint
    save_official sdm_loss synthetic_ceiling tal_loss tokenize train
"""
PUBLIC_MODULES = """
    annotations batches benchmark checkpoints comparison distributed evaluation images leaks losses metrics model plots
    recipes report runs studies synthetic text training transfer
"""
# Rooms that were modules, and the public functions and classes that these had.
FORMER_MODULES = {
    "benchmark": (
        "measure profile_step merged speed_table ratios save_benchmark load_benchmark to_markdown machine_line PARTS"
    ),
    "studies": "Study STUDIES plan estimate run_all study_folder save_study",
    "synthetic": (
        "make_synthetic attributes stated_attributes near_twins is_rendered twin_pids synthetic_ceiling LAYOUTS VIEWS"
    ),
}


def test_every_public_name_stays():
    import irra_core as irra

    for name in PUBLIC.split():
        assert not isinstance(getattr(irra, name), ModuleType), name
    for name in PUBLIC_MODULES.split():
        assert isinstance(getattr(irra, name), ModuleType), name
    assert {*PUBLIC.split(), *PUBLIC_MODULES.split()} <= set(irra.__all__) <= set(dir(irra))
    for room, names in FORMER_MODULES.items():
        for name in names.split():
            assert hasattr(getattr(irra, room), name), f"{room}.{name}"


LOCKS = ("requirements.lock", "requirements-milvus.lock", "requirements-docs.lock")


def locked(name: str = "requirements.lock") -> dict[str, str]:
    """Package → version in a lock."""
    lines = (ROOT / name).read_text().splitlines()
    found = [re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def test_the_lock_holds_every_requirement_in_an_accepted_version():
    extras, versions = PROJECT["optional-dependencies"], locked()
    for line in [*PROJECT["dependencies"], *extras["test"], *extras["milvus"]]:
        requirement = Requirement(line)
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_the_milvus_server_is_locked_apart_and_installed_by_the_tests_alone():
    (line,) = PROJECT["optional-dependencies"]["milvus-server"]
    server = Requirement(line)
    assert {name: version in server.specifier for name, version in locked(LOCKS[1]).items()} == {server.name: True}
    assert server.name not in locked()
    needs = dict(re.findall(r"^([\w./-]+):([^#=\n]*)", (ROOT / "Makefile").read_text(), re.M))
    assert {target for target, needed in needs.items() if ".venv/milvus" in needed.split()} == {"test", "notebooks"}


def test_the_website_is_locked_apart_without_torch():
    versions = locked(LOCKS[2])
    for line in PROJECT["optional-dependencies"]["docs"]:
        requirement = Requirement(line)
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, line
    assert not versions.keys() & {"torch", "open-clip-torch", "jupyterlab", "irra-core"}


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_the_hashes_of_its_files(name):
    entries = re.split(r"^(?=[\w.-]+==)", (ROOT / name).read_text(), flags=re.M)[1:]
    assert len(entries) >= len(locked(name)) > 0
    for entry in entries:
        assert re.search(r"\\\n    --hash=sha256:[0-9a-f]{64}", entry), entry.splitlines()[0]


def test_the_installer_and_the_actions_are_pinned():
    make = (ROOT / "Makefile").read_text()
    assert re.search(r"^UV := uv==[\d.]+$", make, re.M)
    assert re.search(r"^PACKAGING := build==[\d.]+ twine==[\d.]+$", make, re.M)
    assert not re.search(r"pip install [^\n]*\buv\b", make)
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        uses = re.findall(r"uses: (.*)", path.read_text())
        assert uses
        for action in uses:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action), action


def test_what_the_environment_file_asks_for_is_what_pip_gets():
    text = (ROOT / "environment.yml").read_text()
    lines = [line.strip(" -") for line in text.splitlines()]
    assert f"python{PROJECT['requires-python']}" in lines
    assert re.findall(r"- (-\S+ \S+)", text.split("- pip:")[1]) == ["-r requirements.lock"]  # -e has no hash
    assert lines[0].endswith("&& pip install --no-deps -e .")


@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_names_no_host(name):
    assert not re.search(r"://|--index-url|--find-links|--extra-index", (ROOT / name).read_text())


def test_continuous_integration_calls_the_test_command_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "set -eu",
        'cd "$(dirname "$0")/.."',
        "exec make test",
    ]


INSTALL = "Install: `pip install irra_core` once released; until then the wheel from `make release`."


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_rules(path):
    cells = nbformat.read(path, 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert cells[0].source.splitlines()[-2:] == ["", INSTALL]
    assert not any(re.search(r"[!%]\s*(pip|conda)\b", cell.source) for cell in cells)
    assert "parameters" in code[0].metadata.get("tags", [])
    assert "notebook_parameters" in code[1].source
    assert ("data_root" in code[0].source) == ("print(irra.settings.folders(data_root))" in code[1].source)
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
