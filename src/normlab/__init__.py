"""Batch-normalised image classifiers, measured honestly."""
