"""Random numbers → a drawn place, thing or pattern without people, and words for it, for the pictures of `general`."""

from collections.abc import Callable
from math import cos, sin

import numpy as np

from irra_core.synthetic.pedestrian import COLOURS
from irra_core.synthetic.scenery import Random, _box, _car, _fade, _in, _pick, _tree, scene
from irra_core.synthetic.sketch import HEIGHT, Colour, Number, Sketch, ink, tone

PLACES = {  # place → its names in texts
    "street": ("a street", "city street", "old houses", "street view"),
    "shops": ("shops", "a shop window", "shopping street"),
    "plaza": ("a square", "office buildings", "downtown"),
    "campus": ("a park", "trees and grass", "a building with trees"),
    "hall": ("a corridor", "indoors", "a hallway with doors"),
    "night": ("city lights at night", "night street", "evening in town"),
    "beach": ("the beach", "sea and sand", "a day at the sea"),
    "mountains": ("mountains", "a mountain view", "hills under a blue sky"),
    "room": ("a living room", "home interior", "a room with pictures"),
}
STUDIO = ((245, 245, 245), (228, 222, 214), (210, 220, 230), (240, 220, 224), (60, 62, 66))  # walls without a place
WALLS = ((226, 218, 204), (190, 206, 196), (214, 190, 180), (150, 160, 176))
PATTERNS = {
    "striped": ("striped", "stripes"),
    "checked": ("checked", "plaid"),
    "dotted": ("dotted", "polka-dot", "dots"),
    "plain": ("plain",),
}


def place(kind: str, light: Number, rng: Random) -> Sketch:
    """The drawing of a place in PLACES."""
    own = {"beach": _beach, "mountains": _mountains, "room": _room}
    if kind not in own:
        return scene(kind, light, rng)
    s = Sketch(light)
    own[kind](s, _in(rng, 120, 220), rng)
    return s


def studio(light: Number, rng: Random) -> Sketch:
    """The drawing of a plain wall in a colour."""
    s, rgb = Sketch(light), _pick(rng, (*STUDIO, *COLOURS.values()))
    _fade(s, -2, HEIGHT + 2, tone(rgb, 0.1), tone(rgb, -0.12))
    return s


def _room(s: Sketch, horizon: Number, rng: Random) -> None:
    wall, colours = _pick(rng, WALLS), tuple(COLOURS.values())
    _fade(s, -2, horizon + 2, tone(wall, 0.1), wall)
    for _ in range(int(rng.integers(1, 4))):
        x, y, w = _in(rng, -10, 110), _in(rng, 10, horizon - 60), _in(rng, 16, 40)
        _box(s, x - 2, y - 2, w + 4, w * 1.2 + 4, (70, 60, 50))
        _box(s, x, y, w, w * 1.2, _pick(rng, colours))
    _fade(s, horizon, HEIGHT + 2, (150, 110, 80), (120, 86, 60))
    _box(s, _in(rng, -30, 60), horizon - 30, _in(rng, 40, 90), 60, _pick(rng, colours))


def _beach(s: Sketch, horizon: Number, rng: Random) -> None:
    _fade(s, -2, horizon + 2, (120, 176, 232), (214, 230, 240))
    _fade(s, horizon - 40, horizon + 30, (30, 96, 150), (90, 170, 190))
    _fade(s, horizon + 30, HEIGHT + 2, (236, 214, 170), (220, 190, 140))


def _mountains(s: Sketch, horizon: Number, rng: Random) -> None:
    _fade(s, -2, horizon + 2, (120, 176, 232), (214, 230, 240))
    for _ in range(4):
        x, top, w = _in(rng, -20, 140), _in(rng, 20, horizon - 20), _in(rng, 40, 90)
        s.polygon(
            [(x - w, horizon + 2), (x, top), (x + w, horizon + 2)], ink(tone((110, 116, 126), _in(rng, -0.3, 0.2)))
        )
        snow = top + (horizon - top) * 0.2
        s.polygon([(x - w * 0.2, snow), (x, top), (x + w * 0.2, snow)], "#fff")
    _fade(s, horizon, HEIGHT + 2, (96, 140, 80), (70, 110, 60))


