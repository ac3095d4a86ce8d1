"""A photo's file → its first frame, upright, in RGB, within bounds of memory and time; or the reason why not."""

import contextlib
import hashlib
import io
import math
import os
import stat
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from irra_core.datasets.members import member

# Pillow's other readers are left out: some start other programs (EPS), none is a photo's format.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
# One photo takes at most 300 MB and 3 s of one thread: the bounds below leave a part of both for resizing.
MAX_BYTES = 100_000_000  # of a file
MEMORY = 260_000_000  # bytes: the file and all copies of its pixels while it is decoded
MAX_SIDE = 65_535  # pixels; as in JPEG. Resizing takes memory for each row
MAX_PIXELS = 40_000_000  # of any format but those below, which Pillow decodes much faster or slower
MAX_PIXELS_OF = {"JPEG": 89_478_485, "MPO": 89_478_485, "JPEG2000": 6_000_000}
MAX_PIXELS_IN_PYTHON = 500_000  # of kinds that Pillow decodes in Python: PPM as text, BMP with run lengths
MAX_SCANNED = 1_000_000_000  # pixels × scans of a JPEG: each scan goes over the whole picture
# Bytes per pixel: of a picture in memory by mode, of what a decoder holds beside it, and of what a conversion adds.
STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # all others 4, RGB too
DECODER = {"WEBP": 15, "JPEG2000": 20, "TIFF": 4, "GIF": 1}
UNSUPPORTED = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF"}


class Photo(NamedTuple):
    """A file's picture, in RGB, and the SHA-256 of the file's bytes."""

    image: Image.Image
    digest: bytes


def read_photo(file: str, least: tuple[int, int] | None = None) -> Photo | str:
    """The file's first frame, upright, as RGB; or the reason why it cannot be read.

    A JPEG is decoded in a fraction of its size, and of the time, where `least` (width, height) is enough, and where the
    whole would take more memory than MEMORY.
    """
    content = b""
    try:
        if isinstance(content := _content(file), str):
            return content
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.mode == "F":
                return "has floating-point pixels of no known range: save it with 8 bits a channel"
            if least:
                image.draft("RGB", least)
            if reason := _too_large(image, content):
                return reason
            photo = _rgb(image)
            photo.load()  # an RGB file is not decoded so far
            with contextlib.suppress(Exception):  # a broken EXIF entry says nothing; the pixels are fine
                ImageOps.exif_transpose(photo, in_place=True)  # the released code ignores the entry
        return Photo(photo, hashlib.sha256(content).digest())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return f"{error}: save it smaller"
    except PIL.UnidentifiedImageError:
        kind = UNSUPPORTED.get(content[8:12]) if content[4:8] == b"ftyp" else None
        return (
            f"is {kind}, which is not read: save it as JPEG or PNG"
            if kind
            else _reason("its content is no image", file)
        )
    except Exception as error:  # a broken file makes Pillow raise almost anything
        return _reason(getattr(error, "strerror", None) or str(error) or type(error).__name__, file)


def _content(file: str) -> bytes | str:
    """The bytes of a photo, in a file of its own or inside another one, or the reason why they are not read."""
    if (found := member(file, MAX_BYTES)) is not None:
        return found
    about = os.stat(file)
    if not stat.S_ISREG(about.st_mode):  # reading a pipe would never end
        return "is no regular file"
    if about.st_size > MAX_BYTES:
        return f"has {about.st_size:,} bytes, at most {MAX_BYTES:,} are read: save it smaller"
    with open(file, "rb", buffering=0) as opened:  # half the time of Path.read_bytes
        return opened.read()


def _reason(reason: str, file: str) -> str:
    """The reason with the size of the file."""
    size = os.path.getsize(file) if os.path.isfile(file) else 0
    return f"{reason} ({size:,} bytes)"


def _too_large(image: Image.Image, content: bytes) -> str | None:
    """Why a picture would take too much memory or time to decode; None where it does not. Drafts a JPEG if need be."""
    pixels, scans = math.prod(image.size), _scans(image, content)
    slow = any(tile[0] in Image.DECODERS for tile in image.tile)
    most = MAX_PIXELS_IN_PYTHON if slow else MAX_PIXELS_OF.get(image.format or "", MAX_PIXELS)
    if pixels > most:
        return f"has {pixels:,} pixels, at most {most:,} of this kind are decoded: save it smaller, or as JPEG"
    if max(image.size) > MAX_SIDE:
        return f"is {image.width:,} × {image.height:,} pixels, a side has at most {MAX_SIDE:,}: save it smaller"
    if scans * pixels > MAX_SCANNED:
        return f"has {scans:,} scans of {pixels:,} pixels, more than are decoded: save it again, not progressively"
    beside = len(content) + _decoder_bytes(image, pixels, scans)
    shrink = 1
    while (taken := beside + _bytes_per_pixel(image) * pixels // shrink**2) > MEMORY:
        shrink *= 2
        if image.format not in ("JPEG", "MPO") or shrink > 8:
            return f"has {pixels:,} pixels, which take {taken:,} bytes to decode, more than {MEMORY:,}: save it smaller"
    if shrink > 1:
        image.draft("RGB", (image.width // shrink, image.height // shrink))
    return None


def _scans(image: Image.Image, content: bytes) -> int:
    """How many scans a JPEG's first picture has; 1 for other formats."""
    if image.format not in ("JPEG", "MPO"):
        return 1
    header = image if image.format == "JPEG" else JpegImageFile(io.BytesIO(content))
    first = header.fp.tell()  # Pillow has read up to the first scan; before it there may be a thumbnail
    end = content.find(b"\xff\xd9", first)
    return 1 + content.count(b"\xff\xda", first, end if end > 0 else len(content))


def _decoder_bytes(image: Image.Image, pixels: int, scans: int) -> int:
    """Memory that a decoder takes beside the picture."""
    if scans > 1:  # a JPEG's coefficients are all kept until the last scan
        return 2 * len(image.getbands()) * pixels
    tile = math.prod(int(image.tag_v2.get(tag, 0)) for tag in (322, 323)) if image.format == "TIFF" else 0
    return DECODER.get(image.format or "", 0) * max(pixels, tile)


def _bytes_per_pixel(image: Image.Image) -> int:
    """Memory per pixel for the picture, its copy in RGB, copies while a high byte is taken, and one turned upright."""
    depth = {"I": 9, "I;16": 3, "I;16B": 3, "I;16L": 3}.get(image.mode, 0)
    copied = 0 if image.mode == "RGB" else 4
    turned = 4 if image.format == "PNG" else 0  # it may hold its EXIF entries behind the pixels
    with contextlib.suppress(Exception):  # a broken EXIF entry turns nothing
        turned = turned or 4 * (image.getexif().get(0x0112, 1) != 1)
    return STORED.get(image.mode, 4) + depth + copied + turned


def _rgb(image: Image.Image) -> Image.Image:
    """The image as the released code sees it, Pillow's `convert("RGB")`: transparency is dropped, not blended.

    16-bit greys are the exception: Pillow turns all above 255 white; here they keep their high byte.
    """
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65_535:
            raise ValueError("its grey values are outside 0..65,535: save it with 8 bits a channel")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    image.info.pop("transparency", None)  # convert would warn of it, and drop it too
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy
