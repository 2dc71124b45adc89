"""Fixtures that tests of several files use. With pytest-xdist each worker starts servers of its own."""

from __future__ import annotations

import gc
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Final

import hypothesis
import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine

from service.history import HistoryStore, create_cluster, create_redis
from service.ingest import EventLog
from shared.database import create_engine, migrate
from tests.servers import PostgresServer, RedisServer

# Tests hold rules, not times: on a busy machine a single example may take as long as it likes.
hypothesis.settings.register_profile(
    "upnext", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("upnext")


LONGEST: Final = (
    "readme",
    "service_launcher",
    "cli",
    "items",
    "options",
    "demo",
    "train",
    "faults",
    "service_gate",
    "service_paths",
    "crash",
    "ddp",
    "fuzz",
    "warm",
    "history_orders",
    "history",
    "machine",
    "export",
    "evaluate",
    "backup",
    "sources",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first: begun last, one of them would have all other processes wait for its end.

    Each goes to one process (`--dist loadfile`), since its tests share what they train. By itself xdist begins with the
    files of the most tests (`--no-loadscope-reorder`).
    """
    place = {f"test_{name}.py": at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session", autouse=True)
def _without_collections() -> Iterator[None]:
    """Bundles load without the collection of garbage that goes with it in a worker.

    Hundreds are loaded here, each of which would have all objects of all tests looked through: 0.2 s a bundle, a third
    of the whole suite. `test_memory` and the tests with workers of their own have the real thing. Nor does anybody
    need to look through half a million objects of imported modules again and again.
    """
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.bundles.uncollected", nullcontext)
        yield


CLIENTS: Final = {"service.main.create_redis": create_redis, "service.main.create_cluster": create_cluster}


@pytest.fixture(scope="session", autouse=True)
def _patient_with_redis() -> Iterator[None]:
    """A service in the process of tests waits 5 s for Redis instead of 50 ms, which is soon over beside other tests."""
    with pytest.MonkeyPatch.context() as patch:
        for place, create in CLIENTS.items():
            patch.setattr(place, partial(create, timeout=5))
        yield


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """With this, it waits for Redis as long as it does outside of tests."""
    for place, create in CLIENTS.items():
        monkeypatch.setattr(place, create)


@pytest.fixture(scope="session", autouse=True)
def _one_table_of_operators() -> Iterator[None]:
    """The exporter of torch builds the same table of operators for each export, a quarter of its time: once is enough.

    With tests that never meet torch there is nothing to do.
    """
    if "torch" not in sys.modules:
        yield
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def redis_for_session() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_server(redis_for_session: RedisServer) -> RedisServer:
    """A running, empty redis-server. Tests that kill it start their own."""
    redis_for_session.cli("FLUSHALL")
    return redis_for_session


@pytest.fixture
def redis_of_test() -> Iterator[RedisServer]:
    """A redis-server for one test, which may kill, freeze and restart it."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
async def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a fresh, empty database, in turn on SQLite and on PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'upnext.db'}"
    server: PostgresServer = request.getfixturevalue("postgresql")
    return await server.new_database()


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine on a fresh database with the current schema, in turn on SQLite and on PostgreSQL."""
    engine = create_engine(database_url)
    await migrate(engine)
    yield engine
    await engine.dispose()


@pytest.fixture
async def sqlite_engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """Like `engine`, for tests in which the database plays no part."""
    engine = create_engine(f"sqlite:///{tmp_path / 'upnext.db'}")
    await migrate(engine)
    yield engine
    await engine.dispose()


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = create_redis(redis_server.url, timeout=5)  # for slow machines: no test here is about time
    yield client
    await client.aclose()


@pytest.fixture
def histories(redis: Redis, engine: AsyncEngine) -> HistoryStore:
    return HistoryStore(redis, engine)


@pytest.fixture
def event_log(engine: AsyncEngine, histories: HistoryStore) -> EventLog:
    """Without its background task: tests flush and settle when they want to."""
    return EventLog(engine, histories)
