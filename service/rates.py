"""How often a key may ask: counted in Redis for all workers together, in windows that start with their first request.

One round trip a request while there is room, none for a key that has used its window up. Where Redis does not answer,
nobody is refused.
"""

from __future__ import annotations

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
from redis.exceptions import RedisError

from service.errors import RateLimited
from service.redis_cluster import is_cluster, nodes_of, url_of

log = logging.getLogger(__name__)

PAUSE: Final = 1.0
"""Seconds without a try after Redis failed: a dead Redis must not cost each request its timeout."""


def parse_rate(text: str) -> RateLimitItem:
    """A limit as people write it: "600/minute", "100 per 10 seconds". Raises ValueError."""
    return parse(text)


class RateLimit:
    """The same limit for each caller. `redis_url` as for the history cache; `timeout` in seconds."""

    def __init__(self, rate: RateLimitItem, redis_url: str, *, timeout: float = 0.05) -> None:
        self.rate = rate
        self._redis, storage = _clients(redis_url, timeout)
        self._windows = FixedWindowRateLimiter(storage)
        self._used_up: dict[str, float] = {}  # caller -> when the window ends, of time.time
        self._paused_until = 0.0

    async def admit(self, caller: str) -> None:
        """Count one request of `caller`. Raises RateLimited when its window is used up."""
        if (ends := self._used_up.get(caller)) is not None:
            if ends > time.time():
                raise self._refusal(ends)
            del self._used_up[caller]
        if time.monotonic() < self._paused_until:
            return
        try:
            if await self._windows.hit(self.rate, caller):
                return
            ends = (await self._windows.get_window_stats(self.rate, caller)).reset_time
        except (RedisError, OSError) as error:
            self._paused_until = time.monotonic() + PAUSE
            log.warning("Redis cannot be used, requests are not counted: %r", error)
            return
        self._used_up[caller] = ends
        raise self._refusal(ends)

    def _refusal(self, ends: float) -> RateLimited:
        seconds = max(1, math.ceil(ends - time.time()))
        return RateLimited(f"This key may ask {self.rate}; try again in {seconds} s.", retry_after=seconds)

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
