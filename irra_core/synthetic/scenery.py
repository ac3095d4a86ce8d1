"""A person, a view and a domain → a photo of any height: place, passers-by, occluders, light and camera."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, radians, sin
from typing import Any

import numpy as np
import resvg_py
from PIL import Image, ImageFilter

from irra_core.synthetic.pedestrian import COLOURS, Figure
from irra_core.synthetic.sketch import HEIGHT, WIDTH, Colour, Eye, Number, Sketch, ink, tone

Random = np.random.Generator


@dataclass(frozen=True)
class Place:
    """The look of a domain: its scenes, its light and the effects of its camera."""

    scenes: tuple[str, ...]
    tint: tuple[Number, Number, Number]  # mean gain of red, green, blue
    light: tuple[Number, Number]  # range of the exposure
    blur: Number  # largest radius, pixels of a photo 384 high
    noise: tuple[Number, Number]  # range of the standard deviation in such a photo, of 255
    pitch: tuple[Number, Number]  # how far the camera looks down


PLACES = {
    "street": Place(("street", "shops", "plaza"), (1.02, 1.0, 0.97), (0.86, 1.1), 0.8, (1, 5), (0.04, 0.16)),
    "night": Place(("night",), (1.0, 0.96, 1.02), (0.7, 0.92), 0.9, (3, 8), (0.06, 0.2)),
    "campus": Place(("campus", "hall"), (0.99, 1.02, 1.0), (0.92, 1.1), 0.7, (1, 4), (0.0, 0.12)),
}
YAWS = {"front": (0,), "back": (180,), "side": (90, -90)}
BRIGHT = tuple(COLOURS.values())


def photograph(
    person: dict[str, Any], view: str, domain: str, rng: Random, height: int = 192
) -> tuple[Image.Image, dict[str, list[int]], list[str]]:
    """The photo, the pixel box of each thing in it, and the names of the things that are mostly hidden.

    The photo is a third as wide as high. Equal random numbers give the same photo in every height, but for its noise.
    """
    place = PLACES[domain]
    yaw = _pick(rng, YAWS[view]) + _in(rng, -30, 30) * (0.7 if view == "side" else 1)
    tall = _in(rng, 316, 350) * person["stature"] * (0.9 if person["carried"] == "open umbrella" else 1.0)
    x, feet, roll = 64 + _in(rng, -7, 7), _in(rng, 360, 374), radians(_in(rng, -1.6, 1.6))
    eye = Eye(radians(yaw), _in(rng, *place.pitch), tall / 176, x, feet, roll)
    sketch = Sketch(_pick(rng, (-1.0, 1.0)))
    backdrop = scene(_pick(rng, place.scenes), sketch.light, rng)
    if rng.random() < 0.12:
        _passer_by(sketch, backdrop, person, eye, rng, far=True)
    Figure(sketch, backdrop, person, eye, rng).draw()
    sketch.names = ("occluder",)
    if rng.random() < 0.2:
        _pick(rng, (_bicycle, _pole, _bollard, _leaves))(sketch, rng)
    elif rng.random() < 0.05:
        _passer_by(sketch, backdrop, person, eye, rng, far=False)
    scale = height / HEIGHT
    front = _render(sketch.svg(scale))
    image = _render(backdrop.svg(0.375 * scale)).convert("RGB").resize(front.size, Image.Resampling.BICUBIC)
    image.paste(front, mask=front)
    return _camera(image, place, sketch.light, rng), *_in_sight(sketch.boxes, scale)


def _pick(rng: Random, choices: Sequence) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _in(rng: Random, low: Number, high: Number) -> float:
    return low + (high - low) * float(rng.random())


def _render(svg: str) -> Image.Image:
    """RGBA image of an SVG."""
    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))).convert("RGBA")


def _in_sight(boxes: dict[str, list[Number]], scale: Number = 1.0) -> tuple[dict[str, list[int]], list[str]]:
    """Boxes in whole pixels of a photo of that scale, and the names of the things of which more than half is hidden."""
    found, hidden = {}, []
    ox0, oy0, ox1, oy1 = boxes.pop("occluder", (0, 0, 0, 0))
    for name, (x0, y0, x1, y1) in boxes.items():
        left, top, right, low = max(x0, 0), max(y0, 0), min(x1, WIDTH), min(y1, HEIGHT)
        seen = max(right - left, 0) * max(low - top, 0)
        seen -= max(min(right, ox1) - max(left, ox0), 0) * max(min(low, oy1) - max(top, oy0), 0)
        if seen < 0.5 * (x1 - x0) * (y1 - y0):
            hidden.append(name)
        if right - left >= 1 and low - top >= 1:
            corner = min(int(right * scale) + 1, round(WIDTH * scale)), min(int(low * scale) + 1, round(HEIGHT * scale))
            found[name] = [int(left * scale), int(top * scale), *corner]
    return found, hidden


def _camera(image: Image.Image, place: Place, light: Number, rng: Random) -> Image.Image:
    """The image with blur, tint, exposure, contrast, faded colours, light from one side and noise.

    Blur and noise are those of a photo 384 high that was scaled to this image's size.
    """
    scale, radius = image.height / HEIGHT, _in(rng, 0, place.blur)
    if radius > 0.35:
        image = image.filter(ImageFilter.BoxBlur(radius * scale))
    contrast, grey, exposure = _in(rng, 0.92, 1.06), _in(rng, 0.0, 0.12), _in(rng, *place.light)
    rows = []
    for i, tint in enumerate(place.tint):
        gain = tint * _in(rng, 0.96, 1.04) * exposure * contrast
        rows += [gain * (grey / 3 + (1 - grey) * (i == j)) for j in range(3)] + [118 * (1 - contrast)]
    pixels = np.asarray(image.convert("RGB", rows), np.float32)
    across = 1 - np.linspace(-light, light, image.width, dtype=np.float32) * np.float32(-_in(rng, 0, 0.12))
    down = np.linspace(1.04, 0.95, image.height, dtype=np.float32)
    deviation = np.float32(_in(rng, *place.noise) * scale)
    grain = rng.standard_normal(pixels.shape[:2], dtype=np.float32) * deviation
    pixels = pixels * (down[:, None] * across)[..., None] + grain[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))


# occluders and passers-by


def _passer_by(sketch: Sketch, ground: Sketch, person: dict, eye: Eye, rng: Random, far: bool) -> None:
    """Draw another person, far behind or cut by the photo's edge, without boxes."""
    other = person | {"shades": {name: tone(_pick(rng, BRIGHT), -0.25) for name in person["shades"]}}
    other |= {"gender": "man", "hair": "short", "hat": "none", "glasses": "no", "bag": "none", "carried": "nothing"}
    other |= {"upper": "jacket", "worn": "closed", "pattern": "plain", "lower": "trousers", "shoes": "leather shoes"}
    other["shades"]["hair_colour"] = (60, 46, 36)
    share = _in(rng, 0.42, 0.6) if far else 1.02
    x = eye.x + _pick(rng, (-1, 1)) * (_in(rng, 34, 56) if far else _in(rng, 74, 84))
    feet = eye.y - (1 - share) * 240 * (eye.pitch + 0.3) if far else eye.y + 6
    mine, sketch.boxes = sketch.boxes, {}
    Figure(sketch, ground, other, Eye(radians(_in(rng, 0, 360)), eye.pitch, eye.scale * share, x, feet), rng).draw()
    sketch.boxes = mine


