"""Sources: somebody's data -> events, items and a report.

    raw = load_source(parse_source({"kind": "ml-100k"}))
    print(raw.report.terms, describe(raw), sep="\n")

A new source is a config model with its own `kind` in `config.py`, a function that turns it into `RawData`, and a line
in `SOURCES`. Every source reads a table into the same roles (user, item, time, ...) and lets `clean` do the rest, so
ids, times and bad rows mean the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from shared.erasure import Tombstones, TombstonesError
from trainer.sources.clean import below_minimum, filter_min_interactions
from trainer.sources.config import MinInteractions, SourceConfig
from trainer.sources.erased import without_erased
from trainer.sources.errors import (
    EmptySourceError,
    InvalidSourceError,
    MissingColumnError,
    MissingFileError,
    SourceError,
    TooManyBadRowsError,
    UnavailableError,
    UnknownSourceError,
    UnreadableFileError,
)
from trainer.sources.files import load_files, load_folder, load_movielens
from trainer.sources.ml100k import load_ml_100k
from trainer.sources.report import BadRows, RawData, SourceReport, TableReport, describe
from trainer.sources.sql import load_sql

SOURCES: Mapping[str, Callable[[Any], RawData]] = {
    "ml-100k": load_ml_100k,
    "files": load_files,
    "folder": load_folder,
    "movielens": load_movielens,
    "sql": load_sql,
}
"""kind -> the function that loads it."""

_CONFIG: TypeAdapter[SourceConfig] = TypeAdapter(SourceConfig)


def parse_source(entries: Mapping[str, object]) -> SourceConfig:
    """The config that `data.source` describes.

    Raises UnknownSourceError, which lists the kinds, or InvalidSourceError, which lists every wrong entry.
    """
    kind = entries.get("kind")
    if not isinstance(kind, str) or kind not in SOURCES:
        raise UnknownSourceError(kind, SOURCES)
    try:
        return _CONFIG.validate_python(dict(entries))
    except ValidationError as error:
        # `input` is left out: it may be a URL with a password.
        wrong = "; ".join(
            f"{_path(e['loc'])}: {e['msg']}" for e in error.errors(include_input=False, include_url=False)
        )
        raise InvalidSourceError(f"data.source ({kind}): {wrong}") from None


def load_source(config: SourceConfig) -> RawData:
    """Read a source; leave out what was erased, and users and items below `min_interactions`.

    Raises a SourceError whose message says what to do.
    """
    raw = SOURCES[config.kind](config)
    if config.tombstones is not None:
        raw = without_erased(raw, _read_tombstones(config.tombstones))
    return _with_minimum(raw, config.min_interactions)


def _read_tombstones(file: Path) -> Tombstones:
    try:
        return Tombstones.of_file(file)
    except TombstonesError as error:
        raise InvalidSourceError(f"data.source.tombstones: {error}") from error


def _with_minimum(raw: RawData, minimum: MinInteractions) -> RawData:
    events = filter_min_interactions(raw.events, minimum.users, minimum.items)
    if events.is_empty():
        raise EmptySourceError(
            f"no event is left with min_interactions users={minimum.users}, items={minimum.items}; lower them"
        )
    report = replace(raw.report, events=below_minimum(raw.report.events, raw.events.height - events.height))
    return replace(raw, events=events, report=report)


def _path(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location[1:]) or "entry"  # the first part repeats the kind


__all__ = [
    "SOURCES",
    "BadRows",
    "EmptySourceError",
    "InvalidSourceError",
    "MissingColumnError",
    "MissingFileError",
    "RawData",
    "SourceConfig",
    "SourceError",
    "SourceReport",
    "TableReport",
    "TooManyBadRowsError",
    "UnavailableError",
    "UnknownSourceError",
    "UnreadableFileError",
    "describe",
    "filter_min_interactions",
    "load_source",
    "parse_source",
]
