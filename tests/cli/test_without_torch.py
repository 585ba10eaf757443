"""`predict` and `serve` on an ONNX file need a few packages, and PyTorch is none of them."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

import normlab
from normlab.interchange import export_run

# As docs/export.md has them, and what they need in turn.
PREDICT = "click filelock msgspec numpy onnxruntime pillow platformdirs"
SERVE = f"{PREDICT} fastapi python-multipart uvicorn"
INDIRECT = (
    *("flatbuffers", "google", "coloredlogs", "sympy", "mpmath", "packaging"),  # of onnxruntime
    *("starlette", "pydantic", "pydantic_core", "annotated_types", "annotated_doc", "anyio"),
    *(
        "typing_extensions",
        "typing_inspection",
        "sniffio",
        "idna",
        "h11",
        "opentelemetry",
    ),  # of fastapi and uvicorn
)
ONLY = """
import sys
from importlib.machinery import PathFinder
names = {names!r} | set(sys.stdlib_module_names) | {{"normlab", "__editable___normlab"}}
class Only(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name[0] == "_" or name.partition(".")[0] in names:
            return PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Only if finder is PathFinder else finder for finder in sys.meta_path]
from normlab.__main__ import run
code = run(sys.argv[1:])
"""
TELL = """
from pathlib import Path
most = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(int(most) // 1024, file=sys.stderr)
sys.exit(code)
"""


def command(packages: str, *arguments: str) -> list[str]:
    modules = {"pillow": "PIL", "python-multipart": "python_multipart"}
    names = {*INDIRECT, *(modules.get(name, name) for name in packages.split())}
    return [sys.executable, "-c", ONLY.format(names=names) + TELL, *arguments]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    run = normlab.train("fast79", out=folder / "r", data="sample", epochs=1, threads=1)
    return export_run(run, folder / "out" / "model.onnx").path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_predict(model: Path, picture: Path) -> None:
    words = command(PREDICT, "predict", str(model), str(picture))
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("%") == 3
    assert int(done.stderr.split()[-1]) < 200  # megabytes


def test_serve(model: Path, picture: Path) -> None:
    words = command(SERVE, "serve", str(model), "--port", "0")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            lines = iter(process.stdout.readline, "")
            address = next(filter(None, (re.search(r"http://\S+", line) for line in lines)), None)
            assert address is not None, process.stderr.read()
            with picture.open("rb") as file:
                answer = requests.post(f"{address[0]}/predict", files={"files": file}, timeout=30)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert len(answer.json()["results"][0]["predictions"]) == 5
    assert int(errors.split()[-1]) < 200


def test_the_documentation_names_these_packages() -> None:
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")
    assert f"pip install {PREDICT}\n" in text
    assert f"pip install {SERVE}\n" in text


def test_a_run_without_pytorch_is_one_line(picture: Path, tmp_path: Path) -> None:
    words = command(PREDICT, "predict", str(picture))
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "torch" in done.stderr
