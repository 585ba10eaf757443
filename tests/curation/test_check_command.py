"""`normlab data check` on folders: what it lists, what it writes, and what it leaves alone."""

import csv
import hashlib
import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

import normlab
from normlab.api.check import check_data
from normlab.cli import cli
from normlab.curation.check import Check, group
from normlab.curation.copies import Copies
from normlab.curation.first_look import first_look
from normlab.curation.pictures import from_images, read_pictures
from normlab.data import load
from normlab.data.changes import read_changes
from normlab.data.images import from_mapping
from normlab.errors import UserError
from normlab.models.timm_net import load_timm
from normlab.reports import check_page
from normlab.reports.check_page import summary_lines
from normlab.reports.run_report import warnings_of


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A folder of two classes with planted oddities, the check of it, and what was printed."""
    root = tmp_path_factory.mktemp("check")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("NORMLAB_CACHE", str(root / "cache"))
    sample, pets = load("sample"), root / "pets"
    for name in ("cat", "frog"):
        own = sample.x_train[sample.y_train == sample.class_names.index(name)]
        for i, picture in enumerate(own):
            place = pets / ("test" if i < 8 else "train") / name / f"{i:02}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place)
    picture = Image.open(pets / "test/cat/03.png")
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(pets / "train/frog/mirror, of 3.png")
    (pets / "train/cat/same.png").write_bytes((pets / "test/cat/04.png").read_bytes())
    Image.new("RGB", (32, 32), "white").save(pets / "train/cat/blank.png")
    Image.fromarray(np.asarray(picture)[:9, :9]).save(pets / "train/cat/tiny.png")
    other = np.tile(sample.x_test[sample.y_test == sample.class_names.index("ship")][0], (1, 9, 1))
    Image.fromarray(other).save(pets / "train/cat/long.png")
    (pets / "train/cat/damaged.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    (pets / "train/notes <b>.txt").write_text("no picture")
    before = tree(pets)
    words = ["data", "check", str(pets), "--out", str(root / "out"), "--threads", "1"]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    monkeypatch.undo()
    assert done.exit_code == 0, done.output
    assert tree(pets) == before  # nothing is changed
    return pets, root / "out", done.output


def tree(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def record(checked: tuple[Path, Path, str]) -> dict[str, Any]:
    return json.loads((checked[1] / "check.json").read_text())


def test_copies_across_parts_and_labels_come_first(record: dict[str, Any]) -> None:
    groups = {tuple(sorted(group["pictures"])): group for group in record["copies"]["groups"]}
    exact = groups[("test/cat/04.png", "train/cat/same.png")]
    assert exact["exact"]
    assert exact["across_parts"]
    mirrored = groups[("test/cat/03.png", "train/frog/mirror, of 3.png")]
    assert mirrored["labels_differ"]
    assert not mirrored["exact"]
    leaked = record["copies"]["test_pictures_with_a_copy_in_another_part"]
    assert {"test/cat/03.png", "test/cat/04.png"} <= set(leaked)


def test_odd_pictures_and_files_that_are_none(record: dict[str, Any]) -> None:
    kinds = {(odd["picture"], odd["kind"]) for odd in record["odd"]}
    assert ("train/cat/blank.png", "blank") in kinds
    assert ("train/cat/tiny.png", "tiny") in kinds
    assert ("train/cat/long.png", "odd shape") in kinds
    assert len([kind for _, kind in kinds if kind != "unlike all others"]) == 3
    passed = {entry["file"]: entry["why"] for entry in record["passed_over"]}
    assert passed["train/notes <b>.txt"] == "no picture"
    assert "damaged" in passed["train/cat/damaged.png"]


def test_the_lists_name_files_and_can_be_decided_in(
    checked: tuple[Path, Path, str], tmp_path: Path
) -> None:
    pets, out, _ = checked
    with (out / "findings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    named = {row["file"] for row in rows}
    assert "train/frog/mirror, of 3.png" in named
    assert all((pets / name).is_file() for name in named)
    for row in rows:
        row["decision"] = "exclude" if row["file"] == "train/frog/mirror, of 3.png" else ""
    with (tmp_path / "decided.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    changes = read_changes(tmp_path / "decided.csv", None)
    assert changes is not None
    assert changes.exclude == ("train/frog/mirror, of 3.png",)


def test_what_is_printed_is_short_and_leads_to_the_page(checked: tuple[Path, Path, str]) -> None:
    _, out, printed = checked
    lines = [line for line in printed.splitlines() if not line.endswith("…")]
    assert any("2 of 16 test pictures have a copy in another part" in line for line in lines)
    assert lines[-1].endswith(str(out / "index.html"))
    assert len(lines) < 16


def test_the_page_asks_nobody_and_shows_names_as_text(checked: tuple[Path, Path, str]) -> None:
    page = (checked[1] / "index.html").read_text()
    assert "score inf" not in page + (checked[1] / "findings.csv").read_text()
    assert not re.search(r"""(?:src|href)=["']?(?!data:)|https?://|@import""", page)
    assert "<b>" not in page
    assert "notes &lt;b&gt;.txt" in page


