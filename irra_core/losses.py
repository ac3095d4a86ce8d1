"""`Features` + identities → one number each: pure functions."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from irra_core.augmentation import full_precision
from irra_core.recipes import Recipe

EPSILON = 1e-8  # released: keeps the logarithm of a target of zero finite


def in_full_precision(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss computed outside autocast, half precision raised to float32; float64 stays float64."""

    @functools.wraps(loss)
    def computed(*args: Any, **named: Any) -> Tensor:
        args, named = [_raised(value) for value in args], {name: _raised(value) for name, value in named.items()}
        device = next(value.device for value in (*args, *named.values()) if isinstance(value, Tensor))
        with torch.autocast(device.type, enabled=False):
            return loss(*args, **named)

    return computed


def _raised(value: Any) -> Any:
    return full_precision(value) if isinstance(value, Tensor) else value


@in_full_precision
def sdm_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    pids: Int[Tensor, " batch"],
    temperature: float | Float[Tensor, ""] = 0.02,
) -> Float[Tensor, ""]:
    """Similarity distribution matching: the KL divergence image-to-text plus text-to-image, in nats.

    image[i] and text[i] describe the person pids[i]; they need not be normalised. With s = cosine / temperature,
    p_i = softmax_j s_ij and q_ij = [pid_i = pid_j] / (how many j have pid_i):
        loss = mean_i Σ_j p_ij (log p_ij − log(q_ij + ε)) + the same for sᵀ,   ε = 1e-8
    Source: IRRA (Jiang & Ye, CVPR 2023), "Similarity Distribution Matching"; ε as released.
    """
    scores = cosines(image, text) / temperature
    same = same_person(pids, scores)
    target = (same / same.sum(1, keepdim=True) + EPSILON).log()
    return divergence(torch.stack([scores, scores.T]), target).sum()


def cosines(image: Float[Tensor, "batch dim"], text: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch batch"]:
    """The cosine of every image with every text."""
    image, text = F.normalize(torch.stack([image, text]), dim=2)
    return image @ text.T


def same_person(pids: Int[Tensor, " batch"], scores: Float[Tensor, "batch batch"]) -> Float[Tensor, "batch batch"]:
    """1 where row and column are the same person, else 0."""
    return (pids[:, None] == pids).to(scores.dtype)


def divergence(scores: Float[Tensor, "*sides n m"], log_target: Float[Tensor, "n m"]) -> Float[Tensor, "*sides"]:
    """Mean over the rows of KL(softmax of the row ‖ its target), in nats."""
    log_p = scores.log_softmax(-1)
    return (log_p.exp() * (log_p - log_target)).sum(-1).mean(-1)


@in_full_precision
def itc_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    temperature: float | Float[Tensor, ""] = 0.02,
) -> Float[Tensor, ""]:
    """InfoNCE: the mean of image-to-text and text-to-image cross-entropy, in nats; only text[i] is right for image[i].

    With s = cosine / temperature: loss = −½ mean_i (log softmax_j s_ij + log softmax_j s_ji) at j = i.
    Source: CLIP (Radford et al., ICML 2021), figure 3; the paper's baseline.
    """
    scores = cosines(image, text) / temperature
    right = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


@in_full_precision
def id_loss(
    image_logits: Float[Tensor, "batch identities"],
    text_logits: Float[Tensor, "batch identities"],
    pids: Int[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Identity classification: the mean of the image's and the text's cross-entropy, in nats; pids are class numbers.

    Source: Zheng et al., "Dual-path convolutional image-text embeddings with instance loss", TOMM 2020.
    """
    return F.cross_entropy(torch.cat([image_logits, text_logits]), pids.long().repeat(2))


@in_full_precision
def mlm_loss(
    logits: Float[Tensor, "*words vocabulary"],
    labels: Int[Tensor, "*words"],
    count: int | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Masked language modelling: the mean cross-entropy of the words to predict, in nats; label 0 is not predicted.

    Without any word to predict the loss and its gradient are 0. `count` is the number to divide by (default: how many
    labels are not 0), for a batch that is spread over several processes.
    Source: IRRA (CVPR 2023), "Implicit Relation Reasoning"; after BERT.
    """
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), ignore_index=0, reduction="sum")
    count = (labels != 0).sum() if count is None else torch.as_tensor(count, device=total.device)
    return total / count.clamp(min=1)


def total_loss(
    features: Any,
    pids: Int[Tensor, " batch"],
    recipe: Recipe,
    word_count: int | Tensor | None = None,
    names: Sequence[str] | None = None,
    elapsed: float = 1.0,
) -> dict[str, Float[Tensor, ""]]:
    """Each loss of `recipe.losses` by name, in the recipe's order; what is trained is their sum, every weight 1.

    `features` is the model's `Features`; pids are class numbers. A loss gets, by its parameters' names, what is listed
    below. `word_count`: see mlm_loss. `names` picks some of the recipe's losses; `elapsed`: see Batch.
    """
    from irra_core.variants.joined import parts_of
    from irra_core.variants.losses import LOSSES

    given = parts_of(features, "tse" in recipe.loss_names) | {
        "pids": pids,
        "temperature": recipe.temperature if features.temperature is None else features.temperature,
        "epoch": elapsed * recipe.epochs,
        "target": recipe.cmpm_target,
        "weight": features.class_weight,
        "image_logits": features.image_logits,
        "text_logits": features.text_logits,
        "logits": features.word_logits,
        "labels": features.word_labels,
        "count": word_count,
    }
    parts = {}
    for name in recipe.loss_names if names is None else names:
        wanted = inspect.signature(LOSSES[name]).parameters
        parts[name] = LOSSES[name](**{key: given[key] for key in wanted if key in given})
    return parts
