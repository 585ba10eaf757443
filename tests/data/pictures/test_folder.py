"""Folders and parquet files of pictures: the split, the cache, and everything that is wrong."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from normlab.data import ImageData, load
from normlab.data.pictures import decoding
from normlab.data.pictures import parquet as parquet_module
from normlab.data.pictures.collection import interleave
from normlab.errors import DataError, UserError
from normlab.evaluation.baselines import fit_logistic, score_baselines
from normlab.evaluation.metrics import macro_f1


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "pets"


def pixels(number: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(number)).save(path)


def tree(root: Path, counts: dict[str, int], start: int = 0) -> Path:
    """Folders of different pictures, numbered on from `start`."""
    for folder, count in counts.items():
        for i in range(count):
            draw(root / folder / f"{i}.png", start)
            start += 1
    return root


def of_class(data: ImageData, part: str, name: str) -> set[bytes]:
    x, y = (data.x_train, data.y_train) if part == "train" else (data.x_test, data.y_test)
    return {picture.tobytes() for picture in x[y == data.class_names.index(name)]}


PARTED = {"train/cat": 5, "train/dog": 4, "test/dog": 2, "test/cat": 3}


def test_pictures_keep_part_and_class(root: Path) -> None:
    data = load(tree(root, PARTED))
    assert data.class_names == ("cat", "dog")
    assert data.name == "pets/"
    for folder, start in (("train/cat", 0), ("train/dog", 5), ("test/dog", 9), ("test/cat", 11)):
        part, name = folder.split("/")
        expected = {pixels(start + i).tobytes() for i in range(PARTED[folder])}
        assert of_class(data, part, name) == expected
    assert len(data.y_train) == 9


def test_one_tree_is_split_by_pixels_a_fifth_of_each_class(root: Path, tmp_path: Path) -> None:
    data = load(tree(root, {"cat": 20, "dog": 9, "hen": 2}))
    assert np.bincount(data.y_train).tolist() == [16, 7, 1]
    assert np.bincount(data.y_test).tolist() == [4, 2, 1]
    for i, path in enumerate(sorted(root.rglob("*.png"))):  # other names, other depths
        target = tmp_path / "renamed" / path.parent.name / f"d{i % 3}" / f"{(i * 7) % 31}-{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    again = load(tmp_path / "renamed")
    assert again.sha256 == data.sha256


def test_copies_in_one_tree_stay_in_one_part(root: Path) -> None:
    tree(root, {"cat": 10, "dog": 10})
    for path in list(root.rglob("*.png")):
        Image.open(path).save(path.with_suffix(".bmp"))
    data = load(root)
    train, test = ({p.tobytes() for p in x} for x in (data.x_train, data.x_test))
    assert not train & test
    assert len(data.y_train) == 32
    assert len(data.y_test) == 8


def test_the_last_share_of_the_training_pictures_has_all_classes() -> None:
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    keys = [bytes([i]) for i in range(100)]
    order = interleave(labels, keys)
    assert sorted(order) == list(range(100))
    assert np.bincount(labels[order][-10:]).tolist() == [6, 3, 1]
    shuffled = np.random.default_rng(0).permutation(100)
    again = interleave(labels[shuffled], [keys[i] for i in shuffled])
    np.testing.assert_array_equal(shuffled[again], order)


def test_sizes_mix_and_the_result_is_square(root: Path) -> None:
    tree(root, {"cat": 3, "dog": 3})
    Image.fromarray(pixels(99, 100)[:40]).save(root / "dog" / "wide.jpg")
    assert load(root, image_size=64).x_train.shape[1:] == (64, 64, 3)
    assert load(root).image_shape == (32, 32, 3)


def test_litter_is_passed_over(root: Path) -> None:
    tree(root, {"cat": 3, "dog": 3, ".git": 2, "__MACOSX": 1})
    for name in (".DS_Store", "cat/Thumbs.db", "cat/._1.png", "dog/desktop.ini"):
        (root / name).write_text("litter")
    assert load(root).class_names == ("cat", "dog")


def test_every_problem_is_listed_before_anything_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree(root, {"train/cat": 4, "train/dog": 4, "train/fox": 2, "train/hen": 1})
    tree(root, {"test/cat": 2, "test/dog": 2, "test/hen": 1, "test/owl": 1}, start=50)
    (root / "train" / "ant").mkdir()
    (root / "train" / "notes.txt").write_text("not in a class")
    (root / "readme.txt").write_text("neither in train nor in test")
    (root / "train" / "cat" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nxx")
    (root / "train" / "cat" / "notes.txt").write_text("no picture")
    (root / "train" / "cat" / "dead.png").symlink_to(root / "nowhere.png")
    (root / "train" / "cat" / "self.png").symlink_to("self.png")
    (root / "train" / "dog" / "around").symlink_to(root / "train" / "dog")
    (root / "train" / "dog" / "everything").symlink_to(root)
    os.mkfifo(root / "train" / "dog" / "pipe")
    draw(root / "train" / "cat" / "twin.bmp", 50)  # test/cat/0.png
    draw(root / "train" / "cat" / "dog.png", 4)  # train/dog/0.png
    (root / "test" / "hen" / "0.png").write_bytes(b"")
    foreign = os.fsencode(root / "train" / "dog") + b"/\xff\xfe.png"
    with open(foreign, "wb") as file:
        file.write(b"any")
    with pytest.raises(DataError) as error:
        load(root)
    assert "11 problems, listed above" in str(error.value)
    assert "--skip-bad" in str(error.value)
    listed = capsys.readouterr().err
    for expected in (
        "train/cat/broken.png: not a picture",
        "train/cat/dead.png: a link that leads nowhere",
        "train/cat/self.png: a link in a circle",
        "train/dog/around: a link in a circle",
        "train/dog/everything: a link in a circle",
        "train/dog/pipe: neither a file nor a folder",
        "train/dog/\\xff\\xfe.png: its name is not UTF-8",
        "test/hen/0.png: not a picture",
        "fox: no usable picture in test",
        "hen: no usable picture in test",
        "owl: no usable picture in train",
    ):
        assert f"    {expected}" in listed
    for expected in (
        "passed over files that are no pictures: 3 .txt",
        "folders without pictures: train/ant/",
        "the same picture in train and test: left out of train: train/cat/twin.bmp = test/cat",
        "the same picture in two classes: all copies left out: train/cat/dog.png = train/dog/0.png",
    ):
        assert f"pets/: {expected}" in listed


def test_skip_bad_leaves_out_what_was_listed_and_nothing_else(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree(root, {**PARTED, "train/fox": 2})
    (root / "train" / "cat" / "broken.png").write_bytes(b"x")
    data = load(root, skip_bad=True)
    assert data.class_names == ("cat", "dog")
    assert np.bincount(data.y_train).tolist() == [5, 4]
    listed = capsys.readouterr().err
    assert "2 problems" in listed
    assert "broken.png" in listed
    assert "fox" in listed


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"test/cat": 2, "test/dog": 2}, "has test/ but no train/"),
        ({"cat": 4}, "1 classes"),
        ({"train/cat": 2, "test/cat": 2}, "1 classes"),
    ],
)
def test_what_cannot_be_classified(root: Path, counts: dict[str, int], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load(tree(root, counts, 0))


def test_linked_folders_and_files_are_followed(root: Path, tmp_path: Path) -> None:
    tree(tmp_path / "elsewhere", {"cat": 5})
    tree(root, {"dog": 5}, start=20)
    (root / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    assert load(root).class_names == ("cat", "dog")


def test_the_cache_is_used_checked_and_replaced(
    root: Path, cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(root, {"cat": 3, "dog": 3})
    calls = []
    read = decoding.Readers._read
    monkeypatch.setattr(
        decoding.Readers, "_read", lambda self, n, s: (calls.append(s), read(self, n, s))[1]
    )
    first = load(root)
    assert len(calls) == 6
    assert load(root).sha256 == first.sha256
    assert len(calls) == 6
    (folder,) = cache_root.glob("pictures-*[!k]")
    whole = bytearray((folder / "pixels.npy").read_bytes())
    whole[-1] ^= 1
    (folder / "pixels.npy").write_bytes(whole)
    assert load(root).sha256 == first.sha256  # damaged: decoded anew
    assert len(calls) == 12
    draw(root / "cat" / "new.png", 100)
    assert len(load(root).y_train) == len(first.y_train) + 1
    assert len(calls) == 19
    assert [p for p in cache_root.glob("pictures-*") if p.is_dir()] == [folder]


def parquet(path: Path, column: str, labels: list[object], names: list[str], start: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(len(labels)):
        draw(path.parent / "x.png", start + i)
        rows.append((path.parent / "x.png").read_bytes())
    (path.parent / "x.png").unlink()
    pictures: object = rows if column == "image" else [{"bytes": r, "path": None} for r in rows]
    table = pyarrow.table({column: pictures, "label": labels})
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pyarrow.parquet.write_table(table, path)


def test_parquet_with_the_names_of_hugging_face(root: Path) -> None:
    names = ["zebra", "ape"]  # not in the order of the alphabet
    parquet(root / "data" / "train-00000-of-00002.parquet", "img", [0, 1, 1], names, 0)
    parquet(root / "data" / "train-00001-of-00002.parquet", "img", [0], names, 3)
    parquet(root / "data" / "test-00000-of-00001.parquet", "img", [1, 0], names, 4)
    data = load(root)
    assert data.class_names == ("zebra", "ape")
    assert of_class(data, "train", "zebra") == {pixels(0).tobytes(), pixels(3).tobytes()}
    assert of_class(data, "test", "ape") == {pixels(4).tobytes()}


def test_a_picture_that_could_not_be_read_is_tried_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose file has not changed: the reason may have been a right, or time."""
    for name in ("cat", "horse"):
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (40 * i, 0, len(name))).save(root / name / f"{i}.png")
    read = decoding.Readers._read

    def refused(self: Any, size: int, source: Path) -> Any:
        wrong = source.name == "3.png" and source.parent.name == "cat"
        return (None, b"", "it took too long", -1) if wrong else read(self, size, source)

    monkeypatch.setattr(decoding.Readers, "_read", refused)
    with pytest.raises(DataError, match="1 problem"):
        load(root, image_size=16)
    monkeypatch.setattr(decoding.Readers, "_read", read)
    data = load(root, image_size=16)
    assert len(data.y_train) + len(data.y_test) == 8


