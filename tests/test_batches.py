"""Batches: an epoch is every caption once, a batch is a function of (seed, step), processes share it without loss."""

import dataclasses

import numpy as np
import pytest
import torch
from pandas import DataFrame

from irra_core import batches as batches_module
from irra_core.augmentation import normalise
from irra_core.batches import PLACES, Batch, Batches
from irra_core.recipes import recipe as make_recipe
from irra_core.text import END_ID, MASK_ID, START_ID, trim

IMAGES, CAPTIONS, BATCH = 11, 22, 8  # 8 + 8 + 6 captions an epoch


def captions(count: int) -> torch.Tensor:
    """Token ids of captions of 3 to 30 words, all words different, so that a token tells its caption."""
    tokens = torch.zeros(count, 77, dtype=torch.int64)
    for row in range(count):
        words = 3 + row * 27 // count
        ids = [START_ID, *range(1 + 100 * row, 1 + 100 * row + words), END_ID]
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens


@pytest.fixture
def recipe():
    return make_recipe(
        "synthetic", image_height=16, image_width=8, crop_padding=2, batch_size=BATCH, seed=5, erase_probability=0.5
    )


@pytest.fixture
def table():
    """Two captions an image, pids that are no class labels, and images that others than the train split have too."""
    image_ids = np.arange(CAPTIONS) // 2 * 2 + 1
    return DataFrame({"pid": 1000 - image_ids // 4 * 7, "image_id": image_ids, "caption": "", "split": "train"})


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (2 * IMAGES + 5, 3, 16, 8), dtype=np.uint8)


@pytest.fixture
def make(table, pixels):
    def batches(recipe) -> Batches:
        return Batches(table, pixels, captions(len(table)), recipe)

    return batches


HOSTS = ("words_each",)


def fields(batch: Batch) -> list[torch.Tensor]:
    """What of a batch lies on the device, but for the places of its masked words (see `picked`)."""
    return [value for name, value in dataclasses.asdict(batch).items() if name not in (*HOSTS, *PLACES, "elapsed")]


def picked(batch: Batch) -> torch.Tensor:
    """The words that a batch's places pick from its labels, row by row."""
    return batch.labels.gather(1, batch.at).flatten()[batch.wanted]


def same(one: Batch, two: Batch) -> bool:
    alike = all(torch.equal(*pair) for pair in zip(fields(one), fields(two), strict=True))
    alike = alike and all(torch.equal(getattr(one, name), getattr(two, name)) for name in PLACES)
    return alike and all(getattr(one, name) == getattr(two, name) for name in (*HOSTS, "elapsed"))


def test_an_epoch_is_every_caption_once_with_a_short_last_batch(make, recipe):
    batches = make(recipe)
    assert batches.steps_per_epoch == 3
    for epoch in range(3):
        rows = [batches.at(3 * epoch + step).rows for step in range(3)]
        assert [len(part) for part in rows] == [8, 8, 6]
        assert sorted(torch.cat(rows).tolist()) == list(range(CAPTIONS))


@pytest.mark.parametrize(("size", "lengths"), [(7, [7, 7, 7, 1]), (11, [11, 11]), (100, [22])])
def test_batches_of_any_size_cover_the_epoch(make, recipe, size, lengths):
    batches = make(recipe.replace(batch_size=size))
    found = [batches.at(step) for step in range(batches.steps_per_epoch)]
    assert [len(batch.images) for batch in found] == lengths
    assert sorted(torch.cat([batch.rows for batch in found]).tolist()) == list(range(CAPTIONS))
    assert found[-1].labels.any()


def test_each_row_has_its_own_image_caption_and_class(make, recipe, table, pixels):
    plain = recipe.replace(flip_probability=0.0, erase_probability=0.0, crop_padding=0)
    batches = make(plain)
    classes = sorted(set(table.pid))
    assert batches.classes.tolist() == classes
    for step in range(3):
        batch = batches.at(step)
        rows = table.iloc[batch.rows.numpy()]
        assert torch.equal(batch.images, normalise(torch.from_numpy(pixels[rows.image_id.to_numpy()])))
        assert batch.pids.tolist() == [classes.index(pid) for pid in rows.pid]
        assert ((batch.tokens[:, 1] - 1) // 100).tolist() == batch.rows.tolist()


def test_the_order_changes_with_the_epoch_and_the_seed(make, recipe):
    one, other = make(recipe), make(recipe.replace(seed=6))
    orders = {tuple(b.at(step).rows.tolist()) for b in (one, other) for step in (0, 3, 6)}
    assert len(orders) == 6


def test_a_batch_is_bit_for_bit_the_same_in_any_order_and_after_a_restart(make, recipe):
    batches = make(recipe)
    first = [batches.at(step) for step in range(7)]
    assert all(same(make(recipe).at(step), first[step]) for step in (6, 2, 3, 0))
    assert all(same(batches.at(step), first[step]) for step in (5, 0, 6))


def test_masks_and_augmentation_differ_from_epoch_to_epoch(make, recipe):
    recipe = recipe.replace(batch_size=CAPTIONS)
    one, two = (make(recipe).at(step) for step in (0, 1))
    one_order, two_order = one.rows.argsort(), two.rows.argsort()
    for name in ("labels", "images"):
        assert not torch.equal(getattr(one, name)[one_order], getattr(two, name)[two_order])
    assert torch.equal(one.tokens[one_order], two.tokens[two_order])


def test_the_global_random_state_is_neither_read_nor_moved(make, recipe):
    torch.manual_seed(1)
    np.random.seed(1)
    first = make(recipe).at(0)
    torch.manual_seed(2)
    np.random.seed(2)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(2)
    np.random.seed(2)
    assert same(make(recipe).at(0), first)
    assert (torch.rand(1), np.random.rand()) == expected


def test_order_masks_and_augmentation_draw_different_numbers_at_every_step(make, recipe):
    batches = make(recipe)
    generators = [batches._generator(kind, step) for kind in range(4) for step in range(50)]
    assert len({tuple(torch.rand(2, generator=generator).tolist()) for generator in generators}) == 200


def test_masks_do_not_depend_on_how_images_are_augmented(make, recipe):
    one, two = make(recipe).at(0), make(recipe.replace(flip_probability=0.0, crop_padding=0)).at(0)
    assert torch.equal(one.masked_tokens, two.masked_tokens)
    assert not torch.equal(one.images, two.images)


def test_augmentation_does_not_depend_on_how_captions_are_masked(make, recipe):
    one, two = make(recipe).at(0), make(recipe.replace(mask_probability=0.9)).at(0)
    assert torch.equal(one.images, two.images)
    assert not torch.equal(one.masked_tokens, two.masked_tokens)


@pytest.mark.parametrize("padding_attention", [False, True])
@pytest.mark.parametrize("mask_captions", [False, True])
@pytest.mark.parametrize("processes", [2, 3, 8])
def test_the_parts_of_all_processes_are_the_whole_batch(make, recipe, processes, mask_captions, padding_attention):
    recipe = recipe.replace(mask_captions=mask_captions, padding_attention=padding_attention)
    batches = make(recipe)
    for step in range(4):  # 8, 8, 6 and 8 rows: 6 divides by neither 8 nor, as 8, by 3
        expected = batches.at(step)
        *whole, pids, words = fields(expected)
        parts = [make(recipe).at(step, process, processes) for process in range(processes)]
        assert all(sum((getattr(part, name) for part in parts), ()) == getattr(expected, name) for name in HOSTS)
        assert torch.equal(torch.cat([part.words for part in parts]), expected.labels[expected.labels != 0])
        assert all(torch.equal(picked(part), part.words) for part in [expected, *parts])
        parts = [fields(part) for part in parts]
        assert all(torch.equal(part[-2], pids) and part[-1] == words for part in parts)  # what all of them know
        parts = [part[:-2] for part in parts]
        assert all(
            torch.equal(torch.cat(part), all_) for part, all_ in zip(zip(*parts, strict=True), whole, strict=True)
        )
        sizes = [len(part[0]) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@pytest.fixture
def switched(recipe):
    return recipe.replace(sampler="identity", per_identity=4, word_augmentation=0.5, word_deletion=0.2)


@pytest.mark.parametrize("processes", [2, 3])
def test_the_parts_of_a_balanced_and_augmented_batch_are_the_whole_batch_after_a_restart_too(make, switched, processes):
    batches = make(switched)
    for step in (3, 0, 1):
        expected = batches.at(step)
        parts = [make(switched).at(step, process, processes) for process in range(processes)]
        for name in ("images", "tokens", "masked_tokens", "labels", "pids", "rows"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name)), name
        assert {part.elapsed for part in parts} == {expected.elapsed}
        assert same(make(switched).at(step), expected)


def test_the_identity_sampler_gives_each_person_of_a_batch_as_many_captions_and_every_caption_in_each_epoch(
    make, switched
):
    """Five people have 4 captions, one has 2: an epoch has 24 rows."""
    batches = make(switched)
    assert batches.steps_per_epoch == 3
    for epoch in range(2):
        found = [batches.at(3 * epoch + step) for step in range(3)]
        for batch in found:
            assert sorted(batch.pids.bincount().tolist())[-2:] == [4, 4]
        assert set(torch.cat([batch.rows for batch in found]).tolist()) == set(range(CAPTIONS))


def test_augmented_words_are_in_the_captions_alone(make, recipe):
    plain, augmented = make(recipe).at(0), make(recipe.replace(word_augmentation=0.5)).at(0)
    for name in ("images", "masked_tokens", "labels"):
        assert torch.equal(getattr(plain, name), getattr(augmented, name)), name
    assert plain.tokens.shape == augmented.tokens.shape
    assert not torch.equal(plain.tokens, augmented.tokens)
    assert torch.equal(plain.tokens.argmax(1) > 0, augmented.tokens.argmax(1) > 0)
    shorter = make(recipe.replace(word_deletion=0.5)).at(0)
    assert (shorter.tokens.argmax(1) < plain.tokens.argmax(1)).any()
    assert (shorter.tokens.argmax(1) <= plain.tokens.argmax(1)).all()


def test_captions_are_cut_to_the_longest_of_the_whole_batch(make, recipe):
    batches = make(recipe)
    for step in range(3):
        batch = batches.at(step)
        lengths = (captions(CAPTIONS)[batch.rows] != 0).sum(1)
        assert batch.tokens.shape[1] == batch.masked_tokens.shape[1] == batch.labels.shape[1] == lengths.max()
        assert torch.equal(batch.tokens, captions(CAPTIONS)[batch.rows, : lengths.max()])
        parts = [batches.at(step, process, 4) for process in range(4)]
        assert {part.tokens.shape[1] for part in parts} == {int(lengths.max())}


def test_padding_attention_keeps_masked_captions_at_77_tokens(make, recipe):
    short, long = make(recipe).at(0), make(recipe.replace(padding_attention=True)).at(0)
    assert long.masked_tokens.shape == long.labels.shape == (BATCH, 77)
    assert torch.equal(long.tokens, short.tokens)
    length = short.tokens.shape[1]
    assert torch.equal(long.masked_tokens[:, :length], short.masked_tokens)
    assert torch.equal(long.labels[:, :length], short.labels)
    assert not long.masked_tokens[:, length:].any()
    assert not long.labels[:, length:].any()


def test_labels_are_the_words_that_were_masked(make, recipe):
    batch = make(recipe).at(0)
    original = batch.tokens
    chosen = batch.labels != 0
    assert chosen.any(1).all()
    assert torch.equal(batch.labels[chosen], original[chosen])
    assert torch.equal(batch.masked_tokens[~chosen], original[~chosen])
    assert (batch.masked_tokens == MASK_ID).any()
    assert not (original == MASK_ID).any()


@pytest.mark.parametrize("padding_attention", [False, True])
def test_the_host_knows_how_many_words_of_each_caption_are_to_be_predicted(make, recipe, padding_attention):
    batches = make(recipe.replace(padding_attention=padding_attention, mask_probability=0.4))
    for step in range(3):
        batch = batches.at(step)
        assert list(batch.words_each) == [sum(word != 0 for word in row) for row in batch.labels.tolist()]
        assert sum(batch.words_each) == batch.word_count
        assert len(set(batch.words_each)) > 1


def test_mask_captions_gives_the_masked_words_to_the_other_losses_too(make, recipe):
    plain, masked = make(recipe).at(0), make(recipe.replace(mask_captions=True)).at(0)
    assert torch.equal(masked.tokens, plain.masked_tokens)
    assert torch.equal(masked.masked_tokens, plain.masked_tokens)
    assert torch.equal(masked.images, plain.images)
    assert not torch.equal(masked.tokens, plain.tokens)


def test_the_recipes_mask_probability_is_used(make, recipe):
    recipe = recipe.replace(batch_size=CAPTIONS, mask_probability=1.0)
    batch = make(recipe).at(0)
    words = (batch.tokens > 0) & (batch.tokens < MASK_ID)
    assert torch.equal(batch.labels != 0, words)


def test_pixels_may_be_memory_mapped_or_a_tensor(make, recipe, table, pixels, tmp_path):
    np.save(tmp_path / "pixels.npy", pixels)
    expected = make(recipe).at(1)
    for given in (np.load(tmp_path / "pixels.npy", mmap_mode="r"), torch.from_numpy(pixels)):
        assert same(Batches(table, given, captions(CAPTIONS), recipe).at(1), expected)


@pytest.mark.parametrize("arguments", [(-1,), (0, 2, 2), (0, -1, 2), (0, 0, 0)])
def test_a_step_or_process_that_does_not_exist_is_refused(make, recipe, arguments):
    with pytest.raises(ValueError, match=r"(step|process) is -?\d+"):
        make(recipe).at(*arguments)


def test_tables_that_do_not_fit_are_refused(table, pixels, recipe):
    tokens = captions(CAPTIONS)
    with pytest.raises(ValueError, match="no rows"):
        Batches(table[:0], pixels, tokens[:0], recipe)
    with pytest.raises(ValueError, match="tokens has 21 rows, the table 22"):
        Batches(table, pixels, tokens[1:], recipe)
    with pytest.raises(ValueError, match="from 1 to 21, pixels holds 20 images"):
        Batches(table, pixels[:20], tokens, recipe)
    with pytest.raises(ValueError, match=r"pixels are 16×8, the recipe says 24×8"):
        Batches(table, pixels, tokens, recipe.replace(image_height=24))


def test_a_batch_is_sent_to_a_gpu_in_one_pinned_copy_besides_its_photos_and_none_is_waited_for(
    make, recipe, table, pixels, monkeypatch
):
    """Without a GPU: what should go there is recorded and stays."""
    pinned, copies, to = [], [], torch.Tensor.to

    def pin_memory(tensor):
        pinned.append(tensor)
        return tensor

    def copy(tensor, device, *args, non_blocking=False, **kwargs):
        if getattr(device, "type", "") != "cuda":
            return to(tensor, device, *args, non_blocking=non_blocking, **kwargs)
        copies.append((any(tensor is one for one in pinned), non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", copy)
    monkeypatch.setattr(batches_module, "trim", lambda *tokens, device: trim(*tokens))  # a GPU's lengths are rounded
    expected = make(recipe).at(1)
    assert not pinned
    for given in (pixels, torch.from_numpy(pixels)):
        assert same(Batches(table, given, captions(CAPTIONS), recipe, device="cuda").at(1), expected)
        assert copies == [(True, True)] * 2
        copies.clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_the_gpu_are_the_cpus(make, recipe, table, pixels):
    expected = make(recipe).at(1)
    for given in (pixels, torch.from_numpy(pixels).cuda()):
        batch = Batches(table, given, captions(CAPTIONS), recipe, device="cuda").at(1)
        assert all(field.is_cuda for field in fields(batch))
        assert all(torch.allclose(a.cpu(), b, atol=1e-6) for a, b in zip(fields(batch), fields(expected), strict=True))
