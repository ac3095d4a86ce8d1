"""Solids and joints in cm in front of a camera → shapes of an SVG, each with its shading and its pixel box."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import atan2, cos, degrees, hypot, radians, sin

HEIGHT, WIDTH = 384, 128  # of a drawing, in its own units; a photo is drawn at any size of this shape
Number = int | float
Point = tuple[Number, Number]
Colour = Sequence[Number]  # red, green, blue, up to 255
Runs = Sequence[Sequence[Point]]
ROUND = range(-90, 91, 30)  # angles of the points of a line around a solid, degrees
RIM = [(cos(i * 0.6283), sin(i * 0.6283)) for i in range(10)]  # points around a disc of radius 1


@dataclass(frozen=True)
class Eye:
    """The camera's geometry: the body's yaw, how far the camera looks down, pixels per cm, ground point, roll."""

    yaw: Number
    pitch: Number
    scale: Number
    x: Number
    y: Number
    roll: Number = 0.0

    def see(self, right: Number, up: Number, near: Number) -> Point:
        """Pixel of a point given in the camera's own axes, in cm; the roll is small."""
        across, above = self.scale * right, self.scale * (up - self.pitch * near)
        return self.x + across + above * self.roll, self.y - above + across * self.roll

    def at(self, side: Number, up: Number, ahead: Number) -> Point:
        """Pixel of a point given in the body's axes: to its left, up, forward, in cm."""
        return self.see(side * cos(self.yaw) + ahead * sin(self.yaw), up, self.near(side, ahead))

    def near(self, side: Number, ahead: Number) -> Number:
        """The point's coordinate towards the camera, in cm."""
        return ahead * cos(self.yaw) - side * sin(self.yaw)


@dataclass(frozen=True)
class Lathe:
    """A solid of elliptic sections around the body's vertical axis: trunk, skirt, head, hair and hat.

    `rows` are (height, half width, half depth, centre forward) in cm, the top row first. Angles on the body go from
    straight ahead (0) to its left (90); angles as seen go from the left outline (-90) to the right outline (90).
    """

    rows: Sequence[Sequence[Number]]
    eye: Eye

    def section(self, up: Number) -> Sequence[Number]:
        """Half width, half depth and forward centre at a height."""
        for above, below in pairwise(self.rows):
            if up >= below[0]:
                t = max((above[0] - up) / (above[0] - below[0]), 0)
                return [a + t * (b - a) for a, b in zip(above[1:], below[1:], strict=True)]
        return self.rows[-1][1:]

    def turn(self, up: Number) -> Number:
        """Degrees to add to an angle on the body to get the angle as seen."""
        width, depth, _ = self.section(up)
        return degrees(atan2(depth * sin(self.eye.yaw), width * cos(self.eye.yaw)))

    def spot(self, up: Number, seen: Number) -> Point:
        """Pixel of the surface at a height and an angle as seen."""
        return self.ring(up, (seen,))[0]

    def ring(self, up: Number, seen: Iterable[Number] = ROUND) -> list[Point]:
        """Pixels around the near side at a height, for angles as seen."""
        width, depth, centre = self.section(up)
        c, s = cos(self.eye.yaw), sin(self.eye.yaw)
        across, away = hypot(width * c, depth * s), hypot(width * s, depth * c)
        right, near = centre * s, centre * c
        turns = [radians(a) for a in seen]
        return [self.eye.see(across * sin(a) + right, up, away * cos(a) + near) for a in turns]

    def facing(self, angle: Number, up: Number, within: Number = 88) -> Number | None:
        """The angle as seen for an angle on the body, or None if it faces away from the camera."""
        seen = (angle + self.turn(up) + 180) % 360 - 180
        return seen if abs(seen) < within else None

    def edge(self, top: Number, bottom: Number, seen: Number) -> list[Point]:
        """Points down the surface at an angle as seen."""
        ups = [top, *(row[0] for row in self.rows if bottom < row[0] < top), bottom]
        return [self.spot(up, seen) for up in ups]

    def outline(self, top: Number, bottom: Number) -> Runs:
        """Runs of the closed outline: down the left, along the hem, up the right."""
        return [self.edge(top, bottom, -90), self.ring(bottom), self.edge(top, bottom, 90)[::-1]]

    def band(self, top: Number, bottom: Number) -> Runs:
        """Runs of the outline of a horizontal band around the near side."""
        return [self.ring(top), self.ring(bottom)[::-1]]

    def panels(self, first: Number, last: Number, low: Callable, high: Callable, step: Number = 20) -> list[Runs]:
        """Runs of the visible parts of the surface between two angles on the body and two heights (per angle)."""
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
            found.append([lower, right, upper[::-1], self.edge(high(angles[0]), low(angles[0]), seen[0])])
        return found


