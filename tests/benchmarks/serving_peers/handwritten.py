"""What a good engineer writes in an afternoon: the same duties as Upnext's by the usual means.

A strict query model and a response model, seen items and items that do not exist yet left out, popular items for
unknown users, Prometheus metrics over all workers, and a JSON log line a request. Not here, though Upnext has it:
filters, other models, changes of the catalogue, a swap of the model, a bound on requests in flight, histories that
Redis does not hold, and answers while Redis is down.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query
from prometheus_client import CollectorRegistry, Counter, Histogram, make_asgi_app
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.benchmarks.serving_peers.parts import REDIS_SOCKET, Ints, Parts, best, key_of


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        return json.dumps(line | getattr(record, "fields", {}))


handler = logging.StreamHandler(sys.stderr)
handler.setFormatter(JsonFormatter())
log = logging.getLogger("app")
log.addHandler(handler)
log.setLevel(logging.INFO)

REQUESTS = Histogram("request_seconds", "Time to answer.", ["method", "route", "status"])
STAGES = Histogram("stage_seconds", "Time in one stage.", ["stage"])
ANSWERS = Counter("recommendations", "Answers.", ["strategy"])


class Observed:
    """ASGI middleware: request id, metrics and the log line."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, request_id, status = time.perf_counter(), str(uuid.uuid4()), 500

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            took = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "unmatched")
            REQUESTS.labels(scope["method"], route, str(status)).observe(took)
            fields = {"request_id": request_id, "method": scope["method"], "route": route, "status": status}
            log.info("request", extra={"fields": fields | {"ms": round(took * 1000, 3)}})


class Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid")

    n: int = Field(10, ge=1, le=100)
    as_of: datetime | None = None
    exclude_seen: bool = True
    exclude: list[str] = Field(default=[], max_length=100)


class RecommendedItem(BaseModel):
    rank: int
    item_id: str
    title: str
    score: float | None
    available_from: str


class Answer(BaseModel):
    recommendation_id: str
    user_id: str
    model: str
    as_of: datetime
    strategy: str
    requested: int
    returned: int
    items: list[RecommendedItem]


app = FastAPI()
app.add_middleware(Observed)
registry = CollectorRegistry()
MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
app.mount("/metrics", make_asgi_app(registry))
parts = Parts()
popular = np.arange(len(parts.items))
redis = Redis(unix_socket_path=REDIS_SOCKET, decode_responses=True, socket_timeout=0.5)


@app.get("/recommend/{user_id}")
async def recommend(user_id: str, parameters: Annotated[Parameters, Query()]) -> Answer:
    as_of = parameters.as_of or datetime.now(UTC)
    with STAGES.labels("read").time():
        history = parts.rows(await redis.lrange(key_of(user_id), 0, -1))
    allowed = parts.available_from <= as_of.timestamp()  # (N,)
    if parameters.exclude_seen:
        allowed[history] = False
    allowed[parts.rows(parameters.exclude)] = False
    if len(history):
        items = by_model(history, allowed, parameters.n)
    else:
        items = [described(rank, row, None) for rank, row in enumerate(popular[allowed[popular]][: parameters.n], 1)]
    strategy = "sequence" if len(history) else "popular"
    ANSWERS.labels(strategy).inc()
    return Answer(
        recommendation_id=str(uuid.uuid4()),
        user_id=user_id,
        model="sasrec",
        as_of=as_of,
        strategy=strategy,
        requested=parameters.n,
        returned=len(items),
        items=items,
    )


def by_model(history: Ints, allowed: Any, n: int) -> list[RecommendedItem]:
    with STAGES.labels("encode").time():
        (query,) = parts.encode([history])
    with STAGES.labels("retrieve").time():
        scores = parts.vectors @ query  # (N,)
        scores[~allowed] = -np.inf
        found = best(scores, n)
    return [described(rank, row, float(scores[row])) for rank, row in enumerate(found, 1) if allowed[row]]


def described(rank: int, row: int, score: float | None) -> RecommendedItem:
    item = parts.items[row]
    return RecommendedItem(
        rank=rank, item_id=item.item_id, title=item.title, score=score, available_from=item.available_from
    )
