"""Training end to end on the shipped sample: same bits, honest scores, clean ends."""

import hashlib
import json
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import normlab
import normlab.training.checkpoint
from normlab.core.environment import digest_of_code
from normlab.core.streams import AHEAD, stream, streams
from normlab.data.augment import to_input
from normlab.data.batches import batch_bounds, split_validation
from normlab.errors import Interrupted
from normlab.evaluation.scores import score
from normlab.models import NotebookNet
from normlab.recipes import Recipe
from normlab.reports.plots import draw_pictures
from normlab.runs import Task, create_folder
from normlab.training.optimisers import Adam
from normlab.training.preparation import make_plan
from normlab.training.progress import Lines
from normlab.training.state import Plan, State, Totals
from normlab.training.step import train_step

pytestmark = pytest.mark.usefixtures("undrawn")

KEYS = """
run recipe norm seed steps test_accuracy test_accuracy_interval test_loss val_accuracy val_loss
train_seconds images_per_second weights_sha256
"""
TINY: dict[str, Any] = {"epochs": 2, "batch_size": 64, "threads": 1}


@pytest.fixture(scope="module")
def sample() -> normlab.ImageData:
    return normlab.load("sample")


def small(images: normlab.ImageData, n: int = 100, **replaced: Any) -> dict[str, Any]:
    """A mapping with the first `n` training and 40 test images."""
    return {
        "x_train": images.x_train[:n],
        "y_train": images.y_train[:n],
        "x_test": images.x_test[:40],
        "y_test": images.y_test[:40],
        "class_names": images.class_names,
        **replaced,
    }


class After:
    """Calls something after a given number of steps."""

    def __init__(self, steps: int, action: Any) -> None:
        self.steps, self.action = steps, action

    def before_training(self, plan: Plan) -> None:
        pass

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        if state.step == self.steps:
            self.action()


def stop_after(steps: int) -> After:
    return After(steps, lambda: os.kill(os.getpid(), signal.SIGTERM))


@pytest.fixture(scope="module")
def run(sample: normlab.ImageData, tmp_path_factory: pytest.TempPathFactory) -> normlab.Run:
    out = tmp_path_factory.mktemp("runs") / "whole"
    return normlab.train("notebook", data=sample, out=out, **TINY)


def test_a_run_is_a_folder_with_these_files(run: normlab.Run) -> None:
    assert sorted(p.name for p in run.path.iterdir()) == [
        "best.safetensors",
        "curves.png",
        "doubt.safetensors",
        "environment.json",
        "history.jsonl",
        "last.safetensors",
        "recipe.json",
        "report.html",
        "result.json",
    ]
    result = run.result
    assert result is not None
    for key in KEYS.split():
        assert key in result
    assert result["steps"] == 2 * 6  # 360 images in batches of 64
    low, high = result["test_accuracy_interval"]
    assert 0 <= low < result["test_accuracy"] < high <= 1
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert run.environment["threads"] == 1


def test_the_reports_fetch_nothing(run: normlab.Run) -> None:
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("data:image/png;base64,") >= 3 + 24


def test_the_scores_are_those_of_the_kept_weights(
    run: normlab.Run, sample: normlab.ImageData
) -> None:
    """Recomputed from the file of weights with nothing of ours but the network."""
    model = run.model()
    with torch.no_grad():
        x = torch.from_numpy(sample.x_test.astype(np.float32) / 255).permute(0, 3, 1, 2)
        probabilities = model(x).double().softmax(1).numpy()
    labels = sample.y_test.astype(int)
    correct = (probabilities.argmax(1) == labels).mean()
    loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    result = run.result
    assert result is not None
    assert result["test_accuracy"] == pytest.approx(correct, abs=1e-12)
    assert result["test_loss"] == pytest.approx(loss, rel=1e-5)
    evaluation = run.evaluate(sample)
    assert evaluation.accuracy == result["test_accuracy"]
    assert evaluation.confusion.sum() == len(labels)
    assert evaluation.confusion.diagonal().sum() == round(correct * len(labels))


def test_runs_show_themselves_in_a_notebook_cell(run: normlab.Run) -> None:
    assert f"{run.result['test_accuracy']:.2%}" in run._repr_html_()
    assert "Test accuracy" in run.evaluate("sample")._repr_html_()


