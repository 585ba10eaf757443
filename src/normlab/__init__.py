"""Batch-normalised image classifiers on CIFAR-10 and your own pictures, measured honestly.

    import normlab

    run = normlab.train("notebook", epochs=3)
    run.evaluate()

The names below load what they need when they are first used, so that importing this is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normlab.api.compare import Study as Study
    from normlab.api.curve import learning_curve as learning_curve
    from normlab.api.run import Evaluation as Evaluation
    from normlab.api.run import Run as Run
    from normlab.api.run import evaluate as evaluate
    from normlab.api.run import open_run as open_run
    from normlab.api.studies import compare as compare
    from normlab.api.studies import open_study as open_study
    from normlab.api.train import resume as resume
    from normlab.api.train import train as train
    from normlab.data import ImageData as ImageData
    from normlab.data import load as load
    from normlab.diagnosis import Diagnosis as Diagnosis
    from normlab.diagnosis import Finding as Finding
    from normlab.diagnosis import doctor as doctor
    from normlab.diagnosis.checkup import Checkup as Checkup
    from normlab.errors import DataError as DataError
    from normlab.errors import NonFiniteError as NonFiniteError
    from normlab.errors import NormlabError as NormlabError
    from normlab.errors import UserError as UserError
    from normlab.evaluation.recalibration import recalibrate as recalibrate
    from normlab.evaluation.scores import ThreeWay as ThreeWay
    from normlab.evaluation.scores import three_way as three_way
    from normlab.inspection.landscape import walk as walk
    from normlab.inspection.watching import watch as watch
    from normlab.layers import BatchNorm as BatchNorm
    from normlab.layers import convert_batchnorm as convert_batchnorm
    from normlab.layers import convert_sync_batchnorm as convert_sync_batchnorm
    from normlab.recipes import Recipe as Recipe
    from normlab.reports.inspection_report import Inspection as Inspection
    from normlab.reports.inspection_report import inspect as inspect
    from normlab.study.arms import Arm as Arm

_HOMES = {
    "Arm": "study.arms",
    "BatchNorm": "layers",
    "Checkup": "diagnosis.checkup",
    "DataError": "errors",
    "Diagnosis": "diagnosis",
    "Evaluation": "api.run",
    "Finding": "diagnosis",
    "ImageData": "data",
    "Inspection": "reports.inspection_report",
    "NonFiniteError": "errors",
    "NormlabError": "errors",
    "Recipe": "recipes",
    "Run": "api.run",
    "Study": "api.compare",
    "ThreeWay": "evaluation.scores",
    "UserError": "errors",
    "compare": "api.studies",
    "convert_batchnorm": "layers",
    "convert_sync_batchnorm": "layers",
    "doctor": "diagnosis",
    "evaluate": "api.run",
    "inspect": "reports.inspection_report",
    "learning_curve": "api.curve",
    "load": "data",
    "open_run": "api.run",
    "open_study": "api.studies",
    "recalibrate": "evaluation.recalibration",
    "resume": "api.train",
    "three_way": "evaluation.scores",
    "train": "api.train",
    "walk": "inspection.landscape",
    "watch": "inspection.watching",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'normlab' has no attribute {name!r}")
    value = getattr(import_module(f"normlab.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
