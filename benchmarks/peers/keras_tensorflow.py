"""Keras on TensorFlow, running the notebook's network as its author wrote it.

`compile` and `fit` are the author's calls, on float32 arrays in memory. What makes this peer fast
is what its makers chose: compiled graphs (`tf.function`) of oneDNN operations, input pipelines that
read ahead, pools of threads that flush denormals. XLA stays off, as Keras has it on machines
without an accelerator: it is far slower there.
"""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import queue
import threading
from typing import Any

import numpy as np

from benchmarks.quiet import no_stderr

with no_stderr():  # TensorFlow tells of its defaults before it can be asked not to
    import keras
    import tensorflow as tf
    from keras import layers

from benchmarks.entry import (
    Case,
    Entry,
    Images,
    Options,
    Probabilities,
    batches,
    inference_cases,
)


def notebook() -> Any:
    """The notebook's third cell."""
    x = layers.Input(shape=(32, 32, 3), name="input")
    h = layers.BatchNormalization()(x)
    h = layers.Conv2D(32, kernel_size=(3, 3), activation="relu", name="conv1")(h)
    h = layers.Dropout(0.2)(h)
    h = layers.BatchNormalization()(h)
    h = layers.Conv2D(32, kernel_size=(3, 3), activation="relu", padding="same", name="conv2")(h)
    h = layers.MaxPooling2D(pool_size=(2, 2), name="pool1")(h)
    h = layers.BatchNormalization()(h)
    h = layers.Conv2D(64, kernel_size=(3, 3), activation="relu", padding="same", name="conv3")(h)
    h = layers.MaxPooling2D(pool_size=(2, 2), name="pool2")(h)
    h = layers.Flatten()(h)
    h = layers.Dropout(0.2)(h)
    h = layers.BatchNormalization()(h)
    h = layers.Dense(512, activation="relu", name="hidden")(h)
    h = layers.Dropout(0.2)(h)
    h = layers.BatchNormalization()(h)
    y = layers.Dense(10, activation="softmax", name="output")(h)
    return keras.Model(x, y)


def set_weights(model: Any, weights: dict[str, np.ndarray]) -> None:
    """Give `model` weights that are named and laid out as normlab has them."""
    normalizations = 0
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            name = "batch_normalization" + (f"_{normalizations}" if normalizations else "")
            normalizations += 1
            keys = ("weight", "bias", "running_mean", "running_var")
            layer.set_weights([weights[f"{name}.{key}"] for key in keys])
        elif layer.weights:
            kernel = weights[f"{layer.name}.weight"]
            order = (2, 3, 1, 0) if kernel.ndim == 4 else (1, 0)
            layer.set_weights([kernel.transpose(order), weights[f"{layer.name}.bias"]])


def _start(options: Options) -> Any:
    """The model, with its threads set and the prepared weights."""
    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    tf.config.threading.set_inter_op_parallelism_threads(options.threads)
    model = notebook()
    model.compile(loss="categorical_crossentropy", optimizer="adam", metrics=["accuracy"])
    set_weights(model, options.weights("notebook"))
    return model


def _about() -> dict[str, Any]:
    tiny = tf.function(lambda x: tf.reduce_max(x * 1e-10))(tf.fill([1 << 20], 1e-30))
    return {
        "version": f"Keras {keras.__version__} on TensorFlow {tf.__version__}",
        "flushes_denormals": float(tiny) == 0,
    }


def _pixels(images: Images) -> np.ndarray:
    """The notebook's second cell."""
    return images.astype("float32") / 255


class _Turns(keras.callbacks.Callback):
    """Lets a `fit` that never ends do a number of batches at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.orders: queue.Queue[int] = queue.Queue()
        self.done: queue.Queue[BaseException | None] = queue.Queue()
        self.left = 0

    def on_train_begin(self, logs: Any = None) -> None:
        self.left = self.orders.get()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if self.left == 0:
            self.done.put(None)
            self.left = self.orders.get()


def training(options: Options) -> Entry:
    """`fit` as in the notebook; it waits in a thread for its turns."""
    model, turns = _start(options), _Turns()
    batch = options.extra["batch"]

    def fit() -> None:
        x = _pixels(options.array("x_train"))
        y = keras.utils.to_categorical(options.array("y_train"), 10)
        try:
            model.fit(
                x,
                y,
                batch_size=batch,
                epochs=10**6,
                validation_split=0.1,
                validation_freq=10**6,  # timed on its own: see `validation`
                verbose=0,
                callbacks=[turns],
            )
        except BaseException as e:
            turns.done.put(e)

    thread = threading.Thread(target=fit, daemon=True)

    def run(repeats: int) -> None:
        if not thread.is_alive():
            thread.start()
        turns.orders.put(repeats)
        failure = turns.done.get()
        if failure is not None:
            raise failure

    return Entry({"": Case(run, batch)}, lambda x: _answer(model, x), _about())


def validation(options: Options) -> Entry:
    """The validation that `fit` does after an epoch: `evaluate` with the same batch size."""
    model = _start(options)
    n = len(options.array("x_train"))
    first = int(n * 0.9)
    x = _pixels(options.array("x_train")[first:])
    y = keras.utils.to_categorical(options.array("y_train"), 10)[first:]

    def run(repeats: int) -> None:
        for _ in range(repeats):
            model.evaluate(x, y, batch_size=options.extra["batch"], verbose=0)

    return Entry({"": Case(run, len(x))}, lambda x: _answer(model, x), _about())


def _answer(model: Any, images: Images) -> Probabilities:
    answers: Probabilities = model.predict(_pixels(images), verbose=0)
    return answers


def predict(options: Options) -> Entry:
    """`predict`, the call that the documentation gives for many images."""
    model = _start(options)

    def answer(images: Images, batch: int) -> Probabilities:
        answers: Probabilities = model.predict(_pixels(images), batch_size=batch, verbose=0)
        return answers

    cases = inference_cases(answer, options.array("x_test"), 1024)
    return Entry(cases, lambda x: answer(x, 256), _about())


def function(options: Options) -> Entry:
    """The model inside a `tf.function`, the way the documentation gives for few images."""
    model = _start(options)
    signature = [tf.TensorSpec([None, 32, 32, 3], tf.float32)]
    compiled = tf.function(lambda x: model(x, training=False), input_signature=signature)

    def answer(images: Images, batch: int) -> Probabilities:
        return np.concatenate([compiled(_pixels(x)).numpy() for x in batches(images, batch)])

    cases = inference_cases(answer, options.array("x_test"), 1024)
    return Entry(cases, lambda x: answer(x, 256), _about())
