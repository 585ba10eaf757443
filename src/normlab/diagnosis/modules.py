"""Describe a live PyTorch module, or the network of a run, without changing it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn.functional import dropout as functional_dropout
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm
from torch.nn.modules.conv import _ConvNd as TorchConv
from torch.nn.modules.dropout import _DropoutNd as TorchDropout
from torch.nn.modules.instancenorm import _InstanceNorm as TorchInstanceNorm
from torch.nn.parameter import is_lazy

from normlab.data import ImageData
from normlab.data.batches import batch_bounds, split_images
from normlab.diagnosis.network import Batches, Network, Node, Normalizer
from normlab.errors import UserError
from normlab.evaluation.forward import Images, count, frozen, normalizers, trains, untouched
from normlab.evaluation.population import Moments, evenly, population_moments
from normlab.evaluation.scores import three_way
from normlab.layers import BatchNorm, Dropout
from normlab.runs import Run, Start


@dataclass(frozen=True)
class Samples:
    """Images to take statistics from, and images with labels (N,), if any, to score."""

    population: Images
    images: Images
    labels: NDArray[np.integer] | Tensor | None


def from_module(
    model: nn.Module,
    samples: Samples | None = None,
    batches: Batches | None = None,
    path: str = "model",
    graph: tuple[Node, ...] | None = None,
) -> Network:
    """Describe `model`; with samples, run through it what the rules want to know of them.

    Args:
        graph: the order of its layers, where it is known already; None to look for it.

    Raises:
        UserError: lazy layers that have no weights yet, a live Keras model; samples that do not
            fit.
    """
    _refuse(model)
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
                batch_size=max(batches.size or 32, 2),  # one may have no statistics
            )
    total = 0 if samples is None else count(samples.population)
    training = trains(model)
    described = [
        _normalizer(name, layer, found.get(name), total, training) for name, layer in layers.items()
    ]
    return Network(
        path=path,
        kind="PyTorch module",
        normalizers=(*described, *_others(model)),
        tensors={name: array(t) for name, t in model.state_dict().items()},
        graph=trace(model) if graph is None else graph or None,
        training=training,
        meant_without="every layer was looked at",
        batches=batches,
        scores=scores,
    )


def from_run(run: Run, weights: str, data: ImageData | None) -> Network:
    """Describe a run's network as it was trained.

    Raises:
        DataError: data with other classes or image sizes than the run's.
    """
    recipe, last, samples = run.task.recipe, None, None
    weights = run.kept if weights == "kept" else weights
    model = run.model(weights)
    if data is not None:
        run.check_data(data)
        train, _ = split_images(data, recipe.validation)
        if data.sha256 == run.task.data_sha256:
            start, end = batch_bounds(len(train), recipe.batch_size, join_single=True)[-1]
            last = end - start
        samples = Samples(evenly(train.images), data.x_test, data.y_test)
    batches = Batches(size=recipe.batch_size, last=last, accumulation=1)
    network = from_module(model, samples, batches, str(run.path))
    if weights == "recalibrated":  # these do not come from steps: nothing initial is left in them
        ns = tuple(replace(n, steps=None) for n in network.normalizers)
        network = replace(network, normalizers=ns)
    norm = recipe.norm.name
    meant = "" if norm == "batch" else f"its recipe has norm={norm}"
    kind = f"run, {weights} weights"
    network = replace(
        network,
        kind=kind,
        training=None,
        meant_without=meant,
        classes=_classes(run) if weights == run.kept else {},
        simple=_simple(run) if weights == run.kept else None,
    )
    return network if run.task.start is None else _as_trained(network, run.task.start)


def _classes(run: Run) -> dict[str, tuple[int, int]]:
    """Right answers and images of each class in the run's own test."""
    result = run.result
    confusion = None if result is None else result.get("evaluation", {}).get("confusion")
    names = run.task.class_names
    if confusion is None or np.shape(confusion) != (len(names), len(names)):
        return {}
    rows = zip(names, confusion, strict=True)
    return {name: (int(row[k]), int(sum(row))) for k, (name, row) in enumerate(rows)}


def _simple(run: Run) -> tuple[float, float] | None:
    """The run's accuracy, and where the interval of a logistic regression on its data ends."""
    result = run.result
    baselines = None if result is None else result.get("baselines")
    if result is None or not baselines:
        return None
    simple = baselines["logistic regression"]
    return result["test_accuracy"], simple["test_accuracy_interval"][1]


