"""The record that decides the weights: its parts, its settings, and files of earlier releases."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import normlab
from normlab.cli import cli
from normlab.layers import NORMS, normalizer
from normlab.models import MODELS
from normlab.recipes import RECIPES, SETTINGS, Recipe, changed_settings, get
from normlab.recipes.optimizers import OPTIMIZERS
from normlab.recipes.pictures import fitted, pictures
from normlab.recipes.record import AUGMENTS, PARTS
from normlab.recipes.settings import Setting, option_words, settings_of
from normlab.runs import Task
from normlab.training import optimisers

# As the release before wrote them: flat, with numbers that now are settings in the code.
FLAT: dict[str, dict[str, Any]] = {
    "fast84": {
        "name": "fast84",
        "model": "fast",
        "norm": "batch",
        "epochs": 4,
        "batch_size": 250,
        "optimizer": "muon",
        "learning_rate": 0.15,
        "sgd_rate": 0.37,
        "schedule": "to_zero",
        "label_smoothing": 0.1,
        "flip": True,
        "shift": 0,
        "half_size": 0.5,
        "ema": 0.0,
        "norm_position": None,
        "validation": 0.0,
        "patience": None,
    },
    "notebook": {
        "name": "notebook",
        "model": "notebook",
        "norm": "batch",
        "epochs": 25,
        "batch_size": 32,
        "optimizer": "adam",
        "learning_rate": 0.001,
        "sgd_rate": 0.37,
        "schedule": "constant",
        "label_smoothing": 0.0,
        "flip": False,
        "shift": 0,
        "half_size": 0.0,
        "ema": 0.0,
        "norm_position": None,
        "validation": 0.1,
        "patience": None,
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_as_it_was_written(name: str) -> None:
    recipe = RECIPES[name]()
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe
    assert get("notebook").with_settings(recipe.settings()).settings() == recipe.settings()


@pytest.mark.parametrize("kind", [Recipe, *(k for kinds in PARTS.values() for k in kinds.values())])
def test_every_number_of_a_recipe_is_a_setting(kind: Any) -> None:
    """What is none has no range, no option, and is lost on the way through a file."""
    values = {f.name for f in fields(kind) if f.init}
    assert values - {"name", *PARTS} == settings_of(kind).keys() - {"name"}


def values_of(s: Setting) -> st.SearchStrategy[Any]:
    """Some values in the range of a setting, all kinds of them."""
    some: dict[type, Any] = {
        bool: (False, True),
        int: range(21),
        float: [k / 97 for k in range(98)],
        str: s.names or ("resnet18",),
    }
    allowed = st.sampled_from([value for value in some[s.kind] if s.allowed(value)])
    return st.none() | allowed if s.optional else allowed


@given(st.data())
def test_any_recipe_is_read_as_it_was_written(data: st.DataObject) -> None:
    """With every kind of every part, and values that no recipe has."""
    parts: dict[str, Any] = {}
    for part, kinds in PARTS.items():
        kind = data.draw(st.sampled_from(list(kinds.values())))
        parts[part] = {key: data.draw(values_of(s)) for key, s in settings_of(kind).items()}
        if part == "model":
            parts[part] |= {} if parts[part]["name"] == "timm" else {"architecture": None}
        parts[part] = kind(**parts[part])
    own = {key: data.draw(values_of(s)) for key, s in settings_of(Recipe).items()}
    own |= {} if own["epochs"] or own["least_steps"] else {"head": "fitted"}
    own |= {} if own["validation"] else {"patience": None}
    recipe = Recipe(name="any", **parts, **own)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe
    assert get("notebook").with_settings(recipe.settings()).settings() == recipe.settings()


def test_a_way_to_zero_ends_nowhere_else() -> None:
    values = get("fast79").override(schedule="to_zero").as_dict()
    assert values["schedule"]["end"] == 0
    values["schedule"]["end"] = 0.3
    with pytest.raises(normlab.UserError, match=r"schedule_end=0\.3: to_zero has no such setting"):
        Recipe.from_dict(values)


@pytest.mark.parametrize("name", FLAT)
def test_flat_recipes_are_read_as_they_were_meant(name: str) -> None:
    """Tiles of 2 and float32 included, which were all there was."""
    now = get(name).override(winograd=2, products="float32")
    if now.optimizer.name == "muon":
        now = now.override(newton_schulz_products="float32")
    assert Recipe.from_dict(FLAT[name]) == now


def test_a_run_of_the_release_before_opens(tmp_path: Path) -> None:
    float32 = {"products": "float32", "newton_schulz_products": "float32"}
    options = {"epochs": 1, "winograd": 2, **float32, "threads": 1}
    run = normlab.train("fast84", data="sample", out=tmp_path / "r", **options)
    path = tmp_path / "r" / "recipe.json"
    values = json.loads(path.read_text())
    values["recipe"] = FLAT["fast84"] | {"epochs": 1}
    path.write_text(json.dumps(values))
    opened = normlab.open_run(tmp_path / "r")
    assert opened.task == run.task
    assert opened.evaluate().accuracy == run.evaluate().accuracy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lerning_rate": 1.0}, "unknown recipe setting 'lerning_rate': did you mean"),
        ({"model": "fsat"}, "unknown model 'fsat': did you mean 'fast'"),
        ({"optimizer": "adamw"}, "unknown optimizer 'adamw': did you mean 'adam'"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'"),
        ({"momentum": 0.5}, "momentum=0.5: adam has no such setting"),
        ({"learning_rate": float("inf")}, "learning_rate=inf: choose a finite rate above 0"),
        ({"norm_momentum": float("nan")}, "norm_momentum=nan"),
        ({"epochs": 2.5}, "epochs=2.5: give a whole number"),
        ({"flip": 1}, "flip=1: give true or false"),
        ({"patience": 3, "validation": 0.0}, "patience=3: it needs --validation above 0"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(normlab.UserError) as caught:
        get("notebook").override(**changes)
    assert message in str(caught.value)


def test_unknown_keys_of_a_file_fail() -> None:
    values = get("fast79").as_dict()
    values["optimizer"]["nesterov"] = True
    with pytest.raises(normlab.UserError, match=r"optimizer\.nesterov"):
        Recipe.from_dict(values)


def test_another_kind_of_part_keeps_what_both_have() -> None:
    adam = get("fast79").override(optimizer="adam")
    assert adam.optimizer.learning_rate == get("fast79").optimizer.learning_rate
    assert "sgd_rate" not in adam.settings()
    back = get("fast84").override(schedule="triangle")
    assert back.settings()["schedule_end"] == 0.07


def test_another_network_brings_what_hangs_together_with_it() -> None:
    fast = get("notebook").override(model="fast")
    assert (fast.model.logit_scale, fast.norm.momentum) == (1 / 3, 0.6)
    told = get("notebook").override(model="fast", norm_momentum=0.9)
    assert told.norm.momentum == 0.9
    assert get("fast79").override(model="notebook").norm.momentum == 0.99


def test_length_follows_small_data_but_not_whoever_says_epochs() -> None:
    recipe = get("notebook").override(epochs=2, least_steps=100)
    assert recipe.length(10) == (10, 10)
    assert recipe.length(1000) == (2, 1000)
    assert recipe.override(epochs=3).length(10) == (3, 10)


def test_an_epoch_of_tiny_data_is_many_passes() -> None:
    recipe = get("notebook").override(epochs=2, least_steps=1500)
    for batches in (1, 2, 3, 7, 49, 50, 51, 300, 400, 700, 749):
        epochs, steps = recipe.length(batches)
        assert epochs <= 30
        assert 1500 <= epochs * steps <= 1575
    assert recipe.length(4) == (30, 50)
    assert recipe.override(least_steps=43).length(1) == (22, 2)
    assert recipe.override(epochs=100).length(1) == (100, 1)


@pytest.mark.parametrize(
    ("names", "mirrored"),
    [
        (["cat", "dog"], True),
        (["0", "1", "2"], False),
        (["A", "B"], False),
        (["ñ", "other"], False),
        (["left hand", "open"], False),
        (["turn_right", "straight"], False),
        (["bright", "lefty"], True),
        (["class 1", "class 2"], True),
    ],
)
def test_what_a_mirror_turns_into_something_else_is_not_mirrored(
    names: list[str], mirrored: bool
) -> None:
    recipe = pictures()
    follows = fitted(names, 32, {}, from_run=False)
    assert recipe.with_settings(follows).augmentation.flip is mirrored
    assert recipe.with_settings({**follows, "flip": True}).augmentation.flip
    chosen = {**fitted(names, 32, {"augment": "photos"}, from_run=False), "augment": "photos"}
    assert recipe.with_settings(chosen).augmentation.flip


@pytest.mark.parametrize("size", [8, 32, 33, 64, 65, 96, 128, 512])
def test_the_network_fits_the_size_of_pictures(size: int) -> None:
    name = fitted(["cat", "dog"], size, {}, from_run=False)["model"]
    recipe = pictures().with_settings({"model": name})
    assert (recipe.norm.momentum, recipe.model.logit_scale) == (0.6, 1 / 3)
    if size >= 32:
        model = MODELS[name](num_classes=2, image_size=size)
        for side in (size, size // 2):  # the first steps are at half the size
            assert model(torch.zeros(2, 3, side, side)).shape == (2, 2)
    assert "model" not in fitted(["cat", "dog"], size, {}, from_run=True)


@pytest.mark.parametrize("name", list(AUGMENTS))
def test_an_augmentation_by_name_stands_for_its_settings(name: str) -> None:
    recipe = get("notebook").override(augment=name)
    assert {k: v for k, v in recipe.settings().items() if k in AUGMENTS[name]} == AUGMENTS[name]
    assert "augment" not in recipe.settings()
    assert get("notebook").override(augment=name, crop=0.9).augmentation.crop == 0.9
    assert recipe.augmentation.told()


def test_without_validation_there_is_no_patience() -> None:
    assert pictures().override(validation=0.0).patience is None


def test_every_family_has_its_code() -> None:
    for name in NORMS:
        normalizer(name, 4)
    for name in MODELS:
        assert callable(MODELS[name])
    assert set(optimisers.OPTIMIZERS) == set(OPTIMIZERS.values())


@pytest.mark.parametrize("command", ["train", "compare"])
def test_every_setting_is_an_option(command: str) -> None:
    recipe = get("fast79").override(flip=False, shift=3, validation=0.2, norm_position="after")
    words = option_words(get("fast79").settings() | changed_settings(recipe))
    assert "--no-flip" in words
    shown = CliRunner().invoke(cli, [command, "fast79", *words, "--help"])
    assert shown.exit_code == 0, shown.output
    text = shown.output
    assert all(f"--{name.replace('_', '-')}" in text for name in SETTINGS)
    assert "batch, none, layer" in " ".join(text.split())


@pytest.mark.parametrize(
    "edit",
    [
        {"seed": "0"},
        {"seed": -1},
        {"seed": 2**70},
        {"image_size": 32.5},
        {"class_names": []},
        {"class_names": [1, 2]},
        {"\ud800": 1, "seed": None},
        {"recipe": []},
        {"start": {"run": 3}},
    ],
)
def test_an_edited_file_is_named_with_what_is_wrong(edit: dict[str, Any], tmp_path: Path) -> None:
    images = normlab.load("sample")
    values = Task(
        recipe=get("notebook"), seed=0, data="sample", data_sha256=images.sha256,
        class_names=images.class_names, image_size=32,
    ).as_dict()  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(values | edit))
    with pytest.raises(normlab.DataError, match=r"recipe\.json is not a run's recipe"):
        normlab.open_run(tmp_path)


def test_a_folder_in_place_of_a_recipe_is_data(tmp_path: Path) -> None:
    with pytest.raises(
        normlab.UserError, match=f"'{tmp_path}' is a folder, no recipe: .* --data {tmp_path}$"
    ):
        get(str(tmp_path))
    with pytest.raises(normlab.UserError, match="unknown recipe 'fast97': did you mean"):
        get("fast97")
