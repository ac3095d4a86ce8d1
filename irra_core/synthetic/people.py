"""A seed → rendered pedestrians with captions, written to disk in a real data set's layout."""

import contextlib
import json
import multiprocessing
import shutil
import signal
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame

from irra_core.settings import cores, progress_bar, unknown
from irra_core.synthetic.captions import Person, caption_of, hidden_in, weighted
from irra_core.synthetic.pedestrian import COLOURS, HAIR_COLOURS, SKINS
from irra_core.synthetic.scenery import photograph
from irra_core.synthetic.sketch import Number, tone

DOMAINS = ("street", "night", "campus")
RENDERING = 7  # to be increased by every change that gives other pixels, people or captions for the same seed
MARKER = "synthetic.json"  # beside the annotation file of rendered people; holds the arguments that produced them
VIEWS = ("front", "back", "side", "any")  # of an identity's images
TWINS = 0.22  # hard-negative pairs per identity: 593 among 2,700 people
FEWEST = 12
STUDY_TEST = 1000  # test people of the studies: 8,000 captions
HEIGHT = 192  # of a photo, pixels: twice what the small CLIP reads
ALONE = 100  # fewer photos than this are drawn by this process: starting workers would take longer
LAYOUTS = {  # folder, annotation file, path field, first id, captions per image
    "synthetic": ("synthetic", "annotations.json", "img_path", 0, 2),
    "cuhk": ("CUHK-PEDES", "reid_raw.json", "file_path", 1, 2),
    "icfg": ("ICFG-PEDES", "ICFG-PEDES.json", "file_path", 0, 1),
    "rstp": ("RSTPReid", "data_captions.json", "img_path", 0, 2),
}

# domain → attribute → value → weight; a domain's own weights replace the usual ones
MIX: dict[str, dict[str, dict[str, Number]]] = {
    "usual": {
        "upper": {
            "t-shirt": 6, "shirt": 5, "sweater": 4, "hoodie": 4, "jacket": 6, "coat": 5, "down jacket": 3, "dress": 4,
        },
        "lower": {"trousers": 6, "jeans": 6, "shorts": 3, "skirt": 3},
        "shoes": {"sneakers": 6, "boots": 3, "leather shoes": 3},
        "bag": {"none": 6, "backpack": 6, "shoulder bag": 5, "handbag": 4},
        "hat": {"none": 12, "cap": 3, "beanie": 2, "brimmed hat": 2},
        "carried": {
            "nothing": 14, "phone": 2, "bottle": 1.5, "cup": 1.5, "book": 1.5, "umbrella": 1, "open umbrella": 1,
            "shopping bag": 2, "suitcase": 2,
        },
    },
    "street": {
        "upper": {
            "t-shirt": 6, "shirt": 6, "sweater": 4, "hoodie": 4, "jacket": 6, "coat": 4, "down jacket": 2, "dress": 4,
        },
    },
    "night": {
        "upper": {
            "t-shirt": 2, "shirt": 4, "sweater": 4, "hoodie": 4, "jacket": 7, "coat": 8, "down jacket": 6, "dress": 3,
        },
        "lower": {"trousers": 7, "jeans": 6, "shorts": 1, "skirt": 3},
        "shoes": {"sneakers": 5, "boots": 5, "leather shoes": 4},
        "hat": {"none": 10, "cap": 2, "beanie": 5, "brimmed hat": 1},
    },
    "campus": {
        "upper": {
            "t-shirt": 9, "shirt": 6, "sweater": 4, "hoodie": 7, "jacket": 4, "coat": 1, "down jacket": 1, "dress": 3,
        },
        "lower": {"trousers": 4, "jeans": 7, "shorts": 5, "skirt": 3},
        "shoes": {"sneakers": 9, "boots": 2, "leather shoes": 1},
        "bag": {"none": 4, "backpack": 10, "shoulder bag": 4, "handbag": 1},
        "carried": {"nothing": 11, "phone": 3, "bottle": 3, "cup": 2, "book": 4, "shopping bag": 1},
    },
}  # fmt: skip
HAIR = {
    "man": {"short": 12, "bald": 2, "long": 1},
    "woman": {"long": 6, "bob": 4, "ponytail": 5, "bun": 3, "short": 1},
}
CLOTH = dict.fromkeys(COLOURS, 1.0) | {"black": 2.0, "white": 1.6, "grey": 1.4, "blue": 1.3}
DENIM = {"blue": 4, "light blue": 3, "navy": 3, "black": 2, "grey": 1}
CALM = {
    "black": 4,
    "grey": 2.5,
    "navy": 2.5,
    "brown": 2,
    "beige": 2.5,
    "white": 1.5,
    "green": 1.2,
    "blue": 1.2,
    "red": 1,
}
SHOE = {
    "white": 4,
    "black": 4,
    "brown": 2,
    "red": 1.5,
    "blue": 1.5,
    "grey": 1.5,
    "yellow": 0.8,
    "pink": 0.8,
    "green": 0.8,
}
HAIR_MIX = {"black": 5, "brown": 4, "blonde": 3, "grey": 1.5, "red": 1.5}
PATTERNS = {"plain": 6, "striped": 3, "checked": 2.5, "dotted": 2, "logo": 2.5}
PATTERNED = ("t-shirt", "shirt", "sweater", "hoodie", "dress")
COLOURFUL = ("bottle", "book", "umbrella", "open umbrella", "shopping bag", "suitcase")
TWIN_KEYS = {  # attributes in which a hard negative may differ → weight
    "upper_colour": 5, "lower_colour": 5, "shoe_colour": 3, "bag_colour": 3, "hat_colour": 2, "pattern": 3,
    "hair_colour": 2, "lower": 1.5, "bag": 2, "inner_colour": 1.5, "carried_colour": 1, "glasses": 0.3,
}  # fmt: skip


