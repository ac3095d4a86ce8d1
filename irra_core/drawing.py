"""A person's attributes, a view and a seed → a photo of 384×128 pixels and the pixel box of everything on it."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import atan2, cos, degrees, hypot, radians, sin

import numpy as np
import resvg_py
from PIL import Image, ImageFilter

HEIGHT, WIDTH = 384, 128
Number = int | float
Point = tuple[Number, Number]
Rows = list[tuple[Number, Number, Number, Number]]

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

TORSO: Rows = [  # height, half width, half depth, centre forward, in cm for a stature of 172
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
]
HEAD: Rows = [  # height above the chin
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
]
CHIN = 149.5
HAIRLINES = {  # (angle from the nose in degrees, height above the chin)
    "short": [(0, 18.4), (38, 17.8), (60, 14.5), (72, 9.5), (95, 8.0), (120, 4.0), (180, 2.0)],
    "bob": [(0, 17.6), (36, 16.6), (52, 11.0), (60, 1.0), (70, -2.0), (180, -3.0)],
    "long": [(0, 18.2), (32, 17.0), (50, 9.0), (58, -8.0), (72, -13.0), (110, -17.0), (180, -20.0)],
    "tied": [(0, 18.6), (40, 18.0), (62, 14.0), (80, 10.0), (110, 6.5), (180, 3.0)],
}


@dataclass(frozen=True)
class Eye:
    """The camera's geometry: yaw of the body, how far it looks down, pixels per cm, where the ground point lies."""

    yaw: Number
    pitch: Number
    scale: Number
    x: Number
    y: Number
    roll: Number = 0.0

    def see(self, right: Number, up: Number, near: Number) -> Point:
        """Pixel of a point given in the camera's own axes, in cm."""
        across, above = self.scale * right, self.scale * (up - self.pitch * near)
        return self.x + across * cos(self.roll) + above * sin(self.roll), (
            self.y - above * cos(self.roll) + across * sin(self.roll)
        )

    def at(self, side: Number, up: Number, ahead: Number) -> Point:
        """Pixel of a point given in the body's axes: to its left, up, forward, in cm."""
        right = side * cos(self.yaw) + ahead * sin(self.yaw)
        return self.see(right, up, self.near(side, ahead))

    def near(self, side: Number, ahead: Number) -> Number:
        """How far the point comes towards the camera, in cm."""
        return ahead * cos(self.yaw) - side * sin(self.yaw)


@dataclass(frozen=True)
class Lathe:
    """A solid of elliptic sections about the body's vertical: trunk, skirt, head, hair and hat."""

    rows: Rows
    eye: Eye

    def section(self, up: Number) -> tuple[Number, Number, Number]:
        """Half width, half depth and forward centre at a height."""
        rows = self.rows
        if up >= rows[0][0]:
            return rows[0][1:]
        for above, below in pairwise(rows):
            if up >= below[0]:
                t = (above[0] - up) / (above[0] - below[0])
                return tuple(a + t * (b - a) for a, b in zip(above[1:], below[1:], strict=True))
        return rows[-1][1:]

    def turn(self, up: Number) -> Number:
        """Degrees to add to an angle on the body (0 ahead, 90 its left) for the angle seen (0 facing the camera)."""
        width, depth, _ = self.section(up)
        return degrees(atan2(depth * sin(self.eye.yaw), width * cos(self.eye.yaw)))

    def spot(self, up: Number, seen: Number) -> Point:
        """Pixel of the surface at a height, at an angle as seen: -90 the left outline, 90 the right."""
        width, depth, centre = self.section(up)
        c, s = cos(self.eye.yaw), sin(self.eye.yaw)
        right = hypot(width * c, depth * s) * sin(radians(seen)) + centre * s
        near = hypot(width * s, depth * c) * cos(radians(seen)) + centre * c
        return self.eye.see(right, up, near)

    def facing(self, angle: Number, up: Number) -> Number | None:
        """The angle as seen of an angle on the body, or None on the far side."""
        seen = (angle + self.turn(up) + 180) % 360 - 180
        return seen if abs(seen) < 88 else None

    def edge(self, top: Number, bottom: Number, seen: Number) -> list[Point]:
        """Points down one outline."""
        ups = [top, *(row[0] for row in self.rows if bottom < row[0] < top), bottom]
        return [self.spot(up, seen) for up in ups]

    def outline(self, top: Number, bottom: Number) -> list[list[Point]]:
        """Runs of a closed outline: down the left, along the hem, up the right."""
        hem = [self.spot(bottom, seen) for seen in range(-90, 91, 30)]
        return [self.edge(top, bottom, -90), hem, self.edge(top, bottom, 90)[::-1]]

    def patches(self, first: Number, last: Number, low: Callable, high: Callable, step: Number = 20) -> list[list]:
        """Runs of the visible parts of the surface between two angles on the body and two heights (of the angle)."""
        turn, found = self.turn((low(0) + high(0)) / 2), []
        for lap in (-360, 0, 360):
            start, end = max(first + turn + lap, -90), min(last + turn + lap, 90)
            if end - start < 2:
                continue
            count = max(2, int((end - start) / step) + 2)
            seen = [start + (end - start) * i / (count - 1) for i in range(count)]
            angles = [((s - turn + 180) % 360) - 180 for s in seen]
            lower = [self.spot(low(a), s) for a, s in zip(angles, seen, strict=True)]
            upper = [self.spot(high(a), s) for a, s in zip(angles, seen, strict=True)]
            right = self.edge(high(angles[-1]), low(angles[-1]), seen[-1])[::-1]
            left = self.edge(high(angles[0]), low(angles[0]), seen[0])
            found.append([lower, right, upper[::-1], left])
        return found


def curve(runs: Iterable[Sequence[Point]], closed: bool = True) -> str:
    """SVG path through runs of points: smooth inside a run, a corner where two meet."""
    words = []
    for run in runs:
        words.append(f"{'L' if words else 'M'}{run[0][0]:.1f} {run[0][1]:.1f}")
        for i in range(len(run) - 1):
            (ax, ay), (bx, by), (cx, cy), (dx, dy) = (
                run[max(i - 1, 0)],
                run[i],
                run[i + 1],
                run[min(i + 2, len(run) - 1)],
            )
            words.append(
                f"C{bx + (cx - ax) / 6:.1f} {by + (cy - ay) / 6:.1f} {cx - (dx - bx) / 6:.1f} {cy - (dy - by) / 6:.1f} "
                f"{cx:.1f} {cy:.1f}"
            )
    return "".join(words) + ("z" if closed else "")


def tone(rgb: Sequence[Number], by: Number) -> tuple[int, ...]:
    """A colour darkened (by < 0) towards a cool black, or lightened towards white."""
    if by < 0:
        return tuple(int(c * (1 + by * k)) for c, k in zip(rgb, (1.0, 0.98, 0.9), strict=True))
    return tuple(int(c + (255 - c) * by) for c in rgb)


def ink(rgb: Sequence[Number]) -> str:
    """SVG colour."""
    return "#" + "".join(f"{min(max(int(c), 0), 255):02x}" for c in rgb)


@dataclass
class Sketch:
    """An SVG in the making: shapes, gradients, and the pixel box of each named thing."""

    light: Number  # -1: the light comes from the left, 1: from the right
    shapes: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    boxes: dict[str, list[Number]] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def round(self, rgb: Sequence[Number], a: Point, b: Point, depth: Number = 1.0) -> str:
        """Fill of a rounded thing that reaches from pixel a (its left) to pixel b: lit on the light's side."""
        tones = [(0.0, -0.2), (0.22, 0.1), (0.42, 0.03), (0.72, -0.2), (1.0, -0.52)]
        if self.light > 0:
            tones = [(1 - at, by) for at, by in reversed(tones)]
        stops = "".join(f'<stop offset="{at:.2f}" stop-color="{ink(tone(rgb, by * depth))}"/>' for at, by in tones)
        self.gradients.append(
            f'<linearGradient id="g{len(self.gradients)}" gradientUnits="userSpaceOnUse" x1="{a[0]:.1f}" '
            f'y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}">{stops}</linearGradient>'
        )
        return f"url(#g{len(self.gradients) - 1})"

    def fill(self, runs: Sequence[Sequence[Point]], paint: str, alpha: Number = 1.0, boxed: bool = True) -> None:
        """Add a filled shape."""
        self._box(runs, boxed)
        opacity = "" if alpha == 1 else f' fill-opacity="{alpha:.2f}"'
        self.shapes.append(f'<path fill="{paint}"{opacity} d="{curve(runs)}"/>')

    def line(
        self, points: Sequence[Point], paint: str, width: Number, alpha: Number = 1.0, boxed: bool = False
    ) -> None:
        """Add a smooth stroke."""
        self._box([points], boxed)
        self.shapes.append(
            f'<path fill="none" stroke="{paint}" stroke-width="{width:.1f}" stroke-opacity="{alpha:.2f}" '
            f'stroke-linecap="round" stroke-linejoin="round" d="{curve([points], closed=False)}"/>'
        )

    def oval(self, centre: Point, rx: Number, ry: Number, paint: str, alpha: Number = 1.0) -> None:
        """Add an ellipse."""
        self._box([[(centre[0] - rx, centre[1] - ry), (centre[0] + rx, centre[1] + ry)]], True)
        opacity = "" if alpha == 1 else f' fill-opacity="{alpha:.2f}"'
        self.shapes.append(
            f'<ellipse cx="{centre[0]:.1f}" cy="{centre[1]:.1f}" rx="{rx:.1f}" ry="{ry:.1f}" fill="{paint}"{opacity}/>'
        )

    def _box(self, runs: Sequence[Sequence[Point]], boxed: bool) -> None:
        if not (boxed and self.names):
            return
        xs, ys = [p[0] for run in runs for p in run], [p[1] for run in runs for p in run]
        new = [min(xs), min(ys), max(xs), max(ys)]
        for name in self.names:
            old = self.boxes.get(name, new)
            self.boxes[name] = [*map(min, old[:2], new[:2]), *map(max, old[2:], new[2:])]

    def svg(self, scale: Number = 1.0) -> str:
        """The drawing as SVG text, at a scale of the photo's size."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * scale:.0f}" height="{HEIGHT * scale:.0f}"'
        return (
            f'{head} viewBox="0 0 {WIDTH} {HEIGHT}"><defs>{"".join(self.gradients)}</defs>{"".join(self.shapes)}</svg>'
        )


@dataclass
class Pose:
    """Joints in the body's axes (its left, up, forward), in cm; index 0 is the right limb, 1 the left."""

    arms: list[list[tuple[Number, Number, Number]]]
    legs: list[list[tuple[Number, Number, Number]]]
    raised: int | None  # the arm that holds something before the body
    lean: Number


def pose_of(person: dict, rng: np.random.Generator) -> Pose:
    """A step of a walk, or standing; the arm that carries something is held for it."""
    shoulder, hip = 17.4 * person["shoulders"], 8.6 * person["hips"]
    stride = rng.uniform(0, 7) if rng.random() < 0.3 else rng.uniform(12, 27)
    lead = 1 if rng.random() < 0.5 else -1
    legs, arms = [], []
    for side in (-1, 1):
        swing = stride * side * lead
        bend = 4 + (rng.uniform(0.5, 1.1) * stride if swing < 0 else rng.uniform(0, 6))
        thigh, shin = radians(swing + 3), radians(swing + 3 - bend)
        spread = radians(rng.uniform(1, 4)) * side
        knee = (side * hip + 42 * sin(spread), 90 - 42 * cos(thigh), 42 * sin(thigh))
        legs.append([(side * hip, 90.0, 0.0), knee, (knee[0], knee[1] - 40 * cos(shin), knee[2] + 40 * sin(shin))])
        upper, fore = radians(-swing * 0.9), radians(-swing * 0.9 + rng.uniform(8, 26))
        arms.append(_arm(side * shoulder, upper, fore, radians(rng.uniform(5, 11)) * side))
    raised = None
    carried = person["carried"]
    holder = person["hand"]
    if carried in ("phone", "book", "cup", "bottle", "open umbrella"):
        raised = holder
        side = 2 * holder - 1
        fore = {"phone": 128, "book": 98, "cup": 112, "bottle": 88, "open umbrella": 130}[carried]
        arms[holder] = _arm(side * shoulder, radians(12), radians(fore), radians(9) * side, inward=-0.35 * side)
    elif carried in ("shopping bag", "suitcase", "umbrella") or person["bag"] == "handbag":
        side = 2 * holder - 1
        back = -14 if carried == "suitcase" else rng.uniform(-6, 8)
        arms[holder] = _arm(side * shoulder, radians(back), radians(back + 6), radians(9) * side)
    return Pose(arms, legs, raised, 0.0)


