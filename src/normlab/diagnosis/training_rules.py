"""Rules on batches, on given data, and on the three scores."""

from collections.abc import Iterator

import numpy as np

from normlab.diagnosis.network import Network
from normlab.diagnosis.network_rules import dropout_before_normalizer
from normlab.diagnosis.rule import Observation, rule
from normlab.diagnosis.statistics_rules import (
    RECALIBRATE,
    distance,
    living,
    momentum_turned_round,
    never_updated,
    off,
    stale,
    tracked,
)
from normlab.evaluation.baselines import NEARLY_ALL
from normlab.text import counted

GROUP_NORM = "Wu and He 2018, arXiv 1803.08494, figure 1"


@rule(
    "by_batch",
    "batches",
    worst="warning",
    remedy="use batches of 16 or more, or a normaliser that does not depend on them",
    source=GROUP_NORM,
)
def small_batches(network: Network) -> Iterator[Observation]:
    """Batches are too small to normalise by: a warning below 8 images, a note below 16."""
    size = network.batches.size
    if size is not None and size < 16:
        yield Observation(
            "batches", "warning" if size < 8 else "note", f"{counted(size, 'image')} a batch"
        )


@rule(
    "batches",
    "pretrained",
    worst="serious",
    remedy="train again with --statistics keep, the default; in PyTorch, call .eval() on the "
    "normalisers after every .train() and let γ and β require no gradients",
    source="He et al. 2016, arXiv 1512.03385, appendix A; docs/pretrained.md",
)
def pretrained_by_batch(network: Network) -> Iterator[Observation]:
    """A pretrained network was left in training mode on batches unlike those it knows.

    Its running statistics come from batches of hundreds of many kinds of pictures. Serious below 16
    images a batch, a warning from 16 on.
    """
    size, layers = network.batches.size, [n for n in network.normalizers if n.by_batch]
    if layers and size is not None:
        evidence = f"{network.pretrained} learnt on, {len(layers)} normalisers by the statistics "
        severity = "serious" if size < 16 else "warning"
        yield Observation("batches", severity, evidence + f"of {counted(size, 'image')}")


@rule(
    "by_batch",
    "last_batch",
    worst="serious",
    remedy="join it with the batch before (normlab does), or shift the batch size by one",
    source="torch.nn.functional.batch_norm: more than 1 value per channel when training",
)
def last_batch_of_one(network: Network) -> Iterator[Observation]:
    """The last batch of an epoch is a single image.

    Serious where a normaliser gets one value a channel from it, which has no variance: PyTorch
    stops there. A warning where each has at least the pixels of that image.
    """
    if network.batches.last == 1:
        size = network.batches.size
        evidence = (
            "a batch is one image" if size == 1 else f"batches of {size} leave one image over"
        )
        several = all(n.single is False for n in network.normalizers if n.by_batch)
        evidence += ", which is normalised by itself" if several else ", which has no variance"
        yield Observation("batches", "warning" if several else "serious", evidence)


@rule(
    "by_batch",
    "accumulation",
    worst="warning",
    remedy="raise the batch itself, or recompute statistics over the accumulated images",
    source="PyTorch Lightning issue 17446",
)
def accumulation(network: Network) -> Iterator[Observation]:
    """Gradient accumulation does not enlarge the batch that is normalised.

    A warning when that batch is known to have fewer than 16 images, otherwise a note.
    """
    size, accumulated = network.batches.size, network.batches.accumulation
    if accumulated is not None and accumulated > 1:
        severity = "warning" if size is not None and size < 16 else "note"
        seen = "one" if size is None else f"one, of {counted(size, 'image')}"
        evidence = f"an update sees {accumulated} batches, the statistics of each only {seen}"
        yield Observation("batches", severity, evidence)


