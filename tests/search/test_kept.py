"""Galleries that the explorer keeps: encoded once, and never those of other photos."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_retrieval import QUERIES, brute_force, model, photos, same_ranking  # noqa: F401 (fixtures)

import irra_core as irra


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IRRA_CACHE", str(tmp_path / "cache"))


def test_a_second_page_encodes_nothing_and_has_the_ranking_of_a_new_gallery(model, photos):  # noqa: F811
    irra.kept_gallery(model, photos)
    assert model.encoded == 30
    again = irra.kept_gallery(model, photos)
    assert model.encoded == 30
    same_ranking(again.search(QUERIES, k=30), brute_force(model, photos, QUERIES, 30))


def test_a_changed_photo_another_pid_and_another_model_make_another_gallery(model, photos):  # noqa: F811
    irra.kept_gallery(model, photos)
    path = Path(photos.path[0])
    Image.new("RGB", (8, 16), (200, 30, 60)).save(path)
    changed = irra.kept_gallery(model, photos)
    assert model.encoded == 60
    same_ranking(changed.search(QUERIES, k=30), brute_force(model, photos, QUERIES, 30))
    irra.kept_gallery(model, photos.assign(pid=photos.pid + 1))
    irra.kept_gallery(type(model)(seed=1), photos)
    assert len(list((path.parents[1] / "cache" / "galleries").glob("*/gallery.json"))) == 4


def test_a_photo_that_was_removed_from_a_folder_is_not_found_any_more(model, photos):  # noqa: F811
    folder = Path(photos.path[0]).parent
    assert len(irra.kept_gallery(model, folder)) == 30
    Path(photos.path[0]).unlink()
    assert photos.path[0] not in irra.kept_gallery(model, folder).images.path.tolist()


MAPPED = """
import sys, torch, irra_core as irra, numpy as np
model, _ = irra.load_checkpoint(sys.argv[1])
places = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.rstrip().endswith(sys.argv[2])]
inside = lambda at: any(int(low, 16) <= at < int(high, 16) for low, high in places)
print(sum(value.nbytes for value in model.parameters() if inside(value.data_ptr())))
assert not {"sympy", "torch._dynamo"} & set(sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_stay_in_their_file_so_that_processes_share_their_memory_and_load_without_the_compiler(tmp_path):
    recipe = irra.recipe(pretrained="none")
    source, file = irra.build_model(recipe, 5, device="cpu"), tmp_path / "weights.safetensors"
    irra.save_checkpoint(source, recipe, file)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", MAPPED, str(file), file.name]
    done = subprocess.run(command, env={"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(value.nbytes for value in source.parameters())


def test_features_of_a_kept_gallery_are_read_where_they_lie(model, photos, monkeypatch):  # noqa: F811
    monkeypatch.setattr("irra_core.search.encoding.SHARD", 8)
    irra.kept_gallery(model, photos)
    assert not irra.kept_gallery(model, photos)._store.features.flags.owndata
    np.testing.assert_allclose(np.linalg.norm(irra.kept_gallery(model, photos)._store.features, axis=1), 1, atol=1e-6)
