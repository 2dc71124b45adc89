"""Many recommendations at once, and the older client's form of one."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.history import HistoryUnavailable
from service.routes.recommend import number
from shared.encoder import CHUNK
from shared.events import IntArray
from shared.retrieval import Mode
from shared.times import DAY, render
from tests.servers import RedisServer
from tests.serving import Running, assert_problem, ids_of, json_of, serving, until
from tests.worlds import BORN, after, cyclic, write_bundle

N = 12


@pytest.fixture(params=list(Mode))
async def upnext(request: pytest.FixtureRequest, tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Running]:
    async with serving(tmp_path, redis_server, cyclic(N), retrieval=request.param) as running:
        yield running


async def batch(upnext: Running, users: list[str], **fields: Any) -> list[dict[str, Any]]:
    body = json_of(await upnext.http.post("/recommend/batch", json={"users": users, **fields}))
    results: list[dict[str, Any]] = body["results"]
    return results


async def test_results_are_those_of_single_requests_in_order(upnext: Running) -> None:
    for user in range(1, N + 1):
        await upnext.view(f"u{user}", str(user), at=render(BORN + user * DAY))
    users = [f"u{1 + r * 7 % N}" if r % 5 else "nobody" for r in range(3 * CHUNK + 2)]
    for parameters in ({}, {"model": "bert4rec", "n": 100}, {"exclude_seen": False, "exclude": ["2", "3"]}):
        results = await batch(upnext, users, **parameters)
        assert [found["user_id"] for found in results] == users
        for name, found in zip(users, results, strict=True):
            single = await upnext.ask(name, **parameters)
            for own in ("recommendation_id", "as_of", "history_source"):
                found.pop(own), single.pop(own)
            assert found == single
    assert len({found["user_id"] for found in await batch(upnext, ["u1"] * 3)}) == 1


async def test_largest_batch_and_as_of(upnext: Running) -> None:
    await upnext.view("u", "3", at=render(BORN + 3 * DAY))
    results = await batch(upnext, ["u"] * 256, n=1)
    assert [ids_of(found) for found in results] == [["4"]] * 256
    (found,) = await batch(upnext, ["u"], as_of="last_event", n=100)
    assert ids_of(found) == ["1", "2"]
    response = await upnext.http.post(
        "/recommend/batch", json={"users": ["u", "nobody", "u", "none"], "as_of": "last_event"}
    )
    assert_problem(response, 422, "validation", "/users/1", "/users/3", detail="no event")


async def test_histories_that_cannot_be_read(upnext: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def down(*_: object) -> None:
        raise HistoryUnavailable("both are down")

    monkeypatch.setattr(upnext.services.histories, "read", down)
    assert [found["strategy"] for found in await batch(upnext, ["u", "v"])] == ["degraded"] * 2
    response = await upnext.http.post("/recommend/batch", json={"users": ["u"], "require_seen": True})
    assert_problem(response, 503, "history_unavailable")


@pytest.mark.parametrize(
    ("body", "places"),
    [
        ({}, ["/users"]),
        ({"users": []}, ["/users"]),
        ({"users": ["u"] * 257}, ["/users"]),
        ({"users": ["u", "a b"]}, ["/users/1"]),
        ({"users": "u"}, ["/users"]),
        ({"users": ["u"], "n": 0, "user_id": "u"}, ["/n", "/user_id"]),
        ({"users": ["u"], "candidates": []}, ["/candidates"]),
        ({"users": ["u"], "as_of": "now"}, ["/as_of"]),
    ],
)
async def test_bad_batches(tmp_path: Path, redis_server: RedisServer, body: dict[str, Any], places: list[str]) -> None:
    async with serving(tmp_path, redis_server, cyclic()) as upnext:
        response = await upnext.http.post("/recommend/batch", json=body)
        assert sorted(places) == sorted(f["pointer"] for f in response.json()["errors"])
        assert_problem(response, 422, "validation", *(f["pointer"] for f in response.json()["errors"]))


async def test_other_errors(upnext: Running) -> None:
    response = await upnext.http.post("/recommend/batch", json={"users": ["u"], "model": "gpt"})
    assert_problem(response, 404, "unknown_model", detail="bert4rec, sasrec")
    assert_problem(await upnext.http.post("/recommend/batch?n=1", json={"users": ["u"]}), 422, "validation", "n")


class Slow:
    """An encoder that waits in `encode` when it is called outside of the event loop's thread."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.spec = encoder, encoder.spec
        self.calls: list[int] = []
        self.go_on, self.home = threading.Event(), threading.get_ident()

    def encode(self, histories: list[IntArray], times: list[IntArray]) -> Any:
        self.calls.append(len(histories))
        if threading.get_ident() != self.home:
            assert self.go_on.wait(10)
        return self.encoder.encode(histories, times)


