"""API keys: made by `python -m service key NAME SCOPE...`, kept as hashes, read again whenever their file changes.

    # name  scopes            SHA-256 of the key
    shop    read,write        9b74c9897bac770ffc029102a200c5de61f3c3f0a2f2a3d8f4b5d1a2c3e4f506
    ops     read,write,admin  2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae

A key has 256 random bits, so its plain SHA-256 gives nothing away: there is nothing to guess that a slow hash would
protect. To rotate one, add a line, change the callers, take the old line out; the workers follow within a second.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pydantic import SecretStr

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 1.0
PREFIX: Final = "upnext_"
"""Keys start with it, so that a scanner for leaked secrets can tell one."""
_LINE: Final = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,64})\s+(?P<scopes>[a-z,]+)\s+(?P<digest>[0-9a-f]{64})")


class Scope(StrEnum):
    """What a key may do. No scope contains another: a key lists all it has."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Key:
    """A key as the service knows it."""

    name: str
    scopes: frozenset[Scope]
    digest: bytes  # SHA-256


class KeysError(Exception):
    """A file of keys that cannot be used."""


class KeyRing:
    """The keys in force. As an async context manager it reads the file at once, then whenever it changes.

    A file that cannot be read at the start raises KeysError; later, the keys read last stay in force.
    """

    def __init__(self, file: Path | None, key: SecretStr | None) -> None:
        self.file = file
        self.required = file is not None or key is not None
        self._given = [] if key is None else [Key("environment", frozenset(Scope), _sha256(key.get_secret_value()))]
        self._by_start: dict[bytes, Key] = _by_start(self._given)
        self._seen: object = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self.file is not None:
            self.reload(self.file)
            self._task = asyncio.create_task(self._follow(self.file))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def find(self, token: str) -> Key | None:
        """The key that `token` is, if any. What is compared are hashes, in constant time."""
        digest = _sha256(token)
        key = self._by_start.get(digest[:8])  # no caller can choose where the hash of a guess begins
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None

    def reload(self, file: Path) -> bool:
        """Read the file if it is another than it was; whether it was. Raises KeysError."""
        try:
            status = file.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp == self._seen:
                return False
            self._by_start = _by_start([*self._given, *parse_keys(file.read_text())])
        except (OSError, UnicodeDecodeError, KeysError) as error:
            raise KeysError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
        self._seen = stamp
        return True

    async def _follow(self, file: Path) -> None:
        said = ""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                if self.reload(file):
                    log.info("read the API keys anew", extra={"fields": {"keys": len(self._by_start)}})
                said = ""
            except KeysError as error:
                if str(error) != said:
                    log.error("the API keys read last stay in force: %s", error)
                said = str(error)


def parse_keys(text: str) -> list[Key]:
    """The keys of a file. Raises KeysError that names the line, and shows nothing of it."""
    keys: list[Key] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        names = found["scopes"].split(",") if found else []
        if found is None or not set(names) <= set(Scope):
            raise KeysError(f"line {number} is not `name scopes hash`, as `python -m service key` prints it")
        keys.append(Key(found["name"], frozenset(map(Scope, names)), bytes.fromhex(found["digest"])))
    return keys


def new_key(name: str, scopes: Iterable[Scope]) -> tuple[str, str]:
    """A fresh key, and its line for the file. Raises KeysError for a name that a line cannot hold."""
    key = PREFIX + secrets.token_urlsafe(32)
    line = f"{name} {','.join(scopes)} {_sha256(key).hex()}"
    if _LINE.fullmatch(line) is None:
        raise KeysError(f"{name!r} is no name for a key: use up to 64 letters, digits, and _.-")
    return key, line


def _by_start(keys: Iterable[Key]) -> dict[bytes, Key]:
    return {key.digest[:8]: key for key in keys}


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()
