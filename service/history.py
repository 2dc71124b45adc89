"""A user's history at the moment of a request: from Redis when it is there, else from the log.

The log (SQL) is the truth; Redis holds entries that can be rebuilt from it at any time.

    key    upnext:<epoch>:{<user_id>}          a hash, complete or absent
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
- The epoch names one life of one master. It is learnt in the greeting of each connection and used on
  that connection alone; a command tried again on another is named anew. So entries that a restarted server
  loads from an old dump, or that a failover brings, have names that nobody asks for.
- An event that did not reach Redis leaves its row in the outbox (`service.ingest`), and this process
  does not read the user's entry before it has dropped it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from hiredis import pack_command
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError
from sqlalchemy import select
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from shared.database import events
from shared.events import Events, HistoryPolicy, IntArray, KeyArray, history_of, item_key, item_keys
from shared.times import BEGINNING

log = logging.getLogger(__name__)

WINDOW: Final = 256
"""Sequence events in a cached entry: more than any model's T."""
MARKER_MILLISECONDS: Final = 2_000
"""How long a rebuild keeps others from rebuilding; a slower one is not written."""
PAUSE: Final = 0.25
"""Seconds without a try after Redis failed: a dead Redis must not cost each request its timeout."""
GREETING_SECONDS: Final = 1.0
"""An open connection is asked this often whether it still leads to the master it was greeted by."""
EXCHANGE: Final = 256
"""Commands in one exchange with Redis."""
READ_SECONDS: Final = 2.0
"""A database that takes longer to be read is taken for one that does not answer."""
READERS: Final = 6
"""Histories that a worker reads from the log at a time: when all of the cache is gone, other work still has room."""
COMMANDS: Final = 64
"""An exchange may take the client's timeout once more for each so many commands."""
LATE: Final = 0.01
"""Seconds by which a timer may be late before the event loop counts as held up."""
MAX_DIRTY: Final = 100_000

_META: Final = struct.Struct("<8sqqq")  # fingerprint, newest, time and seq of the newest sequence event
_RECORD: Final = np.dtype([("timestamp", "<i8"), ("tag", "<i8"), ("key", "<u8")])
_PACK: Final = struct.Struct("<qqQ")
_EPOCH: Final = "upnext_epoch"
_GREETED: Final = "upnext_greeted"
_WHO: Final = (("INFO", "server"), ("INFO", "replication"))

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

_SHA: Final = {
    text: hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest() for text in (APPEND, CLAIM, COMPLETE)
}


Failed = Callable[[Literal["redis", "database"]], object]


class HistoryUnavailable(Exception):  # noqa: N818 - says what it is
    """Neither Redis nor SQL could be read."""


class _RedisDown(Exception):  # noqa: N818 - says what it is
    """No usable answer from Redis."""


@contextmanager
def database_failures_as(error: type[Exception]) -> Iterator[None]:
    """Turn a database that cannot serve now (unreachable, locked, full) into `error`; mistakes in a statement stay."""
    try:
        yield
    except (IntegrityError, ProgrammingError, DataError):
        raise
    except (DBAPIError, PoolTimeoutError, OSError) as cause:
        raise error(f"{type(cause).__name__}: {cause}".splitlines()[0]) from cause


@asynccontextmanager
async def reading(
    engine: AsyncEngine, error: type[Exception], turn: AbstractAsyncContextManager[Any] | None = None
) -> AsyncIterator[AsyncConnection]:
    """A connection to read by, once it is our `turn`, for READ_SECONDS in all. Failures and slowness become `error`."""
    with database_failures_as(error):
        async with asyncio.timeout(READ_SECONDS), turn or nullcontext(), engine.connect() as connection:
            yield connection


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


class _Command(NamedTuple):
    """A command on one user's entry; the key goes between the two parts."""

    user_id: str
    before: tuple[str | int, ...]
    after: tuple[str | int | bytes, ...] = ()


def _script(text: str, user_id: str, *arguments: str | int | bytes) -> _Command:
    return _Command(user_id, ("EVALSHA", _SHA[text], 1), arguments)


@lru_cache(maxsize=16)
def _fingerprint(policy: HistoryPolicy) -> bytes:
    return policy.fingerprint().encode()


# --- the connection -----------------------------------------------------------------------------------


def create_redis(url: str, *, timeout: float = 0.05) -> Redis:
    """A client for `HistoryStore`: `redis://`, `rediss://` or `unix://`. Connects on first use.

    It gives up after `timeout` seconds without an answer and 250 ms without a connection, and retries nothing by
    itself: a command made for one server must not reach another. Raises ValueError for another kind of URL.
    """
    return Redis.from_url(
        url,
        socket_timeout=timeout,
        socket_connect_timeout=0.25,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        driver_info=None,
        client_name="upnext-history",
        redis_connect_func=_greet,
    )


