"""The training step of a batch that lies in parts with several processes.

The same formula as `train_step`: each rank's loss is the sum over its own images, divided by what
the whole batch would be divided by, so gradients are added, not averaged, and every image weighs
the same wherever it lies. Messages, each while the backward pass goes on: the loss and the right
answers; the gradients, a bucket as soon as the last of it is there. Those of the batch
normalisations are `normlab.layers.parts`.

Hooks of our own and not `DistributedDataParallel`: it averages, which is wrong for uneven parts,
and its first object takes more than two seconds, in which it imports a compiler.
"""

import math
import signal
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from normlab.core.groups import Group
from normlab.data.batches import Batches
from normlab.errors import NonFiniteError
from normlab.evaluation.metrics import count_right
from normlab.layers import BatchNorm
from normlab.layers.dropout import PartGenerator
from normlab.training.optimisers import Optimizer

BUCKET = 1 << 20  # bytes of gradients a message, and at least one parameter's


class Bucket:
    """Gradients of some parameters side by side in memory; each is a view of its place there."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        first = self.parameters[0]
        self.flat = torch.zeros(
            sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device
        )
        parts = torch.split(self.flat, [p.numel() for p in parameters])
        self.views = [
            part.as_strided(p.shape, p.stride(), part.storage_offset())
            for part, p in zip(parts, parameters, strict=True)
        ]
        self.waiting, self.work = len(self.parameters), None


class Gradients:
    """Adds up the ranks' gradients, bucket by bucket, while the backward pass goes on.

    Buckets leave in one order in all ranks: from the last parameter to the first.
    """

    def __init__(self, model: nn.Module, group: Group, size: int = BUCKET) -> None:
        self.group = group
        self.buckets: list[Bucket] = []
        self.place: dict[nn.Parameter, tuple[Bucket, Tensor]] = {}
        for parameters in _packed([p for p in model.parameters() if p.requires_grad], size):
            bucket = Bucket(parameters)
            self.buckets.append(bucket)
            for p, view in zip(bucket.parameters, bucket.views, strict=True):
                self.place[p] = bucket, view
        self.hooks: list[Any] = [
            p.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            for p in self.place
        ]
        self.next = 0

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _arrived(self, p: Tensor) -> None:
        bucket, view = self.place[p]  # type: ignore[index]
        view.copy_(p.grad)  # type: ignore[arg-type]
        p.grad = view
        bucket.waiting -= 1
        while self.next < len(self.buckets) and not self.buckets[self.next].waiting:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[self.next]
        bucket.work = self.group.begin_sum(bucket.flat)
        self.next += 1

    def finish(self) -> None:
        """Wait until every gradient is the sum of all ranks'. What got none stays without."""
        while self.next < len(self.buckets):
            for p, view in zip(
                self.buckets[self.next].parameters, self.buckets[self.next].views, strict=True
            ):
                if p.grad is None:
                    view.zero_()
            self._send()
        for bucket in self.buckets:
            self.group.finish(bucket.work)
            bucket.waiting, bucket.work = len(bucket.parameters), None
        self.next = 0


class ParallelStep:
    """`train_step` for one rank of several; all call it with their parts of the same batch.

    Attributes:
        interrupted: the signals that this process got.
        stop: the signal that any rank got, known to all after the step; 0 for none.
    """

    def __init__(self, model: nn.Module, batches: Batches, interrupted: Sequence[int] = ()) -> None:
        self.batches, self.interrupted, self.stop = batches, interrupted, 0
        self.ranks = batches.ranks
        self.gradients = Gradients(model, self.ranks.numbers)
        self.model = model
        share_statistics(model, self.ranks.statistics)

    def __call__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        x: Tensor,  # (n, 3, H, W), this rank's part
        labels: Tensor,  # (n,)
        rng: Any,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,  # (K,)
    ) -> tuple[float, int]:
        """One update of the weights; the whole batch's mean loss and how many were right.

        Raises:
            NonFiniteError: in all ranks; the weights are as before the step.
            RankError: a rank ended, or did not answer.
        """
        whole = self.batches.whole
        optimizer.zero_grad()
        logits = model(x, PartGenerator(rng, *self.ranks.share(len(whole))))
        divisor = len(whole) if class_weights is None else class_weights[whole].sum()
        loss = (
            cross_entropy(
                logits, labels, class_weights, reduction="sum", label_smoothing=label_smoothing
            )
            / divisor
        )
        correct = count_right(logits.detach(), labels) if len(labels) else 0
        signals = [float(s in self.interrupted) for s in (signal.SIGINT, signal.SIGTERM)]
        scores = torch.tensor([loss.item(), correct, *signals], dtype=torch.float64)
        sent = self.ranks.numbers.begin_sum(scores)
        loss.backward()  # type: ignore[no-untyped-call]
        self.gradients.finish()
        self.ranks.numbers.finish(sent)
        value, total, *asked = scores.tolist()
        self.stop = signal.SIGINT if asked[0] else signal.SIGTERM if asked[1] else 0
        self._join_running(len(whole))
        if not math.isfinite(value):
            raise NonFiniteError(f"the loss is {value}")
        optimizer.step()
        return value, int(total)

    def _join_running(self, images: int) -> None:
        """Running statistics of pieces, which each rank has moved by its own: all pieces' mean."""
        layers = [m for m in self.model.modules() if isinstance(m, BatchNorm) and m.has_ghosts()]
        kept = [layer for layer in layers if layer.running_mean is not None]
        if not kept:
            return
        begin, end, pieces = self.ranks.pieces(images)
        names = ("running_mean", "running_var", "num_batches_tracked")
        values = [getattr(layer, name) for layer in kept for name in names]
        flat = torch.cat([v.double().flatten() for v in values]) * (end - begin) / pieces
        parts = torch.split(self.ranks.sum(flat), [v.numel() for v in values])
        for value, part in zip(values, parts, strict=True):
            part = part if value.is_floating_point() else part.round()
            value.copy_(part.view_as(value))

    def close(self) -> None:
        """Leave the model as an ordinary one."""
        self.gradients.close()
        share_statistics(self.model, None)


def share_statistics(model: nn.Module, group: Group | None) -> None:
    """Let the batch normalisations take their statistics over a group, or over their own images."""
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            layer.group = group


def _packed(parameters: list[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """Parameters from the last to the first, in buckets of about `size` bytes and one type."""
    buckets: list[list[nn.Parameter]] = []
    filled = size
    for p in reversed(parameters):
        if filled >= size or buckets[-1][0].dtype != p.dtype:
            buckets.append([])
            filled = 0
        buckets[-1].append(p)
        filled += p.numel() * p.element_size()
    return buckets
