"""Errors that know their status, and the one form all of them are sent in: RFC 9457 `application/problem+json`.

{"type": "urn:upnext:problem:unknown_model", "title": "Unknown model", "status": 404,
 "detail": "...", "instance": "/recommend/42", "errors": [{"parameter": "n", "detail": "..."}]}
"""

# ruff: noqa: N818 - errors are named as the interface names them

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, ClassVar, Final

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute, Match

from shared.bundle import HOW_TO_PUBLISH

log = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"
TYPE_PREFIX: Final = "urn:upnext:problem:"

Fault = dict[str, str]
"""One wrong place: its `pointer` (RFC 6901, into the body) or `parameter` (query or path), and `detail`."""


class ServiceError(Exception):
    """An error with a place in the interface. Subclasses say which; `str(error)` is the detail."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"
    example: ClassVar[str] = "The request could not be answered. The log has the reason under this request id."
    retry_after: int | None = None  # seconds
    headers: ClassVar[Mapping[str, str]] = {}

    def __init__(self, detail: str | None = None, errors: Sequence[Fault] = (), **extra: Any) -> None:
        super().__init__(detail or self.example)
        self.errors, self.extra = list(errors), extra


class Invalid(ServiceError):
    """The request breaks a rule that is stated in the API description."""

    status, code, title = 422, "validation", "Invalid request"
    example = "n: Input should be less than or equal to 100"


class Malformed(ServiceError):
    """The body cannot be read at all."""

    status, code, title = 400, "malformed", "Malformed request"
    example = "There was an error parsing the body"


class Unauthorized(ServiceError):
    """No key, or none that is known here."""

    status, code, title = 401, "unauthorized", "Unauthorized"
    example = "Send a key that this service knows: `Authorization: Bearer <key>`."
    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}


class Forbidden(ServiceError):
    """The key is known, and may not do this."""

    status, code, title = 403, "forbidden", "Forbidden"
    example = "This needs a key with the scope `write`; the key 'shop' has not."
    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": 'Bearer error="insufficient_scope"'}


class RateLimited(ServiceError):
    """The key has used its window up."""

    status, code, title, retry_after = 429, "rate_limited", "Too many requests", 1
    example = "This key may ask 600 per 1 minute; try again in 17 s."

    def __init__(self, detail: str | None = None, *, retry_after: int = 1) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class NotFound(ServiceError):
    """No such path."""

    status, code, title = 404, "not_found", "Not found"
    example = "There is no such path; /docs lists those that exist."


class UnknownModel(ServiceError):
    """The live bundle has no model of that name."""

    status, code, title = 404, "unknown_model", "Unknown model"
    example = "There is no model 'sasrecs' in the live bundle; there are: bert4rec, sasrec."


class UnknownItem(ServiceError):
    """Neither the live bundle nor the live catalogue has the item."""

    status, code, title = 404, "unknown_item", "Unknown item"
    example = "No item '318' is in the catalogue."


class MethodNotAllowed(ServiceError):
    """The path exists, the method on it does not."""

    status, code, title = 405, "method_not_allowed", "Method not allowed"
    example = "Method Not Allowed"


class Conflict(ServiceError):
    """An event id is in the log already, with another body."""

    status, code, title = 409, "conflict", "Conflict"
    example = "An event with this user_id and event_id is in the log with other fields; nothing was stored."


class Erased(ServiceError):
    """An event from before its user was erased."""

    status, code, title = 409, "erased", "User was erased"
    example = "A user of these events was erased since they happened; nothing was stored."


class TooLarge(ServiceError):
    """The body is over the limit."""

    status, code, title = 413, "too_large", "Body too large"
    example = "The body is larger than 1 MiB."


class Unavailable(ServiceError):
    """Something that the answer needs is down. Worth another try."""

    status, code, title, retry_after = 503, "unavailable", "Unavailable", 2
    example = "A part that the answer needs is down."


class Overloaded(Unavailable):
    """This worker has as many requests in flight as it may have."""

    code, title, retry_after = "overloaded", "Overloaded", 1
    example = "The service has too many requests in flight; try again in a moment."


class NoBundle(Unavailable):
    """Nothing was published yet, or nothing that could be loaded."""

    code, title, retry_after = "no_bundle", "No bundle", 10
    example = f"No bundle is loaded yet; {HOW_TO_PUBLISH}"


class NotReady(Unavailable):
    """The worker cannot answer yet."""

    code, title = "not_ready", "Not ready"
    example = f"No bundle is loaded yet; {HOW_TO_PUBLISH}"


class HistoryDown(Unavailable):
    """The user's history cannot be read, and the request asks not to be answered without."""

    code, title = "history_unavailable", "History unavailable"
    example = "The user's history cannot be read at the moment."


class LogDown(Unavailable):
    """The event log takes no events or cannot be read. Nothing was stored, unless the detail says otherwise."""

    code, title = "log_unavailable", "Event log unavailable"
    example = "The event log cannot be reached; nothing was stored."


class SchemaBehind(Unavailable):
    """The database is at the schema of the release before, which cannot do this."""

    code, title, retry_after = "schema_behind", "Database schema behind", 60
    example = "The database cannot erase users yet; run: python -m service migrate"


class CatalogueDown(Unavailable):
    """The live catalogue cannot be read or changed, or was never read by this worker."""

    code, title = "catalogue_unavailable", "Catalogue unavailable"
    example = "The catalogue cannot be reached."


_FRAMEWORK: Final[Mapping[int, type[ServiceError]]] = {
    400: Malformed, 404: NotFound, 405: MethodNotAllowed, 413: TooLarge, 422: Invalid,
}  # fmt: skip


