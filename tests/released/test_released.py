"""Code of the released names is run from its folder, in single precision on a CPU, and leaves nothing behind."""

import multiprocessing
import sys

import pytest
import torch
from clone import write_clone

import irra_core as irra
from irra_core.batches import Batches
from irra_core.released import clone as released

CPU = torch.device("cpu")


@pytest.fixture
def code(tmp_path):
    return released.load_code(write_clone(tmp_path / "clone"))


@pytest.fixture
def batch(annotations, tiny):
    train = annotations[annotations.split == "train"].reset_index(drop=True)
    pixels = torch.randint(0, 256, (36, 3, 96, 32), dtype=torch.uint8)
    return Batches(train, pixels, irra.tokenize(list(train.caption)), tiny).at(0)


def test_importing_a_clone_leaves_path_and_modules_as_they_were(tmp_path):
    mine = sys.modules["utils"] = type(sys)("utils")
    path, before = list(sys.path), set(sys.modules)
    try:
        code = released.load_code(write_clone(tmp_path / "clone"))
        assert sys.modules["utils"] is mine
    finally:
        del sys.modules["utils"]
    assert code.build.__file__ == str(tmp_path / "clone" / "model" / "build.py")
    assert sys.path == path
    names = {name.split(".")[0] for name in set(sys.modules) - before}
    assert not names & {*released.PACKAGES, "prettytable", "easydict"}


def test_two_clones_do_not_get_each_others_modules(tmp_path):
    first, second = (released.load_code(write_clone(tmp_path / name)) for name in ("one", "two"))
    assert "one" in first.metrics.__file__
    assert "two" in second.metrics.__file__


def test_a_folder_that_is_no_clone_is_named_with_the_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"official .*nowhere.* no clone of the released code: model/build.py"):
        released.load_code(tmp_path / "nowhere")


def test_a_package_that_the_clone_computes_with_is_asked_for(tmp_path):
    folder = write_clone(tmp_path / "clone", solver_build="import no_such_package")
    path = list(sys.path)
    with pytest.raises(ImportError, match="no_such_package"):
        released.load_code(folder)
    assert sys.path == path


def test_half_precision_is_neutral_within_and_itself_again_afterwards():
    one = torch.ones(1)
    with released.in_single_precision():
        assert one.half().dtype == torch.float32
    assert one.half().dtype == torch.float16


def test_the_released_model_gets_our_weights_under_its_names_and_says_nothing(code, tiny, capsys):
    model = irra.build_model(tiny, 10)
    theirs = released.build(code, model, tiny, CPU)
    assert torch.equal(theirs.state["cross_attn.in_proj_weight"], model.interaction.attention.in_proj_weight)
    assert torch.equal(theirs.clip["visual.proj"], model.clip.visual.proj)
    assert theirs.num_classes == 10
    assert theirs.args.img_size == (96, 32)
    released.build_optimiser(code, theirs, tiny)
    assert capsys.readouterr().out == ""


def test_the_released_step_sees_the_same_batch_padded_and_moves_its_weights(code, tiny, batch):
    theirs = released.build(code, irra.build_model(tiny, 10), tiny, CPU)
    given = released.batch_of(batch)
    assert given["caption_ids"].shape == (8, 77)
    assert torch.equal(irra.text.trim(given["caption_ids"])[0], batch.tokens)
    assert torch.equal(given["mlm_labels"][:, : batch.labels.shape[1]], batch.labels)
    losses = released.losses(theirs, given)
    assert sorted(losses) == ["id_loss", "mlm_loss", "sdm_loss"]
    assert losses["sdm_loss"].item() == pytest.approx(batch.images.mean().exp().item(), rel=1e-6)  # not fp16's 1e-3
    before = theirs.weight.clone()
    released.step(theirs, released.build_optimiser(code, theirs, tiny), given)
    assert (theirs.weight < before).all()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_the_released_evaluation_and_loader_read_the_photos_and_captions(code, tiny, annotations, start, monkeypatch):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {start}")
    monkeypatch.setattr(released, "START", start)
    monkeypatch.setattr(released, "WORKERS", 1)
    theirs = released.build(code, irra.build_model(tiny, 10), tiny, CPU)
    assert 0 <= released.evaluate(code, theirs, annotations, tiny) <= 100
    batches = list(released.train_loader(code, annotations, tiny))
    pids = torch.cat([batch["pids"] for batch in batches]).tolist()
    assert sorted(pids) == sorted(annotations[annotations.split == "train"].pid)
    assert batches[0]["images"].shape == (8, 3, 96, 32)
