"""The ONNX graph of a run: pictures of any size in, probabilities out."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from normlab.data.pictures.reading import to_square
from normlab.evaluation.doubt import Doubt
from normlab.evaluation.held_out import Features
from normlab.formats.onnx_model import open_onnx
from normlab.interchange.certificate import Certificate, Check, Reading
from normlab.interchange.folding import fold, map_size
from normlab.interchange.reading_graph import with_reading
from normlab.interchange.steps import (
    Add,
    Affine,
    Array,
    Chain,
    Clip,
    Conv,
    Dense,
    Flatten,
    GlobalMax,
    Keep,
    MaxPool,
    Norm,
    Relu,
    Step,
    chain_of,
)
from normlab.interchange.traced import trace
from normlab.models.timm_net import TimmNet
from normlab.runs import Run

# Old enough for every runtime of the last years; nothing here needs more.
OPSET, IR_VERSION = 17, 8


class _Nodes:
    """Collects nodes, each fed by the one before, and the arrays they use."""

    def __init__(self, start: str) -> None:
        self.last = start
        self.kept = start
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: list[onnx.TensorProto] = []
        self.flat = False  # whether channels are the last dimension

    def add(
        self,
        op: str,
        name: str,
        arrays: Sequence[Array] = (),
        *,
        takes: Sequence[str] = (),
        **attributes: Any,
    ) -> None:
        """Add a node that takes the last output, or those named, and `arrays` as float32."""
        inputs = [*takes] or [self.last]
        for i, array in enumerate(arrays):
            inputs.append(f"{name}.{i}")
            self.arrays.append(numpy_helper.from_array(array.astype(np.float32), inputs[-1]))
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        self.last = name


def build(chain: Chain, num_classes: int, familiar: "Familiar | None" = None) -> onnx.ModelProto:
    """Make the network's graph: `images` uint8 (N, S, S, 3) → `probabilities` float32 (N, K).

    With `familiar` it also gives `familiarity` float32 (N,).
    """
    nodes = _Nodes("images")
    nodes.add("Transpose", "channels_first", perm=[0, 3, 1, 2])
    nodes.add("Cast", "pixels", to=TensorProto.FLOAT)
    outputs = [_output("probabilities", "N", num_classes)]
    for i, step in enumerate(chain.steps):
        if familiar is not None and step is chain.steps[-1]:
            _add_familiarity(nodes, familiar)
            outputs.append(_output("familiarity", "N"))
        if isinstance(step, Conv):
            size = map_size(chain.steps[:i], chain.image_size)
            _add_conv(nodes, step, size, chain.image_size)
        else:
            _add(nodes, step, f"step{i}")
    nodes.add("Softmax", "probabilities", axis=1)
    size = chain.image_size
    graph = helper.make_graph(
        nodes.nodes,
        "normlab",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", size, size, 3])],
        outputs,
        nodes.arrays,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="normlab",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


@dataclass(frozen=True)
class Familiar:
    """What computes familiarity from what the last layer takes; see `evaluation.familiarity`.

    Attributes:
        of_classes: unit features of the classes (K, D).
        norms: those right before the last layer, which folding took into it.
    """

    of_classes: Array
    norms: tuple[Norm, ...]


def _output(name: str, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _add_familiarity(nodes: _Nodes, familiar: Familiar) -> None:
    """max over classes of f·mₖ, divided by ‖f‖; the way to the last layer goes on from f."""
    source = nodes.last
    for norm in familiar.norms:
        _add_norm(nodes, replace(norm, name=f"familiarity.{norm.name}"))
    features = nodes.last
    nodes.add("MatMul", "familiarity.products", [familiar.of_classes.T])
    nodes.add("ReduceMax", "familiarity.largest", axes=[1], keepdims=0)
    nodes.add("ReduceL2", "familiarity.length", takes=[features], axes=[1], keepdims=0)
    nodes.add("Max", "familiarity.positive", [np.array(1e-12)])
    lengths = nodes.last
    nodes.add("Div", "familiarity", takes=["familiarity.largest", lengths])
    nodes.last = source


def _add(nodes: _Nodes, step: Step, name: str) -> None:
    match step:
        case Norm():
            _add_norm(nodes, step)
        case Affine():
            _add_affine(nodes, step)
        case Dense():
            nodes.add("Gemm", step.name, [step.kernel, step.bias], transB=1)
        case Relu():
            nodes.add("Relu", name)
        case Clip():
            nodes.add("Clip", name, [np.array(step.low)])
        case MaxPool():
            nodes.add("MaxPool", name, kernel_shape=[2, 2], strides=[2, 2])
        case GlobalMax():
            nodes.add("GlobalMaxPool", name)
            nodes.add("Flatten", f"{name}.flat")
            nodes.flat = True
        case Flatten():
            nodes.add("Flatten", name)
            nodes.flat = True
        case Keep():
            nodes.kept = nodes.last
        case Add():
            nodes.add("Add", name, takes=[nodes.last, nodes.kept])


def _add_conv(nodes: _Nodes, conv: Conv, size: int, image_size: int) -> None:
    """Add a convolution of a map of size × size."""
    far = conv.padding - conv.trim
    attributes = {
        "kernel_shape": conv.kernel.shape[2:],
        "pads": [conv.padding, conv.padding, far, far],
        "strides": [conv.stride] * 2,
    }
    if conv.of_ones is None:
        nodes.add("Conv", conv.name, [conv.kernel, conv.bias], **attributes)
        return
    # A runtime computes a convolution and the addition of another, of as many images, at once. So
    # the ones come from the pixels, by a kernel of zeros with bias 1; its strides give the size.
    source, stride = nodes.last, image_size // size
    k = image_size - stride * (size - 1)
    ones = [np.zeros((1, 3, k, k)), np.ones(1)]
    shape = {"kernel_shape": [k, k], "strides": [stride] * 2}
    nodes.add("Conv", f"{conv.name}.ones", ones, takes=["pixels"], **shape)
    nodes.add("Conv", f"{conv.name}.border", [conv.of_ones[:, None]], **attributes)
    border = nodes.last
    nodes.add("Conv", conv.name, [conv.kernel, conv.bias], takes=[source], **attributes)
    nodes.add("Add", f"{conv.name}.bordered", takes=[conv.name, border])


def _add_norm(nodes: _Nodes, norm: Norm) -> None:
    """γ/σ·(x − μ) + β, the subtraction first: it is what keeps the precision."""
    shape = (-1,) if nodes.flat else (-1, 1, 1)
    nodes.add("Sub", f"{norm.name}.centred", [norm.mean.reshape(shape)])
    nodes.add("Mul", f"{norm.name}.scaled", [norm.scale.reshape(shape)])
    nodes.add("Add", norm.name, [norm.beta.reshape(shape)])


def _add_affine(nodes: _Nodes, step: Affine) -> None:
    """A convolution of each channel by itself keeps ONNX Runtime in its blocked layout."""
    if (step.scale == 1).all():  # of pixels, which are in no such layout
        nodes.add("Add", step.name, [step.shift[:, None, None]])
        return
    kernel, channels = step.scale[:, None, None, None], len(step.scale)
    nodes.add("Conv", step.name, [kernel, step.shift], group=channels, kernel_shape=[1, 1])


def described(
    run: Run, model: nn.Module, learnt: tuple[Doubt, Features | None] | None = None
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The graph of a run's network with its metadata, and what was not folded and why.

    It takes pictures of any size: `images` uint8 (N, H, W, 3), all of one size. `learnt` brings the
    temperature into the last layer, and familiarity.
    """
    graph, unfolded = network(run, model, learnt)
    return described_as(run, with_reading(graph, run.task.image_size), unfolded, learnt), unfolded


