"""Histories from Redis and from the log: always what `history_of` makes of the committed events."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from service.history import READERS, WINDOW, HistoryStore, HistoryUnavailable, StoredEvent, UserHistory, create_redis
from service.ingest import EventLog, NewEvent
from service.redis_line import Command, RedisDown, RedisLine
from shared.database import create_engine
from shared.database import events as events_table
from shared.events import Events, HistoryPolicy, history_of, item_key, item_keys
from tests.servers import RedisServer

POLICY = HistoryPolicy(sequence_types=("view", "rating"), seen_types=("view", "skip"), minimum_value=3.0)
NOW = 1_700_000_000_000_000


def event(item_id: str, timestamp: int | None = None, user_id: str = "u", **fields: Any) -> NewEvent:
    return NewEvent(fields.pop("event_id", None), user_id, item_id, fields.pop("event_type", "view"),
                    timestamp=timestamp, **fields)  # fmt: skip


def keys(*item_ids: str) -> list[int]:
    return list(item_keys(item_ids))


async def stored(engine: AsyncEngine, user_id: str = "u") -> list[StoredEvent]:
    """The user's events as the log has them, in order of arrival."""
    columns = [events_table.c[name] for name in StoredEvent.__dataclass_fields__]
    query = select(*columns).where(events_table.c.user_id == user_id).order_by(events_table.c.seq)
    async with engine.connect() as connection:
        return [StoredEvent(*row) for row in (await connection.execute(query)).all()]


def expected(rows: list[StoredEvent], policy: HistoryPolicy, as_of: int | None = None) -> dict[str, Any]:
    """The oracle: `history_of` over the whole log, written apart from the code under test."""
    rows = [r for r in rows if as_of is None or r.timestamp <= as_of]
    kinds = tuple(sorted({r.event_type for r in rows}))
    history = history_of(
        Events(
            user=np.zeros(len(rows), np.int64),
            item=item_keys([r.item_id for r in rows]),
            kind=np.array([kinds.index(r.event_type) for r in rows], np.int64),
            kinds=kinds,
            value=np.array([np.nan if r.value is None else r.value for r in rows], np.float64),
            timestamp=np.array([r.timestamp for r in rows], np.int64),
        ),
        policy,
    )
    return {
        "items": [int(k) for k in history.item[history.feeds]],
        "timestamps": [int(t) for t in history.timestamp[history.feeds]],
        "seen": {int(k) for k in history.item[history.seen]},
        "newest": max((r.timestamp for r in rows if policy.names(r.event_type)), default=None),
    }


def assert_equal(history: UserHistory, wanted: dict[str, Any], window: int = WINDOW) -> None:
    assert [int(k) for k in history.items] == wanted["items"][-window:]
    assert [int(t) for t in history.timestamps] == wanted["timestamps"][-window:]
    assert {int(k) for k in history.seen} == wanted["seen"]
    assert len(history.seen) == len(wanted["seen"])
    assert history.newest == wanted["newest"]


@asynccontextmanager
async def store_on(
    url: str, engine: AsyncEngine, *, patience: float = 5, **options: Any
) -> AsyncIterator[HistoryStore]:
    client = create_redis(url, timeout=patience)
    try:
        yield HistoryStore(client, engine, **options)
    finally:
        await client.aclose()


def test_whoever_waits_longer_for_an_answer_waits_as_long_for_a_connection() -> None:
    for patience, wanted in ((0.05, 0.25), (5, 5)):
        found = create_redis("redis://localhost", timeout=patience).connection_pool.connection_kwargs
        assert (found["socket_timeout"], found["socket_connect_timeout"]) == (patience, wanted)


# --- reads and appends --------------------------------------------------------------------------------


async def test_a_committed_event_is_in_the_next_read(event_log: EventLog, histories: HistoryStore) -> None:
    await event_log.append([event("a")], POLICY, NOW)
    first = await histories.read("u", POLICY)
    assert (list(first.items), first.source, first.newest) == (keys("a"), "log", NOW)
    await event_log.append([event("b")], POLICY, NOW + 1)
    second = await histories.read("u", POLICY)
    assert (list(second.items), second.source, second.newest) == (keys("a", "b"), "cache", NOW + 1)
    assert list(second.timestamps) == [NOW, NOW + 1]
    assert second.items.dtype == second.seen.dtype == np.uint64
    assert second.timestamps.dtype == np.int64


async def test_order_is_time_then_arrival_and_late_events_find_their_place(
    event_log: EventLog, histories: HistoryStore
) -> None:
    await event_log.append([event("a", 10), event("b", 20)], POLICY, NOW)
    await histories.read("u", POLICY)
    await event_log.append([event("c", 20), event("d", 5), event("e", 10)], POLICY, NOW)
    history = await histories.read("u", POLICY)
    assert (list(history.items), history.source) == (keys("d", "a", "e", "b", "c"), "cache")
    assert list(history.timestamps) == [5, 10, 10, 20, 20]


