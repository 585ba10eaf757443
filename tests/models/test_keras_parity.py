"""The notebook's network in Keras and here: the same table, outputs and updates."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers

from normlab import UserError, kernels
from normlab.core.streams import stream
from normlab.layers import BatchNorm, Dropout
from normlab.models import NotebookNet, summarize
from normlab.training.optimisers import Adam
from normlab.training.step import train_step


def keras_notebook(dtype: str, dropout: float, norm: str = "batch") -> Any:
    """The notebook's third cell."""

    def normalized(h: Any) -> Any:
        return layers.BatchNormalization(dtype=dtype)(h) if norm == "batch" else h

    def conv(filters: int, padding: str, name: str) -> Any:
        return layers.Conv2D(
            filters, (3, 3), activation="relu", padding=padding, name=name, dtype=dtype
        )

    x = layers.Input(shape=(32, 32, 3), name="input", dtype=dtype)
    h = conv(32, "valid", "conv1")(normalized(x))
    h = layers.Dropout(dropout, dtype=dtype)(h)
    h = conv(32, "same", "conv2")(normalized(h))
    h = layers.MaxPooling2D(pool_size=(2, 2), dtype=dtype)(h)
    h = conv(64, "same", "conv3")(normalized(h))
    h = layers.MaxPooling2D(pool_size=(2, 2), dtype=dtype)(h)
    h = layers.Flatten(dtype=dtype)(h)
    h = normalized(layers.Dropout(dropout, dtype=dtype)(h))
    h = layers.Dense(512, activation="relu", name="hidden", dtype=dtype)(h)
    h = normalized(layers.Dropout(dropout, dtype=dtype)(h))
    y = layers.Dense(10, activation="softmax", name="output", dtype=dtype)(h)
    return keras.Model(x, y)


