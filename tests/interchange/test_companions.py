"""An export's folder runs alone: predict.py answers as `normlab predict` does, without normlab."""

import importlib.util
import io
import json
import struct
import subprocess
import sys
import venv
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

import normlab
from normlab.data import load
from normlab.data.pictures import naming, reading
from normlab.errors import DataError, UserError
from normlab.evaluation.prediction import open_predictor, predict
from normlab.interchange import export_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> normlab.Run:
    folder = tmp_path_factory.mktemp("run") / "r"
    return normlab.train("fast79", out=folder, data="sample", epochs=1, threads=1)


@pytest.fixture(scope="module")
def folder(run: normlab.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(run, tmp_path_factory.mktemp("exported") / 'it\'s a "model".onnx').path.parent


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[ModuleType]:
    """predict.py in this process; it takes Pillow's limit away, which is put back."""
    limit = Image.MAX_IMAGE_PIXELS
    spec = importlib.util.spec_from_file_location("predict", folder / "predict.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    Image.MAX_IMAGE_PIXELS = limit


@cache
def photograph(width: int = 90, height: int = 60) -> Image.Image:
    """A test picture, larger and sharp."""
    return ImageOps.fit(Image.fromarray(load("sample").x_test[7]), (width, height))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def veiled() -> Image.Image:
    image = photograph().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def deep(form: str) -> bytes:
    values = np.asarray(photograph().convert("L")).astype(np.uint16) * 257 - 100
    return saved(Image.fromarray(values), form)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def of_bits(bits: int, colour: int, key: bytes) -> bytes:
    """A PNG of random samples with a transparent colour; 0 is grey and 2 is RGB."""
    side = 16
    width = side * bits * (3 if colour else 1) // 8
    rows = np.random.default_rng(bits).integers(0, 256, (side, width), np.uint8)
    rows = np.hstack([np.zeros((side, 1), np.uint8), rows])  # no filter
    header = struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(rows.tobytes()))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*c) for c in [*chunks, (b"IEND", b"")])


def with_chunk(content: bytes, chunk: bytes) -> bytes:
    return content[:33] + chunk + content[33:]  # after the header


