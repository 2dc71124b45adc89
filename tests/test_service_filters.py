"""Filters over HTTP: categories and dates narrow every kind of answer, and live changes move items in and out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.catalogue import Item
from shared.retrieval import Mode
from shared.times import DAY, render
from tests.servers import RedisServer
from tests.serving import Running, assert_problem, ids_of, json_of, serving
from tests.worlds import BORN, after, cyclic

N = 12
EVEN, ODD = "parity:even", "parity:odd"


def day(number: float) -> str:
    """Item i was born on day(i)."""
    return render(BORN + int(number * DAY))


def sized(item: Item) -> Item:
    """Items 1 to 4 are small, the rest are large."""
    size = "size:small" if int(item.item_id) <= 4 else "size:large"
    return Item(item.item_id, item.title, (*item.categories, size), item.available_from)


@pytest.fixture(params=list(Mode))
async def upnext(request: pytest.FixtureRequest, tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Running]:
    world = cyclic(N, items=tuple(map(sized, cyclic(N).items)))
    async with serving(tmp_path, redis_server, world, retrieval=request.param) as running:
        yield running


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ({"filter": EVEN}, {2, 4, 6, 8, 10, 12}),
        ({"filter": [EVEN, ODD]}, set(range(1, 13))),
        ({"filter": [EVEN, "size:small"]}, {2, 4}),
        ({"filter": [EVEN, "size:small", "size:large"]}, {2, 4, 6, 8, 10, 12}),
        ({"filter": "parity:neither"}, set()),
        ({"filter_out": EVEN}, {1, 3, 5, 7, 9, 11}),
        ({"filter_out": [EVEN, "size:small"]}, {5, 7, 9, 11}),
        ({"filter_out": "parity:neither"}, set(range(1, 13))),
        ({"filter": ODD, "filter_out": "size:large"}, {1, 3}),
        ({"available_after": day(10)}, {10, 11, 12}),
        ({"available_before": day(2)}, {1, 2}),
        ({"available_after": day(3), "available_before": day(5)}, {3, 4, 5}),
        ({"available_after": day(5), "available_before": day(3)}, set()),
        ({"filter": EVEN, "available_after": day(9.5)}, {10, 12}),
    ],
)
async def test_filters_narrow_every_path(upnext: Running, query: dict[str, Any], wanted: set[int]) -> None:
    await upnext.view("u", "3")
    follow = [i for i in after(3, N, without=(3,)) if int(i) in wanted]
    assert await upnext.ids("u", n=100, **query) == follow
    assert await upnext.ids("u", n=2, **query) == follow[:2]
    assert await upnext.ids("nobody", n=100, **query) == [str(i) for i in sorted(wanted)]
    body = {
        name: [value] if name.startswith("f") and isinstance(value, str) else value for name, value in query.items()
    }
    assert ids_of(await upnext.bring(["3"], n=100, **body)) == follow
    named = ["1", "12", "6", "unheard-of"]
    assert ids_of(await upnext.bring(["3"], candidates=named, **body)) == [i for i in follow if i in named]
    assert ids_of(await upnext.bring([], candidates=named, **body)) == [i for i in ("1", "6", "12") if int(i) in wanted]
    batch = json_of(await upnext.http.post("/recommend/batch", json={"users": ["u", "nobody"], "n": 100, **body}))
    assert [ids_of(found) for found in batch["results"]] == [follow, [str(i) for i in sorted(wanted)]]


async def test_filters_go_with_everything_else(upnext: Running) -> None:
    await upnext.view("u", "3", at=day(3.5))
    assert await upnext.ids("u", filter=EVEN, exclude=["4", "8"], n=3) == ["6", "10", "12"]
    assert await upnext.ids("u", filter=ODD, exclude_seen=False, n=100) == ["5", "7", "9", "11", "1", "3"]
    assert await upnext.ids("u", filter=EVEN, as_of=day(6.5)) == ["4", "6", "2"]


async def test_live_changes_move_items_in_and_out(upnext: Running) -> None:
    await upnext.put("2", categories={"parity": ["odd"], "mood": ["dark"]})
    assert ids_of(await upnext.bring(["1"], filter=[EVEN], n=100)) == ["4", "6", "8", "10", "12"]
    assert ids_of(await upnext.bring(["1"], filter=["mood:dark"])) == ["2"]
    assert ids_of(await upnext.bring([], filter=["mood:dark"])) == ["2"]
    await upnext.put("2", categories=[], available_from=day(-5))
    assert ids_of(await upnext.bring(["1"], filter=["mood:dark"])) == []
    assert ids_of(await upnext.bring(["1"], available_before=day(0))) == ["2"]
    assert ids_of(await upnext.bring(["1"], available_before=day(0), as_of=day(0))) == ["2"]
    await upnext.put("2", categories={"parity": ["even"]}, available_from="2000-01-03T00:00:00Z")
    assert ids_of(await upnext.bring(["1"], filter=[EVEN], n=1)) == ["2"]
    await upnext.put("2", withdrawn=True)
    assert ids_of(await upnext.bring(["1"], filter=[EVEN], n=1)) == ["4"]


async def test_an_item_without_a_date_is_before_all_dates(tmp_path: Path, redis_server: RedisServer) -> None:
    world = cyclic(3, items=(Item("1", None, ()), *cyclic(3).items[1:]))
    async with serving(tmp_path, redis_server, world) as upnext:
        assert ids_of(await upnext.bring([], available_after="0001-01-01T00:00:00Z")) == ["2", "3"]
        assert ids_of(await upnext.bring([], available_before="0001-01-01T00:00:00Z")) == ["1"]


async def test_an_unknown_field_is_an_error_that_lists_the_fields(upnext: Running) -> None:
    response = await upnext.http.get("/recommend/u?filter=parity:even&filter=genre:Comedy&filter_out=x:y")
    assert_problem(response, 422, "validation", "filter", "filter_out", detail="there are: parity, size")
    body = {"history": [], "filter": [EVEN, "genre:Comedy"], "filter_out": ["genre:x"]}
    response = await upnext.http.post("/recommend", json=body)
    assert_problem(response, 422, "validation", "/filter/1", "/filter_out/0", detail="there are: parity, size")
    response = await upnext.http.post("/recommend/batch", json={"users": ["u"], "filter": ["genre:x"]})
    assert_problem(response, 422, "validation", "/filter/0")


async def test_a_world_without_categories(tmp_path: Path, redis_server: RedisServer) -> None:
    world = cyclic(2, items=(Item("1"), Item("2")))
    async with serving(tmp_path, redis_server, world) as upnext:
        response = await upnext.http.get("/recommend/u?filter=genre:Comedy")
        assert_problem(response, 422, "validation", "filter", detail="there are: none")


@pytest.mark.parametrize(
    ("query", "places"),
    [
        ("filter=Comedy", ["filter"]),
        ("filter=:x", ["filter"]),
        ("filter_out=x:", ["filter_out"]),
        ("available_after=2000-01-01T00:00:00", ["available_after"]),
        ("available_before=last_event", ["available_before"]),
        ("available_after=2000-01-01T00:00:00Z&available_after=2000-01-01T00:00:00Z", ["available_after"]),
        ("&".join(["filter=parity:even"] * 101), ["filter"]),
    ],
)
async def test_bad_filters(tmp_path: Path, redis_server: RedisServer, query: str, places: list[str]) -> None:
    async with serving(tmp_path, redis_server, cyclic()) as upnext:
        assert_problem(await upnext.http.get(f"/recommend/u?{query}"), 422, "validation", *places)
        values: dict[str, Any] = {}
        for name, value in httpx.QueryParams(query).multi_items():
            values.setdefault(name, []).append(value)
        if len(values[places[0]]) == 1:
            body = {"history": [], **{n: v if n.startswith("f") else v[0] for n, v in values.items()}}
            response = await upnext.http.post("/recommend", json=body)
            pointers = [f"/{p}/0" if p.startswith("f") else f"/{p}" for p in places]
            assert_problem(response, 422, "validation", *pointers)
