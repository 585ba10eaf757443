"""Errors that a person can act on.

Every message names the value received and the remedy, in one line. The command line prints the
message without a traceback and leaves with `exit_code`.
"""

import re
import shlex
import signal
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import metadata

from normlab.text import printable

LONGEST = 1_500  # letters; the value comes first and the remedy last, so the middle is left out


class NormlabError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1

    def __str__(self) -> str:
        """In one line, not too long, that a terminal only shows, whatever files it cites."""
        text = printable(" ".join(super().__str__().splitlines()))
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 300]} … {text[-300:]}"


class UserError(NormlabError, ValueError):
    """A mistake in what was asked for: an option, a file, a folder."""

    exit_code = 2


class DataError(UserError):
    """A data set that is missing, damaged or not what it claims to be."""


class TooLargeError(DataError):
    """A picture that has more pixels, or takes more memory, than is allowed."""


class UnexportableError(UserError):
    """A network, or a normaliser in it, that an exported file cannot hold."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(f"{what}: `normlab predict` and `normlab serve` take the run itself")


class NonFiniteError(NormlabError, ArithmeticError):
    """The loss or a weight became NaN or infinite."""

    exit_code = 3


class Interrupted(NormlabError):
    """SIGINT or SIGTERM asked what was going on to end, and it ended in order."""

    def __init__(self, signum: int, remedy: str = "") -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}{remedy}")
        self.signum = signum
        self.exit_code = 128 + signum


class RankError(NormlabError):
    """Another process of the same training ended, or did not answer in time."""


def install(extra: str) -> str:
    """The command that adds the packages of an extra: `pip install 'pyarrow>=15'`.

    It names them one by one, as the installed normlab's own metadata do, because that is true of a
    clone, of a wheel and of a release. `pip install normlab[…]` is not before there is a release.
    """
    wanted = [line.partition(";") for line in metadata.requires("normlab") or []]
    ours = [name.strip() for name, _, when in wanted if re.search(rf"extra == .{extra}\W", when)]
    # An editable installation may be older than the extra.
    return shlex.join(["pip", "install", *(ours or ("--editable", f".[{extra}]"))])


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: what it may have meant, and what there is.

    >>> nearest("bach", ["batch", "none"])
    "'bach': did you mean 'batch'? Choose one of batch, none"
    """
    names = list(known)
    close = get_close_matches(name, names, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"{name!r}:{hint} {'Choose' if hint else 'choose'} one of {', '.join(names)}"
