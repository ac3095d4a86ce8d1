"""A seed and a number → a picture as the web has them, and its text: `general`, on which the small CLIP is pretrained.

The web is to person search what `general` is to the rendered streets: broader, shorter in words, and partly wrong.
"""

import json
from collections.abc import Sequence
from concurrent.futures import as_completed
from math import cos, radians
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from irra_core.settings import cores, progress_bar
from irra_core.synthetic.captions import WORDS, Person, hidden_in, weighted
from irra_core.synthetic.pedestrian import COLOURS, GARMENTS, HAIR_COLOURS, Figure
from irra_core.synthetic.people import COLOURFUL, HAIR, PATTERNED, _body, _dressed, in_workers
from irra_core.synthetic.scenery import Random, _in, _in_sight, _pick, _render
from irra_core.synthetic.sketch import HEIGHT, WIDTH, Eye, Number, Sketch
from irra_core.synthetic.web_things import PLACES, pattern, place, studio, thing

SIZE = (192, 64)  # pixels of a picture, height and width
PICTURES, HELD_OUT = 48_000, 1_000  # to train on, and to choose the step at which pretraining stops
PART = 500  # pictures that a kill can cost
RENDERING = 1  # to be increased by every change that gives other pictures or texts for the same seed
KINDS = {"person": 62, "two people": 8, "garment": 12, "thing": 8, "place": 5, "pattern": 5}  # per cent
# How a person is framed: weight, stature in pixels of 384, height of the body (cm of 176) in the picture's middle.
FRAMINGS = {
    "full": (6, (250, 345), (84, 96)),
    "upper body": (4, (520, 720), (116, 140)),
    "legs": (1, (520, 720), (36, 60)),
    "head": (0.6, (900, 1300), (148, 164)),
    "far": (0.6, (110, 190), (70, 110)),
}
# Per cent of the texts: right, of another picture, with another colour, of no picture in particular.
FAULTS = {"none": 84, "another's": 7, "colour": 5, "vague": 4}
SAID = {  # probability that a text may name a thing that is seen; it then names one to three of them
    "hair": 0.5, "upper": 0.95, "lower": 0.85, "shoes": 0.7, "bag": 0.8, "hat": 0.8, "glasses": 0.3, "carried": 0.7,
}  # fmt: skip
COLOUR_SAID, PATTERN_SAID, SYNONYM = 0.85, 0.6, 0.4
MANY = {"1": 25, "2": 45, "3": 30}  # things named, per cent
MANY_STOCK = {"2": 25, "3": 40, "4": 35}  # in a stock photo's sentence
VAGUE = (
    "street style", "outfit of the day", "photo", "new in", "untitled", "my weekend", "best of 2019", "inspiration",
    "IMG_{}", "DSC_{}.jpg", "stock photo", "click to enlarge", "look {}", "shop the look", "summer sale", "me, {}",
)  # fmt: skip
NOUNS = {"man": ("man", "man", "guy", "boy", "person"), "woman": ("woman", "woman", "girl", "lady", "person")}
WHOSE = {"man": ("men's", "mens", "for him"), "woman": ("women's", "ladies", "for her")}
FORMS = (
    "{noun} with {listed}", "{noun} wearing {listed}", "{listed}", "{bare}", "{bare} {noun}", "{bare} | street style",
    "{noun}, {bare}", "portrait of a {noun} with {listed}",
)  # fmt: skip
WORN_FORMS = ("a {noun} in {listed}", "{bare} outfit", "#ootd #{tag}", "how to wear {bare}", "my new {bare}")
SHOP_FORMS = (
    "{bare} sale", "buy {bare} online", "{whose} {bare}", "{whose} {bare}, size {size}", "{bare} - 50% off", "{bare}",
)  # fmt: skip
STOCK_FORMS = (  # sentences, as sellers of stock photos write them
    "A {noun} is wearing {listed}.",
    "The {noun} wears {listed}.",
    "This {noun} has {listed}, stock photo",
    "Young {noun} dressed in {listed}",
    "There is a {noun} with {listed} in the picture.",
    "{noun} in {listed}, walking",
    "{noun} with {listed} in front of a wall",
    "Smiling {noun} with {listed}, isolated",
    "We see a {noun} with a pair of shoes and {listed}.",
    "{they} is dressed in {listed} and has a bag over the shoulder",
)
CARRIED_FORMS = ("{noun} carrying {listed}", "The person holds {listed}", "{they} carries {listed} and walks")
STOCK = 0.35  # of the texts of people
WORN = ("upper", "lower", "shoes", "hat")
ARTICLES = ("a pair of ", "an ", "a ")


class Page(NamedTuple):
    """A picture that is not drawn yet, and its text."""

    kind: str  # of KINDS
    ground: Sketch  # drawn first
    front: Sketch | None
    text: str
    fault: str = "none"  # of FAULTS


