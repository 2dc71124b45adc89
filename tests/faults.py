"""The README's table of faults, and the name by which a test says which of its rows it proves."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

ROOT: Final = Path(__file__).resolve().parents[1]
HEADING: Final = "## When something fails"

Test = TypeVar("Test", bound=Callable[..., object])


def fault(row: str) -> Callable[[Test], Test]:
    """Names the row of the README's table that a test proves. Raises KeyError when there is no such row."""
    if row not in rows():
        raise KeyError(f"the README's table of faults has no row {row!r}")
    return lambda test: test


def rows() -> list[str]:
    """What fails, by the first column of the section's first table."""
    section = (ROOT / "README.md").read_text().split(HEADING)[1]
    table = section[section.index("\n|") :].split("\n\n")[0]
    return [row.strip() for row in re.findall(r"^\| ([^|]+) \|", table, re.M)][1:]


def proved() -> set[str]:
    """The rows that tests name."""
    return {
        row for file in (ROOT / "tests").glob("test_*.py") for row in re.findall(r'@fault\("(.+)"\)', file.read_text())
    }
