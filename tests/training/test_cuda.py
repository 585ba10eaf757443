"""On a CUDA device: the numbers of the processor, the same bits again, runs that go on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import normlab
from normlab.core.environment import settings
from normlab.core.streams import stream
from normlab.errors import Interrupted
from normlab.layers import NORMS, normalizer
from stopping import StopAfter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

CUDA = torch.device("cuda")
SHORT: dict[str, Any] = {"data": "sample", "threads": 1, "epochs": 2, "batch_size": 100}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in whole float32; by default cuDNN takes ten bits of each factor (TF32)."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("norm", [name for name in NORMS if name != "none"])
@pytest.mark.parametrize("shape", [(16, 64), (4, 64, 6, 6)])
def test_normalisers_agree_with_float64_on_the_processor(norm: str, shape: tuple[int, ...]) -> None:
    if norm == "instance" and len(shape) == 2:
        pytest.skip("one value of a channel has no variance")
    rng = stream(0, "cuda")
    x, g = (torch.from_numpy(rng.standard_normal(shape)) for _ in range(2))

    def run(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        layer = normalizer(norm, shape[1]).to(device, dtype)
        inputs = x.to(device, dtype, copy=True).requires_grad_()
        y = layer(inputs)
        y.backward(g.to(device, dtype))
        assert inputs.grad is not None
        return y.detach().double().cpu(), inputs.grad.double().cpu()

    for ours, exact in zip(
        run(CUDA, torch.float32), run(torch.device("cpu"), torch.float64), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("recipe", ["notebook", "fast79", "fast94", "pictures"])
def test_a_step_is_the_step_that_the_processor_takes(recipe: str, in_tmp: Path) -> None:
    changes = {**SHORT, "epochs": 1, "batch_size": 400, "products": "float32"}
    there = normlab.train(recipe, device="cuda", out="there", **changes)
    here = normlab.train(recipe, device="cpu", out="here", **changes)
    assert there.environment["device_name"] != "cpu"
    assert there.result is not None
    assert here.result is not None
    assert there.history[0]["loss"] == pytest.approx(here.history[0]["loss"], rel=1e-4)
    assert there.result["test_loss"] == pytest.approx(here.result["test_loss"], rel=1e-2)


@pytest.mark.parametrize("recipe", ["notebook", "fast79"])
def test_same_seed_same_bits_also_after_a_stop(recipe: str, in_tmp: Path) -> None:
    whole = normlab.train(recipe, device="cuda", out="whole", **SHORT)
    again = normlab.train(recipe, device="cuda", out="again", **SHORT)
    with pytest.raises(Interrupted):
        normlab.train(recipe, device="cuda", out="cut", observers=(StopAfter(3),), **SHORT)
    resumed = normlab.resume("cut")
    hashes = [run.result["weights_sha256"] for run in (whole, again, resumed) if run.result]
    assert len(hashes) == 3
    assert len(set(hashes)) == 1


def test_what_follows_a_training_needs_no_such_device(in_tmp: Path) -> None:
    run = normlab.train("fast79", device="cuda", out="run", record=True, ema=0.9, **SHORT)
    assert run.result is not None
    found = run.evaluate("sample")
    assert found.accuracy == run.result["test_accuracy"]


def test_the_determinism_asked_for_ends_with_the_training() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with settings(1, CUDA):
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled() == before
