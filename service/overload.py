"""A bound on the requests in flight: above it a worker says so at once, instead of answering everybody too late.

Refusing must be cheap, or a worker that is asked three times what it can do spends its time on refusing. So a plain GET
over the bound is answered before it is parsed, in 45 us of processor, system calls included, where the way through the
framework takes 120; it is counted, and a line a second tells how many there were. The middleware refuses the rest.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import Overloaded, cleaned, problem
from service.metrics import Metrics
from service.telemetry import uuid7

log = logging.getLogger(__name__)

EXEMPT: Final = frozenset({"/livez", "/readyz", "/metrics"})
"""What operators ask must be answered above all when there is too much to do."""
TOLD_SECONDS: Final = 1.0


@dataclass
class Bound:
    """How many requests are in flight in this process, of how many there may be."""

    limit: int
    metrics: Metrics
    count: int = 0
    untold: int = 0  # refused since the last line about it
    told_at: float = float("-inf")

    @property
    def is_reached(self) -> bool:
        """Whether the next request must be refused, unless its path is exempt."""
        return self.count >= self.limit

    def refused(self) -> None:
        """Count a refusal."""
        self.metrics.count(self.metrics.refused)

    def tell(self, now: float) -> None:
        """Log a refusal that nobody else logs, with all others of that second."""
        self.metrics.observe(self.metrics.requests, 0, "-", "unmatched", "503")
        self.untold += 1
        if now >= self.told_at + TOLD_SECONDS:
            log.warning("more requests at a time than %d: %d refused since the last such line", self.limit, self.untold)
            self.untold, self.told_at = 0, now


class InFlight:
    """ASGI middleware that refuses what is over the bound. It reads nothing of a refused request but its path."""

    def __init__(self, app: ASGIApp, bound: Bound) -> None:
        self.app, self.bound = app, bound

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http" or scope["path"] in EXEMPT:
            await self.app(scope, receive, send)
            return
        if self.bound.is_reached:
            self.bound.refused()
            await problem(Overloaded(), scope["path"])(scope, receive, send)
            return
        self.bound.count += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.bound.count -= 1


class RefusingProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, which refuses plain GET requests over the bound of the application unparsed."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.bound = bound_of(self.app)
        self.within = False  # a request that the parser has not seen to its end

    def on_message_begin(self) -> None:
        """A request begins."""
        self.within = True
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """A request was read to its end."""
        self.within = False
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        bound = self.bound
        if bound is not None and bound.is_reached and self._is_free():
            path = plain_path(data)
            if path is not None and path not in EXEMPT:
                bound.refused()
                self._unset_keepalive_if_required()
                self.transport.write(refusal(path))
                self.on_response_complete()
                bound.tell(self.loop.time())
                return
        super().data_received(data)

    def _is_free(self) -> bool:
        """Whether these bytes begin a request, and no answer is on its way."""
        return not self.within and (self.cycle is None or self.cycle.response_complete) and not self.flow.write_paused


_PLAIN: Final = re.compile(
    rb"GET (/[!-\x3e@-~]*)(?:\?[!-~]*)? HTTP/1\.1\r\n"
    rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n)*\r\n"
)
"""A whole GET request, from its first byte to its last. Group 1 is the path."""
_TELLING: Final = re.compile(
    rb"\n(?:connection:(?!\s*keep-alive\s*\r)|expect:|upgrade:)|content-length|transfer-encoding", re.IGNORECASE
)
"""What says that a body follows, or that the connection is to become something else."""


def plain_path(data: bytes) -> str | None:
    """The path of a GET request that is all of `data`, has no body and wants nothing of its connection; else None."""
    plain = _PLAIN.fullmatch(data)
    return None if plain is None or _TELLING.search(data) else unquote(plain[1].decode("ascii"))


def bound_of(app: Any) -> Bound | None:
    """The bound of the application that uvicorn runs, inside what uvicorn puts around it."""
    while app is not None and not hasattr(app, "state"):
        app = getattr(app, "app", None)
    found = getattr(getattr(app, "state", None), "bound", None)
    return found if isinstance(found, Bound) else None


def refusal(path: str) -> bytes:
    """The whole response, as the middleware's would be but for the times of stages."""
    body = _BODY[0] + orjson.dumps(cleaned(path)) + _BODY[1]
    return b"%sx-request-id: %s\r\ncontent-length: %d\r\n\r\n%s" % (_HEAD, uuid7().encode(), len(body), body)


_EXAMPLE: Final = problem(Overloaded(), "/")
_BODY: Final = bytes(_EXAMPLE.body).split(b'"/"')
_HEAD: Final = b"HTTP/1.1 503 Service Unavailable\r\n" + b"".join(
    name + b": " + value + b"\r\n" for name, value in _EXAMPLE.raw_headers if name != b"content-length"
)
