"""Nothing that comes from elsewhere runs: no call in the code could, and no file that tries to gets in."""

import ast
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

import irra_core as irra
from irra_core.backbone import load_clip_weights

PROJECT = Path(__file__).parent.parent
BUILT_INS = ("eval", "exec", "compile", "__import__")


def sources() -> dict[str, str]:
    """Name → Python source of every module and of every notebook's code cells."""
    found = {path.name: path.read_text(encoding="utf-8") for path in sorted((PROJECT / "irra_core").glob("**/*.py"))}
    for path in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        lines = "".join("".join(cell["source"]) + "\n" for cell in cells).splitlines()
        found[path.name] = "\n".join(line for line in lines if not line.startswith("%"))
    return found


def forbidden(source: str) -> list[str]:
    """Every call and import of a source that could run what it is given, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"{node.lineno}: imports {n}" for n in names if n.split(".")[0] in ("pickle", "dill", "yaml")]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in BUILT_INS or name in ("os.system", "os.popen") or name.startswith("pickle.load"):
            found.append(f"{node.lineno}: calls {name}")
        if given.get("shell", "False") != "False":
            found.append(f"{node.lineno}: {name} with shell={given['shell']}")
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
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
        "import pickle",
        "from yaml import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
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


@pytest.mark.parametrize("name", ["part-00000.safetensors", "part-00000.parquet", "gallery.json"])
def test_a_gallery_with_a_pickle_inside_is_refused_and_runs_none(name, mine, tmp_path, annotations, tiny):
    model = irra.build_model(tiny, 3)
    gallery = irra.Gallery.build(model, annotations[annotations.split == "test"])
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
