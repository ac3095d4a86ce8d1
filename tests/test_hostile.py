"""Nothing that comes from elsewhere runs: no call in the code could, and no file that tries to gets in."""

import ast
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

import irra_core as irra
from irra_core.backbone import load_clip_weights

PROJECT = Path(__file__).parent.parent


def sources() -> dict[str, str]:
    """Name → Python source of every module and of every notebook's code cells."""
    found = {path.name: path.read_text(encoding="utf-8") for path in sorted((PROJECT / "irra_core").glob("**/*.py"))}
    for path in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        found[path.name] = "".join("".join(cell["source"]) + "\n" for cell in cells)  # no Python: ! and % are refused
    return found


MODULES = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "ruamel")
CALLS = re.compile(  # os.execve takes a list and no shell, as subprocess.run does
    r"(builtins\.)?(eval|exec|compile|__import__)|os\.(system|popen|startfile|exec(?!ve$)\w*|spawn\w*|posix_spawn\w*)"
    r"|subprocess\.(getoutput|getstatusoutput)|asyncio\.create_subprocess_shell|(.+\.)?get_ipython\(\)\..+"
    r"|pandas\.read_pickle|torch\.(jit\.load|hub\.load\w*|package\..+)|torch\.distributed\.\w*object\w*"
)


def imported(tree: ast.AST) -> dict[str, str]:
    """Name in a source → what it stands for: `t` → torch, `load` → torch.load."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def forbidden(source: str) -> list[str]:
    """Every call and import of a source that could run what it is given, with its line."""
    found, tree = [], ast.parse(source)
    names = {"np": "numpy", "pd": "pandas", "dist": "torch.distributed"} | imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            taken = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"{node.lineno}: imports {name}" for name in taken if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        name, given = names.get(first, first) + dot + rest, {w.arg: ast.unparse(w.value) for w in node.keywords}
        if CALLS.fullmatch(name) or name.split(".")[0] in MODULES:
            found.append(f"{node.lineno}: calls {name}")
        if name == "importlib.import_module" and any(module in ast.unparse(node) for module in MODULES):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        if given.get("shell", "False") != "False":
            found.append(f"{node.lineno}: {name} with shell={given['shell']}")
        if name == "torch.load" and (given.get("weights_only") != "True" or "pickle_module" in given):
            found.append(f"{node.lineno}: torch.load without weights_only=True, or with a pickle_module")
        if name == "numpy.load" and (given.get("allow_pickle", "False") != "False" or len(node.args) > 2):
            found.append(f"{node.lineno}: {name} with allow_pickle")
    return found


@pytest.mark.parametrize("name", sources())
def test_no_source_calls_what_could_run_what_it_is_given(name):
    assert forbidden(sources()[name]) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(code)",
        "compile(a, b, c)",
        "import os; os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "from os import system; system('ls')",
        "import os as o; o.execvp('ls', [])",
        "subprocess.getoutput('ls')",
        "asyncio.create_subprocess_shell('ls')",
        "get_ipython().system('ls')",
        "import builtins; builtins.eval('1')",
        "importlib.import_module('pickle')",
        "import pickle",
        "import cloudpickle",
        "import ruamel.yaml",
        "from yaml import load",
        "pd.read_pickle(path)",
        "torch.jit.load(path)",
        "from torch import hub; hub.load('somebody/repository', 'model')",
        "torch.package.PackageImporter(path)",
        "dist.broadcast_object_list(given)",
        "from torch import load; load(path)",
        "import torch as t; t.load(path)",
        "torch.load(path, weights_only=True, pickle_module=own)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, None, True)",
    ],
)
def test_the_walk_finds_what_it_looks_for(source):
    assert len(forbidden(source)) == 1


class Mine:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def mine(tmp_path) -> Path:
    """Where the marker would be."""
    return tmp_path / "marker"


def hostile(path: Path, marker: Path, form: str) -> Path:
    """A file that would make the marker: a bare pickle, or a torch file with one among its tensors."""
    if form == "pickle":
        path.write_bytes(pickle.dumps(Mine(marker)))
    else:
        torch.save({"model": {"weight": torch.zeros(2), "more": Mine(marker)}}, path)
    return path


def open_pretrained(path):
    """A recipe whose `pretrained` is the file, and its model."""
    return irra.build_model(irra.recipe(pretrained=str(path)), 3)


WAYS_IN = {
    "open_checkpoint": irra.checkpoints.open_checkpoint,
    "load_checkpoint": irra.load_checkpoint,
    "load_official": irra.load_official,
    "pretrained": open_pretrained,
    "load_clip_weights": lambda path: load_clip_weights(irra.build_model(irra.recipe(pretrained="none"), 3).clip, path),
}


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("way", WAYS_IN)
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(way, suffix, form, mine, tmp_path):
    path = hostile(tmp_path / f"weights{suffix}", mine, form)
    with pytest.raises(ValueError, match=r"weights\.\w+ .*without running code"):
        WAYS_IN[way](path)
    assert not mine.exists()


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_the_marker_appears_where_such_a_file_is_loaded_without_care(form, mine, tmp_path):
    path = hostile(tmp_path / "weights.pth", mine, form)
    torch.load(path, weights_only=False) if form == "torch" else pickle.loads(path.read_bytes())
    assert mine.exists()


@pytest.mark.parametrize("name", ["part-00000.safetensors", "hnsw.safetensors", "gallery.json"])
def test_a_gallery_with_a_pickle_inside_is_refused_and_runs_none(name, mine, tmp_path, annotations, tiny):
    model = irra.build_model(tiny, 3)
    gallery = irra.Gallery.build(model, annotations[annotations.split == "test"], index="hnsw")
    gallery.save(tmp_path / "gallery")
    assert (tmp_path / "gallery" / name).exists(), sorted(os.listdir(tmp_path / "gallery"))
    hostile(tmp_path / "gallery" / name, mine, "pickle")
    with pytest.raises(ValueError, match="gallery"):
        irra.Gallery.load(tmp_path / "gallery", model)
    assert not mine.exists()


def test_a_state_with_a_pickle_inside_is_warned_of_and_runs_none(mine, tmp_path, annotations, tiny):
    folder = tmp_path / "run"
    next(irra.train(tiny, annotations, folder))
    hostile(folder / irra.runs.STATE, mine, "pickle")
    with pytest.warns(UserWarning, match="training begins again"):
        next(irra.train(tiny, annotations, folder))
    assert not mine.exists()
