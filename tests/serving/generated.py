"""What Schemathesis shall not draw, loaded by its command.

An empty list leaves no field in multipart/form-data: one field too many with such a list is none.
"""

from typing import Any

import schemathesis


@schemathesis.hook
def filter_body(_: Any, body: Any) -> bool:
    """Whether a drawn body is what its request will carry."""
    extra = {**body, "files": None} if isinstance(body, dict) else {}
    return [] not in extra.values()
