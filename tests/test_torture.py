"""Kill a training at any instant: resumed, it ends with the same bits, and no stray file stays."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import normlab
from normlab.checkpoint import CHECKPOINT, PREVIOUS

# Checkpoints after every step, so that many kills fall into the writing of one.
COMMAND = """
import sys
import normlab.checkpoint
normlab.checkpoint.SECONDS_BETWEEN = 0.0
from normlab.__main__ import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sample = normlab.load("sample")
    path = tmp_path_factory.mktemp("data") / "some.npz"
    np.savez(
        path,
        x_train=sample.x_train[:70],
        y_train=sample.y_train[:70],
        x_test=sample.x_test[:20],
        y_test=sample.y_test[:20],
        class_names=np.array(sample.class_names),
    )
    return path


def start(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "train", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()


def fresh(data: Path, out: Path) -> list[str]:
    options = ["--epochs", "4", "--batch-size", "8", "--threads", "1", "--seed", "3"]
    return ["notebook", "--data", str(data), "--out", str(out), *options]


def killed_and_resumed(data: Path, out: Path, kills: int, rng: random.Random) -> int:
    """Train with `kills` SIGKILLs at random instants after the first step; return how many hit."""
    process, hits = start(*fresh(data, out)), 0
    for _ in range(kills):
        deadline = time.monotonic() + 60
        while not (out / CHECKPOINT).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.communicate()
        hits += process.returncode == -9
        if (out / "result.json").exists():
            break
        process = start("--resume", str(out))
    _, errors = process.communicate(timeout=120)
    assert (out / "result.json").exists(), errors.decode()
    return hits


def check_same(whole: Path, cut: Path) -> None:
    ends = [json.loads((run / "result.json").read_text()) for run in (whole, cut)]
    for key in ("weights_sha256", "test_loss", "test_accuracy", "val_loss", "steps"):
        assert ends[0][key] == ends[1][key], key
    histories = [
        [
            {**json.loads(line), "seconds": 0}
            for line in (run / "history.jsonl").read_text().splitlines()
        ]
        for run in (whole, cut)
    ]
    assert histories[0] == histories[1]
    for name in ("last.safetensors", "best.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert not [p.name for p in cut.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize(("kills", "rounds"), [(3, 1), pytest.param(5, 12, marks=pytest.mark.soak)])
def test_sigkill_at_random_instants(data: Path, tmp_path: Path, kills: int, rounds: int) -> None:
    finish(start(*fresh(data, tmp_path / "whole")))
    hits = 0
    for number in range(rounds):
        out = tmp_path / f"cut{number}"
        hits += killed_and_resumed(data, out, kills, random.Random(number))
        check_same(tmp_path / "whole", out)
    assert hits >= rounds
    print(f"{hits} SIGKILLs in {rounds} runs, all ended with the same bits")


@pytest.mark.parametrize("damage", ["truncated", "bit", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    data: Path, tmp_path: Path, damage: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "cut"
    finish(start(*fresh(data, whole)))
    process = start(*fresh(data, out))
    deadline = time.monotonic() + 60
    while not (out / PREVIOUS).exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    if (out / CHECKPOINT).exists():
        content = bytearray((out / CHECKPOINT).read_bytes())
        if damage == "truncated":
            (out / CHECKPOINT).write_bytes(content[: 4096 * (len(content) // 8192)])
        elif damage == "bit":
            content[len(content) // 2] ^= 4
            (out / CHECKPOINT).write_bytes(content)
        else:
            (out / CHECKPOINT).unlink()
    finish(start("--resume", str(out)))
    check_same(whole, out)