def web_picture(seed: int, number: int) -> tuple[Image.Image, str]:
    """A picture of 192×64 pixels and its text; the same for the same seed and number on every machine."""
    found = page(np.random.default_rng([seed, number, 0]))
    image = _drawn(found.ground).convert("RGB")
    if found.front is not None:
        front = _drawn(found.front)
        image.paste(front, mask=front)
    return styled(image, np.random.default_rng([seed, number, 1])), found.text


def make_web(
    folder: str | Path, train: int = PICTURES, val: int = HELD_OUT, seed: int = 0, progress: Any = None
) -> Path:
    """The annotation file of `general`, pictures beside it in imgs/; what a killed call has drawn is taken over.

    Every picture is an identity of its own, with one text. The same arguments give the same bytes on any number of
    cores. `progress` is a class like tqdm.
    """
    folder = Path(folder)
    (folder / "imgs").mkdir(parents=True, exist_ok=True)
    parts = [range(i, min(i + PART, train + val)) for i in range(0, train + val, PART)]
    files = [folder / f"part-{part.start:06}.json" for part in parts]
    missing = [(folder, file.name, part, seed, train) for file, part in zip(files, parts) if not file.exists()]
    workers = min(cores(), len(missing))
    with progress_bar(
        progress, total=len(parts), initial=len(parts) - len(missing), desc="rendering", unit="part"
    ) as bar:
        if workers == 1:
            for part in missing:
                bar.update(_draw_part(*part))
        elif missing:
            with in_workers(_draw_part, missing, workers) as futures:
                for future in as_completed(futures):
                    bar.update(future.result())
    records = [record for file in files for record in json.loads(file.read_text(encoding="utf-8"))]
    _written(folder, "annotations.json", records)
    return folder / "annotations.json"


def _draw_part(folder: Path, name: str, numbers: Sequence[int], seed: int, train: int) -> int:
    records = []
    for number in numbers:
        image, text = web_picture(seed, number)
        path = f"{number:06}.jpg"
        image.save(folder / "imgs" / path, "JPEG", quality=92, subsampling=0)
        split = "train" if number < train else "val"
        records.append({"id": number, "img_path": path, "split": split, "captions": [text]})
    _written(folder, name, records)
    return 1


def _written(folder: Path, name: str, records: list[dict[str, Any]]) -> None:
    """Write a file that has its name only once it is complete."""
    aside = folder / f".{name}"
    aside.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    aside.replace(folder / name)


def page(rng: Random) -> Page:
    """A random picture and its text, before they are drawn."""
    found, fault = COMPOSED[weighted(KINDS, rng)](rng), weighted(FAULTS, rng)
    text = found.text
    if fault == "another's":
        text = COMPOSED[_pick(rng, tuple(KINDS))](rng).text
    elif fault == "colour":
        text = recoloured(text, rng)
    elif fault == "vague":
        text = _pick(rng, VAGUE).format(int(rng.integers(100, 9999)))
    return found._replace(text=text, fault=fault)


def _drawn(sketch: Sketch) -> Image.Image:
    return _render(sketch.svg(SIZE[0] / HEIGHT))


def recoloured(text: str, rng: Random) -> str:
    """The text with its first colour replaced by a random one."""
    words = text.split()
    for i, word in enumerate(words):
        if word in COLOURS:
            words[i] = _pick(rng, tuple(COLOURS))
            break
    return " ".join(words)


# people and clothes


def _somebody(rng: Random) -> Person:
    """A person's attributes: any clothes in any colours."""
    colours, gender = dict.fromkeys(COLOURS, 1), _pick(rng, ("man", "woman"))
    man = gender == "man"
    one = {"gender": gender, "hair": weighted(HAIR[gender], rng), "hair_colour": _pick(rng, tuple(HAIR_COLOURS))}
    one["upper"] = weighted(dict.fromkeys(GARMENTS, 1), rng, ("dress",) if man else ())
    if one["upper"] in PATTERNED:
        logo = one["upper"] in ("shirt", "dress")
        one["pattern"] = weighted({"plain": 4, "striped": 2, "checked": 2, "dotted": 2, "logo": 0 if logo else 1}, rng)
    if one["upper"] in ("jacket", "coat"):
        one["worn"], one["inner_colour"] = _pick(rng, ("open", "closed")), weighted(colours, rng)
    if one["upper"] != "dress":
        one["lower"] = weighted({"trousers": 4, "jeans": 3, "shorts": 3, "skirt": 0 if man else 3}, rng)
    one["shoes"] = _pick(rng, ("sneakers", "boots", "leather shoes"))
    one["bag"] = weighted({"none": 5, "backpack": 3, "shoulder bag": 3, "handbag": 0 if man else 2}, rng)
    bare = one["hair"] == "bun" or rng.random() < 0.6
    one["hat"] = "none" if bare else _pick(rng, ("cap", "beanie", "brimmed hat"))
    one["glasses"] = "yes" if rng.random() < 0.25 else "no"
    free = one["bag"] != "handbag" and rng.random() < 0.35
    one["carried"] = _pick(rng, ("phone", "cup", *COLOURFUL)) if free else "nothing"
    for name in ("upper", "lower", "shoe", "bag", "hat", "carried"):
        one[f"{name}_colour"] = weighted(colours, rng)
    return one


