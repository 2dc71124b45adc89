"""The live catalogue over HTTP: changes are in force at once here, and soon in every other worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.catalogue import CatalogueUnavailable
from shared.retrieval import Mode
from tests.servers import RedisServer
from tests.serving import Running, assert_problem, ids_of, json_of, running, serving, until
from tests.worlds import after, cyclic, write_bundle

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


async def test_an_item_that_ends_before_it_begins_can_be_renamed_and_withdrawn(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """As a training makes it of an item with an end, no date, and events after its end alone."""
    world = cyclic(N)
    odd = replace(world.items[1], available_until=world.items[0].available_from)
    async with serving(tmp_path, redis_server, replace(world, items=(world.items[0], odd, *world.items[2:]))) as upnext:
        assert (await upnext.put("2", title="Two"))["title"] == "Two"
        assert_problem(await upnext.send("PUT", "/items/2", {"available_from": "2010-01-01T00:00:00Z"}),
                       422, "validation", "/available_until")  # fmt: skip
        assert json_of(await upnext.http.delete("/items/2"))["withdrawn"]
        later = await upnext.put("2", available_until="2100-01-01T00:00:00Z", withdrawn=False)
        assert later["available"]


async def test_null_goes_back_to_what_the_bundle_says(upnext: Running) -> None:
    published = json_of(await upnext.http.get("/items/2"))
    changes = {
        "title": "Two", "categories": ["genre:A"], "available_from": "2001-01-01T00:00:00Z",
        "available_until": "2100-01-01T00:00:00Z", "withdrawn": True,
    }  # fmt: skip
    changed = await upnext.put("2", **changes)
    assert {name: changed[name] for name in changes} == changes
    back = await upnext.put("2", **dict.fromkeys(changes))
    assert back == published | {"revision": 2}
    await upnext.put("new", title="New", available_from="2001-01-01T00:00:00Z", available_until="2002-01-01T00:00:00Z")
    opened = await upnext.put("new", title=None, available_until=None)
    assert (opened["title"], opened["available_until"], opened["available"]) == (None, None, True)
    assert opened["available_from"] == "2001-01-01T00:00:00Z"


async def test_changes_to_several_fields_at_a_time_all_count(upnext: Running) -> None:
    fields = {"title": "Two", "categories": ["genre:A"], "available_until": "2100-01-01T00:00:00Z", "withdrawn": True}
    await asyncio.gather(*(upnext.put("2", **{name: value}) for name, value in fields.items()))
    shown = json_of(await upnext.http.get("/items/2"))
    assert {name: shown[name] for name in fields} == fields
    assert shown["revision"] == len(fields)


async def test_of_an_item_that_only_a_later_bundle_knows_nothing_is_made_up(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    async with serving(tmp_path, redis_server, None, bundle_poll_seconds=0.02) as upnext:
        await upnext.put("2", title="Two")
        await upnext.put("2", title="Zwei")
        assert json_of(await upnext.http.get("/items/2"))["categories"] == []
        write_bundle(upnext.settings.bundles, cyclic(N))
        await until(lambda: upnext.services.live.serving is not None)
        shown = json_of(await upnext.http.get("/items/2"))
        assert (shown["title"], shown["categories"]) == ("Zwei", ["parity:even"])
        assert shown["available_from"] == "2000-01-03T00:00:00Z"
        # A worker that is stuck on an old bundle does not know what is new.
        write_bundle(upnext.settings.bundles, cyclic(N + 1), version="next", current=False)
        (upnext.settings.bundles / "CURRENT").write_text("nothing\n")
        await until(lambda: upnext.services.live.bundle_failure is not None)
        await upnext.put("13", title="Baker's dozen")
        (upnext.settings.bundles / "CURRENT").write_text("next\n")
        await until(lambda: upnext.services.live.now_serving().bundle.version == "next")
        shown = json_of(await upnext.http.get("/items/13"))
        assert (shown["title"], shown["categories"]) == ("Baker's dozen", ["parity:odd"])
        assert ids_of(await upnext.bring(["12"], as_of="2000-02-01T00:00:00Z", n=1)) == ["13"]


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
    await upnext.put("2", title="Two")
    assert "2" not in ids_of(await upnext.bring(["1"], n=100)), "who tells a title puts nothing back on the shelf"
    await upnext.put("2", withdrawn=False)
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


async def test_a_new_item_comes_last_where_no_model_is_asked(upnext: Running) -> None:
    shown = await upnext.put("new", title="New", available_from="2020-01-01T00:00:00Z")
    assert (shown["in_bundle"], shown["available"]) == (False, True)
    await upnext.put("older", categories=["parity:even"], available_from="2010-01-01T00:00:00Z")
    event = {"user_id": "u", "item_id": "new", "event_type": "view"}
    assert json_of(await upnext.http.post("/events", json=event))["events"][0]["known_item"]

    assert await upnext.ids("nobody", n=100) == [*map(str, range(1, N + 1)), "older", "new"]
    last = (await upnext.ask("nobody", n=100))["items"][-1]
    assert last == {
        "rank": N + 2, "item_id": "new", "title": "New", "score": None, "available_from": "2020-01-01T00:00:00Z",
        "reason": "new",
    }  # fmt: skip
    assert await upnext.ids("u", n=100) == [*map(str, range(1, N + 1)), "older"]  # seen, and no model can read it
    assert await upnext.ids("nobody", filter="parity:even", n=100) == ["2", "4", "6", "8", "10", "12", "older"]
    assert await upnext.ids("nobody", exclude=["new"], available_after="2009-01-01T00:00:00Z") == ["older"]
    named = ["new", "5", "older", "3"]
    assert ids_of(await upnext.bring(["2"], candidates=named)) == ["3", "5", "older", "new"]
    assert ids_of(await upnext.bring(["2", "older"], candidates=named, n=3)) == ["3", "5", "new"]
    assert ids_of(await upnext.bring(["2"], candidates=["new"])) == ["new"]
    assert "new" not in ids_of(await upnext.bring(["2"], n=100))  # no model can score it


async def test_new_items_go_through_the_gate(upnext: Running) -> None:
    await upnext.put("new", available_from="2010-01-01T00:00:00Z", available_until="2011-01-01T00:00:00Z")

    async def shown(**parameters: Any) -> list[bool]:
        answers = [
            await upnext.bring([], n=100, **parameters),
            await upnext.bring(["2"], candidates=["new"], **parameters),
        ]
        return ["new" in ids_of(answer) for answer in answers]

    assert await shown(as_of="2009-12-31T23:59:59Z") == [False, False]
    assert await shown(as_of="2010-01-01T00:00:00Z") == [True, True]
    assert await shown(as_of="2011-01-01T00:00:00Z") == [False, False]
    assert await shown() == [False, False]
    await upnext.put("new", available_until="2100-01-01T00:00:00Z")
    assert await shown() == [True, True]
    assert json_of(await upnext.http.delete("/items/new"))["withdrawn"]
    assert await shown() == [False, False]
    assert await shown(as_of="2010-01-01T00:00:00Z") == [False, False]


async def test_new_items_survive_a_swap_and_grow_into_the_bundle(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, redis_server, cyclic(N), bundle_poll_seconds=0.02) as upnext:
        await upnext.put("13", available_from="2020-01-01T00:00:00Z")
        await upnext.put("new")
        assert await upnext.ids("nobody", n=100) == [*map(str, range(1, N + 1)), "13", "new"]
        nobody_told_when = await upnext.ids("nobody", n=100, as_of="2024-01-01T00:00:00Z")
        assert nobody_told_when == [*map(str, range(1, N + 1)), "13"], "it exists from its first PUT on"
        write_bundle(upnext.settings.bundles, cyclic(N + 1), version="next")
        await until(lambda: upnext.services.live.now_serving().bundle.version == "next")
        assert await upnext.ids("nobody", n=100) == [*map(str, range(1, N + 2)), "new"]
        assert ids_of(await upnext.bring(["12"], n=1)) == ["13"]


async def pages(upnext: Running, limit: int) -> list[list[str]]:
    found: list[list[str]] = []
    cursor: str | None = None
    while True:
        query = {"limit": str(limit)} | ({"cursor": cursor} if cursor else {})
        page = json_of(await upnext.http.get("/items", params=query))
        found.append([item["item_id"] for item in page["items"]])
        cursor = page["next_cursor"]
        if cursor is None:
            return found


async def test_pages(upnext: Running) -> None:
    await upnext.put("new", title="New")
    await upnext.put("11b")
    await upnext.put("2", withdrawn=True)
    every = sorted([*map(str, range(1, N + 1)), "new", "11b"])
    for limit in (1, 3, 7, 14, 15, 1000):
        found = await pages(upnext, limit)
        assert [item for page in found for item in page] == every
        assert [len(page) for page in found[:-1]] == [limit] * (len(found) - 1)
        assert found[-1]
    listed = json_of(await upnext.http.get("/items"))["items"]
    for item in listed:
        assert item == json_of(await upnext.http.get(f"/items/{item['item_id']}"))
    past = json_of(await upnext.http.get("/items?cursor=zzz"))
    assert past == {"items": [], "next_cursor": None}
    response = await upnext.http.get("/items?limit=0&cursor=a%20b&offset=1")
    assert_problem(response, 422, "validation", "cursor", "limit", "offset")


async def test_pages_without_a_bundle(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, redis_server, None) as upnext:
        assert await pages(upnext, 10) == [[]]
        await upnext.put("a")
        assert await pages(upnext, 10) == [["a"]]
        bare = upnext.settings.model_copy(update={"database_url": f"sqlite:///{tmp_path / 'bare.db'}"})
    async with running(bare) as upnext:
        assert_problem(await upnext.http.get("/items"), 503, "catalogue_unavailable")


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


async def test_other_workers_and_those_to_come_follow(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, redis_server, cyclic(N)) as before:
        await before.put("4", withdrawn=True)
    async with (
        running(before.settings.model_copy(update={"catalogue_poll_seconds": 0.02})) as one,
        running(one.settings) as other,
    ):
        await one.put("2", withdrawn=True)
        await one.put("3", withdrawn=True)
        await until(lambda: other.services.live.revision == 3)
        assert ids_of(await other.bring(["1"], n=100)) == after(1, N, without=(1, 2, 3, 4))
