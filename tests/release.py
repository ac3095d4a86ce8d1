"""Is what `make release` built fit to be published? Run by it, with the standard library alone: contents and sizes.

python tests/release.py dist [TAG]
"""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 30e6  # bytes of an archive
ELSEWHERE = {"notebooks": "irra_core/notebooks", "reports/example/studies/runs": "irra_core/studies/committed_runs"}
WRITTEN = ("PKG-INFO", "setup.cfg", "irra_core.egg-info")  # what setuptools adds to an sdist


def tracked(root: Path = ROOT) -> list[str]:
    """Every file of the checkout that git tracks, relative to it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout.decode()
    return [name for name in listed.split("\0") if name and (root / name).is_file()]


def of_the_sdist(files: list[str]) -> set[str]:
    """The tracked files that an sdist holds: all but the pages of executed notebooks."""
    return {name for name in files if not (name.startswith("reports/example/") and name.endswith(".html"))}


def of_the_wheel(files: list[str]) -> set[str]:
    """What a wheel holds of the tracked files, by its names: the package, the notebooks, the committed runs."""
    held = {name for name in files if name.startswith("irra_core/")}
    for folder, inside in ELSEWHERE.items():
        held |= {inside + name.removeprefix(folder) for name in files if name.startswith(folder + "/")}
    return held


def differences(what: str, held: set[str], wanted: set[str]) -> list[str]:
    """One sentence for what an archive lacks, and one for what it should not hold."""
    found = {"lacks": sorted(wanted - held), "should not hold": sorted(held - wanted)}
    return [f"{what} {verb} {len(names)} files: {', '.join(names[:5])}" for verb, names in found.items() if names]


def wrong(dist: Path, files: list[str], tag: str | None = None) -> list[str]:
    """What keeps the sdist and the wheel in the folder `dist` from being published, in sentences; empty if nothing."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    sdist, wheel = dist / f"irra_core-{version}.tar.gz", dist / f"irra_core-{version}-py3-none-any.whl"
    if {path.name for path in dist.iterdir()} != {sdist.name, wheel.name}:
        return [f"{dist} should hold {sdist.name} and {wheel.name} alone"]
    found = [] if tag in (None, f"v{version}") else [f"the tag is {tag}, the version {version}: the tag is v{version}"]
    for path in (sdist, wheel):
        if (size := path.stat().st_size) > LARGEST:
            found.append(f"{path.name} has {size / 1e6:.1f} MB, at most {LARGEST / 1e6:.0f} MB")
    with tarfile.open(sdist) as archive:
        names = {str(PurePosixPath(*PurePosixPath(each.name).parts[1:])) for each in archive if each.isfile()}
    held = {name for name in names if not name.startswith(WRITTEN)}
    found += differences(sdist.name, held, of_the_sdist(files))
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
        about = f"irra_core-{version}.dist-info"
        if "irra = irra_core.command.main:main" not in archive.read(f"{about}/entry_points.txt").decode():
            found.append(f"{wheel.name} does not install the command irra")
        if f"{about}/licenses/LICENSE" not in archive.namelist():
            found.append(f"{wheel.name} does not hold the licence")
    return found + differences(wheel.name, held, of_the_wheel(files))


if __name__ == "__main__":
    dist = Path(sys.argv[1])
    if sentences := wrong(dist, tracked(), *sys.argv[2:]):
        sys.exit("\n".join(sentences))
    for path in sorted(dist.iterdir()):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
