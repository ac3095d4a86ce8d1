"""Each loss against the released code's numbers and against its equation in plain loops."""

from math import exp, log, sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from irra_core.losses import id_loss, itc_loss, mlm_loss, sdm_loss, total_loss
from irra_core.recipes import LOSS_NAMES, recipe
from irra_core.variants.cmpm import cmpc_loss, cmpm_loss
from irra_core.variants.ibm import ibm_loss
from irra_core.variants.losses import LOSSES
from irra_core.variants.tal import tal_loss
from irra_core.variants.tbps import nitc_loss, ritc_loss

REFERENCE = np.load(Path(__file__).parent / "reference" / "irra_reference.npz")
CROWDS = {"strangers": [0, 1, 2, 3, 4], "a pair": [0, 0, 1, 2, 3], "two groups": [3, 1, 3, 1, 3], "one person": [2] * 5}


def reference(case, name):
    return torch.from_numpy(REFERENCE[f"loss{case}_{name}"])


def pair(dtype=torch.float64, size=(5, 6)):
    """Image and text features, seeded, with gradient."""
    features = torch.randn(2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return [feature.clone().requires_grad_() for feature in features]


@pytest.fixture(params=CROWDS.values(), ids=CROWDS.keys())
def pids(request):
    return torch.tensor(request.param)


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("name", ["sdm", "itc", "cmpm"])
def test_an_aligning_loss_and_its_gradients_are_the_released_ones(case, name):
    image, text = (reference(case, key).clone().requires_grad_() for key in ("image", "text"))
    pids = reference(case, "pids")
    loss = LOSSES[name](image, text) if name == "itc" else LOSSES[name](image, text, pids)
    assert loss.item() == pytest.approx(reference(case, name).item(), rel=1e-5)
    loss.backward()
    for got, key in ((image.grad, "gimage"), (text.grad, "gtext")):
        expected = reference(case, f"{name}_{key}")
        assert (got - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("case", range(5))
def test_id_and_mlm_are_the_released_ones(case):
    loss = id_loss(reference(case, "image_logits"), reference(case, "text_logits"), reference(case, "pids"))
    assert loss.item() == pytest.approx(reference(case, "id").item(), rel=1e-5)
    loss = mlm_loss(reference(case, "scores"), reference(case, "labels"))
    assert loss.item() == pytest.approx(reference(case, "mlm").item(), rel=1e-5)


# The equations, one pair at a time, in Python floats.


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a, b):
    return dot(a, b) / sqrt(dot(a, a) * dot(b, b))


def projection(a, b):
    """The length of a along b."""
    return dot(a, b) / sqrt(dot(b, b))


def softmax(scores):
    return [exp(score) / sum(exp(other) for other in scores) for score in scores]


def slow_matching(image, text, pids, similarity, size):
    """The sum over both directions of the mean KL divergence; `size` of a same-identity row divides it."""
    loss = 0.0
    for a, b in (image, text), (text, image):
        for row, pid in zip(a, pids, strict=True):
            same = [float(pid == other) for other in pids]
            p = softmax([similarity(row, other) for other in b])
            loss += sum(x * (log(x) - log(y / size(same) + 1e-8)) for x, y in zip(p, same, strict=True)) / len(pids)
    return loss


def slow_sdm(image, text, pids, temperature=0.02):
    return slow_matching(image, text, pids, lambda a, b: cosine(a, b) / temperature, sum)


def slow_cmpm(image, text, pids, target="l2"):
    size = sum if target == "sum" else lambda row: sqrt(sum(x * x for x in row))
    return slow_matching(image, text, pids, projection, size)


def slow_itc(image, text, temperature=0.02):
    loss = 0.0
    for a, b in (image, text), (text, image):
        for i, row in enumerate(a):
            loss -= log(softmax([cosine(row, other) / temperature for other in b])[i]) / (2 * len(a))
    return loss


def slow_cmpc(image, text, pids, weight):
    loss = 0.0
    for a, b in (image, text), (text, image):
        for i, pid in enumerate(pids):
            way = [x / sqrt(dot(b[i], b[i])) for x in b[i]]
            projected = [dot(a[i], way) * x for x in way]
            loss -= log(softmax([projection(projected, row) for row in weight])[pid]) / len(pids)
    return loss


def slow_cross_entropy(logits, labels, ignored=None):
    terms = [-log(softmax(row)[label]) for row, label in zip(logits, labels, strict=True) if label != ignored]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_sdm_loss_is_the_sum_in_the_paper(pids, temperature):
    image, text = pair()
    expected = slow_sdm(image.tolist(), text.tolist(), pids.tolist(), temperature)
    assert sdm_loss(image, text, pids, temperature).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_itc_loss_is_the_mean_of_two_cross_entropies(temperature):
    image, text = pair()
    expected = slow_itc(image.tolist(), text.tolist(), temperature)
    assert itc_loss(image, text, temperature).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("target", ["sum", "l2"])
def test_cmpm_loss_is_the_sum_in_the_paper_with_either_target(pids, target):
    image, text = pair()
    expected = slow_cmpm(image.tolist(), text.tolist(), pids.tolist(), target)
    assert cmpm_loss(image, text, pids, target).item() == pytest.approx(expected, rel=1e-9)


def test_cmpm_loss_divides_by_the_l2_norm_unless_told_otherwise():
    image, text = pair()
    one_person = torch.zeros(5, dtype=torch.long)
    assert cmpm_loss(image, text, one_person) == cmpm_loss(image, text, one_person, "l2") < 0
    assert cmpm_loss(image, text, one_person, "sum") > 0
    with pytest.raises(ValueError, match=r"cmpm target 'l1' is unknown: .*accepted are l2, sum"):
        cmpm_loss(image, text, one_person, "l1")


def test_cmpc_loss_classifies_each_feature_projected_onto_its_partner(pids):
    image, text = pair()
    weight = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = cmpc_loss(image, text, pids, weight)
    expected = slow_cmpc(image.tolist(), text.tolist(), pids.tolist(), weight.tolist())
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    scaled = cmpc_loss(image, text, pids, weight * torch.arange(1, 8)[:, None])
    assert scaled.item() == pytest.approx(loss.item(), rel=1e-12)  # the length of a class's weight does not count


def test_id_loss_is_the_mean_of_two_cross_entropies(pids):
    image_logits, text_logits = pair()
    expected = [slow_cross_entropy(logits.tolist(), pids.tolist()) for logits in (image_logits, text_logits)]
    assert id_loss(image_logits, text_logits, pids).item() == pytest.approx(sum(expected) / 2, rel=1e-9)


def test_mlm_loss_is_the_mean_over_the_words_whose_label_is_not_0():
    logits = torch.randn(3, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 3, 0, 8], [0, 0, 0, 0], [1, 0, 0, 5]])
    expected = slow_cross_entropy(logits.flatten(0, 1).tolist(), labels.flatten().tolist(), ignored=0)
    assert mlm_loss(logits, labels).item() == pytest.approx(expected, rel=1e-9)
    parts = [mlm_loss(logits[rows], labels[rows], count=4) for rows in (slice(0, 1), slice(1, 3))]
    assert sum(parts).item() == pytest.approx(expected, rel=1e-9)  # two processes, the words of both counted
    one = slow_cross_entropy([logits[2, 0].tolist()], [1], ignored=0)
    assert mlm_loss(logits[2, :3], labels[2, :3]).item() == pytest.approx(one, rel=1e-9)  # a single word


