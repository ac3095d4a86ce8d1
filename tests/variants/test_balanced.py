"""The identity-balanced order: P different identities with K captions in a batch, every caption in every epoch."""

from collections import Counter

import pytest
import torch

from irra_core.variants.balanced import balanced_length, balanced_order

COUNTS = [1, 2, 3, 4, 5, 6, 7, 8, 4, 4, 3, 9]  # captions of each identity


def epoch(counts, per_identity, batch_size, seed=0):
    pids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    pids = pids[torch.randperm(len(pids), generator=torch.Generator().manual_seed(9))]
    order = balanced_order(pids, per_identity, batch_size, torch.Generator().manual_seed(seed))
    return pids, order


@pytest.mark.parametrize("per_identity", [1, 2, 4])
def test_each_batch_has_different_identities_with_as_many_captions(per_identity):
    pids, order = epoch(COUNTS * 4, per_identity, 8)
    batches = [pids[order[start : start + 8]] for start in range(0, len(order), 8)]
    for batch in batches[:-1]:
        assert sorted(Counter(batch.tolist()).values()) == [per_identity] * (8 // per_identity)


@pytest.mark.parametrize("per_identity", [1, 2, 3, 4, 20])
def test_every_caption_comes_in_every_epoch_and_is_repeated_only_to_fill_a_group(per_identity):
    pids, order = epoch(COUNTS, per_identity, 3 * per_identity)
    slow = sum(-(-count // per_identity) * per_identity for count in COUNTS)
    assert len(order) == balanced_length(pids, per_identity) == slow
    times = Counter(order.tolist())
    assert set(times) == set(range(len(pids)))
    for pid, count in enumerate(COUNTS):
        own = [times[row] for row in (pids == pid).nonzero().flatten().tolist()]
        assert sum(own) == -(-count // per_identity) * per_identity
        assert max(own) - min(own) <= 1


def test_a_group_repeats_a_caption_only_where_there_are_too_few():
    pids, order = epoch(COUNTS, 4, 12)
    for group in order.view(-1, 4):
        (pid,) = set(pids[group].tolist())
        if COUNTS[pid] >= 4 and COUNTS[pid] % 4 == 0:
            assert len(set(group.tolist())) == 4


def test_an_order_is_a_function_of_the_seed_and_orders_of_two_epochs_differ():
    assert torch.equal(epoch(COUNTS, 2, 8)[1], epoch(COUNTS, 2, 8)[1])
    assert not torch.equal(epoch(COUNTS, 2, 8)[1], epoch(COUNTS, 2, 8, seed=1)[1])


def test_an_identity_with_most_captions_fills_the_last_batches():
    pids, order = epoch([40, 4, 4], 4, 8)
    assert len(order) == 48
    first = [set(pids[order[start : start + 8]].tolist()) for start in (0, 8)]
    assert sum(len(each) == 2 for each in first) >= 1
    assert Counter(pids[order].tolist()) == {0: 40, 1: 4, 2: 4}


def test_the_groups_of_an_identity_are_spread_over_the_epoch():
    pids, order = epoch([32] * 8, 4, 8)
    early = pids[order[: len(order) // 2]]
    assert all(8 <= (early == pid).sum() <= 24 for pid in range(8))