def _framed(rng: Random, framing: str, shift: Number) -> Eye:
    _, tall, middle = FRAMINGS[framing]
    tall, middle = _in(rng, *tall), _in(rng, *middle)
    feet = _in(rng, 250, 350) if framing == "far" else HEIGHT / 2 + tall * middle / 176
    yaw = _in(rng, 0, 360) if rng.random() < 0.5 else _in(rng, -40, 40)
    x = WIDTH / 2 + _in(rng, -12, 12) + shift
    return Eye(radians(yaw), _in(rng, -0.05, 0.25), tall / 176, x, feet, radians(_in(rng, -4, 4)))


def _view(eye: Eye) -> str:
    turned = cos(eye.yaw)
    return "front" if turned > 0.6 else "back" if turned < -0.6 else "side"


def _backdrop(rng: Random, plain: Number) -> tuple[Sketch, str]:
    """A place and its name, or a plain wall (with probability `plain`) without one."""
    light = _pick(rng, (-1.0, 1.0))
    if rng.random() < plain:
        return studio(light, rng), ""
    kind = _pick(rng, tuple(PLACES))
    return place(kind, light, rng), _pick(rng, PLACES[kind])


def _people(rng: Random, kind: str, framings: tuple[str, ...], count: int, plain: Number) -> Page:
    ground, where = _backdrop(rng, plain)
    framing = weighted({name: FRAMINGS[name][0] for name in framings}, rng)
    front, told = Sketch(ground.light), []
    for number in range(count):
        one = _somebody(rng)
        front.boxes = {}
        eye = _framed(rng, framing, 0 if count == 1 else (-30, 34)[number] + _in(rng, -6, 6))
        Figure(front, ground, _dressed(one, _body(one, rng)), eye, rng).draw()
        front.names = ()
        boxes, hidden = _in_sight(dict(front.boxes))
        told.append((one, hidden_in(_view(eye), one, hidden, boxes)))
    one, hidden = told[int(rng.integers(count))]
    named = _named(one, hidden, rng)
    if kind == "garment":
        named = {slot: phrase for slot, phrase in named.items() if slot in (*WORN, "bag")}
    stock = kind != "garment" and rng.random() < STOCK
    many = int(weighted(MANY_STOCK if stock else MANY, rng))
    slots = [list(named)[i] for i in rng.permutation(len(named))[:many]]
    forms = STOCK_FORMS if stock else FORMS + (WORN_FORMS if set(slots) <= set(WORN) else ())
    if {"bag", "carried"} >= set(slots):
        forms += CARRIED_FORMS
    if kind == "garment" and rng.random() < 0.6:
        forms = SHOP_FORMS
    return Page(kind, ground, front, _text(one["gender"], [named[slot] for slot in slots], where, forms, rng))


def _named(one: dict[str, Any], hidden: set[str], rng: Random) -> dict[str, str]:
    """A phrase for each thing that is seen, as `a striped red dress`."""
    found = {}
    for slot, chance in SAID.items():
        value = one.get(slot, "none")
        if value in ("none", "no", "nothing") or slot in hidden or rng.random() > chance:
            continue
        kinds = WORDS[slot][value]
        kind = _bare(_pick(rng, kinds) if rng.random() < SYNONYM else kinds[0])
        colour = one.get(f"{'shoe' if slot == 'shoes' else slot}_colour", "") if rng.random() < COLOUR_SAID else ""
        colour = _pick(rng, WORDS["colour"][colour]) if colour else ""
        pattern = one.get("pattern", "plain") if slot == "upper" else "plain"
        if pattern not in ("plain", "logo") and rng.random() < PATTERN_SAID:
            kind = f"{_pick(rng, WORDS['pattern'][pattern])} {kind}"
        if "{}" not in kind and slot not in ("carried", "hair"):  # a phone's colour is not seen
            kind = f"{{}} {kind}"
        phrase = " ".join(kind.format(colour).split())
        plural = slot in ("shoes", "glasses", "hair") or value in ("trousers", "jeans", "shorts")
        found[slot] = phrase if plural and "bob" not in phrase else _one(phrase)
    return found


