"""Decisions about pictures, applied; groups that stay on one side of every split."""

import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import normlab
from normlab.cli import cli
from normlab.data import ImageData, load
from normlab.data.batches import split_images
from normlab.data.changes import Changes, picture_names, read_changes
from normlab.errors import DataError
from normlab.reports.run_report import repeat_command


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """cat/0.png to cat/19.png and dog/0.png to dog/19.png, no two alike."""
    for k, name in enumerate(("cat", "dog")):
        for i in range(20):
            draw(tmp_path / "pets" / name / f"{i}.png", 100 * k + i)
    return tmp_path / "pets"


def decisions(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file", "decision", "label"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def by_name(images: ImageData) -> dict[str, tuple[str, str]]:
    """Part and class of each picture."""
    return {
        name: (part, images.class_names[getattr(images, f"y_{part}")[i]])
        for part, names in picture_names(images).items()
        for i, name in enumerate(names)
    }


def test_what_is_decided_changes_and_nothing_else_does(pets: Path, tmp_path: Path) -> None:
    before = by_name(load(pets))
    file = decisions(
        tmp_path / "decided.csv",
        {"file": "cat/3.png", "decision": "exclude"},
        {"file": "dog/4.png", "decision": "relabel", "label": "cat"},
        {"file": "dog/5.png", "decision": "keep"},
    )
    after = by_name(load(pets, changes=read_changes(file, file)))
    expected = dict(before)
    del expected["cat/3.png"]
    expected["dog/4.png"] = (before["dog/4.png"][0], "cat")
    assert after == expected
    assert len(list(pets.rglob("*.png"))) == 40  # originals untouched


def test_pixels_follow_their_names(pets: Path) -> None:
    data = load(pets, changes=Changes(exclude=("cat/3.png",), relabel={"dog/4.png": "cat"}))
    assert data.files_train is not None
    for i, name in enumerate(data.files_train):
        expected = np.asarray(Image.open(pets / name))
        assert np.array_equal(data.x_train[i], expected)


def test_a_contradiction_is_settled_by_a_decision(pets: Path) -> None:
    """Both copies are left out without a decision; with one, what is kept is trained on."""
    (pets / "dog" / "copy.png").write_bytes((pets / "cat" / "7.png").read_bytes())
    undecided = by_name(load(pets))
    assert "cat/7.png" not in undecided
    assert "dog/copy.png" not in undecided
    decided = by_name(load(pets, changes=Changes(exclude=("dog/copy.png",))))
    assert decided == {**undecided, "cat/7.png": ("train", "cat")}
    both = by_name(load(pets, changes=Changes(relabel={"dog/copy.png": "cat"})))
    assert both == {
        **undecided,
        "cat/7.png": ("train", "cat"),
        "dog/copy.png": ("train", "cat"),
    }


def test_arrays_are_named_by_part_and_place() -> None:
    before = load("sample")
    labels = before.class_names
    wrong = labels[(int(before.y_train[7]) + 1) % 10]
    after = load("sample", changes=Changes(exclude=("test/45",), relabel={"train/7": wrong}))
    assert labels[after.y_train[7]] == wrong
    assert np.array_equal(np.delete(before.x_test, 45, 0), after.x_test)
    assert np.array_equal(np.delete(before.y_test, 45), after.y_test)
    assert np.array_equal(np.delete(before.y_train, 7), np.delete(after.y_train, 7))
    assert after.files_test is not None
    assert after.files_test[44:46] == ("test/44", "test/46")


@pytest.mark.parametrize("where", ["folder", "sample"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            Changes(exclude=("cat/99.png", "cat/98.png")),
            "pictures cat/99.png, cat/98.png.*: mend or remove 2 rows",
        ),
        (Changes(relabel={"nowhere": "cat"}), "no picture nowhere"),
        (Changes(relabel={"cat/1.png": "hen", "train/1": "hen"}), "hen|train/1|cat/1.png"),
    ],
)
def test_what_matches_nothing_is_refused_by_name(
    pets: Path, where: str, changes: Changes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(pets if where == "folder" else "sample", changes=changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column file"),
        ("file," + 140_000 * "a", "field larger than field limit"),
        ("name,label\na,b\n", "no column file"),
        ("file\na.png\n", "no column label"),
        ("file,decision,label\na.png,drop,\n", "line 2: the decision 'drop'"),
        ("file,decision,label\na.png,keep,\n", "no row that says"),
        ("file,label\na.png,\n", "line 2: a.png is given no label"),
        ("file,label\na.png,cat\na.png,dog\n", "a.png is given cat and dog"),
    ],
)
def test_files_that_decide_nothing_clear(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_changes(None, tmp_path / "d.csv")


def test_a_plain_list_is_enough(tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text('\ufefffile\r\na.png\r\n"b, c.png"\r\n')
    changes = read_changes(tmp_path / "out.csv", None)
    assert changes is not None
    assert changes.exclude == ("a.png", "b, c.png")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(b"file\n\xff\xfe\n")
    for path in (tmp_path, tmp_path / "none.csv", tmp_path / "binary.csv"):
        with pytest.raises(DataError, match=path.name):
            read_changes(path, None)


def test_a_picture_cannot_be_excluded_and_relabelled(tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("file\na.png\n")
    (tmp_path / "new.csv").write_text("file,label\na.png,cat\n")
    with pytest.raises(DataError, match=r"a\.png: to be left out by --exclude and"):
        read_changes(tmp_path / "out.csv", tmp_path / "new.csv")


def test_a_run_keeps_its_decisions(pets: Path, tmp_path: Path) -> None:
    """It evaluates on what it was scored on, when the CSV is gone and the folder has moved."""
    file = decisions(
        tmp_path / "decided.csv",
        {"file": "cat/3.png", "decision": "exclude"},
        {"file": "dog/4.png", "decision": "relabel", "label": "cat"},
    )
    words = ["train", "fast79", "--data", str(pets), "--exclude", str(file), "--relabel", str(file)]
    words += ["--epochs", "1", "--batch-size", "20", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "run" / "recipe.json").read_text())["changes"]
    assert kept["exclude"] == ["cat/3.png"]
    assert kept["relabel"] == {"dog/4.png": "cat"}
    assert set(kept["sha256"]) == {"exclude", "relabel"}
    assert "1 picture left out, 1 label replaced" in (tmp_path / "run/report.html").read_text()
    file.unlink()
    pets.rename(tmp_path / "moved")
    run = normlab.open_run(tmp_path / "run")
    images = run.task.load(tmp_path / "moved")
    assert images.sha256 == run.task.data_sha256
    other = run.task.load("sample")  # other data have no such pictures, and stay as they are
    assert other.sha256 == load("sample").sha256


def test_a_printed_command_trains_on_the_data_of_the_run(pets: Path, tmp_path: Path) -> None:
    """Decisions, groups and the size of the pictures are in it, and the CSV file may be gone."""
    file = decisions(
        tmp_path / "decided.csv",
        {"file": "cat/3.png", "decision": "exclude"},
        {"file": "dog/4.png", "decision": "relabel", "label": "cat"},
    )
    words = ["train", "fast79", "--data", f"{pets}/*", "--exclude", str(file), "--relabel"]
    words += [str(file), "--group-by", r"/\d", "--image-size", "40", "--epochs", "1"]
    words += ["--batch-size", "20", "--threads", "1", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    file.unlink()
    run = normlab.open_run(tmp_path / "run")
    command = shlex.split(repeat_command(run))
    assert command[0] == "normlab"
    again = CliRunner().invoke(cli, [*command[1:], "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    task = normlab.open_run(tmp_path / "again").task
    assert (task.data_sha256, task.image_size) == (run.task.data_sha256, 40)
    assert (tmp_path / "again" / "last.safetensors").read_bytes() == (
        tmp_path / "run" / "last.safetensors"
    ).read_bytes()


def test_groups_stay_together_in_every_split(tmp_path: Path) -> None:
    number = 0
    for person in range(30):
        for name in ("cat", "dog") if person % 3 else ("cat",):
            for shot in range(2 + person % 4):
                draw(tmp_path / "pets" / name / f"anna{person}_{shot}.png", number)
                number += 1
    data = load(tmp_path / "pets", group_by=r"/([a-z]+\d+)_")
    assert data.files_train is not None
    assert data.files_test is not None
    train, validation = split_images(data, 0.2)
    assert train.files is not None
    assert validation.files is not None
    parts = [train.files, validation.files, data.files_test]
    people = [{name.split("/")[1].split("_")[0] for name in files} for files in parts]
    assert sum(map(len, people)) == len(set.union(*people)) == 30
    assert sum(map(len, parts)) == number
    assert 0.1 < len(data.files_test) / number < 0.3
    assert 0.1 < len(validation.files) / (len(train) + len(validation)) < 0.3
    for labels in (train.labels, validation.labels, data.y_test):
        assert set(labels.tolist()) == {0, 1}
    for name, label in zip(data.files_train, data.y_train, strict=True):
        assert name.startswith(data.class_names[label])


def test_groups_in_both_given_parts_are_left_out_of_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k, name in enumerate(("cat", "dog")):
        for i in range(6):
            draw(tmp_path / "pets/train" / name / f"shot{i}_a.png", 100 * k + i)
        for i in (1, 8):
            draw(tmp_path / "pets/test" / name / f"shot{i}_b.png", 100 * k + 50 + i)
    data = load(tmp_path / "pets", group_by=r"(\w+)/(shot\d+)")
    assert data.files_train is not None
    assert not [name for name in data.files_train if "shot1_" in name]
    assert len(data.files_train) == 10
    said = capsys.readouterr().err
    assert "train/cat/shot1_a.png with test/cat/shot1_b.png" in said
    assert "16 pictures in 14 groups" in said


@pytest.mark.parametrize(("pattern", "message"), [("(", "no regular"), ("x{3}", "in none of")])
def test_patterns_that_find_nothing(pets: Path, pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(pets, group_by=pattern)
    with pytest.raises(DataError, match="names of files"):
        load("sample", group_by=pattern)
