"""Image files → one memory-mapped `uint8` array, decoded once; a `uint8` batch → an augmented, normalised batch."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import stat
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL
import pyarrow
import torch
from jaxtyping import Float, UInt8
from pandas import DataFrame
from PIL import Image
from torch import Tensor

from irra_core.annotations import load_annotations, photo_table
from irra_core.photos import read_photo
from irra_core.recipes import Recipe
from irra_core.settings import SMOKE_IDENTITIES, cache_root, cores, data_root, smoke

VERSION = 2  # of what decoding does to a picture and of the digest: arrays of another version are not used
GROUP = 8  # neighbouring images that a thread takes at once
PAUSE = 0.1  # seconds between two looks at how far the threads are
MOST_UNREADABLE = 0.01  # of a data set's photos; with more, a run does not begin
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # what flock says where there are none
SYNC_BYTES = 2**24  # written through to the disk at once, while the cores decode on: the end then waits for little


class UnreadableImages(ValueError):
    """Image files that cannot be used; `files` is path → reason."""

    def __init__(self, files: dict[str, str]):
        self.files = files
        shown = "\n".join(f"  {path}: {reason}" for path, reason in list(files.items())[:20])
        more = f"\n  … and {len(files) - 20:,} more" if len(files) > 20 else ""
        count = "1 image" if len(files) == 1 else f"{len(files):,} images"
        super().__init__(
            f"{count} cannot be read: copy again, or drop from the annotations, each of these files\n{shown}{more}"
        )


class ImageArray(NamedTuple):
    """Decoded images: `pixels` are memory-mapped and read-only.

    `digest` is the SHA-256, in hex, of the files' bytes, in their order, and of the array's shape and version: where
    the files lie and when they were written does not matter.
    """

    pixels: UInt8[np.ndarray, "n 3 h w"]
    digest: str


def image_array(paths: Iterable[str | Path], height: int, width: int, progress: Callable | None = None) -> ImageArray:
    """The images at `paths`, in their order, decoded to RGB and resized to height × width pixels.

    The array is made once, on all cores, below `cache_root()`, and found again as long as the files' paths, sizes and
    times stay the same. It is there complete or not at all: it gets its name when its last byte is on the disk, one
    process makes it while others that want it wait, and what a killed one left is cleared by the next. `progress` is a
    class like tqdm. Raises UnreadableImages, naming every file, and OSError if the cache folder cannot hold the array.
    Where files are absent, the array of the others is made first, so that those that cannot be decoded are named with
    them; whoever leaves the absent ones out finds it again. So it is with files that could not be decoded before: they
    are tried again, alone.
    """
    files = [os.path.abspath(path) for path in paths]
    if not files:
        raise ValueError("image_array got no paths: an array of no images has no use")
    key, absent = _key(files, height, width)
    if absent:
        raise UnreadableImages(_unreadable(files, absent, height, width, progress))
    array = cache_root() / "images" / f"{key}.npy"
    shape = (len(files), 3, height, width)
    try:
        while (found := _complete(array, shape)) is None:
            if bad := _still_unreadable(array, files, height, width):
                break
            array.parent.mkdir(parents=True, exist_ok=True)
            _clear_abandoned(array.parent, except_for=_partial(array))
            _make(array, files, shape, progress)
    except OSError as error:
        raise OSError(
            error.errno,
            f"an image array of {math.prod(shape):,} bytes cannot be made in {array.parent} ({error.strerror}): "
            f"{_remedy(error, _partial(array))}",
        ) from error
    if found is None:
        raise UnreadableImages(_unreadable(files, bad, height, width, progress))
    return found


def _remedy(error: OSError, partial: Path) -> str:
    """What to do where an array cannot be made."""
    if error.errno == errno.ELOOP:
        return f"delete {partial.name} there if it is a link, which is not followed"
    if error.errno in NO_LOCKS:
        return "its file system has no locks: set IRRA_CACHE to a folder on a local disk"
    return "make room or grant access there, or set IRRA_CACHE to a folder on a local disk"


def _unreadable(
    files: list[str], known: dict[str, str], height: int, width: int, progress: Callable | None
) -> dict[str, str]:
    """What is wrong with each file that cannot be used, in their order, where some, such as absent ones, are known."""
    reasons = dict(known)
    if others := [file for file in files if file not in known]:
        try:
            image_array(others, height, width, progress)
        except UnreadableImages as error:
            reasons |= error.files
    return {file: reasons[file] for file in files if file in reasons}


def _key(files: list[str], height: int, width: int) -> tuple[str, dict[str, str]]:
    """A name for what `files` become, from their paths, sizes and times; the absent ones, with the reasons."""
    digest = hashlib.blake2b(f"{VERSION} {height} {width}".encode(), digest_size=16)
    absent = {}
    for file in files:
        try:
            found = os.stat(file)
            if not stat.S_ISREG(found.st_mode):
                absent[file] = "is no regular file"
            digest.update(f"\0{file}\0{found.st_size} {found.st_mtime_ns}".encode(errors="surrogatepass"))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            absent[file] = getattr(error, "strerror", None) or str(error)
    return digest.hexdigest(), absent


def _complete(array: Path, shape: tuple[int, int, int, int]) -> ImageArray | None:
    """The finished array, or None if it has to be made."""
    try:
        pixels = np.load(array, mmap_mode="r")
        digest = json.loads(array.with_suffix(".json").read_text())["digest"]
    except (FileNotFoundError, EOFError, ValueError, KeyError, TypeError):
        return None
    return ImageArray(pixels, digest) if pixels.shape == shape and pixels.dtype == np.uint8 else None


def _still_unreadable(array: Path, files: list[str], height: int, width: int) -> dict[str, str]:
    """The files for which this array could not be made before and still cannot; none if one of them is mended."""
    try:
        listed = json.loads(_unmade(array).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(listed, list) or not set(map(str, listed)) <= set(files):  # no list of ours
        return {}
    unreadable, pixels = {}, np.empty((3, height, width), np.uint8)
    for file in listed:
        found = _decode(file, pixels)
        if not isinstance(found, str):
            return {}
        unreadable[file] = found
    return unreadable


def _unmade(array: Path) -> Path:
    """Where the files are listed for which the array could not be made."""
    return array.with_suffix(".unreadable")


def _partial(array: Path) -> Path:
    return array.with_suffix(".partial")


def _clear_abandoned(folder: Path, except_for: Path) -> None:
    """Delete the unfinished arrays whose makers are dead: a living one holds the lock on its file."""
    for partial in folder.glob("*.partial"):
        if partial != except_for and (file := _lock(partial, wait=False)):
            with file:
                partial.unlink()


def _lock(partial: Path, wait: bool) -> BinaryIO | None:
    """The open file, locked until it is closed or this process dies; None if it is not to be had under this name.

    Without `wait` it is another array's: a file that cannot be opened or locked, such as a link, is left to whoever
    wants that array.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if wait else 0)  # through a link, its target would be overwritten
    try:
        file = os.fdopen(os.open(partial, flags, 0o666), "r+b")
    except OSError as error:
        if wait and not isinstance(error, FileNotFoundError):  # the folder has just been deleted: the caller makes it
            raise
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(file.fileno()), os.stat(partial)):  # else renamed or deleted while we waited
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException as error:
        file.close()
        if wait or not isinstance(error, OSError):
            raise
        return None
    file.close()
    return None