async def _greet(connection: AbstractConnection) -> None:
    """Set up a fresh connection: log in, learn the epoch, load the scripts."""
    await connection.on_connect()
    scripts = [("SCRIPT", "LOAD", text) for text in _SHA]
    server, replication, *loaded = await _talk(connection, [*_WHO, *scripts])
    if errors := [reply for reply in loaded if isinstance(reply, ResponseError)]:
        raise errors[0]
    setattr(connection, _EPOCH, _epoch(server, replication))
    setattr(connection, _GREETED, asyncio.get_running_loop().time())


def _epoch(server: bytes | ResponseError, replication: bytes | ResponseError) -> str:
    """Eight hex digits for this life of this master, from the replies to INFO.

    The run id changes with each start of the process; the replication id also when a replica becomes master,
    so a master that comes back after two failovers does not find the entries of its first reign.
    Raises redis-py's ConnectionError for a server that is no master or does not say who it is.
    """
    if isinstance(server, ResponseError) or isinstance(replication, ResponseError):
        raise RedisConnectionError(f"the Redis server does not answer INFO: {server!r}")
    lines = (line.split(b":", 1) for line in (server + b"\n" + replication).splitlines() if b":" in line)
    facts = {name: value.strip() for name, value in lines}
    life = facts.get(b"run_id", b"") + facts.get(b"master_replid", b"")
    if facts.get(b"role") != b"master" or not life:
        raise RedisConnectionError(f"the Redis server is {facts.get(b'role', b'?').decode()}, not a master with an id")
    return hashlib.blake2b(life, digest_size=4).hexdigest()


async def _talk(connection: AbstractConnection, commands: Sequence[tuple[str | int | bytes, ...]]) -> list[Any]:
    """Send all commands at once and read all replies. Error replies are raised after the last was read."""
    # hiredis packs in C: redis-py's asyncio side does it in Python, for a fifth of the time that events take.
    packed = [pack_command(command) for command in commands]  # type: ignore[arg-type]
    await connection.send_packed_command(b"".join(packed), check_health=False)
    replies: list[Any] = []
    for _ in commands:
        try:
            replies.append(await connection.read_response())
        except ResponseError as error:
            replies.append(error)
    if stale := [reply for reply in replies if isinstance(reply, NoScriptError | ReadOnlyError)]:
        raise stale[0]  # the connection leads to another server than it did, or to a changed one
    return replies


