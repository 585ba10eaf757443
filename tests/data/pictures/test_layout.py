"""Folders as people have them: the parts, the classes, and what is said of the rest."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normlab.data import ImageData, load
from normlab.data.pictures import folder as folder_module
from normlab.data.pictures.layout import Layout, arrange, match
from normlab.data.pictures.naming import is_litter, part_of, resembles_part
from normlab.data.pictures.walking import grow
from normlab.errors import DataError


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "pets"


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(path)


def fill(root: Path, **counts: int) -> Path:
    """Different pictures in folders; a double underscore stands for a slash."""
    number = 1000 * len(list(root.rglob("*")))
    for folder, count in counts.items():
        for i in range(count):
            draw(root / folder.replace("__", "/") / f"{i}.png", number := number + 1)
    return root


def mark(root: Path, *files: str) -> Path:
    """Files that count as pictures by their names, and are not looked into."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def classes(layout: Layout) -> dict[str | None, list[str]]:
    found: dict[str | None, list[str]] = {}
    for folder in layout.classes:
        found.setdefault(folder.part, []).append(folder.label)
    return found


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("train", "train TRAIN Train training Training trn train_set trainset TrainSet train-data"),
        ("train", "training_images imgs_train seg_train train2017 dataset_train train_split"),
        (
            "test",
            "test Test testing Testing_Set test-images tst evaluation eval test_data seg_test",
        ),
        ("validation", "val Val valid VALID validation Validation_Set dev val2017 valid_imgs"),
        (None, "cat trainer testament vale devil valley station straining latest evaluate contest"),
    ],
)
def test_parts_by_their_names(part: str | None, names: str) -> None:
    for name in names.split():
        assert part_of(name) == part, name
    assert part_of("ｔｒａｉｎ") is None  # full width: not a usual spelling


def test_what_resembles_a_part_or_is_a_systems() -> None:
    for name in ("train_augmented", "My Test Pictures", "petsTrain", "unlabelled", "valid-extra"):
        assert resembles_part(name), name
    for name in ("trainers", "tested", "rain"):
        assert not resembles_part(name), name
    for name in ("@eaDir", "#Recycle", "$RECYCLE.BIN", "Lost+Found", "Thumbs.db", ".cache"):
        assert is_litter(name), name
    assert not is_litter("trash")  # a class of waste


@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("training_set", "test_set"), ("TRAINING", "eval"), ("trn", "tst")]
)
def test_two_parts_in_other_spellings(root: Path, names: tuple[str, str]) -> None:
    mark(root, *(f"{part}/{c}/1.png" for part in names for c in ("owl", "jay")))
    assert classes(arrange(grow(root))) == {"train": ["jay", "owl"], "test": ["jay", "owl"]}


@pytest.mark.parametrize("validation", ["val", "valid", "Validation"])
def test_a_validation_folder_is_used_as_validation(root: Path, validation: str) -> None:
    fill(root, train__owl=4, train__jay=4, test__owl=2, test__jay=2)
    fill(root, **{f"{validation}__owl": 3, f"{validation}__jay": 1})
    data = load(root, image_size=8)
    assert (len(data.y_train), len(data.y_test)) == (8, 4)
    assert data.y_val is not None
    assert np.bincount(data.y_val).tolist() == [1, 3]
    assert data.files_val is not None
    assert {name.split("/")[0] for name in data.files_val} == {validation}


def test_validation_is_for_testing_where_there_is_no_test(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(root, train__owl=4, train__jay=4, val__owl=3, val__jay=1)
    data = load(root, image_size=8)
    assert (len(data.y_train), len(data.y_test), data.x_val) == (8, 4, None)
    assert "no test: the validation pictures are for testing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "files",
    [
        "tram/1.png ship/1.png train/1.png",
        "train/1.png test/1.png parade/1.png",
        "Validation/1.png sketch/1.png",
    ],
)
def test_a_class_may_be_called_as_a_part_is_and_it_is_said(root: Path, files: str) -> None:
    layout = arrange(grow(mark(root, *files.split())))
    assert sorted(classes(layout)[None]) == sorted(f.split("/")[0] for f in files.split())
    assert "taken for classes, though their names may mean more" in layout.notes[0]


