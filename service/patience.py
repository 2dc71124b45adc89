"""Databases that hang, and callers whose time is limited all the same.

What is cancelled may take its time to end: a driver says goodbye to a server before it drops a connection, or waits for
the answer to a ROLLBACK. Nobody who has been told to wait no longer should wait for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

T = TypeVar("T")

STATEMENT_SECONDS: Final = 10.0
"""What a PostgreSQL may take for one statement, be it a ROLLBACK that nobody waits for; then its connection is
dropped."""

_left: set[asyncio.Task[Any]] = set()


async def detached(doing: Coroutine[Any, Any, T]) -> T:
    """What `doing` returns. Who is cancelled in here leaves at once; `doing` is cancelled too, and ends when it can."""
    task = asyncio.create_task(doing)
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        _left.add(task)
        task.add_done_callback(_ended)
        raise
    return task.result()


def _ended(task: asyncio.Task[Any]) -> None:
    _left.discard(task)
    if not task.cancelled():
        task.exception()  # nobody else would look at it


async def with_connection(engine: AsyncEngine, seconds: float, act: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    """What `act` returns for a connection to read by. Raises TimeoutError after `seconds` in all."""

    async def read() -> T:
        async with engine.connect() as connection:
            found = await act(connection)
            # Leaving does that too, but then whoever is cancelled gives a broken connection back to the pool.
            await connection.rollback()
            return found

    async with asyncio.timeout(seconds):
        return await detached(read())


async def in_transaction(engine: AsyncEngine, seconds: float, act: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    """The same in a transaction, which is committed if `act` raises nothing."""

    async def write() -> T:
        async with engine.begin() as connection:
            return await act(connection)

    async with asyncio.timeout(seconds):
        return await detached(write())
