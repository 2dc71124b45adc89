"""The short way to a recommendation answers what the framework's route answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.servers import RedisServer
from tests.serving import Running, running, serving
from tests.worlds import cyclic

REQUESTS = [
    ("GET", path)
    for path in (
        "/recommend/u",
        "/recommend/nobody?n=3",
        "/recommend/a%3Ab%7Cc@d",
        "/recommend/batch",
        "/recommend/u?n=0",
        "/recommend/u?n=1&n=2",
        "/recommend/u?n=",
        "/recommend/u?nix=1&n=x",
        "/recommend/u?model=nix",
        "/recommend/u?model=bert4rec&exclude=4&exclude=5",
        "/recommend/u?exclude_seen=false&filter=parity:even",
        "/recommend/u?filter=nix:1",
        "/recommend/u?as_of=last_event",
        "/recommend/nobody?as_of=last_event",
        "/recommend/u?as_of=2000-01-05T00:00:00Z",
        "/recommend/u?as_of=2000-01-05",
        "/recommend/",
        "/recommend/..",
        "/recommend/%2e%2e",
        "/recommend/a%20b",
        "/recommend/a/b",
        "/recommend/a%2Fb",
        "/recommend/%00",
        f"/recommend/{'x' * 257}",
        "/recommend/u/",
    )
] + [("HEAD", "/recommend/u"), ("DELETE", "/recommend/u"), ("OPTIONS", "/recommend/u")]


EVENT: dict[str, Any] = {"event_id": "e", "user_id": "v", "item_id": "3", "event_type": "view", "value": 4}
JSON = "application/json"
BODIES: list[tuple[str | bytes, str | None]] = [
    (json.dumps(body), JSON)
    for body in cast(
        "tuple[object, ...]",
        (
            EVENT,
            EVENT,  # a duplicate
            EVENT | {"item_id": "4"},  # a conflict
            {"events": [EVENT, EVENT | {"event_id": "f", "timestamp": "2026-01-01T00:00:00+01:00"}]},
            {"events": [EVENT | {"event_id": "g"}, EVENT | {"item_id": "4"}]},
            {"events": []},
            {"events": [EVENT] * 501},
            {"events": [EVENT, {}]},
            {"events": {}},
            {**EVENT, "events": [EVENT]},
            {**EVENT, "colour": "red"},
            {**EVENT, "user_id": 42},
            {**EVENT, "user_id": "\ud800"},
            {**EVENT, "value": "4"},
            {**EVENT, "value": True},
            {**EVENT, "value": 10**400},
            {**EVENT, "timestamp": 1},
            {**EVENT, "timestamp": "2026-01-01T00:00:00"},
            {**EVENT, "timestamp": "2999-01-01T00:00:00Z"},
            {**EVENT, "event_id": "x" * (1 << 20)},
            {},
            [],
            None,
            "text",
        ),
    )
] + [
    (b"", JSON),
    (b"{", JSON),
    (b'{"user_id": "v"', JSON),
    (b"\xff", JSON),
    (b"\xef\xbb\xbf{}", JSON),
    (json.dumps(EVENT).replace("4", "NaN"), JSON),
    (json.dumps(EVENT).replace("4", "1e999"), JSON),
    (json.dumps(EVENT | {"event_id": "h"}).replace('"v"', '"u", "user_id": "v"'), JSON),
    (json.dumps(EVENT | {"event_id": "i"}), "application/json; charset=utf-8"),
    (json.dumps(EVENT | {"event_id": "j"}), "application/vnd.x+json"),
    (json.dumps(EVENT), "text/plain"),
    (json.dumps(EVENT), None),
]


class Around:
    """The application as it would be without the short way."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


async def test_both_ways_answer_alike(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, redis_server, cyclic()) as short:
        await short.view("u", "3", "7", at="2000-01-20T00:00:00Z")
        monkeypatch.setattr("service.main.Direct", Around)
        async with running(short.settings) as long:
            for method, path in REQUESTS:
                await short.http.request(method, path)  # so that both read the history from the same place
                assert await told(short, method, path) == await told(long, method, path), (method, path)
            lines = [(await each.http.get("/metrics")).text for each in (short, long)]
    routes = [{line for line in text.splitlines() if line.startswith("upnext_request_seconds_count")} for text in lines]
    assert [any('route="/recommend/{user_id}",status="422"' in line for line in each) for each in routes] == [True] * 2


async def test_without_a_bundle(tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, redis_server, None) as short:
        monkeypatch.setattr("service.main.Direct", Around)
        async with running(short.settings) as long:
            found = await told(short, "GET", "/recommend/u")
            assert found == await told(long, "GET", "/recommend/u")
            assert found[0] == 503


async def test_both_ways_take_events_alike(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path / "short", redis_server, cyclic()) as short:
        monkeypatch.setattr("service.main.Direct", Around)
        async with serving(tmp_path / "long", redis_server, cyclic()) as long:
            for body, kind in BODIES:
                sent = {"content": body, "headers": {"Content-Type": kind} if kind else {}}
                found, wanted = [await told(each, "POST", "/events", **sent) for each in (short, long)]
                assert found == wanted, (body[:200], kind)
            for query in ("?", "?dry_run=1"):
                found, wanted = [await told(each, "POST", "/events" + query, json=EVENT) for each in (short, long)]
                assert found == wanted, query
            assert await told(short, "GET", "/users/v/history") == await told(long, "GET", "/users/v/history")


async def told(upnext: Running, method: str, path: str, **sent: Any) -> tuple[int, dict[str, Any], Any]:
    """Status, headers and body, less what differs between any two requests."""
    response: httpx.Response = await upnext.http.request(method, path, **sent)
    body = response.json() if response.content else None
    if isinstance(body, dict):
        for name in ("recommendation_id", "as_of"):
            body.pop(name, None)
        for event in body.get("events", ()):
            event.pop("timestamp", None)  # that of a server's clock, where none was sent
        for fault in (body, *body.get("errors", ())):
            if "here it is" in fault.get("detail", ""):  # and what time it is
                fault.pop("detail")
    varying = ("x-request-id", "server-timing", "content-length")
    return response.status_code, {k: v for k, v in response.headers.items() if k not in varying}, body
