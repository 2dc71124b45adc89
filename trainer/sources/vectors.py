"""Vectors of items, made elsewhere: one line an item, its id, a tab, and its numbers with blanks between.

    item	vector
    318	0.12 -0.70 0.03
    2571	0.44 0.01 -0.25

The header is optional and every line has as many numbers as the first. Brackets, quotes and commas between the numbers
are read over. A Parquet file holds a column of ids, and one of lists, as `export embeddings` writes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trainer.sources.errors import MissingFileError, UnreadableFileError
from trainer.sources.ids import id_text
from trainer.sources.tables import reading

NUMBERS = pl.List(pl.Float32())


@dataclass(frozen=True)
class ItemVectors:
    """`values` (M, d) float32 of the items with these ids."""

    item_ids: tuple[str, ...]
    values: NDArray[np.float32]

    def rows_of(self, item_ids: Sequence[str]) -> NDArray[np.float32]:
        """(len(item_ids), d); zeros where an item has none. Of several rows with one id the first counts."""
        place = {item_id: row for row, item_id in reversed(list(enumerate(self.item_ids)))}
        rows = np.array([place.get(i, -1) for i in item_ids], np.int64)
        found = np.zeros((len(rows), self.values.shape[1]), np.float32)
        found[rows >= 0] = self.values[rows[rows >= 0]]
        return found


def read_vectors(path: Path) -> ItemVectors:
    """A file of vectors. Raises MissingFileError, or UnreadableFileError that names the line."""
    if not path.is_file():
        raise MissingFileError(path, "vector file")
    if path.suffix.lower() == ".parquet":
        return _of_parquet(path)
    table = _lines(path)
    found = _as_vectors(table["item"], table["value"].str.split(" "), path.name, table["line"])
    if found is None:
        raise UnreadableFileError(f"{path} holds no vectors: each line is an item id, a tab, and numbers with blanks")
    return found


def _of_parquet(path: Path) -> ItemVectors:
    with reading(path, "parquet"):
        table = pl.read_parquet(path, glob=False)
    lists = [name for name, dtype in table.schema.items() if isinstance(dtype, pl.List | pl.Array)]
    plain = [name for name, dtype in table.schema.items() if not dtype.is_nested()]
    if len(lists) != 1 or len(plain) != 1:
        raise UnreadableFileError(
            f"{path} has the columns {', '.join(table.columns)}: vectors want one of ids and one of lists of numbers"
        )
    return vectors_of_column(table[plain[0]], table[lists[0]], path.name)


def vectors_in(path: Path) -> ItemVectors | None:
    """The vectors of a file such as `titles.tsv` that may also hold text; None where it does.

    It holds vectors when most lines are the same number of numbers, two at least. Raises UnreadableFileError that then
    names a line which is not: as text, all of them would make strange titles.
    """
    table = _lines(path)
    texts = table["value"].str.split(" ")
    numbers = _numbers(texts)
    whole = (numbers.list.len() >= 2) & ~numbers.list.eval(pl.element().is_null()).list.any()
    widths = Counter(numbers.list.len().filter(whole).to_list()).most_common(1)
    if not widths or 2 * widths[0][1] <= len(whole):
        return None
    return _as_vectors(table["item"], texts, path.name, table["line"], widths[0][0])


def vectors_of_column(item_ids: pl.Series, column: pl.Series, what: str) -> ItemVectors:
    """Vectors from a column of lists, or of text with blanks between numbers. Raises UnreadableFileError."""
    lists = column if isinstance(column.dtype, pl.List | pl.Array) else column.cast(pl.String).str.split(" ")
    there = lists.is_not_null() & item_ids.is_not_null()
    line = pl.int_range(1, len(lists) + 1, eager=True)
    found = _as_vectors(_ids(item_ids).filter(there), lists.filter(there), what, line.filter(there))
    if found is None:
        raise UnreadableFileError(f"{what} holds no vectors: map a column of lists of numbers")
    return found


def save_vectors(path: Path, vectors: ItemVectors) -> None:
    """Write what `read_vectors` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write("item\tvector\n")
        file.writelines(_written(vectors))


def _written(vectors: ItemVectors) -> Iterator[str]:
    for item_id, row in zip(vectors.item_ids, vectors.values, strict=True):
        yield f"{item_id}\t{' '.join(f'{x:.6g}' for x in row)}\n"


def _lines(path: Path) -> pl.DataFrame:
    """line i64, item str, value str (single blanks between), of every line that has both; a header is left out."""
    cells = pl.col("text").str.splitn("\t", 2)
    bare = cells.struct[1].str.strip_chars(" \t\r\n\"'[]()").str.replace_all(r"\s*[,;]?\s+", " ")
    # Semicolons or commas alone divide numbers, too. Beside others commas may be part of them: 0,12 -0,7
    divided = (
        pl.when(bare.str.contains(";")).then(bare.str.replace_all(";", " ")).otherwise(bare.str.replace_all(",", " "))
    )
    alone = pl.when(bare.str.contains(" ")).then(bare).otherwise(divided)
    item = cells.struct[0].str.strip_chars("\ufeff ").str.replace('^"(.*)"$', "${1}")
    with reading(path, "text"):
        table = (
            pl.scan_lines(path, name="text", row_index_name="line", row_index_offset=1, glob=False)
            .with_columns(pl.col("line").cast(pl.Int64), item=item, value=alone)
            .filter(pl.col("text").str.strip_chars().str.len_bytes() > 0)
            .select("line", "item", "value")
            .collect()
        )
    header = table.height > 0 and not _is_number((table["value"][0] or "").partition(" ")[0])
    table = table.slice(1) if header else table
    return table.with_columns(_ids(table["item"]).alias("item"))


def _ids(column: pl.Series) -> pl.Series:
    """Ids as events and items have them: 42, where pandas wrote 42.0."""
    frame = column.to_frame("item")
    return frame.select(pl.coalesce(id_text(frame, "item"), pl.col("item").cast(pl.String)))["item"]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(texts: pl.Series) -> pl.Series:
    """Lists of f32, null where there is no finite number."""
    number = pl.element().cast(pl.Float32, strict=False)
    return texts.list.eval(pl.when(number.is_finite()).then(number)) if len(texts) else texts.cast(NUMBERS)


def _array(numbers: pl.Series) -> NDArray[np.float32]:
    """Lists of one length to (M, d)."""
    flat = numbers.explode(empty_as_null=True, keep_nulls=True).to_numpy()
    return np.ascontiguousarray(flat.reshape(len(numbers), -1), np.float32)


def _as_vectors(
    item_ids: pl.Series, texts: pl.Series, what: str, line: pl.Series, width: int | None = None
) -> ItemVectors | None:
    """None where there is no line; raises UnreadableFileError that names the first one of another width.

    Without `width` it is that of the first line.
    """
    if not len(texts):
        return None
    if isinstance(texts.dtype, pl.Array):
        texts = texts.arr.to_list()
    numbers = _numbers(texts)
    widths = numbers.list.len()
    width, like = (widths[0], "as the first line has") if width is None else (width, "as most lines have")
    broken = numbers.is_null() | (widths != width) | numbers.list.eval(pl.element().is_null()).list.any()
    if (wrong := broken.fill_null(value=True).arg_true()).len():
        at = int(wrong[0])
        raise UnreadableFileError(
            f"{what}:{line[at]}: not {width} finite numbers, {like}; each line is an item id, a tab, "
            "and numbers with blanks"
        )
    return ItemVectors(tuple(item_ids), _array(numbers))