@asynccontextmanager
async def _one_limit(connection: AbstractConnection, commands: int) -> AsyncIterator[None]:
    """One limit of time for an exchange: redis-py has one for each reply, and makes a task for each writing.

    A loop that is late runs its timers before it looks at its sockets, where the replies may lie for long: then it is
    not Redis that is slow, and the limit counts anew, once.
    """
    limit, loop = connection.socket_timeout, asyncio.get_running_loop()
    assert limit is not None  # noqa: S101 - by create_redis
    seconds = limit * (1 + commands // COMMANDS)
    connection.socket_timeout = None
    try:
        async with asyncio.timeout(None) as until:
            due = loop.time() + seconds

            def expire() -> None:
                now = loop.time()
                until.reschedule(now + seconds if now > due + LATE else now)

            timer = loop.call_at(due, expire)
            try:
                yield
            finally:
                timer.cancel()
    finally:
        connection.socket_timeout = limit


class _Line:
    """All commands of a process to Redis, one exchange at a time; what waits meanwhile goes together in the next.

    A caller that is cancelled leaves its reply unread by itself alone: nobody else's reply moves. A connection
    on which anything but complete replies happened is closed.
    """

    def __init__(self, redis: Redis, failed: Failed) -> None:
        self.redis = redis
        self.tell = failed
        self.waiting: list[tuple[_Command, asyncio.Future[Any]]] = []
        self.running: asyncio.Task[None] | None = None
        self.failed = False
        self.paused_until = 0.0

    async def ask(self, commands: Sequence[_Command]) -> list[Any]:
        """The replies, in order. Raises _RedisDown when Redis did not take all commands."""
        loop = asyncio.get_running_loop()
        if self.failed and (self.running is not None or loop.time() < self.paused_until):
            raise _RedisDown("Redis failed a moment ago")  # after a failure one caller at a time tries again
        futures: list[asyncio.Future[Any]] = [loop.create_future() for _ in commands]
        self.waiting.extend(zip(commands, futures, strict=True))
        if self.running is None:
            self.running = asyncio.create_task(self._run())
        replies = await asyncio.gather(*futures) if len(futures) > 1 else [await futures[0]] if futures else []
        if errors := [reply for reply in replies if isinstance(reply, Exception)]:
            raise _RedisDown(str(errors[0])) from errors[0]
        return replies

    async def _run(self) -> None:
        try:
            while self.waiting:
                batch, self.waiting = self.waiting[:EXCHANGE], self.waiting[EXCHANGE:]
                await self._serve(batch)
        finally:
            self.running = None
            for _, future in self.waiting:  # only after a cancellation from outside, when the loop ends
                future.cancel()
            self.waiting = []

    async def _serve(self, batch: Sequence[tuple[_Command, asyncio.Future[Any]]]) -> None:
        try:
            commands = [command for command, _ in batch]
            try:
                replies: Sequence[Any] = await self._exchange(commands)
            except (RedisConnectionError, NoScriptError, ReadOnlyError):
                # The pool's socket led to a server that is gone or changed. All commands may run twice, and
                # are named anew for the server that the next connection finds.
                replies = await self._exchange(commands)
            self.failed = False
        except Exception as error:  # whatever it was: the log can answer instead
            self.tell("redis")
            if not self.failed:
                log.warning("Redis cannot be used, histories come from the log: %s: %s", type(error).__name__, error)
            self.failed = True
            self.paused_until = asyncio.get_running_loop().time() + PAUSE
            batch, self.waiting = [*batch, *self.waiting], []  # none of them shall wait for another failure
            replies = [error] * len(batch)
        except BaseException:
            for _, future in batch:
                future.cancel()
            raise
        for (_, future), reply in zip(batch, replies, strict=True):
            if not future.done():
                future.set_result(reply)

    async def _exchange(self, commands: Sequence[_Command]) -> list[Any]:
        pool = self.redis.connection_pool
        connection: AbstractConnection = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            epoch = getattr(connection, _EPOCH)
            packed = [(*c.before, f"upnext:{epoch}:{{{c.user_id}}}", *c.after) for c in commands]
            now = asyncio.get_running_loop().time()
            async with _one_limit(connection, len(packed)):
                if now - getattr(connection, _GREETED) < GREETING_SECONDS:
                    return await _talk(connection, packed)
                server, replication, *replies = await _talk(connection, [*_WHO, *packed])
            if _epoch(server, replication) != epoch:
                raise RedisConnectionError("the Redis server is another master than it was")
            setattr(connection, _GREETED, now)
            return replies
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)


# --- the store ----------------------------------------------------------------------------------------


