"""Erasure: what stays of a user who was erased, and the one rule that both sides apply by it.

A tombstone is a keyed hash of the user's id with a time: events of the user up to that time are gone and stay gone,
whatever brings them back (a retry, a restored backup, a file that the trainer reads). It is pseudonymous, not
anonymous: the key lies in the same database, so who holds both can ask whether an id he knows was erased. Nobody can
read the ids from it.

    {"format": 1, "key": "9c2f...", "erased": {"5feceb66...": "2026-11-22T10:00:00.123456Z"}}

is the form in which tombstones leave the database (`python -m service tombstones`), for trainers that read files.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import inspect, select
from sqlalchemy.exc import NoResultFound
from sqlalchemy.ext.asyncio import AsyncConnection

from shared.database import erasure_key, erasures
from shared.times import parse, render

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TombstonesError(Exception):
    """A file of tombstones that cannot be used."""


def pseudonym(key: bytes, user_id: str, event_id: str = "") -> str:
    """HMAC-SHA256 in hex, of a user, or of one event of a user: ids hold no NUL."""
    return hmac.digest(key, f"{user_id}\0{event_id}".encode(), hashlib.sha256).hex()


@dataclass(frozen=True)
class Tombstones:
    """Who was erased, and when."""

    key: bytes
    erased: Mapping[str, int] = field(default_factory=dict)  # pseudonym of the user -> epoch microseconds

    def erased_at(self, user_id: str) -> int | None:
        """Until when the user's events are gone; None for a user who was never erased."""
        return self.erased.get(pseudonym(self.key, user_id)) if self.erased else None

    def to_json(self) -> str:
        """As the module's docstring has it."""
        times = {user: render(moment) for user, moment in sorted(self.erased.items())}
        return json.dumps({"format": 1, "key": self.key.hex(), "erased": times}, indent=1)

    @classmethod
    def of_file(cls, file: Path) -> Tombstones:
        """Raises TombstonesError."""
        try:
            found = _File.model_validate_json(file.read_bytes())
            return cls(bytes.fromhex(found.key), {user: parse(moment) for user, moment in found.erased.items()})
        except OSError as error:
            raise TombstonesError(f"{file}: {error.strerror}") from error
        except (ValidationError, ValueError) as error:
            reason = "not JSON in the form that `python -m service tombstones` writes"
            raise TombstonesError(f"{file}: {reason}") from error

    def merged(self, other: Tombstones) -> Tombstones:
        """Both; of two times of a user the later. Raises TombstonesError where they have different keys."""
        if not other.erased:
            return self
        if not self.erased:
            return other
        if self.key != other.key:
            raise TombstonesError("tombstones of two installations cannot be told apart: their keys differ")
        later = {user: max(moment, self.erased.get(user, moment)) for user, moment in other.erased.items()}
        return Tombstones(self.key, {**self.erased, **later})


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal[1]
    key: Hash
    erased: dict[Hash, str]


async def has_erasure(connection: AsyncConnection) -> bool:
    """Whether the database is at a schema that knows erasure (0002 or later)."""
    return await connection.run_sync(lambda c: inspect(c).has_table(erasures.name))


async def read_key(connection: AsyncConnection) -> bytes:
    """The key of this database's tombstones. Raises TombstonesError where the database is damaged."""
    try:
        return bytes.fromhex((await connection.execute(select(erasure_key.c.key))).scalar_one())
    except (NoResultFound, TypeError, ValueError) as error:
        raise TombstonesError("the key in the table erasure_key cannot be read") from error


async def read_tombstones(connection: AsyncConnection) -> Tombstones | None:
    """All tombstones; None at schema 0001."""
    if not await has_erasure(connection):
        return None
    rows = (await connection.execute(select(erasures.c.user_hash, erasures.c.erased_at))).all()
    erased = {row.user_hash: row.erased_at for row in rows}
    return Tombstones(await read_key(connection), erased)