def _pole(s: Sketch, rng: Random) -> None:
    x, w = _pick(rng, (_in(rng, 2, 24), _in(rng, 104, 126))), _in(rng, 3, 5)
    s.block(x, [(-2, w), (HEIGHT + 2, w)], s.shaded((96, 100, 104), (x - w, 0), (x + w, 0)))


def _bollard(s: Sketch, rng: Random) -> None:
    x, w, top = _in(rng, 18, 110), _in(rng, 7, 10), _in(rng, 300, 328)
    paint = s.shaded(_pick(rng, ((70, 74, 80), (150, 146, 138), (178, 60, 44))), (x - w, 0), (x + w, 0))
    s.fill([[(x - w, top + 5), (x, top - 2), (x + w, top + 5)], [(x + w, 390), (x - w, 390)]], paint)
    s.block(x, [(top + 14, w), (top + 22, w)], "#e8e6dc", 0.85)


def _bicycle(s: Sketch, rng: Random) -> None:
    """Draw a bicycle parked in front of the legs; its thin lines hide little."""
    x, y, r = _in(rng, -14, 60), _in(rng, 342, 352), 27
    paint = ink(_pick(rng, ((170, 36, 36), (30, 60, 120), (36, 38, 42), (60, 130, 90))))
    hubs = (x, y), (x + 74, y)
    for cx, cy in hubs:
        s.line([(cx + r * cos(i * 0.5236), cy + r * sin(i * 0.5236)) for i in range(13)], "#1b1b1d", 3)
    for cx, cy in hubs:
        for i in range(4):
            dx, dy = r * cos(i * 0.785), r * sin(i * 0.785)
            s.line([(cx - dx, cy - dy), (cx + dx, cy + dy)], "#888", 0.6, 0.6)
    saddle, crank, head = (x + 24, y - 40), (x + 32, y + 2), (x + 62, y - 42)
    pairs = ((hubs[0], crank), (hubs[0], saddle), (crank, saddle), (crank, head), (saddle, head), (hubs[1], head))
    for a, b in pairs:
        s.line([a, b], paint, 2.8)
    s.line([(saddle[0] - 7, saddle[1] - 4), (saddle[0] + 6, saddle[1] - 4)], "#1b1b1d", 4)
    s.line([head, (head[0] - 2, head[1] - 9), (head[0] + 9, head[1] - 12)], "#2a2a2c", 2.6)


