"""Networks by name."""

from torch import nn

from normlab.models.notebook import NotebookNet
from normlab.models.sigmoid import SigmoidNet
from normlab.models.summary import Summary, summarize

MODELS: dict[str, type[nn.Module]] = {"notebook": NotebookNet, "sigmoid": SigmoidNet}

__all__ = ["MODELS", "NotebookNet", "SigmoidNet", "Summary", "summarize"]
