"""A model → its sizes and parts in words."""

from irra_core.model import IRRA
from irra_core.recipes import Recipe


def describe(model: IRRA, recipe: Recipe | None = None) -> dict[str, object]:
    """Sizes and parts of a model in the words of the recipe; `trained on` where a recipe tells."""
    visual, mlm, text = model.clip.visual, model.interaction, model.clip.transformer
    return {
        "image height × width (pixels)": "×".join(map(str, model.image_size)),
        "patch and stride (pixels)": f"{visual.patch_size[0]} and {visual.conv1.stride[0]}",
        "image encoder": f"{len(visual.transformer.resblocks)} blocks of width {visual.conv1.out_channels}",
        "text encoder": f"{len(text.resblocks)} blocks of width {model.clip.text_projection.shape[0]}",
        "feature width": model.clip.text_projection.shape[1],
        "vocabulary": model.clip.vocab_size,
        "identities of the classifier": model.classifier.out_features if model.classifier is not None else "none",
        "interaction encoder": "none" if mlm is None else f"{type(mlm).__name__}, {len(mlm.blocks)} blocks",
        "token selection": "none" if model.selection is None else model.selection.kind,
        "words attend to padding": model.padding_attention,
        "parameters (millions)": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "trained on": recipe.dataset if recipe else "not recorded in the file",
    }