def _arm(shoulder: Number, upper: Number, fore: Number, spread: Number, inward: Number = 0.0) -> list[tuple]:
    """Shoulder, elbow, wrist and knuckles; angles forward from hanging, spread away from the body."""
    joints = [(shoulder, 139.0, 0.0)]
    for length, angle, out in (
        (29, upper, spread),
        (25, fore, spread * 0.3 + inward),
        (9, fore, spread * 0.2 + inward),
    ):
        x, y, z = joints[-1]
        joints.append((x + length * sin(out), y - length * cos(angle) * cos(out), z + length * sin(angle) * cos(out)))
    return joints


def limb(
    points: Sequence[Point], radii: Sequence[Number], ends: tuple[Number, Number] = (0.0, 0.0)
) -> list[list[Point]]:
    """Runs of the outline of a chain of joints in pixels with a radius at each; ends bulge by a share of the radius."""
    normals = []
    for i in range(len(points)):
        a, b = points[max(i - 1, 0)], points[min(i + 1, len(points) - 1)]
        dx, dy = b[0] - a[0], b[1] - a[1]
        size = hypot(dx, dy) or 1.0
        normals.append((dy / size, -dx / size))
    left = [(x + n[0] * r, y + n[1] * r) for (x, y), n, r in zip(points, normals, radii, strict=True)]
    right = [(x - n[0] * r, y - n[1] * r) for (x, y), n, r in zip(points, normals, radii, strict=True)]
    caps = []
    for i, sign, share in ((-1, 1, ends[1]), (0, -1, ends[0])):
        (x, y), (nx, ny), r = points[i], normals[i], radii[i]
        caps.append((x - sign * ny * r * share, y + sign * nx * r * share))
    return [left, [left[-1], caps[0], right[-1]], right[::-1], [right[0], caps[1], left[0]]]


def along(points: Sequence, t: Number):
    """The point at a share of a chain's length, each piece counting alike."""
    at = min(max(t, 0.0), 1.0) * (len(points) - 1)
    i = min(int(at), len(points) - 2)
    return tuple(a + (at - i) * (b - a) for a, b in zip(points[i], points[i + 1], strict=True))


def hull(discs: Iterable[tuple[Point, Number]]) -> list[Point]:
    """Convex outline of discs: Andrew's monotone chain over points on their rims."""
    rim = sorted((x + r * cos(a), y + r * sin(a)) for (x, y), r in discs for a in (i * 0.6283 for i in range(10)))
    chains = []
    for points in (rim, rim[::-1]):
        chain: list[Point] = []
        for p in points:
            while len(chain) > 1 and (
                (chain[-1][0] - chain[-2][0]) * (p[1] - chain[-2][1])
                <= (chain[-1][1] - chain[-2][1]) * (p[0] - chain[-2][0])
            ):
                chain.pop()
            chain.append(p)
        chains.append(chain[:-1])
    return chains[0] + chains[1]


GARMENTS = {  # upper garment: (hem height in cm, ease in cm, sleeve as a share of the arm)
    "t-shirt": (86, 0.6, 0.30),
    "shirt": (84, 0.8, 0.93),
    "sweater": (86, 1.2, 0.93),
    "hoodie": (85, 1.8, 0.94),
    "jacket": (84, 1.9, 0.95),
    "open jacket": (84, 1.9, 0.95),
    "coat": (54, 2.4, 0.95),
    "open coat": (54, 2.4, 0.95),
    "down jacket": (82, 3.2, 0.95),
    "dress": (52, 0.3, 0.28),
}
LONG = ("coat", "open coat", "dress")  # they fall over the hips and legs
OUTER = ("jacket", "open jacket", "coat", "open coat", "down jacket")


