"""An array of decoded images on the disk → its pixels, memory-mapped; each image is checked when it is first read."""

import contextlib
import errno
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt32

from irra_core.images import forget
from irra_core.settings import cores

ALONE = 2**22  # bytes: fewer are checked in less time than threads take to start


class CheckedPixels(np.memmap):
    """Memory-mapped images. Indexing raises OSError for a file cut short, and for an image whose checksum is wrong.

    Each image is checked when it is first indexed; slices of an array share its memory and its length's check.
    """

    checksums: UInt32[np.ndarray, " n"] | None = None  # None for a part: it was checked when it was taken
    unread: Bool[np.ndarray, " n"]
    length = 0  # bytes that the file must have

    def __array_finalize__(self, array: Any) -> None:
        super().__array_finalize__(array)
        self.length = getattr(array, "length", 0)

    def __getitem__(self, index: Any) -> Any:
        if self._mmap is not None:
            self._check_length()
            if self.checksums is not None and self.unread.any():
                first = index[0] if isinstance(index, tuple) else index
                self._check(np.flatnonzero(self.unread) if first is None else np.ravel(np.arange(len(self))[first]))
        return super().__getitem__(index)

    def _check_length(self) -> None:
        """Raise OSError for a file that became shorter: reading beyond its end would kill the process."""
        if (now := self._mmap.size()) < self.length:
            raise self._damaged(f"has {now:,} of its {self.length:,} bytes")

    def _check(self, images: Int64[np.ndarray, " m"]) -> None:
        """Raise OSError unless the images not read before have the checksums of what was decoded."""
        images, pixels = images[self.unread[images]], self.view(np.ndarray)
        if len(images) * pixels[0].nbytes < ALONE:
            found = [zlib.crc32(pixels[image]) for image in images]
        else:
            with ThreadPoolExecutor(cores()) as pool:  # a checksum is computed without the interpreter's lock
                found = list(pool.map(lambda image: zlib.crc32(pixels[image]), images))
        if (wrong := self.checksums[images] != np.array(found, np.uint32)).any():
            raise self._damaged(f"image {images[wrong][0]} of {len(self):,} is not what was decoded")
        self.unread[images] = False

    def _damaged(self, what: str) -> OSError:
        """The error for a damaged file, which is deleted, so that the next start decodes the photos again."""
        file = Path(self.filename)
        for left in (file.with_name(f"{file.name.split('.')[0]}.json"), file):  # Windows keeps a file that is mapped
            with contextlib.suppress(OSError):
                left.unlink()
        forget()
        said = "start again: the photos are then decoded again. If this recurs, set IRRA_CACHE to another disk"
        return OSError(errno.EIO, f"image array {self.filename} is damaged: {what}; {said}")


def mapped(file: Path, shape: tuple[int, ...], checksums: Sequence[int]) -> CheckedPixels:
    """The images in a .npy file, each with its CRC-32. Raises ValueError for a file of another shape or size."""
    array = np.load(file, mmap_mode="r")
    if array.shape != shape or array.dtype != np.uint8 or len(checksums) != len(array):
        raise ValueError(f"{file} holds {array.dtype} {array.shape}: expected is uint8 {shape}, a checksum each")
    pixels = array.view(CheckedPixels)
    pixels.checksums, pixels.unread = np.array(checksums, np.uint32), np.ones(len(array), bool)
    pixels.length = array.offset + array.nbytes
    return pixels
