"""Many texts in one block of memory: a million of them take what they are long, not a million objects."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np

from shared.events import IntArray


class Texts(Sequence[str]):
    """Texts, encoded as UTF-8 one behind the other. Immutable."""

    def __init__(self, block: bytes, ends: IntArray) -> None:
        self.block = block
        self.ends = ends  # (N + 1,): text r is block[ends[r] : ends[r + 1]]

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[r] for r in range(len(self))[row]]
        row = range(len(self))[row]
        return self.block[self.ends[row] : self.ends[row + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        ends = self.ends.tolist()  # numbers of Python: a tenth of the time
        return (self.block[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(ends))


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
        return Texts(bytes(self._block), np.array(self._ends, np.int64))
