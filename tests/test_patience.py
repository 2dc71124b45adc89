"""Whoever is told to wait no longer leaves at once, whatever is left behind."""

from __future__ import annotations

import asyncio
import gc
from contextlib import suppress
from typing import Any

import pytest

from service.patience import detached


async def stubborn(going_on: asyncio.Event, ended: asyncio.Event, error: Exception | None = None) -> None:
    """What is cancelled and has something to do first."""
    try:
        await asyncio.Event().wait()
    finally:
        await going_on.wait()
        ended.set()
        if error is not None:
            raise error


async def test_what_it_returns_and_raises() -> None:
    async def returning() -> int:
        return 3

    async def raising() -> int:
        raise KeyError("a")

    assert await detached(returning()) == 3
    with pytest.raises(KeyError):
        await detached(raising())


@pytest.mark.parametrize("error", [None, KeyError("nobody waits for it")])
async def test_what_takes_its_time_to_end_is_left_behind_and_ends(error: Exception | None) -> None:
    going_on, ended, told = asyncio.Event(), asyncio.Event(), list[dict[str, Any]]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    with suppress(TimeoutError):
        async with asyncio.timeout(0.01):
            await detached(stubborn(going_on, ended, error))
    assert not ended.is_set()
    going_on.set()
    async with asyncio.timeout(60):
        await ended.wait()
    await asyncio.sleep(0)
    gc.collect()
    assert told == []
