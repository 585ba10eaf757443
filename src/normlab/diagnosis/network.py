"""What the rules look at: one description of a model, whatever file or object it came from.

What a source cannot tell is None; `facts` says what is there, and a rule that needs more than that
is reported as not checked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from normlab.evaluation.scores import ThreeWay

Vector = NDArray[np.float64]  # (C,)

# What a rule may need, and how it is called where it is missing.
FACTS = {
    "tensors": "tensors",
    "statistics": "running statistics",
    "steps": "the number of training steps and the momentum",
    "counters": "counters of batches",
    "momentum": "the momentum",
    "eps": "ε",
    "scale": "γ",
    "graph": "the order of the layers",
    "modes": "a live module",
    "exported": "an exported graph",
    "by_batch": "a normaliser that takes the batch's statistics in training",
    "batches": "the batch size",
    "last_batch": "the number of training images",
    "accumulation": "the accumulation of gradients",
    "pretrained": "a run that started from a network pretrained elsewhere",
    "data": "images to run through the network (--data)",
    "scores": "labelled images to run through the network (--data)",
    "classes": "the result of a run",
    "simple": "the result of a run on data of one's own",
}


@dataclass(frozen=True, kw_only=True)
class Normalizer:
    """A batch normalisation of C channels.

    Attributes:
        weight: γ.
        decay: m, the share of the old running statistics that one step keeps.
        steps: t, how often the running statistics were updated.
        data_mean, data_var: population moments of its input, where data were given.
        updates: whether its running statistics move when its model is in training mode.
        takes_batch: whether it normalises by the batch's statistics then; None: if it `updates`.
        dtype: the type of the running statistics in a live module, such as `bfloat16`.
        single: whether one image gives it a single value a channel, where data were given.
        trainable: whether γ or β learns.
        training: the mode it stands in.
    """

    name: str
    running_mean: Vector | None = None
    running_var: Vector | None = None
    weight: Vector | None = None
    eps: float | None = None
    decay: float | None = None
    steps: int | None = None
    data_mean: Vector | None = None
    data_var: Vector | None = None
    updates: bool | None = None
    takes_batch: bool | None = None
    dtype: str | None = None
    single: bool | None = None
    trainable: bool | None = None
    training: bool | None = None

    @property
    def by_batch(self) -> bool:
        """Whether it normalises by the batch in training, as far as the source tells."""
        return self.updates is not False if self.takes_batch is None else self.takes_batch

    @property
    def initial_share(self) -> float | None:
        """mᵗ: what 0 and 1, where they began, weigh at most in the running statistics.

        At most, since t is a lower bound: a counter begins anew when weights are loaded from a
        file without one, and an optimiser's when the model is compiled again.
        """
        if self.decay is None or self.steps is None:
            return None
        return float(self.decay**self.steps)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A layer in the graph. `kind`: `normalizer`, `weights`, `dropout` or `other`."""

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    has_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Batches:
    """How training feeds the model, as far as it is known.

    Attributes:
        size: images that are normalised together.
        last: images in an epoch's last batch.
        accumulation: batches whose gradients make one update.
    """

    size: int | None = None
    last: int | None = None
    accumulation: int | None = None


@dataclass(frozen=True, kw_only=True)
class Network:
    """A model as the rules see it.

    Attributes:
        tensors: all weights and statistics, by name.
        graph: its layers in an order in which they can run.
        assumes: what was taken for granted where the source does not say; cited as evidence.
        caveats: sentences on what else the source leaves open, told whatever is found.
        absence: why none may have been found where there were some once.
        training: whether the model as a whole is in training mode, if it is a live one.
        training_nodes: nodes of an exported graph that are in training mode.
        part: the keys that lead to it in a file that holds several things, such as `model_ema`.
        unread: the normalisers that could not be read, each with the reason.
        unread_tensors: the same of other tensors.
        passed_over: what lies beside the weights and was not looked at.
        classes: right answers and images of each class in a run's test, by its name.
        simple: accuracy of a run, and the highest that is no better than a logistic regression.
        pretrained: what its training started from, if that was pretrained elsewhere.
        meant_without: why it is meant to have no batch normalisation, where that is known.
    """

    path: str
    kind: str
    normalizers: tuple[Normalizer, ...]
    tensors: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    graph: tuple[Node, ...] | None = None
    assumes: str = ""
    absence: str = ""
    caveats: tuple[str, ...] = ()
    training: bool | None = None
    training_nodes: tuple[str, ...] | None = None
    batches: Batches = Batches()
    scores: "ThreeWay | None" = None
    part: str = ""
    unread: Mapping[str, str] = field(default_factory=dict)
    unread_tensors: Mapping[str, str] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()
    meant_without: str = ""
    classes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    simple: tuple[float, float] | None = None
    pretrained: str = ""

    @property
    def facts(self) -> frozenset[str]:
        """The keys of `FACTS` that are known, of one normaliser at least."""
        ns = self.normalizers
        known = {
            "tensors": bool(self.tensors),
            "statistics": any(n.running_var is not None for n in ns),
            "steps": any(n.initial_share is not None for n in ns),
            "counters": any(n.steps is not None for n in ns),
            "momentum": any(n.decay is not None for n in ns),
            "eps": any(n.eps is not None and n.running_var is not None for n in ns),
            "scale": any(n.weight is not None for n in ns),
            "graph": self.graph is not None,
            "modes": self.training is not None,
            "exported": self.training_nodes is not None,
            "by_batch": any(n.by_batch for n in ns),
            "batches": self.batches.size is not None,
            "last_batch": self.batches.last is not None,
            "accumulation": self.batches.accumulation is not None,
            "pretrained": bool(self.pretrained),
            "data": any(n.data_var is not None for n in ns),
            "scores": self.scores is not None,
            "classes": bool(self.classes),
            "simple": self.simple is not None,
        }
        return frozenset(k for k, is_known in known.items() if is_known)