def test_one_button_leaves_out_what_has_a_copy_among_the_test_pictures() -> None:
    """Not one that stands in training and validation alone: both would be gone."""
    sample = load("sample")
    arrays = {"x_train": sample.x_train, "y_train": sample.y_train}
    arrays |= {"x_test": sample.x_test[:60], "y_test": sample.y_test[:60]}
    arrays |= {"x_val": sample.x_test[60:120], "y_val": sample.y_test[60:120]}
    arrays = {name: value.copy() for name, value in arrays.items()}
    arrays["x_val"][0], arrays["y_val"][0] = sample.x_train[1], sample.y_train[1]
    arrays["x_test"][2], arrays["y_test"][2] = sample.x_train[3], sample.y_train[3]
    arrays["x_test"][4], arrays["y_test"][4] = arrays["x_val"][5], arrays["y_val"][5]
    pictures = from_images(from_mapping(arrays, name="mine"))
    copies = Copies(
        pairs=np.array([[1, 460], [3, 402], [404, 465]]),
        scores=np.full(3, np.inf),
        compared=3,
        found={},
    )
    found = Check(pictures, copies, group(pictures, copies), None, [], [], "", {})
    text = check_page.page(found, "mine.npz").decode()
    content = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    ((action,),) = [section["actions"] for section in content["sections"]]
    names = {content["pictures"][i]["name"] for i in action["pictures"]}
    assert names == {"train/3", "val/5"}