@dataclass
class Figure:
    """One person before one camera: draws itself on a sketch, far things first."""

    sketch: Sketch
    person: dict
    eye: Eye
    rng: np.random.Generator

    def draw(self) -> None:
        """Everything from the shadow on the ground to the hat."""
        person, yaw = self.person, self.eye.yaw
        self.front = cos(yaw)
        self.pose = pose_of(person, self.rng)
        sunk = min(leg[2][1] for leg in self.pose.legs) - 8.4
        self.eye = Eye(
            yaw, self.eye.pitch, self.eye.scale, self.eye.x, self.eye.y + self.eye.scale * sunk, self.eye.roll
        )
        turn = float(self.rng.uniform(-0.4, 0.4))
        self.gaze = Eye(yaw + turn * 0.8, self.eye.pitch, self.eye.scale, *self.eye.see(0, 0, 0), self.eye.roll)
        self.trunk = Lathe(self._rows(TORSO, GARMENTS[person["upper"]][1]), self.eye)
        self.second = (36, 44, 84) if person["upper_colour"] in PALE else (240, 240, 236)
        self._shadow()
        arms = sorted((0, 1), key=lambda i: self.eye.near(*[self.pose.arms[i][1][k] for k in (0, 2)]))
        behind = [i for i in arms if self._arm_depth(i) < -4.5]
        if self.front > 0:
            self._pack()
        if self.person["bag"] in ("shoulder bag",) and self._bag_depth() < 0:
            self._shoulder_bag()
        for i in behind:
            self._sleeve(i)
        self._legs()
        self._torso()
        for i in arms:
            if i not in behind and i != self.pose.raised:
                self._sleeve(i)
        self._over_torso()
        self._head()
        if self.front <= 0:
            self._pack()
            if person["hair"] == "long":
                self._hair()
        if self.pose.raised is not None and self.pose.raised not in behind:
            self._sleeve(self.pose.raised)

    def _rows(self, rows: Rows, ease: Number, waist: Number | None = None) -> Rows:
        """The trunk's sections for this build, with a garment's ease."""
        person, found = self.person, []
        for up, width, depth, centre in rows:
            share = person["shoulders"] if up > 120 else person["waist"] if up > 100 else person["hips"]
            loose = ease * min(max((149 - up) / 12, 0.15), 1)
            if person["gender"] == "woman" and 118 < up < 134:
                depth, centre = depth + 0.6, centre + 0.9
            found.append((up, width * share + loose, depth * (0.5 + share / 2) + loose, centre))
        return found

    def _arm_depth(self, i: int) -> Number:
        """How far the middle of the arm comes towards the camera."""
        elbow, wrist = self.pose.arms[i][1], self.pose.arms[i][2]
        return self.eye.near((elbow[0] + wrist[0]) / 2, (elbow[2] + wrist[2]) / 2)

    def _shadow(self) -> None:
        """Soft dark on the ground under and beside the feet."""
        s, scale = self.sketch, self.eye.scale
        x, y = self.eye.see(0, 0, 0)
        y = max(self.eye.at(*leg[2])[1] for leg in self.pose.legs) + 7 * scale
        s.gradients.append(
            '<radialGradient id="s"><stop offset="0" stop-opacity=".55"/><stop offset=".5" stop-opacity=".28"/>'
            '<stop offset="1" stop-opacity="0"/></radialGradient>'
        )
        s.names = ()
        s.oval((x - s.light * 9 * scale, y), 34 * scale, (3.5 + 30 * self.eye.pitch) * scale, "url(#s)")

    # legs and what they wear

    def _legs(self) -> None:
        person = self.person
        order = sorted((0, 1), key=lambda i: self.eye.near(self.pose.legs[i][2][0], self.pose.legs[i][2][2]))
        for i in order:
            self._leg(i)
        if person["upper"] == "dress":
            return
        self.sketch.names = ("lower",)
        hips = Lathe(self._rows(TORSO, 0.4), self.eye)
        rgb = self._cloth("lower_colour")
        if person["lower"] == "skirt":
            self._skirt(hips, rgb)
            return
        fill = self.sketch.round(rgb, hips.spot(92, -90), hips.spot(92, 90))
        self.sketch.fill(hips.outline(106, 84), fill)
        if self.front > 0.3 and person["lower"] == "jeans":
            for angle in (-55, 55):
                seen = hips.facing(angle, 95)
                if seen is not None:
                    self.sketch.line([hips.spot(97, seen), hips.spot(92, seen * 1.2)], "#000", 1, 0.25)
        crotch = hips.spot(85, 0)
        seam = hips.facing(0 if self.front > 0 else 180, 92)
        if seam is not None and abs(seam) < 70:
            self.sketch.line([hips.spot(100, seam), hips.spot(86, seam)], "#000", 1.1, 0.22)
            for sign in (-1, 1):
                end = (crotch[0] + sign * 6 * self.eye.scale, crotch[1] - 3.5 * self.eye.scale)
                self.sketch.line([hips.spot(85.5, seam), end], "#000", 1.2, 0.18)

    def _leg(self, i: int) -> None:
        """Shoe, bare leg, then the trouser leg over both."""
        s, person, eye = self.sketch, self.person, self.eye
        hip, knee, ankle = self.pose.legs[i]
        side = ("right leg", "left leg")[i]
        mid = along([hip, knee], 0.5)
        calf = along([knee, ankle], 0.38)
        far = self.eye.near(hip[0], ankle[2]) < self.eye.near(self.pose.legs[1 - i][0][0], self.pose.legs[1 - i][2][2])
        dim = -0.16 if far and abs(sin(eye.yaw)) > 0.5 else 0.0
        chain = [eye.at(*p) for p in (hip, mid, knee, calf, ankle)]
        across = (chain[2][0] - 9 * eye.scale, chain[2][1]), (chain[2][0] + 9 * eye.scale, chain[2][1])
        bare = person["upper"] == "dress" or person["lower"] in ("shorts", "skirt")
        build = person["hips"]
        s.names = (side, "legs")
        if bare:
            radii = [r * build * eye.scale for r in (9.0, 8.2, 5.6, 5.7, 3.4)]
            skin = tone(person["tights"] or person["skin"], dim)
            s.fill(limb(chain, radii), s.round(skin, *across))
            s.line([(chain[2][0] - 2, chain[2][1] + 2), (chain[2][0] + 2, chain[2][1] + 3)], "#000", 1.2, 0.14)
        self._shoe(i, dim)
        if bare and person["lower"] != "shorts":
            return
        s.names = (side, "legs", "lower")
        fit = person["fit"]
        rgb = tone(self._cloth("lower_colour"), dim)
        fill = s.round(rgb, *across)
        if person["lower"] == "shorts":
            chain = [eye.at(*p) for p in (hip, mid, along([hip, knee], 0.93))]
            s.fill(limb(chain, [r * eye.scale * build for r in (10.0, 9.9, 9.0)], (0, 0.12)), fill)
            s.line([chain[1], chain[2]], "#000", 1.2, 0.12)
            return
        end = along([knee, ankle], 1.04) if person["shoes"] == "boots" else along([knee, ankle], 1.1)
        end = (end[0], max(end[1], ankle[1] - 3.5), end[2])
        chain = [eye.at(*p) for p in (hip, mid, knee, calf, end)]
        radii = [r * build * eye.scale for r in (9.8, 9.2, 7.2 * fit, 7.0 * fit, 6.2 * fit)]
        s.fill(limb(chain, radii, (0, 0.15)), fill)
        self._trouser_folds(chain, radii, rgb)

    def _trouser_folds(self, chain: list[Point], radii: list[Number], rgb: Sequence[Number]) -> None:
        """Creases at the knee and where the cloth meets the shoe; a worn patch on jeans."""
        s, k, sign = self.sketch, self.eye.scale, -self.sketch.light
        (_, _), (tx, ty), (x, y), (cx, cy), (ex, ey) = chain
        if self.person["lower"] == "jeans":
            s.line([along([(tx, ty), (x, y)], 0.1), (x, y)], ink(tone(rgb, 0.28)), radii[1] * 0.55, 0.22)
            s.line([(ex - radii[4] * 0.9, ey - 1.6), (ex + radii[4] * 0.9, ey - 1.6)], ink(tone(rgb, 0.3)), 0.9, 0.5)
        for dy, width in ((-2.5, 0.8), (1.5, 1.0), (4.5, 0.6)):
            s.line(
                [(x - sign * radii[2] * 0.85, y + dy * k), (x - sign * 1.5 * k, y + (dy + 1.6) * k)],
                "#000",
                1.1 * width,
                0.22,
            )
        for dy in (3.0, 6.5):
            s.line([(ex - radii[4] * 0.7, ey - dy * k), (ex + radii[4] * 0.6, ey - (dy - 1.4) * k)], "#000", 1.0, 0.2)
        s.line([(cx + sign * radii[3] * 0.35, cy - 6 * k), (ex + sign * radii[4] * 0.2, ey - 8 * k)], "#fff", 1.6, 0.07)

    def _skirt(self, hips: Lathe, rgb: Sequence[Number]) -> None:
        """A flared skirt from the waist to the knee."""
        s = self.sketch
        rows = [row for row in hips.rows if row[0] > 88]
        width, depth = rows[-1][1], rows[-1][2]
        spread = max(abs(leg[1][2]) for leg in self.pose.legs) * 0.75
        rows = [*rows, (70, width + 2.2, max(depth + 2, spread), 0), (54, width + 4.4, max(depth + 4, spread + 3), 0)]
        skirt = Lathe(rows, self.eye)
        s.fill(skirt.outline(106, 54), s.round(rgb, skirt.spot(70, -90), skirt.spot(70, 90)))
        self._drape(skirt, 90, 55)

    def _drape(self, solid: Lathe, top: Number, bottom: Number) -> None:
        """Long soft folds that fall to a hem, dark with a light edge."""
        for seen in (-58, -25, 8, 40, 66):
            sway = float(self.rng.uniform(-6, 6))
            points = [
                solid.spot(top - 8, seen * 0.6),
                solid.spot((top + bottom) / 2, seen * 0.85),
                solid.spot(bottom, seen + sway),
            ]
            self.sketch.line(points, "#000", 1.5, 0.17)
            self.sketch.line([(x + 1.6, y) for x, y in points], "#fff", 1.2, 0.08)

    def _shoe(self, i: int, dim: Number) -> None:
        """Sole and upper as the convex outline of discs from heel to toe; boots reach up the shin."""
        s, eye, person, k = self.sketch, self.eye, self.person, self.eye.scale
        _, knee, ankle = self.pose.legs[i]
        lift = max(0.0, min(0.9, atan2(ankle[2] - knee[2], knee[1] - ankle[1]) * -0.55))
        toe_out = (2 * i - 1) * 0.16

        def on_foot(ahead: Number, up: Number) -> Point:
            return eye.at(
                ankle[0] + ahead * toe_out,
                ankle[1] + up * cos(lift) - ahead * sin(lift),
                ankle[2] + ahead * cos(lift) + up * sin(lift) * 0.3,
            )

        rgb = tone(self._cloth("shoe_colour"), dim)
        kind = person["shoes"]
        s.names = ("shoes", ("right foot", "left foot")[i])
        sole = hull([(on_foot(-5.2, -7.0), 1.7 * k), (on_foot(8, -7.4), 2.0 * k), (on_foot(17.5, -7.2), 1.6 * k)])
        pale = kind == "sneakers" and person["shoe_colour"] != "white"
        s.fill([sole], ink((226, 226, 222) if pale else tone(rgb, -0.55) if kind != "sneakers" else (196, 196, 192)))
        parts = [
            (on_foot(0, -0.5), 4.5 * k),
            (on_foot(-4, -3.2), 3.3 * k),
            (on_foot(9, -3.9), 3.2 * k),
            (on_foot(15.5, -4.6), 2.4 * k),
        ]
        top = hull(parts)
        xs = [p[0] for p in top]
        fill = s.round(rgb, (min(xs), top[0][1]), (max(xs), top[0][1]), 0.8)
        if kind == "boots":
            shaft = [eye.at(*along([ankle, knee], t)) for t in (0.0, 0.2, 0.42)]
            s.fill(limb(shaft, [4.9 * k, 5.6 * k, 6.4 * k], (0, 0.15)), fill)
            s.line([(shaft[2][0] - 6 * k, shaft[2][1] + 1), (shaft[2][0] + 6 * k, shaft[2][1] + 1)], "#000", 1.0, 0.3)
        s.fill([top], fill)
        if kind == "sneakers":
            lace = ink((240, 240, 238) if person["shoe_colour"] != "white" else (150, 150, 150))
            for ahead, up in ((4.5, 0.4), (7.0, -0.7)):
                a, b = on_foot(ahead, up), on_foot(ahead + 1.8, up - 1.8)
                s.line([(a[0] - 1.2, a[1]), (b[0] + 0.6, b[1])], lace, 1.0, 0.8)

    def _cloth(self, name: str) -> tuple[int, ...]:
        """This person's shade of a named colour."""
        return tuple(self.person["shades"][name])

    # the trunk

    def _torso(self) -> None:
        """The upper garment: cloth, pattern, folds, and what makes it a shirt, a jacket, a coat …"""
        s, person = self.sketch, self.person
        kind = person["upper"]
        hem = GARMENTS[kind][0]
        rgb = self._cloth("upper_colour")
        rows = self.trunk.rows
        if kind in LONG:
            rows = [row for row in rows if row[0] > 95]
            wide, deep = rows[-1][1], rows[-1][2]
            spread = max(abs(leg[1][2]) for leg in self.pose.legs) * 0.7
            flare = 5.0 if kind == "dress" else 2.6
            rows = [*rows, (84, wide + 1.2, deep + 1, 0), (hem, wide + flare, max(deep + flare, spread + 3), 0)]
        self.trunk = trunk = Lathe(rows, self.eye)
        s.names = ("upper", "torso")
        self.upper_fill = s.round(rgb, trunk.spot(125, -90), trunk.spot(125, 90))
        s.fill(trunk.outline(149.5, hem), self.upper_fill)
        self._pattern(trunk, hem)
        s.names = ("upper",)
        if kind in LONG:
            self._drape(trunk, 92, hem + 1)
        elif kind != "down jacket":
            self._creases(trunk, hem)
        getattr(
            self,
            {"t-shirt": "_crew", "sweater": "_sweater", "down jacket": "_down_jacket", "dress": "_dress"}.get(
                kind, "_" + kind.split()[-1]
            ),
        )(trunk, hem, rgb)

    def _creases(self, trunk: Lathe, hem: Number) -> None:
        """Folds that run from the armpits and gather at the waist, and a shadow over the hem."""
        s, rng = self.sketch, self.rng
        for side in (-1, 1):
            for _ in range(2):
                up, seen = float(rng.uniform(118, 130)), side * float(rng.uniform(64, 80))
                s.line(
                    [trunk.spot(up, seen), trunk.spot(up - 6, seen * 0.62), trunk.spot(up - 9, seen * 0.3)],
                    "#000",
                    1.2,
                    0.17,
                )
            up = float(rng.uniform(96, 104))
            points = [trunk.spot(up, side * 82), trunk.spot(up - 2.5, side * 45), trunk.spot(up - 2, side * 15)]
            s.line(points, "#000", 1.3, 0.18)
            s.line([(x, y + 1.6) for x, y in points], "#fff", 1.0, 0.09)
        s.line([trunk.spot(hem + 2.2, seen) for seen in (-84, -40, 0, 40, 84)], "#000", 1.0, 0.16)

    def _pattern(self, trunk: Lathe, hem: Number) -> None:
        """Stripes, checks and dots that follow the body's roundness; a logo on the chest."""
        kind, s = self.person["pattern"], self.sketch
        if kind == "plain":
            return
        fill = s.round(self.second, trunk.spot(125, -90), trunk.spot(125, 90))
        if kind in ("striped", "checked"):
            step, width = (8.0, 3.2) if kind == "striped" else (9.0, 2.0)
            top = 141 if kind == "striped" else 143
            up = float(top)
            while up - width > hem:
                band = [
                    [trunk.spot(up, a) for a in (-90, -45, 0, 45, 90)],
                    [trunk.spot(up - width, a) for a in (90, 45, 0, -45, -90)],
                ]
                s.fill(band, fill, 0.95 if kind == "striped" else 0.75)
                up -= step
        if kind == "checked":
            for angle in range(-170, 190, 28):
                seen = trunk.facing(angle, 120)
                if seen is not None and abs(seen) < 80:
                    s.line(
                        trunk.edge(143, hem + 0.5, seen), fill, 2.2 * self.eye.scale * cos(radians(seen)) ** 0.7, 0.7
                    )
        if kind == "dotted":
            for row, up in enumerate(range(140, int(hem) + 2, -8)):
                for angle in range(-180 + 14 * (row % 2), 180, 28):
                    seen = trunk.facing(angle, up)
                    if seen is not None and abs(seen) < 80:
                        s.oval(
                            trunk.spot(up, seen), 1.9 * self.eye.scale * cos(radians(seen)), 1.9 * self.eye.scale, fill
                        )
        if kind == "logo":
            s.names = ("logo", "upper", "torso")
            for piece in trunk.patches(-30, 30, lambda _: 119.0, lambda _: 131.0):
                s.fill(piece, ink(self.second))
            for piece in trunk.patches(-18, 18, lambda _: 122.5, lambda _: 127.5):
                s.fill(piece, ink(self._cloth("upper_colour")), boxed=False)

    def _neckline(self, trunk: Lathe, depth: Number, wide: Number, paint: str) -> None:
        """The opening of a garment at the throat, filled with what is under it."""
        for piece in trunk.patches(
            -wide, wide, lambda a: 148.6 - depth * cos(radians(90 * a / wide)) ** 0.8, lambda _: 150.0, 12
        ):
            self.sketch.fill(piece, paint, boxed=False)

    def _crew(self, trunk: Lathe, hem: Number, rgb: Sequence[Number]) -> None:
        self._neckline(trunk, 5.5, 80, ink(tone(self.person["skin"], -0.12)))
        rim = [
            trunk.spot(148.6 - 5.5 * cos(radians(s)) ** 0.8 * max(self.front, 0.15), s * 0.9)
            for s in (-85, -50, -20, 0, 20, 50, 85)
        ]
        if self.front > 0.1:
            self.sketch.line(rim, ink(tone(rgb, -0.3)), 1.5, 0.8)

    def _sweater(self, trunk: Lathe, hem: Number, rgb: Sequence[Number]) -> None:
        self._crew(trunk, hem, rgb)
        for up in (hem + 5, hem + 1):
            self.sketch.line([trunk.spot(up, seen) for seen in (-88, -40, 0, 40, 88)], ink(tone(rgb, -0.35)), 1.2, 0.7)

    def _dress(self, trunk: Lathe, hem: Number, rgb: Sequence[Number]) -> None:
        self._neckline(trunk, 8, 60, ink(tone(self.person["skin"], -0.1)))
        belt = [
            [trunk.spot(107, a) for a in (-90, -45, 0, 45, 90)],
            [trunk.spot(104.5, a) for a in (90, 45, 0, -45, -90)],
        ]
        self.sketch.fill(belt, ink(tone(rgb, -0.45)), 0.8)

    def _shirt(self, trunk: Lathe, hem: Number, rgb: Sequence[Number]) -> None:
        s, k = self.sketch, self.eye.scale
        self._neckline(trunk, 6.5, 26, ink(tone(self.person["skin"], -0.12)))
        seen = trunk.facing(0, 120)
        if seen is not None:
            line = trunk.edge(142, hem, seen)
            s.line(line, ink(tone(rgb, -0.35)), 1.0, 0.8)
            s.line([(x + 2.4 * k, y) for x, y in line], ink(tone(rgb, -0.3)), 0.7, 0.5)
            for up in range(138, int(hem) + 3, -9):
                x, y = trunk.spot(up, seen)
                s.oval((x + 1.2 * k, y), 0.9, 0.9, ink(tone(rgb, 0.5) if sum(rgb) < 380 else tone(rgb, -0.5)))
        for a, b in ((-62, -4), (4, 62)):
            inner = -4 if b < 0 else 4
            for piece in trunk.patches(
                a, b, lambda angle, i=inner: 141.5 + 6 * min(abs(angle - i) / 58, 1), lambda _: 150.0, 14
            ):
                s.fill(piece, ink(tone(rgb, 0.08)))
                s.line(piece[0], "#000", 1.0, 0.3)

    def _hoodie(self, trunk: Lathe, hem: Number, rgb: Sequence[Number]) -> None:
        s = self.sketch
        for piece in trunk.patches(-46, 46, lambda a: hem + 4.0, lambda a: hem + 20.0 - 7 * max(abs(a) - 26, 0) / 20):
            s.fill(piece, ink(tone(rgb, -0.1)), 0.75)
            s.line([*piece[2][::-1]], "#000", 1.1, 0.35)
        for angle in (-9, 9):
            seen = trunk.facing(angle, 138)
            if seen is not None:
                s.line(
                    [trunk.spot(144, seen), trunk.spot(137, seen), trunk.spot(130, seen * 1.1)],
                    ink(tone(self.second, -0.06)),
                    1.3,
                )
        s.line([trunk.spot(hem + 3, seen) for seen in (-88, -40, 0, 40, 88)], ink(tone(rgb, -0.35)), 1.1, 0.7)
        self._hood(trunk, rgb)

    def _hood(self, trunk: Lathe, rgb: Sequence[Number]) -> None:
        """The hood lies on the back and comes round the neck."""
        s = self.sketch
        rows = [
            (153.5, 7.6, 7.4, -2.4),
            (150, 10.4, 9.6, -3.4),
            (146, 11.6, 11.4, -4.4),
            (140, 9.4, 12.4, -3.4),
            (134, 4.0, 12.6, -2.6),
        ]
        hood = Lathe(rows, self.eye)
        for piece in hood.patches(40, 320, lambda a: 146.0 - 12 * max(-cos(radians(a)), 0) ** 2, lambda _: 153.0, 16):
            s.fill(piece, s.round(tone(rgb, -0.03), hood.spot(146, -90), hood.spot(146, 90)))
            s.line(piece[0], "#000", 1.3, 0.35)
        seen = hood.facing(180, 146)
        if seen is not None:
            s.line([hood.spot(152, seen), hood.spot(145, seen), hood.spot(136, seen)], "#000", 1.0, 0.25)

    def _jacket(self, trunk: Lathe, hem: Number, rgb: Sequence[Number]) -> None:
        s = self.sketch
        self._opening(trunk, hem, 20 if self.person["upper"] == "open jacket" else 0, rgb)
        for a, b in ((-50, -22), (22, 50)):
            for piece in trunk.patches(a, b, lambda _: hem + 11.0, lambda _: hem + 12.2):
                s.fill(piece, "#000", 0.3)
        for piece in trunk.patches(8, 352, lambda _: 145.4, lambda a: 150.6 + 1.2 * (cos(radians(a)) < 0), 18):
            s.fill(piece, s.round(tone(rgb, -0.06), trunk.spot(147, -90), trunk.spot(147, 90)))
            s.line(piece[0], "#000", 1.0, 0.35)
        s.line([trunk.spot(hem + 4.5, seen) for seen in (-88, -40, 0, 40, 88)], ink(tone(rgb, -0.4)), 1.2, 0.7)

    def _coat(self, trunk: Lathe, hem: Number, rgb: Sequence[Number]) -> None:
        s, opened = self.sketch, self.person["upper"] == "open coat"
        self._opening(trunk, hem, 19 if opened else 0, rgb)
        for a, b in ((-54, -24), (24, 54)):
            for piece in trunk.patches(a, b, lambda _: 92.0, lambda _: 94.5):
                s.fill(piece, "#000", 0.3)
        if not opened:
            for up in (128, 118, 108, 97):
                for angle in (7, -7):
                    seen = trunk.facing(angle, up)
                    if seen is not None:
                        s.oval(trunk.spot(up, seen), 1.1, 1.1, ink(tone(rgb, -0.6)))
        edge = 19 if opened else 3
        for a, b in ((-60, -edge), (edge, 60)):
            for piece in trunk.patches(
                a,
                b,
                lambda angle: 126.0 + 22 * min(max((abs(angle) - edge) / (60 - edge), 0), 1) ** 0.8,
                lambda _: 150.4,
                12,
            ):
                s.fill(piece, ink(tone(rgb, 0.07)))
                s.line(piece[0], "#000", 1.1, 0.38)
        seen = trunk.facing(180, 80)
        if seen is not None:
            s.line(trunk.edge(86, hem, seen), "#000", 1.2, 0.3)

    def _opening(self, trunk: Lathe, hem: Number, wide: Number, rgb: Sequence[Number]) -> None:
        """The front edge: closed along a zip, or open over what is worn under it."""
        s = self.sketch
        if not wide:
            self._neckline(trunk, 5, 24, ink(tone(self._cloth("inner_colour"), -0.2)))
            seen = trunk.facing(0, 115)
            if seen is not None:
                s.line(trunk.edge(144, hem, seen), "#000", 1.5, 0.4)
                s.line([(x + 0.9, y) for x, y in trunk.edge(144, hem, seen)], "#fff", 0.6, 0.3)
            return
        inner = self._cloth("inner_colour")
        bottom = max(hem, 82.0)
        names, s.names = s.names, ("inner",)
        for piece in trunk.patches(-wide, wide, lambda _: bottom, lambda _: 150.0, 10):
            s.fill(piece, s.round(inner, trunk.spot(125, -50), trunk.spot(125, 50), 0.7))
        for piece in trunk.patches(
            -wide, wide, lambda a: 148.6 - 5 * cos(radians(90 * a / wide)) ** 0.8, lambda _: 150.4, 8
        ):
            s.fill(piece, ink(tone(self.person["skin"], -0.12)), boxed=False)
        s.names = names
        if hem < 82:
            s.names = ()
            for piece in trunk.patches(-wide, wide, lambda _: hem, lambda _: bottom + 0.5, 10):
                s.fill(piece, ink(tone(self._cloth("lower_colour"), -0.3)))
            s.names = names
        for angle in (-wide, wide):
            seen = trunk.facing(angle, 115)
            if seen is not None:
                s.line(trunk.edge(147, hem, seen), "#000", 1.8, 0.42)

    def _down_jacket(self, trunk: Lathe, hem: Number, rgb: Sequence[Number]) -> None:
        s = self.sketch
        for up in range(141, int(hem), -9):
            points = [
                trunk.spot(up - 1.2 * (a % 2), seen) for a, seen in enumerate((-88, -66, -44, -22, 0, 22, 44, 66, 88))
            ]
            s.line(points, "#000", 1.5, 0.34)
            s.line([(x, y + 1.9) for x, y in points], "#fff", 1.5, 0.2)
        self._opening(trunk, hem, 0, rgb)
        for piece in trunk.patches(6, 354, lambda _: 145.0, lambda a: 151.5 + 1.5 * (cos(radians(a)) < 0), 18):
            s.fill(piece, s.round(tone(rgb, 0.03), trunk.spot(147, -90), trunk.spot(147, 90)))
            s.line(piece[0], "#000", 1.1, 0.35)

    def _sleeve(self, i: int) -> None:
        """Arm, hand and what it holds."""
        s, person, eye, k = self.sketch, self.person, self.eye, self.eye.scale
        joints = self.pose.arms[i]
        kind, thick = person["upper"], 0.94 + 0.06 * person["shoulders"]
        _, ease, length = GARMENTS[kind]
        shoulder, elbow, wrist, knuckles = joints
        depth = self._arm_depth(i)
        dim = -0.18 if depth < -4.5 else 0.0
        upper_mid, fore_mid = along([shoulder, elbow], 0.5), along([elbow, wrist], 0.45)
        chain = [eye.at(*p) for p in (shoulder, upper_mid, elbow, fore_mid, wrist)]
        across = (chain[2][0] - 6 * k, chain[2][1] - 2 * k), (chain[2][0] + 6 * k, chain[2][1] + 2 * k)
        side = ("right arm", "left arm")[i]
        holding = i == person["hand"]
        s.names = (side,)
        self._hand(wrist, knuckles, dim)
        if length < 0.5:
            skin = s.round(tone(person["skin"], dim), *across)
            s.fill(limb(chain[1:], [r * thick * k for r in (4.6, 4.1, 3.9, 2.7)]), skin)
        s.names = (side, "upper")
        rgb = tone(self._cloth("upper_colour"), dim)
        fill = s.round(rgb, *across)
        cap = [5.9, 5.3, 4.8, 4.5, 3.6]
        radii = [(r * thick + ease * 0.55) * k for r in cap]
        if length < 0.5:
            chain = [chain[0], chain[1], eye.at(*along([shoulder, elbow], 0.72))]
            radii = [radii[0], radii[1] * 1.02, radii[1] * 1.08]
        if depth > -4.5:
            s.line([chain[0], *chain[1:]], "#000", 2 * radii[1] + 3, 0.10)
        s.fill(limb(chain, radii, (0.75, 0.1)), fill)
        self._sleeve_pattern(chain, radii, i, across)
        if length > 0.5:
            (x, y), r = chain[2], radii[2]
            sign = -s.light
            for dy in (-3, 0, 3):
                s.line([(x - sign * r * 0.8, y + dy * k), (x + sign * r * 0.2, y + (dy + 1.6) * k)], "#000", 1.1, 0.22)
            (x, y), (px, py) = chain[4], chain[3]
            s.line(
                [(x - radii[4], y - 2), (x + radii[4], y - 2)]
                if abs(y - py) > abs(x - px)
                else [(x, y - radii[4]), (x, y + radii[4])],
                "#000",
                1.1,
                0.3,
            )
            if kind == "down jacket":
                for t in (0.15, 0.35, 0.62, 0.85):
                    self._across(chain, radii, t, "#000", 1.3, 0.34)
        if holding:
            self._carry(wrist, knuckles)

    def _across(
        self, chain: list[Point], radii: list[Number], t: Number, paint: str, width: Number, alpha: Number
    ) -> None:
        """A stroke across a limb at a share of its length."""
        (x, y), (x2, y2) = along(chain, t - 0.02), along(chain, t + 0.02)
        r = along([(q, 0.0) for q in radii], t)[0] * 0.94
        size = hypot(x2 - x, y2 - y) or 1.0
        nx, ny = (y2 - y) / size * r, -(x2 - x) / size * r
        bulge = 0.18 * r
        mid = (x - ny / r * -bulge * 0, y + abs(nx) / r * bulge)
        self.sketch.line([(x + nx, y + ny), mid, (x - nx, y - ny)], paint, width, alpha)

    def _sleeve_pattern(self, chain: list[Point], radii: list[Number], i: int, across: tuple) -> None:
        """The garment's stripes, checks or dots on the sleeve."""
        kind, k = self.person["pattern"], self.eye.scale
        if kind in ("plain", "logo"):
            return
        fill = self.sketch.round(self.second, *across)
        count = 3 if len(chain) == 3 else 7
        for j in range(count):
            t = (j + 0.6) / count
            if kind == "striped":
                self._across(chain, radii, t, fill, 3.2 * k, 0.95)
            elif kind == "checked":
                self._across(chain, radii, t, fill, 1.9 * k, 0.75)
            else:
                x, y = along(chain, t)
                self.sketch.oval((x + (2.0 if j % 2 else -2.0) * k, y), 1.6 * k, 1.8 * k, fill)
        if kind == "checked":
            self.sketch.line(chain, fill, 1.9 * k, 0.6)

    def _hand(self, wrist: tuple, knuckles: tuple, dim: Number) -> None:
        s, k = self.sketch, self.eye.scale
        a, b = self.eye.at(*wrist), self.eye.at(*knuckles)
        skin = tone(self.person["skin"], dim - 0.04)
        tip = (b[0] + (b[0] - a[0]) * 0.75, b[1] + (b[1] - a[1]) * 0.75 - 0.5)
        s.fill(
            limb([a, b, tip], [2.6 * k, 3.5 * k, 2.2 * k], (0.3, 0.8)),
            s.round(skin, (b[0] - 4 * k, b[1]), (b[0] + 4 * k, b[1]), 0.8),
        )
        s.line([along([a, b], 0.7), tip], "#000", 0.8, 0.16)

    def _carry(self, wrist: tuple, knuckles: tuple) -> None:
        """What the hand holds."""
        person, s, k = self.person, self.sketch, self.eye.scale
        x, y = self.eye.at(*along([wrist, knuckles], 0.8))
        _, ground = self.eye.at(*[(a + b) / 2 for a, b in zip(*(leg[2] for leg in self.pose.legs), strict=True)])
        if person["bag"] == "handbag":
            s.names = ("bag",)
            self._handbag(x, y, self._cloth("bag_colour"))
        if person["carried"] != "nothing":
            s.names = ("carried",)
            getattr(self, "_" + person["carried"].replace(" ", "_"))(x, y, k, ground + 7 * k)

    def _handbag(self, x: Number, y: Number, rgb: Sequence[Number]) -> None:
        s, k = self.sketch, self.eye.scale
        w = (13 * abs(sin(self.eye.yaw)) + 8.5 * abs(self.front)) * k
        top, low = y + 13 * k, y + 33 * k
        s.line(
            [(x - w * 0.55, top + 1), (x - w * 0.35, y + 3), (x, y), (x + w * 0.35, y + 3), (x + w * 0.55, top + 1)],
            ink(tone(rgb, -0.4)),
            2.0,
        )
        body = [
            [(x - w * 0.86, top), (x, top - 1), (x + w * 0.86, top)],
            [(x + w, low - 2), (x + w * 0.8, low), (x - w * 0.8, low), (x - w, low - 2)],
        ]
        s.fill(body, s.round(rgb, (x - w, y), (x + w, y)))
        s.line([(x - w * 0.9, top + 5 * k), (x, top + 6.5 * k), (x + w * 0.9, top + 5 * k)], "#000", 1.1, 0.35)
        s.oval((x, top + 7 * k), 1.4, 1.6, "#e8d9a0")

    def _shopping_bag(self, x: Number, y: Number, k: Number, ground: Number) -> None:
        s, rgb = self.sketch, self._cloth("carried_colour")
        w, top, low = 10 * k, y + 8 * k, y + 37 * k
        s.line([(x - w * 0.5, top), (x - 1, y), (x + 1, y), (x + w * 0.5, top)], ink(tone(rgb, -0.25)), 1.5)
        s.fill(
            [[(x - w * 0.8, top), (x + w * 0.8, top)], [(x + w, low), (x - w, low)]],
            s.round(rgb, (x - w, y), (x + w, y), 0.8),
        )
        s.fill(
            [
                [(x - w * 0.4, top + 9 * k), (x + w * 0.4, top + 9 * k)],
                [(x + w * 0.4, top + 17 * k), (x - w * 0.4, top + 17 * k)],
            ],
            ink(tone(rgb, -0.35)),
            0.7,
        )

    def _suitcase(self, x: Number, y: Number, k: Number, ground: Number) -> None:
        s, rgb = self.sketch, self._cloth("carried_colour")
        w = (8 + 9 * abs(self.front)) * k
        low, top = ground - 2 * k, ground - 50 * k
        for dx in (-0.35, 0.35):
            s.line([(x + dx * w, y), (x + dx * w, top)], "#8b8d92", 1.4)
        s.line([(x - 0.35 * w, y), (x + 0.35 * w, y)], "#2b2b2e", 2.4)
        for dx in (-0.7, 0.7):
            s.oval((x + dx * w, low + 1.2 * k), 2 * k, 2 * k, "#1c1c1e")
        s.fill(
            [
                [(x - w * 0.9, top), (x, top - 1), (x + w * 0.9, top)],
                [(x + w, top + 3), (x + w, low - 2)],
                [(x + w * 0.9, low), (x - w * 0.9, low)],
                [(x - w, low - 2), (x - w, top + 3)],
            ],
            s.round(rgb, (x - w, y), (x + w, y)),
        )
        for dx in (-0.5, 0, 0.5):
            s.line([(x + dx * w, top + 4), (x + dx * w, low - 4)], "#000", 1.1, 0.25)

    def _umbrella(self, x: Number, y: Number, k: Number, ground: Number) -> None:
        s, rgb = self.sketch, self._cloth("carried_colour")
        tip, lean = min(y + 60 * k, ground), 5 * k
        s.line([(x - 2 * k, y - 7 * k), (x, y - 10 * k), (x + 2 * k, y - 7 * k), (x, y)], "#5a3a20", 2.0)
        s.fill(
            [
                [(x - 2.2 * k, y + 3 * k), (x + 2.2 * k, y + 3 * k)],
                [(x + 3.6 * k, y + 16 * k), (x + lean + 0.6, tip)],
                [(x + lean - 0.6, tip), (x - 2.6 * k, y + 16 * k)],
            ],
            s.round(rgb, (x - 3 * k, y), (x + 4 * k, y)),
        )
        s.line([(x - 2.6 * k, y + 12 * k), (x + 3.2 * k, y + 13 * k)], "#000", 1.0, 0.4)

    def _open_umbrella(self, x: Number, y: Number, k: Number, ground: Number) -> None:
        s, rgb = self.sketch, self._cloth("carried_colour")
        top = self.eye.see(0, 203, 0)[1]
        cx, rim, r = x * 0.75 + self.eye.x * 0.25, top + 21 * k, 45 * k
        s.line([(x, y + 4 * k), (cx, top)], "#3a3a3d", 1.8)
        dome = [(cx + r * t, rim - 21 * k * (1 - t * t) ** 0.6) for t in (-1, -0.9, -0.7, -0.4, 0, 0.4, 0.7, 0.9, 1)]
        scallops = [
            [(cx + r * b, rim), (cx + r * (a + b) / 2, rim - 2.6 * k), (cx + r * a, rim)]
            for a, b in ((0.5, 1), (0, 0.5), (-0.5, 0), (-1, -0.5))
        ]
        s.fill([dome, *scallops], s.round(rgb, (cx - r, top), (cx + r, top)))
        for t in (-0.5, 0, 0.5):
            s.line([(cx, top), (cx + r * t * 0.8, rim - 14 * k), (cx + r * t, rim)], "#000", 0.9, 0.3)

    def _phone(self, x: Number, y: Number, k: Number, ground: Number) -> None:
        a, b = 2.4 * k, 5.6 * k
        self.sketch.fill(
            [[(x - a, y - b), (x + a, y - b - 1)], [(x + a, y + b * 0.6), (x - a, y + b * 0.6)]], "#17181b"
        )
        self.sketch.fill(
            [
                [(x - a * 0.7, y - b * 0.8), (x + a * 0.7, y - b * 0.9)],
                [(x + a * 0.7, y + b * 0.3), (x - a * 0.7, y + b * 0.3)],
            ],
            "#9fc4e6",
            boxed=False,
        )

    def _bottle(self, x: Number, y: Number, k: Number, ground: Number) -> None:
        s, rgb = self.sketch, self._cloth("carried_colour")
        s.fill(
            [
                [
                    (x - 2.6 * k, y + 7 * k),
                    (x - 2.8 * k, y - 6 * k),
                    (x - 1.2 * k, y - 10 * k),
                    (x + 1.2 * k, y - 10 * k),
                    (x + 2.8 * k, y - 6 * k),
                    (x + 2.6 * k, y + 7 * k),
                ]
            ],
            s.round(rgb, (x - 3 * k, y), (x + 3 * k, y)),
        )
        s.fill(
            [
                [(x - 1.4 * k, y - 12.5 * k), (x + 1.4 * k, y - 12.5 * k)],
                [(x + 1.4 * k, y - 9.6 * k), (x - 1.4 * k, y - 9.6 * k)],
            ],
            "#f2f2f0",
        )

    def _cup(self, x: Number, y: Number, k: Number, ground: Number) -> None:
        s = self.sketch
        s.fill(
            [
                [(x - 3.4 * k, y - 7 * k), (x + 3.4 * k, y - 7 * k)],
                [(x + 2.4 * k, y + 4 * k), (x - 2.4 * k, y + 4 * k)],
            ],
            s.round((236, 232, 224), (x - 3.4 * k, y), (x + 3.4 * k, y), 0.8),
        )
        s.fill(
            [
                [(x - 2.9 * k, y - 3.5 * k), (x + 2.9 * k, y - 3.5 * k)],
                [(x + 2.6 * k, y + 1 * k), (x - 2.6 * k, y + 1 * k)],
            ],
            "#9a6a3c",
        )
        s.fill(
            [
                [(x - 3.7 * k, y - 9 * k), (x + 3.7 * k, y - 9 * k)],
                [(x + 3.7 * k, y - 6.6 * k), (x - 3.7 * k, y - 6.6 * k)],
            ],
            "#3b2a20",
        )

    def _book(self, x: Number, y: Number, k: Number, ground: Number) -> None:
        s, rgb = self.sketch, self._cloth("carried_colour")
        w = (4 + 6.5 * abs(self.front)) * k
        s.fill(
            [[(x - w, y - 11 * k), (x + w, y - 12 * k)], [(x + w, y + 9 * k), (x - w, y + 10 * k)]],
            s.round(rgb, (x - w, y), (x + w, y), 0.6),
        )
        s.line([(x - w + 1, y + 8 * k), (x + w - 1, y + 7 * k)], "#f4f0e4", 1.5)
        s.line([(x - w * 0.5, y - 5 * k), (x + w * 0.5, y - 5.5 * k)], "#fff", 1.2, 0.6)

    # bags

    def _pack(self) -> None:
        """The backpack's body, behind or before the trunk."""
        if self.person["bag"] != "backpack":
            return
        s, eye = self.sketch, self.eye
        rgb = self._cloth("bag_colour")
        back = -(self.trunk.section(125)[1] + 5.5)
        pack = Lathe(
            [
                (146, 7, 3, back + 3),
                (143.5, 11.5, 5.5, back + 1.5),
                (136, 14, 7.5, back),
                (118, 15, 9, back),
                (106, 14.6, 8.6, back + 0.5),
                (101, 11, 6, back + 1.5),
            ],
            eye,
        )
        s.names = ("bag",)
        s.fill(pack.outline(146, 101), s.round(rgb, pack.spot(120, -90), pack.spot(120, 90)))
        for piece in pack.patches(120, 240, lambda _: 103.5, lambda _: 120.5, 20):
            s.fill(piece, s.round(tone(rgb, -0.08), pack.spot(112, -75), pack.spot(112, 75)))
            s.line(piece[2][::-1], "#000", 1.2, 0.4)
        s.line([pack.spot(133, a) for a in (-80, -40, 0, 40, 80)], "#000", 1.1, 0.38)
        s.line([pack.spot(132, a) for a in (-70, -40, 0, 40, 70)], "#fff", 0.8, 0.25)
        handle = [pack.spot(145, -25), pack.spot(149, 0), pack.spot(145, 25)]
        s.line(handle, ink(tone(rgb, -0.4)), 1.8)

    def _over_torso(self) -> None:
        """Straps of a backpack, and the shoulder bag where it hangs on the near side."""
        person, s, k = self.person, self.sketch, self.eye.scale
        s.names = ("bag",)
        if person["bag"] == "backpack":
            rgb = self._cloth("bag_colour")
            for sign in (-1, 1):
                points = []
                for up, angle in ((149.5, 62), (145, 40), (136, 36), (126, 46), (118, 66), (114, 92)):
                    seen = self.trunk.facing(sign * angle, up)
                    if seen is not None:
                        points.append(self.trunk.spot(up, seen))
                if len(points) > 2:
                    s.line(points, ink(tone(rgb, -0.35)), 4.6 * k, boxed=True)
                    s.line([(x - s.light * -0.8, y) for x, y in points], ink(tone(rgb, 0.06)), 2.8 * k)
        elif person["bag"] == "shoulder bag":
            self._strap()
            if self._bag_depth() >= 0:
                self._shoulder_bag()

    def _bag_depth(self) -> Number:
        return self.eye.near(self._hip_side() * 17, 1)

    def _hip_side(self) -> int:
        return 1 - 2 * self.person["hand"]

    def _strap(self) -> None:
        """The strap runs from the far shoulder across the chest and the back to the hip."""
        side, s, k = self._hip_side(), self.sketch, self.eye.scale
        rgb = tone(self._cloth("bag_colour"), -0.25)
        paths = ((148, -70, -110), (143, -44, -136), (132, -14, -166), (120, 22, 158), (108, 58, 122), (98, 84, 96))
        for column in (1, 2):
            points = []
            for row in paths:
                seen = self.trunk.facing(side * row[column], row[0])
                if seen is not None:
                    points.append(self.trunk.spot(row[0], seen))
            if len(points) > 2:
                s.line(points, ink(rgb), 2.9 * k, boxed=True)
                s.line([(x + 0.9, y) for x, y in points], "#fff", 0.7, 0.18)

    def _shoulder_bag(self) -> None:
        s, eye, k = self.sketch, self.eye, self.eye.scale
        s.names = ("bag",)
        rgb = self._cloth("bag_colour")
        x, y = eye.at(self._hip_side() * (self.trunk.section(92)[0] + 1.5), 94, 1.5)
        w = (14.5 * abs(sin(eye.yaw)) + 7 * abs(self.front)) * k
        top, low = y - 4 * k, y + 20 * k
        s.fill(
            [
                [(x - w * 0.9, top), (x + w * 0.9, top)],
                [(x + w, low - 3), (x + w * 0.85, low), (x - w * 0.85, low), (x - w, low - 3)],
            ],
            s.round(rgb, (x - w, y), (x + w, y)),
        )
        s.fill(
            [
                [(x - w * 0.92, top), (x + w * 0.92, top)],
                [(x + w * 0.9, top + 9 * k), (x, top + 12 * k), (x - w * 0.9, top + 9 * k)],
            ],
            ink(tone(rgb, -0.12)),
        )
        s.line([(x - w * 0.9, top + 9 * k), (x, top + 12 * k), (x + w * 0.9, top + 9 * k)], "#000", 1.1, 0.45)
        s.oval((x, top + 11.5 * k), 1.3, 1.3, "#ddd0a0")

    # the head

    def _head(self) -> None:
        s, person, eye = self.sketch, self.person, self.gaze
        skin, size = tuple(person["skin"]), 1.0 if person["gender"] == "man" else 0.96
        self.skull = Lathe([(CHIN + up * size, w * size, d * size, z + 1.0) for up, w, d, z in HEAD], eye)
        s.names = ("head",)
        long = person["hair"] in ("long", "bob")
        if long and self.front > -0.2:
            self._back_hair()
        neck = [self.eye.at(0, 145.5, -1.6), self.eye.at(0, 149, -0.8), eye.at(0, 154, 0.2)]
        k = eye.scale
        width = 5.6 * (1 if person["gender"] == "man" else 0.86)
        high = person["upper"] in ("jacket", "open jacket", "down jacket", "hoodie")
        s.names = ("head",)
        start = 1 if high else 0
        s.fill(
            limb(neck[start:], [width * 1.15 * k, width * k, width * k][start:], (0.4, 0)),
            s.round(tone(skin, -0.22), (neck[1][0] - 6 * k, neck[1][1]), (neck[1][0] + 6 * k, neck[1][1])),
        )
        if person["hair"] == "ponytail" and self.gaze.near(0, -1) < -0.25:
            self._tail()
        ear = self.skull.facing
        for angle in (-96, 96):
            seen = ear(angle, CHIN + 10.5)
            if seen is not None and not long:
                spot = self.skull.spot(CHIN + 10.5, seen * 1.0)
                s.oval(spot, 1.5 * k, 2.6 * k, ink(tone(skin, -0.14)))
        s.fill(
            self.skull.outline(CHIN + 23 * size, CHIN),
            s.round(skin, self.skull.spot(CHIN + 10, -90), self.skull.spot(CHIN + 10, 90), 0.75),
        )
        self._face(skin)
        for angle in (-97, 97):
            seen = ear(angle, CHIN + 10.5)
            if seen is not None and abs(seen) < 70 and not long:
                spot = self.skull.spot(CHIN + 10.5, seen)
                s.oval(spot, 1.7 * k * max(cos(radians(seen)), 0.5), 2.7 * k, ink(tone(skin, -0.1)))
                s.line([(spot[0], spot[1] - 1.4 * k), (spot[0] + 0.5, spot[1] + 1.2 * k)], "#000", 0.8, 0.25)
        if person["hair"] != "bald":
            self._hair()
        if person["hair"] == "ponytail" and self.gaze.near(0, -1) >= -0.25:
            self._tail()
        if person["hair"] == "bun":
            s.names = ("hair",)
            rgb = self._cloth("hair_colour")
            x, y = eye.at(0, CHIN + 20.5, -9.5)
            if eye.near(0, -1) > -0.8:
                s.oval((x, y), 4.6 * k, 4.4 * k, s.round(rgb, (x - 4.6 * k, y), (x + 4.6 * k, y)))
                s.line([(x - 2.4 * k, y + 1.5 * k), (x, y - 1 * k), (x + 2.6 * k, y + 1 * k)], "#000", 0.9, 0.3)
        if person["hat"] != "none":
            self._hat()

    def _face(self, skin: Sequence[Number]) -> None:
        """Eyes, brows, nose and mouth on the visible part of the skull; glasses over them."""
        s, skull, k = self.sketch, self.skull, self.eye.scale
        s.names = ("face", "head")
        nose = self.gaze.at(0, CHIN + 8.2, 10.6)
        if abs(sin(self.gaze.yaw)) > 0.55 and cos(self.gaze.yaw) > -0.45:
            bridge, under = self.gaze.at(0, CHIN + 12.2, 8.6), self.gaze.at(0, CHIN + 6.6, 8.8)
            inner = self.gaze.at(0, CHIN + 9, 6.5)
            s.fill([[bridge, nose, under], [inner]], ink(tone(skin, -0.06)), boxed=False)
        for sign in (-1, 1):
            seen = skull.facing(sign * 25, CHIN + 11.6)
            if seen is None or abs(seen) > 80:
                continue
            x, y = skull.spot(CHIN + 11.4, seen)
            narrow = max(cos(radians(seen)), 0.35)
            s.oval((x, y), 1.5 * k * narrow, 0.85 * k, "#f4f1ec")
            s.oval((x, y), 0.85 * k * narrow, 0.9 * k, "#2a1d18")
            s.line(
                [(x - 2.0 * k * narrow, y - 2.0 * k), (x, y - 2.6 * k), (x + 2.0 * k * narrow, y - 2.0 * k)],
                ink(tone(self._cloth("hair_colour"), -0.2)),
                1.0,
                0.75,
            )
        seen = skull.facing(0, CHIN + 8)
        if seen is not None and abs(seen) < 62:
            x, y = skull.spot(CHIN + 7.4, seen)
            s.line(
                [
                    (x - self.sketch.light * 0.9 * k, y - 3.4 * k),
                    (x - self.sketch.light * 1.3 * k, y - 0.3 * k),
                    (x + 0.8 * k, y),
                ],
                ink(tone(skin, -0.42)),
                1.0,
                0.6,
            )
        seen = skull.facing(0, CHIN + 4)
        if seen is not None and abs(seen) < 75:
            x, y = skull.spot(CHIN + 3.9, seen)
            w = 2.3 * k * cos(radians(seen))
            lip = tone(skin, -0.42) if self.person["gender"] == "man" else (170, 66, 70)
            s.line([(x - w, y - 0.2), (x, y + 0.5), (x + w, y - 0.2)], ink(lip), 1.3, 0.75)
        if self.person["glasses"] == "yes":
            s.names = ("glasses", "face", "head")
            self._glasses()

    def _glasses(self) -> None:
        s, skull, k = self.sketch, self.skull, self.eye.scale
        for sign in (-1, 1):
            seen = skull.facing(sign * 27, CHIN + 11.4)
            if seen is not None:
                x, y = skull.spot(CHIN + 11.2, seen)
                narrow = max(cos(radians(seen)), 0.3)
                s.oval((x, y), 2.9 * k * narrow, 2.2 * k, "#14161a", 0.88)
                s.line([(x - 1.3 * k * narrow, y - 1.0 * k), (x + 0.6 * k * narrow, y - 1.2 * k)], "#fff", 0.8, 0.5)
        bar = [
            skull.spot(CHIN + 12.0, seen)
            for a in (-92, -40, 0, 40, 92)
            if (seen := skull.facing(a, CHIN + 12)) is not None
        ]
        if len(bar) > 1 and self.gaze.near(0, 1) > -0.3:
            s.line(bar, "#14161a", 1.1)

    def _hairline(self) -> Callable[[Number], Number]:
        """Height of the hair's lower edge at an angle from the nose."""
        knots = HAIRLINES[{"ponytail": "tied", "bun": "tied"}.get(self.person["hair"], self.person["hair"])]

        def height(angle: Number) -> Number:
            a = abs(angle)
            for (a0, h0), (a1, h1) in pairwise(knots):
                if a <= a1:
                    t = (a - a0) / (a1 - a0)
                    return CHIN + h0 + t * t * (3 - 2 * t) * (h1 - h0)
            return CHIN + knots[-1][1]

        return height

    def _mane(self) -> Lathe:
        """The hair's own solid: the skull with its thickness, and the fall below the chin."""
        thick = {"short": 0.8, "ponytail": 0.6, "bun": 0.6}.get(self.person["hair"], 1.3)
        rows = [(up + thick, w + thick, d + thick, z - 0.25) for up, w, d, z in self.skull.rows if up > CHIN + 8]
        fall = [
            (CHIN + 4, 8.6, 9.0, -0.9),
            (CHIN - 3, 9.2, 9.0, -1.5),
            (CHIN - 12, 9.4, 8.6, -2.6),
            (CHIN - 21, 8.0, 8.0, -4.0),
        ]
        if self.person["hair"] in ("long", "bob"):
            return Lathe([*rows, *fall], self.gaze)
        return Lathe([*rows, (CHIN + 4, rows[-1][1] - 1.0, rows[-1][2] - 0.6, -0.5), (CHIN, 5.6, 6.6, -1)], self.gaze)

    def _hair(self) -> None:
        """The part of the hair on this side of the head, above its hairline."""
        s, mane, line = self.sketch, self._mane(), self._hairline()
        s.names = ("hair", "head")
        rgb = self._cloth("hair_colour")
        fill = s.round(rgb, mane.spot(CHIN + 14, -90), mane.spot(CHIN + 14, 90), 0.9)
        top = mane.rows[0][0]
        turn = mane.turn(CHIN + 13)
        seen = list(range(-90, 91, 12))
        lower = [mane.spot(line((a - turn + 180) % 360 - 180), a) for a in seen]
        ends = [line((a - turn + 180) % 360 - 180) for a in (-90, 90)]
        s.fill([lower, mane.edge(top, ends[1], 90)[::-1], mane.edge(top, ends[0], -90)], fill)
        for a in (-62, -34, -8, 20, 48):
            low = line((a - turn + 180) % 360 - 180)
            points = [mane.spot(top - 1.5, a * 0.4), mane.spot((top + low) / 2 + 2, a * 0.9), mane.spot(low + 0.8, a)]
            s.line(points, *(("#fff", 1.2, 0.12) if a * s.light > 0 else ("#000", 1.1, 0.25)))

    def _back_hair(self) -> None:
        """Hair that hangs behind the neck and on the shoulders, seen from the front."""
        s, mane = self.sketch, self._mane()
        s.names = ("hair", "head")
        low = CHIN - (14 if self.person["hair"] == "long" else 2)
        rgb = tone(self._cloth("hair_colour"), -0.25)
        s.fill(mane.outline(CHIN + 12, low), s.round(rgb, mane.spot(CHIN, -90), mane.spot(CHIN, 90)))

    def _tail(self) -> None:
        s, k = self.sketch, self.eye.scale
        s.names = ("hair", "head")
        rgb = self._cloth("hair_colour")
        sway = float(self.rng.uniform(-2.5, 2.5))
        chain = [
            self.gaze.at(x, CHIN + up, z)
            for x, up, z in (
                (0, 16.5, -9),
                (0, 14.5, -13),
                (sway * 0.4, 6, -14.5),
                (sway, -4, -13.5),
                (sway, -12, -12.5),
            )
        ]
        s.fill(
            limb(chain, [2.0 * k, 3.2 * k, 3.9 * k, 3.3 * k, 0.9 * k], (0.3, 0.6)),
            s.round(rgb, (chain[2][0] - 4 * k, chain[2][1]), (chain[2][0] + 4 * k, chain[2][1])),
        )
        s.line(chain[1:4], "#000", 1.0, 0.25)
        s.oval(chain[0], 1.8 * k, 1.8 * k, ink(self._cloth("hair_colour")))

    def _hat(self) -> None:
        s, skull, kind = self.sketch, self.skull, self.person["hat"]
        k, rgb = self.eye.scale, self._cloth("hat_colour")
        s.names = ("hat", "head")
        grow = {"cap": 1.3, "beanie": 1.7, "brimmed hat": 1.4}[kind]
        low = CHIN + {"cap": 15.6, "beanie": 14.6, "brimmed hat": 16.2}[kind]
        rise = {"cap": 1.2, "beanie": 2.6, "brimmed hat": 2.2}[kind]
        rows = [
            (up + rise * max(up - CHIN - 14, 0) / 9, w + grow, d + grow, z)
            for up, w, d, z in skull.rows
            if up > CHIN + 12
        ]
        dome = Lathe(rows, self.gaze)
        fill = s.round(rgb, dome.spot(low, -90), dome.spot(low, 90))
        brim = 5.0 if kind == "brimmed hat" else 0.0
        if brim:
            ring = [
                self.gaze.at((9.2 + brim) * sin(radians(a)), low + 0.6, (10.6 + brim) * cos(radians(a)))
                for a in range(0, 360, 30)
            ]
            flat = hull([(p, 0.9 * k) for p in ring])
            s.fill([flat], s.round(tone(rgb, -0.16), (min(p[0] for p in flat), 0), (max(p[0] for p in flat), 0)))
        peak = [
            self.gaze.at((w) * sin(radians(a)), low + 1.0, 9.6 * cos(radians(a)) + 8.0 * max(cos(radians(a)), 0))
            for a in range(-80, 81, 20)
            for w in (8.4,)
        ]
        shade = [
            self.gaze.at(7.6 * sin(radians(a)), low - 1.0, 9.0 * cos(radians(a)) + 7.0 * max(cos(radians(a)), 0))
            for a in range(-70, 71, 20)
        ]
        before = self.gaze.near(0, 1) > -0.15
        if kind == "cap" and not before:
            s.fill([hull([(p, 0.8 * k) for p in peak])], ink(tone(rgb, -0.25)))
        s.fill(dome.outline(rows[0][0], low), fill)
        if kind == "cap":
            s.line([dome.spot(rows[0][0] - 1, 0), dome.spot(low + 4, 20), dome.spot(low, 24)], "#000", 0.9, 0.25)
            if before:
                s.fill(
                    [hull([(p, 0.9 * k) for p in [*peak, *shade]])],
                    s.round(tone(rgb, -0.2), dome.spot(low, -90), dome.spot(low, 90)),
                )
        elif kind == "beanie":
            cuff = [
                [dome.spot(low + 4.5, a) for a in (-90, -45, 0, 45, 90)],
                [dome.spot(low - 0.4, a) for a in (90, 45, 0, -45, -90)],
            ]
            s.fill(cuff, s.round(tone(rgb, -0.14), dome.spot(low, -90), dome.spot(low, 90)))
            for a in (-60, -36, -12, 12, 36, 60):
                s.line([dome.spot(low + 4.3, a), dome.spot(low - 0.2, a)], "#000", 0.8, 0.25)
        else:
            band = [
                [dome.spot(low + 3.2, a) for a in (-90, -45, 0, 45, 90)],
                [dome.spot(low + 0.4, a) for a in (90, 45, 0, -45, -90)],
            ]
            s.fill(band, ink(tone(rgb, -0.55)))
            if brim and self.eye.pitch > 0:
                front = [
                    p
                    for p, a in zip(ring, range(0, 360, 30), strict=True)
                    if self.gaze.near(sin(radians(a)), cos(radians(a))) > -0.1
                ]
                s.fill(
                    [
                        hull(
                            [
                                *((p, 0.9 * k) for p in front),
                                *((dome.spot(low + 0.6, a), 0.5) for a in (-80, -40, 0, 40, 80)),
                            ]
                        )
                    ],
                    s.round(tone(rgb, -0.05), (min(p[0] for p in flat), 0), (max(p[0] for p in flat), 0)),
                )


