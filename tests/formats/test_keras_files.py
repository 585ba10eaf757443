"""Every form in which Keras saves a model, read by the one reader, for the doctor."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import layers

import normlab
from normlab.diagnosis.keras_files import read_keras as described
from normlab.errors import DataError
from normlab.formats.keras_files import read_keras

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    "ignore:You are saving your model as an HDF5 file",
)


@keras.saving.register_keras_serializable("normlab-tests")
class Renamed(layers.BatchNormalization):
    """A class derived from it."""


@keras.saving.register_keras_serializable("normlab-tests")
class Pair(layers.Layer):
    """A layer with layers in an attribute and in a list, which no description mentions."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.first = layers.BatchNormalization()
        self.rest = [layers.Dense(4), layers.BatchNormalization(scale=False)]

    def call(self, x: Any) -> Any:
        return self.rest[1](self.rest[0](self.first(x)))


@keras.saving.register_keras_serializable("normlab-tests")
class Functional2(keras.Model):
    """A functional model given a class of its own."""


@keras.saving.register_keras_serializable("normlab-tests")
class Subclassed(keras.Model):
    """A model that does not say how its layers follow."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.norm = layers.BatchNormalization()
        self.blocks = [Pair(), layers.BatchNormalization(center=False)]

    def call(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def nested() -> keras.Model:
    inner_in = keras.Input((5, 4))
    h = layers.BatchNormalization(name="deep", epsilon=0.01)(inner_in)
    inner = Functional2(inner_in, layers.Dense(4, name="inner_dense")(h), name="inner")
    x = keras.Input((5, 4))
    h = layers.TimeDistributed(layers.BatchNormalization(name="in_time"), name="time")(x)
    h = Renamed(name="derived", momentum=0.5)(inner(h))
    h = layers.Dense(4, name="before")(h)
    h = layers.BatchNormalization(name="plain")(h)
    return Functional2(x, Pair(name="pair")(h))


def subclassed() -> keras.Model:
    model = Subclassed()
    model(np.zeros((1, 5, 4)))
    return model


def sequential() -> keras.Model:
    line = [keras.Input((5, 4)), layers.Dense(4), layers.BatchNormalization(name="only")]
    return keras.Sequential(line)


MODELS: dict[str, tuple[Callable[[], keras.Model], int]] = {
    "nested": (nested, 6),
    "subclassed": (subclassed, 4),
    "sequential": (sequential, 1),
}
FORMS = ("keras", "h5", "hdf5", "weights.h5")


def norms(model: keras.Model) -> list[Any]:
    found = [x for x in model._flatten_layers() if isinstance(x, layers.BatchNormalization)]
    return list({id(x): x for x in found}.values())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("keras")
    files = {}
    for name, (make, _) in MODELS.items():
        keras.utils.set_random_seed(0)
        model = make()
        for i, layer in enumerate(norms(model)):
            rng = np.random.default_rng(i)
            layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.weights])
            layer.moving_variance.assign(np.full(4, i + 2.0))
        for form in FORMS:
            path = folder / f"{name}.{form}"
            if name == "subclassed" and form in ("h5", "hdf5"):
                continue  # Keras refuses it
            model.save_weights(path) if form == "weights.h5" else model.save(path)
            files[name, form] = path
    return files


CASES = [(n, f) for n in MODELS for f in FORMS if not (n == "subclassed" and f in ("h5", "hdf5"))]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_every_normaliser_is_found(
    saved: dict[tuple[str, str], Path], name: str, form: str
) -> None:
    network = described(saved[name, form])
    variances = sorted(float(n.running_var[0]) for n in network.normalizers)
    assert variances == [float(i + 2) for i in range(MODELS[name][1])]
    assert not network.unread
    assert all(n.running_mean is not None for n in network.normalizers)


@pytest.mark.parametrize("form", ["keras", "h5", "hdf5"])
def test_settings_come_from_the_description(saved: dict[tuple[str, str], Path], form: str) -> None:
    network = described(saved["nested", form])
    found = {n.name: n for n in network.normalizers}
    assert {"inner/deep", "time/in_time", "derived", "plain"} <= found.keys()
    assert found["inner/deep"].eps == 0.01
    assert found["derived"].decay == 0.5
    diagnosis = normlab.doctor(saved["nested", form])
    assert {f.where for f in diagnosis.findings if f.rule == "useless-bias"} == {"before"}
    lacking = [f for f in diagnosis.findings if f.rule == "not-read"]
    assert len(lacking) == 2  # those inside the layer of a class of its own
    assert {f.severity for f in lacking} == {"note"}


def test_keras_2_12_called_hdf5_keras(saved: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(saved["nested", "h5"].read_bytes())
    assert normlab.doctor(path).normalizers == 6


def moved(source: Path, target: Path, change: Callable[[h5py.File], None]) -> Path:
    """Copy a .keras file with its weights changed."""
    weights = target.with_suffix(".h5")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        weights.write_bytes(old.read("model.weights.h5"))
        with h5py.File(weights, "a") as f:
            change(f)
        new.writestr("config.json", old.read("config.json"))
        new.writestr("model.weights.h5", weights.read_bytes())
    return target


def as_2_14(f: h5py.File) -> None:
    """Another name for the layers' group, and no names of layers."""
    other = "_layer_checkpoint_dependencies"
    f["layers/functional2"].move("layers", other)
    f.move("layers", other)
    f.visititems(lambda _, item: item.attrs.pop("name", None))


