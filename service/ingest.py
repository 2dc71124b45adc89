"""Events into the log, and from there to the history cache.

    POST /events ─► waiting ─┐
    POST /events ─► waiting ─┴► one transaction: events + cache_outbox ─► commit ─► cache ─► answers
                                                                             └─► (later) outbox rows deleted

One transaction of a process is under way at a time, and the next takes all that came meanwhile: nobody waits for
company, and under load many requests share the price of a commit. Each of them is still all or nothing by itself.

An event is acknowledged after the commit. Its outbox row says "may not have reached the cache" and goes once
it has. A row that stays (the process died between commit and cache, Redis was down) is found by the sweep of
any worker, which drops the user's entry: the next read rebuilds it from the log.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from json.encoder import encode_basestring_ascii as quoted
from operator import attrgetter
from types import TracebackType
from typing import Any, Final, Literal, Self

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.bulkhead import Bulkhead
from service.commit import Identity, Log, Row, WriteFailed, writer_for
from service.history import HistoryStore, reading
from shared import times
from shared.database import EVERYBODY, LATE, cache_outbox, events, seconds_to_close
from shared.events import HistoryPolicy

log = logging.getLogger(__name__)

FLUSH_SECONDS: Final = 0.2
"""How often the outbox rows of events that reached the cache are deleted."""
SWEEP_SECONDS: Final = 1.0
OVERDUE: Final = 5 * times.SECOND
"""Age at which an outbox row is taken for one whose worker died or could not reach Redis."""
LAST_DROP: Final = 60 * times.SECOND
"""Age at which the entry of an erased user is dropped for the last time; see `service.erasure`."""
FRESH: Final = 2.0
"""Seconds after the beginning of a write in which its events may be added to an entry. Who sends them later stood still
meanwhile, and drops the entry: the user may have been erased."""
SWEEP_ROWS: Final = 1_000
ATTEMPTS: Final = 3
GROUP_EVENTS: Final = 2_000
"""Events in one transaction, unless one request alone has more."""
PATIENCE: Final = 10.0
"""Seconds after which a request that could not be written is told so."""


class EventConflict(Exception):  # noqa: N818 - says what it is
    """Events whose (user_id, event_id) stands for other content already; nothing was written."""

    def __init__(self, positions: list[int]) -> None:
        super().__init__(f"events at {positions} repeat an event_id with other content")
        self.positions = positions


class EventsErased(Exception):  # noqa: N818 - says what it is
    """Events from before their user was erased; nothing was written."""

    def __init__(self, positions: dict[int, int]) -> None:
        super().__init__(f"events at {list(positions)} are from before their user was erased")
        self.positions = positions  # position -> when the user was erased, epoch microseconds


class LogUnavailable(Exception):  # noqa: N818 - says what it is
    """The event log could not be written or read; nothing was acknowledged."""

    def __init__(self, reason: str, *, perhaps_written: bool = False) -> None:
        super().__init__(reason)
        self.perhaps_written = perhaps_written  # the answer to a commit was lost, or is still awaited


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event, its fields as they were sent."""

    event_id: str | None
    user_id: str
    item_id: str
    event_type: str
    value: float | None = None
    timestamp: int | None = None  # epoch microseconds
    recommendation_id: str | None = None
    session_id: str | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """What became of one event."""

    event_id: str
    status: Literal["accepted", "duplicate"]


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """A row of the log."""

    seq: int
    event_id: str
    user_id: str
    item_id: str
    event_type: str
    value: float | None
    timestamp: int  # epoch microseconds
    recommendation_id: str | None
    session_id: str | None


_SENT: Final = tuple(NewEvent.__dataclass_fields__)
_LOGGED: Final = tuple(events.c[name] for name in LoggedEvent.__dataclass_fields__)
_KEYS: Final = tuple(f'"{name}":' for name in sorted(_SENT))
_fields: Final = attrgetter(*sorted(_SENT))


def digest_of(event: NewEvent) -> str:
    """128 bits in hex over the fields as sent: a timestamp left out stays left out, so its retry is equal.

    The text hashed is the event's compact JSON with sorted keys, put together here in a quarter of json.dumps' time.
    """
    parts = [
        key + (quoted(value) if isinstance(value, str) else repr(value))
        for key, value in zip(_KEYS, _fields(event), strict=True)
        if value is not None
    ]
    return hashlib.blake2b(f"{{{','.join(parts)}}}".encode(), digest_size=16).hexdigest()


