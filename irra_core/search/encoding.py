"""Photos and sentences → features that can be ranked; the arguments of a search → checked."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from pandas import DataFrame

from irra_core.evaluation import encode_images, encode_texts
from irra_core.images import decoded_array
from irra_core.recipes import RENDERED, Recipe
from irra_core.settings import data_root, progress_bar
from irra_core.text import whole_characters

RENDERED_ONLY = (
    "This model was trained on rendered people only: on photos its ranking means little. For photos take "
    "irra.load_model('clip'), a checkpoint of the released code, or train on captions of your own (docs/own_photos.md)."
)
SHARD = 1024  # photos that are decoded, encoded and stored together: what an interruption costs at most


def check_recipe(model, recipe: Recipe | None, images: DataFrame | str | Path) -> None:
    """Refuse a recipe whose photos have another size than the model's; warn where it learnt from rendered people.

    The warning is for a folder of photos from elsewhere. A table is a data set, whose name its user has chosen.
    """
    if recipe and (recipe.image_height, recipe.image_width) != tuple(model.image_size):
        raise ValueError(
            f"the recipe's photos are {recipe.image_height}×{recipe.image_width}, the model's "
            f"{model.image_size[0]}×{model.image_size[1]}: give the recipe that the model was built with"
        )
    if recipe is None or recipe.dataset not in RENDERED or isinstance(images, DataFrame):
        return
    if not any(Path(images).resolve().is_relative_to((data_root() / name).resolve()) for name in RENDERED):
        warnings.warn(RENDERED_ONLY, stacklevel=3)


def encoded_photos(
    model, photos: DataFrame, precision: str, unreadable: list[tuple[str, str]], progress
) -> Iterator[tuple[DataFrame, Float32[np.ndarray, "_ dim"]]]:
    """Rows and features, a shard at a time; files that cannot be read go to `unreadable`, with the reason."""
    with progress_bar(progress, total=len(photos), desc="photos", unit="photo") as bar:
        for start in range(0, len(photos), SHARD):
            shard = photos[start : start + SHARD]
            pixels, reasons = decoded_array(list(shard.path), *model.image_size)
            unreadable += reasons.items()
            if len(pixels):
                shard = shard[~shard.path.isin(reasons)].reset_index(drop=True)
                features = encode_images(model, pixels, precision=precision).numpy()
                check_unit(features, list(shard.path))
                yield shard, features
            bar.update(len(pixels) + len(reasons))


def encoded_queries(
    model, text: str | Sequence[str], width: int, precision: str
) -> tuple[list[str], Float32[np.ndarray, "q dim"]]:
    """The checked sentences and their features.

    Raises ValueError for features of another width than the gallery's, or that cannot be ranked.
    """
    queries = checked_queries(text)
    features = encode_texts(model, queries, precision=precision).numpy()
    if features.shape[1] != width:
        raise ValueError(
            f"the model gives features of width {features.shape[1]}, the gallery's have {width}: "
            "search with the model that built it"
        )
    check_unit(features, queries)
    return queries, features


def check_unit(
    features: Float32[np.ndarray, "n dim"],
    names: Sequence[str],
    remedy: str = "the model's weights are damaged, load another checkpoint",
) -> None:
    """Refuse features that cannot be ranked: NaN, infinite or zero."""
    broken = np.flatnonzero(~(np.abs(np.linalg.norm(features, axis=1) - 1) < 1e-2))  # NaN is never below
    if len(broken):
        raise ValueError(
            f"{len(broken)} of {len(features)} features are not unit vectors (NaN or zero), first that of "
            f"{names[broken[0]]!r}: {remedy}"
        )


def checked_queries(text: str | Sequence[str]) -> list[str]:
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


def checked_k(k: int) -> int:
    """The number of results. Raises ValueError for one below 1."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k is {k!r}: accepted is a number of results from 1")
    return int(k)