async def test_times_before_1970_and_far_in_the_future(event_log: EventLog, histories: HistoryStore) -> None:
    await event_log.append([event("a", 0)], POLICY, NOW)
    await histories.read("u", POLICY)
    times = [-62_135_596_800_000_000, -1, 4_102_444_800_000_000]
    await event_log.append([event(f"i{t}", t) for t in times], POLICY, NOW)
    history = await histories.read("u", POLICY)
    assert (list(history.timestamps), history.source) == (sorted([*times, 0]), "cache")


async def test_the_policy_decides_what_an_event_does(
    event_log: EventLog, histories: HistoryStore, engine: AsyncEngine
) -> None:
    await histories.read("u", POLICY)
    batch = [
        event("a", 1), event("b", 2, event_type="skip"), event("c", 3, event_type="rating", value=2.0),
        event("d", 4, event_type="rating", value=3.0), event("e", 5, event_type="hover"),
    ]  # fmt: skip
    await event_log.append(batch, POLICY, NOW)
    history = await histories.read("u", POLICY)
    assert history.source == "cache"
    assert_equal(history, expected(await stored(engine), POLICY))
    assert (list(history.items), set(history.seen), history.newest) == (keys("a", "d"), set(keys("a", "b")), 4)


async def test_a_user_without_events_gets_an_empty_entry_for_a_short_time(
    redis_server: RedisServer, histories: HistoryStore, event_log: EventLog
) -> None:
    for source in ("log", "cache"):
        history = await histories.read("u", POLICY)
        assert (len(history.items), len(history.seen), history.newest, history.source) == (0, 0, None, source)
    [key] = redis_server.keys()
    assert 0 < int(redis_server.cli("TTL", key)) <= 60
    await event_log.append([event("a")], POLICY, NOW)
    assert (await histories.read("u", POLICY)).source == "cache"
    assert int(redis_server.cli("TTL", key)) > 86_400


async def test_an_event_for_an_absent_entry_makes_none(
    redis_server: RedisServer, event_log: EventLog, histories: HistoryStore
) -> None:
    await event_log.append([event("a"), event("b", user_id="v")], POLICY, NOW)
    assert redis_server.keys() == []
    assert list((await histories.read("u", POLICY)).items) == keys("a")


async def test_an_evicted_entry_is_rebuilt(
    redis_server: RedisServer, event_log: EventLog, histories: HistoryStore
) -> None:
    await event_log.append([event("a")], POLICY, NOW)
    await histories.read("u", POLICY)
    redis_server.cli("FLUSHALL")
    await event_log.append([event("b")], POLICY, NOW)
    assert list((await histories.read("u", POLICY)).items) == keys("a", "b")
    assert (await histories.read("u", POLICY)).source == "cache"


async def test_as_of_cuts_sequence_and_seen(event_log: EventLog, histories: HistoryStore, engine: AsyncEngine) -> None:
    await event_log.append([event("a", 1), event("b", 2), event("a", 3)], POLICY, NOW)
    rows = await stored(engine)
    for as_of, source in ((0, "log"), (2, "log"), (3, "cache"), (9, "cache")):
        history = await histories.read("u", POLICY, as_of)
        assert_equal(history, expected(rows, POLICY, as_of))
        assert history.source == source, as_of


async def test_an_entry_of_another_policy_does_not_count(
    redis_server: RedisServer, event_log: EventLog, histories: HistoryStore, engine: AsyncEngine
) -> None:
    other = HistoryPolicy(sequence_types=("skip",), seen_types=("hover",))
    await event_log.append([event("a", 1), event("b", 2, event_type="skip")], POLICY, NOW)
    for policy in (POLICY, other, POLICY):
        assert_equal(await histories.read("u", policy), expected(await stored(engine), policy))
    # An event that the writer's policy does not name still matters to an entry of the other one.
    await histories.read("u", other)
    await event_log.append([event("c", 3, event_type="hover")], POLICY, NOW)
    assert redis_server.keys() == []
    assert_equal(await histories.read("u", other), expected(await stored(engine), other))


async def test_drop_drops_the_entry(redis_server: RedisServer, event_log: EventLog, histories: HistoryStore) -> None:
    await event_log.append([event("a")], POLICY, NOW)
    await histories.read("u", POLICY)
    await histories.drop(["u"])
    assert redis_server.keys() == []


async def test_the_window_keeps_the_newest_and_seen_keeps_all(
    sqlite_engine: AsyncEngine, redis_server: RedisServer
) -> None:
    async with store_on(redis_server.url, sqlite_engine) as histories:
        log = EventLog(sqlite_engine, histories)
        await log.append([event(f"i{n}", n) for n in range(300)], POLICY, NOW)
        await histories.read("u", POLICY)
        for start in (300, 500):
            await log.append([event(f"i{n}", n) for n in range(start, start + 200)], POLICY, NOW)
        await log.append([event("late", 1), event("i0", 900)], POLICY, NOW)
        history = await histories.read("u", POLICY)
        assert (history.source, len(history.items), len(history.seen)) == ("cache", WINDOW, 701)
        assert_equal(history, expected(await stored(sqlite_engine), POLICY))


