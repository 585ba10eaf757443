"""What the interface answers, as its OpenAPI description has it."""

from typing import Any, Literal

from pydantic import BaseModel, Field


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str


class FileProblem(Problem):
    """Why there is no answer to one of several pictures."""

    status: int = Field(
        description="What it would have been answered with alone: 413, 415, 429, 500 or 503."
    )


class ClassProbability(BaseModel):
    """A class and its probability."""

    class_name: str = Field(alias="class")
    probability: float


class Milliseconds(BaseModel):
    """How long it took, from the moment the request had been received."""

    decoding: float = Field(description="Waiting for a decoder and decoding.")
    model: float = Field(description="Waiting for the model's run and that run.")


class PictureAnswer(BaseModel):
    """The answer to one picture."""

    name: str | None = Field(description="The file's name as it was sent.")
    predictions: list[ClassProbability] = Field(description="Most probable first.")
    doubt: Literal["unlike", "undecided"] | None = Field(
        default=None,
        description="Why the answer is not sure: the picture is unlike those of the training, or "
        "no class is probable enough.",
    )
    familiarity: float | None = Field(
        default=None,
        description="How like the nearest class's pictures it is, -1 to 1, if that is known.",
    )
    milliseconds: Milliseconds | None = None
    seen: str | None = Field(
        default=None,
        description="What the network sees, if asked: a `data:` URL of a PNG.",
    )
    heat: str | None = Field(
        default=None,
        description="Where the network looked, if asked: a `data:` URL of a PNG. Red parts speak "
        "for the first class, blue ones against it.",
    )
    error: FileProblem | None = Field(default=None, description="Then there are no predictions.")


class Answers(BaseModel):
    """One answer a picture, in the order they were sent."""

    results: list[PictureAnswer]


class Sample(BaseModel):
    """A picture to try."""

    label: str
    path: str = Field(description="Relative to this document.")


class ModelLimits(BaseModel):
    """What one request may hold."""

    file_bytes: int
    pixels: int = Field(description="Of a picture that is no JPEG.")
    jpeg_pixels: int
    parts: int
    body_bytes: int


class ModelDoubt(BaseModel):
    """When the model says that it is not sure."""

    held_out: int = Field(description="Pictures that it was learnt from.")
    least_probability: float
    least_familiarity: float | None
    temperature: float
    error_before: float | None = Field(
        description="Calibration error on the held-out pictures without the temperature. None if "
        "answers are from several views, of which it was not measured."
    )
    error_after: float | None = Field(
        description="The same with the temperature, which was fitted on these pictures."
    )
    told: str = Field(description="The rule in words.")


class ModelDescription(BaseModel):
    """The model behind `/predict`."""

    name: str
    class_names: list[str]
    image_size: int = Field(description="Side of the square that the network sees, in pixels.")
    formats: list[str] = Field(description="Kinds of pictures that are read.")
    recipe: str | None
    data: str | None
    views: str = Field(
        description="What each picture is answered from: `single`, the picture; `flip`, its mirror "
        "image, too; `shift`, both also moved by a pixel; `unsure`, as `shift` where the picture "
        "alone gives no sure answer."
    )
    sha256: str | None = Field(description="Of the ONNX file. None if the run itself answers.")
    checked: str = Field(description="How it was compared with the run it came from.")
    certificate: dict[str, Any] | None
    doubt: ModelDoubt | None = Field(description="None if it answers whatever it is shown.")
    limits: ModelLimits
    samples: list[Sample]


class Health(BaseModel):
    """The server is up."""

    status: Literal["ok"] = "ok"
    pictures: int = Field(description="Answered since the start.")
    model_runs: int = Field(description="Fewer than pictures if they came in batches.")
