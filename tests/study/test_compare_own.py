"""Studies on one's own pictures: what decides, on which pictures, and what an arm may be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import normlab
from normlab import UserError
from normlab.data.batches import hold_out, split_images
from normlab.reports.study_report import command as study_command
from normlab.study.arms import Arm, parse_arm
from normlab.study.design import MEASURES
from studies import make_design, make_outcome

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures of two classes, dark and light, 30 and 10."""
    root = tmp_path_factory.mktemp("own") / "shades"
    rng = np.random.default_rng(0)
    for name, count, low in (("dark", 30, 0), ("light", 10, 150)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(low, low + 100, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_held_out_images_are_a_share_of_each_class_and_the_test_images_are_gone(
    folder: Path,
) -> None:
    images = normlab.load(folder, image_size=32)
    held = hold_out(images, 0.25)
    counts = np.bincount(images.y_train)
    assert np.bincount(held.y_test).tolist() == np.round(counts / 4).astype(int).tolist()
    assert np.bincount(held.y_train).tolist() == (counts - np.bincount(held.y_test)).tolist()
    names = {"train": set(held.files_train or ()), "test": set(held.files_test or ())}
    assert names["train"] | names["test"] == set(images.files_train or ())
    assert not names["train"] & names["test"]
    assert not names["test"] & set(images.files_test or ())
    where = {name: i for i, name in enumerate(images.files_train or ())}
    for pixels, name in zip(held.x_test, held.files_test or (), strict=True):
        assert np.array_equal(pixels, images.x_train[where[name]])
    assert hold_out(images, 0.25).sha256 == held.sha256 != images.sha256


def test_arrays_sorted_by_class_are_validated_on_all_classes() -> None:
    labels = np.repeat(np.arange(4), 30)
    pixels = np.arange(120, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    data = {"x_train": pixels, "y_train": labels, "x_test": pixels[::9], "y_test": labels[::9]}
    images = normlab.load(data)
    train, validation = split_images(images, 0.1)
    assert np.bincount(validation.labels).tolist() == [3, 3, 3, 3]
    assert np.bincount(train.labels).tolist() == [27, 27, 27, 27]
    for part in (train, validation):
        assert np.array_equal(labels[part.images[:, 0, 0, 0]], part.labels)
    mixed = np.random.default_rng(0).permutation(120)
    shuffled = normlab.load({**data, "x_train": pixels[mixed], "y_train": labels[mixed]})
    _, last = split_images(shuffled, 0.1)
    assert np.array_equal(last.images, shuffled.x_train[108:])


def test_an_arm_may_have_its_own_size_and_start() -> None:
    assert parse_arm("a: image_size=64, from=builtin, epochs=3") == Arm(
        "a", {"epochs": 3}, image_size=64, start="builtin"
    )
    with pytest.raises(UserError, match="image_size=4: choose 8 to 512"):
        parse_arm("a: image_size=4")


@pytest.mark.parametrize("outcome", list(MEASURES))
def test_each_outcome_decides_by_its_own_value(outcome: str) -> None:
    design = make_design(outcome=outcome, held_out=0.2)
    run = make_outcome(design, "batch", 0, 0.75)
    run = type(run)(**{**vars(run), "balanced_accuracy": 0.6, "macro_f1": 0.5})
    expected = {"accuracy": 0.75, "balanced_accuracy": 0.6, "macro_f1": 0.5, "loss": 0.25}
    assert design.value(run) == expected[outcome]
    assert "held-out" in design.measure.name
    assert design.measure.lower_is_better is (outcome == "loss")
    assert design.as_dict()["outcomes"]["primary"].startswith(design.measure.name)


def test_a_study_decides_on_groups_that_it_did_not_train_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"anna{i // 4}_{i}.png")
    settings: dict[str, Any] = {"data": tmp_path / "pets", "seeds": 1, "threads": 1, "jobs": 1}
    settings |= {"checks": 1, "out": tmp_path / "s"}
    arms, pattern = ["a: epochs=1", "b: epochs=1, flip=false"], r"/(anna\d+)_"
    study = normlab.compare(arms=arms, group_by=pattern, **settings)
    images = normlab.load(tmp_path / "pets", group_by=pattern)
    held = hold_out(images, 0.2)
    of = [{name.split("/")[1].split("_")[0] for name in names or ()}
          for names in (held.files_train, held.files_test)]  # fmt: skip
    assert of[0]
    assert of[1]
    assert not of[0] & of[1]
    assert study.outcomes[0].task["data_sha256"] == held.sha256
    assert study.outcomes[0].task["group_by"] == pattern
    assert f"--group-by '{pattern}'" in study_command(study)
    with pytest.raises(UserError, match="group_by"):
        normlab.compare(arms=arms, **settings)


def test_held_out_pictures_do_not_judge_a_run_that_learnt_from_them(
    folder: Path, in_tmp: Path
) -> None:
    learnt: dict[str, Any] = {"epochs": 1, "least_steps": 0, "threads": 1}
    normlab.train(data=folder, out=in_tmp / "at 32", image_size=32, **learnt)
    normlab.train(data=folder, out=in_tmp / "at 16", image_size=16, **learnt)
    for name in ("at 32", "at 16"):
        with pytest.raises(
            UserError, match=r"arm 'start' starts from run .*learnt from the pictures"
        ):
            normlab.compare(
                arms=["plain: epochs=1", f"start: epochs=1, from={in_tmp / name}"],
                out=in_tmp / "s",
                data=folder,
                image_size=32,
                threads=1,
            )
    assert not (in_tmp / "s").exists()


def test_an_arm_may_fit_an_output_layer_to_what_it_starts_from(in_tmp: Path) -> None:
    settings: dict[str, Any] = {"data": "sample", "seeds": 1, "threads": 1, "jobs": 1, "checks": 1}
    arms = ["fitted: epochs=1, from=builtin, head=fitted", "plain: epochs=1"]
    study = normlab.compare("fast79", arms=arms, out=in_tmp / "s", **settings)
    start = study.outcomes[0].task["start"]
    assert start["head"] == "fitted"
    assert start["penalty"] > 0
    again = normlab.compare("fast79", arms=arms, out=in_tmp / "s", **settings)
    assert again.outcomes == study.outcomes


def test_an_outcome_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="outcome=luck: choose one of accuracy"):
        make_design(outcome="luck")


def test_a_study_of_own_pictures_leaves_the_test_images_alone(folder: Path, in_tmp: Path) -> None:
    settings: dict[str, Any] = {"data": folder, "seeds": 1, "threads": 1, "jobs": 1, "checks": 1}
    arms = ["plain: epochs=2", "small: epochs=2, image_size=16", "start: epochs=2, from=builtin"]
    study = normlab.compare(
        arms=arms, outcome="balanced_accuracy", out=in_tmp / "s", image_size=32, **settings
    )
    assert study.design.recipe.name == "pictures"
    images = normlab.load(folder, image_size=32)
    held = hold_out(images, 0.2)
    assert study.design.test_images == len(held.y_test)
    by_arm = {o.arm: o for o in study.outcomes}
    assert {name: o.task["image_size"] for name, o in by_arm.items()} == {
        "plain": 32, "small": 16, "start": 32
    }  # fmt: skip
    assert by_arm["start"].task["start"]["run"] == "builtin"
    assert by_arm["plain"].task["data_sha256"] == held.sha256
    right = by_arm["plain"].correct(len(held.y_test))
    shares = [right[held.y_test == k].mean() for k in (0, 1)]
    assert by_arm["plain"].balanced_accuracy == pytest.approx(np.mean(shares))
    assert study.comparisons[0].difference == pytest.approx(
        by_arm["plain"].balanced_accuracy - by_arm["small"].balanced_accuracy
    )
    assert "balanced held-out accuracy" in study.comparisons[0].sentence
    again = normlab.compare(
        arms=arms, outcome="balanced_accuracy", out=in_tmp / "s", image_size=32, **settings
    )
    assert again.comparisons == study.comparisons
    with pytest.raises(UserError, match="outcome"):
        normlab.compare(arms=arms, out=in_tmp / "s", image_size=32, **settings)
