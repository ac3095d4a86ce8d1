"""One picture per question: each draws what its question is about."""

import matplotlib
import numpy as np
import pytest
from pandas import DataFrame
from test_committed import RANKS, made_run

import irra_core as irra
from irra_core.studies import grid
from irra_core.studies.comparison import compare
from irra_core.studies.pictures import PICTURES, picture

matplotlib.use("agg")


def study_runs(name: str, tmp_path) -> DataFrame:
    """The study's plan with made-up finished runs, of two seeds."""
    planned = grid.plan(name, "synthetic-study", seeds=2)
    paths = [
        str(made_run(tmp_path / str(place), recipe, np.roll(RANKS, place)))
        for place, recipe in enumerate(planned.recipe)
    ]
    return planned.assign(path=paths, status="finished", error="", committed="")


@pytest.mark.parametrize("study", [*PICTURES, "released"])
def test_a_picture_shows_every_variant_by_name(study, tmp_path):
    finished = study_runs(study, tmp_path)
    reference = grid.STUDIES[study].reference
    for path in finished.path:
        history = DataFrame({"step": [4, 9], "val_R1": [10.0, 30.0]})
        history.to_csv(f"{path}/history.csv", index=False)
    table, hard = (compare(finished, reference, hard=each) for each in (False, True))
    table["step_seconds"] = np.linspace(0.1, 0.9, len(table))
    figure = picture(study, table, hard, finished)
    (ax,) = figure.axes
    legend = [] if ax.get_legend() is None else [text.get_text() for text in ax.get_legend().get_texts()]
    words = " ".join([*legend, *(text.get_text() for text in (*ax.texts, *ax.get_yticklabels(), ax.title))])
    missing = [name for name in table.variant if name not in words and not name.endswith("+mlm")]
    assert missing == []


def test_the_slope_of_rq1_is_what_mlm_adds(tmp_path):
    finished = study_runs("rq1", tmp_path)
    table = compare(finished, "sdm+id+mlm").set_index("variant")
    (ax,) = picture("rq1", table.reset_index(), table.reset_index(), finished).axes
    lines = {line.get_label(): line.get_ydata() for line in ax.lines if not line.get_label().startswith("_")}
    for base in ("itc", "sdm", "sdm+id"):
        assert lines[base].tolist() == pytest.approx([table.R1[base], table.R1[f"{base}+mlm"]])
    row = table.loc["sdm+id"]
    assert f"{-row.R1_gain:+.1f} [{-row.R1_gain_high:.1f}, {-row.R1_gain_low:.1f}]" in ax.get_title()
    assert irra.plots.PALETTE[0] in {line.get_color() for line in ax.lines}


def test_rq4_is_drawn_with_its_measured_seconds_and_intervals(tmp_path):
    finished = study_runs("rq4", tmp_path)
    table = compare(finished, "cross").assign(step_seconds=[0.4, 0.6, 0.5, 0.2])
    (ax,) = picture("rq4", table, table, finished).axes
    points = {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in ax.lines if len(line.get_xdata()) == 1
    }
    assert {(0.6, float(table.R1_gain[1])), (0.2, float(table.R1_gain[3]))} <= points
    assert (0.4, 0.0) in points


def test_what_was_not_run_leaves_a_picture(tmp_path):
    planned = grid.plan("rq1", "synthetic-study", seeds=1).assign(path=None, status="not run", error="")
    table = compare(planned, "sdm+id+mlm")
    for study in PICTURES:
        if study != "rq2":
            picture(study, table.assign(step_seconds=np.nan), table, planned).canvas.draw()
