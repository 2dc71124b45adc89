"""Commands to Redis: one exchange at a time, each named for the server that it is meant for.

A key carries the epoch of the server that it was made on, one life of one master: `upnext:<epoch>:{<user_id>}`. The
epoch is learnt in the greeting of each connection and used on that connection alone; a command tried again on another
is named anew. So what a restarted server loads from an old dump, or a failover brings, has names that nobody asks for.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

from hiredis import pack_command
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MovedError, NoScriptError, ReadOnlyError, RedisError, ResponseError

log = logging.getLogger(__name__)

CONNECT: Final = 0.25
"""Seconds that a new connection may take, at least."""
PAUSE: Final = 0.25
"""Seconds without a try after Redis failed: a dead Redis must not cost each request its timeout."""
GREETING_SECONDS: Final = 1.0
"""An open connection is asked this often whether it still leads to the master it was greeted by."""
EXCHANGE: Final = 256
"""Commands in one exchange with Redis."""
COMMANDS: Final = 64
"""An exchange may take the client's timeout once more for each so many commands."""
LATE: Final = 0.01
"""Seconds by which a timer may be late before the event loop counts as held up."""

_EPOCH: Final = "upnext_epoch"
_GREETED: Final = "upnext_greeted"

Failed = Callable[[Literal["redis", "database"]], object]


class RedisDown(Exception):  # noqa: N818 - says what it is
    """No usable answer from Redis."""


class Command(NamedTuple):
    """A command on one user's key; the key goes between the two parts."""

    user_id: str
    before: tuple[str | int, ...]
    after: tuple[str | int | bytes, ...] = ()
    until: float | None = None  # on the event loop's clock: sent later than that, it is a DEL
    once: bool = False  # not to be sent again after a connection was lost, on which it may still be on its way

    def words(self, epoch: str, now: float) -> tuple[str | int | bytes, ...]:
        """What is sent."""
        key = key_of(epoch, self.user_id)
        return ("DEL", key) if self.until is not None and now > self.until else (*self.before, key, *self.after)


def script(text: str, user_id: str, *arguments: str | int | bytes) -> Command:
    """A call of a script that the client was made with."""
    return Command(user_id, ("EVALSHA", _sha(text), 1), arguments)


