"""One person before one camera: the photo, its boxes, what is out of sight."""

import numpy as np
import pytest

from irra_core.synthetic import people as synthetic
from irra_core.synthetic.pedestrian import COLOURS
from irra_core.synthetic.people import DOMAINS
from irra_core.synthetic.scenery import PLACES, SCENES, photograph

PERSON = {"gender": "woman", "hair": "ponytail", "hair_colour": "black", "upper": "sweater", "upper_colour": "red"}
PERSON |= {"pattern": "plain", "lower": "trousers", "lower_colour": "blue", "shoes": "boots", "shoe_colour": "yellow"}
PERSON |= {"bag": "none", "hat": "cap", "hat_colour": "green", "glasses": "yes", "carried": "nothing"}


def photo(view: str, domain: str = "street", seed: int = 0, **changes):
    person = PERSON | changes
    body = synthetic._body(person, np.random.default_rng(0))
    return photograph(synthetic._dressed(person, body), view, domain, np.random.default_rng(seed))


def test_every_domain_has_scenes_that_exist():
    assert set(PLACES) == set(DOMAINS)
    assert {scene for place in PLACES.values() for scene in place.scenes} == set(SCENES)


@pytest.mark.parametrize("view", ["front", "back", "side"])
def test_boxes_lie_inside_the_photo_one_above_the_other(view):
    for seed in range(3):
        _, boxes, _ = photo(view, seed=seed)
        for x0, y0, x1, y1 in boxes.values():
            assert 0 <= x0 < x1 <= 64
            assert 0 <= y0 < y1 <= 192
        assert boxes["hat"][1] < boxes["upper"][1] < boxes["lower"][1] < boxes["shoes"][1]
        assert {"head", "torso", "left arm", "right arm", "left leg", "right leg"} <= set(boxes)


def test_glasses_have_a_box_where_the_face_is_in_sight():
    assert all("glasses" in photo("front", seed=seed)[1] for seed in range(3))
    assert not any("glasses" in photo("back", seed=seed)[1] for seed in range(3))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("torso", "upper_colour", "white"), ("shoes", "shoe_colour", "navy"), ("hat", "hat_colour", "white")],
)
def test_a_part_that_changes_colour_changes_the_photo_in_its_box(name, key, value):
    before, boxes, _ = photo("side", seed=1)
    after, same, _ = photo("side", seed=1, **{key: value})
    assert boxes == same
    x0, y0, x1, y1 = boxes[name]
    difference = np.abs(np.asarray(before, int) - np.asarray(after, int)).sum(2)
    changed = np.where(difference < 40, 0, difference)  # less is noise that clipping changed
    inside = changed[y0:y1, x0:x1]
    assert inside.mean() > 20
    assert inside.sum() > (0.6 if name == "torso" else 0.9) * changed.sum()  # the arms wear the upper garment too


def test_colours_are_seen_in_every_domain():
    for domain in DOMAINS:
        picture, boxes, _ = photo("front", domain, seed=2)
        x0, y0, x1, y1 = boxes["torso"]
        chest = np.asarray(picture)[(2 * y0 + y1) // 3 : (y0 + 2 * y1) // 3, (2 * x0 + x1) // 3 : (x0 + 2 * x1) // 3]
        red, green, blue = np.median(chest.reshape(-1, 3), axis=0)
        assert red > 1.6 * max(green, blue)
        assert COLOURS["red"][0] > 1.6 * COLOURS["red"][1]


def test_the_same_numbers_draw_the_same_photo_and_others_another():
    one, two, other = photo("front", seed=4)[0], photo("front", seed=4)[0], photo("front", seed=5)[0]
    assert one.tobytes() == two.tobytes() != other.tobytes()
