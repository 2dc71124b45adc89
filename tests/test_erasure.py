"""Erasing a user: everything goes, once and for all, whatever happens beside it and whoever brings it back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from alembic import command
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.__main__ import main as service_main
from service.erasure import Eraser, ErasureUnavailable
from service.history import HistoryStore, create_redis
from service.ingest import LAST_DROP, OVERDUE, EventLog, EventsErased, NewEvent
from shared import times
from shared.database import (
    _alembic,
    cache_outbox,
    check_schema,
    create_engine,
    erased_events,
    erasure_key,
    erasures,
    events,
    migrate,
)
from shared.erasure import Tombstones, TombstonesError, pseudonym
from shared.events import HistoryPolicy, item_keys
from tests.servers import RedisServer
from tests.serving import assert_problem, json_of, serving
from tests.trained import raw
from tests.worlds import cyclic
from trainer import seed
from trainer.seed import seed_log
from trainer.sources import SOURCES, InvalidSourceError, RawData, load_source, parse_source
from trainer.sources.erased import OF_ERASED_USERS

POLICY = HistoryPolicy(sequence_types=("view",), seen_types=("view",))
PAST = times.now() - times.DAY


def event(item: str, user: str = "u", event_id: str | None = None, timestamp: int | None = PAST) -> NewEvent:
    return NewEvent(event_id, user, item, "view", timestamp=timestamp)


async def tell(log: EventLog, *sent: NewEvent) -> list[str]:
    return [one.status for one in await log.append(sent, POLICY, times.now())]


async def count(engine: AsyncEngine, table: Any) -> int:
    async with engine.connect() as connection:
        found: int = (await connection.execute(select(func.count()).select_from(table))).scalar_one()
    return found


async def cached(histories: HistoryStore, user: str = "u") -> tuple[str, list[int]]:
    found = await histories.read(user, POLICY)
    return found.source, [int(key) for key in found.items]


async def sweep(log: EventLog, after: int = OVERDUE) -> int:
    """What any worker does some seconds later."""
    async with log.engine.begin() as connection:
        await connection.execute(update(cache_outbox).values(written=cache_outbox.c.written - after))
    return await log.settle()


@pytest.fixture
def eraser(engine: AsyncEngine, histories: HistoryStore) -> Eraser:
    return Eraser(engine, histories)


# --- what goes, and what stays ------------------------------------------------------------------------


async def test_events_and_cache_go_and_others_stay(
    event_log: EventLog, histories: HistoryStore, eraser: Eraser, engine: AsyncEngine
) -> None:
    await tell(event_log, event("a"), event("b"), event("c", "other"))
    assert [(await cached(histories))[0] for _ in range(2)] == ["log", "cache"]
    before = times.now()
    done = await eraser.erase("u")
    assert done.events == 2
    assert before <= done.erased_at <= times.now()
    assert await cached(histories) == ("log", [])
    assert await event_log.history("u", 10) == []
    assert [e.item_id for e in await event_log.history("other", 10)] == ["c"]
    async with engine.connect() as connection:
        users = (await connection.execute(select(cache_outbox.c.user_id, cache_outbox.c.seq))).all()
    assert [(user, seq < 0) for user, seq in users if user == "u"] == [("u", True), ("u", True)]
    assert await sweep(event_log) >= 1
    assert await sweep(event_log, LAST_DROP) >= 1
    async with engine.connect() as connection:
        tables = {
            t: (await connection.execute(select(t))).all() for t in (events, cache_outbox, erasures, erased_events)
        }
    assert not any(value == "u" for rows in tables.values() for row in rows for value in row)


async def test_again_is_fine_and_nobody_is_fine(event_log: EventLog, eraser: Eraser, engine: AsyncEngine) -> None:
    await tell(event_log, event("a"))
    first, second = await eraser.erase("u"), await eraser.erase("u")
    assert (first.events, second.events) == (1, 0)
    assert second.erased_at >= first.erased_at
    assert (await eraser.erase("nobody")).events == 0
    assert await count(engine, erasures) == 2
    both = await asyncio.gather(eraser.erase("u"), eraser.erase("u"))
    assert [one.events for one in both] == [0, 0]


async def test_the_later_time_stays(eraser: Eraser, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    late = (await eraser.erase("u")).erased_at
    monkeypatch.setattr(times, "now", lambda: late - times.DAY)  # a machine whose clock is wrong
    await eraser.erase("u")
    async with engine.connect() as connection:
        assert (await connection.execute(select(erasures.c.erased_at))).scalars().all() == [late]


# --- what is refused ----------------------------------------------------------------------------------


async def test_older_events_are_refused_and_newer_ones_taken(event_log: EventLog, eraser: Eraser) -> None:
    await tell(event_log, event("a", event_id="1"))
    at = (await eraser.erase("u")).erased_at
    for old in (event("a", event_id="1"), event("a"), event("b", timestamp=at), event("b", timestamp=1)):
        with pytest.raises(EventsErased) as refused:
            await tell(event_log, event("x", "other"), old)
        assert refused.value.positions == {1: at}
    assert await event_log.history("u", 10) == await event_log.history("other", 10) == []
    assert await tell(event_log, event("new", timestamp=at + 1), event("x", "other")) == ["accepted"] * 2
    assert [e.item_id for e in await event_log.history("u", 10)] == ["new"]


async def test_a_retry_without_a_time_is_known(event_log: EventLog, eraser: Eraser, engine: AsyncEngine) -> None:
    """Sent without a time its retry would be an event of now; without an id it is one, by contract."""
    await tell(event_log, event("a", event_id="1", timestamp=None), event("b", event_id="old"))
    await eraser.erase("u")
    with pytest.raises(EventsErased):
        await tell(event_log, event("a", event_id="1", timestamp=None))
    assert await tell(event_log, event("a", "other", event_id="1", timestamp=None)) == ["accepted"]
    assert await tell(event_log, event("a", event_id="2", timestamp=None)) == ["accepted"]
    async with engine.begin() as connection:
        await connection.execute(update(erased_events).values(erased_at=erased_events.c.erased_at - 2 * times.DAY))
    await eraser.erase("somebody")
    assert await count(engine, erased_events) == 0


async def test_events_from_a_clock_that_is_ahead(event_log: EventLog, eraser: Eraser) -> None:
    ahead = times.now() + 4 * times.SECOND
    await tell(event_log, event("a", event_id="1", timestamp=ahead))
    assert (await eraser.erase("u")).erased_at == ahead
    with pytest.raises(EventsErased):
        await tell(event_log, event("a", event_id="1", timestamp=ahead))


# --- beside others ------------------------------------------------------------------------------------


class Pause:
    """Stops a coroutine function at its call, until told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, of: object, name: str, *, after: bool = False) -> None:
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()
        original: Callable[..., Any] = getattr(of, name)

        async def paused(*arguments: Any, **fields: Any) -> Any:
            if after:
                result = await original(*arguments, **fields)
            self.reached.set()
            await self.go_on.wait()
            return result if after else await original(*arguments, **fields)

        monkeypatch.setattr(of, name, paused)


