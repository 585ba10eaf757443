"""Networks by name."""

from normlab.models.fast import FastNet
from normlab.models.notebook import NotebookNet
from normlab.models.sigmoid import SigmoidNet
from normlab.models.summary import Summary, summarize
from normlab.recipes.families import MODELS

__all__ = ["MODELS", "FastNet", "NotebookNet", "SigmoidNet", "Summary", "summarize"]
