"""open_clip's own modules on our weights: the independent forward pass that ours is compared with."""

from collections.abc import Mapping

import open_clip
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import nn


def sharing(theirs: nn.Module, ours: nn.Module) -> nn.Module:
    """Their module with our parameters in the place of its own, so that gradients arrive in ours."""
    own = {name for name, _ in theirs.named_parameters() if name != "logit_scale"}
    assert own == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        owner, _, last = name.rpartition(".")
        assert getattr(theirs.get_submodule(owner), last).shape == parameter.shape, name
        setattr(theirs.get_submodule(owner), last, parameter)
    return theirs.to(parameter.dtype)


def their_block(block: nn.Module) -> nn.Module:
    """open_clip's residual attention block of an interaction encoder's kind on the weights of ours."""
    theirs = ResidualAttentionBlock(block.attn.embed_dim, block.attn.num_heads, act_layer=QuickGELU)
    return sharing(theirs, block)


def new_open_clip(config: Mapping, image_size: tuple[int, int]) -> nn.Module:
    """open_clip's CLIP with random weights."""
    vision = config["vision_cfg"] | {"image_size": tuple(image_size)}
    quick_gelu = config.get("quick_gelu", False)
    return open_clip.model.CLIP(config["embed_dim"], vision, config["text_cfg"], quick_gelu=quick_gelu)


def their_clip(config: Mapping, clip: nn.Module) -> nn.Module:
    """open_clip's CLIP on the weights of ours; patches side by side only."""
    return sharing(new_open_clip(config, clip.visual.image_size), clip)


def their_image_tokens(theirs: nn.Module, images):
    """All projected image tokens by open_clip's CLIP."""
    visual = theirs.visual
    return visual.ln_post(visual.transformer(visual._embeds(images))) @ visual.proj


def their_text_tokens(theirs: nn.Module, tokens):
    """All projected text tokens by open_clip's CLIP."""
    length = tokens.shape[1]
    states = theirs.token_embedding(tokens) + theirs.positional_embedding[:length]
    states = theirs.transformer(states, attn_mask=theirs.attn_mask[:length, :length])
    return theirs.ln_final(states) @ theirs.text_projection
