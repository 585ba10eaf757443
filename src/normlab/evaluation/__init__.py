"""Scores of a classifier, and what they are worth. Importing this room loads no PyTorch."""
