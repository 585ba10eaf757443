"""Take a trained run elsewhere: as ONNX or Keras, folded, checked on the whole test set."""

from normlab.interchange.writing import FORMATS, Exported, export_run

__all__ = ["FORMATS", "Exported", "export_run"]
