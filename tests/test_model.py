"""The forward pass against open_clip's and torch's own, one pair at a time: values, gradients, attention."""

import copy
import subprocess
import sys

import pytest
import torch
from open_clips import their_clip, their_image_tokens, their_text_tokens
from torch.nn import functional as F

import irra_core as irra
from irra_core.backbone import new_clip, seeded
from irra_core.model import IRRA

KINDS = ("cross", "co", "merged")
START, END, MASK = 118, 119, 117
CONFIG = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {"layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 120, "width": 64, "heads": 1, "layers": 2},
}


def small(kind="cross", padding_attention=False, num_ids=5):
    """A model of two layers a tower in double precision, so that only errors and no rounding can differ."""
    with seeded(0):
        model = IRRA(new_clip(CONFIG, (24, 16), 8), num_ids, kind, 2, padding_attention).double()
        for parameter in model.parameters():  # biases that are zero would hide mistakes
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def pairs():
    """Four photos with captions of 3 to 12 tokens, masked captions and labels; the last caption has no masked word."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 24, 16, dtype=torch.float64, generator=generator)
    lengths = torch.tensor([12, 7, 9, 3])
    tokens = torch.randint(1, 100, (4, 12), generator=generator)
    tokens[torch.arange(12) >= lengths[:, None]] = 0
    tokens[:, 0], tokens[torch.arange(4), lengths - 1] = START, END
    labels = torch.zeros_like(tokens)
    for row, column in ((0, 2), (0, 10), (1, 5), (2, 1), (2, 2), (2, 7)):
        labels[row, column] = tokens[row, column]
    return images, tokens, tokens.masked_fill(labels != 0, MASK), labels


def slow_text(model, tokens):
    """All projected tokens of one caption by open_clip's own modules."""
    return their_text_tokens(their_clip(CONFIG, model.clip), tokens[None])[0]


def slow_image(model, image):
    """All projected tokens of one photo by open_clip's own modules."""
    return their_image_tokens(their_clip(CONFIG, model.clip), image[None])[0]


def slow_words(model, image, tokens):
    """Word scores of one masked caption: padding cut off, or filled up to 77 where it is attended to."""
    length = int(tokens.argmax()) + 1
    tokens = F.pad(tokens, (0, 77 - len(tokens))) if model.padding_attention else tokens[:length]
    words, patches = slow_text(model, tokens), slow_image(model, image)
    return model.mlm_head(model.interaction(words[None], patches[None]))[0]


def slow_loss(model, images, tokens, masked_tokens, labels):
    """A loss that needs every part of Features, from the slow pieces."""
    total = 0
    for image, caption, masked, label in zip(images, tokens, masked_tokens, labels, strict=True):
        seen, read = slow_image(model, image)[0], slow_text(model, caption)[int(caption.argmax())]
        for features in (seen, read):
            total = total + features.sin().sum() + model.classifier(features).square().sum()
        scores = slow_words(model, image, masked)
        for position in label.nonzero()[:, 0].tolist():
            total = total + F.cross_entropy(scores[position], label[position])
    return total


def fast_loss(model, *batch):
    found = model(*batch)
    total = F.cross_entropy(found.word_logits, found.word_labels, reduction="sum")
    for features, logits in ((found.image, found.image_logits), (found.text, found.text_logits)):
        total = total + features.sin().sum() + logits.square().sum()
    return total


def shorter(pairs, what):
    """The batch as the caller may trim it: all the same length, or one of the two passes longer than the other."""
    images, tokens, masked_tokens, labels = pairs
    if what == "masked captions longer":
        masked_tokens, labels = F.pad(masked_tokens, (0, 65)), F.pad(labels, (0, 65))
    if what == "captions longer":
        tokens = F.pad(tokens, (0, 65))
    if what == "captions masked too":
        tokens = masked_tokens
    return images, tokens, masked_tokens, labels


