"""`load`: the sample, the user's own data, and every mistake in them as one line."""

import io
import json
import subprocess
import sys
import tracemalloc
import zipfile
from contextlib import suppress
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from normlab import data
from normlab.cli.data import data as command
from normlab.data.batches import split_images
from normlab.data.cache import cache_folder
from normlab.data.cifar10 import layouts as cifar10
from normlab.data.npz import read_npz
from normlab.errors import DataError

SAMPLE = "e3671d947db827b135b8d4ecb5ae7796e2739129062b10aba5f2ed245d4a440f"


def arrays(**changes):
    rng = np.random.default_rng(1)
    return {
        "x_train": rng.integers(0, 256, (6, 5, 4, 3), np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2], np.uint8),
        "x_test": rng.integers(0, 256, (3, 5, 4, 3), np.uint8),
        "y_test": np.array([2, 1, 0], np.uint8),
    } | changes


def fails(value, match):
    with pytest.raises(DataError, match=match) as error:
        data.load(value)
    assert "\n" not in str(error.value)


def test_the_sample_is_real_and_balanced():
    sample = data.load("sample")
    assert sample.name == "sample"
    assert sample.class_names == cifar10.CLASS_NAMES
    assert sample.x_train.shape == (400, 32, 32, 3)
    assert sample.image_shape == (32, 32, 3)
    assert np.bincount(sample.y_train).tolist() == [40] * 10
    assert np.bincount(sample.y_test).tolist() == [20] * 10
    assert 100 < sample.x_train.mean() < 140  # the whole set: 120.7


@pytest.fixture
def whole_cifar10():
    if not (cache_folder() / "cifar10").exists():
        pytest.skip("CIFAR-10 is not in the cache; `normlab data fetch` gets it")
    return data.load()


def test_the_sample_is_the_first_of_each_class(whole_cifar10):
    sample = data.load("sample")
    for part, count in (("train", 40), ("test", 20)):
        labels = getattr(whole_cifar10, f"y_{part}")
        rows = sorted(i for k in range(10) for i in np.flatnonzero(labels == k)[:count])
        for letter in "xy":
            whole = getattr(whole_cifar10, f"{letter}_{part}")
            np.testing.assert_array_equal(getattr(sample, f"{letter}_{part}"), whole[rows])


def test_whole_cifar10(whole_cifar10):
    """The facts: counts, and means of the channels."""
    assert whole_cifar10.x_train.shape == (50_000, 32, 32, 3)
    assert isinstance(whole_cifar10.x_train, np.memmap)
    means = whole_cifar10.x_train.mean(axis=(0, 1, 2), dtype=np.float64) / 255
    np.testing.assert_allclose(means, [0.49140, 0.48216, 0.44653], atol=5e-6)
    assert np.bincount(whole_cifar10.y_train).tolist() == [5000] * 10


@pytest.mark.parametrize("label_dtype", [np.uint8, np.int32, np.uint64])
def test_a_mapping_and_an_npz_are_the_same_data(tmp_path, label_dtype):
    plain = arrays()
    other = {k: v.astype(label_dtype) if k[0] == "y" else v for k, v in plain.items()}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "mine.npz", **other)
        loaded = data.load(str(tmp_path / "mine.npz"))
        assert loaded.name == "mine.npz"
        assert loaded.class_names == ("0", "1", "2")
        assert loaded.sha256 == data.load(plain).sha256
        assert loaded.y_train.dtype in (np.uint8, np.int64)
        for name, array in plain.items():
            np.testing.assert_array_equal(getattr(loaded, name), array)
    assert data.load(loaded) is loaded


def test_whole_floats_are_labels():
    found = data.load(arrays(y_train=np.array([0.0, 1, 2, 0, 1, 2])))
    assert found.y_train.dtype == np.int64
    assert found.sha256 == data.load(arrays()).sha256


