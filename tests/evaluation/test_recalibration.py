"""Population statistics against their definition, and three scores that leave no trace."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normlab
from networks import pictures, settle
from normlab.__main__ import run as command
from normlab.core.tensors import read_tensors
from normlab.errors import UserError
from normlab.evaluation.forward import logits_of, mixed, normalizers, untouched
from normlab.evaluation.population import Moments, pool, population_moments, set_statistics
from normlab.evaluation.scores import three_way
from normlab.models import NotebookNet


@pytest.fixture(scope="module")
def sample() -> normlab.ImageData:
    return normlab.load("sample")


def definition(model: NotebookNet, x: np.ndarray, sizes: list[int]) -> dict[str, tuple]:
    """Pooled moments of the notebook's network, in float64 and from the formulas alone.

    A second implementation: no layer of the model is called, only its weights are used.
    """
    w = {k: v.double() for k, v in model.state_dict().items()}
    seen: dict[str, list[torch.Tensor]] = {}

    def bn(name: str, h: torch.Tensor) -> torch.Tensor:
        seen.setdefault(name, []).append(h)
        dims = [d for d in range(h.ndim) if d != 1]
        view = (1, -1, *[1] * (h.ndim - 2))
        var, mean = torch.var_mean(h, dims, correction=0)
        scaled = (h - mean.view(view)) / (var.view(view) + 1e-3).sqrt()
        return scaled * w[f"{name}.weight"].view(view) + w[f"{name}.bias"].view(view)

    def conv(name: str, h: torch.Tensor, padding: int) -> torch.Tensor:
        return nn.functional.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], padding=padding)

    def pooled(h: torch.Tensor) -> torch.Tensor:
        return nn.functional.max_pool2d(h.relu(), 2)

    start = 0
    for size in sizes:
        h = torch.from_numpy(x[start : start + size]).double().permute(0, 3, 1, 2) / 255
        start += size
        h = conv("conv1", bn("batch_normalization", h), 0).relu()
        h = pooled(conv("conv2", bn("batch_normalization_1", h), 1))
        h = pooled(conv("conv3", bn("batch_normalization_2", h), 1))
        h = bn("batch_normalization_3", h.permute(0, 2, 3, 1).flatten(1))
        h = (h @ w["hidden.weight"].T + w["hidden.bias"]).relu()
        bn("batch_normalization_4", h)
    found = {}
    for name, parts in seen.items():
        values = torch.cat([p.movedim(1, -1).reshape(-1, p.shape[1]) for p in parts])
        found[name] = (values.mean(0), values.var(0, correction=0), len(values))
    return found


def test_population_moments_are_those_of_all_values_pooled(sample: normlab.ImageData) -> None:
    model = NotebookNet(seed=3).train()
    images = sample.x_train[:24]
    found = population_moments(model, images, batch_size=10)
    expected = definition(model, images[mixed(24)], [10, 10, 4])
    assert found.keys() == expected.keys()
    for name, (mean, var, count) in expected.items():
        assert found[name].count == count
        torch.testing.assert_close(found[name].mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].var, var, rtol=1e-4, atol=1e-6)


def test_images_sorted_by_class_have_the_statistics_of_all() -> None:
    """A batch of one class, normalised by itself, has lost what tells the class."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 40, (500, 8, 8, 3))
    x = np.concatenate([noise[:250], noise[250:] + 200]).astype(np.uint8)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    found = population_moments(model, x, batch_size=250)
    shuffled = population_moments(model, x[rng.permutation(500)], batch_size=250)
    for name, m in shuffled.items():
        torch.testing.assert_close(found[name].mean, m.mean, rtol=0.05, atol=0.02)
        torch.testing.assert_close(found[name].var, m.var, rtol=0.05, atol=0.01)


