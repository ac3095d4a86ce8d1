"""Geometry and shapes of the drawings."""

from math import cos, radians, sin

import numpy as np
import pytest

from irra_core.synthetic.sketch import Eye, Lathe, Sketch, along, hull, limb, tone

EYE = Eye(yaw=0.7, pitch=0.1, scale=2.0, x=64.0, y=370.0)


def test_an_eye_sees_the_left_hand_on_the_right_and_what_is_near_lower():
    front = Eye(yaw=0.0, pitch=0.1, scale=2.0, x=64.0, y=370.0)
    assert front.at(10, 100, 0) == pytest.approx((84, 170))
    assert front.at(0, 0, 10)[1] > front.at(0, 0, 0)[1] > front.at(0, 0, -10)[1]


def test_a_spot_of_a_lathe_is_the_point_of_the_ellipse():
    solid = Lathe(((100, 10, 6, 1), (50, 14, 8, 1)), EYE)
    for angle in range(0, 360, 15):
        side, ahead = 12 * sin(radians(angle)), 7 * cos(radians(angle)) + 1
        seen = solid.facing(angle, 75)
        towards = EYE.near(sin(radians(angle)) / 12, cos(radians(angle)) / 7)  # the surface's normal
        if seen is not None:
            assert solid.spot(75, seen)[0] == pytest.approx(EYE.at(side, 75, ahead)[0])
        assert abs(towards) < 0.01 or (seen is not None) == (towards > 0), angle


def test_the_outline_of_a_lathe_holds_its_surface():
    solid = Lathe(((100, 10, 6, 0), (50, 14, 8, 0)), EYE)
    xs = [solid.spot(80, a)[0] for a in range(-90, 91)]
    assert min(xs) == solid.spot(80, -90)[0]
    assert max(xs) == solid.spot(80, 90)[0]


def test_panels_round_the_whole_body_are_as_wide_as_its_outline():
    solid = Lathe(((100, 10, 6, 0), (50, 10, 6, 0)), EYE)
    runs = [run for panel in solid.panels(0, 360, lambda _: 60, lambda _: 90) for run in panel]
    xs = [x for run in runs for x, _ in run]
    assert (min(xs), max(xs)) == pytest.approx((solid.spot(75, -90)[0], solid.spot(75, 90)[0]))
    assert not solid.panels(170, 190, lambda _: 60, lambda _: 90)  # the far side is not seen


def test_the_hull_of_discs_holds_every_disc_and_is_convex():
    rng = np.random.default_rng(0)
    discs = [((float(x), float(y)), float(r)) for x, y, r in rng.uniform(1, 9, (6, 3))]
    points = np.array(hull(discs))
    edges = np.roll(points, -1, 0) - points
    turns = edges[:, 0] * np.roll(edges, -1, 0)[:, 1] - edges[:, 1] * np.roll(edges, -1, 0)[:, 0]
    assert (turns > -1e-9).all()
    for (x, y), _ in discs:
        outside = edges[:, 0] * (y - points[:, 1]) - edges[:, 1] * (x - points[:, 0])
        assert (outside > 0).all()


def test_a_limb_is_as_wide_as_its_radii():
    left, _, right, _ = limb([(0, 0), (0, 10), (0, 20)], [3, 2, 1])
    assert [abs(a[0] - b[0]) for a, b in zip(left, right[::-1], strict=True)] == [6, 4, 2]


def test_along_a_chain_each_piece_counts_alike():
    assert along([(0, 0), (10, 0), (10, 2)], 0.25) == (5, 0)
    assert along([(0, 0), (10, 0), (10, 2)], 0.75) == (10, 1)
    assert along([(0, 0), (10, 0)], 2.0) == (10, 0)


def test_lines_of_one_style_become_one_shape_and_are_not_boxed():
    s = Sketch(1.0, names=("coat",))
    s.line([(0, 0), (5, 5)], "#000", 1.0)
    s.line([(9, 9), (5, 5)], "#000", 1.0)
    s.line([(9, 9), (5, 5)], "#fff", 1.0)
    assert len(s.shapes) == 2
    assert s.boxes == {}
    s.oval((10, 20), 3, 4, "#000")
    s.polygon([(0, 18), (2, 19)], "#000")
    assert s.boxes == {"coat": [0, 16, 13, 24]}


def test_tones_darken_and_lighten():
    assert tone((100, 100, 100), 1.0) == (255, 255, 255)
    assert max(tone((100, 100, 100), -1.0)) <= 10
    assert tone((10, 20, 30), 0) == (10, 20, 30)
