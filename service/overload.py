"""A bound on the requests in flight: above it a worker says so at once, instead of answering everybody too late."""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Overloaded, problem
from service.metrics import Metrics

EXEMPT: Final = frozenset({"/livez", "/readyz", "/metrics"})
"""What operators ask must be answered above all when there is too much to do."""


class InFlight:
    """ASGI middleware that refuses what is over the bound. It reads nothing of a refused request but its path."""

    def __init__(self, app: ASGIApp, limit: int, metrics: Metrics) -> None:
        self.app, self.limit, self.metrics = app, limit, metrics
        self.count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http" or scope["path"] in EXEMPT:
            await self.app(scope, receive, send)
            return
        if self.count >= self.limit:
            self.metrics.count(self.metrics.refused)
            await problem(Overloaded(), scope["path"])(scope, receive, send)
            return
        self.count += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.count -= 1
