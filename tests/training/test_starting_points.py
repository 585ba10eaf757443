"""Starting from a run: what is taken over, what may move, and what is refused."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn.functional import cross_entropy

import normlab
from normlab.cli import cli
from normlab.core.tensors import read_tensors, write_tensors
from normlab.data.augment import to_input
from normlab.data.batches import split_validation
from normlab.errors import DataError, Interrupted
from normlab.runs import Run
from normlab.training.preparation import make_plan, new_state
from normlab.training.starting_points import begin
from stopping import StopAfter

pytestmark = pytest.mark.usefixtures("undrawn")

TINY: dict[str, Any] = {"epochs": 2, "batch_size": 32, "threads": 1}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def part(first: int, last: int, names: list[int] | None = None) -> dict[str, Any]:
    """Classes `first` to `last` of the sample, numbered anew; `names` puts them in that order.

    Fewer than 200 pictures, so that no training looks for copies among them first.
    """
    sample = normlab.load("sample")
    order = names or list(range(first, last + 1))
    found: dict[str, Any] = {"class_names": tuple(sample.class_names[i] for i in order)}
    for kind in ("train", "test"):
        x, y = getattr(sample, f"x_{kind}"), getattr(sample, f"y_{kind}")
        chosen = np.flatnonzero(np.isin(y, order))[: 144 if kind == "train" else 50]
        found[f"x_{kind}"] = x[chosen]
        found[f"y_{kind}"] = np.array([order.index(label) for label in y[chosen]], np.uint8)
    return found


OLD, NEW = part(0, 4), part(5, 9)


@pytest.fixture(scope="module", params=["fast79", "notebook"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("sources") / request.param
    return normlab.train(request.param, data=OLD, out=out, **TINY)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return normlab.train("fast79", data=OLD, out=tmp_path_factory.mktemp("fast") / "r", **TINY)


def states(source: Run, run: Run) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """The body, key by key: before and after."""
    before, after = source.model().state_dict(), run.model().state_dict()
    assert before.keys() == after.keys()
    return [(k, t, after[k]) for k, t in before.items() if not k.startswith("output.")]


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("statistics", ["keep", "adapt", "recalibrate"])
def test_what_may_move_moves_and_the_rest_keeps_its_bits(
    source: Run, tmp_path: Path, freeze: bool, statistics: str
) -> None:
    run = normlab.train(
        data=NEW, out=tmp_path / "r", start=source, freeze=freeze, statistics=statistics, **TINY
    )
    network = run.task.recipe.model  # what products are made of is the new training's own
    assert replace(network, products=source.task.recipe.model.products) == source.task.recipe.model
    assert run.task.class_names == NEW["class_names"]
    affine = {f"{n}.{p}" for n in _normalizers(run) for p in ("weight", "bias")}
    for key, before, after in states(source, run):
        same = torch.equal(before, after)
        if key.split(".")[-1] in STATISTICS:
            counted = key.endswith("num_batches_tracked")
            kept = statistics == "keep" or (statistics == "recalibrate" and counted)
            assert same == kept, key
        elif key.startswith("whitening"):
            assert same, key
        elif key in affine:
            assert same == (freeze or statistics != "adapt"), key
        else:
            assert same == freeze, key
    amiss = {"frozen-but-updating"} if freeze and statistics == "adapt" else set()
    assert all(found == amiss for found in examined(run, source))


def _normalizers(run: Run) -> list[str]:
    return [n for n, m in run.model().named_modules() if isinstance(m, normlab.BatchNorm)]


def test_a_frozen_body_is_run_with_its_running_statistics_while_the_head_learns(
    fast: Run, tmp_path: Path
) -> None:
    """Against the head trained by hand on what the source, in evaluation mode, makes of images."""
    run = normlab.train(
        data=NEW, out=tmp_path / "r", start=fast, freeze=True, optimizer="sgd", half_size=0.25,
        **TINY,
    )  # fmt: skip
    images = normlab.load(NEW)
    plan = make_plan(run.task, images, 1)
    body = fast.model()
    body.output = torch.nn.Identity()
    head = run.task.build().output.weight.detach().requires_grad_()
    cpu = torch.device("cpu")
    batches, schedule = plan.batches(cpu), plan.recipe.schedule
    for step in range(plan.steps):
        x, labels = batches(step)
        with torch.no_grad():
            features = body(x)
        loss = cross_entropy(features @ head.T, labels, label_smoothing=0.1)
        (g,) = torch.autograd.grad(loss, head)
        with torch.no_grad():
            head -= plan.recipe.optimizer.learning_rate * schedule.share(step / plan.steps) * g
    torch.testing.assert_close(run.model().output.weight, head, atol=1e-6, rtol=1e-5)


def test_recalibrated_statistics_are_those_of_the_training_images(
    tmp_path: Path, source: Run
) -> None:
    """The first layer that sees pixels: against NumPy, validation images left out."""
    if source.task.recipe.model.name != "notebook":
        pytest.skip("the fast network's first normaliser sees no pixels")
    run = normlab.train(
        data=NEW, out=tmp_path / "r", start=source, statistics="recalibrate", **TINY
    )
    train, _ = split_validation(NEW["x_train"], NEW["y_train"], 0.1)
    pixels = train.images.astype(np.float64).reshape(-1, 3) / 255
    layer = run.model().batch_normalization
    np.testing.assert_allclose(layer.running_mean, pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer.running_var, pixels.var(0), rtol=1e-5)


def test_a_new_head_is_the_seeds_and_the_same_classes_keep_theirs_by_name(
    source: Run, tmp_path: Path
) -> None:
    new = normlab.train(data=NEW, out=tmp_path / "new", start=source, seed=3, **TINY)
    assert new.task.start is not None
    assert new.task.start.head == "new"
    fresh = new.task.build().state_dict()
    _, begun = begin(source, new.task, normlab.load(NEW))
    for key, value in begun.items():
        if key.startswith("output."):
            assert torch.equal(value, fresh[key])
    order = part(0, 4, [3, 0, 4, 1, 2])
    kept = normlab.train(data=order, out=tmp_path / "kept", start=source, **TINY)
    assert kept.task.start is not None
    assert kept.task.start.head == "kept"
    model = kept.task.build().eval()
    model.load_state_dict(begin(source, kept.task, normlab.load(order))[1])
    x = to_input(OLD["x_test"])
    with torch.no_grad():
        ours, theirs = model(x), source.model()(x)
    torch.testing.assert_close(ours, theirs[:, [3, 0, 4, 1, 2]], atol=1e-6, rtol=1e-6)


def test_weights_that_changed_since_they_were_planned_with_are_refused(
    fast: Run, tmp_path: Path
) -> None:
    """The runs of a study open their source anew, each in a process, perhaps days apart."""
    run = normlab.train(data=NEW, out=tmp_path / "r", start=fast, **TINY)
    other = normlab.train("fast79", data=OLD, out=tmp_path / "other", seed=1, **TINY)
    with pytest.raises(DataError, match=r"other are others than when a training from them"):
        begin(other, run.task, normlab.load(NEW))


@pytest.mark.usefixtures("drawn")
def test_the_start_is_part_of_what_the_run_is(fast: Run, tmp_path: Path) -> None:
    run = normlab.train(data=NEW, out=tmp_path / "r", start=fast.path, freeze=True, **TINY)
    written = json.loads((run.path / "recipe.json").read_text())["start"]
    assert written == {
        "run": str(fast.path),
        "weights_sha256": fast.result["weights_sha256"],
        "head": "new",
        "freeze": True,
        "statistics": "keep",
    }
    assert normlab.open_run(run.path).task == run.task
    assert not (run.path / "start.safetensors").exists()
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "body frozen, statistics kept, output layer new" in page
    assert "--freeze --statistics keep" in page
    plain = normlab.train("fast79", data=NEW, out=tmp_path / "plain", **TINY)
    assert "start" not in json.loads((plain.path / "recipe.json").read_text())


@pytest.mark.parametrize("checkpoint", [True, False])
def test_resumed_it_ends_with_the_same_bits_and_needs_its_source_no_more(
    fast: Run, tmp_path: Path, checkpoint: bool
) -> None:
    """From a checkpoint, and from the very start where there is none."""
    source = shutil.copytree(fast.path, tmp_path / "source")
    options = {**TINY, "statistics": "recalibrate", "data": NEW, "start": source}
    whole = normlab.train(out=tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        normlab.train(out=tmp_path / "cut", observers=(StopAfter(3),), **options)
    shutil.rmtree(source)
    if not checkpoint:
        for path in (tmp_path / "cut").glob("checkpoint*"):
            path.unlink()
    cut = normlab.resume(tmp_path / "cut", data=NEW)
    assert cut.result["weights_sha256"] == whole.result["weights_sha256"]
    assert cut.task == whole.task


def test_a_resumed_frozen_body_stays_frozen(fast: Run, tmp_path: Path) -> None:
    options = {**TINY, "data": NEW, "start": fast, "freeze": True}
    with pytest.raises(Interrupted):
        normlab.train(out=tmp_path / "cut", observers=(StopAfter(3),), **options)
    cut = normlab.resume(tmp_path / "cut", data=NEW)
    assert all(torch.equal(before, after) for _, before, after in states(fast, cut))


def test_resuming_under_another_start_is_refused(fast: Run, tmp_path: Path) -> None:
    def interrupted(name: str, **options: Any) -> Path:
        with pytest.raises(Interrupted):
            normlab.train(
                data=NEW, start=fast, out=tmp_path / name, observers=(StopAfter(1),), **options,
                **TINY,
            )  # fmt: skip
        return tmp_path / name

    one, other = interrupted("one"), interrupted("other", freeze=True)
    shutil.copy(other / "start.safetensors", one)
    with pytest.raises(normlab.UserError, match="another start"):
        normlab.resume(one, data=NEW)
    (one / "start.safetensors").unlink()
    with pytest.raises(normlab.UserError, match="does not exist"):
        normlab.resume(one, data=NEW)
    words = ["train", "--resume", str(other), "--from", str(fast.path)]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2
    assert "--from cannot be combined with --resume" in result.output


def test_what_does_not_fit_is_refused_by_name(fast: Run, tmp_path: Path, in_tmp: Path) -> None:
    def refused(match: str, recipe: str | None = None, start: Any = fast, **options: Any) -> None:
        with pytest.raises(normlab.UserError, match=match):
            normlab.train(recipe, start=start, **{"data": NEW, "out": "x", **TINY, **options})
        assert not Path("x").exists()

    refused("'notebook' trains the network 'notebook', run .* holds 'fast'", "notebook")
    refused("norm='none': run .* has 'batch'", norm="none")
    refused("norm_position='after': run .* has None", norm_position="after")
    refused("model|network", model="notebook")
    refused("statistics='freeze': choose one of keep, adapt, recalibrate", statistics="freeze")
    refused("nowhere is no run's folder, no file of weights", start="nowhere")
    refused("freeze=True: .*--from", "fast79", None, freeze=True)
    refused("statistics='keep': .*--from", "fast79", None, statistics="keep")
    plain = normlab.train("notebook", norm="none", data=OLD, out="plain", **TINY)
    refused("no batch normalisation", start=plain, statistics="keep")
    large = {k: v.repeat(2, 1).repeat(2, 2) if k[0] == "x" else v for k, v in NEW.items()}
    refused("64 × 64 pixels: the network of run .* is for 32 × 32", start=plain, data=large)
    assert normlab.train(data=large, out="large", start=fast, **TINY).result  # of any size
    with pytest.raises(Interrupted):
        normlab.train("fast79", data=OLD, out="unfinished", observers=(StopAfter(1),), **TINY)
    refused("unfinished", start="unfinished")
    damaged = shutil.copytree(fast.path, "damaged")
    weights = Path(damaged) / "last.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    refused("last.safetensors is not a whole", start=damaged)
    tensors, _ = read_tensors(fast.path / "last.safetensors")
    write_tensors(weights, {k: t for k, t in tensors.items() if "block" not in k})
    refused("does not fit the recipe beside it", start=damaged)


def test_a_network_without_batch_normalisation_can_be_started_from(in_tmp: Path) -> None:
    plain = normlab.train("notebook", norm="none", data=OLD, out="plain", **TINY)
    run = normlab.train("notebook", data=NEW, start=plain, freeze=True, out="r", **TINY)
    assert (
        run.task.recipe.norm.name == "none"
    )  # the source's, where the recipe alone says otherwise
    assert all(torch.equal(before, after) for _, before, after in states(plain, run))


def examined(run: Run, source: Run) -> Iterator[set[str]]:
    """What the doctor says of freezing: on the network as it is trained, and on the run."""
    rules, images = {"frozen-but-updating", "learning-but-frozen"}, normlab.load(NEW)
    _, weights = begin(source, run.task, images)
    live = new_state(run.task, images, torch.device("cpu"), weights).model.train()
    for diagnosis in (normlab.doctor(live), normlab.doctor(run)):
        assert rules <= set(diagnosis.checked)
        yield {f.rule for f in diagnosis.findings} & rules


def test_from_the_command_line(fast: Run, in_tmp: Path) -> None:
    np.savez("new.npz", **{k: np.asarray(v) for k, v in NEW.items()})
    words = [
        "train", "fast79", "--data", "new.npz", "--from", str(fast.path), "--freeze", "--threads",
        "1", "--epochs", "3", "--validation", "0.2", "--three-way", "--record", "--out", "r",
    ]  # fmt: skip
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert f"Start: run {fast.path}: body frozen, statistics kept, output layer new" in done.output
    assert "normlab train --data new.npz    # the recipe for own pictures" in done.output
    row = json.loads(Path("r/history.jsonl").read_text().splitlines()[0])
    assert row["val_loss_batch"] == row["val_loss"] == row["val_loss_population"]  # all fixed
    assert Path("r/recording.npz").exists()
    done = CliRunner().invoke(cli, ["inspect", "r"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(cli, ["train", "notebook", "--from", str(fast.path)])
    assert done.exit_code != 0
    assert "'notebook' trains the network 'notebook'" in str(done.exception)