async def test_repeats_collapse_in_the_cache_as_in_the_log(
    sqlite_engine: AsyncEngine, redis_server: RedisServer
) -> None:
    policy = HistoryPolicy(sequence_types=("view", "play"), seen_types=("play",), collapse_repeats=True)
    async with store_on(redis_server.url, sqlite_engine, window=3) as histories:
        log = EventLog(sqlite_engine, histories)
        await histories.read("u", policy)

        async def then(source: str, *batch: NewEvent) -> UserHistory:
            await log.append(batch, policy, NOW)
            history = await histories.read("u", policy)
            assert history.source == source
            assert_equal(history, expected(await stored(sqlite_engine), policy), 3)
            return history

        await then("cache", event("a", 1), event("a", 2), event("b", 3))
        # A repeat adds nothing to the sequence, but may be the first to mark the item as seen.
        history = await then("cache", event("b", 4, event_type="play"))
        assert (list(history.items), list(history.timestamps), list(history.seen)) == (
            keys("a", "b"),
            [1, 3],
            keys("b"),
        )
        # However long a run is, it takes one place.
        history = await then("cache", *(event("c", t) for t in range(5, 50)))
        assert list(history.items) == keys("a", "b", "c")
        # A late event may split a run, which the window cannot tell: the entry is rebuilt.
        history = await then("log", event("x", 7))
        assert list(history.items) == keys("c", "x", "c")
        # The newest event again, as in a retry, is none.
        assert await histories.appended((await stored(sqlite_engine))[-2:-1], policy)
        await then("cache")


async def test_keys_that_overlap_in_the_packed_set_are_told_apart(
    sqlite_engine: AsyncEngine, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [1, 2, 2 << 56]  # the third's bytes stand across the border of the first two
    monkeypatch.setattr("service.history.item_key", int)
    async with store_on(redis_server.url, sqlite_engine) as histories:
        await histories.read("u", POLICY)
        events = [StoredEvent(seq, "u", str(key), "skip", None, NOW) for seq, key in enumerate(wanted, 1)]
        assert await histories.appended(events, POLICY)
        assert list((await histories.read("u", POLICY)).seen) == wanted


async def test_an_entry_of_200_events_takes_at_most_6_kb(redis: Redis, sqlite_engine: AsyncEngine) -> None:
    """As Redis counts it, name and overhead included, made by a rebuild and by appending."""
    histories = HistoryStore(redis, sqlite_engine)
    log = EventLog(sqlite_engine, histories)
    for user, ready in (
        ("0f8fad5b-d9cd-469f-a165-70867728950e", False),
        ("7c9e6679-7425-40de-944b-e07fc1f90ae7", True),
    ):
        if ready:
            await histories.read(user, POLICY)
        await log.append([event(f"item-{n}", user_id=user) for n in range(200)], POLICY, NOW)
        found = await histories.read(user, POLICY)
        assert (len(found.items), len(found.seen)) == (200, 200)
        assert (await histories.read(user, POLICY)).source == "cache"
        [key] = [key async for key in redis.scan_iter(match=f"*{user}*")]
        size = await redis.memory_usage(key, samples=0)
        assert size is not None
        assert size <= 6 * 1024


async def test_on_a_redis_in_cluster_mode(sqlite_engine: AsyncEngine) -> None:
    """Every command and script keeps to the keys of one user, whose id alone decides on their slot."""
    with RedisServer(cluster=True) as server:
        async with store_on(server.url, sqlite_engine) as histories:
            log = EventLog(sqlite_engine, histories)
            users = [f"u{n}" for n in range(50)]
            for item in ("a", "b"):
                await log.append([event(item, user_id=u) for u in users], POLICY, NOW)
                found = await asyncio.gather(*(histories.read(u, POLICY) for u in users))
            assert {tuple(h.items) for h in found} == {tuple(keys("a", "b"))}
            assert {h.source for h in found} == {"cache"}
            assert await histories.drop(users[:25])
            left = server.keys()
            assert len(left) == 25
            for key in left:
                user = key.split("{")[1].rstrip("}")
                assert server.cli("CLUSTER", "KEYSLOT", key) == server.cli("CLUSTER", "KEYSLOT", user)


async def test_rebuilds_are_bounded_in_all(
    redis: Redis, event_log: EventLog, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = HistoryStore(redis, engine)
    await event_log.append([event("a", user_id=f"u{n}") for n in range(60)], POLICY, NOW)
    out, most, read = 0, 0, histories._log.rows

    async def counted(user_id: str, as_of: int | None) -> Sequence[Sequence[Any]]:
        nonlocal out, most
        out += 1
        most = max(most, out)
        try:
            return await read(user_id, as_of)
        finally:
            out -= 1

    monkeypatch.setattr(histories._log, "rows", counted)
    found = await asyncio.gather(*(histories.read(f"u{n}", POLICY) for n in range(60)))
    assert {tuple(h.items) for h in found} == {tuple(keys("a"))}
    assert 1 < most <= READERS


async def test_many_users_at_once(sqlite_engine: AsyncEngine, redis_server: RedisServer) -> None:
    async with store_on(redis_server.url, sqlite_engine) as histories:
        log = EventLog(sqlite_engine, histories)
        users = [f"u{n}" for n in range(400)]
        await log.append([event(f"of-{u}", user_id=u) for u in users], POLICY, NOW)
        for source in ("log", "cache"):
            found = await asyncio.gather(*(histories.read(u, POLICY) for u in users))
            assert [list(h.items) for h in found] == [keys(f"of-{u}") for u in users]
            assert {h.source for h in found} == {source}


# --- any order of things ------------------------------------------------------------------------------

TYPES = ("view", "rating", "skip", "hover")
type_sets = st.lists(st.sampled_from(TYPES), min_size=1, unique=True).map(tuple)
policies = st.builds(
    HistoryPolicy,
    sequence_types=type_sets,
    seen_types=type_sets,
    minimum_value=st.sampled_from([None, 3.0]),
    collapse_repeats=st.booleans(),
)
new_events = st.lists(
    st.tuples(
        st.sampled_from("abcdef"), st.integers(0, 6), st.sampled_from(TYPES), st.sampled_from([None, 1.0, 3.0, 5.0])
    ),
    min_size=1,
    max_size=4,
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), new_events),
        st.tuples(st.just("append and read"), new_events),
        st.tuples(st.just("append and read"), new_events),
        st.tuples(st.just("lose"), new_events),  # committed, but Redis was not told; swept afterwards
        st.tuples(st.just("repeat"), st.randoms(use_true_random=False)),
        st.tuples(st.just("read"), st.sampled_from([None, None, 0, 3, 9])),
        st.tuples(st.just("evict"), st.none()),
        st.tuples(st.just("other policy"), st.none()),
    ),
    max_size=14,
)


