"""Everything that draws or writes a page.

Matplotlib obeys a `matplotlibrc` in the current folder and opens whatever has that name, a pipe,
too. Where the current folder is not on the path of Python (`core.children`), which is so in the
command, Matplotlib does not look there either.
"""

import os
import sys
from contextlib import chdir

if "matplotlib" not in sys.modules and os.environ.get("PYTHONSAFEPATH"):
    try:
        with chdir(os.path.dirname(os.path.realpath(__file__))):
            import matplotlib  # noqa: F401
    except OSError:  # the current folder was removed: there is nothing in it
        pass
