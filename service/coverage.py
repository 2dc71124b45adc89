"""Which items of a bundle were in an answer, of whatever worker of this host.

Workers share a byte an item, in a file that all of them map: marking an item is as cheap as in memory of one's own, and
needs no lock. Each worker holds the file of the version it serves by a shared lock, which the kernel takes back however
the worker ends. So a file that nobody holds is of a bundle that is live no more. Its marks are forgotten when that
version goes live again, and it is removed when yet another one is loaded.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

import numpy as np
from numpy.typing import NDArray

from service.metrics import SHARED
from shared.events import IntArray

log = logging.getLogger(__name__)

PREFIX: Final = "answered-"
TRIES: Final = 100
STEP: Final = 0.01
"""Seconds between tries: another worker is about to make the file, or to remove it, which takes it less."""


class Answered:
    """The items of a bundle with `count` items that were in an answer; of all workers, where they share a folder."""

    def __init__(self, version: str, count: int) -> None:
        self.count = count
        self._marks: NDArray[np.bool_] = _marks(version, count + 1)  # by item index

    def add(self, items: IntArray) -> None:
        """Mark items that were in an answer; new ones, which are not of the bundle, do not count."""
        self._marks[items[items <= self.count]] = True

    @property
    def share(self) -> float:
        """Of the bundle's items."""
        return float(np.count_nonzero(self._marks)) / max(self.count, 1)


def _marks(version: str, size: int) -> NDArray[np.bool_]:
    if SHARED in os.environ:
        folder = Path(os.environ[SHARED])
        try:
            _forget_others(folder, version)
            for _ in range(TRIES):
                if (shared := _map(folder / f"{PREFIX}{version}", size)) is not None:
                    return np.frombuffer(shared, bool)
                time.sleep(STEP)
            raise TimeoutError("the file is locked")
        except OSError as error:  # no reason to do without the bundle
            log.warning("items in answers are counted for this worker alone: %s", error)
    return np.zeros(size, bool)


def _map(path: Path, size: int) -> mmap.mmap | None:
    """The file, held for as long as the map is there; None while somebody makes or removes it."""
    with path.open("a+b") as file:
        if _lock(file, fcntl.LOCK_EX):  # nobody serves this version
            file.truncate(0)
            file.write(bytes(size))  # written, not left as a hole: a full disk must show here, and not kill who marks
            file.flush()
        if _lock(file, fcntl.LOCK_SH) and _is_at(path, file) and os.fstat(file.fileno()).st_size == size:
            return mmap.mmap(file.fileno(), size)  # which has a descriptor of its own, and the lock with it
    return None


def _forget_others(folder: Path, version: str) -> None:
    for path in folder.glob(f"{PREFIX}*"):
        if path.name != f"{PREFIX}{version}":
            with suppress(FileNotFoundError), path.open("r+b") as file:
                if _lock(file, fcntl.LOCK_EX) and _is_at(path, file):
                    path.unlink()


def _lock(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Whether this is still the file of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