def _attributes(domain: str, rng: np.random.Generator) -> Person:
    """Random attributes of one person; attributes that do not apply are absent."""
    mix = MIX["usual"] | MIX[domain]
    gender = "man" if rng.random() < 0.5 else "woman"
    man = gender == "man"
    person = {"gender": gender, "hair": weighted(HAIR[gender], rng)}
    if person["hair"] != "bald":
        person["hair_colour"] = weighted(HAIR_MIX, rng)
    person["upper"] = upper = weighted(mix["upper"], rng, ("dress",) if man else ())
    person["upper_colour"] = weighted(CLOTH, rng)
    if upper in PATTERNED:
        person["pattern"] = weighted(PATTERNS, rng, ("logo",) if upper in ("shirt", "dress") else ())
    if upper in ("jacket", "coat"):
        person["worn"] = "open" if rng.random() < 0.5 else "closed"
        if person["worn"] == "open":
            person["inner_colour"] = weighted(CLOTH, rng, (person["upper_colour"],))
    if upper != "dress":
        person["lower"] = weighted(mix["lower"], rng, ("skirt",) if man else ())
        colours = DENIM if person["lower"] == "jeans" else CLOTH if person["lower"] == "skirt" else CALM
        person["lower_colour"] = weighted(colours, rng, (person["upper_colour"],))
    person["shoes"] = weighted(mix["shoes"], rng)
    person["shoe_colour"] = weighted(SHOE, rng)
    person["bag"] = weighted(mix["bag"], rng, ("handbag",) if man else ())
    if person["bag"] != "none":
        person["bag_colour"] = weighted(CLOTH, rng, (person["upper_colour"],))
    person["hat"] = weighted(mix["hat"], rng, () if person["hair"] != "bun" else ("cap", "beanie", "brimmed hat"))
    if person["hat"] != "none":
        person["hat_colour"] = weighted(CLOTH, rng)
    person["glasses"] = "yes" if rng.random() < 0.2 else "no"
    person["carried"] = "nothing" if person["bag"] == "handbag" else weighted(mix["carried"], rng)
    if person["carried"] in COLOURFUL:
        person["carried_colour"] = weighted(CLOTH, rng)
    return person


