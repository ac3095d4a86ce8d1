"""A run, a file, a model of the Hub, or "clip" → a model and its recipe."""

import os
import warnings
from pathlib import Path

import torch

from irra_core.backbone import build_model, configuration
from irra_core.checkpoints import load_checkpoint
from irra_core.hub.configurations import OPENAI
from irra_core.hub.repositories import hub_file, pinned
from irra_core.hub.runs import weights_file
from irra_core.model import IRRA
from irra_core.recipes import Recipe, recipe
from irra_core.settings import data_root

CLIP_FILE, CLIP_HOME = "open_clip_model.safetensors", "https://huggingface.co/timm/vit_base_patch16_clip_224.openai"
ZERO_SHOT = (
    "This is OpenAI's CLIP ViT-B/16, which was never fine-tuned on people: on CUHK-PEDES later papers quote an R@1 of "
    "about 13 % for it, against 68 % once fine-tuned and 73 % for IRRA. It was not measured here."
)
CLASSES = {11003: "cuhk", 3102: "icfg", 3701: "rstp"}  # training identities, by which a released file is told


def load_model(source: str | Path, device: str | torch.device | None = None) -> tuple[IRRA, Recipe]:
    """The model of a source and its recipe, as `load_checkpoint` returns them.

    `source` is `latest` (the last finished run), the folder or the name of a run, a file of this library
    (.safetensors) or of the released code (.pth), `hub:owner/name@revision`, or `clip`: OpenAI's ViT-B/16 without
    fine-tuning, with a warning that says how much worse it is. open_clip downloads its weights once; a file in the data
    folder is taken first. The recipe of a released file and of `clip` is the paper's with the image size and stride
    that fit the model. `device` is by default the GPU if there is one.

    Of a repository of the Hub, as `push_to_hub` writes them, only weights.safetensors and recipe.json are fetched, into
    the Hub's cache, which is enough without network. Without a revision the newest commit is taken, and a warning names
    it.

    Raises FileNotFoundError, which says what to put where, for weights that are not there, and ValueError for a file of
    another kind or of sizes that no backbone has.
    """
    name = os.fspath(source)
    if name.startswith("hub:"):
        return load_checkpoint(hub_file(pinned(name)), device=device)
    if name == "clip":
        warnings.warn(ZERO_SHOT, stacklevel=2)
        return _zero_shot(device)
    file = weights_file(source)
    if file.suffix == ".safetensors":
        return load_checkpoint(file, device=device)
    from irra_core.released.checkpoint import load_official

    model = load_official(file, image_size=None, stride=None, device=device)
    return model, _released_recipe(model, file)


def _zero_shot(device: str | torch.device | None) -> tuple[IRRA, Recipe]:
    """CLIP's two encoders as the paper's recipe uses them before its first step."""
    file = data_root() / CLIP_FILE
    chosen = recipe("cuhk", _smoke=False, losses="sdm", pretrained=str(file) if file.is_file() else "openai")
    try:
        return build_model(chosen, 0, device), chosen
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"CLIP's weights could not be downloaded ({error.__cause__ or error}). Where there is network, get "
            f"{CLIP_FILE} of {CLIP_HOME} and put it into {data_root()}: load_model('clip') takes it from there"
        ) from error


def _released_recipe(model: IRRA, file: Path) -> Recipe:
    """The paper's recipe with the backbone, image size, stride and parts of a released model."""
    height, width = model.image_size
    parts = {"id": model.classifier, "mlm": model.interaction}
    values = {"losses": "+".join(["sdm", *(name for name, part in parts.items() if part is not None)])}
    if model.interaction is not None:
        values |= {"interaction_depth": len(model.interaction.blocks), "padding_attention": True}
    dataset = CLASSES.get(model.classifier.out_features if model.classifier is not None else 0, "cuhk")
    stride = model.clip.visual.conv1.stride[0]
    size = {"image_height": height, "image_width": width, "stride": stride}
    return recipe(dataset, _smoke=False, backbone=_backbone(model, file), **size, **values)


def _backbone(model: IRRA, file: Path) -> str:
    """The name of the backbone whose sizes a released model has. Raises ValueError where none has them."""
    clip, visual = model.clip, model.clip.visual
    text_width, width = clip.text_projection.shape
    image = visual.patch_size[0], visual.conv1.out_channels, len(visual.transformer.resblocks)
    found = (width, *image, clip.vocab_size, text_width, len(clip.transformer.resblocks))
    names = ("embed_dim", "patch_size", "width", "layers", "vocab_size", "width", "layers")
    for name in (*OPENAI, "small"):
        config = configuration(name)
        parts = [config, *[config["vision_cfg"]] * 3, *[config["text_cfg"]] * 3]
        if found == tuple(part[what] for part, what in zip(parts, names, strict=True)):
            return name
    raise ValueError(
        f"{file} has no recipe, because no backbone has its sizes (features {width}, patch, width and layers of images "
        f"{image}, vocabulary, width and layers of texts {found[4:]}): read it with load_official. Backbones are "
        f"{', '.join((*OPENAI, 'small'))}"
    )
