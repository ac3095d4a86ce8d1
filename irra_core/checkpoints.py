"""A model ↔ safetensors on disk."""

import errno
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from irra_core.backbone import (
    CHECKSUM,
    build_model,
    check_fit,
    check_weights,
    checksum,
    fill,
    give_constants,
    learned,
    patch_grid,
    read_weights,
)
from irra_core.model import IRRA
from irra_core.recipes import Recipe, patch_size, read_recipe
from irra_core.settings import WINDOWS, default_device, put_in_place

FORMAT = "irra-core checkpoint 1"


def save_checkpoint(model: IRRA, recipe: Recipe, path: str | Path, merge: bool = True) -> None:
    """Write the model's weights (see `weights_of`) and its recipe to a safetensors file, complete or not at all."""
    save_tensors(weights_of(model, merge), path, description(model, recipe))


def weights_of(model: IRRA, merge: bool = True) -> dict[str, Tensor]:
    """The model's state dict; with `merge` low-rank adapters are added to the matrices that they change."""
    from irra_core.variants.adapters import merged

    return merged(model) if merge else model.state_dict()


def description(model: IRRA, recipe: Recipe) -> dict[str, str]:
    """The metadata of a checkpoint: how to build its model."""
    num_ids = model.classifier.out_features if model.classifier is not None else 0
    return {"format": FORMAT, "recipe": recipe.to_json(), "num_ids": str(num_ids)}


def load_checkpoint(
    path: str | Path, finite: bool = True, device: str | torch.device | None = None, read: Callable = read_weights
) -> tuple[IRRA, Recipe]:
    """The model that `save_checkpoint` wrote, and its recipe; what was frozen, is.

    `device` is by default the GPU if there is one. On a CPU the weights stay in the file, which may be replaced but not
    be written over while the model is used. On the device meta `read` may give tensors without numbers, as a header
    describes them. Raises ValueError for any other file, and unless `finite` is False for weights that are not finite.
    """
    from irra_core.variants.adapters import is_adapter

    tensors, metadata = read(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this library: read one of the released code's with load_official")
    try:
        recipe, num_ids = read_recipe(json.loads(metadata["recipe"])), int(metadata["num_ids"])
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not say what model it holds ({error}): read it with the version of this library that wrote it"
        ) from error
    tensors = learned(tensors)
    if device != "meta":
        check_weights(tensors, str(path), finite)
    _check_sizes(tensors, recipe, num_ids, path)
    rank = recipe.adapter_rank if any(is_adapter(name) for name in tensors) else 0
    plain = recipe.replace(pretrained="none", pretrained_towers="both", adapter_rank=rank)
    return filled(lambda: build_model(plain, num_ids, device="meta"), tensors, path, device=device), recipe


def _check_sizes(tensors: Mapping[str, Tensor], recipe: Recipe, num_ids: int, path: str | Path) -> None:
    """Raise ValueError where a checkpoint's metadata contradicts the sizes of its tensors."""
    names = ("classifier.weight", "clip.visual.positional_embedding")
    classes, positions = (tensors[name].shape[0] if name in tensors and tensors[name].ndim else 0 for name in names)
    height, width, stride = recipe.image_height, recipe.image_width, recipe.stride
    patches = math.prod(patch_grid((height, width), patch_size(recipe.backbone), stride))
    made = f"image_height {height}, image_width {width} and stride {stride} make {patches} patches"
    depth = recipe.interaction_depth if "mlm" in recipe.loss_names else 0
    contradictions = {
        f"num_ids is {num_ids}, but its {names[0]} has {classes} rows": num_ids != classes,
        f"{made}, but its {names[1]} has rows for {positions - 1}": patches != positions - 1,
        f"interaction_depth is {depth}, but it holds {len(tensors)} tensors in all": depth > len(tensors),
    }
    if any(contradictions.values()):
        listed = "; ".join(claim for claim, holds in contradictions.items() if holds)
        raise ValueError(f"{path}: its metadata says {listed}. Copy it again, or write it again with save_checkpoint")