def problem(error: ServiceError, instance: str, headers: Mapping[str, str] | None = None) -> Response:
    """The response for `error`."""
    body: dict[str, Any] = {
        "type": TYPE_PREFIX + error.code,
        "title": error.title,
        "status": error.status,
        "detail": cleaned(str(error)),
        "instance": cleaned(instance),
    }
    if error.errors:
        body["errors"] = error.errors
    sent = {**error.headers, **(headers or {})}
    response = Response(orjson.dumps(body | error.extra), error.status, sent, MEDIA_TYPE)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Send every error of `app` as a problem, the framework's own ones too. `routes` are all that answer here."""

    async def known(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)  # noqa: S101 - registered for it alone
        return problem(error, request.url.path)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101
        return problem(of_validation(error), request.url.path)

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101
        headers = dict(error.headers or {})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(_methods(request, routes))  # the framework has those of one route alone
        return problem(of_status(error.status_code, str(error.detail)), request.url.path, headers)

    app.add_exception_handler(ServiceError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, framework)


def _methods(request: Request, routes: Iterable[BaseRoute]) -> list[str]:
    """What any route takes on this path."""
    found = (route for route in routes if route.matches(request.scope)[0] is not Match.NONE)
    return sorted({method for route in found for method in getattr(route, "methods", None) or ()})


def of_status(status: int, detail: str) -> ServiceError:
    """The framework's error for `status` as one of ours."""
    kind = _FRAMEWORK.get(status)
    if kind is None:
        phrase = HTTPStatus(status).phrase
        kind = type("FrameworkError", (ServiceError,), {"status": status, "code": "http_error", "title": phrase})
    return kind(None if kind is NotFound else detail)


def of_validation(error: RequestValidationError) -> Invalid:
    """What pydantic and the JSON parser found, with a pointer or a parameter each."""
    faults = [_fault(found, error.body) for found in error.errors()]
    first = faults[0]
    where = first.get("pointer") or first.get("parameter")
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Invalid((f"{where}: " if where else "") + first["detail"] + more, faults)


def _fault(found: Mapping[str, Any], body: Any) -> Fault:
    place, *path = found["loc"]
    detail = cleaned(str(found["msg"]).removeprefix("Value error, "))
    if found["type"] == "json_invalid":
        return {"pointer": "", "detail": f"The body is not JSON: {found['ctx']['error']} at character {path[0]}"}
    if found["type"] == "extra_forbidden":
        detail = f"There is no such {'field' if place == 'body' else 'parameter'}"
    if place != "body":
        return {"parameter": cleaned(str(path[0])), "detail": detail}
    missing = path[-1:] if found["type"] == "missing" else []
    return {"pointer": pointer(_inside(path, body) + missing), "detail": detail}


def _inside(path: Sequence[str | int], body: Any) -> list[str | int]:
    """The parts of `path` that stand in `body`: pydantic also puts in the names of a union's branches."""
    kept: list[str | int] = []
    for part in path:
        try:
            body = body[part]
        except (KeyError, IndexError, TypeError):
            continue
        kept.append(part)
    return kept


def pointer(path: Iterable[str | int]) -> str:
    """A JSON pointer (RFC 6901): ["events", 0, "a/b"] -> "/events/0/a~1b"."""
    return "".join("/" + cleaned(str(part)).replace("~", "~0").replace("/", "~1") for part in path)


def cleaned(text: str) -> str:
    """Text that UTF-8 can carry: JSON lets lone surrogates in, and a message may repeat them. Cut to 500 characters."""
    return text[:500].encode("utf-8", "replace").decode()


def responses(*kinds: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI `responses` of a route that raises `kinds`: an example body for each, by status.

    Any route may fail for a reason that nobody thought of, and says so in the same form.
    """
    found: dict[int | str, dict[str, Any]] = {}
    every: tuple[type[ServiceError], ...] = (*kinds, ServiceError)
    for kind in every:
        entry = found.setdefault(
            kind.status,
            {
                "description": kind.title,
                "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}},
            },
        )
        entry["content"][MEDIA_TYPE]["examples"][kind.code] = {"summary": kind.title, "value": _example(kind)}
        if headers := _headers(kind):
            entry.setdefault("headers", {}).update(headers)
    return found


def _headers(kind: type[ServiceError]) -> dict[str, dict[str, Any]]:
    """The headers that errors of a kind bring, as OpenAPI describes them."""
    text = {"required": True, "schema": {"type": "string"}}
    found = {name: {"description": "What to send.", **text, "example": value} for name, value in kind.headers.items()}
    if kind.retry_after is not None:
        found["Retry-After"] = {
            "description": "Seconds until another try is worth it.",
            "required": True,
            "schema": {"type": "integer", "minimum": 1},
            "example": kind.retry_after,
        }
    if kind is MethodNotAllowed:
        found["Allow"] = {"description": "The methods that the path has.", **text, "example": "DELETE, GET, PUT"}
    return found


def _example(kind: type[ServiceError]) -> dict[str, Any]:
    value: dict[str, Any] = {
        "type": TYPE_PREFIX + kind.code,
        "title": kind.title,
        "status": kind.status,
        "detail": kind.example,
        "instance": "/the/path/asked",
    }
    if kind is Invalid:
        value["errors"] = [
            {"parameter": "n", "detail": "Input should be less than or equal to 100"},
            {"pointer": "/events/0/item_id", "detail": "Field required"},
        ]
    if kind is Erased:
        value["errors"] = [{"pointer": "/events/0", "detail": "The user was erased at 2026-11-22T10:00:00Z"}]
    if kind is NotReady:
        value["checks"] = {"bundle": kind.example, "catalogue": "ok", "redis": "ok"}
    if kind is Conflict:
        value["errors"] = [{"pointer": "/events/0", "detail": "The log has this event_id with other fields"}]
    return value