def test_a_class_called_train_in_both_parts(root: Path) -> None:
    mark(root, *(f"{p}/{c}/1.png" for p in ("train", "test") for c in ("train", "ship")))
    assert classes(arrange(grow(root)))["train"] == ["ship", "train"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ("train/1.png test/1.png", "without folders of classes"),
        ("images/1.png labels/1.png", "pictures and what belongs to them"),
        ("images/train/1.png images/val/1.png labels/train/1.txt", "without folders of classes"),
        ("train/images/1.png train/labels/1.txt valid/images/1.png", "no folders of classes"),
        ("test/owl/1.png test/jay/1.png", "but no train/"),
        ("train/owl/1.png Training/owl/1.png test/owl/1.png", "are one part by their names"),
        (
            "ship/1.png tram/1.png train/steam/1.png train/fast/1.png",
            "'{}/train/[*]' for the second",
        ),
        ("pets/a/1.png pets/b/1.png tools/c/1.png tools/d/1.png", "'{}/[*]/[*]' for the second"),
        ("data/a/1.png data/b/1.png owl/1.png jay/1.png", "'{}/data/[*]' for the second"),
        ("photos/a/1.png photos/b/1.png drawings/1.png", "'{}/photos/[*]' for the second"),
    ],
)
def test_two_readings_or_none_are_refused_with_what_to_do(
    root: Path, files: str, said: str
) -> None:
    with pytest.raises(DataError, match=said.format(root)) as error:
        arrange(grow(mark(root, *files.split())))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("pets/pets/train/owl/1.png;pets/pets/test/owl/1.png", {"train": ["owl"], "test": ["owl"]}),
        ("seg_train/seg_train/a/1.png;seg_test/seg_test/a/1.png", {"train": ["a"], "test": ["a"]}),
        ("images/owl/1.png;images/jay/1.png;labels/owl/1.png", {None: ["jay", "owl"]}),
        ("data/owl/1.png;data/jay/1.png;Readme_Images/1.png", {None: ["jay", "owl"]}),
        ("dataset/owl/1.png;dataset/jay/1.png;docs/shot.png", {None: ["jay", "owl"]}),
        ("My Data Set/owl/1.png;My Data Set/jay/1.png", {None: ["jay", "owl"]}),
        ("train/owl/1.png;train/jay/1.png;test/1.png;test/2.png", {None: ["jay", "owl"]}),
        ("data/train_data/a/1.png;data/features/a/1.png", {None: ["a"]}),
        ("owl/Imgs/1.png;jay/Imgs/1.png", {None: ["jay", "owl"]}),
        ("owl/may/1.png;owl/june/1.png;jay/may/1.png;jay/june/2.png", {None: ["jay", "owl"]}),
        ("owl/2019/1.png;owl/2020/1.png;jay/2021/1.png;jay/2022/2.png", {None: ["jay", "owl"]}),
        (
            "owl/train/1.png;owl/test/1.png;jay/train/1.png",
            {"train": ["jay", "owl"], "test": ["owl"]},
        ),
    ],
)
def test_the_level_of_the_classes(
    root: Path, files: str, expected: dict[str | None, list[str]]
) -> None:
    mark(root, "notes.txt", *files.split(";"))
    assert classes(arrange(grow(root))) == expected


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("*", ("birds", "fish")), ("*/*", ("cod", "eel", "jay", "owl")), ("birds/*", ("jay", "owl"))],
)
def test_a_pattern_names_the_classes(root: Path, pattern: str, names: tuple[str, ...]) -> None:
    fill(root, birds__owl=3, birds__jay=3, fish__cod=3, fish__eel=3)
    with pytest.raises(DataError, match="are the classes birds/, fish/ or"):
        load(root, image_size=8)
    assert load(root / pattern, image_size=8).class_names == names


def test_a_pattern_through_the_parts(root: Path) -> None:
    pairs = ("birds/owl", "birds/jay", "fish/cod", "fish/eel")
    mark(root, *(f"{part}/{pair}/1.png" for part in ("train", "test") for pair in pairs))
    with pytest.raises(DataError, match=r"'.*/pets/\*/\*/\*' for the second"):
        arrange(grow(root))
    found = match(grow(root), ("*", "*", "[co]*"))
    assert classes(found) == {"train": ["owl", "cod"], "test": ["owl", "cod"]}


def test_a_systems_folders_are_passed_over_wherever_they_are(root: Path) -> None:
    fill(root, owl=4, jay=4)
    fill(root, **{"@eaDir": 2, "owl__@EADIR__0.png": 2, "lost+found": 1, "jay__#recycle": 1})
    data = load(root, image_size=8)
    assert data.class_names == ("jay", "owl")
    assert len(data.y_train) + len(data.y_test) == 8


