"""Decoders of CIFAR-10's files: right for good files, harmless for hostile ones."""

import gzip
import io
import pickle
import struct
import subprocess
import tarfile
import tracemalloc
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cifar_files import ARRAYS, BATCH, TINY, VERSIONS, python2_pickle, tar, write_folder
from normlab.core.pickles import MAX_OPCODES, as_array, read_pickle
from normlab.data.cifar10 import layouts as cifar10
from normlab.errors import DataError

ROWS = np.arange(BATCH * 3072, dtype=np.uint32).astype(np.uint8).reshape(BATCH, 3072)
LABELS = np.array([3, 1, 9], np.uint8)
BATCH_PICKLE = python2_pickle(ROWS, LABELS)


def assert_tiny(arrays):
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize("version", VERSIONS)
def test_folder_and_archive_of_every_version(tmp_path, version):
    files = VERSIONS[version](ARRAYS)
    assert_tiny(cifar10.read(write_folder(tmp_path / version, files), TINY))
    archive = tmp_path / "archive.tar.gz"
    archive.write_bytes(tar(files, version))
    assert_tiny(cifar10.read(archive, TINY))
    archive.write_bytes(gzip.decompress(archive.read_bytes()))
    assert_tiny(cifar10.read(archive, TINY))


def test_python_itself_reads_the_pickles_of_these_tests_the_same_way():
    batch = pickle.loads(BATCH_PICKLE, encoding="bytes")
    np.testing.assert_array_equal(batch[b"data"], ROWS)
    assert batch[b"labels"] == LABELS.tolist()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_pickled_anew_by_python_3(protocol, order):
    batch = {b"data": np.asarray(ROWS, order=order), b"labels": LABELS.tolist(), "x": [None, True]}
    result = read_pickle(pickle.dumps(batch, protocol))
    np.testing.assert_array_equal(as_array(result["data"]), ROWS)
    assert result["labels"] == LABELS.tolist()


@pytest.mark.parametrize("version", VERSIONS)
def test_other_pixels_are_refused(tmp_path, version):
    changed = ARRAYS | {"x_test": ARRAYS["x_test"] ^ 1}
    folder = write_folder(tmp_path / "data", VERSIONS[version](changed))
    with pytest.raises(DataError, match=r"x_test not those of CIFAR-10"):
        cifar10.read(folder, TINY)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_missing_file_is_named(tmp_path, version):
    files = VERSIONS[version](ARRAYS)
    for name in files:
        archive = tmp_path / "archive.tar.gz"
        archive.write_bytes(tar({k: v for k, v in files.items() if k != name}, version))
        with pytest.raises(DataError, match=r"holds no (images|labels) of"):
            cifar10.read(archive, TINY)


def test_a_pickle_of_too_many_steps_is_left_early():
    with pytest.raises(DataError, match="steps"):
        read_pickle(b"\x80\x02](" + b"K\x00" * MAX_OPCODES + b"e.")


