"""Files of PyTorch that are read with bounded time and memory, whatever they claim."""

import io
import pickle
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from normlab.errors import DataError
from normlab.formats.torch_files import TorchFile, read_torch
from normlab.formats.torch_tensors import TorchReader

TYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)


def wide(tensor: torch.Tensor) -> np.ndarray:
    odd = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    return (tensor.float() if tensor.dtype in odd else tensor).numpy()


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_both_ages_hold_the_same(tmp_path: Path, legacy: bool) -> None:
    """Of many storages, in the types that both can write, with views and shared storages."""
    base = torch.arange(24.0).reshape(4, 6)
    types = [t for t in TYPES if not (legacy and t in (torch.uint16, *TYPES[-2:]))]
    state = {f"w.{t}".replace("torch.", ""): base.to(t) for t in types}
    state |= {f"many.{i}": torch.full((i % 3,), float(i)) for i in range(300)}
    state |= {"v.column": base[:, 2], "v.transposed": base.t(), "v.tied": base}
    state |= {"v.expanded": torch.ones(1).expand(5), "v.scalar": torch.tensor(7)}
    state["p.parameter"] = torch.nn.Parameter(base[1])
    path = tmp_path / "x.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    (part,) = read_torch(path).state_dicts
    assert not part.unread
    assert part.arrays.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(part.arrays[name], wide(tensor.detach()))


def test_a_legacy_file_that_is_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    state = {"a.weight": torch.ones(50), "b.weight": torch.ones(50)}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    (part,) = read_torch(path).state_dicts
    assert len(part.arrays) == 1
    assert "cut off" in next(iter(part.unread.values()))
    path.write_bytes(content[:200])
    with pytest.raises(DataError, match="damaged pickle"):
        read_torch(path)


def test_arrays_of_numpy_beside_or_instead_of_tensors(tmp_path: Path) -> None:
    state = {"bn.running_var": np.arange(3.0), "bn.running_mean": np.ones(3, np.float32).T}
    for name in ("x.pkl", "x.pt"):
        with open(tmp_path / name, "wb") as f:
            pickle.dump({"model": state}, f, protocol=2) if name == "x.pkl" else torch.save(
                state, f
            )
        (part,) = read_torch(tmp_path / name).state_dicts
        for key, array in state.items():
            np.testing.assert_array_equal(part.arrays[key], array)


# What follows builds files by hand: sharing, repetition, many members, huge numbers.


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + len(raw).to_bytes(4, "little") + raw


def tensor(key: str, count: int, size: tuple[int, ...] | None = None, offset: int = 0) -> bytes:
    """The mention of a float32 tensor in a storage of `count` numbers."""
    size = (count,) if size is None else size
    sizes = b"(" + b"".join(map(number, size)) + b"t"
    strides = b"(" + b"".join(number(1 if n == 1 else 0) for n in size[:-1]) + number(1) + b"t"
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    storage += number(count) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return call + storage + number(offset) + sizes + strides + b"\x89Nt" + b"R"


