"""Everything that draws or writes a page.

Matplotlib obeys a `matplotlibrc` in the current folder, or else the user's, and opens whatever has
that name, a pipe, too. Our drawings have settings of their own (`plots.style`). Where the current
folder is not on the path of Python (`core.children`), which is so in the command, Matplotlib is
imported from a folder that has no such file, and told that the user's is empty. In somebody's own
program or notebook it is left alone.
"""

import os
import sys
from contextlib import chdir, suppress

from normlab.core.children import safe_children

if "matplotlib" not in sys.modules and os.environ.get("PYTHONSAFEPATH"):
    with (
        suppress(OSError),  # the current folder was removed: there is nothing in it
        chdir(os.path.dirname(os.path.realpath(__file__))),
        safe_children(MATPLOTLIBRC=os.devnull),
    ):
        import matplotlib  # noqa: F401