LENGTHS = ("the same length", "masked captions longer", "captions longer", "captions masked too")


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("padding_attention", [False, True], ids=["padding apart", "padding attended to"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_pass_has_the_loss_and_gradients_of_the_slow_one(kind, padding_attention, lengths, pairs):
    model, batch = small(kind, padding_attention), shorter(pairs, lengths)
    names, parameters = zip(*model.named_parameters(), strict=True)
    results = []
    for loss in (slow_loss(model, *batch), fast_loss(model, *batch)):
        results.append((loss, torch.autograd.grad(loss, parameters, allow_unused=True)))
    (slow, slow_grads), (fast, fast_grads) = results
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=0)
    for name, expected, found in zip(names, slow_grads, fast_grads, strict=True):
        if expected is None:  # the last image stream of co leads nowhere
            assert found is None, name
            continue
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("padding_attention", [False, True], ids=["padding apart", "padding attended to"])
@pytest.mark.parametrize("kind", KINDS)
def test_word_scores_are_those_of_each_pair_alone_however_the_batch_is_trimmed(kind, padding_attention, pairs):
    images, _, masked_tokens, _ = pairs
    model = small(kind, padding_attention)
    trimmed, whole = model.word_logits(images, masked_tokens), model.word_logits(images, F.pad(masked_tokens, (0, 65)))
    assert trimmed.shape == (4, 12, 120)
    for row, length in enumerate((masked_tokens.argmax(1) + 1).tolist()):
        expected = slow_words(model, images[row], masked_tokens[row])[:length]
        torch.testing.assert_close(trimmed[row, :length], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(whole[row, :length], expected, rtol=1e-9, atol=1e-9)


def test_masked_word_scores_come_row_by_row_with_their_words(pairs):
    images, tokens, masked_tokens, labels = pairs
    model = small()
    found = model(images, tokens, masked_tokens, labels)
    assert found.word_labels.tolist() == labels[labels != 0].tolist()
    expected = model.word_logits(images, masked_tokens)[labels != 0]
    torch.testing.assert_close(found.word_logits, expected, rtol=1e-9, atol=1e-9)


def test_features_are_open_clips_own(pairs):
    images, tokens, *_ = pairs
    model = small()
    theirs = their_clip(CONFIG, model.clip)
    torch.testing.assert_close(model.encode_image(images), theirs.encode_image(images), rtol=1e-9, atol=1e-9)
    whole = F.pad(tokens, (0, 65))
    for given in (tokens, whole):
        torch.testing.assert_close(model.encode_text(given), theirs.encode_text(whole), rtol=1e-9, atol=1e-9)


def test_the_global_features_are_the_class_token_and_the_end_token(pairs):
    images, tokens, *_ = pairs
    model = small()
    shown, read = model.image_tokens(images), model.text_tokens(tokens)
    assert shown.shape == (4, 1 + 3 * 2, 128)
    assert read.shape == (4, 12, 128)
    torch.testing.assert_close(model.encode_image(images), shown[:, 0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.encode_text(tokens), read[torch.arange(4), [11, 6, 8, 2]], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stride", [8, 5])
@pytest.mark.parametrize(("kind", "layers"), [("cross", 1), ("co", 2), ("merged", 2)])
def test_attention_is_rows_by_columns_and_the_mean_over_layers_and_heads(kind, layers, stride, pairs):
    images, tokens, *_ = pairs
    with seeded(0):
        model = IRRA(new_clip(CONFIG, (24, 16), stride), None, kind, 2).double()
    rows, cols = (3, 2) if stride == 8 else (4, 2)
    each, mean = model.attention(images, tokens, heads=True), model.attention(images, tokens)
    assert each.shape == (layers, 2, 4, 12, rows, cols)
    torch.testing.assert_close(mean, each.mean((0, 1)))


@pytest.mark.parametrize("padding_attention", [False, True])
def test_a_words_attention_is_torchs_without_the_class_tokens_share(padding_attention, pairs):
    images, tokens, *_ = pairs
    model = small("cross", padding_attention)
    image = model.interaction.ln_image(model.image_tokens(images))
    words = model.interaction.ln_text(model.text_tokens(tokens))
    _, shares = model.interaction.attention(words, image, image, average_attn_weights=False)
    found = model.attention(images, tokens, heads=True)[0].transpose(0, 1)
    torch.testing.assert_close(found.flatten(-2), shares[..., 1:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.sum((-1, -2)), 1 - shares[..., 0], rtol=1e-9, atol=1e-9)


def test_a_patch_that_alone_looks_like_the_word_gets_the_attention(pairs):
    images, tokens, *_ = pairs
    model = small()
    with torch.no_grad():
        model.interaction.attention.in_proj_weight.mul_(10)
    base = model.attention(images, tokens)
    changed = images.clone()
    changed[:, :, 16:24, 8:16] += 5.0  # the patch in the last row and column
    moved = (model.attention(changed, tokens) - base).abs()
    assert moved[..., 2, 1].mean() > 0.01


@pytest.mark.parametrize(
    ("losses", "parts"),
    [("sdm", (False, False)), ("sdm+id", (True, False)), ("itc+mlm", (False, True)), ("sdm+cmpc", (True, False))],
)
def test_a_model_has_the_parts_that_its_losses_need(losses, parts):
    model = irra.build_model(irra.recipe(pretrained="none", losses=losses), 7)
    assert (model.classifier is not None, model.interaction is not None) == parts
    assert (model.mlm_head is not None) == parts[1]
    found = model(torch.zeros(2, 3, 96, 32), torch.tensor([[49406, 320, 49407]] * 2))
    assert (found.image_logits is not None, found.text_logits is not None) == (parts[0], parts[0])
    assert found.word_logits is None
    assert found.word_labels is None


def test_what_needs_an_absent_interaction_encoder_says_so(pairs):
    images, tokens, *_ = pairs
    model = small(kind=None)
    for name in ("word_logits", "attention"):
        with pytest.raises(ValueError, match=f"{name} needs the interaction encoder"):
            getattr(model, name)(images, tokens)


def test_masked_tokens_without_labels_are_refused(pairs):
    images, tokens, masked_tokens, _ = pairs
    with pytest.raises(ValueError, match="masked_tokens need labels"):
        small()(images, tokens, masked_tokens)


def test_images_of_another_size_are_refused_with_both_sizes():
    with pytest.raises(ValueError, match="images are 16×24 pixels: this model takes 24×16"):
        small().encode_image(torch.zeros(1, 3, 16, 24, dtype=torch.float64))


def test_a_batch_without_a_masked_word_has_no_scores_and_gradients_of_zero(pairs):
    images, tokens, *_ = pairs
    model = small()
    found = model(images, tokens, tokens, torch.zeros_like(tokens))
    assert found.word_logits.shape == (0, 120)
    assert found.word_labels.shape == (0,)
    found.word_logits.sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("interaction.", "mlm_head.")):
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_the_same_seed_builds_the_same_model_and_leaves_the_random_state_alone():
    recipe = irra.recipe(pretrained="none")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = irra.build_model(recipe, 7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = irra.build_model(recipe, 7).state_dict()
    other = irra.build_model(recipe.replace(seed=1), 7).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["clip.visual.proj"], other["clip.visual.proj"])
    assert not torch.equal(first["mlm_head.fc.weight"], other["mlm_head.fc.weight"])


def test_the_encoders_start_alike_whatever_losses_follow():
    recipe = irra.recipe(pretrained="none", losses="sdm+id+mlm")
    full = irra.build_model(recipe, 7).clip.state_dict()
    bare = irra.build_model(recipe.replace(losses="itc"), 7).clip.state_dict()
    assert all(torch.equal(value, bare[name]) for name, value in full.items())


def test_the_head_and_the_classifier_start_with_the_released_spread():
    model = irra.build_model(irra.recipe(pretrained="none", interaction_depth=4), 500)
    assert model.mlm_head.fc.weight.std().item() == pytest.approx(128**-0.5 * 8**-0.5, rel=0.01)
    assert model.mlm_head.dense.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert model.classifier.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert not model.classifier.bias.any()


def test_under_autocast_results_are_single_precision_and_identity_scores_exact():
    model = irra.build_model(irra.recipe(pretrained="none"), 7)
    images = torch.randn(2, 3, 96, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[49406, 320, 518, 49407], [49406, 530, 49407, 0]])
    labels = torch.tensor([[0, 320, 0, 0], [0, 0, 0, 0]])
    full = model(images, tokens, tokens, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images, tokens, tokens, labels)
    for name in ("image", "text", "image_logits", "text_logits", "word_logits"):
        assert getattr(found, name).dtype == torch.float32, name
        torch.testing.assert_close(getattr(found, name), getattr(full, name), atol=0.1, rtol=0.05)
    assert torch.equal(found.image_logits, model.classifier(found.image))


def test_half_precision_matrices_beside_full_layer_norms_run(pairs):
    images, tokens, masked_tokens, labels = pairs
    model = small().float()
    half = copy.deepcopy(model)
    for name, parameter in half.named_parameters():
        if "ln" not in name and "embedding" not in name:
            parameter.data = parameter.data.half()
    found, full = (m(images.float(), tokens, masked_tokens, labels) for m in (half, model))
    for name in ("image", "text", "image_logits", "text_logits", "word_logits"):
        assert getattr(found, name).dtype == torch.float32, name
        torch.testing.assert_close(getattr(found, name), getattr(full, name), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["ViT-B-16-quickgelu", "ViT-B-32", "ViT-L-14", "ViT-S-16-alt"])
def test_a_backbone_by_name_gives_features_of_its_width(name):
    recipe = irra.recipe("rstp", backbone=name, pretrained="none", image_height=224, image_width=112, stride=14)
    with torch.device("meta"):
        model = irra.build_model(recipe, 7, device="meta")
        labels = torch.zeros(2, 10, dtype=torch.long)
        shown, read = model.encode_image(torch.zeros(2, 3, 224, 112)), model.encode_text(labels)
        patches = model.image_tokens(torch.zeros(2, 3, 224, 112))
    width = {"ViT-B-16-quickgelu": 512, "ViT-B-32": 512, "ViT-L-14": 768, "ViT-S-16-alt": 256}[name]
    patch = model.clip.visual.conv1.kernel_size[0]
    assert shown.shape == read.shape == (2, width)
    assert patches.shape == (2, 1 + ((224 - patch) // 14 + 1) * ((112 - patch) // 14 + 1), width)


@pytest.mark.parametrize(
    ("lengths", "passes"), [("the same length", 1), ("captions longer", 2), ("captions masked too", 1)]
)
def test_each_encoder_runs_once_where_lengths_agree(lengths, passes, pairs):
    model, batch, calls = small(), shorter(pairs, lengths), []
    for name, block in (("text", model.clip.token_embedding), ("image", model.clip.visual.ln_pre)):
        block.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(*batch)
    assert (calls.count("text"), calls.count("image")) == (passes, 1)


def test_importing_the_model_loads_no_library_that_it_can_do_without():
    heavy = ("open_clip", "torchvision", "timm", "huggingface_hub", "resvg_py", "faiss", "matplotlib", "torch._dynamo")
    source = (
        "import sys, irra_core as irra, irra_core.model, irra_core.backbone\n"
        "irra.build_model(irra.recipe(pretrained='none'), 2)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
