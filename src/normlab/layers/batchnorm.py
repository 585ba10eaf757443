"""Batch normalisation: formula, then code, in the same order and with the same symbols.

For each channel, over the M = N·H·W values that a batch holds of it (Ioffe and Szegedy 2015,
arXiv 1502.03167, algorithm 1):

    μ  = 1/M · Σ x                       `moments`
    σ² = 1/M · Σ (x − μ)²
    x̂  = (x − μ) / √(σ² + ε)             `normalize`
    y  = γ·x̂ + β

and, while training, the running statistics that evaluation uses in place of μ and σ²:

    running ← m·running + (1 − m)·batch

What libraries mean by the same words differs; `Convention` holds it and each has a name:

    name     ε      "momentum" weighs     default   running variance is
    keras    1e-3   the old value (m)     0.99      biased,   Σ(x − μ)²/M
    torch    1e-5   the new one (1 − m)   0.1       unbiased, Σ(x − μ)²/(M − 1)
    onnx     1e-5   the old value (m)     0.9       biased

"keras" is Keras 3. The fused layer of tf.keras 2, which the seed notebook ran on, keeps the
unbiased variance instead; over 32 images of 30 × 30 pixels the two differ by 1 in 28,800.

All three normalise with the biased variance. The state's names are PyTorch's: γ is `weight`, β is
`bias`.

`BatchNorm` is one of PyTorch's batch normalisations to every tool that looks for them: it inherits
from their base class. `normlab.convert_batchnorm` exchanges the layers of a network. What remains
different is told in the docstring of `BatchNorm`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from normlab import kernels
from normlab.core.groups import Group
from normlab.errors import UserError
from normlab.layers.parts import joint_moments

HALF = {torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Convention:
    """What a library means by "momentum", by the running variance, and its default ε."""

    name: str
    eps: float
    momentum: float
    momentum_weighs_old: bool
    unbiased_running_var: bool


CONVENTIONS = {
    "keras": Convention("keras", 1e-3, 0.99, momentum_weighs_old=True, unbiased_running_var=False),
    "torch": Convention("torch", 1e-5, 0.1, momentum_weighs_old=False, unbiased_running_var=True),
    "onnx": Convention("onnx", 1e-5, 0.9, momentum_weighs_old=True, unbiased_running_var=False),
}


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel.

    The values are taken relative to the channel's first one, so that a large mean costs no
    precision and a constant channel has exactly its value as mean and exactly 0 as variance.
    Two passes, never E[x²] − E[x]²: the variance cannot be negative.

    Args:
        x: (N, C) or (N, C, *), float32 or float64.

    Returns:
        μ and σ², both (C,).
    """
    dims = [0, *range(2, x.ndim)]
    first = x.detach()[0]
    while first.ndim > 1:
        first = first[..., 0]  # (C,) in the end
    d = x - per_channel(first, x)
    d_mean = d.mean(dims)
    var = (d - per_channel(d_mean, x)).square_().mean(dims)
    return first + d_mean, var


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """γ·(x − μ)/√(σ² + ε) + β, with every vector (C,) and `x` (N, C) or (N, C, *)."""
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    y = (x - per_channel(mean, x)) * per_channel(scale, x)
    return y if bias is None else y + per_channel(bias, x)


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View `v` (C,) so that it broadcasts along the channels of `x` (N, C, *)."""
    return v.view(1, -1, *[1] * (x.ndim - 2))


def wide(v: Tensor | None) -> Tensor | None:
    """γ or β in float32 if the network was cast to half precision, else as it is."""
    return v.float() if v is not None and v.dtype in HALF else v


def needed(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Drop the gradients that autograd did not ask for: it refuses one for a missing γ."""
    return tuple([g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=True)])


