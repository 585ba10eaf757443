"""An exported graph reads pictures of any size as training does."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnxruntime import InferenceSession
from PIL import Image

import normlab
from normlab.data import load
from normlab.data.pictures.reading import to_square
from normlab.formats.onnx_model import open_onnx
from normlab.interchange import export_run, onnx_graph
from normlab.interchange.certificate import CertificateError
from normlab.interchange.reading_graph import reading

Pixels = NDArray[Any]
ORDINARY = [(1, 1), (1, 90), (90, 1), (2, 3), (15, 16), (16, 15), (17, 16), (33, 16), (480, 640)]
PILLOW_13_TURNS = [(255, 67), (128, 40), (47, 37), (600, 220)]  # in one call, down comes first


def reader(size: int) -> InferenceSession:
    model = helper.make_model(
        reading(size), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.checker.check_model(model, full_check=True)
    return InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def read(session: InferenceSession, pictures: Pixels) -> Pixels:
    (pixels,) = session.run(None, {"images": pictures})
    return np.asarray(pixels).transpose(0, 2, 3, 1)


def noise(shape: tuple[int, int], seed: int) -> Pixels:
    """Black and white at random: what rounds and overshoots most."""
    generator = np.random.default_rng(seed)
    return (255 * generator.integers(0, 2, (*shape, 3))).astype(np.uint8)


def by_formula(picture: Pixels, size: int) -> Pixels:
    """Keys' filter in float64: across, then down, whole numbers after each."""

    def weights(n: int, side: int) -> Pixels:
        centre = (n - side) / 2 + (np.arange(size) + 0.5) * side / size
        t = np.abs(np.arange(n) + 0.5 - centre[:, None]) / max(1, side / size)
        far = np.where(t < 2, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0)
        w = np.where(t < 1, 1.5 * t**3 - 2.5 * t**2 + 1, far)
        return w / w.sum(1, keepdims=True)

    height, width, _ = picture.shape
    side = min(height, width)
    narrow = np.einsum("hwc,sw->hsc", picture.astype(float), weights(width, side))
    narrow = np.clip(np.floor(narrow + 0.5), 0, 255)
    small = np.einsum("hsc,th->tsc", narrow, weights(height, side))
    return np.clip(np.floor(small + 0.5), 0, 255)


@pytest.mark.parametrize("shape", [*ORDINARY, *PILLOW_13_TURNS])
def test_graph_and_training_follow_one_formula(shape: tuple[int, int]) -> None:
    """Whichever way Pillow goes by itself. Ties are rounded either way."""
    session = reader(16)
    for seed in range(3):
        picture = noise(shape, seed)
        expected = by_formula(picture, 16)
        trained = to_square(picture, 16)
        for found in (trained, read(session, picture[None])[0]):
            assert np.abs(found - expected).max() <= 1
            assert (found != expected).mean() < 0.01


def test_a_batch_is_read_as_its_pictures_are_and_its_own_size_as_it_is() -> None:
    session = reader(16)
    batch = np.stack([noise((40, 50), seed) for seed in range(5)])
    one_by_one = [read(session, batch[i : i + 1])[0] for i in range(5)]
    np.testing.assert_array_equal(read(session, batch), one_by_one)
    own = np.stack([noise((16, 16), seed) for seed in range(5)])
    np.testing.assert_array_equal(read(session, own), own)


def many(count: int, largest: int) -> Iterator[Pixels]:
    """Noise and smooth pictures of random shapes."""
    generator = np.random.default_rng(0)
    for i in range(count):
        height, width = (int(largest ** generator.random()) for _ in range(2))
        if i % 2:
            yield noise((height, width), i)
        else:
            small = Image.fromarray(noise((3, 3), i))
            yield np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def differences(count: int, size: int) -> Pixels:
    session = reader(size)
    found = [
        np.abs(read(session, picture[None])[0] - to_square(picture, size))
        for picture in many(count, 700)
    ]
    return np.stack(found)


@pytest.mark.parametrize("size", [32, 64])
def test_pictures_of_many_sizes_are_read_to_the_last_bit(size: int) -> None:
    assert differences(60, size).max() == 0


@pytest.mark.soak
@pytest.mark.parametrize("size", [32, 64])
def test_a_thousand_pictures_are_read_to_the_last_bit(size: int) -> None:
    found = differences(1000, size)
    print(f"{size} × {size}: {found.max():g} of 255; {(found > 0).mean():.1e} of values differ")
    assert found.max() == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> normlab.Run:
    folder = tmp_path_factory.mktemp("run") / "r"
    return normlab.train("fast79", out=folder, data="sample", epochs=1, threads=1)


def test_an_export_answers_whole_pictures(run: normlab.Run, tmp_path: Path) -> None:
    exported = export_run(run, tmp_path / "model.onnx")
    certified = exported.certificate.reading
    assert certified is not None
    assert certified.largest_difference <= 1
    assert "200 pictures of other sizes read within" in exported.card.read_text(encoding="utf-8")
    model = open_onnx(exported.path)
    assert model.image_size == 32
    picture = np.asarray(Image.fromarray(load("sample").x_test[3]).resize((300, 211)))
    (answer,) = model.session.run(None, {"images": picture[None]})
    expected = model.probabilities(to_square(picture, 32)[None])
    np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-3)


def test_a_graph_that_reads_otherwise_is_not_certified(
    run: normlab.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers to pictures of the network's own size are right all the same."""
    with_reading = onnx_graph.with_reading

    def another_filter(*arguments: Any) -> onnx.ModelProto:
        model = with_reading(*arguments)
        (choice,) = [node for node in model.graph.node if node.op_type == "If"]
        for attribute in choice.attribute:
            for node in attribute.g.node:
                if node.op_type == "Constant" and "three_halves" in node.output[0]:
                    node.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.float64(1.25)))
        return model

    monkeypatch.setattr(onnx_graph, "with_reading", another_filter)
    with pytest.raises(CertificateError, match="pictures of other sizes read within"):
        export_run(run, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("told", ["", "nothing", "0", "1e3", "99999", "null"])
def test_an_image_size_that_is_none_is_refused(run: normlab.Run, told: str) -> None:
    graph, _ = onnx_graph.described(run, run.model())
    for entry in graph.metadata_props:
        if entry.key == "image_size":
            entry.value = told
    with pytest.raises(normlab.DataError, match="with `image_size` in its metadata"):
        open_onnx(graph.SerializeToString())


def test_a_certificate_may_have_no_reading(run: normlab.Run, tmp_path: Path) -> None:
    certificate = export_run(run, tmp_path / "model.onnx").certificate
    without = replace(certificate, reading=None)
    assert without.passed
    assert "other sizes" not in str(without)
