"""What Windows and macOS lack: the flows run without it (tests/windows), and no source relies on it."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import torch

import irra_core as irra
from irra_core import checkpoints, runs, settings
from irra_core.scale import machine, mps

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = ROOT / "tests" / "windows"
SHORT = ["-p", "pretrained", "none", "-p", "batch_size", "8", "-p", "losses", "sdm", "-p", "max_steps", "2"]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux stands in for the systems that lack its features")


def elsewhere(words: list, folder: Path) -> subprocess.CompletedProcess:
    """What Python does with these words where tests/windows restricts it; data, reports and cache are in the folder."""
    roots = {f"IRRA_{name.upper()}": str(folder / name) for name in ("data", "reports", "cache")}
    path = os.pathsep.join([str(ELSEWHERE), str(ROOT)])
    environment = os.environ | roots | {"PYTHONPATH": path, "PYTHONWARNDEFAULTENCODING": "1", "IRRA_SMOKE": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=900)


RESTRICTIONS = """
import json, mmap, multiprocessing, os, pathlib, shutil, subprocess, sys
import sitecustomize
def refused(call, kind):
    try:
        call()
    except kind:
        return True
    return False
for name in ("file", "held", "target", "mapped", "plain"):
    pathlib.Path(name).write_bytes(b"content")
os.mkdir("folder"); os.mkdir("other"); pathlib.Path("folder/inside").write_bytes(b"content")
held, inside = open("held", "rb"), open("folder/inside", "rb")
with open("mapped", "r+b") as file:
    view = mmap.mmap(file.fileno(), 0)
def flush_for_reading():
    with open("file", "rb") as file:
        os.fsync(file.fileno())
def by_name(name):
    __import__(name)
found = {f"import {name}": refused(lambda: by_name(name), ImportError) for name in sitecustomize.MODULES}
found |= {f"os.{name}": not hasattr(os, name) for name in sitecustomize.FUNCTIONS}
found |= {
    "symlink": refused(lambda: pathlib.Path("link").symlink_to("file"), OSError),
    "link": refused(lambda: os.link("file", "link"), OSError),
    "replace an open file": refused(lambda: os.replace("file", "held"), PermissionError),
    "replace a mapped file": refused(lambda: pathlib.Path("file").replace("mapped"), PermissionError),
    "replace a folder": refused(lambda: os.replace("folder", "other"), PermissionError),
    "rename onto a file": refused(lambda: pathlib.Path("file").rename("target"), FileExistsError),
    "move an open file": refused(lambda: os.replace("held", "new"), PermissionError),
    "move a folder with an open file": refused(lambda: os.rename("folder", "new"), PermissionError),
    "delete an open file": refused(lambda: os.unlink("held"), PermissionError),
    "delete a mapped file": refused(lambda: pathlib.Path("mapped").unlink(), PermissionError),
    "delete a folder with an open file": refused(lambda: shutil.rmtree("folder"), PermissionError),
    "flush what is open for reading": refused(flush_for_reading, OSError),
    "fork": refused(multiprocessing.get_context("fork").Process(target=print).start, AttributeError),
    "spawn is the default": multiprocessing.get_start_method() == "spawn",
    "newlines": os.linesep == "\\r\\n",
    "the system's encoding": refused(lambda: pathlib.Path("file").read_text(), EncodingWarning),
    "children": subprocess.run([sys.executable, "-c", "import fcntl"], capture_output=True).returncode == 1,
}
import irra_core.checkpoints
found["the package's ways"] = irra_core.checkpoints.WINDOWS
held.close(); view.close(); inside.close()
os.replace("file", "held"); os.unlink("mapped"); os.rename("folder", "new")
print(json.dumps(found))
"""


@on_linux
def test_each_restriction_raises_and_a_file_that_is_closed_is_free(tmp_path):
    ended = elsewhere(["-c", RESTRICTIONS], tmp_path)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert len(found) > 30
    assert [name for name, restricted in found.items() if not restricted] == []


@on_linux
def test_training_with_interruptions_galleries_and_the_explorer_work_without_what_windows_lacks(tmp_path):
    ended = elsewhere([ELSEWHERE / "flow.py", tmp_path / "base"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "run" in json.loads(ended.stdout.splitlines()[-1])


@on_linux
@pytest.mark.notebook
def test_irra_train_works_without_what_windows_lacks(tmp_path):
    ended = elsewhere(["-m", "irra_core.command", "train", *SHORT], tmp_path)
    assert ended.returncode == 0, ended.stderr
    reports = tmp_path / "reports" / "smoke"
    folder = reports / (reports / "latest.txt").read_text(encoding="utf-8").strip()
    assert {"train.ipynb", "train.html", "metrics.json"} <= {path.name for path in folder.iterdir()}
    assert f"    run folder: {folder}" in ended.stdout.splitlines()
    assert not (reports / "latest").exists()


GRID = """
import sys
import irra_core as irra
if __name__ == "__main__":
    plan = irra.studies.plan("rq2", pretrained="none", batch_size=8)
    table = irra.studies.run_all(plan, workers=2)
    print(*table.status, *table.error)
