"""The doctor against the world: other people's networks, healthy and with a planted fault.

Every architecture gets random weights, a few training steps, and running statistics that have come
to rest. It is then examined as it is, and again with one fault planted, in each form that a network
travels in: live, `.pth`, safetensors, ONNX of PyTorch's two exporters, `.keras`, `.h5`.

    pip install --no-deps --target OTHERS timm torchvision onnxscript onnx_ir ml_dtypes \
        huggingface_hub tqdm
    PYTHONPATH=OTHERS python -m benchmarks.doctor_world

It adds a line to docs/results/doctor-world.jsonl for each examination, goes on where it was
interrupted, and prints the table of docs/doctor.md; what was refused or crashed is tried again. A
fault counts as found if its rule says something that it does not say of the healthy network.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normlab

RESULT = Path(__file__).parents[1] / "docs" / "results" / "doctor-world.jsonl"
STEPS, SETTLING, BATCH = 3, 90, 8

# Names with the size of picture that they take.
TORCHVISION = {
    **dict.fromkeys(("resnet18", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small"), 32),
    **dict.fromkeys(("mnasnet0_5", "shufflenet_v2_x0_5", "regnet_x_400mf", "regnet_y_400mf"), 32),
    **dict.fromkeys(("efficientnet_b0", "densenet121", "squeezenet1_1", "googlenet"), 64),
    "inception_v3": 80,
    "segmentation.lraspp_mobilenet_v3_large": 64,
}
TIMM = {
    **dict.fromkeys(("resnet10t", "skresnet18", "regnetx_002", "efficientnet_lite0"), 32),
    **dict.fromkeys(("mobilenetv2_050", "lcnet_050", "tinynet_e", "ghostnet_050"), 32),
    **dict.fromkeys(("mnasnet_small", "semnasnet_075", "dla46_c", "fbnetc_100"), 32),
    **dict.fromkeys(("repvgg_a0", "hardcorenas_a"), 32),
    "mixer_s32_224": 224,
}
KERAS = {
    **{"MobileNet": 32, "MobileNetV2": 32, "MobileNetV3Small": 32, "EfficientNetB0": 32},
    **{"EfficientNetV2B0": 32, "DenseNet121": 32, "ResNet50V2": 32, "NASNetMobile": 32},
}
NOTHING = "no-normalizer"
NORMLESS = {"squeezenet1_1", "mixer_s32_224"}

# The rule that must speak, by fault.
VECTOR_FAULTS = {
    "NaN in a running mean": "not-finite",
    "a negative variance": "variance-not-positive",
    "no variance": "variance-not-positive",
    "a layer never updated": "never-updated",
    "γ of zeros": "gamma-vanished",
    "dead channels": "constant-channel",
}
LIVE_FAULTS = {
    "an infinite weight": "not-finite",
    "trained for two steps": "stale",
    "momentum 0": "momentum-turned-round",
    "momentum of the other library": "momentum-turned-round",
    "a large ε": "eps-matters",
    "frozen, but updating": "frozen-but-updating",
    "no running statistics": "no-running-statistics",
    "other data": "far-from-data",
}


def pictures(count: int, size: int, seed: int) -> Tensor:
    """Pictures with structure, a mean and a contrast of their own each channel."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=rng)
    x = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    x = x + 0.3 * torch.randn(count, 3, size, size, generator=rng)
    return 0.25 * x + torch.tensor([0.49, 0.48, 0.45]).view(1, 3, 1, 1)


def torch_network(source: str, name: str) -> nn.Module:
    define_operators()
    if source == "timm":
        import timm

        return timm.create_model(name, num_classes=10)
    from torchvision import models

    options: dict[str, Any] = {"weights": None, "num_classes": 10}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    if name.startswith("segmentation."):
        options |= {"weights_backbone": None}
        return getattr(models.segmentation, name.partition(".")[2])(**options)
    return getattr(models, name)(**options)


def define_operators() -> None:
    """Stand-ins for torchvision's operators.

    They may not load beside a PyTorch for processors only. No network here calls them, but the
    import of torchvision, and so of timm, wants them to be there.
    """
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    OPERATORS.append(library)  # it must outlive its definitions
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")


OPERATORS: list[Any] = []


def first(answer: Any) -> Tensor:
    from normlab.evaluation.forward import logits

    return logits(answer)