def pattern(rng: Random) -> tuple[Sketch, str]:
    """A cloth that fills the picture, and a text for it."""
    s, (one, two) = Sketch(1.0), (list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:2])
    _box(s, -2, -2, 140, 400, COLOURS[one])
    kind, gap = _pick(rng, tuple(PATTERNS)), _in(rng, 14, 40)
    rows, columns = np.arange(0, 390, gap).tolist(), np.arange(0, 130, gap).tolist()
    if kind in ("striped", "checked"):
        for y in rows:
            _box(s, -2, y, 140, gap / 2, COLOURS[two], 1.0 if kind == "striped" else 0.55)
    if kind == "checked":
        for x in columns:
            _box(s, x, -2, gap / 2, 400, COLOURS[two], 0.55)
    if kind == "dotted":
        for y in rows:
            for x in columns:
                s.oval((x, y), gap / 4, gap / 4, ink(COLOURS[two]))
    if kind == "plain":
        return s, _pick(rng, (one, f"{one} fabric", f"plain {one}", f"{one} background"))
    word = _pick(rng, PATTERNS[kind])
    return s, _pick(rng, (f"{one} and {two} {word}", f"{one} {two} {word} pattern", f"{word} {one} fabric"))


def thing(s: Sketch, rng: Random) -> str:
    """Draw a thing, and return a text for it."""
    kind, colour = _pick(rng, (*THINGS, "tree", "car")), _pick(rng, tuple(COLOURS))
    if kind == "tree":
        _tree(s, 64 + _in(rng, -20, 20), _in(rng, 270, 370), rng)
        return _pick(rng, ("a tree", "green tree", "tree in the park"))
    if kind == "car":
        _car(s, _in(rng, 160, 260), rng)
        return _pick(rng, ("a car", "parked car", "car on the road"))
    THINGS[kind](s, 64 + _in(rng, -20, 20), _in(rng, 160, 260), _in(rng, 24, 56), COLOURS[colour])
    forms = (
        f"{'an' if colour[0] == 'o' else 'a'} {{}} {{}}",
        "{} {}",
        "{} {}",
        "{} {} on sale",
        "{} {}, as new",
        "cute {} {}",
    )
    return _pick(rng, (_pick(rng, forms).format(colour, kind), f"{kind} in {colour}", kind))


# a thing: drawn around (x, y) with about the half size r in a colour


