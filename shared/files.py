"""Folders that are complete or not there, whatever ends the process or the machine meanwhile."""

from __future__ import annotations

import os
from pathlib import Path


def move_durably(folder: Path, target: Path) -> None:
    """Rename a finished folder to `target` beside it, after all of it has reached the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            sync(file)
    for part in (folder, *(f for f in folder.rglob("*") if f.is_dir())):
        sync(part)
    folder.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Have a file or folder reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
