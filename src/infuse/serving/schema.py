"""The bodies of requests and answers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(min_length=1, max_length=128, description="An adapter's name: that of its folder.")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Item(_Strict):
    """Texts for one adapter."""

    adapter: Name
    texts: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, description="What to label.")]
    top_k: Annotated[int, Field(ge=1, le=1000, description="How many labels to tell per text.")] = 1


class Scored(BaseModel):
    """A label and its probability."""

    label: str
    confidence: float


class Answer(BaseModel):
    """What an adapter says of one text."""

    label: Annotated[str | None, Field(description="Null below the adapter's threshold (out of scope).")]
    labels: Annotated[list[str] | None, Field(description="Of adapters that give several labels; null for others.")]
    confidence: Annotated[float, Field(description="The highest probability of a label.")]
    top: Annotated[list[Scored], Field(description="The top_k labels, most probable first.")]


class Answered(BaseModel):
    """The answers to one item, in the order of its texts."""

    adapter: str
    version: Annotated[str, Field(description="First 12 hexadecimal digits of the SHA-256 of the adapter's file.")]
    answers: list[Answer]


class Adapter(BaseModel):
    """An adapter of the folder."""

    name: str
    status: Annotated[
        Literal["resident", "ready", "broken", "withdrawn"],
        Field(description="In memory; in the folder; unusable (see error); unloaded until the next POST."),
    ]
    version: str | None
    method: str | None
    base: str | None
    labels: list[str]
    multi: bool
    metrics: dict[str, Any]
    bytes: Annotated[int, Field(description="Size of its files.")]
    temperature: float
    threshold: Annotated[float, Field(description="Confidence below which the label is null; 0: never.")]
    error: str | None


class Adapters(BaseModel):
    """Everything that is served, over which base."""

    base: str
    precision: str
    adapters: list[Adapter]


class Status(BaseModel):
    status: str


class Error(BaseModel):
    """Why a request was refused."""

    error: str
