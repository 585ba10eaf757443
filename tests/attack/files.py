"""What a person may be sent: data, runs, studies and models made to harm whoever opens them.

Each attack builds something new each time: files in which much refers to one thing, is repeated or
has many members, besides sound files in which one value is changed. The command that a person would
use is then run on it, in a process that may take 500 MB and a minute. It survives if it ends with
exit code 0, or with 1 or 2 and one line; printed nothing that a terminal obeys; and left everything
outside its folder as it was.
"""

import gzip
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from attack import sessions
from attack.case import Case
from attack.sessions import Session

HOSTILE = (
    *(r"$\frac$", "$x", "a\ud800b", "\udcff", "猫と犬", "\x1b]0;title\x07", "\x1b]52;c;eA==\x07"),
    *(
        "\r\nnormlab: done",
        "x$(touch pwned)",
        "`touch pwned`",
        "a'; touch pwned; '",
        "\u202egnp.exe",
    ),
    *(
        "<script>alert(1)</script>",
        "](https://example.com) | x |",
        "-rf",
        " ",
        "x" * 5_000,
        "\x9b31m",
    ),
)
TRAIN = ("--batch-size", "8", "--threads", "1", "--epochs", "1")
HUGE = (10**3, 10**5, 10**9, 2**31, 2**63 - 1, 10**30)


@dataclass
class Ground:
    """Where one try takes place.

    folder: the working folder, empty at first. outside: a folder that must stay as it is.
    base: a sound recorded run and a sound study, to be copied.
    """

    folder: Path
    outside: Path
    base: Path
    rng: Random
    sessions: list[Session] = field(default_factory=list)

    def run(self, *words: str, **environment: str) -> Session:
        session = sessions.run(words, self.folder, **environment)
        self.sessions.append(session)
        return session

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.base / name, self.folder / name, symlinks=True))


Attack = Callable[[Ground], str | None]
ATTACKS: dict[str, Attack] = {}
LONG: set[str] = set()


def attack(name: str, *, long: bool = False) -> Callable[[Attack], Attack]:
    """A function becomes an attack of this name; a `long` one is left out of the short form."""

    def add(function: Attack) -> Attack:
        ATTACKS[name] = function
        if long:
            LONG.add(name)
        return function

    return add


def attacks(folder: Path, rng: Random, tries: int) -> Iterator[Case]:
    """Every attack, `tries` times each, one `Case` after the other.

    Args:
        tries: 0 for the short form, each of the shorter attacks once.
    """
    os.environ["NORMLAB_CACHE"] = str(folder / "cache")
    os.environ["PYTHONSAFEPATH"] = "1"
    preload()
    base = make_base(folder / "base")
    for number, (name, function) in enumerate(ATTACKS.items()):
        if not tries and name in LONG:
            continue
        survived = 0
        for i in range(tries or 1):
            place = folder / f"{number}-{i}"
            problem = attempt(function, place, base, rng)
            survived += problem is None
            if problem is not None:
                print(f"    {name}: {problem}", file=sys.stderr, flush=True)
            shutil.rmtree(place, ignore_errors=True)
        yield Case(name, tries or 1, survived)


def attempt(function: Attack, place: Path, base: Path, rng: Random) -> str | None:
    """What is wrong after one try; None if nothing is."""
    ground = Ground(place / "work", place / "outside", base, rng)
    ground.folder.mkdir(parents=True)
    ground.outside.mkdir()
    (ground.outside / "precious").write_text("as it was")
    problem = function(ground)
    for session in ground.sessions:
        problem = problem or session.problem
    names = [p.name for p in ground.outside.iterdir()]
    if names != ["precious"] or (ground.outside / "precious").read_text() != "as it was":
        problem = problem or f"changed what is outside: {names}"
    if found := next((p for p in place.rglob("pwned")), None):
        problem = problem or f"ran a command: {found}"
    return problem


def preload() -> None:
    """Load here what every session would load."""
    import torch

    torch.set_num_threads(1)
    for name in ("normlab.api.train", "normlab.study", "normlab.diagnosis.rules"):
        __import__(name)
    for name in ("run_report", "study_report", "inspection_report"):
        __import__(f"normlab.reports.{name}")


def pictures(rng: Random, size: int = 16, count: int = 16) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(rng.randrange(2**32))
    shape = (count, size, size, 3)
    arrays = {
        f"x_{part}": generator.integers(0, 256, shape, np.uint8) for part in ("train", "test")
    }
    return arrays | {f"y_{part}": np.arange(count) % 2 for part in ("train", "test")}