@pytest.mark.parametrize("words", [0, 3])
def test_mlm_loss_of_a_batch_without_a_word_to_predict_is_0_with_gradient_0(words):
    logits = torch.randn(words, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = mlm_loss(logits, torch.zeros(words, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros(words, 9))


def slow_tal(image, text, pids, weights_of):
    """RDE's loss at margin 0.1 and tau 0.015; the positives' weights come from the features `weights_of`."""
    loss = 0.0
    for a, b, c, d in (image, text, *weights_of), (text, image, *reversed(weights_of)):
        for i, pid in enumerate(pids):
            own, others = ([j for j, other in enumerate(pids) if (other == pid) == same] for same in (True, False))
            weight = softmax([cosine(c[i], d[j]) / 0.015 for j in own])
            positive = sum(w * cosine(a[i], b[j]) for w, j in zip(weight, own, strict=True))
            negative = sum(exp(cosine(a[i], b[j]) / 0.015) for j in others)
            loss += max(0.0, 0.1 - positive + 0.015 * log(negative)) if others else 0.0
    return loss


def test_tal_loss_and_its_gradient_are_those_of_the_paper(pids):
    image, text = pair()
    frozen = image.tolist(), text.tolist()
    loss = tal_loss(image, text, pids)
    loss.backward()
    assert loss.item() == pytest.approx(slow_tal(*frozen, pids.tolist(), frozen), rel=1e-9)
    step = torch.zeros_like(image).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1e-6, dtype=image.dtype))
    ends = [slow_tal((image + sign * step).tolist(), frozen[1], pids.tolist(), frozen) for sign in (1, -1)]
    assert image.grad[1, 2].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", ["sdm", "itc", "cmpm", "cmpc"])
