"""Pages: one template engine, in which other people's text is text."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from normlab.text import printable_lines, utf8


def render(template: str, **values: Any) -> bytes:
    """The page that `template`, a file in `normlab/templates`, makes of `values`."""
    environment = Environment(
        loader=PackageLoader("normlab"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_text,
    )
    return utf8(environment.get_template(template).render(values))


def _text(value: Any) -> Any:
    """Letters that could change how others read, and halves of letters, as their escapes."""
    return printable_lines(value) if type(value) is str and not isinstance(value, Markup) else value
