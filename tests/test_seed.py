"""Loading a source into the service's log: once, whatever happens, and so that it can be trained on again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from service.history import HistoryStore
from service.ingest import EventLog, NewEvent
from shared.database import catalogue_revision, create_engine, events, items
from shared.events import HistoryPolicy, item_keys
from tests.trained import START, Row, TypedRow, raw
from trainer import seed
from trainer.seed import seed_log
from trainer.sources import RawData, UnavailableError

EVENTS: list[Row | TypedRow] = [
    ("u", "a", START),
    ("v", "b", START + 5, "rating", 4.5),
    ("u", "b", START),
    ("u", "a", START + 1),
]
ITEMS: list[dict[str, Any]] = [
    {"item_id": "a", "title": "A", "categories": ["genre:x"], "available_from": START},
    {"item_id": "b", "withdrawn": True},
]


def source(has_times: bool = True) -> RawData:
    return raw(EVENTS, ITEMS, has_times=has_times)


async def load(engine: AsyncEngine, data: RawData) -> int:
    return await seed_log(data, engine.url.render_as_string(hide_password=False), lambda _: None)


async def rows(engine: AsyncEngine, query: Any) -> list[tuple[Any, ...]]:
    async with engine.connect() as connection:
        return [tuple(row) for row in await connection.execute(query)]


LOG = select(events.c.user_id, events.c.item_id, events.c.event_type, events.c.value, events.c.timestamp).order_by(
    events.c.seq
)


async def test_events_come_in_the_order_of_arrival(engine: AsyncEngine) -> None:
    assert await load(engine, source()) == len(EVENTS)
    assert await rows(engine, LOG) == [
        ("u", "a", "view", None, START),
        ("v", "b", "rating", 4.5, START + 5),
        ("u", "b", "view", None, START),
        ("u", "a", "view", None, START + 1),
    ]


async def test_a_second_load_stores_nothing_twice(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seed, "CHUNK", 3)
    await load(engine, source())
    first = await rows(engine, LOG)
    assert await load(engine, source()) == 0
    assert await rows(engine, LOG) == first
    longer = raw([*EVENTS, ("w", "a", START)], ITEMS)
    assert await load(engine, longer) == 1


async def test_items_that_the_catalogue_has_keep_what_it_says(engine: AsyncEngine) -> None:
    kept = {"item_id": "a", "title": "kept", "withdrawn": False, "revision": 0}
    async with engine.begin() as connection:
        await connection.execute(items.insert(), [kept])
    await load(engine, source())
    found = await rows(engine, select(items.c.item_id, items.c.title, items.c.withdrawn).order_by(items.c.item_id))
    assert found == [("a", "kept", False), ("b", None, True)]


async def test_a_later_load_brings_loaded_items_up_to_date(engine: AsyncEngine) -> None:
    await load(engine, source())
    await load(engine, raw(EVENTS, [{"item_id": "a", "title": "A2", "withdrawn": True}]))
    found = await rows(engine, select(items.c.item_id, items.c.title, items.c.withdrawn, items.c.loaded))
    assert sorted(found) == [("a", "A2", True, True), ("b", None, True, True)]


async def test_what_a_later_load_says_again_is_no_change(engine: AsyncEngine) -> None:
    several = [*ITEMS, {"item_id": "c", "title": "C", "categories": ["genre:x", "genre:y"]}]
    await load(engine, raw(EVENTS, several))
    first = dict(await rows(engine, select(items.c.item_id, items.c.revision)))
    several[2] = {**several[2], "categories": ["genre:y"]}
    await load(engine, raw(EVENTS, several))
    second = dict(await rows(engine, select(items.c.item_id, items.c.revision)))
    assert {name for name, revision in second.items() if revision > first[name]} == {"c"}


async def test_ids_come_from_content_so_that_another_export_of_the_table_adds_what_is_new(engine: AsyncEngine) -> None:
    assert await load(engine, raw([*EVENTS, EVENTS[0]])) == len(EVENTS) + 1, "equal events are events of their own"
    assert await load(engine, raw([*EVENTS[1:], EVENTS[0], ("w", "a", START)])) == 1
    assert await load(engine, raw([("x", "a", START)])) == 1, "another file of the same name"


async def test_a_running_service_reads_loaded_users_anew(
    engine: AsyncEngine, histories: HistoryStore, event_log: EventLog
) -> None:
    await event_log.append([NewEvent(None, "u", "z", "view", timestamp=START - 1)], HistoryPolicy(), START)
    await histories.read("u", HistoryPolicy())
    assert (await histories.read("u", HistoryPolicy())).source == "cache"
    await load(engine, source())
    assert await event_log.settle() == 2  # u and v
    found = await histories.read("u", HistoryPolicy())
    assert found.items.tolist() == item_keys(["z", "a", "b", "a"]).tolist()


async def test_a_follower_of_the_catalogue_sees_the_load(engine: AsyncEngine) -> None:
    before = (await rows(engine, select(catalogue_revision.c.revision)))[0][0]
    await load(engine, source())
    after = (await rows(engine, select(catalogue_revision.c.revision)))[0][0]
    assert after > before
    assert {r for (r,) in await rows(engine, select(items.c.revision))} == {after}
    found = await rows(engine, select(items.c.categories, items.c.available_from).where(items.c.item_id == "a"))
    assert found == [(["genre:x"], START)]


async def test_without_times_the_place_in_the_file_is_the_time(sqlite_engine: AsyncEngine) -> None:
    await load(sqlite_engine, source(has_times=False))
    assert [row[-1] for row in await rows(sqlite_engine, LOG)] == [0, 1, 2, 3]


async def test_a_new_database_is_made(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new' / 'log.db'}"
    assert await seed_log(source(), url, lambda _: None) == len(EVENTS)
    engine = create_engine(url)
    assert len(await rows(engine, LOG)) == len(EVENTS)
    await engine.dispose()


@pytest.mark.parametrize("url", ["nonsense", "postgresql://me:s3cret@127.0.0.1:1/upnext"])
async def test_a_log_that_cannot_be_written_is_said_without_the_password(url: str) -> None:
    with pytest.raises(UnavailableError) as caught:
        await seed_log(source(), url, lambda _: None)
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)