# the place and the camera


@dataclass(frozen=True)
class Place:
    """How a domain looks: where it happens, the light, what the camera does to a photo."""

    scenes: tuple[str, ...]
    tint: tuple[Number, Number, Number]  # mean gain of red, green, blue
    light: tuple[Number, Number]  # range of the exposure
    blur: Number  # largest radius, pixels
    noise: tuple[Number, Number]  # range of the standard deviation, of 255
    pitch: tuple[Number, Number]  # how far the camera looks down


PLACES = {
    "general": Place(
        ("street", "plaza", "campus", "hall", "shops"), (1.0, 1.0, 1.0), (0.82, 1.12), 0.9, (1, 6), (0.02, 0.2)
    ),
    "street": Place(("street", "shops", "plaza"), (1.02, 1.0, 0.97), (0.86, 1.1), 0.8, (1, 5), (0.04, 0.16)),
    "night": Place(("night",), (0.98, 0.96, 1.04), (0.66, 0.88), 1.0, (4, 9), (0.06, 0.2)),
    "campus": Place(("campus", "hall"), (0.99, 1.02, 1.0), (0.92, 1.16), 0.7, (1, 4), (0.0, 0.12)),
}
YAWS = {"front": (0,), "back": (180,), "side": (90, -90)}


def photograph(person: dict, view: str, domain: str, rng: np.random.Generator) -> tuple[Image.Image, dict, list[str]]:
    """The photo, the pixel box of each thing on it, and the names of those that are mostly out of sight."""
    place = PLACES[domain]
    yaw = YAWS[view][int(rng.integers(len(YAWS[view])))] + float(rng.uniform(-30, 30)) * (0.7 if view == "side" else 1)
    tall = float(rng.uniform(312, 348)) * (0.9 if person["carried"] == "open umbrella" else 1.0)
    x, feet = 64 + float(rng.uniform(-7, 7)), float(rng.uniform(360, 374))
    eye = Eye(
        radians(yaw), float(rng.uniform(*place.pitch)), tall / 176, x, feet, radians(float(rng.uniform(-1.6, 1.6)))
    )
    light = 1.0 if rng.random() < 0.5 else -1.0
    sketch = Sketch(light)
    if rng.random() < 0.1:
        _bystander(sketch, person, eye, rng, behind=True)
    Figure(sketch, person, eye, rng).draw()
    sketch.names = ("occluder",)
    if rng.random() < 0.22:
        kinds = (_bicycle, _pole, _bollard, _leaves)
        kinds[int(rng.integers(len(kinds)))](sketch, rng)
    elif rng.random() < 0.05:
        _bystander(sketch, person, eye, rng, behind=False)
    backdrop = _render(scene(place.scenes[int(rng.integers(len(place.scenes)))], light, rng).svg(0.5))
    backdrop = backdrop.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    front = _render(sketch.svg())
    backdrop.paste(front, mask=front.getchannel("A"))
    image = _camera(backdrop, place, light, rng)
    return image, *_in_sight(sketch.boxes)