async def finished(task: asyncio.Task[Any], seconds: float = 0.3) -> bool:
    await asyncio.wait([task], timeout=seconds)
    return task.done()


async def insert_open(connection: AsyncConnection, item: str) -> None:
    row = {"event_id": item, "user_id": "u", "item_id": item, "event_type": "view", "timestamp": PAST, "digest": "0"}
    await connection.execute(events.insert(), [row])


async def test_an_event_that_is_being_written_is_waited_for(
    event_log: EventLog, eraser: Eraser, engine: AsyncEngine
) -> None:
    async with engine.begin() as connection:
        await insert_open(connection, "a")
        erasing = asyncio.create_task(eraser.erase("u"))
        assert not await finished(erasing)
    assert (await erasing).events == 1
    assert await event_log.history("u", 10) == []


async def test_an_event_that_comes_meanwhile_waits_and_is_refused(
    event_log: EventLog, eraser: Eraser, monkeypatch: pytest.MonkeyPatch
) -> None:
    await tell(event_log, event("a"))
    pause = Pause(monkeypatch, eraser, "_keep_later")
    erasing = asyncio.create_task(eraser.erase("u"))
    await pause.reached.wait()
    telling = asyncio.create_task(tell(event_log, event("b")))
    other = asyncio.create_task(tell(event_log, event("c", "other")))
    assert not await finished(telling)
    pause.go_on.set()
    await erasing
    with pytest.raises(EventsErased):
        await telling
    assert await other == ["accepted"]
    assert await event_log.history("u", 10) == []


