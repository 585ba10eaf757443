"""ONNX Runtime on the graph that `normlab export` writes, and on one that was not folded.

The graph that was not folded keeps a `BatchNormalization` node for each normaliser, as exporters
write them, so that ONNX Runtime may fuse what it can. Denormals are flushed; all else is ONNX
Runtime's own choice.
"""

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from benchmarks.entry import (
    Entry,
    Images,
    Options,
    Probabilities,
    batches,
    inference_cases,
)
from benchmarks.networks import CLASSES, SIZE, build_prepared
from normlab.interchange.folding import fold
from normlab.interchange.onnx_graph import build
from normlab.interchange.steps import Chain, Norm, chain_of


def graph(options: Options, *, folded: bool) -> onnx.ModelProto:
    """The graph of the entry's network with the prepared weights."""
    model = build_prepared(options, options.extra["network"]).eval()
    chain = chain_of(model, SIZE)
    return build(fold(chain), CLASSES) if folded else with_batch_norms(chain)


def with_batch_norms(chain: Chain) -> onnx.ModelProto:
    """The graph of `chain` with one node a normaliser, where `build` writes three."""
    model = build(chain, CLASSES)
    norms = {step.name: step for step in chain.steps if isinstance(step, Norm)}
    nodes: list[onnx.NodeProto] = []
    inputs: dict[str, str] = {}
    for node in model.graph.node:
        name, _, part = node.name.rpartition(".")
        if part == "centred" and name in norms:
            inputs[name] = node.input[0]
        elif node.name in norms:
            nodes.append(_batch_norm(model.graph, norms[node.name], inputs[node.name]))
        elif part != "scaled" or name not in norms:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    for array in [a for a in model.graph.initializer if a.name not in used]:
        model.graph.initializer.remove(array)
    onnx.checker.check_model(model, full_check=True)
    return model


def _batch_norm(target: onnx.GraphProto, norm: Norm, source: str) -> onnx.NodeProto:
    arrays = {"gamma": norm.gamma, "beta": norm.beta, "mean": norm.mean, "var": norm.std**2}
    for key, array in arrays.items():
        target.initializer.append(
            numpy_helper.from_array(array.astype(np.float32), f"{norm.name}.{key}")
        )
    names = [source, *(f"{norm.name}.{key}" for key in arrays)]
    # σ² holds its ε already.
    return helper.make_node("BatchNormalization", names, [norm.name], name=norm.name, epsilon=0.0)


def predict(options: Options) -> Entry:
    """Probabilities of pixels, as the exported model gives them."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.add_session_config_entry("session.set_denormal_as_zero", "1")
    model = graph(options, folded=options.extra["folded"])
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )

    def answer(images: Images, batch: int = 256) -> Probabilities:
        parts = [session.run(["probabilities"], {"images": x})[0] for x in batches(images, batch)]
        return np.concatenate(parts)

    about: dict[str, Any] = {
        "version": f"ONNX Runtime {onnxruntime.__version__}",
        "flushes_denormals": True,  # by the session's setting; not tried out
        "nodes": len(model.graph.node),
    }
    return Entry(inference_cases(answer, options.array("x_test"), 1024), answer, about)
