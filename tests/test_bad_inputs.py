"""Inputs that are wrong, odd or hostile: each works as one expects, or ends in one error that says what to do."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_annotations import draw, own, people

import irra_core as irra
from irra_core.analysis.checks import check_annotations
from irra_core.annotations import load_annotations
from irra_core.checkpoints import open_checkpoint
from irra_core.images import image_array
from irra_core.metrics import query_metrics

REFERENCE = Path(__file__).parent / "reference"
CHECKED = "(?s:.*)typechecking parameter "  # the tests run with type checks on, which come first
TINY = {"pretrained": "none", "batch_size": 8, "epochs": 1, "max_steps": 1, "losses": "sdm+id+mlm"}


# photos


def seen(path: Path) -> np.ndarray:
    """The photo as training sees it: 4 × 2 pixels, with a sound one beside it."""
    draw(path.parent / "sound.png")
    return np.array(image_array([path.parent / "sound.png", path], 4, 2).pixels[1])


def photo(mode: str, colour, name: str = "photo.png", size=(8, 16), **options):
    """A plain image file of a mode, and what training sees of it."""

    def make(folder: Path):
        Image.new(mode, size, colour).save(folder / name, **options)
        return seen(folder / name)

    return make


def plain(*colour: int):
    """True of an array that has this colour everywhere, within what JPEG changes."""
    return lambda pixels: np.abs(pixels.astype(int) - np.array(colour)[:, None, None]).max() <= 3


def spoilt(content: bytes | None, name: str = "photo.jpg"):
    """A file of these bytes (None: no file) in a photo's place."""

    def make(folder: Path):
        if content is not None:
            (folder / name).write_bytes(content)
        return seen(folder / name)

    return make


