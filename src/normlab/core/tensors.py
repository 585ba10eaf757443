"""Tensors and a small JSON document in one file that is either whole or refused.

The format is safetensors, which holds no code. The document and a SHA-256 of everything else stand
in its metadata.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from normlab.core.files import write_atomic
from normlab.core.places import check_regular
from normlab.errors import DataError

Tensors = dict[str, Tensor]

MOST_TENSORS = 100_000  # in a file; each takes a kilobyte, however small it is


def digest(tensors: Mapping[str, Tensor], document: str = "") -> str:
    """SHA-256 of names, types, shapes and bytes, in order of the names, and of `document`."""
    h = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every value of every tensor is a finite number."""
    return all(t.isfinite().all() for t in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], document: Any = None) -> None:
    """Write tensors and a JSON document as one file, atomically, with the hash of both."""
    plain = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    text = json.dumps(document, sort_keys=True, allow_nan=False)
    # One key only: safetensors writes several in no fixed order, and equal files are a promise.
    envelope = json.dumps({"document": text, "sha256": digest(plain, text)})
    write_atomic(path, save(plain, metadata={"normlab": envelope}))


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of any safetensors file; together they are as large as it is.

    Raises:
        DataError: it holds more tensors than any network.
        SafetensorError, OSError: it is damaged, or cannot be read.
    """
    with safe_open(path, framework="pt") as f:
        names = f.keys()
        if len(names) > MOST_TENSORS:
            raise DataError(
                f"{path} holds {len(names):,} tensors; at most {MOST_TENSORS:,} are read"
            )
        return {name: f.get_tensor(name) for name in names}, f.metadata() or {}


def read_tensors(path: Path) -> tuple[Tensors, Any]:
    """Read what `write_tensors` wrote.

    Raises:
        DataError: the file is missing, cut off, altered, or not one of these.
    """
    try:
        check_regular(path)
        tensors, metadata = read_safetensors(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: name a run that has it") from None
    except (SafetensorError, OSError) as e:
        raise DataError(f"{path} is not a whole safetensors file ({e})") from None
    try:
        envelope = json.loads(metadata["normlab"])
        text, expected = envelope["document"], envelope["sha256"]
        altered = expected != digest(tensors, text)
        document = json.loads(text)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise DataError(f"{path} is not a file that normlab wrote") from None
    if altered:
        raise DataError(f"{path} does not match its own SHA-256: it was altered")
    return tensors, document