def test_pictures_are_drawn_above_their_captions(sample: normlab.ImageData) -> None:
    fig = draw_pictures(sample.x_test[:5], list("abcde"), columns=3)
    assert len(fig.axes) == 6
    for ax, image, caption in zip(fig.axes, sample.x_test, "abcde", strict=False):
        assert (ax.images[0].get_array() == image).all()
        assert ax.texts[0].get_text() == caption


def test_one_observer_tells_two_trainings(
    run: normlab.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second one's seconds are counted from its own start."""
    lines = Lines()
    plan: Any = SimpleNamespace(epochs=2, describe=lambda: "a training")
    for seconds in (39.0, 6.0):
        lines.before_training(plan)
        state: Any = SimpleNamespace(history=run.history[:1], seconds=seconds)
        lines.after_step(state, 0, 12, 12)
    assert re.findall(r"12/12 - (\S+) - loss", capsys.readouterr().out) == ["39s", "6s"]


def test_the_first_epoch_after_a_resume_tells_its_own_seconds(
    run: normlab.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines()
    plan: Any = SimpleNamespace(epochs=5, describe=lambda: "a training")
    before, row = {**run.history[0], "seconds": 39.0}, {**run.history[0], "seconds": 45.0}
    lines.before_training(plan)
    for step, seconds in ((11, 44.0), (12, 45.0)):
        history = [before, row] if step == 12 else [before]
        state: Any = SimpleNamespace(history=history, seconds=seconds)
        lines.after_step(state, 1, step, 12)
    assert re.findall(r"12/12 - (\S+) - loss", capsys.readouterr().out) == ["6s"]


def test_of_very_many_epochs_a_hundred_are_told(
    run: normlab.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines()
    plan: Any = SimpleNamespace(epochs=1_005, describe=lambda: "a training")
    lines.before_training(plan)
    state: Any = SimpleNamespace(history=run.history[:1], seconds=1.0)
    for epoch in range(1_005):
        lines.after_step(state, epoch, 1, 1)
    told = [int(e) for e in re.findall(r"Epoch (\d+)/1005", capsys.readouterr().out)]
    assert told == [*range(11, 1_005, 11), 1_005]


def test_same_seed_same_bits_other_seed_other_bits(
    run: normlab.Run, sample: normlab.ImageData, tmp_path: Path
) -> None:
    again = normlab.train("notebook", data=sample, out=tmp_path / "a", **TINY)
    other = normlab.train("notebook", data=sample, out=tmp_path / "b", seed=1, **TINY)
    assert again.result["weights_sha256"] == run.result["weights_sha256"]
    assert other.result["weights_sha256"] != run.result["weights_sha256"]
    drop = {"seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in again.history] == [
        {k: v for k, v in row.items() if k not in drop} for row in run.history
    ]


def test_the_order_is_new_each_epoch_and_the_same_each_time() -> None:
    """Seeding Keras freezes the order of the images; here the same seed still reshuffles."""
    orders = [stream(0, "order", epoch).permutation(1000) for epoch in range(3)]
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])
    assert np.array_equal(orders[1], stream(0, "order", 1).permutation(1000))
    assert not np.array_equal(orders[0], stream(1, "order", 0).permutation(1000))


def test_notebook_plain_is_notebook_with_norm_none(
    sample: normlab.ImageData, tmp_path: Path
) -> None:
    data = small(sample)
    one = normlab.train("notebook-plain", data=data, out=tmp_path / "a", **TINY)
    two = normlab.train("notebook", norm="none", data=data, out=tmp_path / "b", **TINY)
    assert one.result["weights_sha256"] == two.result["weights_sha256"]
    assert one.result["norm"] == "none"


@pytest.mark.parametrize("steps", [3, 4, 7])
def test_an_interrupted_run_resumed_ends_with_the_same_bits(
    sample: normlab.ImageData, tmp_path: Path, steps: int
) -> None:
    """Stopped in the middle of an epoch, at its end, and in the next one (4 steps each)."""
    data, options = small(sample, 112), {"epochs": 3, "batch_size": 25, "threads": 1}
    whole = normlab.train("notebook", data=data, out=tmp_path / "whole", **options)
    stop = After(steps, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="SIGINT"):
        normlab.train("notebook", data=data, out=tmp_path / "cut", observers=(stop,), **options)
    assert normlab.open_run(tmp_path / "cut").result is None
    cut = normlab.resume(tmp_path / "cut", data=data)
    timing = {"run", "train_seconds", "images_per_second", "data_seconds", "evaluation_seconds"}
    for key, value in whole.result.items():
        if key not in timing | {"evaluation"}:
            assert cut.result[key] == value, key
    assert [{**r, "seconds": 0} for r in cut.history] == [
        {**r, "seconds": 0} for r in whole.history
    ]
    for name in ("last.safetensors", "best.safetensors"):
        assert _hash(cut.path / name) == _hash(whole.path / name)
    assert not list(cut.path.glob("checkpoint*"))
    with pytest.raises(normlab.UserError, match="finished"):
        normlab.resume(tmp_path / "cut", data=data)


def test_a_second_signal_ends_at_once_and_writes_no_torn_checkpoint(
    sample: normlab.ImageData, tmp_path: Path
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as caught:
        normlab.train(
            "notebook", data=sample, out=tmp_path / "r", observers=(After(2, twice),), **TINY
        )
    assert caught.value.code == 130
    assert not list((tmp_path / "r").glob("*checkpoint*"))


@pytest.mark.usefixtures("drawn")
def test_resume_under_other_data_or_threads_is_refused(
    sample: normlab.ImageData, tmp_path: Path
) -> None:
    data = small(sample)
    stop = stop_after(1)
    with pytest.raises(Interrupted) as caught:
        normlab.train("notebook", data=data, out=tmp_path / "r", observers=(stop,), **TINY)
    assert caught.value.exit_code == 143
    other = small(sample, x_train=255 - sample.x_train[:100])
    with pytest.raises(normlab.UserError, match="data"):
        normlab.resume(tmp_path / "r", data=other)
    environment = json.loads((tmp_path / "r" / "environment.json").read_text())
    amx = environment.pop("amx")  # as in older runs, which had none
    environment |= {"torch": "1.0", "code_sha256": 64 * "0"} | ({} if amx else {"amx": True})
    (tmp_path / "r" / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(normlab.UserError, match=r"torch .*; amx .*; code \(000000000000… then"):
        normlab.resume(tmp_path / "r", data=data)
    assert "later" not in normlab.open_run(tmp_path / "r").environment
    with pytest.raises(Interrupted):
        normlab.resume(tmp_path / "r", data=data, allow_changes=True, observers=(stop_after(2),))
    done = normlab.resume(tmp_path / "r", data=data)  # as it went on, so nothing differs
    assert done.result is not None
    assert done.environment["torch"] == "1.0"
    (later,) = done.environment["later"]
    assert later["step"] == 1
    assert later["torch"] == torch.__version__  # type: ignore[typeddict-item]
    assert later["differs"][0] == f"torch (1.0 then, {torch.__version__} now)"
    assert later["differs"][1] == f"amx ({not amx} then, {amx} now)"
    assert later["differs"][2].startswith("code (000000000000… then, ")
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert f"from step 2 on</th><td>with other torch (1.0 then, {torch.__version__} now)" in page


def test_code_has_a_digest_of_all_that_runs(tmp_path: Path) -> None:
    (tmp_path / "layers").mkdir()
    found = []
    for name in ("a.py", "layers/a.py", "layers/_avx2.so", "layers/a.html"):
        (tmp_path / name).write_text("")
        found.append(digest_of_code(tmp_path))
    (tmp_path / "a.py").write_text("x = 1\n")
    found.append(digest_of_code(tmp_path))
    assert found[2] == found[3]  # a page's template
    assert len(set(found)) == 4
    assert found[-1] == digest_of_code(tmp_path)


def test_what_no_step_is_left_of_is_not_told(sample: normlab.ImageData, tmp_path: Path) -> None:
    """A run goes on elsewhere, is killed before a checkpoint, and is taken back."""
    data, folder = small(sample), tmp_path / "r"
    with pytest.raises(Interrupted):
        normlab.train("notebook", data=data, out=folder, observers=(stop_after(2),), **TINY)
    path = folder / "environment.json"
    begun = json.loads(path.read_text())
    elsewhere = {"step": 2, "differs": ["torch (… then, 1.0 now)"], **begun, "torch": "1.0"}
    elsewhere["data_sha256"] = normlab.open_run(folder).task.data_sha256
    path.write_text(json.dumps({**begun, "later": [elsewhere]}))
    with pytest.raises(normlab.UserError, match=r"ran with other torch \(1\.0 then"):
        normlab.resume(folder, data=data)
    normlab.resume(folder, data=data, allow_changes=True)
    assert json.loads(path.read_text()) == {**begun, "later": []}


def test_resume_never_takes_data_that_the_network_is_not_made_for(
    sample: normlab.ImageData, tmp_path: Path
) -> None:
    data = small(sample)
    stop = stop_after(1)
    with pytest.raises(Interrupted):
        normlab.train("notebook", data=data, out=tmp_path / "r", observers=(stop,), **TINY)
    classes = (*sample.class_names[:-1], "zebra")
    other = small(sample, class_names=classes)
    with pytest.raises(normlab.UserError, match=r"has other classes .*zebra"):
        normlab.resume(tmp_path / "r", data=other, allow_changes=True)
    assert list((tmp_path / "r").glob("checkpoint*"))


def test_a_run_that_another_process_ends_meanwhile_is_left_alone(
    sample: normlab.ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = small(sample), tmp_path / "r"
    stop = stop_after(1)
    with pytest.raises(Interrupted):
        normlab.train("notebook", data=data, out=folder, observers=(stop,), **TINY)
    load = Task.load

    def ended(task: Task, given: Any) -> normlab.ImageData:
        monkeypatch.setattr(Task, "load", load)
        normlab.resume(folder, data=data)  # it ends while the other loads its data
        return task.load(given)

    monkeypatch.setattr(Task, "load", ended)
    with pytest.raises(normlab.UserError, match="finished"):
        normlab.resume(folder, data=data)
    result = normlab.open_run(folder).result
    assert result is not None
    assert result["length"]["epochs"] == len(normlab.open_run(folder).history)


def test_weights_from_within_an_epoch_have_their_own_validation_score(
    sample: normlab.ImageData, tmp_path: Path
) -> None:
    class Ends:
        def before_training(self, plan: Plan) -> None: ...

        def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
            if state.step == 5:
                state.ending = 5, 6  # as `Deadline` does

    data = small(sample, 112)
    options = {"epochs": 3, "batch_size": 25, "threads": 1}
    run = normlab.train("notebook", data=data, out=tmp_path / "r", observers=(Ends(),), **options)
    assert run.result is not None
    assert run.result["steps"] == 6
    held_out = make_plan(run.task, run.task.load(data), 1).validation
    found = score(run.model("last"), held_out.images, held_out.labels)
    assert run.result["val_loss"] == found.loss != run.history[-1]["val_loss"]


def test_a_reservation_of_a_killed_process_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / ".0001").mkdir(parents=True)
    assert create_folder(None, "fast79").name == "0002-fast79"
    assert create_folder(None, "fast79").name == "0003-fast79"


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_test_set_is_seen_by_nothing_before_the_end(
    sample: normlab.ImageData, tmp_path: Path
) -> None:
    """With the test labels shuffled, weights, stopping and the best epoch stay the same."""
    shuffled = np.random.default_rng(0).permutation(sample.y_test[:40])
    options = {**TINY, "epochs": 30, "patience": 2, "batch_size": 32}
    noise = np.random.default_rng(0).integers(0, 10, 100)  # which is soon learnt by heart
    np.savez(tmp_path / "true.npz", **small(sample, y_train=noise))
    np.savez(tmp_path / "shuffled.npz", **small(sample, y_train=noise, y_test=shuffled))
    one = normlab.train("notebook", data=tmp_path / "true.npz", out=tmp_path / "a", **options)
    two = normlab.train("notebook", data=tmp_path / "shuffled.npz", out=tmp_path / "b", **options)
    assert 3 <= len(one.history) < 30  # it was stopped early
    assert one.result["weights_sha256"] == two.result["weights_sha256"]
    assert _hash(one.path / "best.safetensors") == _hash(two.path / "best.safetensors")
    assert [{**r, "seconds": 0} for r in one.history] == [{**r, "seconds": 0} for r in two.history]
    assert one.result["test_loss"] != two.result["test_loss"]


@pytest.mark.usefixtures("drawn")
def test_patience_ends_the_training_after_the_best_epoch(
    sample: normlab.ImageData, tmp_path: Path
) -> None:
    data = small(sample, y_train=np.random.default_rng(0).integers(0, 10, 100))
    options = {**TINY, "epochs": 30, "patience": 2, "batch_size": 32}
    run = normlab.train("notebook", data=data, out=tmp_path / "a", **options)
    losses = [row["val_loss"] for row in run.history]
    waited = int(np.argmin(losses)) + 2  # then the rate falls to 0, over an epoch at least
    assert waited + 1 <= len(losses) - 1 < 30
    assert run.evaluate(data, weights="best").loss != run.evaluate(data, weights="last").loss


def test_a_huge_learning_rate_stops_at_the_first_non_finite_step(
    sample: normlab.ImageData, tmp_path: Path
) -> None:
    with pytest.raises(normlab.NonFiniteError, match=r"step \d+ of epoch \d+.*learning-rate") as e:
        normlab.train("notebook-plain", data=sample, out=tmp_path / "a", learning_rate=1e30, **TINY)
    assert e.value.exit_code == 3
    assert not (tmp_path / "a" / "result.json").exists()
    assert not (tmp_path / "a" / "last.safetensors").exists()


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_rate_of_1e10_overwrites_no_good_weights(
    sample: normlab.ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    """With a good epoch behind it, and a checkpoint after every step."""
    monkeypatch.setattr(normlab.training.checkpoint, "SECONDS_BETWEEN", 0.0)
    good: dict[str, str] = {}

    class Explode(After):
        def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
            if (epoch, batch) == (1, 2):
                files = [tmp_path / "r" / f"{name}.safetensors" for name in ("best", "checkpoint")]
                good.update({path.name: _hash(path) for path in files})
                weights = next(state.model.parameters())
                with torch.no_grad():  # what an update at such a rate can leave behind
                    weights.fill_(float("inf"))

    with pytest.raises(normlab.NonFiniteError, match="step 3 of epoch 2"):
        normlab.train(
            "notebook", norm=norm, data=small(sample, 80), out=tmp_path / "r", epochs=3,
            batch_size=24, threads=1, observers=(Explode(0, None),),
        )  # fmt: skip
    assert {name: _hash(tmp_path / "r" / name) for name in good} == good
    with pytest.raises(normlab.NonFiniteError, match=r"epoch \d: .* than 1e\+10"):
        normlab.train(
            "notebook", norm=norm, data=small(sample, 80), out=tmp_path / "s", epochs=3,
            batch_size=24, threads=1, learning_rate=1e10,
        )  # fmt: skip
    assert not list((tmp_path / "s").glob("[bl]*.safetensors"))


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    ("n", "options"),
    [
        (33, {"batch_size": 16, "validation": 0}),  # one more than a multiple of the batch
        (1, {"norm": "none", "validation": 0}),
        (2, {"validation": 0}),
        (50, {"one_class": True}),
        (50, {"constant": True}),
    ],
)
def test_odd_data_sets_train_to_an_end(
    sample: normlab.ImageData, tmp_path: Path, n: int, options: dict[str, Any]
) -> None:
    options = dict(options)
    data = small(sample, n)
    if options.pop("one_class", n < 3):
        data |= {"y_train": np.zeros(n, int), "y_test": np.zeros(40, int), "class_names": ["a"]}
    if options.pop("constant", False):
        data["x_train"] = np.full_like(data["x_train"], 7)
    run = normlab.train("notebook", data=data, out=tmp_path / "r", **{**TINY, **options})
    assert run.result is not None
    assert math.isfinite(run.result["test_loss"])


def test_a_step_with_a_non_finite_loss_leaves_the_weights() -> None:
    model = NotebookNet(norm="none")
    optimizer = Adam(list(model.parameters()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.full((2, 3, 32, 32), float("nan"))
    with pytest.raises(normlab.NonFiniteError):
        train_step(model, optimizer, x, torch.tensor([0, 1]), stream(0, "dropout", 0))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("n", "size", "expected"),
    [
        (7, 3, [(0, 3), (3, 7)]),
        (6, 3, [(0, 3), (3, 6)]),
        (8, 3, [(0, 3), (3, 6), (6, 8)]),
        (1, 3, [(0, 1)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_a_last_batch_of_one_joins_the_one_before(
    n: int, size: int, expected: list[tuple[int, int]]
) -> None:
    assert batch_bounds(n, size, join_single=True) == expected


def test_joining_is_said(sample: normlab.ImageData, tmp_path: Path) -> None:
    def describe(n: int) -> str:
        train, validation = split_validation(sample.x_train[:n], sample.y_train[:n], 0)
        return Plan(
            recipe=Recipe(name="x", batch_size=8),
            folder=tmp_path,
            seed=0,
            threads=1,
            train=train,
            validation=validation,
        ).describe()

    assert "joins the one before" in describe(17)
    assert "joins" not in describe(18)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"batch_size": 1}, "no variance"),
        ({"n": 1, "validation": 0}, "no variance"),
        ({"n": 5, "validation": 1e-17}, "is none"),
        ({"height": 16}, "square"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_folder_is_made(
    sample: normlab.ImageData, tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    changes = dict(changes)
    n, height = changes.pop("n", 50), changes.pop("height", 32)
    data = small(sample, n, x_train=sample.x_train[:n, :height], x_test=sample.x_test[:40, :height])
    with pytest.raises(normlab.UserError, match=word):
        normlab.train("notebook", data=data, out=tmp_path / "a", **(TINY | changes))
    assert not (tmp_path / "a").exists()


def test_keras_split_and_number_of_steps() -> None:
    images = np.zeros((50_000, 1, 1, 3), np.uint8)
    train, validation = split_validation(images, np.arange(50_000), 0.1)
    assert len(train) == 45_000
    assert validation.labels[0] == 45_000  # the last ones, before any shuffling
    assert len(batch_bounds(len(train), 32, join_single=True)) == 1_407


def test_pixels_are_scaled_as_in_the_notebook() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    x = to_input(images)
    assert x.shape == (1, 3, 16, 16)
    assert x.is_contiguous(memory_format=torch.channels_last)
    expected = images.astype("float32")
    expected /= 255
    np.testing.assert_array_equal(x.permute(0, 2, 3, 1).numpy(), expected)


def test_totals_are_means_over_images() -> None:
    totals = Totals()
    totals.add(1.0, 3, 4)
    totals.add(4.0, 2, 2)
    assert totals.mean_loss == pytest.approx((1.0 * 4 + 4.0 * 2) / 6)
    assert totals.accuracy == pytest.approx(5 / 6)


def test_dropout_masks_are_exact_unbiased_and_from_the_given_generator() -> None:
    from normlab.layers import Dropout

    layer = Dropout(0.2)
    x = torch.ones(64, 16, 30, 30)
    y = layer(x, stream(0, "dropout", 0))
    assert torch.equal(y, layer(x, stream(0, "dropout", 0)))
    assert not torch.equal(y, layer(x, stream(0, "dropout", 1)))
    realised = round(0.2 * 2**16) / 2**16
    share = (y == 0).double().mean().item()
    assert abs(share - realised) < 5 * math.sqrt(realised * (1 - realised) / y.numel())
    torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / (1 - realised)]))
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(last, stream(0, "dropout", 0)), y)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("field", ["epochs", "batch_size", "learning_rate", "patience"])
def test_recipes_refuse_values_out_of_range(field: str) -> None:
    with pytest.raises(normlab.UserError, match=rf"{field}=0"):
        Recipe(name="x").override(**{field: 0})


def test_unknown_recipe_settings_fail() -> None:
    from normlab import recipes

    with pytest.raises(normlab.UserError, match=r"lerning_rate.*learning_rate"):
        recipes.get("notebook").override(lerning_rate=1)
    for name in recipes.RECIPES:
        recipe = recipes.get(name)
        assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe


def test_streams_made_many_at_a_time_are_those_made_alone() -> None:
    numbers = range(5, 5 + 2 * AHEAD + 3)
    drawn = [rng.integers(1 << 63) for rng in streams(3, "dropout", numbers=numbers)]
    assert drawn == [stream(3, "dropout", n).integers(1 << 63) for n in numbers]
