"""What stands beside an exported ONNX file, so that its folder runs alone."""

from importlib import resources

from normlab.text import printable, utf8

_MARK = "# Written by normlab for {model}."
_REQUIREMENTS = """onnxruntime>=1.18
numpy>=1.26
pillow>=10.3
# pillow-heif  # for HEIC, as phones write it
"""
NAMES = ("predict.py", "requirements.txt")


def companions(model: str) -> dict[str, bytes]:
    """What stands beside the file `model`, by name: `predict.py`, and the packages that it needs.

    The first line of each says that it is ours: see `card.check_place`.
    """
    template = resources.files("normlab") / "templates" / "predict.py"
    code = template.read_text("utf-8").replace('"MODEL.onnx"', ascii(model))
    texts = dict(zip(NAMES, (code, _REQUIREMENTS), strict=True))
    return {name: utf8(f"{mark(model)}\n{text}") for name, text in texts.items()}


def mark(model: str) -> str:
    """The first line of a companion of `model`."""
    return _MARK.format(model=printable(model))
