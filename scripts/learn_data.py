"""Make the data of the page on batch normalisation from runs.

    normlab train notebook --record --out runs/with
    normlab train notebook --record --norm none --out runs/without
    python scripts/small_network.py train runs/small --epochs 2
    python scripts/small_network.py study docs/results/studies/shaken
    python scripts/learn_data.py --with runs/with --without runs/without --small runs/small

Writes docs/learn/data.js, all that the page draws, and docs/results/learn/page.json, the figures
that the page quotes and the answers that its own forward pass is compared with. The pictures are
the 200 test pictures of the sample that comes with normlab; nothing in the page is invented.
"""

import argparse
import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from small_network import SmallNet, pixels
from torch import Tensor
from torch.nn.functional import cross_entropy, relu

import normlab
from normlab.core.files import write_json
from normlab.evaluation.population import evenly, population_moments
from normlab.inspection.recording import read_recording
from normlab.layers import BatchNorm

DOCS = Path(__file__).parents[1] / "docs"
LANDSCAPE = DOCS / "results" / "landscape" / "landscape.json"
LAYERS = ("conv1", "conv2", "conv3", "hidden", "output")
MEASURES = ("in/percentiles", "in/range", "in/histogram", "in/drift", "grad", "dead")
SIZES = (1, 2, 4, 8, 16, 32, 64, 200)
ROWS, PLACES = 8, 40  # pictures of part 1, and values of each
FACTORS = tuple(float(2**e) for e in np.linspace(-3, 3, 25))
POPULATION, MANY = 1024, 1000  # training pictures of the population; test pictures of the table


def packed(values: NDArray[Any] | Tensor, kind: str) -> dict[str, Any]:
    """An array as base64, of uint8, float16 or float32."""
    array = np.ascontiguousarray(np.asarray(values), np.dtype(kind).newbyteorder("<"))
    data = base64.b64encode(array.tobytes()).decode()
    return {"kind": kind, "shape": list(array.shape), "data": data}


def small(path: Path) -> SmallNet:
    """The small network with weights as the page has them: rounded to float16."""
    network = SmallNet()
    network.load_state_dict({k: v.half().to(v.dtype) for k, v in load_file(path).items()})
    return network.eval()


def by_turns(labels: NDArray[np.integer]) -> NDArray[np.int64]:
    """Numbers of pictures, one of each class in turn."""
    places = [np.flatnonzero(labels == k) for k in range(10)]
    return np.stack(places, 1).ravel()


