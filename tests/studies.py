"""Studies put together from given scores, for tests of what follows the training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from normlab.api.compare import Study, open_study
from normlab.core.environment import describe_machine
from normlab.recipes import get
from normlab.study import outcomes as runs
from normlab.study import plan as plans
from normlab.study.arms import make_arms
from normlab.study.design import Design
from normlab.study.outcomes import Outcome
from normlab.study.plan import default_contrasts

CLASSES = tuple("abcdefghij")
TEST_IMAGES = 200


def make_design(names: Sequence[str] = ("batch", "none"), **fields: Any) -> Design:
    arms = make_arms(list(names))
    plan: dict[str, Any] = {
        "recipe": get("notebook"),
        "arms": arms,
        "contrasts": default_contrasts(arms),
        "seeds": 6,
        "first_seed": 0,
        "margin": 0.005,
        "thresholds": (0.5, 0.7),
        "checks": 5,
        "threads": 1,
        "data": "sample",
        "data_sha256": "0" * 64,
        "class_names": CLASSES,
        "image_size": 32,
        "train_images": 400,
        "test_images": TEST_IMAGES,
        "environment": describe_machine(1, torch.device("cpu")),
    }
    return Design(**{**plan, **fields})


def make_outcome(design: Design, arm: str, seed: int, accuracy: float | None) -> Outcome:
    """A run that ended with a test accuracy; None for one that diverged."""
    chosen = next(a for a in design.arms if a.name == arm)
    right = torch.arange(TEST_IMAGES) < (accuracy or 0) * TEST_IMAGES
    end = accuracy or 0.1
    curve = [(100 * i, end * (1 - 0.5**i)) for i in range(1, 6)]
    if accuracy is None:
        curve = curve[:2]
    return Outcome(
        arm=arm,
        seed=seed,
        task=design.task(chosen, seed).as_dict(),
        diverged="the loss is nan at step 3 of epoch 2" if accuracy is None else None,
        test_accuracy=end,
        test_loss=2.302585 if accuracy is None else 1 - accuracy,
        val_accuracy=curve[-1][1] if accuracy else 0.1,
        curve=curve,
        area=sum(a for _, a in curve) / len(curve),
        steps_to={"0.5": None, "0.7": None},
        steps=500,
        step_seconds=0.02 + 0.001 * seed,
        seconds=20.0,
        history=[],
        test_correct=None if accuracy is None else runs.pack(right.numpy()),
        weights_sha256="f" * 64,
        environment=design.environment,
    )


def make_study(folder: Path, scores: Mapping[str, Sequence[float | None]], **fields: Any) -> Study:
    """Write a study in which each arm's runs, from seed 0 on, end with the given accuracies.

    The keys of `scores` describe arms, as `--arm` takes them.
    """
    fields.setdefault("seeds", max(map(len, scores.values())))
    design = make_design(list(scores), **fields)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    plans.save(folder, design)
    for arm, accuracies in zip(design.arm_names, scores.values(), strict=True):
        for seed, accuracy in enumerate(accuracies):
            runs.save(folder / "runs", make_outcome(design, arm, seed, accuracy))
    return open_study(folder)
