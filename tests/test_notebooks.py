"""The train notebook as its users run it: papermill, from any folder, on each layout and on own data, and mistaken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from PIL import Image

from irra_core import runs
from irra_core.annotations import load_annotations
from irra_core.synthetic.people import make_synthetic

pytestmark = pytest.mark.notebook
NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
SHORT = ["-p", "backbone", "small", "-p", "pretrained", "none", "-p", "batch_size", "8", "-p", "max_steps", "2"]


def papermill(*arguments, cwd=NOTEBOOKS, notebook: Path | str = "train.ipynb", **environment):
    """What a user's `papermill train.ipynb out.ipynb …` returns."""
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), *map(str, arguments)]
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def own_json(root):
    """Own data: the JSON schema of the data sets, photos in imgs/ beside it."""
    folder = make_synthetic(root, layout="rstp", people=12)
    return (folder / "data_captions.json").rename(folder / "mine.json")


def own_csv(root):
    """Own data: a CSV with columns path, caption, id and no split."""
    folder = make_synthetic(root, layout="rstp", people=12)
    table = load_annotations("rstp", root)
    table = table.assign(path=[Path(path).relative_to(folder / "imgs") for path in table.path], id=table.pid)
    table[["path", "caption", "id"]].to_csv(folder / "mine.csv", index=False)
    return folder / "mine.csv"


def ham(root):
    """A pretraining set in the layout of HAM-PEDES: photo → captions, each photo a person, no test split."""
    return with_photos(root, {f"images/{i}.jpg": [f"a person with number {i}"] for i in range(30)})


def trained_only(root):
    """Own data with a train split alone."""
    return with_photos(root, [_record("train", i) for i in range(30)])


def only_test(root):
    """A set in the layout of UFine3C, which has a test split alone."""
    return with_photos(root, [_record("test", i) for i in range(6)])


def _record(split, i):
    captions = [f"a person with number {i}", f"someone numbered {i}"]
    return {"split": split, "id": i // 2, "file_path": f"images/{i}.jpg", "captions": captions}


def with_photos(root, content):
    """The path of an annotation file with photos of one colour beside it."""
    (root / "images").mkdir(parents=True)
    for i in range(len(content)):
        Image.new("RGB", (16, 48), (8 * i, 90, 200)).save(root / "images" / f"{i}.jpg")
    (root / "set.json").write_text(json.dumps(content))
    return root / "set.json"


def written(layout, root):
    make_synthetic(root, layout=layout, people=12)
    return layout


@pytest.mark.parametrize("layout", ["rstp", "cuhk", "icfg", "mine.json", "mine.csv"])
def test_train_runs_on_each_official_layout_and_on_own_data(layout, tmp_path):
    own = {"mine.json": own_json, "mine.csv": own_csv}
    dataset = own[layout](tmp_path / "data") if layout in own else written(layout, tmp_path / "data")
    ended = papermill(
        tmp_path / "out.ipynb",
        "-p",
        "dataset",
        dataset,
        *SHORT,
        IRRA_DATA=tmp_path / "data",
        IRRA_REPORTS=tmp_path / "r",
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    assert not [output for cell in cells for output in cell.get("outputs", []) if output.output_type == "error"]
    (metrics,) = (tmp_path / "r").glob("*/*/metrics.json")
    kept = {path.name for path in metrics.parent.iterdir()}
    assert kept >= {"recipe.json", "history.csv", "machine.json", "queries.csv", "training.svg", runs.WEIGHTS}
    assert metrics.parent.parent.name.startswith(layout.split(".")[0])
    found = json.loads(metrics.read_text())
    captions = load_annotations(dataset, tmp_path / "data").query("split == 'test'")
    assert (found["queries"], found["images"]) == (len(captions), captions.image_id.nunique())
    assert len(pd.read_csv(metrics.parent / "history.csv")) == 1
    assert (tmp_path / "r" / "latest").resolve() == metrics.parent


@pytest.mark.parametrize(("make", "shown"), [(ham, 3), (trained_only, 30)], ids=["val", "train"])
def test_train_shows_rankings_of_another_split_where_there_is_no_test_split(make, shown, tmp_path):
    dataset = make(tmp_path / "data")
    ended = papermill(
        tmp_path / "out.ipynb", "-p", "dataset", dataset, *SHORT, "-p", "losses", "sdm", IRRA_REPORTS=tmp_path / "r"
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    (folder,) = {path.parent for path in (tmp_path / "r").glob("*/*/metrics.json")}
    assert len(list(folder.glob("ranking-*.jpg"))) == 3
    assert f"photos: {shown} of {shown} photos" in ended.stderr
    assert "no test split: nothing was scored" in (tmp_path / "out.ipynb").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "datset", "rstp"], ["parameter 'datset' is unknown", "did you mean 'dataset'?", "temperature"]),
        (["-p", "epochs", "five"], ["parameter 'epochs' is 'five'", "accepted is int"]),
        (["-p", "dataset", "nosuch"], ["data set 'nosuch' is unknown", "cuhk", "rstp"]),
        (["-p", "losses", "sdm+nosuch"], ["loss 'nosuch' is unknown", "itc"]),
        (["-p", "dataset", "rstp"], ["RSTPReid", "data_captions.json", "Zhu et al.", "-p dataset synthetic"]),
    ],
    ids=["name", "type", "data set", "loss", "no data"],
)
def test_a_mistake_stops_the_notebook_with_one_clear_error(arguments, words, tmp_path):
    ended = papermill("out.ipynb", *arguments, cwd=tmp_path, notebook=NOTEBOOKS / "train.ipynb")
    assert ended.returncode != 0
    for word in words:
        assert word in ended.stderr
    assert words[-1] in ended.stderr.rstrip().splitlines()[-1]
    executed = nbformat.read(tmp_path / "out.ipynb", 4).cells
    done = [cell for cell in executed if cell.cell_type == "code" and cell.execution_count]
    assert len(done) <= (3 if "dataset" not in arguments or "nosuch" in arguments else 6)