def _leaves(s: Sketch, rng: Random) -> None:
    """Draw a bush in a lower corner."""
    side = _pick(rng, (-1, 1))
    for depth in (0.62, 0.8, 1.0):
        for _ in range(7):
            x, y = 64 + side * _in(rng, 44, 70), _in(rng, 300, 386) + 30 * (1 - depth)
            s.oval((x, y), _in(rng, 6, 11), _in(rng, 5, 8), ink(tone((66, 122, 56), depth - 1)))


# backgrounds


def scene(kind: str, light: Number, rng: Random) -> Sketch:
    """The background: ground in perspective, walls, windows, trees, cars."""
    s = Sketch(light)
    SCENES[kind](s, _in(rng, 150, 235), rng)
    return s


def _box(s: Sketch, x: Number, y: Number, w: Number, h: Number, rgb: Colour, alpha: Number = 1.0) -> None:
    s.polygon([(x, y), (x + w, y), (x + w, y + h), (x, y + h)], ink(rgb), alpha)


def _fade(s: Sketch, y: Number, low: Number, a: Colour, b: Colour) -> None:
    """Draw a band over the whole width with a gradient from colour a (top) to b (bottom)."""
    stops = f'<stop offset="0" stop-color="{ink(a)}"/><stop offset="1" stop-color="{ink(b)}"/>'
    paint = s.gradient(f'<linearGradient id="{{}}" x1="0" y1="0" x2="0" y2="1">{stops}</linearGradient>')
    s.block(64, [(y, 70), (low, 70)], paint)


def _ground(s: Sketch, horizon: Number, rgb: Colour, rng: Random) -> None:
    """Draw the slabs of the ground below the horizon, with a vanishing point."""
    _fade(s, horizon, HEIGHT + 2, tone(rgb, -0.12), tone(rgb, 0.08))
    centre, step = _in(rng, -30, 160), _in(rng, 100, 180)
    for i in range(-5, 6):
        s.line([(centre + i * step * 0.12, horizon), (centre + i * step, 390)], ink(tone(rgb, -0.3)), 1.1, 0.45)
    y, gap = horizon + 5, _in(rng, 6, 9)
    while y < 390:
        s.line([(-3, y), (131, y)], ink(tone(rgb, -0.3)), 1.1, 0.45)
        y, gap = y + gap, gap * 1.45


def _windows(s: Sketch, low: Number, rng: Random, glass: Colour, frame: Colour, lit: Number = 0.0) -> None:
    """Draw rows of windows, the lowest ending at y = low."""
    w, h, gap, x0 = _in(rng, 18, 30), _in(rng, 34, 52), _in(rng, 10, 18), _in(rng, -20, 5)
    y = low - h
    while y > -h:
        for x in np.arange(x0, 132, w + gap).tolist():
            bright = (238, 206, 132) if rng.random() < lit else tone(glass, _in(rng, -0.3, 0.15))
            _box(s, x - 1.5, y - 1.5, w + 3, h + 3, frame)
            _box(s, x, y, w / 2 - 0.7, h, bright)
            _box(s, x + w / 2 + 0.7, y, w / 2 - 0.7, h, bright)
        y -= h + gap * 1.3


