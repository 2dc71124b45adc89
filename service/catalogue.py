"""The live catalogue in SQL: changes to items since the bundle was made.

Each change carries the catalogue's revision after it. All writers take the one row of `catalogue_revision`
first, so changes commit in the order of their revisions, and a follower that asks for what is newer than the
last revision it saw misses none.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple, TypeVar

from sqlalchemy import null, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.commit import SECONDS as WRITE_SECONDS
from service.history import database_failures_as, reading
from service.patience import in_transaction
from service.redis_line import Failed
from shared.catalogue import ItemChange
from shared.database import catalogue_revision, items
from shared.events import ItemId

T = TypeVar("T")

_COLUMNS: Final = tuple(items.c[name] for name in ItemChange.__dataclass_fields__)
PAGE: Final = 5_000
_NEXT: Final = (
    update(catalogue_revision)
    .where(catalogue_revision.c.id == 1)
    .values(revision=catalogue_revision.c.revision + 1)
    .returning(catalogue_revision.c.revision)
)


class CatalogueUnavailable(Exception):  # noqa: N818 - says what it is
    """The live catalogue could not be read or written."""


class Fields(NamedTuple):
    """What a row says of an item; None leaves the bundle's value in force. Times are epoch microseconds."""

    title: str | None = None
    categories: tuple[str, ...] | None = None
    available_from: int | None = None
    available_until: int | None = None
    withdrawn: bool = False


class LiveCatalogue:
    """Reads and writes the table `items`. All methods raise CatalogueUnavailable when SQL fails; `failed` is told."""

    def __init__(self, engine: AsyncEngine, *, failed: Failed = lambda _: None) -> None:
        self.engine, self.failed = engine, failed
        self._upsert_into = (sqlite if engine.dialect.name == "sqlite" else postgresql).insert(items)

    async def get(self, item_id: ItemId) -> ItemChange | None:
        """The item's row; None when nothing was changed since the bundle."""
        return await self._reading(lambda connection: self._row(connection, item_id))

    async def _reading(self, act: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        return await reading(self.engine, CatalogueUnavailable, self.failed, act)

    @staticmethod
    async def _row(connection: AsyncConnection, item_id: ItemId) -> ItemChange | None:
        row = (await connection.execute(select(*_COLUMNS).where(items.c.item_id == item_id))).one_or_none()
        return None if row is None else _change(row)

    async def put(self, item_id: ItemId, decide: Callable[[ItemChange | None], Fields]) -> ItemChange:
        """Replace the item's row by what `decide` makes of the one there is; no other change comes between the two.

        What `decide` raises is raised here, and nothing is written.
        """

        async def write(connection: AsyncConnection) -> ItemChange:
            revision = (await connection.execute(_NEXT)).scalar_one()  # from here on nobody else writes
            chosen = decide(await self._row(connection, item_id))
            fields: dict[str, Any] = {**chosen._asdict(), "loaded": False, "revision": revision}
            # A JSON column would store None as the JSON text null.
            fields["categories"] = null() if chosen.categories is None else list(chosen.categories)
            statement = (
                self._upsert_into.values(item_id=item_id, **fields)
                .on_conflict_do_update(index_elements=[items.c.item_id], set_=fields)
                .returning(*_COLUMNS)
            )
            return _change((await connection.execute(statement)).one())

        with database_failures_as(CatalogueUnavailable, self.failed):
            return await in_transaction(self.engine, WRITE_SECONDS, write)

    async def changes_since(self, revision: int) -> tuple[int, list[ItemChange]]:
        """The catalogue's revision, and all rows changed after `revision`, oldest change first.

        The revision is read first: a change that commits between the reads comes again next time. More than a PAGE, a
        loaded catalogue say, is read page by page, each with its own time, in the order of the primary key.
        """
        query = select(*_COLUMNS).where(items.c.revision > revision).order_by(items.c.revision).limit(PAGE)

        async def ask(connection: AsyncConnection) -> tuple[int, Sequence[Any]]:
            current: int = (await connection.execute(select(catalogue_revision.c.revision))).scalar_one()
            return current, (await connection.execute(query)).all() if current != revision else []

        current, rows = await self._reading(ask)
        if len(rows) == PAGE:
            rows = await self._all_since(revision)
        return current, [_change(row) for row in rows]

    async def _all_since(self, revision: int) -> list[Any]:
        # Of a sum there is no index: it would have each page sort all that is left.
        query = select(*_COLUMNS).where(items.c.revision + 0 > revision).order_by(items.c.item_id).limit(PAGE)
        found: list[Any] = []

        async def page(connection: AsyncConnection) -> Sequence[Any]:
            return (await connection.execute(query.where(items.c.item_id > (found[-1].item_id if found else "")))).all()

        while True:
            rows = await self._reading(page)
            found += rows
            if len(rows) < PAGE:
                return sorted(found, key=attrgetter("revision"))


def _change(row: Any) -> ItemChange:
    item_id, title, categories, *rest = row
    return ItemChange(item_id, title, None if categories is None else tuple(categories), *rest)