def test_each_image_gets_its_own_answer_back() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 4))
    x = pictures(30, size=8)
    found = logits_of(model, x, 30, own_statistics=True)
    with torch.no_grad():
        expected = model.train()(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_pooling_is_the_law_of_total_variance() -> None:
    rng = torch.Generator().manual_seed(0)
    batches = [5 * torch.randn(n, 7, generator=rng, dtype=torch.float64) + n for n in (3, 20, 8)]
    parts = [Moments(b.mean(0), b.var(0, correction=0), len(b)) for b in batches]
    whole = torch.cat(batches)
    pooled = pool(parts)
    torch.testing.assert_close(pooled.mean, whole.mean(0))
    torch.testing.assert_close(pooled.var, whole.var(0, correction=0))
    assert pooled.count == 31


def test_a_last_image_alone_joins_the_batch_before_it(sample: normlab.ImageData) -> None:
    model = NotebookNet()
    found = population_moments(model, sample.x_train[:21], batch_size=10)
    assert found["batch_normalization_4"].count == 21
    with pytest.raises(UserError, match="two or more"):
        population_moments(model, sample.x_train[:1])


def test_statistics_are_written_as_each_library_keeps_them() -> None:
    x = pictures(6, size=8)
    keras, pytorch = normlab.BatchNorm(3), nn.BatchNorm2d(3)
    model = nn.Sequential(keras, pytorch)
    found = population_moments(model, x)
    set_statistics(model, found)
    torch.testing.assert_close(keras.running_var, x.var((0, 2, 3), correction=0))
    torch.testing.assert_close(keras.running_mean, x.mean((0, 2, 3)))
    y = normlab.BatchNorm(3)(x)
    torch.testing.assert_close(pytorch.running_var, y.var((0, 2, 3), correction=1))


def test_broken_running_statistics_do_not_reach_the_population(sample: normlab.ImageData) -> None:
    model = NotebookNet()
    expected = population_moments(model, sample.x_train[:8])
    for layer in normalizers(model).values():
        layer.running_mean.fill_(np.nan)
    found = population_moments(model, sample.x_train[:8])
    for name, m in expected.items():
        assert torch.equal(found[name].mean, m.mean)


def test_a_frozen_layer_is_left_alone() -> None:
    model = nn.Sequential(normlab.BatchNorm(3).freeze(), normlab.BatchNorm(3))
    x = pictures(8, size=8)
    found = population_moments(model, x)
    torch.testing.assert_close(found["1"].mean.float(), x.mean((0, 2, 3)) / (1 + 1e-3) ** 0.5)
    set_statistics(model, found)
    assert not model[0].running_mean.any()
    assert model[1].running_mean.all()


def test_so_is_one_that_is_kept_in_evaluation_mode() -> None:
    """Where the model is in training mode; in one that is not, all stand in it and none is kept."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 8), nn.Flatten())
    model[0].eval()
    x, zeros = pictures(8, size=8), torch.zeros(3).double()
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(logits_of(model, x, 8, own_statistics=True), expected)
    found = population_moments(model, x)
    torch.testing.assert_close(found["1"].mean.float(), x.mean((0, 2, 3)) / (1 + 1e-5) ** 0.5)
    set_statistics(model, found)
    assert not model[0].running_mean.any()
    assert model[1].running_mean.all()
    assert [m.training for m in model] == [False, True, True, True]
    for whole in (model.eval(), nn.Sequential(model)):  # a new container is in training mode
        _, second = population_moments(whole, x).values()
        torch.testing.assert_close(second.mean, zeros, rtol=0, atol=1e-5)


def test_untouched_gives_back_statistics_modes_and_random_stream() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stream = torch.get_rng_state()

    def use() -> None:
        with untouched(model):
            model.train()(pictures(4))
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert [m.training for m in model] == [True, False]
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_three_scores_of_a_settled_network_agree_and_of_a_fresh_one_do_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4)
    )
    x, labels = pictures(400, seed=1, size=8), np.arange(400) % 4
    fresh = three_way(model, x, labels, batch_size=100)
    assert fresh.running.loss != pytest.approx(fresh.population.loss, rel=1e-3)
    settle(model, steps=200, batch=100, size=8)
    settled = three_way(model, x, labels, batch_size=100)
    assert settled.running.loss == pytest.approx(settled.population.loss, rel=5e-3)
    assert settled.batch.loss == pytest.approx(settled.population.loss, rel=5e-3)
    assert settled.count == 400


def test_each_score_is_what_it_says(sample: normlab.ImageData) -> None:
    model = NotebookNet(seed=1)
    x, y = sample.x_test[:60], sample.y_test[:60]
    scores = three_way(model, x, y, population=sample.x_train[:60], batch_size=60)
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2) / 255
    labels = torch.from_numpy(y.astype(np.int64))

    def loss(network: nn.Module) -> float:
        return nn.functional.cross_entropy(network(pixels), labels).item()

    with torch.no_grad():
        assert scores.running.loss == pytest.approx(loss(model.eval()), rel=1e-5)
        recalibrated = copy.deepcopy(model)
        set_statistics(recalibrated, population_moments(model, sample.x_train[:60]))
        assert scores.population.loss == pytest.approx(loss(recalibrated), rel=1e-5)
        for layer in normalizers(model).values():
            layer.train()
        assert scores.batch.loss == pytest.approx(loss(model), rel=1e-5)


def test_three_way_changes_no_bit_of_the_training(
    sample: normlab.ImageData, tmp_path: Path
) -> None:
    data = {
        "x_train": sample.x_train[:90],
        "y_train": sample.y_train[:90],
        "x_test": sample.x_test[:20],
        "y_test": sample.y_test[:20],
        "class_names": sample.class_names,
    }
    options = {"data": data, "epochs": 2, "threads": 1, "validation": 0.2}
    plain = normlab.train("notebook", out=tmp_path / "plain", **options)
    observed = normlab.train("notebook", out=tmp_path / "three", three_way=True, **options)
    for name in ("last", "best"):
        a, b = ((r.path / f"{name}.safetensors").read_bytes() for r in (plain, observed))
        assert a == b
    added = {f"val_{x}_{kind}" for x in ("loss", "accuracy") for kind in ("batch", "population")}
    for before, after in zip(plain.history, observed.history, strict=True):
        assert after.keys() - before.keys() == added
        assert all(after[k] == before[k] for k in before if k != "seconds")
    with pytest.raises(UserError, match="holds out none"):
        normlab.train(
            "notebook", three_way=True, out=tmp_path / "x", **{**options, "validation": 0.0}
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> normlab.Run:
    """Two epochs on the sample, 24 steps, from the command line."""
    out = tmp_path_factory.mktemp("runs") / "short"
    words = "train notebook --data sample --epochs 2 --threads 1 --three-way --out"
    assert command([*words.split(), str(out)]) == 0
    return normlab.open_run(out)


def test_the_last_epochs_scores_are_those_of_the_last_weights(
    run: normlab.Run, sample: normlab.ImageData
) -> None:
    last, x = run.history[-1], sample.x_train
    scores = three_way(run.model(), x[360:], sample.y_train[360:], population=x[:360])
    assert last["val_loss"] == pytest.approx(scores.running.loss, rel=1e-5)
    assert last["val_loss_batch"] == pytest.approx(scores.batch.loss, rel=1e-5)
    assert last["val_loss_population"] == pytest.approx(scores.population.loss, rel=1e-5)
    assert last["val_accuracy_population"] == scores.population.accuracy


def test_stale_statistics_are_found_and_recalibration_mends_them(
    run: normlab.Run,
) -> None:
    ill = normlab.doctor(run)
    stale = [f for f in ill.findings if f.rule == "stale"]
    assert len(stale) == 5
    assert all("after 24 steps with m = 0.99 they weigh 0.79" in f.evidence for f in stale)
    assert all("normlab recalibrate" in f.remedy for f in stale)
    assert ill.serious
    before = json.loads((run.path / "result.json").read_text())
    done = normlab.recalibrate(run)
    assert done["images"] == 360
    lifted = run.evaluate(weights="recalibrated").accuracy
    assert lifted > run.evaluate().accuracy + 0.05
    assert json.loads((run.path / "result.json").read_text()) == before
    assert not normlab.doctor(run, "sample", weights="recalibrated").serious


def test_recalibration_says_what_it_did_and_touches_only_statistics(
    run: normlab.Run,
) -> None:
    done = normlab.recalibrate(run)
    last, _ = read_tensors(run.path / "last.safetensors")
    new, document = read_tensors(run.path / "recalibrated.safetensors")
    assert document == done
    assert done["weights"] == "last"
    assert done["data_sha256"] == run.task.data_sha256
    differing = {k.rsplit(".", 1)[1] for k in last if not torch.equal(last[k], new[k])}
    assert differing == {"running_mean", "running_var"}


def test_recalibration_adapts_to_other_pictures(
    run: normlab.Run, sample: normlab.ImageData
) -> None:
    darker = {
        "x_train": sample.x_train // 3,
        "y_train": sample.y_train,
        "x_test": sample.x_test // 3,
        "y_test": sample.y_test,
        "class_names": sample.class_names,
    }
    normlab.recalibrate(run, sample)
    unadapted = run.evaluate(darker, weights="recalibrated").accuracy
    done = normlab.recalibrate(run, darker)
    assert done["images"] == 400
    assert run.evaluate(darker, weights="recalibrated").accuracy > unadapted


def test_recalibration_refuses_what_it_cannot_do(sample: normlab.ImageData, tmp_path: Path) -> None:
    plain = normlab.train(
        "notebook", norm="none", data=sample, epochs=1, threads=1, out=tmp_path / "plain"
    )
    with pytest.raises(UserError, match="no batch normalisation"):
        normlab.recalibrate(plain)
    with pytest.raises(UserError, match="`normlab recalibrate` makes it"):
        plain.model("recalibrated")


def test_weights_that_a_run_keeps_are_not_overwritten(run: normlab.Run, tmp_path: Path) -> None:
    folder = tmp_path / "repaired"
    shutil.copytree(run.path, folder)
    normlab.recalibrate(normlab.open_run(folder))
    result = json.loads((folder / "result.json").read_text()) | {"weights": "recalibrated"}
    (folder / "result.json").write_text(json.dumps(result))
    before = (folder / "recalibrated.safetensors").read_bytes()
    with pytest.raises(UserError, match="would be overwritten"):
        normlab.recalibrate(normlab.open_run(folder), "sample")
    assert (folder / "recalibrated.safetensors").read_bytes() == before


def test_a_live_network_is_refused_with_the_way_to_renew_it() -> None:
    with pytest.raises(normlab.UserError, match="update_bn"):
        normlab.recalibrate(torch.nn.Sequential(normlab.BatchNorm(3)))