def train(model: nn.Module, size: int, steps: int, settling: int) -> None:
    """A few steps of SGD, then batches that only move the running statistics.

    Momenta for long trainings are raised to PyTorch's 0.1, so that these few are enough.
    """
    model.train()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = max(layer.momentum or 0, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(steps):
        loss = first(model(pictures(BATCH, size, step))).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for step in range(settling):
            model(pictures(BATCH, size, 100 + step))
    model.eval()


def middle(model: nn.Module) -> tuple[str, _BatchNorm]:
    """A normaliser in the middle of the network, with γ that is not zero already."""
    found = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
        and layer.weight is not None
        and layer.num_features >= 4
        and layer.weight.abs().median() > 0.1
    ]
    return found[len(found) // 2]


def spoil(fault: str, gamma: Any, mean: Any, var: Any) -> None:
    """Plant a fault in a normaliser's vectors (arrays or tensors), in place."""
    half = len(mean) // 2
    match fault:
        case "NaN in a running mean":
            mean[0] = float("nan")
        case "a negative variance":
            var[0] = -0.01
        case "no variance":
            var[:] = 0
        case "a layer never updated":
            mean[:], var[:] = 0, 1
        case "γ of zeros":
            gamma[:half] = 0
        case "dead channels":
            mean[:half], var[:half] = 0, 0


@torch.no_grad()
def with_fault(model: nn.Module, fault: str) -> nn.Module:
    model = copy.deepcopy(model)
    _, layer = middle(model)
    match fault:
        case "an infinite weight":
            weight = next(p for p in model.parameters() if p.ndim > 1)
            weight.view(-1)[3] = float("inf")
        case "momentum 0":
            layer.momentum = 0.0
        case "momentum of the other library":
            layer.momentum = 0.99
        case "a large ε":
            layer.eps = 10 * float(layer.running_var.max())
        case "frozen, but updating":
            model.train()
            for p in layer.parameters():
                p.requires_grad_(False)
        case "no running statistics":
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            layer.track_running_stats = False
        case _:
            spoil(fault, layer.weight, layer.running_mean, layer.running_var)
    return model


def examined(examine: Callable[[], normlab.Diagnosis]) -> dict[str, Any]:
    """What an examination came to, in plain values."""
    start = time.perf_counter()
    outcome: dict[str, Any]
    try:
        diagnosis = examine()
    except NotExportedError as e:
        outcome = {"not exported": str(e)[:300]}
    except normlab.NormlabError as e:
        outcome = {"refused": str(e)[:300]}
    except Exception as e:
        outcome = {"crashed": f"{type(e).__name__}: {e}"[:300]}
    else:
        findings = [[f.severity, f.rule, f.where, f.evidence] for f in diagnosis.findings]
        outcome = {"normalizers": diagnosis.normalizers, "findings": shortened(findings)}
    return outcome | {"seconds": round(time.perf_counter() - start, 3)}


def shortened(findings: list[list[str]]) -> list[list[str]]:
    """The findings, but of those that differ in the place alone only the first five."""
    seen = Counter[tuple[str, ...]]()
    kept = []
    for finding in findings:
        alike = (finding[0], finding[1], finding[3])
        seen[alike] += 1
        if seen[alike] <= 5:
            kept.append(finding)
    return kept


Case = tuple[str, str, str, Callable[[], normlab.Diagnosis]]  # form, fault, rule, examination


def torch_cases(source: str, name: str, size: int, folder: Path) -> Iterator[Case]:
    torch.manual_seed(0)
    model = torch_network(source, name)
    young = copy.deepcopy(model)
    train(model, size, STEPS, SETTLING if name not in NORMLESS else 0)
    data = (pictures(32, size, 7), None)
    yield "live", "", "", lambda: normlab.doctor(model)
    yield "live, with data", "", "", lambda: normlab.doctor(model, data=data)
    yield from _saved_cases(model, folder, "", "")
    if name not in NORMLESS:
        train(young, size, 2, 0)
        for fault, rule in (VECTOR_FAULTS | LIVE_FAULTS).items():
            if fault == "other data":
                other = (data[0] * 9 + 6, None)
                case = lambda: normlab.doctor(model, data=other)  # noqa: B023, E731
                yield "live, with data", fault, rule, case
                continue
            ill = young if fault == "trained for two steps" else with_fault(model, fault)
            yield "live", fault, rule, lambda: normlab.doctor(ill)  # noqa: B023
            if fault in (*VECTOR_FAULTS, "an infinite weight", "trained for two steps"):
                yield from _saved_cases(ill, folder, fault, rule)
    yield from onnx_cases(model, size, folder, name not in NORMLESS)


def _saved_cases(model: nn.Module, folder: Path, fault: str, rule: str) -> Iterator[Case]:
    from safetensors.torch import save_model

    def pth() -> normlab.Diagnosis:
        torch.save(model.state_dict(), folder / "network.pth")
        return normlab.doctor(folder / "network.pth")

    def safetensors() -> normlab.Diagnosis:
        save_model(model, str(folder / "network.safetensors"))
        return normlab.doctor(folder / "network.safetensors")

    yield ".pth", fault, rule, pth
    yield ".safetensors", fault, rule, safetensors


class NotExportedError(Exception):
    """PyTorch could not export the network: nothing for the doctor to look at."""


def export(model: nn.Module, x: Tensor, path: Path, **options: Any) -> None:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a failure prints the whole network
            torch.onnx.export(model, (x,), path, verbose=False, **options)
    except Exception as e:
        raise NotExportedError(str(e).partition("\n")[0]) from e


def onnx_cases(model: nn.Module, size: int, folder: Path, normalised: bool) -> Iterator[Case]:
    """Both exporters, with normalisations left as they are and, as is their default, folded."""
    from torch.onnx import TrainingMode

    x = pictures(2, size, 0)
    kept = {
        "ONNX, older exporter": {"dynamo": False, "training": TrainingMode.PRESERVE},
        "ONNX, newer exporter": {"dynamo": True, "optimize": False},
    }
    folded = {
        "ONNX, older exporter, folded": {"dynamo": False},
        "ONNX, newer exporter, folded": {"dynamo": True},
    }
    for form, options in (kept | folded).items():
        path = folder / f"{form}.onnx"

        def exported(path: Path = path, options: Any = options) -> Path:
            if not path.exists():
                export(model.eval(), x, path, **options)
            return path

        def healthy(exported: Callable[[], Path] = exported) -> normlab.Diagnosis:
            return normlab.doctor(exported())

        yield form, "", "", healthy
        if form in kept and normalised:
            for fault, rule in VECTOR_FAULTS.items():
                spoiled = folder / "spoiled.onnx"

                def ill(
                    exported: Callable[[], Path] = exported, fault: str = fault
                ) -> normlab.Diagnosis:
                    spoil_onnx(exported(), spoiled, fault)  # noqa: B023
                    return normlab.doctor(spoiled)  # noqa: B023

                yield form, fault, rule, ill
    if normalised:

        def in_training() -> normlab.Diagnosis:
            training = {"training": TrainingMode.TRAINING, "do_constant_folding": False}
            path = folder / "training.onnx"
            export(copy.deepcopy(model).train(), x, path, dynamo=False, **training)
            return normlab.doctor(path)

        yield "ONNX, older exporter", "in training mode", "training-mode-exported", in_training


def spoil_onnx(source: Path, target: Path, fault: str) -> None:
    """Copy a graph with a fault planted in a normaliser in its middle."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(source)
    nodes = [n for n in model.graph.node if n.op_type == "BatchNormalization"]
    weights = {t.name: t for t in model.graph.initializer}
    nodes = [n for n in nodes if all(x in weights for x in n.input[1:5])]
    node = next(
        n
        for n in nodes[len(nodes) // 2 :] + nodes
        if np.median(np.abs(numpy_helper.to_array(weights[n.input[1]]))) > 0.1
    )
    vectors = [numpy_helper.to_array(weights[x]).copy() for x in node.input[1:5]]
    spoil(fault, vectors[0], vectors[2], vectors[3])
    for place, values in zip((1, 3, 4), (vectors[0], *vectors[2:]), strict=True):
        name = f"{node.input[place]} spoiled"  # the old one may have other readers
        model.graph.initializer.append(numpy_helper.from_array(values, name))
        node.input[place] = name
    onnx.save(model, target)


def keras_cases(name: str, size: int, folder: Path) -> Iterator[Case]:
    import keras

    keras.utils.set_random_seed(0)
    options: dict[str, Any] = {"include_preprocessing": False} if "V3" in name else {}
    if name == "MobileNetV2":
        options = {"alpha": 0.35}
    network = getattr(keras.applications, name)
    model = network(
        weights=None, include_top=True, classes=10, input_shape=(size, size, 3), **options
    )
    layers = [x for x in model.layers if type(x).__name__ == "BatchNormalization"]
    for layer in layers:
        layer.momentum = 0.5  # so that few steps are enough
    model.compile("sgd", "sparse_categorical_crossentropy")
    x = pictures(12 * BATCH, size, 1).permute(0, 2, 3, 1).numpy()
    model.optimizer.learning_rate = 1e-4
    model.fit(x, np.arange(len(x)) % 10, batch_size=BATCH, verbose=0)
    layer = layers[len(layers) // 2]
    vectors = {"mean": layer.moving_mean, "var": layer.moving_variance}
    if layer.gamma is not None:
        vectors["gamma"] = layer.gamma
    before = {k: keras.ops.convert_to_numpy(v).copy() for k, v in vectors.items()}

    def saved(suffix: str, fault: str) -> Callable[[], normlab.Diagnosis]:
        def examine() -> normlab.Diagnosis:
            values = {k: v.copy() for k, v in before.items()}
            spoil(fault, values.get("gamma"), values["mean"], values["var"])
            for k, v in values.items():
                vectors[k].assign(v)
            layer.momentum = 0.01 if fault == "momentum of the other library" else 0.5
            model.save(folder / f"network{suffix}")
            return normlab.doctor(folder / f"network{suffix}")

        return examine

    faults = VECTOR_FAULTS | {"momentum of the other library": "momentum-turned-round"}
    for suffix in (".keras", ".h5"):
        yield suffix, "", "", saved(suffix, "")
        for fault, rule in faults.items():
            if fault != "γ of zeros" or "gamma" in vectors:
                yield suffix, fault, rule, saved(suffix, fault)


def cases(source: str, name: str, size: int, folder: Path) -> Iterator[Case]:
    if source == "keras":
        yield from keras_cases(name, size, folder)
    else:
        yield from torch_cases(source, name, size, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of architectures")
    parser.add_argument("--skip", default=None, help="forms with this in their name, for later")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    if not args.table:
        run(args.result, args.only, args.skip)
    print(table(read(args.result)))


def run(result: Path, only: list[str] | None, skip: str | None) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    before = read(result)
    again = {r["architecture"] for r in before if {"refused", "crashed"} & {*r}}
    kept = [r for r in before if {"findings", "not exported"} & {*r}]
    done = {(r["architecture"], r["form"], r["fault"]) for r in kept}
    complete = {r["architecture"] for r in before if r["form"] == "end"} - again
    sources = {"torchvision": TORCHVISION, "timm": TIMM, "keras": KERAS}
    for source, networks in sources.items():
        for name, size in networks.items():
            architecture = f"{source} {name}"
            if architecture in complete or (only and name not in only):
                continue
            with tempfile.TemporaryDirectory() as folder, open(result, "a", encoding="utf-8") as f:
                row: dict[str, Any] = {"architecture": architecture}
                try:
                    for form, fault, rule, examine in cases(source, name, size, Path(folder)):
                        if skip is not None and skip in form:
                            continue
                        if (architecture, form, fault) not in done:
                            row |= {"form": form, "fault": fault, "rule": rule}
                            print(json.dumps(row | examined(examine)), file=f, flush=True)
                except Exception as e:  # the network cannot be made here: say so and go on
                    print(f"{architecture}: {type(e).__name__}: {e}", flush=True)
                else:
                    if skip is not None:
                        continue
                    print(json.dumps({**row, "form": "end", "fault": ""}), file=f, flush=True)


def read(result: Path) -> list[dict[str, Any]]:
    """The latest line of each examination."""
    if not result.exists():
        return []
    rows = [json.loads(line) for line in result.read_text(encoding="utf-8").splitlines()]
    return list({(r["architecture"], r["form"], r["fault"]): r for r in rows}.values())


def found(row: dict[str, Any], healthy: dict[str, Any] | None) -> bool:
    """Whether the fault's rule says something that it does not say of the healthy network."""

    def said(r: dict[str, Any] | None) -> set[tuple[str, str]]:
        findings = [] if r is None else r.get("findings", [])
        return {(where, evidence) for _, rule, where, evidence in findings if rule == row["rule"]}

    return bool(said(row) - said(healthy))


def accused(row: dict[str, Any], severity: str) -> bool:
    """Whether anything of that severity is said, but that there is nothing to examine."""
    return any(f[0] == severity and f[1] != NOTHING for f in row["findings"])


def table(rows: list[dict[str, Any]]) -> str:
    """A line of Markdown for each form."""
    rows = [r for r in rows if r["form"] != "end"]
    healthy = {(r["architecture"], r["form"]): r for r in rows if not r["fault"]}
    lines = [
        "| form | architectures | faults planted | found | healthy networks | accused seriously "
        "| with a warning | told to hold no normalisation | refused | crashed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for form in [*dict.fromkeys(r["form"] for r in rows), "all"]:
        mine = [r for r in rows if form in (r["form"], "all")]
        read_ones = [r for r in mine if "findings" in r]
        planted = [r for r in read_ones if r["fault"]]
        well = [r for r in read_ones if not r["fault"]]
        counts = (
            len({r["architecture"] for r in mine}),
            len(planted),
            sum(found(r, healthy.get((r["architecture"], r["form"]))) for r in planted),
            len(well),
            sum(accused(r, "serious") for r in well),
            sum(accused(r, "warning") for r in well),
            sum(any(f[1] == NOTHING for f in r["findings"]) for r in well),
            sum("refused" in r for r in mine),
            sum("crashed" in r for r in mine),
        )
        lines.append(f"| {form} | " + " | ".join(str(c) for c in counts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
