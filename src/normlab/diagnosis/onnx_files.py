"""Describe an ONNX graph. Nothing is run; weights outside the file come from its folder only."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.diagnosis.network import Network, Node, Normalizer
from normlab.errors import DataError, UserError, install

_WEIGHTS = {"Conv", "ConvTranspose", "Gemm"}
_VECTORS = ("γ", "β", "the mean", "the variance")
# What `normlab export` writes; its certificate compares the file's answers with the run's.
OWN = "normlab exported it and folded the normalisations into the layers beside them"
FOLDED = (
    "A normalisation that the exporter folded into the layer before it is not in the file and was "
    "not examined"
)
_DEPTH = 50  # of nodes that pass a constant on, and of graphs inside graphs
Array = NDArray[Any]
Arrays = dict[str, Array]


def read_onnx(path: Path) -> Network:
    """Describe the graph in an ONNX file, with the graphs and functions inside it.

    Raises:
        UserError: the package onnx is not installed.
        DataError: the file is damaged, or keeps weights outside its folder.
    """
    try:
        import onnx
        import onnx.inliner
        from google.protobuf.message import DecodeError
    except ImportError:
        raise UserError(f"{path}: reading ONNX needs onnx: {install('onnx')}") from None
    try:
        model = onnx.load(path, load_external_data=False)
        if not model.graph.node:
            raise ValueError("it holds no graph")
        if model.functions:  # each call becomes the nodes of its function
            model = onnx.inliner.inline_local_functions(model)
        return _describe(str(path), model, path.parent)
    except UserError:
        raise
    except (
        *(DecodeError, ValueError, TypeError, OSError, LookupError, AttributeError, RuntimeError),
        *(ArithmeticError, NotImplementedError, onnx.checker.ValidationError),
    ) as e:
        raise DataError(f"{path} is not a whole ONNX file ({e})") from None


def _array(tensor: Any, folder: Path) -> Array:
    from onnx import numpy_helper
    from onnx.external_data_helper import uses_external_data

    if uses_external_data(tensor):
        place = next((e.value for e in tensor.external_data if e.key == "location"), "")
        home = (folder / place).resolve()
        if not home.is_relative_to(folder.resolve()):
            raise DataError(f"tensor {tensor.name!r} lies outside the graph's folder: {place!r}")
        if not home.is_file():
            raise DataError(f"tensor {tensor.name!r} lies in {place!r}, which is not there")
        if math.prod(tensor.dims) > home.stat().st_size * 8:  # of the smallest type, a bit each
            raise DataError(f"tensor {tensor.name!r} is larger than {place!r}, in which it lies")
    values = np.asarray(numpy_helper.to_array(tensor, base_dir=str(folder)))
    # Small floats (bfloat16 and below) have types that NumPy does not know.
    return values.astype(np.float32) if values.dtype.kind == "V" else values


@dataclass(frozen=True)
class _Graph:
    """A graph, and what it sees of the graph around it.

    Attributes:
        prefix: what its nodes' names begin with.
        arrays: its weights, by name.
        makers: its nodes, each with its name, by what they put out.
    """

    prefix: str
    proto: Any
    folder: Path
    arrays: Arrays
    outer: "_Graph | None" = None
    makers: dict[str, tuple[str, Any]] = field(default_factory=dict)

    def maker(self, value: str) -> tuple[str, Any] | None:
        """The node that puts `value` out, here or in a graph around this one."""
        if value in self.makers or self.outer is None:
            return self.makers.get(value)
        return self.outer.maker(value)

    def constant(self, value: str, depth: int = 0) -> Array | None:
        """What `value` is, if that stands in the file: a weight, or a constant passed on."""
        if value in self.arrays:
            return self.arrays[value]
        if value in self.makers:
            _, node = self.makers[value]
            if node.op_type == "Constant":
                return _constant(node, self.folder)
            if depth < _DEPTH and node.input and node.op_type in _PASSED_ON:
                found = self.constant(node.input[0], depth + 1)
                return None if found is None else _PASSED_ON[node.op_type](found)
            return None
        return None if self.outer is None else self.outer.constant(value, depth)


def _constant(node: Any, folder: Path) -> Array | None:
    for a in node.attribute:
        match a.name:
            case "value":
                return _array(a.t, folder)
            case "value_float":
                return np.asarray(a.f, np.float32)
            case "value_int":
                return np.asarray(a.i)
            case "value_floats":
                return np.asarray(a.floats, np.float32)
            case "value_ints":
                return np.asarray(a.ints)
    return None


# Nodes that leave a vector's values, and a truth value, as they are.
_PASSED_ON = {
    "Cast": lambda values: values,
    "CastLike": lambda values: values,
    "Identity": lambda values: values,
    "Flatten": lambda values: values.reshape(-1),
    "Reshape": lambda values: values.reshape(-1),
    "Squeeze": lambda values: values.reshape(-1),
    "Unsqueeze": lambda values: values.reshape(-1),
    "Not": lambda values: ~values.astype(bool),
}


def _graphs(proto: Any, folder: Path) -> Iterator[_Graph]:
    """The graph and all graphs inside its nodes, such as the branches of an If."""
    waiting: list[tuple[Any, str, _Graph | None, int]] = [(proto, "", None, 0)]
    while waiting:
        proto, prefix, outer, depth = waiting.pop()
        arrays = {t.name: _array(t, folder) for t in proto.initializer}
        arrays |= {t.values.name: _array(t.values, folder) for t in proto.sparse_initializer}
        graph = _Graph(prefix, proto, folder, arrays, outer)
        for i, node in enumerate(proto.node):
            name = prefix + str(node.name or f"{node.op_type}_{i}")
            graph.makers.update({output: (name, node) for output in node.output if output})
            inner = [(a.name, g) for a in node.attribute for g in (a.g, *a.graphs) if g.node]
            if inner and depth == _DEPTH:
                raise ValueError(f"graphs inside graphs, {_DEPTH} deep")
            waiting += [(g, f"{name}/{branch}/", graph, depth + 1) for branch, g in inner]
        yield graph


def _describe(path: str, model: Any, folder: Path) -> Network:
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
    nodes: list[Node] = []
    normalizers: list[Normalizer] = []
    training: list[str] = []
    unread: dict[str, str] = {}
    tensors: Arrays = {}
    total = 0
    for graph in _graphs(model.graph, folder):
        tensors |= {graph.prefix + name: values for name, values in graph.arrays.items()}
        for i, node in enumerate(graph.proto.node):
            total += 1
            name = graph.prefix + str(node.name or f"{node.op_type}_{i}")
            attributes = {a.name: a for a in node.attribute}
            if node.op_type in {*_WEIGHTS, "MatMul", "BatchNormalization"}:
                tensors |= _constants(graph, node)
            if node.op_type == "BatchNormalization":
                found, missing = _normalizer(name, node, attributes, graph)
                normalizers.append(found)
                if missing:
                    unread[name] = f"{' and '.join(missing)} is not in the file, but computed"
            if _in_training_mode(node, attributes, graph, opset):
                training.append(name)
            sources = (graph.maker(value) for value in node.input)
            nodes.append(
                Node(
                    name=name,
                    kind=_kind(node),
                    inputs=tuple(source[0] for source in sources if source is not None),
                    has_bias=node.op_type in _WEIGHTS and _has_bias(graph, node),
                )
            )
    return Network(
        path=path,
        kind="ONNX graph",
        normalizers=tuple(normalizers),
        tensors=tensors,
        graph=tuple(nodes),
        training_nodes=tuple(training),
        unread=unread,
        absence="" if normalizers else _absence(model, total),
        meant_without=OWN if model.producer_name == "normlab" else "",
        caveats=(FOLDED,) if normalizers else (),
    )


def _constants(graph: _Graph, node: Any) -> Arrays:
    """Weights that come from Constant nodes, by the name under which `node` takes them."""
    found = {}
    for value in node.input:
        values = graph.constant(value) if value and value not in graph.arrays else None
        if values is not None:
            found[graph.prefix + value] = values
    return found


def _absence(model: Any, total: int) -> str:
    """Why a graph may hold no batch normalisation, though the network has some."""
    maker = " ".join(x for x in (model.producer_name, model.producer_version) if x)
    evidence = f"none of the {total} nodes is a BatchNormalization"
    if maker:
        evidence += f"; {maker} wrote it"
    return evidence + (
        ". Exporters fold normalisations into the layers before them (PyTorch's newer one, "
        "torch.onnx.export with dynamo=True, does so unless optimize=False) or write them as "
        "single operations: their statistics are then not in the file"
    )


def _has_bias(graph: _Graph, node: Any) -> bool:
    """Whether a bias is added: PyTorch's newer exporter also writes zeros where there is none."""
    bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    return bias is not None and bool(bias.any())


