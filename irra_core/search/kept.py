"""Photos → their gallery, encoded once: it is kept in the cache folder, where the explorer's next page finds it."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock
from pandas import DataFrame

from irra_core.recipes import Recipe
from irra_core.retrieval import Gallery
from irra_core.search.photo_table import photo_table
from irra_core.search.stores import model_fingerprint
from irra_core.settings import cache_root


def kept_gallery(model, images: DataFrame | str | Path, progress=None, recipe: Recipe | None = None) -> Gallery:
    """The gallery of a table's photos or of a folder's, as `Gallery.build` makes it.

    Pages of one machine share the memory of its features, which stay in a file. A photo that was added, changed or
    removed makes another gallery; a page that asks for one that is being made waits. Delete `galleries` in the cache
    folder to forget all of them. Raises as `Gallery.build` does.
    """
    digest = hashlib.blake2b(model_fingerprint(model).encode(), digest_size=16)
    for row in photo_table(images)[0].itertuples(index=False):
        digest.update(repr((*row, _version(row.path))).encode())
    folder = cache_root() / "galleries" / digest.hexdigest()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        gallery = Gallery.build(model, images, recipe, progress=progress, folder=folder)
        if len(list(folder.glob("part-*"))) > 1:
            gallery.save(folder)  # as one part, which stays in its file when it is read
    return gallery


def _version(path: str) -> tuple[int, ...]:
    """What changes with a photo's file; nothing where it cannot be read."""
    with suppress(OSError):
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return ()