def test_the_layout_of_keras_2_14_in_nested_models(
    saved: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    path = moved(saved["nested", "keras"], tmp_path / "x.keras", as_2_14)
    found = {n.name: n for n in described(path).normalizers}
    assert {"inner/deep", "time/in_time", "derived", "plain"} <= found.keys()
    assert len(found) == 6


def without_the_second(f: h5py.File) -> None:
    del f["layers/renamed/vars/3"]


def test_a_normaliser_that_lacks_a_vector_is_not_read(
    saved: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    path = moved(saved["nested", "keras"], tmp_path / "x.keras", without_the_second)
    diagnosis = normlab.doctor(path)
    assert diagnosis.normalizers == 5
    (finding,) = [f for f in diagnosis.findings if f.severity == "serious"]
    assert (finding.rule, finding.where) == ("not-read", "derived")
    assert "1 of 6" in finding.evidence


def test_arrays_that_lie_in_the_same_room_are_added_up(tmp_path: Path) -> None:
    """Each fits into the file, but they all claim the same bytes."""
    path = tmp_path / "x.weights.h5"
    with h5py.File(path, "w") as f:
        for i in range(4):
            f[f"layers/a/vars/{i}"] = np.zeros(10_000, np.float32)
        places = sorted(f[f"layers/a/vars/{i}"].id.get_offset() for i in range(4))
    content = path.read_bytes()
    for place in places[1:]:
        content = content.replace(place.to_bytes(8, "little"), places[0].to_bytes(8, "little"))
    path.write_bytes(content)
    read_keras(path)  # as large as it was, they are not too many
    size = len(content)
    shorter = content[: places[-1]]  # the last array's room, now claimed by none, is cut off
    shorter = shorter.replace(size.to_bytes(8, "little"), len(shorter).to_bytes(8, "little"))
    path.write_bytes(shorter)
    with pytest.raises(DataError, match="its arrays claim 160,000 bytes"):
        read_keras(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"config.json": b"[]"}, "not a whole model that Keras saved"),
        ({"config.json": b"[" * 100_000}, "not a whole model that Keras saved"),
        ({"config.json": b"{}", "model.weights.json": b"{}"}, "several parts"),
    ],
)
def test_other_zips_are_refused(tmp_path: Path, content: dict[str, bytes], message: str) -> None:
    path = tmp_path / "x.keras"
    with zipfile.ZipFile(path, "w") as z:
        for name, data in content.items():
            z.writestr(name, data)
    with pytest.raises(DataError, match=message) as error:
        normlab.doctor(path)
    assert "\n" not in str(error.value)


def test_hdf5_of_something_else_is_no_healthy_model(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as f:
        f["measurements"] = np.arange(5.0)
    assert normlab.doctor(path).serious
    with h5py.File(path, "w") as f:
        f.attrs["note"] = json.dumps({})
    with pytest.raises(DataError, match="neither a model nor weights"):
        normlab.doctor(path)