def test_groups_stay_together_in_a_check_as_in_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))
    rng, pattern = np.random.default_rng(0), r"/(anna\d+)_"
    for name in ("cat", "frog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"anna{i // 4}_{i}.png")
    copy = tmp_path / "pets/cat/anna9_0.png"  # of another group, so its copies join two
    copy.write_bytes((tmp_path / "pets/cat/anna0_0.png").read_bytes())
    pictures = read_pictures(tmp_path / "pets", group_by=pattern)
    data = load(tmp_path / "pets", group_by=pattern)
    parts = dict(zip(pictures.names, pictures.parts, strict=True))
    for part in ("train", "test"):
        assert {parts[name] for name in getattr(data, f"files_{part}")} == {part}
    same = np.arange(len(pictures))
    first, second = (pictures.names.index(f"cat/anna{i}_0.png") for i in (0, 9))
    same[second] = first
    number = dict(zip(pictures.names, pictures.joined(same).tolist(), strict=True))
    assert number["cat/anna9_0.png"] == number["frog/anna0_3.png"] != number["frog/anna1_4.png"]
    found, folder = check_data(tmp_path / "pets", group_by=pattern, out=tmp_path / "o", threads=1)
    assert any(line.startswith("6 groups by --group-by") for line in summary_lines(found))
    assert f"--group-by &#39;{pattern}&#39;" in (folder / "index.html").read_text()


def test_a_folder_of_something_else_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    words = ["data", "check", "sample", "--out", str(tmp_path / "mine")]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code != 0
    assert "choose another --out" in str(done.exception) + done.output
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_keys_decide_and_the_csv_has_it(
    checked: tuple[Path, Path, str], browser: Any, tmp_path: Path
) -> None:
    _, out, _ = checked
    context = browser.new_context(accept_downloads=True, offline=True)
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((out / "index.html").as_uri())
    tiles = page.locator(".tile")
    names = tiles.locator(".name").all_inner_texts()
    labels = [text.split(" · ")[0] for text in tiles.locator(".label").all_inner_texts()]
    page.keyboard.press("ArrowDown")  # from the page to its first picture
    for key in ("x", "k", "1", "2", "x", "ArrowLeft", "u"):
        page.keyboard.press(key)
    assert tiles.nth(0).get_attribute("data-decision") == "exclude"
    with page.expect_download() as download:
        page.keyboard.press("s")
    download.value.save_as(tmp_path / "decided.csv")
    assert not errors
    with (tmp_path / "decided.csv").open(newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    expected: dict[str, tuple[str, str]] = {}
    for index, key in enumerate(("x", "k", "1", "2")):
        label = {"1": "cat", "2": "frog"}.get(key, "")
        word = {"x": "exclude", "k": "keep"}.get(key, "relabel")
        if word == "relabel" and label == labels[index]:
            word, label = "keep", ""
        expected[names[index]] = word, label
    expected.pop(names[4], None)  # left out, and that undone
    assert {name: (row["decision"], row["label"]) for name, row in rows.items()} == expected
    left_out = page.locator(".tile[data-decision=exclude]")
    for _ in range(10):  # Chromium may show a page what was stored some milliseconds before
        page.reload()
        if left_out.count():
            break
        page.wait_for_timeout(200)
    assert left_out.count() >= 1  # marks stay
    context.close()


def test_it_fits_a_phone(checked: tuple[Path, Path, str], browser: Any) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark")
    page = context.new_page()
    page.goto((checked[1] / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator(".tile button").first.click()
    assert page.locator(".tile").first.get_attribute("data-decision") == "exclude"
    page.locator(".tile button").first.click()
    assert page.locator("#count").inner_text() == "Nothing is decided yet."
    select = page.locator(".tile select").first
    select.select_option("frog")
    assert page.locator("#save").is_enabled()
    context.close()


def test_a_training_looks_first_and_is_loud_only_when_there_is_something(tmp_path: Path) -> None:
    sample = load("sample")
    clean = from_mapping(
        {"x_train": sample.x_train, "y_train": sample.y_train}
        | {"x_test": sample.x_test[:100], "y_test": sample.y_test[:100]},
        name="pets",
    )
    assert first_look(clean).lines == []
    x_test = clean.x_test.copy()
    x_test[7] = clean.x_train[50][:, ::-1]
    x_test[8] = clean.x_train[51] // 2 + 60
    few = clean.y_train != 3
    few[np.flatnonzero(~few)[:9]] = True
    leaked = replace(clean, x_test=x_test, x_train=clean.x_train[few], y_train=clean.y_train[few])
    lines = first_look(leaked).lines
    assert lines[0] == "3: 9 to train on; give at least 20"
    assert "2 of 100 test pictures have a near copy" in lines[-1]
    assert "test/7 is much like train/" in lines[-1]
    assert "test/8 is much like train/" in lines[-1]
    long = "a folder with a long name/and another one"
    files = {
        f"files_{part}": tuple(f"{part}/{long}/{i}.png" for i in range(count))
        for part, count in (("train", len(leaked.x_train)), ("test", len(x_test)))
    }
    named = first_look(replace(leaked, **files)).leak
    assert named is not None
    assert f"test/{long}/7.png is much like train/{long}/" in named
    assert "…" not in named


def test_train_tells_what_it_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = load("sample")
    x_test = sample.x_test.copy()
    x_test[0] = sample.x_train[5]
    arrays = {"x_train": sample.x_train, "y_train": sample.y_train}
    arrays |= {"x_test": x_test, "y_test": sample.y_test}
    np.savez(tmp_path / "mine.npz", **arrays)
    options = {"epochs": 1, "batch_size": 100, "out": tmp_path / "run", "threads": 1}
    run = normlab.train("fast79", data=tmp_path / "mine.npz", **options)
    said = capsys.readouterr().err
    assert "mine.npz: 1 of 200 test pictures has a near copy among 400 training pictures" in said
    assert "test/0 is much like train/5" in said
    assert run.leak is not None
    assert run.leak in said
    assert any(run.leak in line for line in warnings_of(run.finished()))  # beside the score
    shown = html.unescape((run.path / "report.html").read_text())
    assert "test/0 is much like train/5" in shown


def test_labels_are_judged_by_a_pretrained_network(
    checked: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its features; here those of an untrained one, which tell colours apart."""
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = load_timm().create_model("test_resnet", num_classes=1000)
    save_file(network.state_dict(), tmp_path / "mine.safetensors")
    start = f"test_resnet={tmp_path / 'mine.safetensors'}"
    found, _ = check_data(checked[0], out=tmp_path / "out", start=start, image_size=64, threads=1)
    assert found.by == "5 logistic regressions on the features of test_resnet"
    assert found.suspects is not None
    assert found.suspects.accuracy > 0.5
    with pytest.raises(UserError, match="no network of timm"):
        check_data(checked[0], out=tmp_path / "other", start="resnet-of-nobody")
    assert not (tmp_path / "other").exists()