def test_data_shows_what_is_wrong_with_a_set_that_no_run_would_take(tmp_path):
    file = own_json(tmp_path / "data")
    absent, *broken = load_annotations(file).path.unique()[[4, 9, 10, 11]]
    os.remove(absent)
    for path in broken:
        Path(path).write_bytes(b"no photo")
    ended = papermill(tmp_path / "out.ipynb", "-p", "dataset", file, notebook="data.ipynb", IRRA_CACHE=tmp_path / "c")
    assert ended.returncode != 0
    assert "4 images cannot be read" in ended.stderr
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    shown = "".join(str(cell.outputs) for cell in cells if "check_annotations" in cell.source and "outputs" in cell)
    for words in ("an image file is missing", "an image file cannot be read", Path(absent).name, Path(broken[0]).name):
        assert words in shown


def test_data_describes_a_set_that_has_a_test_split_alone(tmp_path):
    ended = papermill(tmp_path / "out.ipynb", "-p", "dataset", only_test(tmp_path / "data"), notebook="data.ipynb")
    assert ended.returncode == 0, ended.stderr[-3000:]
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    assert "0 of 12 captions have more than 77 tokens" in "".join(str(cell.get("outputs")) for cell in cells)


def test_evaluate_scores_a_released_checkpoint_with_no_other_argument(tmp_path):
    """A file as the released code writes it, with the paper's image size and fewer blocks, on CUHK-PEDES's layout."""
    import torch

    from irra_core.backbone import new_clip
    from irra_core.model import IRRA
    from irra_core.released.checkpoint import save_official

    config = {
        "embed_dim": 64,
        "quick_gelu": True,
        "vision_cfg": {"layers": 1, "width": 64, "patch_size": 16, "image_size": (384, 128)},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    torch.manual_seed(0)
    save_official(IRRA(new_clip(config, (384, 128), 16), 11003, "cross", 2), tmp_path / "best.pth")
    dataset = written("cuhk", tmp_path / "data")
    ended = papermill(
        tmp_path / "out.ipynb", "-p", "checkpoint", tmp_path / "best.pth", "-p", "dataset", dataset,
        notebook="evaluate.ipynb", IRRA_DATA=tmp_path / "data",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    shown = (tmp_path / "out.ipynb").read_text()
    for words in ("384×128", "11003", "CrossEncoder", "published: IRRA"):
        assert words in shown

    refused = papermill(
        tmp_path / "out.ipynb", "-p", "checkpoint", tmp_path / "best.pth", "-p", "dataset", dataset,
        "-p", "image_height", "224",
        notebook="evaluate.ipynb", IRRA_DATA=tmp_path / "data",
    )  # fmt: skip
    assert refused.returncode != 0
    assert "192 patches" in refused.stderr
    assert "384×128" in refused.stderr
