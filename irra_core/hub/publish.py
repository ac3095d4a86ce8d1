"""A finished run → a model repository on the Hub: weights, recipe, scores, figures and a card, in one commit.

Nothing of the run folder is copied as it is: each file is written anew from what was read and checked, so that no
photo, no caption, no notebook and no path of this machine can go with it.
"""

import dataclasses
import importlib.metadata
import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from irra_core import runs
from irra_core.backbone import read_weights
from irra_core.checkpoints import load_checkpoint, save_tensors
from irra_core.hub.repositories import RECIPE, first_line
from irra_core.hub.runs import WEIGHTS, weights_file
from irra_core.recipes import RECIPES, RENDERED, Recipe
from irra_core.settings import short

CARD, METRICS, CURVES = "README.md", "metrics.json", "training.png"
FILES = (WEIGHTS, RECIPE, METRICS, CURVES, CARD)  # all that ever goes
SPLITS = ("val", "last", "test")  # the only text in metrics.json: what selected the weights
CLIP_BY = {  # pretrained → what the encoders started from
    "none": "random weights",
    "general": "a small CLIP that was pretrained on rendered scenes, without real people",
    "openai": "OpenAI's CLIP (MIT licence), whose weights hold the stereotypes of photos and captions of the web",
}


@dataclasses.dataclass(frozen=True)
class Data:
    """What a model card says of a data set."""

    name: str
    shows: str
    licence: str
    real: bool = True


AGREEMENT = (
    "given by its authors for research, to those who sign their agreement. It forbids passing the photos on, and it "
    "decides what may be done with this model"
)
DATA = {
    "cuhk": Data("CUHK-PEDES", "pedestrians, collected from five older re-identification sets", AGREEMENT),
    "icfg": Data("ICFG-PEDES", "pedestrians of MSMT17: a campus, 15 cameras", AGREEMENT),
    "rstp": Data("RSTPReid", "pedestrians of MSMT17", AGREEMENT),
}


def push_to_hub(
    run: str | Path, repository: str, *, private: bool = True, token: str | None = None, endpoint: str | None = None
) -> str:
    """Write a finished run to a model repository of the Hub; returns its address, `hub:owner/name@commit`.

    `run` is `latest`, the name of a run or its folder; `repository` is `owner/name`, made if it is not there. It gets
    weights.safetensors, recipe.json, metrics.json (scores with intervals), training.png (the curves) and README.md, a
    model card filled from them, in one commit: all of them or none. Photos, captions, executed notebooks and folders of
    this machine are never uploaded. The repository is private unless `private` is False, which a warning repeats.
    `token` is by default that of `hf auth login` or HF_TOKEN.

    Raises FileNotFoundError for a run that is not there, ValueError for one that is not finished, a repository with
    another visibility or with files of others, PermissionError without the right to write, and ConnectionError where
    the Hub cannot be reached.
    """
    folder = weights_file(run).parent
    if not runs.finished(folder):
        raise ValueError(
            f"{folder} is no finished run: push_to_hub takes a folder with {WEIGHTS}, {RECIPE} and {METRICS}"
        )
    with tempfile.TemporaryDirectory() as aside:
        data = write_files(folder, Path(aside), repository)
        address = _committed(Path(aside), repository, private, token, endpoint)
    if not private:
        remark = f" It was trained on {data.name}, {data.licence}." if data.real else ""
        warnings.warn(f"{address} is public: everybody can download the weights.{remark}", stacklevel=2)
    return address


def write_files(folder: Path, aside: Path, repository: str) -> Data:
    """Write a run's FILES into the folder `aside`; returns what its card says of the data."""
    run = runs.load_run(folder)
    tensors, metadata = held = read_weights(folder / WEIGHTS)
    _, theirs = load_checkpoint(folder / WEIGHTS, device="cpu", read=lambda _: held)  # which checks every number
    if theirs != run["recipe"]:
        raise ValueError(f"{folder}: {RECIPE} and {WEIGHTS} are of different runs. Run it again")
    public = _without_folders(run["recipe"])
    about = {name: metadata[name] for name in ("format", "num_ids", "step") if name in metadata}
    save_tensors(tensors, aside / WEIGHTS, about | {"recipe": public.to_json()})
    recipe = {"format": runs.FORMAT, "data": run["data"], "recipe": json.loads(public.to_json())}
    runs.write_text(aside / RECIPE, json.dumps(recipe, indent=2))
    metrics = _numbers(run["metrics"], folder / METRICS)
    runs.write_text(aside / METRICS, json.dumps(metrics, indent=2))
    _draw(run["history"], public, aside / CURVES)
    data = _data(public)
    runs.write_text(aside / CARD, card(public, metrics, data, repository))
    return data


def _without_folders(recipe: Recipe) -> Recipe:
    """The recipe with the names of its own data and weights instead of their paths, which would name users."""
    names = {name: getattr(recipe, name) for name in ("dataset", "pretrained")}
    plain = {name: Path(value.replace("\\", "/")).name for name, value in names.items() if not value.startswith("hub:")}
    return recipe.replace(**plain)


