"""Studies that are really run: what is shared in a pair, what survives, what repeats."""

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import normlab
from normlab.__main__ import run as command
from normlab.data import ImageData, load
from normlab.data.batches import hold_out
from normlab.errors import Interrupted, UserError
from normlab.recipes import get
from normlab.runs import Task
from normlab.study import runner
from normlab.study.arms import Arm
from normlab.study.outcomes import Outcome, train_one
from normlab.study.result import Study
from normlab.study.runner import Pool, run_all
from normlab.study.training import Job
from normlab.training.state import Plan, State

pytestmark = pytest.mark.timeout(900)  # processes that load PyTorch: slow on a busy machine
TINY: dict[str, Any] = {"epochs": 1, "batch_size": 16, "checks": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 training and 50 test images of 8×8 pixels whose brightness tells the class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 250)
    images = (labels[:, None, None, None] * 50 + rng.integers(0, 60, (250, 8, 8, 3))).astype("u1")
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(
        path, x_train=images[:200], y_train=labels[:200], x_test=images[200:], y_test=labels[200:]
    )
    return path


def make_task(images: ImageData, seed: int = 0, **changes: Any) -> Task:
    recipe = get("notebook").override(epochs=1, batch_size=16).override(**changes)
    return Task(
        recipe=recipe,
        seed=seed,
        data=images.name,
        data_sha256=images.sha256,
        class_names=images.class_names,
        image_size=8,
    )


def figures(study: Study) -> dict[str, tuple[Any, ...]]:
    """All that must repeat, by run; times and machines may differ."""
    return {
        f"{o.arm} {o.seed}": (
            *(o.weights_sha256, o.test_accuracy, o.test_loss, o.test_correct, o.diverged),
            *(o.curve, o.area, o.steps_to, o.steps),
        )
        for o in study.outcomes
    }


