"""Photos that would take much memory or time are refused or decoded smaller; each photo's cost is measured."""

import io
import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from irra_core.datasets import photos as module
from irra_core.datasets.photos import read_photo

MOST_BYTES, MOST_SECONDS = 300_000_000, 3.0  # of one photo, in one thread

# A fresh process, in which memory that earlier work has freed does not hide what a photo takes.
MEASURE = """
import json, os, sys, time
from irra_core.images import _decode

def peak():
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

_decode(sys.argv[1], 384, 128)
for file in sys.argv[2:]:
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before, began = peak(), time.process_time()
    found = _decode(file, 384, 128)
    spent = time.process_time() - began
    print(json.dumps([peak() - before, spent, found if isinstance(found, str) else None]))
"""


def segments(jpeg: bytes) -> list[bytes]:
    """A JPEG's start, its segments, each scan with its data, and its end."""
    found, at = [jpeg[:2]], 2
    while jpeg[at + 1] != 0xD9:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] == 0xDA:
            while jpeg[end] != 0xFF or jpeg[end + 1] == 0 or 0xD0 <= jpeg[end + 1] <= 0xD7:
                end += 1
        found.append(jpeg[at:end])
        at = end
    return [*found, jpeg[at:]]


def of_scans(path: Path, times: int = 200, size: tuple[int, int] = (5000, 4000)) -> None:
    """A small progressive JPEG whose last scan is repeated."""
    saved = io.BytesIO()
    Image.new("RGB", size, (90, 120, 30)).save(saved, "JPEG", progressive=True)
    *head, last, end = segments(saved.getvalue())
    path.write_bytes(b"".join([*head, *[last] * times, end]))


def animation(path: Path) -> None:
    """A few bytes of WebP: two frames of one pixel on a large canvas."""
    canvas = struct.pack("<I", 9_000 - 1)[:3] * 2
    one = io.BytesIO()
    Image.new("RGB", (1, 1)).save(one, "WEBP", lossless=True)
    frame = b"\0" * 6 + b"\0" * 6 + struct.pack("<I", 100)[:3] + b"\0" + one.getvalue()[12:]
    chunks = [(b"VP8X", b"\x02\0\0\0" + canvas), (b"ANIM", bytes(6)), (b"ANMF", frame), (b"ANMF", frame)]
    body = b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body)


def sparse(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path, "JPEG")
    with path.open("r+b") as file:
        file.truncate(2**30 - 1)


def tiled(path: Path) -> None:
    """A TIFF of few pixels whose only tile is said to be vast."""
    tags = {256: 64, 257: 64, 258: 8, 259: 5, 262: 1, 277: 1, 322: 65_520, 323: 65_520, 324: 8, 325: 64}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    path.write_bytes(b"II*\0" + struct.pack("<I", 72) + bytes(64) + struct.pack("<H", len(tags)) + entries + bytes(4))


def plain(path: Path) -> None:
    """Text, which Pillow decodes in Python."""
    path.write_bytes(b"P3 1000 1000 255\n" + b"7 " * 3_000_000)


def picture(mode: str, size: tuple[int, int], form: str, **options) -> Callable[[Path], None]:
    """A plain picture of a mode; `turned` with an EXIF entry that turns it."""

    def make(path: Path) -> None:
        more = dict(options)
        if more.pop("turned", False):
            more["exif"] = Image.Exif()
            more["exif"][0x0112] = 6
        Image.new(mode, size).save(path, form, **more)

    return make


