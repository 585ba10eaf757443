"""Pictures out of a `multipart/form-data` body, as it arrives."""

from collections.abc import Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import Request

from normlab.serving.settings import ServerSettings
from normlab.text import printable

FIELD = "files"
_NAME = 200  # characters of a file's name that are kept, to be shown beside its answer


@dataclass
class Upload:
    """One picture's file. `name` is only ever shown; `content` is empty if it is too large."""

    name: str | None
    content: bytearray = field(default_factory=bytearray)
    too_large: bool = False


async def read_uploads(request: Request, settings: ServerSettings) -> list[Upload]:
    """The pictures in a request's body.

    Raises:
        HTTPException: 413 too many; 415 another content type; 422 nothing was sent, another field,
            or a body that cannot be parsed.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise HTTPException(415, f"send multipart/form-data, with pictures as fields {FIELD!r}")
    boundary = options.get(b"boundary")
    if not boundary or len(boundary) > 70:  # RFC 2046
        raise HTTPException(422, "the content type names no boundary of 1 to 70 characters")
    form = _Form(settings)
    parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
    try:
        async for chunk in request.stream():
            parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise HTTPException(422, f"the body is not as multipart/form-data is ({error})") from None
    if not form.ended:
        raise HTTPException(422, "the body ends before its last boundary")
    # What a browser sends for a file input that was left empty.
    sent = [u for u in form.uploads if u.content or u.too_large or u.name]
    if not sent:
        raise HTTPException(422, f"no picture was sent; send them as fields {FIELD!r}")
    return sent


class _Form:
    """Takes the parser's events."""

    def __init__(self, settings: ServerSettings) -> None:
        self.uploads: list[Upload] = []
        self.ended = False
        self._settings = settings
        self._header = bytearray()
        self._value = bytearray()
        self._disposition: bytes | None = None

    def callbacks(self) -> dict[str, Callable[..., None]]:
        names = (
            *("part_begin", "header_field", "header_value", "header_end"),
            *("headers_finished", "part_data", "end"),
        )
        return {f"on_{name}": getattr(self, name) for name in names}

    def part_begin(self) -> None:
        if len(self.uploads) == self._settings.parts:
            most = self._settings.parts
            raise HTTPException(413, f"more than {most} pictures; send fewer in a request")
        self._disposition = None

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or name != FIELD:
            raise HTTPException(422, f"a field {name[:_NAME]!r}; send pictures as fields {FIELD!r}")
        file = options.get(b"filename")
        self.uploads.append(Upload(None if file is None else _shown(file)))

    def part_data(self, data: bytes, start: int, end: int) -> None:
        upload = self.uploads[-1]
        if len(upload.content) + end - start > self._settings.file_bytes:
            upload.too_large = True
            upload.content.clear()
        if not upload.too_large:
            upload.content += data[start:end]

    def end(self) -> None:
        self.ended = True


def _shown(name: bytes) -> str:
    return printable(name.decode("utf-8", "replace")[:_NAME])
