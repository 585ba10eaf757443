"""What recipes name: normalisers and networks. A new one is its file and one line here."""

from typing import Any

from normlab.core.registry import Registry

NORMS: Registry[Any] = Registry(
    "norm",
    {
        "batch": "normlab.layers.batchnorm:BatchNorm",
        "none": "normlab.layers.norms:NoNorm",
        "layer": "normlab.layers.norms:LayerNorm",
        "rms": "normlab.layers.norms:RMSNorm",
        "group": "normlab.layers.norms:GroupNorm",
        "instance": "normlab.layers.norms:InstanceNorm",
    },
)

MODELS: Registry[Any] = Registry(
    "model",
    {
        "notebook": "normlab.models.notebook:NotebookNet",
        "fast": "normlab.models.fast:FastNet",
        "fast-deep": "normlab.models.fast:deep",
        "fast-deeper": "normlab.models.fast:deeper",
        "fast-wide": "normlab.models.fast:wide",
        "fast-wider": "normlab.models.fast:wider",
        "fast-widest": "normlab.models.fast:widest",
        "fast-huge": "normlab.models.fast:huge",
        "sigmoid": "normlab.models.sigmoid:SigmoidNet",
        "timm": "normlab.models.timm_net:TimmNet",
    },
)
