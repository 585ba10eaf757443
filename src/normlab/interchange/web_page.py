"""A page that answers pictures in the browser, without a server or a network."""

import base64
import gzip
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

from normlab.data.cifar10.layouts import CLASS_NAMES
from normlab.data.loading import load
from normlab.data.pictures.reading import to_square
from normlab.evaluation.doubt import Doubt
from normlab.evaluation.held_out import Features
from normlab.formats.onnx_model import open_onnx
from normlab.interchange import onnx_graph, web_runtime
from normlab.interchange.browser import answers, browser_version, find_browser
from normlab.interchange.certificate import Certificate, Check, Reading
from normlab.runs import Run
from normlab.text import printable, utf8

CHECKED = 1000  # test pictures that the browser answers
OTHER_SIZES = 50

# The page may load its own files and run WebAssembly; it may connect to nothing at all.
_POLICY = (
    "default-src 'none'; script-src 'self' blob: 'wasm-unsafe-eval'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'none'; base-uri 'none'; form-action 'none'"
)
_SCRIPTS = (web_runtime.SCRIPT, "runtime.js", "model.js", "web.js", "page.js")
_WORDS = {
    "scripts": f'  <meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    + "\n".join(f'  <script src="{name}" defer></script>' for name in _SCRIPTS),
    "without": "The network runs in it.",
    "where": "Pictures stay in this browser: the page connects to nothing.",
}


def certified(
    run: Run,
    model: nn.Module,
    images: NDArray[np.uint8],
    check: Check,
    learnt: tuple[Doubt, Features | None] | None = None,
    *,
    tarball: Path | None = None,
    browser: Path | None = None,
) -> tuple[dict[str, bytes], Certificate, tuple[str, ...]]:
    """The page's files by name, its certificate, and what was not folded and why.

    Up to `CHECKED` test images, evenly chosen, and pictures of other sizes are given to the page in
    a browser, as PNG files.

    Args:
        tarball: of the runtime; by default the cache's, or npm's.
        browser: its program; by default Chromium's or Chrome's.

    Raises:
        UserError: there is no browser, or no runtime.
        CertificateError: the page answers otherwise than the run.
    """
    program, runtime = find_browser(browser), web_runtime.runtime(tarball)
    graph, unfolded = onnx_graph.described(run, model, learnt)
    # The page shows what the network sees.
    graph.graph.output.append(helper.make_tensor_value_info("pixels", TensorProto.FLOAT, None))
    description = _description(run, graph)
    if learnt is not None:
        rule = learnt[0].rule()
        description["doubt"] = {**rule.as_dict(), "told": rule.told()}
    files = _files(runtime, graph, description)
    chosen = np.unique(np.linspace(0, len(images) - 1, min(CHECKED, len(images))).astype(int))
    size = run.task.image_size
    others = list(onnx_graph.of_other_sizes(images, OTHER_SIZES))
    page = {**files, "check.html": _template("check.html")}
    told = answers(page, [_png(picture) for picture in [*images[chosen], *others]], program)
    classes = len(run.task.class_names)
    checked_with = f"{browser_version(program)} with ONNX Runtime Web {web_runtime.PACKAGE.version}"
    certificate = check(np.stack([t[:classes] for t in told[: len(chosen)]]), checked_with, chosen)
    seen = [t[classes:].reshape(3, size, size).transpose(1, 2, 0) for t in told[len(chosen) :]]
    own = open_onnx(graph.SerializeToString())
    squares = np.stack([to_square(picture, size) for picture in others])
    reading = Reading.of(
        np.stack(seen),
        squares,
        np.stack([t[:classes] for t in told[len(chosen) :]]),
        own.probabilities(squares),
    )
    certificate = replace(certificate, reading=reading)
    certificate.require()
    description["checked"] = (
        f"compared with its run in a browser when it was exported: {certificate}"
    )
    whole = sum(map(len, files.values())) / 1e6
    of_runtime = (len(files["runtime.js"]) + len(files[web_runtime.SCRIPT])) / 1e6
    description["more"]["Size"] = f"{whole:.1f} MB, {of_runtime:.1f} of them the runtime"
    return _files(runtime, graph, description), certificate, unfolded


def _description(run: Run, graph: onnx.ModelProto) -> dict[str, Any]:
    """What the page knows of the model, printable: as `/model` of the server has it."""
    task = run.task
    names = [printable(name) for name in task.class_names]
    return {
        "name": printable(Path(run.path).name),
        "class_names": names,
        "image_size": task.image_size,
        "recipe": printable(task.recipe.name),
        "data": printable(Path(task.data).name),
        "sha256": hashlib.sha256(graph.SerializeToString()).hexdigest(),
        "samples": _samples(names),
        "more": {
            "Runs on": f"ONNX Runtime Web {web_runtime.PACKAGE.version} of Microsoft, licence MIT, "
            f"npm package with the SHA-256 {web_runtime.PACKAGE.sha256}"
        },
    }


def _samples(names: list[str]) -> list[dict[str, str]]:
    """Pictures of CIFAR-10, if it is CIFAR-10's classes that the model knows."""
    if set(names) != set(CLASS_NAMES):
        return []
    data = load("sample")
    first = [(name, int(np.argmax(data.y_test == k))) for k, name in enumerate(CLASS_NAMES)]
    return [
        {
            "label": name,
            "path": "data:image/png;base64," + base64.b64encode(_png(data.x_test[i])).decode(),
        }
        for name, i in first
    ]


def _files(
    runtime: Mapping[str, bytes], graph: onnx.ModelProto, description: Mapping[str, Any]
) -> dict[str, bytes]:
    page = Template(_template("page.html").decode()).substitute(_WORDS)
    packed = {
        "glue": _packed(runtime[web_runtime.GLUE]),
        "wasm": _packed(runtime[web_runtime.WASM]),
    }
    model = {**description, "graph": _packed(graph.SerializeToString())}
    files = {
        "index.html": utf8(page),
        **{name: _template(name) for name in ("page.css", "page.js", "web.js", "icon.svg")},
        "model.js": b"const MODEL = " + json.dumps(model).encode() + b";\n",
        "runtime.js": b"const RUNTIME = " + json.dumps(packed).encode() + b";\n",
        web_runtime.SCRIPT: runtime[web_runtime.SCRIPT],
        "LICENSE-onnxruntime.txt": _template("LICENSE-onnxruntime.txt"),
    }
    return files


def _template(name: str) -> bytes:
    return (resources.files("normlab") / "templates" / name).read_bytes()


@cache
def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
