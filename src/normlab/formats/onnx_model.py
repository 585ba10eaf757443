"""An ONNX file that `normlab export` wrote, opened: what it says of itself, and its answers."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.errors import DataError, UserError, install

BATCH = 256
_LARGEST = 4096  # pixels a side that a network may see
_EXPORT = "give a file that `normlab export --format onnx` wrote"


@dataclass(frozen=True)
class OnnxModel:
    """A classifier of pictures in ONNX Runtime.

    session: takes `images` uint8 (N, H, W, 3), gives `probabilities` float32 (N, K) and perhaps
        `familiarity` float32 (N,). Files of older versions take (N, S, S, 3) alone.
    class_names: K names.
    image_size: S.
    metadata: what `normlab export` noted, parsed: `recipe`, `certificate`, `not_folded`, `doubt`.
    """

    session: Any = field(repr=False)
    class_names: tuple[str, ...]
    image_size: int
    metadata: dict[str, Any] = field(repr=False)
    tells_familiarity: bool = False

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities (N, K) for `images` (N, S, S, 3)."""
        return self.answers(images)[0]

    def answers(
        self, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """The same, and familiarity (N,), if the graph computes it."""
        wanted = ["probabilities", "familiarity"][: 1 + self.tells_familiarity]
        parts = [
            self.session.run(wanted, {"images": np.ascontiguousarray(images[i : i + BATCH])})
            for i in range(0, len(images), BATCH)
        ]
        rows = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return rows[0], rows[1] if self.tells_familiarity else None


def open_onnx(model: str | Path | bytes, threads: int | None = None) -> OnnxModel:
    """Open an exported file, or the content of one.

    Args:
        threads: for each call; by default what ONNX Runtime chooses.

    Raises:
        UserError: onnxruntime is missing.
        DataError: it cannot be read, or is no file that `normlab export` wrote.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"ONNX files need the package onnxruntime: {install('onnx')}") from None
    name = "the ONNX model" if isinstance(model, bytes) else str(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong with a file, the exception says
    # Threads that wait by spinning would take the cores from those who decode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    source = model if isinstance(model, bytes) else _readable(Path(model))
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a dozen kinds, with no base of their own
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{name} is no ONNX model that can be run ({reason}): {_EXPORT}") from None
    return _checked(session, name)


def _readable(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path} is not a file: {_EXPORT}")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} may not be read: change its permissions")
    return str(path)


def _checked(session: Any, name: str) -> OnnxModel:
    """Refuse by name what does not have an exported file's input, output and metadata."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    known = session.get_modelmeta().custom_metadata_map
    size = _size(inputs[0].shape, known.get("image_size")) if len(inputs) == 1 else None
    if size is None or (inputs[0].name, inputs[0].type) != ("images", "tensor(uint8)"):
        raise DataError(
            f"{name} takes {_listed(inputs)}, not `images`, uint8 (N, S, S, 3) or, with "
            f"`image_size` in its metadata, (N, H, W, 3): {_EXPORT}"
        )
    answer = next((o for o in outputs if o.name == "probabilities"), None)
    if answer is None or answer.type != "tensor(float)" or len(answer.shape) != 2:
        raise DataError(
            f"{name} gives {_listed(outputs)}, not `probabilities`, float (N, K): {_EXPORT}"
        )
    metadata = {
        key: _parsed(text)
        for key, text in known.items()
        if key in ("class_names", "certificate", "recipe", "not_folded", "doubt")
    }
    names = metadata.pop("class_names", None)
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise DataError(f"{name} has no `class_names` in its metadata: {_EXPORT}")
    if len(names) != answer.shape[1]:
        raise DataError(
            f"{name} names {len(names)} classes but gives {answer.shape[1]} probabilities: "
            f"{_EXPORT}"
        )
    near = next((o for o in outputs if o.name == "familiarity"), None)
    if near is not None and (near.type != "tensor(float)" or len(near.shape) != 1):
        raise DataError(f"{name} gives {_listed([near])}, not `familiarity`, float (N): {_EXPORT}")
    return OnnxModel(session, tuple(names), size, metadata, near is not None)


def _size(shape: list[Any], told: str | None) -> int | None:
    """S of (N, S, S, 3) with N of any length; as `told` where the picture's size is any, too."""
    match shape:
        case [str() | None, int(height), int(width), 3] if height == width > 0:
            return height
        case [str() | None, str() | None, str() | None, 3]:
            size = _parsed(told or "")
            return size if isinstance(size, int) and 0 < size <= _LARGEST else None
    return None


def _listed(values: list[Any]) -> str:
    return ", ".join(f"`{v.name}`, {v.type} {v.shape}" for v in values) or "nothing"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
