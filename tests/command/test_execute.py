"""`irra train` at a terminal: its lines, its errors, and Ctrl-C."""

import ntpath
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from irra_core.annotations import load_annotations
from irra_core.command import execute
from irra_core.command.execute import MOST_LINES, _short
from irra_core.command.main import main
from irra_core.scale.saving import last_state
from irra_core.synthetic.people import make_synthetic

ROOT = Path(__file__).resolve().parents[2]
IRRA = [sys.executable, "-m", "irra_core.command"]
SHORT = ["-p", "backbone", "small", "-p", "pretrained", "none", "-p", "batch_size", "4"]


def own_table(root: Path) -> Path:
    """A CSV of own data: six people in train, three in val and test each."""
    folder = make_synthetic(root, layout="rstp", people=12)
    table = load_annotations("rstp", root)
    table = table.assign(path=[Path(path).relative_to(folder / "imgs") for path in table.path], id=table.pid)
    table[["path", "caption", "id", "split"]].to_csv(folder / "mine.csv", index=False)
    return folder / "mine.csv"


def at_a_terminal(words, stop=None, seconds=150):
    """What a command shows at a pseudo-terminal, and its status; Ctrl-C is typed once `stop` is found in it."""
    import pty

    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.execv(words[0], words)
    shown, end = "", time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if select.select([terminal], [], [], 1)[0]:
                try:
                    shown += os.read(terminal, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    break
            if stop and re.search(stop, shown):
                os.write(terminal, b"\x03")
                stop = None
        else:
            os.kill(process, signal.SIGKILL)
    finally:
        os.close(terminal)
    return shown.replace("\r\n", "\n"), os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_long_message_keeps_its_first_and_last_lines():
    few = "\n".join(f"line {number}" for number in range(MOST_LINES))
    assert _short(few) == few
    lines = _short("\n".join(f"line {number}" for number in range(40))).splitlines()
    assert len(lines) == MOST_LINES
    assert (lines[0], lines[-1]) == ("line 0", "line 39")
    assert sum(int(found) for found in re.findall(r"… (\d+) more", "\n".join(lines))) == 40 - MOST_LINES + 1


def test_the_help_of_train_ends_in_the_parameters_of_its_notebook(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "-p NAME VALUE" in shown
    assert re.search(r"parameters of train.ipynb:\n  dataset: str = \"synthetic\"  # ", shown)
    assert re.search(r"\n  seed: int = None  # ", shown)


@pytest.mark.notebook
def test_a_kernel_that_was_killed_is_one_sentence(tmp_path, monkeypatch, capfd):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import os; os.kill(os.getpid(), 9)")])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "train.ipynb")
    monkeypatch.setattr(execute, "notebook", lambda name: tmp_path / f"{name}.ipynb")
    monkeypatch.setenv("IRRA_REPORTS", str(tmp_path))
    assert main(["train"]) == 1
    *_, last = lines = capfd.readouterr().err.splitlines()
    assert last.startswith("the kernel was killed, as the system does where memory is full: take a smaller batch_size")
    assert len(lines) <= 12
    assert "Traceback" not in " ".join(lines)


@pytest.mark.notebook
def test_an_error_is_one_sentence_without_frames(tmp_path):
    words = [*IRRA, "train", "-p", "datset", "rstp"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    lines = ended.stderr.splitlines()
    assert ended.returncode == 1
    assert lines[-1].startswith("ValueError: parameter 'datset' is unknown: did you mean 'dataset'?")
    assert len(lines) <= 12
    assert lines[0] == "train.ipynb: starting its kernel"
    for word in ("Traceback", "File ", "IPKernelApp"):
        assert word not in ended.stderr + ended.stdout
    executed = re.search(r"executed so far: (.*)", ended.stderr)[1]
    assert "datset" in Path(executed).read_text()


@pytest.mark.notebook
@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
def test_ctrl_c_says_which_command_goes_on_and_from_which_step(tmp_path, monkeypatch):
    reports = tmp_path / "reports"
    monkeypatch.setenv("IRRA_REPORTS", str(reports))
    words = [*IRRA, "train", "-p", "dataset", str(own_table(tmp_path)), *SHORT, "-p", "epochs", "2000"]
    shown, status = at_a_terminal(words, stop=r"training .*val_R1")
    assert status == 130, shown
    *before, said, command = shown.splitlines()
    (folder,) = {path.parent for path in reports.glob("*/*/recipe.json")}
    assert said.removeprefix("^C") == f"stopped; this command goes on from step {last_state(folder).about['step']}:"
    assert command.split()[1:] == ["-m", "irra_core.command", *words[3:]]
    assert all(re.match(r"train\.ipynb: |training |decoding |\^C", line) for line in before), shown
    assert not list(reports.glob(".train*"))


def test_a_command_on_another_drive_and_windows_exe_are_named(monkeypatch, tmp_path):
    here = tmp_path / "irra"
    monkeypatch.setattr(execute.shutil, "which", lambda name: str(tmp_path / "irra.EXE"))
    assert execute._typed(here) == "irra"
    monkeypatch.setattr(execute.shutil, "which", lambda name: None)
    assert os.path.abspath(execute._typed(here)) == str(here)
    monkeypatch.setattr(execute.os.path, "relpath", lambda path: ntpath.relpath("D:/irra", "C:/"))
    assert execute._typed(here) == str(here)


@pytest.mark.notebook
def test_make_train_is_irra_train(tmp_path, monkeypatch):
    """Its notebook, page and scores lie in the run's folder, which is printed."""
    if not (shutil.which("make") and (ROOT / ".venv" / "bin" / "irra").exists()):
        pytest.skip("make, and the environment that it makes")
    monkeypatch.setenv("IRRA_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setenv("IRRA_SMOKE", "1")
    given = f"-p dataset {own_table(tmp_path)} {' '.join(SHORT)}"
    make = ["make", "--old-file", ".venv/ready", "train", f"ARGS={given}"]
    ended = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    folder = (tmp_path / "reports" / "smoke" / "latest").resolve()
    assert {"train.ipynb", "train.html", "metrics.json"} <= {path.name for path in folder.iterdir()}
    for line in (
        f"    run folder: {folder}",
        f"      notebook: {folder}/train.ipynb",
        f"          html: {folder}/train.html",
    ):
        assert line in ended.stdout.splitlines()
