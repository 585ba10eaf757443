"""English for figures, and other people's text made fit for a terminal, a shell and pages.

Names of classes, files and layers come from whoever made the data or the model. In a terminal their
control characters could set its title or clipboard, in a shell their quotes could run a command, in
Markdown and HTML they could be a link. What a reader is shown goes through one of these functions.
"""

import os
import shlex
import unicodedata
from collections.abc import Iterable, Sequence
from html import escape

# They join and part letters in Persian, Hindi and emoji, and move nothing.
_JOINERS = "\u200c\u200d"
# Inside a line, other punctuation means nothing in Markdown.
_MARKDOWN = frozenset("\\`*_{}[]<>()#+!|~&$:@")


def counted(n: int, noun: str) -> str:
    """
    >>> counted(1, "pair"), counted(1407, "step")
    ('1 pair', '1,407 steps')
    """
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def have(n: int) -> str:
    """
    >>> have(1), have(2)
    ('has', 'have')
    """
    return "has" if n == 1 else "have"


def duration(seconds: float) -> str:
    """A time as people say it, to about a tenth.

    >>> duration(7), duration(48), duration(100), duration(5400)
    ('7 seconds', '50 seconds', '1.7 minutes', '1.5 hours')
    """
    if seconds < 10:
        return counted(max(1, round(seconds)), "second")
    if seconds < 55:
        return f"{5 * round(seconds / 5)} seconds"
    if seconds < 55 * 60:
        minutes = seconds / 60
        whole = f"{minutes:.1f}" if minutes < 10 else f"{minutes:.0f}"
        return f"{whole.removesuffix('.0')} minute{'' if whole == '1.0' else 's'}"
    return f"{seconds / 3600:.1f} hours"


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names in a sentence: the first ones, each cut where it is long, and how many more.

    >>> listed(["cat", "dog", "frog"], most=2)
    'cat, dog and 1 more'
    """
    first = ", ".join(name if len(name) <= 40 else f"{name[:39]}…" for name in names[:most])
    return first if len(names) <= most else f"{first} and {len(names) - most:,} more"


def printable(text: str) -> str:
    """Text in one line that a terminal only shows: anything else stands there as its escape.

    Bytes of a file's name that are no UTF-8, which Python keeps as lone surrogates, become \\xNN.

    >>> print(printable("a cat\\x1b]0;title\\x07"))
    a cat\\x1b]0;title\\x07
    """
    if text.isprintable():
        return text
    return "".join(c if _is_shown(c) else _escaped(c) for c in text)


def printable_lines(text: str) -> str:
    """`printable` for text of several lines, which stay."""
    return "\n".join(map(printable, text.split("\n")))


def shown(path: "str | os.PathLike[str]") -> str:
    """The name of a file, `printable`."""
    return printable(os.fsdecode(path))


def shell(words: Iterable[str]) -> str:
    """A command of these words, to be pasted into a shell.

    >>> print(shell(["normlab", "train", "--data", "x$(touch y)"]))
    normlab train --data 'x$(touch y)'
    """
    return " ".join(map(_quoted, words))


def markdown(text: str) -> str:
    """Text inside a line or a table's cell of Markdown, where it is text and nothing else.

    >>> print(markdown("[a](b) | <i>"))
    \\[a\\]\\(b\\) \\| \\<i\\>
    """
    return "".join(f"\\{c}" if c in _MARKDOWN else c for c in printable(text))


def html(text: str) -> str:
    """Text inside HTML, where it is text and nothing else, in quotes, too."""
    return escape(printable_lines(text))


def utf8(text: str) -> bytes:
    """The bytes of a page or table; a lone surrogate, which has none, becomes its escape."""
    return text.encode("utf-8", "backslashreplace")


def _is_shown(c: str) -> bool:
    return c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs"


def _escaped(c: str) -> str:
    if "\udc80" <= c <= "\udcff":
        return f"\\x{ord(c) - 0xDC00:02x}"
    return c.encode("unicode_escape").decode()


def _quoted(word: str) -> str:
    """`shlex.quote`, or $'…' of Bash and Zsh where a terminal would not only show the word."""
    if printable(word) == word:
        return shlex.quote(word)
    plain = b"".join(b"\\" + bytes([b]) if b in b"\\'" else bytes([b]) for b in _bytes(word))
    inside = "".join(chr(b) if 32 <= b < 127 else f"\\x{b:02x}" for b in plain)
    return f"$'{inside}'"


def _bytes(word: str) -> bytes:
    try:
        return word.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # no file has such a name
        return utf8(word)
