"""Progress as lines: what they say, when they come, and that they reach papermill's terminal and its notebook."""

import os
import re
import subprocess
import sys
import time

import nbformat
import pytest
from jupyter_client.manager import KernelManager

from irra_core.scale import progress as bars
from irra_core.scale.progress import Lines


@pytest.fixture
def lines(monkeypatch, capfd):
    """The lines written since the last call; they come every 0.1 seconds, the first after 0.05."""
    monkeypatch.setattr(bars, "FIRST", 0.05)
    monkeypatch.setattr(bars, "EVERY", 0.1)
    return lambda: capfd.readouterr().err.splitlines()


def until(condition, seconds=10.0):
    """Wait until the condition is true; the last of its values."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return value


def test_a_line_says_what_is_done_how_far_it_is_and_how_long_it_takes(lines):
    bar = Lines(total=2000, initial=1000, desc="training sdm", unit="step")
    assert until(lines)[0] == "training sdm: 1,000 of 2,000 steps"  # nothing is known yet about the time left
    bar.update(500)
    bar.set_postfix({"loss": "1.873", "val_R1": "43.2"}, refresh=False)
    bar.began = time.monotonic() - 60  # 500 steps of this process in a minute: another minute for as many
    lines()
    shown = until(lines)[-1]
    assert re.fullmatch(r"training sdm: 1,500 of 2,000 steps, loss 1\.873, val_R1 43\.2, 01:0\d left", shown)
    bar.update(500)
    bar.close()
    assert lines()[-1].startswith("training sdm: 2,000 of 2,000 steps, loss 1.873, val_R1 43.2 in 01:0")
    bar.close()
    time.sleep(0.3)
    assert lines() == []


def test_lines_come_while_the_work_does_not_move(lines):
    with Lines(total=3, desc="waiting"):
        time.sleep(1)
        assert len(lines()) >= 4


def test_short_work_is_one_line_and_short_work_that_leaves_nothing_none(lines, monkeypatch):
    monkeypatch.setattr(bars, "FIRST", 5.0)
    assert list(Lines([1, 2, 3], desc="testing", unit="pair")) == [1, 2, 3]
    assert lines() == ["testing: 3 of 3 pairs in 00:00"]
    for _ in Lines(range(3), desc="evaluating", leave=False):
        pass
    assert lines() == []


def test_a_notebook_gets_few_lines_of_a_long_run(lines, monkeypatch, capfd):
    monkeypatch.setattr(bars, "_kernel", lambda: "a kernel")
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    bar = Lines(total=10, desc="training")
    for second in range(0, 60 * 3600, 10):
        now[0] = float(second)
        bar._write("line", bar.seconds >= bar.next_in_notebook)
    bar.closed.set()
    count = capfd.readouterr().out.count("line")
    assert 20 < count < 60


def test_without_a_stderr_nothing_is_lost(lines, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(bars, "FIRST", 0.01)
    with Lines(total=3, desc="waiting") as bar:
        time.sleep(0.1)
        bar.update(3)
    assert bar.n == 3


CELL = """import time
import irra_core as irra
bar = irra.progress(total=4, desc="training", unit="step")
for _ in range(4):
    time.sleep(1)
    bar.update()
bar.set_postfix(loss="1.5")
bar.close()
type(bar).__name__"""


@pytest.mark.notebook
@pytest.mark.parametrize("watched", [True, False], ids=["descriptor kept", "as on Windows"])
def test_papermill_shows_the_lines_in_its_terminal_and_keeps_them_as_text(watched, tmp_path):
    """ipykernel, which takes its process's stderr, leaves it alone on Windows and in a test."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "in.ipynb")
    command = [sys.executable, "-m", "papermill", str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST" or not watched}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    (cell,) = nbformat.read(tmp_path / "out.ipynb", 4).cells
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    assert not [
        output for output in cell.outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    ]
    for shown in (text, ended.stderr):
        assert re.search(r"training: [12] of 4 steps, 00:0\d left\n", shown), shown
        assert re.search(r"training: 4 of 4 steps, loss 1\.5 in 00:0[4-9]\n", shown), shown


@pytest.mark.notebook
@pytest.mark.parametrize(("voila", "sits"), [(False, True), (True, False)], ids=["JupyterLab", "Voilà"])
def test_where_bars_move_the_kernel_shows_a_bar(voila, sits, tmp_path):
    manager = KernelManager(kernel_name="python3")
    with (tmp_path / "stderr").open("w") as terminal:
        environment = os.environ | ({"VOILA_BASE_URL": "/"} if voila else {})
        manager.start_kernel(stderr=terminal, env=environment)
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        shown = []
        code = "import irra_core as irra, tqdm.notebook\nisinstance(irra.progress(total=3), tqdm.notebook.tqdm)"
        client.execute_interactive(code, allow_stdin=sits, stdin_hook=print, output_hook=shown.append, timeout=120)
        (result,) = [each["content"]["data"]["text/plain"] for each in shown if each["msg_type"] == "execute_result"]
        assert result == "True"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