"""


@on_linux
@pytest.mark.notebook
def test_a_study_with_two_workers_works_without_what_windows_lacks(tmp_path):
    (tmp_path / "grid.py").write_text(GRID, encoding="utf-8")
    ended = elsewhere([tmp_path / "grid.py"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["finished", "finished"]


# sources


def without_encoding(source: str) -> Iterator[int]:
    """The lines of calls that open a text file, or a child's output as text, without saying its encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        named = {each.arg: getattr(each.value, "value", True) for each in node.keywords}
        values = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        binary = any(re.fullmatch(r"[rwxa+]*b[rwxa+]*", value) for value in [*values, str(named.get("mode", ""))])
        owner = getattr(getattr(node.func, "value", None), "id", "")
        if called == "read_text":
            wrong = "encoding" not in named and not node.args
        elif called == "write_text":
            wrong = "encoding" not in named and isinstance(node.func, ast.Attribute) and owner != "runs"
        elif called == "open" and (isinstance(node.func, ast.Name) or not owner or owner not in ("Image", "tarfile")):
            wrong = "encoding" not in named and not binary
        else:
            wrong = owner == "subprocess" and named.get("text") is True and "encoding" not in named
        if wrong:
            yield node.lineno


def sources() -> Iterator[tuple[str, str]]:
    """Name and text of every source of the package, of its benchmarks, and of the notebooks' cells."""
    for folder in ("irra_core", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                yield path.name, re.sub(r"^[%!].*$", "", cell.source, flags=re.M)


def test_every_text_file_is_opened_with_its_encoding():
    assert [f"{name}, line {line}" for name, text in sources() for line in without_encoding(text)] == []


@pytest.mark.parametrize(
    "source",
    ["open('a')", "path.open('w')", "path.read_text()", "path.write_text(text)", "subprocess.run(c, text=True)"],
)
def test_a_text_file_without_its_encoding_is_noticed(source):
    assert list(without_encoding(source)) == [1]


def absent_elsewhere(source: str) -> Iterator[str]:
    """What a source takes from `os` that tests/windows removes; not where it looks first (`hasattr`, `WINDOWS`)."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
        if named and re.search(rf'"{node.attr}"', RESTRICTED) and f'(os, "{node.attr}"' not in source:
            yield node.attr


RESTRICTED = re.search(r"^FUNCTIONS = (.*)", (ELSEWHERE / "sitecustomize.py").read_text(encoding="utf-8"), re.M)[1]


def test_no_source_takes_from_os_what_windows_lacks():
    assert [f"{name}: os.{attribute}" for name, text in sources() for attribute in absent_elsewhere(text)] == []
    assert list(absent_elsewhere("os.getloadavg()[0] + os.cpu_count()")) == ["getloadavg"]


def test_files_of_git_have_the_same_bytes_everywhere():
    assert "* -text" in (ROOT / ".gitattributes").read_text(encoding="utf-8").splitlines()


def test_the_tests_that_need_linux_exist():
    from conftest import LINUX

    for name, tests in LINUX.items():
        source = (ROOT / "tests" / name).read_text(encoding="utf-8")
        assert [test for test in tests.split() if f"def {test}(" not in source] == [], name


# names

HOSTILE = [
    "a:b",
    'say "x"',
    "what?*",
    "<x>|y",
    "ends with a dot.",
    "ends with a space ",
    "tab\there",
    "C:\\x\\y.",
    "a/b.",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_runs_name_is_one_that_windows_accepts(value):
    made = irra.recipe("synthetic").replace(pretrained=f"{value}.pt")
    for name in (runs.run_name(made), runs._plain(value)):
        assert not re.search(r'[<>:"/\\|?*\x00-\x1f]', name), name
        assert not name.endswith((".", " ")), name


# places


def test_the_latest_run_is_named_by_a_text_file_where_links_are_refused(tmp_path, monkeypatch):
    from irra_core.hub.runs import weights_file

    def refused(*_, **__):
        raise OSError(22, "A required privilege is not held by the client")

    monkeypatch.setenv("IRRA_REPORTS", str(tmp_path))
    monkeypatch.setattr(os, "symlink", refused)
    for name in ("default", "seed=1"):
        folder = tmp_path / "synthetic" / name
        folder.mkdir(parents=True)
        (folder / runs.WEIGHTS).touch()
        runs.mark_latest(folder)
        assert (tmp_path / "latest.txt").read_bytes() == f"synthetic/{name}\n".encode()
        runs.begin(folder, irra.recipe("synthetic"), "data")
        assert runs.load_run(tmp_path / "latest")["data"] == "data"
        for source in ("latest", tmp_path / "latest", tmp_path / "latest" / runs.WEIGHTS):
            assert weights_file(source) == (folder / runs.WEIGHTS).resolve()
    assert not (tmp_path / "latest").exists()
    assert not list(tmp_path.glob(".latest*"))


def test_a_file_that_somebody_has_open_is_waited_for_and_then_named_with_the_remedy(tmp_path, monkeypatch):
    calls, replace = [], os.replace

    def busy(source, target):
        calls.append(target)
        if len(calls) < 4:
            raise PermissionError(13, "The process cannot access the file")
        replace(source, target)

    for module in (settings, checkpoints):
        monkeypatch.setattr(module, "WINDOWS", True)
    monkeypatch.setattr(settings.time, "sleep", lambda _: None)
    monkeypatch.setattr(os, "replace", busy)
    runs.write_text(tmp_path / "a.txt", "one\n")
    assert len(calls) == 4
    assert (tmp_path / "a.txt").read_bytes() == b"one\n"
    monkeypatch.setattr(os, "replace", lambda *_: busy(*calls.clear() or _))
    with pytest.raises(PermissionError, match=r"a\.txt cannot be written .*close whatever has it open, or make room"):
        runs.write_text(tmp_path / "a.txt", "two\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_peak_memory_is_windows_own_where_proc_is_absent(monkeypatch):
    monkeypatch.setattr(machine, "Path", lambda _: Path("/nowhere/at/all"))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=7)))
    assert machine.peak_memory() == 7
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=5)))
    if sys.platform == "linux":  # as on macOS: `resource`, in other units
        assert machine.peak_memory() > 2**20
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_memory() == 5


# Apple's GPU


@pytest.fixture
def apple(monkeypatch):
    """A machine on which torch finds MPS."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.delenv("RANK", raising=False)
    mps.scores_as_cpu.cache_clear()
    yield
    mps.scores_as_cpu.cache_clear()


@pytest.mark.parametrize(("difference", "device"), [(1e-6, "mps"), (0.01, "cpu"), (float("inf"), "cpu")])
def test_mps_is_taken_where_it_gives_the_cpus_scores(apple, monkeypatch, difference, device):
    monkeypatch.setattr(mps, "largest_difference", lambda model, device: difference)
    if device == "mps":
        assert settings.default_device() == torch.device("mps")
    else:
        with pytest.warns(UserWarning, match=rf"\(MPS\) is not used, the CPU is: its scores differ .* by {difference}"):
            assert settings.default_device() == torch.device("cpu")
    assert settings.default_device().type == device  # and the warning came once


def test_mps_that_lacks_an_operation_is_left(apple):
    with pytest.warns(UserWarning, match=r"\(MPS\) is not used, the CPU is: ."):  # this machine has none
        assert settings.default_device() == torch.device("cpu")


def test_the_processes_of_torchrun_stay_on_the_cpu(apple, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert settings.default_device() == torch.device("cpu")


def test_the_self_check_compares_the_scores_of_the_device(monkeypatch, recwarn):
    model = mps._small_model()
    assert mps.largest_difference(model, torch.device("cpu")) == 0
    inner = model.encode_text
    calls = []

    def otherwise(tokens):
        calls.append(tokens)
        return inner(tokens) + (0.3 if len(calls) == 2 else 0.0)  # the second call is the device's

    monkeypatch.setattr(model, "encode_text", otherwise)
    assert mps.largest_difference(model, torch.device("cpu")) > mps.SAME
    calls.clear()
    monkeypatch.setattr(
        model, "encode_text", lambda tokens: inner(tokens) * (torch.nan if calls or calls.append(1) else 1)
    )
    assert mps.largest_difference(model, torch.device("cpu")) == float("inf")
