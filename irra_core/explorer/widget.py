"""A `Gallery` → the ipywidgets query explorer."""

import base64
import contextlib
import hashlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import pandas as pd
import regex
import torch
import traitlets
from pandas import DataFrame

from irra_core.analysis.explanations import explain, fill_masks
from irra_core.augmentation import load_images
from irra_core.images import UnreadableImages, open_photo
from irra_core.metrics import query_metrics
from irra_core.recipes import recipe
from irra_core.retrieval import Gallery
from irra_core.runs import write_text
from irra_core.settings import reports_root
from irra_core.text import END_ID, MASK_ID, detokenize_words, length_of, tokenize, whole_characters

THUMBNAIL = (192, 288)  # pixels: twice the size on the page, for high-resolution screens
LONGEST = 5000  # characters of a query: ten times as many as the model reads
DEEP = 10_000  # ranks searched for the right photos
OTHERS = 100  # other descriptions, with whose scores those on the page are compared
COLOURS = ("black", "white", "grey", "red", "blue", "green", "yellow", "brown")
CHOICES = (5, 10, 20, 50)  # values of k offered on the page
WRITABLE = ("query", "k", "held")  # what the page may change; all else is what the kernel found

Card = dict[str, Any]  # the page's data about one photo


class QueryExplorer(anywidget.AnyWidget):
    """A notebook widget that searches photos by a sentence and explains the ranking; the last line of a cell shows it.

    galleries: a Gallery, or name → Gallery to compare checkpoints on the same sentence, with one strip of photos each.
    annotations: known sentences (columns pid, path, caption). They are offered as examples; for these sentences, right
    and wrong photos are framed. vocabulary: the words of the captions that the models were trained on; the page names
    the words of a query that are not among them. `query` and `k` set the first search, and can be read and set later.
    `held` is the sentence whose ranking is the reference for rank changes, `picture` the image_id of the open photo.
    `state` holds these four: `QueryExplorer(gallery, annotations, **state)` restores the page.
    """

    _esm = Path(__file__).with_name("widget.js")
    _css = Path(__file__).with_name("widget.css")

    query = traitlets.Unicode("").tag(sync=True)
    k = traitlets.Int(10, min=1, max=200).tag(sync=True)
    held = traitlets.Unicode("").tag(sync=True)  # the query whose ranking is the reference for rank changes
    setup = traitlets.Dict().tag(sync=True)
    view = traitlets.Dict().tag(sync=True)  # the results of the query
    explanation = traitlets.Dict().tag(sync=True)
    fills = traitlets.Dict().tag(sync=True)
    picture = traitlets.Dict().tag(sync=True)  # the photo that was clicked
    note = traitlets.Unicode("").tag(sync=True)

    def __init__(
        self,
        galleries,
        annotations: DataFrame | None = None,
        *,
        vocabulary: Iterable[str] | None = None,
        query: str = "",
        k: int = 10,
        held: str = "",
        picture: int | None = None,
        examples: int = 24,
    ):
        self._galleries = dict(galleries) if isinstance(galleries, Mapping) else {"": galleries}
        self._annotations = _known(next(iter(self._galleries.values())), annotations)
        self._vocabulary = None if vocabulary is None else {word.lower() for word in vocabulary}
        self._others, self._other_features = others(self._annotations, OTHERS), {}
        self._serial, self._results, self._held_ranks, self._truth, self._explained = 0, {}, {}, None, []
        self.failure: Exception | None = None  # the last error; the page shows its message
        super().__init__(query=query, k=k, held=held)
        models = [getattr(gallery, "model", None) for gallery in self._galleries.values()]
        self.setup = {
            "examples": _examples(self._annotations, examples),
            "choices": sorted({*CHOICES, k}),
            "longest": LONGEST,
            "explains": all(model is not None for model in models),
        }
        self.on_msg(self._receive)
        self.observe(self._search, ["query", "k", "held"])
        self._search()
        if picture is not None:
            self._show(picture)

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Take from the page what a person can do there, and nothing else: a sentence, a number of photos, a reference.

        ipywidgets calls this with whatever a page sends.
        """
        taken = {name: value for name, value in sync_data.items() if name in WRITABLE}
        taken |= {name: value[:LONGEST] for name, value in taken.items() if isinstance(value, str)}
        if isinstance(taken.get("k"), bool) or taken.get("k") not in self.setup["choices"]:
            taken.pop("k", None)
        with contextlib.suppress(traitlets.TraitError):  # of another type than the page's
            super().set_state(taken)

    @property
    def state(self) -> dict[str, Any]:
        """The arguments that restore this page: query, k, held and picture, as plain values."""
        return {"query": self.query, "k": self.k, "held": self.held, "picture": self.picture.get("image_id")}

    @property
    def results(self) -> DataFrame:
        """The photos on the page: `Gallery.search`'s columns, `right` where known, and `gallery`, the strip's name."""
        strips = [table.assign(gallery=name) for name, table in self._results.items()]
        return pd.concat(strips, ignore_index=True) if strips else DataFrame()

    def figure(self):
        """The page's ranking as a matplotlib Figure, one row per strip. Raises ValueError when nothing is shown."""
        from matplotlib.figure import Figure  # here, because a page is faster there without it

        from irra_core.analysis import plots

        if not self._results:
            raise ValueError("there is no ranking to draw: set query to a sentence first")
        lines = -(-self.k // 10)
        figure = Figure(figsize=(plots.WIDTH, 4.3 * lines * len(self._results)), layout="constrained")
        truth = None if self._truth is None else self._truth["path"]
        axes = figure.subplots(len(self._results), squeeze=False)[:, 0]
        for (name, table), ax in zip(self._results.items(), axes, strict=True):
            plots.ranking(table, truth=truth, ax=ax)
            title = "\n".join(part for part in (ax.get_title(loc="left") if ax is axes[0] else "", name) if part)
            ax.set_title(title, loc="left", fontsize=12, pad=28, parse_math=False)
        return figure

    def save(self, folder: str | Path | None = None) -> Path:
        """Write the page's ranking as a PNG, and its caption as a .txt beside it, by default to `reports/explorer`."""
        from irra_core.analysis import plots

        figure = self.figure()
        folder = reports_root() / "explorer" if folder is None else Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text, file = self.view["query"], folder / self._file_name()
        plots.save(figure, file, dpi=150, bbox_inches="tight")
        lines = [f"“{text}”"]
        for strip, (name, gallery) in zip(self.view["strips"], self._galleries.items(), strict=True):
            said = [name, f"first {len(strip['cards'])} of {len(gallery.images):,} photos", strip["standing"]]
            lines.append("; ".join(part for part in said if part))
        lines.append(f"To see it again: QueryExplorer(gallery, annotations, query={text!r}, k={self.k})")
        write_text(file.with_suffix(".txt"), "\n".join(lines) + "\n")
        return file

    def _file_name(self) -> str:
        """The figure's name: the first words of the query, and a hash of all that it depends on."""
        text = self.view["query"]
        words = "-".join(re.findall(r"[a-z0-9]+", text.lower()))[:40].strip("-")
        digest = hashlib.blake2b(repr((text, self.k, *self._results)).encode(), digest_size=4).hexdigest()
        return f"{words or 'query'}-{digest}.png"

    def _search(self, change: Mapping | None = None) -> None:
        """Show the results of the query."""
        self._serial += 1
        self._results, self._truth, self.note = {}, None, ""
        text = _searched(self.query)
        view = {"serial": self._serial, "query": text, "words": [], "masks": 0, "strips": [], "truth": None}
        if not text:
            self.note = "Describe a person above" + (", or take an example." if self.setup.get("examples") else ".")
        with self._plain_words("This sentence cannot be searched"):
            if text:
                view |= self._answer(text)
        self.view = view

    def _answer(self, text: str) -> dict[str, Any]:
        """The part of the view that depends on the sentence, from a search of every gallery."""
        known = self._annotations[self._annotations["caption"].str.strip() == text]
        self._truth = None if known.empty else known.iloc[0]
        strips = []
        for name, gallery in self._galleries.items():
            table = self._ranked(gallery, text)
            self._results[name] = table.head(self.k)
            cards = [_card(row) for row in table.head(self.k).itertuples()]
            self._compare(name, gallery, cards)
            self._note_moves(name, gallery, cards)
            strips.append({"name": name, "standing": self._standing(table), "cards": cards})
        tokens = tokenize(
            [text], length=max(length_of(getattr(each, "model", None)) for each in self._galleries.values())
        )
        self.note = self._doubt(text)
        if _is_cut(text, tokens):
            self.note = "This is longer than the model can read: it reads the words below and ignores the rest."
        words = [word for word, _ in detokenize_words(tokens[0])]
        masks = int((tokens == MASK_ID).sum()) if "[MASK]" in text else 0
        truth = None if self._truth is None else _thumbnail(str(self._truth["path"])) | {"pid": int(self._truth["pid"])}
        found = {"words": words, "masks": masks, "strips": strips, "truth": truth}
        return found | {"open": self._place(strips, self.picture.get("image_id"))}

    def _compare(self, name: str, gallery, cards: list[Card]) -> None:
        """Add to each card how many of 100 other descriptions score lower on its photo."""
        if not isinstance(gallery, Gallery) or not cards:
            return
        from irra_core.search.typical import kept_sentences, shares_below

        if name not in self._other_features:
            self._other_features[name] = kept_sentences(gallery, self._others)
        ids = np.array([card["image_id"] for card in cards], np.int64)
        scores = np.array([card["score"] for card in cards], np.float32)
        for card, share in zip(cards, shares_below(gallery, ids, scores, self._other_features[name]), strict=True):
            card["beats"] = math.floor(100 * float(share) + 1e-4)

    def _doubt(self, text: str) -> str:
        """A sentence that says what the model cannot know in a text; empty where nothing is known against it."""
        if regex.search(r"[\p{L}--\p{Latin}]", text, regex.V1):
            return "The model learned English sentences only: what it finds for other writing means little."
        words = list(dict.fromkeys(regex.findall(r"\p{L}+", text.replace("[MASK]", " ").lower())))
        new = [word for word in words if self._vocabulary is not None and word not in self._vocabulary]
        if not new:
            return ""
        if len(words) > 2 and 2 * len(new) > len(words):
            return "The model learned hardly any of these words. If this is not English, write it in English."
        shown = ", ".join(new[:6]) + (", …" if len(new) > 6 else "")
        return f"Not in the captions that the model was trained on: {shown}. It may not know what this means."

    def _place(self, strips: list[dict], image_id: int | None) -> str:
        """Where the open photo is in the ranking, in words; empty without a photo or a ranking."""
        if image_id is None or not strips:
            return ""
        for card in strips[0]["cards"]:
            if card["image_id"] == image_id:
                return f"rank {card['rank']} for this description"
        return f"not among the first {len(strips[0]['cards'])} for this description"

    def _ranked(self, gallery, text: str) -> DataFrame:
        """The best photos; if the person is known, with `right` and up to DEEP ranks, for average precision."""
        if self._truth is None:
            return gallery.search(text, self.k)
        table = gallery.search(text, max(self.k, min(DEEP, len(gallery.images))))
        return table.assign(right=(table["pid"] == self._truth["pid"]).fillna(False).astype(bool))

    def _standing(self, table: DataFrame) -> str:
        """The ranks of the right photos in words; empty if they are unknown."""
        if "right" not in table:
            return ""
        if not table["right"].any():
            return f"no right photo among the first {len(table):,}"
        first = table.loc[table["right"], "rank"].min()
        if len(table) <= self.k:
            return f"first right photo at rank {first:,}"
        pids = torch.tensor(table["right"].to_numpy(dtype=np.int64))
        scores = torch.tensor(table["score"].to_numpy()[None])
        precision = query_metrics(scores, torch.ones(1, dtype=torch.int64), pids)["AP"]
        return f"first right photo at rank {first:,} · average precision {precision.item():.0f} %"

    def _note_moves(self, name: str, gallery, cards: list[Card]) -> None:
        """Add to each card its rank change since the held query ("new": not among the first 10 · k ranks of it)."""
        held = _searched(self.held)
        if not held:
            return
        if (name, held) not in self._held_ranks:
            table = gallery.search(held, 10 * self.k)
            self._held_ranks = {(name, held): dict(zip(table["image_id"], table["rank"]))} | {
                key: ranks for key, ranks in self._held_ranks.items() if key[1] == held
            }
        before = self._held_ranks[name, held]
        for card in cards:
            rank = before.get(card["image_id"])
            card["moved"] = "new" if rank is None else int(rank - card["rank"])

    def _receive(self, _, message: Any, buffers: Any) -> None:
        """Handle a message from the page: explain the ranking, fill in masks, open a photo, or save the figure."""
        kind = message.get("kind") if isinstance(message, dict) else None
        current = isinstance(message, dict) and message.get("serial") == self._serial
        if kind == "explain" and current:
            with self._plain_words("This ranking cannot be explained"):
                self._explain(message.get("strip"), message.get("place"))
        elif kind == "fill" and current:
            with self._plain_words("[MASK] cannot be filled in"):
                self._fill()
        elif kind == "picture":
            with self._plain_words("This photo cannot be shown"):
                self._show(message.get("image_id"))
        elif kind == "save":
            with self._plain_words("The figure cannot be saved"):
                name, image = self._file_name(), io.BytesIO()
                figure = self.figure()
                figure.savefig(image, dpi=150, bbox_inches="tight", metadata={"Description": self.view["query"]})
                self.send({"kind": "figure", "name": name}, [image.getvalue()])
                self.note = f"Downloaded as {name}"

    def _explain(self, strip: int | None, place: int | None) -> None:
        """Send all contributions, and the maps of all photos, or only of the requested one if each costs 48 passes."""
        if self.explanation.get("serial") != self._serial:
            self._explained = [{} for _ in self._results]
        for number, (name, table) in enumerate(self._results.items()):
            model, known = self._galleries[name].model, self._explained[number]
            looked_at = range(len(table))
            if model.interaction is None:
                looked_at = [place] if strip == number and place in looked_at else []
            looked_at = [photo for photo in looked_at if "map" not in known.get("photos", {}).get(photo, {})]
            if not known or looked_at:
                result = explain(model, _images(model, list(table["path"])), self.view["query"], looked_at)
                photos = {
                    photo: known.get("photos", {}).get(photo, {}) | sent for photo, sent in _sent(result, looked_at)
                }
                rows, cols = result.maps.shape[2:]
                self._explained[number] = {"method": result.method, "rows": rows, "cols": cols, "photos": photos}
        strips = [strip | {"photos": {str(k): v for k, v in strip["photos"].items()}} for strip in self._explained]
        self.explanation = {"serial": self._serial, "strips": strips}

    def _fill(self) -> None:
        """Send the most probable words of each mask per photo; for a model without MLM, send a note instead."""
        strips = []
        for name, table in self._results.items():
            model = self._galleries[name].model
            if model.mlm_head is None:
                strips.append({"note": "this model was trained without MLM and cannot fill in words", "photos": []})
                continue
            words = fill_masks(model, _images(model, list(table["path"])), self.view["query"])
            photos: list[list[list]] = [[[] for _ in range(self.view["masks"])] for _ in range(len(table))]
            for row in words.itertuples():
                photos[row.photo][row.mask].append([row.word, row.probability])
            strips.append({"note": "", "photos": photos})
        self.fills = {"serial": self._serial, "strips": strips}

    def _show(self, image_id: int | None) -> None:
        """Send a photo's captions and, if the gallery supports it, its nearest neighbours; None closes it."""
        if image_id is None:
            self.picture = {}
            return
        gallery = next(iter(self._galleries.values()))
        photo = gallery.images.set_index("image_id").loc[int(image_id)]
        captions = self._annotations.loc[self._annotations["path"] == photo["path"], "caption"].drop_duplicates()
        pid = _pid(photo.get("pid"))
        shown = _thumbnail(str(photo["path"])) | {"image_id": int(image_id), "pid": pid, "captions": list(captions)}
        if hasattr(gallery, "neighbours"):
            deep = self.k if pid is None else max(self.k, min(DEEP, len(gallery.images)))
            table = gallery.neighbours(int(image_id), deep)
            if pid is not None:
                table = table.assign(right=(table["pid"] == pid).fillna(False).astype(bool))
            shown["standing"] = self._standing(table)
            shown["neighbours"] = [_card(row) for row in table.head(self.k).itertuples()]
        now = {"open": self._place(self.view.get("strips", []), int(image_id)), "serial": self._serial}
        self.picture = shown | now

    @contextlib.contextmanager
    def _plain_words(self, what: str) -> Iterator[None]:
        """Context manager that shows an error as one sentence on the page, and stores the exception in `failure`."""
        try:
            yield
        except Exception as error:
            self.failure = error
            self.note = f"{what}: {error or type(error).__name__}"


def _searched(text: str) -> str:
    """The part of a text that is searched, a mask in any case as the model reads it."""
    return re.sub(r"\[mask\]", "[MASK]", whole_characters(text[:LONGEST]).strip(), flags=re.IGNORECASE)


def _known(gallery, annotations: DataFrame | None) -> DataFrame:
    """The sentences of people who are in the gallery; for others the right photo is unknown."""
    if annotations is None or "pid" not in gallery.images:
        return DataFrame({"pid": [], "path": [], "caption": []}).astype({"path": str, "caption": str})
    found = annotations["pid"].isin(gallery.images["pid"].dropna().unique())
    return annotations[found].dropna(subset="caption").reset_index(drop=True)


def _examples(annotations: DataFrame, n: int) -> list[str]:
    """Up to n captions of different people, the same at every start."""
    people = annotations[annotations["caption"].str.strip() != ""].drop_duplicates("pid")
    return list(people.sample(min(n, len(people)), random_state=0)["caption"].str.strip())


def others(annotations: DataFrame, n: int) -> list[str]:
    """n descriptions of somebody: captions of different people, then plain sentences on two garments."""
    plain = [
        f"a {who} in a {upper_colour} {upper} and {lower_colour} {lower}"
        for who in ("man", "woman")
        for upper in ("shirt", "jacket", "coat", "sweater")
        for lower in ("trousers", "jeans", "shorts")
        for upper_colour in COLOURS
        for lower_colour in COLOURS
    ]
    known = _examples(annotations, n)
    order = np.random.default_rng(1).permutation(len(plain))
    return [*known, *(plain[row] for row in order[: n - len(known)])]


def _is_cut(text: str, tokens: torch.Tensor) -> bool:
    """True if the text has more tokens than the model reads."""
    return bool(tokens[0, -1] == END_ID) and torch.equal(tokenize([text[:-1]], length=tokens.shape[1]), tokens)


def _pid(pid: Any) -> int | None:
    """A pid as an int, None if unknown."""
    return None if pid is None or pd.isna(pid) else int(pid)


def _card(row) -> Card:
    """The page's data about one row of a ranking."""
    right = getattr(row, "right", None)
    return _thumbnail(str(row.path)) | {
        "rank": int(row.rank),
        "score": float(row.score),
        "image_id": int(row.image_id),
        "pid": _pid(getattr(row, "pid", None)),
        "right": None if right is None else bool(right),
    }


@lru_cache(maxsize=4096)
def _thumbnail(path: str) -> dict[str, Any]:
    """A small JPEG as a data URL, and its width over its height; `src` is empty if the file cannot be read."""
    try:
        photo = open_photo(path, THUMBNAIL)
    except UnreadableImages:  # the page shows an empty frame with the file's name
        return {"src": "", "ratio": 1 / 3, "name": Path(path).name}
    photo.thumbnail(THUMBNAIL)
    data = io.BytesIO()
    photo.save(data, "JPEG", quality=82)
    encoded = base64.b64encode(data.getvalue()).decode()
    return {"src": f"data:image/jpeg;base64,{encoded}", "ratio": photo.width / photo.height, "name": Path(path).name}


def _images(model, paths: list[str]) -> torch.Tensor:
    """The photos as a batch in the model's size."""
    height, width = model.image_size
    return load_images(paths, recipe("cuhk", _smoke=False).replace(image_height=height, image_width=width))


def _sent(found, looked_at: list[int]) -> Iterator[tuple[int, dict]]:
    """Yields each photo's contributions and, if it was computed, its map: one byte per patch.

    255 is the word's maximum in this photo, but at least half its maximum over all photos: a photo with little
    evidence for the word stays dim, and one bright photo does not darken the others.
    """
    brightest = found.maps.max(axis=(2, 3), keepdims=True, initial=1e-12)
    brightest = np.maximum(brightest, brightest.max(axis=0, keepdims=True, initial=0) / 2)
    maps = dict(zip(looked_at, np.round(255 * found.maps / brightest).astype(np.uint8), strict=True))
    for photo, contributions in enumerate(found.contributions.tolist()):
        map_ = {"map": base64.b64encode(maps[photo].tobytes()).decode()} if photo in maps else {}
        yield photo, {"words": contributions} | map_
