"""Scores of a classifier, and what they are worth."""

from normlab.evaluation.evaluation import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