def network(
    run: Run, model: nn.Module, learnt: tuple[Doubt, Features | None] | None
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The graph without the reading: `images` uint8 (N, S, S, 3); and what was not folded."""
    size = run.task.image_size
    if isinstance(model, TimmNet):
        return trace(model, size, learnt)
    return _folded(model, size, len(run.task.class_names), learnt)


def _folded(
    model: nn.Module, size: int, num_classes: int, learnt: tuple[Doubt, Features | None] | None
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The graph of a network that is a chain of steps, its normalisations folded."""
    whole, familiar = chain_of(model, size), None
    if learnt is not None:
        doubt, means = learnt
        whole = _cooled(whole, doubt.temperature)
        familiar = None if means is None else _familiar(whole, means)
    chain = fold(whole)
    if familiar is not None:  # a normalisation that was not folded is on the way already
        there = {step.name for step in chain.steps if isinstance(step, Norm)}
        norms = tuple(norm for norm in familiar.norms if norm.name not in there)
        familiar = replace(familiar, norms=norms)
    return build(chain, num_classes, familiar), chain.unfolded


def described_as(
    run: Run,
    graph: onnx.ModelProto,
    unfolded: tuple[str, ...],
    learnt: tuple[Doubt, Features | None] | None,
) -> onnx.ModelProto:
    """`graph` with the metadata of the run."""
    metadata: dict[str, Any] = {
        "class_names": run.task.class_names,
        "image_size": run.task.image_size,
        "recipe": run.task.published(),
        "not_folded": unfolded,
    }
    if learnt is not None:
        metadata["doubt"] = learnt[0].as_dict()
        metadata["rule"] = learnt[0].rule().as_dict()
    for key, value in metadata.items():
        graph.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))
    return graph


