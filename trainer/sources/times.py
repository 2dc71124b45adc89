"""Times of any form -> epoch microseconds.

Numbers count from 1970 in the unit that their magnitude shows; text is ISO 8601 with an offset; Parquet may hold
dates and datetimes. Whole columns at once: no Python a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from shared.times import DAY, SECOND, of_year
from trainer.sources.config import TimeUnit

FIRST_YEAR, LAST_YEAR = 1000, 9999
MIN_MICROS = of_year(FIRST_YEAR)
MAX_MICROS = of_year(LAST_YEAR) + 365 * DAY - SECOND
UNITS_A_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
# Up to 1e11 a number means seconds (the year 5138); milliseconds reach that in 1973, and so on by thousands.
LARGEST_BY_UNIT = {"s": 1e11, "ms": 1e14, "us": 1e17}
UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
ISO_8601 = (
    r"^(\d{4}-\d{2}-\d{2})"  # 1 date
    r"(?:[Tt ](\d{2}:\d{2})(:\d{2})?(?:[.,](\d{1,9}))?)?"  # 2 hours and minutes, 3 seconds, 4 fraction
    r"\s*(?:([Zz])|([+-])([01]\d|2[0-3]):?([0-5]\d)?)?$"  # 5 Z, or 6 sign, 7 hours, 8 minutes
)


@dataclass(frozen=True)
class Times:
    """One column of times, row for row as in the file."""

    micros: pl.Series  # i64 epoch microseconds; null where there is none or it cannot be read
    naive: pl.Series  # bool: readable but for its missing offset
    unit: str | None = None  # the unit that epoch numbers were read in


def read_times(raw: pl.Series, unit: TimeUnit, *, assume_utc: bool) -> Times:
    """Read a column of numbers, text, dates or datetimes.

    unit is that of epoch numbers; `auto` decides by the median magnitude, one unit for the whole column.
    Without `assume_utc` a time with no offset gives null and `naive`.
    """
    if raw.dtype.is_numeric():
        return _from_numbers(raw, unit)
    if raw.dtype == pl.String:
        return _from_text(raw, unit, assume_utc=assume_utc)
    if isinstance(raw.dtype, pl.Datetime | pl.Date):
        return _from_datetimes(raw, assume_utc=assume_utc)
    return Times(_nothing(raw.len()), _no(raw.len()))


def year_start(raw: pl.Series) -> pl.Series:
    """Years (numbers or text) -> epoch microseconds of 1 January, UTC; null where it is no year in 1000..9999."""
    years = raw.cast(pl.Float64, strict=False)  # also reads "1995.0", which is how pandas writes years with gaps
    frame = pl.DataFrame({"year": years}).select(
        pl.when(pl.col("year").is_between(FIRST_YEAR, LAST_YEAR) & (pl.col("year") == pl.col("year").floor()))
        .then(pl.col("year"))
        .cast(pl.Int32, strict=False)
    )
    return frame.select(pl.datetime("year", 1, 1, time_unit="us").dt.epoch("us")).to_series()


def _from_datetimes(raw: pl.Series, *, assume_utc: bool) -> Times:
    aware = isinstance(raw.dtype, pl.Datetime) and raw.dtype.time_zone is not None
    if not aware and not assume_utc:
        return Times(_nothing(raw.len()), raw.is_not_null())
    # Polars keeps aware datetimes as UTC, so the epoch needs no conversion.
    return Times(_in_range(raw.dt.epoch("us")), _no(raw.len()))


def _from_numbers(raw: pl.Series, unit: TimeUnit) -> Times:
    chosen = _unit_of(raw) if unit == "auto" else unit
    return Times(_to_micros(raw, chosen), _no(raw.len()), chosen)


def _from_text(raw: pl.Series, unit: TimeUnit, *, assume_utc: bool) -> Times:
    whole = raw.cast(pl.Int64, strict=False)  # exact, where a float would round nanoseconds
    decimal = raw.cast(pl.Float64, strict=False)
    iso, naive = _from_iso(raw, assume_utc=assume_utc)
    if decimal.null_count() == raw.len():
        return Times(iso, naive)
    chosen = _unit_of(decimal) if unit == "auto" else unit
    frame = pl.DataFrame({"whole": _to_micros(whole, chosen), "decimal": _to_micros(decimal, chosen), "iso": iso})
    return Times(frame.select(pl.coalesce("whole", "decimal", "iso")).to_series(), naive, chosen)


def _from_iso(raw: pl.Series, *, assume_utc: bool) -> tuple[pl.Series, pl.Series]:
    parts = pl.DataFrame({"text": raw}).select(pl.col("text").str.extract_groups(ISO_8601)).to_series().struct.unnest()
    clock = pl.col("1") + " " + pl.col("2").fill_null("00:00") + pl.col("3").fill_null(":00")
    local = clock.str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us", strict=False).dt.epoch("us")
    fraction = pl.col("4").fill_null("0").str.slice(0, 6).str.pad_end(6, "0").cast(pl.Int64)
    minutes = pl.col("7").fill_null("0").cast(pl.Int64) * 60 + pl.col("8").fill_null("0").cast(pl.Int64)
    ahead = pl.when(pl.col("6") == "-").then(-minutes).otherwise(minutes) * (60 * SECOND)
    local = local + fraction
    naive = local.is_not_null() & pl.col("5").is_null() & pl.col("6").is_null()
    read = parts.select(micros=local - ahead, naive=naive)
    if assume_utc:
        return _in_range(read["micros"]), _no(raw.len())
    return _in_range(read.select(pl.when(~pl.col("naive")).then(pl.col("micros"))).to_series()), read["naive"]


def _unit_of(numbers: pl.Series) -> str:
    # The median, so that a few zeros or wild values among many good ones do not decide; one NaN would make it NaN.
    median = numbers.cast(pl.Float64).replace(float("nan"), None).abs().median()
    magnitude = float(median) if isinstance(median, int | float) else 0.0
    return next((unit for unit, largest in LARGEST_BY_UNIT.items() if magnitude < largest), "ns")


def _to_micros(numbers: pl.Series, unit: str) -> pl.Series:
    a_second = UNITS_A_SECOND[unit]
    low, high = MIN_MICROS * a_second // 1_000_000, MAX_MICROS * a_second // 1_000_000
    # Out of range becomes null before the multiplication, which could wrap around. Nanoseconds cannot leave the range
    # in 64 bits, and their bounds do not fit there.
    bounds = pl.lit(value=True) if unit == "ns" else pl.col("t").is_between(low, high)
    frame = pl.DataFrame({"t": numbers if numbers.dtype.is_float() else numbers.cast(pl.Int64, strict=False)})
    inside = frame.select(pl.when(bounds).then(pl.col("t"))).to_series()
    if unit == "ns":
        return (inside / 1_000).floor().cast(pl.Int64, strict=False) if inside.dtype.is_float() else inside // 1_000
    micros = inside * (1_000_000 // a_second)
    return micros.round().cast(pl.Int64, strict=False) if micros.dtype.is_float() else micros


def _in_range(micros: pl.Series) -> pl.Series:
    frame = pl.DataFrame({"t": micros.cast(pl.Int64)})
    return frame.select(pl.when(pl.col("t").is_between(MIN_MICROS, MAX_MICROS)).then(pl.col("t"))).to_series()


def _nothing(rows: int) -> pl.Series:
    return pl.repeat(None, rows, dtype=pl.Int64, eager=True)


def _no(rows: int) -> pl.Series:
    return pl.repeat(value=False, n=rows, dtype=pl.Boolean, eager=True)
