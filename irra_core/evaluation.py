"""A trained model and annotated photos → `Evaluation`: every query's rank and the scores with their intervals."""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from pandas import DataFrame
from torch import Tensor

from irra_core.augmentation import moved, normalise
from irra_core.batches import ALONE, Team
from irra_core.images import image_array
from irra_core.metrics import INTERVAL, METRICS, bootstrap_means, query_metrics_from_features
from irra_core.objective import autocast
from irra_core.recipes import Recipe
from irra_core.settings import progress_bar
from irra_core.text import VOCABULARY, length_of, tokenize, trim

Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model on one split, in per cent, and what every single query got.

    `text_to_image` and `image_to_text` have one row per query: pid, image_id (and caption), rank of the first right
    result, R1, R5, R10 (0 or 100), AP, INP. `hard` marks the queries whose person has a near-twin in the gallery.
    """

    text_to_image: DataFrame
    image_to_text: DataFrame
    images: int

    @property
    def metrics(self) -> dict[str, Any]:
        """Everything that `metrics.json` keeps: each score as [value, low, high] (95 %, bootstrap over identities)."""
        queries = self.text_to_image
        found = {
            "queries": len(queries),
            "images": self.images,
            "identities": int(queries.pid.nunique()),
            "text_to_image": scores(queries),
            "image_to_text": scores(self.image_to_text),
        }
        if queries.hard.any():
            hard = queries[queries.hard]
            found["hard_negatives"] = {"queries": len(hard), "text_to_image": scores(hard)}
        return found

    def table(self) -> DataFrame:
        """One row per direction (and one for the hard negatives), columns R1 … mINP with `_low` and `_high`."""
        metrics = self.metrics
        rows = {"text to image": metrics["text_to_image"], "image to text": metrics["image_to_text"]}
        if "hard_negatives" in metrics:
            rows["text to image, hard negatives"] = metrics["hard_negatives"]["text_to_image"]
        return scores_table(rows)

    def _repr_html_(self) -> str:
        return readable(self.table())._repr_html_()


def evaluate(
    model,
    annotations: DataFrame,
    split: str = "test",
    *,
    pixels: Any | None = None,
    hard_pids: Collection[int] = (),
    precision: str = "auto",
    progress=None,
    team: Team = ALONE,
) -> Evaluation:
    """The scores of a model on one split: each caption searches all photos, and each photo all captions.

    `pixels` are the decoded photos of the whole table by image_id [N, 3, H, W]; without them they are decoded here.
    `hard_pids` are the people with a near-twin. Each process of a team encodes and ranks its share, and all get the
    whole. Raises ValueError when the split is empty.
    """
    rows = annotations[annotations.split == split]
    queries = rows.dropna(subset="caption").reset_index(drop=True)  # photos without a caption: gallery only
    if queries.empty:
        raise ValueError(f"split {split!r} has no rows: the table has {', '.join(sorted(set(annotations.split)))}")
    if model.clip.vocab_size != VOCABULARY:
        words = f"{model.clip.vocab_size:,} words, CLIP's {VOCABULARY:,}"
        raise ValueError(f"the model's vocabulary has {words}: it cannot read sentences")
    photos = rows.drop_duplicates("image_id").reset_index(drop=True)
    mine, my_captions = team.part(len(photos)), queries.caption[team.part(len(queries))].tolist()
    if pixels is None:
        height, width = model.image_size
        shown = image_array(list(photos.path), height, width, progress=progress).pixels[mine]
    else:
        shown = pixels[photos.image_id.to_numpy()[mine]]
    image = encode_images(model, shown, precision=precision, progress=progress)
    text = encode_texts(model, my_captions, precision=precision, progress=progress)
    image, text = team.gathered(image, len(photos)), team.gathered(text, len(queries))
    return rank_features(image, text, photos, queries, hard_pids, team)


def known_twins(annotations: DataFrame, recipe: Recipe) -> set[int]:
    """The people with a near-twin in their split; none are known in data that were not rendered."""
    from irra_core.synthetic.people import twin_pids

    return twin_pids(annotations, recipe)


def known_ceiling(annotations: DataFrame, recipe: Recipe) -> float | None:
    """The best R@1, in per cent, that the test captions of rendered people allow; None for other data."""
    from irra_core.synthetic.people import is_rendered, synthetic_ceiling

    return synthetic_ceiling(annotations) if is_rendered(annotations, recipe) else None


def rank_features(
    image: Float[Tensor, "images dim"],
    text: Float[Tensor, "captions dim"],
    photos: DataFrame,
    queries: DataFrame,
    hard_pids: Collection[int] = (),
    team: Team = ALONE,
) -> Evaluation:
    """The evaluation of L2-normalised features, row by row those of the two tables; a team shares the queries out."""
    query_pids, gallery_pids = (torch.tensor(table.pid.to_numpy()) for table in (queries, photos))
    found = _ranked_by(team, text, image, query_pids, gallery_pids)
    described = photos.pid.isin(queries.pid).to_numpy()  # others cannot ask for their caption
    asking = torch.tensor(described)
    back = _ranked_by(team, image[asking], text, gallery_pids[asking], query_pids)
    hard = np.isin(queries.pid.to_numpy(), list(hard_pids))
    about = {name: queries[name] for name in ("pid", "image_id", "caption")}
    about_photos = {name: photos[name].to_numpy()[described] for name in ("pid", "image_id")}
    return Evaluation(
        text_to_image=DataFrame(about | {"hard": hard} | {name: value.numpy() for name, value in found.items()}),
        image_to_text=DataFrame(about_photos | {name: value.numpy() for name, value in back.items()}),
        images=len(photos),
    )


def _ranked_by(
    team: Team,
    query: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    query_pids: Int[Tensor, " queries"],
    gallery_pids: Int[Tensor, " gallery"],
) -> dict[str, Num[Tensor, " queries"]]:
    """`query_metrics_from_features`, of which each process counts its share of the queries."""
    mine = team.part(len(query))
    found = query_metrics_from_features(query[mine], gallery, query_pids[mine], gallery_pids)
    rows = torch.stack([column.double() for column in found.values()], 1)  # ranks are exact in float64
    columns = team.gathered(rows, len(query)).unbind(1)
    return {name: whole.to(column.dtype) for (name, column), whole in zip(found.items(), columns, strict=True)}


def scores(queries: DataFrame) -> dict[str, Interval]:
    """R1, R5, R10, mAP and mINP of per-query values, each with its 95 % interval."""
    values = np.stack([queries[column].to_numpy(dtype=np.float64) for column in METRICS.values()], axis=1)
    ends = np.quantile(bootstrap_means(values, queries.pid.to_numpy()), INTERVAL, axis=0)
    intervals = np.stack([values.mean(0), *ends], axis=1).tolist()
    return {name: tuple(interval) for name, interval in zip(METRICS, intervals, strict=True)}


def gain(after: DataFrame, before: DataFrame) -> dict[str, Interval]:
    """How much better the same queries do after than before, paired: the interval of each score's difference."""
    if not np.array_equal(after.pid.to_numpy(), before.pid.to_numpy()):
        raise ValueError("the two evaluations have different queries: compare runs on the same data and split")
    difference = DataFrame({"pid": after.pid})
    for column in METRICS.values():
        difference[column] = after[column].to_numpy(dtype=np.float64) - before[column].to_numpy(dtype=np.float64)
    return scores(difference)


