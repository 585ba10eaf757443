"""Write src/normlab/data/sample.npz: a small, balanced part of CIFAR-10 that ships with normlab.

The rule: of each class the first 40 training and the first 20 test images, in their order.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normlab import data

PER_CLASS = {"train": 40, "test": 20}
TARGET = Path(__file__).resolve().parent.parent / "src" / "normlab" / "data" / "sample.npz"


def first_of_each_class(labels: NDArray[np.integer], count: int) -> NDArray[np.intp]:
    firsts = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(firsts))


def main() -> None:
    cifar10 = data.load()
    train = first_of_each_class(cifar10.y_train, PER_CLASS["train"])
    test = first_of_each_class(cifar10.y_test, PER_CLASS["test"])
    np.savez_compressed(
        TARGET,
        x_train=cifar10.x_train[train],
        y_train=cifar10.y_train[train],
        x_test=cifar10.x_test[test],
        y_test=cifar10.y_test[test],
        class_names=np.array(cifar10.class_names),
    )
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