def _as_trained(network: Network, start: Start) -> Network:
    """The network as it stood in its training, parts of it frozen.

    Statistics that were recalibrated hold nothing initial.
    """
    moves = start.statistics == "adapt"
    ns = tuple(
        replace(
            n,
            updates=moves,
            takes_batch=moves,
            trainable=moves and not start.freeze,
            training=True,
            # Counted from the start, whose statistics were no initial ones.
            steps=None if start.origin or start.statistics == "recalibrate" else n.steps,
        )
        for n in network.normalizers
    )
    pretrained = "" if start.origin is None else start.origin.network
    return replace(network, normalizers=ns, training=True, pretrained=pretrained)


def _refuse(model: nn.Module) -> None:
    """Refuse what cannot be described, by its name."""
    if any(base.__module__.partition(".")[0] == "keras" for base in type(model).__mro__):
        raise UserError(
            f"a live Keras model ({type(model).__name__}): save it as a .keras file and give that"
        )
    state = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, value in state if is_lazy(value)]
    if lazy:
        raise UserError(
            f"{len(lazy)} weights have no values yet ({lazy[0]} …): the network has lazy layers; "
            "run one batch through it first"
        )
    meta = [name for name, value in state if value.is_meta]
    if meta:
        raise UserError(f"{meta[0]} is on the device 'meta', without values: load weights first")


def _normalizer(
    name: str,
    layer: BatchNorm | TorchBatchNorm,
    found: Moments | None,
    total: int,
    training: bool,
) -> Normalizer:
    if isinstance(layer, BatchNorm):
        decay = layer.decay
    else:
        decay = None if layer.momentum is None else 1 - layer.momentum
    steps = layer.num_batches_tracked
    tracked = layer.track_running_stats and layer.running_var is not None
    return Normalizer(
        name=name or "model",
        running_mean=_vector(layer.running_mean),
        running_var=_vector(layer.running_var),
        weight=_vector(layer.weight),
        eps=layer.eps,
        decay=decay if tracked else None,
        steps=None if steps is None else int(steps),
        data_mean=None if found is None else found.mean.cpu().numpy(),
        data_var=None if found is None else found.var.cpu().numpy(),
        updates=tracked and not getattr(layer, "frozen", False),
        takes_batch=not _frozen(layer, training),
        dtype=_dtype(layer.running_var),
        single=None if found is None else found.count <= total,
        trainable=any(p.requires_grad for p in layer.parameters()),
        training=layer.training,
    )


def _frozen(layer: BatchNorm | TorchBatchNorm, training: bool) -> bool:
    """Whether the layer normalises by running statistics while its network is trained.

    A network in evaluation mode does not show it by its modes; what learns nothing is then taken
    to be frozen.
    """
    if layer.running_var is None:
        return False
    if frozen(layer, training):
        return True
    parameters = list(layer.parameters())
    return not training and bool(parameters) and not any(p.requires_grad for p in parameters)


def _others(model: nn.Module) -> Iterator[Normalizer]:
    """Modules of other classes with the statistics of a batch normalisation.

    Such as torchvision's FrozenBatchNorm2d, layers of one's own, and those of a ScriptModule.
    """
    for name, module in model.named_modules():
        if isinstance(module, TorchBatchNorm | TorchInstanceNorm):
            continue
        own = dict(module.named_buffers(recurse=False))
        own |= dict(module.named_parameters(recurse=False))
        mean, var, steps = (
            own.get(key) for key in ("running_mean", "running_var", "num_batches_tracked")
        )
        if mean is None or var is None or mean.shape != var.shape or mean.ndim != 1:
            continue
        eps = getattr(module, "eps", None)
        yield Normalizer(
            name=name or "model",
            running_mean=_vector(mean),
            running_var=_vector(var),
            weight=_vector(own.get("weight")),
            eps=eps if isinstance(eps, float) else None,
            steps=int(steps) if steps is not None and steps.numel() == 1 else None,
            takes_batch=False if "frozen" in type(module).__name__.lower() else None,
        )


def _dtype(t: Tensor | None) -> str | None:
    return None if t is None else str(t.dtype).removeprefix("torch.")


def _vector(t: Tensor | None) -> NDArray[np.float64] | None:
    return None if t is None else t.detach().double().cpu().numpy()


def array(t: Tensor) -> NDArray[np.generic]:
    """A NumPy view where NumPy has the type; bfloat16 and smaller floats are widened."""
    t = t.detach().cpu()
    if t.is_quantized:
        t = t.dequantize()
    if t.layout is not torch.strided:
        t = t.to_dense()
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