class _Request:
    """The events of one request on their way into the log."""

    def __init__(self, sent: Sequence[NewEvent], policy: HistoryPolicy, now: int) -> None:
        self.policy = policy
        self.batch = [_row(event, now) for event in sent]
        self.named = [event.event_id is not None for event in sent]
        self.done: asyncio.Future[list[Accepted]] = asyncio.get_running_loop().create_future()
        self.rows: dict[Identity, Row] = {}
        for row in self.batch:
            self.rows.setdefault(row.identity, row)
        # Two events of one id: this request will be refused, but the log decides which of the two is wrong.
        self.clashes = len(self.rows) < len(sent) and any(self.rows[r.identity].digest != r.digest for r in self.batch)

    def goes_with(self, rows: Mapping[Identity, Row]) -> bool:
        """Whether it can share a transaction with `rows`, so that none of them decides what becomes of the others."""
        if self.clashes:
            return not rows
        shared = self.rows.keys() & rows.keys()
        return all(self.rows[identity].digest == rows[identity].digest for identity in shared)

    def refusal(self, log: Log) -> EventsErased | EventConflict | None:
        """What the log has against it: events of a user erased since, or that it has with other content."""
        known = [log[row.identity] for row in self.batch]
        if erased := {at: one.erased for at, one in enumerate(known) if one.erased is not None}:
            return EventsErased(erased)
        if others := [at for at, one in enumerate(known) if one.digest != self.batch[at].digest]:
            return EventConflict(others)
        return None

    def outcome(self, log: Log, claimed: set[Identity]) -> list[Accepted]:
        """What became of each event. The first in a group to send a new one claims it; for others it is a duplicate."""
        found = []
        for row, named in zip(self.batch, self.named, strict=True):
            # An id that was given here can be in the log already only by a commit whose answer was lost.
            new = (log[row.identity].new or not named) and row.identity not in claimed
            claimed.add(row.identity)
            found.append(Accepted(row.event_id, "accepted" if new else "duplicate"))
        return found

    def fail(self, error: Exception) -> None:
        """Tell the caller, unless it has gone."""
        if not self.done.done():
            self.done.set_exception(error)


class _Refused(Exception):  # noqa: N818 - says what it is
    """Requests of a group that the log contradicts, each with the reason."""

    def __init__(self, requests: dict[_Request, EventsErased | EventConflict]) -> None:
        super().__init__(f"{len(requests)} requests")
        self.requests = requests


def _judge(group: Sequence[_Request], log: Log) -> None:
    """Raise _Refused if the log contradicts any of the group."""
    if all(known.new and known.erased is None for known in log.values()) and not any(
        request.clashes for request in group
    ):
        return
    refused = {request: reason for request in group if (reason := request.refusal(log)) is not None}
    if refused:
        raise _Refused(refused)


