"""The `normlab` command: runs the verbs of `normlab.cli` and turns errors into one line.

Exit codes: 0; 1 findings, bad inputs among good ones, or somebody closed the output; 2 a user's
mistake; 3 a non-finite loss; 130 and 143 for Ctrl-C and SIGTERM.
"""

from normlab.core.children import leave_out_current_folder

if __name__ == "__main__":  # `python -m` has put the folder first: before anything else is imported
    leave_out_current_folder()

import errno
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from normlab.cli import cli
from normlab.errors import NormlabError
from normlab.text import printable

OUT_OF_MEMORY = "out of memory: try a smaller --batch-size, or end other programs"
GOES_ON = "an unfinished run goes on with `normlab train --resume RUN`, a study with its command"
# How PyTorch, C++ and the loader of libraries say what Python calls a MemoryError.
ALLOCATION_FAILED = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "failed to map segment",
    "Cannot allocate memory",
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    leave_out_current_folder()
    # Imports make objects by the hundred thousand and hardly a cycle: looked for less often, a
    # quarter of a second less of each command.
    gc.set_threshold(10_000, 10, 10)
    code = run(arguments)
    if code == 128 + signal.SIGINT:  # a second one shall not end in a traceback of Python's end
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nor a late first one
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    with _no_signal_is_lost():
        return _run(arguments)


@contextmanager
def _no_signal_is_lost() -> Iterator[None]:
    """Send a signal again whose exception fell where Python ignores exceptions.

    Python's handlers raise wherever the program happens to be. In a destructor or the callback of a
    weak reference the exception is printed with its traceback and forgotten: a lost Ctrl-C.
    """
    before = sys.unraisablehook

    def send_again(unraisable: Any) -> None:
        error = unraisable.exc_value
        if isinstance(error, KeyboardInterrupt):
            signum = int(signal.SIGINT)
        elif isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
            signum = error.code - 128
        else:
            before(unraisable)
            return
        # A moment later, when the destructor is over.
        timer = threading.Timer(0.01, os.kill, (os.getpid(), signum))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = before


def _run(arguments: list[str] | None) -> int:
    try:
        words = sys.argv[1:] if arguments is None else arguments
        return int(cli.main(words, prog_name="normlab", standalone_mode=False, obj=words) or 0)
    except click.UsageError as e:
        if os.environ.get("RANK", "0") != "0":  # rank 0 has the same words and says it
            return 2
        path = e.ctx.command_path if e.ctx else "normlab"
        return _fail(f"{e.format_message().rstrip('.')} (`{path} --help` lists what there is)", 2)
    except click.ClickException as e:
        return _fail(e.format_message(), 2)
    except NormlabError as e:
        return _fail(str(e), e.exit_code)
    except (KeyboardInterrupt, click.Abort):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one shall not end in a traceback
        return _fail("interrupted", 130)
    except OSError as e:
        return _fail(_explain(e), 2)
    except MemoryError:
        return _fail(OUT_OF_MEMORY, 2)
    except ModuleNotFoundError as e:  # installed without its dependencies: docs/export.md
        package = (e.name or "normlab").partition(".")[0]
        if package == "normlab":
            raise
        return _fail(f"this needs the package {package}, which is not installed: add it", 2)
    except (RuntimeError, ImportError) as e:
        if not any(words in str(e) for words in ALLOCATION_FAILED):
            raise
        return _fail(OUT_OF_MEMORY, 2)


def _explain(e: OSError) -> str:
    where = f": {e.filename}" if e.filename else ""
    if e.errno == errno.ENOMEM:
        return OUT_OF_MEMORY
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}; free some space; {GOES_ON}"
    if e.errno == errno.EIO:
        return f"the disk failed ({e.strerror}){where}; look after it; {GOES_ON}"
    return f"{e.strerror or e}{where}"


def _fail(message: str, code: int) -> int:
    print(printable(f"normlab: {' '.join(message.split())}"), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