def _render(svg: str) -> Image.Image:
    """RGBA image of an SVG."""
    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))).convert("RGBA")


def _in_sight(boxes: dict[str, list[Number]]) -> tuple[dict[str, list[int]], list[str]]:
    """Boxes in whole pixels inside the photo, and the names of what is hidden by more than half."""
    found, hidden = {}, []
    occluder = boxes.pop("occluder", None)
    for name, (x0, y0, x1, y1) in boxes.items():
        left, top, right, low = max(x0, 0), max(y0, 0), min(x1, WIDTH), min(y1, HEIGHT)
        area, seen = max((x1 - x0) * (y1 - y0), 1e-6), max(right - left, 0) * max(low - top, 0)
        if occluder:
            seen -= max(min(right, occluder[2]) - max(left, occluder[0]), 0) * max(
                min(low, occluder[3]) - max(top, occluder[1]), 0
            )
        if seen < 0.5 * area:
            hidden.append(name)
        if right - left >= 1 and low - top >= 1:
            found[name] = [int(left), int(top), min(int(right) + 1, WIDTH), min(int(low) + 1, HEIGHT)]
    return found, hidden


def _bystander(sketch: Sketch, person: dict, eye: Eye, rng: np.random.Generator, behind: bool) -> None:
    """Somebody else, far behind or cut by the photo's edge; has no boxes."""
    pick = list(COLOURS.values())
    shades = {name: tone(pick[int(rng.integers(len(pick)))], -0.25) for name in person["shades"]}
    shades["hair_colour"] = (60, 46, 36)
    other = person | {
        "shades": shades,
        "bag": "none",
        "hat": "none",
        "carried": "nothing",
        "pattern": "plain",
        "hair": "short",
    }
    other |= {
        "upper": "jacket",
        "lower": "trousers",
        "gender": "man",
        "shoes": "leather shoes",
        "tights": None,
        "inner_colour": "grey",
    }
    side = 1 if rng.random() < 0.5 else -1
    share = float(rng.uniform(0.42, 0.6)) if behind else 1.02
    x = eye.x + side * (float(rng.uniform(34, 56)) if behind else float(rng.uniform(72, 84)))
    feet = eye.y - (1 - share) * 240 * (eye.pitch + 0.3) if behind else eye.y + 6
    mine, sketch.boxes = sketch.boxes, {}
    Figure(sketch, other, Eye(radians(float(rng.uniform(0, 360))), eye.pitch, eye.scale * share, x, feet), rng).draw()
    sketch.boxes = mine


