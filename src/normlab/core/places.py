"""Files and folders that are what they seem.

A folder that somebody sent may hold links and pipes. In a run or study only regular files are read
and only real folders are written to: a link would lead elsewhere, a pipe would block for ever.
"""

import stat
from pathlib import Path

from normlab.errors import DataError, UserError

MOST_TEXT = 16 << 20  # bytes of a JSON document; as Python's objects it can take 30 times as much


def check_regular(path: Path, *, follow: bool = False) -> None:
    """Refuse what is no regular file.

    Args:
        follow: a link counts as what it leads to; for paths that the user has named.

    Raises:
        DataError: a link, a folder, a pipe or a device.
        FileNotFoundError: there is nothing.
    """
    mode = path.stat(follow_symlinks=follow).st_mode
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
    kind = kinds.get(stat.S_IFMT(mode), "a device or socket")
    raise DataError(f"{path} is {kind} and is not read: put the file itself in its place")


def read_text(path: Path) -> str:
    """What a small regular file holds.

    Raises:
        DataError: it is none, or larger than any that normlab writes.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    check_regular(path)
    if path.stat().st_size > MOST_TEXT:
        raise DataError(f"{path} is larger than {MOST_TEXT >> 20} MiB: normlab wrote no such file")
    return path.read_text(encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Make `folder`, or take the one that is there if it is a folder and no link to one.

    Raises:
        UserError: something else is there.
        OSError: it cannot be made.
    """
    try:
        folder.mkdir()
    except FileExistsError:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise UserError(
                f"{folder} is not a folder itself, and what is written there would go elsewhere: "
                "remove it"
            ) from None
