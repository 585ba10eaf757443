"""The same global batch gives the same training, whatever the number of processes."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed

import normlab
from normlab import kernels
from normlab.core.groups import Group
from normlab.core.ranks import Ranks
from normlab.core.streams import stream
from normlab.data import ImageData
from normlab.evaluation.population import population_moments
from normlab.evaluation.scores import score
from normlab.layers.dropout import Dropout, PartGenerator, draws
from normlab.recipes import RECIPES as ALL
from normlab.runs import Task
from normlab.training.optimisers import set_rate
from normlab.training.parallel import Gradients, ParallelStep, share_statistics
from normlab.training.preparation import make_plan, new_state
from normlab.training.step import train_step
from together import together

STEPS = 20
RECIPES: dict[str, dict[str, Any]] = {
    "notebook": {"flip": True, "shift": 2, "colour": 0.1, "crop": 0.9, "cutout": 3},
    "fast79": {"label_smoothing": 0.2, "half_size": 0.0},
    "fast79 by pieces": {"norm_images": 4},
}


def pictures() -> ImageData:
    """47 pictures, of one class more than of the others."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.zeros(20, np.int64), rng.integers(0, 3, 27)])
    x = rng.integers(0, 256, (47, 16, 16, 3), dtype=np.uint8)
    x[:, :8] = x[:, :8] // 2 + (40 * labels).astype(np.uint8)[:, None, None, None]
    arrays = {"x_train": x, "y_train": labels, "x_test": x[:10], "y_test": labels[:10]}
    return normlab.load(arrays)


def task_of(name: str, images: ImageData, **changes: Any) -> Task:
    recipe = ALL[name.split()[0]]().override(
        **{"batch_size": 10, "balance": "weights", "validation": 0.0, **RECIPES[name], **changes}
    )
    return Task(
        recipe=recipe,
        seed=1,
        data="",
        data_sha256="",
        class_names=images.class_names,
        image_size=16,
    )


def ranks_of(rank: int, size: int) -> Ranks:
    if size == 1:
        return Ranks()
    handle = distributed.new_group()
    return Ranks(rank, size, statistics=Group(handle), numbers=Group())


def train_both(rank: int, size: int, dtype: torch.dtype) -> list[Any]:
    return [train_steps(ranks_of(rank, size), name, dtype) for name in RECIPES]


def train_steps(
    ranks: Ranks, name: str, dtype: torch.dtype, steps: int = STEPS
) -> tuple[list[tuple[float, int]], dict[str, np.ndarray]]:
    """Losses and right answers of each step, and the weights after the last, of one rank."""
    images = pictures()
    task = task_of(name, images)
    plan = make_plan(task, images, 1, ranks=ranks)
    state = new_state(task, images, torch.device("cpu"))
    state.model.to(dtype)
    batches, weights = plan.batches(), plan.class_weights()
    assert weights is not None
    step_of = ParallelStep(state.model, batches) if ranks.size > 1 else train_step
    state.model.train()
    results = []
    for step in range(steps):
        x, labels = batches(step)
        set_rate(state.optimizer, task.recipe.schedule.share(step / steps))
        results.append(
            step_of(
                state.model,
                state.optimizer,
                x.to(dtype),
                labels,
                stream(1, "dropout", step),
                task.recipe.label_smoothing,
                weights.to(dtype),
            )
        )
    return results, {k: v.numpy() for k, v in state.model.state_dict().items()}


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The largest difference of two states, relative to the largest value of each tensor."""
    return max(
        float(np.abs(a[k].astype(float) - b[k]).max() / max(1.0, np.abs(b[k]).max())) for k in b
    )


@pytest.fixture(scope="module")
def alone() -> dict[torch.dtype, list[Any]]:
    return {dtype: train_both(0, 1, dtype) for dtype in (torch.float64, torch.float32)}


@pytest.mark.parametrize(
    "size", [3, pytest.param(2, marks=pytest.mark.soak), pytest.param(4, marks=pytest.mark.soak)]
)
def test_any_number_of_ranks_trains_alike_in_float64(
    size: int, alone: dict[torch.dtype, list[Any]]
) -> None:
    """A batch of ten, which three do not divide, and a last one of seven; dropout, flips, shifts,
    crops, colours, weights of classes: all by an image's place in the whole batch."""
    for rank in together(size, train_both, size, torch.float64):
        both = zip(RECIPES, rank, alone[torch.float64], strict=True)
        for name, (found, own), (losses, weights) in both:
            # Statistics of four images magnify rounding more.
            close = 1e-11 if "pieces" in name else 1e-12
            np.testing.assert_allclose(
                [loss for loss, _ in found], [loss for loss, _ in losses], rtol=close
            )
            assert [n for _, n in found] == [n for _, n in losses]
            assert distance(own, weights) <= close


