"""What was asked for: all that decides the weights of a run."""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import nn

from normlab.core.records import as_object, typed
from normlab.data import ImageData, load
from normlab.data.changes import Changes
from normlab.data.given import was_given
from normlab.data.loading import PUBLIC
from normlab.errors import DataError
from normlab.kernels import Tiles
from normlab.layers import BatchNorm, use_tiles
from normlab.recipes import Recipe
from normlab.recipes.families import MODELS

STATISTICS = ("keep", "adapt", "recalibrate")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a network that was pretrained elsewhere comes from.

    Attributes:
        network: its name in timm, with the tag of its weights if it was named with one.
        library: timm and its version.
        source: the file's name, or the repository on the hub and its revision.
        file_sha256: of the file of weights.
        licence: of the weights, as far as it is stated.
    """

    network: str
    library: str
    source: str
    file_sha256: str
    licence: str

    def __str__(self) -> str:
        return (
            f"{self.network} of {self.library}, pretrained on ImageNet; weights from "
            f"{self.source} (SHA-256 {self.file_sha256[:12]}…, licence {self.licence})"
        )


@dataclass(frozen=True, kw_only=True)
class Start:
    """Which run a training starts from, and how; see `normlab.training.starting_points`.

    Attributes:
        run: its folder, as it was named; or a pretrained network.
        weights_sha256: of the weights taken from it.
        head: the output layer: `kept`, `new` or `fitted`.
        freeze: whether the output layer alone learns.
        statistics: `keep`, `adapt` or `recalibrate`.
        penalty: of a fitted head; see `normlab.evaluation.features.fit_head`.
        origin: of a network that was pretrained elsewhere.
    """

    run: str
    weights_sha256: str
    head: str
    freeze: bool
    statistics: str
    penalty: float | None = None
    origin: Origin | None = None

    def published(self) -> "Start":
        """The same for others: of the folder the last part of its path."""
        return replace(self, run=Path(self.run).name)

    def __str__(self) -> str:
        statistics = {"keep": "kept", "adapt": "adapting", "recalibrate": "recalibrated, then kept"}
        body = "frozen" if self.freeze else "learning on"
        return (
            f"{self.origin or f'run {self.run}'}: body {body}, statistics "
            f"{statistics.get(self.statistics, self.statistics)}, output layer {self.head}"
        )


@dataclass(frozen=True, kw_only=True)
class Task:
    """What `recipe.json` holds: all that decides the weights."""

    recipe: Recipe
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    data: str
    data_sha256: str
    class_names: Annotated[tuple[str, ...], Meta(min_length=1, max_length=10_000)]
    image_size: Annotated[int, Meta(ge=1)]
    skip_bad: bool = False
    start: Start | None = None
    group_by: str | None = None
    changes: Changes | None = None

    def load(self, data: str | Path | Mapping[str, Any] | ImageData | None = None) -> ImageData:
        """The run's data, or `data`, with pictures read as the run's were.

        What the run left out, relabelled and grouped applies to its own data alone, wherever they
        are now.

        Raises:
            DataError: the run names a place that this user has not given before: whoever sent the
                run chose it.
        """
        if data is None and self.data not in PUBLIC and not was_given(Path(self.data)):
            raise DataError(
                f"the run's data are {self.data!r}, a place that was not named here before, so it "
                "is not read: name it once with --data, as in `normlab evaluate RUN --data DATA`"
            )
        size, bad = self.image_size, self.skip_bad
        if data is None:
            return load(
                self.data,
                image_size=size,
                skip_bad=bad,
                group_by=self.group_by,
                changes=self.changes,
            )
        if self.group_by is not None or self.changes is not None:  # the run's data, in a new place
            with contextlib.suppress(DataError):
                images = load(
                    data,
                    image_size=size,
                    skip_bad=bad,
                    group_by=self.group_by,
                    changes=self.changes,
                )
                if images.sha256 == self.data_sha256:
                    return images
        return load(data, image_size=size, skip_bad=bad)

    def build(self) -> nn.Module:
        """Make the network with its initial values."""
        model, norm = self.recipe.model, self.recipe.norm
        network: nn.Module = MODELS[model.name](
            num_classes=len(self.class_names),
            image_size=self.image_size,
            norm=norm.name,
            norm_position=norm.position,
            norm_momentum=norm.momentum,
            norm_epsilon=norm.epsilon,
            logit_scale=model.logit_scale,
            seed=self.seed,
            **({"architecture": model.architecture} if model.name == "timm" else {}),
        )
        use_tiles(network, Tiles(model.winograd, model.products == "bfloat16"))
        for layer in network.modules():
            if isinstance(layer, BatchNorm):
                layer.ghost = norm.images
        return network

    def values(self) -> int:
        """How many weights and statistics the network has; nothing is built for it.

        Raises:
            DataError: no network of such a size can be.
        """
        try:
            with torch.device("meta"):
                return sum(t.numel() for t in self.build().state_dict().values())
        except (RuntimeError, OverflowError, TypeError) as e:
            raise DataError(
                f"a network for images of {self.image_size} × {self.image_size} cannot be "
                f"({str(e).splitlines()[0][:100]})"
            ) from None

    def as_dict(self) -> dict[str, Any]:
        values = {
            "recipe": self.recipe.as_dict(),
            "seed": self.seed,
            "data": self.data,
            "data_sha256": self.data_sha256,
            "class_names": list(self.class_names),
            "image_size": self.image_size,
            "skip_bad": self.skip_bad,
        }
        if self.start is not None:
            start = {key: value for key, value in asdict(self.start).items() if value is not None}
            values["start"] = start
        if self.group_by is not None:
            values["group_by"] = self.group_by
        if self.changes is not None:
            values["changes"] = asdict(self.changes)
        return values

    def published(self) -> dict[str, Any]:
        """`as_dict` for files and pages that others get: last parts of paths, no file's name."""
        start = self.start and self.start.published()
        return replace(self, data=Path(self.data).name, start=start, changes=None).as_dict()

    @classmethod
    def from_dict(cls, values: Any, where: object = "this task") -> "Task":
        """Read what `as_dict` writes, or wrote in any release before.

        Raises:
            UserError: a key is missing, or a value is of another kind or out of its range.
        """
        recipe = Recipe.from_dict(as_object(values, where).get("recipe"))
        return typed(values, cls, where, recipe=recipe)