async def test_writers_are_not_held_up_for_long(postgresql: Any, redis_server: RedisServer) -> None:
    """A transaction that stays open, a load of many events say, must not stop everybody behind an erasure."""
    engine = create_engine(await postgresql.new_database())
    await migrate(engine)
    redis = create_redis(redis_server.url)
    eraser = Eraser(engine, HistoryStore(redis, engine))
    async with engine.begin() as connection:
        await insert_open(connection, "a")
        with pytest.raises(ErasureUnavailable):
            await eraser.erase("u")
    await eraser.erase("u")
    await redis.aclose()
    await engine.dispose()


@pytest.mark.parametrize("drop_reaches_redis", [True, False])
async def test_a_rebuild_beside_it_brings_nothing_back(
    event_log: EventLog, histories: HistoryStore, eraser: Eraser, monkeypatch: pytest.MonkeyPatch,
    drop_reaches_redis: bool,
) -> None:  # fmt: skip
    await tell(event_log, event("a"))
    await histories.drop(["u"])
    pause = Pause(monkeypatch, histories, "_logged", after=True)
    reading = asyncio.create_task(cached(histories))
    await pause.reached.wait()  # it has read the events that go now
    monkeypatch.undo()
    if not drop_reaches_redis:

        async def nothing(_: object) -> bool:
            return False

        monkeypatch.setattr(eraser.histories, "drop", nothing)
    await eraser.erase("u")
    monkeypatch.undo()
    pause.go_on.set()
    await reading  # began before the erasure, and may say so
    if not drop_reaches_redis:
        assert await cached(histories) == ("cache", list(item_keys(["a"])))
        assert await sweep(event_log) >= 1
    assert await cached(histories) == ("log", [])
    assert await cached(histories) == ("cache", [])


