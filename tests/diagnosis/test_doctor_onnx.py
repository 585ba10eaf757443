"""ONNX graphs as their many writers make them: constants in nodes, graphs in graphs, functions."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import normlab
from normlab.diagnosis.onnx_files import read_onnx

VECTORS = {"g": [1, 2, 0.5], "b": [0, 1, 2], "m": [0.5, 0.1, 0], "v": [1, 0.5, 2]}


def vectors(**changed: Any) -> dict[str, np.ndarray]:
    return {k: np.asarray(v, np.float32) for k, v in {**VECTORS, **changed}.items()}


def constant(name: str, value: Any, **attributes: Any) -> onnx.NodeProto:
    if not attributes:
        attributes = {"value": numpy_helper.from_array(np.asarray(value))}
    return helper.make_node("Constant", [], [name], **attributes)


def bn(x: str = "x", y: str = "y", name: str = "bn", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("BatchNormalization", [x, *"gbmv"], [y], name=name, **attributes)


def info(name: str, kind: int = TensorProto.FLOAT, shape: Any = ("N", 3)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def saved(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray] | None = None,
    *,
    opset: int = 17,
    inputs: tuple[onnx.ValueInfoProto, ...] = (),
    functions: list[onnx.FunctionProto] | None = None,
) -> Path:
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in (weights or {}).items()]
    graph = helper.make_graph(nodes, "g", [info("x"), *inputs], [info("y")], tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=8, functions=functions or [], producer_name="me"
    )
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def found(path: Path, rule: str) -> list[tuple[str, str]]:
    return [(f.where, f.severity) for f in normlab.doctor(path).findings if f.rule == rule]


TRAINING = [
    ("initializer", [], {"t": True}, True),
    ("initializer, off", [], {"t": False}, False),
    ("constant", [constant("t", True)], {}, True),
    ("constant, off", [constant("t", False)], {}, False),
    (
        "a constant passed on",
        [
            constant("s", 1, value_int=1),
            helper.make_node("Cast", ["s"], ["u"], to=9),
            helper.make_node("Identity", ["u"], ["t"]),
        ],
        {},
        True,
    ),
    ("negated", [constant("s", False), helper.make_node("Not", ["s"], ["t"])], {}, True),
]


@pytest.mark.parametrize(
    ("nodes", "weights", "ill"), [c[1:] for c in TRAINING], ids=[c[0] for c in TRAINING]
)
def test_dropout_in_training_mode(
    tmp_path: Path, nodes: list[onnx.NodeProto], weights: dict[str, Any], ill: bool
) -> None:
    drop = helper.make_node("Dropout", ["x", "r", "t"], ["y"], name="drop")
    path = saved(tmp_path / "a.onnx", [*nodes, drop], {"r": np.float32(0.5), **weights})
    assert found(path, "training-mode-exported") == [("drop", "serious")] * ill
    still = saved(tmp_path / "b.onnx", [*nodes, drop], {"r": np.float32(0), **weights})
    assert found(still, "training-mode-exported") == []  # it drops nothing


def test_dropout_whose_mode_the_caller_gives(tmp_path: Path) -> None:
    drop = helper.make_node("Dropout", ["x", "", "t"], ["y"])
    path = saved(tmp_path / "a.onnx", [drop], inputs=(info("t", TensorProto.BOOL, ()),))
    assert found(path, "training-mode-exported") == []


@pytest.mark.parametrize("kind", ["BatchNormalization", "Dropout"])
@pytest.mark.parametrize("is_test", [0, 1, None])
def test_the_oldest_graphs_say_it_by_an_attribute(
    tmp_path: Path, kind: str, is_test: int | None
) -> None:
    told = {} if is_test is None else {"is_test": is_test}
    inputs = ["x", *"gbmv"] if kind == "BatchNormalization" else ["x"]
    node = helper.make_node(kind, inputs, ["y"], name="n", **told)
    tensors = [numpy_helper.from_array(v, k) for k, v in vectors().items()]
    graph = helper.make_graph([node], "g", [info("x")], [info("y")], tensors)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 6)]), tmp_path / "a.onnx"
    )
    expected = [] if is_test else [("n", "serious")]
    assert found(tmp_path / "a.onnx", "training-mode-exported") == expected


def test_vectors_behind_constants_and_identities(tmp_path: Path) -> None:
    nodes = [
        constant("g", None, value_floats=VECTORS["g"]),
        constant("m", np.asarray(VECTORS["m"], np.float32)),
        helper.make_node("Identity", ["v0"], ["v1"]),
        helper.make_node("Identity", ["v1"], ["v"]),
        constant("wide", np.asarray(VECTORS["b"], np.float64)),
        helper.make_node("Cast", ["wide"], ["b"], to=TensorProto.FLOAT),
        bn(),
    ]
    path = saved(tmp_path / "a.onnx", nodes, {"v0": np.asarray([1, -0.5, 2], np.float32)})
    (n,) = read_onnx(path).normalizers
    np.testing.assert_allclose(n.running_mean, np.float32(VECTORS["m"]))
    np.testing.assert_allclose(n.weight, VECTORS["g"])
    assert found(path, "variance-not-positive") == [("bn", "serious")]
    nodes[1] = constant("m", np.asarray([0, np.nan, 0], np.float32))
    path = saved(tmp_path / "b.onnx", nodes, {"v0": np.ones(3, np.float32)})
    assert found(path, "not-finite") == [("m", "serious")]


def branch(name: str, nodes: list[onnx.NodeProto], weights: dict[str, Any]) -> onnx.GraphProto:
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    return helper.make_graph(nodes, name, [], [info("inner")], tensors)


def test_graphs_inside_graphs(tmp_path: Path) -> None:
    """One branch sees the outer weights, the other has weights of its own by the same names."""
    then = branch("then", [bn(y="inner")], {})
    other = branch("else", [bn(y="inner"), bn(y="second", name="")], vectors(v=[1, 1, -3]))
    choose = helper.make_node("If", ["c"], ["y"], "choose", then_branch=then, else_branch=other)
    condition = info("c", TensorProto.BOOL, ())
    path = saved(tmp_path / "a.onnx", [choose], vectors(), inputs=(condition,))
    assert normlab.doctor(path).normalizers == 3
    assert sorted(found(path, "variance-not-positive")) == [
        ("choose/else_branch/BatchNormalization_1", "serious"),
        ("choose/else_branch/bn", "serious"),
    ]


def test_functions_are_looked_into(tmp_path: Path) -> None:
    body = [constant("t", True), helper.make_node("Dropout", ["h", "", "t"], ["z"], name="drop")]
    inner = helper.make_function(
        *("own", "Block", ["a", *"gbmv"], ["z"], [bn("a", "h"), *body]),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    call = helper.make_node("Block", ["x", *"gbmv"], ["y"], name="call", domain="own")
    path = saved(tmp_path / "a.onnx", [call], vectors(v=[1, -1, 1]), functions=[inner])
    assert normlab.doctor(path).normalizers == 1
    assert [s for _, s in found(path, "variance-not-positive")] == ["serious"]
    assert [s for _, s in found(path, "training-mode-exported")] == ["serious"]


def test_a_vector_that_is_not_in_the_file(tmp_path: Path) -> None:
    weights = vectors()
    del weights["v"]
    nodes = [helper.make_node("Exp", ["log"], ["v"]), bn(), bn(y="y2", name="other")]
    path = saved(tmp_path / "a.onnx", nodes, {**weights, "log": np.zeros(3, np.float32)})
    assert found(path, "not-read") == [("bn", "serious"), ("other", "serious")]
    diagnosis = normlab.doctor(path)
    assert diagnosis.normalizers == 2
    assert "the variance is not in the file" in diagnosis.text(width=1000)


def test_a_graph_without_normalisers_says_where_they_may_have_gone(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    assert found(path, "no-normalizer") == [("model", "serious")]
    text = normlab.doctor(path).text(width=1000)
    assert "none of the 1 nodes is a BatchNormalization; me wrote it" in text
    assert "fold" in text
    healthy = normlab.doctor(saved(tmp_path / "b.onnx", [bn()], vectors()))
    assert healthy.findings == ()
    assert "folded" in healthy.text(width=1000)


def test_infinities_that_bound_are_no_weights(tmp_path: Path) -> None:
    """An attention mask of −∞, and a Clip without an upper bound."""
    mask = np.triu(np.full((3, 3), -np.inf, np.float32), 1)
    nodes = [
        constant("mask", mask),
        helper.make_node("Add", ["x", "mask"], ["h"]),
        helper.make_node("Clip", ["h", "low", "high"], ["i"]),
        bn("i"),
    ]
    bounds = {"low": np.float32(0), "high": np.float32(np.inf)}
    path = saved(tmp_path / "a.onnx", nodes, {**vectors(), **bounds})
    assert normlab.doctor(path).findings == ()