def _shade(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> str:
    return s.shaded(rgb, (x - r, y), (x + r, y))


def _ball(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    s.oval((x, y), r, r, _shade(s, x, y, r, rgb))


def _cup(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    s.line(
        [(x + r * 0.6, y - r * 0.5), (x + r * 1.2, y - r * 0.2), (x + r * 0.6, y + r * 0.4)], ink(tone(rgb, -0.3)), 5
    )
    s.block(x, [(y - r, r * 0.8), (y + r, r * 0.6)], _shade(s, x, y, r, rgb))
    s.oval((x, y - r), r * 0.8, r * 0.2, ink(tone(rgb, -0.4)))


def _slab(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    corners = [(x - r, y - r), (x + r, y - r * 1.1), (x + r, y + r), (x - r, y + r * 1.1)]
    s.polygon(corners, _shade(s, x, y, r, rgb))


def _book(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    _slab(s, x, y, r, rgb)
    s.block(x, [(y - r * 0.5, r * 0.5), (y - r * 0.3, r * 0.5)], "#eee")


def _suitcase(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    for side in (-0.4, 0.4):
        s.line([(x + side * r, y - r), (x + side * r, y - r * 1.6)], "#444", 3)
    s.line([(x - r * 0.4, y - r * 1.6), (x + r * 0.4, y - r * 1.6)], "#444", 4)
    s.block(x, [(y - r, r * 0.8), (y + r * 1.4, r * 0.85)], _shade(s, x, y, r, rgb))


def _bag(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    handle = [(x - r * 0.5, y - r * 0.6), (x, y - r * 1.5), (x + r * 0.5, y - r * 0.6)]
    s.line(handle, ink(tone(rgb, -0.4)), 4)
    s.block(x, [(y - r * 0.6, r * 0.8), (y + r, r)], _shade(s, x, y, r, rgb))


def _umbrella(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    s.line([(x, y - r), (x, y + r * 1.6)], "#333", 3)
    dome = [(x + r * t, y - r * 0.9 * (1 - t * t) ** 0.5) for t in (-1, -0.7, -0.3, 0, 0.3, 0.7, 1)]
    s.fill([dome], _shade(s, x, y, r, rgb))


def _bottle(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    outline = [(y - r * 1.5, r * 0.16), (y - r, r * 0.16), (y - r * 0.7, r * 0.4), (y + r, r * 0.4)]
    s.block(x, outline, _shade(s, x, y, r, rgb))


def _flower(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    s.line([(x, y), (x + r * 0.1, y + r * 2.4)], "#3a7a3c", 5)
    for i in range(6):
        s.oval((x + r * 0.5 * cos(i * 1.05), y + r * 0.5 * sin(i * 1.05)), r * 0.35, r * 0.35, ink(rgb))
    s.oval((x, y), r * 0.3, r * 0.3, "#f0d040")


def _hat(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    s.oval((x, y), r, r * 0.25, ink(tone(rgb, -0.3)))
    s.block(x, [(y - r * 0.7, r * 0.5), (y, r * 0.58)], _shade(s, x, y, r, rgb))


def _shoe(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    s.block(x, [(y + r * 0.3, r), (y + r * 0.45, r)], "#e8e6e0")
    upper = (
        [(x - r, y + r * 0.3), (x - r, y - r * 0.6), (x - r * 0.3, y - r * 0.6)],
        [(x, y - r * 0.1), (x + r, y + r * 0.3)],
    )
    s.fill(upper, _shade(s, x, y, r, rgb))


def _house(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    s.block(x, [(y - r * 0.4, r), (y + r, r)], _shade(s, x, y, r, rgb))
    s.polygon([(x - r * 1.2, y - r * 0.4), (x, y - r * 1.3), (x + r * 1.2, y - r * 0.4)], "#8a3a2c")
    s.block(x, [(y + r * 0.2, r * 0.2), (y + r, r * 0.2)], "#4a3626")
    for side in (-0.6, 0.6):
        s.block(x + side * r, [(y - r * 0.1, r * 0.18), (y + r * 0.3, r * 0.18)], "#b8d4e8")


def _boat(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    s.block(x, [(y + r * 0.5, r * 1.1), (y + r, r * 0.7)], _shade(s, x, y, r, rgb))
    s.line([(x, y + r * 0.5), (x, y - r * 1.6)], "#5a4630", 3)
    s.polygon([(x + 3, y - r * 1.5), (x + 3, y + r * 0.3), (x + r, y + r * 0.3)], "#f4f2ea")


def _chair(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    for side in (-0.7, 0.7):
        s.line([(x + side * r, y), (x + side * r, y + r * 1.3)], ink(tone(rgb, -0.4)), 5)
    s.block(x - r * 0.65, [(y - r * 1.4, r * 0.14), (y, r * 0.14)], ink(tone(rgb, -0.2)))
    s.block(x, [(y - r * 0.15, r * 0.8), (y + r * 0.15, r * 0.8)], _shade(s, x, y, r, rgb))


def _lamp(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    s.line([(x, y), (x, y + r * 1.8)], "#3a3a3c", 4)
    s.block(x, [(y + r * 1.75, r * 0.5), (y + r * 1.9, r * 0.5)], "#3a3a3c")
    s.block(x, [(y - r * 0.9, r * 0.5), (y + r * 0.1, r * 0.9)], _shade(s, x, y, r, rgb))


def _dog(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    paint = _shade(s, x, y, r, rgb)
    for side in (-0.7, -0.4, 0.4, 0.65):
        s.line([(x + side * r, y), (x + side * r, y + r * 0.9)], ink(tone(rgb, -0.25)), 6)
    s.line([(x - r * 0.9, y - r * 0.1), (x - r * 1.3, y - r * 0.7)], ink(tone(rgb, -0.2)), 5)
    s.oval((x, y), r, r * 0.42, paint)
    s.oval((x + r * 0.95, y - r * 0.5), r * 0.4, r * 0.34, paint)
    s.oval((x + r * 0.72, y - r * 0.5), r * 0.13, r * 0.3, ink(tone(rgb, -0.4)))
    s.oval((x + r * 1.05, y - r * 0.58), 2, 2, "#111")


def _cat(s: Sketch, x: Number, y: Number, r: Number, rgb: Colour) -> None:
    paint = _shade(s, x, y, r, rgb)
    s.line(
        [(x + r * 0.5, y + r * 0.9), (x + r * 1.1, y + r * 0.6), (x + r * 1.0, y - r * 0.1)], ink(tone(rgb, -0.2)), 6
    )
    s.oval((x, y + r * 0.4), r * 0.6, r * 0.75, paint)
    for side in (-1, 1):
        ear = [
            (x + side * r * 0.42, y - r * 0.6),
            (x + side * r * 0.38, y - r * 1.2),
            (x + side * r * 0.05, y - r * 0.85),
        ]
        s.polygon(ear, ink(tone(rgb, -0.2)))
    s.oval((x, y - r * 0.5), r * 0.48, r * 0.42, paint)
    for side in (-1, 1):
        s.oval((x + side * r * 0.18, y - r * 0.55), 3, 3, "#c8e070")


THINGS: dict[str, Callable[[Sketch, Number, Number, Number, Colour], None]] = {
    "ball": _ball, "cup": _cup, "box": _slab, "book": _book, "suitcase": _suitcase, "bag": _bag,
    "umbrella": _umbrella, "bottle": _bottle, "flower": _flower, "hat": _hat, "shoe": _shoe, "house": _house,
    "boat": _boat, "chair": _chair, "lamp": _lamp, "dog": _dog, "cat": _cat,
}  # fmt: skip
