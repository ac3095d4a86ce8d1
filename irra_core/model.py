"""A batch → `Features`: encode the image, encode the caption, let its masked words look at the image, classify."""

from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from irra_core.augmentation import full_precision
from irra_core.batches import masked_places
from irra_core.interaction import build_interaction
from irra_core.transformer import CLIP, QuickGELU


@dataclass
class Features:
    """What the losses need of a batch; the parts that a model or a call does not have are None."""

    image: Float[Tensor, "batch dim"]  # projected class token, not normalised; with `selection`, joined
    text: Float[Tensor, "batch dim"]  # projected end-of-text token, likewise
    image_logits: Float[Tensor, "batch ids"] | None = None
    text_logits: Float[Tensor, "batch ids"] | None = None
    word_logits: Float[Tensor, "masked vocabulary"] | None = None  # masked words only, row by row
    word_labels: Int[Tensor, " masked"] | None = None
    class_weight: Float[Tensor, "ids width"] | None = None  # the classifier's row per identity
    temperature: Float[Tensor, ""] | None = None  # learned; the recipe's is fixed


class IRRA(nn.Module):
    """CLIP's two encoders, an interaction encoder with its MLM head, and one identity classifier for both sides.

    `interaction` and `mlm_head` are None for a model without MLM, `classifier` for one without identities.
    `padding_attention` lets words attend to the padding behind the caption, as the released model does. `selection`
    (last or layers) joins the global features with those of selected tokens (see variants.token_selection), and
    `temperature` is the first value of a temperature that is learned.
    """

    def __init__(
        self,
        clip: CLIP,
        num_ids: int | None = None,
        interaction: str | None = None,
        depth: int = 4,
        padding_attention: bool = False,
        selection: str | None = None,
        temperature: float | None = None,
    ):
        super().__init__()
        self.clip = clip
        self.padding_attention = padding_attention
        width = clip.visual.output_dim
        self.interaction = build_interaction(interaction, width, depth) if interaction else None
        self.mlm_head = _mlm_head(width, clip.vocab_size, depth) if interaction else None
        self.classifier = None
        if num_ids is not None:
            self.classifier = nn.Linear(width, num_ids)
            nn.init.normal_(self.classifier.weight, std=0.001)
            nn.init.zeros_(self.classifier.bias)
        self.selection = None
        if selection:
            from irra_core.variants.token_selection import TokenSelection

            self.selection = TokenSelection(width, selection)
        self.log_scale = None if temperature is None else nn.Parameter(-torch.tensor(temperature).log())

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image's patches."""
        return self.clip.visual.grid_size

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model takes, pixels."""
        return self.clip.visual.image_size

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        tokens: Int[Tensor, "batch length"],
        masked_tokens: Int[Tensor, "batch masked_length"] | None = None,
        labels: Int[Tensor, "batch masked_length"] | None = None,
        places: tuple[Int[Tensor, "batch most"], Int[Tensor, " masked"], Int[Tensor, " masked"]] | None = None,
        elapsed: float = 1.0,
    ) -> Features:
        """Features of a batch; labels are the masked words' tokens, 0 where no word is predicted.

        The MLM head runs on the masked words alone. `places` is what `batches.masked_places` says of the labels, if the
        caller knows it: otherwise it is found here, for which the host waits for a GPU. `elapsed`: see Batch.
        """
        if self.interaction is None or masked_tokens is None:
            return self.classified(Features(self.encode_image(images, elapsed), self.encode_text(tokens, elapsed)))
        if labels is None:
            raise ValueError("masked_tokens need labels: the masked words' tokens, 0 where none is predicted")
        if self.selection is None:
            patches = self.image_tokens(images)
            image = full_precision(patches[:, 0])
            text, words = self._encode_both(tokens, masked_tokens)
        else:
            patches, image = self.selection.of_images(self.clip, images, elapsed)
            text, words = self.encode_text(tokens, elapsed), self.text_tokens(self._padded(masked_tokens))
        at, wanted, word_labels = masked_places(labels) if places is None else places
        states = self.interaction(words, patches, self._real(masked_tokens), at)
        word_logits = full_precision(self.mlm_head(states.flatten(0, 1).index_select(0, wanted)))
        return self.classified(Features(image, text, word_logits=word_logits, word_labels=word_labels))

    def _encode_both(
        self, tokens: Int[Tensor, "batch length"], masked_tokens: Int[Tensor, "batch masked_length"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch words dim"]]:
        """The captions' global features and the masked captions' tokens, in one pass where both are equally long."""
        masked_tokens = self._padded(masked_tokens)
        if tokens.shape == masked_tokens.shape:
            caption, masked = self.clip.begin_text(torch.cat([tokens, masked_tokens])).chunk(2)
        else:
            caption, masked = self.clip.begin_text(tokens), self.clip.begin_text(masked_tokens)
        return full_precision(self.clip.finish_text(caption, _end(tokens))[:, 0]), self.clip.finish_text(masked)

    def classified(self, features: Features) -> Features:
        """The features with the learned temperature and the identity scores, where the model has these."""
        if self.log_scale is not None:
            from irra_core.variants.tbps import temperature_of

            features = replace(features, temperature=temperature_of(self.log_scale))
        if self.classifier is None:
            return features
        whole = torch.cat([features.image, features.text])[:, : self.classifier.in_features]
        with torch.autocast(whole.device.type, enabled=False):  # in full precision
            image, text = full_precision(self.classifier(whole.to(self.classifier.weight.dtype))).chunk(2)
        return replace(features, image_logits=image, text_logits=text, class_weight=self.classifier.weight)

    def encode_image(
        self, images: Float[Tensor, "batch 3 height width"], elapsed: float = 1.0
    ) -> Float[Tensor, "batch dim"]:
        """Global image features: the projected class token, not normalised; with `selection`, joined features."""
        if self.selection is not None:
            return self.selection.of_images(self.clip, images, elapsed)[1]
        first = torch.zeros(len(images), 1, dtype=torch.long, device=images.device)
        return full_precision(self.image_tokens(images, at=first)[:, 0])

    def encode_text(self, tokens: Int[Tensor, "batch length"], elapsed: float = 1.0) -> Float[Tensor, "batch dim"]:
        """Global text features: the projected end-of-text token, not normalised; with `selection`, joined features."""
        if self.selection is not None:
            return self.selection.of_texts(self.clip, tokens, elapsed)
        return full_precision(self.text_tokens(tokens, at=_end(tokens))[:, 0])

    def image_tokens(
        self, images: Float[Tensor, "batch 3 height width"], at: Int[Tensor, "batch wanted"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """All projected image tokens, the class token first, then the patches row by row; with `at`, only those."""
        return self.clip.visual(images, at)

    def text_tokens(
        self, tokens: Int[Tensor, "batch length"], at: Int[Tensor, "batch wanted"] | None = None
    ) -> Float[Tensor, "batch words dim"]:
        """All projected text tokens, padding's included; with `at`, only those at the given positions."""
        return self.clip.finish_text(self.clip.begin_text(tokens), at)

    def word_logits(
        self, images: Float[Tensor, "batch 3 height width"], masked_tokens: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """MLM scores at every position, masked or not. Raises ValueError for a model without MLM."""
        states = self._word_states("word_logits", images, masked_tokens)
        return full_precision(self.mlm_head(states[:, : masked_tokens.shape[1]]))

    def attention(
        self,
        images: Float[Tensor, "batch 3 height width"],
        tokens: Int[Tensor, "batch length"],
        heads: bool = False,
    ) -> Float[Tensor, "batch length rows cols"] | Float[Tensor, "layers heads batch length rows cols"]:
        """How much each word attends to each patch: the mean over layers and heads, or with `heads` each of them.

        `cross` has one image-facing layer, `co` and `merged` have one per block. The class token's share is left out
        (of `merged` also the other words'), so a word's patches sum to 1 minus that share. Raises ValueError for a
        model without interaction encoder.
        """
        layers: list[Tensor] = []
        self._word_states("attention", images, tokens, layers)
        shares = torch.stack([layer.transpose(0, 1)[:, :, : tokens.shape[1], 1:] for layer in layers])
        shares = shares.unflatten(-1, self.grid)
        return shares if heads else shares.mean((0, 1))

    def _word_states(
        self, name: str, images: Tensor, tokens: Tensor, record: list[Tensor] | None = None
    ) -> Float[Tensor, "batch words dim"]:
        """The interaction encoder's state of every word, for the method of that name."""
        if self.interaction is None:
            raise ValueError(f"{name} needs the interaction encoder, which this model is without: train with +mlm")
        words, patches = self.text_tokens(self._padded(tokens)), self.image_tokens(images)
        return self.interaction(words, patches, self._real(tokens), record=record)

    def _padded(self, tokens: Int[Tensor, "batch length"]) -> Int[Tensor, "batch padded"]:
        """Filled up to the text encoder's length where words attend to padding, so that trimming changes nothing."""
        return F.pad(tokens, (0, self.clip.context_length - tokens.shape[1])) if self.padding_attention else tokens

    def _real(self, tokens: Int[Tensor, "batch length"]) -> Bool[Tensor, "batch length"] | None:
        """True up to the end token; None where words attend to padding too."""
        if self.padding_attention:
            return None
        return torch.arange(tokens.shape[1], device=tokens.device) <= _end(tokens)


def _end(tokens: Int[Tensor, "batch length"]) -> Int[Tensor, "batch 1"]:
    """Position of the end of each text, the highest id in CLIP's vocabulary."""
    return tokens.argmax(dim=1, keepdim=True)


def _mlm_head(width: int, vocabulary: int, depth: int) -> nn.Sequential:
    """A word's state → a score for every word."""
    dense, fc = nn.Linear(width, width), nn.Linear(width, vocabulary)
    head = nn.Sequential(OrderedDict(dense=dense, gelu=QuickGELU(), ln=nn.LayerNorm(width), fc=fc))
    nn.init.normal_(head.dense.weight, std=(2 * width) ** -0.5)
    nn.init.normal_(head.fc.weight, std=width**-0.5 * (2 * depth) ** -0.5)
    return head
