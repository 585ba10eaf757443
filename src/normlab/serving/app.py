"""The application: routes, and how one request becomes answers."""

import asyncio
import base64
import io
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import resources
from importlib.metadata import version
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi import Path as PathValue
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BeforeValidator
from starlette.requests import ClientDisconnect

from normlab.data.pictures.reading import FORMATS, MAX_PIXELS
from normlab.serving.answers import (
    Answers,
    ClassProbability,
    FileProblem,
    Health,
    Milliseconds,
    ModelDescription,
    ModelLimits,
    PictureAnswer,
    Problem,
    Sample,
)
from normlab.serving.batching import Batcher
from normlab.serving.decoders import Decoders, RefusedError
from normlab.serving.guard import RETRY, Guard
from normlab.serving.limits import Limits
from normlab.serving.model import ServedModel, one_of_each_class
from normlab.serving.uploads import FIELD, Upload, read_uploads

_PAGE = {
    "/": ("serve.html", "text/html; charset=utf-8"),
    "/serve.css": ("serve.css", "text/css; charset=utf-8"),
    "/serve.js": ("serve.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("serve.svg", "image/svg+xml"),
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
    413: "Too many bytes or pixels, or too much memory or time to decode them.",
    415: "The body is not multipart/form-data, or a picture sent alone cannot be read.",
    422: "No picture was sent, or something else than pictures, or a wrong parameter.",
    429: "Too much is under way; `Retry-After` says when to try again.",
}


class Service:
    """The model with its decoders and batches."""

    def __init__(
        self, model: ServedModel, limits: Limits, ready: Callable[[], object] | None
    ) -> None:
        self.model = model
        self.ready = ready
        self.limits = limits
        self.decoders = Decoders(model.onnx.image_size, limits)
        self.batcher = Batcher(model.onnx.probabilities)

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Hold the decoding processes and the batcher."""
        try:
            await self.decoders.start()
            async with self.batcher:
                if self.ready is not None:
                    self.ready()
                yield
        finally:
            await self.decoders.close()

    async def answer(self, upload: Upload, top: int, seen: bool) -> PictureAnswer:
        """Answer one picture.

        Raises:
            RefusedError: there is no answer.
        """
        if upload.too_large:
            megabytes = self.limits.file_bytes / 1e6
            raise RefusedError(413, f"more than {megabytes:g} MB; make it smaller")
        started = time.perf_counter()
        square = await self.decoders.decode(upload.content, as_png=seen)
        decoded = time.perf_counter()
        probabilities = await self.batcher(square.pixels)
        done = time.perf_counter()
        names = self.model.onnx.class_names
        order = np.argsort(-probabilities, kind="stable")[:top]
        return PictureAnswer(
            name=upload.name,
            predictions=[
                ClassProbability(**{"class": names[k], "probability": float(probabilities[k])})
                for k in order
            ],
            milliseconds=Milliseconds(
                decoding=1000 * (decoded - started), model=1000 * (done - decoded)
            ),
            seen="data:image/png;base64," + base64.b64encode(square.png).decode() if seen else None,
        )

    async def answer_one_of_many(self, upload: Upload, top: int, seen: bool) -> PictureAnswer:
        """The same, with a refusal beside the other answers."""
        try:
            return await self.answer(upload, top, seen)
        except RefusedError as refused:
            error = FileProblem(status=refused.status, detail=refused.detail)
            return PictureAnswer(name=upload.name, predictions=[], error=error)


def create_app(
    model: ServedModel, limits: Limits | None = None, ready: Callable[[], object] | None = None
) -> FastAPI:
    """The application that serves `model`; `ready` is called when it is about to."""
    limits = limits or Limits()
    service = Service(model, limits, ready)
    app = FastAPI(
        title="normlab",
        version=version("normlab"),
        summary=f"Says which of {len(model.onnx.class_names)} classes a picture shows.",
        lifespan=service.running,
        # Its pages of documentation load scripts from another host.
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Guard, limits=limits)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _failed)
    _add_api(app, service)
    _add_page(app)
    return app


def _add_api(app: FastAPI, service: Service) -> None:
    description = _describe(service)
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
    ) -> Answers:
        """Say what is on pictures.

        A picture alone that cannot be answered gives its error's code. Of several, each has its
        own answer or error, and the code is 200.
        """
        uploads = await read_uploads(request, service.limits)
        if len(uploads) == 1:
            return Answers(results=[await service.answer(uploads[0], top, seen)])
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


def _describe(service: Service) -> ModelDescription:
    model, limits = service.model, service.limits
    task = model.onnx.metadata.get("recipe")
    task = task if isinstance(task, dict) else {}
    recipe = task.get("recipe")
    return ModelDescription(
        name=model.name,
        class_names=list(model.onnx.class_names),
        image_size=model.onnx.image_size,
        formats=list(FORMATS),
        recipe=str(recipe["name"]) if isinstance(recipe, dict) and "name" in recipe else None,
        data=_data_name(task.get("data")),
        sha256=model.sha256,
        checked=model.checked,
        certificate=model.certificate,
        limits=ModelLimits(
            file_bytes=limits.file_bytes,
            pixels=MAX_PIXELS,
            parts=limits.parts,
            body_bytes=limits.body_bytes,
        ),
        samples=[
            Sample(label=label, path=f"samples/{i}.png")
            for i, (label, _) in enumerate(one_of_each_class())
        ],
    )


def _data_name(data: object) -> str | None:
    """The last part of a path: where data lie is nobody's business."""
    return data.replace("\\", "/").rstrip("/").rpartition("/")[2] if isinstance(data, str) else None


def _add_page(app: FastAPI) -> None:
    """Everything is read once: no request ever names a file."""
    folder = resources.files("normlab") / "templates"
    for route, (name, kind) in _PAGE.items():
        app.add_api_route(
            route,
            _constant((folder / name).read_bytes(), kind),
            methods=["GET", "HEAD"],
            include_in_schema=False,
        )
    pngs = []
    for _, pixels in one_of_each_class():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        pngs.append(file.getvalue())

    @app.get(
        "/samples/{index}.png",
        response_class=Response,
        responses={
            200: {"content": {"image/png": {}}, "description": "A picture of 32 × 32 pixels."},
            422: {"model": Problem, "description": "There is no such sample."},
        },
    )
    async def sample(index: Annotated[str, PathValue(pattern="^[0-9]$")]) -> Response:
        """A picture to try, from CIFAR-10."""
        return Response(pngs[int(index)], media_type="image/png")


def _constant(content: bytes, kind: str) -> Any:
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
