"""Denormals are zero in every thread of a training, whatever ran before it, and in none after."""

import subprocess
import sys

import pytest

from normlab import kernels

PROGRAM = """
import torch
from normlab.core.environment import settings

torch.set_num_threads(2)
x = torch.full((1 << 20,), 1e-39)
before = int((x * 0.5).count_nonzero())  # the second thread begins here
with settings(2, torch.device("cpu")):
    inside = int((x * 0.5).count_nonzero())
print(before, inside, int((x * 0.5).count_nonzero()))
"""


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here")
def test_threads_that_are_there_already_flush_too() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(1 << 20), "0", str(1 << 20)]
