"""The page of all results: every run, study and published row, marked and escaped, and it needs no other file."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from pandas import DataFrame

import irra_core as irra
from irra_core import runs
from irra_core.studies import report
from irra_core.studies.tables import collect

SCORES = {"R1": 41.0, "R5": 62.0, "R10": 73.0, "mAP": 44.0, "mINP": 25.0}
SVG = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


class Page(HTMLParser):
    """What a browser sees of a page: its tags with their attributes, and its words."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words, self.open = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "path", "circle", "polyline", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data

    def all(self, tag: str, name: str) -> list[str]:
        return [attrs[name] for found, attrs in self.tags if found == tag and name in attrs]


def make_run(root: Path, recipe, shift: float = 0.0, folder: Path | None = None) -> Path:
    """A run folder as a finished training leaves it, without weights; 20 queries of 10 people."""
    folder = folder or runs.run_folder(recipe, "data", root).path
    runs.begin(folder, recipe, "data")
    draw = np.random.default_rng(recipe.seed)
    queries = DataFrame({"pid": np.arange(20) // 2, "rank": 1})
    for column in ("R1", "R5", "R10", "AP", "INP"):
        queries[column] = 100.0 * (draw.random(20) < 0.5)
    scores = {name: [value + shift, value + shift - 5, value + shift + 5] for name, value in SCORES.items()}
    metrics = {"selected": {"on": recipe.select_on, "step": 2}, "queries": 20, "text_to_image": scores}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    queries.to_csv(folder / "queries.csv", index=False)
    history = DataFrame({"step": [1, 2], "sdm": [3.0, 2.0], "loss": [3.0, 2.0], "val_R1": [30.0, 40.0]})
    history.to_csv(folder / "history.csv", index=False)
    return folder


@pytest.fixture
def root(tmp_path) -> Path:
    """Two seeds of CUHK-PEDES's recipe, a run selected on test, an example, a shrunken run and a study."""
    root = tmp_path / "reports"
    for seed in (0, 1):
        (make_run(root, irra.recipe("cuhk", seed=seed)) / "train.ipynb").write_text("{}")
    make_run(root, irra.recipe("cuhk", losses="itc", select_on="test"), shift=20)
    make_run(root, irra.recipe(), folder=root / "example")
    (root / "example" / "train.html").write_text("")
    make_run(root, irra.recipe("rstp", losses="tal"), folder=root / "smoke" / "rstp" / "smoke")
    study = root / "cuhk" / "studies" / "<b>rq9"
    study.mkdir(parents=True)
    DataFrame({"variant": ["<script>alert(2)</script>"], "R1": [12.345]}).to_csv(study / "table.csv", index=False)
    (study / "figure.svg").write_text(SVG)
    return root


@pytest.fixture
def page(root) -> Page:
    return Page(report.write_report(root).read_text())


def rows(root: Path, dataset: str) -> list[str]:
    """The words of each line of a data set's leaderboard."""
    text = (root / "index.html").read_text()
    section = text.split(f'<section id="data-{dataset}">')[1].split("</section>")[0]
    return [re.sub(r"<title>.*?</title>|<[^>]+>", " ", row) for row in section.split("</table>")[0].split("<tr")[2:]]


def test_a_run_from_weights_that_were_selected_on_test_has_a_badge(tmp_path):
    folder = make_run(tmp_path, irra.recipe("cuhk", pretrained="none"))
    assert "pretrained weights selected on test" not in Page(report.write_report(tmp_path).read_text()).words
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["selected"]["pretrained_on"] = "test"
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert (
        "pretrained weights selected on test: not comparable" in Page(report.write_report(tmp_path).read_text()).words
    )


def test_runs_that_differ_only_in_the_seed_share_a_line_with_the_mean_and_its_interval(root):
    (line,) = [
        entry for entry in report.entries(collect(root), root, {}) if entry.name == "default" and not entry.example
    ]
    values = [pd.read_csv(folder / "queries.csv").R1 for folder in line.folders]
    assert len(values) == 2
    assert line.scores["R1"][0] == pytest.approx(sum(value.mean() for value in values) / 2)
    assert line.scores["R1"][1] < line.scores["R1"][0] < line.scores["R1"][2]


def test_one_runs_scores_are_those_of_its_metrics(root):
    (line,) = [entry for entry in report.entries(collect(root), root, {}) if "itc" in entry.name]
    assert line.scores["R1"] == (61.0, 56.0, 66.0)


def test_the_leaderboard_is_in_the_order_of_recall_with_the_published_rows_among_the_runs(root, page):
    found = rows(root, "cuhk")
    first = [float(re.search(r"\d+\.\d", row)[0]) for row in found]
    assert first == sorted(first, reverse=True)
    assert ["published" in row for row in found] == [True, True, False, False]
    assert "paper" in found[0]
    assert "released README" in found[0]
    assert "56.0 – 66.0" in found[2]


def test_a_run_selected_on_test_and_an_example_are_marked_and_no_other_is(root, page):
    assert ["selected on test" in row for row in rows(root, "cuhk")] == [False, False, True, False]
    (row,) = rows(root, "synthetic")
    assert "example" in row
    assert "selected on test" not in row
    assert "example" not in "".join(rows(root, "cuhk"))


def test_a_shrunken_run_is_on_no_page_but_its_own(root, page, monkeypatch):
    assert "tal" not in page.words
    monkeypatch.setenv("IRRA_SMOKE", "1")
    path = report.write_report(root)
    assert path == root / "smoke" / "index.html"
    assert "tal" in Page(path.read_text()).words


def test_the_page_needs_no_other_file_and_no_network(page):
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object"}
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.all("img", "src"))
    assert not re.search(r"https?://", " ".join(page.all("a", "href")))
    assert page.open == []


def test_every_link_leads_to_a_file_or_a_section(root, page):
    links, anchors = page.all("a", "href"), page.all("section", "id")
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (root / unquote(link)).exists(), link
    assert any(link.endswith("example/train.html") for link in links)
    assert sum(link.endswith("train.ipynb") for link in links) == 2


def test_what_files_and_tables_hold_is_shown_and_never_run(root, page):
    assert "<script>alert(2)</script>" in page.words
    assert "<b>rq9" in page.words
    assert "12.3" in page.words
    assert "alert(1)" not in (root / "index.html").read_text()


def test_learning_curves_are_pictures_of_every_line(page):
    assert sum("curves" in label for label in page.all("img", "alt")) == 3


def studied(root: Path, table: DataFrame) -> Page:
    """The page of a folder with nothing but a study of this table."""
    folder = root / "cuhk" / "studies" / "rq9"
    folder.mkdir(parents=True)
    table.to_csv(folder / "table.csv", index=False)
    return Page(report.page(root))


def test_the_table_of_a_study_comes_with_its_verdicts(tmp_path):
    gains = {"R1_gain": 5.0, "R1_gain_low": 2.0, "R1_gain_high": 8.0, "mAP_gain": 1.0, "mAP_gain_low": 0.5}
    scores = {f"{name}{end}": 50.0 for name in SCORES for end in ("", "_sd")}
    fixed = {"reference": "sdm", "status": "finished", "seeds": 3, "parameters": 1e6, "step_seconds": 0.1}
    table = DataFrame(
        [{"variant": name, **fixed, **scores, **gains, "mAP_gain_high": 2.0} for name in ("sdm", "<itc>")]
    )
    shown = studied(tmp_path, table)
    assert "<itc> beats sdm by 5.0 [2.0, 8.0]" in shown.words
    assert "+5.0 [2.0, 8.0]" in shown.words


def test_the_table_of_a_transfer_says_what_was_not_run(tmp_path):
    queries = DataFrame(columns=["train", "test", "leaks", "seed", "query", "pid"])
    table = irra.transfer.transfer_matrix(queries, ("cuhk", "rstp"))
    assert studied(tmp_path, table).words.count("not run") == 2 * 4 * len(SCORES)


@pytest.mark.parametrize(("rows", "folded"), [(12, False), (13, True)])
def test_a_long_table_is_folded_and_a_short_one_is_not(rows, folded, tmp_path):
    page = studied(tmp_path, DataFrame({"n": range(rows)}))
    assert (f"all {rows} rows" in page.words) == folded
    assert [tag for tag, _ in page.tags].count("details") == folded


def test_a_broken_folder_is_listed_with_its_reason_and_the_others_are_shown(root):
    folder = root / "cuhk" / "default"
    (folder / "metrics.json").write_text("{<b>")
    with pytest.warns(UserWarning, match=r"default.metrics\.json cannot be read"):
        page = Page(report.write_report(root).read_text())
    assert "broken" in page.all("section", "id")
    assert f"{folder / 'metrics.json'} cannot be read" in page.words
    assert sum("default" in row for row in rows(root, "cuhk")) == 1  # the other seed


def _scores(**changes):
    """Other test scores of a run; None takes one away."""

    def damage(folder):
        metrics = json.loads((folder / "metrics.json").read_text())
        scores = metrics["text_to_image"] | changes
        metrics["text_to_image"] = {name: score for name, score in scores.items() if score is not None}
        (folder / "metrics.json").write_text(json.dumps(metrics))

    return damage


def _file(name, content):
    return lambda folder: (folder / name).write_text(content)


def test_a_run_without_some_of_its_photos_says_how_many(root):
    report.write_report(root)
    assert not [row for row in rows(root, "cuhk") if "left out" in row]
    (file,) = (folder / "metrics.json" for folder in (root / "cuhk").iterdir() if "itc" in folder.name)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"unreadable_images": 1234}))
    report.write_report(root)
    (row,) = [row for row in rows(root, "cuhk") if "left out" in row]
    assert "itc" in row
    assert "1,234 unreadable photos left out" in row