async def test_a_late_step_to_the_cache_is_taken_back(
    event_log: EventLog, histories: HistoryStore, eraser: Eraser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker that committed the event was slow; meanwhile the user was erased and read again."""
    pause = Pause(monkeypatch, histories, "appended")
    telling = asyncio.create_task(tell(event_log, event("a")))
    await pause.reached.wait()
    await eraser.erase("u")
    assert await cached(histories) == ("log", [])
    pause.go_on.set()
    assert await telling == ["accepted"]
    await event_log.flush()
    assert (await cached(histories))[1] == list(item_keys(["a"]))  # for the seconds up to the sweep
    assert await sweep(event_log) == 1
    assert await cached(histories) == ("log", [])


@pytest.mark.parametrize("stood_still", [True, False], ids=["and sees that it is late", "and does not see it"])
async def test_a_step_to_the_cache_that_comes_after_the_sweep_is_taken_back_too(
    event_log: EventLog, histories: HistoryStore, eraser: Eraser, monkeypatch: pytest.MonkeyPatch, stood_still: bool
) -> None:
    """The worker stood still between commit and cache, and the entry was made anew meanwhile."""
    if stood_still:
        monkeypatch.setattr("service.ingest.FRESH", -1.0)
    pause = Pause(monkeypatch, histories, "appended")
    telling = asyncio.create_task(tell(event_log, event("a")))
    await pause.reached.wait()
    await eraser.erase("u")
    assert await sweep(event_log) >= 1
    assert await cached(histories) == ("log", [])
    pause.go_on.set()
    assert await telling == ["accepted"]
    await event_log.flush()
    if not stood_still:
        assert await cached(histories) == ("cache", list(item_keys(["a"])))  # for the seconds up to the last drop
        assert await sweep(event_log, LAST_DROP) == 1
    assert await cached(histories) == ("log", [])


async def test_redis_away_then_back(engine: AsyncEngine, redis_of_test: RedisServer, event_log: EventLog) -> None:
    redis = create_redis(redis_of_test.url)
    histories = HistoryStore(redis, engine)
    log, eraser = EventLog(engine, histories), Eraser(engine, histories)
    await tell(log, event("a"))
    await cached(histories)
    redis_of_test.freeze()
    assert (await eraser.erase("u")).events == 1
    redis_of_test.thaw()
    other = HistoryStore(create_redis(redis_of_test.url, timeout=5), engine)
    assert await sweep(EventLog(engine, other)) >= 1
    assert await cached(other) == ("log", [])
    await redis.aclose()
    await other.redis.aclose()


async def test_the_database_away(sqlite_engine: AsyncEngine, redis: Redis) -> None:
    locked = create_engine(sqlite_engine.url.render_as_string())
    async with locked.connect() as impatient:  # the pool hands the same connection out again
        await impatient.exec_driver_sql("PRAGMA busy_timeout = 1")
    async with sqlite_engine.begin() as connection:
        await insert_open(connection, "a")
        with pytest.raises(ErasureUnavailable):
            await Eraser(locked, HistoryStore(redis, locked)).erase("u")
    await locked.dispose()


# --- over HTTP ----------------------------------------------------------------------------------------


async def test_over_http(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, redis_server, cyclic()) as upnext:
        await upnext.view("u", "3", at="2026-01-01T00:00:00Z")
        assert await upnext.ids("u", n=1) == ["4"]
        erased = json_of(await upnext.http.delete("/users/u"))
        assert erased["events"] == 1
        assert erased["erased_at"].startswith("20")
        assert (await upnext.ask("u"))["strategy"] == "popular"
        assert json_of(await upnext.http.get("/users/u/history"))["events"] == []
        old = {"user_id": "u", "item_id": "3", "event_type": "view", "timestamp": "2026-01-01T00:00:00Z"}
        response = await upnext.http.post("/events", json=old)
        assert_problem(response, 409, "erased", "", detail="erased")
        response = await upnext.http.post("/events", json={"events": [old | {"user_id": "v"}, old]})
        body = assert_problem(response, 409, "erased", "/events/1")
        assert erased["erased_at"] in body["errors"][0]["detail"]
        await upnext.view("u", "5")
        assert await upnext.ids("u", n=1) == ["6"]
        assert json_of(await upnext.http.delete("/users/u"))["events"] == 1
        assert "upnext_erasures_total 2.0" in (await upnext.http.get("/metrics")).text
        assert_problem(await upnext.http.delete("/users/a%20b"), 422, "validation", "user_id")


# --- schema 0001 --------------------------------------------------------------------------------------


async def downgrade(url: str) -> None:
    engine = create_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(lambda c: command.downgrade(_alembic(c), "0001"))
    await engine.dispose()


async def test_at_the_schema_before_all_works_but_erasure(database_url: str, tmp_path: Path, redis_server: RedisServer,
                                                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    engine = create_engine(database_url)
    await migrate(engine, "0001")
    await check_schema(engine)
    async with serving(tmp_path, redis_server, cyclic(), database_url=database_url) as upnext:
        await upnext.view("u", "3")
        assert await upnext.ids("u", n=1) == ["4"]
        await upnext.put("9", title="Nine")
        assert upnext.services.live.catalogue_failure is None
        response = await upnext.http.delete("/users/u")
        assert_problem(response, 503, "schema_behind", detail="python -m service migrate")
        assert json_of(await upnext.http.get("/users/u/history"))["events"]
        await migrate(engine)  # beside the running worker
        assert json_of(await upnext.http.delete("/users/u"))["events"] == 1
        old = {"user_id": "u", "item_id": "3", "event_type": "view", "timestamp": "2026-01-01T00:00:00Z"}
        assert_problem(await upnext.http.post("/events", json=old), 409, "erased", "")
    await engine.dispose()


async def test_the_migration_keeps_what_is_there(database_url: str) -> None:
    engine = create_engine(database_url)
    await migrate(engine, "0001")
    async with engine.begin() as connection:
        await insert_open(connection, "a")
        before = (await connection.execute(select(events))).all()
    await migrate(engine)
    async with engine.connect() as connection:
        assert (await connection.execute(select(events))).all() == before
        (key,) = (await connection.execute(select(erasure_key.c.key))).scalars().all()
        assert len(bytes.fromhex(key)) == 32
    await downgrade(database_url)
    async with engine.connect() as connection:
        assert (await connection.execute(select(events))).all() == before
    await engine.dispose()


async def test_each_database_has_a_key_of_its_own(tmp_path: Path) -> None:
    keys = set()
    for name in ("a", "b"):
        engine = create_engine(f"sqlite:///{tmp_path / name}")
        await migrate(engine)
        async with engine.connect() as connection:
            keys.add((await connection.execute(select(erasure_key.c.key))).scalar_one())
        await engine.dispose()
    assert len(keys) == 2


# --- tombstones in the trainer ------------------------------------------------------------------------


KEY = bytes(range(32))


def tombstones(**erased: int) -> Tombstones:
    return Tombstones(KEY, {pseudonym(KEY, user): at for user, at in erased.items()})


def test_a_tombstone_names_nobody() -> None:
    text = tombstones(alice=PAST).to_json()
    assert "alice" not in text
    assert pseudonym(KEY, "alice") != pseudonym(bytes(32), "alice")
    assert len({pseudonym(KEY, user, event) for user in ("a", "ab") for event in ("", "b", "c")}) == 6


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, 2**52)))
def test_tombstones_survive_a_file(tmp_path_factory: pytest.TempPathFactory, erased: dict[str, int]) -> None:
    file = tmp_path_factory.mktemp("t") / "tombstones.json"
    written = tombstones(**erased)
    file.write_text(written.to_json())
    assert Tombstones.of_file(file) == written


@given(st.one_of(st.text(), st.binary().map(lambda b: b.decode("latin-1")), st.recursive(
    st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from(["format", "key", "erased", "x"]), inner)).map(json.dumps)))  # fmt: skip
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.mktemp("t") / "tombstones.json"
    file.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(TombstonesError):
        Tombstones.of_file(file)
    with pytest.raises(TombstonesError):
        Tombstones.of_file(file.parent)


def test_of_two_times_the_later() -> None:
    merged = tombstones(a=1, b=5).merged(tombstones(a=2, b=4, c=3))
    assert merged == tombstones(a=2, b=5, c=3)
    assert Tombstones(bytes(32)).merged(tombstones(a=1)) == tombstones(a=1)
    with pytest.raises(TombstonesError, match="keys differ"):
        merged.merged(Tombstones(bytes(32), {"0" * 64: 1}))


SECOND = times.SECOND
T = 1_700_000_000 * SECOND


def write_files(folder: Path, *, has_times: bool) -> Mapping[str, Mapping[str, object]]:
    """The same events in each layout of files: u at T and T + 10 s, v at T."""
    when = [T // SECOND, T // SECOND + 10, T // SECOND]
    rows = {"user": ["u", "u", "v"], "item": ["1", "2", "1"], "time": when}
    frame = pl.DataFrame(rows if has_times else {k: rows[k] for k in ("user", "item")})
    columns = {"user": "user", "item": "item"} | ({"time": "time"} if has_times else {})
    frame.write_csv(folder / "events.csv")
    frame.write_parquet(folder / "events.parquet")
    frame.write_csv(folder / "train_ratings.csv")
    pl.DataFrame({"userId": rows["user"], "movieId": rows["item"], "rating": [4, 4, 4], "timestamp": when}).write_csv(
        folder / "ratings.csv"
    )
    (folder / "movies.csv").write_text("movieId,title,genres\n1,A,x\n2,B,y\n")
    found: dict[str, Mapping[str, object]] = {
        "csv": {"kind": "files", "events": folder / "events.csv", "columns": columns},
        "parquet": {"kind": "files", "events": folder / "events.parquet", "columns": columns},
        "folder": {"kind": "folder", "path": folder},
    }
    return found | ({"movielens": {"kind": "movielens", "path": folder}} if has_times else {})


@pytest.mark.parametrize("has_times", [True, False])
def test_every_layout_of_files_leaves_erased_events_out(tmp_path: Path, has_times: bool) -> None:
    (tmp_path / "t.json").write_text(tombstones(u=T, w=T).to_json())
    for name, entries in write_files(tmp_path, has_times=has_times).items():
        source = load_source(parse_source({**entries, "tombstones": tmp_path / "t.json"}))
        kept = source.events.select("user_id", "item_id").rows()
        assert kept == ([("u", "2"), ("v", "1")] if has_times else [("v", "1")]), name
        assert source.report.events.left_out[OF_ERASED_USERS] == 3 - len(kept)
        assert source.report.events.rows_kept == len(kept)
        assert load_source(parse_source(entries)).events.height == 3


def test_every_kind_of_source_takes_tombstones() -> None:
    for kind in SOURCES:
        entries: dict[str, Any] = {"kind": kind, "url": "sqlite:///x"} if kind == "sql" else {"kind": kind, "path": "x"}
        if kind in ("files", "ml-100k"):
            entries = {"kind": kind, "events": "x", "columns": {"user": "u", "item": "i"}} if kind == "files" else {
                "kind": kind}  # fmt: skip
        assert parse_source({**entries, "tombstones": "t.json"}).tombstones == Path("t.json")


def test_unusable_tombstones_stop_the_run(tmp_path: Path) -> None:
    entries = write_files(tmp_path, has_times=True)["csv"]
    with pytest.raises(InvalidSourceError, match="tombstones"):
        load_source(parse_source({**entries, "tombstones": tmp_path / "none.json"}))


async def test_the_log_is_read_without_them(engine: AsyncEngine, event_log: EventLog, eraser: Eraser) -> None:
    """As after a restore by other means than ours: the events are back, the tombstone is there."""
    await tell(event_log, event("a"), event("b", "other"))
    at = (await eraser.erase("u")).erased_at
    async with engine.begin() as connection:
        await insert_open(connection, "a")
    await tell(event_log, event("new", timestamp=at + 1))
    url = engine.url.set(drivername=engine.url.drivername.split("+")[0]).render_as_string(hide_password=False)
    source = parse_source({"kind": "sql", "url": url})
    found = await asyncio.to_thread(load_source, source)
    assert found.events.select("user_id", "item_id").rows() == [("other", "b"), ("u", "new")]
    assert found.report.events.left_out == {OF_ERASED_USERS: 1}


async def load(engine: AsyncEngine, data: RawData) -> int:
    return await seed_log(data, engine.url.render_as_string(hide_password=False), lambda _: None)


@pytest.mark.parametrize("has_times", [True, False])
async def test_a_load_brings_nothing_back(engine: AsyncEngine, eraser: Eraser, has_times: bool) -> None:
    await eraser.erase("u")
    assert await load(engine, raw([("u", "a", PAST), ("v", "a", PAST)], has_times=has_times)) == 1
    async with engine.connect() as connection:
        assert (await connection.execute(select(events.c.user_id))).scalars().all() == ["v"]


async def test_who_is_erased_during_a_load_is_left_out(
    engine: AsyncEngine, eraser: Eraser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Erased after the load has looked at the tombstones, and before it writes."""
    original = seed._seed_events

    async def later(*arguments: Any) -> int:
        await eraser.erase("u")
        return await original(*arguments)

    monkeypatch.setattr(seed, "_seed_events", later)
    monkeypatch.setattr(seed, "CHUNK", 1)
    await load(engine, raw([("u", "a", PAST), ("u", "b", PAST), ("v", "a", PAST)]))
    async with engine.connect() as connection:
        assert (await connection.execute(select(events.c.user_id))).scalars().all() == ["v"]


async def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                           redis_server: RedisServer) -> None:  # fmt: skip
    async with serving(tmp_path, redis_server, cyclic()) as upnext:
        await upnext.http.delete("/users/u")
        url = upnext.settings.database_url
    monkeypatch.setenv("UPNEXT_DATABASE_URL", url)
    assert await asyncio.to_thread(service_main, ["tombstones"]) == 0
    (tmp_path / "t.json").write_text(capsys.readouterr().out)
    found = Tombstones.of_file(tmp_path / "t.json")
    assert found.erased_at("u") is not None
    assert found.erased_at("v") is None
    await downgrade(url)
    assert await asyncio.to_thread(service_main, ["tombstones"]) == 1
    assert "python -m service migrate" in capsys.readouterr().err