def state_of(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Keras' weights under our names and in our layout."""
    state: dict[str, torch.Tensor] = {}
    normalizations = 0
    for layer in model.layers:
        values = [v.value.detach().to(dtype) for v in layer.weights]
        if isinstance(layer, layers.BatchNormalization):
            name = "batch_normalization" + (f"_{normalizations}" if normalizations else "")
            normalizations += 1
            for key, value in zip(
                ("weight", "bias", "running_mean", "running_var"), values, strict=True
            ):
                state[f"{name}.{key}"] = value
        elif values:
            kernel, bias = values
            state[f"{layer.name}.weight"] = (
                kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
            )
            state[f"{layer.name}.bias"] = bias
    return state


def pair(dtype: str, norm: str = "batch") -> tuple[Any, NotebookNet]:
    """Keras' network and ours with the same weights, dropout off."""
    keras.utils.set_random_seed(1)
    theirs = keras_notebook(dtype, 0.0, norm)
    torch_dtype = getattr(torch, dtype)
    ours = NotebookNet(norm=norm).to(torch_dtype)
    missing = ours.load_state_dict(state_of(theirs, torch_dtype), strict=False).missing_keys
    assert all("num_batches_tracked" in name for name in missing)
    for module in ours.modules():
        if isinstance(module, Dropout):
            module.threshold = 0
    return theirs, ours


def pixels(n: int, dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(n, 32, 32, 3)).astype(dtype)


def ours_of(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def test_the_table_is_the_notebooks() -> None:
    table = summarize(NotebookNet())
    assert (table.total, table.trainable, table.non_trainable) == (1_654_774, 1_647_344, 7_430)
    theirs = keras_notebook("float32", 0.2)
    expected = [
        ((None, *layer.output.shape[1:]), layer.count_params())
        for layer in theirs.layers[1:]  # the input is a layer there
    ]
    assert [(layer.output_shape, layer.parameters) for layer in table.layers] == expected
    assert "Total params: 1,654,774" in str(table)
    plain = summarize(NotebookNet(norm="none"))
    assert plain.non_trainable == 0
    assert plain.total == keras_notebook("float32", 0.2, "none").count_params()


def test_describing_a_network_leaves_it_alone() -> None:
    model = NotebookNet().train()
    model.dropout.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    summarize(model)
    assert [m for m in model.modules() if not m.training] == [model.dropout]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_outputs_are_keras_outputs_in_both_modes(norm: str) -> None:
    theirs, ours = pair("float32", norm)
    x = pixels(16, "float32")
    for training in (True, False):
        expected = theirs(x, training=training).detach().numpy()
        with torch.no_grad():
            got = ours.train(training)(ours_of(x)).softmax(1).numpy()
        assert np.abs(got - expected).max() <= 1e-5


@pytest.fixture
def floatx(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets what Keras computes in, its optimiser and data included, and puts it back.

    On this backend Keras' promotion rules turn float64 into float32, within its batch
    normalisation too, whatever was asked for; the table that does so is emptied of that rule.
    """
    from keras.src.backend.common import dtypes

    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    before = keras.config.floatx()
    yield keras.config.set_floatx
    keras.config.set_floatx(before)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_adam_steps_are_keras_steps(dtype: str, floatx: Callable[[str], None]) -> None:
    floatx(dtype)
    theirs, ours = pair(dtype)
    theirs.compile(loss="categorical_crossentropy", optimizer="adam", metrics=["accuracy"])
    optimizer = Adam(list(ours.parameters()))
    ours.train()
    for step in range(5):
        x = pixels(16, dtype, seed=step)
        labels = np.random.default_rng(step).integers(0, 10, 16)
        loss, _ = theirs.train_on_batch(x, np.eye(10)[labels])
        ours_loss, _ = train_step(
            ours, optimizer, ours_of(x), torch.from_numpy(labels), stream(0, "unused")
        )
        if step == 0:
            assert ours_loss == pytest.approx(float(loss), rel=1e-5)
    state = ours.state_dict()
    differences = torch.cat(
        [
            (state[name].double() - value.double()).abs().flatten()
            for name, value in state_of(theirs, getattr(torch, dtype)).items()
        ]
    )
    assert len(differences) == 1_654_774
    if dtype == "float64":
        assert differences.max() <= 1e-8
    else:
        assert (differences <= 1e-4).double().mean() >= 0.999
    assert all(m.num_batches_tracked == 5 for m in ours.modules() if isinstance(m, BatchNorm))


def test_initial_values_are_glorot_uniform_and_the_same_in_both_arms() -> None:
    batch, none = NotebookNet(seed=3), NotebookNet(norm="none", seed=3)
    other = NotebookNet(seed=4)
    for name, fans in {"conv1": 27 + 288, "conv2": 576, "hidden": 3136 + 512}.items():
        weight = getattr(batch, name).weight
        limit = (6 / fans) ** 0.5
        assert weight.abs().max() <= limit
        assert weight.abs().max() > 0.97 * limit
        assert abs(weight.std().item() / (limit / 3**0.5) - 1) < 0.1
        assert torch.equal(weight, getattr(none, name).weight)
        assert not torch.equal(weight, getattr(other, name).weight)
        assert not getattr(batch, name).bias.any()


def test_relu_after_pooling_is_relu_before() -> None:
    x = torch.randn(2, 3, 9, 9)
    pool = torch.nn.MaxPool2d(2)
    assert torch.equal(pool(x).relu(), pool(x.relu()))


def test_too_small_images_are_refused() -> None:
    with pytest.raises(UserError, match="8 × 8"):
        NotebookNet(image_size=7)


def test_adam_goes_on_from_its_state() -> None:
    """The bias correction of step t must be the same after a resume."""
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    one, two = Adam([a]), Adam([b])
    for step in range(6):
        gradient = torch.randn(5)
        a.grad, b.grad = gradient, gradient.clone()
        one.step()
        two.step()
        if step == 2:
            state = {k: v.clone() for k, v in two.state[b].items()}
            two = Adam([b])
            two.state[b] = state
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((5,), torch.contiguous_format),
        ((33, 1001), torch.contiguous_format),
        ((600, 500), torch.contiguous_format),
        ((16, 8, 3, 3), torch.channels_last),
    ],
)
def test_compiled_adam_is_adam(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """Against float64, with a parameter that got no gradient in one of the steps."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator) for size in (shape, (7,))]
    start[0] = start[0].contiguous(memory_format=layout)
    ours, wide = ([torch.nn.Parameter(t.to(kind)) for t in start] for kind in (None, torch.double))
    one, two = Adam(ours, 1e-2), Adam(wide, 1e-2)
    for step in range(6):
        for a, b in zip(ours, wide, strict=True):
            drawn = torch.randn(a.shape, generator=generator)
            a.grad, b.grad = torch.empty_like(a).copy_(drawn), torch.empty_like(b).copy_(drawn)
            assert kernels.adapts(a, torch.empty_like(a))
        if step == 3:
            ours[1].grad = wide[1].grad = None
        one.step()
        two.step()
    for a, b in zip(ours, wide, strict=True):
        assert one.state[a]["step"] == two.state[b]["step"]
        assert (a - b).abs().max() < 2e-6
        assert (one.state[a]["exp_avg_sq"] - two.state[b]["exp_avg_sq"]).abs().max() < 1e-6
