"""Leaked photos: what the search finds is what comparing every pair finds; copies match, other people do not."""

import math

import numpy as np
import pytest
from pandas import DataFrame
from PIL import Image

from irra_core.analysis import leaks
from irra_core.annotations import load_annotations
from irra_core.images import UnreadableImages
from irra_core.synthetic.people import make_synthetic


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> DataFrame:
    """32 rendered people, four photos each."""
    root = tmp_path_factory.mktemp("rendered")
    make_synthetic(root, people=32)
    return load_annotations("synthetic", root)


def slow_hash(path) -> str:
    """The bits of a photo from the cosine transform's sum, one frequency at a time."""
    height, width = leaks.SIZE
    with Image.open(path) as image:
        small = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR), dtype=float)
    grey = 0.299 * small[:, :, 0] + 0.587 * small[:, :, 1] + 0.114 * small[:, :, 2]
    low = []
    for u in range(16):
        across = np.array([math.cos(math.pi / height * u * (y + 0.5)) for y in range(height)])
        for v in range(16):
            along = np.array([math.cos(math.pi / width * v * (x + 0.5)) for x in range(width)])
            low.append(float((grey * across[:, None] * along[None, :]).sum()))
    median = sorted(low[1:])[127]
    return "".join("1" if value > median else "0" for value in low[1:]) + "0"


def saved(photo: Image.Image, path, **options) -> str:
    photo.save(path, **options)
    return str(path)


@pytest.fixture
def copies(rendered, tmp_path) -> DataFrame:
    """Three photos: the first saved as a worse JPEG, the second larger, the third a little cropped."""
    first, second, third = (Image.open(path).convert("RGB") for path in rendered.path.unique()[:3])
    wide, high = third.size
    paths = [
        saved(first, tmp_path / "again.jpg", quality=40),
        saved(second.resize((200, 500)), tmp_path / "larger.png"),
        saved(third.crop((1, 3, wide - 1, high - 4)).resize((48, 144)), tmp_path / "cropped.jpg", quality=85),
    ]
    return DataFrame({"pid": [100, 101, 102], "image_id": [7, 8, 9], "path": paths})


def test_the_hash_is_the_sum_of_the_cosine_transform_above_its_median(rendered):
    paths = list(rendered.path.unique()[:5])
    found = ["".join(map(str, bits)) for bits in np.unpackbits(leaks.photo_hashes(paths), axis=1)]
    assert found == [slow_hash(path) for path in paths]


def test_a_copy_saved_again_resized_or_slightly_cropped_is_found_and_nothing_else_is(rendered, copies):
    found = leaks.same_photos(rendered, copies)
    originals = list(rendered.drop_duplicates("image_id").image_id[:3])
    assert sorted(zip(found.test_image_id, found.train_image_id)) == list(zip([7, 8, 9], originals))
    assert found.test_path.tolist() == [copies.set_index("image_id").path[image] for image in found.test_image_id]
    assert found.distance.is_monotonic_increasing


@pytest.mark.parametrize("distance", [0, 48, 90, 255])
def test_the_search_finds_the_pairs_that_comparing_all_of_them_finds(rendered, copies, distance):
    photos = rendered.drop_duplicates("image_id").head(24)
    table = leaks.same_photos(photos, copies, distance)
    expected = set()
    for ours in copies.itertuples():
        for theirs in photos.itertuples():
            bits = sum(a != b for a, b in zip(slow_hash(ours.path), slow_hash(theirs.path)))
            if bits <= distance:
                expected.add((ours.image_id, theirs.image_id, bits))
    assert set(zip(table.test_image_id, table.train_image_id, table.distance)) == expected
    assert len(table) == len(expected)


def test_photos_of_different_rendered_people_never_match_though_their_views_are_alike(rendered):
    people = rendered.drop_duplicates("image_id").sort_values("pid")
    half = people.pid.median()
    assert leaks.same_photos(people[people.pid < half], people[people.pid >= half]).empty


def test_two_photos_of_one_person_are_no_leak_but_the_photo_itself_is(rendered):
    photos = rendered.drop_duplicates("image_id")
    table = leaks.same_photos(photos, photos)
    assert (table.test_image_id == table.train_image_id).all()
    assert (table.distance == 0).all()
    assert len(table) == len(photos)


def test_a_leaked_photo_goes_with_all_its_captions_and_nothing_else_goes(rendered):
    gone = [int(rendered.image_id.iloc[0]), int(rendered.image_id.iloc[-1])]
    left = leaks.without(rendered, gone)
    assert set(left.image_id) == set(rendered.image_id) - set(gone)
    assert len(left) == len(rendered) - 4
    assert leaks.without(rendered, []).equals(rendered)


def test_the_copies_that_sensitivity_makes_are_found_as_often_as_it_says(rendered):
    paths = rendered.path.unique()[:16]
    table = leaks.sensitivity(paths)
    assert len(table) == 4
    assert (table.found[:3] == 100).all()
    nothing = leaks.sensitivity(paths, distance=0)
    assert (nothing["median"] == table["median"]).all()
    assert nothing.found.iloc[3] == 0


def test_an_unreadable_photo_is_named(rendered, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    table = DataFrame({"pid": [0], "image_id": [0], "path": [str(tmp_path / "broken.jpg")]})
    with pytest.raises(UnreadableImages, match=r"broken\.jpg"):
        leaks.same_photos(rendered, table)


def test_the_nearest_photo_is_the_nearest_of_all(rendered):
    paths = list(rendered.path.unique())
    hashes = leaks.photo_hashes(paths)
    bits = np.unpackbits(hashes, axis=1).astype(int)
    expected = [min(int((one != other).sum()) for other in bits[16:]) for one in bits[:16]]
    assert leaks.nearest(hashes[16:], hashes[:16]).tolist() == expected
