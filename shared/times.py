"""Time is epoch microseconds (int64, UTC) inside, RFC 3339 with an offset outside."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Final

SECOND: Final = 1_000_000
DAY: Final = 86_400 * SECOND

# Bounds that stand for "since ever" and "for ever": far outside datetime's range, safe to add to in int64.
BEGINNING: Final = -(2**62)
END: Final = 2**62

UNDATED: Final = 10**12
"""Timestamps below (before 12 January 1970) are places in a file: data without times has an order and no clock."""


def now() -> int:
    """The current time in epoch microseconds."""
    return time.time_ns() // 1_000


def parse(text: str) -> int:
    """RFC 3339 text with an offset to epoch microseconds.

    Raises ValueError for text that is no time, and for a time without an offset: guessing the
    zone of a naive time moves events by hours.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is no RFC 3339 time; write it like 2026-11-21T10:00:00Z") from None
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no offset; add Z or +01:00, for instance {text}Z")
    return of_datetime(moment)


def of_datetime(moment: datetime) -> int:
    """An aware datetime to epoch microseconds, exactly (no float on the way)."""
    delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * SECOND + delta.microseconds


def of_year(year: int) -> int:
    """1 January of `year`, 00:00 UTC: what a bare year means everywhere in Upnext."""
    return of_datetime(datetime(year, 1, 1, tzinfo=UTC))


def render(moment: int) -> str:
    """Epoch microseconds to RFC 3339 in UTC: 2026-11-21T10:00:00Z, with a fraction only where there is one."""
    seconds, fraction = divmod(moment, SECOND)
    text = datetime.fromtimestamp(seconds, UTC).isoformat()[:19]  # without its own way to write the offset
    return f"{text}.{fraction:06d}Z" if fraction else f"{text}Z"


def render_bound(moment: int) -> str | None:
    """Like `render`; None where the bound is open (`BEGINNING`, `END`)."""
    return None if moment in (BEGINNING, END) else render(moment)