def test_the_gradient_is_that_of_the_value(name, pids):
    image, text = pair()
    weight = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    arguments = {"itc": (image, text), "cmpc": (image, text, pids, weight)}.get(name, (image, text, pids))
    assert torch.autograd.gradcheck(LOSSES[name], arguments, atol=1e-6, rtol=1e-4)


ALIGNING = ["sdm", "itc", "cmpm", "cmpc", "tal", "ibm", "nitc", "ritc", "tse"]


def aligned(name, image, text, pids):
    """The loss and its two gradients, of any aligning loss."""
    weight = torch.randn(7, image.shape[1], generator=torch.Generator().manual_seed(1)).to(image.dtype)
    more = {"itc": (), "cmpc": (pids, weight)}.get(name, (pids,))
    loss = LOSSES[name](image, text, *more)
    return loss, *torch.autograd.grad(loss, (image, text))


@pytest.mark.parametrize("name", ALIGNING)
def test_large_features_in_float32_give_the_loss_of_float64(name, pids):
    image, text = pair(torch.float32)
    large = [(feature.detach() * 300).requires_grad_() for feature in (image, text)]
    exact = [feature.detach().double().requires_grad_() for feature in large]
    for got, expected in zip(aligned(name, *large, pids), aligned(name, *exact, pids), strict=True):
        assert got.isfinite().all()
        assert (got - expected).norm() <= 1e-4 * expected.norm() + 1e-6


