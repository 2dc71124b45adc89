"""Item and user vectors of a published model, for use outside of the service: a score is their dot product."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl

from shared.bundle import Bundle
from shared.encoder import Vectors
from trainer.config import ConfigError
from trainer.dataset import Dataset
from trainer.predict import ask, to_bundle

USERS_AT_ONCE: Final = 4096


def item_vectors(bundle: Bundle, name: str) -> pl.DataFrame:
    """Columns item_id and vector (list of D float32), in the order of the bundle's catalogue."""
    return _table("item_id", list(bundle.catalogue.items.ids), np.asarray(bundle.models[name].retriever.vectors))


def user_vectors(bundle: Bundle, dataset: Dataset, name: str) -> pl.DataFrame:
    """Columns user_id and vector of the users who have an event that the model knows, asked at their newest event."""
    ids, parts = [], []
    for users, vectors in _encoded(bundle, dataset, name):
        ids += users
        parts.append(vectors)
    width = bundle.models[name].info.encoder.width
    return _table("user_id", ids, np.concatenate([np.zeros((0, width), np.float32), *parts]))


def _encoded(bundle: Bundle, dataset: Dataset, name: str) -> Iterator[tuple[list[str], Vectors]]:
    """User ids and query vectors, some at a time."""
    mapped, encoder = to_bundle(bundle, dataset), bundle.models[name].encoder
    for start in range(0, len(dataset.users), USERS_AT_ONCE):
        ids, histories, times = [], [], []
        for user in range(start, min(start + USERS_AT_ONCE, len(dataset.users))):
            asked = ask(dataset, mapped, user)
            if asked is not None and len(asked.history):
                ids.append(dataset.users[user])
                histories.append(asked.history)
                times.append(asked.times)
        yield ids, encoder.encode(histories, times)


def _table(column: str, ids: list[str], vectors: Vectors) -> pl.DataFrame:
    wide = pl.Series("vector", np.ascontiguousarray(vectors), dtype=pl.Array(pl.Float32, vectors.shape[1]))
    return pl.DataFrame({column: pl.Series(ids, dtype=pl.String), "vector": wide.arr.to_list()})


def write_vectors(table: pl.DataFrame, file: Path) -> None:
    """Parquet, or `.tsv` with `id <tab> v1 v2 ...` a line, as the trainer reads vector files."""
    check_vectors_file(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        table.write_parquet(file)
        return
    with file.open("w", encoding="utf-8") as lines:
        for name, vector in table.iter_rows():
            lines.write(f"{name}\t{' '.join(map(repr, vector))}\n")


def check_vectors_file(file: Path) -> None:
    """Raise ConfigError for a file that `write_vectors` cannot write: better before the work than after it."""
    if file.suffix not in (".parquet", ".tsv"):
        raise ConfigError(f"{file.name}: write to a file that ends in .parquet or .tsv")
