"""An open_clip tag → a weights file, or the error that says what to put where."""

from pathlib import Path

import open_clip
import pytest

from irra_core.hub import tags
from irra_core.hub.tags import download


def test_without_network_the_error_says_which_file_to_put_where(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(tags, "getproxies", lambda: {"https": "a proxy, so that no name is looked up"})
    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    with pytest.raises(FileNotFoundError) as caught:
        download("ViT-B-16-quickgelu", "openai")
    for part in ("no route to the hub", "get open_clip_model.safetensors of", "put it into", "-p pretrained data/"):
        assert part in str(caught.value)


def test_a_tag_stands_for_the_file_that_open_clip_downloads(monkeypatch):
    monkeypatch.setattr(tags, "getproxies", lambda: {"https": "a proxy"})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda source: f"/cache/{source['hf_hub']}file.safetensors")
    found = download("ViT-B-16-quickgelu", "openai")
    assert found == Path("/cache/timm/vit_base_patch16_clip_224.openai/file.safetensors")


@pytest.mark.parametrize(
    ("name", "tag", "message"),
    [
        ("ViT-B-16-quickgelu", "opnai", "did you mean 'openai'"),
        ("ViT-B-16", "openai", "another activation than backbone 'ViT-B-16': take 'ViT-B-16-quickgelu'"),
        ("ViT-L-14", "laion2b_s32b_b82k", r"expects images with mean \(0.5, 0.5, 0.5\)"),
    ],
)
def test_a_tag_that_does_not_suit_the_backbone_is_refused(name, tag, message):
    with pytest.raises(ValueError, match=message):
        download(name, tag)
