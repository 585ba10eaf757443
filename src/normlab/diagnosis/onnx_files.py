"""Describe an ONNX graph. Nothing is run; weights outside the file come from its folder only."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.diagnosis.patient import Node, Normalizer, Patient
from normlab.errors import DataError, UserError

_WEIGHTS = {"Conv", "ConvTranspose", "Gemm"}
Arrays = dict[str, NDArray[Any]]


def read_onnx(path: Path) -> Patient:
    """Describe the graph in an ONNX file.

    Raises:
        UserError: the package onnx is not installed.
        DataError: the file is damaged, or keeps weights outside its folder.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise UserError(f"{path}: reading ONNX needs onnx: install normlab[onnx]") from None
    try:
        model = onnx.load(path, load_external_data=False)
        if not model.graph.node:
            raise ValueError("it holds no graph")
        arrays = {t.name: _array(t, path.parent) for t in model.graph.initializer}
        return _describe(str(path), model, arrays)
    except UserError:
        raise
    except (
        *(DecodeError, ValueError, TypeError, OSError, LookupError, AttributeError, RuntimeError),
        *(ArithmeticError, NotImplementedError, onnx.checker.ValidationError),
    ) as e:
        raise DataError(f"{path} is not a whole ONNX file ({e})") from None


def _array(tensor: Any, folder: Path) -> NDArray[Any]:
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
    return np.asarray(numpy_helper.to_array(tensor, base_dir=str(folder)))


def _describe(path: str, model: Any, arrays: Arrays) -> Patient:
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
    makers = {
        output: _name(node, i) for i, node in enumerate(model.graph.node) for output in node.output
    }
    nodes, normalizers, training = [], [], []
    for i, node in enumerate(model.graph.node):
        attributes = {a.name: a for a in node.attribute}
        if node.op_type == "BatchNormalization":
            normalizers.append(_normalizer(_name(node, i), node, attributes, arrays))
        if _in_training_mode(node, attributes, arrays, opset):
            training.append(_name(node, i))
        nodes.append(
            Node(
                name=_name(node, i),
                kind=_kind(node),
                inputs=tuple(makers[x] for x in node.input if x in makers),
                has_bias=node.op_type in _WEIGHTS and len(node.input) > 2,
            )
        )
    return Patient(
        path=path,
        kind="ONNX graph",
        normalizers=tuple(normalizers),
        tensors=arrays,
        graph=tuple(nodes),
        training_nodes=tuple(training),
    )


def _name(node: Any, index: int) -> str:
    return str(node.name or f"{node.op_type}_{index}")


def _kind(node: Any) -> str:
    if node.op_type == "BatchNormalization":
        return "normalizer"
    if node.op_type == "Dropout":
        return "dropout"
    return "weights" if node.op_type in _WEIGHTS else "other"


def _in_training_mode(node: Any, attributes: dict[str, Any], arrays: Arrays, opset: int) -> bool:
    """Until version 14, more than one output meant training; then there came an attribute."""
    if node.op_type == "BatchNormalization":
        if opset >= 14:
            return "training_mode" in attributes and bool(attributes["training_mode"].i)
        return len([output for output in node.output if output]) > 1
    if node.op_type == "Dropout" and opset >= 12 and len(node.input) > 2 and node.input[2]:
        mode = arrays.get(node.input[2])
        return mode is not None and bool(mode.any())
    return False


def _normalizer(name: str, node: Any, attributes: dict[str, Any], arrays: Arrays) -> Normalizer:
    gamma, _, mean, var = (
        None if x not in arrays else arrays[x].astype(np.float64) for x in node.input[1:5]
    )
    return Normalizer(
        name=name,
        running_mean=mean,
        running_var=var,
        weight=gamma,
        eps=attributes["epsilon"].f if "epsilon" in attributes else 1e-5,
    )
