"""Layouts that are files: your own (`files`), a folder of tables (`folder`), and MovieLens since 20M (`movielens`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

from trainer.sources.clean import CATEGORY, Cleaned, clean_events, clean_items, no_items
from trainer.sources.config import FilesSource, FolderSource, MovieLensSource
from trainer.sources.errors import MissingFileError
from trainer.sources.report import ITEMS_SCHEMA, NO_TIMES, RawData, SourceReport
from trainer.sources.tables import header_of, read_table
from trainer.sources.vectors import ItemVectors, vectors_in, vectors_of_column

YEAR_IN_TITLE = r"\((\d{4})(?:\s*[\u2013-][^()]*)?\)(?: \(V\))?\s*$"  # "(1995)", "(2007-2010)", "(1995) (V)"
NO_GENRES = "(no genres listed)"
TITLES = "titles.tsv"
FOLDER_TABLES = {  # file -> column beside `item`, role it takes
    TITLES: ("title", "title"),
    "years.tsv": ("year", "year"),
    "genres.tsv": ("genre", CATEGORY + "genre"),
    "directors.tsv": ("director", CATEGORY + "director"),
    "writers.tsv": ("writer", CATEGORY + "writer"),
}


def load_files(config: FilesSource) -> RawData:
    """The user's own events and items."""
    mapping = {role: column for role, column in config.columns.model_dump().items() if column is not None}
    table = read_table(config.events, mapping, what="events file", file_format=config.format)
    events = clean_events(
        table,
        event_type=config.event_type,
        max_bad_rows=config.max_bad_rows,
        unit=config.time_unit,
        assume_utc=config.assume_utc,
    )
    items = _load_items(config)
    has_times = config.columns.time is not None
    return _raw(config.events.name, events, [items] if items else [], _vectors(config), has_times=has_times)


def _load_items(config: FilesSource) -> Cleaned | None:
    if config.items is None or config.item_columns is None:
        return None
    mapping = config.item_columns.model_dump(exclude={"categories", "vectors"})
    columns = {role: column for role, column in mapping.items() if column is not None}
    columns |= {CATEGORY + name: column for name, column in config.item_columns.category_columns().items()}
    table = read_table(config.items, columns, what="items file", file_format=config.items_format)
    return clean_items(
        table,
        max_bad_rows=config.max_bad_rows,
        unit=config.time_unit,
        assume_utc=config.assume_utc,
        separator=config.categories_separator,
    )


def _vectors(config: FilesSource) -> dict[str, ItemVectors]:
    """The vectors that columns of the items file hold."""
    if config.items is None or config.item_columns is None or not config.item_columns.vectors:
        return {}
    columns = {"id": config.item_columns.id, **config.item_columns.vectors}
    table = read_table(config.items, columns, what="items file", file_format=config.items_format).frame
    return {
        field: vectors_of_column(table["id"], table[field], f"{config.items.name}, column {column}")
        for field, column in config.item_columns.vectors.items()
    }


def load_folder(config: FolderSource) -> RawData:
    """`train_ratings.csv` and whatever item tables lie beside it."""
    ratings = config.path / "train_ratings.csv"
    if not ratings.is_file():
        raise MissingFileError(ratings, "ratings file")
    columns = {"user": "user", "item": "item"}
    if "time" in header_of(ratings, ","):
        columns["time"] = "time"
    table = read_table(ratings, columns, what="ratings file")
    events = clean_events(table, event_type="rating", max_bad_rows=config.max_bad_rows)
    cleaned, vectors, notes = [], {}, []
    for name, (column, role) in FOLDER_TABLES.items():
        path = config.path / name
        if not path.is_file():
            notes.append(f"no {name}: items have no {column}")
            continue
        if name == TITLES and (found := vectors_in(path)):
            vectors["title"] = found
            notes.append(f"{name} holds vectors of width {found.values.shape[1]}: items have no title in words")
            continue
        cleaned.append(_item_table(path, column, role, config.max_bad_rows))
    return _raw(config.path.absolute().name, events, cleaned, vectors, has_times="time" in columns, notes=notes)


def _item_table(path: Path, column: str, role: str, max_bad_rows: float) -> Cleaned:
    table = read_table(path, {"id": "item", role: column}, what=f"table of {column}s")
    # One value a row, and no value holds a tab: nothing is split here.
    return clean_items(table, max_bad_rows=max_bad_rows, separator="\t", several_rows=role.startswith(CATEGORY))


def load_movielens(config: MovieLensSource) -> RawData:
    """`ratings.csv` (userId, movieId, rating, timestamp) and `movies.csv` (movieId, title, genres)."""
    columns = {"user": "userId", "item": "movieId", "value": "rating", "time": "timestamp"}
    table = read_table(config.path / "ratings.csv", columns, what="ratings file")
    events = clean_events(table, event_type="rating", max_bad_rows=config.max_bad_rows, unit="s")
    columns = {"id": "movieId", "title": "title", CATEGORY + "genre": "genres"}
    movies = read_table(config.path / "movies.csv", columns, what="movies file")
    genre = pl.col(CATEGORY + "genre")
    frame = movies.frame.with_columns(
        pl.when(genre != NO_GENRES).then(genre).alias(CATEGORY + "genre"),
        pl.col("title").str.extract(YEAR_IN_TITLE).alias("year"),
    )
    items = clean_items(replace(movies, frame=frame), max_bad_rows=config.max_bad_rows)
    notes = ["events of one user in the same second keep the order of the file, which MovieLens sorts by movie id"]
    return _raw(config.path.absolute().name, events, [items], {}, has_times=True, notes=notes)


def _raw(
    name: str,
    events: Cleaned,
    items: list[Cleaned],
    vectors: Mapping[str, ItemVectors],
    *,
    has_times: bool,
    notes: Sequence[str] = (),
) -> RawData:
    said = (*events.notes, *(note for table in items for note in table.notes), *notes)
    report = SourceReport(
        events.report, tuple(table.report for table in items), said if has_times else (NO_TIMES, *said)
    )
    return RawData(name, events.frame, _merge_items([table.frame for table in items]), report, has_times, vectors)


def _merge_items(frames: list[pl.DataFrame]) -> pl.DataFrame:
    """One row an item from tables that each know a part of it, in the order of first mention."""
    if not frames:
        return no_items()
    first = [pl.col(column).drop_nulls().first() for column in ("title", "available_from", "available_until")]
    categories = pl.col("categories").explode(empty_as_null=False, keep_nulls=False).unique(maintain_order=True)
    merged = pl.concat(frames).group_by("item_id", maintain_order=True)
    return merged.agg(*first, categories, pl.col("withdrawn").any()).select(ITEMS_SCHEMA.names()).cast(ITEMS_SCHEMA)