# name → how the file is made, and the beginning of the reason why it is refused; None: it is read.
COSTLY = {
    "an animated WebP of 138 bytes": (animation, "has 81,000,000 pixels"),
    "a sparse file": (sparse, "has 1,073,741,823 bytes"),
    "a JPEG of 200 scans": (of_scans, "has 209 scans of 20,000,000 pixels"),
    "a CMYK JPEG": (picture("CMYK", (9000, 9000), "JPEG"), None),
    "a JPEG of 81 million pixels, turned": (picture("RGB", (9000, 9000), "JPEG", turned=True), None),
    "a progressive JPEG": (picture("RGB", (8000, 8000), "JPEG", progressive=True), "has 64,000,000 pixels, which take"),
    "a 16-bit PNG": (picture("I;16", (6000, 6000), "PNG"), "has 36,000,000 pixels, which take"),
    "a smaller 16-bit PNG": (picture("I;16", (4400, 4400), "PNG"), None),
    "a transparent PNG": (picture("RGBA", (4600, 4600), "PNG", turned=True), None),
    "a WebP": (picture("RGB", (3600, 3600), "WEBP", method=0), None),
    "a JPEG 2000": (picture("RGB", (2400, 2400), "JPEG2000"), None),
    "a large JPEG 2000": (picture("RGB", (3000, 3000), "JPEG2000"), "has 9,000,000 pixels, at most 6,000,000"),
    "a TIFF": (picture("I", (3800, 3800), "TIFF"), "has 14,440,000 pixels, which take"),
    "a TIFF of a vast tile": (tiled, "has 4,096 pixels, which take"),
    "a PPM of text": (plain, "has 1,000,000 pixels, at most 500,000 of this kind"),
    "a photo 60,000 pixels high": (picture("RGB", (500, 60_000), "PNG"), None),
    "a photo 70,000 pixels high": (picture("RGB", (3, 70_000), "PNG"), "is 3 × 70,000 pixels"),
}


def test_no_photo_takes_more_than_300_mb_and_3_seconds(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    files = []
    for number, (make, _) in enumerate(COSTLY.values()):
        files.append(tmp_path / f"{number}.jpg")
        make(files[-1])
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path / "small.png"), *map(str, files)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)
    assert ended.returncode == 0, ended.stderr
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    for (name, (_, expected)), (taken, seconds, reason) in zip(COSTLY.items(), rows, strict=True):
        assert taken < MOST_BYTES, name
        assert seconds < MOST_SECONDS, name
        assert (reason is None) == (expected is None), (name, reason)
        if expected:
            assert re.match(expected, reason), (name, reason)


def test_a_large_jpeg_that_would_take_too_much_memory_is_decoded_at_half_its_size(tmp_path, monkeypatch):
    Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).convert("RGB").save(
        tmp_path / "a.jpg", quality=95
    )
    whole = read_photo(str(tmp_path / "a.jpg"))
    monkeypatch.setattr(module, "MEMORY", 150_000)
    half = read_photo(str(tmp_path / "a.jpg"))
    assert (whole.image.size, half.image.size) == ((256, 256), (128, 128))
    assert whole.digest == half.digest
    smaller = np.asarray(whole.image.resize((128, 128), Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(half.image).astype(int) - smaller).max() < 6


def test_a_thumbnail_and_what_follows_the_picture_are_no_scans(tmp_path):
    thumbnail = io.BytesIO()
    Image.new("RGB", (16, 16)).save(thumbnail, "JPEG")
    exif = Image.Exif()
    exif[0x010E] = "\xff\xda"
    Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg", exif=exif.tobytes() + thumbnail.getvalue())
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes() + b"\xff\xda" * 1000)
    with Image.open(tmp_path / "a.jpg") as image:
        assert module._scans(image, (tmp_path / "a.jpg").read_bytes()) == 1
    of_scans(tmp_path / "b.jpg", times=7, size=(16, 16))
    with Image.open(tmp_path / "b.jpg") as image:
        assert module._scans(image, (tmp_path / "b.jpg").read_bytes()) == 9 + 7


@pytest.mark.parametrize(("brand", "kind"), [(b"avif", "AVIF"), (b"heic", "HEIC")])
def test_a_listed_kind_that_is_not_read_is_named_with_the_remedy(tmp_path, brand, kind):
    (tmp_path / "a.avif").write_bytes(struct.pack(">I", 20) + b"ftyp" + brand + bytes(100))
    assert read_photo(str(tmp_path / "a.avif")) == f"is {kind}, which is not read: save it as JPEG or PNG"


def test_an_error_without_words_is_named_by_its_kind(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(module, "_rgb", full)
    assert read_photo(str(tmp_path / "a.png")).startswith("MemoryError (")
