"""The event log: all or nothing, idempotent by (user_id, event_id), and an outbox that repairs the cache."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from service.commit import Judge, Log, Row, SqliteWriter
from service.history import HistoryStore, create_redis
from service.ingest import OVERDUE, Accepted, EventConflict, EventLog, LogUnavailable, NewEvent, digest_of
from shared.database import cache_outbox, create_engine, events, migrate, prepare_sqlite
from shared.events import HistoryPolicy, item_keys
from tests.servers import PostgresServer, RedisServer

POLICY = HistoryPolicy(sequence_types=("view",), seen_types=("view", "skip"))
NOW = 1_700_000_000_000_000


def event(item_id: str, event_id: str | None = None, user_id: str = "u", **fields: Any) -> NewEvent:
    return NewEvent(event_id, user_id, item_id, fields.pop("event_type", "view"), **fields)


async def count(engine: AsyncEngine, table: Any) -> int:
    async with engine.connect() as connection:
        found: int = (await connection.execute(select(func.count()).select_from(table))).scalar_one()
    return found


async def age_outbox(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(update(cache_outbox).values(written=cache_outbox.c.written - OVERDUE))


async def items_of(histories: HistoryStore, user_id: str = "u") -> list[int]:
    return list((await histories.read(user_id, POLICY)).items)


def keys(*item_ids: str) -> list[int]:
    return list(item_keys(item_ids))


async def test_events_are_stored_in_the_order_of_time_then_arrival(event_log: EventLog) -> None:
    first = [event("a", timestamp=5), event("b", timestamp=3), event("c", timestamp=5), event("d")]
    accepted = await event_log.append(first, POLICY, NOW)
    assert [a.status for a in accepted] == ["accepted"] * 4
    assert len({a.event_id for a in accepted}) == 4
    await event_log.append([event("e", timestamp=5)], POLICY, NOW)
    stored = await event_log.history("u", 100)
    assert [(e.item_id, e.timestamp) for e in stored] == [("b", 3), ("a", 5), ("c", 5), ("e", 5), ("d", NOW)]
    assert [e.item_id for e in await event_log.history("u", 2)] == ["e", "d"]
    assert await event_log.history("nobody", 5) == []


async def test_all_fields_come_back(event_log: EventLog) -> None:
    sent = NewEvent("e1", "u", "a", "rating", 4.5, 7, "r1", "s1")
    assert await event_log.append([sent], POLICY, NOW) == [Accepted("e1", "accepted")]
    [stored] = await event_log.history("u", 1)
    assert (stored.event_id, stored.user_id, stored.item_id, stored.event_type) == ("e1", "u", "a", "rating")
    assert (stored.value, stored.timestamp, stored.recommendation_id, stored.session_id) == (4.5, 7, "r1", "s1")


async def test_a_retry_is_a_duplicate_even_without_a_timestamp(event_log: EventLog, engine: AsyncEngine) -> None:
    sent = [event("a", "e1"), event("b", "e2", timestamp=3)]
    await event_log.append(sent, POLICY, NOW)
    again = await event_log.append([*sent, event("c", "e3"), event("c", "e3")], POLICY, NOW + 1)
    assert [a.status for a in again] == ["duplicate", "duplicate", "accepted", "duplicate"]
    assert await count(engine, events) == 3
    # The same event_id of another user is another event.
    assert (await event_log.append([event("a", "e1", "v")], POLICY, NOW))[0].status == "accepted"


@pytest.mark.parametrize(
    "other", [event("b", "e1"), event("a", "e1", timestamp=NOW), event("a", "e1", value=1.0)], ids=str
)
async def test_other_content_under_a_known_id_is_a_conflict(event_log: EventLog, other: NewEvent) -> None:
    await event_log.append([event("a", "e1")], POLICY, NOW)
    with pytest.raises(EventConflict) as caught:
        await event_log.append([event("x", "new"), other, event("a", "e1")], POLICY, NOW)
    assert caught.value.positions == [1]


async def test_a_conflict_writes_nothing_and_names_all_positions(event_log: EventLog, engine: AsyncEngine) -> None:
    await event_log.append([event("a", "e1")], POLICY, NOW)
    batch = [event("x", "e2"), event("b", "e1"), event("y", "e2"), event("z", "e3"), event("c", "e1")]
    with pytest.raises(EventConflict) as caught:
        await event_log.append(batch, POLICY, NOW)
    assert caught.value.positions == [1, 2, 4]
    assert await count(engine, events) == 1
    assert await count(engine, cache_outbox) == 1


async def test_a_large_batch_keeps_its_order(event_log: EventLog) -> None:
    batch = [event(f"i{n}", timestamp=1) for n in range(500)]
    await event_log.append(batch, POLICY, NOW)
    assert [e.item_id for e in await event_log.history("u", 1_000)] == [f"i{n}" for n in range(500)]


async def test_an_empty_batch_is_nothing(event_log: EventLog) -> None:
    assert await event_log.append([], POLICY, NOW) == []


async def test_writers_at_the_same_time_agree_on_who_was_first(event_log: EventLog, engine: AsyncEngine) -> None:
    ids = [f"e{n}" for n in range(20)]

    async def write(order: Sequence[str]) -> list[Accepted]:
        return await event_log.append([event("a", e) for e in order], POLICY, NOW)

    answers = await asyncio.gather(*(write(ids if n % 2 else ids[::-1]) for n in range(8)))
    accepted = [a.event_id for answer in answers for a in answer if a.status == "accepted"]
    assert sorted(accepted) == sorted(ids)
    assert await count(engine, events) == len(ids)


# --- many requests, one transaction -------------------------------------------------------------------


def watched(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the log's transactions, as they come."""
    sizes: list[int] = []
    write = log._writer.write

    async def watching(rows: Sequence[Row], judge: Judge) -> Log:
        sizes.append(len(rows))
        return await write(rows, judge)

    monkeypatch.setattr(log._writer, "write", watching)
    return sizes


