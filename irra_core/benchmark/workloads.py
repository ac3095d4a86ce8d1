"""The works that users wait for → `Row`s: seconds, rates and memory, ours and the released code's, with targets."""

import contextlib
import datetime
import functools
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from irra_core.annotations import photo_table
from irra_core.backbone import build_model
from irra_core.batches import Batch, Batches
from irra_core.evaluation import encode_images, evaluate
from irra_core.images import forget, image_array, open_annotations, open_photo
from irra_core.metrics import query_metrics_from_features, retrieval_metrics
from irra_core.model import IRRA
from irra_core.objective import Objective, autocast, computes_bf16, loss_parts, step_precision
from irra_core.recipes import Recipe, recipe
from irra_core.released import clone as released
from irra_core.scale.machine import forget_peak, peak_memory
from irra_core.settings import cache_root, cores, smoke
from irra_core.synthetic.people import VIEWS, make_synthetic
from irra_core.text import tokenize
from irra_core.training import build_optimiser, optimise

EQUAL_LOSSES = 1e-3  # relative difference allowed between both codes on one batch, in single precision
EQUAL_SCORES = 1e-4  # difference allowed, in percentage points
GALLERY = {"queries": 6_156, "gallery": 3_074, "people": 1_000}  # CUHK-PEDES's test split
PHOTOS_PER_PERSON = 20  # of the large galleries; ICFG-PEDES has 19,848 test photos of 1,000 people
CUHK_TRAIN = {"photos": 34_054, "captions": 68_126, "people": 11_003}
FEATURE_WIDTH = 512  # ViT-B/16's
LIMIT_SIZES = {"cpu": (1_536, 2**28), "cuda": (8_192, 2**30)}  # side of the square matrices, bytes copied
DENSE_BF16 = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s by their data sheets
NO_BF16 = "this device has no instructions for bf16"
GIB = 2**30
IMPORT = "import time; t = time.perf_counter(); import irra_core; print(time.perf_counter() - t)"
READY = "import torch; import irra_core as irra; irra.train, irra.build_model, irra.Gallery"


class Target(NamedTuple):
    """The value that a row's `ratio` to the other code, or `ours` itself, should at least (≥) or at most (≤) have."""

    of: str
    sign: str
    value: float

    def met(self, value: int | float) -> bool:
        """True if the value reaches the target."""
        return value >= self.value if self.sign == "≥" else value <= self.value


