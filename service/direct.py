"""`GET /recommend/{user_id}` and `POST /events` without the framework's general machinery.

Routing, exit stacks and dependency solving take FastAPI about as long as the recommendation itself takes us. So this
middleware, the innermost one, calls the endpoint. What it reads, answers and refuses is what the route would. The route
is still there: it stands in OpenAPI, and gets whatever is not plain enough for here (another method, an id that is
none, a body that is not valid, a mounted application). A test asks both and compares.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ServiceError, of_validation, problem
from service.routes import events, recommend
from service.routes.dependencies import reader_of, services_of
from service.routes.events import take_events
from service.routes.recommend import recommend_for_user
from service.schemas import EventBody, EventOrEvents, EventsBody, RecommendParameters
from service.telemetry import trace_of
from shared.events import is_id

PREFIX: Final = "/recommend/"


def _route(router: APIRouter, endpoint: Any) -> Any:
    return next(route for route in router.routes if getattr(route, "endpoint", None) is endpoint)


_RECOMMEND: Final = _route(recommend.router, recommend_for_user)
_EVENTS: Final = _route(events.router, take_events)
_parameters: Final = reader_of(RecommendParameters)
_body: Final[TypeAdapter[EventBody | EventsBody]] = TypeAdapter(EventOrEvents)


class Direct:
    """ASGI middleware that answers the two requests which come thousands of times a second."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if (user_id := _user_asked_for(scope)) is not None:
            await _answer(scope, _RECOMMEND, self._recommend(user_id, Request(scope)), send)
        elif _brings_events(scope):
            body = _Body(receive)
            if (sent := await body.read()) is not None:
                await _answer(scope, _EVENTS, self._take(sent, Request(scope)), send)
            else:
                await self.app(scope, body.again, send)
        else:
            await self.app(scope, receive, send)

    @staticmethod
    async def _recommend(user_id: str, request: Request) -> Response:
        parameters = _parameters(request.scope["query_string"])
        return await recommend_for_user(user_id, parameters, services_of(request), trace_of(request))

    @staticmethod
    async def _take(sent: EventBody | EventsBody, request: Request) -> Response:
        return await take_events(sent, services_of(request), trace_of(request))


async def _answer(scope: Scope, route: Any, answer: Awaitable[Response], send: Send) -> None:
    """Send what the endpoint returns or raises, under the route that the metrics and the log line name."""
    scope["route"] = route
    try:
        response = await answer
    except ServiceError as error:
        response = problem(error, scope["path"])
    except RequestValidationError as error:
        response = problem(of_validation(error), scope["path"])
    await response(scope, _nothing, send)


async def _nothing() -> Message:
    raise RuntimeError("a plain response reads nothing")


def _user_asked_for(scope: Scope) -> str | None:
    """The user id in the path, if the request is one for here."""
    if scope["type"] != "http" or scope["method"] != "GET" or scope.get("root_path"):
        return None
    path: str = scope["path"]
    user_id = path[len(PREFIX) :]
    return user_id if path.startswith(PREFIX) and is_id(user_id) else None


def _brings_events(scope: Scope) -> bool:
    """Whether this is `POST /events` with a body that says it is JSON, and no parameters."""
    if scope["type"] != "http" or scope["path"] != "/events" or scope["method"] != "POST":
        return False
    if scope["query_string"] or scope.get("root_path"):
        return False
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    return kinds in ([b"application/json"], [b"application/json; charset=utf-8"])


class _Body:
    """A body that is read here, and can be read again by the route if it is not plainly valid."""

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self.messages: list[Message] = []

    async def read(self) -> EventBody | EventsBody | None:
        """The events; None if the route shall say what is wrong, which it does better."""
        try:
            while True:
                message = await self.receive()
                self.messages.append(message)
                if not message.get("more_body"):
                    break
            return _body.validate_json(b"".join(message.get("body", b"") for message in self.messages))
        except (HTTPException, ValidationError):  # too large, or not valid
            return None

    async def again(self) -> Message:
        """What was received, and then what comes."""
        return self.messages.pop(0) if self.messages else await self.receive()
