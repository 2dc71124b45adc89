"""Columns of a million rows that take no more memory than they must; each worker has its own."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from shared.events import IntArray

Integers = NDArray[np.integer[Any]]
"""Of 32 bits or 64."""
_LARGE: Final = 1 << 32


def narrow(numbers: IntArray) -> Integers:
    """The same numbers in half the memory, where all of them fit into 32 bits."""
    limits = np.iinfo(np.int32)
    fit = not len(numbers) or (numbers.min() >= limits.min and numbers.max() <= limits.max)
    return numbers.astype(np.int32) if fit else numbers


class Texts(Sequence[str]):
    """Texts, encoded as UTF-8 one behind the other in one block: not a million objects. Immutable."""

    def __init__(self, block: bytes, ends: array[int]) -> None:
        self._block = block
        self._ends = ends  # (N + 1,): text r is block[ends[r] : ends[r + 1]]; an array gives Python's numbers at once

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[r] for r in range(len(self))[row]]
        if row < 0:
            row = range(len(self))[row]
        return str(self._block[self._ends[row] : self._ends[row + 1]], "utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (str(self._block[a:b], "utf-8", "surrogatepass") for a, b in pairwise(self._ends))


class TextWriter:
    """Puts texts together one by one."""

    def __init__(self) -> None:
        self._block, self._ends = bytearray(), array("q", [0])

    def add(self, text: str) -> None:
        """Append a text. Lone surrogates, which JSON may hold, are kept."""
        self._block += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._block))

    def written(self) -> Texts:
        """All that were added."""
        return Texts(bytes(self._block), array("I" if len(self._block) < _LARGE else "q", self._ends))
