"""A cached history is complete or absent, in whatever order the steps of several processes come.

Each process is cut into the steps that others can see: a command to Redis, a look into SQL, a commit. All merges of the
steps are played, one after the other, on a real Redis and a real database; afterwards nobody may read anything but the
log, at once, or after the sweep where a step was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncEngine

from service.erasure import Eraser
from service.history import HistoryStore, create_redis
from service.ingest import LAST_DROP, EventLog, EventsErased, NewEvent
from service.redis_line import RedisDown
from shared.database import cache_outbox
from shared.events import HistoryPolicy, item_keys
from tests.servers import RedisServer

POLICY = HistoryPolicy()
NOW = 1_700_000_000_000_000


class Process:
    """One worker, stopped before each of its steps until it is told to go on."""

    def __init__(self, redis: Redis, engine: AsyncEngine) -> None:
        self.histories = HistoryStore(redis, engine)
        self.log, self.eraser = EventLog(engine, self.histories), Eraser(engine, self.histories)
        self.stopped, self.go_on = asyncio.Event(), asyncio.Event()
        self.task: asyncio.Task[Any] | None = None
        stops: tuple[tuple[Any, str], ...] = (
            (self.histories._line, "ask"),
            (self.histories._log, "rows"),
            (self.log._writer, "write"),
            (self.eraser, "_erase"),
        )
        for owner, name in stops:
            setattr(owner, name, self.stopping(getattr(owner, name)))

    def stopping(self, step: Callable[..., Awaitable[Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
        """`step`, before which the process stops."""

        async def stopped(*arguments: Any, **named: Any) -> Any:
            self.stopped.set()
            await self.go_on.wait()
            self.go_on.clear()
            return await step(*arguments, **named)

        return stopped

    async def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Begin, up to the first step."""
        self.stopped.clear()
        self.task = asyncio.create_task(work)
        await self._until_stopped()

    async def step(self) -> bool:
        """Take one step; False if there was none left."""
        assert self.task is not None
        if self.task.done():
            return False
        self.stopped.clear()
        self.go_on.set()
        await self._until_stopped()
        return True

    async def _until_stopped(self) -> None:
        assert self.task is not None
        stop = asyncio.create_task(self.stopped.wait())
        await asyncio.wait({stop, self.task}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()


def merges(*steps: int) -> Iterator[tuple[int, ...]]:
    """All orders of the steps of several processes: merges(2, 1) -> (0, 0, 1), (0, 1, 0), (1, 0, 0)."""
    if not any(steps):
        yield ()
    for which, left in enumerate(steps):
        if left:
            for rest in merges(*(count - (n == which) for n, count in enumerate(steps))):
                yield (which, *rest)


def event(item: str, user: str) -> NewEvent:
    return NewEvent(event_id=f"{user}-{item}", user_id=user, item_id=item, event_type="view", timestamp=NOW)


class Scene:
    """What a test needs: processes that stop, one that does not, and the way to the end."""

    def __init__(self, redis: Redis, engine: AsyncEngine) -> None:
        self.redis, self.engine = redis, engine
        self.histories = HistoryStore(redis, engine)
        self.log = EventLog(engine, self.histories)
        self.processes: list[Process] = []
        self.number = 0

    @property
    def next_user(self) -> str:
        """Who is played with next."""
        return f"u{self.number}"

    async def play(self, order: Sequence[int], works: Sequence[Callable[[Process, str], Any]]) -> str:
        """Play one order for a fresh user who has one event and no entry of it; the user."""
        user = self.next_user
        self.number += 1
        await self.log.append([event("a", user)], POLICY, NOW)
        await self.log.flush()
        self.processes += [Process(self.redis, self.engine) for _ in range(len(works) - len(self.processes))]
        processes = self.processes[: len(works)]
        for process, work in zip(processes, works, strict=True):
            await process.start(work(process, user))
        for which in order:
            await processes[which].step()
        for process in processes:
            while await process.step():
                pass
            assert process.task is not None
            await process.task
        return user

    async def sweep(self) -> None:
        """What any worker has done after a minute."""
        async with self.engine.begin() as connection:
            await connection.execute(update(cache_outbox).values(written=cache_outbox.c.written - LAST_DROP))
        await self.log.settle()

    async def assert_true(self, user: str, order: Sequence[int], items: Sequence[str] | None = None) -> None:
        """What is read, twice, is what the log has; and that is `items`."""
        whole = (await self.histories.read_whole(user, POLICY)).items.tolist()
        if items is not None:
            assert sorted(whole) == sorted(item_keys(items)), order
        for _ in range(2):
            assert (await self.histories.read(user, POLICY)).items.tolist() == whole, order


@pytest.fixture
async def scene(redis: Redis, sqlite_engine: AsyncEngine) -> Scene:
    return Scene(redis, sqlite_engine)


def reads(process: Process, user: str) -> Any:
    return process.histories.read(user, POLICY)  # HMGET, CLAIM, SQL, COMPLETE


def tells(process: Process, user: str) -> Any:
    return process.log.append([event("b", user)], POLICY, NOW)  # commit, APPEND


def tells_in_vain(process: Process, user: str) -> Any:
    """Redis does not get the event, and the process does not live to drop the entry."""

    async def down(*_: object) -> None:
        raise RedisDown("gone")

    process.histories._line.ask = process.stopping(down)  # type: ignore[method-assign]
    return tells(process, user)


async def tells_unless_erased(process: Process, user: str) -> None:
    try:
        await process.log.append([event("b", user)], POLICY, NOW)
    except EventsErased:
        return


def erases(process: Process, user: str) -> Any:
    return process.eraser.erase(user)  # commit, DEL


async def test_an_event_beside_two_reads(scene: Scene) -> None:
    for order in merges(4, 2, 1):  # the second goes on when the first is done
        user = await scene.play(order, (reads, tells, reads))
        await scene.assert_true(user, order, ["a", "b"])


async def test_an_event_its_retry_and_a_read(scene: Scene) -> None:
    for order in merges(4, 2, 2):
        user = await scene.play(order, (reads, tells, tells))
        await scene.assert_true(user, order, ["a", "b"])


async def test_an_entry_is_evicted_in_between(scene: Scene) -> None:
    async def evicts(process: Process, user: str) -> None:
        await process.stopping(scene.redis.flushdb)()

    for order in merges(4, 2, 1):
        user = await scene.play(order, (reads, tells, evicts))
        await scene.assert_true(user, order, ["a", "b"])


async def test_a_retry_of_an_event_that_never_reached_redis(scene: Scene) -> None:
    for order in merges(4, 2, 2):
        user = await scene.play(order, (reads, tells_in_vain, tells))
        await scene.assert_true(user, order, ["a", "b"])


async def test_redis_is_restarted_from_an_old_dump(redis_of_test: RedisServer, sqlite_engine: AsyncEngine) -> None:
    async def restarts(process: Process, user: str) -> None:
        await process.stopping(partial(asyncio.to_thread, redis_of_test.restart))()

    async with aclosing(create_redis(redis_of_test.url, timeout=5)) as redis:
        scene = Scene(redis, sqlite_engine)
        for order in merges(4, 2, 1):
            await scene.histories.read(scene.next_user, POLICY)  # what the dump has is complete, and without an event
            redis_of_test.cli("SAVE")
            user = await scene.play(order, (reads, tells, restarts))
            await scene.assert_true(user, order, ["a", "b"])


async def test_an_event_that_never_reaches_redis_counts_after_the_sweep(scene: Scene) -> None:
    for order in merges(4, 2, 1):
        user = await scene.play(order, (reads, tells_in_vain, reads))
        await scene.sweep()
        await scene.assert_true(user, order, ["a", "b"])


async def test_an_event_beside_an_erasure_and_a_read(redis: Redis, engine: AsyncEngine) -> None:
    scene = Scene(redis, engine)
    for order in merges(4, 2, 2):
        user = await scene.play(order, (reads, tells_unless_erased, erases))
        await scene.sweep()
        await scene.assert_true(user, order, [])  # the event was refused, or erased with the one before