def test_what_keras_load_data_returns():
    plain = arrays()
    pairs = (
        (plain["x_train"], plain["y_train"][:, None]),
        (plain["x_test"], plain["y_test"][:, None]),
    )
    assert data.load(pairs).sha256 == data.load(plain).sha256
    assert data.load([list(pair) for pair in pairs]).sha256 == data.load(plain).sha256
    fails((*pairs, pairs[0]), r"tuple of 3; give \(\(x_train, y_train\), \(x_test, y_test\)\)")
    fails(pairs[0], r"tuple of 2; give")
    fails([], "list of 0")


def test_a_validation_part_of_its_own(tmp_path):
    own = arrays(x_val=arrays()["x_test"][:2], y_val=np.array([1, 1]))
    np.savez(tmp_path / "mine.npz", **own)
    loaded = data.load(tmp_path / "mine.npz")
    np.testing.assert_array_equal(loaded.x_val, own["x_val"])
    assert loaded.sha256 == data.load(own).sha256 != data.load(arrays()).sha256
    train, validation = split_images(loaded, 0.5)
    assert (len(train), len(validation)) == (6, 2)
    np.testing.assert_array_equal(validation.labels, [1, 1])
    assert loaded.summary() == "3 classes: 0 2 + 1 + 0, 1 2 + 1 + 2, 2 2 + 1 + 0 " + (
        "(training + test + validation)"
    )
    assert loaded.summary(most=1) == "3 classes: 0 2 + 1 + 0 and 2 more " + (
        "(training + test + validation)"
    )


def test_a_split_carries_the_names_of_files():
    own = replace(data.load(arrays()), files_train=tuple("abcdef"))
    train, validation = split_images(own, 0.5)
    assert (train.files, validation.files) == (("a", "b", "c"), ("d", "e", "f"))
    assert own.sha256 == data.load(arrays()).sha256
    train, validation = split_images(data.load(arrays()), 0.5)
    assert train.files is validation.files is None


def test_the_fingerprint_of_data_without_validation_stays():
    """Runs resume by it: computed by the version that knew no validation part."""
    assert data.load("sample").sha256 == SAMPLE


def test_labels_as_keras_has_them():
    assert data.load(arrays(y_train=arrays()["y_train"][:, None])).y_train.shape == (6,)


@pytest.mark.parametrize("names", [["cat", "dog", "hen"], np.array([b"cat", b"dog", b"hen"])])
def test_class_names(tmp_path, names):
    np.savez(tmp_path / "mine.npz", **arrays(class_names=np.asarray(names)))
    assert data.load(tmp_path / "mine.npz").class_names == ("cat", "dog", "hen")
    assert data.load(arrays(class_names=names)).num_classes == 3


def test_one_image_of_one_class():
    one = {"x": np.zeros((1, 1, 1, 3), np.uint8), "y": np.zeros(1, np.uint8)}
    tiny = data.load({f"{k}_{part}": v for part in ("train", "test") for k, v in one.items()})
    assert tiny.num_classes == 1
    assert "1 training" in repr(tiny)


@pytest.mark.parametrize("name", ["x_train", "y_train", "x_test", "y_test", "class_names"])
def test_the_fingerprint_covers_everything(name):
    names = np.array(["a", "b", "c"])
    plain = arrays(class_names=names)
    changed = plain[name].copy()
    changed[0] = "z" if name == "class_names" else (changed[0] + 1) % 3
    assert data.load(plain).sha256 != data.load(plain | {name: changed}).sha256
    assert data.load(plain).sha256 == data.load(dict(plain)).sha256


