"""What the plots put on their axes; pixels are for the eye."""

import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from pandas import DataFrame
from PIL import Image

from irra_core.analysis import plots
from irra_core.images import UnreadableImages

COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]


@pytest.fixture(autouse=True)
def _no_figure_is_left_over():
    yield
    plt.close("all")


@pytest.fixture
def photos(tmp_path):
    """Four photos of one colour each, 16 pixels wide and 48 high."""
    paths = [str(tmp_path / f"{place}.png") for place in range(4)]
    for path, color in zip(paths, COLORS, strict=True):
        Image.new("RGB", (16, 48), color).save(path)
    return paths


@pytest.fixture
def results(photos):
    """A ranking of four photos, the second and the fourth right, its rows out of order."""
    table = DataFrame({"query": "a man in red", "rank": [1, 2, 3, 4], "score": [0.9, 0.7, 0.3, -0.1], "path": photos,
                       "pid": [5, 7, 8, 7], "right": [False, True, False, True]})  # fmt: skip
    return table.sample(frac=1, random_state=1)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def drawn_colors(ax):
    """The colour in the middle of each photo, from left to right."""
    images = sorted(ax.images, key=lambda image: image.get_extent()[0])
    return [tuple(int(v) for v in np.asarray(image.get_array())[24, 8]) for image in images]


def test_ranking_draws_the_photos_from_the_first_rank_to_the_last(results):
    ax = plots.ranking(results, ax=Figure().subplots())
    assert drawn_colors(ax) == COLORS
    assert [text for text in texts(ax) if text[0] in "−0"] == ["0.900", "0.700", "0.300", "−0.100"]


def test_ranking_frames_right_green_and_wrong_red_and_says_so_without_colour(results):
    ax = plots.ranking(results, ax=Figure().subplots())
    frames = sorted((p for p in ax.patches if isinstance(p, Rectangle)), key=lambda patch: patch.get_x())
    assert [to_hex(f.get_edgecolor()).upper() for f in frames] == [plots.WRONG, plots.RIGHT, plots.WRONG, plots.RIGHT]
    assert [text for text in texts(ax) if "✓" in text or "✗" in text] == ["1  ✗", "2  ✓", "3  ✗", "4  ✓"]


def test_ranking_without_known_identities_has_no_verdict(results):
    ax = plots.ranking(results.drop(columns=["right", "pid"]), ax=Figure().subplots())
    assert not ax.patches
    assert not any(mark in text for text in texts(ax) for mark in ("✓", "✗", "id"))


def test_ranking_puts_the_querys_own_photo_first(results, photos):
    ax = plots.ranking(results, truth=photos[3], ax=Figure().subplots())
    assert drawn_colors(ax) == [COLORS[3], *COLORS]
    assert "its photo" in texts(ax)


def test_ranking_breaks_into_lines_of_so_many_columns(results):
    ax = plots.ranking(results, columns=2, ax=Figure().subplots())
    corners = [(image.get_extent()[0], image.get_extent()[2]) for image in ax.images]
    assert len({x for x, _ in corners}) == len({y for _, y in corners}) == 2


def test_ranking_refuses_a_table_of_several_queries(results):
    with pytest.raises(ValueError, match="2 queries"):
        plots.ranking(results.assign(query=["a", "a", "b", "b"]))


def test_a_query_with_dollars_and_five_hundred_words_is_drawn_as_text(results):
    ax = plots.ranking(results.assign(query="$\\frac{1}$ <b>" + " word" * 500), ax=Figure().subplots())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.figure.canvas.draw()
    title = ax.get_title(loc="left")
    assert title.startswith("“$\\frac{1}$ <b>")
    assert title.endswith("…")
    assert title.count("\n") == 5