def _numbers(value: Any, file: Path) -> Any:
    """The scores of metrics.json. Raises ValueError for text in it, which no run of this library writes."""
    if isinstance(value, Mapping) and all(re.fullmatch(r"\w{1,40}", name) for name in value):
        return {name: _numbers(part, file) for name, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part, file) for part in value]
    if value is None or isinstance(value, int | float) or value in SPLITS:
        return value
    raise ValueError(f"{file} holds the text {short(value)}, which is not published: remove it, or run again")


def _draw(history: Any, recipe: Recipe, file: Path) -> None:
    """Draw the curves of loss and R@1 from the rows of history."""
    from matplotlib.figure import Figure

    from irra_core.analysis import plots

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    plots.loss_curves(history, ax=left)
    split = "test" if recipe.select_on == "test" else "val"
    if f"{split}_R1" in history:
        plots.metric_curve(history, metric=f"{split}_R1", ax=right)
    figure.savefig(file, dpi=110)


def _data(recipe: Recipe) -> Data:
    """What the card says of the data of a recipe."""
    if recipe.dataset in RENDERED:
        shows = "rendered figures, no real people"
        return Data(f"rendered people (`{recipe.dataset}`)", shows, "made by the package itself, MIT", real=False)
    own = Data(
        f"own data (`{recipe.dataset.replace('`', '')}`)",
        "photos that this package knows nothing of",
        "that of whoever owns the photos and captions: say here which it is, and whether the people in them agreed",
    )
    return DATA.get(recipe.dataset, own)


def card(recipe: Recipe, metrics: Mapping[str, Any], data: Data, repository: str) -> str:
    """The model card: Markdown, after the YAML that the Hub reads."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    rows = {
        "this model, a caption searches photos": metrics.get("text_to_image"),
        "this model, a photo searches captions": metrics.get("image_to_text"),
        "before fine-tuning, a caption searches photos": metrics.get("pretrained"),
        "random weights, a caption searches photos": metrics.get("untrained"),
        "gain over the start, paired": metrics.get("gain_over_pretrained"),
    }
    return environment.get_template("card.md.jinja").render(
        recipe=recipe,
        differences=recipe.differences(),
        metrics=metrics,
        rows={name: scores for name, scores in rows.items() if scores},
        data=data,
        start=CLIP_BY.get(recipe.pretrained, f"`{recipe.pretrained.replace('`', '')}`"),
        free=not data.real and recipe.pretrained in ("none", "general"),
        on_test="test" in metrics["selected"].values(),
        own=recipe.dataset not in RECIPES,
        repository=repository,
        version=importlib.metadata.version("irra-core"),
    )


def _committed(aside: Path, repository: str, private: bool, token: str | None, endpoint: str | None) -> str:
    """Make the repository if need be, and commit the files; returns the address of the commit."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    hub = HfApi(endpoint=endpoint, token=token)
    if not (token or get_token()):
        raise PermissionError(
            f"{repository} cannot be written without a token: make one with the right to write in the settings of your "
            "account, then `hf auth login`, HF_TOKEN, or push_to_hub(…, token=…)"
        )
    with _answering(repository, hub.endpoint):
        hub.create_repo(repository, private=private, exist_ok=True)
        _check_repository(hub.model_info(repository), private)
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=aside / name) for name in FILES]
        done = hub.create_commit(repository, added, commit_message="A run of irra-core")
    return f"hub:{repository}@{done.oid}"


def _check_repository(info: Any, private: bool) -> None:
    """Raise ValueError for a repository that others can see although it should be private, or that is not ours."""
    found = "private" if info.private else "public"
    if bool(info.private) != private:
        raise ValueError(
            f"{info.id} is there already and {found}, but private is {private}: nothing was uploaded. Change its "
            f"visibility in its settings on the Hub, give private={not private}, or take another name"
        )
    names = {file.rfilename for file in info.siblings or []} - {".gitattributes"}
    if names - {CARD} and RECIPE not in names:
        raise ValueError(
            f"{info.id} holds files that irra-core did not write ({', '.join(sorted(names)[:5])}): nothing was "
            "uploaded. Take another name"
        )


@contextmanager
def _answering(repository: str, endpoint: str):
    """Within, an error of the Hub is one sentence: who may not write, what name is wrong, or that it is not reached."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"repository {repository!r} is not accepted: {first_line(error)}. Write owner/name") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(
                f"{repository} cannot be written: {endpoint} refused the token ({status}). Take a token with the "
                "right to write (`hf auth login`, HF_TOKEN or token=), and an owner that is you or your organisation"
            ) from error
        raise ConnectionError(
            f"{repository} was not written: {endpoint} answered {status} ({first_line(error)})"
        ) from error
    except ValueError:
        raise
    except Exception as error:  # of httpx, whose classes have another home in each version
        raise ConnectionError(
            f"{repository} was not written: {endpoint} was not reached ({first_line(error)}). Call push_to_hub again"
        ) from error