class Evil:
    """Unpickled by Python, this creates the file it names."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return subprocess.run, (["touch", str(self.path)],)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_batch_that_calls_a_function_is_refused_and_not_run(tmp_path, protocol):
    witness = tmp_path / "witness"
    hostile = pickle.dumps({"data": Evil(witness), "labels": []}, protocol)
    folder = write_folder(tmp_path / "data", {"data_batch_1": hostile})
    with pytest.raises(
        DataError, match=r"asks to call '(subprocess|commands).run'; refused"
    ) as error:
        cifar10.read(folder, TINY)
    assert "\n" not in str(error.value)
    assert not witness.exists()
    pickle.loads(hostile)  # that it would have run
    assert witness.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged pickle"),
        (BATCH_PICKLE[:-9], "damaged pickle"),
        (b"\x80\x02Pid\n.", "uses PERSID"),
        (b"\x80\x02(lp0\n.", "uses LIST"),
        (b"S'\\d'\n.", "uses STRING"),  # pickletools warns of the escape
        (pickle.dumps({"data": 1, "labels": []}), "no array"),
        (pickle.dumps({"data": ROWS.astype(">u2"), "labels": []}, 2), "not uint8"),
        (pickle.dumps({"data": ROWS[:2], "labels": []}, 2), "pixels have shape"),
        (pickle.dumps({"data": ROWS, "labels": [1, 2]}, 2), "list of 3 labels"),
        (pickle.dumps({"data": ROWS, "labels": [1, 2, 10]}, 2), "from 0 to 9"),
        (pickle.dumps([1]), "no data and labels"),
    ],
)
def test_a_wrong_pickle_is_one_clear_line(tmp_path, content, message):
    folder = write_folder(tmp_path / "data", {"test_batch": content})
    with pytest.raises(DataError, match=message) as error:
        cifar10.read(folder, TINY)
    assert "\n" not in str(error.value)


def peak_memory(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(content):
    with pytest.raises(DataError):
        as_array(read_pickle(content))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little") + b".",  # bytes that are not there
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo entry with a huge index
        BATCH_PICKLE.replace(b"M\x00\x0c\x86", b"J\x00\x00\x00\x7f\x86"),  # a huge shape
        b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.",  # an allocation if it were called
    ],
)
def test_a_claim_of_gigabytes_allocates_nothing(content):
    assert peak_memory(lambda: refused(content)) < 1_000_000


def test_a_long_key_mentioned_often_is_not_copied():
    """1 MB of key under 10,000 names took 10 GB."""
    key = b"X" + (1 << 20).to_bytes(4, "little") + b"k" * (1 << 20)
    content = b"\x80\x02}(" + key + b"q\x00N" + b"h\x00N" * 10_000 + b"u."
    assert peak_memory(lambda: refused(content)) < 12 << 20


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(BATCH_PICKLE) - 1), st.integers(0, 255)),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, len(BATCH_PICKLE)),
)
def test_damaged_batches_raise_nothing_but_data_errors(changes, cut):
    content = bytearray(BATCH_PICKLE)
    for position, value in changes:
        # Half of the changes in the opcodes around the pixels, where they matter.
        content[position if position % 2 else position % 300] = value
    for damaged in (bytes(content), bytes(content[:cut])):
        with suppress(DataError):  # and nothing else
            batch = read_pickle(damaged)
            if isinstance(batch, dict):
                as_array(batch.get("data"))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing_but_data_errors(content):
    for start in (b"", b"\x80\x02", b"\x80\x04(]}"):
        with suppress(DataError):
            read_pickle(start + content)


def hostile_archive(path, victim):
    """Every trick in one archive, followed by good files."""
    good = VERSIONS["cifar-10-batches-py"](ARRAYS)
    with tarfile.open(path, "w:gz") as archive:

        def add(name, kind=tarfile.REGTYPE, content=b"", link=""):
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(content), link
            archive.addfile(member, io.BytesIO(content))

        add(f"../../{victim.name}", content=b"owned")
        add(str(victim), content=b"owned")
        add("cifar-10-batches-py/data_batch_1", tarfile.SYMTYPE, link=str(victim))
        add("cifar-10-batches-py/data_batch_2", tarfile.LNKTYPE, link=str(victim))
        add("cifar-10-batches-py/data_batch_3", tarfile.FIFOTYPE)
        add("cifar-10-batches-py/data_batch_4", tarfile.CHRTYPE)
        add("cifar-10-batches-py/data_batch_5", tarfile.DIRTYPE)
        for name, content in good.items():
            add(f"/etc/../{name}", content=content)


def test_links_devices_and_paths_outside_change_nothing(tmp_path):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    hostile_archive(inside / "hostile.tar.gz", victim)
    before = sorted(tmp_path.rglob("*"))
    assert_tiny(cifar10.read(inside / "hostile.tar.gz", TINY))
    assert victim.read_text() == "as it was"
    assert sorted(tmp_path.rglob("*")) == before


def test_an_archive_that_unpacks_to_gigabytes_is_left_early(tmp_path):
    path = tmp_path / "bomb.tar.gz"
    member = tarfile.TarInfo("padding")
    member.size = 300 << 20
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(member.tobuf())
        for _ in range(300):
            file.write(bytes(1 << 20))
    with pytest.raises(DataError, match=r"unpacks to more than 256 MiB"):
        cifar10.read(path, TINY)


def test_a_member_that_claims_gigabytes_is_refused_unread(tmp_path):
    member = tarfile.TarInfo("data_batch_1")
    member.size = 8 << 30
    path = tmp_path / "claim.tar"
    path.write_bytes(member.tobuf() + bytes(1024))
    with pytest.raises(DataError, match=r"data_batch_1 is larger than"):
        cifar10.read(path, TINY)


def test_a_sparse_member_is_passed_over(tmp_path):
    member = tarfile.TarInfo("data_batch_1")
    member.size = 4
    member.pax_headers = {"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": "0,4"}
    path = tmp_path / "sparse.tar"
    path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + b"abcd" + bytes(508 + 1024))
    with pytest.raises(DataError, match=r"holds no images|larger than"):
        cifar10.read(path, TINY)


@pytest.mark.parametrize("keep", [0, 1, 20, 700, 5000])
def test_half_an_archive_is_one_clear_line(tmp_path, keep):
    path = tmp_path / "half.tar.gz"
    path.write_bytes(tar(VERSIONS["cifar-10-batches-py"](ARRAYS))[:keep])
    with pytest.raises(DataError) as error:
        cifar10.read(path, TINY)
    assert "\n" not in str(error.value)
    assert str(error.value).count(str(path)) == 1


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_archives_raise_nothing_but_data_errors(tmp_path_factory, data):
    whole = gzip.decompress(tar(VERSIONS["cifar-10-batches-bin"](ARRAYS)))
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for position in data.draw(st.lists(st.integers(0, 511), max_size=6)):
        if position < len(content):
            content[position] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("tar") / "damaged.tar"
    path.write_bytes(content)
    with suppress(DataError):  # and nothing else
        assert_tiny(cifar10.read(path, TINY))


def png(mode, size):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def claims(picture, size):
    """The PNG with another size in its header, and the checksum to go with it."""
    header = b"IHDR" + struct.pack(">II", *size) + picture[24:29]
    return picture[:12] + header + struct.pack(">I", zlib.crc32(header)) + picture[33:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_batch.png", b"not a picture", "damaged PNG"),
        ("test_batch.png", png("RGB", (1024, 4)), r"not RGB \(1024, 3\)"),
        ("test_batch.png", png("RGB", (12_000, 12_000)), "larger"),
        ("test_batch.png", claims(png("RGB", (1024, 3)), (12_000, 12_000)), "damaged PNG"),
        ("test_batch.png", png("L", (1024, 3)), r"not RGB \(1024, 3\)"),
        ("test_batch.png", png("RGB", (1024, 3))[:-40], "damaged PNG"),
        ("train_lables.json", b"[" * 50_000, "damaged JSON"),
        ("train_lables.json", b"[1, 2", "damaged JSON"),
        ("train_lables.json", b"[1, 2]", "list of 15 labels"),
        ("test_lables.json", b"[1, 2, 3.0]", "from 0 to 9"),
        ("test_batch.bin", bytes(3073 * 2), "bytes, not"),
        ("test_batch", bytes(1_000_000), "is larger than"),
    ],
)
def test_wrong_files_of_the_other_versions(tmp_path, name, content, message):
    folder = write_folder(tmp_path / "data", {name: content})
    with pytest.raises(DataError, match=message) as error:
        cifar10.read(folder, TINY)
    assert "\n" not in str(error.value)


def test_an_absent_path_and_a_folder_without_the_data(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        cifar10.read(tmp_path / "nothing", TINY)
    with pytest.raises(DataError, match=r"holds no images of data_batch_1"):
        cifar10.read(tmp_path, TINY)
