"""Sentences about rendered people: true, grammatical, silent on what a photo does not show."""

import re
from functools import cache

import numpy as np
import pytest

from irra_core.synthetic.captions import STYLES, WORDS, caption_of, hidden_in, things_named, weighted
from irra_core.synthetic.people import DOMAINS

MAN = {"gender": "man", "hair": "bald", "upper": "t-shirt", "upper_colour": "orange", "pattern": "logo"}
MAN |= {"lower": "jeans", "lower_colour": "blue", "shoes": "boots", "shoe_colour": "black", "bag": "backpack"}
MAN |= {"bag_colour": "red", "hat": "none", "glasses": "yes", "carried": "phone"}
WOMAN = {"gender": "woman", "hair": "bob", "hair_colour": "blonde", "upper": "coat", "upper_colour": "navy"}
WOMAN |= {"worn": "open", "inner_colour": "orange", "lower": "skirt", "lower_colour": "beige", "shoes": "sneakers"}
WOMAN |= {"shoe_colour": "white", "bag": "none", "hat": "brimmed hat", "hat_colour": "orange", "glasses": "no"}
WOMAN |= {"carried": "open umbrella", "carried_colour": "orange"}
EVERYTHING = {name: [0, 0, 9, 9] for name in ("hair", "hat", "bag", "carried", "upper", "lower", "shoes")}
FACING = {name: [0, 0, 9, 9] for name in ("glasses", "logo", "inner")}


@cache
def told(who: str, view: str, domain: str = "street", count: int = 150) -> list[tuple[str, dict]]:
    """Many captions of one photo that shows everything that its view can show."""
    person = {"man": MAN, "woman": WOMAN}[who]
    hidden = hidden_in(view, person, [], EVERYTHING | (FACING if view == "front" else {}))
    return [caption_of(person, hidden, domain, np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("who", ["man", "woman"])
def test_a_caption_is_a_sentence_that_says_each_stated_attribute(who, domain):
    for caption, stated in told(who, "front", domain):
        assert re.fullmatch(r"[A-Z][A-Za-z ,.-]+\.", caption), caption
        assert not re.search(r"\ba [aeio]|\ban [^aeio]|  | [,.]|[,.][,.]", caption.lower()), caption
        assert stated.items() <= {"man": MAN, "woman": WOMAN}[who].items()
        for key, value in stated.items():
            words = WORDS["colour" if key.endswith("colour") else key][value]
            assert any(all(part in caption.lower() for part in word.split("{}")) for word in words), (caption, key)


def test_everything_in_sight_is_said_by_some_caption_and_left_out_by_another():
    for key in set(MAN) - {"hat"}:
        said = [key in stated for _, stated in told("man", "front")]
        assert 0 < sum(said) < len(said), key


def test_a_photo_from_behind_tells_no_face_no_chest_and_nothing_held_before_it():
    stated = set().union(*(stated for _, stated in told("man", "back")))
    assert "lower_colour" in stated
    assert not stated & {"glasses", "pattern", "carried"}
    assert not set().union(*(stated for _, stated in told("woman", "back"))) & {"worn", "inner_colour"}


def test_what_the_boxes_lack_or_an_occluder_hides_is_not_told():
    without = {name: box for name, box in EVERYTHING.items() if name != "hat"}
    hidden = hidden_in("front", WOMAN, ["shoes"], without)
    for seed in range(60):
        _, stated = caption_of(WOMAN, hidden, "street", np.random.default_rng(seed))
        assert not stated.keys() & {"hat", "hat_colour", "shoes", "shoe_colour"}


def test_a_backpack_shows_its_straps_from_the_front_only():
    assert any("straps" in caption for caption, _ in told("man", "front"))
    assert not any("straps" in caption for caption, _ in told("man", "back"))


def test_the_domains_prefer_their_own_styles():
    assert set(STYLES) == set(DOMAINS)
    starts = {domain: [caption.split()[0] for caption, _ in told("man", "front", domain)] for domain in DOMAINS}
    assert starts["street"].count("There") < starts["campus"].count("There")
    assert starts["campus"].count("This") < starts["night"].count("This")


def test_weighted_draws_by_weight_and_leaves_out():
    rng = np.random.default_rng(0)
    drawn = [weighted({"a": 3, "b": 1, "c": 9}, rng, without=("c",)) for _ in range(4000)]
    assert set(drawn) == {"a", "b"}
    assert drawn.count("a") / 4000 == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("who", ["man", "woman"])
def test_things_named_are_those_that_the_caption_states_each_with_its_colour(who, domain):
    keys = {"shoe_colour": "shoes"}
    for caption, stated in told(who, "front", domain):
        words = re.findall(r"[a-z]+|[^\sa-z]+", caption.lower())
        found = things_named(words)
        colours = [key for key in stated if key.endswith("_colour")]
        assert {item.thing for item in found if item.kind == "colour"} == {
            keys.get(key, key.removesuffix("_colour")) for key in colours
        }, caption
        for item in found:
            said = " ".join(words[place] for place in item.places)
            if item.kind == "colour":
                name = "shoe_colour" if item.thing == "shoes" else f"{item.thing}_colour"
                assert said in WORDS["colour"][stated[name]], caption
        nouns = {"upper", "lower", "shoes", "bag", "hat", "carried", "glasses"} & set(stated)
        assert nouns <= {item.thing for item in found if item.kind == "noun"}, caption


def test_a_longer_name_is_not_taken_for_the_shorter_one_inside_it():
    words = re.findall(r"\w+", "a woman in dress shoes with a red shopping bag over a white top")
    found = [(item.thing, " ".join(words[place] for place in item.places)) for item in things_named(words)]
    assert found == [
        ("shoes", "dress shoes"), ("carried", "red"), ("carried", "shopping bag"), ("inner", "white"), ("inner", "top"),
    ]  # fmt: skip
