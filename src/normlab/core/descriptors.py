"""Standard input, output and error exist, even where a shell has closed them (`>&-`)."""

import os
import sys


def open_standard_streams() -> None:
    """Put the null device where one of the three is closed.

    Otherwise the next file or socket that is opened takes its number, and whoever writes to
    standard output or starts a process writes there.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
