"""`general`: pictures and texts as the web has them, the same for the same seed, as faulty as declared."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from irra_core.synthetic import captions, web, web_things
from irra_core.synthetic.pedestrian import COLOURS


def share(texts, words) -> float:
    """Per cent of the texts that hold one of these words."""
    pattern = re.compile("|".join(words))
    return 100 * sum(bool(pattern.search(text)) for text in texts) / len(texts)


def test_a_seed_and_a_number_give_the_same_bytes_and_others_give_others():
    one, text = web.web_picture(3, 7)
    same, again = web.web_picture(3, 7)
    assert (one.tobytes(), text) == (same.tobytes(), again)
    assert len({web.web_picture(seed, number)[0].tobytes() for seed in (3, 4) for number in (7, 8)}) == 4


def test_the_data_set_is_the_same_on_any_number_of_cores_and_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(web, "PART", 4)
    monkeypatch.setattr(web, "cores", lambda: 1)
    file = web.make_web(tmp_path / "one", train=8, val=2)
    monkeypatch.setattr(web, "cores", lambda: 2)
    web.make_web(tmp_path / "two", train=8, val=2)
    monkeypatch.setattr(web, "cores", lambda: 1)
    done = web._draw_part
    drawn = []

    def killed(*part):
        if len(drawn) == 1:
            (tmp_path / "cut" / "imgs" / "000004.jpg").write_bytes(b"half")
            raise KeyboardInterrupt
        drawn.append(part)
        return done(*part)

    monkeypatch.setattr(web, "_draw_part", killed)
    with pytest.raises(KeyboardInterrupt):
        web.make_web(tmp_path / "cut", train=8, val=2)
    monkeypatch.setattr(web, "_draw_part", done)
    web.make_web(tmp_path / "cut", train=8, val=2)
    first = {path.name: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    for other in ("two", "cut"):
        assert {path.name: path.read_bytes() for path in (tmp_path / other).rglob("*") if path.is_file()} == first
    records = json.loads(file.read_text())
    assert [record["split"] for record in records] == ["train"] * 8 + ["val"] * 2
    assert len({record["id"] for record in records}) == 10
    with Image.open(tmp_path / "one" / "imgs" / records[0]["img_path"]) as image:
        assert (image.height, image.width) == web.SIZE


def test_kinds_and_faults_are_as_frequent_in_the_texts_as_declared(monkeypatch):
    plain = {kind: lambda rng, kind=kind: web.Page(kind, None, None, f"a green {kind}") for kind in web.KINDS}
    monkeypatch.setattr(web, "COMPOSED", plain)
    count, vague = 6000, [text.format(r"\d+") for text in web.VAGUE]
    pages = [web.page(np.random.default_rng([5, number])) for number in range(count)]
    found = Counter()
    for page in pages:
        told = re.fullmatch(r"a (.+?) (person|two people|garment|thing|place|pattern)", page.text)
        if told is None:
            assert any(re.fullmatch(text, page.text) for text in vague)
            found["vague"] += 1
        elif told[2] != page.kind:
            assert told[1] == "green"
            found["another's"] += len(web.KINDS) / (len(web.KINDS) - 1)  # some are of the same kind
        else:
            found["colour"] += (told[1] != "green") * len(COLOURS) / (len(COLOURS) - 1)
    declared = dict(web.FAULTS)
    assert declared.pop("none") + sum(declared.values()) == sum(web.KINDS.values()) == 100
    for name, per_cent in declared.items():
        assert 100 * found[name] / count == pytest.approx(per_cent, abs=1.7), name  # 4 standard deviations of 12 %
    kinds = Counter(page.kind for page in pages)
    for name, per_cent in web.KINDS.items():
        assert 100 * kinds[name] / count == pytest.approx(per_cent, abs=2.6), name  # of 45 %


def test_another_colour_is_all_that_changes_in_a_recoloured_text():
    rng = np.random.default_rng(0)
    texts = {web.recoloured("a striped red dress and black boots", rng) for _ in range(200)}
    assert {text for text in texts if not re.fullmatch(r"a striped [a-z ]+ dress and black boots", text)} == set()
    assert len(texts) == len(COLOURS)
    assert web.recoloured("the beach", rng) == "the beach"


def test_texts_of_people_are_short_and_none_is_of_the_targets_grammar():
    people = [web._person(np.random.default_rng(number)) for number in range(60)]
    words = [len(page.text.split()) for page in people]
    careful = captions.caption_of(
        {"gender": "man", "hair": "short", "hair_colour": "black", "upper": "shirt", "upper_colour": "red"}
        | {"pattern": "striped", "lower": "jeans", "lower_colour": "blue", "shoes": "boots", "shoe_colour": "black"}
        | {"bag": "backpack", "bag_colour": "green", "hat": "none", "glasses": "no", "carried": "nothing"},
        set(),
        "street",
        np.random.default_rng(0),
    )[0]
    assert np.median(words) < len(careful.split()) / 2
    texts = [page.text for page in people]
    annotators = ("pedestrian", "gentleman", "on foot", "straps")  # words that only they use
    assert share(texts, annotators) == 0
    stock = [max(re.split(r"\{\w+\}", form), key=len) for form in web.STOCK_FORMS]
    assert share(texts, map(re.escape, stock)) < 100 * web.STOCK + 15


def test_every_kind_place_thing_and_style_draws():
    for kind, composed in web.COMPOSED.items():
        for seed in range(2):
            page = composed(np.random.default_rng(seed))
            assert page.kind == kind
            image = web._drawn(page.ground)
            assert (image.height, image.width) == web.SIZE
            assert page.text
    blank = web._drawn(web.Sketch(1.0)).tobytes()
    for name, draw in web_things.THINGS.items():
        sketch = web.Sketch(1.0)
        draw(sketch, 64, 200, 40, COLOURS["red"])
        pixels = np.asarray(web._drawn(sketch)).reshape(-1, 4)
        assert pixels[:, 3].mean() > 5, name
        opaque = pixels[pixels[:, 3] > 200].astype(int)
        assert (opaque[:, 0] > opaque[:, 2] + 30).mean() > 0.2, f"{name} is red"
    for name in web_things.PLACES:
        assert web._drawn(web_things.place(name, 1.0, np.random.default_rng(1))).tobytes() != blank, name
    photo = Image.effect_noise((64, 192), 90).convert("RGB")
    for name, (_, drawn_as) in web.STYLES.items():
        image = drawn_as(photo, np.random.default_rng(2))
        assert (image.size, image.mode) == (photo.size, "RGB"), name
        assert (image.tobytes() == photo.tobytes()) == (name == "photo"), name


def test_a_text_says_what_the_picture_shows():
    rng = np.random.default_rng(4)
    for _ in range(200):
        one = web._somebody(rng)
        hidden = {"shoes", "lower"}
        named = web._named(one, hidden, rng)
        assert not hidden & set(named)
        for slot, phrase in named.items():
            words = captions.WORDS[slot][one[slot]]
            assert any(web._bare(word).replace("{} ", "").split()[-1] in phrase for word in words), (slot, phrase)
            assert "  " not in phrase
            assert "{" not in phrase
