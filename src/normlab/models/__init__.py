"""Networks by name."""

from torch import nn

from normlab.models.notebook import NotebookNet
from normlab.models.summary import Summary, summarize

MODELS: dict[str, type[nn.Module]] = {"notebook": NotebookNet}

__all__ = ["MODELS", "NotebookNet", "Summary", "summarize"]