def results(answers: Sequence[list[Accepted] | BaseException]) -> list[str]:
    """One word for what became of each request."""
    words: list[str] = []
    for answer in answers:
        if not isinstance(answer, list):
            assert isinstance(answer, EventConflict), answer
        words.append(answer[0].status if isinstance(answer, list) else "conflict")
    return words


async def test_requests_at_the_same_time_share_transactions(
    event_log: EventLog, engine: AsyncEngine, histories: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in ("u0", "u1"):
        await histories.read(user, POLICY)
    sizes = watched(event_log, monkeypatch)
    sent = [event(f"i{n}", user_id=f"u{n % 2}", timestamp=n % 5) for n in range(60)]
    answers = await asyncio.gather(*(event_log.append([e], POLICY, NOW) for e in sent))
    assert [a.status for [a] in answers] == ["accepted"] * 60
    assert sum(sizes) == 60
    assert len(sizes) <= 2
    for user in ("u0", "u1"):  # (timestamp, arrival), in the log as in the cache
        wanted = [e.item_id for e in sorted(sent, key=lambda e: e.timestamp or 0) if e.user_id == user]
        assert [e.item_id for e in await event_log.history(user, 100)] == wanted
        history = await histories.read(user, POLICY)
        assert (list(history.items), history.source) == (keys(*wanted), "cache")


async def test_a_lone_request_waits_for_no_company(event_log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, begun, write = 0, [], event_log._writer.write

    async def turning() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def writing(rows: Sequence[Row], judge: Judge) -> Log:
        begun.append((turns, len(rows)))
        return await write(rows, judge)

    monkeypatch.setattr(event_log._writer, "write", writing)
    counting = asyncio.create_task(turning())
    for n in range(3):
        await asyncio.sleep(0)
        sent = turns
        await event_log.append([event(f"i{n}")], POLICY, NOW)
        at, size = begun[n]
        assert size == 1
        assert at - sent < 5  # any wait, however short, is many turns of the event loop
    counting.cancel()


async def test_a_conflict_is_of_one_request_alone(
    event_log: EventLog, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await event_log.append([event("a", "e1")], POLICY, NOW)
    sizes = watched(event_log, monkeypatch)
    batches = [
        [event("b", "e2")],
        [event("c", "e3"), event("other", "e1")],  # contradicts the log: neither of the two is stored
        [event("a", "e1")],
        [event("d", "e4"), event("e", "e4")],  # contradicts itself
        [event("f", "e5")],
        [event("other", "e5")],  # contradicts a request beside it
        [event("f", "e5")],
        [event("c", "e3")],
    ]
    answers = await asyncio.gather(*(event_log.append(b, POLICY, NOW) for b in batches), return_exceptions=True)
    outcome = ["accepted", "conflict", "duplicate", "conflict", "accepted", "conflict", "duplicate", "accepted"]
    assert results(answers) == outcome
    assert [a.positions for a in answers if isinstance(a, EventConflict)] == [[1], [1], [0]]
    assert sorted(e.event_id for e in await event_log.history("u", 100)) == ["e1", "e2", "e3", "e5"]
    assert await count(engine, cache_outbox) == 4
    assert len(sizes) < len(batches)


async def test_one_event_in_two_requests_is_accepted_once(event_log: EventLog, engine: AsyncEngine) -> None:
    answers = await asyncio.gather(*(event_log.append([event("a", "e1")], POLICY, NOW) for _ in range(9)))
    assert [a.status for [a] in answers] == ["accepted"] + ["duplicate"] * 8
    assert await count(engine, events) == 1


@pytest.mark.parametrize("wrong", [event("\ud800"), event("a", timestamp=2**63)], ids=["text", "number"])
async def test_what_no_database_can_store_fails_alone(
    event_log: EventLog, engine: AsyncEngine, wrong: NewEvent
) -> None:
    batches = [[event("a")], [wrong], [event("b")]]
    answers = await asyncio.gather(*(event_log.append(b, POLICY, NOW) for b in batches), return_exceptions=True)
    assert [isinstance(answer, list) for answer in answers] == [True, False, True]
    assert await count(engine, events) == await count(engine, cache_outbox) == 2


async def test_a_transaction_has_a_size(event_log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.ingest.GROUP_EVENTS", 5)
    sizes = watched(event_log, monkeypatch)
    batches = [[event(f"i{n}-{k}") for k in range(2)] for n in range(5)] + [[event(f"i{k}") for k in range(7)]]
    await asyncio.gather(*(event_log.append(b, POLICY, NOW) for b in batches))
    assert sizes == [4, 4, 2, 7]


async def test_processes_that_write_at_the_same_time(database_url: str, redis: Redis) -> None:
    engines = [create_engine(database_url) for _ in range(3)]
    await migrate(engines[0])
    logs = [EventLog(engine, HistoryStore(redis, engine)) for engine in engines]
    ids = [f"e{n}" for n in range(30)]

    async def write(log: EventLog, event_id: str) -> str:
        [taken] = await log.append([event("a", event_id, timestamp=1)], POLICY, NOW)
        return taken.status

    found = await asyncio.gather(*(write(log, i) for i in ids for log in logs))
    assert sorted(found) == ["accepted"] * 30 + ["duplicate"] * 60
    stored = await logs[0].history("u", 1_000)
    assert sorted(e.event_id for e in stored) == sorted(ids)
    assert [e.seq for e in stored] == sorted({e.seq for e in stored})
    for engine in engines:
        await engine.dispose()


async def test_leaving_waits_for_what_is_being_written(
    engine: AsyncEngine, histories: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with EventLog(engine, histories) as log:
        writing = [asyncio.create_task(log.append([event("a")], POLICY, NOW)) for _ in range(5)]
        await asyncio.sleep(0)
    assert all(task.done() and task.result() for task in writing)
    assert await count(engine, events) == 5
    assert await count(engine, cache_outbox) == 0


async def test_a_log_that_does_not_answer_is_given_up_on(
    event_log: EventLog, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.ingest.PATIENCE", 0.1)
    go_on = asyncio.Event()
    write = event_log._writer.write

    async def stuck(rows: Sequence[Row], judge: Judge) -> Log:
        await go_on.wait()
        return await write(rows, judge)

    monkeypatch.setattr(event_log._writer, "write", stuck)
    first = asyncio.create_task(event_log.append([event("a", "e1")], POLICY, NOW))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(event_log.append([event("b", "e2")], POLICY, NOW))
    with pytest.raises(LogUnavailable) as begun:
        await first
    with pytest.raises(LogUnavailable) as waiting:
        await second
    assert (begun.value.perhaps_written, waiting.value.perhaps_written) == (True, False)
    monkeypatch.undo()
    go_on.set()
    assert (await event_log.append([event("a", "e1")], POLICY, NOW))[0].status == "duplicate"
    assert [e.event_id for e in await event_log.history("u", 9)] == ["e1"]  # e2 was said to be nowhere, and is


async def test_the_victim_of_a_deadlock_tries_again(postgresql: PostgresServer, redis: Redis) -> None:
    engine = create_engine(await postgresql.new_database())
    await migrate(engine)
    log = EventLog(engine, HistoryStore(redis, engine))

    def other(event_id: str) -> dict[str, Any]:
        return {
            "event_id": event_id,
            "user_id": "u",
            "item_id": "x",
            "event_type": "view",
            "timestamp": 1,
            "digest": "",
        }

    async with engine.connect() as rival:
        await rival.execute(text("SET deadlock_timeout = '10s'"))  # so that the log's transaction is the victim
        await rival.execute(insert(events), other("e2"))
        writing = asyncio.create_task(log.append([event("a", "e1"), event("b", "e2")], POLICY, NOW))
        await asyncio.sleep(0.05)  # it has e1 now, and waits for e2
        await rival.execute(insert(events), other("e1"))
        await rival.rollback()
    assert [a.status for a in await writing] == ["accepted", "accepted"]
    await engine.dispose()


async def test_the_outbox_is_emptied_of_events_that_reached_the_cache(event_log: EventLog, engine: AsyncEngine) -> None:
    await event_log.append([event("a"), event("b", user_id="v")], POLICY, NOW)
    assert await count(engine, cache_outbox) == 2
    await event_log.flush()
    assert await count(engine, cache_outbox) == 0


async def test_the_background_task_flushes_and_sweeps(
    engine: AsyncEngine, histories: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.ingest.FLUSH_SECONDS", 0.01)
    async with EventLog(engine, histories) as log:
        await log.append([event("a")], POLICY, NOW)
        async with asyncio.timeout(5):
            while await count(engine, cache_outbox):  # noqa: ASYNC110 - the database sends no event
                await asyncio.sleep(0.01)
        await log.append([event("b")], POLICY, NOW)
    assert await count(engine, cache_outbox) == 0  # leaving flushes


async def test_one_sweep_goes_on_until_nothing_is_overdue(
    engine: AsyncEngine, histories: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a long time without Redis."""
    for name, value in (("FLUSH_SECONDS", 0.01), ("SWEEP_SECONDS", 3600.0), ("SWEEP_ROWS", 2)):
        monkeypatch.setattr(f"service.ingest.{name}", value)
    rows = [{"seq": seq, "user_id": f"u{seq}", "written": 0} for seq in range(1, 8)]
    async with engine.begin() as connection:
        await connection.execute(insert(cache_outbox), rows)
    async with EventLog(engine, histories), asyncio.timeout(60):
        while await count(engine, cache_outbox):  # noqa: ASYNC110 - the database sends no event
            await asyncio.sleep(0.01)


async def test_a_commit_of_sqlite_survives_the_loss_of_power(tmp_path: Path) -> None:
    """By SQLite's own account: with WAL and synchronous FULL (2) each commit is on the disk before it is answered."""
    path = tmp_path / "log.db"
    engine = create_engine(f"sqlite:///{path}")
    await migrate(engine)
    names = ("journal_mode", "synchronous", "busy_timeout")
    writer = SqliteWriter(engine)

    def ask() -> list[Any]:
        with writer._transaction() as connection:
            return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    at_the_writer = writer._thread.submit(ask).result()
    async with engine.connect() as connection:
        elsewhere = [(await connection.execute(text(f"PRAGMA {name}"))).scalar_one() for name in names]
    await engine.dispose()
    assert at_the_writer == elsewhere == ["wal", 2, 5_000]


async def test_a_commit_that_did_not_reach_the_cache_is_found_and_repaired(
    event_log: EventLog, engine: AsyncEngine, histories: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await event_log.append([event("a")], POLICY, NOW)
    assert await items_of(histories) == keys("a")
    with monkeypatch.context() as patch:
        patch.setattr(histories, "appended", _dies)
        with pytest.raises(RuntimeError, match="died"):
            await event_log.append([event("b", "e2")], POLICY, NOW)
    await event_log.flush()
    assert await event_log.settle() == 0  # not overdue yet
    assert await items_of(histories) == keys("a")
    await age_outbox(engine)
    assert await event_log.settle() == 1
    assert await items_of(histories) == keys("a", "b")
    assert await count(engine, cache_outbox) == 0


async def test_a_retry_repairs_the_cache_at_once(
    event_log: EventLog, engine: AsyncEngine, histories: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await event_log.append([event("a")], POLICY, NOW)
    assert await items_of(histories) == keys("a")
    with monkeypatch.context() as patch:
        patch.setattr(histories, "appended", _dies)
        with pytest.raises(RuntimeError, match="died"):
            await event_log.append([event("b", "e2")], POLICY, NOW)
    assert (await event_log.append([event("b", "e2")], POLICY, NOW + 9))[0].status == "duplicate"
    history = await histories.read("u", POLICY)
    assert (list(history.items), history.source) == (keys("a", "b"), "cache")
    await event_log.flush()
    assert await count(engine, cache_outbox) == 0


async def _dies(*_: Any) -> bool:
    raise RuntimeError("the process died here")


async def test_while_redis_is_down_events_are_accepted_and_repaired_later(
    sqlite_engine: AsyncEngine, redis_of_test: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.redis_line.PAUSE", 0.0)
    client, other_client = (create_redis(redis_of_test.url, timeout=0.5) for _ in range(2))
    histories, others = (HistoryStore(c, sqlite_engine) for c in (client, other_client))  # two workers
    log = EventLog(sqlite_engine, histories)
    await log.append([event("a")], POLICY, NOW)
    assert await items_of(histories) == await items_of(others) == keys("a")
    redis_of_test.freeze()
    await log.append([event("b")], POLICY, NOW)
    assert (await histories.read("u", POLICY)).source == "log"
    await age_outbox(sqlite_engine)
    assert await log.settle() == 0
    assert await count(sqlite_engine, cache_outbox) == 2
    redis_of_test.thaw()
    assert await items_of(histories) == keys("a", "b")  # this worker knows that the entry lacks an event
    assert await log.settle() == 2
    assert await items_of(others) == keys("a", "b")
    await client.aclose()
    await other_client.aclose()


async def test_a_missing_database_is_log_unavailable(tmp_path: Path, redis_server: RedisServer) -> None:
    client = create_redis(redis_server.url)
    for url in (f"sqlite:///{tmp_path / 'empty.db'}", f"postgresql://u@/db?host={tmp_path}"):
        engine = create_engine(url)
        log = EventLog(engine, HistoryStore(client, engine))
        with pytest.raises(LogUnavailable):
            await log.append([event("a")], POLICY, NOW)
        with pytest.raises(LogUnavailable):
            await log.history("u", 1)
        with pytest.raises(LogUnavailable):
            await log.settle()
        await engine.dispose()
    await client.aclose()


def prepared_with(pragma: str) -> Callable[[Any], None]:
    """`prepare_sqlite` with a pragma more, for the connection that the log writes by."""

    def prepare(connection: Any) -> None:
        prepare_sqlite(connection)
        connection.execute(f"PRAGMA {pragma}")

    return prepare


async def test_a_lock_held_too_long_is_log_unavailable_and_the_next_try_is_not(
    sqlite_engine: AsyncEngine, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.commit.prepare_sqlite", prepared_with("busy_timeout = 20"))
    log = EventLog(sqlite_engine, HistoryStore(redis, sqlite_engine))
    async with sqlite_engine.connect() as other:
        await other.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(LogUnavailable, match="locked"):
            await log.append([event("a")], POLICY, NOW)
    assert await log.history("u", 1) == []
    assert (await log.append([event("a")], POLICY, NOW))[0].status == "accepted"


async def test_a_full_disk_is_log_unavailable_until_there_is_room(
    sqlite_engine: AsyncEngine, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(sqlite_engine, HistoryStore(redis, sqlite_engine))
    batch = [event(f"{n}" * 50) for n in range(500)]
    with monkeypatch.context() as patch:
        patch.setattr("service.commit.prepare_sqlite", prepared_with("max_page_count = 1"))
        with pytest.raises(LogUnavailable, match="full"):
            await log.append(batch, POLICY, NOW)
    assert await count(sqlite_engine, events) == 0
    await log.append(batch, POLICY, NOW)
    assert await count(sqlite_engine, events) == 500


@given(
    st.builds(
        NewEvent,
        event_id=st.none() | st.text(),
        user_id=st.text(),
        item_id=st.text(),
        event_type=st.text(),
        value=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        timestamp=st.none() | st.integers(-(2**62), 2**62),
        session_id=st.none() | st.text(),
    )
)
def test_the_digest_is_that_of_compact_json_with_sorted_keys(sent: NewEvent) -> None:
    """It stands in logs that earlier releases wrote."""
    fields = {name: value for name in NewEvent.__dataclass_fields__ if (value := getattr(sent, name)) is not None}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert digest_of(sent) == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def test_the_digest_is_over_the_fields_as_sent() -> None:
    assert digest_of(event("a", "e1")) == digest_of(event("a", "e1"))
    assert len(digest_of(event("a"))) == 32
    variants = [
        event("a", "e1"), event("a", "e1", timestamp=0), event("a", "e1", value=0.0), event("a", "e1", session_id="x"),
        event("a", "e1", recommendation_id="x"), event("b", "e1"), event("a", "e1", event_type="skip"),
    ]  # fmt: skip
    assert len({digest_of(v) for v in variants}) == len(variants)
