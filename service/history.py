"""A user's history at the moment of a request: from Redis when it is there, else from the log.

The log (SQL) is the truth; Redis holds entries that can be rebuilt from it at any time.

    key    upnext:<epoch>:{<user_id>}          a hash, complete or absent; see `redis_line` for the epoch
    m      policy fingerprint, newest event's time, place of the newest sequence event
    w      window: the newest 256 sequence events, 24 bytes each: time, seq * 2 + seen, item key;
           little-endian, sorted by (time, seq)
    s      keys of seen items beyond those marked in the window: older ones, and those of events
           that mark an item as seen without feeding the sequence
    t      instead of the three: a marker. Somebody reads the log to complete this entry.

What keeps an entry right:

- `appended` runs after the commit and changes existing entries only. Where it meets a marker it deletes it.
- A rebuild puts its marker first, reads SQL second, and writes third, only if its marker still stands. So an
  event is either in what SQL returned, or its `appended` met the marker, or it met the finished entry.
- The epoch names one life of one master, so nobody asks for entries that a restarted server loads from an old dump, or
  that a failover brings.
- An event that did not reach Redis leaves its row in the outbox (`service.ingest`), and this process
  does not read the user's entry before it has dropped it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sqlite3
import struct
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final, Literal, TypeVar

import numpy as np
from redis.asyncio import Redis
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service import patience, redis_line
from service.bulkhead import Bulkhead
from service.log_reader import reader_for
from service.redis_cluster import ClusterLines, RedisCluster
from service.redis_line import Command, Failed, Greeting, RedisDown, RedisLine, script
from shared.events import Events, HistoryPolicy, IntArray, KeyArray, history_of, item_key, item_keys
from shared.times import BEGINNING

log = logging.getLogger(__name__)

T = TypeVar("T")

WINDOW: Final = 256
"""Sequence events in a cached entry: more than any model's T."""
MARKER_MILLISECONDS: Final = 2_000
"""How long a rebuild keeps others from rebuilding; a slower one is not written."""
READ_SECONDS: Final = 2.0
"""A database that takes longer to be read is taken for one that does not answer."""
READERS: Final = 6
"""Histories that a worker reads from the log at a time: when all of the cache is gone, other work still has room."""
MAX_DIRTY: Final = 100_000
"""Users known by name whose entries may lack an event; when there are more, all entries of all users are dropped."""
DROPPED: Final = 256
"""Entries that are dropped at a time: a Redis that is away is found out by the first few."""

_META: Final = struct.Struct("<8sqqq")  # fingerprint, newest, time and seq of the newest sequence event
_RECORD: Final = np.dtype([("timestamp", "<i8"), ("tag", "<i8"), ("key", "<u8")])
_PACK: Final = struct.Struct("<qqQ")

