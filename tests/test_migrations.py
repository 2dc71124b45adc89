"""Migrations lead to exactly the tables in `shared.database`, on both dialects, and back."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, select
from sqlalchemy.ext.asyncio import AsyncEngine

from shared.database import (
    SchemaError,
    SqliteConnection,
    _alembic,
    catalogue_revision,
    check_schema,
    create_engine,
    metadata,
    migrate,
    normalise,
)  # fmt: skip


@pytest.fixture
async def empty(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(database_url)
    yield engine
    await engine.dispose()


async def test_upgrade_creates_the_metadata(empty: AsyncEngine) -> None:
    def differences(connection: Connection) -> list[Any]:
        options = {"compare_type": True, "compare_server_default": True}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))

    await migrate(empty)
    async with empty.connect() as connection:
        assert await connection.run_sync(differences) == []
        assert (await connection.execute(select(catalogue_revision.c.revision))).scalar_one() == 0


async def test_upgrade_again_changes_nothing(empty: AsyncEngine) -> None:
    await migrate(empty)
    await migrate(empty)
    await check_schema(empty)


async def test_downgrade_leaves_nothing_but_the_version_table(empty: AsyncEngine) -> None:
    await migrate(empty)
    async with empty.begin() as connection:
        await connection.run_sync(lambda c: command.downgrade(_alembic(c), "base"))
    async with empty.connect() as connection:
        assert await connection.run_sync(lambda c: inspect(c).get_table_names()) == ["alembic_version"]
    await migrate(empty)
    await check_schema(empty)


async def test_a_database_without_the_schema_is_refused_with_the_command_that_helps(empty: AsyncEngine) -> None:
    with pytest.raises(SchemaError, match="python -m service migrate"):
        await check_schema(empty)


def test_other_databases_are_refused() -> None:
    with pytest.raises(SchemaError, match="mysql"):
        normalise("mysql://host/db")


async def test_a_connection_that_is_told_to_stop_twice_ends() -> None:
    connection = await SqliteConnection.to(100, ":memory:")
    busy, on_its_way = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def work() -> None:
        loop.call_soon_threadsafe(busy.set)
        assert on_its_way.wait(60)

    working = asyncio.create_task(connection._execute(work))  # type: ignore[no-untyped-call]
    await busy.wait()
    closing = asyncio.create_task(connection.close())
    await asyncio.sleep(0)  # its first step waits behind the work
    connection.stop()
    closing.cancel()
    await asyncio.sleep(0)
    on_its_way.set()
    async with asyncio.timeout(60):
        await working
        await asyncio.wait({closing})
    connection._thread.join(60)
    assert not connection._thread.is_alive()


def test_a_connection_may_answer_after_the_end_of_its_event_loop() -> None:
    """Without an exception in its thread, which would fail this test."""

    async def leave_at_work() -> tuple[aiosqlite.Connection, threading.Event]:
        connection = await SqliteConnection.to(100, ":memory:")
        ended = threading.Event()
        working = asyncio.create_task(connection._execute(ended.wait, 60))  # type: ignore[no-untyped-call]
        await asyncio.sleep(0)  # its first step gives the work to the thread
        working.cancel()
        return connection, ended

    connection, ended = asyncio.run(leave_at_work())
    ended.set()
    connection._thread.join(60)
    assert not connection._thread.is_alive()


async def test_a_connection_that_comes_back_after_the_end_of_its_engine_is_closed(tmp_path: Path) -> None:
    """Without a warning of the collector, which would fail this test."""
    before = threading.active_count()
    engine = create_engine(f"sqlite:///{tmp_path}/some.db")
    connection = await engine.connect()
    assert threading.active_count() == before + 1
    await engine.dispose()
    await connection.close()
    del connection
    gc.collect()
    async with asyncio.timeout(60):
        while threading.active_count() > before:  # noqa: ASYNC110 - a thread that ends sets no event
            await asyncio.sleep(0.01)