def _pole(sketch: Sketch, rng: np.random.Generator) -> None:
    x, w = float(rng.choice([rng.uniform(2, 26), rng.uniform(102, 126)])), float(rng.uniform(3, 5))
    fill = sketch.round((96, 100, 104), (x - w, 0), (x + w, 0))
    sketch.fill([[(x - w, -2), (x + w, -2)], [(x + w, 386), (x - w, 386)]], fill)


def _bollard(sketch: Sketch, rng: np.random.Generator) -> None:
    x, w, top = float(rng.uniform(18, 110)), float(rng.uniform(7, 10)), float(rng.uniform(296, 325))
    rgb = ((70, 74, 80), (150, 146, 138), (178, 60, 44))[int(rng.integers(3))]
    fill = sketch.round(rgb, (x - w, 0), (x + w, 0))
    sketch.fill([[(x - w, top + 5), (x, top - 2), (x + w, top + 5)], [(x + w, 390), (x - w, 390)]], fill)
    sketch.fill([[(x - w, top + 14), (x + w, top + 14)], [(x + w, top + 22), (x - w, top + 22)]], "#e8e6dc", 0.85)


def _bicycle(sketch: Sketch, rng: np.random.Generator) -> None:
    """A bicycle parked before the legs: thin enough to see through."""
    x, y, r = float(rng.uniform(-14, 60)), float(rng.uniform(342, 352)), 27.0
    paint = ink(((170, 36, 36), (30, 60, 120), (36, 38, 42), (60, 130, 90))[int(rng.integers(4))])
    a, b = (x, y), (x + 74, y)
    for cx, cy in (a, b):
        sketch.shapes.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{r}" fill="none" stroke="#1b1b1d" stroke-width="3"/>'
        )
        for i in range(4):
            dx, dy = (r - 1) * cos(i * 0.785), (r - 1) * sin(i * 0.785)
            sketch.line([(cx - dx, cy - dy), (cx + dx, cy + dy)], "#888", 0.6, 0.6)
    saddle, crank, head = (x + 24, y - 40), (x + 32, y + 2), (x + 62, y - 42)
    for p, q in ((a, crank), (a, saddle), (crank, saddle), (crank, head), (saddle, head), (b, head)):
        sketch.line([p, q], paint, 2.8)
    sketch.line([(saddle[0] - 7, saddle[1] - 4), (saddle[0] + 6, saddle[1] - 4)], "#1b1b1d", 4)
    sketch.line([head, (head[0] - 2, head[1] - 9), (head[0] + 9, head[1] - 12)], "#2a2a2c", 2.6)


