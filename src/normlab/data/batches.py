"""From arrays of pixels to the batches that a step takes."""

from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normlab import recipes
from normlab.core.ranks import ALONE, Ranks
from normlab.core.streams import stream
from normlab.data.augment import Augmentation, halve
from normlab.data.images import ImageData
from normlab.errors import UserError

EVALUATION_BATCH = 250  # images at a time where nothing is learnt


@dataclass(frozen=True)
class Split:
    """Images (N, H, W, 3) uint8 and labels (N,) of one part of a data set.

    files: N names of the files that the images are from, if they are from files.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    files: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)


def split_validation(
    images: NDArray[np.uint8],
    labels: NDArray[np.integer],
    fraction: float,
    groups: NDArray[np.int64] | None = None,
) -> tuple[Split, Split]:
    """Hold out the last `fraction` of the images, before any shuffling, as Keras does.

    groups: (N,), each in one piece; the cut moves to the nearest place between two.

    Raises:
        UserError: nothing would be left to train on, or nothing to validate on.
    """
    classes: NDArray[np.int64] = labels.astype(np.int64)
    cut = int(len(labels) * (1 - fraction))
    if groups is not None and fraction > 0:
        cut = boundary(groups, cut)
    if cut < 1:
        raise UserError(f"validation={fraction} of {len(labels)} images leaves none to train on")
    if fraction > 0 and cut == len(labels):
        raise UserError(f"validation={fraction} of {len(labels)} images is none: raise it or use 0")
    return Split(images[:cut], classes[:cut]), Split(images[cut:], classes[cut:])


def hold_out(images: ImageData, share: float) -> ImageData:
    """The same data with a share of each class's training images in place of the test images.

    Whoever chooses between ways to train by these still has test images that had no say. Drawn
    from a fixed seed; at least one image of each class that has two.
    """
    groups = images.groups_train
    if groups is None:
        last = np.sort(_last_of_each(images.y_train, share))
    else:  # in one piece each
        last = np.arange(boundary(groups, int(len(groups) * (1 - share))), len(groups))
    kept = np.delete(np.arange(len(images.y_train)), last)
    files = images.files_train
    return replace(
        images,
        x_train=images.x_train[kept],
        y_train=images.y_train[kept],
        files_train=None if files is None else tuple(files[i] for i in kept),
        groups_train=None if groups is None else groups[kept],
        x_test=images.x_train[last],
        y_test=images.y_train[last],
        files_test=None if files is None else tuple(files[i] for i in last),
    )


def _last_of_each(labels: NDArray[np.integer], share: float) -> NDArray[np.int64]:
    """Indices of a share of the images of each class."""
    chosen = []
    for label in np.unique(labels):
        own = stream(0, "hold out", int(label)).permutation(np.flatnonzero(labels == label))
        count = max(1, round(share * len(own))) if len(own) > 1 else 0
        chosen.append(own[len(own) - count :])
    return np.concatenate(chosen)


def split_images(images: ImageData, fraction: float) -> tuple[Split, Split]:
    """What to train on and what to validate on, with the names of the files.

    The data's own validation images, if they have any; else `split_validation`. Of images
    sorted by class a share of each class is held out: the last ones would lack the others.

    Raises:
        UserError: as `split_validation` does.
    """
    if images.x_val is not None and images.y_val is not None:
        return (
            Split(images.x_train, images.y_train.astype(np.int64), images.files_train),
            Split(images.x_val, images.y_val.astype(np.int64), images.files_val),
        )
    train, validation = split_validation(
        images.x_train, images.y_train, fraction, images.groups_train
    )
    if fraction and images.groups_train is None and _sorted_by_class(images.y_train):
        apart = hold_out(images, fraction)
        return (
            Split(apart.x_train, apart.y_train.astype(np.int64), apart.files_train),
            Split(apart.x_test, apart.y_test.astype(np.int64), apart.files_test),
        )
    if images.files_train is None:
        return train, validation
    files, cut = images.files_train, len(train)
    return replace(train, files=files[:cut]), replace(validation, files=files[cut:])


def _sorted_by_class(labels: NDArray[np.integer]) -> bool:
    """Whether the images of each class lie in one piece, so that the last ones lack classes."""
    pieces = 1 + np.count_nonzero(np.diff(labels))
    return bool(pieces == len(np.unique(labels)) > 1)


def boundary(groups: NDArray[np.int64], cut: int) -> int:
    """The place nearest to `cut` between two groups; `groups` (N,) has each in one piece."""
    between = np.flatnonzero(np.diff(groups)) + 1
    return int(between[np.abs(between - cut).argmin()]) if len(between) else len(groups)


def batch_bounds(n: int, batch_size: int, *, join_single: bool) -> list[tuple[int, int]]:
    """Cut 0…n into batches, the last one partial.

    A last batch of a single image has no variance to normalise by; with `join_single` it joins the
    batch before it.

    >>> batch_bounds(7, 3, join_single=True)
    [(0, 3), (3, 7)]
    """
    bounds = [(a, min(a + batch_size, n)) for a in range(0, n, batch_size)]
    if join_single and len(bounds) > 1 and batch_size > 1 and bounds[-1][1] - bounds[-1][0] == 1:
        bounds[-2:] = [(bounds[-2][0], n)]
    return bounds


def balanced_order(labels: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """Indices (N,) of N images, class k's N_k of them √N_k/Σ√N times, class by class.

    Each image of a class is shown as often as any other of it, or once more.
    """
    counts = np.bincount(labels)
    ends = np.rint(np.cumsum(np.sqrt(counts)) / np.sqrt(counts).sum() * len(labels)).astype(int)
    chosen = []
    for label, count in enumerate(np.diff(ends, prepend=0)):
        own = np.flatnonzero(labels == label)
        rng = stream(seed, "sample", epoch, label)
        rounds = [rng.permutation(own) for _ in range(-(-count // max(1, len(own))))]
        chosen.append(np.concatenate(rounds)[:count] if rounds else own[:0])
    return np.concatenate(chosen)


@dataclass
class Batches:
    """The batches of a training: each pass's in a new order, as its augmentation changes them.

    Any step can be asked for at any time; what it sees follows from the seed and its number.

    Attributes:
        bounds: of the batches of a pass, in the order of its images.
        augmentation: how images are changed; None for as they are.
        half_steps: the steps below this one see images of half the height and width.
        balanced: show images of rare classes more often, as `balanced_order` draws them.
        ranks: the processes that have a part each of every batch.
        whole: labels of all ranks' images of the batch that was asked for last.
    """

    train: Split
    bounds: list[tuple[int, int]]
    _: KW_ONLY
    seed: int
    augmentation: recipes.Augmentation | None = None
    half_steps: float = 0
    balanced: bool = False
    device: torch.device | str = "cpu"
    ranks: Ranks = ALONE
    epoch: int = -1

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Pixels (N, 3, H, W) in [0, 1] and labels (N,) of this rank's part of a step's batch."""
        epoch, batch = divmod(step, len(self.bounds))
        if epoch != self.epoch:
            self._begin(epoch)
        begin, end = self.bounds[batch]
        first, last = self.ranks.share(end - begin)
        x = self.augment(self.train.images, self.order[begin + first : begin + last], self.device)
        if step < self.half_steps:
            x = halve(x)
        self.whole = self.labels[begin:end]
        return x, self.whole[first:last]

    def _begin(self, epoch: int) -> None:
        n = len(self.train)
        self.epoch = epoch
        self.order = stream(self.seed, "order", epoch).permutation(n)
        if self.balanced:
            self.order = balanced_order(self.train.labels, self.seed, epoch)[self.order]
        self.labels = torch.from_numpy(self.train.labels[self.order]).to(self.device)
        settings = self.augmentation or recipes.Augmentation()
        self.augment = Augmentation.draw(self.seed, epoch, n, settings)