def test_files_that_are_no_pictures_are_told_in_one_line_and_damaged_ones_stop(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(root, owl=4, jay=4, empty=0)
    mark(root, "README.md", "labels.csv", "look.ipynb", "owl/a.xml", "owl/b.xml", "docs/LICENSE")
    draw(root / "poster.png", 7)
    (root / "owl" / "0.png").rename(root / "owl" / "no ending")  # a picture by its first bytes
    data = load(root, image_size=8)
    assert len(data.y_train) + len(data.y_test) == 8
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "pets/: passed over files that are no pictures: 2 .xml, 1 .md, 1 .csv, …",
        "pets/: folders without pictures: docs/",
        "pets/: pictures in no folder of a class are passed over: poster.png",
        "pets/: 8 pictures in 2 classes: jay 4, owl 4",
    ]
    load(root, image_size=8)  # nothing is decoded: what the training says soon is not said twice
    assert capsys.readouterr().err.splitlines() == said[:3]
    (root / "owl" / "1.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"1 problem, listed above; .*--skip-bad"):
        load(root, image_size=8)
    assert "    owl/1.png: not a picture, or damaged" in capsys.readouterr().err


def test_what_is_passed_over_is_said_before_anything_is_decoded(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object) -> None:
        raise AssertionError(capsys.readouterr().err)

    monkeypatch.setattr(folder_module, "decode", decode)
    mark(root, "owl/1.png", "labels.csv")
    with pytest.raises(DataError, match="1 classes"):
        load(root)
    mark(root, "jay/1.png")
    with pytest.raises(AssertionError, match=r"passed over files that are no pictures: 1 \.csv"):
        load(root)


def test_picture_formats_that_are_not_read_are_no_litter(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(root, owl=4, jay=4)
    mark(root, "owl/scan.dcm", "owl/drawing.svg")
    with pytest.raises(DataError, match="2 problems"):
        load(root, image_size=8)
    assert "owl/drawing.svg" in capsys.readouterr().err


def test_one_class_for_both_spellings_of_a_letter(root: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    fill(root, **{f"train__{composed}": 2, "train__bar": 2, f"test__{apart}": 2, "test__bar": 2})
    assert load(root, image_size=8).class_names == ("bar", composed)
    (root / "train" / composed).rename(root / "train" / apart)
    assert load(root, image_size=8).class_names == ("bar", apart)  # as it was for runs that know it


def test_a_class_that_differs_by_case_is_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(root, train__Owl=2, train__jay=2, test__owl=2, test__jay=2)
    with pytest.raises(DataError, match="2 problems"):
        load(root, image_size=8)
    said = capsys.readouterr().err
    assert "Owl: no usable picture in test; owl there is another class by its spelling" in said


def test_masks_beside_the_pictures_are_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(root, owl=3, jay=3)
    for path in list(root.rglob("*.png")):
        Image.new("L", (8, 8), path.stat().st_ino % 200).save(path.with_suffix(".bmp"))
    load(root, image_size=8, skip_bad=True)
    assert "6 pictures have a namesake (0.bmp and 0.png)" in capsys.readouterr().err


def test_links_that_multiply_end(root: Path) -> None:
    """Each of 20 folders holds two links to the next: a million ways to the last."""
    fill(root, owl=3, jay=3)
    for i in range(20):
        (root / f"owl/{i}").mkdir()
    for i in range(19):
        for name in "ab":
            (root / f"owl/{i}/{name}").symlink_to(root / f"owl/{i + 1}")
    tree = grow(root)
    assert sum(1 for _ in tree.every()) < 2000
    assert any("more than 16 times" in str(f.problem) for t in tree.every() for f in t.problems)


def test_files_are_named_through_the_cache_and_skipping(root: Path) -> None:
    fill(root, owl=9, jay=6)
    (root / "owl" / "3.png").write_bytes(b"")

    def named(data: ImageData) -> dict[str, bytes]:
        assert data.files_train is not None
        assert data.files_test is not None
        names = [*data.files_train, *data.files_test]
        return dict(zip(names, map(bytes, [*data.x_train, *data.x_test]), strict=True))

    first = named(load(root, image_size=8, skip_bad=True))
    assert len(first) == 14
    assert named(load(root, image_size=8, skip_bad=True)) == first
    for name, pixels in first.items():
        assert np.asarray(Image.open(root / name)).tobytes() == pixels