class HistoryStore:
    """Histories from Redis, completed from the log. `redis` must come from `create_redis`.

    `ttl` and `empty_ttl` (seconds) are the lives of an entry since its last event, and of the entry of a user
    without events. `failed` is told of each call to Redis or the database that failed.
    """

    def __init__(
        self,
        redis: Redis,
        engine: AsyncEngine,
        *,
        ttl: int = 7 * 86_400,
        empty_ttl: int = 60,
        window: int = WINDOW,
        failed: Failed = lambda _: None,
    ) -> None:
        if redis.connection_pool.connection_kwargs.get("redis_connect_func") is not _greet:
            raise ValueError("the Redis client of a HistoryStore must come from create_redis")
        self.engine, self.ttl, self.empty_ttl, self.window = engine, ttl, empty_ttl, window
        self.failed = failed
        self._line = _Line(redis, failed)
        self._readers = asyncio.Semaphore(READERS)
        self._rebuilds: dict[bytes, asyncio.Task[_Entry]] = {}  # by marker
        self._dirty: dict[str, None] = {}  # users whose entry may lack an event that was acknowledged here

    async def read(self, user_id: str, policy: HistoryPolicy, as_of: int | None = None) -> UserHistory:
        """The user's history; with `as_of` (epoch microseconds), of events with timestamp <= as_of.

        Raises HistoryUnavailable when neither Redis nor SQL can be read.
        """
        source: Literal["cache", "log"] = "cache"
        try:
            entry, marker = await self._cached(user_id, policy)
        except _RedisDown:
            return (await self._logged(user_id, policy, as_of)).history("log")
        if entry is None:
            entry, source = await self._rebuilt(user_id, policy, marker), "log"
        if as_of is not None and as_of < entry.newest:
            entry, source = await self._logged(user_id, policy, as_of), "log"
        return entry.history(source)

    async def appended(self, events: Sequence[StoredEvent], policy: HistoryPolicy) -> bool:
        """Bring committed events to the entries that exist; True if Redis took all of it. Never raises for Redis.

        May be called again with the same events, and with users in any order.
        """
        by_user: dict[str, list[StoredEvent]] = {}
        for event in events:
            by_user.setdefault(event.user_id, []).append(event)
        dirty = [user_id for user_id in by_user if user_id in self._dirty]
        commands = [self._append(user_id, rows, policy) for user_id, rows in by_user.items() if user_id not in dirty]
        return await self._change(by_user, commands, drop=dirty)

    async def read_whole(self, user_id: str, policy: HistoryPolicy, as_of: int | None = None) -> UserHistory:
        """Like `read`, from the log and with the whole sequence. Raises HistoryUnavailable."""
        return (await self._logged(user_id, policy, as_of, whole=True)).history("log")

    async def drop_dirty(self) -> None:
        """Drop the entries that may lack an event acknowledged here, so that other workers do not read them either."""
        if self._dirty:
            await self.drop(list(self._dirty))

    async def drop(self, user_ids: Iterable[str]) -> bool:
        """Drop entries, so that the next reads rebuild them; True if Redis took all of it."""
        users = list(dict.fromkeys(user_ids))
        return await self._change(users, [], drop=users)

    async def drop_all(self) -> bool:
        """Drop all entries of all users, whatever their epoch: the log was replaced. True if Redis took all of it."""
        try:
            async for key in self._line.redis.scan_iter(match="upnext:????????:{*", count=1_000):
                await self._line.redis.delete(key)
        except (RedisError, OSError) as error:
            log.warning("the cached histories cannot be dropped now: %r", error)
            return False
        return True

    async def ping(self) -> bool:
        """Whether Redis is usable right now."""
        try:
            await self._line.ask([_Command("", ("EXISTS",))])
        except _RedisDown:
            return False
        return True

    async def _change(self, users: Iterable[str], commands: Sequence[_Command], drop: Iterable[str]) -> bool:
        """Run `commands`, and drop the entries of `drop`; unless all of it is known to have run, `users` are dirty."""
        try:
            await self._line.ask([*commands, *(_Command(user_id, ("DEL",)) for user_id in drop)])
        except BaseException as error:
            self._dirty.update(dict.fromkeys(users))
            for user_id in list(islice(self._dirty, max(0, len(self._dirty) - MAX_DIRTY))):
                del self._dirty[user_id]  # the sweep of the outbox will come by
            if isinstance(error, _RedisDown):
                return False
            raise
        for user_id in drop:
            self._dirty.pop(user_id, None)
        return True

    def _append(self, user_id: str, rows: Iterable[StoredEvent], policy: HistoryPolicy) -> _Command:
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
        return _script(APPEND, user_id, *how, newest, b"".join(records), "".join(feeds))

    async def _cached(self, user_id: str, policy: HistoryPolicy) -> tuple[_Entry | None, bytes | None]:
        """The complete entry of this policy, else the marker that stands there. Raises _RedisDown."""
        if user_id in self._dirty and not await self.drop([user_id]):
            raise _RedisDown("the entry may lack an event")
        [(meta, window, others, marker)] = await self._line.ask([_Command(user_id, ("HMGET",), ("m", "w", "s", "t"))])
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
        with suppress(_RedisDown):
            [holder] = await self._line.ask([_script(CLAIM, user_id, fingerprint, mine, MARKER_MILLISECONDS)])
        if holder not in (mine, b""):
            return await self._rebuilt(user_id, policy, holder)
        entry = await self._logged(user_id, policy)
        if holder == mine:
            ttl = self.empty_ttl if entry.newest == BEGINNING else self.ttl
            with suppress(_RedisDown):
                await self._line.ask([_script(COMPLETE, user_id, mine, *entry.encode(fingerprint), ttl)])
        return entry

    async def _logged(
        self, user_id: str, policy: HistoryPolicy, as_of: int | None = None, *, whole: bool = False
    ) -> _Entry:
        """The entry as the log has it now. Raises HistoryUnavailable."""
        columns = (events.c.seq, events.c.item_id, events.c.event_type, events.c.value, events.c.timestamp)
        query = select(*columns).where(events.c.user_id == user_id).order_by(events.c.timestamp, events.c.seq)
        if as_of is not None:
            query = query.where(events.c.timestamp <= as_of)
        try:
            async with reading(self.engine, HistoryUnavailable, self._readers) as connection:
                rows = (await connection.execute(query)).all()
        except HistoryUnavailable:
            self.failed("database")
            raise
        return _entry_of(rows, policy, len(rows) if whole else self.window)


def _entry_of(rows: Sequence[Any], policy: HistoryPolicy, window: int) -> _Entry:
    """The entry for one user's rows (seq, item_id, event_type, value, timestamp) in the order of (timestamp, seq)."""
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
    last = next(((r.timestamp, r.seq) for r in reversed(rows) if policy.feeds(r.event_type, r.value)), (BEGINNING, 0))
    return _Entry(next(named, BEGINNING), last, records, others)