@given(policy=policies, steps=steps)
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
async def test_whatever_happens_reads_equal_history_of_over_the_log(
    policy: HistoryPolicy, steps: list[tuple[str, Any]], sqlite_engine: AsyncEngine, redis_server: RedisServer
) -> None:
    user, window = uuid.uuid4().hex, 4
    async with store_on(redis_server.url, sqlite_engine, window=window) as histories:
        log = EventLog(sqlite_engine, histories)
        lost = EventLog(sqlite_engine, _Deaf(histories, sqlite_engine))
        for what, detail in [("read", None), *steps, ("read", None), ("read", None)]:
            if what in ("append", "append and read", "lose"):
                batch = [event(i, t, user, event_type=k, value=v) for i, t, k, v in detail]
                await (lost if what == "lose" else log).append(batch, policy, NOW)
                if what == "lose":
                    await histories.drop([user])
            elif what == "repeat":
                rows = await stored(sqlite_engine, user)
                assert await histories.appended(detail.sample(rows, min(len(rows), 3)), policy)
            elif what == "evict":
                redis_server.cli("FLUSHALL")
            elif what == "other policy":
                await histories.read(user, POLICY)
            if what in ("read", "append and read"):
                as_of = detail if what == "read" else None
                history = await histories.read(user, policy, as_of)
                assert_equal(history, expected(await stored(sqlite_engine, user), policy, as_of), window)


class _Deaf(HistoryStore):
    """A store that does not tell Redis of events."""

    def __init__(self, histories: HistoryStore, engine: AsyncEngine) -> None:
        self.histories, self.engine = histories, engine

    async def appended(self, events: Any, policy: Any, until: float | None = None) -> bool:
        return False


