"""Photo files → one memory-mapped `uint8` array, decoded once, and what could not be read; a recipe → its table."""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import shutil
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL
from filelock import FileLock
from jaxtyping import UInt8
from pandas import DataFrame
from PIL import Image, ImageOps

from irra_core.annotations import load_annotations, photo_table
from irra_core.recipes import Recipe
from irra_core.settings import SMOKE_IDENTITIES, cache_root, cores, data_root, progress_bar, smoke

VERSION = 2  # of what decoding does to a picture and of the digest: arrays of another version are not used
AHEAD = 32  # images per core that may wait in memory to be written: 5 MB at 384×128
REMEMBERED = 8  # arrays that a process keeps open: a run needs one, transfer one per data set
MOST_UNREADABLE = 0.01  # of a data set's photos; with more, a run does not begin
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # errors of a file system without locks
# Pillow's other readers are left out: some start other programs (EPS), none is a photo's format.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
MAX_BYTES = 2**30
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 256 MB of RGB


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

    `digest` is the SHA-256, in hex, of the files' bytes, in their order, and of the array's shape and version: the
    files' folder and times do not matter. `unreadable` is path → reason of the files that have no row in `pixels`.
    """

    pixels: UInt8[np.ndarray, "n 3 h w"]
    digest: str
    unreadable: dict[str, str]


def open_annotations(
    recipe: Recipe, root: str | Path | None = None, progress: Any = None, leave_out: bool = True
) -> DataFrame:
    """The table of a recipe's data set; the people of a synthetic one are rendered first, if they are not there yet.

    With IRRA_SMOKE=1 a few rendered people in a folder of their own replace the default ones. Real photos that cannot
    be read are left out (see `leave_out_unreadable`); `leave_out=False` gives the table as it is written, for
    check_annotations.
    """
    if not recipe.dataset.startswith("synthetic"):
        table = load_annotations(recipe.dataset, root, recipe.identities)
        return leave_out_unreadable(table, recipe, progress) if leave_out else table
    from irra_core.synthetic.people import RENDERING, make_synthetic

    root = data_root(root) / (f"smoke/rendering-{RENDERING}" if smoke() else "")  # each version has its own folder
    domain = recipe.dataset.removeprefix("synthetic").removeprefix("-") or "street"
    made = {"people": SMOKE_IDENTITIES} if smoke() else {}
    made["height"] = 192 if recipe.image_height <= 192 else 384  # the other size is in a folder of its own
    folder = make_synthetic(root, domain=domain, progress=progress, **made)
    return load_annotations(recipe.dataset, folder.parent, recipe.identities)


def leave_out_unreadable(annotations: DataFrame, recipe: Recipe, progress: Callable | None = None) -> DataFrame:
    """The table without the photos that cannot be read, so that one of thousands does not stop a run.

    They are named in a warning, and `left_out` lists them. Raises UnreadableImages for more than MOST_UNREADABLE of
    the photos, where the cause is something else, such as a disk that is not mounted; with the recipe's
    `unreadable="stop"` for a single one.
    """
    photos = photo_table(annotations)
    unreadable = readable_images(photos.path, recipe.image_height, recipe.image_width, progress).unreadable
    if not unreadable:
        return annotations
    error = UnreadableImages(unreadable)
    if recipe.unreadable == "stop" or len(unreadable) > MOST_UNREADABLE * len(photos):
        raise error
    bad = annotations.path.map(os.path.abspath).isin(unreadable)
    warnings.warn(f"left out with their {bad.sum():,} captions: {error}", stacklevel=2)
    kept = annotations[~bad].reset_index(drop=True)
    kept = kept.assign(image_id=np.unique(kept.image_id, return_inverse=True)[1].astype(np.int64))
    kept.attrs["unreadable"] = [{"path": path, "reason": reason} for path, reason in unreadable.items()]
    return kept


def left_out(annotations: DataFrame) -> DataFrame:
    """The photos that `open_annotations` left out of this table: `path, reason`; empty where it left out none.

    The list is in the table's `attrs`, which pandas keeps through selections, `assign` and Parquet files, but not
    through CSV files.
    """
    return DataFrame(annotations.attrs.get("unreadable", []), columns=["path", "reason"])


_opened: dict[tuple, ImageArray] = {}  # folder, size and files → the array, the oldest first


def image_array(paths: Iterable[str | Path], height: int, width: int, progress: Callable | None = None) -> ImageArray:
    """The images at `paths`, in their order, decoded to RGB and resized to height × width pixels.

    The array is made once, on all cores, below `cache_root()`, and found again as long as the files' paths, sizes and
    times stay the same. It is complete or absent: it is renamed into place once complete, one process makes it while
    others wait, and the next process removes what a killed one left. A process looks at the files once: later calls
    give the array that it has open, so it sees the photos as they were at its first call (see `forget`). `progress` is
    a class like tqdm. Raises UnreadableImages, naming every file, and OSError if the cache folder cannot hold the
    array.
    """
    found = readable_images(paths, height, width, progress)
    if found.unreadable:
        raise UnreadableImages(found.unreadable)
    return found


def forget() -> None:
    """Forget the arrays that this process has opened: the next call of `image_array` looks at the files again."""
    _opened.clear()


def readable_images(
    paths: Iterable[str | Path], height: int, width: int, progress: Callable | None = None
) -> ImageArray:
    """`image_array` of those files that can be read; its `unreadable` holds the others, in their order.

    The pixels are those that `image_array` gives for the readable files. The unreadable files are listed beside the
    array; the next process first reads them alone again. Raises UnreadableImages where no file can be read.
    """
    files, size, folder = [os.path.abspath(path) for path in paths], (height, width), cache_root() / "images"
    if not files:
        raise ValueError("image_array got no paths: an array of no images has no use")
    asked = (folder, size, *files)
    if asked in _opened:
        return _opened[asked]
    key = _key(files, size)
    try:
        found = _complete(folder, key, files, size) or _make(folder, key, files, size, progress)
    except OSError as error:
        raise OSError(
            error.errno,
            f"an image array of {3 * math.prod(size) * len(files):,} bytes cannot be made in {folder} "
            f"({error.strerror}): {_remedy(error, key)}",
        ) from error
    if not found.unreadable:  # else the next call reads those files again: they may have been replaced
        while len(_opened) >= REMEMBERED:
            _opened.pop(next(iter(_opened)), None)
        _opened[asked] = found
    return found


def _remedy(error: OSError, key: str) -> str:
    """What to do where an array cannot be made."""
    if error.errno == errno.ELOOP:
        return f"delete {key}.lock there if it is a link, which is not followed"
    if error.errno in NO_LOCKS:
        return "its file system has no locks: set IRRA_CACHE to a folder on a local disk"
    return "make room or grant access there, or set IRRA_CACHE to a folder on a local disk"


def _key(files: list[str], size: tuple[int, int]) -> str:
    """The name of the files' array, from their paths, sizes and times."""
    digest = hashlib.blake2b(f"{VERSION} {size[0]} {size[1]}".encode(), digest_size=16)
    for file in files:
        try:
            found = os.stat(file)
            about = f"{found.st_size} {found.st_mtime_ns}"
        except (OSError, ValueError):  # ValueError: a NUL in the path
            about = "absent"
        digest.update(f"\0{file}\0{about}".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _complete(folder: Path, key: str, files: list[str], size: tuple[int, int]) -> ImageArray | None:
    """The finished array of the files, or None where it has to be made, or where an unreadable file is readable now."""
    try:
        about = json.loads((folder / f"{key}.json").read_text())
        listed, digest = set(about.get("unreadable", ())), about["digest"]
        again = {file: read_photo(file) for file in files if file in listed}
        unreadable = {file: reason for file, reason in again.items() if isinstance(reason, str)}
        if len(unreadable) < len(listed):
            return None
        readable = [file for file in files if file not in unreadable]
        name = _key(readable, size) if unreadable else key
        pixels = np.load(folder / f"{name}.npy", mmap_mode="r")
    except (FileNotFoundError, EOFError, ValueError, KeyError, TypeError, AttributeError):  # absent, torn, or not ours
        return None
    complete = pixels.shape == (len(readable), 3, *size) and pixels.dtype == np.uint8
    return ImageArray(pixels, digest, unreadable) if complete else None


def _make(folder: Path, key: str, files: list[str], size: tuple[int, int], progress: Callable | None) -> ImageArray:
    """The array of the files that can be read, written aside and renamed, unless another process does so first."""
    folder.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(folder)
    with FileLock(folder / f"{key}.lock", fallback_to_soft=False):
        if found := _complete(folder, key, files, size):  # made by another process while this one waited
            return found
        partial = folder / f"{key}.partial"
        partial.unlink(missing_ok=True)
        try:
            if shutil.disk_usage(folder).free < 3 * math.prod(size) * len(files):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with open(partial, "xb") as file:  # x: a link is not followed
                digest, unreadable = _write(file, files, size, progress)
            readable = [file for file in files if file not in unreadable]
            if not readable:
                raise UnreadableImages(unreadable)
            if unreadable and _key(files, size) != key:  # the pixels would get the name of newer files
                raise RuntimeError("photos changed while they were decoded: wait until all are copied, then repeat")
            name = _key(readable, size) if unreadable else key
            for described, listed in {key: list(unreadable), name: []}.items():
                about = {"digest": digest, "unreadable": listed, "version": VERSION, "pillow": PIL.__version__}
                beside = folder / f"{described}.json"
                beside.unlink(missing_ok=True)  # through a link, its target would be overwritten
                beside.write_text(json.dumps(about))
            os.replace(partial, folder / f"{name}.npy")  # last: an array under its name is complete
        finally:
            partial.unlink(missing_ok=True)
        return ImageArray(np.load(folder / f"{name}.npy", mmap_mode="r"), digest, unreadable)


def _clear_abandoned(folder: Path) -> None:
    """Delete the unfinished arrays of killed processes: a living one holds its array's lock."""
    for partial in folder.glob("*.partial"):
        lock = FileLock(partial.with_suffix(".lock"), blocking=False, fallback_to_soft=False)
        with contextlib.suppress(OSError), lock:
            partial.unlink(missing_ok=True)


def _write(
    file: BinaryIO, files: list[str], size: tuple[int, int], progress: Callable | None
) -> tuple[str, dict[str, str]]:
    """Write header and pixels of the readable files through to the disk; gives the digest and the others' reasons."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), 3, *size)}
    np.lib.format.write_array_header_1_0(file, header)
    digests, unreadable = [], {}
    with progress_bar(progress, total=len(files), desc="decoding images", unit="image") as bar:
        for path, decoded in zip(files, decode_images(files, *size)):
            if isinstance(decoded, str):
                unreadable[path] = decoded
            else:
                file.write(decoded[0])
                digests.append(decoded[1])
            bar.update(1)
    shape = (len(digests), 3, *size)
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header | {"shape": shape})  # of equal length, whatever the count
    file.flush()
    os.fsync(file.fileno())
    return hashlib.sha256(f"{VERSION} {shape}".encode() + b"".join(digests)).hexdigest(), unreadable


Decoded = tuple[UInt8[np.ndarray, "3 h w"], bytes]  # a photo in the size asked for, the SHA-256 of its file's bytes


def decode_images(files: list[str], height: int, width: int) -> Iterator[Decoded | str]:
    """Each file's pixels and its SHA-256, or the reason why it cannot be read, in their order; on all cores."""
    many = AHEAD * cores()
    with ThreadPoolExecutor(cores()) as pool:  # threads: Pillow decodes and resizes without the interpreter's lock
        for start in range(0, len(files), many):
            yield from pool.map(lambda file: _decode(file, height, width), files[start : start + many])


def decoded_array(files: list[str], height: int, width: int) -> tuple[UInt8[np.ndarray, "n 3 h w"], dict[str, str]]:
    """The images that can be read, in their order, without the cache, and path → reason for the others."""
    pixels, unreadable, count = np.empty((len(files), 3, height, width), np.uint8), {}, 0
    for file, decoded in zip(files, decode_images(files, height, width)):
        if isinstance(decoded, str):
            unreadable[file] = decoded
        else:
            pixels[count], count = decoded[0], count + 1
    return pixels[:count], unreadable


def _decode(file: str, height: int, width: int) -> Decoded | str:
    """The photo resized bilinearly with antialias, or the reason why it cannot be read."""
    photo = read_photo(file)
    if isinstance(photo, str):
        return photo
    image = photo.image
    if image.size != (width, height):  # else resize would copy
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), photo.digest


