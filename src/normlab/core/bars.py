"""Progress bars on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn


@contextmanager
def transient_bar(*columns: "str | ProgressColumn", total: int) -> Iterator[Callable[[int], None]]:
    """A bar that goes away at the end; nothing where standard error is no terminal.

    Yields a function that takes how much is done.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)