@dataclass(kw_only=True)
class Row:
    """One measured quantity: every repeat of ours and, where it was measured, of the other code; and its target.

    With a unit that ends in "/s" larger is better, with all others smaller. `reached` is the FLOP/s or bytes/s of our
    median, to be compared with the machine's measured `limit` of that name.
    """

    work: str
    what: str
    unit: str
    ours: list[float] | None = None
    other: list[float] | None = None
    other_name: str = "released code"
    target: Target | None = None
    limit: str | None = None
    reached: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times better our median is than the other code's; None if either was not measured."""
        if not self.ours or not self.other:
            return None
        ours, other = median(self.ours), median(self.other)
        return ours / other if self.unit.endswith("/s") else other / ours

    def to_dict(self, limits: Mapping[str, float]) -> dict[str, Any]:
        """The row as the JSON holds it, with the machine's load and the time of the measurement."""
        value = self.ratio if self.target and self.target.of == "ratio" else median(self.ours) if self.ours else None
        judged = self.target is not None and value is not None and not smoke()
        return {
            "work": self.work,
            "what": self.what,
            "unit": self.unit,
            "ours": _summary(self.ours),
            "other": _summary(self.other),
            "other_name": self.other_name,
            "ratio": self.ratio,
            "target": self.target._asdict() if self.target else None,
            "met": self.target.met(value) if judged else None,
            "limit": self.limit,
            "share_of_limit": self.reached / limits[self.limit] if self.reached and self.limit else None,
            "note": self.note,
            "load": round(psutil.getloadavg()[0], 2),
            "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def _summary(values: list[float] | None) -> dict[str, Any] | None:
    """Minimum, median, maximum and all of the values; None if there are none."""
    return {"min": min(values), "median": median(values), "max": max(values), "all": values} if values else None


@dataclass
class Bench:
    """What all works share: device, number of repeats, the released code if given, the rendered data set.

    `sizes` replaces sizes of works by name, for tests.
    """

    device: torch.device
    repeats: int
    code: released.Code | None = None
    root: str | Path | None = None
    sizes: dict[str, int] = field(default_factory=dict)

    @functools.cached_property
    def annotations(self) -> DataFrame:
        """The synthetic data set, rendered if it is not there yet."""
        return open_annotations(recipe("synthetic"), self.root)

    def size(self, name: str, full: int, shrunk: int) -> int:
        """A size of a work: the one that the targets are for, or with IRRA_SMOKE=1 the shrunken one."""
        return self.sizes.get(name, shrunk if smoke() else full)


def measure_limits(device: torch.device) -> dict[str, float]:
    """FLOP/s of a large matrix product per precision, and bytes/s read and written by a copy; the best of ten each."""
    side, size = LIMIT_SIZES[device.type] if not smoke() else (256, 2**20)
    found = {}
    for name in precisions(device):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        with autocast(device, name):  # by the library that a model's linear maps are computed with
            seconds = interleave({"product": lambda a=left, b=right: F.linear(a, b)}, 10, device)["product"]
        found[name] = 2 * side**3 / min(seconds)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = interleave({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    return found | {"memory": 2 * size / min(seconds)}


def precisions(device: torch.device) -> tuple[str, ...]:
    """The precisions in which a step is timed: bf16 only where the device has instructions for it."""
    return ("bf16", "fp32") if computes_bf16(device) else ("fp32",)


def interleave(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Seconds of each call, called in turns: one warm-up round, then `repeats` rounds.

    In turns, so that other load on the machine slows all calls alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            spent = seconds_of(call, device)
            if turn:
                seconds[name].append(spent)
    return seconds


def seconds_of(call: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds that a call takes, the work that it starts on a GPU included."""
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device | None) -> None:
    """Synchronise a GPU; nothing for a CPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def small_step(bench: Bench) -> list[Row]:
    """Rows of a training step of the synthetic recipe."""
    chosen = recipe("synthetic", pretrained="none", batch_size=bench.size("batch", 64, 4))
    own = step_precision(chosen.precision, bench.device)
    return _step_rows(bench, "step", chosen, 500, {own: Target("ratio", "≥", 8)})


def paper_step(bench: Bench) -> list[Row]:
    """Rows of a training step of the paper's model in small batches; with IRRA_SMOKE=1 of the small CLIP."""
    size = {"backbone": "small"} if smoke() else {}
    chosen = recipe("cuhk", pretrained="none", batch_size=bench.size("paper batch", 8, 2), **size)
    people = bench.size("people", CUHK_TRAIN["people"], 24)
    return _step_rows(
        bench, "paper-step", chosen, people, {"fp32": Target("ratio", "≥", 1.4), "bf16": Target("ratio", "≥", 4.5)}
    )


def _step_rows(bench: Bench, work: str, chosen: Recipe, people: int, targets: Mapping[str, Target]) -> list[Row]:
    """One row per precision: our step as users run it, in turns with the released step on the same batch and weights.

    A precision that the device has no instructions for is not measured.
    """
    batch = _batch(bench, chosen)
    model = build_model(chosen, people, device=bench.device).train()
    optimiser = build_optimiser(model, chosen)
    objectives = {precision: Objective(model, chosen, precision) for precision in precisions(bench.device)}
    calls = {name: lambda o=objective: optimise(o, optimiser, batch) for name, objective in objectives.items()}
    if bench.code:
        theirs = released.build(bench.code, model, chosen, bench.device).train()
        their_batch = released.batch_of(batch)
        _check_same_losses(model, batch, chosen, released.losses(theirs, their_batch))
        their_optimiser = released.build_optimiser(bench.code, theirs, chosen)
        calls["released"] = lambda: released.step(theirs, their_optimiser, their_batch)
    seconds = interleave(calls, bench.repeats, bench.device)
    with counting() as counted:
        optimise(objectives["fp32"], optimiser, batch)
    shape = f"{chosen.backbone} {chosen.image_height}×{chosen.image_width}, batch {chosen.batch_size}"
    own = step_precision(chosen.precision, bench.device)
    return [
        Row(
            work=work,
            what=f"training step, {shape}, {precision}{', what the recipe takes here' if precision == own else ''}",
            unit="s",
            ours=seconds.get(precision),
            other=seconds.get("released"),
            target=targets.get(precision),
            limit=precision,
            reached=counted.get_total_flops() / median(seconds[precision]) if precision in seconds else None,
            note="" if precision in seconds else NO_BF16,
        )
        for precision in ("bf16", "fp32")
    ]


def _batch(bench: Bench, chosen: Recipe) -> Batch:
    """One batch of the recipe: captions of the rendered people, and noise as photos, which costs the same."""
    return noise_batches(bench, chosen, chosen.batch_size).at(0)


def counting() -> FlopCounterMode:
    """A counter of the FLOPs of matrix products, convolutions and attention, oneDNN's private operator included."""
    ours = {torch.ops.mkldnn._linear_pointwise: _linear_flops} if hasattr(torch.ops.mkldnn, "_linear_pointwise") else {}
    return FlopCounterMode(display=False, custom_mapping=ours)


def _linear_flops(tokens: Sequence[int], weight: Sequence[int], *rest: Any, **named: Any) -> int:
    """Multiplications and additions of a linear map, computed from its shapes."""
    return 2 * math.prod(tokens) * weight[0]


def noise_batches(bench: Bench, chosen: Recipe, captions: int, photos: int | None = None) -> Batches:
    """Batches of that many train captions, drawn from the rendered people's, and noise photos on the device."""
    train = bench.annotations.query("split == 'train'")
    train = train.sample(captions, replace=captions > len(train), random_state=0).reset_index(drop=True)
    train = train.assign(image_id=np.arange(captions) % (photos or captions))
    shape = (photos or captions, 3, chosen.image_height, chosen.image_width)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=bench.device)
    return Batches(train, pixels, tokenize(train.caption.tolist(), length=chosen.text_length), chosen, bench.device)


def _check_same_losses(model: IRRA, batch: Batch, chosen: Recipe, theirs: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError unless both codes' losses agree; meanwhile our model attends to padding, as released."""
    attends, model.padding_attention = model.padding_attention, True
    with torch.no_grad():
        ours = loss_parts(model, batch, chosen, "fp32")
    model.padding_attention = attends
    allowed = 0.05 if batch.pids.device.type == "cuda" else EQUAL_LOSSES  # on a GPU the released code computes in fp16
    for name, value in ours.items():
        other = theirs[f"{name}_loss"].item()
        if abs(value.item() - other) > allowed * abs(other):
            raise RuntimeError(
                f"not the same work: loss {name} is {value.item():.6g} here, {other:.6g} in the released code"
            )


def ranking(bench: Bench) -> list[Row]:
    """The row of scores from a similarity matrix as large as CUHK-PEDES's test split, beside the released rank()."""
    sizes = [bench.size(name, full, full // 100) for name, full in GALLERY.items()]
    query, gallery, query_pids, gallery_pids = _planted(*sizes)
    similarity = (query @ gallery.T).to(bench.device)
    calls = {"ours": lambda: retrieval_metrics(similarity, query_pids, gallery_pids)}
    note = ""
    if bench.code:
        calls["released"] = lambda: released.rank(bench.code, similarity, query_pids, gallery_pids)
        ours, theirs = calls["ours"](), calls["released"]()
        largest = max(abs(ours[name] - theirs[name]) for name in ours)
        if largest > EQUAL_SCORES:
            raise RuntimeError(f"not the same work: scores {ours} here, {theirs} in the released code")
        note = f"scores differ by at most {largest:.1e} per cent"
    seconds = interleave(calls, bench.repeats, bench.device)
    return [
        Row(
            work="rank",
            what=f"retrieval_metrics, {sizes[0]:,} × {sizes[1]:,}",
            unit="s",
            ours=seconds["ours"],
            other=seconds.get("released"),
            target=Target("ratio", "≥", 2),
            limit="memory",
            reached=similarity.nbytes / median(seconds["ours"]),
            note=note,
        )
    ]


def _planted(
    queries: int, gallery: int, people: int, width: int = FEATURE_WIDTH
) -> tuple[Float[Tensor, "q d"], Float[Tensor, "g d"], Int[Tensor, " q"], Int[Tensor, " g"]]:
    """L2-normalised query and gallery features that often but not always find their identity, and the identities."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(people, width, generator=generator)
    found, pids = [], []
    for count in (queries, gallery):
        pids.append(torch.arange(count) % people)
        features = torch.randn(count, width, generator=generator).mul_(3)
        for start in range(0, count, 4096):  # in pieces, so that no temporary adds to the peak memory
            features[start : start + 4096] += centres[pids[-1][start : start + 4096]]
        found.append(F.normalize(features, dim=1, out=features))
    return *found, *pids


def large_ranking(bench: Bench) -> list[Row]:
    """Rows of scores from features, as many as ICFG-PEDES's test split has: time and memory."""
    count = bench.size("features", 19_848, 400)
    return _ranking_rows(bench, "rank-19848", count, bench.repeats, Target("ours", "≤", 10), 1)


def larger_ranking(bench: Bench) -> list[Row]:
    """Rows of scores from features of 100,000 photos and 100,000 captions, measured once: it takes minutes."""
    return _ranking_rows(bench, "rank-100000", bench.size("many features", 100_000, 800), 1, None, 2)


def _ranking_rows(bench: Bench, work: str, count: int, repeats: int, target: Target | None, most_gib: int) -> list[Row]:
    """Seconds, and peak memory above the features, of ranking count × count; each repeat in its own process."""
    source = "import sys; from irra_core.benchmark import workloads; "
    source += "print(workloads.ranking_cost(*map(int, sys.argv[1:])))"
    found = []
    for _ in range(repeats):
        said = _in_child(source, str(count), str(torch.get_num_threads()))
        found.append([float(number) for number in said.strip("()\n").split(",")])
    seconds, memory = ([row[place] for row in found] for place in (0, 1))
    what = f"scores from features, {count:,} × {count:,}"
    reached = 2 * count**2 * FEATURE_WIDTH / median(seconds)
    return [
        Row(work=work, what=what, unit="s", ours=seconds, target=target, limit="fp32", reached=reached),
        Row(
            work=work,
            what=f"{what}: memory above the features",
            unit="GiB",
            ours=memory,
            target=Target("ours", "≤", most_gib),
        ),
    ]


def ranking_cost(count: int, threads: int) -> tuple[float, float]:
    """Seconds, and peak GiB above the features, of ranking count × count features; to be run in its own process."""
    torch.set_num_threads(threads)
    query_metrics_from_features(*_planted(64, 64, 8))  # warm-up: what torch allocates on first use is not counted
    features = _planted(count, count, max(count // PHOTOS_PER_PERSON, 2))
    before = _forget_peak()
    seconds = seconds_of(lambda: query_metrics_from_features(*features))
    return seconds, (_memory("VmHWM") - before) / GIB


def _forget_peak() -> int:
    """Reset this process's peak memory; the bytes that it holds now."""
    forget_peak()
    return _memory("VmRSS")


def _memory(name: str) -> int:
    """Bytes of one of Linux's memory figures of this process; on other systems the peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory()
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _in_child(source: str, *arguments: str) -> str:
    """The output of a source in a new Python process. Raises RuntimeError with its last line of errors if it fails."""
    ended = subprocess.run([sys.executable, "-c", source, *arguments], capture_output=True, encoding="utf-8")
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(f"a measuring process ended with {ended.returncode} and said {last!r}: is memory short?")
    return ended.stdout


def evaluation(bench: Bench) -> list[Row]:
    """Rows of an evaluation on the synthetic test split, in both directions, beside the released code's."""
    chosen, annotations = recipe("synthetic", pretrained="none"), bench.annotations
    pixels = image_array(list(photo_table(annotations).path), chosen.image_height, chosen.image_width).pixels
    model = build_model(chosen, 500, device=bench.device)
    inside, outside, scores = {}, [], {}

    def ours() -> None:
        inside.clear()
        began = time.perf_counter()
        with clock(model, "encode_image", "encoders", inside), clock(model, "encode_text", "encoders", inside):
            scores["ours"] = evaluate(model, annotations, pixels=pixels).metrics["text_to_image"]["R1"][0]
        outside.append(100 * (1 - inside["encoders"] / (time.perf_counter() - began)))

    calls: dict[str, Callable[[], Any]] = {"ours": ours}
    if bench.code:
        theirs = released.build(bench.code, model, chosen, bench.device)
        calls["released"] = lambda: scores.update(released=released.evaluate(bench.code, theirs, annotations, chosen))
    seconds = interleave(calls, bench.repeats, bench.device)
    with counting() as counted:
        ours()
    reached = counted.get_total_flops() / median(seconds["ours"])
    captions = int((annotations.split == "test").sum())
    note = f"R@1 {scores['ours']:.2f} here, {scores['released']:.2f} there" if bench.code else ""
    share = Row(work="evaluation", what="evaluation: what is not its encoders", unit="% of the time")
    share.ours, share.target = outside[1 : bench.repeats + 1], Target("ours", "≤", 5)
    whole = Row(work="evaluation", what=f"evaluation, {captions:,} captions", unit="s", note=note, ours=seconds["ours"])
    whole.other, whole.limit, whole.reached = seconds.get("released"), "fp32", reached
    return [whole, share]


@contextlib.contextmanager
def clock(owner: Any, name: str, part: str, spent: dict[str, float], device=None) -> Iterator[None]:
    """Within, the seconds of each call of owner.name are added to spent[part]."""
    inner = getattr(owner, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        _wait(device)
        began = time.perf_counter()
        try:
            return inner(*arguments, **named)
        finally:
            _wait(device)
            spent[part] = spent.get(part, 0.0) + time.perf_counter() - began

    setattr(owner, name, timed)
    try:
        yield
    finally:
        delattr(owner, name)


def decoding(bench: Bench) -> list[Row]:
    """Rows of decoding photos into the cache, beside Pillow alone, and of opening the cached array again.

    Real photos have many sizes. The rendered ones have one, at which nothing is resized.
    """
    rendered = list(photo_table(bench.annotations).path)[:3_200]
    with tempfile.TemporaryDirectory() as folder:
        copies = _photos_of_many_sizes(rendered, Path(folder))
        return [
            *_decoding_rows(bench, copies, "photos of many sizes", 384, 128),
            *_decoding_rows(bench, rendered, "photos of that size", 192, 64),
            *_decoding_rows(bench, rendered, "photos", 96, 32),
        ]


def _photos_of_many_sizes(files: list[str], folder: Path) -> list[str]:
    """Paths of resized copies: 80 to 220 pixels wide and 2.2 to 3.3 times as tall, as detected people are."""
    generator, copies = np.random.default_rng(0), []
    for place, file in enumerate(files):
        width = generator.integers(80, 221)
        size = (int(width), int(width * generator.uniform(2.2, 3.3)))
        copies.append(str(folder / f"{place}.jpg"))
        open_photo(file).resize(size, Image.Resampling.LANCZOS).save(copies[-1], quality=90)
    return copies


def _decoding_rows(bench: Bench, files: list[str], kind: str, height: int, width: int) -> list[Row]:
    """Both rows of one size; every repeat fills its own cache folder, on the disk of the user's cache."""
    spent, later = [], []
    cache_root().mkdir(parents=True, exist_ok=True)

    def ours() -> None:
        with tempfile.TemporaryDirectory(dir=cache_root()) as folder, _environment(IRRA_CACHE=folder):
            spent.append(seconds_of(lambda: image_array(files, height, width)))
            forget()  # the next call looks at the files again, as another process does
            later.append(seconds_of(lambda: image_array(files, height, width)))

    pillow = interleave({"ours": ours, "pillow": lambda: _pillow_alone(files, height, width)}, bench.repeats)["pillow"]
    rates = [[len(files) / value for value in values] for values in (spent[1:], pillow)]
    what = f"{len(files):,} {kind} at {height}×{width}"
    first = Row(work="decode", what=f"decode and cache {what}", unit="photos/s")
    first.ours, first.other, first.other_name, first.target = *rates, "Pillow alone", Target("ratio", "≥", 0.8)
    again = Row(work="decode", what=f"find again {what}", unit="s", target=Target("ours", "≤", 1))
    again.ours = later[1:]
    return [first, again]


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables within, and restore them afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _pillow_alone(files: list[str], height: int, width: int) -> None:
    """Decode and resize each file by Pillow on all cores, and discard it."""

    def some(part: list[str]) -> None:
        for file in part:
            with Image.open(file) as image:
                image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(some, [files[start :: cores()] for start in range(cores())]))


def loading(bench: Bench) -> list[Row]:
    """Rows of the rate of training batches, beside the released loader, and of their share of a training step."""
    chosen, annotations = recipe("synthetic", pretrained="none"), bench.annotations
    chosen = chosen.replace(batch_size=bench.size("batch", 64, 4))
    pixels = image_array(list(photo_table(annotations).path), chosen.image_height, chosen.image_width).pixels
    train = annotations[annotations.split == "train"].reset_index(drop=True)
    batches = Batches(train, pixels, tokenize(train.caption.tolist(), length=chosen.text_length), chosen, bench.device)
    count = bench.size("batches", 20, 3)
    model = build_model(chosen, len(batches.classes), device=bench.device).train()
    optimiser = build_optimiser(model, chosen)
    objective = Objective(model, chosen, step_precision(chosen.precision, bench.device))
    calls: dict[str, Callable[[], Any]] = {
        "data": lambda: [batches.at(step) for step in range(count)],
        "step": lambda: optimise(objective, optimiser, batches.at(0)),
    }
    with _environment(IRRA_ARRAY_GB="0"):
        files = image_array(list(photo_table(annotations).path), chosen.image_height, chosen.image_width).pixels
    streamed, steps = Batches(train, files, batches.tokens, chosen, bench.device), itertools.count()
    calls["streamed"] = lambda: [streamed.at(next(steps)) for _ in range(count)]
    their_rates: list[float] = []
    if bench.code:
        calls["released"] = lambda: their_rates.append(_loader_rate(bench, annotations, chosen, count))
    seconds = interleave(calls, bench.repeats, bench.device)
    rate, share = [], []
    background = [count * chosen.batch_size / value for value in seconds["streamed"]]
    for data, step in zip(seconds["data"], seconds["step"]):
        rate.append(count * chosen.batch_size / data)
        share.append(100 * data / count / step)
    what = f"training batches of {chosen.batch_size}"
    return [
        Row(work="loader", what=what, unit="photos/s", ours=rate, other=their_rates[1:] or None),
        Row(
            work="loader",
            what=f"{what}, photos decoded in the background (IRRA_ARRAY_GB)",
            unit="photos/s",
            ours=background,
            other=rate,
            other_name="the decoded array",
        ),
        Row(
            work="loader",
            what="a training step waits for its data",
            unit="% of the step",
            ours=share,
            target=Target("ours", "≤", 2),
        ),
    ]


def _loader_rate(bench: Bench, annotations: DataFrame, chosen: Recipe, count: int) -> float:
    """Photos per second of the released loader, without its start."""
    batches = iter(released.train_loader(bench.code, annotations, chosen))
    next(batches)
    began = time.perf_counter()
    photos = sum(len(batch["pids"]) for batch, _ in zip(batches, range(count)))
    return photos / (time.perf_counter() - began)


def rendering(bench: Bench) -> list[Row]:
    """The row of rendering people with their captions on one core, as the first run does on every core."""
    people = bench.size("rendered people", 24, 12)  # so few photos that no worker processes are started

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            make_synthetic(folder, people=people)

    rates = [len(VIEWS) * people / spent for spent in interleave({"ours": ours}, bench.repeats)["ours"]]
    row = Row(work="render", what="render people, 192×64, one core", unit="photos/s", target=Target("ours", "≥", 50))
    row.ours = rates
    return [row]


def starting(bench: Bench) -> list[Row]:
    """Rows of the time of the import alone, and of starting a notebook kernel that can train."""
    imports = [float(_in_child(IMPORT)) for _ in range(bench.repeats)]
    ready = None if smoke() else [_kernel_ready() for _ in range(bench.repeats)]  # ten seconds each
    return [
        Row(work="start", what="import irra_core", unit="s", ours=imports, target=Target("ours", "≤", 0.2)),
        Row(
            work="start",
            what="a fresh kernel that can train",
            unit="s",
            ours=ready,
            target=Target("ours", "≤", 12),
        ),
    ]


def _kernel_ready(source: str = READY) -> float:
    """Seconds from starting a notebook kernel until it has imported torch, the model and training."""
    from jupyter_client.manager import KernelManager

    manager = KernelManager()
    began = time.perf_counter()
    manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=120)
        reply = client.execute_interactive(
            source,
            timeout=120,
            output_hook=lambda message: None,
        )
        spent = time.perf_counter() - began
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    if reply["content"]["status"] != "ok":
        raise RuntimeError(f"the kernel could not import irra_core: {reply['content'].get('evalue')}")
    return spent


def gpu(bench: Bench) -> list[Row]:
    """Rows of training with CUHK-PEDES's sizes and of encoding its gallery on one GPU; not measured without a GPU."""
    train = Row(work="gpu", what="training, paper's recipe, CUHK-PEDES's sizes", unit="photos/s")
    peak = Row(work="gpu", what="its share of the dense bf16 peak", unit="%", target=Target("ours", "≥", 45))
    idle = Row(work="gpu", what="device idle meanwhile", unit="%", target=Target("ours", "≤", 2))
    whole = Row(work="gpu", what="60 epochs, extrapolated from one", unit="minutes", target=Target("ours", "≤", 20))
    encode = Row(work="gpu", what="encode gallery, 384×128", unit="photos/s", target=Target("ours", "≥", 12_000))
    rows = [train, peak, idle, whole, encode]
    if bench.device.type != "cuda" and not bench.sizes:
        return rows
    size = {"backbone": "small"} if smoke() or bench.sizes else {}
    chosen = recipe("cuhk", pretrained="none", batch_size=bench.size("batch", 64, 4), **size)
    captions, photos = (bench.size(name, CUHK_TRAIN[name], 24) for name in ("captions", "photos"))
    batches = noise_batches(bench, chosen, captions, photos)
    model = build_model(chosen, bench.size("people", CUHK_TRAIN["people"], 24), device=bench.device).train()
    optimiser, precision = build_optimiser(model, chosen), step_precision(chosen.precision, bench.device)
    objective = Objective(model, chosen, precision)

    def steps(count: int) -> None:
        for number in range(count):
            optimise(objective, optimiser, batches.at(number))

    with counting() as counted:
        steps(1)
    count = batches.steps_per_epoch
    seconds = seconds_of(lambda: steps(count), bench.device)
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else ""
    limit = next((rate for card, rate in DENSE_BF16.items() if card in name), None)
    peak.note = "" if limit else "of a measured matrix product, the data sheet not being known"
    limit = limit or measure_limits(bench.device)[precision]
    train.ours, whole.ours = [captions / seconds], [seconds]
    peak.ours = [100 * counted.get_total_flops() * count / seconds / limit]
    idle.ours = _idle(lambda: steps(min(count, 20)), bench.device)
    pixels = batches.pixels[: bench.size("encoded", 8_192, 16)].cpu().numpy()
    calls = {"encode": lambda: encode_images(model, pixels)}
    encode.ours = [len(pixels) / spent for spent in interleave(calls, bench.repeats, bench.device)["encode"]]
    return rows


def _idle(call: Callable[[], None], device: torch.device) -> list[float] | None:
    """Per cent of the time in which no kernel runs on the GPU; None without a GPU."""
    if device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        seconds = seconds_of(call, device)
    copies = ("Memcpy", "Memset")
    kernels = [e for e in profiled.events() if e.device_type == DeviceType.CUDA and not e.name.startswith(copies)]
    busy = covered((event.time_range.start, event.time_range.end) for event in kernels) / 1e6
    return [max(0.0, 100 * (1 - busy / seconds))]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Total length of the union of spans (start, end): overlaps count once."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


WORKS: dict[str, Callable[[Bench], list[Row]]] = {
    "step": small_step,
    "paper-step": paper_step,
    "rank": ranking,
    "rank-19848": large_ranking,
    "rank-100000": larger_ranking,
    "evaluation": evaluation,
    "decode": decoding,
    "loader": loading,
    "render": rendering,
    "start": starting,
    "gpu": gpu,
}
ON_REQUEST = ("rank-100000",)  # takes minutes: measured only if named
