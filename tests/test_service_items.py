"""The live catalogue over HTTP: changes are in force at once here, and soon in every other worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.catalogue import CatalogueUnavailable
from shared.retrieval import Mode
from tests.servers import RedisServer
from tests.serving import Running, assert_problem, ids_of, json_of, running, serving, until
from tests.worlds import after, cyclic

N = 12


@pytest.fixture(params=list(Mode))
async def upnext(request: pytest.FixtureRequest, tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Running]:
    async with serving(tmp_path, redis_server, cyclic(N), retrieval=request.param) as running:
        yield running


async def test_show(upnext: Running) -> None:
    assert json_of(await upnext.http.get("/items/2")) == {
        "item_id": "2", "title": "Item 2", "categories": ["parity:even"], "available_from": "2000-01-03T00:00:00Z",
        "available_until": None, "withdrawn": False, "available": True, "in_bundle": True, "revision": None,
    }  # fmt: skip
    assert_problem(await upnext.http.get("/items/unheard-of"), 404, "unknown_item")


async def test_a_change_leaves_what_it_does_not_name(upnext: Running) -> None:
    shown = await upnext.put("2", title="Two", categories={"genre": ["A", "B"]})
    assert shown["title"] == "Two"
    assert shown["categories"] == ["genre:A", "genre:B"]
    assert shown["available_from"] == "2000-01-03T00:00:00Z"
    assert shown["revision"] == 1
    assert json_of(await upnext.http.get("/items/2")) == shown
    first = (await upnext.bring(["1"], n=1))["items"][0]
    assert (first["item_id"], first["title"]) == ("2", "Two")
    assert (await upnext.put("2"))["title"] == "Two"
    assert (await upnext.bring(["1"], n=1))["items"][0]["title"] == "Two"
    again = await upnext.put("2", available_until="2100-01-01T00:00:00Z")
    assert (again["title"], again["categories"]) == ("Two", ["genre:A", "genre:B"])
    assert again["available_from"] == "2000-01-03T00:00:00Z"
    assert again["available_until"] == "2100-01-01T00:00:00Z"
    late = await upnext.send("PUT", "/items/2", {"available_from": "2100-01-01T00:00:00Z"})
    assert_problem(late, 422, "validation", "/available_until")


async def test_withdrawn_items_are_gone_at_once_for_every_time(upnext: Running) -> None:
    assert json_of(await upnext.http.delete("/items/2"))["withdrawn"]
    again = json_of(await upnext.http.delete("/items/2"))
    assert again["withdrawn"]
    assert not again["available"]
    for answer in (
        await upnext.bring(["1"], n=100),
        await upnext.bring(["1"], n=100, candidates=["2", "3"]),
        await upnext.bring([], n=100),
        await upnext.ask("nobody", n=100),
        await upnext.ask("nobody", n=100, as_of="2000-02-01T00:00:00Z"),
    ):
        assert "2" not in ids_of(answer)
    await upnext.put("2")
    assert ids_of(await upnext.bring(["1"], n=1)) == ["2"]
    assert_problem(await upnext.http.delete("/items/unheard-of"), 404, "unknown_item")


async def test_intervals_move(upnext: Running) -> None:
    await upnext.put("2", available_until="2010-01-01T00:00:00Z")
    await upnext.put("3", available_from="2010-01-01T00:00:00Z")
    assert ids_of(await upnext.bring(["1"], n=100)) == after(1, N, without=(1, 2))
    then = "2009-12-31T23:59:59.999999Z"
    assert ids_of(await upnext.bring(["1"], n=100, as_of=then)) == after(1, N, without=(1, 3))
    await upnext.put("12", available_from="1990-01-01T00:00:00Z")  # beyond the prefix of its time
    assert ids_of(await upnext.bring(["1"], as_of="1995-01-01T00:00:00Z")) == ["12"]


async def test_a_new_item_is_known_but_not_recommended(upnext: Running) -> None:
    shown = await upnext.put("new", title="New", available_from="2020-01-01T00:00:00Z")
    assert (shown["in_bundle"], shown["available"]) == (False, True)
    event = {"user_id": "u", "item_id": "new", "event_type": "view"}
    assert json_of(await upnext.http.post("/events", json=event))["events"][0]["known_item"]
    assert "new" not in await upnext.ids("u", n=100)


@pytest.mark.parametrize(
    ("body", "places"),
    [
        ({"available_from": "2020-01-01T00:00:00Z", "available_until": "2020-01-01T00:00:00Z"}, [""]),
        ({"available_from": "2020-01-01"}, ["/available_from"]),
        ({"categories": ["comedy"]}, ["/categories/0"]),
        ({"categories": {"genre": "Comedy"}}, ["/categories"]),
        ({"categories": {"genre": [None]}}, ["/categories"]),
        ({"categories": [1]}, ["/categories/0"]),
        ({"withdrawn": "yes"}, ["/withdrawn"]),
        ({"title": "\ud800"}, ["/title"]),
        ({"title": "a\0b"}, ["/title"]),
        ({"categories": ["genre:\0"]}, ["/categories/0"]),
        ({"price": 3}, ["/price"]),
    ],
)
async def test_bad_bodies(tmp_path: Path, redis_server: RedisServer, body: dict[str, Any], places: list[str]) -> None:
    async with serving(tmp_path, redis_server, cyclic(N)) as upnext:
        assert_problem(await upnext.send("PUT", "/items/2", body), 422, "validation", *places)


async def test_ids_and_parameters(upnext: Running) -> None:
    assert_problem(await upnext.http.get("/items/a%20b"), 422, "validation", "item_id")
    assert_problem(await upnext.http.get("/items/2?full=1"), 422, "validation", "full")
    assert_problem(await upnext.http.put("/items/2?x=1&y=2", json={}), 422, "validation", "x", "y")


async def test_catalogue_down(upnext: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def down(*_: object, **__: object) -> None:
        raise CatalogueUnavailable("disk full")

    for method in ("get", "put", "changes_since"):
        monkeypatch.setattr(upnext.services.catalogue, method, down)
    assert_problem(await upnext.http.get("/items/2"), 503, "catalogue_unavailable")
    assert_problem(await upnext.http.put("/items/2", json={}), 503, "catalogue_unavailable")
    assert_problem(await upnext.http.delete("/items/2"), 503, "catalogue_unavailable")
    await upnext.services.live.follow_catalogue()
    checks = json_of(await upnext.http.get("/readyz"))
    assert (checks["status"], checks["checks"]["catalogue"]) == ("degraded", "the database cannot be read")
    assert await upnext.ids("u", n=1) == ["1"]  # as it was when it was last read


async def test_other_workers_follow(tmp_path: Path, redis_server: RedisServer) -> None:
    async with (
        serving(tmp_path, redis_server, cyclic(N), catalogue_poll_seconds=0.02) as one,
        running(one.settings) as other,
    ):
        await one.put("2", withdrawn=True)
        await one.put("3", withdrawn=True)
        await until(lambda: other.services.live.revision == 2)
        assert ids_of(await other.bring(["1"], n=100)) == after(1, N, without=(1, 2, 3))
