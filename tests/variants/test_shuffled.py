"""Noisy pairs: the share, the persons, what stays, and that the seed alone decides."""

import pandas as pd
import pytest

from irra_core.variants.shuffled import shuffled_captions


def table(people=30, each=4):
    rows = [(n // each, n // 2, f"{n // 2}.png", f"caption {n}", "train") for n in range(people * each)]
    return pd.DataFrame(rows, columns=["pid", "image_id", "path", "caption", "split"])


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_that_share_of_the_captions_is_with_another_person_and_none_is_lost(share):
    before = table()
    after = shuffled_captions(before, share, 0)
    moved = after.caption != before.caption
    assert moved.sum() == int(share * len(before))
    person = before.set_index("caption").pid
    assert (person[after.caption[moved]].to_numpy() != after.pid[moved].to_numpy()).all()
    assert sorted(after.caption) == sorted(before.caption)
    rest = ["pid", "image_id", "path", "split"]
    assert after[rest].equals(before[rest])
    assert after.index.equals(before.index)


def test_the_seed_decides_and_a_share_of_zero_changes_nothing():
    before = table()
    assert shuffled_captions(before, 0.5, 1).equals(shuffled_captions(before, 0.5, 1))
    assert not shuffled_captions(before, 0.5, 1).equals(shuffled_captions(before, 0.5, 2))
    assert shuffled_captions(before, 0.0, 1).equals(before)
    assert before.equals(table())


def test_with_one_person_captions_stay_with_that_person():
    after = shuffled_captions(table(people=1), 1.0, 0)
    assert sorted(after.caption) == sorted(table(people=1).caption)