@lru_cache(maxsize=16)
def _sha(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def key_of(epoch: str, user_id: str) -> str:
    """The name of a user's key, whose place in a cluster the user id alone decides: what stands in the first braces.

    Empty braces would not count, and the epoch would decide with the rest.
    """
    return f"upnext:{epoch}:{{{user_id}}}" if not user_id.startswith("}") else f"upnext:{epoch}:-{{0}}{user_id}"


ANY_KEY: Final = "upnext:????????:*"
"""A pattern of all names."""


@dataclass(frozen=True)
class Greeting:
    """What is said on a fresh connection: log in, learn the epoch, load the scripts."""

    scripts: tuple[str, ...]
    who: tuple[tuple[str, ...], ...] = (("INFO", "server"), ("INFO", "replication"))
    """Commands whose replies tell the epoch."""
    life: tuple[bytes, ...] = (b"run_id", b"master_replid")
    """Facts in them that change with it: the run id with each start of the process, the replication id also when a
    replica becomes master, so that a master that comes back after two failovers does not find what it left."""

    async def greet(self, connection: AbstractConnection) -> None:
        """What redis-py calls on a fresh connection."""
        await connection.on_connect()
        load = [("SCRIPT", "LOAD", text) for text in self.scripts]
        replies = await _talk(connection, [*self.who, *load])
        who, loaded = replies[: len(self.who)], replies[len(self.who) :]
        if errors := [reply for reply in loaded if isinstance(reply, ResponseError)]:
            raise errors[0]
        setattr(connection, _EPOCH, self.epoch(who))
        setattr(connection, _GREETED, asyncio.get_running_loop().time())

    def epoch(self, replies: Sequence[bytes | ResponseError]) -> str:
        """Eight hex digits for this life of this master, from its replies about itself.

        Raises redis-py's ConnectionError for a server that is no master or does not say who it is.
        """
        said = b"\n".join(reply for reply in replies if not isinstance(reply, ResponseError))
        lines = (line.split(b":", 1) for line in said.splitlines() if b":" in line)
        facts = {name: value.strip() for name, value in lines}
        if missing := [name.decode() for name in self.life if not facts.get(name)]:
            raise RedisConnectionError(f"the Redis server does not tell its {missing[0]}")
        if facts.get(b"role") != b"master":
            raise RedisConnectionError(f"the Redis server is {facts.get(b'role', b'?').decode()}, not master")
        return hashlib.blake2b(b"".join(facts[name] for name in self.life), digest_size=4).hexdigest()


def create_redis(url: str, greeting: Greeting, *, timeout: float) -> Redis:
    """A client for `RedisLine`: `redis://`, `rediss://` or `unix://`. Connects on first use.

    It gives up after `timeout` seconds without an answer and 250 ms without a connection (`timeout` where that is
    longer), and retries nothing by itself: a command made for one server must not reach another. Raises ValueError for
    another kind of URL.
    """
    return Redis.from_url(
        url,
        socket_timeout=timeout,
        socket_connect_timeout=max(CONNECT, timeout),
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        driver_info=None,
        client_name="upnext-history",
        redis_connect_func=greeting.greet,
    )


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


class RedisLine:
    """All commands of a process to Redis, one exchange at a time; what waits meanwhile goes together in the next.

    A caller that is cancelled leaves its reply unread by itself alone: nobody else's reply moves. A connection
    on which anything but complete replies happened is closed.
    """

    def __init__(self, redis: Redis, failed: Failed) -> None:
        greet = redis.connection_pool.connection_kwargs.get("redis_connect_func")
        greeting = getattr(greet, "__self__", None)
        if not isinstance(greeting, Greeting):
            raise ValueError("the Redis client of a history store must come from create_redis")
        self.redis, self.greeting = redis, greeting
        self.tell = failed
        self.waiting: list[tuple[Command, asyncio.Future[Any]]] = []
        self.running: asyncio.Task[None] | None = None
        self.failed = False
        self.paused_until = 0.0
        self.doubted = 0.0  # when something was seen that may be the end of an epoch, on the event loop's clock

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, in order. Raises RedisDown when Redis did not take all commands; they may have run or not."""
        loop = asyncio.get_running_loop()
        if self.failed and (self.running is not None or loop.time() < self.paused_until):
            raise RedisDown("Redis failed a moment ago")  # after a failure one caller at a time tries again
        futures: list[asyncio.Future[Any]] = [loop.create_future() for _ in commands]
        self.waiting.extend(zip(commands, futures, strict=True))
        if self.running is None:
            self.running = asyncio.create_task(self._run())
        replies = await asyncio.gather(*futures) if len(futures) > 1 else [await futures[0]] if futures else []
        if errors := [reply for reply in replies if isinstance(reply, Exception)]:
            raise RedisDown(str(errors[0])) from errors[0]
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

    async def _serve(self, batch: Sequence[tuple[Command, asyncio.Future[Any]]]) -> None:
        try:
            commands = [command for command, _ in batch]
            try:
                replies: Sequence[Any] = await self._exchange(commands)
            except (NoScriptError, ReadOnlyError):
                replies = await self._exchange(commands)
            except RedisConnectionError as error:
                # The pool's socket led to a server that is gone or changed. Most commands may run twice, and
                # are named anew for the server that the next connection finds.
                again = iter(await self._exchange([command for command in commands if not command.once]))
                replies = [error if command.once else next(again) for command in commands]
            self.failed = False
            if any(isinstance(reply, Exception) and not isinstance(reply, MovedError) for reply in replies):
                self.tell("redis")  # it is full, say; a slot that has moved is asked for where it is now
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

    async def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        pool = self.redis.connection_pool
        connection: AbstractConnection = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            epoch = getattr(connection, _EPOCH)
            now, who = asyncio.get_running_loop().time(), self.greeting.who
            packed = [command.words(epoch, now) for command in commands]
            async with _one_limit(connection, len(packed)):
                if getattr(connection, _GREETED) > max(now - GREETING_SECONDS, self.doubted):
                    return await _talk(connection, packed)
                replies = await _talk(connection, [*who, *packed])
            if self.greeting.epoch(replies[: len(who)]) != epoch:
                raise RedisConnectionError("the Redis server is another master than it was")
            setattr(connection, _GREETED, now)
            return replies[len(who) :]
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)

    async def ping(self) -> None:
        """Raises RedisDown unless Redis is usable right now."""
        await self.ask([Command("", ("ECHO",))])  # a key that no slot of a cluster counts for

    async def drop_all(self) -> None:
        """Delete all keys of all users, whatever their epoch. Raises RedisDown."""
        try:
            cursor = 0
            while True:
                cursor, keys = await self.redis.scan(cursor, match=ANY_KEY, count=EXCHANGE)
                dropping = self.redis.pipeline(transaction=False)
                for key in keys:  # one by one: those of a cluster may not be named in one command
                    dropping.unlink(key)
                await dropping.execute()
                if cursor == 0:
                    return
        except (RedisError, OSError) as error:
            raise RedisDown(str(error)) from error
