"""The live catalogue in SQL: changes to items since the bundle was made.

Each change carries the catalogue's revision after it. All writers take the one row of `catalogue_revision`
first, so changes commit in the order of their revisions, and a follower that asks for what is newer than the
last revision it saw misses none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from sqlalchemy import null, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.commit import SECONDS as WRITE_SECONDS
from service.history import database_failures_as, reading
from shared.catalogue import ItemChange
from shared.database import catalogue_revision, items
from shared.events import ItemId

_COLUMNS: Final = tuple(items.c[name] for name in ItemChange.__dataclass_fields__)
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
    """Reads and writes the table `items`. All methods raise CatalogueUnavailable when SQL fails."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._upsert_into = (sqlite if engine.dialect.name == "sqlite" else postgresql).insert(items)

    async def get(self, item_id: ItemId) -> ItemChange | None:
        """The item's row; None when nothing was changed since the bundle."""
        async with reading(self.engine, CatalogueUnavailable) as connection:
            return await self._row(connection, item_id)

    @staticmethod
    async def _row(connection: AsyncConnection, item_id: ItemId) -> ItemChange | None:
        row = (await connection.execute(select(*_COLUMNS).where(items.c.item_id == item_id))).one_or_none()
        return None if row is None else _change(row)

    async def put(self, item_id: ItemId, decide: Callable[[ItemChange | None], Fields]) -> ItemChange:
        """Replace the item's row by what `decide` makes of the one there is; no other change comes between the two.

        What `decide` raises is raised here, and nothing is written.
        """
        with database_failures_as(CatalogueUnavailable):
            async with asyncio.timeout(WRITE_SECONDS), self.engine.begin() as connection:
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

    async def changes_since(self, revision: int) -> tuple[int, list[ItemChange]]:
        """The catalogue's revision, and all rows changed after `revision`, oldest change first.

        The revision is read first: a change that commits between the two reads comes again next time.
        """
        query = select(*_COLUMNS).where(items.c.revision > revision).order_by(items.c.revision)
        async with reading(self.engine, CatalogueUnavailable) as connection:
            current: int = (await connection.execute(select(catalogue_revision.c.revision))).scalar_one()
            rows = (await connection.execute(query)).all() if current != revision else []
        return current, [_change(row) for row in rows]


def _change(row: Any) -> ItemChange:
    item_id, title, categories, *rest = row
    return ItemChange(item_id, title, None if categories is None else tuple(categories), *rest)