def scores_table(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> DataFrame:
    """Name → {score: (value, low, high)} as a tidy table: columns R1, R1_low, R1_high, …, in per cent."""
    table = {}
    for row, found in rows.items():
        table[row] = {f"{name}{end}": v for name in found for end, v in zip(("", "_low", "_high"), found[name])}
    return DataFrame.from_dict(table, orient="index")


def readable(table: DataFrame) -> DataFrame:
    """The table for the eye: `81.2 [79.0, 83.1]`, one column per score."""
    names = [name for name in METRICS if name in table]
    text = {}
    for name in names:
        rows = zip(table[name], table[f"{name}_low"], table[f"{name}_high"])
        text[f"{name} (%)"] = [f"{value:.1f} [{low:.1f}, {high:.1f}]" for value, low, high in rows]
    return DataFrame(text, index=table.index)


def encode_images(
    model, pixels: Any, *, batch_size: int = 256, precision: str = "auto", progress=None
) -> Float[Tensor, "n dim"]:
    """L2-normalised float32 features, on the CPU, of decoded photos (uint8 [N, 3, H, W])."""
    device = next(model.parameters()).device

    def encode(start: int) -> Tensor:
        chunk = torch.from_numpy(np.require(pixels[start : start + batch_size], requirements=["W", "E"]))
        return model.encode_image(normalise(moved(chunk, device)))

    return _encoded(model, encode, len(pixels), batch_size, precision, progress, "photo")


def encode_texts(
    model, captions: Sequence[str], *, batch_size: int = 256, precision: str = "auto", progress=None
) -> Float[Tensor, "n dim"]:
    """L2-normalised float32 features, on the CPU, of sentences."""
    device = next(model.parameters()).device
    tokens = tokenize(list(captions) or [""], length=length_of(model))  # of no sentences, features of the right width
    order = (tokens != 0).sum(1).argsort(stable=True)  # captions of one length together: little padding to compute

    def encode(start: int) -> Tensor:
        (chunk,) = trim(tokens[order[start : start + batch_size]], device=device)
        return model.encode_text(moved(chunk, device))

    found = _encoded(model, encode, len(tokens), batch_size, precision, progress, "caption")
    return torch.empty_like(found).index_copy_(0, order, found)[: len(captions)]


def _encoded(model, encode, count: int, batch_size: int, precision: str, progress, unit: str) -> Tensor:
    """The L2-normalised features of all batches of one encoder.

    A GPU is left to work: while it encodes one batch the next is read and sent, and the features stay there to the end.
    """
    device = next(model.parameters()).device
    parts, before = [], None
    shown = progress_bar(progress, total=count, unit=unit, desc="evaluating", leave=False)
    with shown as bar, scoring(model), torch.inference_mode(), autocast(device, precision):
        for start in range(0, max(count, 1), batch_size):  # of no rows, features of the right width
            parts.append(F.normalize(encode(start).float(), dim=1))
            if device.type == "cuda":
                if before:
                    before.synchronize()  # no more than one ahead: each batch on its way takes memory
                before = torch.cuda.current_stream(device).record_event()
            bar.update(len(parts[-1]))
    return torch.cat(parts).cpu().clone()  # a tensor of its own, not of inference mode


@contextlib.contextmanager
def scoring(model) -> Iterator[None]:
    """Within, the model is not in training mode; afterwards it is in the mode that it was in."""
    training = model.training
    if training:  # a model has hundreds of parts, each of which is told
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
