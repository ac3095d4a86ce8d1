"""A table and its image files → findings: errors, warnings and notes about the data."""

import os
import stat
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pandas import DataFrame

from irra_core.annotations import SPLITS, common_folder
from irra_core.datasets.members import exists, stat_photo
from irra_core.datasets.photos import read_photo
from irra_core.images import left_out

# Images, captions and identities of each split, as the data sets' papers and the released code count them.
PUBLISHED_COUNTS: dict[str, dict[str, dict[str, int]]] = {
    "cuhk": {
        "train": {"images": 34054, "captions": 68126, "identities": 11003},
        "val": {"images": 3078, "captions": 6158, "identities": 1000},
        "test": {"images": 3074, "captions": 6156, "identities": 1000},
    },
    "icfg": {
        "train": {"images": 34674, "captions": 34674, "identities": 3102},
        "test": {"images": 19848, "captions": 19848, "identities": 1000},
    },
    "rstp": {
        "train": {"images": 18505, "captions": 37010, "identities": 3701},
        "val": {"images": 1000, "captions": 2000, "identities": 200},
        "test": {"images": 1000, "captions": 2000, "identities": 200},
    },
    # Read by the path of their annotation file, which is recognised by its name.
    "UFine6926": {
        "train": {"images": 18577, "captions": 37154, "identities": 4926},
        "test": {"images": 7629, "captions": 15258, "identities": 2000},
    },
    "UFine3C": {"test": {"images": 7446, "captions": 37939, "identities": 2250}},
}


def check_annotations(annotations: DataFrame, dataset: str | None = None, read_images: bool = True) -> DataFrame:
    """All findings about the table and its image files, the worst first: `severity, finding, where, count`.

    `severity` is "error" (a run would fail or its result be wrong), "warning" (look at it) or "note"; `where` names
    the first cases, `count` is the number of all. With the name or the file of a real data set, its sizes are compared
    with PUBLISHED_COUNTS. `read_images=False` checks that the files exist without decoding them: on a network disk that
    saves minutes.
    """
    findings = [
        *_identity_findings(annotations),
        *_caption_findings(annotations),
        *_file_findings(annotations, read_images),
        *_left_out_findings(annotations),
        *_count_findings(annotations, dataset),
    ]
    rank = ("error", "warning", "note").index
    findings = sorted((row for row in findings if row[3]), key=lambda row: rank(row[0]))
    return DataFrame(findings, columns=["severity", "finding", "where", "count"])


def _left_out_findings(annotations: DataFrame) -> Iterable[tuple[str, str, str, int]]:
    """Findings about photos that were removed from the table because they could not be read."""
    yield _finding("warning", "an image that cannot be read was left out", left_out(annotations).path)


def _identity_findings(annotations: DataFrame) -> Iterable[tuple[str, str, str, int]]:
    """Findings about the splits and the images of identities."""
    sizes = annotations.groupby("pid").agg(splits=("split", "nunique"), images=("image_id", "nunique"))
    yield _finding("error", "the same identity in two splits", sizes.index[sizes["splits"] > 1], "pid {}")
    owners = annotations.groupby("path")["pid"].nunique()
    yield _finding("error", "the same image under two identities", owners.index[owners > 1])
    counts = annotations.groupby("split")["pid"].nunique()
    yield _finding("error", "a split with one identity", counts.index[counts < 2])
    yield _finding("warning", "a split without rows", [s for s in ("train", "test") if s not in counts])
    yield _finding("note", "no val split: train identities are held out", [] if "val" in counts else ["val"])
    yield _finding("note", "an identity with one image", sizes.index[sizes["images"] == 1], "pid {}")


def _caption_findings(annotations: DataFrame) -> Iterable[tuple[str, str, str, int]]:
    """Findings about empty and repeated captions."""
    captions = annotations["caption"].str.strip().str.lower()
    empty = captions == ""
    yield _finding("warning", "an empty caption", annotations.loc[empty, "path"])
    twice = DataFrame({"path": annotations["path"], "caption": captions})[~empty].duplicated()
    yield _finding("warning", "a caption twice for the same image", annotations["path"][twice.index[twice]])
    owners = annotations["pid"][~empty].groupby(captions[~empty]).nunique()
    yield _finding("note", "one caption for several identities: no model can tell them apart", owners.index[owners > 1])


