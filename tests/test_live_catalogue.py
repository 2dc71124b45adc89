"""The live catalogue: rows replaced or withdrawn, and a revision that a follower can rely on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.catalogue import CatalogueUnavailable, Fields, LiveCatalogue
from shared.catalogue import ItemChange
from shared.database import catalogue_revision, create_engine, items
from tests.serving import put_row


@pytest.fixture
def catalogue(engine: AsyncEngine) -> LiveCatalogue:
    return LiveCatalogue(engine)


async def test_put_replaces_the_row_and_counts_up(catalogue: LiveCatalogue) -> None:
    assert await catalogue.get("a") is None
    first = await put_row(catalogue, "a", title="A", categories=("genre:x",), available_from=-5, available_until=2**50)
    assert first == ItemChange("a", "A", ("genre:x",), -5, 2**50, False, 1)
    assert await catalogue.get("a") == first
    second = await put_row(catalogue, "a", categories=(), withdrawn=True)
    assert second == await catalogue.get("a") == ItemChange("a", None, (), None, None, True, 2)


async def test_fields_left_out_are_null_in_sql(catalogue: LiveCatalogue, engine: AsyncEngine) -> None:
    await put_row(catalogue, "a")
    async with engine.connect() as connection:
        query = select(func.count()).select_from(items).where(items.c.categories.is_(None))
        assert (await connection.execute(query)).scalar_one() == 1


async def test_a_loaded_row_says_so_until_a_call_changes_it(catalogue: LiveCatalogue, engine: AsyncEngine) -> None:
    row = {"item_id": "a", "title": "A", "withdrawn": False, "revision": 1, "loaded": True}
    async with engine.begin() as connection:
        await connection.execute(items.insert(), [row])
    loaded = await catalogue.get("a")
    assert loaded is not None
    assert loaded.loaded
    assert not (await put_row(catalogue, "a", title="B")).loaded


async def test_changes_since_a_revision(catalogue: LiveCatalogue) -> None:
    assert await catalogue.changes_since(0) == (0, [])
    await put_row(catalogue, "a")
    b = await put_row(catalogue, "b")
    a = await put_row(catalogue, "a", title="A")
    assert await catalogue.changes_since(0) == (3, [b, a])
    assert await catalogue.changes_since(2) == (3, [a])
    assert await catalogue.changes_since(3) == (3, [])


async def test_changes_come_in_pages(
    catalogue: LiveCatalogue, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.catalogue.PAGE", 3)
    loaded = [{"item_id": f"i{n}", "withdrawn": False, "revision": 1, "loaded": True} for n in range(7)]
    async with engine.begin() as connection:
        await connection.execute(items.insert(), loaded)
        await connection.execute(catalogue_revision.update().values(revision=1))
    await put_row(catalogue, "i3")
    read, pages = catalogue._reading, count(1)

    async def changing(act: Callable[[AsyncConnection], Awaitable[Any]]) -> Any:
        if next(pages) == 3:  # i0 to i2 were read a moment ago
            await put_row(catalogue, "i1", withdrawn=True)
        return await read(act)

    monkeypatch.setattr(catalogue, "_reading", changing)
    revision, changes = await catalogue.changes_since(0)
    assert revision == 2
    assert [c.item_id for c in changes] == ["i0", "i1", "i2", "i4", "i5", "i6", "i3"]
    revision, changes = await catalogue.changes_since(revision)
    assert (revision, [(c.item_id, c.withdrawn) for c in changes]) == (3, [("i1", True)])


async def test_a_follower_misses_no_change_of_concurrent_writers(catalogue: LiveCatalogue) -> None:
    followed: dict[str, ItemChange] = {}
    revision, done = 0, False

    async def follow() -> None:
        nonlocal revision
        while True:
            last_look = done
            revision, changes = await catalogue.changes_since(revision)
            followed.update((change.item_id, change) for change in changes)
            if last_look:
                return
            await asyncio.sleep(0.001)

    async def write(writer: int) -> list[ItemChange]:
        return [await put_row(catalogue, f"i{writer}-{n % 5}", title=f"{n}") for n in range(10)]

    follower = asyncio.create_task(follow())
    written = [change for changes in await asyncio.gather(*(write(w) for w in range(6))) for change in changes]
    done = True
    await follower
    assert sorted(change.revision for change in written) == list(range(1, 61))
    assert revision == 60
    newest = {change.item_id: change for change in sorted(written, key=lambda change: change.revision)}
    assert followed == newest


async def test_no_change_comes_between_reading_a_row_and_replacing_it(catalogue: LiveCatalogue) -> None:
    def one_more(row: ItemChange | None) -> Fields:
        return Fields(title=str(int(row.title or 0) + 1 if row else 1))

    await asyncio.gather(*(catalogue.put("a", one_more) for _ in range(20)))
    row = await catalogue.get("a")
    assert row is not None
    assert (row.title, row.revision) == ("20", 20)


async def test_what_decides_may_refuse_and_nothing_is_written(catalogue: LiveCatalogue) -> None:
    def refuse(_row: ItemChange | None) -> Fields:
        raise KeyError("no")

    with pytest.raises(KeyError):
        await catalogue.put("a", refuse)
    assert await catalogue.changes_since(0) == (0, [])


async def test_a_database_that_fails_is_catalogue_unavailable(tmp_path: Path) -> None:
    engine = create_engine(f"postgresql://u@/db?host={tmp_path}")
    catalogue = LiveCatalogue(engine)
    for call in (catalogue.get("a"), put_row(catalogue, "a"), catalogue.changes_since(0)):
        with pytest.raises(CatalogueUnavailable):
            await call
    await engine.dispose()
