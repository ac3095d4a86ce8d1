"""An image file → its first frame, upright, in red, green and blue; or the reason why there is none."""

import hashlib
import io
import math
import os
import stat
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

# Pillow's other readers are left out: some start other programs (EPS), none is a photo's format.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
MAX_BYTES = 2**30
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 256 MB of RGB
TURNS = {  # EXIF orientation → what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Photo(NamedTuple):
    """What a file shows, in RGB, and the SHA-256 of the file's own bytes."""

    image: Image.Image
    digest: bytes


def read_photo(file: str, least: tuple[int, int] | None = None) -> Photo | str:
    """The file's first frame, upright, as RGB; or the reason why there is none.

    A JPEG is decoded in a fraction of its size, and of the time, where `least` (width, height) is enough.
    """
    try:
        found = os.stat(file)
        if not stat.S_ISREG(found.st_mode):  # a pipe would never end
            return "is no regular file"
        if found.st_size > MAX_BYTES:
            return f"has {found.st_size:,} bytes, at most {MAX_BYTES:,} are read: save it smaller"
        with open(file, "rb", buffering=0) as opened:  # half the time of Path.read_bytes
            content = opened.read()
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if math.prod(image.size) > MAX_PIXELS:
                return f"has {math.prod(image.size):,} pixels, at most {MAX_PIXELS:,} are decoded: save it smaller"
            if image.mode == "F":
                return "has floating-point pixels of no known range: save it with 8 bits a channel"
            if least:
                image.draft("RGB", least)
            photo = _upright(_rgb(image))
            photo.load()  # an RGB file is not decoded so far
        return Photo(photo, hashlib.sha256(content).digest())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return f"{error}: save it smaller"
    except Exception as error:  # a broken file makes Pillow raise almost anything
        size = os.path.getsize(file) if os.path.isfile(file) else 0
        reason = "its content is no image" if isinstance(error, PIL.UnidentifiedImageError) else error
        return f"{reason} ({size:,} bytes)"


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


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF entry says, which the released code ignores."""
    try:
        turn = TURNS.get(image.getexif().get(0x0112))
    except Exception:  # a broken EXIF entry says nothing; the pixels are fine
        return image
    return image if turn is None else image.transpose(turn)
