"""`irra explore`: what is searched, by which models; what is not there is said before anything starts."""

import argparse
import json
import os

import pytest

from irra_core import runs
from irra_core.command import explore
from irra_core.explorer import app
from irra_core.hub.runs import WEIGHTS, newest_run


def parsed(*words) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    explore.add_arguments(parser)
    return parser.parse_args(list(map(str, words)))


@pytest.fixture
def reports(tmp_path, monkeypatch):
    monkeypatch.setenv("IRRA_REPORTS", str(tmp_path / "reports"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "reports"


def finished(folder, dataset, ended):
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps({"recipe": {"dataset": str(dataset)}}))
    for name in (WEIGHTS, "metrics.json"):
        (folder / name).write_text("{}")
        os.utime(folder / name, (ended, ended))
    return folder


def test_names_that_two_modules_share_are_equal():
    assert (WEIGHTS, explore.SETTINGS) == (runs.WEIGHTS, app.SETTINGS)


def test_a_data_set_is_searched_by_its_newest_finished_run(reports):
    finished(reports / "synthetic" / "old", "synthetic", 1_000)
    newest = finished(reports / "synthetic" / "new", "synthetic", 3_000)
    finished(reports / "rstp" / "default", "rstp", 5_000)
    (finished(reports / "synthetic" / "stopped", "synthetic", 9_000) / "metrics.json").unlink()
    (reports / "latest").symlink_to("rstp/default")
    assert newest_run("synthetic") == newest
    assert explore.chosen(parsed()) == {
        "photos": None, "dataset": "synthetic", "models": [("", str(newest / WEIGHTS))]
    }  # fmt: skip


def test_the_run_of_own_data_is_found_by_another_spelling_of_its_path(reports, tmp_path):
    (tmp_path / "people.csv").write_text("path,caption,id\n")
    run = finished(reports / "people-0123abcd" / "default", tmp_path / "people.csv", 1_000)
    assert explore.chosen(parsed("./people.csv"))["models"] == [("", str(run / WEIGHTS))]
    assert explore.chosen(parsed("./people.csv"))["dataset"] == str(tmp_path / "people.csv")


def test_a_folder_is_searched_by_clip_and_two_models_are_compared_by_name(reports, tmp_path):
    (tmp_path / "photos").mkdir()
    run = finished(reports / "synthetic" / "seed=1", "synthetic", 1_000)
    settings = explore.chosen(parsed("photos"))
    assert settings == {"photos": str(tmp_path / "photos"), "dataset": None, "models": [("", "clip")]}
    settings = explore.chosen(parsed("photos", "--compare", "clip", run / WEIGHTS))
    assert settings["models"] == [("A: clip", "clip"), ("B: synthetic/seed=1", str(run / WEIGHTS))]
    assert explore.chosen(parsed("photos", "--model", "seed=1"))["models"] == [("", str(run / WEIGHTS))]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "'nowhere' is no folder of photos, no annotation file and none of synthetic, "),
        (["synthetic"], "has no finished run of data set 'synthetic': train one with `irra train`, or"),
        (["rstp"], "train one with `irra train -p dataset rstp`"),
        (["synthetic", "--model", "no.pth"], "no weights are at 'no.pth'"),
    ],
)
def test_what_is_not_there_is_one_sentence_and_starts_nothing(words, said, reports, monkeypatch, capsys):
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("a server was started"))
    assert explore.run(parsed(*words)) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("windows", [False, True])
def test_the_server_gets_the_settings_absolute_folders_and_its_template(windows, reports, tmp_path, monkeypatch):
    started = []

    def execve(*given):
        assert not windows, "a child of Windows would outlive it"
        started.append(given)

    def run(command, env):
        if windows:
            started.append((command[0], command, env))
        return argparse.Namespace(returncode=0)

    (tmp_path / "photos").mkdir()
    monkeypatch.setenv("IRRA_CACHE", "here")
    monkeypatch.setattr(explore.settings, "WINDOWS", windows)
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(explore.subprocess, "run", run)
    assert explore.run(parsed("photos", "--port", "8877")) == 0
    ((_, command, environment),) = started
    assert json.loads(environment["IRRA_EXPLORE"])["photos"] == str(tmp_path / "photos")
    assert all(os.path.isabs(environment[f"IRRA_{name}"]) for name in ("DATA", "REPORTS", "CACHE"))
    assert "--port=8877" in command
    assert "--Voila.ip=127.0.0.1" in command
    assert (explore.EXPLORER / "served" / "voila" / "templates" / "irra" / "index.html.j2").is_file()
    assert environment["JUPYTER_PATH"].startswith(str(explore.EXPLORER / "served"))