def batches(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """`order` cut into batches; the last may be smaller."""
    return [order[first : first + size] for first in range(0, len(order), size)]


@torch.no_grad()
def by_batch(network: SmallNet, x: Tensor, cut: list[NDArray[np.int64]]) -> Tensor:
    """Logits (N, 10) with each batch normalised by its own statistics, without dropout."""
    logits = torch.empty(len(x), 10, dtype=x.dtype)
    for chosen in cut:
        h = x[chosen]
        for norm, layer in layers_of(network):
            dims = [0, *range(2, h.ndim)]
            mean, var = h.mean(dims), h.var(dims, correction=0)
            h = layer(scaled(h, mean, var, norm))
        logits[chosen] = h
    return logits


@torch.no_grad()
def by_moments(network: SmallNet, x: Tensor, moments: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Logits (N, 10) with given means and variances of each normaliser."""
    h = x
    for number, (norm, layer) in enumerate(layers_of(network)):
        h = layer(scaled(h, *moments[f"norm{number}"], norm))
    return h


def scaled(x: Tensor, mean: Tensor, var: Tensor, norm: BatchNorm) -> Tensor:
    """γ·(x − μ)/√(σ² + ε) + β."""
    a = norm.weight.to(x) / (var.to(x) + norm.eps).sqrt()
    shape = (1, -1, *[1] * (x.ndim - 2))
    return (x - mean.to(x).view(shape)) * a.view(shape) + norm.bias.to(x).view(shape)


def layers_of(network: SmallNet) -> list[tuple[Any, Any]]:
    """Each normaliser, and what follows until the next, without dropout."""
    from torch.nn.functional import conv2d, linear, max_pool2d

    n = network

    def convolve(layer: Any, padding: int, pool: bool) -> Any:
        def apply(h: Tensor) -> Tensor:
            z = conv2d(h, layer.weight.to(h), layer.bias.to(h), padding=padding)
            return relu(max_pool2d(z, 2) if pool else z)

        return apply

    third = convolve(n.conv3, 1, True)
    return [
        (n.norm0, convolve(n.conv1, 0, False)),
        (n.norm1, convolve(n.conv2, 1, True)),
        (n.norm2, lambda h: third(h).flatten(1)),
        (n.norm3, lambda h: relu(linear(h, n.hidden.weight.to(h), n.hidden.bias.to(h)))),
        (n.norm4, lambda h: linear(h, n.output.weight.to(h), n.output.bias.to(h))),
    ]


def right(logits: Tensor, labels: NDArray[np.integer]) -> int:
    """How many answers are right."""
    return int((logits.argmax(1).numpy() == labels).sum())


def running(network: SmallNet) -> dict[str, tuple[Tensor, Tensor]]:
    """The running statistics by the normaliser's name."""
    norms = {f"norm{n}": norm for n, (norm, _) in enumerate(layers_of(network))}
    return {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}


def cuts(labels: NDArray[np.integer], size: int) -> dict[str, list[NDArray[np.int64]]]:
    """The three ways of filling batches; of one class there are no more than 20 pictures."""
    alone = [c for k in range(10) for c in batches(np.flatnonzero(labels == k), size)]
    every = np.arange(len(labels))
    mixed = batches(by_turns(labels), size) if size < len(labels) else [every]
    return {"mixed": mixed, "class": alone, "same": batches(every, 1)}


def networks(folder: Path, images: Any, table: dict[str, Any]) -> dict[str, Any]:
    """Part 2: two networks, the pictures, and what PyTorch answers in float64."""
    sample = normlab.load("sample")
    order = np.argsort(sample.y_test, kind="stable")
    x, labels = sample.x_test[order], sample.y_test[order]
    data: dict[str, Any] = {
        "pictures": packed(x, "uint8"),
        "labels": labels.tolist(),
        "classes": list(sample.class_names),
    }
    whole = np.linspace(0, len(images.x_test) - 1, MANY).astype(int)
    for name in ("early", "end"):
        network = small(folder / f"{name}.safetensors")
        found = population_moments(network, evenly(images.x_train, POPULATION))
        rounded = {k: (m.mean.half().double(), m.var.half().double()) for k, m in found.items()}
        state = {
            k: packed(v.half(), "float16")
            for k, v in network.state_dict().items()
            if not k.endswith("num_batches_tracked")
        }
        for k, (mean, var) in rounded.items():
            state[f"{k}.population_mean"] = packed(mean, "float16")
            state[f"{k}.population_var"] = packed(var, "float16")
        data[name] = state
        x64, many = pixels(x).double(), pixels(images.x_test[whole])
        logits = {"running": by_moments(network, x64, running(network))}
        logits["population"] = by_moments(network, x64, rounded)
        found_right: dict[str, Any] = {k: right(v, labels) for k, v in logits.items()}
        for size in SIZES:
            for content, cut in cuts(labels, size).items():
                answers = by_batch(network, x64, cut)
                found_right[f"batch {content} {size}"] = right(answers, labels)
                if (size, content) in ((32, "mixed"), (16, "class"), (1, "mixed")):
                    logits[f"batch {content} {size}"] = answers
        many_labels = images.y_test[whole]
        table[name] = {
            "pictures": len(labels),
            "right": found_right,
            "logits": {k: v[:20].tolist() for k, v in logits.items()},
            "many": {
                "pictures": MANY,
                "running": right(by_moments(network, many, running(network)), many_labels) / MANY,
                "population": right(by_moments(network, many, rounded), many_labels) / MANY,
                **{
                    f"batch {size}": right(
                        by_batch(network, many, batches(np.arange(MANY), size)), many_labels
                    )
                    / MANY
                    for size in (2, 8, 32, 200)
                },
            },
        }
    return data


def recording(run: Any) -> dict[str, Any]:
    """Part 3: what each layer was given, at every recorded step."""
    seen = read_recording(run.path)
    layers: dict[str, Any] = {}
    for layer in LAYERS:
        kept = {}
        for measure in MEASURES:
            values = seen.get(layer, measure)
            if values is None:
                continue
            if measure == "in/histogram":
                values = values / np.maximum(values.max(1, keepdims=True), 1e-12) * 255
                kept["histogram"] = packed(np.round(values), "uint8")
            else:
                kept[measure.removeprefix("in/")] = packed(values, "float32")
        layers[layer] = kept
    return {"step": seen.steps.tolist(), "layers": layers}


@torch.no_grad()
def first_layer(network: Any, images: Any) -> dict[str, Any]:
    """Part 1: values of one channel of the first layer, of eight pictures at forty places."""
    chosen = np.concatenate([np.flatnonzero(images.y_test == k)[:1] for k in range(ROWS)])
    x = pixels(images.x_test[chosen])
    h = relu(network.conv1(network.batch_normalization(x)))  # (8, 32, 30, 30)
    zeros = (h == 0).float().mean((0, 2, 3))  # dots on top of each other show nothing
    channel = int(
        torch.where(zeros <= max(0.05, float(zeros.min())), h.std((0, 2, 3)), -1).argmax()
    )
    steps = (np.arange(PLACES) * 900 // PLACES + 11) % 900
    values = h[:, channel].flatten(1)[:, steps]  # (8, 40)
    norm = network.batch_normalization_1
    return {
        "values": packed(values, "float32"),
        "pictures": packed(images.x_test[chosen], "uint8"),
        "names": [images.class_names[k] for k in images.y_test[chosen]],
        "channel": channel,
        "gamma": float(norm.weight[channel]),
        "beta": float(norm.bias[channel]),
        "mean": float(norm.running_mean[channel]),
        "var": float(norm.running_var[channel]),
        "eps": norm.eps,
    }


def stretched(network: Any, images: Any) -> dict[str, list[float]]:
    """Part 4: loss, and norm of its gradient, with the weights of conv2 times a factor."""
    x, y = pixels(images.x_train[:64]), torch.from_numpy(images.y_train[:64].astype(np.int64))
    layer = network.conv2
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    found: dict[str, list[float]] = {"factor": list(FACTORS), "loss": [], "gradient": []}
    network.train()
    for module in network.modules():
        if type(module).__name__ == "Dropout":
            module.eval()
    for factor in FACTORS:
        with torch.no_grad():
            layer.weight.copy_(weight * factor)
            layer.bias.copy_(bias * factor)
        network.zero_grad()
        loss = cross_entropy(network(x), y)
        loss.backward()
        found["loss"].append(loss.item())
        found["gradient"].append(layer.weight.grad.norm().item())
    return found


@torch.no_grad()
def folding(network: Any, images: Any) -> dict[str, Any]:
    """Part 5: the input of the second normaliser, and four output channels of conv2."""
    chosen = [int(np.flatnonzero(images.y_test == k)[0]) for k in (0, 8)]  # an airplane, a ship
    x = pixels(images.x_test[chosen])
    h = relu(network.conv1(network.batch_normalization.eval()(x)))
    norm, conv = network.batch_normalization_1, network.conv2
    a = norm.weight / (norm.running_var + norm.eps).sqrt()
    b = norm.bias - a * norm.running_mean
    weight = conv.weight.half().float()
    strength = (weight.sum((2, 3)) * b).sum(1).abs()
    channels = strength.argsort(descending=True)[[0, 1, 2, 3]]
    return {
        "pictures": packed(images.x_test[chosen], "uint8"),
        "names": [images.class_names[images.y_test[n]] for n in chosen],
        "input": packed(h.contiguous(), "float16"),
        "a": packed(a, "float32"),
        "b": packed(b, "float32"),
        "weight": packed(weight[channels], "float16"),
        "bias": packed(conv.bias[channels], "float32"),
        "channels": channels.tolist(),
    }


def landscape() -> dict[str, Any]:
    """Part 4: how much the loss varies along the gradient, seed by seed."""
    raw = json.loads(LANDSCAPE.read_text())
    arms = {
        arm: {
            k: np.round(np.array(raw["arms"][arm][k], float), 5).tolist()
            for k in ("range", "change")
        }
        for arm in ("batch", "none")
    }
    return {"steps": raw["steps"], "arms": arms}


def medians(path: Path) -> dict[str, Any]:
    """Of each measure the median over the steps: mean, lowest and highest of the seeds."""
    raw = json.loads(path.read_text())["arms"]
    found: dict[str, Any] = {}
    for arm in raw:
        for measure, rows in raw[arm].items():
            each = np.nanmedian(np.array(rows, float), 1)
            found.setdefault(arm, {})[measure] = {
                "mean": float(each.mean()),
                "low": float(each.min()),
                "high": float(each.max()),
            }
    return found


def studies() -> list[dict[str, Any]]:
    """Parts 4 and 6: differences of pairs, seed by seed, in points of test accuracy."""
    wanted = (
        ("notebook-25-epochs", "batch", "none", "the notebook, 25 epochs"),
        ("notebook-5-epochs", "batch", "none", "the notebook, 5 epochs"),
        ("fast79-batch-none", "batch", "none", "fast79"),
        ("fast79-tuned", "batch", "none", "fast79, each arm at its own best rate"),
        ("fast79-batch-batch", "batch", "again", "fast79 against itself, other seeds"),
        ("shaken", "shaken", "none", "normalised and shaken, against none"),
        ("shaken", "batch", "shaken", "normalised, against normalised and shaken"),
    )
    found = []
    for folder, first, other, name in wanted:
        path = DOCS / "results" / "studies" / folder
        if not (path / "result.json").exists():
            continue
        study = normlab.open_study(path)
        pairs = study.pairs(first, other)
        differences = [round(100 * (_accuracy(a) - _accuracy(b)), 4) for a, b in pairs]
        found.append({"study": folder, "name": name, "differences": differences})
    return found


def _accuracy(outcome: Any) -> float:
    return float(outcome.accuracy if hasattr(outcome, "accuracy") else outcome.value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--with", dest="batch", type=Path, required=True)
    parser.add_argument("--without", dest="none", type=Path, required=True)
    parser.add_argument("--small", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = normlab.load()
    runs = {"batch": normlab.open_run(options.batch), "none": normlab.open_run(options.none)}
    trained = {arm: run.model().eval() for arm, run in runs.items()}
    table: dict[str, Any] = {}
    data = {
        "dots": first_layer(trained["batch"], images),
        "networks": networks(options.small, images, table),
        "recordings": {arm: recording(run) for arm, run in runs.items()},
        "fold": folding(trained["batch"], images),
        "landscape": landscape(),
        "stretched": {arm: stretched(model, images) for arm, model in trained.items()},
        "studies": studies(),
    }
    for name in ("landscape", "fast79"):
        table[f"landscape of {name}"] = medians(LANDSCAPE.with_name(f"{name}.json"))
    table["recordings"] = {arm: summary(run) for arm, run in runs.items()}
    table["stretched"] = data["stretched"]
    text = json.dumps(data, separators=(",", ":"))
    (DOCS / "learn" / "data.js").write_text(f"window.normlabData={text};\n", encoding="utf-8")
    (DOCS / "results" / "learn").mkdir(exist_ok=True)
    write_json(DOCS / "results" / "learn" / "page.json", table)
    print(f"docs/learn/data.js: {len(text) / 1e6:.2f} MB")


def summary(run: Any) -> dict[str, Any]:
    """What the page says of a recording: medians over the second half of its samples."""
    seen = read_recording(run.path)
    half = len(seen.steps) // 2
    return {
        "steps": int(seen.steps[-1]),
        "test_accuracy": run.result["test_accuracy"],
        "drift": {k: float(np.nanmedian(seen.get(k, "in/drift")[half:])) for k in LAYERS[1:]},
        "dead": {k: float(np.nanmedian(seen.get(k, "dead")[half:])) for k in LAYERS},
        "grad": {k: float(np.nanmedian(seen.get(k, "grad")[half:])) for k in LAYERS},
    }


if __name__ == "__main__":
    main()
