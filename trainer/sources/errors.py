"""What can go wrong while a source is read. Every message says what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from trainer.errors import TrainerError


class SourceError(TrainerError):
    """A source could not be read; the base of every error of `trainer.sources`."""


class UnknownSourceError(SourceError):
    """`kind` names no source."""

    def __init__(self, kind: object, known: Iterable[str]) -> None:
        super().__init__(f"unknown source {kind!r}: `kind` is one of {', '.join(sorted(known))}")


class InvalidSourceError(SourceError):
    """The configuration of a source has a missing, unknown or unusable entry."""


class MissingFileError(SourceError):
    """A file that the configuration names is not there."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(
            f"{what} not found: {path} (looked in {path.absolute().parent}); correct the path in data.source"
        )


class MissingColumnError(SourceError):
    """A mapped column is not in the file."""

    def __init__(self, name: str, missing: Iterable[str], found: Iterable[str]) -> None:
        super().__init__(
            f"{name} has no column {', '.join(repr(column) for column in missing)}; "
            f"columns found: {', '.join(found) or 'none'}. Correct the column mapping in data.source"
        )


class UnreadableFileError(SourceError):
    """A file is there, and is not what its format says."""


class TooManyBadRowsError(SourceError):
    """More rows are bad than `max_bad_rows` allows."""


class EmptySourceError(SourceError):
    """No event is left to train on."""


class UnavailableError(SourceError):
    """A data set or a database could not be reached, or is not the published one."""
