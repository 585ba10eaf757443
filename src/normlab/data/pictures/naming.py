"""What the names of files and folders say: parts of a data set, systems' own folders, pictures.

Names are compared without case and composed (NFC): `é` may be one character or two.
"""

import re
import unicodedata

PARTS = ("train", "test", "validation")

# Files and folders that systems and programs leave beside pictures. With every name that begins
# with a dot, these are passed over.
LITTER = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "picasa.ini"),
        *("__macosx", "network trash folder", "temporary items", "thevolumesettingsfolder"),
        *("@eadir", "#recycle", "#snapshot", "@tmp", "@appstore", "@database"),  # Synology
        *("@recycle", "@recently-snapshot", "@transcode", "@qpkg"),  # QNAP
        *("$recycle.bin", "recycler", "system volume information", "found.000"),  # Windows
        *("lost+found", "__pycache__", "node_modules"),
    }
)

# What else marks a folder that a system or a program made.
_SYSTEM = re.compile(
    r"[@#$~].*|_*thumb(nail)?s?|recycle[ -]?bin|lost\.dir|.*\.(lrdata|photoslibrary|aplibrary)"
)

_TRAIN = r"train(?:ing)?|trn"
_TEST = r"test(?:ing)?|tst|eval(?:uation)?"
_VALIDATION = r"val(?:id(?:ation|ating|ate)?)?|dev"
_KIND = r"(?:set|data|dataset|image|images|img|imgs|picture|pictures|pics|photos|samples|split|seg)"
_PART = re.compile(
    rf"{_KIND}?(?:(?P<train>{_TRAIN})|(?P<test>{_TEST})|(?P<validation>{_VALIDATION}))"
    rf"{_KIND}*(?:folder|dir)?\d*"
)
_WORDS = re.compile(rf"{_TRAIN}|test(?:ing)?|val(?:id(?:ation)?)?|unlabell?ed|predict(?:ion)?s?")

# Folders that hold the data, and such as lie beside them.
_WRAPPER = re.compile(r"(?:all|raw|my)?(?:data|dataset|image|img|picture|pic|photo)s?\d*")
_BESIDE = re.compile(
    r"(?:bbox|mask|label|annotation|segmentation)s?(?:json|xml|txt)?\d*|groundtruths?|gt|annots?"
    r"|(?:readme|doc|screenshot|figure|plot|result|output|example|asset|static).*"
)

# Endings of the formats that are read, and of pictures in formats that are not.
ENDINGS = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".webp", ".bmp"),
        *(".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".avifs"),
        *(".heic", ".heif", ".hif", ".heics", ".heifs"),
    }
)
UNREAD = frozenset(
    {
        *(".svg", ".psd", ".jxl", ".jp2", ".j2k", ".jpx", ".tga", ".dcm", ".dicom", ".exr"),
        *(".hdr", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pcx"),
        *(".pef", ".srw", ".sr2", ".xcf", ".qoi", ".jxr"),
    }
)


def canonical(name: str) -> str:
    """The form in which names are compared."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def part_of(name: str) -> str | None:
    """The part of a data set that a folder or file of this name holds, in any usual spelling.

    >>> [part_of(n) for n in ("Train", "test_set", "Validation Images", "seg_train", "cat")]
    ['train', 'test', 'validation', 'train', None]
    """
    found = _PART.fullmatch(re.sub(r"[\W_]+", "", canonical(name)))
    return None if found is None else found.lastgroup


def resembles_part(name: str) -> bool:
    """Whether a word of the name is that of a part: `train_augmented`, `My Test Pictures`."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFC", name))
    words = re.split(r"[\W_\d]+", canonical(spaced))
    return part_of(name) is not None or any(_WORDS.fullmatch(word) for word in words)


def is_litter(name: str) -> bool:
    """Whether a system or a program left it there; such names are passed over."""
    return name.startswith(".") or canonical(name) in LITTER


def resembles_litter(name: str) -> bool:
    """Whether it looks like a folder of a system's, and may be a class of the user's."""
    return _SYSTEM.fullmatch(canonical(name)) is not None


def is_wrapper(name: str) -> bool:
    """Whether a folder of this name is likely to hold the data: `images`, `dataset`."""
    return _WRAPPER.fullmatch(re.sub(r"[\W_]+", "", canonical(name))) is not None


def is_beside(name: str) -> bool:
    """Whether a folder of this name is likely to lie beside the pictures: `labels`, `docs`."""
    return _BESIDE.fullmatch(re.sub(r"[\W_]+", "", canonical(name))) is not None


def ending(name: str) -> str:
    """The ending, in small letters with its dot; empty if there is none."""
    dot = name.rfind(".")
    return canonical(name[dot:]) if dot > 0 else ""