def _cooled(chain: Chain, temperature: float) -> Chain:
    """The chain whose logits are divided by the temperature."""
    *steps, last = chain.steps
    assert isinstance(last, Dense)
    last = replace(last, kernel=last.kernel / temperature, bias=last.bias / temperature)
    return replace(chain, steps=(*steps, last))


def _familiar(chain: Chain, means: Features) -> Familiar:
    norms: list[Norm] = []
    for step in reversed(chain.steps[:-1]):
        if not isinstance(step, Norm):
            break
        norms.insert(0, step)
    return Familiar(means.astype(np.float64), tuple(norms))


def certified(
    run: Run,
    model: nn.Module,
    images: NDArray[np.uint8],
    check: Check,
    learnt: tuple[Doubt, Features | None] | None = None,
) -> tuple[bytes, Certificate, tuple[str, ...]]:
    """The file's content, its certificate, and which normalisations were not folded and why.

    The certificate goes into the metadata of the very graph that was checked.

    Raises:
        CertificateError: it answers otherwise than the run, or reads pictures otherwise.
    """
    graph, unfolded = described(run, model, learnt)
    answers, near = open_onnx(graph.SerializeToString()).answers(images)
    checked_with = f"ONNX Runtime {version('onnxruntime')}"
    certificate = check(answers, checked_with, familiarity=near)
    certificate = replace(certificate, reading=check_reading(graph, images))
    certificate.require()
    graph.metadata_props.add(key="certificate", value=certificate.as_json())
    return graph.SerializeToString(), certificate, unfolded


def check_reading(
    graph: onnx.ModelProto, images: NDArray[np.uint8], pictures: int = 200
) -> Reading:
    """Compare how the graph reads pictures of other sizes with how training reads them."""
    probed = onnx.ModelProto()
    probed.CopyFrom(graph)
    probed.graph.output.append(helper.make_tensor_value_info("pixels", TensorProto.FLOAT, None))
    model = open_onnx(probed.SerializeToString())
    others = list(of_other_sizes(images, pictures))
    told = [model.session.run(["pixels", "probabilities"], {"images": p[None]}) for p in others]
    squares = np.stack([to_square(picture, model.image_size) for picture in others])
    pixels, answers = (np.concatenate(part) for part in zip(*told, strict=True))
    seen = pixels.transpose(0, 2, 3, 1)
    return Reading.of(seen, squares, answers, model.probabilities(squares))


def of_other_sizes(images: NDArray[np.uint8], count: int) -> Iterator[NDArray[np.uint8]]:
    """Pictures of 1 to 600 pixels a side, 1 : 8 to 8 : 1, always the same for the same images.

    The pixels of `images` (N, S, S, 3) become their blocks, with hard edges.
    """
    generator = np.random.default_rng(0)
    for i in generator.integers(0, len(images), count):
        longer = 600 ** generator.random()
        shape = longer * 8.0 ** -np.array([generator.random(), 0])[generator.permutation(2)]
        rows, columns = (
            (np.arange(n) * images.shape[1]) // n for n in np.maximum(1, shape.astype(int))
        )
        yield np.ascontiguousarray(images[i][rows][:, columns])
