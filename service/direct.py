"""`GET /recommend/{user_id}` without the framework's general machinery.

Routing, exit stacks and dependency solving take FastAPI about as long as the recommendation itself takes us. So this
middleware, the innermost one, calls the endpoint. What it reads, answers and refuses is what the route would. The route
is still there: it stands in OpenAPI, and gets whatever is not plain enough for here (another method, an id that is
none, a mounted application). A test asks both and compares.
"""

from __future__ import annotations

from typing import Final

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ServiceError, of_validation, problem
from service.routes.dependencies import reader_of, services_of
from service.routes.recommend import recommend_for_user, router
from service.schemas import RecommendParameters
from service.telemetry import trace_of
from shared.events import is_id

PREFIX: Final = "/recommend/"
_ROUTE: Final = next(route for route in router.routes if getattr(route, "endpoint", None) is recommend_for_user)
_read: Final = reader_of(RecommendParameters)


class Direct:
    """ASGI middleware that answers the one request which comes thousands of times a second."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        user_id = _user_asked_for(scope)
        if user_id is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = _ROUTE  # which the metrics and the log line name
        request = Request(scope)
        try:
            parameters = _read(scope["query_string"])
            response = await recommend_for_user(user_id, parameters, services_of(request), trace_of(request))
        except ServiceError as error:
            response = problem(error, scope["path"])
        except RequestValidationError as error:
            response = problem(of_validation(error), scope["path"])
        await response(scope, receive, send)


def _user_asked_for(scope: Scope) -> str | None:
    """The user id in the path, if the request is one for here."""
    if scope["type"] != "http" or scope["method"] != "GET" or scope.get("root_path"):
        return None
    path: str = scope["path"]
    user_id = path[len(PREFIX) :]
    return user_id if path.startswith(PREFIX) and is_id(user_id) else None
