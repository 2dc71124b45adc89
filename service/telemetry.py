"""What a request took and how it ended: each stage is timed once, and feeds header, histogram and log line.

`Server-Timing: read;dur=0.4, encode;dur=0.2, retrieve;dur=0.1;desc="exact", ...` durations in milliseconds.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, TextIO

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ServiceError, problem
from service.metrics import Metrics
from shared.events import is_id

log = logging.getLogger(__name__)

MAX_BODY: Final = 1 << 20  # bytes


def uuid7() -> str:
    """A UUID that sorts by time (RFC 9562, 5.7): 48 bits of milliseconds, version, 74 random bits."""
    value = (time.time_ns() // 1_000_000 << 80) | random.getrandbits(80)
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(3 << 62) | 2 << 62
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class Stage:
    """A context that adds its time to `stages[name]` of one request, or of each that it serves at once.

    A class: a generator costs three times as much.
    """

    __slots__ = ("name", "started", "traces")

    def __init__(self, name: str, *traces: Trace) -> None:
        self.name, self.traces = name, traces

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        took = time.perf_counter() - self.started
        for trace in self.traces:
            trace.stages[self.name] = trace.stages.get(self.name, 0) + took


@dataclass(slots=True)
class Trace:
    """What one request tells about itself, filled on its way down, written when the response starts."""

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)  # name -> seconds
    paths: Counter[str] = field(default_factory=Counter)  # retrieval paths that found what is answered
    model_version: str | None = None
    caller: str | None = None  # the name of the key that was sent, never the key
    history_items: int = 0  # items that models were to read, and how many of them the bundle knows
    known_items: int = 0
    encoded: int = 0  # query vectors that were made for it and whoever was served with it, and those remembered
    remembered: int = 0

    def stage(self, name: str) -> Stage:
        """Time one stage; the times of one that comes several times add up."""
        return Stage(name, self)

    @property
    def path(self) -> str:
        """The retrieval paths, for people: one, or with several users what was taken for any of them."""
        return ", ".join(sorted(self.paths))

    def server_timing(self) -> str:
        """The header's value."""
        parts = [f"{name};dur={seconds * 1000:.3f}" for name, seconds in self.stages.items()]
        if self.paths:
            parts = [p + f';desc="{self.path}"' if p.startswith("retrieve;") else p for p in parts]
        parts.append(f"total;dur={(time.perf_counter() - self.started) * 1000:.3f}")
        return ", ".join(parts)


def trace_of(request: Request) -> Trace:
    """The trace of the request at hand."""
    trace = request.scope["upnext.trace"]
    assert isinstance(trace, Trace)  # noqa: S101 - put there by Telemetry below
    return trace


class Telemetry:
    """ASGI middleware: request id, headers, metrics, the log line, the body limit, and the last resort for errors.

    Plain ASGI because starlette's BaseHTTPMiddleware runs each request in a task of its own.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace = scope["upnext.trace"] = Trace(_request_id(scope))
        status = 0

        async def traced(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_headers(trace)]
            await send(message)

        try:
            await self.app(scope, limited(scope, receive), traced)
        except Exception:
            log.exception("unexpected error", extra={"fields": {"request_id": trace.request_id}})
            if status:  # the head is out: nothing honest can follow it
                raise
            await problem(ServiceError(), scope["path"])(scope, receive, traced)
        finally:
            self._finish(scope, trace, status)

    def _finish(self, scope: Scope, trace: Trace, status: int) -> None:
        # The template, not the path: ids do not belong in labels, and paths of unknown routes are anybody's.
        route = getattr(scope.get("route"), "path", "unmatched")
        metrics, took = self.metrics, time.perf_counter() - trace.started
        metrics.observe(metrics.requests, took, scope["method"] if route != "unmatched" else "-", route, str(status))
        for name, seconds in trace.stages.items():
            metrics.observe(metrics.stages, seconds, name)
        for path, times in trace.paths.items():
            metrics.count(metrics.retrievals, path, amount=times)
        if trace.history_items:
            metrics.count(metrics.history_items, "true", amount=trace.known_items)
            metrics.count(metrics.history_items, "false", amount=trace.history_items - trace.known_items)
        if trace.encoded:
            metrics.count(metrics.query_vectors, "encoded", amount=trace.encoded)
        if trace.remembered:
            metrics.count(metrics.query_vectors, "remembered", amount=trace.remembered)
        if log.isEnabledFor(logging.INFO):
            fields: dict[str, Any] = {
                "request_id": trace.request_id,
                "method": scope["method"],
                "route": route,
                "status": status,
                "ms": int(took * 1e6) / 1e3,
                "stages": {name: int(seconds * 1e6) / 1e3 for name, seconds in trace.stages.items()},
            }
            if trace.caller:
                fields["caller"] = trace.caller
            if trace.paths:
                fields["retrieval"] = trace.path
            log.handle(_RequestRecord(fields))


class _RequestRecord(logging.LogRecord):
    """What `log.info("request", extra={"fields": fields})` makes, without asking who logs, from where and in which
    thread.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(_REQUEST)
        self.created = time.time()
        self.msecs = self.created % 1 * 1000
        self.fields = fields