PHOTO = saved(photograph(), "PNG")
READ = {
    **{form: saved(photograph(), form) for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")},
    "AVIF": saved(photograph(), "AVIF"),
    "GIF": saved(photograph(), "GIF"),
    "grey": saved(photograph().convert("L"), "PNG"),
    "black and white": saved(photograph().convert("1"), "PNG"),
    "palette": saved(photograph().quantize(16), "PNG"),
    "alpha": saved(veiled(), "PNG"),
    "alpha in WebP": saved(veiled(), "WEBP", lossless=True),
    "grey with alpha": saved(veiled().convert("LA"), "PNG"),
    "transparent colour": saved(photograph().quantize(16), "PNG", transparency=3),
    "transparent colour of RGB": saved(photograph(), "PNG", transparency=(0, 0, 0)),
    **{
        f"transparent grey {key} of {bits} bits": of_bits(bits, 0, struct.pack(">H", key))
        for bits, key in ((1, 0), (1, 1), (2, 0), (2, 1), (2, 3), (4, 7), (8, 9))
    },
    "CMYK": saved(photograph().convert("CMYK"), "JPEG"),
    "YCbCr": saved(photograph().convert("YCbCr"), "TIFF"),
    "16 bits PNG": deep("PNG"),
    "16 bits TIFF": deep("TIFF"),
    "16 bits PPM": deep("PPM"),
    **{
        f"turned {n} {form}": saved(photograph(), form, exif=turned(n))
        for n in range(1, 9)
        for form in ("JPEG", "PNG")
    },
    "turned how": saved(photograph(), "JPEG", exif=turned(77)),
    "no EXIF that can be read": saved(photograph(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff"),
    "MPO": saved(photograph(), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
    "a bad text": with_chunk(PHOTO, png_chunk(b"zTXt", b"x\0\0" + b"no zlib")),
    "a bad profile": with_chunk(PHOTO, png_chunk(b"iCCP", b"x")),
    "a bad check sum": with_chunk(PHOTO, png_chunk(b"tEXt", b"a\0b")[:-1] + b"?"),
    "tall": saved(photograph(30, 200), "PNG"),
    "wide": saved(photograph(201, 30), "PNG"),
    "small": saved(photograph(7, 5), "PNG"),
    "its own size": saved(photograph(32, 32), "PNG"),
}
REFUSED = {
    "animation": saved(photograph(), "GIF", save_all=True, append_images=[photograph(90, 61)]),
    "pages": saved(photograph(), "TIFF", save_all=True, append_images=[photograph()]),
    "floats": saved(photograph().convert("F"), "TIFF"),
    "32 bits": saved(photograph().convert("I"), "TIFF"),
    "Lab": saved(Image.new("LAB", (9, 9)), "TIFF"),
    "zero is white": saved(Image.new("I;16", (9, 9)), "TIFF", tiffinfo={262: 0}),
    "16 bits, black transparent": saved(Image.new("I;16", (9, 9)), "PNG", transparency=0),
    "16 bits, one transparent": saved(Image.new("I;16", (9, 9)), "PNG", transparency=9),
    "16 bits of colour, black transparent": of_bits(16, 2, struct.pack(">3H", 0, 0, 0)),
    "cut off": PHOTO[: len(PHOTO) // 2],
    "no picture": b"words",
    "nothing": b"",
}


@pytest.fixture(scope="module")
def answers(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[tuple[str, float]]]]:
    """Of each kind a file, and what `normlab predict` answers to it."""
    place = tmp_path_factory.mktemp("pictures")
    paths = [place / str(i) for i in range(len(READ))]
    for path, content in zip(paths, READ.values(), strict=True):
        path.write_bytes(content)
    predictor = open_predictor(next(folder.glob("*.onnx")))
    told = [p.top(predictor.class_names, 10) for p in predict(predictor, paths)]
    return dict(zip(READ, zip(paths, told, strict=True), strict=True))


# In a process of its own predict.py keeps Pillow's warnings away; pytest's filters come after it.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", READ)
def test_every_kind_is_answered_as_normlab_predict_does(
    kind: str, alone: ModuleType, answers: dict[str, tuple[Path, list[tuple[str, float]]]]
) -> None:
    path, expected = answers[kind]
    np.testing.assert_array_equal(alone.read(path), reading.read_picture(path))
    ranked, _ = alone.answer(path)
    assert [name for name, _ in ranked] == [name for name, _ in expected]
    np.testing.assert_allclose([p for _, p in ranked], [p for _, p in expected], atol=1e-6)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_normlab_refuses_is_refused(kind: str, alone: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(REFUSED[kind])
    with pytest.raises(DataError):
        reading.read_picture(path)
    with pytest.raises((ValueError, OSError, SyntaxError)):
        alone.read(path)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_large_pictures_are_reduced_alike(form: str, alone: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(saved(Image.effect_noise((6001, 4200), 60), form))
    np.testing.assert_array_equal(alone.read(path), reading.read_picture(path))


def test_heic_is_read_where_its_package_is(alone: ModuleType, tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "phone.heic"
    pillow_heif.from_pillow(photograph()).save(path, quality=90)
    np.testing.assert_array_equal(alone.read(path), reading.read_picture(path))


def test_the_command_answers_folders_and_names_what_is_bad(folder: Path, tmp_path: Path) -> None:
    """In a Python that has neither normlab nor PyTorch."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.png").write_bytes(PHOTO)
    (tmp_path / "a.jpg").write_bytes(READ["turned 6 JPEG"])
    (tmp_path / "words.txt").write_text("no picture")
    blocked = "import runpy, sys; sys.modules |= dict.fromkeys(('normlab', 'torch')); "
    code = f"{blocked} sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(folder / "predict.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert [line.count("%") for line in done.stdout.splitlines()] == [3, 3]
    assert done.stderr.count("\n") == 1
    assert "words.txt: cannot identify image file" in done.stderr


def test_names_cannot_speak_to_the_terminal(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a\x1b]0;x\a.png").write_bytes(PHOTO)
    (tmp_path / "b\x1b[2J.png").write_bytes(b"no picture")
    command = [sys.executable, str(folder / "predict.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "a?]0;x?.png: " in done.stdout
    assert "b?[2J.png: " in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_of_a_folder_it_takes_what_normlab_predict_takes(
    folder: Path, alone: ModuleType, tmp_path: Path
) -> None:
    """Files without an ending, folders with one, links; not what systems leave there."""
    assert set(alone.LITTER) == naming.LITTER
    given = tmp_path / "given"
    taken = ("v1.0/a.png", "v1.0/c", "IMG_1", "Z.png", "a/@b/c.jpg", "notes.txt")
    passed = (".DS_Store", "._a.png", ".cache/d.png", "Thumbs.db", "@eaDir/a.png", "a/__MACOSX/e")
    for name in (*taken, *passed):
        (given / name).parent.mkdir(parents=True, exist_ok=True)
        (given / name).write_bytes(PHOTO if name != "notes.txt" else b"words")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f").write_bytes(PHOTO)
    (given / "linked").symlink_to(tmp_path / "elsewhere")
    (given / "a" / "circle").symlink_to(given)
    (given / "nowhere").symlink_to(tmp_path / "missing")
    answers = list(predict(open_predictor(next(folder.glob("*.onnx"))), [given]))
    command = [sys.executable, str(folder / "predict.py"), str(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for problem, lines in ((False, done.stdout), (True, done.stderr)):
        names = [str(a.path) for a in answers if (a.problem is not None) is problem]
        assert [line.partition(": ")[0] for line in lines.splitlines()] == names
    assert len(answers) == 9
    assert done.returncode == 1


def test_it_is_short_and_needs_three_packages(folder: Path) -> None:
    lines = (folder / "predict.py").read_text("utf-8").splitlines()
    assert len([line for line in lines if line]) <= 81
    words = (folder / "requirements.txt").read_text("utf-8").split("\n")
    needed = {line.split(">=")[0] for line in words if line and not line.startswith("#")}
    assert needed == {"onnxruntime", "numpy", "pillow"}


def test_somebody_elses_predict_py_is_not_written_over(run: normlab.Run, tmp_path: Path) -> None:
    mine = tmp_path / "predict.py"
    mine.write_text("print('mine')\n")
    with pytest.raises(UserError, match=r"predict\.py' is there and not what normlab wrote"):
        export_run(run, tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["predict.py"]
    mine.unlink()
    export_run(run, tmp_path / "model.onnx")
    export_run(run, tmp_path / "model.onnx")  # its own are no obstacle


@pytest.mark.soak
def test_in_an_environment_with_its_requirements_alone(folder: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    listed = subprocess.run(
        [python, "-m", "pip", "install", "-q", "-r", folder / "requirements.txt"], check=False
    )
    if listed.returncode:
        pytest.skip("no packages can be had here")
    (tmp_path / "a.png").write_bytes(PHOTO)
    command = [python, folder / "predict.py", tmp_path / "a.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("%") == 3
    has = subprocess.run(
        [python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True
    )
    names = {package["name"] for package in json.loads(has.stdout)}
    assert not names & {"torch", "normlab"}
