"""Table + array + seed + step → the batch of that step (so a run can resume at any step)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from pandas import DataFrame
from torch import Tensor

from irra_core.augmentation import coordinates, draw_augmentation, moved, moved_together, rearranged
from irra_core.recipes import Recipe
from irra_core.text import mask_tokens, trim

PLACES = ("at", "wanted", "words")  # what masked_places gives, as fields of a batch
ORDER, MASKS, AUGMENTATION, WORDS = range(4)  # what is drawn: each has random numbers of its own


class Team(NamedTuple):
    """Which of how many processes this is; alone, nothing is sent anywhere."""

    process: int = 0
    processes: int = 1

    @property
    def leads(self) -> bool:
        """True in the one process that writes files and shows progress."""
        return self.process == 0

    def part(self, count: int) -> slice:
        """This process's share of so many rows: the shares, in order, are all rows and differ by at most one."""
        return slice(count * self.process // self.processes, count * (self.process + 1) // self.processes)

    def gathered(self, rows: Float[Tensor, "mine ..."], count: int) -> Float[Tensor, "all ..."]:
        """All `count` rows, of which each process gives its part; the gradient finds its way back to each part.

        Every process must compute the same loss of the gathered rows: the gradient of a part is then that of the sum
        of all processes' losses, which DistributedDataParallel divides by their number again.
        """
        if self.processes == 1:
            return rows
        from irra_core.scale.gathering import Gathered

        return Gathered.apply(rows, self, count)

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.processes > 1:
            torch.distributed.barrier()


ALONE = Team()


def member(process: int, processes: int) -> Team:
    """The team of so many processes as that one sees it. Raises ValueError where there is no such one."""
    if not 0 <= process < processes:
        raise ValueError(f"process is {process} of {processes}: accepted is 0 to the number of processes - 1")
    return Team(process, processes)


@dataclass(frozen=True)
class Batch:
    """The pairs of one step, on the device, or one process's part of them.

    `images` are augmented and normalised. `tokens` are the captions, `masked_tokens` the same with words masked and
    `labels` the ids of the words to predict, 0 elsewhere. `pids` count the identities from 0, as `Batches.classes`
    lists them; `rows` are places in the train table. `all_pids` and `word_count`, the number of words to predict, are
    those of the whole batch, over which the losses are taken. `at`, `wanted` and `words` say which words to predict
    (see masked_places) and `words_each`, on the host, how many each row has, so that no step waits for the device.
    `elapsed` is the share of the training's epochs that is done before this step.
    """

    images: Float[Tensor, "b 3 h w"]
    tokens: Int[Tensor, "b length"]
    masked_tokens: Int[Tensor, "b masked_length"]
    labels: Int[Tensor, "b masked_length"]
    pids: Int[Tensor, " b"]
    rows: Int[Tensor, " b"]
    all_pids: Int[Tensor, " whole"]
    word_count: Int[Tensor, ""]
    at: Int[Tensor, "b most"] | None = None
    wanted: Int[Tensor, " masked"] | None = None
    words: Int[Tensor, " masked"] | None = None
    words_each: tuple[int, ...] | None = None
    elapsed: float = 1.0

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What the model takes, in its order."""
        places = None if self.at is None else (self.at, self.wanted, self.words)
        return self.images, self.tokens, self.masked_tokens, self.labels, places, self.elapsed


def masked_places(
    labels: Int[Tensor, "b length"],
) -> tuple[Int[Tensor, "b most"], Int[Tensor, " masked"], Int[Tensor, " masked"]]:
    """Each row's masked positions, padded to the most in a row; which of all these are real; the words of those."""
    masked = labels != 0
    counts = masked.sum(1)
    most = max([1, *counts.tolist()])  # a process may have no pairs in an epoch's last batch
    at = masked.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # a row's masked positions come first
    real = torch.arange(most, device=labels.device) < counts[:, None]
    return at, real.flatten().nonzero()[:, 0], labels[masked]


def steps_per_epoch(pids: Int[Tensor, " rows"], recipe: Recipe) -> int:
    """Batches in which every caption comes once (see variants.balanced for `identity`); the last may be short."""
    rows = len(pids)
    if recipe.sampler == "identity":
        from irra_core.variants.balanced import balanced_length

        rows = balanced_length(pids, recipe.per_identity)
    return -(-rows // recipe.batch_size)


class Batches:
    """The batches of a run: `at(step)` depends on nothing but the arguments given here and the step.

    `train` has one row per caption and `tokens` its token ids, row by row; `pixels` are the decoded images of the whole
    data set, by `image_id`, in memory, memory-mapped, or already on the device. `classes` are the sorted pids.
    """

    def __init__(
        self,
        train: DataFrame,
        pixels: UInt8[Any, "n 3 h w"],
        tokens: Int[Tensor, "captions length"],
        recipe: Recipe,
        device: str | torch.device = "cpu",
    ):
        self.pixels, self.tokens, self.recipe, self.device = pixels, tokens, recipe, torch.device(device)
        self.classes, classes = np.unique(train.pid.to_numpy(), return_inverse=True)
        self.pids = torch.from_numpy(classes)
        self.images = torch.from_numpy(train.image_id.to_numpy(dtype=np.int64, copy=True))
        self._check()
        self.steps_per_epoch = steps_per_epoch(self.pids, recipe)
        self._shuffled = (-1, self.images)  # the last epoch asked for and its order

    def _check(self) -> None:
        """Raise ValueError unless table, images, tokens and recipe belong together."""
        rows, height, width = len(self.images), self.recipe.image_height, self.recipe.image_width
        if not rows:
            raise ValueError("the train split has no rows: there is nothing to learn from")
        if len(self.tokens) != rows:
            raise ValueError(f"tokens has {len(self.tokens)} rows, the table {rows}: tokenise the table's captions")
        if not 0 <= int(self.images.min()) <= int(self.images.max()) < len(self.pixels):
            raise ValueError(
                f"the table's image_id reaches from {int(self.images.min())} to {int(self.images.max())}, pixels holds "
                f"{len(self.pixels)} images: give the image array of the whole data set"
            )
        if tuple(self.pixels.shape[2:]) != (height, width):
            found = "×".join(map(str, self.pixels.shape[2:]))
            raise ValueError(f"pixels are {found}, the recipe says {height}×{width}: decode them in the recipe's size")

    def at(self, step: int, process: int = 0, processes: int = 1) -> Batch:
        """The batch of a step, counted from 0 over all epochs, or the part of it that is one process's.

        The parts, in the order of the processes, are the whole batch; they differ by at most one row, so those of a
        batch with fewer rows than processes may be empty.
        """
        if step < 0:
            raise ValueError(f"step is {step}: steps count from 0")
        team = member(process, processes)
        recipe, rows = self.recipe, self._rows(step)
        tokens, masked, labels = self._captions(rows, step)
        augmentation = draw_augmentation(len(rows), recipe, self._generator(AUGMENTATION, step))
        part, asked = team.part(len(rows)), (labels != 0).sum(1)
        whole, rows = rows, rows[part]
        if follow := getattr(self.pixels, "follow", None):  # photos that are decoded in the background
            follow(step, self._photos_of, team)
        known = {"tokens": tokens[part], "masked_tokens": masked[part], "labels": labels[part]}
        known |= {"pids": self.pids[rows], "rows": rows, "all_pids": self.pids[whole], "word_count": asked.sum()}
        known |= dict(zip(PLACES, masked_places(labels[part]), strict=True))
        drawn = coordinates(augmentation.part(part), recipe)
        sent = moved_together([*known.values(), self.images[rows], *drawn], self.device)
        images, places = sent[len(known)], sent[len(known) + 1 :]
        return Batch(
            images=rearranged(self._pixels(self.images[rows], images), *places, recipe),
            **dict(zip(known, sent)),
            words_each=tuple(asked[part].tolist()),
            elapsed=step / (self.steps_per_epoch * recipe.epochs),
        )

    def _photos_of(self, step: int, team: Team) -> Int[Tensor, " mine"]:
        """The photos of this process's part of a step."""
        rows = self._rows(step)
        return self.images[rows[team.part(len(rows))]]

    def _captions(
        self, rows: Int[Tensor, " b"], step: int
    ) -> tuple[Int[Tensor, "b length"], Int[Tensor, "b masked_length"], Int[Tensor, "b masked_length"]]:
        """Captions, masked captions and labels, cut to the longest caption of the whole batch (see text.trim).

        With `padding_attention` the masked captions keep their padding, which the interaction encoder then sees.
        Augmented words are in the captions alone: MLM masks and predicts the words as they were written.
        """
        recipe, tokens = self.recipe, self.tokens[rows]
        masked, labels = mask_tokens(tokens, self._generator(MASKS, step), recipe.mask_probability)
        captions = masked if recipe.mask_captions else tokens
        if recipe.word_augmentation or recipe.word_deletion:
            from irra_core.variants.word_augmentation import augment_words

            words = self._generator(WORDS, step)
            captions = augment_words(captions, words, recipe.word_augmentation, recipe.word_deletion)
        _, captions, short_masked, short_labels = trim(tokens, captions, masked, labels, device=self.device)
        return (captions, masked, labels) if recipe.padding_attention else (captions, short_masked, short_labels)

    def _pixels(self, images: Int[Tensor, " b"], sent: Int[Tensor, " b"]) -> UInt8[Tensor, "b 3 h w"]:
        """The decoded images, on the device; `sent` are the same numbers on the device."""
        if not isinstance(self.pixels, Tensor):
            return moved(torch.from_numpy(self.pixels[images.numpy()]), self.device)
        return moved(self.pixels[sent if self.pixels.device == sent.device else images], self.device)

    def _rows(self, step: int) -> Int[Tensor, " b"]:
        """The rows of the train table that a step learns from."""
        epoch, index = divmod(step, self.steps_per_epoch)
        shuffled, order = self._shuffled
        if epoch != shuffled:
            self._shuffled = (epoch, order := self._order(self._generator(ORDER, epoch)))
        return order[index * self.recipe.batch_size :][: self.recipe.batch_size]

    def _order(self, generator: torch.Generator) -> Int[Tensor, " rows"]:
        """The rows of an epoch in the order of its batches."""
        if self.recipe.sampler == "shuffle":
            return torch.randperm(len(self.images), generator=generator)
        from irra_core.variants.balanced import balanced_order

        return balanced_order(self.pids, self.recipe.per_identity, self.recipe.batch_size, generator)

    def _generator(self, kind: int, count: int) -> torch.Generator:
        """Random numbers of their own for the order of an epoch, or the masks, words or augmentation of a step."""
        seed = np.random.SeedSequence((self.recipe.seed, kind, count)).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed))
