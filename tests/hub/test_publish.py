"""A finished run → what lies on the Hub afterwards: these files and no others, nothing of any photo or caption."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import matplotlib.image
import pytest
import torch
from hub_server import OWNER, TOKEN, connected

import irra_core as irra
from irra_core import runs
from irra_core.hub import publish
from irra_core.training import train

ROOT = Path(__file__).resolve().parent.parent.parent
NAME = f"{OWNER}/irra"


@pytest.fixture(scope="module")
def trained(annotations, narrow, tmp_path_factory):
    """The folder of a run on own data, whose path names a user, with every file that shows photos or captions."""
    home = tmp_path_factory.mktemp("home-of-somebody")
    table = home / "people.csv"
    annotations.rename(columns={"path": "file_path", "pid": "id"}).to_csv(table, index=False)
    steps = {"batch_size": 8, "epochs": 2, "max_steps": 5, "evaluate_every": 2}
    recipe = irra.recipe(str(table), backbone="small", pretrained="none", **steps)
    folder = home / "reports" / "people" / "run"
    list(train(recipe, annotations, folder))
    captions = "\n".join(annotations.caption)
    for name in ("train.ipynb", "train.html", "training.svg", "notes.txt", "tensorboard/events"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(captions)
    shutil.copy(annotations.path[0], folder / "ranking-3.png")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, in the reports folder of this test."""
    folder = tmp_path / "reports" / "people" / "run"
    shutil.copytree(trained, folder)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with connected(tmp_path / "hub-cache", monkeypatch) as server:
        yield server


def test_a_run_becomes_one_commit_of_five_files_whose_model_is_the_runs(hub, run, monkeypatch, tmp_path):
    monkeypatch.setenv("IRRA_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    address = irra.push_to_hub("people/run", NAME)
    repository = hub.repositories[NAME]
    assert repository.private
    assert len(repository.commits) == 2  # the empty one of a new repository, and one with all files
    commit, files = list(repository.commits.items())[-1]
    assert address == f"hub:{NAME}@{commit}"
    assert set(files) == {".gitattributes", *publish.FILES}
    model, recipe = irra.load_model(address)
    own, own_recipe = irra.load_checkpoint(run / runs.WEIGHTS)
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in model.state_dict().items())
    assert recipe == own_recipe.replace(dataset="people.csv")
    metrics = json.loads((run / "metrics.json").read_text())
    assert json.loads(files["metrics.json"]) == metrics
    (tmp_path / "curves.png").write_bytes(files["training.png"])
    assert matplotlib.image.imread(tmp_path / "curves.png").std() > 0.01  # something is drawn
    value, low, high = metrics["text_to_image"]["R1"]
    card = files["README.md"].decode()
    assert f"| this model, a caption searches photos | {value:.1f} [{low:.1f}, {high:.1f}] |" in card
    assert f'irra.load_model("hub:{NAME}")' in card


def test_nothing_of_a_photo_a_caption_or_a_folder_is_sent(hub, run, annotations, trained):
    irra.push_to_hub(run, NAME, token=TOKEN)
    sent = b"\n".join([*hub.bodies, *hub.large.values(), *hub.repositories[NAME].files("main")[1].values()])
    assert len(sent) > 1e6  # the weights are in it
    words = [*annotations.caption, "person in a", "home-of-somebody", str(run), str(trained), *annotations.path]
    for word in words:
        assert word.encode() not in sent, word
        assert json.dumps(word).strip('"').encode() not in sent, word
    for path in annotations.path[:3]:
        assert Path(path).read_bytes()[100:160] not in sent
    assert "people.csv" in sent.decode(errors="ignore")  # the name alone


def test_text_among_the_scores_is_refused_before_anything_is_sent(hub, run):
    metrics = json.loads((run / "metrics.json").read_text())
    for wrong in ({"remark": "a woman in a red coat"}, {"text_to_image": {"R1": ["a woman"]}}, {"a woman in red": 1}):
        (run / "metrics.json").write_text(json.dumps(metrics | wrong))
        with pytest.raises(ValueError, match=r"metrics.json holds .*not published"):
            irra.push_to_hub(run, NAME, token=TOKEN)
    assert hub.requests == []


def test_weights_of_another_run_or_damaged_ones_are_refused_before_anything_is_sent(hub, run):
    kept = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps(kept | {"recipe": kept["recipe"] | {"seed": 7}}))
    with pytest.raises(ValueError, match=r"recipe.json and weights.safetensors are of different runs"):
        irra.push_to_hub(run, NAME, token=TOKEN)
    (run / "recipe.json").write_text(json.dumps(kept))
    weights = bytearray((run / runs.WEIGHTS).read_bytes())
    weights[-9] ^= 1
    (run / runs.WEIGHTS).write_bytes(weights)
    with pytest.raises(ValueError, match="is damaged"):
        irra.push_to_hub(run, NAME, token=TOKEN)
    (run / "metrics.json").unlink()
    with pytest.raises(ValueError, match="is no finished run"):
        irra.push_to_hub(run, NAME, token=TOKEN)
    assert hub.requests == []