def archive(path: Path, pickled: bytes, storages: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x/data.pkl", b"\x80\x02" + pickled + b".")
        for key, content in storages.items():
            z.writestr(f"x/data/{key}", content)
    return path


def cost(call: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of the processor, and bytes at the peak."""
    tracemalloc.start()
    started = time.process_time()
    try:
        call()
        return time.process_time() - started, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(path: Path, message: str) -> Callable[[], None]:
    def call() -> None:
        with pytest.raises(DataError, match=message):
            read_torch(path)

    return call


def dictionary(entries: list[tuple[str, bytes]]) -> bytes:
    return b"}(" + b"".join(text(k) + v for k, v in entries) + b"u"


@pytest.mark.parametrize("places", [1, 40])
def test_tensors_that_share_one_storage_are_added_up_before_any_is_made(
    tmp_path: Path, places: int
) -> None:
    """In one state dict, and spread over many."""
    count = 1 << 18
    each = [(f"{i}.running_var", tensor("0", count)) for i in range(2000 // places)]
    parts = [(f"model{i}", dictionary(each)) for i in range(places)]
    path = archive(tmp_path / "x.pt", dictionary(parts), {"0": bytes(4 * count)})
    _, memory = cost(refused(path, "they share their storages"))
    assert memory < 30 << 20


def test_an_expanded_tensor_claims_what_it_becomes(tmp_path: Path) -> None:
    pickled = dictionary([("bn.running_var", tensor("0", 1, (1 << 20, 1 << 20)))])
    path = archive(tmp_path / "x.pt", pickled, {"0": bytes(4)})
    _, memory = cost(refused(path, "4,398,046,511,104 bytes"))
    assert memory < 2 << 20


def test_members_that_overlap_are_counted_each(tmp_path: Path) -> None:
    """A directory whose entries all point to the same bytes."""
    keys = [str(i) for i in range(50)]
    pickled = dictionary([(f"{k}.weight", tensor(k, 1 << 16)) for k in keys])
    path = archive(tmp_path / "x.pt", pickled, {"0": bytes(4 << 16)})
    with zipfile.ZipFile(path, "a") as z:
        first = z.getinfo("x/data/0")
        for key in keys[1:]:
            info = zipfile.ZipInfo(f"x/data/{key}")
            for field in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(info, field, getattr(first, field))
            z.filelist.append(info)
            z.NameToInfo[info.filename] = info
        z._didModify = True
    _, memory = cost(lambda: _unread(path))
    assert memory < 16 << 20


def _unread(path: Path) -> None:
    try:
        found = read_torch(path)
    except DataError:
        return
    assert sum(len(part.unread) for part in found.state_dicts) >= 49


def test_many_storages_take_time_in_proportion(tmp_path: Path) -> None:
    """20,000 took minutes when each looked through the archive's directory."""
    keys = [str(i) for i in range(20_000)]
    pickled = dictionary([(f"{k}.weight", tensor(k, 1)) for k in keys])
    path = archive(tmp_path / "x.pt", pickled, dict.fromkeys(keys, bytes(4)))
    found: list[TorchFile] = []
    started = time.process_time()
    found.append(read_torch(path))
    assert time.process_time() - started < 30  # a square would be many minutes
    assert len(found[0].state_dicts[0].arrays) == 20_000


HUGE = number(1 << 8_000_000)


@pytest.mark.parametrize(
    "pickled",
    [
        dictionary([("a.weight", tensor("0", 4, (1 << 400_000,) * 16))]),
        dictionary([("a.weight", tensor("0", 4, (4,), 1 << 8_000_000))]),
        dictionary([("a.weight", tensor("0", 1 << 8_000_000))]),
        dictionary([("a.weight", tensor("0", 4, (-1,)))]),
        b"}(" + text("a.weight") + HUGE + HUGE + tensor("0", 4) + b"u",
        b"(" + b"q\x00h\x00" * 5 + HUGE + b"l" + b"q\x01" + b"h\x01" * 1000 + b"t",
    ],
)
def test_huge_numbers_cost_what_they_take_in_the_file(tmp_path: Path, pickled: bytes) -> None:
    path = archive(tmp_path / "x.pt", pickled, {"0": bytes(16)})
    seconds, memory = cost(refused(path, "none of its tensors|no weights|damaged|1,024 bits"))
    assert seconds < 10
    assert memory < 60 << 20


MANY = 5_000
LIST = b"(" + b"N" * MANY + b"lq\x00"
STATE = b"}(" + b"".join(text(f"k{i}") + b"N" for i in range(MANY)) + b"uq\x00"
LONG_NAME = b"c" + b"m" * 500_000 + b"\nx\nq\x00"


@pytest.mark.parametrize(
    "pickled",
    [
        LIST + b"0](" + b"ccollections\nOrderedDict\nh\x00\x85R" * MANY + b"e",
        STATE + b"0](" + b"ca\nb\n)\x81h\x00b" * MANY + b"e",
        STATE + b"0](" + b"c__torch__\nb\n)\x81h\x00b" * MANY + b"e",
        b"(" + b"N" * MANY + b"tq\x000](" + b"ca\nb\nh\x00R" * MANY + b"e",
        b"(" + b"N" * MANY + b"tq\x000](" + b"ca\nb\n)Rh\x00R" * MANY + b"e",
        LONG_NAME + b"0](" + b"h\x00)R" * MANY + b"e",
        b"](" + (text("a") + dictionary([("w.x", tensor("0", 4))]))[6:] * 2_000 + b"e",
    ],
    ids=["lists", "states", "scripts", "arguments", "calls of calls", "names", "state dicts"],
)
def test_what_many_things_share_is_looked_through_once(tmp_path: Path, pickled: bytes) -> None:
    """Each would take the square of its length in time or memory."""
    path = archive(tmp_path / "x.pt", pickled, {"0": bytes(16)})
    seconds, memory = cost(refused(path, "no weights|without measure|damaged|2,000 state dicts"))
    assert seconds < 10
    assert memory < 40 << 20


def deep(levels: int) -> bytes:
    return b"]" * levels + b"a" * (levels - 1)


def doubled(levels: int) -> bytes:
    """Dictionaries that each hold the one before under two keys: 2**levels ways down."""
    steps = dictionary([("running_var", tensor("0", 4))]) + b"q\x00"
    for i in range(levels):
        steps += b"0}(" + text("a") + b"h" + bytes([i]) + text("b") + b"h" + bytes([i]) + b"u"
        steps += b"q" + bytes([i + 1])
    return steps


def test_sharing_is_walked_once(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt", doubled(90), {"0": bytes(16)})
    seconds, _ = cost(lambda: read_torch(path))
    assert seconds < 5
    assert len(read_torch(path).state_dicts) == 1


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (deep(100_000), "no weights"),
        (b")" * 300_000, "more than 250,000 steps"),
        (b"}q\x00(" + text("x") + b"h\x00u", "no weights"),  # holds itself
        (dictionary([("k" * 1_000_000, tensor("0", 4))]), "no weights"),
        (b"\x80\x02}" + b"(" + text("k" * 900) + b"}(" + text("k" * 900) + b"]uu", "characters"),
    ],
    ids=["deep", "long", "cycle", "a long name", "names that add up"],
)
def test_shapes_that_are_no_checkpoint_are_refused(
    tmp_path: Path, pickled: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchReader, "limit", 250_000)
    path = archive(tmp_path / "x.pt", pickled, {"0": bytes(16)})
    _, memory = cost(refused(path, message))
    assert memory < 50 << 20


def test_weights_that_lie_too_deep_are_told(tmp_path: Path) -> None:
    value: Any = {"a.weight": torch.zeros(2)}
    for _ in range(150):
        value = [value]
    path = tmp_path / "x.pt"
    torch.save({"deep": value, "model": {"b.weight": torch.zeros(2)}}, path)
    found = read_torch(path)
    assert [part.place for part in found.state_dicts] == ["model"]
    assert any("100 levels" in told for told in found.passed_over)


def test_nothing_is_ever_called(tmp_path: Path) -> None:
    """Every way in which a pickle asks for a call, each of which makes a file if it is made."""
    mark = tmp_path / "mark"
    plain = text(f"touch {mark}")
    ways = [
        b"cos\nsystem\n(" + plain + b"tR",
        b"cos\nsystem\n(" + plain + b"t\x81",
        b"(" + b"cos\nsystem\n" + plain + b"o",
        b"(" + plain + b"ios\nsystem\n",
        text("os") + text("system") + b"\x93(" + plain + b"tR",
        b"cos\nsystem\n(" + plain + b"t}\x92",
        b"cbuiltins\ngetattr\n(cos\nsystem\n" + text("__call__") + b"tR(" + plain + b"tR",
    ]
    for way in ways:
        pickled = b"\x80\x04" + dictionary([("x", way), ("a.weight", tensor("0", 4))])
        path = archive(tmp_path / "x.pt", pickled, {"0": bytes(16)})
        (part,) = read_torch(path).state_dicts
        assert part.arrays["a.weight"].tolist() == [0, 0, 0, 0]
        assert not mark.exists()
        if b"\x81" in way or b"\x92" in way:
            continue  # Python makes these calls of classes only
        with zipfile.ZipFile(path) as z:
            raw = z.read("x/data.pkl").replace(tensor("0", 4), b"N")
        pickle.load(io.BytesIO(raw))
        assert mark.exists()
        mark.unlink()
