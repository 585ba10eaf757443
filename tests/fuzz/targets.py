"""What is fuzzed: each parser of files as a function of bytes, with the memory that it may take.

A parser may return or raise `UserError`. Inputs of parsers that read zip archives begin with a byte
that says whether the rest is the archive or one member of a sound one: most changes to an archive
break a checksum, and what lies behind it would never be reached.
"""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from crafted import torch_file

from normlab.core.pickles import as_array, read_pickle
from normlab.data.cifar10.archives import read_members
from normlab.data.cifar10.layouts import Reference, _decode_file
from normlab.data.npz import read_npz
from normlab.errors import UserError

CORPUS = Path(__file__).parent / "corpus"
MEBI = 1 << 20
ONE = Reference(batch=1, sha256={})
TOKENS = (b"null", b"true", b"[]", b"{}", b'""', b"-1", b"0", b"1e999", b"NaN", b"9" * 30, b"0.5")
JSON_TOKENS = (*TOKENS, b'"x"', b"[[]]", b"[1]", b'{"a":1}', b",", b":", b'"')


@dataclass(frozen=True)
class Target:
    """A parser.

    ours: whether it was written here, or is a library's.
    in_child: whether the package runs it in a process with limits, which then may be passed.
    memory: bytes that one call may take beyond what the process has.
    """

    name: str
    run: Callable[[bytes, Path], object]
    ours: bool
    in_child: bool = False
    memory: int = 64 * MEBI
    tokens: tuple[bytes, ...] = ()


def _pickle(data: bytes, _: Path) -> None:
    batch = read_pickle(data)
    if isinstance(batch, dict) and "data" in batch:
        as_array(batch["data"])


def _cifar(data: bytes, _: Path) -> None:
    name = ("data_batch_1", "test_batch.bin", "train_lables.json", "test_lables.json")[data[0] % 4]
    list(_decode_file(name, data[1:], ONE.batch))


def _cifar_png(data: bytes, _: Path) -> None:
    list(_decode_file("test_batch.png", data, ONE.batch))


