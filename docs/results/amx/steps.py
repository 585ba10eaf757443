"""A step of a recipe with AMX's products, then one with AVX512-BF16's, on random pictures.

steps.json was written from what this prints, with the rates that `passes` gives beside.

PYTHONPATH=src:. python docs/results/amx/steps.py fast94 fast79
"""

import sys

import numpy as np

from benchmarks import passes
from normlab.data.images import ImageData
from normlab.kernels import convolutions, library

rng = np.random.default_rng(0)
IMAGES = ImageData(
    name="cifar10",
    x_train=rng.integers(0, 256, (20000, 32, 32, 3), dtype=np.uint8),
    y_train=rng.integers(0, 10, 20000).astype(np.uint8),
    x_test=rng.integers(0, 256, (1000, 32, 32, 3), dtype=np.uint8),
    y_test=rng.integers(0, 10, 1000).astype(np.uint8),
    class_names=tuple("abcdefghij"),
)
passes.load = lambda: IMAGES
passes.WARM_UP, passes.STEPS = 3, 20
for name in sys.argv[1:]:
    for way, has in (("AMX", library.has_amx), ("AVX512-BF16", lambda: False)):
        convolutions.has_amx = has
        found = passes.passes_of(name, 2)
        print(f"{name}, {way}: {1e3 * found['seconds']:.2f} ms a step")
        for row in found["passes"][:20]:
            print(f"  {row['pass']:60} {row['calls']:g} {1e3 * row['seconds']:.2f} ms")