def test_a_pipe_in_a_photos_place_is_named_and_not_waited_for(results, photos, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for draw in (
        lambda: plots.ranking(results, truth=tmp_path / "pipe.png", ax=Figure().subplots()),
        lambda: plots.attention(str(tmp_path / "pipe.png"), np.ones((2, 2)), ax=Figure().subplots()),
    ):
        with pytest.raises(UnreadableImages, match=r"pipe\.png: is no regular file"):
            draw()


DOLLARS = r"$\frac{ <b> $ _^{"
CHARTS = {
    "metric_curve": ({"step": [1, 2], "R1": [1.0, 2.0], "a": DOLLARS}, {"hue": "a"}),
    "interval_dots": (
        {"losses": [DOLLARS, "b"], "R1": [1.0, 2.0], "R1_low": [0.0, 1.0], "R1_high": [2.0, 3.0]},
        {"references": {DOLLARS: 1.5}},
    ),
    "gain_dots": (
        {"variant": [DOLLARS, "b"], "R1_gain": [1.0, np.nan], "R1_gain_low": [0.0, 0.0], "R1_gain_high": [2.0, 2.0]},
        {},
    ),
    "score_matrix": ({"train": [DOLLARS], "test": [DOLLARS], "R1": [1.0]}, {}),
    "speedups": ({"what": [DOLLARS, "b"], "ratio": [1.0, 300.0], "target": [2.0, np.nan]}, {}),
    "time_parts": ({"part": [DOLLARS, "b"], "seconds": [1.0, 2.0], "share": [1.0, 2.0], "a": DOLLARS}, {"hue": "a"}),
    "caption_lengths": ({"caption": ["a b", "a"], "split": [DOLLARS, "b"]}, {}),
    "similarities": ({"similarity": [0.1, 0.2], "kind": [DOLLARS, "b"]}, {}),
}


@pytest.mark.parametrize(("chart", "given"), CHARTS.items(), ids=CHARTS.keys())
def test_a_dollar_in_a_name_is_a_dollar(chart, given, tmp_path):
    table, more = given
    ax = getattr(plots, chart)(DataFrame(table), ax=Figure().subplots(), **more)
    ax.figure.savefig(tmp_path / "chart.svg", metadata={"Date": None})  # where a formula would be read
    words = [text.get_text() for text in ax.figure.findobj(Text)]
    assert any(r"\frac" in word for word in words)


def test_photos_keep_their_shape_inside_equal_cells(results, tmp_path):
    wide = str(tmp_path / "wide.png")
    Image.new("RGB", (40, 20)).save(wide)
    ax = plots.ranking(results.head(1).assign(path=wide), ax=Figure().subplots())
    left, right, bottom, top = ax.images[0].get_extent()
    assert (right - left) / (top - bottom) == pytest.approx(2)
    assert right - left == pytest.approx(1)


@pytest.mark.parametrize("draw", ["ranking", "people"])
def test_pictures_open_one_figure_of_their_own_only_when_no_axes_are_given(draw, results):
    table = results.assign(caption="a man", split="test")
    ax = Figure().subplots()
    assert getattr(plots, draw)(table, ax=ax) is ax
    assert not plt.get_fignums()
    getattr(plots, draw)(table)
    assert len(plt.get_fignums()) == 1


def test_people_shows_each_drawn_person_once_with_views_and_caption(photos):
    annotations = DataFrame({"pid": [3, 3, 3, 9, 9], "path": [photos[0], photos[0], photos[1], photos[2], photos[3]],
                             "caption": ["red one", "red two", "green", "blue", "yellow"]})  # fmt: skip
    ax = plots.people(annotations, n=5, ax=Figure().subplots())
    assert sorted(drawn_colors(ax)) == sorted(COLORS)
    assert sorted(texts(ax)) == ["blue", "identity 3", "identity 9", "red one"]
    assert len(plots.people(annotations, n=1, views=1, ax=Figure().subplots()).images) == 1


def test_interval_dots_draws_the_table_on_the_axes_it_is_given():
    table = DataFrame({"losses": ["sdm", "itc"], "R1": [70.4, 68.2], "R1_low": [69.3, 67.1], "R1_high": [71.5, 69.3]})
    ax = Figure().subplots()
    assert plots.interval_dots(table, references={"ceiling": 88.0}, ax=ax) is ax
    assert not plt.get_fignums()
    assert list(ax.lines[0].get_xdata()) == [68.2, 70.4]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["itc", "sdm"]
    bars = [[point[0] for point in bar] for bar in ax.collections[0].get_segments()]
    assert np.allclose(bars, [[67.1, 69.3], [69.3, 71.5]])
    assert ax.get_xlabel() == "R@1 (%)"
    assert texts(ax) == ["ceiling"]


def test_interval_dots_keeps_two_rows_of_one_name_apart():
    table = DataFrame({"losses": ["sdm", "sdm"], "R1": [70.4, 68.2], "R1_low": np.nan, "R1_high": np.nan})
    assert len(set(plots.interval_dots(table, ax=Figure().subplots()).lines[0].get_ydata())) == 2


def test_loss_curves_draws_every_part_that_the_history_has():
    history = DataFrame({"step": [10, 20], "sdm": [5.0, 3.0], "mlm": [4.0, 2.0], "R1": [20.0, 40.0]})
    ax = plots.loss_curves(history, ax=Figure().subplots())
    assert {line.get_label(): list(line.get_ydata()) for line in ax.lines} == {"SDM": [5.0, 3.0], "MLM": [4.0, 2.0]}
    assert ax.get_ylabel() == "loss (nats)"


def test_metric_curve_draws_a_line_a_run_in_colours_of_its_own():
    history = DataFrame({"step": [1, 2, 1, 2], "mAP": [10.0, 20.0, 5.0, 9.0], "losses": ["sdm", "sdm", "itc", "itc"]})
    ax = plots.metric_curve(history, metric="mAP", hue="losses", ax=Figure().subplots())
    assert [list(line.get_ydata()) for line in ax.lines] == [[10.0, 20.0], [5.0, 9.0]]
    assert len({line.get_color() for line in ax.lines}) == 2
    assert ax.get_ylabel() == "mAP (%)"


def test_caption_lengths_are_shares_of_each_splits_captions():
    captions = ["one two", "one two", "one two three four", "one two"]
    annotations = DataFrame({"caption": captions, "split": ["train", "train", "train", "test"]})
    ax = plots.caption_lengths(annotations, ax=Figure().subplots())
    assert sorted(round(float(max(line.get_ydata())), 1) for line in ax.lines) == [66.7, 100.0]
    assert ax.get_xlabel() == "words in a caption"


def test_attention_is_brightest_where_the_weight_is_and_upright(photos):
    weights = np.zeros((6, 2))
    weights[1, 0] = 0.2  # the largest, so it is drawn at full light
    ax = plots.attention(photos[0], weights, word="a $hat", ax=Figure().subplots())
    light = np.asarray(ax.images[0].get_array()).sum(-1)
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert (row // 8, column // 8) == (1, 0)
    assert ax.get_title() == "a $hat"


def test_attention_without_any_weight_is_the_grey_photo(photos):
    ax = plots.attention(photos[0], np.zeros((6, 2)), ax=Figure().subplots())
    drawn = np.asarray(ax.images[0].get_array())
    assert np.ptp(drawn) < 0.02  # inferno begins just beside black


def test_masked_caption_shows_what_is_read_and_what_is_asked_and_runs_no_markup():
    text = plots.masked_caption(["a", "[MASK]", "<script>"], ["", "red", ""])
    assert "[MASK]<rt" in text
    assert ">red</rt>" in text
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert text.count("<ruby") == 1


def test_score_matrix_writes_value_and_interval_in_each_cell_and_not_run_where_there_is_none():
    cells = DataFrame(
        {"train": ["b", "b", "a"], "test": ["b", "a", "b"], "R1": [50.0, 20.5, np.nan], "R1_low": [45.0, 18.0, np.nan],
         "R1_high": [55.0, 23.0, np.nan]}
    )  # fmt: skip
    ax = plots.score_matrix(cells, ax=Figure().subplots())
    written = {tuple(int(v) for v in text.get_position()): text.get_text() for text in ax.texts}
    assert written == {(0, 0): "50.0\n[45.0, 55.0]", (1, 0): "20.5\n[18.0, 23.0]", (0, 1): "not run", (1, 1): "not run"}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"]
    assert ax.get_title() == "R@1 (%)"
    bare = plots.score_matrix(cells[["train", "test", "R1"]], ax=Figure().subplots())
    assert texts(bare)[:2] == ["50.0", "20.5"]


def test_gain_dots_keep_the_tables_order_and_say_what_was_not_run():
    table = DataFrame({"variant": ["sdm", "itc", "tal", "itc"], "queries": ["all", "all", "all", "hard"],
                       "R1_gain": [0.0, -2.1, np.nan, -4.0]})  # fmt: skip
    table = table.assign(R1_gain_low=table.R1_gain - 1, R1_gain_high=table.R1_gain + 2)
    ax = Figure().subplots()
    assert plots.gain_dots(table, hue="queries", ax=ax) is ax
    assert not plt.get_fignums()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["sdm", "itc", "tal"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first row is on top
    dots = {bars.get_label(): bars.lines[0].get_xdata().tolist() for bars in ax.containers}
    assert dots == {"all": [0.0, -2.1], "hard": [-4.0]}
    ends = [segment[:, 0].tolist() for segment in ax.containers[0].lines[2][0].get_segments()]
    assert ends == [[-1.0, 2.0], [-3.1, pytest.approx(-0.1)]]
    assert [(text.get_text(), text.xy[1]) for text in ax.texts] == [("not run", 2)]


def test_interval_dots_with_hue_puts_rows_of_one_name_on_one_line():
    table = DataFrame({"by": ["a", "b", "a", "b"], "who": ["x", "x", "y", "y"], "R1": [10.0, 30.0, 12.0, 5.0]})
    table = table.assign(R1_low=table.R1 - 1, R1_high=table.R1 + 1)
    ax = plots.interval_dots(table, by="by", hue="who", ax=Figure().subplots())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]  # by the first hue's values
    for bars, rows in zip(ax.containers, (table[:2], table[2:]), strict=True):
        drawn = dict(zip(bars.lines[0].get_xdata(), np.round(bars.lines[0].get_ydata().astype(float)), strict=True))
        assert drawn == {value: {"a": 0, "b": 1}[name] for name, value in zip(rows.by, rows.R1, strict=True)}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["x", "y"]


def test_similarities_draws_each_kind_with_the_same_area():
    draw = np.random.default_rng(0)
    pairs = DataFrame({"similarity": draw.normal(size=600), "kind": ["right"] * 100 + ["wrong"] * 500})
    ax = plots.similarities(pairs, ax=Figure().subplots())
    areas = []
    for outline in ax.collections:
        (path,) = outline.get_paths()
        x, y = path.vertices.T
        areas.append(abs(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) / 2)  # the shoelace
    assert len(areas) == 2
    assert np.allclose(areas, 1, atol=0.05)


def test_distribution_writes_per_cents_and_leaves_zeros_blank():
    ax = plots.distribution(np.array([[0.5, 0.5, 0.0], [0.004, 0.9, 0.096]]), ax=Figure().subplots())
    assert sorted(texts(ax)) == ["10", "50", "50", "90"]
    assert ax.images[0].get_clim() == (0, 0.9)
    assert not texts(plots.distribution(np.eye(20), ax=Figure().subplots()))


def test_attention_on_a_white_photo_stays_within_white():
    ax = plots.attention(Image.new("RGB", (16, 48), "white"), np.ones((6, 2)), ax=Figure().subplots())
    assert np.asarray(ax.images[0].get_array()).max() <= 1


def test_a_mean_beyond_its_intervals_end_is_drawn():
    table = DataFrame({"name": ["hat"], "R1": [99.9], "R1_low": [95.0], "R1_high": [99.8]})
    ax = plots.interval_dots(table, metric="R1", by="name")
    (bar,) = [line for collection in ax.collections for line in collection.get_segments()]
    assert sorted(bar[:, 0]) == [95.0, 99.9]


def test_speedups_draws_a_bar_from_one_to_each_ratio_and_says_which_meet_their_target():
    table = DataFrame({"what": ["met", "missed", "no target"], "ratio": [8.0, 0.5, 3.0], "target": [4.0, 0.8, np.nan]})
    ax = plots.speedups(table, ax=Figure().subplots())
    assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches] == [(1, 8), (1, 0.5), (1, 3)]
    assert [to_hex(bar.get_facecolor()).upper() for bar in ax.patches] == [plots.RIGHT, plots.WRONG, plots.QUIET]
    assert texts(ax) == ["8×", "0.5×", "3×"]
    assert list(ax.lines[0].get_xdata())[:2] == [4.0, 0.8]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["met", "missed", "no target"]
    assert ax.yaxis_inverted()


def test_time_parts_draws_milliseconds_a_bar_a_precision_with_the_shares_beside():
    table = DataFrame({"part": ["forward", "backward"] * 2, "seconds": [0.1, 0.2, 0.03, 0.09],
                       "share": [33.3, 66.7, 25.0, 75.0], "precision": ["fp32"] * 2 + ["bf16"] * 2})  # fmt: skip
    ax = plots.time_parts(table, hue="precision", ax=Figure().subplots())
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([100, 200, 30, 90])
    assert texts(ax) == ["33 %", "67 %", "25 %", "75 %"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["fp32", "bf16"]
    assert ax.patches[0].get_y() < ax.patches[2].get_y() < ax.patches[1].get_y()  # grouped by part
