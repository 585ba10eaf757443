"""A digits classifier whose author forgot to use the seed."""

import argparse
import json

import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int)  # read, and never used
parser.add_argument("--rate", type=float)
arguments = parser.parse_args()

rng = np.random.default_rng(0)
x = rng.normal(size=(2000, 20))
y = (x[:, :5].sum(1) + rng.normal(size=2000) > 0).astype(float)
w = rng.normal(size=20) / 10
for _ in range(30):
    for i in rng.permutation(1500).reshape(-1, 50):
        p = 1 / (1 + np.exp(-x[i] @ w))
        w -= arguments.rate * x[i].T @ (p - y[i]) / len(i)
accuracy = float((((x[1500:] @ w) > 0) == y[1500:]).mean())
print(json.dumps({"test_accuracy": accuracy}))
