"""Batch normalisation once more, in NumPy float64 and straight from the paper."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def _rows(x: ArrayLike) -> tuple[Array, tuple[int, ...]]:
    moved = np.moveaxis(np.asarray(x, np.float64), 1, -1)
    return moved.reshape(-1, moved.shape[-1]), moved.shape


def _back(rows: Array, shape: tuple[int, ...]) -> Array:
    return np.moveaxis(rows.reshape(shape), -1, 1)


def batch_moments(x: ArrayLike) -> tuple[Array, Array]:
    rows, _ = _rows(x)
    return rows.mean(0), rows.var(0)


def batch_norm(x: ArrayLike, gamma: ArrayLike, beta: ArrayLike, eps: float) -> Array:
    rows, shape = _rows(x)
    mean, var = rows.mean(0), rows.var(0)
    return _back((rows - mean) / np.sqrt(var + eps) * np.asarray(gamma) + np.asarray(beta), shape)


def batch_norm_gradients(
    x: ArrayLike, gamma: ArrayLike, eps: float, g: ArrayLike
) -> tuple[Array, Array, Array]:
    """The chain rule of the paper's page 4, step by step: dx, dγ, dβ."""
    rows, shape = _rows(x)
    dy, _ = _rows(g)
    m = len(rows)
    mean, var = rows.mean(0), rows.var(0)
    x_hat = (rows - mean) / np.sqrt(var + eps)
    dx_hat = dy * np.asarray(gamma)
    dvar = (dx_hat * (rows - mean)).sum(0) * -0.5 * (var + eps) ** -1.5
    dmean = -dx_hat.sum(0) / np.sqrt(var + eps) + dvar * (-2 * (rows - mean)).sum(0) / m
    dx = dx_hat / np.sqrt(var + eps) + dvar * 2 * (rows - mean) / m + dmean / m
    return _back(dx, shape), (dy * x_hat).sum(0), dy.sum(0)