def _street(s: Sketch, horizon: Number, rng: Random) -> None:
    wall = _pick(rng, ((196, 178, 152), (168, 112, 92), (176, 180, 184), (214, 206, 190), (142, 132, 126)))
    _fade(s, -2, horizon + 2, tone(wall, 0.1), tone(wall, -0.1))
    _windows(s, horizon - _in(rng, 26, 60), rng, (96, 116, 136), tone(wall, 0.35))
    _ground(s, horizon, _pick(rng, ((158, 156, 152), (140, 140, 144), (172, 164, 150))), rng)
    if rng.random() < 0.5:
        _box(s, -4, horizon, 140, _in(rng, 28, 50), (92, 94, 98))
        _car(s, horizon, rng)
    elif rng.random() < 0.5:
        x = _in(rng, -10, 110)
        _box(s, x, horizon - 84, 34, 85, tone(wall, -0.5))
        _box(s, x + 3, horizon - 80, 28, 80, _pick(rng, ((90, 52, 40), (44, 70, 60), (60, 66, 90))))
    if rng.random() < 0.35:
        _tree(s, _pick(rng, (-8, 8, 120, 134)), horizon + 20, rng)


def _car(s: Sketch, horizon: Number, rng: Random) -> None:
    x, y = _in(rng, -90, 70), horizon + 26
    lower = [(x, y), (x + 4, y - 22), (x + 30, y - 26)], [(x + 46, y - 44), (x + 92, y - 44)]
    paint = s.shaded(tone(_pick(rng, BRIGHT), -0.1), (x + 60, y - 44), (x + 60, y), 0.7)
    s.fill([*lower, [(x + 112, y - 24), (x + 138, y - 20), (x + 142, y)]], paint)
    s.polygon([(x + 38, y - 26), (x + 50, y - 40), (x + 88, y - 40), (x + 102, y - 26)], "#3a4650")
    for dx in (28, 112):
        s.oval((x + dx, y), 12, 12, "#1c1c1e")
        s.oval((x + dx, y), 5.5, 5.5, "#9a9da0")


def _tree(s: Sketch, x: Number, foot: Number, rng: Random) -> None:
    trunk = [(x - 6, foot), (x - 4, foot - 90), (x - 6, foot - 180)], [(x + 6, foot - 180), (x + 4, foot - 90)]
    s.fill([*trunk, [(x + 7, foot)]], s.shaded((92, 72, 54), (x - 6, foot), (x + 6, foot)))
    green = _pick(rng, ((74, 120, 58), (96, 138, 70), (60, 100, 62), (150, 130, 60)))
    for depth in (-0.4, -0.4, -0.4, -0.2, -0.2, -0.2, 0.0, 0.0, 0.0, 0.0, 0.15, 0.15):
        r = _in(rng, 14, 28) * (0.7 if depth > 0 else 1)
        s.oval((x + _in(rng, -44, 44), foot - 170 + _in(rng, -90, 24)), r, r * 0.85, ink(tone(green, depth)))


def _shops(s: Sketch, horizon: Number, rng: Random) -> None:
    wall = _pick(rng, ((70, 66, 64), (150, 60, 50), (60, 84, 100), (196, 190, 176), (52, 80, 66)))
    sign, x = _in(rng, 20, 60), _in(rng, -20, 20)
    _fade(s, -2, horizon + 2, tone(wall, 0.05), tone(wall, -0.15))
    board = _pick(rng, ((176, 40, 44), (34, 66, 120), (230, 224, 208), (40, 110, 80), (222, 170, 60)))
    _box(s, -4, sign, 140, 26, board)
    for _ in range(7):  # letters, too small to read
        w = _in(rng, 4, 12)
        _box(s, x, sign + 8, w, 10, (245, 242, 232) if sum(board) < 480 else (60, 56, 52), 0.85)
        x += w + _in(rng, 3, 9)
    x = _in(rng, -40, -5)
    while x < 130:
        w = _in(rng, 44, 70)
        _box(s, x, sign + 34, w, horizon - sign - 40, (108, 122, 130))
        for _ in range(5):
            r = _in(rng, 5, 12)
            _box(s, x + _in(rng, 0, w - 10), horizon - 12 - r * 3, r, r * 3, _pick(rng, BRIGHT), 0.55)
        glare = [(x + w * 0.2, sign + 34), (x + w * 0.5, sign + 34), (x + w * 0.3, horizon - 6), (x, horizon - 6)]
        s.polygon(glare, "#fff", 0.14)
        x += w + 6
    _ground(s, horizon, _pick(rng, ((170, 162, 152), (150, 150, 154), (184, 172, 156))), rng)


def _plaza(s: Sketch, horizon: Number, rng: Random) -> None:
    _fade(s, -2, horizon + 2, (186, 206, 226), (224, 228, 230))
    x = _in(rng, -30, 0)
    while x < 132:
        w, top = _in(rng, 26, 60), _in(rng, 0, horizon - 60)
        rgb = _pick(rng, ((150, 156, 166), (186, 176, 162), (128, 140, 152), (172, 150, 136)))
        _box(s, x, top, w, horizon - top, rgb)
        for y in np.arange(top + 8, horizon - 12, 13).tolist():
            _box(s, x + 4, y, w - 8, 5, tone(rgb, -0.25))
        x += w
    _ground(s, horizon, _pick(rng, ((186, 180, 170), (164, 166, 168), (196, 184, 164))), rng)