def curve(runs: Runs, closed: bool = True) -> str:
    """SVG path through runs of points: smooth inside a run (Catmull-Rom), a corner where two meet."""
    words = []
    for run in runs:
        (bx, by), step = run[0], "L" if words else "M"
        words.append(f"{step}{bx:.1f} {by:.1f}")
        ax, ay, last = bx, by, len(run) - 1
        for i in range(last):
            (cx, cy), (dx, dy) = run[i + 1], run[min(i + 2, last)]
            words.append(
                f"C{bx + (cx - ax) / 6:.1f} {by + (cy - ay) / 6:.1f} {cx - (dx - bx) / 6:.1f} {cy - (dy - by) / 6:.1f} "
                f"{cx:.1f} {cy:.1f}"
            )
            ax, ay, bx, by = bx, by, cx, cy
    return "".join(words) + ("z" if closed else "")


def limb(points: Sequence[Point], radii: Sequence[Number], ends: tuple[Number, Number] = (0, 0)) -> Runs:
    """Runs of the outline of a chain of joints in pixels with a radius at each; ends bulge by a share of the radius."""
    normals = []
    for i in range(len(points)):
        (ax, ay), (bx, by) = points[max(i - 1, 0)], points[min(i + 1, len(points) - 1)]
        size = hypot(bx - ax, by - ay) or 1.0
        normals.append(((by - ay) / size, (ax - bx) / size))
    left = [(x + n[0] * r, y + n[1] * r) for (x, y), n, r in zip(points, normals, radii, strict=True)]
    right = [(x - n[0] * r, y - n[1] * r) for (x, y), n, r in zip(points, normals, radii, strict=True)]
    caps = []
    for i, by in ((0, -ends[0] * radii[0]), (-1, ends[1] * radii[-1])):
        caps.append((points[i][0] - normals[i][1] * by, points[i][1] + normals[i][0] * by))
    return [left, [left[-1], caps[1], right[-1]], right[::-1], [right[0], caps[0], left[0]]]


def along(points: Sequence[Sequence[Number]], t: Number) -> tuple[Number, ...]:
    """The point at fraction t of a chain, in which every segment counts as equally long."""
    at = min(max(t, 0.0), 1.0) * (len(points) - 1)
    i = min(int(at), len(points) - 2)
    return tuple(a + (at - i) * (b - a) for a, b in zip(points[i], points[i + 1], strict=True))


def hull(discs: Iterable[tuple[Point, Number]]) -> list[Point]:
    """Convex outline of discs (centre, radius): Andrew's monotone chain over points on their rims."""
    rim = sorted((x + r * c, y + r * s) for (x, y), r in discs for c, s in RIM)
    found: list[Point] = []
    for points in (rim, rim[::-1]):
        chain: list[Point] = []
        for x, y in points:
            while len(chain) > 1:
                (ax, ay), (bx, by) = chain[-2:]
                if (bx - ax) * (y - ay) > (by - ay) * (x - ax):
                    break
                chain.pop()
            chain.append((x, y))
        found += chain[:-1]
    return found


def tone(rgb: Colour, by: Number) -> tuple[int, ...]:
    """A colour darkened (by < 0) towards a cool black, or lightened towards white."""
    if by < 0:
        return tuple(int(c * (1 + by * k)) for c, k in zip(rgb, (1.0, 0.98, 0.9), strict=True))
    return tuple(int(c + (255 - c) * by) for c in rgb)


def ink(rgb: Colour) -> str:
    """SVG colour."""
    return "#" + "".join(f"{min(max(int(c), 0), 255):02x}" for c in rgb)


