"""What an id is, in whatever column it stands: of events, of items, of vectors."""

from __future__ import annotations

from typing import Final

import polars as pl

from shared.events import ID_PATTERN

EXACT_FLOAT: Final = 2**53  # whole numbers from here on are not exact in a float
WHOLE_NUMBER: Final = r"^-?\d+(\.0+)?$"


def id_text(frame: pl.DataFrame, column: str) -> pl.Expr:
    """Ids as text, null where the value cannot be an id. A number is its plain whole number: 42, not 42.0."""
    dtype, raw = frame.schema[column], pl.col(column)
    text = raw.cast(pl.String, strict=False)
    if dtype.is_integer():
        return text
    if dtype.is_float():
        exact = (raw == raw.floor()) & (raw.abs() < EXACT_FLOAT)
        text = pl.when(exact).then(raw.cast(pl.Int64, strict=False)).cast(pl.String)
    elif dtype == pl.String:
        text = text.str.strip_chars()
        if _floats_as_text(frame[column]):
            text = text.str.replace(r"\.0+$", "")
    return pl.when(text.str.contains(ID_PATTERN) & ~text.is_in([".", ".."])).then(text)


def _floats_as_text(column: pl.Series) -> bool:
    """True if a text column holds whole numbers alone and some as 42.0, as pandas writes a column with a gap."""
    values = column.drop_nulls()
    return bool(values.str.ends_with(".0").any() and values.str.contains(WHOLE_NUMBER).all())
