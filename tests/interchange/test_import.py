"""Models saved by Keras 3 and Keras 2 become runs with the same answers; others are refused."""

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import torch
from keras import layers
from PIL import Image

import normlab
from normlab import DataError, UserError
from normlab.__main__ import run as command
from normlab.data import load
from normlab.evaluation.forward import logits_of
from normlab.formats.keras_notebook import read_notebook
from normlab.interchange import export_run
from normlab.interchange.importing import import_model
from normlab.models import NotebookNet

# Keras 3.15's own conversions on this backend, with NumPy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def keras_notebook(norm: str = "batch", activation: str = "relu") -> Any:
    """The notebook's third cell, with statistics and γ, β as after some training."""
    names = iter(["batch_normalization", *(f"batch_normalization_{i}" for i in range(1, 5))])

    def normalized(h: Any) -> Any:
        return layers.BatchNormalization(name=next(names))(h) if norm == "batch" else h

    x = layers.Input(shape=(32, 32, 3), name="input")
    h = layers.Conv2D(32, kernel_size=(3, 3), activation=activation, name="conv1")(normalized(x))
    h = normalized(layers.Dropout(0.2)(h))
    h = layers.Conv2D(32, (3, 3), activation="relu", padding="same", name="conv2")(h)
    h = normalized(layers.MaxPooling2D(pool_size=(2, 2), name="pool1")(h))
    h = layers.Conv2D(64, (3, 3), activation="relu", padding="same", name="conv3")(h)
    h = layers.MaxPooling2D(pool_size=(2, 2), name="pool2")(h)
    h = normalized(layers.Dropout(0.2)(layers.Flatten()(h)))
    h = layers.Dense(512, activation="relu", name="hidden")(h)
    h = normalized(layers.Dropout(0.2)(h))
    y = layers.Dense(10, activation="softmax", name="output")(h)
    model = keras.Model(x, y)
    rng = np.random.default_rng(5)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            low = (-1.0, -0.5, -0.5, 0.2)
            layer.set_weights(
                [rng.uniform(a, 1.5, w.shape) for a, w in zip(low, layer.weights, strict=True)]
            )
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """Files of Keras 3, and what Keras answers for them."""
    folder = tmp_path_factory.mktemp("keras")
    x = load("sample").x_test.astype("float32") / 255
    files = {}
    for norm, ending in (("batch", "keras"), ("none", "keras"), ("batch", "h5")):
        model = keras_notebook(norm)
        path = folder / f"{norm}.{ending}"
        keras.saving.save_model(model, path)
        files[path.name] = (path, model.predict(x, verbose=0))
    return files


def to_keras_2(layer: Any) -> None:
    """Describe a layer as Keras 2 does."""
    config = layer["config"]
    config["dtype"] = "float32"
    if "batch_shape" in config:
        config["batch_input_shape"] = config.pop("batch_shape")
    for key in [k for k in config if k.startswith("renorm") or k == "optional"]:
        del config[key]
    if layer["class_name"] == "BatchNormalization":
        config["axis"] = [1 if config["name"].endswith(("_3", "_4")) else 3]
    layer["inbound_nodes"] = [
        [[arg["config"]["keras_history"][0], 0, 0, {}] for arg in node["args"]]
        for node in layer["inbound_nodes"]
    ]


def as_keras_2(source: Path, target: Path) -> None:
    """Rewrite an .h5 of Keras 3 as Keras 2.4 (TensorFlow 2.4, the notebook's year) lays it out.

    There the model is a "Functional" whose input has `batch_input_shape`, nodes are nested lists,
    weights are called `conv1/kernel:0`, and texts are bytes.
    """
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        model = json.loads(old.attrs["model_config"])
        for layer in model["config"]["layers"]:
            to_keras_2(layer)
        model["config"]["input_layers"] = [["input", 0, 0]]
        model["config"]["output_layers"] = [["output", 0, 0]]
        new.attrs["model_config"] = json.dumps(model).encode()
        new.attrs["keras_version"] = b"2.4.0"
        new.attrs["backend"] = b"tensorflow"
        for name, group in old["model_weights"].items():
            names = [f"{n}:0" for n in group.attrs["weight_names"]]
            copy = new.create_group(f"model_weights/{name}")
            copy.attrs["weight_names"] = np.array([n.encode() for n in names], dtype="S")
            for n in names:
                copy[n] = group[n.removesuffix(":0")][()]


