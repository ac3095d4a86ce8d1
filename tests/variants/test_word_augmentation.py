"""Word augmentation and deletion: against a plain loop over the same draws, and their shares."""

import pytest
import torch

from irra_core.text import MASK_ID, tokenize, trim
from irra_core.variants.word_augmentation import augment_words

CAPTIONS = ["a man in a red coat and black shoes who carries a green bag", "a woman", "", "hat " * 90]


def slow_augmented(row, chance, kind, fate, words, changed, deleted):
    """One caption, token by token."""
    ids = row.tolist()
    end = ids.index(49407)
    places = [place for place in range(end) if 0 < ids[place] < MASK_ID]
    stays = max(places, key=lambda place: fate[place], default=None)
    out = []
    for place, token in enumerate(ids[: end + 1]):
        if place in places:
            hit = chance[place] < changed
            if place != stays and ((hit and kind[place] >= 0.8) or fate[place] < deleted):
                continue
            if hit and kind[place] < 0.6:
                token = MASK_ID
            elif hit and kind[place] < 0.8:
                token = words[place].item()
        out.append(token)
    return out + [0] * (len(ids) - len(out))


@pytest.mark.parametrize(("changed", "deleted"), [(0.2, 0.0), (0.0, 0.05), (0.9, 0.3), (1.0, 1.0)])
def test_a_caption_is_changed_word_by_word(changed, deleted):
    tokens = tokenize(CAPTIONS)
    found = augment_words(tokens, torch.Generator().manual_seed(3), changed, deleted)
    draws = torch.Generator().manual_seed(3)
    chance, kind, fate = torch.rand((3, *tokens.shape), generator=draws)
    words = torch.randint(1, MASK_ID, tokens.shape, generator=draws)
    for row in range(len(tokens)):
        drawn = (chance[row], kind[row], fate[row], words[row])
        assert found[row].tolist() == slow_augmented(tokens[row], *drawn, changed, deleted)


def test_the_shares_are_those_of_the_authors_code():
    tokens = tokenize(["hat " * 60] * 200)
    found = augment_words(tokens, torch.Generator().manual_seed(0), 0.2)
    words, masks = (tokens == tokens[0, 1]).sum().item(), (found == MASK_ID).sum().item()
    gone = words - ((found > 0) & (found < 49406)).sum().item()
    kept = (found == tokens[0, 1]).sum().item()
    assert masks / words == pytest.approx(0.12, abs=0.01)
    assert gone / words == pytest.approx(0.04, abs=0.01)
    assert (words - masks - gone - kept) / words == pytest.approx(0.04, abs=0.01)


def test_without_a_share_nothing_changes_and_one_word_always_stays():
    tokens = tokenize(CAPTIONS)
    assert torch.equal(augment_words(tokens, torch.Generator().manual_seed(0), 0.0), tokens)
    emptied = augment_words(tokens, torch.Generator().manual_seed(0), 0.0, 1.0)
    assert (emptied > 0).sum(1).tolist() == [3, 3, 2, 3]
    assert trim(emptied)[0].shape == (4, 3)
