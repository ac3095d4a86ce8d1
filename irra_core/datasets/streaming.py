"""Photo files → an array that decodes what is indexed, in the background of the steps that are known in advance.

For sets of photos whose decoded array (147 kB per photo at 384×128) would not fit: see IRRA_ARRAY_GB. The workers of
torch's DataLoader decode the photos of the coming steps, in the order in which the steps ask for them, so a batch is
the same as with the decoded array: no buffer is shuffled.
"""

import hashlib
import math
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from torch import Tensor

from irra_core.annotations import common_folder
from irra_core.datasets.members import stat_photo
from irra_core.images import VERSION, ImageArray, UnreadableImages, decode_images
from irra_core.settings import cores

AHEAD = 2  # steps per worker that are decoded in advance

Plan = Callable[..., Tensor]  # a step and what else it takes → the photos that the step asks for, by their place


class StreamedPixels:
    """Photos [N, 3, H, W] that are decoded when they are indexed. A slice decodes nothing until it is read itself.

    Raises UnreadableImages, naming the files, where an indexed photo cannot be read.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, files: list[str], size: tuple[int, int]):
        self.files, self.shape = files, (len(files), 3, *size)
        self._ahead: _Ahead | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of all photos once decoded."""
        return math.prod(self.shape)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return StreamedPixels(self.files[index], self.shape[2:])
        if isinstance(index, tuple):
            return np.asarray(self[index[0]])[(slice(None), *index[1:]) if np.ndim(index[0]) else index[1:]]
        photos = np.arange(len(self.files))[index]
        if self._ahead is not None and self._ahead.is_next(photos):
            return self._ahead.take()
        found = _decoded([self.files[photo] for photo in np.ravel(photos)], self.shape[2:])
        return found.reshape(*np.shape(photos), *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[np.arange(len(self))].astype(dtype or self.dtype)

    def follow(self, step: int, plan: Plan, *arguments: Any) -> None:
        """Decode the photos of this step and of those after it in the background, in the order of the plan.

        `plan` is a method, called with a step and the arguments. The workers end with the object that it belongs to.
        """
        if self._ahead is None or self._ahead.step != step:
            self._ahead = _Ahead(self.files, self.shape[2:], step, weakref.WeakMethod(plan), arguments)


class _Ahead:
    """The photos of the steps from `step` on, decoded in advance by the workers of a DataLoader."""

    def __init__(self, files: list[str], size: tuple[int, int], step: int, plan: Any, arguments: tuple):
        from torch.utils.data import DataLoader

        self.step, self._asked = step, deque()
        workers = cores()
        loader = DataLoader(
            _Photos(files, size),
            batch_sampler=_order(self._asked, step, plan, arguments),
            num_workers=workers,
            collate_fn=_unchanged,  # arrays travel through pipes: a container's shared memory may be small
            prefetch_factor=AHEAD,
        )
        self._loader = iter(loader)

    def is_next(self, photos: Int[np.ndarray, " photos"]) -> bool:
        """True if these are the photos of the next step."""
        return np.array_equal(self._asked[0], photos)

    def take(self) -> UInt8[np.ndarray, "photos 3 h w"]:
        """The photos of the next step; waits until they are decoded."""
        pixels, unreadable = next(self._loader)
        self._asked.popleft()
        self.step += 1
        if unreadable:
            raise UnreadableImages(unreadable)
        return pixels


def _order(asked: deque, step: int, plan: Any, arguments: tuple) -> Iterator[list[int]]:
    """Yields the photos of each step, which the loader asks for in this process, and keeps them in `asked`."""
    while (photos_of := plan()) is not None:
        asked.append(photos_of(step, *arguments).numpy())
        del photos_of  # else the workers would keep the batches, which keep the workers
        yield asked[-1].tolist()
        step += 1


class _Photos:
    """What a worker of the DataLoader has: the files, and how to decode those of a step."""

    def __init__(self, files: list[str], size: tuple[int, int]):
        self.files, self.size = files, size

    def __getitems__(self, photos: list[int]) -> tuple[np.ndarray, dict[str, str]]:
        try:
            return _decoded([self.files[photo] for photo in photos], self.size, one_by_one=True), {}
        except UnreadableImages as error:  # its constructor takes no message, by which a worker would hand it on
            return np.empty((0, 3, *self.size), np.uint8), error.files


def _unchanged(batch: Any) -> Any:
    return batch


def _decoded(files: list[str], size: tuple[int, int], one_by_one: bool = False) -> UInt8[np.ndarray, "photos 3 h w"]:
    """The decoded photos, on all cores or `one_by_one`. Raises UnreadableImages."""
    pixels, unreadable = np.empty((len(files), 3, *size), np.uint8), {}
    for place, (file, decoded) in enumerate(zip(files, decode_images(files, *size, 1 if one_by_one else cores()))):
        if isinstance(decoded, str):
            unreadable[file] = decoded
        else:
            pixels[place] = decoded[0]
    if unreadable:
        raise UnreadableImages(unreadable)
    return pixels


def streamed(files: list[str], size: tuple[int, int]) -> ImageArray:
    """The photos as an array that decodes what is indexed. Its digest is of the files' names and sizes, not contents.

    Which photos cannot be read is not known before they are indexed, so `unreadable` is empty. Raises UnreadableImages
    for files that are absent.
    """
    folder, absent = common_folder(files), {}
    digest = hashlib.sha256(f"streamed {VERSION} {len(files)} {size}".encode())
    for file in files:
        try:
            about = f"{os.path.relpath(file, folder)} {stat_photo(file).st_size}\0"
            digest.update(about.replace(os.sep, "/").encode(errors="surrogatepass"))
        except (OSError, ValueError) as error:
            absent[file] = getattr(error, "strerror", None) or str(error)
    if absent:
        raise UnreadableImages(absent)
    return ImageArray(StreamedPixels(files, size), digest.hexdigest(), {})
