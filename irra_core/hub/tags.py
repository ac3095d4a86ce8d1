"""An open_clip tag, or a model of the Hub → the file of its weights, downloaded once."""

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from irra_core.backbone import configuration
from irra_core.hub.repositories import hub_file
from irra_core.settings import project_root, unknown


def download(backbone: str, tag: str) -> Path:
    """The file of an open_clip tag: the one in the hub's cache, or downloaded by open_clip into it.

    A tag of hub:owner/name@commit stands for the weights of a run that `push_to_hub` wrote there.
    Raises ValueError for a tag that the backbone does not have or that does not suit it, and FileNotFoundError, which
    says what to put where, when it cannot be had.
    """
    if tag.startswith("hub:"):
        return hub_file(tag)
    import open_clip  # here, because it takes longer to import than torch
    from huggingface_hub import constants, try_to_load_from_cache

    source = open_clip.get_pretrained_cfg(backbone, tag)
    if not source:
        raise unknown(f"pretrained (a tag of {backbone})", tag, open_clip.list_pretrained_tags_by_model(backbone))
    if source.get("quick_gelu", False) != configuration(backbone).get("quick_gelu", False):
        other = backbone.removesuffix("-quickgelu") if backbone.endswith("-quickgelu") else f"{backbone}-quickgelu"
        raise ValueError(f"pretrained {tag!r} has another activation than backbone {backbone!r}: take {other!r}")
    if tuple(source["mean"]) != open_clip.OPENAI_DATASET_MEAN:
        raise ValueError(f"pretrained {tag!r} expects images with mean {source['mean']}, not CLIP's: take another tag")
    repository, name = source.get("hf_hub", "").rstrip("/"), "open_clip_model.safetensors"
    cached = try_to_load_from_cache(repository, name) if repository else None
    if isinstance(cached, str):
        return Path(cached)
    try:
        if not getproxies():  # without a name server the hub would retry for a minute
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        return Path(open_clip.download_pretrained(source))
    except Exception as error:
        raise FileNotFoundError(
            f"pretrained {tag!r} of {backbone} could not be downloaded ({type(error).__name__}: {error}). Where there "
            f"is network, get {name} of {repository or source['url']}, put it into {project_root() / 'data'} and give "
            f"its path: -p pretrained data/{name}; or take pretrained 'none', random weights"
        ) from error