def slowed(upnext: Running) -> Slow:
    """Put a slow encoder before the default model's."""
    live = upnext.services.live.now_serving()
    queries = live.queries[live.bundle.manifest.default_model]
    slow = Slow(queries.encoder)
    queries.encoder = slow  # type: ignore[assignment]
    return slow


async def test_single_requests_and_a_new_bundle_go_ahead_meanwhile(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, redis_server, cyclic(N), bundle_poll_seconds=0.02) as upnext:
        for user in range(20):
            await upnext.view(f"u{user}", str(user % N + 1))
        slow = slowed(upnext)
        bulk = asyncio.create_task(batch(upnext, [f"u{user}" for user in range(20)], n=2))
        await until(lambda: bool(slow.calls))
        assert await upnext.ids("u4", n=1) == ["6"]
        await upnext.put("2", withdrawn=True)
        write_bundle(upnext.settings.bundles, cyclic(N + 1), version="next")
        await until(lambda: upnext.services.live.now_serving().bundle.version == "next")
        await upnext.put("3", withdrawn=True)  # after the swap, and still in force for the old bundle's answers
        assert not bulk.done()
        slow.go_on.set()
        results = await bulk
        assert slow.calls == [16, 1]  # the last four did what others did, whose vectors are remembered
        assert {found["model"]["version"] for found in results} == {"2000-03-01T00-00-00Z-test"}
        assert ids_of(results[0]) == ["4", "5"]
        assert [ids_of(found) for found in results[2:5]] == [after(3 + r, N)[:2] for r in range(3)]
        # Nothing holds the old bundle, once the bulk thread has put its last work down.
        await until(lambda: gc.collect() >= 0 and not upnext.services.live._former)


async def test_an_item_withdrawn_meanwhile_is_not_returned(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, redis_server, cyclic(N)) as upnext:
        await upnext.view("u", "1")
        slow = slowed(upnext)
        bulk = asyncio.create_task(batch(upnext, ["u"], n=2))
        await until(lambda: bool(slow.calls))
        await upnext.put("2", withdrawn=True)
        slow.go_on.set()
        assert ids_of((await bulk)[0]) == ["3", "4"]


# --- POST /api/recommend/


async def test_the_older_form(upnext: Running) -> None:
    await upnext.view("1", "3")
    answer = json_of(await upnext.http.post("/api/recommend/", json={"user_id": 1, "model": "sasrec"}))
    assert answer["recommendations"][0] == {"id": 4, "title": "Item 4", "score": 12.0}
    assert [item["id"] for item in answer["recommendations"]] == [int(i) for i in after(3, N, without=(3,))[:10]]
    assert json_of(await upnext.http.post("/api/recommend/", json={"user_id": "1"})) == answer
    few = json_of(await upnext.http.post("/api/recommend/", json={"user_id": "nobody", "n": 2}))
    assert few["recommendations"] == [
        {"id": 1, "title": "Item 1", "score": None}, {"id": 2, "title": "Item 2", "score": None},
    ]  # fmt: skip
    await upnext.put("002", title="Two")
    await upnext.put("x")
    body = {"user_id": "nobody", "n": 100}
    ids = [item["id"] for item in json_of(await upnext.http.post("/api/recommend/", json=body))["recommendations"]]
    assert ids[-2:] == ["002", "x"]


@pytest.mark.parametrize("user", [True, 1.5, None, "a b", "..", 2**63, []])
async def test_users_of_the_older_form_are_numbers_or_ids(upnext: Running, user: object) -> None:
    response = await upnext.http.post("/api/recommend/", json={"user_id": user})
    assert response.status_code == 422, response.text
    assert {fault["pointer"] for fault in response.json()["errors"]} == {"/user_id"}


async def test_errors_of_the_older_form(upnext: Running) -> None:
    post = upnext.http.post
    assert_problem(await post("/api/recommend/", json={}), 422, "validation", "/user_id")
    assert_problem(await post("/api/recommend/", json={"user_id": 1, "k": 1}), 422, "validation", "/k")
    assert_problem(await post("/api/recommend/", json={"user_id": 1, "model": "x"}), 404, "unknown_model")
    assert_problem(await post("/api/recommend", json={"user_id": 1}), 404, "not_found")


@pytest.mark.parametrize(
    ("item_id", "value"),
    [
        ("0", 0), ("42", 42), ("9007199254740991", 2**53 - 1), ("9007199254740992", "9007199254740992"),
        ("042", "042"), ("-1", "-1"), ("1e3", "1e3"), ("1.0", "1.0"), ("a1", "a1"), ("1_0", "1_0"),
        ("9" * 200, "9" * 200),
    ],
)  # fmt: skip
def test_whole_numbers_come_back_as_numbers(item_id: str, value: int | str) -> None:
    assert number(item_id) == value
    assert type(number(item_id)) is type(value)
