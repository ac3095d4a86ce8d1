"""A batch → `Features`: the dual encoder (open_clip) and the interaction encoder."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from open_clip.model import CLIP
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.nn import functional as F

from irra_core.augmentation import moved
from irra_core.backbone import WEIGHT_SUFFIXES, configuration, download, load_clip_weights, new_clip
from irra_core.interaction import build_interaction, norm, run_block
from irra_core.packing import Packing
from irra_core.recipes import Recipe
from irra_core.scale.linear import Linear, keep_freed_memory, linear
from irra_core.settings import project_root
from irra_core.variants.adapters import limit_learning


@dataclass
class Features:
    """What the losses need of a batch; the parts that a model or a call does not have are None."""

    image: Float[Tensor, "batch dim"]  # projected class token, not normalised
    text: Float[Tensor, "batch dim"]  # projected end-of-text token, not normalised
    image_logits: Float[Tensor, "batch ids"] | None = None
    text_logits: Float[Tensor, "batch ids"] | None = None
    word_logits: Float[Tensor, "masked vocabulary"] | None = None  # masked words only, row by row
    word_labels: Int[Tensor, " masked"] | None = None


class IRRA(nn.Module):
    """CLIP's two encoders, an interaction encoder with its MLM head, and one identity classifier for both sides.

    `interaction` and `mlm_head` are None for a model without MLM, `classifier` for one without identities.
    `padding_attention` lets words attend to the padding behind the caption, as the released model does.
    """

    def __init__(
        self,
        clip: CLIP,
        num_ids: int | None = None,
        interaction: str | None = None,
        depth: int = 4,
        padding_attention: bool = False,
    ):
        super().__init__()
        keep_freed_memory()
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
        lengths: tuple[int, ...] | None = None,
        words_each: tuple[int, ...] | None = None,
    ) -> Features:
        """Features of a batch; labels are the masked words' tokens, 0 where no word is predicted.

        The image is encoded once, caption and masked caption in one pass when they are equally long, nothing but
        attention is computed for their padding, and the MLM head runs on the masked words alone. `lengths` are each
        row's tokens up to its end, in both forms, and `words_each` its masked words, if the caller knows them:
        otherwise they are counted, for which the host waits for a GPU.
        """
        if self.interaction is None or masked_tokens is None:
            packing = self._packing(tokens, tokens, lengths)
            found = Features(
                self.encode_image(images), self._caption(self._begin_text(tokens, packing), tokens, packing)
            )
        else:
            if labels is None:
                raise ValueError("masked_tokens need labels: the masked words' tokens, 0 where none is predicted")
            patches = self.image_tokens(images)
            masked_tokens, labels = self._padded(masked_tokens), self._padded(labels)
            packing = self._packing(tokens, masked_tokens, lengths)
            text, words = self._caption_and_masked_words(tokens, masked_tokens, packing)
            found = Features(_full(patches[:, 0]), text)
            states, found.word_labels = self._masked_states(words, patches, masked_tokens, labels, words_each, packing)
            found.word_logits = _full(self.mlm_head(states))
        return self.classified(found)

    def _packing(
        self, tokens: Int[Tensor, "batch length"], masked_tokens: Int[Tensor, "batch masked_length"], lengths
    ) -> Packing | None:
        """Where captions and masked captions have tokens; None where padding is attended to or lengths disagree."""
        if self.padding_attention or tokens.shape != masked_tokens.shape:
            return None
        if lengths is None:
            ends = _end(tokens) if tokens is masked_tokens else _end(tokens).maximum(_end(masked_tokens))
            lengths = (ends[:, 0] + 1).tolist()
        return Packing.of(lengths, tokens.shape[1], tokens.device)

    def classified(self, features: Features) -> Features:
        """The features with the identity scores of their image and text; as they are without a classifier."""
        if self.classifier is None:
            return features
        return replace(
            features, image_logits=self._identities(features.image), text_logits=self._identities(features.text)
        )

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Global image features: the projected class token, not normalised."""
        first = torch.zeros(len(images), 1, dtype=torch.long, device=images.device)
        return _full(self.image_tokens(images, at=first)[:, 0])

    def encode_text(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch dim"]:
        """Global text features: the projected end-of-text token, not normalised."""
        return _full(self.text_tokens(tokens, at=_end(tokens))[:, 0])

    def image_tokens(
        self, images: Float[Tensor, "batch 3 height width"], at: Int[Tensor, "batch wanted"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """All projected image tokens, the class token first, then the patches row by row; with `at`, only those."""
        visual = self.clip.visual
        if tuple(images.shape[-2:]) != tuple(self.image_size):
            given = "×".join(map(str, images.shape[-2:]))
            raise ValueError(f"images are {given} pixels: this model takes {self.image_size[0]}×{self.image_size[1]}")
        patches = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        start = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        states = torch.cat([start, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
        states = norm(visual.ln_pre, states)
        for block in visual.transformer.resblocks[:-1]:
            states = run_block(block, states)
        states = run_block(visual.transformer.resblocks[-1], states, at=at)
        return linear(norm(visual.ln_post, states), visual.proj.T)

    def text_tokens(
        self, tokens: Int[Tensor, "batch length"], at: Int[Tensor, "batch wanted"] | None = None
    ) -> Float[Tensor, "batch words dim"]:
        """All projected text tokens, padding's included; with `at`, only those at the given positions."""
        return self._finish_text(self._begin_text(tokens), at)

    def _begin_text(
        self, tokens: Int[Tensor, "batch length"], packing: Packing | None = None
    ) -> Float[Tensor, "batch length width"] | Float[Tensor, "real width"]:
        """The text encoder up to its last block."""
        clip = self.clip
        positions = clip.positional_embedding[: tokens.shape[1]]
        if packing is not None:
            tokens, positions = packing.pack(tokens), F.embedding(packing.places % packing.length, positions)
        states = (clip.token_embedding(tokens) + positions).to(clip.text_projection.dtype)
        for block in clip.transformer.resblocks[:-1]:
            states = run_block(block, states, causal=True, packing=packing)
        return states

    def _finish_text(
        self,
        states: Float[Tensor, "batch length width"] | Float[Tensor, "real width"],
        at: Int[Tensor, "batch wanted"] | None,
        packing: Packing | None = None,
    ) -> Float[Tensor, "batch words dim"] | Float[Tensor, "real dim"]:
        """The text encoder from its last block on."""
        states = run_block(self.clip.transformer.resblocks[-1], states, causal=True, at=at, packing=packing)
        return linear(norm(self.clip.ln_final, states), self.clip.text_projection.T)

    def _caption(
        self, states: Tensor, tokens: Int[Tensor, "batch length"], packing: Packing | None
    ) -> Float[Tensor, "batch dim"]:
        """The captions' global features from what the text encoder has begun."""
        return _full(self._finish_text(states, _end(tokens), packing)[:, 0])

    def _caption_and_masked_words(
        self,
        tokens: Int[Tensor, "batch length"],
        masked_tokens: Int[Tensor, "batch masked_length"],
        packing: Packing | None,
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch masked_length dim"] | Float[Tensor, "real dim"]]:
        """The captions' global features and the masked captions' tokens, in one pass where lengths agree."""
        if tokens is masked_tokens:
            caption = masked = self._begin_text(tokens, packing)
        elif tokens.shape == masked_tokens.shape:
            both = torch.cat([tokens, masked_tokens])
            caption, masked = self._begin_text(both, packing and packing.twice()).chunk(2)
        else:
            caption, masked = self._begin_text(tokens), self._begin_text(masked_tokens)
        return self._caption(caption, tokens, packing), self._finish_text(masked, None, packing)

    def _masked_states(
        self,
        words: Float[Tensor, "batch length dim"] | Float[Tensor, "real dim"],
        patches: Float[Tensor, "batch tokens dim"],
        masked_tokens: Int[Tensor, "batch length"],
        labels: Int[Tensor, "batch length"],
        words_each: tuple[int, ...] | None,
        packing: Packing | None,
    ) -> tuple[Float[Tensor, "masked dim"], Int[Tensor, " masked"]]:
        """The interaction encoder's states at the masked positions, row by row, and the words that stood there."""
        masked = labels != 0
        counts = masked.sum(1).tolist() if words_each is None else words_each
        most = max([1, *counts])  # a process may have no pairs in an epoch's last batch
        at = masked.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # a row's masked positions come first
        wanted = [row * most + place for row, count in enumerate(counts) for place in range(count)]
        wanted = moved(torch.tensor(wanted, dtype=torch.long), labels.device)
        states = self.interaction(words, patches, self._real(masked_tokens), at, packing=packing)
        states, answers = (each.flatten(0, 1).index_select(0, wanted) for each in (states, labels.gather(1, at)))
        return states, answers

    def _identities(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch ids"]:
        """Identity scores, in full precision also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            return _full(self.classifier(features.to(self.classifier.weight.dtype)))

    def word_logits(
        self, images: Float[Tensor, "batch 3 height width"], masked_tokens: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """MLM scores at every position, masked or not. Raises ValueError for a model without MLM."""
        self._need_interaction("word_logits")
        padded = self._padded(masked_tokens)
        states = self.interaction(self.text_tokens(padded), self.image_tokens(images), self._real(padded))
        return _full(self.mlm_head(states[:, : masked_tokens.shape[1]]))

    def attention(
        self,
        images: Float[Tensor, "batch 3 height width"],
        tokens: Int[Tensor, "batch length"],
        heads: bool = False,
    ) -> Float[Tensor, "batch length rows cols"] | Float[Tensor, "layers heads batch length rows cols"]:
        """How much each word attends to each patch: the mean over layers and heads, or with `heads` each of them.

        `cross` has one image-facing layer, `co` and `merged` have one a block. The class token's share is left out
        (of `merged` also the other words'), so a word's patches sum to 1 minus that share. Raises ValueError for a
        model without interaction encoder.
        """
        self._need_interaction("attention")
        padded, layers = self._padded(tokens), []
        self.interaction(self.text_tokens(padded), self.image_tokens(images), self._real(padded), record=layers)
        shares = torch.stack([layer.transpose(0, 1)[:, :, : tokens.shape[1], 1:] for layer in layers])
        shares = shares.unflatten(-1, self.grid)
        return shares if heads else shares.mean((0, 1))

    def _need_interaction(self, name: str) -> None:
        if self.interaction is None:
            raise ValueError(f"{name} needs the interaction encoder, which this model is without: train with +mlm")

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


def _full(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """At least single precision, whatever autocast or half-precision weights made of it."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _mlm_head(width: int, vocabulary: int, depth: int) -> nn.Sequential:
    """A word's state → a score for every word."""
    dense, fc = Linear(width, width), Linear(width, vocabulary)
    head = nn.Sequential(OrderedDict(dense=dense, gelu=QuickGELU(), ln=nn.LayerNorm(width), fc=fc))
    nn.init.normal_(head.dense.weight, std=(2 * width) ** -0.5)
    nn.init.normal_(head.fc.weight, std=width**-0.5 * (2 * depth) ** -0.5)
    return head


def build_model(recipe: Recipe, num_ids: int, weights: Path | None = None) -> IRRA:
    """The model of a recipe, on the CPU: pretrained CLIP weights, new parts drawn from `recipe.seed`.

    With `pretrained_towers` image or text the other encoder keeps its random weights. What `frozen` and `adapter_rank`
    keep from learning has requires_grad False.

    `weights` is the file that pretrained `general` stands for, by default the cached one that training makes. The
    global random state is left alone. Raises ValueError for a backbone, tag or file that does not fit,
    FileNotFoundError for weights that are not there.
    """
    config = configuration(recipe.backbone)
    file = None if recipe.pretrained == "none" else _pretrained_file(recipe, weights)
    with seeded(recipe.seed):
        clip = new_clip(config, (recipe.image_height, recipe.image_width), recipe.stride)
        model = IRRA(
            clip,
            num_ids if {"id", "cmpc"} & set(recipe.loss_names) else None,
            recipe.interaction if "mlm" in recipe.loss_names else None,
            recipe.interaction_depth,
            recipe.padding_attention,
        )
    if file is not None:
        drawn = {name: value.clone() for name, value in clip.state_dict().items()}
        load_clip_weights(clip, file)
        clip.load_state_dict({**clip.state_dict(), **_random_tower(drawn, recipe.pretrained_towers)})
    with seeded(recipe.seed):
        limit_learning(clip, recipe.frozen, recipe.adapter_rank)
    return model


def _random_tower(drawn: dict[str, Tensor], pretrained_towers: str) -> dict[str, Tensor]:
    """Of CLIP's tensors those of the encoder that is not to be pretrained; none where both are."""
    keep = {"both": (), "image": (False,), "text": (True,)}[pretrained_towers]
    return {name: value for name, value in drawn.items() if name.startswith("visual.") in keep}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from the seed within, and leave torch's global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _pretrained_file(recipe: Recipe, general: Path | None) -> Path:
    """The weights file that `pretrained` stands for, downloaded by open_clip if it is a tag."""
    if recipe.pretrained == "general":
        from irra_core.synthetic.pretraining import general_weights, pretraining

        path = Path(general or general_weights(pretraining()))
        if not path.is_file():
            raise FileNotFoundError(
                f"pretrained 'general': {path} is not there. Training makes it (the small CLIP after InfoNCE on the "
                "domain general, once, cached): call train, or take pretrained 'none'"
            )
        return path
    if Path(recipe.pretrained).suffix in WEIGHT_SUFFIXES:
        for folder in (Path.cwd(), project_root()):
            if (folder / recipe.pretrained).is_file():
                return folder / recipe.pretrained
        raise FileNotFoundError(f"pretrained {recipe.pretrained!r}: there is no such file in {Path.cwd()}")
    return download(recipe.backbone, recipe.pretrained)
