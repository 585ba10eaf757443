"""The `normlab` command: runs the verbs of `normlab.cli` and turns errors into one line.

Exit codes: 0; 1 findings, or bad inputs among good ones; 2 a user's mistake; 3 a non-finite loss;
130 and 143 for Ctrl-C and SIGTERM.
"""

import errno
import sys

import click

from normlab.cli import cli
from normlab.errors import NormlabError


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    try:
        return int(cli.main(arguments, prog_name="normlab", standalone_mode=False) or 0)
    except click.UsageError as e:
        path = e.ctx.command_path if e.ctx else "normlab"
        return _fail(f"{e.format_message().rstrip('.')} (`{path} --help` lists what there is)", 2)
    except click.ClickException as e:
        return _fail(e.format_message(), 2)
    except NormlabError as e:
        return _fail(str(e), e.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone; nothing is left to say it to
        return 0
    except OSError as e:
        if e.errno == errno.ENOSPC:
            return _fail(
                "the disk is full: free some space; an unfinished run goes on with "
                "`normlab train --resume RUN`",
                2,
            )
        return _fail(f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}", 2)
    except MemoryError:
        return _fail("out of memory: try a smaller --batch-size", 2)


def _fail(message: str, code: int) -> int:
    print(f"normlab: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