_REQUEST: Final = logging.makeLogRecord(
    {"name": __name__, "levelno": logging.INFO, "levelname": "INFO", "msg": "request"}
).__dict__


def limited(scope: Scope, receive: Receive) -> Receive:
    """`receive` that refuses bodies over the limit, declared or not, before they are read to the end."""
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    left = MAX_BODY - (int(declared) if declared.isdigit() and int(declared) > MAX_BODY else 0)

    async def counting() -> Message:
        nonlocal left
        if left < 0:
            raise _too_large()
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise _too_large()
        return message

    return counting


def _too_large() -> HTTPException:
    # The framework's own type: it passes through FastAPI's reading of the body, which hides others behind a 400.
    return HTTPException(413, "The body is larger than 1 MiB.")


def _request_id(scope: Scope) -> str:
    """The client's X-Request-Id if it is an id at all, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and len(value) <= 128 and is_id(text := value.decode("latin-1")):
            return str(text)
    return uuid7()


def _headers(trace: Trace) -> list[tuple[bytes, bytes]]:
    headers = [(b"x-request-id", trace.request_id.encode()), (b"server-timing", trace.server_timing().encode())]
    if trace.model_version:
        headers.append((b"x-model-version", trace.model_version.encode()))
    return headers


class JsonLines(logging.Formatter):
    """One JSON object a line, so that nothing a client sends can break or forge a line."""

    def __init__(self) -> None:
        super().__init__()
        # What logging would find out for each record and our lines do not show: caller, thread, process, task.
        logging._srcfile = None  # as logging's documentation says
        logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False

    def format(self, record: logging.LogRecord) -> str:
        """`record` as JSON; `extra={"fields": {...}}` adds fields."""
        line: dict[str, Any] = {
            "time": f"{_second(int(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().encode("utf-8", "replace").decode(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info).encode("utf-8", "replace").decode()
        return orjson.dumps(line).decode()


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


class TurnHandler(logging.StreamHandler[TextIO]):
    """Writes what one turn of the event loop tells at the end of the turn; warnings and what comes from elsewhere at
    once.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Write `record`, soon. The caller holds the handler's lock."""
        try:
            self._lines.append(self.format(record))
            if record.levelno >= logging.WARNING:
                self.flush()
            elif len(self._lines) == 1:
                asyncio.get_running_loop().call_soon(self.flush)
        except RuntimeError:  # no loop runs here
            self.flush()
        except Exception:  # as logging's own handlers do
            self.handleError(record)

    def flush(self) -> None:
        """Write what waits."""
        with self.lock or nullcontext():
            lines, self._lines = self._lines, []
            if lines:
                self.stream.write("\n".join(lines) + "\n")
            super().flush()


def logging_config(level: str) -> dict[str, Any]:
    """For `logging.config.dictConfig`: our own lines at `level`, the libraries' warnings, as JSON to stderr."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "service.telemetry.JsonLines"}},
        "handlers": {
            "stderr": {"class": "service.telemetry.TurnHandler", "formatter": "json", "stream": "ext://sys.stderr"}
        },
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": {name: {"level": level.upper()} for name in ("service", "shared")},
    }
