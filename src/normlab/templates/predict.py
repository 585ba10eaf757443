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
session = onnxruntime.InferenceSession(Path(__file__).with_name("MODEL.onnx"))
known = session.get_modelmeta().custom_metadata_map
CLASSES, RULE = json.loads(known["class_names"]), json.loads(known.get("rule", "{}"))
LITTER = """thumbs.db|ehthumbs.db|ehthumbs_vista.db|desktop.ini|icon\r|picasa.ini|__macosx|recycler|
network trash folder|temporary items|thevolumesettingsfolder|@eadir|@tmp|@appstore|@database|@qpkg|
@recycle|@recently-snapshot|@transcode|#recycle|#snapshot|$recycle.bin|system volume information|
found.000|lost+found|__pycache__|node_modules""".replace("\n", "").split("|")  # in folders


def answer(file):
    """Classes with probabilities, most probable first, and why it is not sure: "" if it is."""
    (probabilities,), *near = session.run(None, {"images": read(file)[None]})
    pairs = sorted(zip(CLASSES, probabilities.tolist(), strict=True), key=lambda pair: -pair[1])
    if (least := RULE.get("least_familiarity")) is not None and near[0][0] < least:
        return pairs, "not sure, unlike the pictures it was trained on; if any: "
    sure = pairs[0][1] >= RULE.get("least_probability", 0)
    return pairs, "" if sure else "not sure, no class stands out: "


def read(file):
    """Upright RGB pixels, uint8 (H, W, 3). Crop and resizing are in the model."""
    content = Path(file).read_bytes()
    with suppress(OSError, SyntaxError, ValueError):
        return decode(content)  # or without a PNG's metadata, which Pillow may take offence at
    kept, place = (content[:8], 8) if content[:4] == b"\x89PNG" else (content, len(content))
    while chunk := content[place : place + 12 + int.from_bytes(content[place : place + 4])]:
        kept += chunk if chunk[4:5].isupper() or chunk[4:8] in b"tRNS eXIf acTL" else b""
        place += len(chunk)
    return decode(kept)


def decode(content):
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > (200e6 if image.format in ("JPEG", "MPO") else 50e6):
        raise ValueError("too many pixels: make it smaller")
    if getattr(image, "is_animated", False) and image.format not in ("MPO", "HEIF"):
        raise ValueError("animated or of several pages: give one still picture")
    tags, key, turn = getattr(image, "tag_v2", {}), image.info.get("transparency"), None
    deep, bits = image.mode[0] == "I", "".join(t[3] for t in image.tile if image.format == "PNG")
    odd = image.mode in ("F", "LAB") or (image.mode == "I" and image.format != "PPM")
    if odd or (deep and tags.get(262, 1) == 0) or (key is not None and "16" in bits):
        raise ValueError("with values whose white is unclear: save it with 8 bits a channel")
    if isinstance(key, int) and key < (step := {"L;2": 85, "L;4": 17}.get(bits, 0)):
        image.info["transparency"] = key * step  # Pillow brings grey of 2 or 4 bits to 8, not this
    image.draft(image.mode, [n // times(image) for n in image.size])  # a large JPEG is unpacked
    image.load()  # at a half, a quarter or an eighth
    with suppress(Exception):
        turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(image.getexif().get(274))  # EXIF
    if deep and (white := 2 ** int(np.max(tags.get(258, 16))) - 1):
        image = Image.fromarray(np.rint(np.clip(image, 0, white) * (255 / white)).astype("uint8"))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB").reduce(times(image))
    return np.asarray(image if turn is None else image.transpose(turn))


def times(image):
    return next((n for n in (1, 2, 4) if image.width * image.height <= 25e6 * n * n), 8)


if __name__ == "__main__":
    paths, bad = [Path(name) for name in sys.argv[1:]], 0
    for n, path in enumerate(paths):
        try:
            if path.is_dir() and path.resolve() not in map(Path.resolve, path.absolute().parents):
                inside = (p for p in path.iterdir() if p.name.casefold() not in LITTER)
                paths[n + 1 : n + 1] = sorted(p for p in inside if p.name[0] != ".")
                continue
            pairs, doubt = answer(path)
            line, out = ", ".join(f"{name} {p:.1%}" for name, p in pairs[:3]), sys.stdout
        except Exception as error:
            doubt, line, out, bad = "", str(error), sys.stderr, 1
        print("".join(c if c.isprintable() else "?" for c in f"{path}: {doubt}{line}"), file=out)
    sys.exit(bad)
