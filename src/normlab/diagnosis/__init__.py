"""What is wrong with a batch-normalised model, and what to do about it.

The names below load what they need when they are first used: the readers of files run in processes
of their own, which need no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normlab.diagnosis.examination import doctor as doctor
    from normlab.diagnosis.examination import examine as examine
    from normlab.diagnosis.findings import Diagnosis as Diagnosis
    from normlab.diagnosis.findings import Finding as Finding
    from normlab.diagnosis.rules import RULES as RULES

_HOMES = {
    "RULES": "rules",
    "Diagnosis": "findings",
    "Finding": "findings",
    "doctor": "examination",
    "examine": "examination",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'normlab.diagnosis' has no attribute {name!r}")
    return getattr(import_module(f"normlab.diagnosis.{_HOMES[name]}"), name)
