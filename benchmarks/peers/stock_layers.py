"""The network of `fast79` on PyTorch's own layers."""

import copy

from torch import nn

from normlab.layers import BatchNorm, Conv2d, MaxPool2d


def stock(model: nn.Module) -> nn.Module:
    """A copy of `model` whose layers are those of `torch.nn`, with the same values."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if (replacement := _stock_layer(module)) is not None:
            replacement.load_state_dict(module.state_dict(), strict=False)
            model.set_submodule(name, replacement)
    return model


def _stock_layer(module: nn.Module) -> nn.Module | None:
    if isinstance(module, Conv2d):
        bias = module.bias is not None
        return nn.Conv2d(
            module.in_channels, module.out_channels, 3, padding=module.padding[0], bias=bias
        )
    if isinstance(module, BatchNorm):
        return nn.BatchNorm2d(module.num_features, module.eps, momentum=1 - module.momentum)
    if isinstance(module, MaxPool2d):
        return nn.MaxPool2d(module.kernel_size, module.stride)
    return None