@rule(
    "data",
    worst="serious",
    remedy=RECALIBRATE + "; if these pictures differ on purpose, give them with --data",
    source="Li et al. 2016, arXiv 1603.04779",
)
def far_from_data(network: Network) -> Iterator[Observation]:
    """Running statistics are far from those of the data.

    Medians over the channels that are not dead in both, with σ² the data's variance plus ε: serious
    when the mean is off by more than σ or the variance by more than 4 times, a warning at half σ
    and 2 times. Serious, too, when the layer is given values that are not finite.
    """
    for n, mean, var in tracked(network):
        if n.data_mean is None or n.data_var is None:
            continue
        if not (np.isfinite(n.data_mean) & np.isfinite(n.data_var)).all():
            yield Observation(n.name, "serious", "its input is NaN or infinite on these data")
        elif severity := off(n, mean, var):
            shift, factor = distance(n, mean, var)
            total = int(living(n, var).sum())
            evidence = f"in the median channel of {total} the mean is off by {shift:.2g} σ "
            yield Observation(
                n.name, severity, evidence + f"and the variance by a factor of {factor:.3g}"
            )


@rule(
    "scores",
    worst="serious",
    remedy="where population statistics do better, " + RECALIBRATE + "; where batch statistics do "
    "worse, use larger batches",
    source="Keras issue 6977; Li et al. 2018, arXiv 1801.05134",
)
def score_gap(network: Network) -> Iterator[Observation]:
    """Batch, running and population statistics give different scores.

    A gap counts when it exceeds 2 points and twice its standard error, taken as if the scores were
    independent; it is serious from 5 points on.
    """
    scores = network.scores
    if scores is None:
        return
    best = scores.population.accuracy
    for name, score, cause in (
        ("running", scores.running.accuracy, _cause(network)),
        ("batch", scores.batch.accuracy, f"batches of {scores.batch_size} images are noisy"),
    ):
        error = np.sqrt((best * (1 - best) + score * (1 - score)) / scores.count)
        gap = best - score
        if gap > max(0.02, 2 * error):
            severity = "serious" if gap >= 0.05 and name == "running" else "warning"
            evidence = f"accuracy {score:.3f} with {name} statistics, {best:.3f} with population "
            yield Observation(
                "model", severity, evidence + f"statistics, {scores.count} images: {cause}"
            )


@rule(
    "classes",
    worst="serious",
    remedy="look at its pictures (`normlab evaluate`) and their labels, give more of them, or "
    "count them more (`--balance weights`)",
    source="Johnson and Khoshgoftaar 2019, J. Big Data 6:27",
)
def class_never_right(network: Network) -> Iterator[Observation]:
    """A class was never answered rightly in the run's test.

    Serious from 5 test images of it on, else a warning: of one or two it may be chance.
    """
    for name, (right, images) in network.classes.items():
        if images and not right:
            severity = "serious" if images >= 5 else "warning"
            yield Observation(f"class {name}", severity, f"0 of {images} test images were right")


@rule(
    "simple",
    worst="warning",
    remedy="train longer (`--minutes`), at a larger --image-size, or give more pictures",
    source="`normlab.evaluation.baselines`",
)
def no_better_than_simple(network: Network) -> Iterator[Observation]:
    """The network is not clearly better than a logistic regression on 8 × 8 pixels.

    Nothing is said where both are nearly always right, 98 % or more.
    """
    if network.simple is not None and network.simple[0] <= min(network.simple[1], NEARLY_ALL):
        accuracy, bound = network.simple
        evidence = f"accuracy {accuracy:.3f}; the regression's interval ends at {bound:.3f}"
        yield Observation("model", "warning", evidence)


def _cause(network: Network) -> str:
    """The likeliest reason why running statistics are not the population's."""
    causes = {
        "they were never updated": never_updated,
        "they are stale": stale,
        "their momentum is turned round": momentum_turned_round,
        "they are far from these data": far_from_data,
        "dropout stands before a normaliser": dropout_before_normalizer,
    }
    return next((c for c, r in causes.items() if any(r.check(network))), "the cause is not known")