def _archive(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    sizes = {"data_batch_1": 600, "test_batch": 600}
    assert all(len(content) <= 600 for _, content in read_members(path, sizes))


def zipped(data: bytes, member: str, others: dict[str, bytes]) -> bytes:
    """The archive in `data`, or one of `others` with `data` as `member`; the first byte says."""
    if data[0] % 2:
        return data[1:]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {**others, member: data[1:]}.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


_PIXELS = np.zeros((2, 2, 2, 3), np.uint8)
NPZ = {
    **dict.fromkeys(("x_train.npy", "x_test.npy"), npy(_PIXELS)),
    **dict.fromkeys(("y_train.npy", "y_test.npy"), npy(np.arange(2))),
}
# Of two samples of one layer of three channels.
_SHAPES = {
    **{f"a/{side}/{key}": (2, *shape) for side in ("in", "out") for key, shape in (
        ("percentiles", (3,)), ("unit", (3,)), ("range", (2,)), ("histogram", (64,)),
        ("mean", (3,)), ("var", (3,)), ("drift", ()))},
    **dict.fromkeys(("a/grad", "a/dead", "loss", "seconds"), (2,)),
}  # fmt: skip
RECORDING = {
    "step.npy": npy(np.arange(1, 3)),
    "layers.npy": npy(np.array(["a"])),
    **{f"{name}.npy": npy(np.zeros(shape, np.float32)) for name, shape in _SHAPES.items()},
}


def _npz(data: bytes, path: Path) -> None:
    """Data of one's own and a recording, which are read by the same code."""
    from normlab.inspection.recording import read_recording

    if data[0] & 2:
        (path.parent / "recording.npz").write_bytes(zipped(data, "loss.npy", RECORDING))
        read_recording(path.parent)
    else:
        path.write_bytes(zipped(data, "x_train.npy", NPZ))
        read_npz(path)


def _torch(data: bytes, path: Path) -> None:
    """By the first byte: 2 a file of PyTorch before 1.6, 4 a program for one, else a zip's part."""
    from normlab.diagnosis.examination import examine_all
    from normlab.diagnosis.state_dicts import from_torch_file
    from normlab.formats.torch_files import read_torch

    parts = {"a/data/0": bytes(64), "a/byteorder": b"little"}
    if data[0] == 2:
        path.write_bytes(data[1:])
    elif data[0] == 4:
        path.write_bytes(torch_file(data[1:]))
    else:
        path.write_bytes(zipped(data, "a/data.pkl", parts))
    examine_all(from_torch_file("x", read_torch(path)))


def _json(data: bytes, path: Path) -> None:
    """Every JSON document that is read back: of a run, of a study, of a study's run."""
    from normlab.runs import open_run
    from normlab.study import outcomes, plan

    folder = path.parent
    kind = data[0] % 6
    name = ("recipe.json", "history.jsonl", plan.FILE, "batch-seed-0.json", "environment.json",
            "result.json")[kind]  # fmt: skip
    (folder / name).write_bytes(data[1:])
    if kind == 0:
        open_run(folder)
    elif kind in (1, 4, 5):
        (folder / "recipe.json").write_bytes((CORPUS / "json" / "recipe").read_bytes()[1:])
        run = open_run(folder)
        _ = run.history if kind == 1 else run.environment if kind == 4 else run.result
    elif kind == 2:
        plan.load(folder)
    else:
        _ = outcomes.load(folder, _task(), "batch", 0)


def _task() -> object:
    from normlab.runs import Task

    return Task.from_dict(json.loads((CORPUS / "json" / "recipe").read_bytes()[1:]))


def _keras_config(data: bytes, path: Path) -> None:
    """What is made of the description of a model; the arrays are another target's."""
    from normlab.diagnosis import keras_files
    from normlab.formats import keras_notebook as keras_reader

    path = path.with_name("x.keras")
    path.write_bytes(zipped(b"\0" + data[1:], "config.json", {"model.weights.h5": b"no"}))
    if data[0] % 2:
        keras_files.read_keras(path)
    else:
        keras_reader.read_notebook(path, 8, 10)


def _hdf5(data: bytes, path: Path) -> None:
    from normlab.diagnosis import keras_files
    from normlab.formats import keras_notebook as keras_reader

    if data[0] % 2:
        path = path.with_name("x.h5")
        path.write_bytes(data[1:])
        keras_reader.read_notebook(path, 8, 10)
    else:
        path = path.with_name("x.keras")
        config = (CORPUS / "keras-config" / "sequential").read_bytes()[1:]
        path.write_bytes(zipped(data, "model.weights.h5", {"config.json": config}))
        keras_files.read_keras(path)


def _onnx(data: bytes, path: Path) -> None:
    from normlab.diagnosis.onnx_files import read_onnx

    path.write_bytes(data)
    (path.parent / "weights.bin").write_bytes(bytes(16))
    read_onnx(path)


def _parquet(data: bytes, path: Path) -> None:
    from normlab.data.pictures.parquet import read_rows

    path.write_bytes(data)
    read_rows(path, 1 << 30)


def _picture(data: bytes, _: Path) -> None:
    from normlab.data.pictures.reading import read_picture, to_square

    to_square(read_picture(data), 8)


def _safetensors(data: bytes, path: Path) -> None:
    from normlab.core.tensors import read_tensors
    from normlab.diagnosis.state_dicts import from_arrays, read_safetensors

    path.write_bytes(data[1:])
    if data[0] % 2:
        read_tensors(path)
    else:
        from_arrays("x", "x", read_safetensors(path))


TARGETS = {
    target.name: target
    for target in (
        Target("pickle", _pickle, True),
        Target("cifar", _cifar, True, tokens=JSON_TOKENS),
        Target("archive", _archive, True),
        Target("torch", _torch, True),
        Target("json", _json, True, tokens=JSON_TOKENS),
        Target("keras-config", _keras_config, True, tokens=JSON_TOKENS),
        Target("npz", _npz, True),
        Target("picture", _picture, False, True, 1024 * MEBI),
        Target("cifar-png", _cifar_png, False),
        Target("onnx", _onnx, False, True, 1024 * MEBI),
        Target("parquet", _parquet, False, True, 1024 * MEBI),
        Target("safetensors", _safetensors, False),
        Target("hdf5", _hdf5, False, True, 1024 * MEBI),
    )
}


def attempt(target: Target, data: bytes, path: Path) -> Exception | None:
    """Run a parser; whatever it raises that it may not raise."""
    try:
        target.run(data, path)
    except UserError as e:
        return ValueError(f"two lines: {e}") if "\n" in str(e) else None
    except Exception as e:
        return e
    return None


def small_tar(gz: bool) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if gz else "w") as archive:
        for name in ("x/data_batch_1", "x/test_batch"):
            member = tarfile.TarInfo(name)
            member.size = 30
            archive.addfile(member, io.BytesIO(bytes(30)))
    return buffer.getvalue()
