"""What hnswlib 0.8.0 writes to a file, checked before it is read: hnswlib itself follows any number it finds there.

header      0, max elements, elements, bytes an element, offset of label, offset of vector;  top level, entry;
            M, M on level 0, M, two numbers for building
level 0     an element: how many links, the links (M0 places), vector, label
above       an element: how many bytes, then for each of its levels: how many links, the links (M places)
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

import numpy as np

from shared.events import IntArray

_HEADER: Final = struct.Struct("=6QiI3QdQ")
_MOST_LINKS: Final = 1_000  # of M; more is no index that anybody built


def check_index(file: Path, width: int) -> int:
    """How many vectors of `width` the index in `file` holds, under the labels 0, 1, 2, ... in any order.

    Raises ValueError for anything else: of another width, cut off, or with a link that leads nowhere.
    """
    if file.stat().st_size < _HEADER.size:
        raise ValueError(f"{file.name} is no index")
    data = np.memmap(file, np.uint8, "r").view(np.ndarray)
    zero, room, count, size, at_label, at_vector, top, entry, m, m0, m_again, _, _ = _HEADER.unpack(
        data[: _HEADER.size].tobytes()
    )
    if at_label - at_vector != 4 * width:
        raise ValueError(f"{file.name} was not built for vectors of width {width}")
    shape = (zero, room, at_vector, size, m0, m_again)
    expected = (0, count, 4 * m0 + 4, at_label + 8, 2 * m, m)
    if shape != expected or not 0 < m <= _MOST_LINKS or not 0 < count <= len(data) // size or entry >= count:
        raise ValueError(f"the header of {file.name} contradicts itself")
    above = _HEADER.size + count * size
    if above > len(data):
        raise ValueError(f"{file.name} is cut off")
    elements = data[_HEADER.size : above].reshape(count, size)  # (N, bytes)
    _check_links(file, elements[:, :at_vector], np.zeros(count, np.int64), 0)
    labels = np.ascontiguousarray(elements[:, at_label:]).view(np.uint64).ravel()  # (N,)
    if not np.array_equal(np.sort(labels), np.arange(count, dtype=np.uint64)):
        raise ValueError(f"the labels of {file.name} are not its rows")
    _check_above(file, data[above:], count, 4 * m + 4, top, entry)
    return int(count)


def _check_above(file: Path, data: np.ndarray[tuple[int], np.dtype[np.uint8]], count: int, size: int, top: int,
                 entry: int) -> None:  # fmt: skip
    raw, at = data.tobytes(), 0
    levels = np.zeros(count, np.int64)  # (N,)
    lists: list[list[int]] = []  # of each level above 0: where the lists of links begin
    for element in range(count):
        (length,) = struct.unpack_from("=I", raw, at) if at + 4 <= len(raw) else (-1,)
        levels[element], rest = divmod(length, size)
        if length < 0 or rest or at + 4 + length > len(raw) or levels[element] > top:
            raise ValueError(f"the upper levels of {file.name} are cut off or of another shape")
        for level in range(levels[element]):
            if level == len(lists):
                lists.append([])
            lists[level].append(at + 4 + level * size)
        at += 4 + length
    if at != len(raw) or levels[entry] != top:
        raise ValueError(f"{file.name} has another end than its header says")
    for level, starts in enumerate(lists, 1):
        found = data[np.add.outer(np.array(starts), np.arange(size))]  # (elements of the level, bytes)
        _check_links(file, found, levels, level)


def _check_links(
    file: Path, lists: np.ndarray[tuple[int, int], np.dtype[np.uint8]], levels: IntArray, level: int
) -> None:
    """Raise ValueError unless all links lead to elements that are on this level too."""
    words = np.ascontiguousarray(lists).view(np.uint32)  # (L, 1 + places): the lower half of the first is the number
    number, links = words[:, 0] & 0xFFFF, words[:, 1:]
    if np.any(number > links.shape[1]):
        raise ValueError(f"{file.name} has an element with too many links")
    used = links[np.arange(links.shape[1]) < number[:, None]]
    if np.any(used >= len(levels)) or np.any(levels[used] < level):
        raise ValueError(f"{file.name} has a link that leads nowhere")
