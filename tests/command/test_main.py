"""The console script: its words, and where they end."""

import subprocess
import sys
from pathlib import Path

import pytest

from irra_core.command.execute import STUDIES
from irra_core.command.main import COMMANDS, main
from irra_core.command.notebooks import notebook
from irra_core.settings import notebooks_root


def test_help_lists_every_subcommand_and_loads_no_torch():
    begin = "import sys; from irra_core.command.main import main"
    source = f"{begin}\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    *help, loaded = ended.stdout.splitlines()
    assert ended.returncode == 0, ended.stderr
    assert loaded == "False"
    for name in COMMANDS:
        assert any(line.split()[:1] == [name] for line in help), name


@pytest.mark.parametrize(
    "words", [[], ["trian"], ["train", "--epochs", "1"], ["study"], ["study", "rq6"], ["notebooks"]]
)
def test_words_that_mean_nothing_end_with_the_usage(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: irra")


def test_every_study_has_its_notebook():
    for name, (stem, _) in STUDIES.items():
        assert notebook(stem).is_file(), name
    with pytest.raises(ValueError, match="notebook 'tarin' is unknown: did you mean 'train'"):
        notebook("tarin")


def test_notebooks_are_copied_and_what_the_user_changed_is_kept(tmp_path, capsys):
    folder = tmp_path / "deep" / "mine"
    assert main(["notebooks", str(folder)]) == 0
    wanted = {path.name: path.read_bytes() for path in notebooks_root().glob("*.ipynb")}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted
    assert capsys.readouterr().out.split() == [str(folder / name) for name in sorted(wanted)]
    (folder / "data.ipynb").write_text("my own")
    (folder / "train.ipynb").unlink()
    assert main(["notebooks", str(folder)]) == 1
    said = capsys.readouterr()
    assert said.out.split() == [str(folder / "train.ipynb")]
    assert "data.ipynb" in said.err
    assert (folder / "data.ipynb").read_text() == "my own"


def test_report_prints_the_path_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IRRA_REPORTS", str(tmp_path))
    assert main(["report"]) == 0
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "index.html"
    assert (tmp_path / "index.html").is_file()