def test_a_numbered_file_that_is_missing_is_named(root: Path) -> None:
    folder, names = root / "sample", ["cat", "dog"]  # a data set of normlab's has that name, too
    for n in (0, 1):
        parquet(folder / f"train-0000{n}-of-00002.parquet", "img", [0, 1], names, 2 * n)
    parquet(folder / "test-00000-of-00001.parquet", "img", [1, 0], names, 4)
    assert load(folder, image_size=16).name == "sample/"
    (folder / "train-00001-of-00002.parquet").rename(root / "elsewhere.parquet")
    with pytest.raises(DataError, match=r"lacks train-00001-of-00002\.parquet, one of 2 files"):
        load(folder, image_size=16)


def test_one_parquet_file_of_plain_bytes_and_labels(root: Path) -> None:
    parquet(root / "a.parquet", "image", [2, 10, 2, 10, 2], [], 0)
    data = load(root / "a.parquet", image_size=16)
    assert data.class_names == ("2", "10")
    assert data.image_shape == (16, 16, 3)
    assert (len(data.y_train), len(data.y_test)) == (3, 2)


def test_bad_rows_and_other_files_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet(root / "a.parquet", "image", [0, 1, 0, 1, -1], ["a", "b"], 0)
    with pytest.raises(DataError, match="1 problem,"):
        load(root / "a.parquet")
    assert "row 4: no label (-1)" in capsys.readouterr().err
    parquet(root / "a.parquet", "image", [0, 1, 0, 7, 1], ["a", "b"], 0)
    with pytest.raises(DataError, match="1 problem,"):
        load(root / "a.parquet")
    assert "row 3: the label 7 is none of 0 to 1" in capsys.readouterr().err
    parquet(root / "b.parquet", "photo", [0], [], 0)
    with pytest.raises(DataError, match="photo, label; give img or image"):
        load(root / "b.parquet")
    (root / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a readable parquet"):
        load(root / "c.parquet")


@pytest.mark.parametrize(
    ("labels", "names", "gap"),
    [
        ([2.0, 10.0, 2.0, 10.0, float("nan")], ("2", "10"), "row 4: no label (None)"),
        ([1, 0, None, 1, 0], ("0", "1"), "row 2: no label (None)"),
        (["owl", "jay", "owl", "jay", "nan"], ("jay", "owl"), "row 4: no label (None)"),
        ([b"owl", b"jay", b"", b"owl", b"jay"], ("jay", "owl"), "row 2: no label (None)"),
        ([0.0, 1.0, 0.5, 1.0, 0.0], ("0", "1"), "row 2: the label 0.5 is no whole number"),
        ([0, 1, 0, 1, -1], ("0", "1"), "row 4: no label (-1)"),
        ([0, 1, 0, 1, -3], ("0", "1"), "row 4: the label -3 is negative"),
    ],
)
def test_labels_with_gaps_keep_their_values(
    root: Path,
    labels: list[object],
    names: tuple[str, ...],
    gap: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A gap makes numbers floats in most programs; 2.0 is the class 2, and NaN is none."""
    parquet(root / "a.parquet", "image", labels, [], 0)
    with pytest.raises(DataError, match="1 problem,"):
        load(root / "a.parquet")
    assert f"a.parquet {gap}" in capsys.readouterr().err
    assert load(root / "a.parquet", skip_bad=True).class_names == names


def test_labels_by_reference(root: Path) -> None:
    parquet(root / "a.parquet", "image", ["owl", "jay", "owl", "jay"], [], 0)
    table = pyarrow.parquet.read_table(root / "a.parquet")
    pyarrow.parquet.write_table(
        table.set_column(1, "label", table.column("label").dictionary_encode()),
        root / "a.parquet",
    )
    assert load(root / "a.parquet").class_names == ("jay", "owl")


def test_a_validation_file_is_used_as_validation(root: Path) -> None:
    for i, part in enumerate(("train", "test", "validation")):
        file = root / f"{part}-00000-of-00001.parquet"
        parquet(file, "img", [0, 1, 0, 1][: 4 - i], ["a", "b"], 10 * i)
    data = load(root)
    assert data.y_val is not None
    assert [len(y) for y in (data.y_train, data.y_test, data.y_val)] == [4, 3, 2]
    assert data.files_val is not None
    assert set(data.files_val) == {f"validation-00000-of-00001.parquet row {i}" for i in (0, 1)}
    (root / "extra.parquet").write_bytes((root / "test-00000-of-00001.parquet").read_bytes())
    with pytest.raises(DataError, match="and no others"):
        load(root)


def many_references(path: Path, rows: int, size: int) -> None:
    """A file of a few KB whose rows are all one picture of `size` bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pyarrow.array([bytes(size)] * rows, pyarrow.large_binary())
    table = pyarrow.table({"image": column, "label": [0, 1] * (rows // 2)})
    pyarrow.parquet.write_table(table, path, compression="zstd")


def test_all_files_of_a_folder_share_one_budget(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_module, "MAX_UNSUSPECTED", 30 << 20)
    for i in range(4):
        many_references(root / f"{i}.parquet", 10, 1 << 20)
    assert sum(file.stat().st_size for file in root.iterdir()) < 1 << 20
    with pytest.raises(DataError, match=r"2.parquet: its rows take 10 MiB, and .* 9 MiB are left"):
        load(root)


@pytest.mark.parametrize("kind", ["pictures", "labels", "rows", "names"])
def test_rows_that_take_too_much_are_refused_before_they_are_built(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_module, "MAX_UNSUSPECTED", 1 << 20)
    count, big = 1000, 10_000
    pictures = [b"x" * big] * count if kind == "pictures" else [b"x"] * count
    labels = ["y" * big] * count if kind == "labels" else ["y"] * count
    if kind == "rows":
        pictures, labels = pictures * 10, labels * 10
    table = pyarrow.table({"image": pictures, "label": labels})
    if kind == "names":
        table = table.set_column(1, "label", table.column(1).dictionary_encode())
        table = table.set_column(0, "image", pyarrow.array([b"z" * big] * count))
    root.mkdir()
    pyarrow.parquet.write_table(table, root / "a.parquet")
    assert (root / "a.parquet").stat().st_size < 100_000
    with pytest.raises(DataError, match="its rows take"):
        load(root / "a.parquet")


def test_sixteen_bits_that_are_nearly_black_are_told(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A camera of 12 bits; then one picture that uses the whole range."""
    rng = np.random.default_rng(0)
    for i in range(8):
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 4096, (32, 32)).astype(np.uint16)).save(path)
    load(root)
    counts, *said = capsys.readouterr().err.splitlines()
    assert counts.endswith("8 pictures in 2 classes: a 4, b 4")
    assert "all 8 pictures of 16 bits stay below 7 % of white" in said[0]
    assert "by 16 if they hold 12 bits" in said[0]
    load(root)  # from the cache
    assert capsys.readouterr().err.splitlines() == said
    Image.fromarray(rng.integers(0, 65536, (32, 32)).astype(np.uint16)).save(root / "a" / "9.png")
    load(root)
    assert capsys.readouterr().err.splitlines() == [
        counts.replace("8 p", "9 p").replace("a 4", "a 5")
    ]


def test_logistic_regression_is_at_its_minimum() -> None:
    """At the minimum of a convex function its gradient, here by differences, is zero."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(60, 4)), rng.integers(0, 3, 60)
    w = fit_logistic(x, labels, 3)

    def loss(w: np.ndarray) -> float:
        logits = x @ w[:-1] + w[-1]
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return float(-np.log(p[np.arange(60), labels]).mean() + (w[:-1] ** 2).sum() / 120)

    for i in np.ndindex(w.shape):
        step = np.zeros_like(w)
        step[i] = 1e-5
        assert abs(loss(w + step) - loss(w - step)) / 2e-5 < 1e-4


def test_simple_answers_on_separable_pictures() -> None:
    """Dark against light: the regression is right, the majority class is so by its share."""
    dark, light = np.full((30, 16, 16, 3), 40, np.uint8), np.full((10, 16, 16, 3), 200, np.uint8)
    x, y = np.concatenate([dark, light]), np.repeat([0, 1], [30, 10])
    data = ImageData(
        name="mine", x_train=x, y_train=y, x_test=x, y_test=y, class_names=("dark", "light")
    )
    scores = score_baselines(data)
    assert scores["logistic regression"]["test_accuracy"] == 1
    majority = scores["majority class"]
    assert (majority["test_accuracy"], majority["balanced_accuracy"]) == (0.75, 0.5)
    assert majority["macro_f1"] == pytest.approx(6 / 7 / 2)


def test_macro_f1_by_hand() -> None:
    confusion = np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    assert macro_f1(confusion) == pytest.approx((6 / 9 + 8 / 11) / 2)


def test_resizing_is_for_pictures_only(in_tmp: Path) -> None:
    import normlab

    with pytest.raises(UserError, match="image_size=64"):
        normlab.train("notebook", data="sample", image_size=64)
    assert not (in_tmp / "runs").exists()
