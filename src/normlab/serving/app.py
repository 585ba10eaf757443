"""The application: routes, and how one request becomes answers."""

import asyncio
import base64
import io
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from importlib import resources
from importlib.metadata import version
from string import Template
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi import Path as PathValue
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from PIL import Image
from pydantic import BeforeValidator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from normlab.data.cifar10.layouts import CLASS_NAMES
from normlab.data.images import Pixels
from normlab.data.pictures.reading import MAX_JPEG, MAX_OTHER, formats
from normlab.evaluation.doubt import Rule
from normlab.evaluation.heat import heat_from, hidden, overlay
from normlab.serving.answers import (
    Answers,
    ClassProbability,
    FileProblem,
    Health,
    Milliseconds,
    ModelDescription,
    ModelDoubt,
    ModelLimits,
    PictureAnswer,
    Problem,
    Sample,
)
from normlab.serving.batching import Batcher
from normlab.serving.decoders import Decoders, RefusedError
from normlab.serving.guard import LOCAL_HOSTS, RETRY, Guard
from normlab.serving.model import ServedModel, one_of_each_class
from normlab.serving.settings import ServerSettings
from normlab.serving.uploads import FIELD, Upload, read_uploads
from normlab.text import printable

_PAGE = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/serve.js": ("serve.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_OPENAPI = '<code>POST /predict</code>{}: <a href="openapi.json">openapi.json</a>'
_WORDS = {  # of the page that is exported, there are others
    "scripts": """  <script src="serve.js" defer></script>
  <script src="page.js" defer></script>""",
    "without": f"{_OPENAPI.format(' works without')} describes it.",
    "where": "Pictures go to this server and are not kept.\n    "
    f"Programs use {_OPENAPI.format('')}.",
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "additionalProperties": False,
                    "properties": {
                        FIELD: {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "format": "binary"},
                            "description": "Pictures; what they are is told by their bytes.",
                        }
                    },
                }
            }
        },
    }
}
_ERRORS = {
    408: "The request came too slowly.",
    411: "The body's length is not told.",
    413: "Too many bytes or pixels, or too much memory or time to decode them.",
    415: "The body is not multipart/form-data, or a picture sent alone cannot be read.",
    421: "The server does not answer under the name in `Host`.",
    422: "No picture was sent, or something else than pictures, or a wrong parameter.",
    429: "Too much is under way; `Retry-After` says when to try again.",
    500: "The network's answer to a picture sent alone is not a number.",
    503: "The process that decoded a picture sent alone was ended by something else.",
}


class Service:
    """The model with its decoders and batches."""

    def __init__(
        self,
        model: ServedModel,
        decoders: Decoders,
        settings: ServerSettings,
        ready: Callable[[], object],
        rule: Rule | None,
    ) -> None:
        self.model = model
        self.class_names = [printable(name) for name in model.predictor.class_names]
        self.settings = settings
        self.decoders = decoders
        self.rule = rule
        self.batcher = Batcher(model.answers)
        self._ready = ready

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Hold the batcher."""
        async with self.batcher:
            self._ready()
            yield

    async def answer(
        self, upload: Upload, top: int, seen: bool, heat: bool = False
    ) -> PictureAnswer:
        """Answer one picture.

        Raises:
            RefusedError: there is no answer.
        """
        if upload.too_large:
            megabytes = self.settings.file_bytes / 1e6
            raise RefusedError(413, f"more than {megabytes:g} MB; make it smaller")
        started = time.perf_counter()
        square = await self.decoders.decode(upload.content, as_png=seen)
        decoded = time.perf_counter()
        probabilities, familiarity = await self.batcher(square.pixels)
        done = time.perf_counter()
        if not np.isfinite(probabilities).all():
            raise RefusedError(500, "the network's answer is not a number: train it anew")
        names = self.class_names
        order = np.argsort(-probabilities, kind="stable")[:top]
        return PictureAnswer(
            name=upload.name,
            predictions=[
                ClassProbability(**{"class": names[k], "probability": float(probabilities[k])})
                for k in order
            ],
            doubt=None if self.rule is None else self.rule.doubt(probabilities, familiarity),
            familiarity=familiarity,
            milliseconds=Milliseconds(
                decoding=1000 * (decoded - started), model=1000 * (done - decoded)
            ),
            seen=_as_url(square.png) if seen else None,
            heat=await self._heat(square.pixels, probabilities) if heat else None,
        )

    async def _heat(self, pixels: Pixels, probabilities: NDArray[np.floating]) -> str:
        """The picture with what hiding its parts does to the answer, as a PNG's `data:` URL."""
        answers = await asyncio.gather(*map(self.batcher, hidden(pixels)))
        best = int(probabilities.argmax())
        rows = [probabilities[best], *(row[best] for row, _ in answers)]
        file = io.BytesIO()
        Image.fromarray(overlay(pixels, heat_from(np.array(rows)), 256)).save(file, "PNG")
        return _as_url(file.getvalue())

    async def answer_one_of_many(self, upload: Upload, top: int, seen: bool) -> PictureAnswer:
        """The same, with a refusal beside the other answers."""
        try:
            return await self.answer(upload, top, seen)
        except RefusedError as refused:
            error = FileProblem(status=refused.status, detail=refused.detail)
            return PictureAnswer(name=upload.name, predictions=[], error=error)