def _campus(s: Sketch, horizon: Number, rng: Random) -> None:
    _fade(s, -2, horizon + 2, (150, 192, 232), (220, 232, 238))
    if rng.random() < 0.75:
        top = _in(rng, -20, 50)
        _box(s, -4, top, 140, horizon - top, _pick(rng, ((164, 92, 70), (178, 122, 92), (206, 196, 180))))
        _windows(s, horizon - 22, rng, (116, 144, 168), (236, 232, 222))
    for _ in range(int(rng.integers(1, 3))):
        _tree(s, _in(rng, -10, 138), horizon + 8, rng)
    green = _pick(rng, ((108, 150, 72), (92, 136, 70), (132, 158, 84)))
    _fade(s, horizon, HEIGHT + 2, tone(green, -0.1), tone(green, 0.1))
    a, b = _in(rng, 10, 90), _in(rng, 10, 90)
    path = _pick(rng, ((196, 188, 174), (170, 168, 166), (206, 186, 160)))
    s.polygon([(a - 6, horizon), (a + 16, horizon), (b + 130, 390), (b - 110, 390)], ink(path))
    for t in (0.1, 0.25, 0.5, 0.8):
        y = horizon + (388 - horizon) * t
        s.line([(a - 6 + (b - 104 - a) * t, y), (a + 16 + (b + 114 - a) * t, y)], ink(tone(path, -0.2)), 1.1, 0.6)


def _hall(s: Sketch, horizon: Number, rng: Random) -> None:
    wall = _pick(rng, ((218, 214, 204), (200, 208, 212), (224, 210, 186)))
    _fade(s, -2, horizon + 2, tone(wall, 0.1), tone(wall, -0.08))
    x = _in(rng, -30, 10)
    while x < 130:
        if rng.random() < 0.6:
            rgb = _pick(rng, ((128, 88, 60), (90, 110, 128), (160, 60, 54), (112, 124, 108)))
            _box(s, x, horizon - 132, 38, 132, tone(rgb, -0.3))
            _box(s, x + 3, horizon - 128, 32, 128, rgb)
            _box(s, x + 9, horizon - 116, 18, 40, (196, 214, 222), 0.8)
        else:
            _box(s, x + 4, horizon - 120, 30, 36, _pick(rng, BRIGHT), 0.6)
            _box(s, x + 7, horizon - 117, 24, 12, (245, 245, 240), 0.8)
        x += _in(rng, 46, 62)
    _box(s, -4, horizon - 7, 140, 8, tone(wall, -0.4))
    _ground(s, horizon, _pick(rng, ((190, 180, 164), (168, 172, 174), (150, 130, 108))), rng)


def _night(s: Sketch, horizon: Number, rng: Random) -> None:
    wall = _pick(rng, ((52, 54, 66), (66, 58, 56), (44, 56, 70)))
    _fade(s, -2, horizon + 2, (26, 30, 48), tone(wall, 0.1))
    _windows(s, horizon - _in(rng, 20, 60), rng, (34, 42, 58), tone(wall, -0.2), lit=0.38)
    _ground(s, horizon, _pick(rng, ((84, 86, 94), (96, 90, 86))), rng)
    for _ in range(int(rng.integers(2, 5))):  # lamps and their reflections on the ground
        rgb = ink(_pick(rng, ((255, 214, 140), (255, 236, 200), (240, 120, 90), (130, 190, 255), (150, 240, 190))))
        stops = "".join(f'<stop offset="{at}" stop-color="{rgb}" stop-opacity="{by}"/>' for at, by in GLOW)
        paint = s.gradient(f'<radialGradient id="{{}}">{stops}</radialGradient>')
        x, y, r = _in(rng, -5, 133), _in(rng, 20, horizon - 10), _in(rng, 14, 40)
        s.oval((x, y), r, r, paint)
        s.oval((x, 2 * horizon - y + 40), r * 0.6, r * 2.2, paint, 0.4)


GLOW = ((0, 0.95), (0.25, 0.5), (1, 0))
SCENES = {"street": _street, "shops": _shops, "plaza": _plaza, "campus": _campus, "hall": _hall, "night": _night}
