"""Items like an item."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service import recommend, similar
from shared.catalogue import Item, ItemChange
from shared.popularity import Popularity
from shared.retrieval import Mode, Retrieval, Retriever
from shared.times import DAY, render
from tests.servers import RedisServer
from tests.serving import Running, assert_problem, ids_of, json_of, serving
from tests.worlds import BORN, World, cyclic

N = 12


def fan() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Item i points at i * 10 degrees, with a length that would mislead an inner product."""
    angles = np.radians(np.arange(1, N + 1) * 10)
    lengths = 1 + 5 * (np.arange(N) % 4)
    return (np.stack([np.cos(angles), np.sin(angles)], axis=1) * lengths[:, None]).astype(np.float32)  # (N, 2)


def fan_world() -> World:
    table = np.ones((N + 2, 2), np.float32)
    return cyclic(N, vectors=fan(), tables={"sasrec": table, "bert4rec": table})


@pytest.fixture(params=[*Mode, "large"])
async def upnext(
    request: pytest.FixtureRequest, tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Running]:
    """In each setting of retrieval, and as if the catalogue were a large one."""
    mode = request.param
    if mode == "large":
        mode = Mode.AUTO
        monkeypatch.setattr(recommend, "LARGE", 0)
    async with serving(tmp_path, redis_server, fan_world(), retrieval=mode) as running:
        yield running


async def like(upnext: Running, item: str, **parameters: object) -> list[str]:
    return ids_of(json_of(await upnext.http.get(f"/items/{item}/similar", params=parameters)))  # type: ignore[arg-type]


async def test_nearest_by_angle_first_and_never_itself(upnext: Running) -> None:
    response = await upnext.http.get("/items/1/similar?n=3")
    answer = json_of(response)
    assert ids_of(answer) == ["2", "3", "4"]
    assert (answer["item_id"], answer["strategy"], answer["requested"]) == ("1", "similar", 3)
    assert answer["model"] == {"name": "sasrec", "version": "2000-03-01T00-00-00Z-test"}
    first = answer["items"][0]
    assert (first["title"], first["reason"], first["rank"]) == ("Item 2", "similar", 1)
    assert first["score"] == pytest.approx(np.cos(np.radians(10)), abs=1e-6)
    assert response.headers["x-model-version"] == "2000-03-01T00-00-00Z-test"
    assert "retrieve;" in response.headers["server-timing"]
    assert set(await like(upnext, "6", n=2, model="bert4rec")) == {"5", "7"}
    assert len(await like(upnext, "6", n=100)) == N - 1


async def test_only_items_that_exist(upnext: Running) -> None:
    await upnext.put("2", withdrawn=True)
    await upnext.put("3", available_until="2010-01-01T00:00:00Z")
    assert await like(upnext, "1", n=2) == ["4", "5"]
    assert await like(upnext, "1", n=2, as_of="2009-01-01T00:00:00Z") == ["3", "4"]
    assert await like(upnext, "1", n=100, as_of=render(BORN + 4 * DAY)) == ["3", "4"]
    assert await like(upnext, "2", n=1) == ["1"]  # gone itself, and all the more in need of others


async def test_a_new_item_has_similar_ones_by_categories(upnext: Running) -> None:
    await upnext.put("new", categories=["parity:even", "size:small"])
    await upnext.put("10", categories=["parity:even", "size:small"])
    await upnext.put("other", categories=["size:small"], title="Other")
    answer = json_of(await upnext.http.get("/items/new/similar?n=4"))
    assert ids_of(answer) == ["10", "2", "4", "6"]
    assert answer["strategy"] == "popular"
    assert {(i["score"], i["reason"]) for i in answer["items"]} == {(None, "popular")}
    last = json_of(await upnext.http.get("/items/new/similar?n=100"))["items"][-1]
    assert (last["item_id"], last["title"], last["score"], last["reason"]) == ("other", "Other", None, "new")
    await upnext.put("new", categories=[])
    assert await like(upnext, "new") == []
    assert "new" not in await like(upnext, "1", n=100)


