"""What a forked session of `torture` finds loaded: a training loads what no import names."""

import contextlib
import io
import tempfile
from pathlib import Path

import torch

import normlab.__main__
import normlab.cli
import normlab.reports.study_report
import torture

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
    place = Path(name)
    torture.write_data(place / "data.npz")
    words = ["train", "notebook", "--data", str(place / "data.npz"), "--epochs", "1", "--threads"]
    normlab.__main__.run([*words, "1", "--record", "--out", str(place / "warm")])
