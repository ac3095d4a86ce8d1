"""A model + images → `Gallery`; text → the ranked table."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet
import torch
from jaxtyping import Float32
from pandas import DataFrame
from safetensors import SafetensorError, safe_open

from irra_core.backbone import CHECKSUM, checksum
from irra_core.batches import ALONE, Team, member
from irra_core.checkpoints import replaced, save_tensors
from irra_core.evaluation import encode_images, encode_texts
from irra_core.images import UnreadableImages, decoded_array
from irra_core.recipes import Recipe
from irra_core.runs import write_text
from irra_core.search.milvus import Milvus, is_milvus
from irra_core.search.nearest import GRAPH, Memory, Shard
from irra_core.search.reranking import CANDIDATES, reciprocal_scores, word_scores
from irra_core.settings import unknown
from irra_core.text import whole_characters

FORMAT = 1  # of a gallery's folder
INDEXES = ("exact", "hnsw")
SHARD = 1024  # photos that are decoded, encoded and stored together: what an interruption costs at most
HEAD = "gallery.json"
PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2", ".heic", ".avif")


class Gallery:
    """Photos of people and their features under one model: what a sentence searches.

    `Gallery.build` makes one, `Gallery.load` opens one. `unreadable` lists the files that were skipped (path, reason).
    """

    def __init__(self, model, store: Memory | Milvus, precision: str = "auto"):
        self.model, self.precision = model, precision
        self.unreadable = DataFrame({"path": [], "reason": []}, dtype="str")
        self._store = store

    @classmethod
    def build(
        cls,
        model,
        images: DataFrame | str | Path,
        recipe: Recipe | None = None,
        index: str = "exact",
        url: str | None = None,
        progress=None,
        folder: str | Path | None = None,
        process: int = 0,
        processes: int = 1,
    ) -> "Gallery":
        """The gallery of a table's photos (columns path and, where known, image_id and pid) or of a folder's.

        A folder is searched with its subfolders for files that end like pictures. `index` is `exact`, or `hnsw`: faster
        and approximate (see `recall`). With `folder` every 1,024 photos are written there and a second call goes on
        where the first was interrupted. With `url` the gallery is kept in Milvus, and goes on there: a path ending in
        .db is embedded Milvus Lite, http://… a server or a cluster, and #name behind either one of several galleries.
        Several processes, on one machine or many, fill one folder or url: each is told its number and encodes its
        share of the photos; when all are done, `Gallery.load` has the whole. Until then each has its own share, which
        it searches exactly, and lists the unreadable files of that alone. A last call of one process lists them all,
        and writes the `hnsw` graph into the folder, which each `load` would have to build otherwise.
        `recipe` gives the arithmetic (`precision`). Raises ValueError when there is no readable photo, or when folder,
        url or recipe belong to another model.
        """
        _check_index(index)
        _check_recipe(model, recipe)
        if url and (folder or not is_milvus(url)):
            raise ValueError(
                f"url is {url!r} and folder {folder!r}: accepted is one, url a path ending in .db or http://…"
            )
        team = member(process, processes)
        if processes > 1 and not (folder or url):
            raise ValueError(f"processes is {processes}, but their shares would meet nowhere: give a folder or a url")
        head = Path(folder) / HEAD if folder else None
        gallery = cls._begun(model, index, url, head, team)
        gallery.precision = recipe.precision if recipe else "auto"
        photos, misnamed = _photo_table(images)
        mine = photos[team.part(len(photos))].reset_index(drop=True)
        gallery._add(mine, misnamed[team.part(len(misnamed))], progress, folder, team)
        if len(mine) or processes == 1:
            _check_filled(gallery, images)
        if head and processes == 1:
            gallery._store.save_graph(head.parent)
            _begin_folder(head, model, index, len(gallery))
        return gallery

    @classmethod
    def _begun(cls, model, index: str, url: str | None, head: Path | None, team: Team) -> "Gallery":
        """What is there already of a gallery, or an empty one; other processes may begin it at the same moment."""
        if url:
            return cls(model, Milvus(url, _width(model), index, model_fingerprint(model)))
        if head is None:
            return cls(model, Memory(_width(model), index))
        if not head.is_file():
            _begin_folder(head, model, index)
        said = _read_head(head, model)  # it may be another model's, begun meanwhile: refused
        if said["index"] != index:
            _begin_folder(head, model, index, said["photos"])
        # a share is never walked through
        return cls._opened(head.parent, model, index if team == ALONE else "exact", whole=False)

    @property
    def images(self) -> DataFrame:
        """One row a photo: image_id, path, pid (<NA> where unknown)."""
        return self._store.images

    def __len__(self) -> int:
        return len(self._store)

    def __repr__(self) -> str:
        return f"Gallery({len(self):,} photos, {self._store})"

    def search(self, text: str | Sequence[str], k: int = 10, rerank: str | None = None) -> DataFrame:
        """The k best photos for each sentence, best first: query, rank (from 1), score (cosine), path, pid, image_id.

        `rerank` orders the best 100 anew by their neighbours (`reciprocal`), or the best 20 by how well the sentence's
        words follow from them (`words`, which looks at the photos again); the column `reranked` then has the scores of
        that order. A gallery of fewer photos gives all of them. Raises ValueError for an empty sentence or k below 1.
        """
        queries, k = _checked_queries(text), _checked_k(k)
        features = self._encode(queries)
        if rerank is None:
            return self._ranking(queries, *self._store.nearest(features, k))
        if rerank not in CANDIDATES:
            raise unknown("rerank", rerank, CANDIDATES)
        scores, ids = self._store.nearest(features, max(k, CANDIDATES[rerank]))
        second = np.full_like(scores, -np.inf)
        for row, query in enumerate(queries):
            found = np.isfinite(scores[row])
            second[row, found] = self._second_look(rerank, query, scores[row, found], ids[row, found])
        best = np.argsort(-second, axis=1, kind="stable")[:, :k]
        scores, ids, second = (np.take_along_axis(each, best, 1) for each in (scores, ids, second))
        return self._ranking(queries, scores, ids, second)

    def _second_look(self, rerank: str, query: str, scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The photos' scores under a re-ranking; beyond its candidates the order stays."""
        if not len(scores):
            return scores
        first = slice(CANDIDATES[rerank])
        if rerank == "reciprocal":
            found = reciprocal_scores(scores[first], self._store.features_of(ids[first]))
        else:
            paths = list(self._store.rows(ids[first]).path)
            pixels, unreadable = decoded_array(paths, *self.model.image_size)
            if unreadable:
                raise UnreadableImages(unreadable)
            found = word_scores(self.model, query, pixels, scores[first], self.precision)
        return np.append(found, found.min() - (scores[first].min() - scores[len(found) :]))

    def _encode(self, queries: list[str]) -> Float32[np.ndarray, "q dim"]:
        """The sentences' features, refused where they cannot be compared with the photos'."""
        features = encode_texts(self.model, queries, precision=self.precision).numpy()
        if features.shape[1] != self._store.dim:
            raise ValueError(
                f"the model gives features of width {features.shape[1]}, the gallery's have {self._store.dim}: "
                "search with the model that built it"
            )
        _check_finite(features, queries)
        return features

    def _ranking(
        self, queries: list[str], scores: np.ndarray, ids: np.ndarray, second: np.ndarray | None = None
    ) -> DataFrame:
        """The tidy table of the hits; equal scores in the order of the ids."""
        order = np.lexsort((ids, -(scores if second is None else second)))
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        query, place = np.nonzero(np.isfinite(scores))  # an approximate index may find fewer than k
        found = self._store.rows(ids[query, place])
        ranked = DataFrame({"query": pd.array(queries, dtype="str")[query], "rank": place + 1})
        ranked["score"] = scores[query, place].astype(np.float64)
        ranked = ranked.assign(**{name: found[name].array for name in ("path", "pid", "image_id")})
        if second is not None:
            ranked["reranked"] = np.take_along_axis(second, order, 1)[query, place].astype(np.float64)
        return ranked

    def neighbours(self, image_id: int, k: int = 10) -> DataFrame:
        """The k photos nearest to one of the gallery's, itself left out: query (its path), and `search`'s columns."""
        ids = np.array([image_id])
        query = self._store.rows(ids).path[0]
        scores, found = self._store.nearest(self._store.features_of(ids), _checked_k(k) + 1)
        itself = found == image_id
        scores, found = scores[~itself][None, :k], found[~itself][None, :k]
        return self._ranking([query], scores, found)

    def recall(self, k: int = 10, queries: Sequence[str] | None = None) -> float:
        """The share of the true k best that the index finds: 1.0 for an exact one.

        Give sentences that people would search with: without, up to 1,000 of the gallery's own photos are the queries,
        which an approximate index finds more easily than it does sentences.
        """
        if queries is None:
            rows = np.random.default_rng(0).permutation(len(self))[:1000]
            features = self._store.features_of(self.images.image_id.to_numpy()[rows])
        else:
            features = self._encode(_checked_queries(queries))
        scores, found = self._store.nearest(features, _checked_k(k))
        true = self._store.nearest(features, k, exact=True)[1]
        hits = zip(true, found, np.isfinite(scores), strict=True)
        return float(np.mean([np.isin(right, ids[there]).mean() for right, ids, there in hits]))

    def add(self, images: DataFrame | str | Path, progress=None) -> int:
        """How many photos of a table, a folder or a single file were added; those already here are skipped."""
        return self._add(*_photo_table(images), progress)

    def _add(
        self,
        photos: DataFrame,
        misnamed: list[tuple[str, str]],
        progress=None,
        folder: str | Path | None = None,
        team: Team = ALONE,
    ) -> int:
        photos, unreadable = self._new(photos), list(misnamed)
        shards = _encoded(self.model, photos, self.precision, unreadable, progress)
        self._store.extend(_written(shards, Path(folder), team) if folder else shards)
        listed = DataFrame(unreadable, columns=["path", "reason"], dtype="str")
        earlier = self.unreadable[~self.unreadable.path.isin([*photos.path, *listed.path])]
        self.unreadable = pd.concat([earlier, listed], ignore_index=True)
        return len(photos) + len(misnamed) - len(listed)

    def _new(self, photos: DataFrame) -> DataFrame:
        """The rows that are not here yet. Raises ValueError where an image_id is here with another path."""
        here = self._store.rows(photos.image_id.to_numpy(), known=False)
        paths = dict(zip(here.image_id, here.path, strict=True))
        for row in photos[photos.image_id.isin(here.image_id)].itertuples():
            if paths[row.image_id] != row.path:
                raise ValueError(
                    f"image_id {row.image_id} is {paths[row.image_id]} in the gallery and {row.path} in the images "
                    "to add: number them apart, or build another gallery"
                )
        return photos[~photos.image_id.isin(here.image_id)].reset_index(drop=True)

    def remove(self, image_ids: Iterable[int | np.integer]) -> int:
        """How many photos were taken out. Raises ValueError for an image_id that is not here."""
        ids = np.unique(np.fromiter(image_ids, dtype=np.int64))
        self._store.rows(ids)
        self._store.remove(ids)
        return len(ids)

    def save(self, folder: str | Path) -> None:
        """Write features, table and index to a folder, which appears complete or not at all.

        A gallery that is there is replaced. Raises ValueError for a folder that holds something else.
        """
        if isinstance(self._store, Milvus):
            raise ValueError(f"the gallery is kept in {self._store.url}: Gallery.load(url, model) opens it")
        folder = Path(folder)
        _check_free(folder)
        aside, old = (folder.with_name(f"{folder.name}.{word}-{os.getpid()}") for word in ("partial", "old"))
        try:
            _begin_folder(aside / HEAD, self.model, self._store.index, len(self))
            _write_part(aside, self.images, self._store.features)
            self._store.save_graph(aside)
            if folder.exists():
                folder.replace(old)
            aside.replace(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            if old.exists() and not folder.exists():
                old.replace(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | Path, model, index: str | None = None) -> "Gallery":
        """The gallery that `save`, or `build` with a folder, wrote; `index` replaces the one it had.

        Every file is checked before it is used. The url of a gallery in Milvus opens that one. Raises ValueError when a
        file is damaged or missing or another model made the gallery, FileNotFoundError when there is none. That a file
        is missing is not seen where several processes filled the folder and no last call of one completed it.
        """
        if is_milvus(folder):
            return cls(model, Milvus(str(folder), _width(model), index, model_fingerprint(model)))
        return cls._opened(Path(folder), model, index)

    @classmethod
    def _opened(cls, folder: Path, model, index: str | None, whole: bool = True) -> "Gallery":
        """The gallery of a folder; without `whole` it may have lost parts, which are about to be made again."""
        head = _read_head(folder / HEAD, model)
        store = Memory(head["dim"], _check_index(index or head["index"]))
        parts = [_read_part(path, head["dim"]) for path in sorted(folder.glob("part-*.safetensors"))]
        if (count := sum(len(photos) for photos, _ in parts)) < head["photos"]:
            if whole:
                raise ValueError(
                    f"{folder} has {count:,} of its {head['photos']:,} photos, a part is missing: copy the gallery "
                    "again, or call Gallery.build(…, folder=) with the same photos, which adds what is missing"
                )
            (folder / GRAPH).unlink(missing_ok=True)  # the rows that come back have other places
        store.extend(parts, folder / GRAPH)
        if store.images.image_id.duplicated().any():
            twice = store.images.image_id[store.images.image_id.duplicated()].iloc[0]
            raise ValueError(f"{folder}: image_id {twice} is there twice: build the gallery again")
        return cls(model, store)


def _check_filled(gallery: Gallery, images: DataFrame | str | Path) -> None:
    if not len(gallery):
        listed = "".join(f"; {row.path}: {row.reason}" for row in gallery.unreadable[:3].itertuples())
        source = "the table" if isinstance(images, DataFrame) else images
        raise ValueError(f"{source} has no photo that can be read ({len(gallery.unreadable)} unreadable{listed})")


def _check_index(index: str) -> str:
    if index not in INDEXES:
        raise unknown("index", index, INDEXES)
    return index


def _check_recipe(model, recipe: Recipe | None) -> None:
    """Refuse a recipe whose photos have another size than the model's."""
    if recipe and (recipe.image_height, recipe.image_width) != tuple(model.image_size):
        raise ValueError(
            f"the recipe's photos are {recipe.image_height}×{recipe.image_width}, the model's "
            f"{model.image_size[0]}×{model.image_size[1]}: give the recipe that the model was built with"
        )


def _width(model) -> int:
    """The width of the model's features, asked by encoding a sentence."""
    return encode_texts(model, ["a person"]).shape[1]


def _checked_queries(text: str | Sequence[str]) -> list[str]:
    """A list of sentences, none empty, of whole characters."""
    queries = [text] if isinstance(text, str) else list(text)
    for place, query in enumerate(queries, 1):
        if not isinstance(query, str):
            raise TypeError(f"query {place} is {query!r}: accepted is a sentence")
        if not query.strip():
            raise ValueError(f"query {place} is empty: write what the person looks like")
    if not queries:
        raise ValueError("there is no query: write what the person looks like")
    return [whole_characters(query) for query in queries]


def _checked_k(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k is {k!r}: accepted is a number of results from 1")
    return int(k)


def _check_finite(
    features: Float32[np.ndarray, "n dim"],
    names: Sequence[str],
    remedy: str = "the model's weights are damaged, load another checkpoint",
) -> None:
    """Refuse features that cannot be ranked: NaN, or no direction at all."""
    broken = np.flatnonzero(~(np.abs(np.linalg.norm(features, axis=1) - 1) < 1e-2))  # NaN is never below
    if len(broken):
        raise ValueError(
            f"{len(broken)} of {len(features)} features are not unit vectors (NaN or zero), first that of "
            f"{names[broken[0]]!r}: {remedy}"
        )


def _photo_table(images: DataFrame | str | Path) -> tuple[DataFrame, list[tuple[str, str]]]:
    """One row a photo (image_id, path, pid), and the files whose names cannot be kept, with why.

    Photos without annotations are numbered by a hash of their path.
    """
    if not isinstance(images, DataFrame):
        images = DataFrame({"path": _photo_files(Path(images))}, dtype=object)
    elif "path" not in images:
        raise ValueError(f"the table has no column 'path', only {', '.join(map(str, images.columns))}")
    for place, path in enumerate(images.path):
        if not isinstance(path, str | Path):
            raise ValueError(f"row {place} of the table has path {path!r}: accepted are paths as text")
    named = images.path.map(_is_utf8).astype(bool)
    escaped = (os.fspath(path).encode("utf-8", "backslashreplace").decode() for path in images.path[~named])
    misnamed = [(path, "its name is not UTF-8: rename the file") for path in escaped]
    images = images[named]
    photos = DataFrame({"path": images.path.map(os.fspath).astype("str")})
    photos["image_id"] = _whole_numbers(images.image_id) if "image_id" in images else photos.path.map(_photo_id)
    if photos.image_id.isna().any():
        raise ValueError(f"{photos.path[photos.image_id.isna()].iloc[0]} has no image_id: give each photo a number")
    photos["pid"] = _whole_numbers(images.pid) if "pid" in images else pd.array([pd.NA] * len(photos), "Int64")
    photos = photos.drop_duplicates(["image_id", "path"]).reset_index(drop=True)
    if photos.image_id.duplicated().any():
        twice = photos[photos.image_id == photos.image_id[photos.image_id.duplicated()].iloc[0]]
        raise ValueError(
            f"image_id {twice.image_id.iloc[0]} has two photos, {' and '.join(twice.path[:2])}: rename one"
        )
    return photos[["image_id", "path", "pid"]].astype({"image_id": np.int64}), misnamed


def _whole_numbers(column: pd.Series) -> pd.Series:
    """The column as Int64, <NA> where it is empty; nothing is rounded."""
    try:
        return column.astype("Int64")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"column {column.name!r} of the table has other values than whole numbers, such as "
            f"{_first_unwhole(column)!r}: number the {'people' if column.name == 'pid' else 'photos'} from 0"
        ) from error


def _first_unwhole(column: pd.Series) -> Any:
    """The first value that is no whole number."""
    whole = [pd.isna(value) or (isinstance(value, float | int | np.number) and value == value // 1) for value in column]
    return next((value for value, is_whole in zip(column, whole, strict=True) if not is_whole), column.iloc[0])


def _is_utf8(path: str | Path) -> bool:
    """False for a file's name in another encoding, which no table or JSON can hold."""
    return whole_characters(name := os.fspath(path)) == name


def _photo_files(source: Path) -> list[str]:
    """The absolute paths of a file, or of all below a folder that end like pictures and are not hidden."""
    if source.is_file():
        return [os.path.abspath(source)]
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder of photos: looked for {source.absolute()}")
    found = []
    for folder, below, files in os.walk(os.path.abspath(source)):
        below[:] = [name for name in below if not name.startswith(".")]
        pictures = (name for name in files if name.lower().endswith(PHOTO_ENDINGS) and not name.startswith("."))
        found += [os.path.join(folder, name) for name in pictures]
    return sorted(found)


def _photo_id(path: str) -> int:
    """53 bits of the path's hash: the same in every process and on every machine, and exact in a browser."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "big") >> 11


def _encoded(model, photos: DataFrame, precision: str, unreadable: list[tuple[str, str]], progress) -> Iterator[Shard]:
    """The photos' rows and features, a shard at a time; files that cannot be read go to `unreadable`, with why."""
    bar = progress(total=len(photos), desc="photos", unit="photo") if progress else None
    try:
        for start in range(0, len(photos), SHARD):
            shard = photos[start : start + SHARD]
            pixels, reasons = decoded_array(list(shard.path), *model.image_size)
            unreadable += reasons.items()
            if len(pixels):
                shard = shard[~shard.path.isin(reasons)].reset_index(drop=True)
                features = encode_images(model, pixels, precision=precision).numpy()
                _check_finite(features, list(shard.path))
                yield shard, features
            if bar:
                bar.update(len(pixels) + len(reasons))
    finally:
        if bar:
            bar.close()


def _written(shards: Iterable[Shard], folder: Path, team: Team) -> Iterator[Shard]:
    """The same shards, each on disk before it is handed on."""
    for photos, features in shards:
        _write_part(folder, photos, features, team)
        yield photos, features


def _write_part(folder: Path, photos: DataFrame, features: Float32[np.ndarray, "n dim"], team: Team = ALONE) -> None:
    """A part of a gallery's folder. The features come last: a part without them does not count.

    Process p of n counts p, p + n, p + 2n, …, so that no two write the same part.
    """
    process, processes = team
    taken = [int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.safetensors")]
    free = max(taken, default=-1) + 1
    part = folder / f"part-{free + (process - free) % processes:05}"
    with replaced(part.with_suffix(".parquet")) as aside:
        photos.to_parquet(aside)
    ids = torch.tensor(photos.image_id.to_numpy(), dtype=torch.int64)
    arrays = {"features": torch.from_numpy(np.ascontiguousarray(features)), "image_id": ids}
    save_tensors(arrays, part.with_suffix(".safetensors"))


def _check_free(folder: Path) -> None:
    """Refuse a folder that holds anything but a gallery, also one that another process begins at this moment.

    A gallery's head is its first file, so it is looked for after the others: then it is there if any of them is its.
    """
    taken = folder.exists() and (not folder.is_dir() or any(folder.glob("[!.]*")))
    if taken and not (folder / HEAD).is_file():
        raise ValueError(f"{folder} holds something that is no gallery: give the path of a new folder")


def _begin_folder(head: Path, model, index: str, photos: int = 0) -> None:
    """Write what a gallery's folder says of itself; `photos` is how many it has at least."""
    _check_free(head.parent)
    head.parent.mkdir(parents=True, exist_ok=True)
    said = {"format": FORMAT, "model": model_fingerprint(model), "dim": _width(model), "index": index, "photos": photos}
    write_text(head, json.dumps(said, indent=2) + "\n")


def model_fingerprint(model) -> str:
    """32 hex digits that change with the weights of the two encoders or the size of the photos."""
    digest = hashlib.blake2b(str(tuple(model.image_size)).encode(), digest_size=16)
    state = getattr(model, "clip", model).state_dict()  # the interaction encoder makes no features
    for name in sorted(state):
        values = state[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).numpy())
    return digest.hexdigest()


def _read_head(path: Path, model) -> dict[str, Any]:
    """What a gallery's folder says of itself, checked against the model."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no gallery: it has no {HEAD}; Gallery.build(…, folder=) makes one")
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
        known = {name: type(head[name]) for name in ("format", "model", "dim", "index")}
        known["photos"] = type(head.setdefault("photos", 0))  # an unfinished gallery has no number, nor an earlier one
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): build the gallery again") from None
    kinds = {"format": int, "model": str, "dim": int, "index": str, "photos": int}
    if known != kinds or head["format"] != FORMAT:
        raise ValueError(f"{path} is no gallery of format {FORMAT}: build the gallery again")
    mine = model_fingerprint(model)
    if head["model"] != mine:
        raise ValueError(
            f"{path.parent} was built by model {head['model'][:12]} and this is model {mine[:12]}: features of two "
            "models cannot be compared; load the checkpoint that built it, or build another gallery"
        )
    if head["dim"] != (width := _width(model)):
        raise ValueError(
            f"{path} is damaged: it gives the features' width as {head['dim']}, the model's is {width}: "
            "build the gallery again"
        )
    return head


def _read_part(path: Path, dim: int) -> Shard:
    """One part of a gallery's folder, checked: checksum, dtypes, shapes, counts, ids, unit vectors."""
    try:
        features, ids = _part_arrays(path)
        photos = _part_table(path.with_suffix(".parquet"))
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} or its .parquet is damaged ({error}): delete both and build again") from None
    if features.dtype != np.float32 or features.shape != (len(photos), dim):
        raise ValueError(
            f"{path}: features are {features.dtype} {features.shape}, expected float32 {(len(photos), dim)}: "
            "delete the part and build again"
        )
    if not np.array_equal(ids, photos.image_id.to_numpy()) or photos.path.isna().any():
        raise ValueError(f"{path} and its .parquet name different photos: delete both and build again")
    _check_finite(features, list(photos.path), f"{path} is damaged, delete it and build again")
    return photos, features


def _part_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A part's features and ids, as they were written; parts of an earlier version have no checksum."""
    if not path.is_file():
        raise ValueError("it is no regular file")
    with safe_open(path, "pt") as file:  # torch has names for all dtypes, numpy has not
        arrays, metadata = {name: file.get_tensor(name) for name in ("features", "image_id")}, file.metadata() or {}
    if CHECKSUM in metadata and checksum(arrays, metadata) != metadata[CHECKSUM]:
        raise ValueError("its content has another checksum than when it was written")
    if arrays["image_id"].dtype != torch.int64:
        raise TypeError(f"its image_id is {arrays['image_id'].dtype}")
    return arrays["features"].numpy(), arrays["image_id"].numpy()


def _part_table(path: Path) -> DataFrame:
    """A part's rows; a column of another dtype than was written is refused, since converting it may lose something."""
    table = pyarrow.parquet.read_table(path, columns=["image_id", "path", "pid"])
    for name, kind in zip(table.column_names, table.schema.types, strict=True):
        text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        if not (text if name == "path" else pyarrow.types.is_integer(kind)):
            raise TypeError(f"its column {name} is {kind}")
    return table.replace_schema_metadata(None).to_pandas().astype({"image_id": np.int64, "path": "str", "pid": "Int64"})
