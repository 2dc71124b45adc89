"""Recommendations over HTTP, in a cyclic world: i is followed by i + 1."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from service.history import WINDOW, HistoryUnavailable
from shared.events import HistoryPolicy
from shared.retrieval import Mode
from shared.times import DAY, render
from tests.servers import RedisServer
from tests.serving import Running, assert_problem, ids_of, serving
from tests.worlds import BORN, after, cyclic

N = 12


def day(number: float) -> str:
    """Item i was born on day(i)."""
    return render(BORN + int(number * DAY))


@pytest.fixture(params=list(Mode))
async def upnext(request: pytest.FixtureRequest, tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Running]:
    async with serving(tmp_path, redis_server, cyclic(N), retrieval=request.param) as running:
        yield running


@pytest.mark.parametrize("model", ["sasrec", "bert4rec"])
async def test_what_follows_comes_first(upnext: Running, model: str) -> None:
    await upnext.view("u", "3", "7")
    answer = await upnext.ask("u", model=model, n=100)
    assert ids_of(answer) == after(7, N, without=(3, 7))
    assert answer["strategy"] == "sequence"
    assert answer["model"] == {"name": model, "version": "2000-03-01T00-00-00Z-test"}
    assert answer["exclusions"] == {"seen": True}
    assert (answer["requested"], answer["returned"]) == (100, N - 2)
    assert answer["items"][0] == {
        "rank": 1, "item_id": "8", "title": "Item 8", "score": 12.0, "available_from": day(8), "reason": "sequence",
    }  # fmt: skip


async def test_an_event_changes_the_next_answer(upnext: Running) -> None:
    for item in (1, 5, 9, 5):
        await upnext.view("u", str(item))
        assert (await upnext.ids("u", exclude_seen=False))[0] == str(item + 1)
    assert (await upnext.ask("u"))["history_source"] == "cache"


async def test_same_question_same_answer(upnext: Running) -> None:
    await upnext.view("u", "4")
    answers = [await upnext.ask("u", as_of=day(400)) for _ in range(3)]
    for answer in answers:
        assert answer.pop("recommendation_id")
        answer.pop("history_source")  # the first read fills the cache
    # The events lie after as_of, so nothing is known: popular, in the order of counts.
    assert answers[0] == answers[1] == answers[2]
    assert answers[0]["strategy"] == "popular"


async def test_equal_scores_are_in_order_of_index(tmp_path: Path, redis_server: RedisServer) -> None:
    flat = {"sasrec": np.ones((N + 2, N), np.float32)}
    for mode in Mode:
        world = cyclic(N, tables=flat, models=("sasrec",))
        async with serving(tmp_path / mode, redis_server, world, retrieval=mode) as upnext:
            answer = await upnext.bring(["6"], n=100)
        assert ids_of(answer) == [str(i) for i in range(1, N + 1) if i != 6]


async def test_a_user_without_known_items_gets_popular_ones(upnext: Running) -> None:
    answer = await upnext.ask("nobody", n=3)
    assert ids_of(answer) == ["1", "2", "3"]
    assert {(i["score"], i["reason"]) for i in answer["items"]} == {(None, "popular")}
    await upnext.view("u", "unheard-of")
    answer = await upnext.ask("u", exclude=["1", "3"], n=2)
    assert (answer["strategy"], ids_of(answer)) == ("popular", ["2", "4"])


async def test_exclude_is_repeatable_and_takes_unknown_ids(upnext: Running) -> None:
    await upnext.view("u", "1")
    assert await upnext.ids("u", exclude=["2", "4", "unheard-of"], n=3) == ["3", "5", "6"]


async def test_seen_items_come_back_only_on_request(upnext: Running) -> None:
    await upnext.view("u", "1", "2", "3")
    assert await upnext.ids("u", n=100) == after(3, N, without=(1, 2, 3))
    answer = await upnext.ask("u", n=100, exclude_seen=False)
    assert ids_of(answer) == after(3, N)
    assert answer["exclusions"] == {"seen": False}


async def test_as_of_cuts_history_and_catalogue(upnext: Running) -> None:
    for item, at in ((1, 1), (2, 2), (3, 3), (4, 4)):
        await upnext.view("u", str(item), at=day(at + 0.5))
    answer = await upnext.ask("u", as_of=day(2.5), n=100)  # events on the stroke of as_of count
    assert answer["as_of"] == day(2.5)
    assert ids_of(answer) == []  # 1 and 2 exist then, and both are seen
    assert await upnext.ids("u", as_of=day(2.4)) == ["2"]
    assert await upnext.ids("u", as_of=day(6), n=100) == ["5", "6"]
    assert await upnext.ids("u", n=100) == after(4, N, without=(1, 2, 3, 4))


async def test_as_of_last_event(upnext: Running) -> None:
    await upnext.view("u", "1", at=day(1))
    await upnext.view("u", "2", at=day(3.5))
    answer = await upnext.ask("u", as_of="last_event")
    assert (answer["as_of"], ids_of(answer)) == (day(3.5), ["3"])
    assert_problem(
        await upnext.http.get("/recommend/nobody?as_of=last_event"), 422, "validation", "as_of", detail="no event"
    )


async def test_items_of_the_future_do_not_exist_now(tmp_path: Path, redis_server: RedisServer) -> None:
    world = cyclic(N)
    items = tuple(i if i.item_id != "5" else type(i)("5", available_from=BORN + 100 * 366 * DAY) for i in world.items)
    async with serving(tmp_path, redis_server, type(world)(items, models=("sasrec",))) as upnext:
        assert "5" not in await upnext.ids("nobody", n=100)
        assert "5" not in ids_of(await upnext.bring(["4"], n=100, candidates=["5", "6"]))
        assert "5" in await upnext.ids("nobody", n=100, as_of="2150-01-01T00:00:00Z")


async def test_brought_history(upnext: Running) -> None:
    answer = await upnext.bring(["2", "unheard-of", "5"], n=3)
    assert ids_of(answer) == ["6", "7", "8"]
    assert (answer["user_id"], answer["history_source"], answer["strategy"]) == (None, "request", "sequence")
    assert ids_of(await upnext.bring(["2", "5"], exclude_seen=False, n=100)) == after(5, N)
    assert (await upnext.bring([]))["strategy"] == "popular"


async def test_brought_history_with_times(upnext: Running) -> None:
    history = [
        {"item_id": "5", "timestamp": day(9)},
        {"item_id": "2", "timestamp": day(3)},
        {"item_id": "7", "timestamp": day(9)},  # later than 5 by place, at the same time
    ]
    assert ids_of(await upnext.bring(history, n=1)) == ["8"]
    answer = await upnext.bring(history, as_of=day(4), n=100)
    assert ids_of(answer) == ["3", "4", "1"]  # what exists on day 4; 5 and 7 lie after it and do not count
    answer = await upnext.bring(history, as_of="last_event", n=1)
    assert (answer["as_of"], ids_of(answer)) == (day(9), ["8"])
    for unknowable in ([], ["1"]):
        response = await upnext.http.post("/recommend", json={"history": unknowable, "as_of": "last_event"})
        assert_problem(response, 422, "validation", "/as_of")


async def test_candidates_are_ranked_alone(upnext: Running) -> None:
    await upnext.put("9", withdrawn=True)
    named = ["1", "9", "5", "unheard-of", "4", "5", "3"]
    assert ids_of(await upnext.bring(["3"], candidates=named)) == ["4", "5", "1"]
    assert ids_of(await upnext.bring(["3"], candidates=[])) == []
    answer = await upnext.bring([], candidates=named, exclude=["3"])
    assert (answer["strategy"], ids_of(answer)) == ("popular", ["1", "4", "5"])


async def test_nothing_of_a_brought_history_is_stored(upnext: Running) -> None:
    await upnext.bring(["3"])
    assert await upnext.services.catalogue.changes_since(0) == (0, [])
    response = await upnext.http.get("/users/None/history")
    assert response.json()["events"] == []


async def test_collapsed_repeats_are_no_steps(tmp_path: Path, redis_server: RedisServer) -> None:
    world = cyclic(N, policy=HistoryPolicy(collapse_repeats=True))
    async with serving(tmp_path, redis_server, world) as upnext:
        assert ids_of(await upnext.bring(["3", "3", "3"], n=1)) == ["4"]


async def test_default_model_setting(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, redis_server, cyclic(N), default_model="bert4rec") as upnext:
        assert (await upnext.ask("u"))["model"]["name"] == "bert4rec"
    async with serving(tmp_path / "b", redis_server, cyclic(N), default_model="no-such") as upnext:
        assert (await upnext.ask("u"))["model"]["name"] == "sasrec"


async def test_unreadable_history(upnext: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    await upnext.view("u", "1")

    async def down(*_: object) -> None:
        raise HistoryUnavailable("both are down")

    monkeypatch.setattr(upnext.services.histories, "read", down)
    answer = await upnext.ask("u", n=3, exclude=["2"])
    assert (answer["strategy"], answer["history_source"]) == ("degraded", "none")
    assert answer["exclusions"] == {"seen": False}
    assert ids_of(answer) == ["1", "3", "4"]  # 1 is seen, but who could know
    assert_problem(await upnext.http.get("/recommend/u?require_seen=true"), 503, "history_unavailable")
    assert_problem(await upnext.http.get("/recommend/u?as_of=last_event"), 503, "history_unavailable")


async def test_headers(upnext: Running) -> None:
    await upnext.view("u", "1")
    response = await upnext.http.get("/recommend/u", headers={"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.headers["x-model-version"] == "2000-03-01T00-00-00Z-test"
    assert response.headers["cache-control"] == "private, no-store"
    stages = [part.split(";")[0] for part in response.headers["server-timing"].split(", ")]
    assert stages == ["read", "encode", "retrieve", "exclude", "rank", "total"]
    path = "hnsw_exact" if upnext.settings.retrieval is Mode.HNSW else "exact"
    assert f'desc="{path}"' in response.headers["server-timing"]
    odd = await upnext.http.get("/recommend/u", headers={"X-Request-Id": "a b\x7f"})
    assert len(odd.headers["x-request-id"]) == 36


async def test_known_items_behind_a_window_of_unknown_ones_count(upnext: Running) -> None:
    await upnext.view("u", "1", "2", at="2000-02-01T00:00:00Z")
    for start in range(0, WINDOW, 100):
        await upnext.view("u", *(f"unknown-{n}" for n in range(start, min(start + 100, WINDOW))))
    for _ in range(2):  # from the log, then from the cache
        answer = await upnext.ask("u", n=1)
        assert (answer["strategy"], answer["items"][0]["item_id"]) == ("sequence", "3")


async def test_a_model_with_a_clock_is_told_when_things_happened(tmp_path: Path, redis_server: RedisServer) -> None:
    """In this world who has been away for more than an hour has moved on by one."""
    async with serving(tmp_path, redis_server, cyclic(N, clock="query")) as upnext:
        await upnext.view("u", "unknown", "3", "unknown", at=day(400))
        for model in ("sasrec", "bert4rec"):
            for at, first in ((day(400.01), "4"), (day(400.5), "5"), ("last_event", "4")):
                assert (await upnext.ids("u", model=model, as_of=at))[0] == first
                batch = await upnext.http.post("/recommend/batch", json={"users": ["u"], "model": model, "as_of": at})
                assert batch.json()["results"][0]["items"][0]["item_id"] == first
            timed = [{"item_id": "3", "timestamp": day(400)}]
            assert ids_of(await upnext.bring(timed, model=model, as_of=day(400.01)))[0] == "4"
            assert ids_of(await upnext.bring(timed, model=model))[0] == "5"
            # Nobody said when: it has just happened, whatever the time that is asked about.
            assert ids_of(await upnext.bring(["3"], model=model, as_of=day(400.5)))[0] == "4"
