"""The commands in the README, as a new user types them: in a fresh shell, in the folder of the checkout."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from irra_core.annotations import load_annotations
from irra_core.command.execute import STUDIES
from irra_core.synthetic.people import make_synthetic

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("make", "irra", "papermill", "source", "cd")
SHORT = " -p backbone small -p pretrained none -p batch_size 8"  # of the real data sets' recipe
README = (ROOT / "README.md").read_text()
BLOCKS = [
    [line.strip() for line in block.splitlines()]
    for block in re.findall(r"(?:^    \S.*\n)+", README, re.M)
    if block.split()[0] in PROGRAMS
]
NEEDED = pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "irra").exists(), reason="the environment that make makes")


def fresh_shell(lines: list[str], checkout: Path, home: Path, **environment) -> subprocess.CompletedProcess:
    """What a shell without this environment says to the lines, of which the first that fails is the last."""
    kept = {name: os.environ[name] for name in os.environ if name.startswith(("IRRA_", "PYTHONPATH", "OMP_", "LANG"))}
    path = os.pathsep.join(
        each for each in os.environ["PATH"].split(os.pathsep) if not (Path(each) / "papermill").exists()
    )
    variables = kept | {"PATH": path, "HOME": str(home)} | environment
    return subprocess.run(
        ["bash", "-e", "-x"], input="\n".join(lines), cwd=checkout, env=variables, capture_output=True, text=True
    )


def test_the_readme_has_blocks_of_commands():
    programs = [line.split()[0] for block in BLOCKS for line in block]
    assert {"make", "irra", "papermill"} <= set(programs) <= set(PROGRAMS)
    assert len(BLOCKS) >= 4


@NEEDED
def test_every_command_is_found_after_the_lines_above_it(tmp_path):
    lines = [line for block in BLOCKS for line in block]
    asked = [line if line.startswith(("source", "cd")) else f"command -v {line.split()[0]}" for line in lines]
    ended = fresh_shell(asked, ROOT, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert fresh_shell(["papermill --version"], ROOT, tmp_path).returncode == 127  # the shell is a fresh one


def test_every_target_and_study_in_its_text_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([\w-]+)`", README)) <= targets
    assert set(re.findall(r"`irra study ([\w-]+)`", README)) <= set(STUDIES)


def shrunken(line: str) -> str:
    """A command of the README, with the small CLIP instead of one that would be downloaded."""
    line = line.partition("#")[0]
    real = re.search(r"train.*-p dataset", line)
    return line + SHORT if real else line


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose notebooks are copies, in which commands may leave files; and what the README assumes in it."""
    import torch

    from irra_core.backbone import new_clip
    from irra_core.model import IRRA
    from irra_core.released.checkpoint import save_official

    folder = tmp_path / "checkout"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name in ("notebooks", "Makefile"):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
        elif path.name not in ("reports", "data"):
            (folder / path.name).symlink_to(path)
    make = (folder / "Makefile").read_text()
    assert ".venv/ready: requirements.lock pyproject.toml\n" in make
    (folder / "Makefile").write_text(make.replace(".venv/ready: requirements.lock pyproject.toml", ".venv/ready:"))
    for layout in ("rstp", "cuhk"):
        made = make_synthetic(tmp_path / "data", layout=layout, people=12)
    table = load_annotations("cuhk", tmp_path / "data")
    table = table.assign(path=[Path(path).relative_to(made) for path in table.path], id=table.pid)
    table[["path", "caption", "id", "split"]].to_csv(made / "annotations.csv", index=False)
    (tmp_path / "mine").symlink_to(made)
    vision = {"layers": 1, "width": 64, "patch_size": 16, "image_size": (384, 128)}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    clip = {"embed_dim": 64, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    save_official(IRRA(new_clip(clip, (384, 128), 16), 11003, "cross", 2), folder / "notebooks" / "best.pth")
    return folder


@NEEDED
@pytest.mark.notebook
def test_every_command_works_as_written_shrunken(checkout, tmp_path):
    """All but the explorer, which serves until it is stopped; each in a fresh shell, after the `cd` above it."""
    environment = {"IRRA_SMOKE": "1", "IRRA_DATA": str(tmp_path / "data"), "IRRA_REPORTS": str(tmp_path / "reports")}
    above, done = [], 0
    for line in (shrunken(line) for block in BLOCKS for line in block if " explore" not in line):
        if line.startswith(("source", "cd")):
            above.append(line)
        else:
            ended = fresh_shell([*above, line], checkout, tmp_path, **environment)
            assert ended.returncode == 0, f"{line}\n{ended.stderr[-3000:]}"
            done += 1
    assert done >= 9
    assert (tmp_path / "reports" / "smoke" / "latest" / "metrics.json").exists()
