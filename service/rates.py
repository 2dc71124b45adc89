"""How often a key may ask: counted in Redis for all workers together, in windows that start with their first request.

One round trip a request while there is room, one a second for a key that has used its window up. Where Redis does not
answer, nobody is refused.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any, Final

from limits import RateLimitItem, parse
from limits.aio.storage import RedisClusterStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service.errors import RateLimited
from service.redis_cluster import is_cluster, nodes_of, url_of
from service.redis_line import Failed

log = logging.getLogger(__name__)

PAUSE: Final = 1.0
"""Seconds without a try after Redis failed: a dead Redis must not cost each request its timeout."""
BELIEVED: Final = 1.0
"""Seconds for which a key stays used up without a question: its requests alone must notice too that Redis is gone."""
PATIENCE: Final = 5
"""Timeouts that one count may take, whatever the client does: that of a cluster asks other nodes too, and sleeps."""


def parse_rate(text: str) -> RateLimitItem:
    """A limit as people write it: "600/minute", "100 per 10 seconds". Raises ValueError."""
    return parse(text)


class RateLimit:
    """The same limit for each caller. `redis_url` as for the history cache; `timeout` in seconds; `failed` is told
    of each call that failed."""

    def __init__(
        self, rate: RateLimitItem, redis_url: str, *, timeout: float = 0.05, failed: Failed = lambda _: None
    ) -> None:
        self.rate, self.failed = rate, failed
        self._redis, storage = _clients(redis_url, timeout)
        self._windows = FixedWindowRateLimiter(storage)
        self._patience = PATIENCE * timeout
        # caller -> until when that is believed, and when the window ends; of time.monotonic, as clocks are set back
        self._used_up: dict[str, tuple[float, float]] = {}
        self._paused_until = 0.0

    async def admit(self, caller: str) -> None:
        """Count one request of `caller`. Raises RateLimited when its window is used up, and nothing else."""
        now = time.monotonic()
        if now < self._paused_until:
            return
        believed, ends = self._used_up.get(caller, (0.0, 0.0))
        if now >= believed:
            try:
                async with asyncio.timeout(self._patience):
                    left = await self._left(caller)
            except Exception as error:  # errors of a cluster's client are no RedisError, and its bugs refuse nobody
                self._paused_until = time.monotonic() + PAUSE
                self._used_up.clear()  # nobody is refused by what a Redis that is gone has said
                self.failed("redis")
                log.warning("Redis cannot be used, requests are not counted: %r", error)
                return
            if left is None:
                self._used_up.pop(caller, None)
                return
            now = time.monotonic()
            ends = now + left
            self._used_up[caller] = (min(ends, now + BELIEVED), ends)
        seconds = max(1, math.ceil(ends - now))
        raise RateLimited(f"This key may ask {self.rate}; try again in {seconds} s.", retry_after=seconds)

    async def _left(self, caller: str) -> float | None:
        """Count one request; None while there is room, else the seconds to the end of the window."""
        if await self._windows.hit(self.rate, caller):
            return None
        left = (await self._windows.get_window_stats(self.rate, caller)).reset_time - time.time()
        if left <= self.rate.get_expiry():
            return left
        # Redis keeps ends by its machine's clock: it was set back, and the window would last for as much longer.
        await self._windows.clear(self.rate, caller)
        return None if await self._windows.hit(self.rate, caller) else 0.0

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()


def _clients(url: str, timeout: float) -> tuple[Redis | RedisCluster, RedisStorage]:
    """The client that is to be closed in the end, and the library's storage on it."""
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "protocol": 2,
        "driver_info": None,
        "client_name": "upnext-rates",
    }
    how: dict[str, Any] = {"implementation": "redispy", "key_prefix": "upnext:rate"}
    if not is_cluster(url):
        client = Redis.from_url(url, retry=Retry(NoBackoff(), 0), **options)
        return client, RedisStorage("async+redis://", **how, connection_pool=client.connection_pool)  # type: ignore[arg-type]
    nodes = nodes_of(url)
    login = {**parse_url(url_of(url, nodes[0]))}
    secure = login.pop("connection_class", None) is SSLConnection
    options |= {name: value for name, value in login.items() if name not in ("host", "port")} | {"ssl": secure}
    places = ",".join(f"{host}:{port}" for host, port in nodes)
    options["retry"] = Retry(NoBackoff(), 1)  # the map of slots is read anew before a second try
    storage = RedisClusterStorage(f"async+redis+cluster://{places}", **how, **options)
    return storage.bridge.storage, storage  # type: ignore[attr-defined]
