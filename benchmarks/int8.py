"""Eight bits before and after folding: what quantising a network costs.

    python -m benchmarks.int8 runs/0001-fast79 --out docs/results/export/fast79-int8-ways.json

The same quantiser, calibrated on the same training pictures, is given the graph with its
normalisations as `BatchNormalization` nodes, as exporters of frameworks leave it, and the graph
that `normlab export` folds; of that with the first, the last, or both of these layers left in
float32, too. All test pictures, one thread.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from normlab.interchange.folding import fold
from normlab.interchange.onnx_graph import build
from normlab.interchange.quantized import _two_samples, quantize
from normlab.interchange.steps import chain_of
from normlab.runs import open_run

BATCH = 250


def with_nodes(network: onnx.ModelProto) -> onnx.ModelProto:
    """`network` with each Sub, Mul, Add of a normalisation as one `BatchNormalization`."""
    model = onnx.ModelProto()
    model.CopyFrom(network)
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    left = iter(network.graph.node)
    for node in left:
        if node.op_type != "Sub":
            nodes.append(node)
            continue
        scale, shift = next(left), next(left)
        mean, gamma, beta = (arrays[n.input[1]].ravel() for n in (node, scale, shift))
        name = shift.output[0]
        inputs = [node.input[0]]
        for part, values in enumerate((gamma, beta, mean, np.ones_like(mean))):
            inputs.append(f"{name}.{part}.bn")
            model.graph.initializer.append(numpy_helper.from_array(values, inputs[-1]))
        nodes.append(helper.make_node("BatchNormalization", inputs, [name], name, epsilon=0.0))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def answers(network: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Probabilities (N, K)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(
        network.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    parts = [
        session.run(None, {"images": np.ascontiguousarray(images[i : i + BATCH])})[0]
        for i in range(0, len(images), BATCH)
    ]
    return np.concatenate(parts)


def measure(path: Path) -> Iterator[dict[str, Any]]:
    run = open_run(path)
    data, chain = run.task.load(), chain_of(run.model(), run.task.image_size)
    classes = len(run.task.class_names)
    folded, unfolded = build(fold(chain), classes), with_nodes(build(chain, classes))
    calibration, _ = _two_samples(data.x_train)
    expected = answers(folded, data.x_test)
    layers = [n.name for n in folded.graph.node if n.op_type in ("Conv", "Gemm")]
    first, last = layers[0], layers[-1]
    ways = {
        "float32, folded": folded,
        "float32, unfolded": unfolded,
        "int8, folded": quantize(folded, calibration),
        "int8, folded, first layer in float32": quantize(folded, calibration, (first,)),
        "int8, folded, last layer in float32": quantize(folded, calibration, (last,)),
        "int8, folded, both in float32": quantize(folded, calibration, (first, last)),
        "int8, unfolded": quantize(unfolded, calibration),
    }
    for way, network in ways.items():
        told = answers(network, data.x_test)
        yield {
            "way": way,
            "accuracy": float((told.argmax(1) == data.y_test).mean()),
            "changed_answers": float((told.argmax(1) != expected.argmax(1)).mean()),
            "largest_difference": float(np.abs(told - expected).max()),
            "bytes": len(network.SerializeToString()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for row in measure(arguments.run):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
