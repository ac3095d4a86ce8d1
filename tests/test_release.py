"""The wheel: what it holds, and that everything works from it in an empty folder; what publishing it needs."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import nbformat
import pytest
import release
import wheels

ROOT = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
CHECKOUT = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a checkout, whose files git lists")
FILES = [
    "LICENSE",
    "notebooks/train.ipynb",
    "irra_core/__init__.py",
    "reports/example/train.html",
    "reports/example/studies/runs/a/run.json",
]


def archives(dist: Path, sdist: list[str], wheel: dict[str, str]) -> Path:
    """An sdist and a wheel with these files."""
    dist.mkdir()
    with tarfile.open(dist / f"irra_core-{VERSION}.tar.gz", "w:gz") as archive:
        for name in sdist:
            archive.addfile(tarfile.TarInfo(f"irra_core-{VERSION}/{name}"), io.BytesIO())
    with zipfile.ZipFile(dist / f"irra_core-{VERSION}-py3-none-any.whl", "w") as archive:
        for name, text in wheel.items():
            archive.writestr(name, text)
    return dist


def whole() -> tuple[list[str], dict[str, str]]:
    """What the two archives hold of FILES."""
    about = f"irra_core-{VERSION}.dist-info"
    held = ["irra_core/__init__.py", "irra_core/notebooks/train.ipynb", "irra_core/studies/committed_runs/a/run.json"]
    wheel = dict.fromkeys([*held, f"{about}/licenses/LICENSE"], "")
    wheel[f"{about}/entry_points.txt"] = "[console_scripts]\nirra = irra_core.command.main:main\n"
    return [name for name in FILES if not name.endswith(".html")], wheel


def test_a_release_that_holds_everything_is_accepted(tmp_path):
    dist = archives(tmp_path / "dist", *whole())
    assert release.wrong(dist, FILES) == release.wrong(dist, FILES, f"v{VERSION}") == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda sdist, wheel: sdist.remove("notebooks/train.ipynb"), "lacks 1 files: notebooks/train.ipynb"),
        (lambda sdist, wheel: sdist.append("data/photo.jpg"), "should not hold 1 files: data/photo.jpg"),
        (lambda sdist, wheel: wheel.pop("irra_core/notebooks/train.ipynb"), "lacks 1 files: irra_core/notebooks/train"),
        (lambda sdist, wheel: wheel.update({"tests/wheels.py": ""}), "should not hold 1 files: tests/wheels.py"),
        (lambda sdist, wheel: wheel.pop(f"irra_core-{VERSION}.dist-info/licenses/LICENSE"), "not hold the licence"),
        (lambda sdist, wheel: wheel.update({f"irra_core-{VERSION}.dist-info/entry_points.txt": ""}), "command irra"),
    ],
)
def test_each_mistake_in_an_archive_is_named(change, said, tmp_path):
    sdist, wheel = whole()
    change(sdist, wheel)
    (found,) = release.wrong(archives(tmp_path / "dist", sdist, wheel), FILES)
    assert said in found


def test_a_release_of_another_tag_or_size_or_with_an_old_archive_beside_it_is_refused(tmp_path, monkeypatch):
    dist = archives(tmp_path / "dist", *whole())
    (found,) = release.wrong(dist, FILES, "v99")
    assert f"the tag is v{VERSION}" in found
    with monkeypatch.context() as patch:
        patch.setattr(release, "LARGEST", 100)
        assert len(release.wrong(dist, FILES)) == 2
    (dist / "irra_core-0.0.1.tar.gz").write_bytes(b"")
    assert "alone" in release.wrong(dist, FILES)[0]


@CHECKOUT
def test_the_wheel_holds_the_package_the_notebooks_and_the_committed_runs(tmp_path):
    needed = ("irra_core/", *(f"{folder}/" for folder in release.ELSEWHERE), "pyproject.toml", "README.md", "LICENSE")
    tree = wheels.copy_checkout([name for name in release.tracked() if name.startswith(needed)], tmp_path / "tree")
    (tmp_path / "dist").mkdir()
    with zipfile.ZipFile(wheels.build(tree, "wheel", tmp_path / "dist")) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == release.of_the_wheel(release.tracked())
    assert {Path(name).suffix for name in held} >= {".py", ".csv", ".js", ".css", ".ipynb", ".safetensors", ".gz"}


def test_the_citation_has_the_version_of_the_package():
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()


def test_publishing_needs_no_secret_and_happens_after_the_check():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    built, published = re.split(r"\n  publish:\n", text)
    assert "run: make release" in built
    assert "needs: build" in published
    assert "id-token: write" in published
    assert "id-token" not in built
    assert not re.search(r"secrets\.|password", text)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return wheels.build_release(tmp_path_factory.mktemp("release"))


class Installed:
    """An empty folder outside the checkout, and the programs of an environment that has the wheel."""

    def __init__(self, wheel: Path, folder: Path):
        self.programs, self.variables = wheels.install(wheel, folder / "environment")
        self.folder = folder / "empty"
        self.folder.mkdir()

    def __call__(self, program: str, *words: str, smoke: bool = True, folder: Path | None = None):
        """What a program says that is run in the folder; it must succeed."""
        environment = self.variables | {"IRRA_SMOKE": "1" if smoke else "0"}
        command = [shutil.which(program, path=str(self.programs)), *words]
        ended = subprocess.run(
            command, cwd=folder or self.folder, env=environment, capture_output=True, text=True, timeout=1200
        )
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
        return ended


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Installed:
    (wheel,) = built.glob("*.whl")
    return Installed(wheel, tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def trained(installed) -> subprocess.CompletedProcess:
    """What `irra train` said in the empty folder."""
    return installed("irra", "train", "-p", "batch_size", "8")


IMPORT_ALL = """
import importlib, json, pkgutil, irra_core
names = [each.name for each in pkgutil.walk_packages(irra_core.__path__, "irra_core.")]
names = [name for name in names if not name.endswith("__main__")]
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
"""
SEARCH = """
import irra_core as irra
model, recipe = irra.load_model("latest")
annotations = irra.open_annotations(recipe)
gallery = irra.Gallery.build(model, annotations[annotations.split == "test"])
print(len(gallery.search("a man in a red jacket and blue jeans", k=3)), len(irra.published()) > 10)
"""

COMMITTED = """
import json
from irra_core.recipes import read_recipe
from irra_core.studies import committed
for file in committed.SHIPPED.glob("*/run.json"):
    recipe = read_recipe(json.loads(file.read_text())["recipe"])
    print(committed.find(recipe).relative_to(committed.SHIPPED))
