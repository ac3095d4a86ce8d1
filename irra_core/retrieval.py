"""A model + photos → `Gallery`; text → the ranked table."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pandas import DataFrame

from irra_core.batches import ALONE, Team, member
from irra_core.recipes import Recipe
from irra_core.settings import short, unknown


class Gallery:
    """Photos of people and their features under one model: what a sentence searches.

    `Gallery.build` encodes photos, `Gallery.load` opens a stored gallery. `unreadable` lists the files that were
    skipped (path, reason).

    Several processes, on one machine or many, fill one folder or url: `build` is given each one's number and encodes
    its share of the photos; when all are done, `load` opens the whole. Until then each process has its own share, which
    it searches exactly, and lists the unreadable files of that share. A last call of `build` by one process lists all
    unreadable files, and writes the `hnsw` graph into the folder, which each `load` would have to build otherwise.
    """

    def __init__(self, model, store, precision: str = "auto"):
        """`store` has the features and rows: a `search.nearest.Memory` or a `search.milvus.Milvus`."""
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

        A folder is searched, with its subfolders, for files with an image's ending. `index` is `exact`, or `hnsw`:
        faster and approximate (see `recall`). With `folder`, every 1,024 photos are written there, and a second call
        resumes where the first was interrupted. With `url` the gallery is stored in Milvus and resumes there: a path
        ending in .db is embedded Milvus Lite, http://… a server or a cluster; #name at the end selects one of several
        galleries. `recipe` sets the arithmetic (`precision`). Raises ValueError when no photo can be read, or when
        folder, url or recipe belong to another model.
        """
        from irra_core.search.encoding import check_recipe
        from irra_core.search.photo_table import nothing_to_read, photo_table
        from irra_core.search.stores import opened_store

        check_recipe(model, recipe, images)
        team = member(process, processes)
        with opened_store(model, index, url, folder, team) as store:
            gallery = cls(model, store, recipe.precision if recipe else "auto")
            photos, misnamed = photo_table(images)
            photos, misnamed = photos[team.part(len(photos))].reset_index(drop=True), misnamed[team.part(len(misnamed))]
            gallery._add(photos, misnamed, progress, folder, team)
            if not len(gallery) and (len(photos) or team == ALONE):
                raise nothing_to_read(images, gallery.unreadable)
        return gallery

    @property
    def images(self) -> DataFrame:
        """One row per photo: image_id, path, pid (<NA> where unknown)."""
        return self._store.images

    def __len__(self) -> int:
        return len(self._store)

    def __repr__(self) -> str:
        left = f", {len(self.unreadable):,} left out: see unreadable" if len(self.unreadable) else ""
        return f"Gallery({len(self):,} photos{left}, {self._store})"

    def search(self, text: str | Sequence[str], k: int = 10, rerank: str | None = None) -> DataFrame:
        """The k best photos for each sentence, best first: query, rank (from 1), score (cosine), path, pid, image_id.

        `rerank` sorts the best 100 again by their neighbours (`reciprocal`), or the best 20 by how well the sentence's
        words follow from them (`words`, which decodes the photos again); the column `reranked` then has the scores of
        that order. A gallery of fewer photos gives all of them. Raises ValueError for an empty sentence or k below 1.
        """
        from irra_core.search.encoding import checked_k, encoded_queries

        k = checked_k(k)
        queries, features = encoded_queries(self.model, text, self._store.dim, self.precision)
        if rerank is None:
            return self._ranking(queries, *self._store.nearest(features, k))
        from irra_core.search.reranking import CANDIDATES, second_scores

        if rerank not in CANDIDATES:
            raise unknown("rerank", rerank, CANDIDATES)
        scores, ids = self._store.nearest(features, max(k, CANDIDATES[rerank]))
        second = np.full_like(scores, -np.inf)
        for row, query in enumerate(queries):
            hits = np.isfinite(scores[row])
            second[row, hits] = second_scores(
                rerank, self.model, self._store, query, scores[row, hits], ids[row, hits], self.precision
            )
        best = np.argsort(-second, axis=1, kind="stable")[:, :k]
        return self._ranking(queries, *(np.take_along_axis(each, best, 1) for each in (scores, ids, second)))

    def _ranking(
        self, queries: list[str], scores: np.ndarray, ids: np.ndarray, second: np.ndarray | None = None
    ) -> DataFrame:
        """The tidy table of the hits; equal scores in the order of the ids."""
        order = np.lexsort((ids, -(scores if second is None else second)))
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        query, rank = np.nonzero(np.isfinite(scores))  # an approximate index may return fewer than k
        rows = self._store.rows(ids[query, rank])
        table = DataFrame({"query": pd.array(queries, dtype="str")[query], "rank": rank + 1})
        table["score"] = scores[query, rank].astype(np.float64)
        table = table.assign(**{name: rows[name].array for name in ("path", "pid", "image_id")})
        if second is not None:
            table["reranked"] = np.take_along_axis(second, order, 1)[query, rank].astype(np.float64)
        return table

    def neighbours(self, image_id: int, k: int = 10) -> DataFrame:
        """The k photos nearest to one of the gallery's, itself left out: query (its path), and `search`'s columns."""
        from irra_core.search.encoding import checked_k

        query_id = np.array([image_id])
        query = self._store.rows(query_id).path[0]
        scores, ids = self._store.nearest(self._store.features_of(query_id), checked_k(k) + 1)
        itself = ids == image_id
        return self._ranking([query], scores[~itself][None, :k], ids[~itself][None, :k])

    def recall(self, k: int = 10, queries: Sequence[str] | None = None) -> float:
        """The share of the true k best that the index returns: 1.0 for an exact one.

        Give sentences that people would search with: without, up to 1,000 of the gallery's own photos are the queries,
        and an approximate index has a higher recall for photos than for sentences.
        """
        from irra_core.search.stores import recall

        return recall(self._store, self.model, self.precision, k, queries)

    def add(self, images: DataFrame | str | Path, progress=None) -> int:
        """How many photos of a table, a folder or a single file were added; those already here are skipped."""
        from irra_core.search.photo_table import photo_table

        return self._add(*photo_table(images), progress)

    def _add(
        self,
        photos: DataFrame,
        misnamed: list[tuple[str, str]],
        progress=None,
        folder: str | Path | None = None,
        team: Team = ALONE,
    ) -> int:
        """How many photos were added, and written to the folder if there is one."""
        from irra_core.search.encoding import encoded_photos
        from irra_core.search.photo_table import check_paths

        stored = self._store.rows(photos.image_id.to_numpy(), known=False)
        check_paths(photos, stored)
        photos, unreadable = photos[~photos.image_id.isin(stored.image_id)].reset_index(drop=True), list(misnamed)
        shards = encoded_photos(self.model, photos, self.precision, unreadable, progress)
        if folder:
            from irra_core.search.folder import written

            shards = written(shards, Path(folder), team)
        self._store.extend(shards)
        skipped = DataFrame(unreadable, columns=["path", "reason"], dtype="str")
        earlier = self.unreadable[~self.unreadable.path.isin([*photos.path, *skipped.path])]
        self.unreadable = pd.concat([earlier, skipped], ignore_index=True)
        return len(photos) + len(misnamed) - len(skipped)

    def remove(self, image_ids: Iterable[int | np.integer]) -> int:
        """How many photos were taken out. Raises ValueError for an image_id that is not here."""
        given = list(image_ids)
        for one in given:
            if not isinstance(one, int | np.integer) or not -(2**63) <= one < 2**63:
                raise ValueError(f"image_id {short(one)} is not in the gallery: it is no whole number of 64 bits")
        ids = np.unique(np.array(given, dtype=np.int64))
        self._store.rows(ids)
        self._store.remove(ids)
        return len(ids)

    def save(self, folder: str | Path) -> None:
        """Write features, table and index to a folder, which appears complete or not at all.

        A gallery that is there is replaced. Raises ValueError for a folder that holds something else.
        """
        from irra_core.search.stores import save_store

        save_store(self._store, self.model, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, model, index: str | None = None) -> "Gallery":
        """The gallery that `save`, or `build` with a folder, wrote; `index` replaces the one it had.

        Every file is checked before it is used. The url of a gallery in Milvus opens that one. Raises ValueError when a
        file is damaged or missing or another model wrote the gallery, FileNotFoundError when there is none. A missing
        file is not noticed where several processes filled the folder and no last call of one completed it.
        """
        from irra_core.search.stores import load_store

        return cls(model, load_store(folder, model, index))
