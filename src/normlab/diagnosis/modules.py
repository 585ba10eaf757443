"""Describe a live PyTorch module, or the network of a run, without changing it."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn.functional import dropout as functional_dropout
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm
from torch.nn.modules.conv import _ConvNd as TorchConv
from torch.nn.modules.dropout import _DropoutNd as TorchDropout

from normlab.data import ImageData
from normlab.data.batches import batch_bounds, split_validation
from normlab.diagnosis.patient import Batches, Node, Normalizer, Patient
from normlab.errors import DataError
from normlab.evaluation.population import (
    Images,
    Moments,
    evenly,
    normalizers,
    population_moments,
    untouched,
)
from normlab.evaluation.recalibration import three_way
from normlab.layers import BatchNorm, Dropout
from normlab.runs.run import Run, Start


@dataclass(frozen=True)
class Samples:
    """Images to take statistics from, and images with labels (N,), if any, to score."""

    population: Images
    images: Images
    labels: NDArray[np.integer] | None


def from_module(
    model: nn.Module,
    samples: Samples | None = None,
    batches: Batches | None = None,
    path: str = "model",
) -> Patient:
    """Describe `model`; with samples, run through it what the rules want to know of them."""
    batches = batches or Batches()
    found: dict[str, Moments] = {}
    scores = None
    layers = normalizers(model)
    if samples is not None and layers:
        found = population_moments(model, samples.population)
        if samples.labels is not None:
            scores = three_way(
                model,
                samples.images,
                samples.labels,
                population=samples.population,
                batch_size=batches.size or 32,
            )
    return Patient(
        path=path,
        kind="PyTorch module",
        normalizers=tuple(_normalizer(n, layer, found.get(n)) for n, layer in layers.items()),
        tensors={name: array(t) for name, t in model.state_dict().items()},
        graph=trace(model),
        training=model.training,
        batches=batches,
        scores=scores,
    )


def from_run(run: Run, weights: str, data: ImageData | None) -> Patient:
    """Describe a run's network as it was trained.

    Raises:
        DataError: data with other classes or image sizes than the run's.
    """
    recipe, last, samples = run.task.recipe, None, None
    model = run.model(weights)
    if data is not None:
        _check(run, data)
        train, _ = split_validation(data.x_train, data.y_train, recipe.validation)
        if data.sha256 == run.task.data_sha256:
            start, end = batch_bounds(len(train), recipe.batch_size, join_single=True)[-1]
            last = end - start
        samples = Samples(evenly(train.images), data.x_test, data.y_test)
    batches = Batches(size=recipe.batch_size, last=last, accumulation=1)
    patient = from_module(model, samples, batches, str(run.path))
    if weights == "recalibrated":  # these do not come from steps: nothing initial is left in them
        ns = tuple(replace(n, steps=None) for n in patient.normalizers)
        patient = replace(patient, normalizers=ns)
    meant = "" if recipe.norm == "batch" else f"its recipe has norm={recipe.norm}"
    kind = f"run, {weights} weights"
    patient = replace(patient, kind=kind, training=None, meant_without=meant)
    return patient if run.task.start is None else _as_trained(patient, run.task.start)


def _as_trained(patient: Patient, start: Start) -> Patient:
    """The network as it stood in its training, parts of it frozen.

    Statistics that were recalibrated hold nothing initial.
    """
    moves = start.statistics == "adapt"
    ns = tuple(
        replace(
            n,
            updates=moves,
            trainable=moves and not start.freeze,
            training=True,
            steps=None if start.statistics == "recalibrate" else n.steps,
        )
        for n in patient.normalizers
    )
    return replace(patient, normalizers=ns, training=True)


def _check(run: Run, data: ImageData) -> None:
    size = run.task.image_size
    if data.class_names != run.task.class_names or data.x_test.shape[1:3] != (size, size):
        raise DataError(
            f"data {data.name!r} has other classes or image sizes than run {run.path}: give data "
            f"with {len(run.task.class_names)} classes and {size} × {size} pixels"
        )


def _normalizer(name: str, layer: BatchNorm | TorchBatchNorm, found: Moments | None) -> Normalizer:
    if isinstance(layer, BatchNorm):
        old_weight: float | None = layer.old_weight
        updates = not layer.frozen
    else:
        old_weight = None if layer.momentum is None else 1 - layer.momentum
        updates = layer.track_running_stats
    steps = layer.num_batches_tracked
    return Normalizer(
        name=name or "model",
        running_mean=_vector(layer.running_mean),
        running_var=_vector(layer.running_var),
        weight=_vector(layer.weight),
        eps=layer.eps,
        old_weight=old_weight,
        steps=None if steps is None else int(steps),
        data_mean=None if found is None else found.mean.cpu().numpy(),
        data_var=None if found is None else found.var.cpu().numpy(),
        updates=updates,
        trainable=any(p.requires_grad for p in layer.parameters()),
        training=layer.training,
    )


def _vector(t: Tensor | None) -> NDArray[np.float64] | None:
    return None if t is None else t.detach().double().cpu().numpy()


def array(t: Tensor) -> NDArray[np.generic]:
    """A NumPy view where NumPy has the type; bfloat16 and smaller floats are widened."""
    t = t.detach().cpu()
    if t.is_floating_point() and t.dtype not in (torch.float16, torch.float32, torch.float64):
        t = t.float()
    return t.numpy()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers stay whole; only what is made of layers is looked into."""
        return not list(m.children())


def trace(model: nn.Module) -> tuple[Node, ...] | None:
    """The order of the layers as `torch.fx` finds it without running one; None if it cannot."""
    if not list(model.children()):
        return None
    try:
        with untouched(model):
            graph = _Tracer().trace(model.eval())  # in training, fused stages hide their layers
    except Exception:  # a forward may do anything with a stand-in for a tensor, and so may fail
        return None
    layers = dict(model.named_modules())
    names = {
        node: str(node.target) if node.op == "call_module" else node.name for node in graph.nodes
    }
    return tuple(
        Node(
            name=names[node],
            kind=_kind(node, layers),
            inputs=tuple(names[source] for source in node.all_input_nodes),
            has_bias=getattr(layers.get(names[node]), "bias", None) is not None,
        )
        for node in graph.nodes
    )


def _kind(node: fx.Node, layers: dict[str, nn.Module]) -> str:
    if node.op == "call_function" and node.target is functional_dropout:
        return "dropout"
    layer = layers[str(node.target)] if node.op == "call_module" else None
    match layer:
        case BatchNorm() | TorchBatchNorm():
            return "normalizer"
        case nn.Linear() | TorchConv():
            return "weights"
        case Dropout(rate=rate) | TorchDropout(p=rate) if rate > 0:
            return "dropout"
    return "other"
