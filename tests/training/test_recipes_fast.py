"""The fast recipes: their parts against oracles, and that they train, resume and learn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import normlab
from normlab import kernels, recipes
from normlab.core.streams import stream
from normlab.data.augment import Augmentation, halve, mirror, shift, views_of
from normlab.errors import Interrupted
from normlab.evaluation.forward import logits_of
from normlab.models import FastNet
from normlab.models.fast import Whitening, covariance, patches_of
from normlab.recipes import fast79, notebook
from normlab.reports.plots import plot_curve
from normlab.training.optimisers import Muon, make_optimizer, orthogonalize, set_rate
from normlab.training.step import train_step
from stopping import StopAfter

pytestmark = pytest.mark.usefixtures("undrawn")

SHORT: dict[str, Any] = {"data": "sample", "threads": 1, "epochs": 2, "batch_size": 100}


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(stream(seed, "pixels").random(shape)).float()


def test_learns_the_sample(in_tmp: Path) -> None:
    run = normlab.train("fast79", data="sample", threads=1, epochs=10)
    assert run.result is not None
    assert run.result["test_accuracy"] > 0.2  # chance 0.1, 4.7 standard errors away
    assert run.history[-1]["loss"] < run.history[0]["loss"]


def test_same_seed_same_bits_and_another_seed_others(in_tmp: Path) -> None:
    hashes = [normlab.train("fast79", seed=s, **SHORT).result["weights_sha256"] for s in (3, 3, 4)]  # type: ignore[index]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_resumed_within_an_epoch_ends_with_the_same_bits(in_tmp: Path, norm: str) -> None:
    changes = {"norm": norm, "shift": 2, **SHORT}
    whole = normlab.train("fast79", **changes)
    for step in (1, 3, 6):  # before and after the change of size, and in the second epoch
        with pytest.raises(Interrupted):
            normlab.train("fast79", out=f"cut-{step}", observers=(StopAfter(step),), **changes)
        resumed = normlab.resume(f"cut-{step}")
        assert whole.result is not None
        assert resumed.result is not None
        assert resumed.result["weights_sha256"] == whole.result["weights_sha256"]


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(("size", "classes"), [(64, 3), (33, 2), (16, 12)])
def test_other_sizes_and_numbers_of_classes(in_tmp: Path, size: int, classes: int) -> None:
    rng = stream(0, "pictures")
    data = {
        "x_train": rng.integers(0, 256, (40, size, size, 3), dtype=np.uint8),
        "y_train": np.arange(40) % classes,
        "x_test": rng.integers(0, 256, (12, size, size, 3), dtype=np.uint8),
        "y_test": np.arange(12) % classes,
    }
    run = normlab.train("fast79", data=data, threads=1, epochs=1)
    assert run.evaluate(data, views="shift").probabilities.shape == (12, classes)


def test_too_small_images_are_refused() -> None:
    with pytest.raises(normlab.UserError, match="image size 15"):
        FastNet(image_size=15)


def test_twins_share_their_initial_values() -> None:
    batch, none = FastNet(seed=5).state_dict(), FastNet(seed=5, norm="none").state_dict()
    shared = [name for name in batch if name in none]
    assert sum("conv.weight" in name for name in shared) == 4
    assert all(torch.equal(batch[name], none[name]) for name in shared)
    other = FastNet(seed=6).state_dict()
    assert not torch.equal(
        batch["blocks.0.conv.weight"][-1], other["blocks.0.conv.weight"][-1]
    ) or (not torch.equal(batch["blocks.1.conv.weight"][-1], other["blocks.1.conv.weight"][-1]))


def test_first_filters_pass_their_input_on() -> None:
    block = FastNet().blocks[1]
    x = pixels(2, 16, 8, 8)
    torch.testing.assert_close(block.conv(x)[:, :16], x)


def test_whitened_patches_have_identity_covariance() -> None:
    rough = pixels(50, 3, 16, 16)
    x = (rough + rough.roll(1, 2) + rough.roll(1, 3) + rough.mean(1, keepdim=True)) / 4
    whitening = Whitening(12)
    whitening.fit(x, eps=0.0)
    patches = patches_of(x - x.mean((0, 2, 3)).view(3, 1, 1))
    white = (patches @ whitening.kernel[:12].flatten(1).T).double()
    centred = white - white.mean(0)
    covariance = centred.T @ centred / len(centred)
    torch.testing.assert_close(covariance, torch.eye(12).double(), atol=2e-3, rtol=0)
    inside = whitening(x)[:, :12, 1:-1, 1:-1].permute(0, 2, 3, 1)  # where nothing is padded
    plain = white.relu().float().reshape(50, 14, 14, 12)
    torch.testing.assert_close(inside, plain, atol=1e-4, rtol=0)
    assert torch.equal(whitening.kernel[12:], -whitening.kernel[:12])


def test_whitening_of_constant_images_is_finite() -> None:
    network = FastNet(image_size=16)
    network.fit_to(np.full((10, 16, 16, 3), 7, np.uint8))
    assert network(torch.full((4, 3, 16, 16), 7 / 255)).isfinite().all()


def test_mirror_and_shift_against_numpy() -> None:
    x = pixels(4, 3, 6, 6)
    flags = torch.tensor([True, False, True, False])
    mirrored = mirror(x, flags).numpy()
    for i, image in enumerate(x.numpy()):
        np.testing.assert_array_equal(mirrored[i], image[:, :, ::-1] if flags[i] else image)
    by = torch.tensor([[0, 0], [2, -1], [-2, 2], [1, 1]])
    moved = shift(x, by, 2).numpy()
    for i, image in enumerate(x.numpy()):
        padded = np.pad(image, [(0, 0), (2, 2), (2, 2)], mode="reflect")
        down, right = by[i].tolist()
        expected = padded[:, 2 - down : 8 - down, 2 - right : 8 - right]
        np.testing.assert_array_equal(moved[i], expected)


def test_halve_is_the_mean_of_two_by_two() -> None:
    x = pixels(2, 3, 8, 6)
    expected = x.reshape(2, 3, 4, 2, 3, 2).mean((3, 5))
    torch.testing.assert_close(halve(x), expected)


def test_two_epochs_show_every_image_both_ways() -> None:
    first, second, third = (
        Augmentation.draw(0, epoch, 1000, recipes.Augmentation(flip=True, shift=2))
        for epoch in range(3)
    )
    assert first.mirrored is not None
    assert second.mirrored is not None
    assert third.mirrored is not None
    np.testing.assert_array_equal(first.mirrored, ~second.mirrored)
    np.testing.assert_array_equal(first.mirrored, third.mirrored)
    assert 400 < first.mirrored.sum() < 600
    assert first.shifts is not None
    assert second.shifts is not None
    assert {*first.shifts.ravel()} == {-2, -1, 0, 1, 2}
    assert not np.array_equal(first.shifts, second.shifts)


def test_views() -> None:
    x = pixels(2, 3, 8, 8)
    assert [len(views_of(x, v)) for v in ("single", "flip", "shift")] == [1, 2, 6]
    with pytest.raises(normlab.UserError, match="choose one of single, flip, shift"):
        views_of(x, "many")


def test_the_unmoved_pair_weighs_as_much_as_the_moved_four() -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.rand(4, 3, 8, 8)
    unmoved, mirrored, *moved = (logits_of(network, view) for view in views_of(x, "shift"))
    expected = (unmoved + mirrored) / 4 + sum(moved) / 8
    torch.testing.assert_close(logits_of(network, x, views="shift"), expected)
    torch.testing.assert_close(logits_of(network, x, views="flip"), (unmoved + mirrored) / 2)


def test_only_the_least_sure_quarter_is_seen_again() -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.rand(40, 3, 8, 8)
    single, shifted, unsure = (
        logits_of(network, x, views=v) for v in ("single", "shift", "unsure")
    )
    again = single.softmax(1).amax(1).argsort()[:10]
    torch.testing.assert_close(unsure[again], shifted[again])
    others = torch.ones(40, dtype=torch.bool)
    others[again] = False
    assert torch.equal(unsure[others], single[others])
    pictures = (x.permute(0, 2, 3, 1) * 255).byte().numpy()
    assert logits_of(network, pictures, views="unsure").shape == (40, 5)
    assert logits_of(network, x[:1], views="unsure").shape == (1, 5)  # a quarter of one is none


def test_set_rate_follows_the_triangle() -> None:
    optimizer = make_optimizer(fast79().optimizer, FastNet())
    whole = [group["lr"] for group in optimizer.param_groups]
    assert [fast79().schedule.share(t) for t in (0.0, 0.23, 1.0)] == pytest.approx([0.2, 1.0, 0.07])
    for _ in range(2):  # the share is of the first rate, not of the last one
        set_rate(optimizer, fast79().schedule.share(0.115))
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.6 * r for r in whole])


def test_dense_weights_and_biases_follow_torch_sgd() -> None:
    ours, theirs = ([torch.nn.Parameter(pixels(5, 4)), torch.nn.Parameter(pixels(4))] for _ in "ab")
    muon = Muon(ours, sgd_rate=0.1, sgd_momentum=0.8, weight_decay=0.02)
    sgd = torch.optim.SGD(
        [
            {"params": theirs[:1], "lr": 0.1, "weight_decay": 0.02},
            {"params": theirs[1:], "lr": 0.8, "weight_decay": 0.0025},
        ],
        momentum=0.8,
        nesterov=True,
    )
    for step in range(5):
        for parameters in (ours, theirs):
            for p in parameters:
                p.grad = pixels(*p.shape, seed=step) - 0.5
        muon.step()
        sgd.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_the_iterations_are_those_of_newton_and_schulz(iterations: int) -> None:
    """As the formula has them, one after the other; also where singular values span 1e4."""
    a, b, c = 3.4445, -4.7750, 2.0315
    matrix = (pixels(24, 90).double() - 0.5) * torch.logspace(0, -4, 90, dtype=torch.float64)
    x = matrix / matrix.norm()
    for _ in range(iterations):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    torch.testing.assert_close(orthogonalize(matrix, iterations), x, rtol=1e-6, atol=1e-6)
    found = orthogonalize(matrix.float(), iterations)
    assert (found - x).norm() < 1e-4 * x.norm()


@pytest.mark.parametrize("shape", [(128, 300), (300, 128)])
def test_products_of_bfloat16_change_a_step_by_a_hundredth(shape: tuple[int, int]) -> None:
    matrix = pixels(*shape) - 0.5
    exact, rounded = orthogonalize(matrix), orthogonalize(matrix, bfloat16=True)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.02 * exact.norm()
    assert torch.equal(rounded, exact) is not kernels.has_bfloat16()
    few = pixels(64, 300) - 0.5
    assert torch.equal(orthogonalize(few, bfloat16=True), orthogonalize(few))


def test_the_covariance_of_patches_is_that_of_numpy() -> None:
    x = pixels(70, 3, 9, 8)
    x -= x.mean((0, 2, 3), keepdim=True)
    expected = np.cov(patches_of(x).double().numpy(), rowvar=False, bias=True)
    np.testing.assert_allclose(covariance(x).numpy(), expected, atol=1e-8)


def test_muon_turns_kernels_of_unit_filters() -> None:
    matrix = pixels(16, 40) - 0.5
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    assert values[0] / values[-1] > 3
    orthogonal = orthogonalize(matrix, iterations=5)
    found = torch.linalg.svdvals(orthogonal)
    assert 0.5 < found.min() < found.max() < 1.5
    assert (left.T @ orthogonal @ right.T).trace() > 0.95 * found.sum()  # the same directions
    torch.testing.assert_close(orthogonalize(matrix.T), orthogonalize(matrix).T)
    kernel = torch.nn.Parameter(pixels(16, 4, 3, 3))
    start = kernel.detach() * 4 / kernel.detach().norm()
    kernel.grad = pixels(16, 4, 3, 3, seed=1)
    Muon([kernel], learning_rate=0.1).step()
    step = (start - kernel.detach()).flatten(1) / 0.1
    assert torch.linalg.svdvals(step).max() < 1.5


def test_label_smoothing_is_in_the_loss() -> None:
    model, x, labels = FastNet(), pixels(8, 3, 32, 32), torch.arange(8)
    model.fit_to((pixels(20, 32, 32, 3) * 255).byte().numpy())
    log_p = torch.log_softmax(model(x).detach(), 1)
    expected = -(0.8 * log_p[torch.arange(8), labels] + 0.2 * log_p.mean(1)).mean()
    optimizer = make_optimizer(fast79().optimizer, model)
    loss, _ = train_step(model, optimizer, x, labels, stream(0, "dropout"), 0.2)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_bad_settings_are_refused_by_name() -> None:
    for bad in (
        {"optimizer": "sgdd"},
        {"schedule": "cosine"},
        {"label_smoothing": 1.0},
        {"half_size": 1.5},
        {"shift": -1},
        {"sgd_rate": 0.0},
    ):
        with pytest.raises(normlab.UserError, match=next(iter(bad))):
            notebook().override(**bad)


def test_few_epochs_are_noted_part_by_part(in_tmp: Path) -> None:
    run = normlab.train("fast79", data="sample", threads=1, epochs=2, batch_size=10)
    for row in run.history:
        shares, losses, accuracies = np.array(row["parts"]).T
        np.testing.assert_allclose(shares, np.arange(1, 21) / 20)
        np.testing.assert_allclose(losses.mean(), row["loss"])  # parts of 20 images each
        np.testing.assert_allclose(accuracies.mean(), row["accuracy"])
    line = plot_curve(Figure().subplots(), run.history, "loss").lines[0]
    assert list(line.get_xdata()) == [
        e + p[0] for e, r in enumerate(run.history) for p in r["parts"]
    ]
    many = normlab.train("fast79", data="sample", threads=1, epochs=5, batch_size=100)
    assert "parts" not in many.history[0]