def gradient(
    x: Tensor, g: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, γ and β in closed form.

    With g = dL/dy, M values a channel and all sums over those values:

        dβ = Σ g
        dγ = Σ g·x̂
        dx = γ/(M·√(σ² + ε)) · (M·g − Σ g − x̂·Σ g·x̂)
    """
    dims = [0, *range(2, x.ndim)]
    count = x.numel() // x.shape[1]
    x_hat = normalize(x, mean, var, None, None, eps)
    bias_grad = g.sum(dims)
    weight_grad = (g * x_hat).sum(dims)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    x_grad = g - per_channel(bias_grad / count, x) - x_hat * per_channel(weight_grad / count, x)
    return x_grad * per_channel(scale, x), weight_grad, bias_grad


def part_moments(x: Tensor, shape: tuple[int, int, int] | None) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations (C,), float64, of a part of a batch; zeros for none.

    Args:
        shape: what `kernels.layout` says of x.
    """
    if shape is not None:
        return kernels.moments(x, shape)
    if not x.numel():
        nothing = x.new_zeros(x.shape[1], dtype=torch.float64)
        return nothing, nothing
    first = x.detach()[0].flatten(1)[:, 0] if x.ndim > 2 else x.detach()[0]  # (C,)
    mean, var = moments(x - per_channel(first, x))  # rounded to x's type beside 0, not beside first
    return first.double() + mean.double(), var.double() * (x.numel() // x.shape[1])


def part_gradient(
    group: Group,
    x: Tensor,
    shape: tuple[int, int, int] | None,
    g: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    count: int,
    *,
    keep_scale: float = 0.0,
    bias: Tensor | None = None,
    relu: bool = False,
    x_grad: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients with respect to x, γ and β of a part of a batch of `count` values a channel.

    Those of γ and β are this part's own, as those of every other weight are: whoever adds up the
    processes' gradients adds up these, too. The other arguments are those of `kernels.gradient`.
    """
    if shape is not None:
        x = kernels.as_saved(x, shape)
        g = kernels.like(g, x)
        batch = x, shape, g, mean, var, weight, eps
        sums, weight_grad, bias_grad = kernels.part_sums(*batch, bias=bias, relu=relu)
        if not x_grad:
            return None, weight_grad, bias_grad
        whole = group.sum(sums), count
        dx = kernels.part_gradient(*batch, *whole, keep_scale=keep_scale, bias=bias, relu=relu)
        return dx, weight_grad, bias_grad
    dims = [0, *range(2, x.ndim)]
    r = (var + eps).rsqrt()
    d = x - per_channel(mean, x)
    bias_grad, product = g.sum(dims), (g * d).sum(dims)
    if not x_grad:
        return None, product * r, bias_grad
    sums = group.sum(torch.cat([bias_grad, product]).double()) / max(count, 1)
    g_mean, product_mean = sums.to(x.dtype).chunk(2)
    scale = r if weight is None else r * weight
    dx = g - per_channel(g_mean, x) - d * per_channel(r * r * product_mean, x)
    return dx * per_channel(scale, x), product * r, bias_grad


class _GhostNormalize(torch.autograd.Function):
    """Pieces of a batch, each normalised by its own statistics; the running ones see their mean."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: "BatchNorm"
    ) -> Tensor:
        compiled, pieces = norm.is_plain(), norm.pieces(x)
        ctx.shapes = [kernels.layout(piece) if compiled else None for piece in pieces]
        outputs, ctx.moments = [], []
        for piece, shape in zip(pieces, ctx.shapes, strict=True):
            if shape is not None:
                y, mean, var = kernels.batch_norm(piece, shape, weight, bias, norm.eps, None)
            else:
                mean, var = moments(piece)
                y = normalize(piece, mean, var, weight, bias, norm.eps)
            outputs.append(y)
            ctx.moments.append((mean, var))
        mean, var = (torch.stack(v).mean(0) for v in zip(*ctx.moments, strict=True))
        norm.track(mean, var, norm.running(x.numel() // (x.shape[1] * len(pieces))))
        ctx.save_for_backward(x, weight)
        ctx.norm, ctx.has_bias = norm, bias is not None
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grads: list[tuple[Tensor | None, Tensor, Tensor]] = []
        start = 0
        for piece, shape, found in zip(ctx.norm.pieces(x), ctx.shapes, ctx.moments, strict=True):
            part = g[start : start + len(piece)]
            start += len(piece)
            mean, var = moments(piece) if torch.is_grad_enabled() else found
            if shape is None or torch.is_grad_enabled():
                grads.append(gradient(piece, part, mean, var, weight, ctx.norm.eps))
            else:
                batch = kernels.as_saved(piece, shape), shape, part, mean, var, weight
                grads.append(kernels.gradient(*batch, ctx.norm.eps))
        dx, dw, db = zip(*grads, strict=True)
        return (
            torch.cat(dx),
            None if weight is None else torch.stack(dw).sum(0),
            torch.stack(db).sum(0) if ctx.has_bias else None,
            None,
        )


class _BatchNormalize(torch.autograd.Function):
    """`moments`, `normalize` and `gradient`, in compiled passes where these apply.

    A gradient of the gradient is asked for with gradients enabled in `backward`: then `moments`
    and `gradient` are computed anew, by operations that can be differentiated.

    On small inputs most of the time is Python's, so every call here counts.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: "BatchNorm"
    ) -> Tensor:
        shape, count = kernels.layout(x), x.numel() // x.shape[1]
        group = norm.partners()
        if group is not None:
            shape = shape if norm.is_plain() else None
            mean, var, count = norm.join(group, x, *part_moments(x, shape))
            apply = normalize if shape is None else kernels.normalize
            y = apply(x, mean, var, weight, bias, norm.eps)
        elif shape is not None and norm.is_plain():
            running = norm.running(count)
            y, mean, var = kernels.batch_norm(x, shape, weight, bias, norm.eps, running)
        else:
            mean, var = moments(x)
            y = normalize(x, mean, var, weight, bias, norm.eps)
            norm.track(mean, var, norm.running(count))
        ctx.save_for_backward(x, weight)
        ctx.batch = shape, mean, var, norm.eps, bias is not None
        ctx.group, ctx.count = group, count
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        shape, mean, var, eps, has_bias = ctx.batch
        dx: Tensor | None
        if ctx.group is not None:
            if torch.is_grad_enabled():
                raise UserError(
                    "a synchronised BatchNorm has no gradient of the gradient: leave out "
                    'create_graph, or use statistics="local"'
                )
            batch, x_grad = (mean, var, weight, eps, ctx.count), ctx.needs_input_grad[0]
            dx, dw, db = part_gradient(ctx.group, x, shape, g, *batch, x_grad=x_grad)
        elif torch.is_grad_enabled():
            dx, dw, db = gradient(x, g, *moments(x), weight, eps)
        elif shape is None:
            dx, dw, db = gradient(x, g, mean, var, weight, eps)
        else:
            x, x_grad = kernels.as_saved(x, shape), ctx.needs_input_grad[0]
            dx, dw, db = kernels.gradient(x, shape, g, mean, var, weight, eps, x_grad=x_grad)
        return dx, None if weight is None else dw, db if has_bias else None, None


def as_group(group: Any) -> Group | None:
    """A process group of PyTorch's, or "world", as a `Group`; None stays None."""
    if group is None or isinstance(group, Group):
        return group
    if isinstance(group, str) and group != "world":
        raise UserError(f'group={group!r}: give a process group, or "world" for all processes')
    return Group(None if group == "world" else group)


class BatchNorm(TorchBatchNorm):
    """Batch normalisation over all dimensions but the second, for inputs of 2 to 5 dimensions.

    In training it normalises with the batch's own statistics and moves the running ones towards
    them; in evaluation (`.eval()`), and when frozen, it uses the running ones and changes nothing.

        >>> bn = BatchNorm(3)
        >>> y = bn(torch.randn(8, 3, 4, 4))
        >>> y.mean((0, 2, 3)).abs().max() < 1e-6
        tensor(True)

    Args:
        num_features: C, the size of dimension 1.
        convention: `keras`, `torch` or `onnx`; see the module's table.
        momentum: as the convention understands it; its default if None.
        eps: ε, added to the variance; the convention's default if None.
        scale: learn γ (`weight`).
        center: learn β (`bias`).
        track_running_stats: keep running statistics; without them, evaluation takes the batch's.
        group: the processes whose images are one batch, in training: a process group of
            `torch.distributed`, or "world" for all; None for this process alone. Each sends one
            message forward and one backward, also for no image at all. Frozen, and in evaluation,
            the layer sends nothing. Gradients of γ and β stay each process's own, as those of all
            weights are until somebody adds or averages them (`DistributedDataParallel` does).
        statistics: "group" for those of all the group's images, "local" for this process's own.
        ghost: in training, normalise so many images at a time by their own statistics (ghost
            batches: Hoffer et al. 2017, arXiv 1705.08741), as one process of several does with
            "local"; the running statistics see the mean of them. None for the whole batch. A last
            piece that holds a single value a channel joins the one before it.

    Half-precision inputs are normalised in float32 and returned as they came. Running statistics
    stay float32 when the layer is cast to half precision: in bfloat16 they would stop moving.

    With `convention="torch"` the layer gives what `torch.nn.BatchNorm1d`, `2d` and `3d` give, and
    tools that look for PyTorch's class find it: `torch.optim.swa_utils.update_bn`,
    `torch.nn.utils.fusion.fuse_conv_bn_eval`, `torch.func.replace_all_batch_norm_modules_`. State
    dicts go both ways, those without `num_batches_tracked` too. What remains different:

    - The constructor's options and their names; `normlab.convert_batchnorm` takes them over.
    - `momentum` as an attribute is the convention's. PyTorch's meaning is `1 - decay`. A tool
      that copies `momentum` (`SyncBatchNorm.convert_sync_batchnorm`) is right only with
      `convention="torch"`: call `convert_batchnorm(network, to="torch")` first.
    - The attribute `momentum = None` asks for the average of all batches, as in PyTorch; in the
      constructor None is the convention's default.
    - A tool that looks for `nn.BatchNorm2d` itself, not for the base class, passes it by.
    - `torch.func.vmap` and TorchScript do not take it: convert it first.

    Raises:
        UserError: unknown convention, C < 1, momentum outside [0, 1], ε < 0; in `forward`, an
            input of other dimensions or channels, or one that holds a single value a channel
            while training, whose variance would be 0 (with a group: all its inputs together); a
            gradient of the gradient with a group.
        RankError: another process of the group ended, or did not answer in time.
    """

    # None in a layer that keeps no running statistics.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    torch_class: Any = None  # the class that `convert_batchnorm` made this layer from

    def __init__(
        self,
        num_features: int,
        *,
        convention: str = "keras",
        momentum: float | None = None,
        eps: float | None = None,
        scale: bool = True,
        center: bool = True,
        track_running_stats: bool = True,
        group: Any = None,
        statistics: str = "group",
        ghost: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if convention not in CONVENTIONS:
            known = ", ".join(CONVENTIONS)
            raise UserError(f"unknown convention {convention!r}: choose one of {known}")
        self.convention = CONVENTIONS[convention]
        self.num_features = num_features
        # Plain numbers, as the compiled passes take them: NumPy's are none.
        self.momentum = float(self.convention.momentum if momentum is None else momentum)
        self.eps = float(self.convention.eps if eps is None else eps)
        self.affine = scale or center
        self.track_running_stats = track_running_stats
        self.frozen = False
        if statistics not in ("group", "local"):
            raise UserError(f"statistics={statistics!r}: choose group or local")
        if ghost is not None and ghost < 1:
            raise UserError(f"ghost={ghost}: choose 1 image or more, or None for the whole batch")
        self.group, self.statistics, self.ghost = as_group(group), statistics, ghost
        if num_features < 1:
            raise UserError(f"num_features={num_features}: a batch normalisation needs ≥ 1 channel")
        if not 0 <= self.momentum <= 1:
            raise UserError(f"momentum={self.momentum}: choose a value from 0 to 1")
        if not self.eps >= 0:
            raise UserError(f"eps={self.eps}: choose a value ≥ 0")
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features)) if scale else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if center else None)
        tracked = track_running_stats
        self.register_buffer("running_mean", torch.zeros(num_features) if tracked else None)
        self.register_buffer("running_var", torch.ones(num_features) if tracked else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if tracked else None)

    @property
    def decay(self) -> float | None:
        """m: how much of the old running statistics one step keeps, whatever the convention.

        None when the running statistics are the average of all batches (`momentum = None`).
        """
        if self.momentum is None:
            return None
        return self.momentum if self.convention.momentum_weighs_old else 1 - self.momentum

    def freeze(self, frozen: bool = True) -> "BatchNorm":
        """Use running statistics and learn nothing, also after `.train()`, until unfrozen."""
        self.frozen = frozen
        for parameter in self.parameters():
            parameter.requires_grad_(not frozen)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (N, C) or (N, C, *); same shape, type and memory layout out."""
        self.check(x)
        if x.dtype in HALF:
            return self.forward(x.float()).to(x.dtype)
        if not self.uses_batch():
            return self._normalize_running(x)
        weight, bias = wide(self.weight), wide(self.bias)
        if not x.numel() and self.partners() is None:  # nothing to take statistics from
            nothing = x.new_zeros(self.num_features)
            return normalize(x, nothing, nothing, weight, bias, self.eps)
        apply: Any = _GhostNormalize.apply if self.has_ghosts() else _BatchNormalize.apply
        y: Tensor = apply(x, weight, bias, self)
        return y

    def has_ghosts(self) -> bool:
        """Whether `forward` would now normalise a batch piece by piece."""
        return self.ghost is not None and self.training and not self.frozen

    def pieces(self, x: Tensor) -> list[Tensor]:
        """The parts of `x` (N, C, *) that are normalised by statistics of their own."""
        pieces = list(torch.split(x, self.ghost or len(x)))
        if len(pieces) > 1 and pieces[-1].numel() == self.num_features:
            pieces[-2:] = [x[len(x) - len(pieces[-2]) - len(pieces[-1]) :]]
        return pieces

    def standardize(self, x: Tensor) -> Tensor:
        """x̂ of a training batch that needs no gradient; moves the running statistics."""
        if x.dtype in HALF:
            return self.standardize(x.float()).to(x.dtype)
        shape = kernels.layout(x)
        if shape is not None and self.is_plain() and self.partners() is None:
            running = self.running(x.numel() // self.num_features)
            return kernels.batch_norm(x, shape, None, None, self.eps, running)[0]
        with torch.no_grad():
            y: Tensor = _BatchNormalize.apply(x, None, None, self)  # type: ignore[no-untyped-call]
        return y

    def uses_batch(self) -> bool:
        """Whether `forward` would now use the batch's own statistics, not the running ones."""
        return (self.training and not self.frozen) or vars(self)["_buffers"]["running_mean"] is None

    def partners(self) -> Group | None:
        """The processes to share the statistics of a training batch with; None if there are none.

        Raises:
            UserError: the layer has a group, and `torch.distributed` was not started.
        """
        group = self.group
        if group is None or not self.training or self.frozen:
            return None
        if self.statistics == "local" or self.ghost is not None:
            return None
        return group if group.size > 1 else None

    def join(self, group: Group, x: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean, biased variance (C,) and number of values of the group's batch, of which `x` is a
        part and `mean` and `m2` are its moments; moves the running statistics.
        """
        own = x.numel() // x.shape[1] if x.numel() else 0
        count, mean, var = joint_moments(group, own, mean, m2)
        mean, var = mean.to(x.dtype), var.to(x.dtype)
        self.track(mean, var, self.running(count) if count else None)
        return mean, var, count

    def compiled(self, x: Tensor) -> bool:
        """Whether the compiled kernels take `x` and this layer's state."""
        return kernels.layout(x) is not None and self.is_plain()

    def is_plain(self) -> bool:
        """Whether γ, β and the running statistics, as far as there are any, are as the compiled
        passes take them: float32, in the processor's memory and without gaps.
        """
        state = vars(self)  # found faster here than as attributes
        weights, buffers = state["_parameters"], state["_buffers"]
        if "weight" not in weights or "bias" not in weights:  # parametrised, or pruned
            return False
        batches = buffers["num_batches_tracked"]
        return (batches is None or (batches.dtype is torch.int64 and batches.is_cpu)) and (
            kernels.plain(
                *(weights["weight"], weights["bias"]),
                *(buffers["running_mean"], buffers["running_var"]),
            )
        )

    def _normalize_running(self, x: Tensor) -> Tensor:
        fast = self.compiled(x) and not torch.is_grad_enabled()
        apply = kernels.normalize if fast else normalize
        weight, bias = wide(self.weight), wide(self.bias)
        return apply(x, self.running_mean, self.running_var, weight, bias, self.eps)

    def running(self, count: int) -> kernels.Running | None:
        """How a batch of `count` values a channel moves the running statistics; None if not."""
        correction = count / (count - 1) if self.convention.unbiased_running_var else 1.0
        named = vars(self)["_buffers"]  # found faster here than as attributes
        mean, var, batches = (
            named["running_mean"],
            named["running_var"],
            named["num_batches_tracked"],
        )
        if mean is None or not self.track_running_stats:
            return None
        keep = self.decay
        if keep is None:  # the average of all batches: each weighs the same
            keep = 1 - 1 / (int(batches) + 1)
        return kernels.Running(mean, var, keep, correction, batches)

    @staticmethod
    @torch.no_grad()
    def track(mean: Tensor, var: Tensor, running: kernels.Running | None) -> None:
        """Move the running statistics, if any: running ← m·running + (1 − m)·batch."""
        if running is None:
            return
        var = var * running.correction
        running.mean.lerp_(mean.to(running.mean.dtype), 1 - running.keep)
        running.var.lerp_(var.to(running.var.dtype), 1 - running.keep)
        running.batches.add_(1)

    def check(self, x: Tensor) -> None:
        """Raise `UserError` unless `x` is what `forward` takes now."""
        if not 2 <= x.ndim <= 5 or x.shape[1] != self.num_features:
            raise UserError(
                f"an input of shape {tuple(x.shape)}: "
                f"this layer takes 2 to 5 dimensions, the second of size {self.num_features}"
            )
        if x.numel() == self.num_features and self.uses_batch() and self.partners() is None:
            raise UserError(
                f"a training batch of shape {tuple(x.shape)} holds 1 value a channel, too "
                "few for a variance: use a batch of two or more, or .eval() or .freeze()"
            )
        if self.ghost == 1 and self.has_ghosts() and x.numel() == len(x) * self.num_features:
            raise UserError(
                f"ghost=1 and an input of shape {tuple(x.shape)}: a piece holds 1 value a channel, "
                "too few for a variance: choose 2 or more"
            )

    def reset_parameters(self) -> None:
        """γ to 1, β to 0, and the running statistics to where they began."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BatchNorm":
        """Move or cast the layer; running statistics do not go below float32."""
        before = {name: self._buffers[name] for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in HALF:
                source = new if old.is_meta else old  # the values before they were rounded
                self._buffers[name] = source.to(new.device, torch.float32)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """As PyTorch's layer loads, files without a counter too; statistics stay float32."""
        super()._load_from_state_dict(*args)
        for name in ("running_mean", "running_var"):  # `assign=True` takes over the file's type
            self._buffers[name] = wide(self._buffers[name])

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, convention={self.convention.name!r}, momentum={self.momentum}, "
            f"eps={self.eps}, scale={self.weight is not None}, center={self.bias is not None}"
            + ("" if self.track_running_stats else ", track_running_stats=False")
            + ("" if self.group is None else f", statistics={self.statistics!r}")
            + ("" if self.ghost is None else f", ghost={self.ghost}")
            + (", frozen" if self.frozen else "")
        )