async def test_errors(upnext: Running) -> None:
    get = upnext.http.get
    assert_problem(await get("/items/unheard-of/similar"), 404, "unknown_item")
    assert_problem(await get("/items/1/similar?model=gpt"), 404, "unknown_model", detail="bert4rec, sasrec")
    assert_problem(await get("/items/a%20b/similar"), 422, "validation", "item_id")
    assert_problem(await get("/items/1/similar?n=0&as_of=last_event&k=1"), 422, "validation", "n", "as_of", "k")


async def test_no_bundle(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, redis_server, None) as upnext:
        await upnext.put("new")
        assert_problem(await upnext.http.get("/items/new/similar"), 503, "no_bundle")


async def test_a_vector_of_zeros_is_like_nothing_in_particular(tmp_path: Path, redis_server: RedisServer) -> None:
    vectors = np.eye(3, dtype=np.float32)
    vectors[0] = 0
    world = cyclic(3, vectors=vectors, items=tuple(Item(str(i), available_from=BORN) for i in (1, 2, 3)))
    async with serving(tmp_path, redis_server, world) as upnext:
        assert await like(upnext, "1") == ["2", "3"]
        assert await like(upnext, "2") == ["1", "3"]


async def test_in_a_large_catalogue_others_go_on_and_the_last_gate_sees_what_changed_meanwhile(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recommend, "LARGE", N)
    begun, go_on = asyncio.Event(), threading.Event()
    search, loop = Retriever.similar, asyncio.get_running_loop()

    def slowly(*arguments: Any) -> Retrieval:
        found = search(*arguments)
        loop.call_soon_threadsafe(begun.set)
        assert go_on.wait(60)
        return found

    async with serving(tmp_path, redis_server, fan_world()) as upnext:
        monkeypatch.setattr(Retriever, "similar", slowly)
        asked = asyncio.create_task(like(upnext, "1", n=2))
        await asyncio.wait_for(begun.wait(), 60)
        assert await upnext.ids("u", n=1) == ["1"]
        upnext.services.live.apply([ItemChange("2", None, None, None, None, True, 1)])
        go_on.set()
        assert await asked == ["3", "4"]


async def test_in_a_large_catalogue_items_may_be_added_while_others_are_looked_at(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recommend, "LARGE", N)
    begun, go_on = asyncio.Event(), threading.Event()
    find, loop = similar.akin, asyncio.get_running_loop()

    def late(*arguments: Any) -> Retrieval:
        loop.call_soon_threadsafe(begun.set)
        assert go_on.wait(60)
        return find(*arguments)

    monkeypatch.setattr(similar, "akin", late)
    async with serving(tmp_path, redis_server, fan_world()) as upnext:
        await upnext.put("new", categories=["parity:even"])
        asked = asyncio.create_task(like(upnext, "new", n=100))
        await asyncio.wait_for(begun.wait(), 60)
        await upnext.put("newer", categories=["parity:even"])
        go_on.set()
        assert set(await asked) == {str(n) for n in range(2, N + 1, 2)}
        assert set(await like(upnext, "new", n=100)) == {str(n) for n in range(2, N + 1, 2)} | {"newer"}


async def test_in_a_large_catalogue_the_order_of_an_older_day_is_made_aside(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recommend, "LARGE", N)
    makers: list[str] = []
    ranked = Popularity._ranked

    def told(self: Popularity, day: int) -> Any:
        makers.append(threading.current_thread().name)
        return ranked(self, day)

    monkeypatch.setattr(Popularity, "_ranked", told)
    async with serving(tmp_path, redis_server, cyclic(N)) as upnext:
        makers.clear()  # the order of now is made when the bundle is loaded
        today = await upnext.ids("u")
        assert makers == []
        older = render(BORN + 3 * DAY)
        assert set(await upnext.ids("u", as_of=older)) < set(today)
        assert [name.split("_")[0] for name in makers] == ["aside"]
        body = {"users": ["u", "v"], "as_of": render(BORN + 4 * DAY)}
        json_of(await upnext.http.post("/recommend/batch", json=body))
        assert [name.split("_")[0] for name in makers] == ["aside"] * 2