class EventLog:
    """The event log. As an async context manager it also keeps the outbox small and sweeps it."""

    def __init__(self, engine: AsyncEngine, histories: HistoryStore) -> None:
        self.engine, self.histories = engine, histories
        self._writer = writer_for(engine)
        self._bulkhead = Bulkhead()
        self._waiting: deque[_Request] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._reaching: set[asyncio.Task[None]] = set()  # groups on their way to the cache
        self._arrived: list[int] = []  # seqs of events that reached the cache
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        finishing = asyncio.create_task(self._finish())
        # Not by a timeout: what hangs in the database takes its time to be cancelled, too. Who waited for it was told
        # already, and its rows are swept later.
        await asyncio.wait({finishing}, timeout=seconds_to_close(self.engine))
        if finishing.done():
            finishing.result()
        else:
            finishing.cancel()
            log.warning("the event log does not answer, so what is under way is left to the sweep of the next start")

    async def _finish(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        while tasks := [task for task in (self._writing, *self._reaching) if task is not None]:
            await asyncio.wait(tasks)
        with suppress(LogUnavailable):  # the rows stay, and are swept later
            await self.flush()

    async def append(self, events: Sequence[NewEvent], policy: HistoryPolicy, now: int) -> list[Accepted]:
        """Commit all events or none, then bring them to the cache; what became of each, in order.

        `now` (epoch microseconds) is the time of events sent without one. Events without an id get one, and
        are new events whenever they are sent. Raises EventConflict and EventsErased: nothing was written; and
        LogUnavailable: nothing was, unless it says so.
        """
        if not events:
            return []
        with self._bulkhead.place(LogUnavailable):
            return await self._write(_Request(events, policy, now))

    async def _write(self, request: _Request) -> list[Accepted]:
        self._waiting.append(request)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_waiting())
        try:
            async with asyncio.timeout(PATIENCE):
                return await request.done
        except TimeoutError:
            begun = request not in self._waiting
            if not begun:
                self._waiting.remove(request)
            raise LogUnavailable("the event log does not answer", perhaps_written=begun) from None

    async def history(self, user_id: str, limit: int) -> list[LoggedEvent]:
        """The user's newest `limit` events, oldest first. Raises LogUnavailable."""
        order = (events.c.timestamp.desc(), events.c.seq.desc())
        query = select(*_LOGGED).where(events.c.user_id == user_id).order_by(*order).limit(limit)
        return [LoggedEvent(*row) for row in reversed(await self._found(query))]

    async def _found(self, query: Select[Any]) -> Sequence[Any]:
        async def ask(connection: AsyncConnection) -> Sequence[Any]:
            rows: Sequence[Any] = (await connection.execute(query)).all()
            return rows

        return await reading(self.engine, LogUnavailable, self.histories.failed, ask)

    async def settle(self) -> int:
        """Sweep the outbox once: drop the entries of users with overdue events; how many events that repaired.

        While Redis is down the rows stay. Raises LogUnavailable.
        """
        box = cache_outbox.c
        now = times.now()  # a row from the future was written before the clock was set back
        due = (box.written <= now - OVERDUE) & (box.seq >= LATE) | (box.written <= now - LAST_DROP)
        overdue = due | (box.written > now + OVERDUE)
        query = select(box.seq, box.user_id).where(overdue).order_by(box.seq).limit(SWEEP_ROWS)
        rows = await self._found(query)
        users = {row.user_id for row in rows}
        if EVERYBODY in users and not await self.histories.drop_all():
            return 0
        if not rows or not await self.histories.drop(users - {EVERYBODY}):
            return 0
        await self._delete([row.seq for row in rows])
        log.info("dropped cached histories that %d events had not reached", len(rows))
        return len(rows)

    async def flush(self) -> None:
        """Delete the outbox rows of all events that have reached the cache. Raises LogUnavailable."""
        arrived, self._arrived = self._arrived, []
        for start in range(0, len(arrived), SWEEP_ROWS):
            await self._delete(arrived[start : start + SWEEP_ROWS])

    async def _delete(self, seqs: Sequence[int]) -> None:
        try:
            await self._writer.forget(seqs)
        except WriteFailed as error:
            self.histories.failed("database")
            raise LogUnavailable(str(error)) from error

    async def _run(self) -> None:
        """Flush and sweep until cancelled; what fails is tried again, for its rows are still there."""
        loop = asyncio.get_running_loop()
        sweep_at = loop.time()
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await self.histories.drop_dirty()
                await self.flush()
                if loop.time() >= sweep_at:
                    sweep_at = loop.time() + SWEEP_SECONDS
                    while await self.settle() == SWEEP_ROWS:
                        pass  # there may be more: of all that was written while Redis was down, say
            except LogUnavailable as error:
                log.warning("the outbox cannot be swept now: %s", error)
            except Exception:  # the task must outlive whatever this is
                log.exception("the outbox could not be swept")

    async def _write_waiting(self) -> None:
        try:
            while self._waiting:
                await self._write_group(self._next_group())
        finally:
            self._writing = None

    def _next_group(self) -> list[_Request]:
        """Take the requests, in the order they came, that one transaction can hold."""
        group: list[_Request] = []
        rows: dict[Identity, Row] = {}
        while self._waiting:
            request = self._waiting[0]
            full = group and len(rows) + len(request.rows) > GROUP_EVENTS
            if full or not request.goes_with(rows):
                break
            group.append(self._waiting.popleft())
            rows |= request.rows
            if request.clashes:
                break
        return group

    async def _write_group(self, group: Sequence[_Request], attempt: int = 1, *, perhaps: bool = False) -> None:
        """Commit the group and tell each request what became of it; `perhaps` an attempt before this one did."""
        rows = {identity: row for request in group for identity, row in request.rows.items()}
        until = asyncio.get_running_loop().time() + FRESH
        try:
            found = await self._writer.write(list(rows.values()), partial(_judge, group))
        except _Refused as refused:
            for request, reason in refused.requests.items():
                request.fail(reason)
            if rest := [request for request in group if request not in refused.requests]:
                await self._write_group(rest, attempt, perhaps=perhaps)
        except WriteFailed as error:
            perhaps |= error.perhaps_written
            if error.passing and attempt < ATTEMPTS:
                await self._write_group(group, attempt + 1, perhaps=perhaps)
                return
            self.histories.failed("database")
            if perhaps:  # what stands in the cache may lack what stands in the log
                await self.histories.drop(user_id for user_id, _ in rows)
            for request in group:
                request.fail(LogUnavailable(str(error), perhaps_written=perhaps))
        except Exception as error:
            for request in group:  # whoever is at fault, it is not all of them
                if len(group) > 1:
                    await self._write_group([request])
                else:
                    request.fail(error)
        else:
            task = asyncio.create_task(self._reach_cache(group, found, until))
            self._reaching.add(task)
            task.add_done_callback(self._reaching.discard)

    async def _reach_cache(self, group: Sequence[_Request], found: Log, until: float) -> None:
        """Bring a committed group to the cache, duplicates too: their first try may have died before that."""
        try:
            policies = dict.fromkeys(request.policy for request in group)
            stored = [known.event for known in found.values()]
            # Two of them where a bundle brought another just now: the entries of the first are dropped then.
            reached = [await self.histories.appended(stored, policy, until) for policy in policies]
        except Exception as error:
            for request in group:
                request.fail(error)
            return
        if all(reached):
            self._arrived.extend(event.seq for event in stored)
        claimed: set[Identity] = set()
        for request in group:
            outcome = request.outcome(found, claimed)
            if not request.done.done():
                request.done.set_result(outcome)


def _row(event: NewEvent, now: int) -> Row:
    """The event as a row of the log, but for its number."""
    return Row(
        event.event_id or uuid.uuid4().hex,
        event.user_id,
        event.item_id,
        event.event_type,
        event.value,
        now if event.timestamp is None else event.timestamp,
        event.recommendation_id,
        event.session_id,
        digest_of(event),
    )