class Recorder:
    """Observes the order of the images through the running totals, and dropout through a probe."""

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []
        self.draws: list[float] = []

    def before_training(self, plan: Plan) -> None:
        self.model: torch.nn.Module | None = None

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        if self.model is None:
            self.model = state.model
            state.model.register_forward_pre_hook(self.note)

    def note(self, _: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        self.inputs.append(arguments[0].clone())
        if len(arguments) > 1 and arguments[1] is not None:
            rng = arguments[1]
            position = rng.bit_generator.state
            self.draws.append(float(rng.random()))
            rng.bit_generator.state = position


def test_a_pair_shares_initial_values_order_of_images_and_dropout_streams(tiny: Path) -> None:
    images = load(tiny)
    recorders = {"batch": Recorder(), "none": Recorder(), "layer": Recorder()}
    kernels = {}
    for norm, recorder in recorders.items():
        task = make_task(images, norm=norm)
        state = task.build().state_dict()
        kernels[norm] = {k: state[k] for k in state if k.startswith(("conv", "hidden", "output"))}
        train_one(task, images, arm=norm, seed=0, observers=(recorder,))
    first = recorders["batch"]
    assert len(first.draws) > 5
    for norm in ("none", "layer"):
        assert kernels[norm].keys() == kernels["batch"].keys()
        for name, kernel in kernels[norm].items():
            assert torch.equal(kernel, kernels["batch"][name])
        assert recorders[norm].draws == first.draws
        for ours, theirs in zip(recorders[norm].inputs, first.inputs, strict=True):
            assert torch.equal(ours, theirs)


def test_an_arm_of_other_seeds_shares_nothing(tiny: Path) -> None:
    images = load(tiny)
    shared, other = (train_one(make_task(images, s), images, arm="a", seed=0) for s in (0, 1000))
    assert shared.weights_sha256 != other.weights_sha256


def test_checks_of_the_validation_accuracy_change_nothing(tiny: Path) -> None:
    images = load(tiny)
    often, once = (
        train_one(make_task(images, epochs=2), images, arm="a", seed=0, checks=checks)
        for checks in (8, 1)
    )
    assert often.weights_sha256 == once.weights_sha256
    assert [step for step, _ in often.curve] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert [step for step, _ in once.curve] == [12, 24]
    assert often.curve[3::4] == once.curve
    assert often.area == pytest.approx(np.mean([accuracy for _, accuracy in often.curve]))


def test_a_diverged_run_is_scored_at_chance_with_its_reason(tiny: Path) -> None:
    images = load(tiny)
    task = make_task(images, norm="none", learning_rate=1e30)
    outcome = train_one(task, images, arm="wild", seed=0, thresholds=(0.01,))
    assert outcome.diverged is not None
    assert outcome.diverged.startswith("the loss is ")
    assert outcome.test_accuracy == 1 / 4
    assert outcome.test_loss == math.log(4)
    assert outcome.steps_to == {"0.01": None}
    assert outcome.area == 1 / 4


def test_the_number_of_jobs_changes_nothing_and_a_run_is_what_train_gives(
    tiny: Path, in_tmp: Path
) -> None:
    arms = ["batch", "none: norm=none, learning_rate=1e-2"]
    one = normlab.compare("notebook", arms=arms, seeds=2, data=tiny, out="one", jobs=1, **TINY)
    two = normlab.compare("notebook", arms=arms, seeds=2, data=tiny, out="two", jobs=2, **TINY)
    assert figures(one) == figures(two)
    assert len(figures(one)) == 4
    held = hold_out(normlab.load(tiny), 0.2)  # own data: a study decides without the test images
    arrays = {name: getattr(held, name) for name in ("x_train", "y_train", "x_test", "y_test")}
    run = normlab.train(
        "notebook", norm="none", epochs=1, batch_size=16, learning_rate=1e-2, seed=1, data=arrays,
        out="run", threads=1,
    )  # fmt: skip
    outcome = one.arm("none")[1]
    assert run.result is not None
    assert outcome.weights_sha256 == run.result["weights_sha256"]
    assert outcome.test_accuracy == run.result["test_accuracy"]
    assert outcome.test_loss == pytest.approx(run.result["test_loss"], rel=1e-12)
    right = outcome.correct(len(held.y_test))
    assert right.mean() == outcome.test_accuracy
    assert (in_tmp / "one" / "report.html").exists()

    more = normlab.compare("notebook", arms=arms, seeds=3, data=tiny, out="one", jobs=1, **TINY)
    assert len(more.outcomes) == 6
    assert {k: v for k, v in figures(more).items() if not k.endswith("2")} == figures(one)
    with pytest.raises(
        UserError, match=r"begun with other epochs \(1 then, 2 now\): choose another"
    ):
        normlab.compare("notebook", arms=arms, data=tiny, out="one", **{**TINY, "epochs": 2})
    with pytest.raises(UserError, match="holds no study: choose a new one"):
        normlab.compare("notebook", arms=arms, data=tiny, out="run", **TINY)


def test_an_arm_against_itself_on_the_sample_scores_the_same(in_tmp: Path) -> None:
    study = normlab.compare(
        "notebook",
        arms=[Arm("a", {"norm": "batch"}), Arm("b", {"norm": "batch"})],
        seeds=1,
        epochs=1,
        batch_size=180,
        data="sample",
        jobs=2,
    )
    assert study.path == Path("studies/notebook-a-b")
    assert "a and b scored the same in every pair" in study.comparisons[0].sentence
    assert study.outcomes[0].weights_sha256 == study.outcomes[1].weights_sha256


def test_each_arm_is_tuned_on_validation_images_before_the_study(tiny: Path, in_tmp: Path) -> None:
    def study() -> Study:
        return normlab.compare(
            "notebook", seeds=1, data=tiny, out="s", tune="learning_rate=1e-6,3", jobs=2, **TINY
        )

    first = study()
    tuning = first.design.tuning
    assert tuning is not None
    assert set(tuning.chosen) == {"batch", "none"}
    for arm, scores in tuning.scores.items():
        assert tuning.chosen[arm] == tuning.factors[scores.index(max(scores))]
        rate = first.arm(arm)[0].task["recipe"]["optimizer"]["learning_rate"]
        assert rate == pytest.approx(1e-3 * tuning.chosen[arm])
    trials = [json.loads(p.read_text()) for p in (in_tmp / "s" / "tuning").glob("*.json")]
    assert len(trials) == 2 * 2 * 2
    assert all(t["test_accuracy"] is None and t["task"]["seed"] >= 10**9 for t in trials)
    (in_tmp / "s" / "runs" / "batch-seed-0.json").unlink()
    assert figures(study()) == figures(first)


class Lethal(str):
    """A name that kills whichever process unpickles it."""

    def __reduce__(self) -> Any:
        return eval, ("__import__('os').kill(__import__('os').getpid(), 9)",)


class Notes:
    """Reports to lists."""

    def __init__(self) -> None:
        self.kept: list[Outcome] = []
        self.repeats: list[tuple[str, str]] = []

    def keep(self, outcome: Outcome) -> Outcome:
        self.kept.append(outcome)
        return outcome

    def __enter__(self) -> "Notes":
        return self

    def __exit__(self, *_: object) -> None: ...

    def finished(self, job: Job, outcome: Outcome, in_flight: int) -> None: ...

    def repeated(self, job: Job, reason: str) -> None:
        self.repeats.append((job.name, reason))

    def given_up(self, job: Job, reason: str) -> None: ...


def test_a_run_that_kills_its_worker_is_repeated_then_given_up_and_no_other(tiny: Path) -> None:
    images = load(tiny)
    notes = Notes()
    jobs = [
        Job(arm=arm, seed=seed, task=make_task(images, seed), data=str(tiny), threads=1,
            thresholds=(), checks=1, test=True)
        for seed, arm in enumerate(["batch", Lethal("lethal"), "batch", "batch"])
    ]  # fmt: skip
    given_up = run_all(jobs, Pool(jobs=2), notes.keep, notes)
    assert list(given_up) == ["lethal seed 1"]
    assert given_up["lethal seed 1"].startswith("its worker died")
    assert sorted(o.seed for o in notes.kept) == [0, 2, 3]
    assert [name for name, _ in notes.repeats].count("lethal seed 1") == 2


class FakePool:
    """In place of a `Pool`: its generator starts the runs, waits for each, and ends the workers.

    A signal comes at each of `moments`; `log` has what happened.
    """

    jobs = 1

    def __init__(self, moments: tuple[str, ...], scheduler: str | None) -> None:
        self.moments, self.scheduler = moments, scheduler
        self.killed = False
        self.log: list[str] = []

    def at(self, moment: str) -> None:
        if moment in self.moments:
            signal.raise_signal(signal.SIGINT)
        self.log.append(moment)

    def kill(self) -> None:
        self.killed = True

    @contextlib.contextmanager
    def parallel(self, alone: bool) -> Iterator[Any]:
        yield self.start, 1

    def start(self, calls: Iterator[Any]) -> Iterator[Any]:
        names = [arguments[0].name for _, arguments, _ in calls]
        self.at("started")
        return self.results(names)

    def results(self, names: list[str]) -> Iterator[Any]:
        try:
            for name in names:
                self.at("waited")
                if self.killed:
                    raise BrokenExecutor
                yield name, "failed"
        finally:
            self.at("ended")


@pytest.mark.parametrize(
    ("moments", "scheduler", "log"),
    [
        (("started",), None, ["started", "waited", "ended"]),
        (("waited",), None, ["started", "waited", "ended"]),
        (("waited", "ended"), None, ["started", "waited", "ended"]),
        (("told",), None, ["started", "waited", "told", "ended"]),
        (("started",), "tcp://x", ["started"]),
        (("waited", "ended"), "tcp://x", ["started", "ended"]),
        (("told",), "tcp://x", ["started", "waited", "told", "ended"]),
    ],
)
def test_a_signal_is_never_raised_in_the_midst_of_joblib(
    moments: tuple[str, ...],
    scheduler: str | None,
    log: list[str],
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It left half a worker there, and ended in a traceback of joblib's."""
    pool, notes = FakePool(moments, scheduler), Notes()
    monkeypatch.setattr(runner, "_kill_workers", pool.kill)
    monkeypatch.setattr(notes, "repeated", lambda *_: pool.at("told"))
    job = Job(arm="a", seed=0, task=make_task(load(tiny)), data=str(tiny), threads=1,
              thresholds=(), checks=1, test=True)  # fmt: skip
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="SIGINT"):
        run_all([job], pool, notes.keep, notes)  # type: ignore[arg-type]
    assert pool.log == log
    assert signal.getsignal(signal.SIGINT) is before


def test_a_failure_in_a_worker_is_told_and_given_up(tiny: Path) -> None:
    task = replace(make_task(load(tiny)), data_sha256="0" * 64)
    job = Job(
        arm="a", seed=0, task=task, data=str(tiny), threads=1, thresholds=(), checks=1, test=True
    )
    notes = Notes()
    given_up = run_all([job], Pool(jobs=1), notes.keep, notes)
    assert "are others here than where the study was begun" in given_up["a seed 0"]
    assert len(notes.repeats) == 2


SMALL: dict[str, Any] = {"epochs": 2, "batch_size": 16, "seeds": 4}
COMPARE = ["notebook", "--arms", "batch,none", "--epochs", "2", "--batch-size", "16"]
COMPARE += ["--seeds", "4"]
PATIENCE = 240.0  # seconds; a busy machine takes long to start processes


@contextlib.contextmanager
def process(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A process of its own group; whatever of it is left in the end is ended."""
    child = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def wait_for_runs(folder: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(list((folder / "runs").glob("*.json"))) < count:
        assert time.monotonic() < deadline, "no run was finished in time"
        time.sleep(0.02)


def workers_of(pid: int) -> list[int]:
    """Loky's workers among the children of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = [int(c) for c in children if b"popen_loky" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return sorted(found)


@pytest.fixture(scope="module")
def uninterrupted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole") / "s"
    return figures(normlab.compare("notebook", data=tiny, out=folder, jobs=2, **SMALL))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers through /proc")
def test_a_study_survives_its_own_death_that_of_a_worker_and_ctrl_c(
    tiny: Path, in_tmp: Path, uninterrupted: dict[str, Any]
) -> None:
    command = ["normlab", "compare", *COMPARE, "--data", str(tiny), "--out", "s", "--jobs", "2"]
    with process(*command) as study:  # killed: the workers end by themselves
        wait_for_runs(in_tmp / "s", 1)
        workers = workers_of(study.pid)
        assert workers
        study.kill()
        study.wait()
        deadline = time.monotonic() + PATIENCE
        while any(Path(f"/proc/{w}/cmdline").exists() for w in workers):
            assert time.monotonic() < deadline, "workers outlive their study"
            time.sleep(0.05)
    kept = len(list((in_tmp / "s" / "runs").glob("*.json")))
    assert 1 <= kept < 8

    with process(*command) as study:  # a worker is killed: its run is done again; then Ctrl-C
        deadline = time.monotonic() + PATIENCE
        while not (workers := workers_of(study.pid)):
            assert time.monotonic() < deadline, "no worker came up"
            time.sleep(0.02)
        os.kill(workers[0], signal.SIGKILL)
        wait_for_runs(in_tmp / "s", kept + 1)
        os.kill(study.pid, signal.SIGINT)
        output, _ = study.communicate(timeout=PATIENCE)
    assert study.returncode == 130, output
    assert "a worker died while it was under way" in output
    assert "it is done again" in output
    assert "the same command goes on from there" in output.splitlines()[-1]
    assert "Traceback" not in output, output
    assert len(list((in_tmp / "s" / "runs").glob("*.json"))) < 8

    whole = normlab.compare("notebook", data=tiny, out="s", jobs=2, **SMALL)
    assert figures(whole) == uninterrupted


def test_runs_go_to_the_workers_of_a_dask_scheduler(
    tiny: Path, in_tmp: Path, uninterrupted: dict[str, Any]
) -> None:
    pytest.importorskip("distributed", reason="needs the extra `cluster`")
    where = in_tmp / "scheduler.json"
    scheduler = ["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    worker = ["distributed.cli.dask_worker", "--scheduler-file", str(where), "--nthreads", "1"]
    worker += ["--no-nanny", "--no-dashboard", "--host", "127.0.0.1"]
    with (
        process(*scheduler, "--no-dashboard", "--scheduler-file", str(where)),
        process(*worker) as mortal,
        process(*worker),
    ):
        deadline = time.monotonic() + PATIENCE
        while not where.exists() or not where.read_text():
            assert time.monotonic() < deadline, "the scheduler did not come up"
            time.sleep(0.05)
        address = json.loads(where.read_text())["address"]
        wait_for_workers(address, 2)
        command = ["normlab", "compare", *COMPARE, "--data", str(tiny), "--out", "s"]
        with process(*command, "--scheduler", address) as study:
            wait_for_runs(in_tmp / "s", 1)
            mortal.kill()
            output, _ = study.communicate(timeout=2 * PATIENCE)
        assert study.returncode == 0, output
    assert figures(normlab.open_study("s")) == uninterrupted


def wait_for_workers(address: str, count: int) -> None:
    from distributed import Client

    with Client(address, timeout=f"{PATIENCE}s", set_as_default=False) as client:
        client.wait_for_workers(count, timeout=PATIENCE)


def test_a_scheduler_that_does_not_answer_is_named(tiny: Path, in_tmp: Path) -> None:
    pytest.importorskip("distributed", reason="needs the extra `cluster`")
    with pytest.raises(UserError, match=r"scheduler 'tcp://127\.0\.0\.1:9' does not answer"):
        normlab.compare("notebook", data=tiny, out="s", scheduler="tcp://127.0.0.1:9", **TINY)


def test_a_study_on_own_pictures(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        Path("pets", label).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(f"pets/{label}/{i}.png")
    Path("pets/cat/broken.png").write_bytes(b"no picture")
    words = [
        "compare",
        "fast79",
        "--seeds",
        "1",
        "--data",
        "pets",
        "--image-size",
        "16",
        "--jobs",
        "1",
        "--out",
        "s",
    ]
    assert command(words) == 2
    assert "broken.png" in capsys.readouterr().err
    assert command([*words, "--skip-bad"]) == 0
    again = capsys.readouterr().out.split("Again: normlab ")[1].strip()
    assert "--image-size 16 --skip-bad" in again
    assert command(shlex.split(again)) == 0
    assert "Verdict: " in capsys.readouterr().out
