"""Who is measured beside whom."""

import statistics
from typing import Any

from benchmarks.rounds import Entry, Group

KERAS, PLAIN, OURS, PURE = "Keras", "PyTorch", "normlab", "normlab, no kernels"
PLAIN_LAST = f"{PLAIN}, channels-last"
STOCK = "stock layers"
FOLDED, UNFOLDED = "ONNX Runtime, folded", "ONNX Runtime, not folded"
FUNCTION = "Keras, tf.function"
LAYOUTS = {PLAIN: "channels-first", PLAIN_LAST: "channels-last"}
TRAIN, VALIDATE, FAST = " (training)", " (validation)", "fast79, "
BATCHES = (32, 256)


def training(batch: int, data: str, quick: bool) -> Group:
    """Training steps of the notebook's network."""
    plain = [
        Entry(name, "plain_pytorch:training", {"batch": batch, "layout": layout})
        for name, layout in LAYOUTS.items()
    ]
    ours = [
        Entry(name, "ours:training", {"batch": batch, "data": data, "layers": layers})
        for name, layers in ((PURE, "no kernels"), (OURS, "normlab"))
    ]
    keras = Entry(KERAS, "keras_tensorflow:training", {"batch": batch})
    return Group(f"training-{batch}", [keras, *plain, *ours], *((1, 3) if quick else (2, 9)))


def accuracy(faster: str, data: str, quick: bool) -> Group:
    """Whole trainings of `fast79`, and the parts of an epoch of the notebook.

    Args:
        faster: of the two layouts of plain PyTorch.
    """
    batch, layout = {"batch": 32}, {"layout": LAYOUTS[faster]}
    ours = {"data": data, "layers": "normlab"}
    entries = [
        Entry(KERAS + TRAIN, "keras_tensorflow:training", batch),
        Entry(KERAS + VALIDATE, "keras_tensorflow:validation", batch),
        Entry(faster + TRAIN, "plain_pytorch:training", batch | layout),
        Entry(faster + VALIDATE, "plain_pytorch:validation", layout),
        Entry(OURS + TRAIN, "ours:training", ours | batch),
        Entry(OURS + VALIDATE, "ours:validation", ours),
    ]
    for layers in ("stock", "no kernels", "normlab"):
        extra = {"data": data, "layers": layers}
        name = STOCK if layers == "stock" else PURE if layers == "no kernels" else OURS
        entries.append(Entry(FAST + name, "fast79:training", extra, "fast79"))
    return Group("accuracy", entries, *((1, 1) if quick else (3, 5)))


def layers(quick: bool) -> Group:
    """The layer alone."""
    entries = [
        Entry(name, "batch_norm:layers", {"layer": name}, None) for name in ("torch.nn", OURS)
    ]
    return Group("layers", entries, *((0.05, 3) if quick else (0.15, 9)))


def inference(network: str, quick: bool) -> Group:
    """Pixels in, probabilities out."""
    extra = {"network": network}
    runtime = [
        Entry(name, "onnx_runtime:predict", extra | {"folded": name == FOLDED}, network)
        for name in (FOLDED, UNFOLDED)
    ]
    if network == "notebook":
        others = [
            Entry(KERAS, "keras_tensorflow:predict"),
            Entry(FUNCTION, "keras_tensorflow:function"),
            *(
                Entry(name, "plain_pytorch:predict", {"layout": layout})
                for name, layout in LAYOUTS.items()
            ),
        ]
    else:
        others = [Entry(PLAIN_LAST, "ours:predict", extra | {"layers": "stock"}, network)]
    ours = Entry(OURS, "ours:predict", extra | {"layers": "normlab"}, network)
    return Group(
        f"inference-{network}", [*others, ours, *runtime], *((0.3, 3) if quick else (0.7, 9))
    )


def faster_layout(result: dict[str, Any]) -> str:
    """Of a measured training group, the layout in which plain PyTorch was faster."""
    samples = result["samples"][""]
    return min(LAYOUTS, key=lambda name: statistics.median(s["seconds"] for s in samples[name]))