RUN_DAMAGES = {
    "no R@5": _scores(R5=None),
    "a score in words": _scores(R1="abc"),
    "a score of two numbers": _scores(R1=[1.0, 2.0]),
    "a score whose interval is text": _scores(mAP=[1.0, "<script>", "b"]),
    "scores in a list": _file("metrics.json", '{"text_to_image": [1, 2]}'),
    "deeply nested metrics": _file("metrics.json", '{"text_to_image": ' + "[" * 100_000),
    "a deeply nested recipe": _file("recipe.json", "[" * 100_000),
    "a history of text": _file("history.csv", "step,sdm,loss,val_R1\nx,y,z,x\nx,y,z,x\n"),
    "a history without steps": _file("history.csv", "sdm,loss,val_R1\n3,3,30\n2,2,40\n"),
    "a history of no column": _file("history.csv", ""),
}


@pytest.mark.parametrize("damage", RUN_DAMAGES.values(), ids=RUN_DAMAGES.keys())
def test_a_damaged_run_costs_the_page_its_own_line_only(root, damage):
    (folder,) = (folder for folder in (root / "cuhk").iterdir() if "itc" in folder.name)
    damage(folder)
    with pytest.warns(UserWarning, match="left out"):
        page = Page(report.write_report(root).read_text())
    left_out = page.words.split("no study that can be shown")[1]
    assert str(folder) in left_out
    assert str(root / "example") not in left_out
    assert [sum(word in row for row in rows(root, "cuhk")) for word in ("itc", "2 seeds", "published")] == [0, 1, 2]
    assert "3 finished runs and 1 study" in page.words
    assert page.open == []


