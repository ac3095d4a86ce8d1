"""Identities without a split → a seeded split; CUHK-PEDES without its official split is refused."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from irra_core.annotations import named

# The folders below CUHK-PEDES/imgs/: photos from there are CUHK-PEDES, whatever the annotation file is called.
CUHK_FOLDERS = {"cam_a", "cam_b", "CUHK01", "CUHK03", "Market", "test_query", "train_query"}


def split_identities(file: Path, names: Collection[str], pids: np.ndarray, seed: int) -> list[str]:
    """Each row's split: of the shuffled identities an eighth is val, a quarter test, the rest train.

    `names` are the photos' names in the file. Raises ValueError for CUHK-PEDES, whose official split is needed, and for
    fewer than 6 identities.
    """
    folders = {name.replace("\\", "/").split("/")[0] for name in names}
    if file.name == "caption_all.json" or (folders <= CUHK_FOLDERS and folders & {"CUHK01", "CUHK03"}):
        raise ValueError(
            f"{named(file)} is CUHK-PEDES without its split: scores on a random split cannot be compared with others. "
            "Get the official file with the field split, reid_raw.json, from the authors of the data set, put "
            "it at CUHK-PEDES/reid_raw.json below the data root, beside imgs/, and give `-p dataset cuhk`. For another "
            "split on purpose, write the field split in every record"
        )
    known = np.unique(pids)
    val, test = max(2, round(len(known) / 8)), max(2, round(len(known) / 4))
    if len(known) < val + test + 2:
        raise ValueError(
            f"{named(file)} has no splits, and its {len(known)} identities are too few to make them (two each): "
            "write the field split, or annotate at least 6 identities"
        )
    shuffled = np.random.default_rng(seed).permutation(known).tolist()
    split = dict.fromkeys(shuffled, "train")
    split |= dict.fromkeys(shuffled[:val], "val") | dict.fromkeys(shuffled[val : val + test], "test")
    return [split[pid] for pid in pids.tolist()]
