"""The doctor while somebody else's training goes on.

    checkup = normlab.Checkup(model)
    for epoch in range(epochs):
        for x, y in loader:
            ...
        checkup.end_epoch()

At the end of an epoch the doctor looks at the model as it stands, and at what its batch
normalisations were given in some of the epoch's own steps. What is new is said once, with the
remedy. Nothing is run for it, and the training keeps its bits.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from normlab.diagnosis.examination import examine
from normlab.diagnosis.findings import SEVERITIES, Finding
from normlab.diagnosis.modules import from_module
from normlab.diagnosis.network import Batches, Network, Normalizer
from normlab.errors import UserError
from normlab.evaluation.forward import first_tensor, normalizers
from normlab.evaluation.population import Moments, pool
from normlab.layers import moments
from normlab.text import listed, printable

EVERY_STEPS = 16  # of which one is measured: moments take a few hundredths of a step
CAUSES, EFFECT = ("stale", "never-updated", "momentum-turned-round"), "far-from-data"
KEPT = 8  # measured steps that stand for the data; the weights moved little meanwhile


@dataclass
class Said:
    """What was said already, and how what is new is said.

    Attributes:
        report: told each new finding in a line; None for nobody.
        findings: all so far, worst first in each epoch.
    """

    report: Callable[[str], None] | None = print
    findings: list[Finding] = field(default_factory=list)
    worst: dict[str, int] = field(default_factory=dict)

    def news(self, epoch: int, network: Network) -> tuple[Finding, ...]:
        """The findings that are new, or worse than before, each said once for all its places.

        Notes, which are no faults, are left out; so is that there is no normaliser to look at.
        """
        if not network.normalizers:
            return ()
        groups: dict[str, list[Finding]] = {}
        found = examine(network).findings
        explained = {f.where for f in found if f.rule in CAUSES}
        for finding in found:
            grade = SEVERITIES.index(finding.severity)
            if finding.rule == EFFECT and finding.where in explained:
                continue
            if grade and grade > self.worst.get(finding.rule, 0):
                groups.setdefault(finding.rule, []).append(finding)
        for rule, group in groups.items():
            self.worst[rule] = max(SEVERITIES.index(f.severity) for f in group)
            self.findings += group
            if self.report is not None:
                self.report(_line(epoch, group))
        return tuple(f for group in groups.values() for f in group)


class Checkup:
    """A doctor that comes at the end of epochs; see the module.

    Args:
        model: any PyTorch module. Of one that torch.compile made only weights and running
            statistics are seen.
        every: come after each so many epochs, the first time after the first.
        accumulation: how many batches' gradients make one update.
        report: told each new finding in a line; None for nobody.

    Attributes:
        findings: all so far.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        accumulation: int | None = None,
        report: Callable[[str], None] | None = print,
    ) -> None:
        if every < 1:
            raise UserError(f"every={every}: choose 1 or more epochs")
        self.model = _inside(model)
        self.every, self.accumulation = every, accumulation
        self.epoch = 0
        self._said = Said(report)
        self._graph: Any = None
        self._steps = 0
        self._sizes: Counter[int] = Counter()
        self._last: int | None = None
        self._seen: dict[str, deque[tuple[Moments, bool]]] = {}
        self._hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            *(
                layer.register_forward_pre_hook(self._measure(name), with_kwargs=True)
                for name, layer in normalizers(self.model).items()
            ),
        ]

    @property
    def findings(self) -> list[Finding]:
        return self._said.findings

    def end_epoch(self) -> tuple[Finding, ...]:
        """Say that an epoch is over: what is newly found."""
        self.epoch += 1
        found: tuple[Finding, ...] = ()
        if (self.epoch - 1) % self.every == 0:
            found = self._said.news(self.epoch, self._network())
        self._sizes.clear()
        return found

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _network(self) -> Network:
        size = self._sizes.most_common(1)[0][0] if self._sizes else None
        batches = Batches(size=size, last=self._last, accumulation=self.accumulation)
        network = from_module(self.model, None, batches, graph=self._graph)
        self._graph = network.graph or ()
        training = bool(self._steps) or network.training
        return replace(
            network,
            training=training,
            normalizers=tuple(self._with_data(n) for n in network.normalizers),
        )

    def _with_data(self, n: Normalizer) -> Normalizer:
        seen = self._seen.get(n.name)
        if not seen:
            return n
        found = pool([m for m, _ in seen])
        return replace(
            n,
            data_mean=found.mean.cpu().numpy(),
            data_var=found.var.cpu().numpy(),
            single=any(single for _, single in seen),
        )

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not (torch.is_grad_enabled() and module.training):
            return
        self._steps += 1
        x = first_tensor([*inputs, *named.values()])
        if x is not None and x.ndim:
            self._sizes[len(x)] += 1
            self._last = len(x)

    def _measure(self, name: str) -> Any:
        place = name or "model"

        def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if self._steps % EVERY_STEPS and self._seen.get(place):
                return
            if not (torch.is_grad_enabled() and self.model.training):
                return
            x = first_tensor([*inputs, *named.values()])
            if x is None or x.ndim < 2 or not x.numel():
                return
            with torch.no_grad():
                mean, var = moments(x if x.dtype == torch.float64 else x.float())
            count = x.numel() // x.shape[1]
            found = Moments(mean.double(), var.double(), count), count == len(x)
            self._seen.setdefault(place, deque(maxlen=KEPT)).append(found)

        return note


def _inside(model: nn.Module) -> nn.Module:
    """The model in wrappers of DDP and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, nn.parallel.DistributedDataParallel | nn.DataParallel
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _line(epoch: int, found: Sequence[Finding]) -> str:
    worst = max(found, key=lambda f: SEVERITIES.index(f.severity))
    places = listed([f.where for f in found], most=4)
    return printable(
        f"epoch {epoch}: {worst.severity}, {worst.rule} at {places}: {worst.evidence}. "
        f"Remedy: {worst.remedy}."
    )