def _file_findings(annotations: DataFrame, read_images: bool) -> Iterable[tuple[str, str, str, int]]:
    """Findings about the image files: missing, unreadable, duplicate, or links that lead out of the folder."""
    pids = annotations.groupby("path", sort=False)["pid"].first().to_dict()
    paths = list(pids)
    with ThreadPoolExecutor(8) as pool, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*decompression bomb.*")  # reported as a finding instead
        faults = dict(zip(paths, pool.map(_examine if read_images else _look, paths), strict=True))
    yield _finding("error", "an image file is missing", [p for p, (fault, _) in faults.items() if fault == "missing"])
    broken = [f"{p}: {fault}" for p, (fault, _) in faults.items() if fault not in (None, "missing")]
    yield _finding("error", "an image file cannot be read: copy it again, or drop its record", broken)
    same: dict[bytes, list[str]] = {}
    for path, (_, digest) in faults.items():
        if digest:
            same.setdefault(digest, []).append(path)
    doubles = [(group, len({pids[path] for path in group})) for group in same.values() if len(group) > 1]
    yield _finding("error", "one photo under two identities", [" = ".join(group) for group, n in doubles if n > 1])
    yield _finding("warning", "one photo under two names", [" = ".join(group) for group, n in doubles if n == 1])
    yield _finding("warning", "a link that leads out of the image folder", _led_out(paths))


def _led_out(paths: list[str]) -> list[str]:
    """The files that a link (of the file or of its folder) resolves to outside their common folder."""
    inside = os.path.join(os.path.realpath(common_folder(paths)), "")
    real = {folder: os.path.join(os.path.realpath(folder), "") for folder in {os.path.dirname(path) for path in paths}}
    ends = [os.path.realpath(path) if os.path.islink(path) else real[os.path.dirname(path)] for path in paths]
    return [path for path, end in zip(paths, ends, strict=True) if not end.startswith(inside)]


def _look(path: str) -> tuple[str | None, None]:
    """The fault of a file that is missing, not regular or empty (None: no fault), and no digest."""
    if not exists(path):
        return "missing", None
    about = stat_photo(path)
    if not stat.S_ISREG(about.st_mode):
        return "is no regular file", None
    return (None if about.st_size else "0 bytes"), None


def _examine(path: str) -> tuple[str | None, bytes | None]:
    """The fault of the image file (None: training can read it), and the digest of its bytes."""
    fault, _ = _look(path)
    if fault:
        return fault, None
    photo = read_photo(path)
    return (photo, None) if isinstance(photo, str) else (None, photo.digest)


def _count_findings(annotations: DataFrame, dataset: str | None) -> Iterable[tuple[str, str, str, int]]:
    """Findings about sizes that differ from the published sizes."""
    if not (sizes := published_counts(dataset)):
        return
    counts = count_splits(annotations)
    different = []
    for split, published in sizes.items():
        for what, number in published.items():
            here = int(counts.loc[split, what]) if split in counts.index else 0
            if here != number:
                different.append(f"{split} {what}: {here:,}, published {number:,}")
    yield _finding("warning", f"sizes differ from those published of {dataset}", different)
    yield _finding("note", f"sizes are those published of {dataset}", [] if different else list(counts.index))


def published_counts(dataset: str | None) -> dict[str, dict[str, int]]:
    """Split → images, captions and identities of a data set, by its name or its file's; empty where none are known."""
    names = {name.lower(): name for name in PUBLISHED_COUNTS}
    return PUBLISHED_COUNTS.get(names.get(Path(dataset or "").stem.lower(), ""), {})


def count_splits(annotations: DataFrame) -> DataFrame:
    """Images, captions and identities of each split that the table has, in the order train, val, test."""
    groups = annotations.groupby("split")
    counts = DataFrame(
        {
            "images": groups["image_id"].nunique(),
            "captions": groups.size(),
            "identities": groups["pid"].nunique(),
        }
    )
    return counts.reindex([split for split in SPLITS if split in counts.index])


def _finding(severity: str, finding: str, places: Iterable, form: str = "{}") -> tuple[str, str, str, int]:
    """One row of findings: the first five cases by name, and the number of all."""
    places = list(places)
    named = ", ".join(form.format(place) for place in places[:5])
    return severity, finding, named + (", …" if len(places) > 5 else ""), len(places)
