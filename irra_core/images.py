"""Photo files → one memory-mapped `uint8` array, decoded once, and what could not be read; a recipe → its table."""

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL
from filelock import FileLock
from jaxtyping import UInt8
from pandas import DataFrame
from PIL import Image

from irra_core.annotations import load_annotations, photo_table
from irra_core.recipes import Recipe
from irra_core.settings import SMOKE_IDENTITIES, array_limit, cache_root, cores, data_root, progress_bar, smoke

VERSION = 2  # of what decoding does to a picture and of the digest: arrays of another version are not used
AHEAD = 32  # images per core that may wait in memory to be written: 5 MB at 384×128
REMEMBERED = 8  # arrays that a process keeps open: a run needs one, transfer one per data set
MOST_UNREADABLE = 0.01  # of a data set's photos; with more, a run does not begin
FEW_UNREADABLE = 3  # photos that a small data set may lose, if they are not above a quarter of it
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # errors of a file system without locks


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
    """Decoded images: `pixels` are memory-mapped and read-only; indexing checks each image at its first reading.

    Above `array_limit` they are `datasets.streaming.StreamedPixels`, which decode what is indexed.
    `digest` is the SHA-256, in hex, of the files' bytes, in their order, and of the array's shape and version: the
    files' folder and times do not matter. `unreadable` is path → reason of the files that have no row in `pixels`.
    """

    pixels: UInt8[Any, "n 3 h w"]
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
    from irra_core.synthetic.people import RENDERING, arguments_of, make_synthetic

    root = data_root(root) / (f"smoke/rendering-{RENDERING}" if smoke() else "")  # each version has its own folder
    made = arguments_of(recipe.dataset, SMOKE_IDENTITIES if smoke() else None)
    made["height"] = 192 if recipe.image_height <= 192 else 384  # the other size is in a folder of its own
    folder = make_synthetic(root, progress=progress, **made)
    return load_annotations(recipe.dataset, folder.parent, recipe.identities)


