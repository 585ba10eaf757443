"""The corpus of the fuzz targets, and some changes to it; `make fuzz` does millions."""

import random
import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run import fuzz, mutate
from targets import CORPUS, TARGETS, Target, attempt, zipped

from normlab.core.sandbox import limited
from normlab.diagnosis import examination
from normlab.errors import DataError
from normlab.formats.keras_notebook import read_notebook


def test_every_parser_has_a_corpus_of_small_files() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == set(TARGETS)
    assert all(path.stat().st_size <= 20_000 for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    target, rng = TARGETS[name], random.Random(0)
    seeds = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    changed = [mutate(rng, seeds, target.tokens) for _ in range(60)] if name != "hdf5" else []
    for data in (*seeds, *changed):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the command shows none of theirs
            error = attempt(target, data, tmp_path / "x")
        assert error is None, (data[:80], error)


LIMITS = Path(__file__).parent / "limits"


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize("kind", ["crash", "hang", "memory"])
def test_what_breaks_a_library_is_one_line_here(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that crash HDF5, keep it busy for ever or make it ask for gigabytes."""
    monkeypatch.setattr(examination, "SECONDS", 4.0)
    config = (CORPUS / "keras-config" / "sequential").read_bytes()[1:]
    data = (LIMITS / f"hdf5-{kind}").read_bytes()
    path = tmp_path / ("model.h5" if data[0] % 2 else "model.keras")
    if data[0] % 2:
        path.write_bytes(data[1:])
        with pytest.raises(DataError):
            limited(read_notebook, path, 8, 10, memory=1 << 30, seconds=4)
    else:
        path.write_bytes(zipped(data, "model.weights.h5", {"config.json": config}))
        with pytest.raises(DataError) as error:
            examination.read(path)
        assert "\n" not in str(error.value)


def misbehave(data: bytes, _: Path) -> None:
    """Does what a parser may not do."""
    if data[0] == 1:
        raise KeyError("x")
    while data[0] == 2 and len(data) > 4:
        pass
    if data[0] == 3:
        import ctypes

        ctypes.string_at(0)


def test_the_fuzzer_finds_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import run

    (tmp_path / "corpus" / "bad").mkdir(parents=True)
    (tmp_path / "corpus" / "bad" / "seed").write_bytes(b"\0\1\2\3")
    monkeypatch.setattr(run, "CORPUS", tmp_path / "corpus")
    monkeypatch.setattr(run, "HANG", 0.3)
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        result = fuzz(Target("bad", misbehave, True), 300, 0, tmp_path / "found")
    assert result["executions"] == 300
    what = " ".join(result["what"])  # type: ignore[arg-type]
    assert "KeyError" in what
    assert "died: -11" in what
    assert "takes over" in what
