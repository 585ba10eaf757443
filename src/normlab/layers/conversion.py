"""Exchange PyTorch's batch normalisations for normlab's, and back, in a network as it stands."""

from typing import Any

import torch
from torch import nn

from normlab.errors import UserError
from normlab.layers.batchnorm import BatchNorm, as_group

# Exactly these: a subclass may do more than normalise (timm's BatchNormAct2d also activates).
TORCH_CLASSES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TorchClass = type[nn.BatchNorm1d] | type[nn.BatchNorm2d] | type[nn.BatchNorm3d]


def convert_batchnorm(
    module: nn.Module, to: str = "normlab", *, torch_class: TorchClass = nn.BatchNorm2d
) -> nn.Module:
    """Exchange the batch normalisations in `module`; outputs and state dict stay the same.

        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> convert_batchnorm(network)[1]
        BatchNorm(8, convention='torch', momentum=0.1, eps=1e-05, scale=True, center=True)
        >>> convert_batchnorm(network, to="torch")[1]
        BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)

    Parameters and buffers are the same objects before and after, so an optimiser keeps working.
    Hooks on the exchanged layers are lost. PyTorch has no `.freeze()`: a frozen layer comes back
    in evaluation mode and without gradients, and the next `.train()` lets its statistics move.
    PyTorch keeps the unbiased running variance, also for a layer that had Keras' convention.

    Args:
        module: a network, changed in place, or a normaliser itself.
        to: `normlab`: `nn.BatchNorm1d`, `2d` and `3d` become `normlab.BatchNorm` with PyTorch's
            convention; subclasses (`torch.nn.utils.parametrize` makes such, too) and
            `SyncBatchNorm` stay. `torch`: the other way round.
        torch_class: the class for layers that did not come from one of PyTorch's; it decides how
            many dimensions their input has.

    Returns:
        `module`, or its successor if it is a normaliser itself.

    Raises:
        UserError: another `to`, a lazy layer that has not seen its first batch, or one whose γ or β
            is pruned or reparametrised by hooks, which would be lost. Nothing is changed then.
    """
    if to not in ("normlab", "torch"):
        raise UserError(f"to={to!r}: choose normlab or torch")
    done: dict[nn.Module, nn.Module] = {}  # a layer that stands in two places stays one layer

    def successor(layer: nn.Module) -> nn.Module:
        if layer not in done:
            if to == "torch" and type(layer) is BatchNorm:
                done[layer] = _to_torch(layer, torch_class)
            elif to == "normlab" and type(layer) in TORCH_CLASSES:
                done[layer] = _to_normlab(layer)  # type: ignore[arg-type]
            else:
                done[layer] = layer
                for name, child in list(layer._modules.items()):
                    if child is not None and (new := successor(child)) is not child:
                        layer._modules[name] = new
        return done[layer]

    if to == "normlab":
        _refuse_lazy(module)
    _refuse_pruned(module, (BatchNorm,) if to == "torch" else TORCH_CLASSES)
    return successor(module)


def convert_sync_batchnorm(
    module: nn.Module, group: Any = "world", *, statistics: str = "group"
) -> nn.Module:
    """Let the batch normalisations in `module` share their statistics with other processes.

    As `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, on CPUs too: outputs and state dict stay the
    same, and PyTorch's layers become normlab's (see `convert_batchnorm`). Call it in each process
    before `DistributedDataParallel`, with `broadcast_buffers=False`: all have the same statistics.

        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> convert_sync_batchnorm(network)[1].statistics
        'group'

    Args:
        group: a process group of `torch.distributed`, or "world" for all processes; None makes the
            layers this process's own again.
        statistics: "group", or "local" for each process's own.

    Raises:
        UserError: as `convert_batchnorm` does, or other statistics.
    """
    if statistics not in ("group", "local"):
        raise UserError(f"statistics={statistics!r}: choose group or local")
    module = convert_batchnorm(module)
    for layer in module.modules():
        if isinstance(layer, BatchNorm):
            layer.group, layer.statistics = as_group(group), statistics
    return module


def _refuse_lazy(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        lazy = isinstance(layer, nn.modules.lazy.LazyModuleMixin)
        if lazy and isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"{name or 'the module'} is a {type(layer).__name__} that has not seen its first "
                "batch: run one through the network first"
            )


def _refuse_pruned(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Refuse layers whose γ or β is computed by a hook from parameters of other names."""
    for name, layer in module.named_modules():
        if type(layer) in kinds and not {"weight", "bias"} <= layer._parameters.keys():
            raise UserError(
                f"{name or 'the module'} is pruned or reparametrised (its parameters are "
                f"{', '.join(layer._parameters)}): make that permanent first, such as by "
                "torch.nn.utils.prune.remove(layer, 'weight')"
            )


def _to_normlab(layer: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> BatchNorm:
    new = BatchNorm(
        layer.num_features,
        convention="torch",
        eps=layer.eps,
        scale=layer.weight is not None,
        center=layer.bias is not None,
        track_running_stats=layer.track_running_stats,
    )
    new.momentum = layer.momentum
    new.torch_class = type(layer)
    _take_over(layer, new)
    for name in ("running_mean", "running_var"):
        buffer = new._buffers[name]
        if buffer is not None and buffer.dtype != torch.float64:
            new._buffers[name] = buffer.float()
    return new


def _to_torch(layer: BatchNorm, torch_class: TorchClass) -> nn.Module:
    momentum = layer.momentum
    if momentum is not None and layer.convention.momentum_weighs_old:
        momentum = 1 - momentum
    new = (layer.torch_class or torch_class)(
        layer.num_features,
        eps=layer.eps,
        momentum=momentum,
        affine=layer.affine,
        track_running_stats=layer.track_running_stats,
    )
    _take_over(layer, new)
    if layer.frozen:
        new.eval()
    return new


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the parameters, buffers and mode of `old`."""
    new._parameters.update(old._parameters)
    new._buffers.update(old._buffers)
    new.training = old.training