def cut_short(folder: Path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photo.jpg")
    (folder / "photo.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:2000])
    return seen(folder / "photo.jpg")


def sixteen_bits(folder: Path):
    Image.fromarray(np.full((8, 8), 51_400, dtype=np.uint16)).save(folder / "photo.png")
    return seen(folder / "photo.png")


def animated(folder: Path):
    first, second = Image.new("RGB", (8, 16), (200, 0, 0)), Image.new("RGB", (8, 16), (0, 0, 200))
    first.save(folder / "photo.gif", save_all=True, append_images=[second])
    return seen(folder / "photo.gif")


def turned(folder: Path):
    """Red above blue, stored lying on its side, with an EXIF entry that says so."""
    upright = Image.new("RGB", (8, 16), (255, 0, 0))
    upright.paste((0, 0, 255), (0, 8, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "photo.png", exif=exif)
    return seen(folder / "photo.png")


def linked(target):
    """A link in a photo's place."""

    def make(folder: Path):
        (folder / "photo.png").symlink_to(target)
        return seen(folder / "photo.png")

    return make


def pipe(folder: Path):
    os.mkfifo(folder / "photo.png")
    return seen(folder / "photo.png")


REMEDY = "(?s).*copy again, or drop from the annotations.*photo"
PHOTOS = {
    "an absent photo": (spoilt(None), REMEDY),
    "a photo of no bytes": (spoilt(b""), REMEDY + r".*0 bytes"),
    "a photo cut short": (cut_short, REMEDY + ".*truncated"),
    "text in a photo's place": (spoilt(b"hello"), REMEDY + ".*no image"),
    "a vector graphic": (spoilt(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "photo.svg"), REMEDY + ".*no image"),
    "a PNG's head without its body": (spoilt(b"\x89PNG\r\n\x1a\n", "photo.png"), REMEDY),
    "a pipe in a photo's place": (pipe, REMEDY + ".*no regular file"),
    "a link to itself": (linked("photo.png"), REMEDY),
    "a link to nowhere": (linked("nowhere.png"), REMEDY),
    "a link to a photo": (linked("sound.png"), plain(0, 0, 100)),
    "a CMYK photo": (photo("CMYK", (0, 255, 255, 0), "photo.jpg"), plain(255, 0, 0)),
    "a 16-bit photo": (sixteen_bits, plain(200, 200, 200)),
    "a floating-point photo": (photo("F", 0.5, "photo.tiff"), REMEDY + ".*8 bits a channel"),
    "a grey photo": (photo("L", 90), plain(90, 90, 90)),
    "a black and white photo": (photo("1", 1), plain(255, 255, 255)),
    "a photo with a palette": (photo("P", 0), plain(0, 0, 0)),
    "a transparent photo": (photo("RGBA", (10, 200, 30, 0)), plain(10, 200, 30)),
    "an animated photo": (animated, plain(200, 0, 0)),
    "a photo that EXIF turns": (turned, lambda pixels: pixels[0, 0, 0] > 250 and pixels[2, -1, 0] > 250),
    "a photo of one pixel": (photo("RGB", (9, 8, 7), size=(1, 1)), plain(9, 8, 7)),
    "a photo 20,000 pixels high": (photo("RGB", (9, 8, 7), size=(3, 20_000)), plain(9, 8, 7)),
    "a decompression bomb": (photo("1", 1, size=(20_000, 20_000)), REMEDY + ".*pixels"),
    "a photo with a name beyond ASCII": (photo("RGB", (9, 8, 7), "фото é 人.png"), plain(9, 8, 7)),
}


# annotations


def read(content, name: str = "own.json"):
    """The table of an own annotation file with this content."""
    return lambda folder: load_annotations(own(folder, content, name))


def record(**changes):
    """The table of four records, the third of them changed; `...` takes a field away."""

    def make(folder: Path):
        content = people(4, split="test")
        content[2] = {name: value for name, value in (content[2] | changes).items() if value is not ...}
        return load_annotations(own(folder, content))

    return make


def checked(**changes):
    """What check_annotations finds in four train records, the third of them changed."""

    def make(folder: Path):
        content = people(4, split="train")
        content[2] |= changes
        return " ".join(check_annotations(load_annotations(own(folder, content))).finding)

    return make


def copied(folder: Path):
    """What check_annotations finds where two people have the same photo under two names."""
    file = own(folder, people(4, split="train"))
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes())
    return " ".join(check_annotations(load_annotations(file)).finding)


def link_out(folder: Path):
    """A link below the data that leads out of them: who owns the disk made it, so it is followed, and a finding."""
    draw(folder / "elsewhere" / "far.png", 70)
    (folder / "data").mkdir()
    (folder / "data" / "linked").symlink_to(folder / "elsewhere")
    content = people(2, split="test")
    content[1]["file_path"] = "linked/far.png"
    table = load_annotations(own(folder / "data", content))
    assert table.path.map(os.path.isfile).all()
    return " ".join(check_annotations(table).finding)


THIRD = r"/own\.json, record 3: .*"
ANNOTATIONS = {
    "an absent file": (lambda folder: load_annotations(folder / "no.json"), "annotation file .*no.json.* is not there"),
    "an empty file": (read(b""), r"own\.json is empty \(0 bytes\): copy it again"),
    "JSON cut short": (read(b'[{"id": 1, "cap'), r"own\.json is not JSON.*copy it again"),
    "JSON that is no list": (read({"images": []}), r"own\.json holds .*expected is a list"),
    "a record that is no record": (read([3]), r"own\.json, record 1: is 3"),
    "no records": (read([]), "has no records: expected is"),
    "Latin-1": (read('[{"id": "é"}]'.encode("latin-1")), "not UTF-8.*save it as UTF-8"),
    "a byte-order mark": (read(b"\xef\xbb\xbf" + json.dumps(people(12)).encode()), lambda table: len(table) == 12),
    "no id": (record(id=...), THIRD + "field 'id' is missing.*expected"),
    "no captions": (record(captions=...), THIRD + "field 'captions' is missing.*expected"),
    "no path": (record(file_path=...), THIRD + "field 'file_path' .* is missing.*expected"),
    "captions that are one text": (record(captions="a man"), THIRD + "captions is 'a man'.*expected is a list"),
    "no caption in the list": (record(captions=[]), lambda table: table.caption.isna().tolist() == [0, 0, 1, 0]),
    "no caption in train": (record(captions=[], split="train"), THIRD + "captions is empty: write at least one"),
    "a caption that is null": (record(captions=[None]), THIRD + "caption is None.*expected is a text"),
    "a caption that is empty": (record(captions=[""]), lambda table: table.caption[2] == ""),
    "an empty caption among findings": (checked(captions=[""]), lambda found: "an empty caption" in found),
    "a caption of 10,000 words": (record(captions=["word " * 10_000]), lambda table: len(table.caption[2]) == 50_000),
    "a caption with NUL": (record(captions=["a\0b"]), THIRD + "NUL.*write it again"),
    "a caption with half a pair": (record(captions=["a\ud83d"]), THIRD + "half a surrogate pair.*write it again"),
    "a path that leads out": (record(file_path="../a.png"), THIRD + "names no file inside .*write it relative"),
    "an absolute path": (record(file_path="/etc/passwd"), THIRD + "names no file inside .*write it relative"),
    "a Windows drive": (record(file_path="C:\\a.png"), THIRD + "names no file inside .*write it relative"),
    "Windows separators": (record(file_path=".\\c.png"), lambda table: Path(table.path[2]).name == "c.png"),
    "a link that leads out": (link_out, lambda found: "a link that leads out" in found),
    "ids as texts": (record(id="p2"), lambda table: table.pid.tolist() == [0, 1, 2, 3]),
    "an id that is null": (record(id=None), THIRD + "id is None.*expected is an integer or a text"),
    "an unknown split": (record(split="tset"), THIRD + "split 'tset' is unknown: did you mean 'test'"),
    "a photo in two records": (record(file_path="a.png"), lambda table: table.image_id.tolist() == [0, 1, 0, 2]),
    "equal photos under two names": (copied, lambda found: "one photo under two identities" in found),
    "one identity in train and test": (
        checked(split="test", id=0),
        lambda found: "the same identity in two splits" in found,
    ),
    "an identity with one photo": (checked(), lambda found: "an identity with one image" in found),
    "a data set that nobody knows": (lambda _: irra.recipe("cuhkk"), "'cuhkk' is unknown: did you mean 'cuhk'"),
    "a CSV with other columns": (read("a,b\n1,2\n", "own.csv"), r"own\.csv: column 'path' is missing"),
}


# sentences, recipes, scores


def tokens(*captions):
    """The token ids of captions."""
    return lambda _: irra.tokenize(list(captions))


def numbers(**fields):
    """A recipe with these fields."""
    return lambda _: irra.recipe(**fields)


def ranked(similarity, pids=(0, 1)):
    """The metrics of a similarity of two sentences and two photos."""
    pids = torch.tensor(pids)
    return lambda _: query_metrics(torch.tensor(similarity), torch.tensor([0, 1]), pids)


SENTENCES = {
    "a caption without words": (tokens(""), lambda ids: (ids != 0).sum() == 2),
    "10,000 words": (tokens("word " * 10_000), lambda ids: ids[0, -1] == 49407),
    "a word of a million letters": (tokens("a" * 10**6), lambda ids: ids[0, -1] == 49407),
    "NUL and half a pair": (tokens("a \0 man \ud83d"), lambda ids: ids.shape == (1, 77)),
    "a number among captions": (  # an iterator: of a list, type checks look at one item drawn at random
        lambda _: irra.tokenize(iter(["a", 3])),
        "caption 1 is 3: expected is a text",
    ),
    "one text for a list": (lambda _: irra.tokenize("a man"), "captions is one text.*give a list"),
    "an unknown field": (numbers(temprature=1.0), "'temprature' is unknown: did you mean 'temperature'"),
    "a text for a number": (numbers(epochs="3"), "'epochs' is '3': accepted is int|" + CHECKED + "'epochs'"),
    "a truth for a number": (numbers(epochs=True), "'epochs' is True: accepted is int|" + CHECKED + "'epochs'"),
    "a learning rate below 0": (numbers(lr=-1.0), "'lr' is -1.0: accepted is above 0"),
    "a learning rate that is NaN": (numbers(lr=float("nan")), "'lr' is nan: accepted is above"),
    "an infinite learning rate": (numbers(lr=float("inf")), "'lr' is inf: accepted is above 0.0 and at most"),
    "a batch of one": (numbers(batch_size=1), "'batch_size' is 1: accepted is at least 2"),
    "losses that align nothing": (numbers(losses="id"), "align nothing: add one of"),
    "an unknown loss": (numbers(losses="smd"), "'smd' is unknown: did you mean 'sdm'"),
    "an unknown backbone": (numbers(backbone="ViT-B-61"), "'ViT-B-61' is unknown: did you mean"),
    "a score that is NaN": (ranked([[0.0, float("nan")], [0.0, 1.0]]), "NaN for query 0.*look at the weights"),
    "infinite scores": (ranked([[float("inf"), 0.0], [0.0, 1.0]]), lambda found: found["AP"].tolist() == [100, 100]),
    "nobody to find": (ranked([[1.0, 0.0], [0.0, 1.0]], (0, 7)), "identity that is not in the gallery.*drop them"),
    "scores turned round": (
        ranked([[1.0, 0.0]]),
        r"similarity is \(1, 2\).*one row a query|" + CHECKED + "'query_pids'",
    ),
}


# checkpoints, galleries, training


def opened(content: bytes | None, name: str = "file.pth"):
    """The checkpoint in a file of these bytes (None: no file)."""

    def make(folder: Path):
        if content is not None:
            (folder / name).write_bytes(content)
        return open_checkpoint(folder / name)

    return make


def torch_file(content):
    """The checkpoint in a file that torch wrote."""

    def make(folder: Path):
        torch.save(content, folder / "file.pth")
        return open_checkpoint(folder / "file.pth")

    return make


def foreign(folder: Path):
    save_file({"weight": torch.zeros(2)}, folder / "file.safetensors")
    return open_checkpoint(folder / "file.safetensors")


def tensors_missing(folder: Path):
    from irra_core.checkpoints import FORMAT, save_tensors

    made = irra.recipe(pretrained="none").to_json()
    save_tensors({"weight": torch.zeros(2)}, folder / "file.safetensors", {"format": FORMAT, "recipe": made})
    return open_checkpoint(folder / "file.safetensors")


CHECKPOINTS = {
    "an absent checkpoint": (opened(None), r"file\.pth is not there"),
    "an empty checkpoint": (opened(b""), r"file\.pth \(0 bytes\).*Copy it again"),
    "a checkpoint of text": (opened(b"hello"), r"file\.pth \(5 bytes\).*Copy it again"),
    "safetensors of no bytes": (opened(b"", "file.safetensors"), r"file\.safetensors \(0 bytes\).*Copy it again"),
    "a list in a torch file": (torch_file([1, 2]), r"file\.pth holds a list: expected is a state dict"),
    "a tensor in a torch file": (torch_file(torch.zeros(2)), r"file\.pth holds a Tensor: expected is a state dict"),
    "numbers in a state dict": (torch_file({"model": {"a": 1}}), r"file\.pth is not in the released format"),
    "another model's torch file": (torch_file({"fc.weight": torch.zeros(2)}), "none of its tensors is under base_mod"),
    "another program's safetensors": (foreign, "no checkpoint of this library.*load_official"),
    "a checkpoint that lacks what it should say": (tensors_missing, r"file\.safetensors"),
    "the wrong image size": (
        lambda _: irra.load_official(REFERENCE / "irra_tiny.pth", (96, 32), 16),
        r"irra_tiny\.pth.*What fits",
    ),
}


@pytest.fixture
def table(annotations) -> pd.DataFrame:
    """Annotations that a row of the table below may spoil."""
    return annotations.copy()


def train(table, folder, **changes):
    """The history of one step."""
    return list(irra.train(irra.recipe(**(TINY | changes)), table, folder / "run"))


def nobody_twice(table):
    """One identity in all, in every split."""
    return table.assign(pid=0)


def gallery(table, spoil=None):
    """A gallery of the test photos, made by a model of random weights that may be spoilt."""
    model = irra.build_model(irra.recipe(**TINY), 3)
    if spoil is not None:
        model.clip.visual.proj.data.fill_(spoil)
    return irra.Gallery.build(model, table[table.split == "test"])


def without(table, split):
    """The table without a split, its photos numbered again."""
    kept = table[table.split != split].reset_index(drop=True)
    return kept.assign(image_id=pd.factorize(kept.image_id)[0])


WORK = {
    "a batch larger than the data set": (lambda t, f: train(t, f, batch_size=500), lambda rows: rows[0]["loss"] > 0),
    "one identity in all": (lambda t, f: train(nobody_twice(t), f), lambda rows: np.isfinite(rows[0]["loss"])),
    "nothing to train on": (lambda t, f: train(without(t, "train"), f), "train split has no rows"),
    "no test split": (lambda t, f: train(without(t, "test"), f), lambda rows: len(rows) == 1),
    "empty captions": (lambda t, f: train(t.assign(caption=""), f), lambda rows: np.isfinite(rows[0]["loss"])),
    "captions of 10,000 words": (
        lambda t, f: train(t.assign(caption="word " * 10_000), f),
        lambda rows: np.isfinite(rows[0]["loss"]),
    ),
    "NaN features": (lambda t, f: gallery(t, float("nan")), "not unit vectors.*load another checkpoint"),
    "infinite features": (lambda t, f: gallery(t, float("inf")), "not unit vectors.*load another checkpoint"),
    "an empty query": (lambda t, f: gallery(t).search(" "), "query 1 is empty: write what"),
    "no results": (lambda t, f: gallery(t).search("a man", k=0), "k is 0: accepted is a number of results from 1"),
    "a photo that is not there": (lambda t, f: gallery(t).remove([999]), "999"),
    "an absent gallery": (
        lambda t, f: irra.Gallery.load(f / "no", irra.build_model(irra.recipe(**TINY), 3)),
        "no is no gallery: it has no gallery.json; Gallery.build",
    ),
}

FILES = PHOTOS | ANNOTATIONS | SENTENCES | CHECKPOINTS


def test_the_table_has_more_than_sixty_rows():
    assert len(FILES) + len(WORK) > 60
    assert len(FILES) == sum(map(len, (PHOTOS, ANNOTATIONS, SENTENCES, CHECKPOINTS))), "two rows have one name"


def judge(act, expected) -> None:
    """Fail unless the act does as one expects: an error with these words (no other, no warning), or a right result."""
    if isinstance(expected, str):
        with pytest.raises((ValueError, TypeError, OSError), match=expected):
            act()
    else:
        assert expected(act())


@pytest.mark.filterwarnings("error", "ignore::PIL.Image.DecompressionBombWarning", "ignore:.*more than 77 tokens")
@pytest.mark.parametrize("row", FILES)
def test_a_bad_file_or_value_works_as_expected_or_says_what_to_do(row, tmp_path):
    make, expected = FILES[row]
    judge(lambda: make(tmp_path), expected)


@pytest.mark.parametrize("row", WORK)
def test_bad_data_train_and_are_searched_as_expected_or_say_what_to_do(row, table, tmp_path):
    make, expected = WORK[row]
    judge(lambda: make(table, tmp_path), expected)