def as_keras_2_keras(source: Path, target: Path, version: str) -> None:
    """Rewrite a .keras of Keras 3 as Keras 2.13, 2.14 and 2.15 were seen to write it.

    The zip is the same, and so, in 2.15, are the places of the weights; before, they had another
    folder, and in 2.13 every layer with weights was counted twice. The description has
    `batch_input_shape`, nested lists for nodes, and another module for the model; beside the
    weights lie those of the optimiser and the metrics.
    """
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        model = json.loads(old.read("config.json"))
        for layer in model["config"]["layers"]:
            to_keras_2(layer)
        model["config"]["input_layers"] = [["input", 0, 0]]
        model["config"]["output_layers"] = [["output", 0, 0]]
        model |= {"module": "keras.src.engine.functional", "registered_name": "Functional"}
        weights = io.BytesIO(old.read("model.weights.h5"))
        with h5py.File(weights, "a") as f:
            f["optimizer/vars/0"] = np.int64(24)
            f["metrics/mean/vars/0"] = np.float32(1)
            if version != "2.15":
                f.move("layers", "_layer_checkpoint_dependencies")
            if version == "2.13":
                folder = f["_layer_checkpoint_dependencies"]
                for name in sorted(folder, reverse=True):
                    kind, _, number = name.rpartition("_")
                    if number.isdigit():
                        folder.move(name, f"{kind}_{2 * int(number)}")
        new.writestr("metadata.json", json.dumps({"keras_version": f"{version}.0"}))
        new.writestr("config.json", json.dumps(model))
        new.writestr("model.weights.h5", weights.getvalue())


