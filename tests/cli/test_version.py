"""`normlab --version`, and the wheel's tag: one for every Python."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from normlab.__main__ import run as command
from normlab.kernels import library


def test_version_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--version"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"normlab {version('normlab')}, ")
    assert told.endswith(f"; PyTorch {version('torch')}\n")
    assert ("no kernels" in told) is not library.available()


def test_version_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'numpy')); "
        "from normlab.__main__ import run; sys.exit(run(['--version']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_libraries_and_wheel_name_no_python(tmp_path: Path) -> None:
    """What setup.py says, asked without building."""
    code = """
import sys
from setuptools import Distribution, Extension
import runpy, setuptools
given = {}
setuptools.setup = lambda **words: given.update(words)
runpy.run_path("setup.py")
distribution = Distribution({"name": "x", "ext_modules": [Extension("x.kernels._y", [])]})
wheel = given["cmdclass"]["bdist_wheel"](distribution)
wheel.finalize_options()
library = given["cmdclass"]["build_ext"](distribution).get_ext_filename("x.kernels._y")
print(*wheel.get_tag(), library)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    python, abi, platform, library_name = done.stdout.split()
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    assert library_name == str(Path("x/kernels/_y.so"))
