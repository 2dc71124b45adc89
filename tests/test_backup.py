"""Backup and restore: one moment in, the same out, between any two databases, and never what was erased."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sqlalchemy import Table, select
from sqlalchemy.ext.asyncio import AsyncEngine
from typer.testing import CliRunner

from service.catalogue import LiveCatalogue
from service.erasure import Eraser
from service.history import HistoryStore
from service.ingest import EventLog, EventsErased
from shared.database import cache_outbox, catalogue_revision, create_engine, erasures, events, items, migrate
from shared.erasure import Tombstones, read_tombstones
from tests.servers import PostgresServer
from tests.serving import put_row
from tests.test_erasure import PAST, cached, event, tell
from trainer import backup as module
from trainer.__main__ import app
from trainer.backup import MANIFEST, BackupError, backup, restore


def url_of(engine: AsyncEngine) -> str:
    family = engine.url.drivername.split("+")[0]
    return engine.url.set(drivername=family).render_as_string(hide_password=False)


def silent(_: str) -> None: ...


async def content(engine: AsyncEngine) -> dict[str, list[tuple[Any, ...]]]:
    tables: list[Table] = [events, items, erasures, catalogue_revision]
    async with engine.connect() as connection:
        return {
            t.name: sorted((tuple(row) for row in await connection.execute(select(t))), key=lambda row: str(row[0]))
            for t in tables
        }


@pytest.fixture
async def filled(engine: AsyncEngine, histories: HistoryStore, event_log: EventLog) -> AsyncEngine:
    """A log and a catalogue with everything that they can hold."""
    await tell(event_log, *(event(f"i{n}", f"u{n % 3}", event_id=f"e{n}", timestamp=PAST - n) for n in range(25)))
    catalogue = LiveCatalogue(engine)
    await put_row(
        catalogue, "a", title='ü "\n', categories=("genre:x", "tag:a:b"), available_from=-1, available_until=2**52
    )
    await put_row(catalogue, "b", withdrawn=True)
    await put_row(catalogue, "c", categories=())
    await tell(event_log, event("x", "gone"))
    await Eraser(engine, histories).erase("gone")
    return engine


@pytest.fixture(params=["sqlite", "postgresql"])
async def target(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """An empty database, without a schema even."""
    url = f"sqlite:///{tmp_path / 'target.db'}"
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgresql")
        url = await server.new_database()
    engine = create_engine(url)
    yield engine
    await engine.dispose()


async def test_what_goes_in_comes_out(filled: AsyncEngine, target: AsyncEngine, tmp_path: Path) -> None:
    manifest = await backup(url_of(filled), tmp_path / "b", silent, rows=10)
    assert manifest.event_files() == ["events-00001.parquet", "events-00002.parquet", "events-00003.parquet"]
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o700
    assert await restore(url_of(target), tmp_path / "b", silent) == 25
    assert await content(target) == await content(filled)
    async with target.connect() as connection, filled.connect() as source:
        assert await read_tombstones(connection) == await read_tombstones(source)
        null = await connection.exec_driver_sql("SELECT count(*) FROM items WHERE categories IS NULL")
        assert null.scalar_one() == 1


async def test_the_restored_log_goes_on(filled: AsyncEngine, target: AsyncEngine, histories: HistoryStore,
                                        event_log: EventLog, tmp_path: Path) -> None:  # fmt: skip
    await cached(histories, "u0")
    await cached(histories, "later")
    await tell(event_log, event("y", "later"))
    assert (await cached(histories, "later"))[0] == "cache"
    await backup(url_of(filled), tmp_path / "b", silent)
    async with filled.begin() as connection:
        last = (await connection.execute(select(events.c.seq).order_by(events.c.seq.desc()).limit(1))).scalar_one()
    await restore(url_of(target), tmp_path / "b", silent)
    store = HistoryStore(histories.redis, target)
    log = EventLog(target, store)
    assert (await cached(store, "later"))[0] == "cache"  # of the log that was there before
    assert await log.settle() == 1
    assert [(await cached(store, user))[0] for user in ("u0", "later", "later")] == ["log", "log", "cache"]
    assert await tell(log, event("new", "u0"), event("i0", "u0", event_id="e0", timestamp=PAST)) == [
        "accepted", "duplicate"]  # fmt: skip
    async with target.connect() as connection:
        newest = (await connection.execute(select(events.c.seq).order_by(events.c.seq.desc()).limit(1))).scalar_one()
    assert newest > last
    with pytest.raises(EventsErased):
        await tell(log, event("x", "gone"))


async def test_a_backup_is_one_moment(filled: AsyncEngine, event_log: EventLog, histories: HistoryStore,
                                      target: AsyncEngine, tmp_path: Path) -> None:  # fmt: skip
    """An event, an item and an erasure come while it is being written."""
    before = await content(filled)
    said: list[str] = []
    loop = asyncio.get_running_loop()
    pages = module._pages

    async def slowly(*arguments: Any) -> AsyncIterator[pl.DataFrame]:
        async for frame in pages(*arguments):
            yield frame
            if not said:
                said.append("")
                await tell(event_log, event("during"))
                await put_row(LiveCatalogue(filled), "during")
                await Eraser(filled, histories).erase("u1")

    module_pages = pytest.MonkeyPatch()
    module_pages.setattr(module, "_pages", slowly)
    try:
        await backup(url_of(filled), tmp_path / "b", silent, rows=5)
    finally:
        module_pages.undo()
    assert said
    assert loop.is_running()
    await restore(url_of(target), tmp_path / "b", silent)
    assert await content(target) == before


async def test_who_was_erased_since_stays_erased(filled: AsyncEngine, target: AsyncEngine, histories: HistoryStore,
                                                 tmp_path: Path) -> None:  # fmt: skip
    await backup(url_of(filled), tmp_path / "b", silent, rows=4)
    await Eraser(filled, histories).erase("u1")
    async with filled.connect() as connection:
        since = await read_tombstones(connection)
    assert since is not None
    (tmp_path / "since.json").write_text(since.to_json())
    await restore(url_of(target), tmp_path / "b", silent, tombstones=tmp_path / "since.json")
    assert await content(target) == await content(filled)
    assert not [row for row in (await content(target))["events"] if row[2] == "u1"]


async def test_the_tombstones_of_the_database_count(target: AsyncEngine, histories: HistoryStore, filled: AsyncEngine,
                                                    tmp_path: Path) -> None:  # fmt: skip
    """Emptied and restored in place: what was erased after the backup does not come back."""
    await backup(url_of(filled), tmp_path / "b", silent)
    at = (await Eraser(filled, histories).erase("u2")).erased_at
    async with filled.begin() as connection:
        await connection.execute(events.delete())
        await connection.execute(items.delete())
    assert await restore(url_of(filled), tmp_path / "b", silent) == 17
    async with filled.connect() as connection:
        found = await read_tombstones(connection)
    assert found is not None
    assert found.erased_at("u2") == at
    assert found.erased_at("gone") is not None


async def test_tombstones_of_another_installation_are_refused(
    target: AsyncEngine, filled: AsyncEngine, histories: HistoryStore, tmp_path: Path
) -> None:
    await backup(url_of(filled), tmp_path / "b", silent)
    await migrate(target)
    await Eraser(target, histories).erase("u")
    before = await content(target)
    with pytest.raises(BackupError, match="keys differ"):
        await restore(url_of(target), tmp_path / "b", silent)
    (tmp_path / "other.json").write_text(Tombstones(bytes(32), {"0" * 64: 1}).to_json())
    with pytest.raises(BackupError, match="keys differ"):
        await restore(url_of(target), tmp_path / "b", silent, tombstones=tmp_path / "other.json")
    assert await content(target) == before


async def test_a_log_that_holds_something_is_left_alone(filled: AsyncEngine, tmp_path: Path) -> None:
    await backup(url_of(filled), tmp_path / "b", silent)
    before = await content(filled)
    with pytest.raises(BackupError, match="not empty"):
        await restore(url_of(filled), tmp_path / "b", silent)
    with pytest.raises(BackupError, match="exists already"):
        await backup(url_of(filled), tmp_path / "b", silent)
    assert await content(filled) == before
    async with filled.connect() as connection:
        assert (await connection.execute(select(cache_outbox))).all()


async def test_a_restore_that_fails_leaves_nothing(filled: AsyncEngine, target: AsyncEngine, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    await backup(url_of(filled), tmp_path / "b", silent, rows=10)

    def fail(text: str) -> None:
        if "20 of" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await restore(url_of(target), tmp_path / "b", fail)
    assert (await content(target))["events"] == []
    assert await restore(url_of(target), tmp_path / "b", silent) == 25


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "missing", "link", "manifest", "format", "no items", "columns", "path", "no parquet"]
)
async def test_a_damaged_backup_is_refused(sqlite_engine: AsyncEngine, tmp_path: Path, damage: str) -> None:
    row = {"event_id": "e", "user_id": "u", "item_id": "i", "event_type": "view", "timestamp": PAST, "digest": "0"}
    async with sqlite_engine.begin() as connection:
        await connection.execute(events.insert(), [row])
    folder, target = tmp_path / "b", tmp_path / "target.db"
    await backup(url_of(sqlite_engine), folder, silent)
    file, manifest = folder / "events-00001.parquet", json.loads((folder / MANIFEST).read_text())
    content_of = file.read_bytes()

    def put(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)
        manifest["files"][name] = module._entry(folder / name).model_dump()

    match damage:
        case "flip":
            file.write_bytes(bytes([content_of[0] ^ 1]) + content_of[1:])
        case "cut":
            file.write_bytes(content_of[:-1])
        case "missing":
            file.unlink()
        case "link":
            file.rename(tmp_path / "elsewhere")
            file.symlink_to(tmp_path / "elsewhere")
        case "manifest":
            (folder / MANIFEST).write_text("{")
        case "format":
            manifest["format"] = 2
        case "no items":
            del manifest["files"]["items.parquet"]
        case "columns":
            pl.DataFrame({"seq": [1]}).write_parquet(file)
            put(file.name, file.read_bytes())
        case "path":
            manifest["files"]["../b/items.parquet"] = manifest["files"]["items.parquet"]
        case _:
            put(file.name, b"PAR1")
    if damage != "manifest":
        (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BackupError):
        await restore(f"sqlite:///{target}", folder, silent)
    assert not target.exists()


def test_commands(tmp_path: Path) -> None:
    async def fill() -> None:
        engine = create_engine(f"sqlite:///{tmp_path / 'a.db'}")
        await migrate(engine)
        await engine.dispose()

    asyncio.run(fill())
    runner, a, b = CliRunner(), f"sqlite:///{tmp_path / 'a.db'}", f"sqlite:///{tmp_path / 'b.db'}"
    done = runner.invoke(app, ["data", "backup", str(tmp_path / "b"), "--database-url", a])
    assert done.exit_code == 0, done.output
    done = runner.invoke(app, ["data", "restore", str(tmp_path / "b")], env={"UPNEXT_DATABASE_URL": b})
    assert done.exit_code == 0, done.output
    assert "0 events restored" in done.output
    for url in ("sqlite:///nowhere/x.db", "nonsense", "mysql://x/y"):
        done = runner.invoke(app, ["data", "backup", str(tmp_path / "c"), "--database-url", url])
        assert isinstance(done.exception, BackupError)
    assert not Path("nowhere").exists()


async def test_no_password_is_shown(tmp_path: Path) -> None:
    with pytest.raises(BackupError) as error:
        await backup("postgresql://u:secret@127.0.0.1:1/x?sslmode=disable", tmp_path / "b", silent)
    assert "secret" not in str(error.value)
    assert not (tmp_path / "b").exists()