def _kind(node: Any) -> str:
    if node.op_type == "BatchNormalization":
        return "normalizer"
    if node.op_type == "Dropout":
        return "dropout"
    return "weights" if node.op_type in _WEIGHTS else "other"


def _in_training_mode(node: Any, attributes: Mapping[str, Any], graph: _Graph, opset: int) -> bool:
    """Whether the node does what it does in training.

    Until version 7 an attribute `is_test` said so. A normaliser then said so by more than one
    output, and since version 14 by an attribute; dropout by an input, since version 12.
    """
    if node.op_type not in ("BatchNormalization", "Dropout"):
        return False
    if opset < 7:
        return "is_test" not in attributes or not attributes["is_test"].i
    if node.op_type == "BatchNormalization":
        if opset >= 14:
            return "training_mode" in attributes and bool(attributes["training_mode"].i)
        return len([output for output in node.output if output]) > 1
    if opset < 12 or len(node.input) < 3 or not node.input[2]:
        return False
    mode = graph.constant(node.input[2])
    ratio = graph.constant(node.input[1]) if node.input[1] else np.asarray(0.5)
    drops = ratio is None or bool(ratio.any())
    return drops and mode is not None and bool(mode.any())


def _normalizer(
    name: str, node: Any, attributes: Mapping[str, Any], graph: _Graph
) -> tuple[Normalizer, list[str]]:
    """The normaliser, and which of its vectors are not in the file."""
    gamma, beta, mean, var = values = [_vector(graph.constant(x)) for x in node.input[1:5]]
    missing = [what for what, v in zip(_VECTORS, values, strict=True) if v is None]
    del beta  # no rule looks at it
    found = Normalizer(
        name=name,
        running_mean=mean,
        running_var=var,
        weight=gamma,
        eps=attributes["epsilon"].f if "epsilon" in attributes else 1e-5,
    )
    return found, missing


def _vector(values: Array | None) -> NDArray[np.float64] | None:
    return None if values is None else values.astype(np.float64).reshape(-1)
