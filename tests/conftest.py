"""What the tests share: folders of their own, and a data set of a few coloured people."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on models this small a second thread only waits

import numpy as np
import pytest
from pandas import DataFrame
from PIL import Image

import irra_core as irra
from irra_core import backbone

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 60, 200),
    "yellow": (220, 200, 40),
    "white": (235, 235, 235),
    "black": (25, 25, 25),
}

# The little CLIP at half its width and with one layer.
NARROW = backbone.SMALL_CLIP | {
    "embed_dim": 64,
    "vision_cfg": backbone.SMALL_CLIP["vision_cfg"] | {"width": 64, "layers": 1},
    "text_cfg": backbone.SMALL_CLIP["text_cfg"] | {"width": 64, "heads": 1, "layers": 1},
}


# File → its tests that need Linux: its signals, links, pipes, limits or /proc; without names all of them.
LINUX = {
    "analysis/test_checks.py": "test_all_findings_are_listed_at_once",
    "analysis/test_plots.py": "test_a_pipe_in_a_photos_place_is_named_and_not_waited_for",
    "command/test_explore.py": "test_a_data_set_is_searched_by_its_newest_finished_run",
    "datasets/test_photos.py": "",
    "explorer/test_explorer.py": "test_a_pipe_or_a_bomb_in_a_photos_place_is_an_empty_frame",
    "hub/test_sources.py": "test_a_run_is_found_by_its_folder_its_file_its_name_and_as_latest",
    "scale/test_cpu.py": "test_a_process_that_keeps_its_memory_asks_for_new_pages_once",
    "scale/test_distributed.py": "",
    "search/test_folder.py": "test_a_damaged_gallery_is_refused",
    "studies/test_report.py": "test_the_committed_example_is_on_the_page_of_a_fresh_clone",
    "studies/test_tables.py": "test_runs_behind_a_linked_folder_are_found_and_none_is_counted_twice",
    "synthetic/test_pretraining.py": "test_a_killed_pretraining_is_resumed_and_ends_with_the_same_bytes",
    "synthetic/test_synthetic.py": (
        "test_the_same_people_in_the_size_of_the_paper_are_beside_the_small_ones_and_look_like_them "
        "test_sigterm_ends_rendering_at_once_and_leaves_nothing"
    ),
    "test_bad_inputs.py": "",
    "test_faults.py": "",
    "test_images.py": "",
}
TESTS = Path(__file__).parent
collect_ignore = [name for name, tests in LINUX.items() if not tests and sys.platform == "win32"]  # some do not import


def pytest_collection_modifyitems(items):
    """Mark the tests of LINUX."""
    for item in items:
        name = item.path.relative_to(TESTS).as_posix() if item.path.is_relative_to(TESTS) else ""
        if name in LINUX and (not LINUX[name] or item.originalname in LINUX[name].split()):
            item.add_marker(pytest.mark.linux)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory, monkeypatch):
    """Data, reports and cache of a test session lie in its temporary folder; nobody's settings reach a test."""
    base = tmp_path_factory.getbasetemp()
    for name in ("data", "reports", "cache"):
        monkeypatch.setenv(f"IRRA_{name.upper()}", str(base / name))
    monkeypatch.delenv("IRRA_SMOKE", raising=False)


@pytest.fixture(scope="session")
def annotations(tmp_path_factory) -> DataFrame:
    """18 people in two plain colours, two photos each, a caption a photo: 10 train, 4 val, 4 test."""
    folder = tmp_path_factory.mktemp("people")
    noise, names, rows = np.random.default_rng(0), list(COLOURS), []
    for pid in range(18):
        upper, lower = names[pid % 6], names[(pid // 6 + pid + 1) % 6]
        for view in range(2):
            pixels = np.full((96, 32, 3), 120, dtype=np.int64)
            pixels[15:50, 6:26], pixels[50:90, 8:24] = COLOURS[upper], COLOURS[lower]
            pixels += noise.integers(-20, 20, pixels.shape)
            path = folder / f"{pid:02}-{view}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
            split = "train" if pid < 10 else "val" if pid < 14 else "test"
            caption = f"a person in a {upper} shirt and {lower} trousers, photo {'one' if view else 'two'}"
            rows.append((pid, len(rows), str(path), caption, split))
    return DataFrame(rows, columns=["pid", "image_id", "path", "caption", "split"])


@pytest.fixture(scope="module")
def narrow():
    """NARROW is the little CLIP for a module of tests: its runs take less than half."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "SMALL_CLIP", NARROW)
        yield


@pytest.fixture
def tiny() -> irra.Recipe:
    """The little CLIP from random weights: 5 steps of 8 pairs, 3 evaluations, the first inside an epoch."""
    steps = {"batch_size": 8, "epochs": 2, "max_steps": 5, "evaluate_every": 2}
    return irra.recipe(pretrained="none", erase_probability=0.2, **steps)