@pytest.mark.parametrize(
    "name",
    [
        *("batch.keras", "none.keras", "batch.h5", "keras2.h5", "keras2.12.keras"),
        *("keras2.13.keras", "keras2.14.keras", "keras2.15.keras"),
    ],
)
def test_an_imported_model_answers_as_in_keras(
    saved: dict[str, tuple[Path, np.ndarray]], name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if name in ("keras2.h5", "keras2.12.keras"):  # Keras 2.12 wrote HDF5 under either name
        source, expected = saved["batch.h5"]
        as_keras_2(source, path)
    elif name.startswith("keras2"):
        source, expected = saved["batch.keras"]
        as_keras_2_keras(source, path, name[5:].removesuffix(".keras"))
    else:
        path, expected = saved[name]
    run = import_model(path, tmp_path / "run", data="sample")
    np.testing.assert_allclose(normlab.evaluate(run).probabilities, expected, rtol=0, atol=1e-5)
    assert run.result is not None
    assert run.result["imported_from"]["file"] == name
    assert run.task.recipe.norm.name == ("none" if name == "none.keras" else "batch")


def test_a_file_that_keras_2_15_wrote_itself() -> None:
    """The notebook's network for 8 × 8 pixels after 390 steps there, and what it answered."""
    folder = Path(__file__).with_name("keras_2_15")
    found = read_notebook(folder / "notebook.keras", 8, 10)
    assert found.norm == "batch"
    model = NotebookNet(image_size=8)
    state = {name: torch.from_numpy(values) for name, values in found.state.items()}
    model.load_state_dict(state, strict=False)
    with np.load(folder / "answers.npz") as file:
        answers = logits_of(model, file["images"]).double().softmax(1).numpy()
        np.testing.assert_allclose(answers, file["probabilities"], rtol=0, atol=1e-5)


def test_own_pictures_have_the_size_and_omissions_that_are_asked_for(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(Path(__file__).with_name("keras_2_15") / "notebook.keras")
    rng = np.random.default_rng(0)
    for name in "abcdefghij":
        (in_tmp / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            picture = Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8))
            picture.save(in_tmp / "pictures" / name / f"{i}.png")
    (in_tmp / "pictures" / "a" / "bad.png").write_bytes(b"")
    words = ["import", model, "--data", "pictures", "--out", "run"]
    assert command([*words, "--skip-bad"]) == 2
    assert "or another --image-size" in capsys.readouterr().err
    assert command([*words, "--image-size", "8"]) == 2
    assert "--skip-bad" in capsys.readouterr().err
    assert command([*words, "--image-size", "8", "--skip-bad"]) == 0
    assert command(["evaluate", "run"]) == 0


def test_an_imported_run_is_an_ordinary_run(
    saved: dict[str, tuple[Path, np.ndarray]], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Imported, scored, exported to Keras and imported again: the weights stay the same."""
    path, _ = saved["batch.keras"]
    assert command(["import", str(path), "--data", "sample", "--out", "run"]) == 0
    assert "Test accuracy: " in capsys.readouterr().out
    assert command(["evaluate", "run"]) == 0
    assert command(["export", "run", "--format", "keras", "--out", "again.keras"]) == 0
    again = import_model("again.keras", "again", data="sample")
    first = json.loads(Path("run/result.json").read_text())
    assert again.result is not None
    assert again.result["weights_sha256"] == first["weights_sha256"]
    Path("README.md").unlink()  # the card of again.keras
    assert export_run(again, "model.onnx").certificate.passed


def rewritten(source: Path, target: Path, change: Any) -> Path:
    """Copy a .keras file with its config.json changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                change(config)
                content = json.dumps(config).encode()
            new.writestr(name, content)
    return target


def layer_of(config: Any, name: str) -> Any:
    return next(x for x in config["config"]["layers"] if x["config"]["name"] == name)


def to_lambda(config: Any) -> None:
    layer_of(config, "pool1").update(class_name="Lambda")


def to_tanh(config: Any) -> None:
    layer_of(config, "conv2")["config"]["activation"] = "tanh"


def to_torch_epsilon(config: Any) -> None:
    layer_of(config, "batch_normalization_2")["config"]["epsilon"] = 1e-5


def to_branch(config: Any) -> None:
    node = layer_of(config, "conv3")["inbound_nodes"][0]
    node["args"][0]["config"]["keras_history"][0] = "conv2"


def to_training(config: Any) -> None:
    layer_of(config, "batch_normalization_1")["inbound_nodes"][0]["kwargs"]["training"] = True


def to_longer(config: Any) -> None:
    config["config"]["layers"].pop()
    config["config"]["output_layers"] = ["batch_normalization_4", 0, 0]


def to_larger_input(config: Any) -> None:
    config["config"]["layers"][0]["config"]["batch_shape"] = [None, 64, 64, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to_lambda, r"layer 'pool1' \(Lambda\) stands where .* has a MaxPooling2D"),
        (to_tanh, "layer 'conv2' .* has activation='tanh' where .* has 'relu'"),
        (to_torch_epsilon, "'batch_normalization_2' .* has epsilon=1e-05 where .* has 0.001"),
        (to_branch, "layer 'conv3' is fed by .'conv2'"),
        (to_training, "layer 'batch_normalization_1' is called with training=True"),
        (to_longer, "it ends where the notebook's network goes on with a Dense"),
        (to_larger_input, "64, 64, 3., the data have images of 32 × 32"),
        (lambda config: config.pop("config"), "is not a whole model that Keras saved"),
    ],
)
def test_another_network_is_refused_by_name(
    saved: dict[str, tuple[Path, np.ndarray]], tmp_path: Path, change: Any, message: str
) -> None:
    path = rewritten(saved["batch.keras"][0], tmp_path / "other.keras", change)
    with pytest.raises(DataError, match=message) as caught:
        import_model(path, tmp_path / "run", data="sample")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_damaged_and_hostile_files_are_refused(
    saved: dict[str, tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    cut = tmp_path / "cut.keras"
    cut.write_bytes(saved["batch.keras"][0].read_bytes()[:100_000])
    bomb = tmp_path / "bomb.keras"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("config.json", b" " * 10_000_000)
        z.writestr("model.weights.h5", b"")
    linked = tmp_path / "linked.h5"
    linked.write_bytes(saved["batch.h5"][0].read_bytes())
    with h5py.File(linked, "a") as f:
        del f["model_weights/conv2/conv2/kernel"]
        f["model_weights/conv2/conv2/kernel"] = h5py.ExternalLink("elsewhere.h5", "/x")
    elsewhere = tmp_path / "elsewhere.h5"
    shutil.copy(saved["batch.h5"][0], elsewhere)
    led_away = tmp_path / "led_away.h5"
    with h5py.File(elsewhere) as old, h5py.File(led_away, "w") as f:
        f.attrs.update(old.attrs)
        f["model_weights"] = h5py.ExternalLink("elsewhere.h5", "/model_weights")
    swollen = tmp_path / "swollen.h5"
    with h5py.File(saved["batch.h5"][0]) as old, h5py.File(swollen, "w") as f:
        f.attrs.update(old.attrs)
        f.create_group("model_weights")
        for name, group in old["model_weights"].items():
            if name != "hidden":
                old.copy(group, f, f"model_weights/{name}")
        hidden = f.create_group("model_weights/hidden")
        hidden.attrs.update(old["model_weights/hidden"].attrs)
        f.create_dataset(
            "model_weights/hidden/hidden/kernel", (3136, 512), "f4", chunks=True, compression="gzip"
        )
    weights_only = tmp_path / "weights.h5"
    with h5py.File(weights_only, "w") as f:
        f["x"] = 1.0
    for path, message in (
        (cut, "not a whole model"),
        (bomb, "is compressed"),
        (linked, "is a link"),
        (led_away, "is a link"),
        (swollen, "more than the file has"),
        (weights_only, "weights only"),
        (tmp_path / "absent.keras", "does not exist"),
        (tmp_path / "model.pkl", "name a .keras or .h5 file"),
    ):
        with pytest.raises(DataError, match=message):
            import_model(path, tmp_path / "run", data="sample")


def test_a_full_folder_is_left_alone(
    saved: dict[str, tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="not empty"):
        import_model(saved["none.keras"][0], saved["none.keras"][0].parent, data="sample")
