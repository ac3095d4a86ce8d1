"""A person's attributes and build, an `Eye` → the person on a `Sketch`, drawn from far to near, one box per thing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import atan2, cos, hypot, radians, sin
from typing import Any

import numpy as np

from irra_core.synthetic.sketch import Colour, Eye, Lathe, Number, Point, Sketch, along, hull, ink, limb, tone

COLOURS = {
    "black": (34, 34, 38),
    "white": (238, 238, 234),
    "grey": (132, 134, 138),
    "red": (196, 36, 38),
    "pink": (238, 148, 178),
    "orange": (236, 124, 36),
    "yellow": (240, 204, 60),
    "green": (46, 132, 66),
    "light blue": (140, 190, 232),
    "blue": (40, 92, 196),
    "navy": (32, 42, 92),
    "purple": (122, 62, 158),
    "brown": (112, 70, 40),
    "beige": (212, 186, 146),
}
HAIR_COLOURS = {
    "black": (30, 27, 27),
    "brown": (94, 60, 34),
    "blonde": (216, 178, 98),
    "grey": (168, 168, 166),
    "red": (168, 72, 30),
}
SKINS = ((244, 208, 180), (232, 190, 156), (212, 164, 126), (170, 120, 84), (122, 82, 58), (92, 60, 44))
PALE = ("white", "beige", "yellow", "light blue", "pink")  # their patterns are dark, those of the others white

# The rows of a Lathe: height, half width, half depth, centre forward, in cm for a stature of 172.
TORSO = (
    (150.0, 5.8, 5.4, -0.6),
    (147.5, 8.0, 6.2, -1.0),
    (145.5, 12.2, 7.2, -1.0),
    (143.0, 16.2, 8.4, -0.6),
    (139.5, 18.2, 9.6, 0.0),
    (133.0, 17.6, 11.0, 0.6),
    (125.0, 17.0, 11.6, 0.8),
    (115.0, 15.4, 10.8, 0.4),
    (106.0, 14.6, 10.2, 0.2),
    (97.0, 16.0, 11.0, -0.2),
    (90.0, 16.8, 11.6, -0.4),
    (80.0, 16.4, 11.2, -0.2),
)
CHIN = 149.5
HEAD = (  # above the chin
    (23.0, 1.2, 1.4, -0.6),
    (22.3, 3.7, 4.7, -0.6),
    (20.5, 5.9, 7.6, -0.6),
    (17.5, 7.2, 9.2, -0.4),
    (13.0, 7.6, 9.4, -0.1),
    (9.0, 7.3, 8.6, 0.5),
    (5.5, 6.3, 7.2, 1.3),
    (2.5, 4.9, 5.6, 2.4),
    (0.6, 3.1, 3.8, 3.3),
    (0.0, 1.6, 2.0, 3.5),
)
HAIRLINES = {  # (angle from the nose in degrees, height above the chin)
    "short": ((0, 18.4), (38, 17.8), (60, 14.5), (72, 9.5), (95, 8.0), (120, 4.0), (180, 2.0)),
    "bob": ((0, 17.6), (36, 16.6), (52, 11.0), (60, 1.0), (70, -2.0), (180, -3.0)),
    "long": ((0, 18.2), (32, 17.0), (50, 9.0), (60, -9.0), (76, -13.0), (110, -17.0), (180, -20.0)),
    "tied": ((0, 18.6), (40, 18.0), (62, 14.0), (80, 10.0), (110, 6.5), (180, 3.0)),
}
THICK = {"short": 0.8, "ponytail": 0.6, "bun": 0.6, "bob": 1.3, "long": 1.3}  # hair, cm
GARMENTS = {  # upper garment: (height of the hem, ease, sleeve as a share of the arm)
    "t-shirt": (86, 0.6, 0.30),
    "shirt": (84, 0.8, 0.93),
    "sweater": (86, 1.2, 0.93),
    "hoodie": (85, 1.8, 0.94),
    "jacket": (84, 1.9, 0.95),
    "coat": (54, 2.4, 0.95),
    "down jacket": (82, 3.2, 0.95),
    "dress": (52, 0.3, 0.28),
}
LONG = ("coat", "dress")  # garments that cover the hips and part of the legs
REACH = {"phone": 128, "book": 98, "cup": 112, "bottle": 88, "open umbrella": 130}  # angle of the forearm, degrees


def pose_of(person: dict[str, Any], rng: np.random.Generator) -> tuple[list, list]:
    """Random joints of both arms and both legs (right, left), walking or standing; in cm in the body's axes."""
    stride = float(rng.uniform(0, 7) if rng.random() < 0.3 else rng.uniform(12, 26))
    lead = 1 if rng.random() < 0.5 else -1
    legs, arms = [], []
    for i, side in enumerate((-1, 1)):
        swing = stride * side * lead
        bend = 4 + float(rng.uniform(0.4, 0.9) * stride if swing < 0 else rng.uniform(0, 6))
        thigh, shin, spread = radians(swing + 3), radians(swing + 3 - bend), radians(float(rng.uniform(1, 4))) * side
        hip = (side * 8.6 * person["hips"], 90.0, 0.0)
        knee = (hip[0] + 42 * sin(spread), 90 - 42 * cos(thigh), 42 * sin(thigh))
        legs.append([hip, knee, (knee[0], knee[1] - 40 * cos(shin), knee[2] + 40 * sin(shin))])
        upper, fore, inward = -swing * 0.9, -swing * 0.9 + float(rng.uniform(8, 26)), 0.0
        if i == person["hand"] and person["carried"] in REACH:
            upper, fore, inward = 12, REACH[person["carried"]], -0.35 * side
        elif i == person["hand"] and (person["carried"] != "nothing" or person["bag"] == "handbag"):
            upper = -14 if person["carried"] == "suitcase" else float(rng.uniform(-6, 8))
            fore = upper + 6
        spread = float(rng.uniform(0.09, 0.19)) * side
        joints = [(side * 17.2 * person["shoulders"], 138.6, 0.0)]
        for length, angle, out in ((29, upper, spread), (25, fore, spread * 0.3 + inward), (9, fore, inward)):
            x, y, z = joints[-1]
            down, ahead = length * cos(radians(angle)) * cos(out), length * sin(radians(angle)) * cos(out)
            joints.append((x + length * sin(out), y - down, z + ahead))
        arms.append(joints)
    return arms, legs