def _twin(person: Person, rng: np.random.Generator) -> Person:
    """The same person with one attribute changed."""
    keys = {key: weight for key, weight in TWIN_KEYS.items() if person.get(key, "none") != "none"}
    if person["bag"] == "handbag":
        keys.pop("bag", None)
    if person.get("lower") not in ("trousers", "shorts"):
        keys.pop("lower", None)
    key = weighted(keys, rng)
    choices = {
        "lower_colour": DENIM if person.get("lower") == "jeans" else CALM,
        "shoe_colour": SHOE,
        "hair_colour": HAIR_MIX,
        "pattern": {k: v for k, v in PATTERNS.items() if k != "logo" or person["upper"] not in ("shirt", "dress")},
        "lower": {"trousers": 1, "shorts": 1},
        "bag": {"backpack": 1, "shoulder bag": 1},
        "glasses": {"yes": 1, "no": 1},
    }.get(key, CLOTH)
    return person | {key: weighted(choices, rng, (person[key],))}


def _body(person: Person, rng: np.random.Generator) -> dict[str, Any]:
    """Properties for the drawing that no caption states: build, skin, carrying hand, a shift of the clothes' shades."""
    woman = person["gender"] == "woman"
    build = float(rng.uniform(0.93, 1.09))
    return {
        "skin": SKINS[int(rng.integers(3 if person.get("hair_colour") in ("blonde", "red") else len(SKINS)))],
        "shoulders": build * (0.88 if woman else 1.0),
        "waist": build * (0.85 if woman else 1.0) * float(rng.uniform(0.96, 1.06)),
        "hips": build * (0.98 if woman else 0.96),
        "stature": float(rng.uniform(0.96, 1.04)) * (0.97 if woman else 1.0),
        "fit": float(rng.uniform(0.84, 1.12)),
        "hand": int(rng.integers(2)),
        "tights": (46, 42, 46) if woman and rng.random() < 0.25 else None,
        "shift": float(rng.uniform(-0.1, 0.1)),
    }


def _dressed(person: Person, body: dict[str, Any]) -> dict[str, Any]:
    """Attributes and body as input of the drawing, with a colour for every part."""
    complete = {
        "hair_colour": "brown",
        "pattern": "plain",
        "lower": "none",
        "worn": "closed",
        "lower_colour": "black",
        "inner_colour": "white",
    }
    complete |= {"bag_colour": "black", "hat_colour": "black", "carried_colour": "black"} | person | body
    names = (
        "upper_colour",
        "lower_colour",
        "inner_colour",
        "shoe_colour",
        "bag_colour",
        "hat_colour",
        "carried_colour",
    )
    shades = {name: tone(COLOURS[complete[name]], body["shift"]) for name in names}
    return complete | {"shades": shades | {"hair_colour": HAIR_COLOURS[complete["hair_colour"]]}}


def _people(count: int, domain: str, seed: int, test: int | None = None) -> list[dict[str, Any]]:
    """All people of a data set: split, attributes, body and the list indices of their near-twins."""
    rng = np.random.default_rng([seed, DOMAINS.index(domain)])
    val, usual = max(2, round(count / 10)), max(2, round(3 * count / 20))
    people: list[dict[str, Any]] = []
    for split, size in (("train", count - val - usual), ("val", val), ("test", test or usual)):  # test last
        group: list[dict[str, Any]] = []
        known: set[tuple] = set()

        def admit(person: Person, body: dict[str, Any], group=group, known=known, split=split) -> None:
            if (key := tuple(sorted(person.items()))) not in known:
                known.add(key)
                group.append({"split": split, "attributes": person, "body": body})

        pairs = int(TWINS * size)
        while len(group) < size - pairs:
            person = _attributes(domain, rng)
            admit(person, _body(person, rng))
        while len(group) < size:
            base = group[len(group) - (size - pairs)]
            admit(_twin(base["attributes"], rng), base["body"])
        people += [group[i] for i in rng.permutation(size)]
    for split in ("train", "val", "test"):
        indices = [i for i, one in enumerate(people) if one["split"] == split]
        for i, twins in _find_twins([people[i]["attributes"] for i in indices]).items():
            people[indices[i]]["twins"] = [indices[j] for j in twins]
    return people


