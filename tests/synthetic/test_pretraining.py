"""The small CLIP's pretraining: what the package holds of it, and that a killed one ends with the same weights."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

import irra_core as irra
from irra_core import runs
from irra_core.backbone import CHECKSUM, GENERAL, read_weights
from irra_core.synthetic.pretraining import pretraining
from irra_core.training import train


def test_the_shipped_weights_are_half_of_16_mb_at_most_sound_and_say_how_they_were_made():
    assert GENERAL.stat().st_size <= 16e6
    tensors, metadata = read_weights(GENERAL)  # its checksum is compared
    assert len(metadata[CHECKSUM]) == 32
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    model, chosen = irra.load_checkpoint(GENERAL)
    assert (chosen.dataset, chosen.losses, chosen.backbone, chosen.pretrained) == ("general", "itc", "small", "none")
    assert torch.equal(model.clip.text_projection.cpu(), tensors["clip.text_projection"].float())


def test_make_pretrain_has_the_recipe_of_the_shipped_weights(tmp_path):
    (tmp_path / "annotations.json").write_text("[]")
    now, made = (json.loads(text) for text in (pretraining(tmp_path / "annotations.json").to_json(), _shipped_recipe()))
    assert made.pop("dataset") == "general"
    del made["interaction_depth"]  # which only MLM reads
    assert {name: value for name, value in now.items() if name in made} == made


def _shipped_recipe() -> str:
    with safe_open(GENERAL, "pt") as file:
        return file.metadata()["recipe"]


def test_a_model_begins_from_the_shipped_weights():
    model, shipped = irra.build_model(irra.recipe(), 3), load_file(GENERAL)
    for name, value in model.clip.named_parameters():
        assert torch.equal(value.cpu(), shipped[f"clip.{name}"].float()), name


def test_a_run_begins_from_the_shipped_weights(monkeypatch, annotations, tmp_path):
    monkeypatch.setenv("IRRA_SMOKE", "1")
    list(train(irra.recipe(batch_size=8), annotations, tmp_path / "run"))
    metrics = runs.load_run(tmp_path / "run")["metrics"]
    assert metrics["pretrained"] != metrics["untrained"]
    assert "gain_over_pretrained" in metrics


def _pretraining(folder: Path) -> subprocess.Popen:
    environment = os.environ | {"IRRA_SMOKE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "irra_core.synthetic.pretraining", str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_killed_pretraining_is_resumed_and_ends_with_the_same_bytes(tmp_path):
    killed = _pretraining(tmp_path / "cut")
    while not (tmp_path / "cut" / "run" / "state.safetensors").exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    for name in ("cut", "whole"):
        ended = _pretraining(tmp_path / name)
        said = ended.communicate()
        assert ended.returncode == 0, said[1].decode()
        assert str(tmp_path / name / "general.safetensors") in said[0].decode()
    one, other = (tmp_path / name / "general.safetensors" for name in ("cut", "whole"))
    assert one.read_bytes() == other.read_bytes()
    assert read_weights(one)[1]["recipe"] == read_weights(other)[1]["recipe"]