class Photo(NamedTuple):
    """A file's picture, in RGB, and the SHA-256 of the file's bytes."""

    image: Image.Image
    digest: bytes


def read_photo(file: str, least: tuple[int, int] | None = None) -> Photo | str:
    """The file's first frame, upright, as RGB; or the reason why it cannot be read.

    A JPEG is decoded in a fraction of its size, and of the time, where `least` (width, height) is enough.
    """
    try:
        found = os.stat(file)
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would never end
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
            photo = _rgb(image)
            photo.load()  # an RGB file is not decoded so far
            with contextlib.suppress(Exception):  # a broken EXIF entry says nothing; the pixels are fine
                ImageOps.exif_transpose(photo, in_place=True)  # the released code ignores the entry
        return Photo(photo, hashlib.sha256(content).digest())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return f"{error}: save it smaller"
    except Exception as error:  # a broken file makes Pillow raise almost anything
        size = os.path.getsize(file) if os.path.isfile(file) else 0
        reason = "its content is no image" if isinstance(error, PIL.UnidentifiedImageError) else error
        return f"{getattr(reason, 'strerror', None) or reason} ({size:,} bytes)"


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


def open_photo(path: str | Path, least: tuple[int, int] | None = None) -> Image.Image:
    """One photo in its own size, upright, in RGB; a JPEG smaller where `least` (width, height) is enough.

    Raises UnreadableImages.
    """
    photo = read_photo(os.fspath(path), least)
    if isinstance(photo, str):
        raise UnreadableImages({str(path): photo})
    return photo.image