def leave_out_unreadable(annotations: DataFrame, recipe: Recipe, progress: Callable | None = None) -> DataFrame:
    """The table without the photos that cannot be read, so that one of thousands does not stop a run.

    They are named in a warning, and `left_out` lists them. Raises UnreadableImages for more than MOST_UNREADABLE of
    the photos (of a small set, more than FEW_UNREADABLE), where the cause is something else, such as a disk that is not
    mounted; with the recipe's `unreadable="stop"` for a single one.
    """
    photos = photo_table(annotations)
    unreadable = readable_images(photos.path, recipe.image_height, recipe.image_width, progress).unreadable
    if not unreadable:
        return annotations
    error = UnreadableImages(unreadable)
    most = max(MOST_UNREADABLE * len(photos), min(FEW_UNREADABLE, len(photos) // 4))
    if recipe.unreadable == "stop" or len(unreadable) > most:
        raise error
    bad = annotations.path.map(os.path.abspath).isin(unreadable)
    left = f"{len(unreadable):,} of {len(photos):,} photos are left out with their {bad.sum():,} captions"
    warnings.warn(f"{left} (unreadable='stop' would stop instead): {error}", stacklevel=2)
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
    if 3 * math.prod(size) * len(files) > array_limit():
        from irra_core.datasets.streaming import streamed

        return streamed(files, size)
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
    from irra_core.datasets.members import stat_photo

    digest = hashlib.blake2b(f"{VERSION} {size[0]} {size[1]}".encode(), digest_size=16)
    for file in files:
        try:
            found = stat_photo(file)
            about = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"  # the last cannot be set
        except (OSError, ValueError):  # ValueError: a NUL in the path
            about = "absent"
        digest.update(f"\0{file}\0{about}".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _complete(folder: Path, key: str, files: list[str], size: tuple[int, int]) -> ImageArray | None:
    """The finished array of the files, or None where it has to be made, or where an unreadable file is readable now."""
    from irra_core.datasets.mapped import mapped
    from irra_core.datasets.photos import read_photo

    try:
        about = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        listed, digest = set(about.get("unreadable", ())), about["digest"]
        again = {file: read_photo(file) for file in files if file in listed}
        unreadable = {file: reason for file, reason in again.items() if isinstance(reason, str)}
        if len(unreadable) < len(listed):
            return None
        readable = [file for file in files if file not in unreadable]
        if unreadable:
            about = json.loads((folder / f"{_key(readable, size)}.json").read_text(encoding="utf-8"))
        pixels = mapped(folder / Path(about["array"]).name, (len(readable), 3, *size), about["checksums"])
    except (FileNotFoundError, EOFError, ValueError, KeyError, TypeError, AttributeError):  # absent, torn, or not ours
        return None
    return ImageArray(pixels, digest, unreadable)


def _make(folder: Path, key: str, files: list[str], size: tuple[int, int], progress: Callable | None) -> ImageArray:
    """The array of the files that can be read, written aside and renamed, unless another process does so first.

    Each version of an array has a name of its own: a file that a process may have mapped is never written to.
    """
    from irra_core.datasets.mapped import mapped

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
                digest, checksums, unreadable = _write(file, files, size, progress)
            readable = [file for file in files if file not in unreadable]
            if not readable:
                raise UnreadableImages(unreadable)
            if unreadable and _key(files, size) != key:  # the pixels would get the name of newer files
                raise RuntimeError("photos changed while they were decoded: wait until all are copied, then repeat")
            name = _key(readable, size) if unreadable else key
            array, earlier = folder / f"{name}.{secrets.token_hex(4)}.npy", list(folder.glob(f"{name}*.npy"))
            about = {"digest": digest, "version": VERSION, "pillow": PIL.__version__, "array": array.name}
            for described, listed in {key: list(unreadable), name: []}.items():
                beside = folder / f"{described}.json"
                beside.unlink(missing_ok=True)  # through a link, its target would be overwritten
                content = json.dumps(about | {"unreadable": listed, "checksums": checksums})
                beside.write_text(content, encoding="utf-8")
            os.replace(partial, array)  # last: an array under its name is complete
            for version in earlier:
                with contextlib.suppress(PermissionError):  # on Windows, where a process still has it mapped
                    version.unlink()
        finally:
            partial.unlink(missing_ok=True)
        return ImageArray(mapped(array, (len(readable), 3, *size), checksums), digest, unreadable)


def _clear_abandoned(folder: Path) -> None:
    """Delete the unfinished arrays of killed processes: a living one holds its array's lock."""
    for partial in folder.glob("*.partial"):
        lock = FileLock(partial.with_suffix(".lock"), blocking=False, fallback_to_soft=False)
        with contextlib.suppress(OSError), lock:
            partial.unlink(missing_ok=True)


def _write(
    file: BinaryIO, files: list[str], size: tuple[int, int], progress: Callable | None
) -> tuple[str, list[int], dict[str, str]]:
    """Write header and pixels of the readable files; returns digest, each image's checksum, and the others' reasons."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), 3, *size)}
    np.lib.format.write_array_header_1_0(file, header)
    digests, checksums, unreadable = [], [], {}
    with progress_bar(progress, total=len(files), desc="decoding images", unit="image") as bar:
        for path, decoded in zip(files, decode_images(files, *size)):
            if isinstance(decoded, str):
                unreadable[path] = decoded
            else:
                file.write(decoded[0])
                digests.append(decoded[1])
                checksums.append(zlib.crc32(decoded[0]))
            bar.update(1)
    shape = (len(digests), 3, *size)
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header | {"shape": shape})  # of equal length, whatever the count
    file.flush()
    os.fsync(file.fileno())
    digest = hashlib.sha256(f"{VERSION} {shape}".encode() + b"".join(digests)).hexdigest()
    return digest, checksums, unreadable


Decoded = tuple[UInt8[np.ndarray, "3 h w"], bytes]  # a photo in the size asked for, the SHA-256 of its file's bytes


def decode_images(files: list[str], height: int, width: int, threads: int | None = None) -> Iterator[Decoded | str]:
    """Each file's pixels and its SHA-256, or the reason why it cannot be read, in their order; on all cores."""
    many = AHEAD * (threads or cores())
    with ThreadPoolExecutor(threads or cores()) as pool:  # Pillow decodes and resizes without the interpreter's lock
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
    from irra_core.datasets.photos import read_photo

    photo = read_photo(file)
    if isinstance(photo, str):
        return photo
    image = photo.image
    if image.size != (width, height):  # else resize would copy
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), photo.digest


def open_photo(path: str | Path, least: tuple[int, int] | None = None) -> Image.Image:
    """One photo in its own size, upright, in RGB; a JPEG smaller where `least` (width, height) is enough.

    Raises UnreadableImages.
    """
    from irra_core.datasets.photos import read_photo

    photo = read_photo(os.fspath(path), least)
    if isinstance(photo, str):
        raise UnreadableImages({str(path): photo})
    return photo.image
