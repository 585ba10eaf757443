"""Rules on what the tensors say: running statistics, γ, ε and momentum."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.diagnosis.network import Network, Normalizer, Vector
from normlab.diagnosis.rule import Observation, rule

PAPER = "Ioffe and Szegedy 2015, arXiv 1502.03167"
RECALIBRATE = "`normlab recalibrate RUN` writes the statistics of a whole set of images"

Tracked = tuple[Normalizer, Vector, Vector]


def tracked(network: Network) -> Iterator[Tracked]:
    """Each normaliser with running statistics: itself, mean, variance."""
    for n in network.normalizers:
        if n.running_mean is not None and n.running_var is not None:
            yield n, n.running_mean, n.running_var


def share(found: np.ndarray) -> str:
    """Say how many of the channels: '3 of 32 channels'."""
    return f"{int(found.sum())} of {found.size} channels"


@rule(
    "tensors",
    worst="serious",
    remedy="train again from weights that are finite, with a lower learning rate; a step skipped "
    "because of its gradients has already changed the running statistics",
    source="PyTorch issue 88474",
)
def not_finite(network: Network) -> Iterator[Observation]:
    """A weight or statistic is NaN or infinite."""
    for name, values in network.tensors.items():
        if values.dtype.kind in "fc" and not np.isfinite(values).all() and not _is_mask(values):
            bad = int((~np.isfinite(values)).sum())
            yield Observation(name, "serious", f"{bad} of {values.size} values are NaN or infinite")


def _is_mask(values: NDArray[Any]) -> bool:
    """Whether the values bound others: a mask of 0 and −∞, added before softmax, or one limit."""
    if values.ndim == 0:
        return not np.isnan(values)
    return values.ndim >= 2 and bool(((values == 0) | (values == -np.inf)).all())


@rule(
    "statistics",
    worst="serious",
    remedy="a variance cannot be: compute it as Σ(x − μ)²/M, not as E[x²] − E[x]²; " + RECALIBRATE,
    source="Chan, Golub and LeVeque 1983; Caffe issue 3963",
)
def variance_not_positive(network: Network) -> Iterator[Observation]:
    """A running variance is negative, or zero in every channel."""
    for n, _, var in tracked(network):
        if (var < 0).any():
            low = f"running_var is negative in {share(var < 0)}, at lowest {var.min():.3g}"
            yield Observation(n.name, "serious", low)
        elif not var.any():
            yield Observation(n.name, "serious", f"running_var is 0 in all {var.size} channels")


@rule(
    "statistics",
    worst="serious",
    remedy="train with the layer in training mode, or " + RECALIBRATE,
    source=f"{PAPER}, algorithm 2: inference takes the training population's statistics",
)
def never_updated(network: Network) -> Iterator[Observation]:
    """Running statistics stand where they began."""
    for n, mean, var in tracked(network):
        if not mean.any() and (var == 1).all():
            after = "" if n.steps is None else f" after {n.steps:,} counted batches"
            yield Observation(n.name, "serious", f"running_mean is 0 and running_var 1{after}")


@rule(
    "steps",
    worst="serious",
    remedy="train longer, choose a smaller m, or " + RECALIBRATE + "; with --data the doctor sees "
    "whether they are right",
    source="closed form of running ← m·running + (1 − m)·batch; Keras issue 6977",
)
def stale(network: Network) -> Iterator[Observation]:
    """The initial 0 and 1 still weigh in the running statistics.

    After t steps they weigh mᵗ, if t counts them all: from 0.02 a warning, from 0.25 serious where
    the statistics are close to 0 and 1 (medians: |mean| ≤ 0.25, variance from 1/2 to 2) or far from
    those of the data. Not said where t cannot be all: a variance is below mᵗ, or the batches since
    then would need means of more than 3 of their standard deviations (medians). Not said, either,
    where the data's statistics are like the running ones.
    """
    refuted = {_count(n) for n, _, var in tracked(network) if _refutes(n, var)}
    for n, mean, var in tracked(network):
        weight = n.initial_share
        if weight is None or weight < 0.02 or not n.steps or _count(n) in refuted:
            continue
        seen = n.data_var is not None
        if off(n, mean, var) == "" if seen else _improbable(mean, var, weight):
            continue
        near = np.median(np.abs(mean)) <= 0.25 and 0.5 <= np.median(var) <= 2
        severity = "serious" if weight >= 0.25 and (seen or near) else "warning"
        evidence = f"after {n.steps} steps with m = {n.decay:.3g} they weigh {weight:.2f}"
        if severity == "warning" and not seen:
            evidence += ", if no steps came before the counter's first"
        yield Observation(n.name, severity, evidence + network.assumes)


def _count(n: Normalizer) -> tuple[int | None, float | None]:
    """What layers with one history of updates have in common."""
    return n.steps, n.decay


def _refutes(n: Normalizer, var: Vector) -> bool:
    """Whether a variance is smaller than the initial 1 alone would make it after `n.steps`."""
    weight = n.initial_share
    return weight is not None and bool(((var >= 0) & (var < 0.98 * weight)).any())


def _improbable(mean: Vector, var: Vector, weight: float) -> bool:
    """Whether batches that moved 0 and 1 so far would be of a kind that is hardly ever seen."""
    since_mean, since_var = mean / (1 - weight), (var - weight) / (1 - weight)
    return bool(np.median(np.abs(since_mean)) > 3 * np.sqrt(max(np.median(since_var), 0)))


def off(n: Normalizer, mean: Vector, var: Vector) -> str:
    """How bad it is that the running statistics are off those of the data: a severity, or "".

    Medians over the channels that are not dead in both, with σ² the data's variance plus ε: serious
    when the mean is off by more than σ or the variance by more than 4 times, a warning at half σ
    and 2 times.
    """
    shift, factor = distance(n, mean, var)
    if shift > 1 or factor > 4:
        return "serious"
    return "warning" if shift > 0.5 or factor > 2 else ""


def distance(n: Normalizer, mean: Vector, var: Vector) -> tuple[float, float]:
    """By how many σ the means are off, and the variances by what factor, in the median channel.

    Of those that vary: a channel that is dead in training and on the data is like itself.
    """
    if n.data_mean is None or n.data_var is None:
        return 0.0, 1.0
    eps, chosen = n.eps or 1e-12, living(n, var)
    shifts = np.abs(mean - n.data_mean) / np.sqrt(n.data_var + eps)
    factors = np.abs(np.log((np.maximum(var, 0) + eps) / (n.data_var + eps)))
    return float(np.median(shifts[chosen])), float(np.exp(np.median(factors[chosen])))


def living(n: Normalizer, var: Vector) -> np.ndarray:
    """Which channels vary, by the running statistics or on the data; all where none does."""
    flat = constant(n, var)
    if n.data_var is not None:
        flat = flat & constant(n, n.data_var)
    return np.asarray(~flat | flat.all())


@rule(
    "counters",
    worst="warning",
    remedy="expected where a layer was added later, or its weights came from a file without "
    "counters; otherwise look for one left in .eval()",
    source="PyTorch's documentation of num_batches_tracked; fastai issue 3030",
)
def updated_unequally(network: Network) -> Iterator[Observation]:
    """Some normalisers were updated less often than others."""
    most = max((n.steps for n in network.normalizers if n.steps is not None), default=0)
    for n, _, _ in tracked(network):
        if n.steps is not None and 0 < n.steps < most:
            yield Observation(n.name, "warning", f"counted {n.steps:,} updates, others {most:,}")


@rule(
    "momentum",
    worst="serious",
    remedy="Keras and ONNX weigh the old value (0.99, 0.9), PyTorch the new one (0.1): "
    "m_torch = 1 − m_keras",
    source="Keras' BatchNormalization and torch.nn.BatchNorm2d, documentation of momentum",
)
def momentum_turned_round(network: Network) -> Iterator[Observation]:
    """Momentum of another library: running statistics forget, or stand still.

    Serious when a step keeps at most 0.1 of the old statistics, or all of them.
    """
    for n in network.normalizers:
        if n.decay is None or network.assumes or not n.by_batch:
            continue
        if n.decay < 0.5:
            severity = "serious" if n.decay <= 0.1 + 1e-9 else "warning"
            memory = f"one step keeps {n.decay:.3g} of the old statistics"
            yield Observation(
                n.name, severity, f"{memory}: they are little more than the last batch's"
            )
        elif n.decay == 1:
            yield Observation(
                n.name, "serious", "a step keeps all of the old statistics and takes in nothing"
            )


def typical(n: Normalizer, var: Vector) -> float:
    """The median variance of the channels that exceed ε, or of all of them where none does.

    A dead channel's running variance decays without end. If most are dead, they are not typical.
    """
    finite = var[np.isfinite(var)]
    above = finite[finite > (n.eps or 0)]
    chosen = above if above.size else finite
    return float(np.median(chosen)) if chosen.size else 0.0


def constant(n: Normalizer, var: Vector) -> np.ndarray:
    """Which channels have no variance next to the others of their layer."""
    return np.abs(var) <= 1e-5 * typical(n, var)


@rule(
    "statistics",
    worst="warning",
    remedy="dead: lower the learning rate or drop the channels; constant in the pixels: expected "
    "of borders and of grey pictures",
    source="Lu et al. 2020, arXiv 1903.06733, on dying ReLU",
)
def constant_channel(network: Network) -> Iterator[Observation]:
    """Channels are dead, always 0, or constant.

    Their variance is below 1e-5 of the median of those channels whose variance exceeds ε. A note,
    from a quarter on a warning.
    """
    for n, running_mean, running_var in tracked(network):
        mean = running_mean if n.data_mean is None else n.data_mean
        var = running_var if n.data_var is None else n.data_var
        flat = constant(n, var)
        if not flat.any() or flat.all():
            continue
        dead = flat & (mean**2 <= 1e-5 * typical(n, var))
        severity = "warning" if flat.mean() >= 0.25 else "note"
        evidence = f"{share(flat)} do not vary, {int(dead.sum())} of them always 0"
        yield Observation(
            n.name, severity, evidence + (" on these data" if n.data_var is not None else "")
        )


@rule(
    "eps",
    worst="warning",
    remedy="choose a smaller ε (PyTorch 1e-5, Keras 1e-3), or scale the layer's input",
    source=f"{PAPER}, algorithm 1: ε is there for stability only",
)
def eps_matters(network: Network) -> Iterator[Observation]:
    """ε is as large as the variance, so outputs shrink.

    Counted are channels that vary and whose variance is below ε, which costs them 30 % of their
    scale: a note from 5 % of the channels, a warning from 25 %.
    """
    for n, _, var in tracked(network):
        if n.eps is None or n.eps == 0:
            continue
        varying = ~constant(n, var) & (var > 0)
        small = varying & (var < n.eps)
        part = small.sum() / max(varying.sum(), 1)
        if part >= 0.05:
            middle = float(np.median(var[small]))
            shrunk = np.sqrt(middle / (middle + n.eps))
            evidence = f"ε = {n.eps:g} exceeds the variance of {share(small)}; the median one of "
            evidence += f"these leaves with a standard deviation of {shrunk:.2g}, not 1"
            severity = "warning" if part >= 0.25 else "note"
            yield Observation(n.name, severity, evidence + network.assumes)


@rule(
    "scale",
    worst="warning",
    remedy="no weight decay on γ; prune the channels; before training, γ = 0 at the end of a "
    "residual branch is meant",
    source="Goyal et al. 2017, arXiv 1706.02677, section 5.1; Liu et al. 2017, arXiv 1708.06519",
)
def gamma_vanished(network: Network) -> Iterator[Observation]:
    """γ is so small that a channel passes nothing on.

    Below 1e-3 of the network's median |γ|, or of 1 if that is larger: a note, from a quarter of
    the channels on a warning. The median is that of the |γ| that are not below 1e-3 of the largest.
    """
    weights = [n.weight for n in network.normalizers if n.weight is not None]
    scales = np.abs(np.concatenate(weights))
    scales = scales[np.isfinite(scales)]
    left = scales[scales >= 1e-3 * scales.max(initial=0.0)]
    middle = float(np.median(left)) if left.size else 0.0
    limit = 1e-3 * min(middle or 1.0, 1.0)
    for n in network.normalizers:
        if n.weight is not None and (gone := np.abs(n.weight) < limit).any():
            severity = "warning" if gone.mean() >= 0.25 else "note"
            yield Observation(n.name, severity, f"|γ| is below {limit:.1g} in {share(gone)}")
