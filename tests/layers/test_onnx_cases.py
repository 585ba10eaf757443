"""ONNX's own cases for BatchNormalization: four of the node, five converted models."""

import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.backend.test.case import node
from onnx.backend.test.loader import load_model_tests

from normlab import BatchNorm

NODE = [
    "test_batchnorm_epsilon",
    "test_batchnorm_epsilon_training_mode",
    "test_batchnorm_example",
    "test_batchnorm_example_training_mode",
]
CONVERTED = [
    "test_BatchNorm1d_3d_input_eval",
    "test_BatchNorm2d_eval",
    "test_BatchNorm2d_momentum_eval",
    "test_BatchNorm3d_eval",
    "test_BatchNorm3d_momentum_eval",
]


@cache
def cases(kind: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "node":  # all of ONNX's 2,000 would be computed for it: the one module's are
            import_module("onnx.backend.test.case.node.batch_normalization")
            known = node._NodeTestCases
        else:
            known = load_model_tests(kind=kind)
        return {c.name: c for c in known if "batchnorm" in c.name.lower()}


def run(operation: onnx.NodeProto, values: list[np.ndarray]) -> list[np.ndarray]:
    """Answer the operation with our layer: y, and in training mode the running statistics."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in operation.attribute}
    x, scale, bias, mean, var = (torch.from_numpy(v.copy()) for v in values)
    layer = BatchNorm(
        len(scale),
        convention="onnx",
        eps=attributes.get("epsilon"),
        momentum=attributes.get("momentum"),
    )
    state = {"weight": scale, "bias": bias, "running_mean": mean, "running_var": var}
    layer.load_state_dict(state | {"num_batches_tracked": torch.tensor(0)})
    layer.train(bool(attributes.get("training_mode", 0)))
    with torch.no_grad():
        y = layer(x)
    outputs = [y, layer.running_mean, layer.running_var]
    return [t.numpy() for t in outputs[: len(operation.output)]]


@pytest.mark.parametrize("name", NODE)
def test_node_case(name: str) -> None:
    case = cases("node")[name]
    for inputs, outputs in case.data_sets:
        got = run(case.model.graph.node[0], list(inputs))
        assert len(got) == len(outputs)
        for ours, theirs in zip(got, outputs, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=case.rtol, atol=case.atol)


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_model(name: str) -> None:
    case = cases("pytorch-converted")[name]
    graph = onnx.load(Path(case.model_dir) / "model.onnx").graph
    known = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    batch_norm = graph.node[0]
    sets = sorted(Path(case.model_dir).glob("test_data_set_*"))
    assert sets
    for folder in sets:
        x, y = (
            numpy_helper.to_array(onnx.load_tensor(folder / f"{part}_0.pb"))
            for part in ("input", "output")
        )
        (got,) = run(batch_norm, [x, *(known[i] for i in batch_norm.input[1:])])
        np.testing.assert_allclose(got, y, rtol=case.rtol, atol=case.atol)


def test_there_are_no_other_cases() -> None:
    assert sorted(cases("node")) == NODE
    assert sorted(cases("pytorch-converted")) == CONVERTED