def _find_twins(people: Sequence[Person]) -> dict[int, list[int]]:
    """Index → indices of the people who differ in exactly one attribute, that is, are equal without that attribute."""
    blanked: dict[tuple, list[int]] = defaultdict(list)
    for i, person in enumerate(people):
        for key in person:
            blanked[(key, *sorted(item for item in person.items() if item[0] != key))].append(i)
    found: dict[int, set[int]] = {i: set() for i in range(len(people))}
    for group in blanked.values():
        for i in group:
            found[i].update(j for j in group if j != i)
    return {i: sorted(twins) for i, twins in found.items()}


# the data set on disk


def make_synthetic(
    root: str | Path,
    layout: str = "synthetic",
    people: int = 2700,
    seed: int = 0,
    domain: str = "street",
    progress: Any = None,
    height: int = HEIGHT,
    test: int | None = None,
) -> Path:
    """Folder of rendered people below root, written once, and renamed into place once complete.

    `people` is the total, at least 12, split 15:2:3 into train, val and test, at least two each, with four views per
    identity and two captions per image. `test` changes the number of test people alone: the train and val photos stay
    the same. `height` is the photos', in pixels; they are a third as wide. Photos of another height than 192 are
    written below a folder of their own, `384x128/` for 384. layout `synthetic` writes `synthetic/` for the domain
    `street` and `synthetic-<domain>/` for `night` and `campus`, with a number of test people `synthetic-study/` and
    `synthetic-study-<domain>/`; `cuhk`, `icfg` and `rstp` write those data sets' own folders and files (icfg has no
    val split and one caption per image). The same arguments give the same pixels on any number of cores. `progress`
    is a class like tqdm. Raises ValueError for an unknown layout or domain, for fewer than 12 people or 2 test people,
    for a height that is no multiple of 3 or below 48, and if the folder holds anything other than these people.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if domain not in DOMAINS:
        raise unknown("domain", domain, DOMAINS)
    if people < FEWEST:
        raise ValueError(f"people {people!r}: accepted is {FEWEST} or more, for two identities in every split")
    if height < 48 or height % 3:
        raise ValueError(f"height {height!r}: accepted are multiples of 3 from 48, as 192 or 384; the width is a third")
    if test is not None and test < 2:
        raise ValueError(f"test {test!r}: accepted is 2 or more people, or None for 3 of 20")
    name = LAYOUTS[layout][0]
    if layout == "synthetic":
        name += ("" if test is None else "-study") + ("" if domain == "street" else f"-{domain}")
    folder = Path(root).resolve() / (f"{height}x{height // 3}" if height != HEIGHT else "") / name
    made = {"layout": layout, "people": people, "seed": seed, "domain": domain, "height": height}
    made |= {} if test is None else {"test": test}
    made["rendering"] = RENDERING
    if _is_there(folder, made):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        _write(aside, made, progress)
        aside.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was faster: its folder is checked below
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if not _is_there(folder, made):
        raise OSError(f"{folder} could not be written: check the permissions and free space of {folder.parent}")
    return folder


def arguments_of(dataset: str, people: int | None = None) -> dict[str, Any]:
    """What `make_synthetic` is given for a rendered data set of RECIPES, or for a shrunken one of so many people."""
    name = dataset.removeprefix("synthetic").removeprefix("-study").removeprefix("-")
    made: dict[str, Any] = {"domain": name or "street"}
    if dataset.startswith("synthetic-study"):
        made["test"] = STUDY_TEST if people is None else max(2, round(3 * people / 20))
    return made if people is None else made | {"people": people}


def _is_there(folder: Path, made: dict[str, Any]) -> bool:
    """True if the folder holds these people, False if it does not exist. Raises ValueError if it holds others."""
    if not folder.exists():
        return False
    marker = folder / MARKER
    found = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None
    if found == made:
        return True
    what = (
        "no rendered people" if found is None else ", ".join(f"{k} {v}" for k, v in found.items() if v != made.get(k))
    )
    wanted = ", ".join(f"{k} {v}" for k, v in made.items() if found is None or v != found.get(k))
    raise ValueError(f"{folder} holds {what} where {wanted} was asked for: give another root, or move that folder away")


def _write(folder: Path, made: dict[str, Any], progress: Any) -> None:
    """Write photos, annotation file and marker into an empty folder."""
    _, file, field, first, captions = LAYOUTS[made["layout"]]
    jobs, records = [], []
    for index, one in enumerate(_people(made["people"], made["domain"], made["seed"], made.get("test"))):
        pid = index + first
        split = "train" if made["layout"] == "icfg" and one["split"] == "val" else one["split"]
        for image, view in enumerate(VIEWS):
            path = _image_path(made["layout"], pid, image, split)
            (folder / "imgs" / path).parent.mkdir(parents=True, exist_ok=True)
            look = (one["attributes"], one["body"], view, made["domain"], made["height"])
            entropy = [made["seed"], DOMAINS.index(made["domain"]), index, image]
            jobs.append((str(folder / "imgs" / path), *look, entropy, captions))
            twins = [twin + first for twin in one["twins"]]
            records.append({"id": pid, field: path, "split": split, "near_twins": twins})
    for record, content in zip(records, _render(jobs, progress), strict=True):
        record |= content
    (folder / file).write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    (folder / MARKER).write_text(json.dumps(made), encoding="utf-8")


def _image_path(layout: str, pid: int, image: int, split: str) -> str:
    """The path of a photo below imgs/, named as the data set's authors name theirs."""
    if layout == "cuhk":
        return f"{('CUHK01', 'CUHK03', 'Market', 'test_query', 'train_query')[pid % 5]}/{pid:05d}{image:02d}.jpg"
    if layout == "icfg":
        return f"{split}/{pid:04d}/{pid:04d}_{image:03d}.jpg"
    if layout == "rstp":
        return f"{pid:04d}_c{1 + (pid * 7 + image * 4) % 15}_{image:04d}.jpg"
    return f"{pid:04d}_{image}.jpg"