def _as_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def create_app(
    model: ServedModel,
    decoders: Decoders,
    settings: ServerSettings,
    *,
    hosts: Iterable[str] = LOCAL_HOSTS,
    ready: Callable[[], object],
    rule: Rule | None = None,
) -> FastAPI:
    """Return the application that serves `model` under the names `hosts`.

    Args:
        rule: which answers it is sure of; None for all.
        ready: is called when the server is about to answer.
    """
    service = Service(model, decoders, settings, ready, rule)
    app = FastAPI(
        title="normlab",
        version=version("normlab"),
        summary=f"Says which of {len(model.predictor.class_names)} classes a picture shows.",
        lifespan=service.running,
        redirect_slashes=False,  # to what the client calls this server
        # Its pages of documentation load scripts from another host.
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Guard, settings=settings, hosts=hosts)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _failed)
    samples = _samples(model)
    _add_api(app, service, samples)
    _add_page(app, samples)
    return app


def _samples(model: ServedModel) -> list[tuple[str, Pixels]]:
    """Pictures of CIFAR-10, if it is CIFAR-10's classes that the model knows."""
    return one_of_each_class() if set(model.predictor.class_names) == set(CLASS_NAMES) else []


def _add_api(app: FastAPI, service: Service, samples: list[tuple[str, Pixels]]) -> None:
    description = _describe(service, samples)
    errors: dict[int | str, dict[str, Any]] = {
        code: {"model": Problem, "description": text} for code, text in _ERRORS.items()
    }
    errors[429]["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}

    @app.post("/predict", openapi_extra=_BODY, responses=errors)
    async def predict(
        request: Request,
        top: Annotated[
            int,
            BeforeValidator(_only_digits),
            Query(ge=1, le=1000, description="Classes a picture."),
        ] = 5,
        seen: Annotated[bool, Query(description="Send back what the network sees.")] = False,
        heat: Annotated[
            bool,
            Query(description="Of one picture alone: send back where the network looked."),
        ] = False,
    ) -> Answers:
        """Say what is on pictures.

        A picture alone that cannot be answered gives its error's code. Of several, each has its
        own answer or error, and the code is 200.
        """
        uploads = await read_uploads(request, service.settings)
        if len(uploads) == 1:
            return Answers(results=[await service.answer(uploads[0], top, seen, heat)])
        if heat:
            raise RefusedError(422, "heat takes 65 runs of the model: send one picture alone")
        answers = (service.answer_one_of_many(upload, top, seen) for upload in uploads)
        return Answers(results=await asyncio.gather(*answers))

    @app.get("/model")
    async def model() -> ModelDescription:
        """Describe the model."""
        return description

    @app.get("/healthz")
    async def healthz() -> Health:
        """Say that the server is up."""
        counts = service.batcher.counts
        return Health(pictures=counts.pictures, model_runs=counts.runs)


def _only_digits(value: object) -> object:
    """Refuse what Python would take for a whole number and the description would not: "+5"."""
    if isinstance(value, str) and not re.fullmatch("[0-9]+", value):
        raise ValueError("give a whole number")
    return value


def _describe(service: Service, samples: list[tuple[str, Pixels]]) -> ModelDescription:
    model, settings = service.model, service.settings
    task = model.task if isinstance(model.task, dict) else {}
    recipe = task.get("recipe")
    name = recipe.get("name") if isinstance(recipe, dict) else None
    return ModelDescription(
        name=printable(model.name),
        class_names=service.class_names,
        image_size=model.predictor.image_size,
        formats=list(formats()),
        recipe=printable(name) if isinstance(name, str) else None,
        data=_data_name(task.get("data")),
        views=model.views,
        sha256=model.sha256,
        checked=printable(model.checked),
        certificate=_plain(model.certificate),
        doubt=_doubt(service),
        limits=ModelLimits(
            file_bytes=settings.file_bytes,
            pixels=MAX_OTHER,
            jpeg_pixels=MAX_JPEG,
            parts=settings.parts,
            body_bytes=settings.body_bytes,
        ),
        samples=[
            Sample(label=label, path=f"samples/{i}.png") for i, (label, _) in enumerate(samples)
        ],
    )


def _doubt(service: Service) -> ModelDoubt | None:
    doubt, rule = service.model.predictor.doubt, service.rule
    if doubt is None or rule is None:
        return None
    single = service.model.views == "single"  # what the calibration is of
    return ModelDoubt(
        held_out=doubt.total,
        least_probability=rule.least_probability,
        least_familiarity=rule.least_familiarity if doubt.tells_unlike else None,
        temperature=doubt.temperature,
        error_before=doubt.before["error"] if single and doubt.before else None,
        error_after=doubt.after["error"] if single and doubt.after else None,
        told=rule.told(),
    )


def _plain(value: Any, depth: int = 4) -> Any:
    """What a file says of itself, fit for JSON and for a page: no control characters, no NaN."""
    match value:
        case str():
            return printable(value)
        case float():
            return value if math.isfinite(value) else None
        case dict() if depth:
            return {printable(str(k)): _plain(v, depth - 1) for k, v in value.items()}
        case list() if depth:
            return [_plain(v, depth - 1) for v in value]
        case bool() | int():
            return value
    return None


def _data_name(data: object) -> str | None:
    """The last part of a path: where data lie is nobody's business."""
    if not isinstance(data, str):
        return None
    return printable(data.replace("\\", "/").rstrip("/").rpartition("/")[2])


def _add_page(app: FastAPI, samples: list[tuple[str, Pixels]]) -> None:
    """Everything is read once: no request ever names a file."""
    folder = resources.files("normlab") / "templates"
    for route, (name, kind) in _PAGE.items():
        app.add_api_route(
            route,
            _constant(_filled((folder / name).read_text("utf-8"), name), kind),
            methods=["GET", "HEAD"],
            include_in_schema=False,
        )
    pngs = []
    for _, pixels in samples:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        pngs.append(file.getvalue())

    @app.get(
        "/samples/{index}.png",
        response_class=Response,
        responses={
            200: {"content": {"image/png": {}}, "description": "A picture of 32 × 32 pixels."},
            404: {"model": Problem, "description": "There is no such sample for this model."},
            422: {"model": Problem, "description": "There is no such sample."},
        },
    )
    async def sample(index: Annotated[str, PathValue(pattern="^[0-9]$")]) -> Response:
        """A picture to try, from CIFAR-10, if the model knows its classes."""
        if int(index) >= len(pngs):
            raise HTTPException(404, "this model knows other classes than the samples show")
        return Response(pngs[int(index)], media_type="image/png")


def _filled(text: str, name: str) -> str:
    return Template(text).substitute(_WORDS) if name == "page.html" else text


def _constant(content: str, kind: str) -> Any:
    async def send() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return send


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    detail = f"{first['loc'][-1]}: {first['msg']}"
    return JSONResponse({"detail": detail}, 422)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusedError)
    headers = RETRY if error.status == 429 else None
    return JSONResponse({"detail": error.detail}, error.status, headers=headers)


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody is left to read it


async def _failed(_: Request, error: Exception) -> JSONResponse:
    """What should not happen; the log has the traceback."""
    return JSONResponse({"detail": "the server failed at this request"}, 500)