"""


@CHECKOUT
@pytest.mark.notebook
class TestFromAWheel:
    def test_the_release_is_fit_to_be_published(self, built):
        assert release.wrong(built, release.tracked()) == []

    def test_every_module_is_imported_from_the_wheel(self, installed):
        ended = installed("python", "-c", IMPORT_ALL)
        found = json.loads(ended.stdout.splitlines()[-1])
        wanted = {path for path in release.tracked() if path.endswith(".py") and path.startswith("irra_core/")}
        assert len(found) == len(wanted) - 2  # irra_core itself, and the room command's __main__
        inside = installed.programs.parent.resolve()
        assert [name for name, file in found.items() if not Path(file).resolve().is_relative_to(inside)] == []

    def test_training_and_a_search_work_and_the_first_line_says_where_everything_is(self, installed, trained):
        where, *_ = trained.stderr.splitlines()
        folder, home = installed.folder, installed.variables["HOME"]
        assert where.startswith(f"data: {folder / 'data'}, reports: {folder / 'reports'}, cache: ")
        cache = Path(where.split("cache: ")[1])
        if os.name != "nt":
            assert cache.is_relative_to(home)
        assert any(cache.rglob("*.*"))
        assert {path.name for path in folder.iterdir()} - {"photos"} == {"data", "reports"}
        run = (folder / "reports" / "smoke" / "latest").resolve()
        assert f"    run folder: {run}" in trained.stdout.splitlines()
        first = next(cell for cell in nbformat.read(run / "train.ipynb", 4).cells if cell.get("outputs"))
        assert first.outputs[0].text.splitlines() == [where]
        assert installed("python", "-c", SEARCH).stdout.split() == ["3", "True"]

    def test_the_search_page_is_served_over_a_folder_of_photos(self, installed, trained):
        photos = installed.folder / "photos"
        photos.mkdir()
        for path in sorted((installed.folder / "data").rglob("*.jpg"))[:4]:
            shutil.copy(path, photos)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        command = ["explore", "photos", "--model", "latest", "--no-browser", "--port", port]
        environment = installed.variables | {"IRRA_SMOKE": "1"}
        served = subprocess.Popen(
            [installed.programs / "irra", *command], cwd=installed.folder, env=environment, stderr=subprocess.PIPE
        )
        try:
            said = iter(lambda: served.stderr.readline().decode(), "")
            assert next(said).startswith(f"data: {installed.folder / 'data'}, ")
            address = next(found[0] for line in said if (found := re.search(r"http://127\S+token=\w+", line)))
            with urllib.request.urlopen(address, timeout=300) as page:
                assert "h1\\u003eFind a person by a description" in page.read().decode()  # of the cell, not the title
        finally:
            served.terminate()
            served.communicate()

    def test_every_notebook_runs_from_the_copy_in_an_empty_folder(self, installed, tmp_path):
        said = installed("irra", "notebooks", ".", folder=tmp_path)
        assert "data: " not in said.stderr
        assert sorted(path.stem for path in tmp_path.iterdir()) == NOTEBOOKS
        for name in NOTEBOOKS:
            words = ["-m", "papermill", "--no-progress-bar", f"{name}.ipynb", f"executed-{name}.ipynb"]
            installed("python", *words, folder=tmp_path)
        assert (tmp_path / "reports" / "smoke" / "latest" / "metrics.json").is_file()

    def test_the_committed_runs_are_found_as_in_the_checkout(self, installed):
        wanted = {path.parent.name for path in (ROOT / "reports/example/studies/runs").glob("*/run.json")}
        assert wanted == set(installed("python", "-c", COMMITTED, smoke=False).stdout.split()) != set()