def test_the_fingerprint_covers_shapes():
    turned = {k: np.swapaxes(v, 1, 2) if k[0] == "x" else v for k, v in arrays().items()}
    same_bytes = {k: arrays()[k].reshape(v.shape) if k[0] == "x" else v for k, v in turned.items()}
    assert data.load(arrays()).sha256 != data.load(same_bytes).sha256


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x_train": arrays()["x_train"] / 255}, r"x_train \* 255\)"),
        ({"x_train": arrays()["x_train"][..., :1]}, r"x_train has shape \(6, 5, 4, 1\)"),
        ({"x_train": arrays()["x_train"][0]}, "x_train has shape"),
        ({"x_test": arrays()["x_test"][:0], "y_test": []}, "x_test has shape"),
        ({"x_test": arrays()["x_test"][:, :4]}, "bring them to one size"),
        ({"y_train": [0, 1, 2]}, "6 images in x_train but 3 labels"),
        ({"y_train": [0.0, 1, 2, 0, 1, 2.5]}, "y_train is float64 and holds 2.5"),
        ({"y_train": [0, 1, 2, 0, float("nan"), 2]}, "NaN, no label, for 1 of 6 images"),
        ({"y_train": np.eye(6, dtype=int)}, r"\(6, 6\), one-hot; .* y_train.argmax\(1\)"),
        ({"y_train": np.ones((6, 2), int)}, r"y_train has shape \(6, 2\); give one label"),
        ({"y_train": ["owl", "jay", "cat"] * 2}, r"numpy.unique\(y_train, return_inverse=True\)"),
        ({"y_train": np.ma.masked_equal([0, 1, 2, 0, 1, 2], 1)}, "masked array with 2 values"),
        ({"x_train": arrays()["x_train"].transpose(0, 3, 1, 2)}, r"x_train.transpose\(0, 2, 3, 1"),
        ({"x_train": arrays()["x_train"][..., 0]}, r"x_train\[..., None\].repeat\(3, axis=3\)"),
        ({"x_train": arrays()["x_train"][..., :1]}, r"x_train.repeat\(3, axis=3\)"),
        ({"x_train": arrays()["x_train"][:, None, ..., 0]}, r"transpose\(0, 2, 3, 1\).repeat"),
        ({"x_train": np.zeros((6, 5, 4, 4), np.uint8)}, "leaves the alpha channel out"),
        ({"x_train": np.zeros((6, 192), np.uint8)}, r"x_train.reshape\(-1, 8, 8, 3\)"),
        ({"x_train": arrays()["x_train"] / 127.5 - 1}, "go from -1 to 1, so undo"),
        ({"x_train": arrays()["x_train"].astype(int)}, r"x_train.astype\('uint8'\)"),
        ({"x_train": arrays()["x_train"] * 1.0}, r"x_train.round\(\).astype\('uint8'\)"),
        ({"x_train": arrays()["x_train"] > 9}, r"x_train.astype\('uint8'\) \* 255"),
        ({"x_train": arrays()["x_train"] * np.uint16(16)}, r"/ 4095 \* 255.* if they hold 12 bits"),
        ({"x_train": np.full((6, 5, 4, 3), np.nan)}, "NaN or infinite"),
        ({"x_val": arrays()["x_test"]}, "one of x_val and y_val is missing"),
        ({"x_val": arrays()["x_test"], "y_val": [0, 1]}, "3 images in x_val but 2 labels"),
        ({"x_val": arrays()["x_test"][:, :4], "y_val": [0, 1, 2]}, "validation images"),
        ({"y_train": [0, 1, -1, 0, 1, 2]}, "label -1"),
        ({"y_train": np.array([0, 1, 2**63, 0, 1, 2], np.uint64)}, "label 9223372036854775808"),
        ({"y_train": [0, 1, 4, 0, 1, 2]}, "no image has the label 3"),
        ({"class_names": ["a", "b"]}, "label 2 has no name"),
        ({"class_names": ["a", "b", "a"]}, "a name twice"),
        ({"class_names": [1, 2, 3]}, "give K strings"),
        ({"x_train": [[1], [1, 2]]}, "x_train is not an array"),
    ],
)
def test_mistakes_in_arrays(changes, match):
    fails(arrays(**changes), match)


def test_mistakes_in_what_is_named(tmp_path):
    fails({"x_train": 1}, "y_train, x_test, y_test missing")
    fails(str(tmp_path / "nothing.npz"), "does not exist")
    fails("cifar100", "does not exist; give 'cifar10', 'sample'")
    fails(tmp_path, "holds no")
    fails(7, "data=7; give")
    text = tmp_path / "notes.txt"
    text.write_text("not an archive")
    fails(text, "not a readable tar archive")


