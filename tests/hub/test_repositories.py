"""`hub:owner/name@revision` → the model of that commit; what is refused before it is downloaded, and what is said."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hub_server import OWNER, TOKEN, connected
from huggingface_hub import constants
from safetensors.torch import load_file

import irra_core as irra
from irra_core.training import train

NAME = f"{OWNER}/irra"
WEIGHTS, RECIPE = "weights.safetensors", "recipe.json"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with connected(tmp_path / "hub-cache", monkeypatch) as server:
        yield server


def files_of(folder: Path, seed: int = 0, **given) -> dict[str, bytes]:
    """The files of a repository as push_to_hub writes them, of a model as the seed draws it."""
    recipe = irra.recipe(pretrained="none", losses="itc", seed=seed, **given)
    folder.mkdir(exist_ok=True)
    irra.save_checkpoint(irra.build_model(recipe, 5), recipe, folder / WEIGHTS)
    kept = json.dumps({"format": 1, "data": "0", "recipe": json.loads(recipe.to_json())})
    return {WEIGHTS: (folder / WEIGHTS).read_bytes(), RECIPE: kept.encode(), "README.md": b"card", "best.pth": b"no"}


@pytest.fixture
def model(narrow, hub, tmp_path):
    """A public repository of one commit, and its files."""
    made = hub.made(NAME, files_of(tmp_path / "first", 1))
    return made, list(made.commits)[-1]


def only_these_were_fetched(hub) -> bool:
    asked = [path for method, path in hub.requests if "/resolve/" in path]
    return bool(asked) and all(path.endswith((WEIGHTS, RECIPE)) for path in asked)


def test_the_newest_commit_is_taken_and_said_and_a_named_one_stays(hub, model, tmp_path):
    made, first = model
    with pytest.warns(UserWarning, match=rf"without a revision this is the newest commit {first}. To have it again"):
        assert irra.load_model(f"hub:{NAME}")[1].seed == 1
    second = made.commit(files_of(tmp_path / "second", 2))
    made.refs["v1"] = first
    with pytest.warns(UserWarning, match=f"newest commit {second}"):
        loaded, recipe = irra.load_model(f"hub:{NAME}")
    assert recipe.seed == 2
    expected = load_file(tmp_path / "second" / WEIGHTS)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in expected.items())
    with pytest.warns(UserWarning, match=f"branch or tag stands for the commit {first}"):
        assert irra.load_model(f"hub:{NAME}@v1")[1].seed == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert irra.load_model(f"hub:{NAME}@{first}")[1].seed == 1
        assert irra.checkpoints.open_checkpoint(f"hub:{NAME}@{first}")[1].seed == 1  # of a notebook
    assert only_these_were_fetched(hub)


def test_without_network_the_cache_is_enough_and_the_commit_is_said(hub, model, monkeypatch):
    _, first = model
    with pytest.warns(UserWarning, match="newest"):
        irra.load_model(f"hub:{NAME}")
    for name, value in {"HF_HUB_OFFLINE": True, "ENDPOINT": "http://127.0.0.1:9"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(constants, name, value)
            hub.requests.clear()
            with pytest.warns(
                UserWarning, match=rf"newest commit that this machine holds \(.* was not reached.* {first}"
            ):
                assert irra.load_model(f"hub:{NAME}")[1].seed == 1
            assert irra.load_model(f"hub:{NAME}@{first}")[1].seed == 1
            with pytest.raises(
                FileNotFoundError, match=r"other: .*not reached.* does not hold it: load it once with netw"
            ):
                irra.load_model(f"hub:{OWNER}/other")
            with pytest.raises(FileNotFoundError, match="does not hold it"):
                irra.load_model(f"hub:{NAME}@{'0' * 40}")
            assert hub.requests == []


def test_a_real_process_is_offline_by_its_environment(hub, model, tmp_path):
    _, first = model
    source = f"import irra_core as irra; print(irra.load_model('hub:{NAME}')[1].seed)"
    patched = "from conftest import NARROW; from irra_core import backbone; backbone.SMALL_CLIP = NARROW; "
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    for offline in ("0", "1"):
        asked = [sys.executable, "-c", patched + source]
        ended = subprocess.run(asked, capture_output=True, text=True, env=environment | {"HF_HUB_OFFLINE": offline})
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.split()[-1] == "1"
        assert first in ended.stderr
        hub.broken = "/"


def test_what_is_not_there_is_one_sentence_with_the_remedy(hub, model, monkeypatch):
    hub.made(f"{OWNER}/secret", private=True)
    hub.made(f"{OWNER}/asked").gated = True
    cases = [
        (
            f"hub:{OWNER}/nowhere",
            FileNotFoundError,
            "there is no .*/nowhere, or it is private: this machine has no token",
        ),
        (f"hub:{OWNER}/secret", FileNotFoundError, "or it is private: .*log in with `hf auth login`"),
        (f"hub:{OWNER}/asked", PermissionError, "gives access on request: ask for it on http"),
        (f"hub:{NAME}@v9", FileNotFoundError, "has no revision 'v9': take one of its branches, tags or commits"),
        ("hub:irra", ValueError, "is no address of a model: accepted is hub:owner/name"),
        ("hub:a/b/c@d", ValueError, "is no address of a model"),
        ("hub:a/b..c", ValueError, "is no address of a model"),
    ]
    for address, kind, said in cases:
        with pytest.raises(kind, match=said) as caught:
            irra.load_model(address)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(FileNotFoundError, match=r"there is no .*, or this machine's token may not read it"):
        irra.load_model("hub:others/irra")
    with pytest.raises(ValueError, match=r"secret has no weights.safetensors, so it is not from irra.push_to_hub"):
        irra.load_model(f"hub:{OWNER}/secret")  # its owner sees it


def test_pickles_are_never_fetched(hub, tmp_path):
    hub.made(f"{OWNER}/old", {"pytorch_model.bin": b"cos\nsystem\n", "best.pth": b"x", RECIPE: b"{}"})
    with pytest.raises(ValueError, match=r"only best.pth, pytorch_model.bin: a pickle could run code, so none is read"):
        irra.load_model(f"hub:{OWNER}/old")
    hub.made(f"{OWNER}/half", {WEIGHTS: b"x"})
    with pytest.raises(ValueError, match=r"half has no recipe.json, so it is not from irra.push_to_hub"):
        irra.load_model(f"hub:{OWNER}/half")
    assert not hub.asked("/resolve/")


def header_of(data: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: dict, numbers: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def larger(data: bytes) -> bytes:
    """A tensor more, whose name is among those that no model needs."""
    header, numbers = header_of(data)
    more = bytes(2**24 + 1)
    header["logit_scale"] = {
        "dtype": "U8",
        "shape": [len(more)],
        "data_offsets": [len(numbers), len(numbers) + len(more)],
    }
    return with_header(header, numbers + more)


def changed(name: str, **values):
    def change(data: bytes) -> bytes:
        header, numbers = header_of(data)
        header[name] = header[name] | values
        return with_header(header, numbers)

    return change


PROJECTION = "clip.text_projection"
WRONG = {
    "cut": (lambda data: data[:-40_000], rf"{WEIGHTS} has [\d,]+ bytes, but the model of its recipe needs"),
    "with more": (larger, "but the model of its recipe needs"),
    "a header of 2 GB": (lambda data: (2**31).to_bytes(8, "little") + data[8:], "is none of this library"),
    "no header": (lambda data: b"pickle", "is none of this library"),
    "no JSON": (lambda data: (20).to_bytes(8, "little") + bytes(2000), "is none of this library"),
    "a list": (lambda data: with_header([1], bytes(100)), "is none of this library"),
    "a shape": (changed(PROJECTION, shape=[64, 640]), r"text_projection is \(64, 640\), wanted \(64, 64\)"),
    "a huge shape": (changed(PROJECTION, shape=[2**62, 2**62]), "is none of this library"),
    "a negative shape": (changed(PROJECTION, shape=[-1, 64]), "is none of this library"),
    "another type": (changed(PROJECTION, dtype="I64"), "is none of this library"),
    "no recipe": (changed("__metadata__", recipe="{"), "is none of this library"),
    "another recipe": (
        changed("__metadata__", recipe=irra.recipe(pretrained="none", losses="itc").to_json()),
        "different",
    ),
    "no format": (changed("__metadata__", format="other"), "is no checkpoint of this library"),
    "many people": (changed("__metadata__", num_ids="1e12"), "does not say what model it holds"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_weights_that_are_not_the_recipes_are_refused_by_their_header_alone(wrong, hub, model):
    made, _ = model
    change, said = WRONG[wrong]
    files = made.files("main")[1]
    commit = made.commit(files | {WEIGHTS: change(files[WEIGHTS])})
    with pytest.raises(ValueError, match=said):
        irra.load_model(f"hub:{NAME}@{commit}")
    fetched = [path for method, path in hub.requests if method == "GET" and path.startswith("/large/")]
    assert len(fetched) <= 2  # the first 100,000 bytes
    assert not list((Path(constants.HF_HUB_CACHE)).glob(f"**/snapshots/*/{WEIGHTS}"))


def test_a_recipe_of_other_sizes_or_of_a_huge_file_is_refused(hub, model):
    made, _ = model
    files = made.files("main")[1]
    commit = made.commit(files | {RECIPE: bytes(2**20 + 1)})
    with pytest.raises(ValueError, match=r"recipe.json has 1,048,577 bytes, accepted are 1,048,576: .* not downloaded"):
        irra.load_model(f"hub:{NAME}@{commit}")
    assert not hub.asked("/resolve/")
    deep = json.loads(files[RECIPE])["recipe"] | {"losses": "itc+mlm", "interaction_depth": 10**9}
    header, numbers = header_of(files[WEIGHTS])
    header["__metadata__"]["recipe"] = json.dumps(deep)
    commit = made.commit({RECIPE: json.dumps({"recipe": deep}).encode(), WEIGHTS: with_header(header, numbers)})
    with pytest.raises(ValueError, match=r"interaction_depth is 1000000000, but it holds \d+ tensors"):
        irra.load_model(f"hub:{NAME}@{commit}")


def test_damage_on_the_way_is_found_by_the_checksum(hub, model):
    made, _ = model
    files = made.files("main")[1]
    wrong = bytearray(files[WEIGHTS])
    wrong[-9] ^= 1
    commit = made.commit({WEIGHTS: bytes(wrong)})
    with pytest.raises(ValueError, match="is damaged"):
        irra.load_model(f"hub:{NAME}@{commit}")


def test_a_download_that_breaks_off_says_so(hub, model, monkeypatch):
    _, first = model
    hub.broken = "/resolve/"
    with pytest.raises(ConnectionError, match=rf"hub:{NAME}@{first}: the download broke off .*start it again"):
        irra.load_model(f"hub:{NAME}@{first}")


def test_a_recipe_holds_the_commit_so_that_a_moved_branch_makes_another_run(hub, model, tmp_path):
    made, first = model
    with pytest.warns(UserWarning, match="newest commit"):
        before = irra.recipe(pretrained=f"hub:{NAME}")
    assert before.pretrained == f"hub:{NAME}@{first}"
    second = made.commit(files_of(tmp_path / "second", 2))
    with pytest.warns(UserWarning, match="newest commit"):
        after = irra.recipe(pretrained=f"hub:{NAME}")
    assert after.pretrained == f"hub:{NAME}@{second}"
    assert irra.runs.run_name(before) != irra.runs.run_name(after)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert irra.recipe(pretrained=before.pretrained) == before
    weights = [irra.build_model(each, 5).clip.text_projection for each in (before, after)]
    files = [load_file(tmp_path / name / WEIGHTS)[PROJECTION] for name in ("first", "second")]
    assert all(torch.equal(one, other) for one, other in zip(weights, files))


def test_a_run_that_starts_from_the_hub_resumes_from_the_same_commit(hub, model, annotations, tiny, tmp_path):
    made, first = model
    recipe = tiny.replace(pretrained=f"hub:{NAME}@{first}")
    whole = list(train(recipe, annotations, tmp_path / "whole"))
    begun = train(recipe, annotations, tmp_path / "cut")
    rows = [next(begun)]
    begun.close()
    made.commit(files_of(tmp_path / "second", 2))  # main moves
    rows += list(train(recipe, annotations, tmp_path / "cut"))
    assert rows == whole
    kept = json.loads((tmp_path / "cut" / RECIPE).read_text())["recipe"]
    assert kept["pretrained"] == f"hub:{NAME}@{first}"


def test_an_address_without_a_commit_is_not_built_from(narrow):
    recipe = irra.recipe(pretrained="none").replace(pretrained=f"hub:{NAME}")
    with pytest.raises(ValueError, match=r"names no commit: irra.recipe\(pretrained='hub:somebody/irra'\) adds"):
        irra.build_model(recipe, 5)


def test_reading_a_foreign_recipe_asks_nobody(hub, narrow, tmp_path):
    recipe = irra.recipe(pretrained="none", losses="itc").replace(pretrained="hub:evil/model")
    model = irra.build_model(irra.recipe(pretrained="none", losses="itc"), 5)
    irra.save_checkpoint(model, recipe, tmp_path / WEIGHTS)
    irra.load_checkpoint(tmp_path / WEIGHTS)
    assert hub.requests == []