# Numbers in Lua are doubles: times and sequence numbers stay below 2^53, item keys are moved as bytes.
APPEND: Final = """
-- Bring events to a complete entry of this policy; drop anything else that is there.
-- ARGV: fingerprint, window, ttl (s), collapse (0/1), newest, records sorted by (time, seq), one digit a record: feeds
local found = redis.call('HMGET', KEYS[1], 'm', 'w', 's')
if not found[1] or string.sub(found[1], 1, 8) ~= ARGV[1] then
  redis.call('DEL', KEYS[1])
  return 0
end
local _, newest, last_time, last_seq = struct.unpack('<c8i8i8i8', found[1])
local w, s = found[2] or '', found[3] or ''
local records, feeds, room = ARGV[6], ARGV[7], tonumber(ARGV[2]) * 24

local function mark(key)
  local from = 1
  while true do
    local at = string.find(s, key, from, true)
    if not at then s = s .. key return end
    if at % 8 == 1 then return end
    from = at + 1
  end
end

local function add(record, at)  -- behind the first `at` bytes of the window
  w = string.sub(w, 1, at) .. record .. string.sub(w, at + 1)
  if #w > room then
    if string.byte(w, 9) % 2 == 1 then mark(string.sub(w, 17, 24)) end
    w = string.sub(w, 25)
  end
end

for i = 1, #feeds do
  local record = string.sub(records, i * 24 - 23, i * 24)
  local key = string.sub(record, 17, 24)
  local time, tag = struct.unpack('<i8i8', record)
  local seq = math.floor(tag / 2)
  if string.byte(feeds, i) == 48 then
    mark(key)
  elseif ARGV[4] == '1' then
    -- The window holds the first of each run of repeats, so only what comes at the end can be added.
    if time > last_time or (time == last_time and seq > last_seq) then
      if string.sub(w, -8) ~= key then add(record, #w) elseif tag % 2 == 1 then mark(key) end
    elseif seq ~= last_seq then
      redis.call('DEL', KEYS[1])
      return 0
    end
  else
    local at, there = #w, false
    while at > 0 do
      local t, g = struct.unpack('<i8i8', w, at - 23)
      local q = math.floor(g / 2)
      there = q == seq
      if there or t < time or (t == time and q < seq) then break end
      at = at - 24
    end
    if not there then add(record, at) end
  end
  if string.byte(feeds, i) == 49 and (time > last_time or (time == last_time and seq > last_seq)) then
    last_time, last_seq = time, seq
  end
end
newest = math.max(newest, tonumber(ARGV[5]))
redis.call('HSET', KEYS[1], 'm', struct.pack('<c8i8i8i8', ARGV[1], newest, last_time, last_seq), 'w', w, 's', s)
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""

CLAIM: Final = """
-- Put a marker where there is neither one already nor a complete entry of this policy.
-- ARGV: fingerprint, token, life of the marker (ms). Returns whose marker stands, '' for nobody's.
local found = redis.call('HMGET', KEYS[1], 'm', 't')
if found[2] then return found[2] end
if found[1] and string.sub(found[1], 1, 8) == ARGV[1] then return '' end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 't', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return ARGV[2]
"""

COMPLETE: Final = """
-- Turn my marker into the complete entry. ARGV: token, m, w, s, ttl (s)
if redis.call('HGET', KEYS[1], 't') ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'm', ARGV[2], 'w', ARGV[3], 's', ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[5])
return 1
"""

SCRIPTS: Final = (APPEND, CLAIM, COMPLETE)


class HistoryUnavailable(Exception):  # noqa: N818 - says what it is
    """Neither Redis nor SQL could be read."""


@contextmanager
def database_failures_as(error: type[Exception], failed: Failed) -> Iterator[None]:
    """Turn a database that cannot serve now (unreachable, locked, full) into `error`; mistakes in a statement stay."""
    try:
        yield
    except (IntegrityError, ProgrammingError, DataError):
        raise
    except (DBAPIError, PoolTimeoutError, OSError, sqlite3.Error) as cause:
        failed("database")
        raise error(f"{type(cause).__name__}: {cause}".splitlines()[0]) from cause


async def reading(
    engine: AsyncEngine, error: type[Exception], failed: Failed, act: Callable[[AsyncConnection], Awaitable[T]]
) -> T:
    """What `act` returns for a connection to read by, within READ_SECONDS. Failures and slowness become `error`."""
    with database_failures_as(error, failed):
        return await patience.with_connection(engine, READ_SECONDS, act)


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """What the cache needs to know of an event in the log."""

    seq: int
    user_id: str
    item_id: str
    event_type: str
    value: float | None
    timestamp: int  # epoch microseconds


@dataclass(frozen=True, slots=True)
class UserHistory:
    """A user's history under a policy."""

    items: KeyArray  # (L,) item keys of the sequence, oldest first; the newest WINDOW at least
    timestamps: IntArray  # (L,) epoch microseconds
    seen: KeyArray  # (S,) distinct keys of all seen items of the whole history, sorted
    newest: int | None  # time of the newest event that the policy names; None without any
    source: Literal["cache", "log"]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a cache entry says, wherever it was read."""

    newest: int  # BEGINNING without any
    last: tuple[int, int]  # (time, seq) of the newest event that feeds the sequence, collapsed or not
    window: np.ndarray[Any, Any]  # (L,) of _RECORD
    others: KeyArray  # seen items that the window does not mark

    @classmethod
    def decode(cls, meta: bytes, window: bytes | None, others: bytes | None) -> _Entry:
        _, newest, last_time, last_seq = _META.unpack(meta)
        records = np.frombuffer(window or b"", _RECORD)
        return cls(newest, (last_time, last_seq), records, np.frombuffer(others or b"", "<u8"))

    def encode(self, fingerprint: bytes) -> tuple[bytes, bytes, bytes]:
        """The fields m, w and s."""
        return _META.pack(fingerprint, self.newest, *self.last), self.window.tobytes(), self.others.tobytes()

    def history(self, source: Literal["cache", "log"]) -> UserHistory:
        keys = np.ascontiguousarray(self.window["key"])
        seen = np.sort(np.concatenate((keys[self.window["tag"] & 1 == 1], self.others)))
        seen = seen[np.append(True, seen[1:] != seen[:-1])] if len(seen) else seen  # a tenth of np.unique's time
        newest = None if self.newest == BEGINNING else self.newest
        return UserHistory(keys, np.ascontiguousarray(self.window["timestamp"]), seen, newest, source)


def create_redis(url: str, *, timeout: float = 0.05) -> Redis:
    """A client for `HistoryStore`; see `service.redis_line.create_redis`."""
    return redis_line.create_redis(url, Greeting(SCRIPTS), timeout=timeout)


def create_cluster(url: str, *, timeout: float = 0.05) -> RedisCluster:
    """Clients for `HistoryStore`: `redis+cluster://host:port,host:port`, `rediss+cluster://`. Raises ValueError."""
    return RedisCluster(url, SCRIPTS, timeout=timeout)


@lru_cache(maxsize=16)
def _fingerprint(policy: HistoryPolicy) -> bytes:
    return policy.fingerprint().encode()


# --- the store ----------------------------------------------------------------------------------------


class HistoryStore:
    """Histories from Redis, completed from the log. `redis` must come from `create_redis` or `create_cluster`.

    `ttl` and `empty_ttl` (seconds) are the lives of an entry since its last event, and of the entry of a user
    without events. `failed` is told of each call to Redis or the database that failed.
    """

    def __init__(
        self,
        redis: Redis | RedisCluster,
        engine: AsyncEngine,
        *,
        ttl: int = 7 * 86_400,
        empty_ttl: int = 60,
        window: int = WINDOW,
        failed: Failed = lambda _: None,
    ) -> None:
        self.redis, self.engine, self.ttl, self.empty_ttl, self.window = redis, engine, ttl, empty_ttl, window
        self.failed = failed
        self._line = RedisLine(redis, failed) if isinstance(redis, Redis) else ClusterLines(redis, failed)
        self._log, self._readers, self._bulkhead = reader_for(engine), asyncio.Semaphore(READERS), Bulkhead()
        self._rebuilds: dict[bytes, asyncio.Task[_Entry]] = {}  # by marker
        # Users whose entry may lack an event that was acknowledged here, and the number of the last such event.
        self._dirty: dict[str, int] = {}
        self._lost = 0
        self._all_dirty: int | None = None  # the same for any user: there were too many to know them all

    async def read(self, user_id: str, policy: HistoryPolicy, as_of: int | None = None) -> UserHistory:
        """The user's history; with `as_of` (epoch microseconds), of events with timestamp <= as_of.

        Raises HistoryUnavailable when neither Redis nor SQL can be read.
        """
        source: Literal["cache", "log"] = "cache"
        try:
            entry, marker = await self._cached(user_id, policy)
        except RedisDown:
            return (await self._waited(partial(self._logged, user_id, policy, as_of))).history("log")
        if entry is None:
            entry, source = await self._waited(partial(self._rebuilt, user_id, policy, marker)), "log"
        if as_of is not None and as_of < entry.newest:
            entry, source = await self._waited(partial(self._logged, user_id, policy, as_of)), "log"
        return entry.history(source)

    async def appended(self, events: Sequence[StoredEvent], policy: HistoryPolicy, until: float | None = None) -> bool:
        """Bring committed events to the entries that exist; True if Redis took all of it. Never raises for Redis.

        May be called again with the same events, and with users in any order. What is sent after `until`, on the event
        loop's clock, drops the entries instead: meanwhile the events may have been erased.
        """
        by_user: dict[str, list[StoredEvent]] = {}
        for event in events:
            by_user.setdefault(event.user_id, []).append(event)
        dirty = [user_id for user_id in by_user if user_id in self._dirty]
        clean = [(user_id, rows) for user_id, rows in by_user.items() if user_id not in dirty]
        commands = [self._append(user_id, rows, policy)._replace(until=until) for user_id, rows in clean]
        return await self._change(by_user, commands, drop=dirty)

    async def read_whole(self, user_id: str, policy: HistoryPolicy, as_of: int | None = None) -> UserHistory:
        """Like `read`, from the log and with the whole sequence. Raises HistoryUnavailable."""
        return (await self._waited(partial(self._logged, user_id, policy, as_of, whole=True))).history("log")

    async def _waited(self, reading: Callable[[], Awaitable[_Entry]]) -> _Entry:
        """What the log is read for, as one of those who wait for it."""
        with self._bulkhead.place(HistoryUnavailable):
            return await reading()

    async def drop_dirty(self) -> None:
        """Drop the entries that may lack an event acknowledged here, so that other workers do not read them either."""
        if (lost := self._all_dirty) is not None:
            if not (await self.ping() and await self.drop_all()):
                return
            if self._all_dirty == lost:
                self._all_dirty = None
        users = list(self._dirty)
        for start in range(0, len(users), DROPPED):
            if not await self.drop(users[start : start + DROPPED]):
                return

    async def drop(self, user_ids: Iterable[str]) -> bool:
        """Drop entries, so that the next reads rebuild them; True if Redis took all of it."""
        users = list(dict.fromkeys(user_ids))
        return await self._change(users, [], drop=users)

    async def drop_all(self) -> bool:
        """Drop all entries of all users, whatever their epoch: the log was replaced. True if Redis took all of it."""
        try:
            await self._line.drop_all()
        except RedisDown as error:
            log.warning("the cached histories cannot be dropped now: %s", error)
            return False
        return True

    async def ping(self) -> bool:
        """Whether Redis is usable right now."""
        try:
            await self._line.ping()
        except RedisDown:
            return False
        return True

    async def _change(self, users: Iterable[str], commands: Sequence[Command], drop: Iterable[str]) -> bool:
        """Run `commands`, and drop the entries of `drop`; unless all of it is known to have run, `users` are dirty."""
        marks = {user_id: self._dirty.get(user_id) for user_id in drop}
        try:
            await self._line.ask([*commands, *(Command(user_id, ("DEL",)) for user_id in marks)])
        except BaseException as error:
            self._lost += 1
            for user_id in users:
                self._dirty.pop(user_id, None)  # to the end of the line
                self._dirty[user_id] = self._lost
            if len(self._dirty) > MAX_DIRTY:
                self._dirty, self._all_dirty = {}, self._lost
            if isinstance(error, RedisDown):
                return False
            raise
        for user_id, mark in marks.items():
            if self._dirty.get(user_id) == mark:  # an event that was lost after this drop had been sent needs another
                self._dirty.pop(user_id, None)
        return True

    def _append(self, user_id: str, rows: Iterable[StoredEvent], policy: HistoryPolicy) -> Command:
        """One script call. A user whose events touch nothing gets one too: it drops an entry of another policy."""
        newest, records, feeds = BEGINNING, [], []
        for event in sorted(rows, key=lambda e: (e.timestamp, e.seq)):
            if policy.names(event.event_type):
                newest = max(newest, event.timestamp)
            feeding, seen = policy.feeds(event.event_type, event.value), policy.marks_seen(event.event_type)
            if feeding or seen:
                records.append(_PACK.pack(event.timestamp, event.seq * 2 + seen, item_key(event.item_id)))
                feeds.append("1" if feeding else "0")
        how = (_fingerprint(policy), self.window, self.ttl, int(policy.collapse_repeats))
        return script(APPEND, user_id, *how, newest, b"".join(records), "".join(feeds))

    async def _cached(self, user_id: str, policy: HistoryPolicy) -> tuple[_Entry | None, bytes | None]:
        """The complete entry of this policy, else the marker that stands there. Raises RedisDown."""
        if self._all_dirty is not None or (user_id in self._dirty and not await self.drop([user_id])):
            raise RedisDown("the entry may lack an event")
        [(meta, window, others, marker)] = await self._line.ask([Command(user_id, ("HMGET",), ("m", "w", "s", "t"))])
        if meta is None or not meta.startswith(_fingerprint(policy)):
            return None, marker
        return _Entry.decode(meta, window, others), None

    async def _rebuilt(self, user_id: str, policy: HistoryPolicy, marker: bytes | None) -> _Entry:
        """Read the log, and complete the entry unless somebody else is at it.

        Reads of one user share a rebuild of this process. Joining one is right only while its marker stands: an
        event acknowledged before this read began, after that rebuild's look into SQL, has taken the marker away.
        """
        if marker is not None and (marker not in self._rebuilds or not marker.startswith(_fingerprint(policy))):
            return await self._logged(user_id, policy)
        if marker is None:
            marker = _fingerprint(policy) + secrets.token_bytes(8)
            task = self._rebuilds[marker] = asyncio.create_task(self._rebuild(user_id, policy, marker))
            task.add_done_callback(self._ended(marker))
        return await asyncio.shield(self._rebuilds[marker])  # one reader that goes away must not end it for all

    def _ended(self, marker: bytes) -> Callable[[asyncio.Task[_Entry]], object]:
        def end(task: asyncio.Task[_Entry]) -> None:
            del self._rebuilds[marker]
            if not task.cancelled():
                task.exception()  # all readers may have gone: nobody else would look at it

        return end

    async def _rebuild(self, user_id: str, policy: HistoryPolicy, mine: bytes) -> _Entry:
        fingerprint, holder = _fingerprint(policy), b""
        with suppress(RedisDown):
            claim = script(CLAIM, user_id, fingerprint, mine, MARKER_MILLISECONDS)
            # Arriving late a second time, it would put back the marker that an event has taken away in between.
            [holder] = await self._line.ask([claim._replace(once=True)])
        if holder not in (mine, b""):
            return await self._rebuilt(user_id, policy, holder)
        entry = await self._logged(user_id, policy)
        if holder == mine:
            ttl = self.empty_ttl if entry.newest == BEGINNING else self.ttl
            with suppress(RedisDown):
                await self._line.ask([script(COMPLETE, user_id, mine, *entry.encode(fingerprint), ttl)])
        return entry

    async def _logged(
        self, user_id: str, policy: HistoryPolicy, as_of: int | None = None, *, whole: bool = False
    ) -> _Entry:
        """The entry as the log has it now. Raises HistoryUnavailable."""
        with database_failures_as(HistoryUnavailable, self.failed):
            async with asyncio.timeout(READ_SECONDS):
                rows = await patience.detached(self._rows(user_id, as_of))
        return _entry_of(rows, policy, len(rows) if whole else self.window)

    async def _rows(self, user_id: str, as_of: int | None) -> Sequence[Sequence[Any]]:
        async with self._readers:
            return await self._log.rows(user_id, as_of)


def _entry_of(rows: Sequence[Any], policy: HistoryPolicy, window: int) -> _Entry:
    """The entry for one user's rows as `LogReader` has them."""
    seq, item_id, event_type, value, timestamp = zip(*rows, strict=True) if rows else ((),) * 5
    kinds = tuple(dict.fromkeys(event_type))
    number = {kind: n for n, kind in enumerate(kinds)}
    E = len(rows)
    history = history_of(
        Events(
            user=np.zeros(E, np.int64),
            item=item_keys(item_id),
            kind=np.fromiter((number[kind] for kind in event_type), np.int64, E),
            kinds=kinds,
            value=np.array(value, np.float64),  # None becomes nan
            timestamp=np.array(timestamp, np.int64),
        ),
        policy,
    )
    feeding = np.flatnonzero(history.feeds)  # (L,)
    feeding = feeding[max(len(feeding) - window, 0) :]
    records = np.empty(len(feeding), _RECORD)
    records["timestamp"] = history.timestamp[feeding]
    records["tag"] = np.array(seq, np.int64)[feeding] * 2 + history.seen[feeding]
    records["key"] = history.item[feeding]
    others = np.setdiff1d(history.item[history.seen], records["key"][records["tag"] & 1 == 1]).astype(np.uint64)
    named = (t for t, kind in zip(reversed(timestamp), reversed(event_type), strict=True) if policy.names(kind))
    newest = zip(reversed(timestamp), reversed(seq), reversed(event_type), reversed(value), strict=True)
    last = next(((t, s) for t, s, kind, v in newest if policy.feeds(kind, v)), (BEGINNING, 0))
    return _Entry(next(named, BEGINNING), last, records, others)