@dataclass
class Figure:
    """One person in front of one camera.

    `person` has a value for every attribute of `synthetic`, the build (shoulders, waist, hips, fit: 1 is typical),
    skin, tights, the carrying hand (0 right, 1 left), and `shades`: the colour of every part.
    """

    sketch: Sketch
    ground: Sketch  # the shadow is drawn on it
    person: dict[str, Any]
    eye: Eye
    rng: np.random.Generator

    def draw(self) -> None:
        """Draw everything, from the shadow on the ground to the hat."""
        person, eye = self.person, self.eye
        self.arms, self.legs = pose_of(person, self.rng)
        sunk = min(leg[2][1] for leg in self.legs) - 8.4
        self.eye = eye = replace(eye, y=eye.y + eye.scale * sunk)
        self.gaze = replace(eye, yaw=eye.yaw + float(self.rng.uniform(-0.32, 0.32)))
        self.front = cos(eye.yaw)
        self.hem, ease, self.sleeve = GARMENTS[person["upper"]]
        self.hips = Lathe(self._built(TORSO, 0.4), eye)
        self.trunk = Lathe(self._falling(self._built(TORSO, ease)), eye)
        self.skull = Lathe([(CHIN + up, w, d, z + 1.0) for up, w, d, z in HEAD], self.gaze)
        self.second = (36, 44, 84) if person["upper_colour"] in PALE else (240, 240, 236)
        far_first = sorted((0, 1), key=self._arm_depth)
        behind = [i for i in far_first if self._arm_depth(i) < -4.5]
        raised = [person["hand"]] if person["carried"] in REACH and person["hand"] not in behind else []
        self._shadow()
        if self.front > 0:
            self._pack()
        if self._bag_depth() < 0:
            self._shoulder_bag()
        for i in behind:
            self._arm(i)
        self._lower()
        if person["hair"] in ("long", "bob") and self.front > -0.2:
            self._back_hair()
        self._upper()
        for i in far_first:
            if i not in [*behind, *raised]:
                self._arm(i)
        self._straps()
        self._head()
        if self.front <= 0:
            self._pack()
            if person["hair"] == "long":
                self._hair()
        for i in raised:
            self._arm(i)
        if "lower" in self.sketch.boxes:  # only what the upper garment does not cover
            box, hem = self.sketch.boxes["lower"], self.trunk.spot(self.hem, 0)[1]
            box[1] = min(max(box[1], hem), box[3])

    def _built(self, rows: Sequence, ease: Number) -> list:
        """The trunk's rows for this build, with a garment's ease."""
        person, found = self.person, []
        for up, width, depth, centre in rows:
            share = person["shoulders"] if up > 120 else person["waist"] if up > 100 else person["hips"]
            loose = ease * min(max((149 - up) / 12, 0.15), 1)
            chest = 0.8 if person["gender"] == "woman" and 118 < up < 134 else 0.0
            found.append((up, width * share + loose, depth * (0.5 + share / 2) + loose + chest * 0.7, centre + chest))
        return found

    def _falling(self, rows: list) -> list:
        """The rows of a garment; a long one is flared below the hips, at least as deep as the step."""
        if self.person["upper"] not in LONG:
            return rows
        step = max(abs(leg[1][2]) for leg in self.legs) * 0.7 + 3
        rows, flare = [row for row in rows if row[0] > 95], 5.0 if self.person["upper"] == "dress" else 2.6
        wide, deep = rows[-1][1:3]
        return [*rows, (84, wide + 1.2, deep + 1, 0), (self.hem, wide + flare, max(deep + flare, step), 0)]

    def _arm_depth(self, i: int) -> Number:
        """The coordinate of the forearm's middle towards the camera, in cm."""
        return self.eye.near(*[(a + b) / 2 for a, b in zip(self.arms[i][1], self.arms[i][2], strict=True)][::2])

    def _shade(self, name: str, by: Number = 0.0) -> tuple[int, ...]:
        """This person's colour of a part, darkened or lightened."""
        return tone(self.person["shades"][name], by)

    def _panel(self, solid: Lathe, span: Point, low: Any, high: Any, paint: str, alpha: Number = 1.0, edge: str = ""):
        """Fill the visible part of a solid's surface; edge draws its `low` or `high` border as a seam."""
        low, high = (f if callable(f) else (lambda _, f=f: f) for f in (low, high))
        for runs in solid.panels(*span, low, high, 14):
            self.sketch.fill(runs, paint, alpha)
            if edge:
                self.sketch.line(runs[0] if edge == "low" else runs[2], "#000", 1.1, 0.36)

    def _seam(self, solid: Lathe, angle: Number, top: Number, low: Number, width: Number = 1.1, alpha: Number = 0.3):
        """Draw a line down a solid at an angle on the body, if it is visible."""
        seen = solid.facing(angle, (top + low) / 2)
        if seen is not None:
            self.sketch.line(solid.edge(top, low, seen), "#000", width, alpha)

    def _shadow(self) -> None:
        """Draw a soft shadow on the ground under and beside the feet."""
        s, k = self.ground, self.eye.scale
        stops = "".join(f'<stop offset="{at}" stop-opacity="{by}"/>' for at, by in ((0, 0.55), (0.5, 0.28), (1, 0)))
        y = max(self.eye.at(*leg[2])[1] for leg in self.legs) + 7 * k
        paint = s.gradient(f'<radialGradient id="{{}}">{stops}</radialGradient>')
        s.oval((self.eye.x - s.light * 9 * k, y), 34 * k, (3.5 + 30 * self.eye.pitch) * k, paint)

    # legs, their clothes and shoes

    def _lower(self) -> None:
        """Draw both legs, the far one first, then the skirt or the hips of the trousers."""
        s, person, hips = self.sketch, self.person, self.hips
        far, near = sorted((0, 1), key=lambda i: self.eye.near(self.legs[i][2][0], self.legs[i][2][2]))
        self._leg(far, -0.16 if abs(sin(self.eye.yaw)) > 0.5 else 0.0)
        self._leg(near, 0.0)
        if person["upper"] == "dress":
            return
        s.names = ("lower",)
        rgb, top = self._shade("lower_colour"), min(self.hem + 6, 106)
        if person["lower"] == "skirt":
            rows = [row for row in hips.rows if row[0] > 88]
            wide, deep = rows[-1][1:3]
            step = max(abs(leg[1][2]) for leg in self.legs) * 0.75 + 3
            skirt = Lathe(
                [*rows, (70, wide + 2.2, max(deep + 2, step - 2), 0), (54, wide + 4.4, max(deep + 4, step), 0)],
                self.eye,
            )
            s.fill(skirt.outline(top, 54), s.across(rgb, skirt, 70))
            self._drape(skirt, 90, 55)
            return
        if top < 84:  # a coat covers all of it
            return
        s.fill(hips.outline(top, 84), s.across(rgb, hips, 92))
        seen = hips.facing(0 if self.front > 0 else 180, 92, 70)
        if seen is not None:
            x, y = hips.spot(85.5, seen)
            s.line([hips.spot(100, seen), (x, y)], "#000", 1.1, 0.2)
            for dx in (-6, 6):
                s.line([(x, y), (x + dx * self.eye.scale, y - 4 * self.eye.scale)], "#000", 1.1, 0.2)

    def _leg(self, i: int, dim: Number) -> None:
        """Draw the bare leg and the shoe, then the trouser leg over both."""
        s, person, eye, k = self.sketch, self.person, self.eye, self.eye.scale * self.person["hips"]
        hip, knee, ankle = self.legs[i]
        side, lower = ("right leg", "left leg")[i], person["lower"] if person["upper"] != "dress" else "none"
        mid, calf = along([hip, knee], 0.5), along([knee, ankle], 0.38)
        chain = [eye.at(*p) for p in (hip, mid, knee, calf, ankle)]
        (x, y), r = chain[2], 9 * eye.scale
        s.names = (side, "legs")
        if lower in ("none", "shorts", "skirt"):
            skin = tone(person["tights"] or person["skin"], dim)
            s.fill(limb(chain, [r * k for r in (9.0, 8.2, 5.6, 5.7, 3.4)]), s.shaded(skin, (x - r, y), (x + r, y)))
            s.line([(x - 2, y + 2), (x + 2, y + 3)], "#000", 1.2, 0.14)
        self._shoe(i, dim)
        if lower in ("none", "skirt"):
            return
        s.names = (side, "legs", "lower")
        rgb, fit = self._shade("lower_colour", dim), person["fit"]
        paint = s.shaded(rgb, (x - r, y), (x + r, y))
        if lower == "shorts":
            chain = [*chain[:2], eye.at(*along([hip, knee], 0.93))]
            s.fill(limb(chain, [10.0 * k, 9.9 * k, 9.0 * k], (0, 0.12)), paint)
            s.line(chain[1:], "#000", 1.2, 0.12)
            return
        end = along([knee, ankle], 1.04)
        chain[-1] = eye.at(end[0], max(end[1], ankle[1] - 3.5), end[2])
        radii = [9.8 * k, 9.2 * k, 7.2 * fit * k, 7.0 * fit * k, 6.2 * fit * k]
        s.fill(limb(chain, radii, (0, 0.15)), paint)
        self._trouser_folds(chain, radii, rgb)

    def _trouser_folds(self, chain: list[Point], radii: list[Number], rgb: Colour) -> None:
        """Draw creases at the knee and above the shoe, and a worn patch on jeans."""
        s, k, lit = self.sketch, self.eye.scale, self.sketch.light
        thigh, (x, y), (cx, cy), (ex, ey) = chain[1:]
        if self.person["lower"] == "jeans":
            s.line([along([thigh, (x, y)], 0.1), (x, y)], ink(tone(rgb, 0.28)), radii[1] * 0.55, 0.22)
            s.line([(ex - radii[4] * 0.9, ey - 1.6), (ex + radii[4] * 0.9, ey - 1.6)], ink(tone(rgb, 0.3)), 0.9, 0.5)
        s.line([(cx - lit * radii[3] * 0.35, cy - 6 * k), (ex - lit * radii[4] * 0.2, ey - 8 * k)], "#fff", 1.6, 0.07)
        for dy in (-2.5, 1.5, 4.5):
            s.line([(x + lit * radii[2] * 0.85, y + dy * k), (x + lit * 1.5 * k, y + (dy + 1.6) * k)], "#000", 1.1, 0.2)
        for dy in (3.0, 6.5):
            s.line([(ex - radii[4] * 0.7, ey - dy * k), (ex + radii[4] * 0.6, ey - (dy - 1.4) * k)], "#000", 1.1, 0.2)

    def _drape(self, solid: Lathe, top: Number, low: Number) -> None:
        """Draw long soft folds down to a hem, dark with a light edge."""
        folds = []
        for seen in (-58, -25, 8, 40, 66):
            sway = float(self.rng.uniform(-6, 6))
            middle = solid.spot((top + low) / 2, seen * 0.85)
            folds.append([solid.spot(top - 8, seen * 0.6), middle, solid.spot(low, seen + sway)])
        for fold in folds:
            self.sketch.line(fold, "#000", 1.5, 0.17)
        for fold in folds:
            self.sketch.line([(x + 1.6, y) for x, y in fold], "#fff", 1.2, 0.08)

    def _shoe(self, i: int, dim: Number) -> None:
        """Draw sole and upper as convex hulls of discs from heel to toe, and the shaft of boots up the shin."""
        s, person, k = self.sketch, self.person, self.eye.scale
        _, knee, ankle = self.legs[i]
        lift = max(0.0, min(0.7, atan2(ankle[2] - knee[2], knee[1] - ankle[1]) * -0.45))

        def on_foot(ahead: Number, up: Number) -> Point:
            side = ankle[0] + ahead * (2 * i - 1) * 0.16
            height = ankle[1] + up * cos(lift) - ahead * sin(lift)
            return self.eye.at(side, height, ankle[2] + ahead * cos(lift) + up * sin(lift) * 0.3)

        rgb, kind, white = self._shade("shoe_colour", dim), person["shoes"], person["shoe_colour"] == "white"
        s.names = ("shoes", ("right foot", "left foot")[i])
        sole = (196, 196, 192) if white else (226, 226, 222)
        under = [(on_foot(-5.2, -6.6), 1.9 * k), (on_foot(8, -6.4), 3.4 * k), (on_foot(16.5, -6.6), 2.4 * k)]
        s.fill([hull(under)], ink(sole if kind == "sneakers" else tone(rgb, -0.55)))
        discs = ((0, -0.5, 4.6), (-4, -3.2, 3.4), (9, -3.5, 3.9), (14.5, -3.9, 3.1))
        top = hull([(on_foot(ahead, up), r * k) for ahead, up, r in discs])
        xs = [x for x, _ in top]
        paint = s.shaded(rgb, (min(xs), 0), (max(xs), 0), 0.8)
        if kind == "boots" and (person["upper"] == "dress" or person["lower"] in ("shorts", "skirt")):
            shaft = [self.eye.at(*along([ankle, knee], t)) for t in (0.0, 0.2, 0.42)]
            s.fill(limb(shaft, [4.9 * k, 5.6 * k, 6.4 * k], (0, 0.15)), paint)
            (x, y), r = shaft[2], 6 * k
            s.line([(x - r, y + 1), (x + r, y + 1)], "#000", 1.0, 0.3)
        s.fill([top], paint)
        if kind == "sneakers":
            for ahead, up in ((4.5, 0.4), (7.0, -0.7)):
                (ax, ay), (bx, by) = on_foot(ahead, up), on_foot(ahead + 1.8, up - 1.8)
                s.line([(ax - 1.2, ay), (bx + 0.6, by)], "#969696" if white else "#f0f0ee", 1.0, 0.8)

    # the upper garment

    def _upper(self) -> None:
        """Draw cloth, pattern and folds, then the details of the garment (shirt, jacket, coat …)."""
        s, person, trunk, hem = self.sketch, self.person, self.trunk, self.hem
        rgb = self._shade("upper_colour")
        s.names = ("upper", "torso")
        s.fill(trunk.outline(149.5, hem), s.across(rgb, trunk, 125))
        if person["pattern"] != "plain":
            self._pattern(trunk, hem)
        s.names = ("upper",)
        if person["upper"] in LONG:
            self._drape(trunk, 92, hem + 1)
        elif person["upper"] != "down jacket":
            self._creases(trunk, hem)
        getattr(self, "_" + person["upper"].replace("-", "_").replace(" ", "_"))(trunk, hem, rgb)

    def _creases(self, trunk: Lathe, hem: Number) -> None:
        """Draw folds from the armpits and at the waist, and a shadow above the hem."""
        s, waist = self.sketch, []
        for side in (-1, 1):
            for _ in range(2):
                up, seen = float(self.rng.uniform(118, 130)), side * float(self.rng.uniform(64, 80))
                s.line([trunk.spot(up - dy, seen * f) for dy, f in ((0, 1), (6, 0.62), (9, 0.3))], "#000", 1.2, 0.17)
            up = float(self.rng.uniform(96, 104))
            waist.append([trunk.spot(up - dy, side * a) for dy, a in ((0, 82), (2.5, 45), (2, 15))])
            s.line(waist[-1], "#000", 1.2, 0.17)
        s.line(trunk.ring(hem + 2.2, (-84, -40, 0, 40, 84)), "#000", 1.2, 0.17)
        for fold in waist:
            s.line([(x, y + 1.6) for x, y in fold], "#fff", 1.0, 0.09)

    def _pattern(self, trunk: Lathe, hem: Number) -> None:
        """Draw stripes, checks or dots that follow the body's curvature, or an emblem on the chest."""
        kind, s, k = self.person["pattern"], self.sketch, self.eye.scale
        paint = s.across(self.second, trunk, 125)
        top, step, width, alpha = {"striped": (141, 8, 3.2, 0.95), "checked": (143, 9, 2, 0.75)}.get(kind, (0, 1, 0, 0))
        while top - width > hem:
            s.fill(trunk.band(top, top - width), paint, alpha)
            top -= step
        if kind == "checked":
            for angle in range(-170, 190, 28):
                seen = trunk.facing(angle, 120, 80)
                if seen is not None:
                    s.line(trunk.edge(143, hem + 0.5, seen), paint, 2.2 * k * cos(radians(seen)) ** 0.7, 0.7)
        if kind == "dotted":
            for row, up in enumerate(range(140, int(hem) + 2, -8)):
                for angle in range(-180 + 14 * (row % 2), 180, 28):
                    seen = trunk.facing(angle, up, 80)
                    if seen is not None:
                        s.oval(trunk.spot(up, seen), 1.9 * k * cos(radians(seen)), 1.9 * k, ink(self.second))
        if kind == "logo":
            s.names = ("logo", "upper", "torso")
            seen = trunk.facing(0, 125, 60)
            if seen is not None:
                (x, y), r = trunk.spot(125.5, seen), 7.2 * k * cos(radians(seen)) ** 0.7
                s.oval((x, y), r, 7.2 * k, ink(self.second))
                own = ink(self._shade("upper_colour"))
                s.polygon([(x - r * 0.62, y + 3.4 * k), (x, y - 5 * k), (x + r * 0.62, y + 3.4 * k)], own)
                s.line([(x - r * 0.5, y + 5 * k), (x + r * 0.5, y + 5 * k)], own, 1.2)

    def _neckline(self, trunk: Lathe, depth: Number, wide: Number, paint: str) -> None:
        """Draw the opening at the throat in the paint of what is under it."""

        def low(a: Number) -> Number:
            return 148.6 - depth * max(cos(radians(90 * a / wide)), 0.0) ** 0.8  # rounding may give a cosine below 0

        self._panel(trunk, (-wide, wide), low, 150.0, paint)

    def _throat(self) -> str:
        return ink(tone(self.person["skin"], -0.12))

    def _t_shirt(self, trunk: Lathe, hem: Number, rgb: Colour) -> None:
        self._neckline(trunk, 5.5, 80, self._throat())
        if self.front > 0.1:
            rim = [
                trunk.spot(148.6 - 5.5 * cos(radians(a)) ** 0.8 * self.front, a * 0.9)
                for a in (-85, -50, -20, 0, 20, 50, 85)
            ]
            self.sketch.line(rim, ink(tone(rgb, -0.3)), 1.5, 0.8)

    def _sweater(self, trunk: Lathe, hem: Number, rgb: Colour) -> None:
        self._t_shirt(trunk, hem, rgb)
        for up in (hem + 5, hem + 1):
            self.sketch.line(trunk.ring(up), ink(tone(rgb, -0.35)), 1.2, 0.7)

    def _dress(self, trunk: Lathe, hem: Number, rgb: Colour) -> None:
        self._neckline(trunk, 8, 60, self._throat())
        self.sketch.fill(trunk.band(107, 104.5), ink(tone(rgb, -0.45)), 0.8)

    def _shirt(self, trunk: Lathe, hem: Number, rgb: Colour) -> None:
        s, k = self.sketch, self.eye.scale
        self._neckline(trunk, 6.5, 26, self._throat())
        seen = trunk.facing(0, 120)
        if seen is not None:
            placket = trunk.edge(142, hem, seen)
            s.line(placket, ink(tone(rgb, -0.35)), 0.9, 0.7)
            s.line([(x + 2.4 * k, y) for x, y in placket], ink(tone(rgb, -0.35)), 0.9, 0.7)
            button = ink(tone(rgb, 0.5) if sum(rgb) < 380 else tone(rgb, -0.5))
            for up in range(138, int(hem) + 3, -9):
                x, y = trunk.spot(up, seen)
                s.oval((x + 1.2 * k, y), 0.9, 0.9, button)
        for side in (-1, 1):
            span = (4, 62) if side > 0 else (-62, -4)
            self._panel(
                trunk, span, lambda a: 141.5 + 6 * min(abs(abs(a) - 4) / 58, 1), 150.0, ink(tone(rgb, 0.08)), edge="low"
            )

    def _hoodie(self, trunk: Lathe, hem: Number, rgb: Colour) -> None:
        s = self.sketch
        pocket = s.across(tone(rgb, -0.1), trunk, 100)
        self._panel(trunk, (-46, 46), hem + 4.0, lambda a: hem + 20 - 7 * max(abs(a) - 26, 0) / 20, pocket, 0.8, "high")
        for angle in (-9, 9):
            seen = trunk.facing(angle, 138)
            if seen is not None:
                s.line(
                    [trunk.spot(144, seen), trunk.spot(137, seen), trunk.spot(130, seen * 1.1)], ink(self.second), 1.3
                )
        s.line(trunk.ring(hem + 3), ink(tone(rgb, -0.35)), 1.1, 0.7)
        rows = (
            (153.5, 7.6, 7.4, -2.4),
            (150, 10.4, 9.6, -3.4),
            (146, 11.6, 11.4, -4.4),
            (140, 9.4, 12.4, -3.4),
            (134, 4, 12.6, -2.6),
        )
        hood = Lathe(rows, self.eye)
        paint = s.across(tone(rgb, -0.03), hood, 146)
        self._panel(hood, (40, 320), lambda a: 146 - 12 * max(-cos(radians(a)), 0) ** 2, 153, paint, edge="low")
        self._seam(hood, 180, 152, 136)

    def _jacket(self, trunk: Lathe, hem: Number, rgb: Colour) -> None:
        self._opening(trunk, hem, 20)
        for span in ((-50, -22), (22, 50)):
            self._panel(trunk, span, hem + 11.0, hem + 12.2, "#000", 0.3)
        self._collar(trunk, rgb)
        self.sketch.line(trunk.ring(hem + 4.5), ink(tone(rgb, -0.4)), 1.2, 0.7)

    def _collar(self, trunk: Lathe, rgb: Colour) -> None:
        """Draw a stand-up collar, open at the throat."""
        paint = self.sketch.across(tone(rgb, -0.04), trunk, 147)
        self._panel(trunk, (7, 353), 145.2, lambda a: 151 + 1.4 * (cos(radians(a)) < 0), paint, edge="low")

    def _coat(self, trunk: Lathe, hem: Number, rgb: Colour) -> None:
        opened = self.person["worn"] == "open"
        self._opening(trunk, hem, 19)
        for span in ((-54, -24), (24, 54)):
            self._panel(trunk, span, 92.0, 94.5, "#000", 0.3)
        for up in () if opened else (128, 118, 108, 97):
            for angle in (7, -7):
                seen = trunk.facing(angle, up)
                if seen is not None:
                    self.sketch.oval(trunk.spot(up, seen), 1.1, 1.1, ink(tone(rgb, -0.6)))
        edge = 19 if opened else 3
        for span in ((-60, -edge), (edge, 60)):
            low = lambda a: 126 + 22 * min(max((abs(a) - edge) / (60 - edge), 0), 1) ** 0.8  # noqa: E731
            self._panel(trunk, span, low, 150.4, ink(tone(rgb, 0.07)), edge="low")
        self._seam(trunk, 180, 86, hem)

    def _down_jacket(self, trunk: Lathe, hem: Number, rgb: Colour) -> None:
        quilts = []
        for up in range(141, int(hem), -9):
            quilts.append([trunk.spot(up - 1.2 * (n % 2), a) for n, a in enumerate(range(-88, 89, 22))])
        for quilt in quilts:
            self.sketch.line(quilt, "#000", 1.5, 0.34)
        for quilt in quilts:
            self.sketch.line([(x, y + 1.9) for x, y in quilt], "#fff", 1.5, 0.2)
        self._opening(trunk, hem, 0)
        self._collar(trunk, rgb)

    def _opening(self, trunk: Lathe, hem: Number, wide: Number) -> None:
        """Draw the front: closed by a zip, or open over the inner garment."""
        s = self.sketch
        if self.person["worn"] != "open":
            self._neckline(trunk, 5, 24, ink(self._shade("inner_colour", -0.2)))
            seen = trunk.facing(0, 115)
            if seen is not None:
                s.line(trunk.edge(144, hem, seen), "#000", 1.5, 0.4)
                s.line([(x + 0.9, y) for x, y in trunk.edge(144, hem, seen)], "#fff", 0.6, 0.3)
            return
        low = max(hem, 82.0)
        inner = s.shaded(self._shade("inner_colour"), trunk.spot(125, -50), trunk.spot(125, 50), 0.7)
        s.names = ("inner",)
        self._panel(trunk, (-wide, wide), low, 150.0, inner)
        s.names = ()
        self._neckline(trunk, 5, wide, self._throat())
        if hem < 82:
            self._panel(trunk, (-wide, wide), hem, low + 0.5, ink(self._shade("lower_colour", -0.3)))
        s.names = ("upper",)
        for angle in (-wide, wide):
            self._seam(trunk, angle, 147, hem, 1.8, 0.42)

    # arms and carried things

    def _arm(self, i: int) -> None:
        """Draw the hand, the bare forearm or sleeve, and what the hand carries."""
        s, person, eye, k = self.sketch, self.person, self.eye, self.eye.scale
        shoulder, elbow, wrist, knuckles = self.arms[i]
        dim = -0.18 if self._arm_depth(i) < -4.5 else 0.0
        between = along([shoulder, elbow], 0.5), along([elbow, wrist], 0.45)
        chain = [eye.at(*p) for p in (shoulder, between[0], elbow, between[1], wrist)]
        x, y = chain[2]
        ends = (x - 6 * k, y - 2 * k), (x + 6 * k, y + 2 * k)
        s.names = (("right arm", "left arm")[i],)
        self._hand(wrist, knuckles, dim)
        if self.sleeve < 0.5:
            skin = s.shaded(tone(person["skin"], dim), *ends)
            s.fill(limb(chain[1:], [r * person["shoulders"] * k for r in (4.6, 4.1, 3.9, 2.7)]), skin)
        s.names = (*s.names, "upper")
        radii = [(r * person["shoulders"] + GARMENTS[person["upper"]][1] * 0.55) * k for r in (5.8, 5.3, 4.8, 4.5, 3.6)]
        if self.sleeve < 0.5:
            chain = [*chain[:2], eye.at(*along([shoulder, elbow], 0.72))]
            radii = [radii[0], radii[1] * 1.02, radii[1] * 1.08]
        s.fill(limb(chain, radii, (0.5, 0.1)), s.shaded(self._shade("upper_colour", dim), *ends))
        self._sleeve_pattern(chain, radii)
        if self.sleeve > 0.5:
            for dy in (-3, 0, 3):
                a, b = x + s.light * radii[2] * 0.8, x - s.light * radii[2] * 0.2
                s.line([(a, y + dy * k), (b, y + (dy + 1.6) * k)], "#000", 1.1, 0.22)
            self._cuff(chain, radii, 0.97, "#000", 1.1, 0.3)
            for t in (0.15, 0.35, 0.62, 0.85) if person["upper"] == "down jacket" else ():
                self._cuff(chain, radii, t, "#000", 1.3, 0.34)
        if i == person["hand"]:
            self._carry(*eye.at(*along([wrist, knuckles], 0.8)))

    def _cuff(self, chain: list[Point], radii: list[Number], t: Number, paint: str, width: Number, alpha: Number):
        """Draw a stroke across a limb at fraction t of its length."""
        (x, y), (ax, ay), (bx, by) = along(chain, t), along(chain, t - 0.02), along(chain, t + 0.02)
        size = hypot(bx - ax, by - ay) or 1.0
        r = along([(r,) for r in radii], t)[0] * 0.94
        nx, ny = (by - ay) / size * r, (ax - bx) / size * r
        self.sketch.line([(x + nx, y + ny), (x, y + abs(nx) * 0.18), (x - nx, y - ny)], paint, width, alpha)

    def _sleeve_pattern(self, chain: list[Point], radii: list[Number]) -> None:
        """Draw the garment's stripes, checks or dots on the sleeve."""
        kind, k, paint = self.person["pattern"], self.eye.scale, ink(tone(self.second, -0.08))
        count = 3 if len(chain) == 3 else 7
        for j in range(count if kind in ("striped", "checked", "dotted") else 0):
            t = (j + 0.6) / count
            if kind == "dotted":
                x, y = along(chain, t)
                self.sketch.oval((x + (2 if j % 2 else -2) * k, y), 1.6 * k, 1.8 * k, paint)
            else:
                width, alpha = (3.2, 0.95) if kind == "striped" else (1.9, 0.75)
                self._cuff(chain, radii, t, paint, width * k, alpha)
        if kind == "checked":
            self.sketch.line(chain, paint, 1.9 * k, 0.6)

    def _hand(self, wrist: Sequence, knuckles: Sequence, dim: Number) -> None:
        s, k = self.sketch, self.eye.scale
        a, (x, y) = self.eye.at(*wrist), self.eye.at(*knuckles)
        tip = (x + (x - a[0]) * 0.75, y + (y - a[1]) * 0.75 - 0.5)
        paint = ink(tone(self.person["skin"], dim - 0.1))
        s.fill(limb([a, (x, y), tip], [2.6 * k, 3.5 * k, 2.2 * k], (0.3, 0.8)), paint)
        s.line([along([a, (x, y)], 0.7), tip], "#000", 0.8, 0.16)

    def _carry(self, x: Number, y: Number) -> None:
        """Draw what the hand at this pixel carries."""
        person, s = self.person, self.sketch
        if person["bag"] == "handbag":
            s.names = ("bag",)
            self._handbag(x, y, self.eye.scale)
        if person["carried"] != "nothing":
            s.names = ("carried",)
            getattr(self, "_" + person["carried"].replace(" ", "_"))(x, y, self.eye.scale)

    def _wide(self, side: Number, front: Number) -> Number:
        """Half width in pixels of a box whose half widths from the side and from the front are given in cm."""
        return (side * abs(sin(self.eye.yaw)) + front * abs(self.front)) * self.eye.scale

    def _body(self, name: str, x: Number, w: Number, depth: Number = 1.0) -> str:
        """Shaded paint of a thing centred at x, in the colour of the part `name`."""
        return self.sketch.shaded(self._shade(name), (x - w, 0), (x + w, 0), depth)

    def _handbag(self, x: Number, y: Number, k: Number) -> None:
        s, w = self.sketch, self._wide(13, 8.5)
        top, low = y + 13 * k, y + 33 * k
        bow = ((-0.55, top + 1), (-0.35, y + 3), (0, y), (0.35, y + 3), (0.55, top + 1))
        s.line([(x + dx * w, up) for dx, up in bow], ink(self._shade("bag_colour", -0.4)), 2.0)
        s.block(x, [(top, w * 0.86), (low - 2, w), (low, w * 0.85)], self._body("bag_colour", x, w))
        s.line([(x - w * 0.9, top + 5 * k), (x, top + 6.5 * k), (x + w * 0.9, top + 5 * k)], "#000", 1.1, 0.35)
        s.oval((x, top + 7 * k), 1.4, 1.6, "#e8d9a0")

    def _shopping_bag(self, x: Number, y: Number, k: Number) -> None:
        s, w, dark = self.sketch, 10 * k, ink(self._shade("carried_colour", -0.3))
        s.line([(x - w * 0.5, y + 8 * k), (x - 1, y), (x + 1, y), (x + w * 0.5, y + 8 * k)], dark, 1.5)
        s.block(x, [(y + 8 * k, w * 0.8), (y + 37 * k, w)], self._body("carried_colour", x, w, 0.8))
        s.block(x, [(y + 17 * k, w * 0.4), (y + 25 * k, w * 0.4)], dark, 0.7)

    def _suitcase(self, x: Number, y: Number, k: Number) -> None:
        s, w, low = (
            self.sketch,
            self._wide(8, 17),
            self.eye.y - self.eye.scale * min(leg[2][1] for leg in self.legs) + 6 * k,
        )
        top = low - 48 * k
        for dx in (-0.35 * w, 0.35 * w):
            s.line([(x + dx, y), (x + dx, top)], "#8b8d92", 1.4)
        s.line([(x - 0.35 * w, y), (x + 0.35 * w, y)], "#2b2b2e", 2.4)
        for dx in (-0.7 * w, 0.7 * w):
            s.oval((x + dx, low + 1.2 * k), 2 * k, 2 * k, "#1c1c1e")
        s.block(x, [(top, w * 0.88), (top + 3, w), (low - 2, w), (low, w * 0.9)], self._body("carried_colour", x, w))
        for dx in (-0.5 * w, 0, 0.5 * w):
            s.line([(x + dx, top + 4), (x + dx, low - 4)], "#000", 1.1, 0.25)

    def _umbrella(self, x: Number, y: Number, k: Number) -> None:
        s, tip = self.sketch, (x + 5 * k, y + 56 * k)
        s.line([(x - 2 * k, y - 7 * k), (x, y - 10 * k), (x + 2 * k, y - 7 * k), (x, y)], "#5a3a20", 2.0)
        sides = [
            (x - 2.2 * k, y + 3 * k),
            (x + 2.2 * k, y + 3 * k),
            (x + 4.2 * k, y + 16 * k),
            tip,
            (x - 3 * k, y + 16 * k),
        ]
        s.polygon(sides, self._body("carried_colour", x, 4 * k))
        s.line([(x - 2.6 * k, y + 12 * k), (x + 3.2 * k, y + 13 * k)], "#000", 1.0, 0.4)

    def _open_umbrella(self, x: Number, y: Number, k: Number) -> None:
        s, top = self.sketch, self.eye.see(0, 203, 0)[1]
        cx, rim, r = x * 0.75 + self.eye.x * 0.25, top + 21 * k, 45 * k
        s.line([(x, y + 4 * k), (cx, top)], "#3a3a3d", 1.8)
        dome = [(cx + r * t, rim - 21 * k * (1 - t * t) ** 0.6) for t in (-1, -0.9, -0.7, -0.4, 0, 0.4, 0.7, 0.9, 1)]
        scallops = [
            [(cx + r * (b + 0.5), rim), (cx + r * (b + 0.25), rim - 2.6 * k), (cx + r * b, rim)]
            for b in (0.5, 0, -0.5, -1)
        ]
        s.fill([dome, *scallops], self._body("carried_colour", cx, r))
        for t in (-0.5, 0, 0.5):
            s.line([(cx, top), (cx + r * t * 0.8, rim - 14 * k), (cx + r * t, rim)], "#000", 0.9, 0.3)

    def _phone(self, x: Number, y: Number, k: Number) -> None:
        self.sketch.block(x, [(y - 5.6 * k, 2.5 * k), (y + 3.4 * k, 2.5 * k)], "#17181b")
        self.sketch.block(x, [(y - 4.6 * k, 1.7 * k), (y + 1.7 * k, 1.7 * k)], "#9fc4e6")

    def _bottle(self, x: Number, y: Number, k: Number) -> None:
        spans = [(y - 10 * k, 1.2 * k), (y - 6 * k, 2.9 * k), (y + 7 * k, 2.9 * k)]
        self.sketch.block(x, spans, self._body("carried_colour", x, 3 * k))
        self.sketch.block(x, [(y - 12.5 * k, 1.4 * k), (y - 9.6 * k, 1.4 * k)], "#f2f2f0")

    def _cup(self, x: Number, y: Number, k: Number) -> None:
        s = self.sketch
        s.block(
            x,
            [(y - 7 * k, 3.4 * k), (y + 4 * k, 2.4 * k)],
            s.shaded((236, 232, 224), (x - 3.4 * k, y), (x + 3.4 * k, y)),
        )
        s.block(x, [(y - 3.5 * k, 2.9 * k), (y + 1 * k, 2.6 * k)], "#9a6a3c")
        s.block(x, [(y - 9 * k, 3.7 * k), (y - 6.6 * k, 3.7 * k)], "#3b2a20")

    def _book(self, x: Number, y: Number, k: Number) -> None:
        s, w = self.sketch, self._wide(4, 10.5)
        s.block(x, [(y - 11 * k, w), (y + 9 * k, w)], self._body("carried_colour", x, w, 0.6))
        s.line([(x - w + 1, y + 8 * k), (x + w - 1, y + 8 * k)], "#f4f0e4", 1.5)
        s.line([(x - w * 0.5, y - 5 * k), (x + w * 0.5, y - 5 * k)], "#fff", 1.2, 0.6)

    # bags

    def _pack(self) -> None:
        """Draw the backpack's body."""
        if self.person["bag"] != "backpack":
            return
        s, rgb, back = self.sketch, self._shade("bag_colour"), -(self.trunk.section(125)[1] + 5.5)
        rows = (
            (146, 7, 3, 3),
            (143.5, 11.5, 5.5, 1.5),
            (136, 14, 7.5, 0),
            (118, 15, 9, 0),
            (106, 14.6, 8.6, 0.5),
            (101, 11, 6, 1.5),
        )
        pack = Lathe([(up, w, d, back + z) for up, w, d, z in rows], self.eye)
        s.names = () if self.front > 0.9 else ("bag",)  # the trunk hides all but the straps
        s.fill(pack.outline(146, 101), s.across(rgb, pack, 120))
        self._panel(pack, (120, 240), 103.5, 120.5, s.across(tone(rgb, -0.08), pack, 112), edge="high")
        s.line(pack.ring(133, (-80, -40, 0, 40, 80)), "#000", 1.1, 0.36)
        s.line(pack.ring(132, (-70, -40, 0, 40, 70)), "#fff", 0.8, 0.25)
        s.line([pack.spot(145, -25), pack.spot(149, 0), pack.spot(145, 25)], ink(tone(rgb, -0.4)), 1.8)

    def _straps(self) -> None:
        """Draw the straps of a bag on the trunk, then a shoulder bag on the near side."""
        s, k, kind = self.sketch, self.eye.scale, self.person["bag"]
        s.names = ("bag",)
        if kind == "backpack":
            path = ((149.5, 62), (145, 40), (136, 36), (126, 46), (118, 66), (114, 92))
            paths = [[(up, sign * angle) for up, angle in path] for sign in (-1, 1)]
        elif kind == "shoulder bag":  # from the far shoulder across chest and back to the hip
            path = ((148, -70, -110), (143, -44, -136), (132, -14, -166), (120, 22, 158), (108, 58, 122), (98, 84, 96))
            paths = [[(row[0], self._bag_side() * row[i]) for row in path] for i in (1, 2)]
        else:
            return
        for path in paths:
            seen = [(up, a) for up, angle in path if (a := self.trunk.facing(angle, up)) is not None]
            if len(seen) > 2:
                points = [self.trunk.spot(up, a) for up, a in seen]
                width = 4.6 if kind == "backpack" else 3.2
                s.line(points, ink(self._shade("bag_colour", -0.4)), width * k, boxed=True)
                s.line(
                    [(x + s.light * 0.7, y) for x, y in points], ink(self._shade("bag_colour", 0.05)), width * 0.6 * k
                )
        if self._bag_depth() >= 0:
            self._shoulder_bag()

    def _bag_side(self) -> int:
        """The side of the hip with the shoulder bag: 1 left, -1 right."""
        return 1 - 2 * self.person["hand"]

    def _bag_depth(self) -> Number:
        return self.eye.near(self._bag_side() * 17, 1)

    def _shoulder_bag(self) -> None:
        if self.person["bag"] != "shoulder bag":
            return
        s, k, w = self.sketch, self.eye.scale, self._wide(14.5, 7)
        s.names = ("bag",)
        x, y = self.eye.at(self._bag_side() * (self.trunk.section(92)[0] + 1.5), 94, 1.5)
        top, low = y - 4 * k, y + 20 * k
        s.block(x, [(top, w * 0.9), (low - 3, w), (low, w * 0.86)], self._body("bag_colour", x, w))
        flap = [(x - w * 0.9, top + 9 * k), (x, top + 12 * k), (x + w * 0.9, top + 9 * k)]
        s.fill([[(x + w * 0.92, top)], [(x - w * 0.92, top)], flap], ink(self._shade("bag_colour", -0.12)))
        s.line(flap, "#000", 1.1, 0.45)
        s.oval((x, top + 11.5 * k), 1.3, 1.3, "#ddd0a0")

    # the head

    def _head(self) -> None:
        """Draw neck, skull, face, ears, hair and hat."""
        s, person, skull, skin, k = self.sketch, self.person, self.skull, self.person["skin"], self.eye.scale
        tail = person["hair"] == "ponytail"
        s.names = ("head",)
        neck = [self.eye.at(0, 145.5, -1.6), self.eye.at(0, 149, -0.8), self.gaze.at(0, 154, 0.2)]
        radii = [w * k * (1.06 if person["gender"] == "man" else 0.88) for w in (6.4, 5.6, 5.6)]
        covered = person["upper"] in ("jacket", "down jacket", "hoodie")
        x, y = neck[1]
        paint = s.shaded(tone(skin, -0.18), (x - 6 * k, y), (x + 6 * k, y))
        s.fill(limb(neck[covered:], radii[covered:], (0.4, 0)), paint)
        if tail and self.gaze.near(0, -1) < -0.25:
            self._tail()
        s.names = ("head",)
        s.fill(skull.outline(CHIN + 23, CHIN), s.across(skin, skull, CHIN + 10, 0.75))
        self._face(skin)
        s.names = ("head",)
        for angle in (-97, 97) if person["hair"] not in ("long", "bob") else ():
            seen = skull.facing(angle, CHIN + 10.5)
            if seen is not None:
                x, y = skull.spot(CHIN + 10.5, seen)
                s.oval((x, y), 1.7 * k * max(cos(radians(seen)), 0.6), 2.7 * k, ink(tone(skin, -0.12)))
                s.line([(x, y - 1.4 * k), (x + 0.5, y + 1.2 * k)], "#000", 0.8, 0.25)
        if person["hair"] != "bald":
            self._hair()
        if tail and self.gaze.near(0, -1) >= -0.25:
            self._tail()
        if person["hair"] == "bun" and self.gaze.near(0, -1) > -0.8:
            x, y = self.gaze.at(0, CHIN + 20.5, -9.5)
            s.oval((x, y), 4.6 * k, 4.4 * k, self._body("hair_colour", x, 4.6 * k))
            s.line([(x - 2.4 * k, y + 1.5 * k), (x, y - 1 * k), (x + 2.6 * k, y + 1 * k)], "#000", 0.9, 0.3)
        if person["hat"] != "none":
            self._hat()

    def _face(self, skin: Colour) -> None:
        """Draw eyes, brows, nose and mouth on the visible part of the skull, then the glasses."""
        s, skull, gaze, k = self.sketch, self.skull, self.gaze, self.eye.scale
        s.names = ("face", "head")
        if abs(sin(gaze.yaw)) > 0.55 and cos(gaze.yaw) > -0.45:  # in profile the nose extends the outline
            profile = [gaze.at(0, CHIN + up, z) for up, z in ((12.2, 8.6), (8.2, 10.6), (6.6, 8.8))]
            s.fill([profile, [gaze.at(0, CHIN + 9, 6.5)]], ink(tone(skin, -0.06)))
        brow = ink(self._shade("hair_colour", -0.25))
        for angle in (-25, 25):
            seen = skull.facing(angle, CHIN + 11.6, 80)
            if seen is not None:
                (x, y), narrow = skull.spot(CHIN + 11.2, seen), k * max(cos(radians(seen)), 0.35)
                s.oval((x, y), 1.2 * narrow, 0.62 * k, "#e9e2da", 0.75)
                s.oval((x, y), 0.72 * narrow, 0.7 * k, "#2a1d18")
                s.line([(x + dx * narrow, y - up * k) for dx, up in ((-2, 1.7), (0, 2.3), (2, 1.7))], brow, 1.0, 0.75)
        seen = skull.facing(0, CHIN + 8, 62)
        if seen is not None:
            x, y = skull.spot(CHIN + 7.4, seen)
            bridge = [(x - s.light * 0.9 * k, y - 3.4 * k), (x - s.light * 1.3 * k, y - 0.3 * k), (x + 0.8 * k, y)]
            s.line(bridge, ink(tone(skin, -0.42)), 1.0, 0.6)
        seen = skull.facing(0, CHIN + 4, 75)
        if seen is not None:
            (x, y), w = skull.spot(CHIN + 3.9, seen), 2.3 * k * cos(radians(seen))
            lip = tone(skin, -0.42) if self.person["gender"] == "man" else tone((176, 66, 70), -0.2)
            s.line([(x - w, y - 0.2), (x, y + 0.5), (x + w, y - 0.2)], ink(lip), 1.3, 0.75)
        if self.person["glasses"] == "yes":
            self._glasses()

    def _glasses(self) -> None:
        s, skull, k = self.sketch, self.skull, self.eye.scale
        s.names = ("glasses", "face", "head")
        for angle in (-27, 27):
            seen = skull.facing(angle, CHIN + 11.4)
            if seen is not None:
                (x, y), narrow = skull.spot(CHIN + 11.2, seen), k * max(cos(radians(seen)), 0.3)
                s.oval((x, y), 2.9 * narrow, 2.2 * k, "#14161a", 0.88)
                s.line([(x - 1.3 * narrow, y - 1.0 * k), (x + 0.6 * narrow, y - 1.2 * k)], "#fff", 0.8, 0.5)
        bar = [a for angle in (-92, -40, 0, 40, 92) if (a := skull.facing(angle, CHIN + 12)) is not None]
        if len(bar) > 1 and self.gaze.near(0, 1) > -0.3:
            s.line(skull.ring(CHIN + 12, bar), "#14161a", 1.1)

    def _hairline(self) -> Callable[[Number], Number]:
        """Height of the hair's lower edge at an angle from the nose."""
        style = self.person["hair"]
        knots = HAIRLINES["tied" if style in ("ponytail", "bun") else style]

        def height(angle: Number) -> Number:
            for (a0, h0), (a1, h1) in pairwise(knots):
                if abs(angle) <= a1:
                    t = (abs(angle) - a0) / (a1 - a0)
                    return CHIN + h0 + t * t * (3 - 2 * t) * (h1 - h0)
            return CHIN + knots[-1][1]

        return height

    def _mane(self) -> Lathe:
        """The solid of the hair: the skull widened by the hair's thickness, and the hair that hangs down."""
        thick = THICK[self.person["hair"]]
        rows = [(up + thick, w + thick, d + thick, z - 0.25) for up, w, d, z in self.skull.rows if up > CHIN + 8]
        fall = ((4, rows[-1][1] - 1.0, rows[-1][2] - 0.6, -0.5), (0, 5.6, 6.6, -1))
        if self.person["hair"] in ("long", "bob"):
            fall = ((4, 8.6, 9.0, -0.9), (-3, 9.2, 9.0, -1.5), (-12, 9.4, 8.6, -2.6), (-21, 8.0, 8.0, -4.0))
        return Lathe([*rows, *((CHIN + up, w, d, z) for up, w, d, z in fall)], self.gaze)

    def _hair(self) -> None:
        """Draw the hair on the visible side of the head, above the hairline."""
        s, mane, line = self.sketch, self._mane(), self._hairline()
        s.names = ("hair", "head")
        top, turn = mane.rows[0][0], mane.turn(CHIN + 13)
        low = {a: line((a - turn + 180) % 360 - 180) for a in (*range(-90, 91, 12), -62, -34, -8, 20, 48, 90)}
        lower = [mane.spot(low[a], a) for a in range(-90, 91, 12)]
        paint = s.across(self._shade("hair_colour"), mane, CHIN + 14, 0.9)
        s.fill([lower, mane.edge(top, low[90], 90)[::-1], mane.edge(top, low[-90], -90)], paint)
        for a in (-62, -34, -8, 20, 48):
            middle = mane.spot((top + low[a]) / 2 + 2, a * 0.9)
            strand = [mane.spot(top - 1.5, a * 0.4), middle, mane.spot(low[a] + 0.8, a)]
            s.line(strand, *(("#fff", 1.2, 0.12) if a * s.light > 0 else ("#000", 1.1, 0.25)))

    def _back_hair(self) -> None:
        """Draw the hair behind the neck, as seen from the front."""
        mane, low = self._mane(), CHIN - (9 if self.person["hair"] == "long" else 2)
        self.sketch.names = ("hair", "head")
        paint = self.sketch.across(self._shade("hair_colour", -0.3), mane, CHIN)
        self.sketch.fill(mane.outline(CHIN + 12, low), paint)

    def _tail(self) -> None:
        s, k, sway = self.sketch, self.eye.scale, float(self.rng.uniform(-2.5, 2.5))
        s.names = ("hair", "head")
        joints = ((0, 16.5, -9), (0, 14.5, -13), (sway * 0.4, 6, -14.5), (sway, -4, -13.5), (sway, -12, -12.5))
        chain = [self.gaze.at(x, CHIN + up, z) for x, up, z in joints]
        s.fill(
            limb(chain, [r * k for r in (2.0, 3.2, 3.9, 3.3, 0.9)], (0.3, 0.6)),
            self._body("hair_colour", chain[2][0], 4 * k),
        )
        s.line(chain[1:4], "#000", 1.0, 0.25)
        s.oval(chain[0], 1.8 * k, 1.8 * k, ink(self._shade("hair_colour")))

    def _hat(self) -> None:
        """Draw a cap with a peak, a beanie with a cuff, or a hat with a brim."""
        s, kind, rgb = self.sketch, self.person["hat"], self._shade("hat_colour")
        s.names = ("hat", "head")
        grow, low, rise = {"cap": (1.3, 15.6, 1.2), "beanie": (1.7, 14.6, 2.6), "brimmed hat": (1.4, 16.2, 2.2)}[kind]
        low += CHIN
        rows = [(up, w + grow, d + grow, z) for up, w, d, z in self.skull.rows if up > CHIN + 12]
        dome = Lathe([(up + rise * max(up - CHIN - 14, 0) / 9, *rest) for up, *rest in rows], self.gaze)
        brim = self._brim(kind, low)
        facing = self.gaze.near(0, 1) > -0.15
        if kind == "brimmed hat" or (kind == "cap" and not facing):
            s.fill([hull(brim)], s.across(tone(rgb, -0.18), dome, low))
        s.fill(dome.outline(dome.rows[0][0], low), s.across(rgb, dome, low))
        if kind == "cap":
            s.line([dome.spot(dome.rows[0][0] - 1, 0), dome.spot(low + 4, 20), dome.spot(low, 24)], "#000", 0.9, 0.25)
            if facing:
                s.fill([hull(brim)], s.across(tone(rgb, -0.2), dome, low))
        elif kind == "beanie":
            s.fill(dome.band(low + 4.5, low - 0.4), s.across(tone(rgb, -0.14), dome, low))
            for a in (-60, -36, -12, 12, 36, 60):
                s.line([dome.spot(low + 4.3, a), dome.spot(low - 0.2, a)], "#000", 0.8, 0.25)
        else:
            s.fill(dome.band(low + 3.2, low + 0.4), ink(tone(rgb, -0.55)))
            near = [(p, r) for p, r in brim if p[1] >= self.gaze.at(0, low + 0.4, 0)[1]]
            s.fill([hull([*near, *((p, 0.5) for p in dome.ring(low + 0.6))])], s.across(tone(rgb, -0.05), dome, low))

    def _brim(self, kind: str, low: Number) -> list[tuple[Point, Number]]:
        """Discs along the rim of a brim or a peak."""
        k, found = self.eye.scale, []
        for a in (radians(a) for a in (range(0, 360, 30) if kind == "brimmed hat" else range(-80, 81, 20))):
            if kind == "brimmed hat":
                found.append((self.gaze.at(14.2 * sin(a), low + 0.6, 15.6 * cos(a)), 0.9 * k))
            else:
                found.append((self.gaze.at(8.4 * sin(a), low + 1.0, 17.6 * cos(a)), 0.9 * k))
                found.append((self.gaze.at(7.6 * sin(a), low - 1.0, 16.0 * cos(a)), 0.9 * k))
        return found
