"""The notebook "Implementing Batch Normalization on CIFAR10" as a script: Keras on TensorFlow.

python keras_cifar10.py --norm batch --seed 0      or --norm none: the same without its layers

normlab is not needed here. The last line that it prints is JSON, which `normlab compare --command`
reads. Unlike the notebook it draws a new order of the images in each epoch: after
`set_random_seed` Keras repeats the same one (docs/notebook.md).
"""

import argparse
import json
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers, models
from keras.utils import to_categorical

parser = argparse.ArgumentParser()
parser.add_argument("--norm", choices=["batch", "none"], default="batch")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--epochs", type=int, default=25)
parser.add_argument(
    "--data", help="a .npz with x_train, y_train, x_test, y_test, to save a download"
)
arguments = parser.parse_args()

keras.utils.set_random_seed(arguments.seed)

if arguments.data:
    with np.load(arguments.data) as found:
        (x_train, y_train), (x_test, y_test) = (
            (found["x_train"], found["y_train"]),
            (found["x_test"], found["y_test"]),
        )
else:
    (x_train, y_train), (x_test, y_test) = keras.datasets.cifar10.load_data()
X_train, X_test = x_train.astype("float32") / 255, x_test.astype("float32") / 255
Y_train, Y_test = to_categorical(y_train), to_categorical(y_test)


def normalize(h):
    return layers.BatchNormalization()(h) if arguments.norm == "batch" else h


x = layers.Input(shape=(32, 32, 3), name="input")
h = normalize(x)
h = layers.Conv2D(32, kernel_size=(3, 3), activation="relu", name="conv1")(h)
h = layers.Dropout(0.2)(h)
h = normalize(h)
h = layers.Conv2D(32, kernel_size=(3, 3), activation="relu", padding="same", name="conv2")(h)
h = layers.MaxPooling2D(pool_size=(2, 2), name="pool1")(h)
h = normalize(h)
h = layers.Conv2D(64, kernel_size=(3, 3), activation="relu", padding="same", name="conv3")(h)
h = layers.MaxPooling2D(pool_size=(2, 2), name="pool2")(h)
h = layers.Flatten()(h)
h = layers.Dropout(0.2)(h)
h = normalize(h)
h = layers.Dense(512, activation="relu", name="hidden")(h)
h = layers.Dropout(0.2)(h)
h = normalize(h)
y = layers.Dense(10, activation="softmax", name="output")(h)

model = models.Model(x, y)
model.compile(loss="categorical_crossentropy", optimizer="adam", metrics=["accuracy"])
held_out = len(X_train) // 10  # the last tenth, as validation_split=0.1 takes it
train, validation = slice(None, -held_out), slice(-held_out, None)
rng = np.random.default_rng(arguments.seed)
for epoch in range(arguments.epochs):
    order = rng.permutation(len(X_train) - held_out)
    model.fit(
        X_train[train][order],
        Y_train[train][order],
        batch_size=32,
        initial_epoch=epoch,
        epochs=epoch + 1,
        shuffle=False,
        validation_data=(X_train[validation], Y_train[validation]),
        verbose=2,
    )

loss, accuracy = model.evaluate(X_test, Y_test, verbose=0)
print(json.dumps({"test_accuracy": accuracy, "test_loss": loss}))
