"""What the explorer sends to its page, with a gallery that ranks by a rule that anyone can follow."""

import base64
import errno
import io
import json
import math
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from pandas import DataFrame
from PIL import Image

import irra_core as irra
import irra_core.explorer.widget as module
from irra_core import build_model
from irra_core.explorer.widget import QueryExplorer
from irra_core.recipes import recipe

COLORS = ["red", "green", "blue", "white", "black", "yellow"]


class FakeGallery:
    """Twelve photos, two of each of six people; a sentence finds those whose colour it names first."""

    def __init__(self, images, model=None, reverse=False):
        self.images, self.reverse = images, reverse
        if model is not None:
            self.model = model

    def search(self, text, k):
        if text == "break":
            raise RuntimeError("the server is gone")
        named = np.array([COLORS[int(pid)] in text for pid in self.images.pid], dtype=float)
        order = np.argsort(-named, kind="stable")[:: -1 if self.reverse else 1][:k]
        found = self.images.iloc[order].assign(query=text, rank=range(1, len(order) + 1))
        found["score"] = 1 / found["rank"]
        return found[["query", "rank", "score", "path", "pid", "image_id"]].reset_index(drop=True)


@pytest.fixture
def images(tmp_path):
    rows = []
    for image_id in range(12):
        path = tmp_path / f"photo {image_id}.png"
        Image.new("RGB", (40, 120), COLORS[image_id // 2]).save(path)
        rows.append({"image_id": image_id, "path": str(path), "pid": image_id // 2})
    return DataFrame(rows).astype({"pid": "Int64"})


@pytest.fixture
def annotations(images):
    rows = images.assign(caption=[f"a man in a {COLORS[pid]} coat, view {i}" for i, pid in enumerate(images.pid)])
    strangers = [{"image_id": 99, "path": "nowhere.png", "pid": 77, "caption": "somebody else"}]
    return pd.concat([rows, DataFrame(strangers)], ignore_index=True).astype({"pid": "int64"})


@pytest.fixture
def explorer(images, annotations):
    return QueryExplorer(FakeGallery(images), annotations, k=5)


def cards(explorer, strip=0):
    return explorer.view["strips"][strip]["cards"]


def ask(explorer, kind, **more):
    """What the page sends."""
    explorer._receive(explorer, {"kind": kind, "serial": explorer.view["serial"], **more}, None)


def test_a_query_shows_the_gallerys_ranking_with_thumbnails(explorer, images):
    explorer.query = "someone in blue"
    assert [card["image_id"] for card in cards(explorer)] == [4, 5, 0, 1, 2]
    assert [card["rank"] for card in cards(explorer)] == [1, 2, 3, 4, 5]
    data = base64.b64decode(cards(explorer)[0]["src"].removeprefix("data:image/jpeg;base64,"))
    thumbnail = Image.open(io.BytesIO(data))
    assert thumbnail.format == "JPEG"
    assert thumbnail.size == (40, 120)
    assert np.abs(np.asarray(thumbnail)[60, 20].astype(int) - (0, 0, 255)).max() < 8
    assert list(explorer.results.image_id) == [4, 5, 0, 1, 2]


def test_a_large_photo_is_sent_small(explorer, images):
    Image.new("RGB", (900, 2700), "red").save(images.path[0])
    explorer.query = "red"
    data = base64.b64decode(cards(explorer)[0]["src"].split(",")[1])
    assert Image.open(io.BytesIO(data)).size == (96, 288)
    assert len(data) < 20_000


def test_a_free_query_has_no_verdict_and_no_photo_of_its_own(explorer):
    explorer.query = "someone in blue"
    assert all(card["right"] is None for card in cards(explorer))
    assert explorer.view["truth"] is None
    assert explorer.view["strips"][0]["standing"] == ""


def test_an_example_frames_right_and_wrong_and_says_where_the_right_ones_stand(explorer, annotations):
    explorer.query = f"  {annotations.caption[8]} "
    assert [card["right"] for card in cards(explorer)] == [True, True, False, False, False]
    assert explorer.view["truth"]["pid"] == 4
    assert explorer.view["strips"][0]["standing"] == "first right photo at rank 1 · average precision 100 %"


def test_a_right_photo_that_is_not_shown_is_found_deeper(images, annotations):
    explorer = QueryExplorer(FakeGallery(images, reverse=True), annotations, k=5, query=annotations.caption[8])
    assert not any(card["right"] for card in cards(explorer))
    # the two right photos are the last of twelve: (1/11 + 2/12) / 2 = 12.9 %
    assert explorer.view["strips"][0]["standing"] == "first right photo at rank 11 · average precision 13 %"


def test_examples_are_sentences_of_people_who_are_in_the_gallery(explorer):
    assert len(explorer.setup["examples"]) == len(COLORS)
    assert all("coat" in text for text in explorer.setup["examples"])


def test_a_gallery_of_unknown_people_has_photos_without_identity(images, annotations):
    folder = images.assign(pid=pd.array([pd.NA] * 12, "Int64"))
    gallery = FakeGallery(folder)
    gallery.search = lambda text, k: folder.head(k).assign(query=text, rank=range(1, k + 1), score=0.5)
    explorer = QueryExplorer(gallery, annotations, query="anyone", k=3)
    assert [card["pid"] for card in cards(explorer)] == [None] * 3
    assert explorer.setup["examples"] == []
    json.dumps(explorer.view)


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\u00a0"])
def test_an_empty_text_is_answered_with_a_plain_request(explorer, text):
    explorer.query = "red"
    explorer.query = text
    assert explorer.view["strips"] == []
    assert explorer.note.startswith("Describe a person")
    assert explorer.failure is None


@pytest.mark.parametrize(
    "text",
    [
        "😀 👩‍👩‍👧",
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "رجل يرتدي معطفا",
        "\ud83d",
        "\0",
        "a" * 20_000,
    ],
    ids=["emoji", "script", "image", "right to left", "half an emoji", "nul", "one long word"],
)
def test_odd_text_is_searched_as_text(explorer, text):
    explorer.query = text
    assert len(cards(explorer)) == 5
    assert explorer.failure is None
    json.dumps(explorer.view).encode()  # what goes to the page is valid


def test_five_hundred_words_are_searched_and_the_page_says_that_the_end_is_not_read(explorer):
    explorer.query = "word " * 500
    assert len(explorer.view["words"]) == 75
    assert "longer than the model can read" in explorer.note
    explorer.query = "word " * 75  # exactly what fits
    assert len(explorer.view["words"]) == 75
    assert explorer.note == ""


def test_a_failure_is_one_plain_sentence_and_the_next_query_works(explorer):
    explorer.query = "break"
    assert explorer.note == "This sentence cannot be searched: the server is gone"
    assert explorer.view["strips"] == []
    assert isinstance(explorer.failure, RuntimeError)
    explorer.query = "red"
    assert explorer.note == ""
    assert len(cards(explorer)) == 5


def test_a_photo_that_cannot_be_read_keeps_its_place_in_the_ranking(explorer, images):
    Path(images.path[0]).write_bytes(b"no picture")
    explorer.query = "red"
    assert cards(explorer)[0]["src"] == ""
    assert cards(explorer)[0]["name"] == "photo 0.png"
    assert cards(explorer)[1]["src"] != ""


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("make", [getattr(os, "mkfifo", None), lambda path: Image.new("1", (10_000, 9_000)).save(path)])
def test_a_pipe_or_a_bomb_in_a_photos_place_is_an_empty_frame(explorer, images, make):
    Path(images.path[0]).unlink()
    make(images.path[0])
    explorer.query = "red"
    assert [card["src"] != "" for card in cards(explorer)] == [False, True, True, True, True]


def page_writes(explorer, **state):
    """What ipywidgets does with a page's change of the widget's state."""
    explorer._handle_msg({"content": {"data": {"method": "update", "state": state}}})


def test_the_page_changes_what_a_person_can_and_nothing_else(explorer):
    page_writes(explorer, query="red", k=20, held="blue")
    assert (explorer.query, explorer.k, explorer.held) == ("red", 20, "blue")
    kept = {name: getattr(explorer, name) for name in ("view", "setup", "explanation", "fills", "picture", "note")}
    hostile = {"masks": 5_000_000, "serial": explorer._serial, "query": "x", "words": [], "strips": []}
    page_writes(explorer, **dict.fromkeys(kept, hostile) | {"note": "x", "_esm": "x", "layout": "x", "comm": None})
    assert {name: getattr(explorer, name) for name in kept} == kept
    assert explorer._esm != "x"


@pytest.mark.parametrize(
    "state",
    [
        {"k": 200},
        {"k": 7},
        {"k": True},
        {"k": "5"},
        {"k": [5]},
        {"query": 3},
        {"held": None},
        {"query": ["red"]},
        {1: 2},
    ],
)
def test_a_value_that_no_person_can_enter_is_ignored(explorer, state):
    page_writes(explorer, query="red")
    before = explorer.state, explorer.view
    page_writes(explorer, **{str(name): value for name, value in state.items()})
    assert (explorer.state, explorer.view) == before


def test_a_sentence_and_a_reference_are_cut_where_the_page_cuts_them(explorer, monkeypatch):
    page_writes(explorer, query="red " * 10**6, held="blue " * 10**6)
    assert (len(explorer.query), len(explorer.held)) == (module.LONGEST, module.LONGEST)
    searched = []
    search = FakeGallery.search
    monkeypatch.setattr(FakeGallery, "search", lambda *args: searched.append(len(args[1])) or search(*args))
    explorer.held = "green " * 10**6  # by code
    assert max(searched) <= module.LONGEST


@pytest.mark.parametrize(
    "message",
    [
        None,
        "explain",
        {},
        {"kind": "nosuch"},
        {"kind": "picture", "image_id": "../x"},
        {"kind": "picture", "image_id": 10**6},
        {"kind": "explain", "serial": -1},
    ],
)
def test_a_message_that_no_page_sends_raises_nothing(explorer, message):
    explorer.query = "red"
    explorer._receive(explorer, message, None)
    assert explorer.explanation == {}
    assert explorer.picture == {}


def test_a_held_ranking_shows_who_rises_and_who_falls(explorer):
    explorer.query = "red"
    explorer.held = "red"
    assert [card["moved"] for card in cards(explorer)] == [0] * 5
    explorer.query = "blue"  # photos 4 and 5 rise from 5 and 6 to the top
    assert [card["moved"] for card in cards(explorer)] == [4, 4, -2, -2, -2]
    explorer.held = ""
    assert "moved" not in cards(explorer)[0]


def test_two_galleries_answer_the_same_sentence_in_two_strips(images, annotations):
    both = {"sdm": FakeGallery(images), "itc": FakeGallery(images, reverse=True)}
    explorer = QueryExplorer(both, annotations, query="blue", k=5)
    assert [strip["name"] for strip in explorer.view["strips"]] == ["sdm", "itc"]
    assert cards(explorer, 0)[0]["image_id"] == 4
    assert cards(explorer, 1)[0]["image_id"] == 11
    assert list(explorer.results.groupby("gallery").size()) == [5, 5]


def test_a_picture_shows_its_sentences_and_its_neighbours_where_the_gallery_knows_them(explorer, images, annotations):
    ask(explorer, "picture", image_id=3)
    assert explorer.picture["pid"] == 1
    assert explorer.picture["captions"] == [annotations.caption[3]]
    assert "neighbours" not in explorer.picture
    gallery = FakeGallery(images)
    gallery.neighbours = lambda image_id, k: gallery.search("green", k)
    explorer = QueryExplorer(gallery, annotations, k=4)
    ask(explorer, "picture", image_id=3)
    assert [card["right"] for card in explorer.picture["neighbours"]] == [True, True, False, False]
    assert explorer.picture["standing"] == "first right photo at rank 1 · average precision 100 %"
    ask(explorer, "picture", image_id=None)
    assert explorer.picture == {}


def test_the_state_of_a_page_makes_the_same_page_again(images, annotations):
    gallery = FakeGallery(images)
    gallery.neighbours = lambda image_id, k: gallery.search("green", k)
    first = QueryExplorer(gallery, annotations, query="red", k=3)
    ask(first, "picture", image_id=3)
    first.held, first.query, first.k = "red", "blue", 4
    state = json.loads(json.dumps(first.state))
    assert state == {"query": "blue", "k": 4, "held": "red", "picture": 3}
    again = QueryExplorer(gallery, annotations, **state)
    assert again.view["strips"] == first.view["strips"]
    assert [card["moved"] for card in cards(again)] == [4, 4, -2, -2]
    assert again.picture["captions"] == first.picture["captions"]


def test_saving_writes_the_ranking_and_its_words_inside_the_folder(explorer, annotations, tmp_path):
    explorer.query = annotations.caption[0]
    file = explorer.save(tmp_path / "figures")
    assert file.parent == tmp_path / "figures"
    assert Image.open(file).width > 1000
    words = file.with_suffix(".txt").read_text(encoding="utf-8")
    assert "first right photo at rank 1" in words
    again = re.search(r"QueryExplorer\((.*)\)", words).group()
    copy = eval(again, {"QueryExplorer": QueryExplorer, "gallery": FakeGallery(explorer._galleries[""].images),
                        "annotations": annotations})  # fmt: skip
    assert copy.view["strips"] == explorer.view["strips"]
    explorer.query = "../../etc/passwd <b>"
    assert explorer.save(tmp_path / "figures").parent == tmp_path / "figures"


def test_a_figure_that_cannot_be_written_leaves_what_was_there_before(explorer, tmp_path, monkeypatch):
    explorer.query = "red"
    file = explorer.save(tmp_path)
    before = file.read_bytes()

    def full(figure, path, **_):
        Path(path).write_bytes(b"half a figure")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match=r"No space left.*make room.*what was there before is intact"):
        explorer.save(tmp_path)
    assert file.read_bytes() == before
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file() and "photo" not in path.name} == {
        ".png",
        ".txt",
    }


def test_saving_before_a_search_tells_the_page_what_to_do(explorer):
    ask(explorer, "save")
    assert "set query to a sentence" in explorer.note


@pytest.fixture(scope="module")
def models():
    """Untrained models with and without an interaction encoder."""
    names = {"sdm+mlm": "sdm+mlm", "sdm": "sdm"}
    return {n: build_model(recipe("synthetic", pretrained="none", losses=x, _smoke=False), 4) for n, x in names.items()}


@pytest.fixture
def explaining(images, annotations, models):
    galleries = {name: FakeGallery(images, model) for name, model in models.items()}
    return QueryExplorer(galleries, annotations, query="a [MASK] coat", k=5)


def test_a_model_with_attention_explains_every_photo_at_once_and_one_without_the_photo_pointed_at(explaining):
    ask(explaining, "explain", strip=1, place=2)
    attending, covering = explaining.explanation["strips"]
    assert attending["method"] == "attention"
    assert covering["method"] == "drop-one-patch"
    assert lit(attending) == ["0", "1", "2", "3", "4"]
    assert lit(covering) == ["2"]
    assert all(len(photo["words"]) == 3 for photo in covering["photos"].values())
    ask(explaining, "explain", strip=1, place=4)
    assert lit(explaining.explanation["strips"][1]) == ["2", "4"]
    photo = attending["photos"]["0"]
    assert len(photo["words"]) == len(explaining.view["words"]) == 3
    assert len(base64.b64decode(photo["map"])) == 3 * attending["rows"] * attending["cols"]


def lit(strip):
    """The photos of a strip that have a map."""
    return [place for place, photo in strip["photos"].items() if "map" in photo]


def test_an_explanation_that_comes_late_is_not_computed(explaining):
    serial = explaining.view["serial"]
    explaining.query = "a red coat"
    explaining._receive(explaining, {"kind": "explain", "serial": serial}, None)
    assert explaining.explanation == {}


def test_masks_are_filled_in_per_photo_and_a_model_without_mlm_says_that_it_cannot(explaining):
    assert explaining.view["masks"] == 1
    ask(explaining, "fill")
    able, unable = explaining.fills["strips"]
    assert [len(photo[0]) for photo in able["photos"]] == [5] * 5
    shares = [share for _, share in able["photos"][0][0]]
    assert shares == sorted(shares, reverse=True)
    assert "without MLM" in unable["note"]


def test_maps_are_sent_as_bytes_that_compare_the_photos_of_a_word():
    maps = np.zeros((2, 1, 2, 2))
    maps[0, 0, 0, 1], maps[1, 0, 1, 0] = 0.5, 0.1
    sent = dict(module._sent(SimpleNamespace(maps=maps, contributions=np.zeros((3, 1))), [0, 2]))
    assert list(base64.b64decode(sent[0]["map"])) == [0, 255, 0, 0]
    assert sent[1] == {"words": [0.0]}
    assert list(base64.b64decode(sent[2]["map"])) == [0, 0, 102, 0]  # 0.1 of half of 0.5


def test_the_page_sets_text_never_markup_and_asks_no_other_host():
    script = Path(module.__file__).with_suffix(".js").read_text(encoding="utf-8")
    style = Path(module.__file__).with_suffix(".css").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|^import ", script + style, re.MULTILINE)


def value(chance: random.Random, depth: int = 0):
    """Anything that JSON can say."""
    plain = (
        None,
        True,
        False,
        0,
        1,
        -1,
        1.7,
        2**70,
        10**400,
        -0.0,
        math.inf,
        math.nan,
        "",
        "red",
        "\ud800",
        "a" * 9000,
    )
    if depth > 3 or chance.random() < 0.6:
        return chance.choice(plain)
    if chance.random() < 0.5:
        return [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(("kind", "serial", "masks", "query", "")): value(chance, depth + 1) for _ in range(3)}


@pytest.mark.parametrize(("count", "seed"), [(100, "short"), pytest.param(4000, "long", marks=pytest.mark.long)])
def test_what_a_page_sends_never_breaks_the_explorer_nor_changes_what_is_the_kernels(
    explorer, tmp_path, monkeypatch, count, seed
):
    monkeypatch.setenv("IRRA_REPORTS", str(tmp_path / "reports"))
    explorer.query, chance = "red", random.Random(seed)
    names = ("query", "k", "held", "view", "setup", "explanation", "fills", "picture", "note", "comm", "_esm")
    kernels = ("setup", "_esm")
    before = {name: getattr(explorer, name) for name in kernels}
    for number in range(count):
        if chance.random() < 0.5:
            explorer.set_state({chance.choice(names): value(chance) for _ in range(chance.randint(1, 4))})
        else:
            kind = chance.choice(("explain", "fill", "picture", "save", "no such", value(chance)))
            fields = {name: value(chance) for name in ("strip", "place", "image_id") if chance.random() < 0.7}
            message = {"kind": kind, "serial": chance.choice((explorer.view.get("serial"), value(chance)))} | fields
            explorer._receive(explorer, chance.choice((message, value(chance))), None)
        assert {name: getattr(explorer, name) for name in kernels} == before, number
        for sent in (explorer.explanation, explorer.fills):  # nothing, or the kernel's answer to an earlier ranking
            assert 0 <= sent.get("serial", 0) <= explorer._serial, number
        assert len(explorer.query) <= module.LONGEST, number
        assert explorer.k in explorer.setup["choices"], number
        assert len(json.dumps(explorer.view)) < 10**6, number
    explorer.query = "someone in blue"
    assert list(explorer.results.image_id[:2]) == [4, 5]


@pytest.mark.parametrize("mask", ["[mask]", "[Mask]", "[MASK]"])
def test_a_mask_is_one_in_any_case(explorer, mask):
    explorer.query = f"a man in a {mask} coat"
    assert (explorer.view["query"], explorer.view["masks"]) == ("a man in a [MASK] coat", 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a man in a red coat", ""),
        ("A MAN in a [mask] coat", ""),
        ("a man in a scarlet poncho", "Not in the captions that the model was trained on: scarlet, poncho."),
        ("eine Frau in einem roten Mantel", "hardly any of these words. If this is not English"),
        ("穿红色外套的女人", "English sentences only"),
        ("امرأة ترتدي معطفا أحمر", "English sentences only"),
    ],
)
def test_a_text_that_the_model_cannot_know_is_answered_with_a_hint(images, annotations, text, said):
    words = ["a", "man", "in", "red", "blue", "coat", "view"]
    explorer = QueryExplorer(FakeGallery(images), annotations, vocabulary=words, query=text)
    assert said in explorer.note
    assert bool(explorer.note) == bool(said)
    assert len(cards(explorer)) == 10


def test_without_a_vocabulary_only_other_writing_is_doubted(images):
    explorer = QueryExplorer(FakeGallery(images), query="a scarlet poncho")
    assert explorer.note == ""
    explorer.query = "红"
    assert "English" in explorer.note


def test_the_score_is_compared_with_a_hundred_other_descriptions(images, annotations):
    gallery = irra.Gallery.build(build_model(recipe("synthetic", pretrained="none", losses="itc"), 6), images)
    explorer = QueryExplorer(gallery, annotations, query="a man in a red coat", k=5)
    sentences = module.others(annotations[annotations.pid < 6], 100)
    assert len(sentences) == len(set(sentences)) == 100
    assert sum(sentence in set(annotations.caption) for sentence in sentences) == 6  # one for each person
    for card in cards(explorer):
        scores = [gallery.search(s, 12).set_index("image_id").score[card["image_id"]] for s in sentences]
        assert card["beats"] == sum(score < card["score"] - 1e-6 for score in scores)


def test_the_open_photo_follows_the_query(explorer):
    explorer.query = "red"
    explorer._show(2)
    assert explorer.picture["open"] == "rank 3 for this description"
    explorer.query = "green"
    assert explorer.view["open"] == "rank 1 for this description"
    explorer.query = "yellow"
    assert explorer.view["open"] == "rank 5 for this description"
    explorer.k = 1
    assert explorer.view["open"] == "not among the first 1 for this description"
    explorer._show(None)
    explorer.query = "red"
    assert explorer.view["open"] == ""


def test_save_gives_the_page_a_figure_with_its_sentence_and_writes_no_file(explorer, monkeypatch, tmp_path):
    monkeypatch.setenv("IRRA_REPORTS", str(tmp_path / "reports"))
    sent = []
    monkeypatch.setattr(explorer, "send", lambda content, buffers: sent.append((content, *buffers)))
    explorer.query = "a man in a red coat"
    ask(explorer, "save")
    ((content, image),) = sent
    assert content["kind"] == "figure"
    assert re.fullmatch(r"a-man-in-a-red-coat-[0-9a-f]{8}\.png", content["name"])
    figure = Image.open(io.BytesIO(image))
    assert figure.format == "PNG"
    assert figure.info["Description"] == "a man in a red coat"
    assert explorer.note == f"Downloaded as {content['name']}"
    assert not (tmp_path / "reports").exists()