def _render(jobs: Sequence[tuple], progress: Any) -> list[dict[str, Any]]:
    """Draw photos, on all cores if they are many; returns the content of each photo, in the order of the jobs."""
    processes = cores()
    pieces = [jobs[i : i + 16] for i in range(0, len(jobs), 16)]
    with progress_bar(progress, total=len(jobs), desc="rendering people", unit="image") as bar:
        if processes == 1 or len(jobs) < ALONE:
            done = []
            for piece in pieces:
                done.append(_photos(piece))
                bar.update(len(piece))
            return [content for piece in done for content in piece]
        with in_workers(_photos, [(piece,) for piece in pieces], processes) as futures:
            for future in as_completed(futures):
                pieces[futures[future]] = future.result()
                bar.update(len(pieces[futures[future]]))
    return [content for piece in pieces for content in piece]


@contextlib.contextmanager
def in_workers(function: Callable, calls: Sequence[tuple], processes: int) -> Iterator[dict[Future, int]]:
    """The calls of a function, made by processes of their own: future → number of its call.

    An error, an interrupt or SIGTERM within drops the calls that have not begun; SIGTERM is then SystemExit, so that
    folders that are half-written are removed.
    """
    before = None
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                with _main_hidden():
                    futures = {pool.submit(function, *call): number for number, call in enumerate(calls)}
                yield futures
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Context manager that hides the main script from workers, which need only this module.

    Otherwise a worker would run the script again, or look for its file if it came from stdin.
    """
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    main.__spec__ = None
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _photos(jobs: Sequence[tuple]) -> list[dict[str, Any]]:
    """Draw and write photos; returns the content of each."""
    return [_photo(*job) for job in jobs]


def _photo(
    path: str, person: Person, body: dict, view: str, domain: str, height: int, entropy: list[int], count: int
) -> dict[str, Any]:
    """Draw one photo and write its captions; the random numbers depend only on `entropy`."""
    rng = np.random.default_rng([*entropy, 0])
    if view == "any":
        view = ("front", "back", "side")[int(rng.integers(3))]
    image, boxes, out_of_sight = photograph(_dressed(person, body), view, domain, rng, height)
    image.save(path, "JPEG", quality=92, subsampling=0)  # else the colours of shoes 5 pixels high would smear
    hidden = hidden_in(view, person, out_of_sight, boxes)
    rng, captions = np.random.default_rng([*entropy, 1]), {}
    while len(captions) < count:
        text, stated = caption_of(person, hidden, domain, rng)
        captions.setdefault(text, stated)
    return {
        "captions": list(captions),
        "view": view,
        "attributes": person,
        "caption_attributes": list(captions.values()),
        "boxes": boxes,
    }


# reading the attributes of rendered people


def _records(annotations: DataFrame) -> dict[str, dict[str, Any]]:
    """Absolute image path → record of the annotation file, for the rendered people of a table."""
    found: dict[str, dict[str, Any]] = {}
    folders = {folder for path in annotations["path"].unique() for folder in [_home(Path(path))]}
    for folder in sorted(folders):
        made = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        _, file, field, _, _ = LAYOUTS[made["layout"]]
        for record in json.loads((folder / file).read_text(encoding="utf-8")):
            found[str(folder / "imgs" / record[field])] = record
    return found


def _home(path: Path) -> Path:
    """The folder of rendered people that an image belongs to."""
    for folder in path.parents:
        if (folder / MARKER).is_file():
            return folder
    raise ValueError(f"{path} is not a rendered image (no {MARKER} above it): only rendered images have attributes")


def attributes(annotations: DataFrame) -> DataFrame:
    """One row per image of rendered people: `pid, image_id, path, split, view, attributes, boxes, near_twins`.

    attributes is a dictionary, boxes a dictionary of pixel boxes [x0, y0, x1, y1] in the file's own size. Raises
    ValueError for images that were not rendered.
    """
    records = _records(annotations)
    rows = annotations.drop_duplicates("image_id")[["pid", "image_id", "path", "split"]].reset_index(drop=True)
    for name in ("view", "attributes", "boxes", "near_twins"):
        rows[name] = [records[str(path)][name] for path in rows["path"]]
    return rows


def stated_attributes(annotations: DataFrame) -> list[Person]:
    """The attributes that each caption states, one item per row; raises ValueError for images not rendered."""
    records = _records(annotations)
    found = []
    for path, caption in zip(annotations["path"], annotations["caption"], strict=True):
        record = records[str(path)]
        found.append(record["caption_attributes"][record["captions"].index(caption)])
    return found


def near_twins(annotations: DataFrame) -> dict[int, list[int]]:
    """pid → the pids in its split that differ in exactly one attribute, for the rendered people of a table."""
    rows = attributes(annotations).drop_duplicates("pid")
    return {int(pid): list(twins) for pid, twins in zip(rows["pid"], rows["near_twins"], strict=True)}


def is_rendered(annotations: DataFrame, recipe: Any) -> bool:
    """True for rendered data sets, whose attributes are known; False for other photos in a data set of such a name."""
    first = Path(annotations["path"].iloc[0])
    return recipe.dataset.startswith("synthetic") and any((folder / MARKER).is_file() for folder in first.parents)


def twin_pids(annotations: DataFrame, recipe: Any) -> set[int]:
    """The pids of the people who have a near-twin; empty for real data."""
    if not is_rendered(annotations, recipe):
        return set()
    return {pid for pid, twins in near_twins(annotations).items() if twins}


def synthetic_ceiling(annotations: DataFrame) -> float:
    """The best R@1 on the test captions of rendered people, in per cent: that of a ranker with perfect attributes.

    The ranker knows the attributes that a caption states and those of every image, and orders the images that fit at
    random: a query's expected hit is the share of these images with its identity. Raises ValueError for other data.
    """
    test = annotations[annotations["split"] == "test"]
    records = _records(test)
    people: dict[int, Person] = {}
    images: dict[int, set[int]] = defaultdict(set)
    for pid, image, path in zip(test["pid"], test["image_id"], test["path"], strict=True):
        people[pid] = records[str(path)]["attributes"]
        images[pid].add(image)
    hits = 0.0
    for pid, stated in zip(test["pid"], stated_attributes(test), strict=True):
        fitting = [other for other, person in people.items() if stated.items() <= person.items()]
        fits = sum(len(images[other]) for other in fitting)
        hits += len(images[pid]) / fits
    return 100 * hits / len(test)
