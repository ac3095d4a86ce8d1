"""Attention over several blocks against a plain loop; how many tokens are selected as training goes on."""

import pytest
import torch

from irra_core.variants.multi_layer import ratio_at, rollout


def attention(blocks, length=5, heads=2):
    draws = torch.randn(blocks, 3, heads, length, length, generator=torch.Generator().manual_seed(0))
    return list(draws.double().softmax(-1))


def slow_kept(block):
    """Â of one image, entry by entry."""
    size = block.shape[-1]
    mean = [[sum(head[i][j].item() for head in block) / len(block) for j in range(size)] for i in range(size)]
    entries = sorted((mean[i][j], i * size + j) for i in range(size) for j in range(size))
    dropped = {place for _, place in entries[: size * size // 4]} - {0}
    rows = []
    for i in range(size):
        row = [0.0 if i * size + j in dropped else mean[i][j] for j in range(size)]
        row = [(value + (i == j)) / 2 for j, value in enumerate(row)]
        rows.append([value / sum(row) for value in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("blocks", "middle"), [(1, 0), (3, 1), (12, 4)])
def test_the_rollout_is_the_product_over_a_middle_and_the_last_block(blocks, middle):
    layers = attention(blocks)
    found = rollout(layers[blocks // 3], layers[-1])
    for row in range(3):
        expected = slow_kept(layers[-1][row]) @ slow_kept(layers[middle][row])
        torch.testing.assert_close(found[row], expected)
    torch.testing.assert_close(found.sum(2), torch.ones(3, 5, dtype=torch.float64))


def test_of_a_text_no_entry_is_dropped_so_that_padding_changes_nothing():
    earlier = torch.ones(6, 6, dtype=torch.bool).tril()
    scores = torch.randn(2, 1, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    long = list(scores.masked_fill(~earlier, -torch.inf).softmax(-1))
    short = [layer[:, :, :4, :4] for layer in long]
    torch.testing.assert_close(rollout(*long)[:, 3, :4], rollout(*short)[:, 3])
    assert (rollout(*long)[0][earlier] > 0).all()


def test_the_share_of_selected_tokens_falls_from_the_first_to_the_last_value():
    assert ratio_at(0.0) == 0.65
    assert ratio_at(1.0) == ratio_at(2.0) == pytest.approx(0.5)
    assert ratio_at(0.5) == pytest.approx((0.65 * 0.5) ** 0.5)