def _leaves(sketch: Sketch, rng: np.random.Generator) -> None:
    """Foliage that hangs into a corner."""
    side = 1 if rng.random() < 0.5 else 0
    for _ in range(16):
        x, y = side * 128 + (1 - 2 * side) * float(rng.uniform(-6, 24)), float(rng.uniform(268, 392))
        g = float(rng.uniform(0.6, 1.1))
        sketch.oval((x, y), float(rng.uniform(4, 8)), float(rng.uniform(3, 6)), ink((44 * g, 92 * g, 40 * g)))


def scene(kind: str, light: Number, rng: np.random.Generator) -> Sketch:
    """What is behind the person: ground in perspective, walls, windows, trees, cars."""
    s = Sketch(light)
    horizon = float(rng.uniform(150, 235))
    {"street": _street, "shops": _shops, "plaza": _plaza, "campus": _campus, "hall": _hall, "night": _night}[kind](
        s, horizon, rng
    )
    return s


def _rect(s: Sketch, x: Number, y: Number, w: Number, h: Number, rgb: Sequence[Number], alpha: Number = 1.0) -> None:
    opacity = "" if alpha == 1 else f' fill-opacity="{alpha:.2f}"'
    s.shapes.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{ink(rgb)}"{opacity}/>')


def _fade(s: Sketch, y: Number, h: Number, a: Sequence[Number], b: Sequence[Number]) -> None:
    """A band over the whole width that goes from colour a (above) to b."""
    s.gradients.append(
        f'<linearGradient id="g{len(s.gradients)}" x1="0" y1="0" x2="0" y2="1"><stop offset="0" stop-color="{ink(a)}"/>'
        f'<stop offset="1" stop-color="{ink(b)}"/></linearGradient>'
    )
    s.shapes.append(f'<rect x="-5" y="{y:.1f}" width="140" height="{h:.1f}" fill="url(#g{len(s.gradients) - 1})"/>')


def _pick(rng: np.random.Generator, choices: Sequence):
    return choices[int(rng.integers(len(choices)))]


