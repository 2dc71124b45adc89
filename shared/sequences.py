"""Packing: from histories of any length to the rectangle an encoder reads. One function for both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from shared.events import IntArray
from shared.times import SECOND

Clock = Literal["none", "events", "query"]
"""What an encoder is told of time: nothing, how long before the newest event each event was, or how long before the
question."""

PAD: Final = 0  # item index 0 is never an item
BUCKETS: Final = tuple(range(8, 201, 8))
"""Lengths T that rectangles come in: time grows with T, and half a step of padding on average is little."""
BUCKET_WIDTH: Final = 0.301
LARGEST_BUCKET: Final = 127
"""Times apart are told in steps of a third or so: bucket b begins at exp(0.301 b) seconds (HSTU, Zhai et al. 2024)."""


def mask_index(item_count: int) -> int:
    """MASK = N + 1: the token that BERT4Rec reads as "what stands here?"."""
    return item_count + 1


def bucket_of(length: int, max_length: int, buckets: Sequence[int] = BUCKETS) -> int:
    """The smallest bucket that holds `length`, at most `max_length`."""
    return next((b for b in buckets if length <= b < max_length), max_length)


def pack(
    histories: Sequence[Sequence[int] | IntArray],
    max_length: int,
    *,
    mask: int | None = None,
    width: int | None = None,
) -> tuple[IntArray, IntArray]:
    """Keep the newest items of each history, right-padded with PAD; items (B, T) and lengths (B,).

        pack([[7, 8, 9], [4]], 2)          -> [[8, 9], [4, 0]], [2, 1]
        pack([[7, 8, 9], [4]], 3, mask=99) -> [[8, 9, 99], [4, 99, 0]], [3, 2]

    With `mask`, the newest `max_length - 1` items are kept and `mask` is put behind them; it counts
    as length. T is `width` where given (at least the longest row), else the longest row's length.
    Positions run forward from 0, and the query of a row stands at `lengths - 1`. Items must already be
    known ones: a row without any item and without mask would have no query, so it is a ValueError.
    """
    arrays = [np.asarray(h, np.int64) for h in histories]
    if len(arrays) == 1:
        return _pack_one(arrays[0], max_length, mask, width)
    stops = np.cumsum([len(a) for a in arrays], dtype=np.int64)  # (B,)
    starts = stops - np.fromiter((len(a) for a in arrays), np.int64, len(arrays))
    flat = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
    return pack_slices(flat, starts, stops, max_length, mask=mask, width=width)


def _pack_one(history: IntArray, max_length: int, mask: int | None, width: int | None) -> tuple[IntArray, IntArray]:
    """`pack` for one history, as requests come: a fifth of the time."""
    kept = history[max(len(history) - _room(max_length, mask), 0) :]
    length = len(kept) + (mask is not None)
    if length < 1:
        raise ValueError(NOTHING)
    items = np.full((1, length if width is None else width), PAD, np.int64)
    items[0, : len(kept)] = kept
    if mask is not None:
        items[0, len(kept)] = mask
    return items, np.array([length], np.int64)


def _room(max_length: int, mask: int | None) -> int:
    """How many items fit."""
    room = max_length if mask is None else max_length - 1
    if room < 1:
        raise ValueError(f"max_length {max_length} leaves no room for an item")
    return room


NOTHING: Final = "a history without a known item cannot be packed"


def pack_slices(
    flat: IntArray,
    starts: IntArray,
    stops: IntArray,
    max_length: int,
    *,
    mask: int | None = None,
    width: int | None = None,
) -> tuple[IntArray, IntArray]:
    """`pack` for histories that lie in one array: history b is `flat[starts[b]:stops[b]]`. No loop over rows."""
    kept = np.minimum(stops - starts, _room(max_length, mask))  # (B,)
    lengths = kept + (mask is not None)
    if len(lengths) and lengths.min() < 1:
        raise ValueError(NOTHING)
    T = int(lengths.max(initial=1)) if width is None else width
    column = np.arange(T)  # (T,)
    at = (stops - kept)[:, None] + column  # (B, T) position in flat
    items = np.full(at.shape, PAD, np.int64)
    real = column < kept[:, None]  # (B, T)
    items[real] = flat[at[real]]
    if mask is not None:
        items[np.arange(len(lengths)), kept] = mask
    return items, lengths


def time_buckets(times: IntArray, clock: Clock, largest: int, *, masked: bool = False) -> NDArray[np.int32]:
    """How long before each position's moment each event was: (B, T, T) buckets, 0 for a second or less.

    `times` are packed epoch microseconds. They are (B, T + 1) for a causal encoder: of its T events and, behind the
    last of each row, of the question. The moment of position t is the time of event t ("events"), or of event t + 1,
    which it is to guess ("query"). A `masked` encoder is asked at MASK, which stands in the row: times are (B, T) and
    the moment of each position is its own. Differences are taken in integers; what is farther apart than anything
    that training saw counts as `largest`.
    """
    seconds = times // SECOND
    seen = seconds if masked else seconds[:, :-1]  # (B, T)
    asked = seconds[:, 1:] if clock == "query" and not masked else seen  # (B, T)
    apart = np.abs(asked[:, :, None] - seen[:, None, :]).astype(np.float32)  # (B, T, T)
    np.maximum(apart, 1.0, out=apart)
    np.log(apart, out=apart)
    apart *= np.float32(1 / BUCKET_WIDTH)
    np.minimum(apart, np.float32(largest), out=apart)
    buckets: NDArray[np.int32] = apart.astype(np.int32)
    return buckets
