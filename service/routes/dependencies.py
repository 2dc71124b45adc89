"""What endpoints get: one finished object each, built by the lifespan."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, TypeVar, get_origin
from urllib.parse import parse_qsl

import orjson
from fastapi import Depends, Path, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from service.bundles import Live
from service.catalogue import LiveCatalogue
from service.erasure import Eraser
from service.history import HistoryStore
from service.ingest import EventLog
from service.metrics import Metrics
from service.recommend import Recommender
from service.schemas import Id, NoParameters
from service.telemetry import Trace, trace_of

Parameters = TypeVar("Parameters", bound=BaseModel)
PRIVATE = {"Cache-Control": "private, no-store"}


@dataclass(frozen=True)
class Services:
    """Everything that the lifespan built. Lives in `app.state.services`."""

    live: Live
    recommender: Recommender
    histories: HistoryStore
    log: EventLog
    eraser: Eraser
    catalogue: LiveCatalogue
    metrics: Metrics


def services_of(request: Request) -> Services:
    """The services of the application at hand."""
    services = request.app.state.services
    assert isinstance(services, Services)  # noqa: S101 - put there by the lifespan
    return services


def query_of(model: type[Parameters]) -> Callable[[Request], Awaitable[Parameters]]:
    """A dependency that reads the query string as `model`. Raises RequestValidationError."""
    read = reader_of(model)

    async def dependency(request: Request) -> Parameters:
        return read(request.scope["query_string"])

    return dependency


def reader_of(model: type[Parameters]) -> Callable[[bytes], Parameters]:
    """A function that reads a query string as `model`. Raises RequestValidationError.

    FastAPI's own query models take the last of a repeated parameter and drop the others without a word.
    """
    lists = {name for name, field in model.model_fields.items() if get_origin(field.annotation) is list}

    @lru_cache(maxsize=256)  # few callers vary what they ask for; models are frozen, and errors are not kept
    def read(query: bytes) -> Parameters:
        values: dict[str, Any] = {}
        for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
            values.setdefault(name, []).append(value)
        for name, given in values.items():
            if name not in lists and len(given) == 1:
                (values[name],) = given
        try:
            return model.model_validate(values)
        except ValidationError as error:
            found = error.errors(include_url=False)
            raise RequestValidationError([e | {"loc": ("query", *e["loc"])} for e in found]) from error

    return read


def described(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` for a route that reads `model` by `query_of`."""
    fields = model.model_json_schema()["properties"]
    place = {"in": "query", "required": False}
    return {
        "parameters": [
            {"name": n, **place, "description": f.pop("description"), "schema": f} for n, f in fields.items()
        ]
    }


# Coroutine functions: FastAPI runs plain functions in a thread, which costs more than they do.
async def _services(request: Request) -> Services:
    return services_of(request)


async def _trace(request: Request) -> Trace:
    return trace_of(request)


ServicesOf = Annotated[Services, Depends(_services)]
TraceOf = Annotated[Trace, Depends(_trace)]
UserPath = Annotated[Id, Path(description="The caller's id of a user.", examples=["42"])]
ItemPath = Annotated[Id, Path(description="The caller's id of an item.", examples=["318"])]
NO_PARAMETERS = [Depends(query_of(NoParameters))]


def answer(content: dict[str, Any]) -> Response:
    """JSON bytes made by orjson: several times faster than a response model, which only describes them."""
    return Response(dumped(content), headers=PRIVATE, media_type="application/json")


def dumped(content: dict[str, Any]) -> bytes:
    """`content` as JSON."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