def newer_zip():
    buffer = io.BytesIO()
    np.savez(buffer, **arrays())
    content = bytearray(buffer.getvalue())
    content[content.index(b"PK\x01\x02") + 6] = 64  # the zip version needed
    return bytes(content)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip" * 99, newer_zip()])
def test_files_that_are_no_npz(tmp_path, content):
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    fails(path, "not a readable .npz")


def test_an_npz_lacks_an_array(tmp_path):
    np.savez(tmp_path / "part.npz", x_train=arrays()["x_train"])
    fails(tmp_path / "part.npz", "y_train, x_test, y_test missing")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_an_npz_with_a_pickle_is_refused_and_not_run(tmp_path):
    witness = tmp_path / "witness"
    hostile = np.array([Evil(witness)] * 6, dtype=object)
    np.savez(tmp_path / "evil.npz", **arrays(y_train=hostile))
    fails(tmp_path / "evil.npz", "y_train.npy holds object")
    assert not witness.exists()


def header(shape, dtype="|u1"):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def npz_with(path, content, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        archive.writestr("x_train.npy", content)
    return path


def read_under_watch(path):
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as error:
            read_npz(path)
        return str(error.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        header((1 << 40, 32, 32, 3)) + bytes(100),
        header((1 << 62, 4)) + bytes(100),  # its size overflows 64 bits to nothing
        header((4,), "|V999999999") + bytes(100),
        header((1 << 33,), "|S0"),
        header((-1,)) + bytes(100),
    ],
)
def test_a_header_that_claims_too_much_allocates_nothing(tmp_path, content):
    message, peak = read_under_watch(npz_with(tmp_path / "claim.npz", content))
    assert "claims shape" in message or "holds" in message or "damaged" in message
    assert peak < 2_000_000


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x_train.npy", "w", force_zip64=True) as member,
    ):
        member.write(header((300 << 20,)))
        for _ in range(300):
            member.write(bytes(1 << 20))
    message, peak = read_under_watch(path)
    assert "claim 314,5" in message
    assert peak < 2_000_000


@pytest.mark.parametrize("shared", [False, True])
def test_many_members_have_one_budget(tmp_path, shared):
    """Of 200 MiB each: as members of their own, and as entries that name the same bytes."""
    path = tmp_path / "many.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("x_train",) if shared else ("x_train", "x_test"):
            with archive.open(f"{name}.npy", "w") as member:
                member.write(header((200 << 20,)))
                for _ in range(200):
                    member.write(bytes(1 << 20))
        if shared:
            twin = copy(archive.infolist()[0])
            twin.filename = "x_test.npy"
            archive.filelist.append(twin)
    message, peak = read_under_watch(path)
    assert ("they overlap" if shared else "its arrays claim 419,4") in message
    assert peak < 2_000_000


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_npz_files_raise_nothing_but_data_errors(tmp_path_factory, changes):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays())
    content = bytearray(buffer.getvalue())
    for position, value in changes:
        content[position % len(content)] = value
    path = tmp_path_factory.mktemp("npz") / "damaged.npz"
    path.write_bytes(content)
    with suppress(DataError):  # and nothing else
        read_npz(path)


def test_importing_the_data_package_is_light():
    heavy = "{'torch', 'pooch', 'requests', 'rich', 'PIL', 'filelock'}"
    script = (
        f"import sys, normlab.data, normlab.cli.data; print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))
    run = CliRunner().invoke
    assert "not in" in run(command, ["info"]).output
    assert json.loads(run(command, ["info", "--json"]).output)["present"] is False
    missing = run(command, ["fetch", "--data", str(tmp_path / "nothing")])
    assert isinstance(missing.exception, DataError)
    assert run(command, ["fetch", "--minutes", "0"]).exit_code == 2
    folder = tmp_path / "cache" / "cifar10"
    folder.mkdir()
    np.save(folder / "x_test.npy", np.zeros(3, np.uint8))
    verified = run(command, ["verify", "--json"])
    assert verified.exit_code == 1
    assert json.loads(verified.output.splitlines()[-1])["found"]["x_train"] is None
