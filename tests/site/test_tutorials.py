"""Every `normlab` command of the tutorials, run one after the other in a folder like a clone's."""

import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import normlab

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
SERVES = "normlab serve"
LONG = "normlab train --data my-pictures/"  # minutes on a few pictures: three epochs do here


def commands(name: str) -> list[str]:
    """The lines of a tutorial's console blocks."""
    text = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def run(line: str, folder: Path) -> None:
    """Run a line of a tutorial; a server is asked to end once it answers."""
    words = shlex.split(line)
    if words[0] == "pip":
        return  # the environment of the tests is installed
    assert words[0] == "normlab", line
    if line.startswith(LONG):
        words += ["--epochs", "3"]
    command = [sys.executable, "-m", "normlab", *words[1:]]
    if line.startswith(SERVES):
        server = subprocess.Popen([*command, "--port", "0"], cwd=folder, stderr=subprocess.DEVNULL)
        time.sleep(10)
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 130
        return
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    fine = (0, 1) if words[1] == "doctor" else (0,)  # 1: it found something serious
    assert done.returncode in fine, f"{line}\n{done.stdout[-800:]}\n{done.stderr[-800:]}"


def test_commands_are_found() -> None:
    assert len(commands("first-hour")) >= 9
    assert len(commands("comparison")) >= 3
    assert len(commands("own-pictures")) >= 5


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["first-hour", "comparison", "own-pictures"])
def test_every_command_runs(name: str, tmp_path: Path) -> None:
    sample = normlab.load("sample")
    for k in (0, 8):
        folder = tmp_path / "my-pictures" / sample.class_names[k]
        folder.mkdir(parents=True)
        for n in np.flatnonzero(sample.y_train == k):
            Image.fromarray(sample.x_train[n]).save(folder / f"{n:03d}.png")
    Image.fromarray(sample.x_test[0]).save(tmp_path / "my-picture.jpg")
    (tmp_path / "README.md").write_text("# as a clone has one")
    for line in commands(name):
        run(line, tmp_path)
