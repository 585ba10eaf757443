"""One budget a file and a folder: what is shared or repeated is counted before it is built."""

import gzip
import io
import json
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cifar_files import TINY
from normlab.core.files import write_json
from normlab.core.pickles import MAX_KEY, read_pickle
from normlab.core.tensors import MOST_TENSORS, read_tensors, write_tensors
from normlab.data.cifar10 import layouts
from normlab.data.cifar10.archives import read_members
from normlab.data.images import MOST_CLASSES, from_mapping
from normlab.data.npz import MAX_ARRAYS, read_arrays, read_npz
from normlab.data.pictures.walking import walk
from normlab.errors import DataError, UserError
from normlab.inspection.recording import RECORDING, read_recording
from normlab.models import MODELS
from normlab.recipes import get
from normlab.runs import Task, open_run
from normlab.study import plan as plans
from normlab.study.arms import Arm
from normlab.study.plan import enough_pairs
from recorded import write_run
from studies import make_design

MEBI = 1 << 20


@contextmanager
def at_most(size: int) -> Any:
    """Python may allocate so many bytes meanwhile."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


# Pickles and archives


def test_a_key_that_is_mentioned_many_times_is_not_copied_each_time() -> None:
    key = b"X" + struct.pack("<I", MEBI) + b"k" * MEBI + b"q\x01"
    content = b"\x80\x02}(" + key + b"K\x01" + b"h\x01K\x01" * 20_000 + b"u."
    with at_most(40 * MEBI), pytest.raises(DataError, match="a key that no CIFAR-10 batch has"):
        read_pickle(content)
    short = b"U" + bytes([200]) + b"k" * 200 + b"q\x01"
    assert len(read_pickle(b"\x80\x02}(" + short + b"K\x01" + b"h\x01K\x01" * 20_000 + b"u.")) == 1
    assert MAX_KEY > 200


def test_numbers_too_long_for_arithmetic_are_refused() -> None:
    number = b"\x8b" + struct.pack("<I", 10**6) + b"\x7f" * 10**6 + b"q\x01"
    with pytest.raises(DataError, match="1,024 bits"):
        read_pickle(b"\x80\x02(" + number + b"h\x01t.")
    assert read_pickle(b"\x80\x02\x8a\x10" + b"\x7f" * 16 + b".") == int.from_bytes(b"\x7f" * 16)


@pytest.mark.parametrize("lines", [200, 100_000])
def test_headers_for_all_members_are_short_and_not_copied_into_each(
    lines: int, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT,
        pax_headers={f"c.{i}": "x" * 10 for i in range(lines)},
    ) as tar:  # fmt: skip
        for _ in range(900):
            tar.addfile(tarfile.TarInfo("other"))
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(buffer.getvalue(), 1))
    with at_most(16 * MEBI):
        if lines == 200:
            assert list(read_members(path, {"data_batch_1": 10**6})) == []
        else:
            with pytest.raises(DataError, match="not CIFAR-10"):
                list(read_members(path, {"data_batch_1": 10**8}))


def test_a_pipe_for_an_archive_or_array_does_not_block(tmp_path: Path) -> None:
    import os

    for name in ("x.tar", "x.npz"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="a pipe"):
        layouts.read(tmp_path / "x.tar", TINY)
    with pytest.raises(DataError, match="a pipe"):
        read_npz(tmp_path / "x.npz")


# Arrays


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def zeros(path: Path, names: list[str], size: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        for name in names:
            z.writestr(f"{name}.npy", header((size,)) + bytes(size))


def test_arrays_are_counted_together(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    zeros(path, ["x_train", "x_test", "y_train", "y_test"], 80 * MEBI)  # each less than the bound
    with at_most(4 * MEBI), pytest.raises(DataError, match=r"its arrays claim 335,\d\d\d,\d\d\d"):
        read_npz(path)
    assert read_arrays(path, ["x_train"])["x_train"].nbytes == 80 * MEBI


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    names = [f"a{i}.npy" for i in range(200, 260)]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr("a000.npy", header((50_000,)) + bytes(50_000))
    content = buffer.getvalue()
    at = content.index(b"PK\x01\x02")
    entry, end = content[at : at + 54], bytearray(content[at + 54 :])
    end[8:16] = struct.pack("<HHI", len(names), len(names), 54 * len(names))
    entries = b"".join(entry[:46] + name.encode() for name in names)
    (tmp_path / "x.npz").write_bytes(content[:at] + entries + bytes(end))
    with pytest.raises(DataError, match="they overlap"):
        read_arrays(tmp_path / "x.npz")


def test_there_are_not_any_number_of_arrays(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as z:
        for i in range(MAX_ARRAYS + 1):
            z.writestr(f"{i}.npy", b"")
    with pytest.raises(DataError, match="10,001 arrays"):
        read_arrays(tmp_path / "x.npz")


def test_classes_are_counted_before_a_table_of_them_is_made() -> None:
    x, y = np.zeros((2, 8, 8, 3), np.uint8), np.arange(2)
    names = np.arange(MOST_CLASSES + 1).astype("U")
    with pytest.raises(DataError, match="at most 10,000"):
        from_mapping(
            {"x_train": x, "y_train": y, "x_test": x, "y_test": y, "class_names": names}, name="d"
        )


def test_tensors_are_counted(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({str(i): empty for i in range(MOST_TENSORS + 1)}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(DataError, match="100,001 tensors"):
        read_tensors(tmp_path / "x.safetensors")


# Recordings


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    run = write_run(tmp_path_factory.mktemp("recorded") / "run", "batch")
    return dict(np.load(run.path / RECORDING))


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.__delitem__(name)


def with_(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.update({name: change(arrays[name])})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("step"), "'step' is not a list of steps"),
        (without("layers"), "'layers' is not a list of names"),
        (without("loss"), "'loss' is missing"),
        (without("dense1/in/drift"), "'dense1/in/drift' is missing"),
        (without("dense1/in/var"), "no mean and variance"),
        (without("dense1/weight_grad"), "alone"),
        (with_("step", lambda v: v[::-1]), "does not go upwards"),
        (with_("step", lambda v: v.astype(float)), "'step' is not"),
        (with_("layers", lambda v: v[:1].repeat(2)), "a name twice"),
        (with_("layers", lambda v: np.append(v, "x")), "'x/in/percentiles' is missing"),
        (with_("layers", lambda v: np.arange(3)), "'layers' is not"),
        (with_("loss", lambda v: v.astype(str)), "'loss' is"),
        (with_("loss", lambda v: v[:-1]), "'loss' is float32"),
        (with_("dense1/out/histogram", lambda v: v[:, :3]), "of shape"),
        (with_("dense1/out/histogram", lambda v: v - 9), "a count below 0"),
        (with_("dense1/out/range", lambda v: v[..., None]), "of shape"),
        (with_("dense1/out/mean", lambda v: v[:, 0]), "no value a channel"),
        (with_("dense1/weight_norm", lambda v: v[:, None]), "not one value a sample"),
        (with_("norm1/running_mean", lambda v: v[:, :2]), "not as many channels"),
    ],
)
def test_an_edited_recording_is_named_by_what_is_wrong(
    edit: Callable[[dict[str, Any]], None],
    message: str,
    recorded: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    arrays = dict(recorded)
    edit(arrays)
    np.savez(tmp_path / RECORDING, **arrays)
    with pytest.raises(DataError, match="not a whole recording") as caught:
        read_recording(tmp_path)
    assert message in str(caught.value)


# Runs


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_network_is_measured_without_being_built(model: str, norm: str) -> None:
    if (model, norm) == ("timm", "none"):
        pytest.skip("a network of timm brings its normalisers")
    of_timm = {"architecture": "test_resnet"} if model == "timm" else {}
    task = Task(
        recipe=get("fast79").override(model=model, norm=norm, **of_timm),
        seed=0, data="sample", data_sha256="", class_names=tuple("abc"), image_size=64,
    )  # fmt: skip
    assert task.values() == sum(t.numel() for t in task.build().state_dict().values())


@pytest.mark.parametrize(
    ("size", "message"), [(1_000, "holds 4 values"), (2**40, "cannot be"), (10**40, "cannot be")]
)
def test_weights_are_looked_at_before_the_network_is_built(
    size: int, message: str, tmp_path: Path
) -> None:
    task = Task(
        recipe=get("notebook"), seed=0, data="sample", data_sha256="",
        class_names=tuple("abc"), image_size=size,
    )  # fmt: skip
    write_json(tmp_path / "recipe.json", task.as_dict())
    write_tensors(tmp_path / "last.safetensors", {"x": torch.zeros(4)})
    with at_most(16 * MEBI), pytest.raises(DataError, match=message):
        open_run(tmp_path).model()


def test_a_runs_data_are_read_only_from_where_the_user_has_named_them(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NORMLAB_CACHE", str(in_tmp / "cache"))
    x, y = np.zeros((4, 16, 16, 3), np.uint8), np.arange(4) % 2
    for name in ("a", "b"):
        np.savez(in_tmp / f"{name}.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    task = Task(
        recipe=get("fast79"), seed=0, data="a.npz", data_sha256="", class_names=tuple("01"),
        image_size=16,
    )  # fmt: skip
    with pytest.raises(
        DataError, match=r"'a\.npz', a place that was not named here before.*--data"
    ):
        task.load()
    assert len(task.load("a.npz").y_train) == 4
    assert len(task.load().y_train) == 4
    (in_tmp / "a.npz").unlink()
    (in_tmp / "a.npz").symlink_to("b.npz")  # the same path leads to another place
    with pytest.raises(DataError, match="not named here"):
        task.load()
    (in_tmp / "cache" / "given").chmod(0o500)  # a cache that cannot be written is no error
    assert len(task.load("b.npz").y_train) == 4


# Studies, recipes, folders


@pytest.mark.parametrize("key", ["seeds", "checks"])
def test_a_plan_asks_for_no_more_than_can_be_done(key: str) -> None:
    with pytest.raises(UserError, match=rf"{key}=999999999: choose at most 10,000"):
        make_design(**{key: 999_999_999})


def test_looks_whose_level_no_pairs_reach_end_in_a_sentence() -> None:
    assert enough_pairs(1, look=5) <= 21
    for look in (12, 2_000):
        with pytest.raises(UserError, match="no number of pairs can decide"):
            enough_pairs(3, look)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "", ".x", "a\n"])
def test_an_arm_of_a_plan_leads_to_no_other_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name it with letters"):
        Arm(name)
    plans.save(tmp_path, make_design())
    plan = json.loads((tmp_path / "study.json").read_text())
    plan["arms"][0]["name"] = name
    write_json(tmp_path / "study.json", plan)
    with pytest.raises(UserError):
        plans.load(tmp_path)


@pytest.mark.parametrize("rate", [float("inf"), float("nan"), 0.0, -1.0])
@pytest.mark.parametrize("setting", ["learning_rate", "sgd_rate"])
def test_a_rate_is_a_number(setting: str, rate: float) -> None:
    with pytest.raises(UserError, match=f"{setting}={rate}"):
        get("fast79").override(**{setting: rate})


def test_links_that_multiply_end(tmp_path: Path) -> None:
    """Nine folders with links to each other: 9! ways lead through them."""
    inner = [tmp_path / f"{i}" for i in range(9)]
    for folder in inner:
        folder.mkdir()
        (folder / "picture").touch()
    for folder in inner:
        for i, other in enumerate(inner):
            (folder / f"to {i}").symlink_to(other)
    found = list(walk(tmp_path))
    assert len(found) < 5_000
    assert len({f.path.resolve() for f in found if f.problem is None}) == 9
    assert "links lead to it more than 16 times" in {f.problem for f in found}
