"""Reading one file into a frame that knows the place of every row.

CSV and TSV are read twice, both times by Polars. The first pass looks at lines alone and finds those that cannot be
a row (too many or too few columns, a quote that never closes); the second parses the rest, so one broken line never
costs the file and every line keeps its number. A value therefore cannot hold a line break: such files go as Parquet.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
from polars.exceptions import NoDataError, PanicException, PolarsError

from trainer.sources.config import FileFormat
from trainer.sources.errors import InvalidSourceError, MissingColumnError, MissingFileError, UnreadableFileError

SEPARATORS: Mapping[str, str] = {"csv": ",", "tsv": "\t"}
FORMATS: Mapping[str, FileFormat] = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
PROBLEMS = pl.Schema({"row": pl.Int64(), "reason": pl.String(), "detail": pl.String()})


def no_problems() -> pl.DataFrame:
    """An empty frame of bad rows: row, reason, detail."""
    return pl.DataFrame(schema=PROBLEMS)


@dataclass(frozen=True)
class Table:
    """One file (or SQL table) as it was read.

    frame: the wanted columns under the names of their roles, and `row` i64: the line in a text file (the header is
        line 1), the number of the row, from 1, in a Parquet file. Text stays text here.
    problems: rows that are no rows at all, not in `frame`; columns row, reason, detail.
    """

    name: str
    frame: pl.DataFrame
    problems: pl.DataFrame = field(default_factory=no_problems)
    place: str = ""  # written before a row number: "" for lines, "row " for Parquet

    @property
    def rows_read(self) -> int:
        """Rows of the file, bad ones too; blank lines are none."""
        return self.frame.height + self.problems.height


def read_table(path: Path, columns: Mapping[str, str], *, what: str, file_format: FileFormat | None = None) -> Table:
    """Read the wanted columns of a CSV, TSV or Parquet file.

    columns: role -> column in the file. what: the file's name in messages, such as "events file".
    Raises MissingFileError, MissingColumnError, InvalidSourceError (unknown format) or UnreadableFileError.
    """
    if not path.is_file():
        raise MissingFileError(path, what)
    chosen = file_format or FORMATS.get(path.suffix.lower())
    if chosen is None:
        raise InvalidSourceError(
            f"{what} {path}: the suffix {path.suffix!r} names no format; rename the file to one of "
            f"{', '.join(FORMATS)} or set its format (csv, tsv or parquet) in data.source"
        )
    with reading(path, chosen):
        return _read_parquet(path, columns) if chosen == "parquet" else _read_text(path, columns, SEPARATORS[chosen])


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turns what libraries say of a broken file into UnreadableFileError, with a remedy."""
    try:
        yield
    except (PolarsError, PanicException, OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnreadableFileError(f"{path} cannot be read as {kind}: {_first_line(error)}{_advice(error)}") from error


def header_of(path: Path, separator: str) -> list[str]:
    """Column names of a text file."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter=separator), [])
    names = [name.strip() for name in header]
    if not any(names):
        raise UnreadableFileError(f"{path} has no header: its first line must name the columns")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UnreadableFileError(f"{path} names a column twice: {', '.join(repeated)}; rename one in its first line")
    return names


def _read_parquet(path: Path, columns: Mapping[str, str]) -> Table:
    frame = pl.scan_parquet(path, glob=False)
    _check_columns(path, columns, frame.collect_schema().names())
    wanted = [pl.col(column).alias(role) for role, column in columns.items()]
    numbered = frame.select(wanted).with_row_index("row", offset=1).with_columns(pl.col("row").cast(pl.Int64))
    return Table(path.name, _whole(numbered), place="row ")


def _read_text(path: Path, columns: Mapping[str, str], separator: str) -> Table:
    header = header_of(path, separator)
    _check_columns(path, columns, header)
    broken = _broken_lines(path, separator, len(header))
    frame = _parse_text(path, columns, separator, header, broken["row"])
    return Table(path.name, frame, broken.filter(pl.col("reason") != "blank"))


def _whole(frame: pl.LazyFrame) -> pl.DataFrame:
    """In one piece: a column that is added in one piece to many would copy them all, and these be kept beside."""
    return frame.collect().rechunk()


def _check_columns(path: Path, columns: Mapping[str, str], found: list[str]) -> None:
    missing = [column for column in columns.values() if column not in found]
    if missing:
        raise MissingColumnError(path.name, missing, found)


def _lines(path: Path) -> pl.LazyFrame:
    """Every line of a text file and its number from 1: row i64, line str."""
    lines = pl.scan_lines(path, row_index_name="row", row_index_offset=1, glob=False)
    return lines.with_columns(pl.col("row").cast(pl.Int64))


def _broken_lines(path: Path, separator: str, width: int) -> pl.DataFrame:
    """Lines after the header that hold no row of `width` columns: row, reason, detail. Blank ones are "blank"."""
    # Without its quoted parts a line has exactly width - 1 separators, and no quote is left.
    line = pl.col("line")
    bare = line.str.replace_all(r'"[^"]*"', "")
    found = bare.str.count_matches(separator, literal=True) + 1
    between = re.escape(separator)
    # A field that begins with a quoted part and goes on behind it, such as "Great" Cats: the parser would give up.
    beside = line.str.contains(rf'(^|{between})\s*"([^"]|"")*"[^"{between}]*[^"\s{between}]')
    reason = (
        pl.when(pl.col("line").str.strip_chars().str.len_bytes() == 0)
        .then(pl.lit("blank"))
        .when(bare.str.contains('"', literal=True))
        .then(pl.lit("unbalanced quote"))
        .when(beside)
        .then(pl.lit("text beside a quoted value"))
        .when(found != width)
        .then(pl.lit("wrong number of columns"))
    )
    detail = (
        pl.when(bare.str.contains('"', literal=True))
        .then(pl.lit("double it inside quotes; a value cannot hold a line break, save such a file as Parquet"))
        .when(beside)
        .then(pl.lit("quote the whole value and double the quotes in it"))
        .otherwise(found.cast(pl.String) + f" instead of {width}")
    )
    lines = _lines(path).filter(pl.col("row") > 1).select("row", reason=reason, detail=detail)
    return lines.filter(pl.col("reason").is_not_null()).collect(engine="streaming").sort("row").cast(PROBLEMS)


def _parse_text(
    path: Path, columns: Mapping[str, str], separator: str, header: list[str], broken: pl.Series
) -> pl.DataFrame:
    if broken.is_empty():
        frame = _scan_rows(path, columns, separator, header, skip=1)
        return frame.with_row_index("row", offset=2).with_columns(pl.col("row").cast(pl.Int64))
    kept = _lines(path).filter((pl.col("row") > 1) & ~pl.col("row").is_in(broken.implode()))
    rows = kept.select("row").collect().to_series()
    with TemporaryDirectory(prefix="upnext-") as folder:
        clean = Path(folder) / "rows"
        # Lines come out as they went in: there is one column, and nothing in it is quoted again.
        kept.select("line").sink_csv(clean, include_header=False, quote_style="never")
        frame = _scan_rows(clean, columns, separator, header, skip=0)
    if frame.height != rows.len():
        raise UnreadableFileError(f"{path}: {rows.len()} lines gave {frame.height} rows; check its quotes")
    return frame.with_columns(rows)


def _scan_rows(path: Path, columns: Mapping[str, str], separator: str, header: list[str], *, skip: int) -> pl.DataFrame:
    """The wanted columns as text, trimmed; nothing between two separators is null."""
    schema = dict.fromkeys(header, pl.String)
    wanted = [pl.col(column).str.strip_chars().replace("", None).alias(role) for role, column in columns.items()]
    try:
        frame = pl.scan_csv(
            path,
            has_header=False,
            skip_lines=skip,
            separator=separator,
            schema=schema,
            infer_schema=False,
            glob=False,
        )
        return _whole(frame.select(wanted))
    except NoDataError:  # a header and nothing else
        return pl.DataFrame(schema=dict.fromkeys(columns, pl.String))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _advice(error: BaseException) -> str:
    if "utf" in str(error).lower():
        return "; save it as UTF-8, for instance: iconv -f latin1 -t utf-8 in.csv > out.csv"
    return ""
