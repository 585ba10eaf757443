"""Scores of a classifier, and what they are worth."""
