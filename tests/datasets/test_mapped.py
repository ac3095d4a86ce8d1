"""The image array on the disk: damage is found at the first reading, by every kind of index, and never again."""

import errno
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_images import HEIGHT, WIDTH, cache, photos, resized, smooth

from irra_core.datasets import mapped as module
from irra_core.images import ImageArray, forget, image_array

__all__ = ["cache"]  # a fixture
crc32 = zlib.crc32


@pytest.fixture
def decoded(tmp_path) -> tuple[list[str], ImageArray, Path]:
    """Nine photos, their array, and its file."""
    paths = photos(tmp_path / "photos", 9)
    found = image_array(paths, HEIGHT, WIDTH)
    return paths, found, Path(found.pixels.filename)


def spoil(file: Path, every: int, start: int = 128) -> None:
    """Flip every so many bytes of an array's file, in its place, behind the header."""
    content = np.memmap(file, np.uint8, "r+")
    content[start::every] ^= 255
    content.flush()


def test_flipped_bytes_end_the_reading_with_an_error_and_are_decoded_again(decoded, cache):
    paths, found, file = decoded
    spoil(file, 7)
    with pytest.raises(
        OSError, match=rf"{file} is damaged: image 3 of 9 is not what was decoded; start again"
    ) as error:
        found.pixels[[3, 5]]
    assert error.value.errno == errno.EIO
    again = image_array(paths, HEIGHT, WIDTH)
    assert again.digest == found.digest
    assert np.array_equal(again.pixels[:], [resized(Image.open(path)) for path in paths])
    assert len(list(cache.glob("*.npy"))) == 1


def test_one_flipped_bit_is_found_before_the_array_is_opened_or_after(decoded):
    paths, found, file = decoded
    content = bytearray(file.read_bytes())
    content[found.pixels.offset + 4 * 3 * HEIGHT * WIDTH + 11] ^= 1
    file.write_bytes(content)
    forget()
    for pixels in (found.pixels, image_array(paths, HEIGHT, WIDTH).pixels):
        assert pixels[3].shape == (3, HEIGHT, WIDTH)  # beside the damage
        with pytest.raises(OSError, match="image 4 of 9"):
            pixels[4]


@pytest.mark.parametrize(
    "index",
    [
        4,
        -5,
        np.int64(4),
        [1, 4],
        np.array([8, 4, 4]),
        slice(2, 6),
        slice(None),
        slice(None, None, -1),
        (4, 0),
        (slice(3, 5), slice(None), 2),
        np.arange(9) == 4,
        ...,
        None,
        (..., 0),
        np.array([[1, 2], [3, 4]]),
    ],
    ids=str,
)
def test_every_kind_of_index_reads_what_an_array_in_memory_would_give_and_checks_it(decoded, index):
    _, found, file = decoded
    expected = np.array(found.pixels)
    assert np.array_equal(found.pixels[index], expected[index])
    found.pixels.unread[:] = True
    spoil(file, 10**6, found.pixels.offset + 4 * 3 * HEIGHT * WIDTH)  # one byte of image 4
    with pytest.raises(OSError, match="image 4 of 9"):
        found.pixels[index]


def test_an_index_beside_the_damage_and_iteration_up_to_it_read_on(decoded):
    _, found, file = decoded
    spoil(file, 10**6, found.pixels.offset + 4 * 3 * HEIGHT * WIDTH)
    assert found.pixels[[0, 8, 5]].shape == (3, 3, HEIGHT, WIDTH)
    assert found.pixels[-3:].shape == (3, 3, HEIGHT, WIDTH)
    seen = []
    with pytest.raises(OSError, match="image 4 of 9"):
        seen.extend(image[0, 0, 0] for image in found.pixels)


def test_each_image_is_checked_once(decoded, monkeypatch):
    _, found, _ = decoded
    checked = []
    monkeypatch.setattr(module.zlib, "crc32", lambda pixels: checked.append(1) or crc32(pixels))
    for _ in range(3):
        found.pixels[[2, 3]]
        found.pixels[3:5]
    assert len(checked) == 3
    for _ in range(3):
        found.pixels[:]
    assert len(checked) == 9


def test_many_images_are_checked_in_threads_with_the_same_result(decoded, monkeypatch):
    _, found, file = decoded
    monkeypatch.setattr(module, "ALONE", 0)
    spoil(file, 10**6, found.pixels.offset + 7 * 3 * HEIGHT * WIDTH)
    with pytest.raises(OSError, match="image 7 of 9"):
        found.pixels[:]


def test_a_file_cut_short_while_it_is_mapped_ends_with_an_error_and_not_with_the_process(decoded):
    paths, found, file = decoded
    part = found.pixels[2:9]
    found.pixels[:]
    size = file.stat().st_size
    os.truncate(file, 1000)
    for pixels in (found.pixels, part):
        with pytest.raises(OSError, match=rf"{file} is damaged: has 1,000 of its {size:,} bytes; start again"):
            pixels[:2]
    assert np.array_equal(image_array(paths, HEIGHT, WIDTH).pixels[8], resized(Image.open(paths[8])))


def test_a_photo_replaced_with_the_same_size_and_time_is_decoded_again(tmp_path):
    path = tmp_path / "photo.bmp"  # without compression: all have one size
    smooth(1).save(path)
    before = os.stat(path)
    assert np.array_equal(image_array([path], HEIGHT, WIDTH).pixels[0], resized(smooth(1)))
    smooth(2).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    forget()
    assert np.array_equal(image_array([path], HEIGHT, WIDTH).pixels[0], resized(smooth(2)))


def test_a_mapped_file_is_never_overwritten(decoded, cache):
    paths, found, file = decoded
    before = np.array(found.pixels)
    next(cache.glob("*.json")).unlink()  # so that the array is made again
    forget()
    again = image_array(paths, HEIGHT, WIDTH)
    assert Path(again.pixels.filename) != file
    assert np.array_equal(found.pixels[:], before)
    assert [Path(again.pixels.filename)] == list(cache.glob("*.npy"))


def test_the_list_of_an_array_says_which_file_below_the_cache_and_no_other(decoded, cache, tmp_path):
    """A list that names a file elsewhere is not followed."""
    paths, found, file = decoded
    about = next(cache.glob("*.json"))
    (tmp_path / "elsewhere.npy").write_bytes(file.read_bytes())
    about.write_text(about.read_text().replace(file.name, "../../elsewhere.npy"))
    forget()
    again = image_array(paths, HEIGHT, WIDTH)
    assert Path(again.pixels.filename).parent == cache
    assert again.digest == found.digest
