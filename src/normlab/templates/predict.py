"""Say what is on pictures, as `normlab predict` does: python predict.py PICTURE|FOLDER…"""

import io
import json
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF"]
with suppress(ImportError):  # HEIC, as phones write it, needs the package pillow-heif
    from pillow_heif import HeifImagePlugin  # noqa: F401 (its import makes Pillow read it)

    FORMATS.append("HEIF")
warnings.filterwarnings("ignore", module="PIL")  # of metadata
Image.MAX_IMAGE_PIXELS = None  # `decode` has limits of its own
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientations as Pillow's Transpose
session = onnxruntime.InferenceSession(Path(__file__).with_name("MODEL.onnx"))
known = session.get_modelmeta().custom_metadata_map
CLASSES, RULE = json.loads(known["class_names"]), json.loads(known.get("rule", "{}"))
OUTPUTS = [output.name for output in session.get_outputs()]


def answer(file):
    """Classes with probabilities, most probable first, and why it is not sure: "" if it is."""
    found = dict(zip(OUTPUTS, session.run(OUTPUTS, {"images": read(file)[None]}), strict=True))
    probabilities = map(float, found["probabilities"][0])
    pairs = sorted(zip(CLASSES, probabilities, strict=True), key=lambda pair: -pair[1])
    if (near := RULE.get("least_familiarity")) is not None and found["familiarity"][0] < near:
        return pairs, "not sure, unlike the pictures it was trained on; if any: "
    sure = pairs[0][1] >= RULE.get("least_probability", 0)
    return pairs, "" if sure else "not sure, no class stands out: "


def read(file):
    """Upright RGB pixels, uint8 (H, W, 3). Crop and resizing are in the model."""
    content = Path(file).read_bytes()
    try:
        return decode(content)
    except (OSError, SyntaxError, ValueError):
        if content[:4] != b"\x89PNG":
            raise
        kept, place = content[:8], 8  # metadata that Pillow takes offence at decide nothing
        while place + 12 <= len(content):
            end = place + 12 + int.from_bytes(content[place : place + 4])
            if not content[place + 4] & 32 or content[place + 4 : place + 8] in b"tRNS eXIf acTL":
                kept += content[place:end]
            place = end
        return decode(kept)


def decode(content):
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > (200e6 if image.format in ("JPEG", "MPO") else 50e6):
        raise ValueError("too many pixels: make it smaller")
    if getattr(image, "is_animated", False) and image.format not in ("MPO", "HEIF"):
        raise ValueError("animated or of several pages: give one still picture")
    tags, key = getattr(image, "tag_v2", {}), image.info.get("transparency", 0)
    deep, key = image.mode.startswith("I"), np.max(list(key) if isinstance(key, bytes) else key)
    odd = image.mode in ("F", "LAB") or (image.mode == "I" and image.format != "PPM")
    if odd or key > 255 or (deep and (key or tags.get(262, 1) == 0)):
        raise ValueError("with values whose white is unclear: save it with 8 bits a channel")
    image.draft(image.mode, [n // times(image) for n in image.size])  # a large JPEG is unpacked
    image.load()  # at a half, a quarter or an eighth
    turn, white = None, 2 ** int(np.max(tags.get(258, 16))) - 1
    with suppress(Exception):
        turn = TURNS.get(image.getexif().get(274))
    if deep:
        image = Image.fromarray(np.rint(np.clip(image, 0, white) * (255 / white)).astype("uint8"))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB").reduce(times(image))
    return np.asarray(image if turn is None else image.transpose(turn))


def times(image):
    return next((n for n in (1, 2, 4) if image.width * image.height <= 25e6 * n * n), 8)


if __name__ == "__main__":
    given, bad = map(Path, sys.argv[1:]), 0
    for file in (f for p in given for f in (sorted(p.rglob("*.*")) if p.is_dir() else [p])):
        try:
            pairs, doubt = answer(file)
            print(f"{file}: {doubt}" + ", ".join(f"{name} {p:.1%}" for name, p in pairs[:3]))
        except Exception as error:
            print(f"{file}: {error}", file=sys.stderr)
            bad = 1
    sys.exit(bad)
