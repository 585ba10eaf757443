"""The network of the paper's figure 1."""

import numpy as np
import pytest
import torch

from normlab import recipes
from normlab.errors import UserError
from normlab.models import MODELS, SigmoidNet


def test_its_layers_are_the_papers() -> None:
    recipe = recipes.get("paper-sigmoid")
    assert MODELS[recipe.model.name] is SigmoidNet
    assert recipe.batch_size == 60
    steps = recipe.epochs * 60_000 * (1 - recipe.validation) / 60  # on MNIST
    assert 50_000 <= steps < 51_000
    dense = [m for m in SigmoidNet(norm="none").modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in dense] == [
        *((784, 100), (100, 100), (100, 100), (100, 10))
    ]


def test_both_arms_start_with_the_same_weights() -> None:
    with_norm, without = SigmoidNet(norm="batch", seed=3), SigmoidNet(norm="none", seed=3)
    for name, parameter in without.named_parameters():
        assert torch.equal(parameter, with_norm.get_parameter(name))


def test_it_computes_what_numpy_computes() -> None:
    model = SigmoidNet(image_size=32, norm="none").eval()
    pixels = np.random.default_rng(0).random((4, 3, 32, 32))
    grey = np.tensordot([0.299, 0.587, 0.114], pixels, axes=(0, 1))
    h = grey[:, 2:30, 2:30].reshape(4, 784)
    for name in ("dense1", "dense2", "dense3"):
        dense = model.get_submodule(name)
        z = h @ dense.weight.detach().double().numpy().T + dense.bias.detach().numpy()
        h = 1 / (1 + np.exp(-z))
    expected = h @ model.output.weight.detach().double().numpy().T
    found = model(torch.from_numpy(pixels).float()).detach().numpy()
    assert found == pytest.approx(expected, abs=1e-4)


def test_small_images_are_refused() -> None:
    with pytest.raises(UserError, match="at least 28 × 28"):
        SigmoidNet(image_size=27)
