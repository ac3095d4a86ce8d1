"""Settings in the environment → the page that `irra explore` serves, which says what it does while it loads."""

import html
import io
import json
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ipywidgets
import regex
from tqdm import tqdm

SETTINGS = "IRRA_EXPLORE"  # the environment variable with the settings, as JSON
ANY = "*"  # stands for all words
TITLE = "Find a person by a description"


def page() -> ipywidgets.Box:
    """The page of the settings in IRRA_EXPLORE: at once a line that says what is loaded, then the explorer.

    Loading goes on in a thread: the page is there before torch is imported. The settings are `models` (pairs of a
    label and a source of `load_model`), and either `photos` (a folder) or `dataset`.
    """
    head, status = ipywidgets.HTML(f"<h1>{TITLE}</h1>"), ipywidgets.HTML()
    box = ipywidgets.VBox([head, status])
    box.add_class("irra-app")
    _say(status, "Starting")
    threading.Thread(target=_fill, args=(box, status, json.loads(os.environ[SETTINGS])), daemon=True).start()
    return box


def _fill(box: ipywidgets.Box, status: ipywidgets.HTML, settings: dict[str, Any]) -> None:
    """Put the explorer into the page, or the one sentence that says why it cannot be there."""
    try:
        explorer, remarks = load(settings, lambda words: _say(status, words))
    except Exception as error:
        status.value = f'<p role="alert" class="irra-failed">{html.escape(str(error) or type(error).__name__)}</p>'
        return
    status.value = "".join(f'<p class="irra-remark">{html.escape(remark)}</p>' for remark in remarks)
    box.children = [box.children[0], status, explorer] if remarks else [box.children[0], explorer]


def _say(status: ipywidgets.HTML, words: str) -> None:
    status.value = f'<p role="status">{html.escape(words)} …</p>'


def load(settings: dict[str, Any], say: Callable[[str], None]) -> tuple[Any, list[str]]:
    """The explorer of these settings, and remarks on its models and photos; `say` is called with what is done.

    Raises as `load_model` and `kept_gallery` do.
    """
    say("Loading the libraries")
    from irra_core.hub.sources import ZERO_SHOT
    from irra_core.search.encoding import RENDERED_ONLY

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        explorer, left_out = _explorer(settings, say)
    ours = (ZERO_SHOT, RENDERED_ONLY)
    remarks = [remark for remark in ours if any(str(each.message) == remark for each in said)]
    remarks += [str(each.message) for each in said if str(each.message).startswith("hub:")]  # which commit it is
    if left_out:
        remarks.append(f"{left_out:,} of the photos cannot be read and are left out.")
    return explorer, remarks


def _explorer(settings: dict[str, Any], say: Callable[[str], None]) -> tuple[Any, int]:
    """The explorer, and how many photos were left out."""
    from irra_core.explorer.widget import QueryExplorer
    from irra_core.hub.sources import load_model
    from irra_core.search.kept import kept_gallery

    def bars(**shown: Any) -> tqdm:
        return _Bar(say, **shown)

    photos, people, galleries, learned = settings.get("photos"), None, {}, set()
    for label, source in settings["models"]:
        say(f"Loading the model {label}".rstrip())
        model, recipe = load_model(source)
        if photos is None and people is None:
            say("Reading the data set")
            annotations = _data_set(settings["dataset"], recipe, bars)
            people = annotations[annotations.split == "test"]
        learned |= _words(recipe, settings.get("dataset"), None if people is None else annotations)
        say(f"Opening the photos for the model {label}".rstrip())
        galleries[label] = kept_gallery(model, photos or people, progress=bars, recipe=recipe)
    say("Opening the page")
    explorer = QueryExplorer(galleries, people, vocabulary=None if ANY in learned else learned)
    return explorer, max(len(gallery.unreadable) for gallery in galleries.values())


def _data_set(dataset: str, recipe: Any, progress: Callable) -> Any:
    """The table of a data set; rendered people are rendered first if need be, in the size that the recipe reads."""
    from irra_core.annotations import load_annotations
    from irra_core.images import open_annotations
    from irra_core.recipes import RENDERED
    from irra_core.recipes import recipe as usual

    if dataset not in RENDERED:
        return load_annotations(dataset)
    size = {"image_height": recipe.image_height, "image_width": recipe.image_width}
    own = recipe if recipe.dataset == dataset else usual(dataset, _smoke=False).replace(**size)
    return open_annotations(own, progress=progress)


def _words(recipe: Any, dataset: str | None, annotations: Any) -> set[str]:
    """The words of the captions that a model was trained on; {ANY} where they are not at hand."""
    from irra_core.annotations import load_annotations

    if annotations is None or recipe.dataset != dataset:
        try:
            annotations = load_annotations(recipe.dataset)
        except (OSError, ValueError):  # CLIP's captions, or a data set that is elsewhere
            return {ANY}
    captions = annotations.caption[annotations.split == "train"]
    return set(regex.findall(r"\p{L}+", " ".join(captions).lower())) or {ANY}


class _Bar(tqdm):
    """A bar that is a line of words: what, how many of how many, and the time left."""

    def __init__(self, say: Callable[[str], None], **shown: Any):
        self._say = say
        super().__init__(**shown, file=io.StringIO(), mininterval=0.5)

    def display(self, *_: Any, **__: Any) -> None:
        state = self.format_dict
        words = (state["prefix"] or "").rstrip(": ")
        if state["total"]:
            words += f": {state['n']:,} of {state['total']:,}"
        if state["rate"] and state["total"]:
            words += f", {(state['total'] - state['n']) / state['rate']:.0f} s left"
        with suppress(Exception):
            self._say(words[:1].upper() + words[1:])
