"""The main flows in one process, shrunken: render, train with two interruptions, evaluate, galleries, the explorer."""

import gc
import json
import os
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

import irra_core as irra
from irra_core import backbone, images, runs
from irra_core.scale import saving
from irra_core.search import encoding, kept

NARROW = {
    "embed_dim": 64,
    "vision_cfg": backbone.SMALL_CLIP["vision_cfg"] | {"width": 64, "layers": 1},
    "text_cfg": backbone.SMALL_CLIP["text_cfg"] | {"width": 64, "heads": 1, "layers": 1},
}


def trained(recipe, annotations, folder: Path, interrupted: bool) -> list[dict]:
    """The rows of a run, interrupted after its first and its second evaluation or not at all."""
    rows = []
    for _ in range(2 if interrupted else 0):
        with closing(irra.train(recipe, annotations, folder)) as steps:
            rows.append(next(steps))
    return [*rows, *irra.train(recipe, annotations, folder)]


def weights(folder: Path) -> dict:
    return dict(backbone.read_weights(folder / runs.WEIGHTS)[0])


def training(folder: Path) -> Path:
    """A run that is interrupted ends as the whole one; then it is loaded and scored while its weights are replaced."""
    recipe = irra.recipe("synthetic", pretrained="none", batch_size=8, epochs=1, evaluate_every=1)
    annotations = irra.open_annotations(recipe)
    rows = trained(recipe, annotations, folder / "cut", True)
    whole = trained(recipe, annotations, folder / "whole", False)
    assert rows == whole, (rows, whole)
    assert len(rows) == 3
    first, second = weights(folder / "cut"), weights(folder / "whole")
    assert all(torch.equal(first[name], second[name]) for name in second)
    left = {path.name for path in (folder / "cut").iterdir()} - {runs.LOCK}
    assert left == {"recipe.json", "history.csv", "metrics.json", "queries.csv", "machine.json", runs.WEIGHTS}, left
    for path in (folder / "cut").glob("*.*"):
        assert path.suffix not in (".csv", ".json") or b"\r" not in path.read_bytes(), path
    run = irra.training.trained_run(recipe, annotations)
    runs.mark_latest(run)
    root = run.parent.parent
    assert (root / "latest.txt").read_text(encoding="utf-8") == f"synthetic/{run.name}\n"
    assert not (root / "latest").exists()
    model, kept_recipe = irra.load_model("latest")
    saving.save_weights(model, kept_recipe, run, 3)  # over the file that the model was loaded from
    assert irra.evaluate(model, annotations).metrics["queries"] > 0
    return run


def arrays(folder: Path) -> None:
    """A photo that changed is decoded anew while the array with the old one is in use; the array can be deleted."""
    from PIL import Image

    folder.mkdir()
    files = [folder / f"{shade}.png" for shade in (10, 200)]
    for file in files:
        Image.new("RGB", (32, 96), (int(file.stem),) * 3).save(file)
    before = images.image_array(files, 96, 32)
    Image.new("RGB", (32, 96), (90, 90, 90)).save(files[0])
    images.forget()
    after = images.image_array(files, 96, 32)
    assert [int(before.pixels[0].max()), int(after.pixels[0].max())] == [10, 90]
    damaged = after.pixels.filename
    with open(damaged, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x00")
    images.forget()
    with pytest.raises(OSError, match="is damaged"):  # its file is mapped and stays
        images.image_array(files, 96, 32).pixels[1]
    assert int(images.image_array(files, 96, 32).pixels[1].max()) == 200


def galleries(run: Path, folder: Path) -> None:
    """Galleries are filled, replaced while they are open, kept, searched and shown."""
    model, recipe = irra.load_model(run)
    table = irra.open_annotations(recipe)
    table = table[table.split == "test"]
    encoding.SHARD = 8  # several parts
    for index in ("exact", "hnsw"):
        gallery = irra.Gallery.build(model, table, index=index, folder=folder / index)
        first = gallery.search("a man in a red coat", k=3)
        loaded = irra.Gallery.load(folder / index, model)
        loaded.save(folder / index)  # over itself
        loaded.remove([int(loaded.images.image_id[0])])
        loaded.save(folder / index)
        assert len(irra.Gallery.load(folder / index, model)) == len(gallery) - 1
        assert list(loaded.search("a man in a red coat", k=3).columns) == list(first.columns)
        irra.Gallery.load(folder / index, model).save(folder / index)  # of one part, which is not concatenated
    assert sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock")) == ["exact", "hnsw"]
    for _ in range(2):
        found = kept.kept_gallery(model, table, recipe=recipe)
    explorer = irra.QueryExplorer(found, table, query="a man in a red coat")
    assert len(explorer.view["strips"][0]["cards"]) == 10
    assert explorer.save(folder).is_file()


if __name__ == "__main__":
    base = Path(sys.argv[1])
    backbone.SMALL_CLIP = backbone.SMALL_CLIP | NARROW
    path = training(base)
    gc.collect()
    arrays(base / "photos")
    galleries(path, base / "galleries")
    sys.stdout.write(json.dumps({"run": str(path)}) + "\n")
