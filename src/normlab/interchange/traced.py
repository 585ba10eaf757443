"""The ONNX graph of a network of timm, as PyTorch's own exporter traces it.

Such networks are graphs, not chains of steps, so they are not rewritten here. The exporter takes
each batch normalisation into the convolution before it; what it left is counted in the graph.
"""

import io
import warnings
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from normlab.errors import UnexportableError
from normlab.evaluation.doubt import Doubt
from normlab.evaluation.held_out import Features
from normlab.models.timm_net import TimmNet

OPSET = 17
FLOAT = TensorProto.FLOAT


class _FromPixels(nn.Module):
    """Probabilities (N, K) of pixels (N, 3, S, S), float32 from 0 to 255; and familiarity (N,)."""

    def __init__(self, model: TimmNet, learnt: tuple[Doubt, Features | None] | None) -> None:
        super().__init__()
        self.model = model
        self.temperature = 1.0 if learnt is None else learnt[0].temperature
        means = None if learnt is None else learnt[1]
        self.means = None if means is None else torch.from_numpy(means)  # (K, D)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        f = self.model.features(pixels / 255)  # (N, D)
        answers = (self.model.answer(f) / self.temperature).softmax(1)
        if self.means is None:
            return (answers,)
        length = f.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return answers, (f / length @ self.means.T).amax(1)


def trace(
    model: TimmNet, image_size: int, learnt: tuple[Doubt, Features | None] | None
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The graph: `images` uint8 (N, S, S, 3) → `pixels` → `probabilities` float32 (N, K).

    `learnt` brings the temperature, and `familiarity` float32 (N,).

    Returns:
        The graph, and a sentence for each normalisation that was not folded.

    Raises:
        UnexportableError: PyTorch cannot export this network.
    """
    example = torch.zeros(2, 3, image_size, image_size)
    whole = _FromPixels(model, learnt).eval()
    outputs = ["probabilities", "familiarity"][: 1 if whole.means is None else 2]
    options: dict[str, Any] = {
        "dynamo": False,  # the other exporter needs two packages more, for the same graph
        "opset_version": OPSET,
        "input_names": ["pixels"],
        "output_names": outputs,
        "dynamic_axes": {name: {0: "N"} for name in ["pixels", *outputs]},
    }
    content = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(whole, (example,), content, **options)  # type: ignore[arg-type]
    except Exception as e:  # an exporter may raise anything about somebody else's network
        reason = (str(e).splitlines() or [""])[0]
        raise UnexportableError(
            f"PyTorch cannot export this network as ONNX ({type(e).__name__}: {reason})"
        ) from None
    model_proto = onnx.load_from_string(content.getvalue())
    graph = model_proto.graph
    first = helper.make_node("Transpose", ["images"], ["channels_first"], perm=[0, 3, 1, 2])
    graph.node.insert(0, helper.make_node("Cast", ["channels_first"], ["pixels"], to=FLOAT))
    graph.node.insert(0, first)
    del graph.input[:]
    shape: list[str | int | None] = ["N", image_size, image_size, 3]
    graph.input.append(helper.make_tensor_value_info("images", TensorProto.UINT8, shape))
    onnx.checker.check_model(model_proto, full_check=True)
    left = [node.name for node in graph.node if node.op_type == "BatchNormalization"]
    return model_proto, tuple(f"{name} was not folded by PyTorch's exporter" for name in left)