@pytest.mark.parametrize("name", ALIGNING)
def test_equal_images_and_texts_give_a_finite_loss_and_gradient(name, pids):
    features = [torch.ones(5, 6, requires_grad=True) for _ in "it"]
    assert all(part.isfinite().all() for part in aligned(name, *features, pids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALIGNING)
def test_half_precision_and_autocast_do_not_degrade_a_loss(name, dtype, pids):
    half = pair(dtype)
    full = [feature.detach().float().requires_grad_() for feature in half]
    expected = aligned(name, *full, pids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(aligned(name, *full, pids)[0], expected[0])
    if name != "cmpc":  # its weight would be rounded too
        loss, *gradients = aligned(name, *half, pids)
        assert torch.equal(loss, expected[0])
        assert all(torch.equal(got, exact.to(dtype)) for got, exact in zip(gradients, expected[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_classification_in_half_precision_is_that_of_the_same_logits_in_float32(dtype, pids):
    image, text = (feature.detach().to(dtype) for feature in pair())
    full = (image.float(), text.float())
    for loss, exact in (
        (id_loss(image, text, pids), id_loss(*full, pids)),
        (mlm_loss(image, pids), mlm_loss(full[0], pids)),
    ):
        assert loss.dtype == torch.float32
        assert torch.equal(loss, exact)


def test_float64_stays_float64(pids):
    image, text = pair()
    assert all(aligned(name, image, text, pids)[0].dtype == torch.float64 for name in ALIGNING)
    assert id_loss(image, text, pids).dtype == mlm_loss(image, pids).dtype == torch.float64


def features(words=6):
    """What a model gives for five pairs, seven identities and some masked words of a vocabulary of nine."""
    image, text = pair(torch.float32)
    numbers = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 5, 7, generator=numbers)
    word_logits, word_labels = torch.randn(words, 9, generator=numbers), torch.arange(words) % 9
    return SimpleNamespace(
        image=image,
        text=text,
        image_logits=logits[0],
        text_logits=logits[1],
        word_logits=word_logits,
        word_labels=word_labels,
        class_weight=torch.randn(7, 6, generator=torch.Generator().manual_seed(1)),
        temperature=None,
    )


def test_every_loss_that_a_recipe_can_name_is_in_the_registry():
    assert tuple(LOSSES) == LOSS_NAMES
    assert all(LOSSES[name].__name__ == f"{name}_loss" for name in LOSS_NAMES)


@pytest.mark.parametrize("losses", ["sdm+id+mlm", "mlm+itc", "cmpm+cmpc", "tal+id+mlm", "ibm+nitc+ritc"])
def test_total_loss_has_one_part_for_each_name_in_the_recipes_order(losses, pids):
    given = features()
    parts = total_loss(given, pids, recipe(losses=losses))
    assert list(parts) == losses.split("+")
    expected = {
        "sdm": sdm_loss(given.image, given.text, pids),
        "itc": itc_loss(given.image, given.text),
        "cmpm": cmpm_loss(given.image, given.text, pids, "sum"),
        "cmpc": cmpc_loss(given.image, given.text, pids, given.class_weight),
        "tal": tal_loss(given.image, given.text, pids),
        "ibm": ibm_loss(given.image, given.text, pids),
        "nitc": nitc_loss(given.image, given.text, pids, 0.02),
        "ritc": ritc_loss(given.image, given.text, pids, 0.02),
        "id": id_loss(given.image_logits, given.text_logits, pids),
        "mlm": F.cross_entropy(given.word_logits[1:], given.word_labels[1:]),
    }
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(
        {name: expected[name].item() for name in parts}
    )


def test_total_loss_follows_the_recipes_temperature_and_target_and_the_word_count():
    given, pids = features(), torch.tensor(CROWDS["two groups"])
    parts = total_loss(given, pids, recipe(losses="sdm+itc+cmpm+mlm", temperature=0.3, cmpm_target="l2"), 10)
    assert parts["sdm"] == sdm_loss(given.image, given.text, pids, 0.3)
    assert parts["itc"] == itc_loss(given.image, given.text, 0.3)
    assert parts["cmpm"] == cmpm_loss(given.image, given.text, pids, "l2")
    assert parts["mlm"].item() == pytest.approx(mlm_loss(given.word_logits, given.word_labels).item() * 5 / 10)


def test_total_loss_of_joined_features_gives_each_loss_its_part(pids):
    given = features()
    selected = [torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
    whole = {name: getattr(given, name) for name in ("image", "text")}
    for (name, feature), own in zip(whole.items(), selected, strict=True):
        setattr(given, name, torch.cat([feature, own], 1))
    parts = total_loss(given, pids, recipe(losses="tal+tse+sdm"))
    assert parts["tal"] == tal_loss(*whole.values(), pids)
    assert parts["tse"] == tal_loss(*selected, pids)
    assert parts["sdm"] == sdm_loss(*whole.values(), pids)


def test_total_loss_takes_the_learned_temperature_and_the_epoch_of_the_step(pids):
    given, tbps = features(), recipe(losses="nitc+sdm", learned_temperature=True, epochs=4)
    given.temperature = torch.tensor(0.3)
    parts = total_loss(given, pids, tbps, elapsed=0.125)
    assert parts["nitc"] == nitc_loss(given.image, given.text, pids, torch.tensor(0.3), 0.5)
    assert parts["sdm"] == sdm_loss(given.image, given.text, pids, torch.tensor(0.3))
