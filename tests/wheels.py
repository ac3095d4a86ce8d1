"""The checkout → its sdist, the wheel built from that, and an environment in which the wheel is installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import release

BUILD = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"


def build(tree: Path, kind: str, folder: Path) -> Path:
    """The archive, `sdist` or `wheel`, that this environment's setuptools builds of a source tree; no network."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(folder)]
    ended = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert "Warning" not in ended.stdout + ended.stderr, ended.stdout + ended.stderr
    (built,) = folder.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind])
    return built


def copy_checkout(files: list[str], tree: Path) -> Path:
    """A copy of these files of the checkout, in which a build may leave its own."""
    for name in files:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(release.ROOT / name, tree / name)
    return tree


def build_release(folder: Path) -> Path:
    """The folder with the sdist of the tracked files, and the wheel that is built from it."""
    dist = folder / "dist"
    dist.mkdir(parents=True)
    sdist = build(copy_checkout(release.tracked(), folder / "checkout"), "sdist", dist)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (tree,) = (folder / "unpacked").iterdir()
    build(tree, "wheel", dist)
    return dist


def install(wheel: Path, folder: Path) -> tuple[Path, dict[str, str]]:
    """The folder of the programs of a fresh environment with the wheel, and the variables to run them with.

    It sees the packages of this environment by a line in a .pth file. Python does not read the .pth files of a folder
    that is added this way, so an editable install of the project has no effect there.
    """
    venv.create(folder, symlinks=os.name != "nt")
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = programs / Path(sys.executable).name
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    places = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(own, "packages_of_the_tests.pth").write_text("\n".join(places) + "\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("IRRA_", "PYTHON", "VIRTUAL_"))}
    share = Path(sysconfig.get_path("data"), "share", "jupyter")  # templates of nbconvert and Voilà
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    home = folder.with_name("home")
    home.mkdir()
    homes = {"HOME": str(home), "USERPROFILE": str(home), "XDG_CACHE_HOME": "", "LOCALAPPDATA": str(home)}
    return programs, kept | homes | {"PATH": path, "JUPYTER_PATH": str(share)}
