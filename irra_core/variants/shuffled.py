"""Captions of train → the same captions, a share of them with the wrong photos: noisy pairs.

Source: the synthetic noise of RDE (Qin et al., CVPR 2024), whose robustness it measures. There the captions of a
random share of the pairs are shuffled, so that some come back to their own photo; here none does.
"""

import numpy as np
from pandas import DataFrame

PURPOSE = 4  # the random numbers of batches have 0 to 3
TRIES = 100  # of exchanging captions that are with their own person


def shuffled_captions(train: DataFrame, share: float, seed: int) -> DataFrame:
    """The table with that share of its captions exchanged among their rows; photos and identities stay.

    Each of these captions is of another person than its row, unless most of them are of one person. The same share and
    seed give the same table.
    """
    count = int(share * len(train))
    if count < 2:
        return train
    draw = np.random.default_rng(np.random.SeedSequence((seed, PURPOSE)))
    rows = draw.permutation(len(train))[:count]
    pids, source = train.pid.to_numpy()[rows], draw.permutation(count)
    for _ in range(TRIES):
        own = np.flatnonzero(pids == pids[source])
        if not len(own):
            break
        other = draw.integers(count, size=len(own))
        for here, there in zip(own, other, strict=True):
            source[here], source[there] = source[there], source[here]
    captions = train.caption.to_numpy(copy=True)
    captions[rows] = captions[rows[source]]
    return train.assign(caption=captions)
