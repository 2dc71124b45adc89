"""Histories in an event log, for a benchmark to ask about."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import numpy as np
from sqlalchemy import insert

from shared.database import create_engine, events, migrate
from shared.events import IntArray
from shared.times import SECOND
from tests.benchmarks.bundles import SINCE

USERS: Final = 1000
ROOT: Final = Path(__file__).parents[2]


def prefix(length: int) -> str:
    """What the ids of users with a history of this length begin with: "h50-" and a number below USERS."""
    return f"h{length}-"


def histories(items: int, length: int) -> IntArray:
    """(USERS, length) item numbers, the same on every call; popular items oftener."""
    rng = np.random.default_rng(length)
    spread = rng.zipf(1.2, (USERS, length)) - 1 + rng.integers(0, items, (USERS, length)) // 3
    return np.asarray(np.minimum(spread, items - 1) + 1, np.int64)


def fill(url: str, items: int, lengths: tuple[int, ...]) -> None:
    """An event log with USERS users for each length."""
    asyncio.run(_fill(url, items, lengths))


async def _fill(url: str, items: int, lengths: tuple[int, ...]) -> None:
    engine = create_engine(url)
    await migrate(engine)
    async with engine.begin() as connection:
        for length in lengths:
            rows = [
                {
                    "event_id": f"{length}-{user}-{place}", "user_id": f"{prefix(length)}{user}", "item_id": str(item),
                    "event_type": "view", "timestamp": SINCE + (user * 300 + place) * SECOND, "digest": "0" * 32,
                }
                for user, row in enumerate(histories(items, length).tolist())
                for place, item in enumerate(row)
            ]  # fmt: skip
            await connection.execute(insert(events), rows)
    await engine.dispose()
