"""Networks of timm inside ours: frozen for good, seeded, and loaded beside any torchvision."""

import subprocess
import sys

import pytest
import torch

from normlab.errors import UserError, install
from normlab.models.timm_net import TimmNet, batch_norms, config_of

TINY = "test_resnet"


def test_frozen_normalisers_stay_so_in_training() -> None:
    """PyTorch's own thaw at the next `.train()` (fastai issue 3030)."""
    model = TimmNet(architecture=TINY, num_classes=3)
    model.freeze()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(2):
        model.train()
        model(torch.rand(4, 3, 32, 32)).sum().backward()
    assert model.training
    assert all(not layer.training for layer in batch_norms(model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for layer in batch_norms(model) for p in layer.parameters())
    thawed = TimmNet(architecture=TINY, num_classes=3).train()
    thawed(torch.rand(4, 3, 32, 32))
    assert not torch.equal(thawed.state_dict()["body.conv1.1.running_mean"], torch.zeros(16))


def test_the_seed_decides_the_initial_values_and_no_one_elses_draws() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    a, b, c = (TimmNet(architecture=TINY, num_classes=3, seed=s).state_dict() for s in (5, 5, 6))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["body.conv1.0.weight"], c["body.conv1.0.weight"])


def test_momentum_and_epsilon_are_the_recipes() -> None:
    model = TimmNet(architecture=TINY, norm_momentum=0.7, norm_epsilon=1e-2)
    assert {(round(n.momentum or 0, 9), n.eps) for n in batch_norms(model)} == {(0.3, 1e-2)}


def test_normalisers_are_the_networks_own() -> None:
    with pytest.raises(UserError, match=r"are part of it \(norm='batch'\)"):
        TimmNet(architecture=TINY, norm="layer")
    with pytest.raises(UserError, match=r"are part of it \(norm='none'\)"):
        TimmNet(architecture="test_vit", image_size=160)
    assert not batch_norms(TimmNet(architecture="test_vit", image_size=160, norm="none"))


def test_unknown_names_are_told_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no network 'resnet81': did you mean resnet18"):
        config_of("resnet81")
    with pytest.raises(UserError, match="name a network of timm"):
        config_of(None)


WITHOUT = """
import sys
from importlib.abc import MetaPathFinder
class No(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == {name!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, No())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda n, *a: None if n == {name!r} else real(n, *a)
from normlab.models.timm_net import load_timm
try:
    load_timm()
except Exception as e:
    print(type(e).__name__, e)
"""


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_missing_package_is_named_with_the_extra(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(name=name)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.startswith(
        f"UserError networks pretrained on ImageNet need the package {name}"
    )
    assert install("pretrained") in done.stdout