async def test_a_drop_under_way_does_not_stand_for_an_event_lost_since(
    histories: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drop was sent before the event: another process may have made the entry anew in between."""
    first, drop = StoredEvent(1, "u", "a", "view", None, NOW), asyncio.Event()

    async def down(_: object) -> list[Any]:
        raise RedisDown("gone")

    async def slow(_: object) -> list[Any]:
        await drop.wait()
        return [1]

    monkeypatch.setattr(histories._line, "ask", down)
    assert not await histories.appended([first], POLICY)
    monkeypatch.setattr(histories._line, "ask", slow)
    dropping = asyncio.create_task(histories.drop(["u"]))
    await asyncio.sleep(0)
    monkeypatch.setattr(histories._line, "ask", down)
    assert not await histories.appended([first], POLICY)
    drop.set()
    assert await dropping
    assert "u" in histories._dirty
    monkeypatch.setattr(histories._line, "ask", slow)
    assert await histories.drop(["u"])
    assert "u" not in histories._dirty


async def test_of_many_entries_that_lack_an_event_few_are_tried_while_redis_is_away(
    histories: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    async def down(commands: Sequence[Command]) -> list[Any]:
        asked.append(len(commands))
        raise RedisDown("gone")

    async def up(commands: Sequence[Command]) -> list[Any]:
        asked.append(len(commands))
        return [1] * len(commands)

    monkeypatch.setattr("service.history.DROPPED", 10)
    monkeypatch.setattr(histories._line, "ask", down)
    lost = [StoredEvent(n, f"u{n}", "a", "view", None, NOW) for n in range(95)]
    assert not await histories.appended(lost, POLICY)
    asked.clear()
    await histories.drop_dirty()
    assert asked == [10]
    asked.clear()
    monkeypatch.setattr(histories._line, "ask", up)
    await histories.drop_dirty()
    assert asked == [10] * 9 + [5]
    assert not histories._dirty


async def test_when_more_entries_lack_an_event_than_can_be_known_none_is_read(
    redis_of_test: RedisServer, sqlite_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.history.MAX_DIRTY", 3)
    async with store_on(redis_of_test.url, sqlite_engine) as histories:
        log, users = EventLog(sqlite_engine, histories), [f"u{n}" for n in range(6)]
        for user in users:
            await log.append([event("a", 1, user)], POLICY, NOW)
            await histories.read(user, POLICY)
        assert isinstance(histories._line, RedisLine)
        histories._line.failed, histories._line.paused_until = True, float("inf")  # as after a timeout a moment ago
        for user in users:
            await log.append([event("b", 2, user)], POLICY, NOW)
        await histories.drop_dirty()  # in vain
        histories._line.failed = False
        for user in users:
            history = await histories.read(user, POLICY)
            assert (list(history.items), history.source) == (keys("a", "b"), "log")
        await histories.drop_dirty()
        assert redis_of_test.keys() == []
        for source in ("log", "cache"):
            for user in users:
                history = await histories.read(user, POLICY)
                assert (list(history.items), history.source) == (keys("a", "b"), source)


async def test_a_cached_read_is_one_round_trip(
    redis: Redis, sqlite_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = HistoryStore(redis, sqlite_engine)
    await EventLog(sqlite_engine, histories).append([event("a")], POLICY, NOW)
    await histories.read("u", POLICY)
    assert isinstance(histories._line, RedisLine)
    exchange, sizes = histories._line._exchange, []

    async def exchanging(commands: Sequence[Command]) -> list[Any]:
        sizes.append(len(commands))
        return await exchange(commands)

    monkeypatch.setattr(histories._line, "_exchange", exchanging)
    for _ in range(20):
        assert (await histories.read("u", POLICY)).source == "cache"
    assert sizes == [1] * 20


# --- rebuilds -----------------------------------------------------------------------------------------


class PausedStore(HistoryStore):
    """A store whose reads of the log stop before and after SQL until they are let on."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.before: Callable[[], Awaitable[None]] | None = None
        self.after: Callable[[], Awaitable[None]] | None = None
        self.logged = 0

    async def _logged(self, *arguments: Any, **options: Any) -> Any:
        self.logged += 1
        before, self.before = self.before, None
        after, self.after = self.after, None
        if before is not None:
            await before()
        entry = await super()._logged(*arguments, **options)
        if after is not None:
            await after()
        return entry


@pytest.fixture
async def paused(redis: Redis, sqlite_engine: AsyncEngine) -> PausedStore:
    return PausedStore(redis, sqlite_engine)


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_an_event_beside_a_rebuild_is_in_the_next_read(
    paused: PausedStore, sqlite_engine: AsyncEngine, redis_server: RedisServer, moment: str
) -> None:
    log = EventLog(sqlite_engine, paused)
    await log.append([event("a")], POLICY, NOW)

    async def another_event() -> None:
        await log.append([event("b")], POLICY, NOW)

    setattr(paused, moment, another_event)
    await paused.read("u", POLICY)
    assert redis_server.keys() == []  # the marker went, so the rebuild was not written
    second = await paused.read("u", POLICY)
    assert (list(second.items), second.source) == (keys("a", "b"), "log")
    assert (await paused.read("u", POLICY)).source == "cache"


async def test_a_claim_that_arrives_late_does_not_bring_an_old_rebuild_back(
    paused: PausedStore, sqlite_engine: AsyncEngine
) -> None:
    """A proxy breaks off, and delivers what it had of the broken connection after an event came between."""
    log = EventLog(sqlite_engine, HistoryStore(paused._line.redis, sqlite_engine))  # type: ignore[union-attr]
    await log.append([event("a")], POLICY, NOW)
    line, late = paused._line, list[Command]()
    assert isinstance(line, RedisLine)
    exchange = line._exchange

    async def broken(commands: Sequence[Command]) -> list[Any]:
        if not late and (claims := [command for command in commands if command.once]):
            late.extend(claims)
            raise RedisConnectionError("gone")
        return await exchange(commands)

    async def meanwhile() -> None:
        await log.append([event("b")], POLICY, NOW)
        await exchange(late)

    line._exchange = broken  # type: ignore[method-assign]
    paused.after = meanwhile
    assert list((await paused.read("u", POLICY)).items) == keys("a")
    assert len(late) == 1
    for _ in range(2):
        assert list((await paused.read("u", POLICY)).items) == keys("a", "b")


async def test_a_commit_whose_cache_step_comes_after_the_rebuild_counts_once(
    paused: PausedStore, sqlite_engine: AsyncEngine
) -> None:
    log = EventLog(sqlite_engine, _Deaf(paused, sqlite_engine))
    await log.append([event("a"), event("b")], POLICY, NOW)
    await paused.read("u", POLICY)
    assert await paused.appended(await stored(sqlite_engine), POLICY)
    history = await paused.read("u", POLICY)
    assert (list(history.items), history.source) == (keys("a", "b"), "cache")


async def test_reads_at_the_same_time_share_one_look_into_the_log(
    paused: PausedStore, sqlite_engine: AsyncEngine
) -> None:
    await EventLog(sqlite_engine, paused).append([event("a")], POLICY, NOW)
    found = await asyncio.gather(*(paused.read("u", POLICY) for _ in range(20)))
    assert paused.logged == 1
    assert {tuple(h.items) for h in found} == {tuple(keys("a"))}


async def test_a_read_that_began_after_an_event_joins_no_older_rebuild(
    paused: PausedStore, sqlite_engine: AsyncEngine
) -> None:
    log = EventLog(sqlite_engine, paused)
    await log.append([event("a")], POLICY, NOW)
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        arrived.set()
        await go_on.wait()

    paused.after = wait
    older = asyncio.create_task(paused.read("u", POLICY))
    await arrived.wait()
    joined = asyncio.create_task(paused.read("u", POLICY))  # nothing happened since: may share
    await asyncio.sleep(0.05)
    assert paused.logged == 1
    await log.append([event("b")], POLICY, NOW)
    assert list((await paused.read("u", POLICY)).items) == keys("a", "b")
    go_on.set()
    assert list((await older).items) == list((await joined).items) == keys("a")
    history = await paused.read("u", POLICY)
    assert (list(history.items), history.source) == (keys("a", "b"), "cache")


async def test_a_rebuild_is_joined_by_readers_of_its_own_policy_alone(
    paused: PausedStore, sqlite_engine: AsyncEngine
) -> None:
    await EventLog(sqlite_engine, paused).append([event("a"), event("b", event_type="skip")], POLICY, NOW)

    async def read_otherwise() -> None:
        history = await paused.read("u", HistoryPolicy(sequence_types=("skip",), seen_types=()))
        assert list(history.items) == keys("b")

    paused.after = read_otherwise
    assert list((await paused.read("u", POLICY)).items) == keys("a")


async def test_a_reader_that_leaves_does_not_end_the_rebuild_for_others(
    paused: PausedStore, sqlite_engine: AsyncEngine
) -> None:
    await EventLog(sqlite_engine, paused).append([event("a")], POLICY, NOW)
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        arrived.set()
        await go_on.wait()

    paused.after = wait
    leaving, staying = (asyncio.create_task(paused.read("u", POLICY)) for _ in range(2))
    await arrived.wait()
    leaving.cancel()
    go_on.set()
    assert list((await staying).items) == keys("a")
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_one_process_rebuilds_the_others_answer_from_the_log(
    paused: PausedStore, sqlite_engine: AsyncEngine, redis_server: RedisServer
) -> None:
    await EventLog(sqlite_engine, paused).append([event("a")], POLICY, NOW)
    async with store_on(redis_server.url, sqlite_engine) as other:

        async def read_elsewhere() -> None:
            history = await other.read("u", POLICY)
            assert (list(history.items), history.source) == (keys("a"), "log")
            assert int(redis_server.cli("HLEN", redis_server.keys()[0])) == 1  # still the marker alone

        paused.after = read_elsewhere
        await paused.read("u", POLICY)
        assert (await other.read("u", POLICY)).source == "cache"


async def test_a_marker_whose_rebuilder_died_expires(
    paused: PausedStore, sqlite_engine: AsyncEngine, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.history.MARKER_MILLISECONDS", 50)

    async def die() -> None:
        raise HistoryUnavailable

    paused.before = die
    with pytest.raises(HistoryUnavailable):
        await paused.read("u", POLICY)
    await asyncio.sleep(0.1)
    assert redis_server.keys() == []
    await paused.read("u", POLICY)
    assert (await paused.read("u", POLICY)).source == "cache"


# --- Redis fails --------------------------------------------------------------------------------------


async def test_after_a_restart_entries_do_not_count_even_from_an_old_dump(
    sqlite_engine: AsyncEngine, redis_of_test: RedisServer
) -> None:
    async with store_on(redis_of_test.url, sqlite_engine) as histories:
        log = EventLog(sqlite_engine, histories)
        await log.append([event("a")], POLICY, NOW)
        await histories.read("u", POLICY)
        redis_of_test.cli("SAVE")
        await log.append([event("b")], POLICY, NOW)
        assert list((await histories.read("u", POLICY)).items) == keys("a", "b")
        redis_of_test.restart()  # kill -9; the pool's socket is stale, the dump lacks b
        [old] = redis_of_test.keys()
        history = await histories.read("u", POLICY)
        assert (list(history.items), history.source) == (keys("a", "b"), "log")
        history = await histories.read("u", POLICY)
        assert (list(history.items), history.source) == (keys("a", "b"), "cache")
        assert len(set(redis_of_test.keys()) - {old}) == 1


async def test_an_event_sent_over_a_stale_socket_is_not_lost(
    sqlite_engine: AsyncEngine, redis_of_test: RedisServer
) -> None:
    async with store_on(redis_of_test.url, sqlite_engine) as histories:
        log = EventLog(sqlite_engine, histories)
        await log.append([event("a")], POLICY, NOW)
        await histories.read("u", POLICY)
        redis_of_test.cli("SAVE")
        redis_of_test.restart()
        await log.append([event("b")], POLICY, NOW)
        assert list((await histories.read("u", POLICY)).items) == keys("a", "b")


async def test_a_master_that_comes_back_after_two_failovers_does_not_find_its_old_entries(
    sqlite_engine: AsyncEngine, redis_of_test: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.redis_line.GREETING_SECONDS", 0.0)
    monkeypatch.setattr("service.redis_line.PAUSE", 0.0)
    async with store_on(redis_of_test.url, sqlite_engine) as histories:
        log = EventLog(sqlite_engine, histories)
        await log.append([event("a")], POLICY, NOW)
        await histories.read("u", POLICY)
        assert (await histories.read("u", POLICY)).source == "cache"
        redis_of_test.cli("REPLICAOF", "127.0.0.1", "1")  # now a replica, on the same open connection
        assert (await histories.read("u", POLICY)).source == "log"
        assert not await histories.ping()
        elsewhere = EventLog(sqlite_engine, _Deaf(histories, sqlite_engine))  # a worker that follows the new master
        await elsewhere.append([event("b")], POLICY, NOW)
        redis_of_test.cli("REPLICAOF", "NO", "ONE")
        assert list((await histories.read("u", POLICY)).items) == keys("a", "b")
        assert await histories.ping()


async def test_a_master_that_turns_read_only_is_left(
    sqlite_engine: AsyncEngine, redis_of_test: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.redis_line.PAUSE", 0.0)
    async with store_on(redis_of_test.url, sqlite_engine) as histories:
        log = EventLog(sqlite_engine, histories)
        await log.append([event("a")], POLICY, NOW)
        await histories.read("u", POLICY)
        redis_of_test.cli("REPLICAOF", "127.0.0.1", "1")
        await log.append([event("b")], POLICY, NOW)
        history = await histories.read("u", POLICY)
        assert (list(history.items), history.source) == (keys("a", "b"), "log")


async def test_flushed_scripts_are_loaded_again(sqlite_engine: AsyncEngine, redis_of_test: RedisServer) -> None:
    async with store_on(redis_of_test.url, sqlite_engine) as histories:
        await histories.read("u", POLICY)
        redis_of_test.cli("SCRIPT", "FLUSH")
        assert await histories.appended([StoredEvent(1, "u", "a", "view", None, NOW)], POLICY)


async def test_without_redis_the_log_answers_and_few_requests_pay_for_the_try(
    sqlite_engine: AsyncEngine, redis_of_test: RedisServer
) -> None:
    async with store_on(redis_of_test.url, sqlite_engine, patience=0.05) as histories:
        log = EventLog(sqlite_engine, histories)
        await log.append([event("a")], POLICY, NOW)
        await histories.read("u", POLICY)
        redis_of_test.freeze()
        start = asyncio.get_running_loop().time()
        for _ in range(20):
            history = await histories.read("u", POLICY)
            assert (list(history.items), history.source) == (keys("a"), "log")
        assert asyncio.get_running_loop().time() - start < 20 * 0.05  # what it would be if each waited
        assert not await histories.ping()
        redis_of_test.thaw()
        await asyncio.sleep(0.3)
        assert await histories.ping()
        redis_of_test.kill()
        assert (await histories.read("u", POLICY)).source == "log"
        assert not await histories.appended([StoredEvent(9, "u", "b", "view", None, NOW)], POLICY)


async def test_a_full_redis_fails_the_writes_alone(sqlite_engine: AsyncEngine, redis_of_test: RedisServer) -> None:
    async with store_on(redis_of_test.url, sqlite_engine) as histories:
        log = EventLog(sqlite_engine, histories)
        await log.append([event("a"), event("x", user_id="v")], POLICY, NOW)
        await histories.read("u", POLICY)
        redis_of_test.cli("CONFIG", "SET", "maxmemory", "1")
        assert (await histories.read("u", POLICY)).source == "cache"
        assert (await histories.read("v", POLICY)).source == "log"
        await log.append([event("b")], POLICY, NOW)
        assert list((await histories.read("u", POLICY)).items) == keys("a", "b")


async def test_without_redis_and_sql_it_is_history_unavailable(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'empty.db'}")
    async with store_on(f"unix://{tmp_path / 'nothing'}", engine) as histories:
        with pytest.raises(HistoryUnavailable):
            await histories.read("u", POLICY)
        assert not await histories.drop(["u"])
    await engine.dispose()


async def test_what_lies_behind_the_window_is_read_from_the_log(sqlite_engine: AsyncEngine, redis: Redis) -> None:
    histories = HistoryStore(redis, sqlite_engine, window=2)
    await EventLog(sqlite_engine, histories).append([event(i, n) for n, i in enumerate("abcd")], POLICY, NOW)
    assert list((await histories.read("u", POLICY)).items) == keys("c", "d")
    whole = await histories.read_whole("u", POLICY)
    assert (list(whole.items), whole.source) == (keys("a", "b", "c", "d"), "log")


async def test_an_entry_that_missed_an_event_is_dropped_for_other_workers_too(
    redis_of_test: RedisServer, sqlite_engine: AsyncEngine
) -> None:
    async with store_on(redis_of_test.url, sqlite_engine) as mine, store_on(redis_of_test.url, sqlite_engine) as other:
        await EventLog(sqlite_engine, mine).append([event("a")], POLICY, NOW)
        await other.read("u", POLICY)
        assert isinstance(mine._line, RedisLine)
        mine._line.failed, mine._line.paused_until = True, float("inf")  # as after a timeout a moment ago
        await EventLog(sqlite_engine, mine).append([event("b", 1)], POLICY, NOW)
        mine._line.failed = False
        await mine.drop_dirty()
        assert list((await other.read("u", POLICY)).items) == keys("b", "a")


async def test_a_client_of_another_make_is_refused(sqlite_engine: AsyncEngine) -> None:
    with pytest.raises(ValueError, match="create_redis"):
        HistoryStore(Redis(), sqlite_engine)


async def test_cancelled_reads_never_shift_replies(sqlite_engine: AsyncEngine, redis_server: RedisServer) -> None:
    """Behind a slow proxy, readers give up at any moment; whoever gets an answer gets their own user's."""
    delay = 0.0

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, slow: bool) -> None:
        try:
            while data := await reader.read(65536):
                if slow:
                    await asyncio.sleep(delay)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    pumps: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(redis_server.socket)
        pumps.add(asyncio.create_task(pump(reader, up_writer, slow=False)))
        pumps.add(asyncio.create_task(pump(up_reader, writer, slow=True)))

    proxy = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    async with store_on(f"redis://127.0.0.1:{port}", sqlite_engine, patience=0.05) as histories:
        log = EventLog(sqlite_engine, histories)
        users = [f"u{n}" for n in range(8)]
        await log.append([event(f"of-{u}", user_id=u) for u in users], POLICY, NOW)

        async def read(user: str, patience: float) -> tuple[str, UserHistory] | None:
            try:
                async with asyncio.timeout(patience):
                    return user, await histories.read(user, POLICY)
            except TimeoutError:
                return None

        for u in users:
            await read(u, 5)
        answers: list[tuple[str, UserHistory] | None] = []
        for turn in range(60):
            delay = (turn % 8) / 100  # up to 70 ms: beyond the client's own 50 ms as well
            answers += await asyncio.gather(*(read(u, (n + turn) % 8 / 200) for n, u in enumerate(users)))
        given = [answer for answer in answers if answer is not None]
        assert len(given) < len(answers)
        assert any(history.source == "cache" for _, history in given)
        for user, history in given:
            assert list(history.items) == keys(f"of-{user}")
        delay = 0.0
        await asyncio.sleep(0.3)
        for u in users:
            assert list((await histories.read(u, POLICY)).items) == keys(f"of-{u}")
    proxy.close()
    await proxy.wait_closed()
    await asyncio.gather(*pumps)


# --- size ---------------------------------------------------------------------------------------------


async def test_200_events_take_at_most_6_5_kb(sqlite_engine: AsyncEngine, redis_server: RedisServer) -> None:
    async with store_on(redis_server.url, sqlite_engine) as histories:
        log = EventLog(sqlite_engine, histories)
        await log.append([event(f"i{n}", n, user_id="user-4711") for n in range(150)], POLICY, NOW)
        await histories.read("user-4711", POLICY)
        for n in range(150, 200):
            await log.append([event(f"i{n}", n, user_id="user-4711")], POLICY, NOW)
        history = await histories.read("user-4711", POLICY)
        assert (history.source, len(history.items)) == ("cache", 200)
        assert int(redis_server.cli("MEMORY", "USAGE", redis_server.keys()[0])) <= 6_500


def test_item_keys_survive_the_cache() -> None:
    assert np.array([item_key("a")], "<u8").tobytes() == item_key("a").to_bytes(8, "little")
