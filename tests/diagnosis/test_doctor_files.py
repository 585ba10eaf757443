"""Models from elsewhere, read from files without running anything in them."""

import json
import pickle
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

import normlab
from networks import ResNet, settle
from normlab.diagnosis.keras_files import read_keras
from normlab.diagnosis.onnx_files import read_onnx
from normlab.errors import DataError, UserError
from normlab.formats.torch_files import read_torch


@pytest.fixture(scope="module")
def resnet() -> ResNet:
    torch.manual_seed(0)
    model = ResNet()
    settle(model, steps=60, batch=8)
    return model


def ids(diagnosis: normlab.Diagnosis, severity: str | None = None) -> set[str]:
    return {f.rule for f in diagnosis.findings if severity in (None, f.severity)}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_resnet_in_torchvisions_form(resnet: ResNet, tmp_path: Path, suffix: str) -> None:
    def saved(name: str, state: dict[str, Any]) -> Path:
        path = tmp_path / f"{name}{suffix}"
        torch.save(state, path) if suffix == ".pt" else save_file(state, path)
        return path

    healthy = normlab.doctor(saved("healthy", resnet.state_dict()))
    assert healthy.normalizers == 20
    assert not healthy.serious

    fresh = normlab.doctor(saved("fresh", ResNet().state_dict()))
    assert ids(fresh, "serious") == {"never-updated"}

    rng = torch.Generator().manual_seed(0)
    state = {k: v.clone() for k, v in resnet.state_dict().items()}
    for name, value in state.items():
        if name.endswith("running_var"):
            value.copy_(torch.randn(value.shape, generator=rng))
        if name.endswith("running_mean"):
            value.copy_(torch.randn(value.shape, generator=rng))
    random = normlab.doctor(saved("random", state))
    assert ids(random, "serious") == {"variance-not-positive"}

    state = {k: v.clone() for k, v in resnet.state_dict().items()}
    state["layer1.0.bn2.running_mean"][3] = float("nan")
    state["layer2.0.downsample.1.running_var"].mul_(0)
    broken = normlab.doctor(saved("broken", state))
    places = {(f.rule, f.where) for f in broken.findings if f.severity == "serious"}
    assert places == {
        ("not-finite", "layer1.0.bn2.running_mean"),
        ("variance-not-positive", "layer2.0.downsample.1"),
    }


def test_a_state_dict_says_what_it_cannot_tell(resnet: ResNet, tmp_path: Path) -> None:
    path = tmp_path / "few.pt"
    model = ResNet()
    settle(model, steps=5, batch=4)
    torch.save(model.state_dict(), path)
    diagnosis = normlab.doctor(path)
    (finding, *_) = [f for f in diagnosis.findings if f.rule == "stale"]
    assert "5 steps with m = 0.9 they weigh 0.59 (taking PyTorch's defaults" in finding.evidence
    assert diagnosis.not_checked["useless-bias"] == "the order of the layers"
    assert not {*diagnosis.checked} & {*diagnosis.not_checked}


def test_the_live_resnet_is_traced(resnet: ResNet) -> None:
    diagnosis = normlab.doctor(resnet)
    assert "useless-bias" in diagnosis.checked
    assert not ids(diagnosis, "serious")


def test_every_kind_of_tensor_is_read_as_pytorch_reads_it(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=rng)
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)
    state = {str(kind): base.to(kind) for kind in kinds}
    state |= {
        "transposed": base.t(),
        "part": base[2:5, 1::3],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "last": base.to(memory_format=torch.contiguous_format),
        "parameter": nn.Parameter(base[0]),
    }
    path = tmp_path / "kinds.pt"
    torch.save({"epoch": 3, "lr": 0.5, "model": {"state_dict": state}}, path)
    (part,) = read_torch(path).state_dicts
    found = part.arrays
    assert part.place == "model.state_dict"
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        wide = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
        np.testing.assert_array_equal(found[name], wide.numpy())
        assert found[name].shape == tuple(tensor.shape)


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_a_pickle_that_would_run_code_is_read_around_and_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "evil.pt"
    model = settle(ResNet(), steps=60, batch=4)
    for legacy in (False, True):
        torch.save(
            {"state_dict": model.state_dict(), "x": Evil(mark)},
            path,
            _use_new_zipfile_serialization=not legacy,
        )
        diagnosis = normlab.doctor(path)
        assert diagnosis.normalizers == 20
        assert diagnosis.passed_over == ("x (__builtin__.getattr)",)
        assert not mark.exists()
        torch.load(path, weights_only=False)  # the file is as evil as it looks
        assert mark.exists()
        mark.unlink()