def test_float32_differs_as_two_orders_of_summation_do(
    alone: dict[torch.dtype, list[Any]],
) -> None:
    """And every rank has the same bits. Another order: PyTorch's passes, not the compiled ones."""
    with kernels.disabled():
        other = train_both(0, 1, torch.float32)
    first, *others = together(3, train_both, 3, torch.float32)
    for rank in others:
        for (_, mine), (_, theirs) in zip(first, rank, strict=True):
            for key, value in mine.items():
                np.testing.assert_array_equal(theirs[key], value)
    for i in range(len(RECIPES)):
        rounding = distance(other[i][1], alone[torch.float32][i][1])
        found = distance(first[i][1], alone[torch.float32][i][1])
        assert 0 < found < 10 * rounding, (found, rounding)


def _score(rank: int, size: int) -> list[Any]:
    """What is scored, how many images this rank answered, and the moments of the population."""
    ranks, images = ranks_of(rank, size), pictures()
    state = new_state(task_of("notebook", images), images, torch.device("cpu"))
    model, seen = state.model.eval(), 0
    share_statistics(model, ranks.statistics if size > 1 else None)

    def note(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        seen += len(inputs[0])

    many = np.concatenate([images.x_train] * 14)  # 658 images: three batches
    labels = np.concatenate([images.y_train] * 14)
    hook = model.register_forward_pre_hook(note)
    scores = [score(model, many, labels, ranks=ranks)]
    hook.remove()
    scores += [
        score(model, many, labels, statistics=kind, ranks=ranks) for kind in ("batch", "population")
    ]
    moments = population_moments(model, many, ranks=ranks)
    flat = {k: (m.mean.numpy(), m.var.numpy(), m.count) for k, m in moments.items()}
    return [seen, [(s.loss, s.accuracy) for s in scores], flat]


def test_pieces_of_a_batch_stay_together() -> None:
    """Four images each; the last one of 13 joins the piece before it."""
    parts = [Ranks(r, 3, piece=4).share(13) for r in range(3)]
    assert parts == [(0, 4), (4, 8), (8, 13)]
    assert [Ranks(r, 4, piece=4).share(8) for r in range(4)] == [(0, 0), (0, 4), (4, 4), (4, 8)]
    assert [Ranks(r, 2).share(5) for r in range(2)] == [(0, 2), (2, 5)]


@pytest.mark.parametrize("size", [4])
def test_every_image_is_scored_once_and_the_scores_have_the_same_bits(size: int) -> None:
    """With four ranks, one has no batch of the three."""
    total, scores, moments = _score(0, 1)
    ranks = together(size, _score, size)
    assert total == 658
    assert sum(seen for seen, _, _ in ranks) == total
    for _, found, own in ranks:
        assert found == scores
        for name, values in moments.items():
            for a, b in zip(own[name], values, strict=True):
                np.testing.assert_array_equal(a, b)


@given(
    images=st.integers(1, 9),
    each=st.integers(1, 23),
    ranks=st.integers(1, 5),
    layers=st.integers(1, 3),
)
@settings(max_examples=100, deadline=None)
def test_parts_of_the_draws_are_those_of_the_whole_batch(
    images: int, each: int, ranks: int, layers: int
) -> None:
    """Also where a part does not begin at a 64-bit word, and for the layers after the first."""
    rng, dropout = stream(0, "dropout", 7), Dropout(0.3)
    whole = [draws(dropout.drops(images * each, rng), images * each) for _ in range(layers)]
    for rank in range(ranks):
        first, last = Ranks(rank, ranks).share(images)
        part, values = PartGenerator(stream(0, "dropout", 7), first, last), (last - first) * each
        for layer in whole:
            found = draws(dropout.drops(values, part), values)
            np.testing.assert_array_equal(found, layer[first * each : last * each])


def _buckets(rank: int) -> list[Any]:
    torch.manual_seed(0)
    model = torch.nn.ModuleList(torch.nn.Linear(*sizes) for sizes in ((3, 4), (4, 2), (2, 9)))
    model[1].bias.requires_grad_(False)
    gradients = Gradients(model, Group(), size=40)
    found = []
    for step in range(2):
        model.zero_grad()
        x = torch.full((2, 3), 1.0 + rank + step)
        model[1](model[0](x)).sum().backward()  # the last layer takes no part
        gradients.finish()
        found.append(
            [None if p.grad is None else p.grad.clone().numpy() for p in model.parameters()]
        )
    gradients.close()
    return [len(gradients.buckets), found]


def test_gradients_of_some_parameters_in_small_buckets() -> None:
    (buckets, first), (_, second) = together(2, _buckets)
    assert buckets > 2
    torch.manual_seed(0)
    model = torch.nn.ModuleList(torch.nn.Linear(*sizes) for sizes in ((3, 4), (4, 2), (2, 9)))
    model[1].bias.requires_grad_(False)
    for step in range(2):
        model.zero_grad()
        for rank in range(2):
            model[1](model[0](torch.full((2, 3), 1.0 + rank + step))).sum().backward()
        for p, *found in zip(model.parameters(), first[step], second[step], strict=True):
            for grad in found:
                if p.grad is None:
                    assert grad is None
                else:
                    np.testing.assert_allclose(grad, p.grad, rtol=1e-6)