@dataclass
class Sketch:
    """An SVG under construction: shapes, gradients, and the pixel box of each named thing."""

    light: Number  # -1: the light comes from the left, 1: from the right
    shapes: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    boxes: dict[str, list[Number]] = field(default_factory=dict)
    names: tuple[str, ...] = ()  # names of the things that the next shapes belong to
    stroke: str = ""  # style of the last shape if it was a line

    def shaded(self, rgb: Colour, a: Point, b: Point, depth: Number = 1.0) -> str:
        """Paint of a rounded thing from pixel a (its left) to pixel b (its right), brighter on the light's side."""
        tones = [(0.0, -0.2), (0.22, 0.1), (0.42, 0.03), (0.72, -0.2), (1.0, -0.52)]
        if self.light > 0:
            tones = [(1 - at, by) for at, by in reversed(tones)]
        stops = "".join(f'<stop offset="{at:.2f}" stop-color="{ink(tone(rgb, by * depth))}"/>' for at, by in tones)
        ends = f'x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}"'
        return self.gradient(
            f'<linearGradient id="{{}}" gradientUnits="userSpaceOnUse" {ends}>{stops}</linearGradient>'
        )

    def across(self, rgb: Colour, solid: Lathe, up: Number, depth: Number = 1.0) -> str:
        """Paint of a solid, shaded from its left outline to its right one."""
        return self.shaded(rgb, solid.spot(up, -90), solid.spot(up, 90), depth)

    def gradient(self, text: str) -> str:
        """Add a gradient from SVG text with {} in place of the id; returns its paint."""
        name = f"g{len(self.gradients)}"
        self.gradients.append(text.format(name))
        return f"url(#{name})"

    def fill(self, runs: Runs, paint: str, alpha: Number = 1.0, boxed: bool = True) -> None:
        """Add a filled shape."""
        self._box([p for run in runs for p in run], boxed)
        opacity = "" if alpha == 1 else f' fill-opacity="{alpha:.2f}"'
        self._add(f'<path fill="{paint}"{opacity} d="{curve(runs)}"/>')

    def polygon(self, points: Sequence[Point], paint: str, alpha: Number = 1.0, boxed: bool = True) -> None:
        """Add a shape with straight sides."""
        self.fill([[p] for p in points], paint, alpha, boxed)

    def block(self, x: Number, spans: Sequence[Point], paint: str, alpha: Number = 1.0, boxed: bool = True) -> None:
        """Add a shape with straight sides that is symmetric about x: (y, half width) from the top down."""
        self.polygon([(x - w, y) for y, w in spans] + [(x + w, y) for y, w in reversed(spans)], paint, alpha, boxed)

    def line(
        self, points: Sequence[Point], paint: str, width: Number, alpha: Number = 1.0, boxed: bool = False
    ) -> None:
        """Add a smooth stroke; neighbours of one style become one shape, which draws faster."""
        self._box(points, boxed)
        style = f'<path fill="none" stroke="{paint}" stroke-width="{width:.1f}" stroke-opacity="{alpha:.2f}" '
        path = curve([points], closed=False)
        if style == self.stroke:
            self.shapes[-1] = f'{self.shapes[-1][:-3]}{path}"/>'
        else:
            self._add(f'{style}stroke-linecap="round" stroke-linejoin="round" d="{path}"/>', style)

    def oval(self, centre: Point, rx: Number, ry: Number, paint: str, alpha: Number = 1.0) -> None:
        """Add an ellipse."""
        x, y = centre
        self._box([(x - rx, y - ry), (x + rx, y + ry)], True)
        opacity = "" if alpha == 1 else f' fill-opacity="{alpha:.2f}"'
        self._add(f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="{rx:.1f}" ry="{ry:.1f}" fill="{paint}"{opacity}/>')

    def _add(self, shape: str, stroke: str = "") -> None:
        self.shapes.append(shape)
        self.stroke = stroke

    def _box(self, points: Sequence[Point], boxed: bool) -> None:
        """Extend the boxes of the current names to include these points."""
        if not (boxed and self.names):
            return
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        new = [min(xs), min(ys), max(xs), max(ys)]
        for name in self.names:
            old = self.boxes.get(name, new)
            self.boxes[name] = [*map(min, old[:2], new[:2]), *map(max, old[2:], new[2:])]

    def svg(self, scale: Number = 1.0) -> str:
        """The drawing as SVG text, of `scale` pixels per unit."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * scale:.0f}" height="{HEIGHT * scale:.0f}"'
        body = f"<defs>{''.join(self.gradients)}</defs>{''.join(self.shapes)}"
        return f'{head} viewBox="0 0 {WIDTH} {HEIGHT}">{body}</svg>'