def _make(array: Path, files: list[str], shape: tuple[int, int, int, int], progress: Callable | None) -> None:
    """Write the array aside and rename it, unless another process does so first."""
    partial = _partial(array)
    if (file := _lock(partial, wait=True)) is None:
        return
    with file:
        if _complete(array, shape):  # made between our look and our lock
            partial.unlink()
            return
        try:
            if shutil.disk_usage(array.parent).free < math.prod(shape):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.truncate(0)
            digest = _write(file, files, shape, progress)
            about = {"digest": digest, "shape": shape, "version": VERSION, "pillow": PIL.__version__}
            array.with_suffix(".json").write_text(json.dumps(about))  # before the array: its name is the promise
            os.replace(partial, array)
            _unmade(array).unlink(missing_ok=True)
        except BaseException as error:
            if isinstance(error, UnreadableImages):
                with contextlib.suppress(OSError):  # the list saves time, no more
                    _unmade(array).unlink(missing_ok=True)  # were it a link, its target would be overwritten
                    _unmade(array).write_text(json.dumps(list(error.files)))
            partial.unlink(missing_ok=True)
            raise


def _write(file: BinaryIO, files: list[str], shape: tuple[int, int, int, int], progress: Callable | None) -> str:
    """Write header and pixels through to the disk; gives the array's digest."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    file.flush()
    start, size = file.tell(), math.prod(shape[1:])

    digests, waiting = [b""] * len(files), 0
    bar = progress(total=len(files), desc="decoding images", unit="image") if progress else None

    def keep(place: int, pixels: UInt8[np.ndarray, "3 h w"], digest: bytes) -> None:
        digests[place] = digest
        left, at = memoryview(pixels).cast("B"), start + place * size
        while left:  # where the disk is full a part is taken, and the next call says why
            written = os.pwrite(file.fileno(), left, at)
            left, at = left[written:], at + written

    def meanwhile(newly: int) -> None:
        nonlocal waiting
        waiting += newly * size
        if waiting >= SYNC_BYTES:
            os.fsync(file.fileno())
            waiting = 0
        if bar is not None:
            bar.update(newly)

    try:
        unreadable = decode_images(files, *shape[2:], keep, meanwhile)
    finally:
        if bar is not None:
            bar.close()
    if unreadable:
        raise UnreadableImages(unreadable)
    os.fsync(file.fileno())
    return hashlib.sha256(f"{VERSION} {shape}".encode() + b"".join(digests)).hexdigest()


def decode_images(
    files: list[str],
    height: int,
    width: int,
    keep: Callable[[int, UInt8[np.ndarray, "3 h w"], bytes], None],
    meanwhile: Callable[[int], Any] | None = None,
) -> dict[str, str]:
    """Decode the files on all cores; gives those that cannot be read, in their order, each with the reason.

    `keep` takes a file's place, its pixels and its bytes' digest, in the thread that has decoded it, while they are in
    that core's cache. The pixels are overwritten with the thread's next image: what is to stay has to be copied.
    `meanwhile` is told in the calling thread, every PAUSE and at the end, how many files more are done.
    """
    unreadable: dict[int, str] = {}

    def decode(places: Iterator[int]) -> None:
        pixels = np.empty((3, height, width), np.uint8)
        for place in places:
            digest = _decode(files[place], pixels)
            if isinstance(digest, str):
                unreadable[place] = digest
            else:
                keep(place, pixels, digest)

    _on_all_cores(decode, len(files), meanwhile)
    return {files[place]: unreadable[place] for place in sorted(unreadable)}


def _on_all_cores(
    work: Callable[[Iterator[int]], None], count: int, meanwhile: Callable[[int], Any] | None = None
) -> None:
    """Call `work` in a thread a core, each with places of 0 … count − 1 that no other gets, a GROUP at a time.

    Whatever ends one thread leaves the others nothing more to begin. `meanwhile` as in `decode_images`.
    """
    starts, done, told = iter(range(0, count, GROUP)), [], 0

    def places() -> Iterator[int]:
        for start in starts:
            for place in range(start, min(start + GROUP, count)):
                yield place
                done.append(place)

    def run() -> None:
        try:
            work(places())
        finally:
            deque(starts, maxlen=0)

    with ThreadPoolExecutor(cores()) as pool:  # threads: Pillow decodes and resizes without the interpreter's lock
        try:
            threads = [pool.submit(run) for _ in range(cores())]
            running = True
            while running:
                running = bool(wait(threads, PAUSE).not_done)
                if meanwhile:
                    newly = len(done) - told
                    meanwhile(newly)
                    told += newly
        finally:
            deque(starts, maxlen=0)
    for thread in threads:
        thread.result()


def decoded_array(files: list[str], height: int, width: int) -> tuple[UInt8[np.ndarray, "n 3 h w"], dict[str, str]]:
    """The images that can be read, in their order, and why the others cannot: path → reason."""
    pixels = np.empty((len(files), 3, height, width), np.uint8)
    unreadable = decode_images(files, height, width, lambda place, image, _: np.copyto(pixels[place], image))
    return (pixels[[file not in unreadable for file in files]] if unreadable else pixels), unreadable


def _decode(file: str, pixels: UInt8[np.ndarray, "3 h w"]) -> bytes | str:
    """Fill `pixels` with the photo, resized bilinearly with antialias; gives its digest, or why there is none."""
    photo = read_photo(file)
    if isinstance(photo, str):
        return photo
    image, size = photo.image, pixels.shape[:0:-1]
    if image.size != size:  # else resize would copy
        image = image.resize(size, Image.Resampling.BILINEAR)
    pixels[:] = _rows(image).transpose(2, 0, 1)
    return photo.digest


def _rows(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """An RGB image's pixels as they lie in Pillow's memory, to be copied while other threads run.

    Arrow's protocol hands that memory over as it is, red, green, blue and a byte of nothing; Pillow's own ways out hold
    the interpreter's lock, for which the other cores would wait.
    """
    try:
        memory = pyarrow.array(image).buffers()[-1]
    except ValueError:  # an image beyond 16 MB lies in several pieces
        return np.asarray(image)
    return np.frombuffer(memory, np.uint8, 4 * math.prod(image.size)).reshape(image.height, image.width, 4)[..., :3]


def open_annotations(
    recipe: Recipe, root: str | Path | None = None, progress: Any = None, leave_out: bool = True
) -> DataFrame:
    """The table of a recipe's data set; rendered people are made first, once, where they are not there yet.

    With IRRA_SMOKE=1 a few rendered people of their own folder stand in for the default ones. Of real photos, those
    that cannot be read are left out (see `leave_out_unreadable`); `leave_out=False` gives the table as it is written,
    for check_annotations to look at.
    """
    if not recipe.dataset.startswith("synthetic"):
        table = load_annotations(recipe.dataset, root, recipe.identities)
        return leave_out_unreadable(table, recipe, progress) if leave_out else table
    from irra_core.synthetic.people import RENDERING, make_synthetic

    root = data_root(root) / (f"smoke/rendering-{RENDERING}" if smoke() else "")  # an older one is in nobody's way
    domain = recipe.dataset.removeprefix("synthetic").removeprefix("-") or "street"
    made = {"people": SMOKE_IDENTITIES} if smoke() else {}
    make_synthetic(root, domain=domain, progress=progress, **made)
    return load_annotations(recipe.dataset, root, recipe.identities)


def leave_out_unreadable(annotations: DataFrame, recipe: Recipe, progress: Callable | None = None) -> DataFrame:
    """The table without the photos that cannot be read: one of thousands does not end a run.

    They are named in a warning and in `attrs["unreadable"]` (a path and a reason each), from which a run takes its
    unreadable.csv and its count. Raises UnreadableImages for more than MOST_UNREADABLE of the photos: then something
    else is wrong, such as a disk that is not there; with the recipe's `unreadable="stop"` for a single one.
    """
    photos = photo_table(annotations)
    try:
        image_array(list(photos.path), recipe.image_height, recipe.image_width, progress)
        return annotations
    except UnreadableImages as error:
        if recipe.unreadable == "stop" or len(error.files) > MOST_UNREADABLE * len(photos):
            raise
        unreadable = error
    bad = annotations.path.map(os.path.abspath).isin(unreadable.files)
    warnings.warn(f"left out with their {bad.sum():,} captions: {unreadable}", stacklevel=2)
    kept = annotations[~bad].reset_index(drop=True)
    kept = kept.assign(image_id=np.unique(kept.image_id, return_inverse=True)[1].astype(np.int64))
    kept.attrs["unreadable"] = [{"path": path, "reason": reason} for path, reason in unreadable.files.items()]
    return kept


def open_photo(path: str | Path, least: tuple[int, int] | None = None) -> Image.Image:
    """One photo in its own size, upright, in RGB; a JPEG smaller where `least` (width, height) is enough.

    Raises UnreadableImages.
    """
    photo = read_photo(os.fspath(path), least)
    if isinstance(photo, str):
        raise UnreadableImages({str(path): photo})
    return photo.image


def load_images(paths: Iterable[str | Path], recipe: Recipe) -> Float[Tensor, "n 3 h w"]:
    """The images at `paths` in the recipe's size, normalised, without augmentation and without the cache.

    Raises UnreadableImages, naming every file.
    """
    files = [os.fspath(path) for path in paths]
    height, width = recipe.image_height, recipe.image_width
    if not files:
        return torch.empty(0, 3, height, width)
    pixels, unreadable = decoded_array(files, height, width)
    if unreadable:
        raise UnreadableImages(unreadable)
    from irra_core.augmentation import normalise

    return normalise(torch.from_numpy(pixels))
