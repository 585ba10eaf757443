"""Say what is on pictures, as `normlab predict` does: python predict.py PICTURE|FOLDER…"""

import io
import json
import struct
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF"]
with suppress(ImportError):  # HEIC, as phones write it, needs the package pillow-heif
    from pillow_heif import register_heif_opener

    register_heif_opener()
    FORMATS.append("HEIF")
Image.MAX_IMAGE_PIXELS = None  # `decode` has limits of its own
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientations as Pillow's Transpose
session = onnxruntime.InferenceSession(Path(__file__).with_name("MODEL.onnx"))
known = session.get_modelmeta().custom_metadata_map
CLASSES, RULE = json.loads(known["class_names"]), json.loads(known.get("rule", "null"))
OUTPUTS = [output.name for output in session.get_outputs()]


def answer(file):
    """Classes with probabilities, most probable first. Crop and resizing are in the model."""
    return ask(file)[0]


def ask(file):
    """The same, and why it is not sure: `unlike`, `undecided`, or None where it is."""
    found = dict(zip(OUTPUTS, session.run(OUTPUTS, {"images": read(file)[None]}), strict=True))
    p, near = map(float, found["probabilities"][0]), found.get("familiarity", [1])[0]
    pairs = sorted(zip(CLASSES, p, strict=True), key=lambda pair: -pair[1])
    if RULE and RULE["least_familiarity"] is not None and near < RULE["least_familiarity"]:
        return pairs, "unlike"
    return pairs, "undecided" if RULE and pairs[0][1] < RULE["least_probability"] else None


def told(file):
    """One line."""
    pairs, doubt = ask(file)
    likely = ", ".join(f"{name} {p:.1%}" for name, p in pairs[:3])
    if doubt == "unlike":
        return f"not sure, unlike the pictures it was trained on (if any: {likely})"
    return f"not sure, no class stands out: {likely}" if doubt else likely


def read(file):
    """Upright RGB pixels, uint8 (H, W, 3)."""
    content = Path(file).read_bytes()
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow's, of metadata
            return decode(content)
    except (OSError, SyntaxError, ValueError):
        if content[:4] != b"\x89PNG":
            raise
        kept, place = content[:8], 8  # metadata that Pillow takes offence at decide nothing
        while place + 12 <= len(content):
            length, kind = struct.unpack_from(">I4s", content, place)
            if not kind[0] & 32 or kind in (b"tRNS", b"eXIf", b"acTL"):
                kept += content[place : place + 12 + length]
            place += 12 + length
        return decode(kept)


def decode(content):
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    jpeg, tags = image.format in ("JPEG", "MPO"), getattr(image, "tag_v2", {})
    if image.width * image.height > (200e6 if jpeg else 50e6):
        raise ValueError("too many pixels: make it smaller")
    if getattr(image, "is_animated", False) and image.format not in ("MPO", "HEIF"):
        raise ValueError("animated or of several pages: give one still picture")
    key, deep = image.info.get("transparency", 0), image.mode.startswith("I")
    key = np.max(list(key) if isinstance(key, bytes) else key)
    odd = image.mode in ("F", "LAB") or (image.mode == "I" and image.format != "PPM")
    if odd or key > 255 or (deep and (key or tags.get(262, 1) == 0)):
        raise ValueError("with values whose white is unclear: save it with 8 bits a channel")
    if jpeg:  # unpacked at a half, a quarter or an eighth if it is large
        image.draft(image.mode, [n // times(image) for n in image.size])
    image.load()
    turn, white = None, 2 ** int(np.max(tags.get(258, 16))) - 1
    with suppress(Exception):
        turn = TURNS.get(image.getexif().get(274))
    if deep:
        grey = np.clip(np.asarray(image), 0, white) * (255 / white)
        image = Image.fromarray(np.rint(grey).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB").reduce(times(image))
    return np.asarray(image if turn is None else image.transpose(turn))


def times(image):
    return next((n for n in (1, 2, 4) if image.width * image.height <= 25e6 * n * n), 8)


if __name__ == "__main__":
    given, bad = map(Path, sys.argv[1:]), 0
    for file in (f for p in given for f in (sorted(p.rglob("*.*")) if p.is_dir() else [p])):
        try:
            print(f"{file}: {told(file)}")
        except Exception as error:
            print(f"{file}: {error}", file=sys.stderr)
            bad = 1
    sys.exit(bad)
