"""The callbacks in a real `fit`: bits, recording, findings, history.

Here with Keras on PyTorch; `KERAS_BACKEND=tensorflow` runs the same on TensorFlow, where that is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import normlab
from normlab.inspection.recording import read_recording

pytest.importorskip("keras", reason="needs Keras")

# Each Keras has one backend, so it runs in a process of its own.
SCRIPT = """
import hashlib, json, sys
import numpy as np
import keras
from keras import layers
from normlab.callbacks.keras import Checkup, History, Watch

folder, how = sys.argv[1:]
keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
x = 5 * rng.normal(size=(60, 8, 8, 3)).astype("float32")
y = rng.integers(0, 4, 60)
model = keras.Sequential([
    layers.Input((8, 8, 3)),
    layers.Conv2D(6, 3, name="conv"), layers.BatchNormalization(name="bn"), layers.ReLU(),
    layers.Dropout(0.3), layers.Flatten(), layers.LayerNormalization(name="ln"),
    layers.Dense(4, activation="softmax", name="fc"),
])
model.compile(loss="sparse_categorical_crossentropy", optimizer=keras.optimizers.SGD(0.05),
              metrics=["accuracy"])
lines = []
callbacks = []
if how == "watched":
    watch, checkup = Watch(folder, x[:16], every=4), Checkup(x, report=lines.append)
    callbacks = [watch, checkup, History(folder)]
model.fit(x, y, batch_size=10, epochs=2, validation_split=0.2, verbose=0, callbacks=callbacks)
digest = hashlib.sha256()
for weight in model.weights:
    digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(weight)).tobytes())
print(json.dumps({"digest": digest.hexdigest(), "lines": lines}))
"""


def fit(folder: Path, how: str) -> dict[str, object]:
    environment = {"KERAS_BACKEND": "torch", **os.environ}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), how],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.soak
def test_a_keras_training_is_watched_examined_and_noted(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    watched, alone = fit(folder, "watched"), fit(folder, "alone")
    assert watched["digest"] == alone["digest"]

    seen = read_recording(folder)
    assert seen.layers == ("conv", "bn", "ln", "fc")
    assert list(seen.steps) == [1, 2, 4, 8]
    assert seen.arrays["bn/in/mean"].shape == (4, 6)
    assert seen.arrays["bn/running_mean"].shape == (4, 6)
    assert seen.arrays["bn/out/mean"] == pytest.approx(seen.arrays["bn/beta"], abs=1e-5)
    assert (seen.arrays["fc/in/drift"] > 0).all()
    assert seen.arrays["conv/in/drift"].max() == 0
    assert np.isfinite(seen.arrays["loss"]).all()
    lines = watched["lines"]
    assert isinstance(lines, list)
    assert any("stale at bn: after 5 steps with m = 0.99" in line for line in lines), lines
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["steps"]) for r in rows] == [(1, 5), (2, 10)]
    assert all(0 <= r["val_accuracy"] <= 1 for r in rows)
    normlab.inspect(folder).write(tmp_path / "drawn")


NESTED = """
import json, sys
import numpy as np
import keras
from keras import layers
from normlab.callbacks.keras import Checkup, History, Watch

def base(name):
    x = layers.Input((8, 8, 3))
    y = layers.BatchNormalization(name="bn")(layers.Conv2D(4, 3, name="conv")(x))
    return keras.Model(x, y, name=name)

folder = sys.argv[1]
keras.utils.set_random_seed(0)
x = 5 * np.random.default_rng(0).normal(size=(12, 8, 8, 3)).astype("float32")
y = np.arange(12) % 4
left, right = base("left"), base("right")
right.trainable = False
dead = left.get_layer("conv")
dead.trainable = False
dead.kernel.assign(np.concatenate([np.zeros((3, 3, 3, 3)), np.ones((3, 3, 3, 1))], 3))
inputs = layers.Input((8, 8, 3))
h = layers.BatchNormalization(name="bn")(layers.Add()([left(inputs), right(inputs)]))
outputs = layers.Dense(4, activation="softmax", name="fc")(layers.GlobalAveragePooling2D()(h))
model = keras.Model(inputs, outputs, name="all")
optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=4)
model.compile(loss="sparse_categorical_crossentropy", optimizer=optimizer)
lines = []
def fit(model, *others):
    callbacks = [Checkup(x, report=lines.append), *others]
    model.fit(x, y, batch_size=2, epochs=2, verbose=0, callbacks=callbacks)
fit(model, Watch(folder, x, every=1), History(folder))

class Mine(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = model
    def call(self, x, training=False):
        return self.inner(x, training=training)

mine = Mine()
mine.compile(loss="sparse_categorical_crossentropy", optimizer="sgd")
fit(mine)
left.get_layer("conv").bias.assign(np.full(4, np.nan))
fit(model)
print(json.dumps(lines))
"""


def test_models_within_a_model_are_examined_and_a_step_is_an_update(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NESTED, str(tmp_path / "w")],
        capture_output=True, text=True, env={"KERAS_BACKEND": "torch", **os.environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = "\n".join(json.loads(done.stdout.splitlines()[-1]))
    assert "stale at left/bn, bn: after 4 steps with m = 0.99" in text  # batches; one update
    assert "never-updated at right/bn: running_mean is 0" in text
    assert "constant-channel at left/bn: 3 of 4 channels do not vary, 3 of them always 0" in text
    assert "constant-channel at all/left/bn: 3 of 4 channels do not vary, 3 of them" in text
    assert "not-finite at conv/bias" in text  # the other conv/bias is finite
    seen = read_recording(tmp_path / "w")
    assert list(seen.steps) == [1, 2, 3]
    assert (seen.arrays["fc/out/drift"] > 0).all()
    rows = [json.loads(line) for line in (tmp_path / "w/history.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in rows] == [1, 3]


def test_a_model_without_places_is_refused_by_name(tmp_path: Path) -> None:
    script = (
        "import keras, sys, numpy as np\n"
        "from normlab.callbacks.keras import Watch\n"
        "from normlab.errors import UserError\n"
        "class Mine(keras.Model):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.fc = keras.layers.Dense(2)\n"
        "    def call(self, x): return self.fc(x)\n"
        "model = Mine(); model.compile(loss='mse', optimizer='sgd')\n"
        "x = np.zeros((4, 3), 'float32')\n"
        "try:\n"
        f"    model.fit(x, x[:, :2], verbose=0, callbacks=[Watch({str(tmp_path / 'w')!r}, x)])\n"
        "except UserError as e: print(e)\n"
    )
    environment = {"KERAS_BACKEND": "torch", **os.environ}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert "a Mine is no functional or sequential model" in done.stdout, done.stderr
