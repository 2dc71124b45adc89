"""POST /events and GET /users/{id}/history."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.ingest import LogUnavailable
from shared.times import SECOND, now, render
from tests.servers import RedisServer
from tests.serving import Running, assert_problem, json_of, serving
from tests.worlds import cyclic

EVENT = {"event_id": "e1", "user_id": "u", "item_id": "3", "event_type": "view", "timestamp": "2026-01-01T00:00:00Z"}


@pytest.fixture
async def upnext(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Running]:
    async with serving(tmp_path, redis_server, cyclic()) as running:
        yield running


async def test_one_and_many(upnext: Running) -> None:
    answer = json_of(await upnext.http.post("/events", json=EVENT))
    known = {"known_item": True, "known_type": True}
    assert answer == {"accepted": 1, "duplicates": 0, "events": [{"event_id": "e1", "status": "accepted", **known}]}
    others = [EVENT, {"user_id": "u", "item_id": "x", "event_type": "wink", "value": 4}]
    answer = json_of(await upnext.http.post("/events", json={"events": others}))
    assert (answer["accepted"], answer["duplicates"]) == (1, 1)
    assert answer["events"][0] == {"event_id": "e1", "status": "duplicate", **known}
    assert answer["events"][1]["event_id"]
    assert not answer["events"][1]["known_item"]
    assert not answer["events"][1]["known_type"]


async def test_history_shows_the_newest_oldest_first(upnext: Running) -> None:
    await upnext.view("u", "1", "2", "3")
    json_of(await upnext.http.post("/events", json=EVENT | {"value": 2.5, "session_id": "s"}))
    answer = json_of(await upnext.http.get("/users/u/history?limit=4"))
    assert [event["item_id"] for event in answer["events"]] == ["3", "1", "2", "3"]
    assert answer["events"][0] == {
        "event_id": "e1", "item_id": "3", "event_type": "view", "value": 2.5, "timestamp": "2026-01-01T00:00:00Z",
        "recommendation_id": None, "session_id": "s",
    }  # fmt: skip
    assert [e["item_id"] for e in json_of(await upnext.http.get("/users/u/history?limit=1"))["events"]] == ["3"]
    assert json_of(await upnext.http.get("/users/nobody/history"))["events"] == []


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"item_id": "a b"}, "/item_id"),
        ({"item_id": "."}, "/item_id"),
        ({"user_id": ".."}, "/user_id"),
        ({"user_id": 42}, "/user_id"),
        ({"user_id": "a\n"}, "/user_id"),
        ({"user_id": "x" * 257}, "/user_id"),
        ({"event_id": ""}, "/event_id"),
        ({"event_type": "two words"}, "/event_type"),
        ({"timestamp": "2026-01-01T00:00:00"}, "/timestamp"),
        ({"timestamp": "yesterday"}, "/timestamp"),
        ({"timestamp": 1}, "/timestamp"),
        ({"timestamp": "0001-01-01T00:00:00+10:00"}, "/timestamp"),
        ({"timestamp": render(now() + 3_600 * SECOND)}, "/timestamp"),
        ({"value": "4"}, "/value"),
        ({"value": True}, "/value"),
        ({"colour": "red"}, "/colour"),
        ({"a/b~c": 1}, "/a~1b~0c"),
        ({"\ud800": 1}, ""),
    ],
)
async def test_a_bad_event_is_a_422_for_all(upnext: Running, change: dict[str, Any], place: str) -> None:
    bad = EVENT | change
    assert_problem(await upnext.send("POST", "/events", bad), 422, "validation", place)
    response = await upnext.send("POST", "/events", {"events": [EVENT, bad]})
    assert_problem(response, 422, "validation", "/events/1" + place)
    assert json_of(await upnext.http.get("/users/u/history"))["events"] == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
async def test_values_are_finite(upnext: Running, number: str) -> None:
    text = '{"user_id": "u", "item_id": "3", "event_type": "view", "value": ' + number + "}"
    response = await upnext.http.post("/events", content=text, headers={"Content-Type": "application/json"})
    assert_problem(response, 422, "validation", "/value")


async def test_clocks_may_differ_by_five_seconds(upnext: Running) -> None:
    json_of(await upnext.http.post("/events", json=EVENT | {"timestamp": render(now() + 3 * SECOND)}))


async def test_shapes_of_the_body(upnext: Running) -> None:
    many = {"events": [EVENT] * 501}
    assert_problem(await upnext.http.post("/events", json=many), 422, "validation", "/events")
    assert_problem(await upnext.http.post("/events", json={"events": []}), 422, "validation", "/events")
    assert_problem(await upnext.http.post("/events", json={"events": [], "x": 1}), 422, "validation", "/events", "/x")
    assert_problem(await upnext.http.post("/events", json=[EVENT]), 422, "validation", "")
    assert_problem(await upnext.http.post("/events?dry_run=1", json=EVENT), 422, "validation", "dry_run")
    missing = {"user_id": "u"}
    assert_problem(await upnext.http.post("/events", json=missing), 422, "validation", "/item_id", "/event_type")


async def test_conflict(upnext: Running) -> None:
    json_of(await upnext.http.post("/events", json=EVENT))
    other = EVENT | {"item_id": "4"}
    assert_problem(await upnext.http.post("/events", json=other), 409, "conflict", "")
    batch = {"events": [EVENT | {"event_id": "e2"}, other]}
    assert_problem(await upnext.http.post("/events", json=batch), 409, "conflict", "/events/1")
    assert len(json_of(await upnext.http.get("/users/u/history"))["events"]) == 1


async def test_log_down(upnext: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = LogUnavailable("disk full")

    async def down(*_: object) -> None:
        raise reason

    for method in ("append", "history"):
        monkeypatch.setattr(upnext.services.log, method, down)
    assert_problem(await upnext.http.post("/events", json=EVENT), 503, "log_unavailable", detail="nothing was stored")
    assert_problem(await upnext.http.get("/users/u/history"), 503, "log_unavailable")
    reason = LogUnavailable("no answer", perhaps_written=True)
    assert_problem(await upnext.http.post("/events", json=EVENT), 503, "log_unavailable", detail="may be stored or not")