def rewritten(source: Path, target: Path, change: Any) -> Path:
    """Copy a zip, each member as `change` returns it; None leaves it out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, c: None if n.endswith("data.pkl") else c, "no 'data.pkl'"),
        (lambda n, c: c[:60] if n.endswith("data.pkl") else c, "damaged pickle"),
        (lambda n, c: b"big" if n.endswith("byteorder") else c, "big-endian"),
        (lambda n, c: None if n.rpartition("/")[2] in "01" else c, "none of its tensors"),
    ],
)
def test_a_damaged_state_dict_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    whole = tmp_path / "whole.pt"
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)).state_dict(), whole)
    with pytest.raises(DataError, match=message):
        read_torch(rewritten(whole, tmp_path / "broken.pt", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, c: c[:-4] if n.endswith("data/0") else c, "has not the 108 values"),
        (lambda n, c: None if n.endswith("data/0") else c, "no 'data/0' in the file"),
        (lambda n, c: c.replace(b"K\x1bK\x09K\x03K\x01", b"K\x1bK\x09K\x09K\x09"), "does not fit"),
        (lambda n, c: c.replace(b"FloatStorage", b"EvilStorage2"), "type of number, EvilStorage2"),
        (lambda n, c: c.replace(b"K\x03K\x03", b"NK\x03", 1), "sizes and strides|no sizes"),
    ],
)
def test_one_odd_tensor_leaves_the_others_readable(
    tmp_path: Path, change: Any, message: str
) -> None:
    whole = tmp_path / "whole.pt"
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3).double())
    torch.save(model.state_dict(), whole)
    (part,) = read_torch(rewritten(whole, tmp_path / "odd.pt", change)).state_dicts
    assert "0.weight" in part.unread
    assert re.search(message, part.unread["0.weight"])
    assert {"1.weight", "1.bias"} <= part.arrays.keys()
    diagnosis = normlab.doctor(tmp_path / "odd.pt")
    assert ("not-read", "0.weight", "note") in {
        (f.rule, f.where, f.severity) for f in diagnosis.findings
    }


def test_other_pytorch_files_are_refused_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save([1, 2], path)
    with pytest.raises(DataError, match=r"no weights.*: save model\.state_dict"):
        read_torch(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DataError, match="no weights"):
        read_torch(path)
    path.write_bytes(pickle.dumps({"layer.weight": torch.zeros(2)}))
    with pytest.raises(DataError, match=r"save it with torch\.save"):
        read_torch(path)
    path.write_bytes(b"weights")
    with pytest.raises(DataError, match="no zip and no older file"):
        read_torch(path)
    path = tmp_path / "model_best.pth.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "x.py")
    with pytest.raises(DataError, match="tar archive"):
        normlab.doctor(path)


def test_unknown_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        normlab.doctor(tmp_path / "none.pt")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="of no known form"):
        normlab.doctor(tmp_path / "notes.txt")
    (tmp_path / "x.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(DataError, match="not a whole safetensors"):
        normlab.doctor(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="cannot be run"):
        normlab.doctor(tmp_path / "x.safetensors", data="sample")


# Keras asks a PyTorch tensor for a copy in a way that NumPy 2 has deprecated.
KERAS = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def keras_model(**compile_options: Any) -> keras.Model:
    """A functional model with a model inside, a branch, dropout and normalisers of two kinds."""
    keras.utils.set_random_seed(0)
    inner_in = keras.Input((8, 8, 3))
    h = keras.layers.Conv2D(4, 3, padding="same", name="with_bias")(inner_in)
    h = keras.layers.BatchNormalization(name="inner_bn")(h)
    inner = keras.Model(inner_in, h, name="inner")
    x = keras.Input((8, 8, 3))
    h = inner(x)
    side = keras.layers.Conv2D(4, 1, activation="relu", name="active")(h)
    side = keras.layers.BatchNormalization(name="no_beta", center=False, momentum=0.1)(side)
    h = keras.layers.Add()([h, side])
    h = keras.layers.Dropout(0.2, name="drop")(h)
    h = keras.layers.ReLU()(h)
    h = keras.layers.BatchNormalization(name="no_gamma", scale=False)(h)
    y = keras.layers.Dense(3)(keras.layers.Flatten()(h))
    model = keras.Model(x, y)
    if compile_options:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(loss=loss, **compile_options)
        rng = np.random.default_rng(0)
        model.fit(rng.random((16, 8, 8, 3)), np.arange(16) % 3, batch_size=4, verbose=0)
    return model


@KERAS
def test_a_keras_model_from_its_file(tmp_path: Path) -> None:
    model = keras_model(optimizer=keras.optimizers.Adam(gradient_accumulation_steps=2))
    path = tmp_path / "model.keras"
    model.save(path)
    network = read_keras(path)
    found = {n.name: n for n in network.normalizers}
    assert list(found) == ["inner/inner_bn", "no_beta", "no_gamma"]
    layers = {x.name: x for x in [*model.layers, *model.get_layer("inner").layers]}
    for name, n in found.items():
        layer = layers[name.rpartition("/")[2]]
        np.testing.assert_array_equal(n.running_mean, np.array(layer.moving_mean.value.detach()))
        np.testing.assert_array_equal(n.running_var, np.array(layer.moving_variance.value.detach()))
        assert (n.weight is None) == (name == "no_gamma")
        assert n.steps == 4
        assert n.eps == 1e-3
    diagnosis = normlab.doctor(path)
    seen = {(f.rule, f.where) for f in diagnosis.findings}
    assert {
        ("useless-bias", "inner/with_bias"),
        ("dropout-before-normalizer", "no_gamma"),
        ("momentum-turned-round", "no_beta"),
        ("stale", "inner/inner_bn"),
        ("stale", "no_gamma"),
        ("accumulation", "batches"),
    } == {(rule, where) for rule, where in seen if rule != "constant-channel"}
    assert diagnosis.serious


@KERAS
def test_keras_is_never_asked_to_rebuild_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.keras"
    keras_model().save(path)
    for name in [n for n in sys.modules if n.partition(".")[0] in ("keras", "tensorflow")]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it now fails
    assert ids(normlab.doctor(path), "serious") == {"never-updated", "momentum-turned-round"}


@KERAS
def test_a_healthy_sequential_keras_model(tmp_path: Path) -> None:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, use_bias=False),
            keras.layers.BatchNormalization(momentum=0.5),
            keras.layers.ReLU(),
            keras.layers.Conv2D(4, 3, use_bias=False),
            keras.layers.BatchNormalization(momentum=0.5),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    model.fit(rng.random((32, 8, 8, 3)), np.arange(32) % 3, batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    diagnosis = normlab.doctor(tmp_path / "model.keras")
    assert diagnosis.normalizers == 2
    assert {"stale", "useless-bias", "eps-matters"} <= {*diagnosis.checked}
    assert not diagnosis.serious


@KERAS
@pytest.mark.parametrize("member", ["config.json", "model.weights.h5"])
def test_a_damaged_keras_file_is_refused(tmp_path: Path, member: str) -> None:
    whole, broken = tmp_path / "whole.keras", tmp_path / "broken.keras"
    keras_model().save(whole)
    rewritten(whole, broken, lambda n, c: c[: len(c) // 2] if n == member else c)
    with pytest.raises(DataError, match="not a whole model that Keras saved"):
        normlab.doctor(broken)
    rewritten(whole, broken, lambda n, c: None if n == member else c)
    with pytest.raises(DataError, match="not a whole model that Keras saved"):
        normlab.doctor(broken)
    rewritten(whole, broken, lambda n, c: b"{}" if n == "config.json" else c)
    with pytest.raises(DataError, match="not a whole model that Keras saved"):
        normlab.doctor(broken)


@KERAS
def test_a_keras_file_cannot_reach_other_files(tmp_path: Path) -> None:
    """HDF5 can link to other files, or keep an array's values in one: neither is followed."""
    path, secret = tmp_path / "m.keras", tmp_path / "secret.h5"
    keras_model().save(path)
    with h5py.File(secret, "w") as f:
        f["values"] = np.full(4, 42.0)
    with zipfile.ZipFile(path) as archive:
        (tmp_path / "w.h5").write_bytes(archive.read("model.weights.h5"))
    with h5py.File(tmp_path / "w.h5", "a") as f:
        place = "layers/batch_normalization/vars/0"
        assert place in f
        del f[place]
        f[place] = h5py.ExternalLink(str(secret), "/values")
    content = (tmp_path / "w.h5").read_bytes()
    linked = rewritten(
        path, tmp_path / "linked.keras", lambda n, c: content if n.endswith(".h5") else c
    )
    diagnosis = normlab.doctor(linked)
    assert diagnosis.normalizers == 2
    (finding,) = [f for f in diagnosis.findings if f.rule == "not-read"]
    assert (finding.where, finding.severity) == ("no_beta", "serious")
    assert "1 of 3 batch normalisations could not be read" in finding.evidence
    assert "links, or missing" in finding.evidence


