"""What a user writes under `data.source`: one strict model for each kind of source.

    source:
      kind: files
      events: data/events.csv
      columns: {user: user_id, item: sku, time: created_at, event_type: action, value: price}
      items: data/products.parquet
      item_columns: {id: sku, title: name, available_from: listed_at, categories: {brand: brand, shelf: shelves}}
      assume_utc: true

Relative paths start at the working directory. An entry that a kind does not know is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

FileFormat = Literal["csv", "tsv", "parquet"]
TimeUnit = Literal["auto", "s", "ms", "us", "ns"]
FieldName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
ColumnName = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class MinInteractions(_Strict):
    """Leave out users and items with fewer events; with both above 1, repeated until it holds for both (a k-core)."""

    users: Annotated[int, Field(ge=1)] = 1
    """Fewest events that a user must have."""
    items: Annotated[int, Field(ge=1)] = 1
    """Fewest events that an item must have."""


class _Source(_Strict):
    max_bad_rows: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest share of bad rows in any one file or table; above it the run stops."""
    min_interactions: MinInteractions = MinInteractions()
    tombstones: Path | None = None
    """File that `python -m service tombstones` wrote: events of users erased since are left out."""


class MovieLens100KSource(_Source):
    """MovieLens 100K, fetched once: from GroupLens, or else out of the RecBole package."""

    kind: Literal["ml-100k"]
    cache: Path = Path("data/ml-100k")
    """Folder that keeps the data set; a GroupLens `ml-100k.zip` put there by hand is used too."""


class EventColumns(_Strict):
    """Which column of the events file holds what; only `user` and `item` are needed."""

    user: ColumnName
    """Id of the user."""
    item: ColumnName
    """Id of the item."""
    time: ColumnName | None = None
    """Epoch number or ISO 8601 text; without it the order of the file counts and time rules are off."""
    event_type: ColumnName | None = None
    """What the user did; without it all events are of the one type that `event_type` beside `columns` names."""
    value: ColumnName | None = None
    """Number that belongs to the event, a rating say."""
    order: ColumnName | None = None
    """Number that gives the arrival order of the events of one user; without it the order of the file counts."""
    keep: ColumnName | None = None
    """Boolean column; rows where it is false are left out and counted."""


class ItemColumns(_Strict):
    """Which column of the items file holds what; only `id` is needed."""

    id: ColumnName
    """Id of the item, as in the events."""
    title: ColumnName | None = None
    """What the item is called."""
    available_from: ColumnName | None = None
    """Time from which the item exists; without one its first event counts."""
    year: ColumnName | None = None
    """Year from which the item exists, meaning 1 January, UTC; instead of `available_from`."""
    available_until: ColumnName | None = None
    """Time from which it exists no more."""
    withdrawn: ColumnName | None = None
    """Boolean column: true for an item that must not be recommended."""
    categories: ColumnName | dict[FieldName, ColumnName] | None = None
    """`{field: column}`; a plain column name means the field `category`. Lists, or text with a separator."""
    vectors: dict[FieldName, ColumnName] = {}
    """`{field: column}`: vectors for the item features, as lists of numbers, or text with blanks between numbers."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.available_from is not None and self.year is not None:
            message = "map `available_from` or `year`, not both"
            raise ValueError(message)
        return self

    def category_columns(self) -> dict[str, str]:
        """Field -> column."""
        if isinstance(self.categories, str):
            return {"category": self.categories}
        return dict(self.categories or {})


class FilesSource(_Source):
    """Your own events file and, if there is one, items file: CSV, TSV or Parquet."""

    kind: Literal["files"]
    events: Path
    """File of events, a row each."""
    columns: EventColumns
    format: FileFormat | None = None
    """Format of the events file, where its suffix does not say."""
    event_type: Annotated[str, Field(min_length=1, max_length=64)] = "view"
    """Type of every event, where no column gives it; one that the history policy names."""
    time_unit: TimeUnit = "auto"
    """Unit of epoch numbers in both files; `auto` goes by magnitude and prints what it chose."""
    assume_utc: bool = False
    """Read times without an offset as UTC; otherwise their rows are bad."""
    items: Path | None = None
    """File of items, a row each."""
    item_columns: ItemColumns | None = None
    items_format: FileFormat | None = None
    """Format of the items file, where its suffix does not say."""
    categories_separator: Annotated[str, Field(min_length=1)] = "|"
    """What stands between the categories of an item, where they are text."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.items is None) != (self.item_columns is None):
            message = "`items` (the file) and `item_columns` (its mapping) belong together: give both or neither"
            raise ValueError(message)
        if self.columns.event_type is not None and "event_type" in self.model_fields_set:
            message = "give `event_type` (one type for all) or `columns.event_type`, not both"
            raise ValueError(message)
        return self


class FolderSource(_Source):
    """A folder with `train_ratings.csv` (user,item[,time]) and, as far as they are there, `titles.tsv` (item, title or
    a vector of it: numbers with blanks between), `years.tsv` (item, year), `genres.tsv` (item, genre), `directors.tsv`
    and `writers.tsv`."""

    kind: Literal["folder"]
    path: Path
    """The folder."""


class MovieLensSource(_Source):
    """A folder in the layout of MovieLens since 20M: `ratings.csv` and `movies.csv`."""

    kind: Literal["movielens"]
    path: Path
    """The folder."""


class SqlSource(_Source):
    """The service's own event log and catalogue."""

    kind: Literal["sql"]
    url: SecretStr
    """SQLAlchemy URL: `sqlite:///upnext.db` or `postgresql://user:password@host/name`."""
    chunk_rows: Annotated[int, Field(ge=1)] = 100_000
    """Rows fetched at a time."""


SourceConfig = Annotated[
    MovieLens100KSource | FilesSource | FolderSource | MovieLensSource | SqlSource, Field(discriminator="kind")
]
"""Any source, told apart by `kind`."""
