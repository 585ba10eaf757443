"""What happens around the steps: scores of the weights that are kept, stopping, repair, crops."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

import normlab
from normlab.data.augment import Augmentation, cover, crop, recolour
from normlab.data.batches import Split, balanced_order, split_images
from normlab.evaluation.recalibration import renew_stale
from normlab.evaluation.scores import clearly_better, score
from normlab.recipes import get
from normlab.recipes.schedules import Constant, ToZero, Triangle
from normlab.study.outcomes import train_one
from normlab.training.hooks import Patience, first_low, make_hooks
from normlab.training.preparation import check_network, make_plan, new_state
from normlab.training.state import StepResult

SHORT: dict[str, Any] = {"data": "sample", "threads": 1}


def test_with_an_average_everything_scores_the_average(tmp_path: Path) -> None:
    """Three-way scores, and a study's checks in the midst of an epoch."""
    run = normlab.train("notebook", ema=0.9, epochs=2, three_way=True, out=tmp_path / "r", **SHORT)
    images = normlab.load("sample")
    train, held_out = split_images(images, 0.1)
    last = run.history[-1]
    own = normlab.three_way(
        run.model(), held_out.images, held_out.labels, population=train.images, batch_size=32
    )
    assert last["val_loss"] == pytest.approx(own.running.loss, rel=1e-6)
    assert last["val_loss_batch"] == pytest.approx(own.batch.loss, rel=1e-6)  # type: ignore[typeddict-item]

    def curve(ema: float) -> list[float]:
        task = run.task.__class__(**{**vars(run.task), "recipe": get("notebook").override(
            epochs=1, ema=ema
        )})  # fmt: skip
        return [a for _, a in train_one(task, images, arm="a", seed=0, checks=4).curve]

    averaged, plain = curve(0.999), curve(0.0)
    assert len(averaged) == 4
    assert averaged != plain


def test_patience_cools_down_and_keeps_the_best_weights_if_clearly_better(
    tmp_path: Path,
) -> None:
    rates: list[float] = []

    class Rates:
        def before_training(self, plan: Any) -> None: ...

        def after_step(self, state: Any, *_: int) -> None:
            rates.append(state.optimizer.param_groups[0]["lr"])

    run = normlab.train(
        "notebook", patience=2, epochs=200, learning_rate=0.01, out=tmp_path / "r",
        observers=(Rates(),), **SHORT,
    )  # fmt: skip
    assert run.result is not None
    epochs = len(run.history)
    losses = [row["val_loss"] for row in run.history]
    best = int(np.argmin(losses))
    assert epochs < 200
    assert rates[0] == 0.01
    assert rates[-1] < 0.2 * rates[0]
    assert rates == sorted(rates, reverse=True)
    _, held_out = split_images(normlab.load("sample"), 0.1)
    found = score(run.model("best"), held_out.images, held_out.labels)
    assert found.loss == pytest.approx(losses[best], rel=1e-6)
    assert run.evaluate().weights == run.kept
    if run.kept != "recalibrated":
        better = clearly_better(run.model("best"), run.model("last"), held_out)
        assert run.kept == ("best" if better else "last")


