"""Rules on how the layers stand to one another, and in which modes."""

from collections.abc import Iterator

from normlab.diagnosis.network import Network, Node
from normlab.diagnosis.rule import Observation, rule

EXPORT = "ONNX BatchNormalization, attribute training_mode; PyTorch issue 75252"


def normalizer_nodes(network: Network) -> Iterator[Node]:
    yield from (node for node in network.graph or () if node.kind == "normalizer")


@rule(
    "graph",
    worst="note",
    remedy="leave the bias out (bias=False, use_bias=False): the normaliser subtracts it again, "
    "and β does its work",
    source="Ioffe and Szegedy 2015, arXiv 1502.03167, section 3.2",
)
def useless_bias(network: Network) -> Iterator[Observation]:
    """A bias is subtracted again by the normaliser right behind it."""
    nodes = {node.name: node for node in network.graph or ()}
    frozen = {n.name for n in network.normalizers if not n.by_batch}
    readers: dict[str, int] = {}
    for node in nodes.values():
        for name in node.inputs:
            readers[name] = readers.get(name, 0) + 1
    for node in normalizer_nodes(network):
        if node.name in frozen:  # it subtracts a fixed mean, so the bias shifts its output
            continue
        for source in (nodes[name] for name in node.inputs if name in nodes):
            if source.kind == "weights" and source.has_bias and readers[source.name] == 1:
                yield Observation(
                    source.name, "note", f"its bias has no effect: {node.name} follows"
                )


@rule(
    "graph",
    worst="note",
    remedy="put dropout behind the last normaliser, or `normlab recalibrate RUN`",
    source="Li et al. 2018, arXiv 1801.05134",
)
def dropout_before_normalizer(network: Network) -> Iterator[Observation]:
    """Dropout stands before a normaliser: its variance shifts between training and evaluation."""
    nodes = {node.name: node for node in network.graph or ()}
    frozen = {n.name for n in network.normalizers if not n.by_batch}
    for node in normalizer_nodes(network):
        if node.name in frozen:  # it learns nothing from what dropout left
            continue
        for dropout in _dropouts_before(node, nodes):
            evidence = f"{dropout} stands before it: the variance it learns in training is another"
            yield Observation(node.name, "note", f"{evidence} than in evaluation")


def _dropouts_before(node: Node, nodes: dict[str, Node]) -> list[str]:
    """Dropouts that reach `node` without passing another normaliser."""
    found, seen, waiting = [], set[str](), list(node.inputs)
    while waiting:
        name = waiting.pop()
        if name in seen or name not in nodes:
            continue
        seen.add(name)
        if nodes[name].kind == "dropout":
            found.append(name)
        if nodes[name].kind != "normalizer":
            waiting += nodes[name].inputs
    return sorted(found)


@rule(
    "modes",
    worst="serious",
    remedy="keep it in .eval() after every .train(), or use normlab.BatchNorm.freeze()",
    source="fastai issue 3030: .train() thaws frozen normalisers",
)
def frozen_but_updating(network: Network) -> Iterator[Observation]:
    """A layer that learns nothing still moves its running statistics."""
    if not network.training:
        return
    for n in network.normalizers:
        if n.trainable is False and n.weight is not None and n.training and n.updates:
            evidence = "γ and β do not require gradients, yet it is in training mode"
            yield Observation(n.name, "serious", evidence)


@rule(
    "modes",
    worst="warning",
    remedy="freeze γ and β too, or put the layer into training mode",
    source="PyTorch's documentation of Module.eval and requires_grad",
)
def learning_but_frozen(network: Network) -> Iterator[Observation]:
    """A layer that learns does not move its running statistics."""
    if not network.training:
        return
    for n in network.normalizers:
        if n.trainable and n.running_var is not None and not n.by_batch:
            evidence = "γ or β learns, but in training it normalises by fixed running statistics"
            yield Observation(n.name, "warning", evidence)


@rule(
    "exported",
    worst="serious",
    remedy="call .eval() before the export and ask for inference mode",
    source=EXPORT,
)
def training_mode_exported(network: Network) -> Iterator[Observation]:
    """An exported graph is still in training mode: answers depend on the other images."""
    dropouts = {node.name for node in network.graph or () if node.kind == "dropout"}
    for name in network.training_nodes or ():
        effect = ", so it drops at random" if name in dropouts else ""
        yield Observation(name, "serious", f"the node is in training mode{effect}")


@rule(
    "modes",
    worst="serious",
    remedy="make the layer with track_running_stats=True and train again, or give it the "
    "statistics of a whole set of images",
    source="PyTorch's documentation of track_running_stats; PyTorch issue 37823",
)
def no_running_statistics(network: Network) -> Iterator[Observation]:
    """A layer normalises by the batch in evaluation, too: answers depend on the other images."""
    for n in network.normalizers:
        if n.running_var is None:
            yield Observation(n.name, "serious", "it keeps no running statistics")
        elif n.updates is False and n.by_batch:
            evidence = "it normalises by the batch in training, but track_running_stats is off: "
            yield Observation(
                n.name, "warning", evidence + "evaluation takes statistics that never move"
            )


@rule(
    "modes",
    worst="warning",
    remedy="keep the layer in float32 and use torch.autocast, or call "
    "normlab.convert_batchnorm(network) before the cast",
    source="PyTorch issue 70901; Micikevicius et al. 2018, arXiv 1710.03740",
)
def half_precision_statistics(network: Network) -> Iterator[Observation]:
    """Running statistics are kept in half precision: small steps are lost.

    A warning in training, a note in evaluation, where they no longer move.
    """
    for n in network.normalizers:
        if n.dtype in ("bfloat16", "float16") and n.by_batch:
            severity = "warning" if network.training else "note"
            digits = 8 if n.dtype == "bfloat16" else 11
            evidence = f"they are {n.dtype}, of {digits} binary digits: a step below 1/{2**digits} "
            yield Observation(n.name, severity, evidence + "of their size moves nothing")