def make_base(base: Path) -> Path:
    """A recorded run, its data, and a study whose scores are made up."""
    from studies import make_study

    base.mkdir()
    np.savez(base / "data.npz", **pictures(Random(0)))
    train = ("train", "fast79", "--data", "data.npz", "--record", "--out", "run", *TRAIN)
    session = sessions.run(train, base)
    assert session.code == 0, session.text
    make_study(base / "study", {"batch": [0.8, 0.7], "none": [0.6, 0.7]})
    return base


def edit(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


# CIFAR-10 --------------------------------------------------------------------------------------


@attack("CIFAR-10 pickles that mention a long key, list or number many thousand times", long=True)
def shared_pickle(ground: Ground) -> str | None:
    rng = ground.rng
    times = rng.randrange(10_000, 80_000)
    what = rng.choice(("key", "list", "number"))
    if what == "key":
        size = rng.randrange(100_000, 1_000_000)
        thing = b"X" + struct.pack("<I", size) + b"k" * size + b"q\x01"
        body = b"}(" + thing + b"K\x01" + b"h\x01K\x01" * times + b"u."
    elif what == "list":
        body = b"]q\x01(" + b"h\x01" * times + b"e."
    else:
        size = rng.randrange(1_000, 1_000_000)
        number = b"\x8b" + struct.pack("<I", size) + b"\x7f" * size + b"q\x01"
        body = b"}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        body += b"\x87R(K\x01(" + number + b"h\x01h\x01tU\x02u1NU\x00tbU\x06labels]u."
    (ground.folder / "batches").mkdir()
    (ground.folder / "batches" / "data_batch_1").write_bytes(b"\x80\x02" + body)
    ground.run("train", "fast79", "--data", "batches", "--out", "run", *TRAIN)
    return None


@attack("archives with many members, long headers for all of them, zeros without end")
def archive(ground: Ground) -> str | None:
    rng, buffer = ground.rng, io.BytesIO()
    header = {
        f"comment.{i}": "x" * rng.randrange(60) for i in range(rng.choice((10, 1_000, 30_000)))
    }
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=header
    ) as tar:
        for _ in range(rng.choice((10, 900, 5_000))):
            tar.addfile(tarfile.TarInfo(rng.choice(("data_batch_1", "x/test_batch", "other"))))
    content = buffer.getvalue() + bytes(rng.choice((0, 100 << 20)))
    (ground.folder / "x.tar.gz").write_bytes(gzip.compress(content, 1))
    ground.run("train", "fast79", "--data", "x.tar.gz", "--out", "run", *TRAIN)
    return None


# Arrays ----------------------------------------------------------------------------------------


def npy(shape: tuple[int, ...], dtype: str) -> bytes:
    """The header of an array, without its values."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def bomb(path: Path, names: list[str], size: int, dtype: str = "<f4") -> None:
    """An `.npz` of arrays of `size` zero bytes each."""
    shape = (size // np.dtype(dtype).itemsize,)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        for name in names:
            with z.open(f"{name}.npy", "w") as member:
                member.write(npy(shape, dtype) + bytes(size))


def overlap(path: Path, names: list[str]) -> None:
    """An `.npz` whose directory has one member under many names."""
    names = [f"{name}.npy" for name in names]
    width = max(map(len, names))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("#" * width, npy((50 << 20,), "|u1") + bytes(50 << 20))
    content = buffer.getvalue()
    at = content.index(b"PK\x01\x02")
    entry, end = content[at : at + 46 + width], bytearray(content[at + 46 + width :])
    entries = [entry[:46] + name.ljust(width, "#").encode() for name in names]
    end[8:16] = struct.pack("<HHI", len(names), len(names), sum(map(len, entries)))
    path.write_bytes(content[:at] + b"".join(entries) + bytes(end))


@attack("`.npz` data whose members are many, overlap, or unpack together to gigabytes")
def npz_data(ground: Ground) -> str | None:
    names = ["x_train", "y_train", "x_test", "y_test", "class_names"]
    path = ground.folder / "data.npz"
    kind = ground.rng.choice(("bomb", "overlap", "names"))
    if kind == "bomb":
        bomb(
            path,
            names,
            ground.rng.randrange(60 << 20, 120 << 20),
            ground.rng.choice(("|u1", "<i8")),
        )
    elif kind == "overlap":
        overlap(path, names)
    else:
        many = np.char.add("c", np.arange(ground.rng.randrange(20_000, 200_000)).astype("U"))
        np.savez_compressed(path, **pictures(ground.rng), class_names=many)
    ground.run("train", "fast79", "--data", "data.npz", "--out", "run", *TRAIN)
    return None


@attack("recordings of many arrays, gigabytes of zeros, or arrays of another shape or type")
def recording(ground: Ground) -> str | None:
    rng, run = ground.rng, ground.copy("run")
    path = run / "recording.npz"
    kind = rng.choice(("bomb", "many", "edit", "edit", "edit"))
    if kind == "bomb":
        bomb(path, ["step", "layers", *(f"a{i}" for i in range(8))], 40 << 20)
    elif kind == "many":
        np.savez(path, **{f"a{i}": np.zeros(1) for i in range(20_000)})
    else:
        arrays = dict(np.load(path))
        for _ in range(rng.randrange(1, 3)):
            name = rng.choice([*arrays, "step", "layers", "loss"])
            values = arrays.get(name, np.zeros(2))
            changes: tuple[Callable[[], Any], ...] = (
                lambda v=values: v.astype("U3"),
                lambda v=values: v[..., None],
                lambda v=values: v[:1],
                lambda v=values: v.reshape(-1),
                lambda v=values: np.full(v.shape, np.nan) if v.dtype.kind == "f" else v[::-1],
                lambda v=values: -v.astype(float) if v.dtype.kind in "iuf" else v[:0],
                lambda: None,
            )
            changed = rng.choice(changes)()
            arrays.pop(name, None)
            if changed is not None:
                arrays[name] = changed
        np.savez(path, **arrays)
    ground.run("inspect", "run")
    return None


# Runs and studies ------------------------------------------------------------------------------


@attack("a run whose recipe asks for a network of any size")
def sizes(ground: Ground) -> str | None:
    rng, run = ground.rng, ground.copy("run")

    def change(recipe: dict[str, Any]) -> None:
        what = rng.choice(("image_size", "classes", "both", "model"))
        if what in ("image_size", "both"):
            recipe["image_size"] = rng.choice(HUGE)
        if what in ("classes", "both"):
            recipe["class_names"] = [str(i) for i in range(rng.choice((3, 1_000, 200_000)))]
        if what == "model":
            recipe["recipe"]["model"] = rng.choice(("notebook", "sigmoid", "fast-wider"))
            recipe["image_size"] = rng.choice((32, 500, 1_000))

    edit(run / "recipe.json", change)
    ground.run("evaluate", "run", "--data", str(ground.base / "data.npz"))
    ground.run("doctor", "run")
    return None


@attack("a study of a thousand million pairs, checks or looks, or of arms called ../x")
def study(ground: Ground) -> str | None:
    rng, folder = ground.rng, ground.copy("study")

    def change(plan: dict[str, Any]) -> None:
        key = rng.choice(("seeds", "checks", "looks", "arm", "first_seed"))
        if key == "looks":
            plan["looks"] = list(range(rng.choice((10, 1_000, 100_000))))
        elif key == "arm":
            plan["arms"][0]["name"] = rng.choice(
                ("../../outside/precious", "/etc/passwd", *HOSTILE)
            )
        else:
            plan[key] = rng.choice((999_999_999, *HUGE))

    edit(folder / "study.json", change)
    ground.run("compare", "--show", "study")
    return None


@attack("a value of another type, size or kind anywhere in a run's or study's JSON", long=True)
def edited_json(ground: Ground) -> str | None:
    rng, run, folder = ground.rng, ground.copy("run"), ground.copy("study")
    path = rng.choice([*run.glob("*.json"), *folder.rglob("*.json")])

    def change(document: Any) -> None:
        holder, key = rng.choice(list(places(document)))
        strange = (None, True, -1, 0, 1e308, "x", "", [], {}, [[1]], *HUGE, *HOSTILE)
        holder[key] = rng.choice(strange)

    edit(path, change)
    ground.run("evaluate", "run", "--data", str(ground.base / "data.npz"))
    ground.run("inspect", "run")
    ground.run("compare", "--show", "study")
    return None


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON document where a value stands."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield document, key
        if isinstance(value, dict | list):
            yield from places(value)


@attack("a run that has links and pipes where its files and folders should be", long=True)
def links(ground: Ground) -> str | None:
    rng, run = ground.rng, ground.copy("run")
    name = rng.choice(
        ("evaluation-last", "inspect", "recipe.json", "result.json", "environment.json", ".lock",
         "recording.npz", "last.safetensors", "history.jsonl", "recalibrated.safetensors")
    )  # fmt: skip
    place = run / name
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    if rng.random() < 0.5 and name not in ("evaluation-last", "inspect"):
        os.mkfifo(place)
    else:
        folder = name in ("evaluation-last", "inspect")
        place.symlink_to(ground.outside if folder else ground.outside / "precious")
    data = ("--data", str(ground.base / "data.npz"))
    ground.run("evaluate", "run", *data)
    ground.run("inspect", "run")
    ground.run("recalibrate", "run", *data)
    return None


@attack("a run whose data are another's folder, a pipe or a device")
def foreign_data(ground: Ground) -> str | None:
    run = ground.copy("run")
    os.mkfifo(ground.folder / "pipe")
    (ground.folder / "link.npz").symlink_to(ground.outside / "precious")
    places = ("/etc", "/", "/proc", "/dev/zero", "pipe", "link.npz", str(ground.outside), "~", ".")
    place = ground.rng.choice(places)
    edit(run / "recipe.json", lambda recipe: recipe.update(data=place))
    session = ground.run("evaluate", "run")
    return None if session.code == 2 and "--data" in session.text else f"read {place}"


@attack("folders of pictures with links to the folders above and beside them")
def link_loops(ground: Ground) -> str | None:
    rng, root = ground.rng, ground.folder / "pictures"
    for label in ("cat", "dog"):
        folder = root / label
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(pictures(rng)["x_train"][0]).save(folder / f"{i}.png")
        inner = [folder / f"{i}" for i in range(rng.randrange(2, 12))]
        for place in inner:
            place.mkdir()
        for place in inner:
            for i, other in enumerate(inner):
                (place / f"to{i}").symlink_to(rng.choice((other, other, root, folder)))
    ground.run("train", "fast79", "--data", "pictures", "--skip-bad", "--out", "run", *TRAIN)
    return None


# Names -----------------------------------------------------------------------------------------


def called(rng: Random) -> list[str]:
    """Two different names, one of them hostile at least."""
    return [rng.choice(HOSTILE), rng.choice((*HOSTILE, "dog")) + "2"]


@attack("classes called as no font, terminal, shell or page likes it", long=True)
def class_names(ground: Ground) -> str | None:
    rng = ground.rng
    name = rng.choice(
        ("x$(touch pwned).npz", "a'b;touch pwned;.npz", "-data.npz", "$x$.npz", "d.npz")
    )
    names = np.array(called(rng))
    np.savez(ground.folder / "safe.npz", **pictures(rng), class_names=names)
    data = ground.folder / name
    shutil.copy(ground.folder / "safe.npz", data)
    session = ground.run(
        "train", "fast79", f"--data=./{name}", "--out", "run", *TRAIN, PYTHONWARNINGS="error"
    )
    result = ground.folder / "run" / "result.json"
    if session.code == 0:
        pasted(ground, session.text)
    ground.run("evaluate", "run")
    if session.code != 0 or not result.exists():
        return session.problem or f"the training ended with {session.code}: {session.text[-200:]}"
    return None


def pasted(ground: Ground, text: str) -> None:
    """Run the commands that were printed in a shell where normlab does nothing."""
    lines = [line.strip() for line in text.split("\n") if line.strip().startswith("normlab ")]
    script = "normlab() { :; }\n" + "\n".join(lines)
    subprocess.run(["bash", "-c", script], cwd=ground.folder, check=False, capture_output=True)


@attack("layers of a model called so")
def layer_names(ground: Ground) -> str | None:
    import torch
    from safetensors.torch import save_file

    name = ground.rng.choice(HOSTILE).encode("utf-8", "replace").decode()
    values = {
        "weight": torch.ones(3),
        "running_mean": torch.zeros(3),
        "running_var": torch.zeros(3),
    }
    save_file({f"{name}.{k}": v for k, v in values.items()}, ground.folder / "model.safetensors")
    ground.run("doctor", "model.safetensors")
    return None


@attack("a safetensors file of a hundred thousand empty tensors", long=True)
def many_tensors(ground: Ground) -> str | None:
    count = ground.rng.randrange(100_001, 150_000)
    header = {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}
    text = json.dumps(header).encode()
    place = ground.copy("run") / "last.safetensors"
    place.write_bytes(struct.pack("<Q", len(text)) + text)
    ground.run("doctor", "run")
    ground.run("doctor", "run/last.safetensors")
    return None


@attack(
    "a `matplotlibrc` in the current folder that asks for TeX, is no text, or is a pipe", long=True
)
def matplotlibrc(ground: Ground) -> str | None:
    place = ground.folder / "matplotlibrc"
    kind = ground.rng.choice(("tex", "bytes", "pipe"))
    if kind == "tex":
        place.write_text("text.usetex: True\nfont.size: 99\nsvg.fonttype: path\n")
    elif kind == "bytes":
        place.write_bytes(b"\xff\xfe\x00")
    else:
        os.mkfifo(place)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    shutil.copytree(ground.base / "run", ground.folder / "run")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "normlab", "inspect", "run"],
            cwd=ground.folder, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "hangs"
    drawn = (ground.folder / "run" / "inspect" / "figure-1.png").exists()
    good = done.returncode == 0 and drawn and not done.stderr
    return None if good else f"{done.returncode}: {done.stderr[-300:]}"