def _bare(phrase: str) -> str:
    for article in ARTICLES:
        phrase = phrase.removeprefix(article)
    return phrase


def _one(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeio' else 'a'} {phrase}"


def _text(gender: str, named: list[str], where: str, forms: tuple[str, ...], rng: Random) -> str:
    noun = _pick(rng, NOUNS[gender])
    if not named:
        return f"{noun}, {where}" if where else noun
    bare = " ".join(map(_bare, named))
    listed = " and ".join(filter(None, (", ".join(named[:-1]), named[-1])))
    words = {
        "noun": noun,
        "they": "He" if gender == "man" else "She",
        "listed": listed,
        "bare": bare,
        "tag": bare.replace(" ", ""),
    }
    words |= {"whose": _pick(rng, WHOSE[gender]), "size": _pick(rng, ("S", "M", "L", "XL", "38", "42"))}
    text = _pick(rng, forms).format(**words)
    return f"{text}{_pick(rng, (' at ', ', ', ' in '))}{where}" if where and rng.random() < 0.25 else text


# kinds of pictures


def _person(rng: Random) -> Page:
    return _people(rng, "person", tuple(FRAMINGS), 1, plain=0.3)


def _two_people(rng: Random) -> Page:
    return _people(rng, "two people", ("full", "upper body"), 2, plain=0.3)


def _garment(rng: Random) -> Page:
    return _people(rng, "garment", ("upper body", "legs"), 1, plain=0.7)


def _thing(rng: Random) -> Page:
    ground = _backdrop(rng, plain=0.5)[0]
    front = Sketch(ground.light)
    return Page("thing", ground, front, thing(front, rng))


def _place(rng: Random) -> Page:
    ground, where = _backdrop(rng, plain=0.0)
    return Page("place", ground, None, where)


def _pattern(rng: Random) -> Page:
    ground, text = pattern(rng)
    return Page("pattern", ground, None, text)


COMPOSED = {
    "person": _person, "two people": _two_people, "garment": _garment, "thing": _thing, "place": _place,
    "pattern": _pattern,
}  # fmt: skip


# how a picture is taken, drawn and printed


def _grey(image: Image.Image, rng: Random) -> Image.Image:
    grey = ImageOps.grayscale(image)
    return ImageOps.colorize(grey, (40, 26, 14), (255, 240, 214)) if rng.random() < 0.4 else grey.convert("RGB")


def _lines(image: Image.Image, rng: Random) -> Image.Image:
    edges = ImageOps.invert(ImageOps.grayscale(image.filter(ImageFilter.FIND_EDGES))).convert("RGB")
    return Image.blend(edges, image, _in(rng, 0.0, 0.5))


def _coarse(image: Image.Image, rng: Random) -> Image.Image:
    small = image.resize((int(rng.integers(16, 32)), int(rng.integers(48, 96))))
    return small.resize(image.size, Image.Resampling.NEAREST)


STYLES = {  # name: per cent of the pictures, and how a picture becomes one
    "photo": (70, lambda image, rng: image),
    "black and white": (5, _grey),
    "poster": (5, lambda image, rng: ImageOps.posterize(image, int(rng.integers(2, 4)))),
    "pencil": (3, _lines),
    "paint": (6, lambda image, rng: image.filter(ImageFilter.ModeFilter(5))),
    "thumbnail": (4, _coarse),
    "out of focus": (7, lambda image, rng: image.filter(ImageFilter.GaussianBlur(_in(rng, 0.5, 2)))),
}


def styled(image: Image.Image, rng: Random) -> Image.Image:
    """The picture mirrored, cropped, in another style, in another light, with a banner and grain: each by chance."""
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if rng.random() < 0.4:
        width, height = image.size
        share = _in(rng, 0.7, 1.0)
        w, h = width * share * _in(rng, 0.85, 1.0), height * share
        x, y = _in(rng, 0, width - w), _in(rng, 0, height - h)
        image = image.resize(image.size, Image.Resampling.BILINEAR, (x, y, x + w, y + h))
    image = STYLES[weighted({name: share for name, (share, _) in STYLES.items()}, rng)][1](image, rng)
    for enhanced, low, high in ((ImageEnhance.Color, 0.7, 1.4), (ImageEnhance.Brightness, 0.75, 1.25)):
        image = enhanced(image).enhance(_in(rng, low, high))
    image = ImageEnhance.Contrast(image).enhance(_in(rng, 0.8, 1.2))
    pixels = np.asarray(image, np.float32) * rng.uniform(0.94, 1.06, 3)
    if rng.random() < 0.1:
        top, tall = int(rng.integers(0, 180)), int(rng.integers(6, 22))
        pixels[top : top + tall] = rng.integers(0, 255, 3)
    pixels = pixels + rng.standard_normal(SIZE)[..., None] * _in(rng, 0, 9)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