class Answers(torch.nn.Module):
    """Answers with given logits (N, 2), whatever the N images are."""

    def __init__(self, margins: np.ndarray) -> None:
        super().__init__()
        self.logits = torch.from_numpy(np.stack([margins, -margins], 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(x)]


@pytest.mark.parametrize(
    ("luck", "expected"),
    [(lambda i: 0.3, True), (lambda i: 0.0, False), (lambda i: 4.0 * (i == 0) - 0.1, False)],
    ids=["everywhere", "nowhere", "one image"],
)
def test_best_weights_are_kept_only_if_the_held_out_images_tell_them_apart(
    luck: Any, expected: bool
) -> None:
    n = 24
    other = np.linspace(-1, 1, n)
    best = other + np.array([luck(i) for i in range(n)])
    held_out = Split(np.zeros((n, 8, 8, 3), np.uint8), np.zeros(n, np.int64))
    losses = [np.log1p(np.exp(-2 * margins)) for margins in (other, best)]
    gain = losses[0] - losses[1]
    assert (gain.mean() > gain.std(ddof=1) / np.sqrt(n)) == expected
    assert clearly_better(Answers(best), Answers(other), held_out) == expected
    assert not clearly_better(Answers(other), Answers(best), held_out)


@pytest.mark.parametrize("kind", [Constant, ToZero, Triangle])
@pytest.mark.parametrize("steps", [1, 7, 1500])
def test_patience_counts_from_where_the_rate_is_half(kind: Any, steps: int) -> None:
    schedule = kind()
    first = first_low(schedule, steps)
    if kind is Constant:
        assert first == 0
    else:
        assert all(schedule.share(step / steps) <= 0.5 for step in range(first, steps + 1))
        assert first == 0 or schedule.share((first - 1) / steps) > 0.5


def test_few_held_out_images_end_no_training() -> None:
    images = normlab.load("sample")

    def hooks(validation: float) -> list[type]:
        task = normlab.runs.Task(
            recipe=get("notebook").override(patience=1, validation=validation), seed=0,
            data="sample", data_sha256=images.sha256, class_names=images.class_names, image_size=32,
        )  # fmt: skip
        return [type(hook) for hook in make_hooks(make_plan(task, images, 1))]

    assert Patience in hooks(0.025)  # 10 of 400
    assert Patience not in hooks(0.0225)


def test_a_resumed_cool_down_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings = {"patience": 1, "epochs": 60, "learning_rate": 0.02, **SHORT}

    class Stop:
        def before_training(self, plan: Any) -> None: ...

        def after_step(self, state: Any, *_: int) -> None:
            if state.ending is not None and state.step > state.ending[0] + 3:
                raise normlab.training.loop.Interrupted(15)

    whole = normlab.train("notebook", out=tmp_path / "whole", **settings)
    with pytest.raises(normlab.training.loop.Interrupted):
        normlab.train("notebook", out=tmp_path / "cut", observers=(Stop(),), **settings)
    resumed = normlab.resume(tmp_path / "cut")
    assert whole.result is not None
    assert resumed.result is not None
    assert resumed.result["weights_sha256"] == whole.result["weights_sha256"]


def test_patience_waits_for_the_schedules_own_end_where_it_is_near() -> None:
    images = normlab.load("sample")
    task = normlab.runs.Task(
        recipe=get("notebook").override(epochs=3, patience=1), seed=0, data="sample",
        data_sha256=images.sha256, class_names=images.class_names, image_size=32,
    )  # fmt: skip
    plan = make_plan(task, images, 1)
    state = new_state(task, images, torch.device("cpu"))
    hook = Patience(1)
    hook.before_training(plan, state)
    state.step, state.best_epoch, state.history = 24, 1, [{"epoch": 1}, {"epoch": 2}]
    hook.after_step(state, StepResult(1, 12, 12, 0.0, 0, 1))
    assert state.ending is None
    assert not state.stopped


def test_stale_statistics_are_renewed_and_good_ones_left_alone() -> None:
    images = normlab.load("sample")
    train, _ = split_images(images, 0.25)
    task = normlab.runs.Task(
        recipe=get("notebook").override(validation=0.25), seed=0, data="sample",
        data_sha256=images.sha256, class_names=images.class_names, image_size=32,
    )  # fmt: skip
    model = task.build()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x = torch.from_numpy(train.images).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(train.labels)
    model.train()
    for step in range(15):
        rng = np.random.default_rng(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x, rng), labels).backward()
        optimizer.step()
    for layer in model.modules():
        if isinstance(layer, normlab.BatchNorm):
            layer.running_mean.fill_(0.7)
            layer.running_var.fill_(30.0)
    held = Split(train.images[:100], train.labels[:100])  # which it knows: scores far apart
    repair = renew_stale(model, train.images, held)
    assert repair is not None
    assert repair.after.accuracy > repair.before.accuracy + 0.02
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert renew_stale(model, train.images, held) is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("recipe", "changes", "size", "message"),
    [
        ("notebook", {"half_size": 0.5}, 32, "half_size=0.5: the network 'notebook'"),
        ("fast79", {}, 15, "at least 16 × 16"),
        ("notebook", {"norm": "instance"}, 32, "InstanceNorm"),
    ],
)
def test_what_a_step_could_not_do_is_refused_before(
    recipe: str, changes: dict[str, Any], size: int, message: str
) -> None:
    task = normlab.runs.Task(
        recipe=get(recipe).override(**changes), seed=0, data="", data_sha256="",
        class_names=("a", "b"), image_size=size,
    )  # fmt: skip
    with pytest.raises(normlab.UserError, match=message):
        check_network(task)


