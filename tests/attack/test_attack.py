"""`make attack` in its short form, and each attack on files a few times (`make soak`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")


def attack(tmp_path: Path, *words: str) -> dict[str, dict[str, int]]:
    out = tmp_path / "counts.json"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent), *words, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    attacks: dict[str, dict[str, int]] = json.loads(out.read_text())["attacks"]
    return attacks


def test_the_short_attacks_on_files_are_survived(tmp_path: Path) -> None:
    found = attack(tmp_path, "files", "--tries", "0")
    assert len(found) >= 8
    assert all(case == {"tried": 1, "survived": 1} for case in found.values())


@pytest.mark.soak
def test_all_attacks_on_files_are_survived(tmp_path: Path) -> None:
    found = attack(tmp_path, "files", "--tries", "3")
    assert len(found) >= 14
    assert all(case == {"tried": 3, "survived": 3} for case in found.values())