def test_public_is_said_and_only_on_request(hub, run, recwarn):
    irra.push_to_hub(run, NAME, token=TOKEN)
    assert not [each for each in recwarn if "public" in str(each.message)]
    with pytest.warns(
        UserWarning, match=r"hub:somebody/open@\w{40} is public: everybody can download .*own data .*owns"
    ):
        irra.push_to_hub(run, f"{OWNER}/open", private=False, token=TOKEN)
    assert [hub.repositories[name].private for name in (NAME, f"{OWNER}/open")] == [True, False]


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_of_the_other_visibility_gets_nothing(hub, run, private):
    made = hub.made(NAME, private=not private)
    with pytest.raises(ValueError, match=rf"is there already and .*, but private is {private}: nothing was uploaded"):
        irra.push_to_hub(run, NAME, private=private, token=TOKEN)
    assert len(made.commits) == 1
    assert not hub.large


def test_a_repository_with_files_of_others_gets_nothing_and_one_of_ours_the_new_run(hub, run):
    made = hub.made(NAME, {"pytorch_model.bin": b"0", "README.md": b"mine"}, private=True)
    with pytest.raises(ValueError, match=r"holds files that irra-core did not write \(README.md, pytorch_model.bin\)"):
        irra.push_to_hub(run, NAME, token=TOKEN)
    assert len(made.commits) == 1
    first = irra.push_to_hub(run, f"{OWNER}/ours", token=TOKEN)
    shutil.copy(run / "history.csv", run / "kept.csv")
    history = (run / "history.csv").read_text().splitlines()
    (run / "history.csv").write_text("\n".join(history[:-1]))  # another figure
    second = irra.push_to_hub(run, f"{OWNER}/ours", token=TOKEN)
    assert first != second
    assert set(hub.repositories[f"{OWNER}/ours"].files("main")[1]) == {".gitattributes", *publish.FILES}


def test_a_commit_that_fails_leaves_no_file_behind(hub, run):
    hub.broken = "/commit/"
    with pytest.raises(ConnectionError, match=rf"{NAME} was not written: http://127.0.0.1:\d+ answered 500"):
        irra.push_to_hub(run, NAME, token=TOKEN)
    assert set(hub.repositories[NAME].files("main")[1]) == {".gitattributes"}
    hub.broken = ""
    assert irra.push_to_hub(run, NAME, token=TOKEN).startswith(f"hub:{NAME}@")


def test_who_may_not_write_is_told_what_to_do(hub, run, monkeypatch):
    with pytest.raises(PermissionError, match=r"cannot be written without a token: .*`hf auth login`"):
        irra.push_to_hub(run, NAME)
    with pytest.raises(PermissionError, match=r"refused the token \(401\). Take a token with the right to write"):
        irra.push_to_hub(run, NAME, token="hf_of_nobody")
    with pytest.raises(PermissionError, match=r"refused the token \(403\).* an owner that is you"):
        irra.push_to_hub(run, "google/irra", token=TOKEN)
    with pytest.raises(ValueError, match=r"repository 'a/b/c' is not accepted: .*Write owner/name"):
        irra.push_to_hub(run, "a/b/c", token=TOKEN)
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9 was not reached .*Call push_to_hub again"):
        irra.push_to_hub(run, NAME, token=TOKEN, endpoint="http://127.0.0.1:9")
    assert not hub.repositories


def test_the_card_says_what_the_documented_one_says_of_uses_and_data():
    def plain(text: str) -> str:
        return " ".join(text.split())

    documented = (ROOT / "docs" / "model_card.md").read_text()
    uses = documented.split("**What it must not be used for.**")[1].split("\n\n")[0]
    template = plain((ROOT / "irra_core" / "hub" / "card.md.jinja").read_text())
    for use in uses.split("\n- ")[1:]:
        assert plain(use.split(": see the scores")[0]) in template
    data_card = (ROOT / "docs" / "data_card.md").read_text()
    for name, data in publish.DATA.items():
        assert f"| {data.name} (`{name}`) | {data.shows} |" in data_card


@pytest.mark.parametrize(
    ("dataset", "given", "licence", "says"),
    [
        ("synthetic", {}, "mit", "say nothing about photos of real people"),
        ("synthetic", {"backbone": "ViT-B-16-quickgelu"}, "other", "OpenAI's CLIP (MIT licence)"),
        ("cuhk", {}, "other", "those who sign their agreement"),
        ("cuhk", {"preset": "released"}, "other", "weights were selected on the test split"),
    ],
)
def test_the_cards_licence_follows_from_data_and_clip(dataset, given, licence, says):
    recipe = irra.recipe(dataset, _smoke=False, **given)
    metrics = {"selected": {"on": recipe.select_on, "step": 1}, "queries": 3240, "images": 1620, "identities": 405}
    metrics["text_to_image"] = {name: [1.0, 0.5, 1.5] for name in ("R1", "R5", "R10", "mAP", "mINP")}
    text = publish.card(recipe, metrics, publish._data(recipe), NAME)
    read = huggingface_hub.ModelCard(text)
    assert read.data.license == licence
    assert says in " ".join(text.split())
    assert "3,240 captions search 1,620 photos of 405 people" in " ".join(text.split())
    assert "|\n| this" in text.split("## Scores")[1].split("\n\n")[2] + "\n"  # one table without gaps


def test_the_card_of_data_without_a_test_split_has_no_scores():
    recipe = irra.recipe("cuhk", _smoke=False)
    text = publish.card(recipe, {"selected": {"on": "val", "step": 1}}, publish._data(recipe), NAME)
    assert "nothing was scored" in text
    assert "R@5" not in text
