"""People on a sketch: every garment, bag, hat and thing is drawn, joined, and boxed under its name."""

from math import radians
from xml.etree import ElementTree

import numpy as np
import pytest

from irra_core.synthetic import people as synthetic
from irra_core.synthetic.pedestrian import COLOURS, GARMENTS, Figure, pose_of
from irra_core.synthetic.sketch import Eye, Sketch

PERSON = {"gender": "woman", "hair": "short", "hair_colour": "brown", "upper": "sweater", "upper_colour": "red"}
PERSON |= {"pattern": "plain", "lower": "trousers", "lower_colour": "blue", "shoes": "boots", "shoe_colour": "black"}
PERSON |= {"bag": "none", "hat": "none", "glasses": "no", "carried": "nothing"}
SLOTS = {"upper": "upper", "lower": "lower", "shoes": "shoes", "bag": "bag", "hat": "hat", "carried": "carried"}
VALUES = [
    *((slot, value) for slot, values in synthetic.MIX["usual"].items() for value in values),
    *(("hair", style) for styles in synthetic.HAIR.values() for style in styles),
    *(("pattern", pattern) for pattern in synthetic.PATTERNS),
]


def drawn(yaw: float, seed: int = 0, **changes: str) -> Sketch:
    person = PERSON | changes
    sketch = Sketch(1.0)
    complete = synthetic._dressed(person, synthetic._body(person, np.random.default_rng(0)))
    Figure(sketch, Sketch(1.0), complete, Eye(radians(yaw), 0.1, 1.9, 64.0, 370.0), np.random.default_rng(seed)).draw()
    return sketch


@pytest.mark.parametrize(("slot", "value"), dict.fromkeys(VALUES))
def test_every_value_of_an_attribute_is_drawn_and_boxed(slot, value):
    for yaw in (0, 95, 180):
        sketch = drawn(yaw, **{slot: value})
        ElementTree.fromstring(sketch.svg())  # raises where it is not well-formed
        assert "nan" not in sketch.svg()
        if slot in SLOTS:
            assert (SLOTS[slot] in sketch.boxes) == (value not in ("none", "nothing"))


@pytest.mark.parametrize(("slot", "other"), [("upper", "coat"), ("lower", "shorts"), ("hat", "cap")])
def test_another_value_is_another_drawing(slot, other):
    assert drawn(0).svg() != drawn(0, **{slot: other}).svg()


def test_the_parts_of_a_body_are_joined():
    for yaw in range(0, 360, 45):
        boxes = drawn(yaw).boxes
        for a, b in (("head", "torso"), ("torso", "left arm"), ("torso", "lower"), ("left leg", "left foot")):
            (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = boxes[a], boxes[b]
            assert min(ax1, bx1) > max(ax0, bx0), (yaw, a, b)
            assert min(ay1, by1) >= max(ay0, by0) - 1, (yaw, a, b)


def test_a_neckline_whose_last_cosine_rounds_below_0_is_drawn():
    assert "upper" in drawn(314.5, upper="dress").boxes  # a fractional power of it would be a complex number


def test_the_feet_stand_on_the_ground_point_of_the_camera():
    for seed in range(8):
        assert drawn(90, seed).boxes["shoes"][3] == pytest.approx(372, abs=6)


def test_limbs_keep_their_length_in_every_pose():
    person = {"hips": 1.0, "shoulders": 1.0, "hand": 1, "carried": "phone", "bag": "none"}
    for seed in range(20):
        arms, legs = pose_of(person, np.random.default_rng(seed))
        for joints, lengths in [*((arm, (29, 25, 9)) for arm in arms), *((leg, (42, 40)) for leg in legs)]:
            for a, b, length in zip(joints, joints[1:], lengths, strict=False):
                assert np.linalg.norm(np.subtract(a, b)) == pytest.approx(length, rel=0.03)


def test_a_raised_hand_is_above_the_elbow_and_the_other_is_not():
    person = {"hips": 1.0, "shoulders": 1.0, "hand": 0, "carried": "phone", "bag": "none"}
    arms, _ = pose_of(person, np.random.default_rng(0))
    assert arms[0][2][1] > arms[0][1][1]
    assert arms[1][2][1] < arms[1][1][1]


def test_what_an_open_jacket_shows_is_boxed_from_the_front_only():
    worn = {"upper": "jacket", "worn": "open", "inner_colour": "yellow"}
    assert "inner" in drawn(0, **worn).boxes
    assert "inner" not in drawn(180, **worn).boxes


def test_every_garment_of_the_data_set_can_be_drawn_in_a_colour_that_exists():
    assert {value for mix in synthetic.MIX.values() for value in mix.get("upper", ())} <= set(GARMENTS)
    assert {*synthetic.CLOTH, *synthetic.DENIM, *synthetic.CALM, *synthetic.SHOE} <= set(COLOURS)