def test_a_crop_shows_its_part() -> None:
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    parts = torch.tensor([[1.0, 0.3, 0.9], [0.5, 0.0, 0.0], [0.5, 1.0, 1.0]])
    seen = crop(x, parts)
    torch.testing.assert_close(seen[0], x[0], atol=1e-5, rtol=1e-5)
    for index, corner in ((1, x[1:2, :, :8, :8]), (2, x[2:3, :, 8:, 8:])):
        expected = interpolate(corner, (16, 16), mode="bilinear", align_corners=False)[0]
        inner = slice(2, -2)  # at the part's edge the crop sees what lies beyond it
        torch.testing.assert_close(
            seen[index][:, inner, inner], expected[:, inner, inner], atol=1e-5, rtol=1e-5
        )


def test_colours_change_as_their_factors_say() -> None:
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2
    factors = torch.tensor([[1.0, 1, 1], [1.2, 1, 1], [1, 0.5, 1], [1, 1, 0.0]])
    seen = recolour(x, factors)
    torch.testing.assert_close(seen[0], x[0])
    torch.testing.assert_close(seen[1], x[1] * 1.2)
    assert seen[2].std() < 0.6 * x[2].std()
    torch.testing.assert_close(seen[3], x[3].mean(0, keepdim=True).expand(3, 8, 8))


def test_a_square_is_covered_with_the_mean_colour_also_where_it_lies_half_outside() -> None:
    x = torch.rand(3, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    seen = cover(x, torch.tensor([[0.5, 0.5], [0.0, 0.999], [0.99, 0.0]]), 5)
    squares = slice(6, 11), slice(4, 9)
    corners = (slice(0, 3), slice(9, 12)), (slice(13, 16), slice(0, 3))
    for before, after, (rows, columns) in zip(x, seen, (squares, *corners), strict=True):
        expected = before.clone()
        expected[:, rows, columns] = before.mean((1, 2))[:, None, None]
        torch.testing.assert_close(after, expected)


def test_the_covered_square_is_drawn_anew_in_every_epoch() -> None:
    settings = get("fast95").augmentation
    first, second = (Augmentation.draw(3, epoch, 200, settings) for epoch in (0, 1))
    images = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    x = first(images, np.arange(100, 150))
    plain = replace(first, covers=None)(images, np.arange(100, 150))
    changed = (x != plain).any(1).sum((1, 2))
    assert changed.max() == 64
    assert changed.min() >= 16  # a quarter at least: the middle is a pixel of the image
    assert torch.equal(x, first(images, np.arange(200))[100:150])
    assert first.covers is not None
    assert second.covers is not None
    assert not np.array_equal(first.covers, second.covers)


def test_sampling_shows_rare_classes_more_often_and_no_image_much_more_than_another() -> None:
    counts = np.array([400, 100, 25, 0, 1])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), counts))
    order = balanced_order(labels, seed=3, epoch=0)
    assert len(order) == len(labels)
    shown = np.bincount(labels[order], minlength=5)
    expected = np.sqrt(counts) / np.sqrt(counts).sum() * len(labels)
    assert np.abs(shown - expected).max() <= 1
    for label in (0, 1, 2):
        times = np.bincount(order, minlength=len(labels))[labels == label]
        assert times.max() - times.min() <= 1
    assert not np.array_equal(order, balanced_order(labels, seed=3, epoch=1))
    assert np.array_equal(order, balanced_order(labels, seed=3, epoch=0))


def test_a_plan_that_samples_weighs_nothing_and_shows_what_it_should() -> None:
    images = normlab.load("sample")
    few = np.flatnonzero((images.y_train != 3) | (np.arange(400) % 8 == 0))
    rare = replace(
        images, x_train=images.x_train[few], y_train=images.y_train[few], files_train=None
    )
    task = normlab.runs.Task(
        recipe=get("notebook").override(balance="sampling", validation=0.0, batch_size=50), seed=0,
        data="sample", data_sha256=rare.sha256, class_names=rare.class_names, image_size=32,
    )  # fmt: skip
    plan = make_plan(task, rare, 1)
    assert plan.class_weights() is None
    batches = plan.batches()
    labels = torch.cat([batches(step)[1] for step in range(len(plan.bounds))]).numpy()
    shown, had = np.bincount(labels), np.bincount(rare.y_train)
    assert shown[3] > 1.5 * had[3]
    assert shown.sum() == had.sum()