def test_seeds_whose_queries_lack_columns_are_left_out_together(root):
    folders = [folder for folder in (root / "cuhk").iterdir() if (folder / "train.ipynb").exists()]
    (folders[0] / "queries.csv").write_text("a,b\n1,2\n")
    with pytest.warns(UserWarning, match="R1"):
        words = Page(report.write_report(root).read_text()).words.split("no study that can be shown")[1]
    assert [f"{folder} cannot be shown (KeyError" in words for folder in folders] == [True, True]


STUDY_DAMAGES = {
    "an empty table": "",
    "a torn table": 'a,b\n"1,2\n3',
    "verdicts without seeds": "variant,reference,R1_gain,status,R1_gain_low,R1_gain_high\na,b,1,finished,0,2\n",
    "gains in words": "variant,reference,R1_gain,status,seeds,R1_gain_low,R1_gain_high\na,b,x,,3,y,z\n",
}


@pytest.mark.parametrize("content", STUDY_DAMAGES.values(), ids=STUDY_DAMAGES.keys())
@pytest.mark.parametrize("name", ["table.csv", "another.csv"])
def test_a_damaged_study_costs_the_page_that_study_only(root, content, name):
    folder = root / "cuhk" / "studies" / "damaged"
    folder.mkdir()
    (folder / name).write_text(content)
    with pytest.warns(UserWarning, match="left out of the page: .*damaged cannot be shown"):
        page = Page(report.write_report(root).read_text())
    assert f"{folder} cannot be shown" in page.words
    assert "<b>rq9" in page.words
    assert "4 finished runs and 1 study" in page.words


def test_a_folder_without_runs_gives_a_page_with_what_is_published(tmp_path):
    words = Page(report.write_report(tmp_path / "none").read_text()).words
    assert "0 finished runs" in words
    assert "73.4" in words
    assert "Not run here" in words


def test_the_committed_example_is_on_the_page_of_a_fresh_clone(tmp_path):
    example = Path(__file__).resolve().parents[2] / "reports" / "example"
    (tmp_path / "example").symlink_to(example)
    assert collect(tmp_path).run.tolist() == ["example"]  # behind a linked folder
    found = report.entries(collect(example.parent), example.parent, {})
    assert any(entry.example for entry in found)