@KERAS
def test_an_array_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    path, weights = tmp_path / "m.keras", tmp_path / "w.h5"
    keras_model().save(path)
    with zipfile.ZipFile(path) as archive:
        weights.write_bytes(archive.read("model.weights.h5"))
    with h5py.File(weights, "a") as f:
        f.create_dataset("layers/bomb", shape=(1 << 40,), chunks=(1 << 10,), dtype="f4")
    content = weights.read_bytes()
    bomb = rewritten(path, tmp_path / "b.keras", lambda n, c: content if n.endswith(".h5") else c)
    with pytest.raises(DataError, match="layers/bomb claims 4,398,046,511,104 bytes"):
        normlab.doctor(bomb)


def onnx_file(path: Path, var: Any, location: str | None = None) -> Path:
    """Convolution with a bias, dropout and a normaliser, as an exporter writes them."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "c"], ["h"], name="conv"),
        helper.make_node("BatchNormalization", ["h", "g", "b", "m", "v"], ["i"], name="bn"),
        helper.make_node("Dropout", ["i", "ratio", "mode"], ["y"], name="drop"),
    ]
    ones = np.ones(4, np.float32)
    weights = {
        "w": np.ones((4, 3, 1, 1), np.float32),
        "c": ones,
        "g": ones,
        "b": ones,
        "m": ones,
        "v": np.asarray(var, np.float32),
        "ratio": np.float32(0.5),
        "mode": np.bool_(True),
    }
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    if location is not None:
        variance = next(t for t in tensors if t.name == "v")
        variance.ClearField("raw_data")
        variance.data_location = TensorProto.EXTERNAL
        variance.external_data.add(key="location", value=location)
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    graph = helper.make_graph(nodes, "graph", shapes[:1], shapes[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, path)
    return path


def test_an_onnx_graph(tmp_path: Path) -> None:
    ill = normlab.doctor(onnx_file(tmp_path / "ill.onnx", [1e-7, 2e-7, 3e-7, -1.0]))
    assert {(f.rule, f.where) for f in ill.findings} == {
        ("variance-not-positive", "bn"),
        ("training-mode-exported", "drop"),
        ("eps-matters", "bn"),
        ("useless-bias", "conv"),
    }
    healthy = normlab.doctor(onnx_file(tmp_path / "healthy.onnx", [1, 2, 3, 4]))
    assert ids(healthy) == {"training-mode-exported", "useless-bias"}


def test_external_onnx_data_come_from_the_graphs_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    values = np.array([1, 2, 3, 4], np.float32)
    for place in (folder, tmp_path):
        (place / "weights.bin").write_bytes(values.tobytes())
    inside = read_onnx(onnx_file(folder / "inside.onnx", values, "weights.bin"))
    np.testing.assert_array_equal(inside.normalizers[0].running_var, values)
    for location in ("../weights.bin", str(tmp_path / "weights.bin")):
        with pytest.raises(DataError, match="outside the graph's folder"):
            read_onnx(onnx_file(folder / "outside.onnx", values, location))
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(DataError, match="outside the graph's folder"):
        read_onnx(onnx_file(folder / "link.onnx", values, "link.bin"))
    with pytest.raises(DataError, match="which is not there"):
        read_onnx(onnx_file(folder / "gone.onnx", values, "gone.bin"))


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a" * 30])
def test_a_damaged_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(DataError, match="not a whole ONNX file"):
        normlab.doctor(tmp_path / "x.onnx")


def test_findings_are_plain_json(resnet: ResNet, tmp_path: Path) -> None:
    path = tmp_path / "fresh.pt"
    torch.save(ResNet().state_dict(), path)
    told = json.loads(json.dumps(normlab.doctor(path).as_dict()))
    assert {*told} == {
        *("path", "kind", "normalizers", "findings", "checked", "not_checked"),
        *("parts", "passed_over", "assumes", "caveats"),
    }
    for finding in told["findings"]:
        assert {*finding} == {"rule", "where", "severity", "evidence", "remedy", "source"}
        assert all(isinstance(v, str) and v for v in finding.values())