def _ground(s: Sketch, horizon: Number, rgb: Sequence[Number], rng: np.random.Generator, joints: bool = True) -> None:
    """Ground from the horizon down, its slabs drawn to a vanishing point."""
    _fade(s, horizon, HEIGHT - horizon + 2, tone(rgb, -0.12), tone(rgb, 0.08))
    if not joints:
        return
    centre = float(rng.uniform(-30, 160))
    step = float(rng.uniform(34, 60))
    for i in range(-6, 8):
        x = centre + i * step * 3
        s.line([(centre + (x - centre) * 0.12, horizon), (x, 390)], ink(tone(rgb, -0.3)), 1.1, 0.5)
    y, gap = horizon + 5, float(rng.uniform(6, 9))
    while y < 390:
        s.line([(-3, y), (131, y)], ink(tone(rgb, -0.3)), 1.1, 0.45)
        y, gap = y + gap, gap * 1.45


def _windows(
    s: Sketch,
    low: Number,
    rng: np.random.Generator,
    glass: Sequence[Number],
    frame: Sequence[Number],
    lit: Number = 0.0,
) -> None:
    """Rows of windows down to a height."""
    w, h = float(rng.uniform(18, 30)), float(rng.uniform(34, 52))
    x0, gap = float(rng.uniform(-20, 5)), float(rng.uniform(10, 18))
    y = low - h
    while y > -h:
        x = x0
        while x < 132:
            bright = (238, 206, 132) if rng.random() < lit else tone(glass, float(rng.uniform(-0.3, 0.15)))
            _rect(s, x - 1.5, y - 1.5, w + 3, h + 3, frame)
            _rect(s, x, y, w, h, bright)
            s.line([(x + w / 2, y), (x + w / 2, y + h)], ink(frame), 1.4)
            x += w + gap
        y -= h + gap * 1.3


def _street(s: Sketch, horizon: Number, rng: np.random.Generator) -> None:
    wall = _pick(rng, ((196, 178, 152), (168, 112, 92), (176, 180, 184), (214, 206, 190), (142, 132, 126)))
    _fade(s, -2, horizon + 4, tone(wall, 0.1), tone(wall, -0.1))
    _windows(s, horizon - float(rng.uniform(26, 60)), rng, (96, 116, 136), tone(wall, 0.35))
    _ground(s, horizon, _pick(rng, ((158, 156, 152), (140, 140, 144), (172, 164, 150))), rng)
    if rng.random() < 0.55:
        _rect(s, -4, horizon, 140, float(rng.uniform(24, 50)), (92, 94, 98))
        _car(s, horizon, rng)
    elif rng.random() < 0.5:
        x = float(rng.uniform(-10, 110))
        _rect(s, x, horizon - 84, 34, 86, tone(wall, -0.5))
        _rect(s, x + 3, horizon - 80, 28, 80, _pick(rng, ((90, 52, 40), (44, 70, 60), (60, 66, 90))))
    if rng.random() < 0.4:
        _tree(s, _pick(rng, (-8, 8, 120, 134)), horizon + 20, rng)


def _car(s: Sketch, horizon: Number, rng: np.random.Generator) -> None:
    rgb, x, y = _pick(rng, list(COLOURS.values())), float(rng.uniform(-90, 70)), horizon + 26
    s.fill(
        [
            [(x, y), (x + 4, y - 22), (x + 30, y - 26)],
            [(x + 46, y - 44), (x + 92, y - 44)],
            [(x + 112, y - 24), (x + 138, y - 20), (x + 142, y)],
        ],
        s.round(rgb, (x + 60, y - 44), (x + 60, y), 0.7),
    )
    s.fill([[(x + 38, y - 26), (x + 50, y - 40), (x + 88, y - 40), (x + 102, y - 26)]], "#3a4650")
    for dx in (28, 112):
        s.oval((x + dx, y), 12, 12, "#1c1c1e")
        s.oval((x + dx, y), 5.5, 5.5, "#9a9da0")


def _tree(s: Sketch, x: Number, foot: Number, rng: np.random.Generator) -> None:
    s.fill(
        [
            [(x - 6, foot), (x - 4, foot - 90), (x - 6, foot - 180)],
            [(x + 6, foot - 180), (x + 4, foot - 90), (x + 7, foot)],
        ],
        s.round((92, 72, 54), (x - 6, foot), (x + 6, foot)),
    )
    green = _pick(rng, ((74, 120, 58), (96, 138, 70), (60, 100, 62), (150, 130, 60)))
    for _ in range(12):
        dx, dy, r = float(rng.uniform(-44, 44)), float(rng.uniform(-90, 24)), float(rng.uniform(14, 28))
        s.oval((x + dx, foot - 170 + dy), r, r * 0.85, ink(tone(green, float(rng.uniform(-0.35, 0.2)))))


def _shops(s: Sketch, horizon: Number, rng: np.random.Generator) -> None:
    wall = _pick(rng, ((70, 66, 64), (150, 60, 50), (60, 84, 100), (196, 190, 176), (52, 80, 66)))
    _fade(s, -2, horizon + 4, tone(wall, 0.05), tone(wall, -0.15))
    sign = float(rng.uniform(20, 60))
    _rect(
        s, -4, sign, 140, 26, _pick(rng, ((176, 40, 44), (34, 66, 120), (230, 224, 208), (40, 110, 80), (222, 170, 60)))
    )
    x = float(rng.uniform(-20, 20))
    for _ in range(7):
        w = float(rng.uniform(4, 12))
        _rect(s, x, sign + 8, w, 10, (245, 242, 232), 0.85)
        x += w + float(rng.uniform(3, 9))
    x = float(rng.uniform(-40, -5))
    while x < 130:
        w = float(rng.uniform(44, 70))
        _rect(s, x, sign + 34, w, horizon - sign - 40, (108, 122, 130))
        for _ in range(5):
            r = float(rng.uniform(5, 12))
            _rect(
                s,
                x + float(rng.uniform(0, w - 10)),
                horizon - 12 - r * 3,
                r,
                r * 3,
                _pick(rng, list(COLOURS.values())),
                0.55,
            )
        s.fill(
            [[(x + w * 0.2, sign + 34), (x + w * 0.5, sign + 34)], [(x + w * 0.3, horizon - 6), (x, horizon - 6)]],
            "#fff",
            0.14,
        )
        x += w + 6
    _ground(s, horizon, _pick(rng, ((170, 162, 152), (150, 150, 154), (184, 172, 156))), rng)


def _plaza(s: Sketch, horizon: Number, rng: np.random.Generator) -> None:
    _fade(s, -2, horizon + 4, (186, 206, 226), (224, 228, 230))
    x = float(rng.uniform(-30, 0))
    while x < 132:
        w, h = float(rng.uniform(26, 60)), float(rng.uniform(60, horizon))
        rgb = _pick(rng, ((150, 156, 166), (186, 176, 162), (128, 140, 152), (172, 150, 136)))
        _rect(s, x, horizon - h, w, h, rgb)
        y = horizon - h + 8
        while y < horizon - 12:
            _rect(s, x + 4, y, w - 8, 5, tone(rgb, -0.35), 0.7)
            y += 13
        x += w
    _ground(s, horizon, _pick(rng, ((186, 180, 170), (164, 166, 168), (196, 184, 164))), rng)


def _campus(s: Sketch, horizon: Number, rng: np.random.Generator) -> None:
    _fade(s, -2, horizon + 4, (150, 192, 232), (220, 232, 238))
    if rng.random() < 0.75:
        brick = _pick(rng, ((164, 92, 70), (178, 122, 92), (206, 196, 180)))
        top = float(rng.uniform(-20, 50))
        _rect(s, -4, top, 140, horizon - top, brick)
        _windows(s, horizon - 22, rng, (116, 144, 168), (236, 232, 222))
    for _ in range(int(rng.integers(1, 3))):
        _tree(s, float(rng.uniform(-10, 138)), horizon + 12, rng)
    green = _pick(rng, ((108, 150, 72), (92, 136, 70), (132, 158, 84)))
    _fade(s, horizon, HEIGHT - horizon + 2, tone(green, -0.1), tone(green, 0.1))
    a, b = float(rng.uniform(10, 90)), float(rng.uniform(10, 90))
    path = _pick(rng, ((196, 188, 174), (170, 168, 166), (206, 186, 160)))
    s.fill([[(a - 6, horizon), (a + 16, horizon)], [(b + 130, 390), (b - 110, 390)]], ink(path))
    for t in (0.1, 0.25, 0.5, 0.8):
        y = horizon + (388 - horizon) * t
        s.line([(a - 6 + (b - 104 - a) * t, y), (a + 16 + (b + 114 - a) * t, y)], ink(tone(path, -0.2)), 1.1, 0.6)


def _hall(s: Sketch, horizon: Number, rng: np.random.Generator) -> None:
    wall = _pick(rng, ((218, 214, 204), (200, 208, 212), (224, 210, 186)))
    _fade(s, -2, horizon + 4, tone(wall, 0.1), tone(wall, -0.08))
    x = float(rng.uniform(-30, 10))
    while x < 130:
        if rng.random() < 0.6:
            rgb = _pick(rng, ((128, 88, 60), (90, 110, 128), (160, 60, 54), (112, 124, 108)))
            _rect(s, x, horizon - 132, 38, 132, tone(rgb, -0.3))
            _rect(s, x + 3, horizon - 128, 32, 128, rgb)
            _rect(s, x + 9, horizon - 116, 18, 40, (196, 214, 222), 0.8)
        else:
            _rect(s, x + 4, horizon - 120, 30, 36, _pick(rng, list(COLOURS.values())), 0.6)
            _rect(s, x + 7, horizon - 117, 24, 12, (245, 245, 240), 0.8)
        x += float(rng.uniform(46, 62))
    _rect(s, -4, horizon - 7, 140, 8, tone(wall, -0.4))
    _ground(s, horizon, _pick(rng, ((190, 180, 164), (168, 172, 174), (150, 130, 108))), rng)
    for _ in range(3):
        s.oval((float(rng.uniform(0, 128)), float(rng.uniform(horizon + 20, 380))), 30, 7, "#fff", 0.12)


def _night(s: Sketch, horizon: Number, rng: np.random.Generator) -> None:
    wall = _pick(rng, ((52, 54, 66), (66, 58, 56), (44, 56, 70)))
    _fade(s, -2, horizon + 4, (26, 30, 48), tone(wall, 0.1))
    _windows(s, horizon - float(rng.uniform(20, 60)), rng, (34, 42, 58), tone(wall, -0.2), lit=0.38)
    _ground(s, horizon, _pick(rng, ((76, 78, 86), (88, 82, 78))), rng)
    for _ in range(int(rng.integers(2, 5))):
        rgb = _pick(rng, ((255, 214, 140), (255, 236, 200), (240, 120, 90), (130, 190, 255), (150, 240, 190)))
        x, y, r = float(rng.uniform(-5, 133)), float(rng.uniform(20, horizon - 10)), float(rng.uniform(14, 40))
        s.gradients.append(
            f'<radialGradient id="g{len(s.gradients)}"><stop offset="0" stop-color="{ink(rgb)}" stop-opacity=".95"/>'
            f'<stop offset=".25" stop-color="{ink(rgb)}" stop-opacity=".5"/>'
            f'<stop offset="1" stop-color="{ink(rgb)}" stop-opacity="0"/></radialGradient>'
        )
        glow = f"url(#g{len(s.gradients) - 1})"
        s.oval((x, y), r, r, glow)
        s.oval((x, 2 * horizon - y + 40), r * 0.6, r * 2.2, glow, 0.4)


def _camera(image: Image.Image, place: Place, light: Number, rng: np.random.Generator) -> Image.Image:
    """Light on the person, tint, exposure, vignette, blur and noise."""
    radius = float(rng.uniform(0, place.blur))
    if radius > 0.35:
        image = image.filter(ImageFilter.GaussianBlur(radius))
    pixels = np.asarray(image, np.float32)
    tint = (
        np.array(place.tint, np.float32)
        * rng.uniform(0.94, 1.06, 3).astype(np.float32)
        * np.float32(rng.uniform(*place.light))
    )
    across = (
        1 + np.float32(rng.uniform(0, 0.14)) * np.linspace(-light, light, WIDTH, dtype=np.float32)[None, :, None] * -1
    )
    down = np.linspace(1.04, 0.94, HEIGHT, dtype=np.float32)[:, None, None]
    contrast, grey = np.float32(rng.uniform(0.86, 1.06)), np.float32(rng.uniform(0.0, 0.22))
    pixels = pixels * (across * down * tint)
    pixels = (pixels - 118) * contrast + 118
    pixels += (pixels.mean(2, keepdims=True) - pixels) * grey
    grain = rng.standard_normal((HEIGHT, WIDTH, 1), dtype=np.float32) * np.float32(rng.uniform(*place.noise))
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
