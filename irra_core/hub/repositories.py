"""`hub:owner/name@revision` → the weights of a commit of a model repository, checked before they are downloaded.

Only weights.safetensors and recipe.json are fetched. Imports torch only to check weights.
"""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from irra_core.hub.runs import WEIGHTS

RECIPE = "recipe.json"
ADDRESS = re.compile(r"hub:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>\S+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
MOST_RECIPE = 2**20  # bytes; a recipe.json has 2,000
MOST_HEADER = 2**24  # bytes of a weights file beside its numbers: names, shapes, recipe
PATIENCE = 20  # seconds for an answer about a repository


def pinned(address: str) -> str:
    """The address with the full hash of its commit: of the newest one, where it has no revision, with a warning.

    Where the Hub cannot be reached, the commit is the one that this machine's cache holds. Raises ValueError for what
    is no address or no repository of this library, FileNotFoundError or PermissionError for one that is not there, and
    each says what to do.
    """
    repository, revision = _parts(address)
    if revision and COMMIT.fullmatch(revision):
        return address
    from huggingface_hub import HfApi

    info = _info(address, repository, revision)
    if isinstance(info, str):
        commit, said = _cached(address, repository, revision, info), f" that this machine holds ({info})"
    else:
        _check_files(address, info)
        with _downloading(address):  # which notes the branch's commit in the cache
            file = HfApi().hf_hub_download(repository, RECIPE, revision=revision or "main")
        commit, said = Path(file).parent.name, ""
    exact = f"hub:{repository}@{commit}"
    what = "the branch or tag stands for the commit" if revision else "without a revision this is the newest commit"
    warnings.warn(f"{address}: {what}{said} {commit}. To have it again, write {exact}", stacklevel=3)
    return exact


def hub_file(address: str) -> Path:
    """The weights file of a pinned address, in the Hub's cache; downloaded into it if need be, after its checks.

    Raises as `pinned`, and ValueError where the sizes are not those that the recipe's model needs.
    """
    repository, commit = _parts(address)
    if not commit or not COMMIT.fullmatch(commit):
        raise ValueError(f"{address!r} names no commit: irra.recipe(pretrained={address!r}) adds that of today")
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = [try_to_load_from_cache(repository, name, revision=commit) for name in (RECIPE, WEIGHTS)]
    if all(isinstance(path, str) for path in cached):
        return Path(cached[1])
    info = _info(address, repository, commit)
    if isinstance(info, str):
        _cached(address, repository, commit, info)
        raise FileNotFoundError(f"{address}: {info}, and this machine's cache holds only a part of it")
    sizes, hub = _check_files(address, info), HfApi()
    with _downloading(address):
        recipe = hub.hf_hub_download(repository, RECIPE, revision=commit)
        _check_weights(address, hub, sizes[WEIGHTS], Path(recipe))
        return Path(hub.hf_hub_download(repository, WEIGHTS, revision=commit))


@contextmanager
def _downloading(address: str) -> Iterator[None]:
    """Within, whatever breaks a download is a ConnectionError that says how to go on; our ValueErrors stay."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # of httpx, whose classes have another home in each version
        raise ConnectionError(f"{address}: the download broke off ({first_line(error)}): start it again") from error


def first_line(error: Exception) -> str:
    """An error's class and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _parts(address: str) -> tuple[str, str | None]:
    """Repository and revision of an address."""
    if not (found := ADDRESS.fullmatch(address)):
        raise ValueError(
            f"{address!r} is no address of a model: accepted is hub:owner/name, or hub:owner/name@revision with a "
            "branch, a tag or a commit"
        )
    return found["repository"], found["revision"]


def _info(address: str, repository: str, revision: str | None) -> Any:
    """What the Hub says of a revision, its files with their sizes; a str that says why, where it cannot be reached."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    place = f"{constants.ENDPOINT}/{repository}"
    try:
        return HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=PATIENCE)
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{address}: {place} has no revision {revision!r}: take one of its branches, tags or commits, or leave "
            "the revision out for the newest"
        ) from error
    except GatedRepoError as error:
        raise PermissionError(
            f"{address}: its owner gives access on request: ask for it on {place}, then log in with `hf auth login` or "
            "set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        access = "this machine's token may not read it" if get_token() else "it is private: this machine has no token"
        raise FileNotFoundError(
            f"{address}: there is no {place}, or {access}: check the name, or log in with `hf auth login` (or set "
            "HF_TOKEN) as somebody who may read it"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"{address!r} is no address of a model: {str(error).splitlines()[0]}") from error
    except Exception as error:  # of httpx, whose classes have another home in each version
        return f"{constants.ENDPOINT} was not reached: {first_line(error)}"


def _cached(address: str, repository: str, revision: str | None, reason: str) -> str:
    """The commit of a revision in the Hub's cache. Raises FileNotFoundError where it is not there."""
    from huggingface_hub import constants, try_to_load_from_cache

    file = try_to_load_from_cache(repository, RECIPE, revision=revision or "main")
    if not isinstance(file, str):
        raise FileNotFoundError(
            f"{address}: {reason}, and the cache in {constants.HF_HUB_CACHE} does not hold it: load it once with "
            "network (and without HF_HUB_OFFLINE), or copy that folder from a machine that has loaded it"
        )
    return Path(file).parent.name


def _check_files(address: str, info: Any) -> dict[str, int]:
    """File → bytes of a repository. Raises ValueError unless it holds the two files that are read, in sound sizes."""
    sizes = {file.rfilename: file.size for file in info.siblings}
    for name in (WEIGHTS, RECIPE):
        if sizes.get(name):
            continue
        pickles = sorted(name for name in sizes if name.endswith(PICKLES))
        if name == WEIGHTS and pickles:
            raise ValueError(
                f"{address} has no {WEIGHTS}, only {', '.join(pickles[:3])}: a pickle could run code, so none is read "
                "from the Hub. If you trust its source, download it yourself and give its path"
            )
        raise ValueError(
            f"{address} has no {name}, so it is not from irra.push_to_hub: its files are "
            f"{', '.join(sorted(sizes)[:10]) or 'none'}. Take a repository with {WEIGHTS} and {RECIPE}"
        )
    if sizes[RECIPE] > MOST_RECIPE:
        raise ValueError(
            f"{address}: {RECIPE} has {sizes[RECIPE]:,} bytes, accepted are {MOST_RECIPE:,}: it is no recipe of this "
            "library, and was not downloaded"
        )
    return sizes


def _check_weights(address: str, hub: Any, size: int, recipe: Path) -> None:
    """Raise ValueError unless the header of a repository's weights file, read alone, describes the recipe's model.

    Names, shapes and types must be those of the model, the bytes of the file those of its numbers.
    """
    import torch
    from huggingface_hub.errors import SafetensorsParsingError

    from irra_core.backbone import PRECISIONS, learned
    from irra_core.checkpoints import load_checkpoint

    kinds = dict(zip(("F32", "F16", "BF16", "F64"), PRECISIONS, strict=True))
    repository, commit = _parts(address)
    try:
        header = hub.parse_safetensors_file_metadata(repository, WEIGHTS, revision=commit)
        tensors = {
            name: torch.empty(said.shape, dtype=kinds[said.dtype], device="meta")
            for name, said in learned(header.tensors).items()
        }
        same = json.loads(recipe.read_text(encoding="utf-8"))["recipe"] == json.loads(header.metadata["recipe"])
    except (
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RuntimeError,
        OverflowError,
        SafetensorsParsingError,
    ) as error:
        raise ValueError(
            f"{address}: {WEIGHTS} or {RECIPE} is none of this library ({first_line(error)}), and the weights were not "
            "downloaded. Take a repository that irra.push_to_hub wrote"
        ) from error
    load_checkpoint(f"{address}/{WEIGHTS}", device="meta", read=lambda _: (tensors, header.metadata))
    if not same:
        raise ValueError(f"{address}: {RECIPE} and {WEIGHTS} are of different runs: its owner should push one again")
    needed = sum(tensor.nbytes for tensor in tensors.values())
    if not needed < size <= needed + MOST_HEADER:
        raise ValueError(
            f"{address}: {WEIGHTS} has {size:,} bytes, but the model of its recipe needs {needed:,}: it was not "
            "downloaded. Its owner should push the run again"
        )