def filled(
    build: Callable[[], IRRA],
    tensors: Mapping[str, Tensor],
    path: str | Path,
    named: Callable[[str], str] = str,
    device: str | torch.device | None = None,
) -> IRRA:
    """The model that `build` makes, with a file's tensors as its weights; by default on the GPU if there is one.

    It is built on the meta device, without memory, and compared with the file before any memory is allocated. `named`
    maps our name of a parameter to the file's. Raises ValueError naming each tensor that does not fit.
    """
    try:
        with torch.device("meta"), _NothingDrawn():
            model = build()
    except (ValueError, RuntimeError) as error:  # RuntimeError: a size beyond what torch can count
        raise ValueError(f"{path}: {error}") from error
    wanted = learned(model.state_dict())
    check_fit({named(name): value for name, value in wanted.items()}, tensors, str(path))
    # On a CPU they stay in their file, whose memory processes share; on Windows such a file could not be replaced.
    weights = {name: tensors[named(name)].to(torch.float32, copy=WINDOWS) for name in wanted}
    model.load_state_dict(weights, strict=False, assign=True)
    give_constants(model.clip)
    return model.to(device or default_device())


class _NothingDrawn(TorchFunctionMode):
    """Leaves out initial values, drawn and scaled: on meta, torch would load its compiler for them (3 s, 80 MB)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("normal_", "uniform_", "mul", "__mul__", "__rmul__"):
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if function is torch.randn else function)(*args, **(kwargs or {}))


def open_checkpoint(
    path: str | Path, image_size: Sequence[int | None] = (None, None), stride: int | None = None
) -> tuple[IRRA, Recipe | None]:
    """The model of a checkpoint of either kind: ours with its recipe, or a released `.pth`, which has none.

    `path` may also be what `load_model` accepts, such as `latest`. Image size and stride are for a released file only
    (None: 384×128 and 16); ours has its own.
    """
    suffix = Path(path).suffix
    if suffix == ".safetensors" or not (suffix == ".pth" or Path(path).is_file()):
        if stride is not None or any(image_size):
            raise ValueError(
                f"{path} knows its image size and stride: leave them out, they are for released .pth files"
            )
        from irra_core.hub.sources import load_model

        return load_model(path)
    from irra_core.released.checkpoint import load_official

    height, width = image_size
    return load_official(path, (height or 384, width or 128), stride or 16), None


def load_weights(model: IRRA, path: str | Path) -> None:
    """Fill a model with the weights of its checkpoint. Raises ValueError naming each tensor that does not fit."""
    tensors = learned(read_weights(path)[0])
    check_weights(tensors, str(path))
    fill(learned(model.state_dict()), tensors, str(path))


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    keep: str | Path | None = None,
) -> None:
    """Write named tensors to a safetensors file with their checksum, complete or not at all.

    With `keep` the file that was there before is renamed to it once the new one is on the disk.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}  # read from a GPU once
    metadata = dict(metadata or {})
    metadata[CHECKSUM] = checksum(tensors, metadata)
    with replaced(path) as aside:
        save_file(tensors, aside, metadata)
        _sort_metadata(aside)
        if keep is not None and Path(path).exists():
            flush(aside)
            put_in_place(Path(path), Path(keep))


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, so that equal content has equal bytes: its writer's order is random."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(text.ljust(size))  # as many bytes as before; the format pads with spaces


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write into; renamed to `path` once complete, deleted when anything fails.

    It gets the permissions of any new file in that folder: safetensors would let nobody else read it.
    Raises OSError, naming `path`, where the folder is full or cannot be written to.
    """
    path = Path(path)
    token = f"{os.getpid()}-{secrets.token_hex(4)}"  # machines share process numbers
    aside = path.with_name(f".{path.name[:40]}.{token}.part")  # a system's names are short
    try:
        aside.touch()
        mode = aside.stat().st_mode
        yield aside
        aside.chmod(mode)
        flush(aside)
        put_in_place(aside, path)
    except (OSError, SafetensorError) as error:
        told = re.search(r"os error (\d+)", str(error))  # how safetensors reports the system's error
        number = int(told[1]) if told else getattr(error, "errno", None) or errno.EIO
        before = "what was there before is intact" if path.exists() else "nothing was there before"
        reason = getattr(error, "strerror", None) or str(error)
        remedy = f"{'close whatever has it open, or ' * WINDOWS}make room or grant access in {path.parent}"
        raise OSError(number, f"{path} cannot be written ({reason}): {remedy}; {before}") from error
    finally:
        with suppress(OSError):  # of a read-only disk
            aside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file's bytes are on the disk: without it a rename may be on the disk before them."""
    with path.open("r+b") as file:  # Windows flushes only a file that is open for writing
        os.fsync(file.fileno())
