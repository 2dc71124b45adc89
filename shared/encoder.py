"""An ONNX encoder: histories of item indices in, query vectors out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

# A recommender has no business calling home: onnxruntime reads this when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from shared.events import IntArray
from shared.sequences import BUCKETS, Clock, bucket_of, mask_index, pack, time_buckets

Vectors = NDArray[np.float32]

PADDING: Final = 48
"""Positions of padding that take about as long as another call."""
CHUNK: Final = 16
"""Histories encoded in one call at most: more gain nothing per item and hold up everybody else."""


class EncoderSpec(BaseModel):
    """What the service must know to feed an encoder. Part of the manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = Field(description="What was trained: sasrec or bert4rec.")
    item_count: int = Field(ge=1, description="N: indices 1..N are items, 0 is PAD, N + 1 is MASK.")
    width: int = Field(ge=1, description="D: length of a query vector.")
    max_length: int = Field(ge=2, description="T: items read at most, MASK included.")
    asks_with_mask: bool = Field(description="Whether MASK is put behind the history to ask for what follows.")
    buckets: tuple[int, ...] = BUCKETS
    clock: Clock = Field("none", description="Whether it reads times, and what they are measured from.")
    largest_time: int = Field(0, ge=0, description="Largest bucket of time that training saw.")

    def ages(self, times: Sequence[IntArray], width: int | None = None) -> NDArray[np.int32]:
        """Buckets (B, T, T) for rows packed to `width` T (the longest row's length otherwise); times (L + 1,) each."""
        longest, extra = (self.max_length, 0) if self.asks_with_mask else (self.max_length + 1, 1)
        packed, _ = pack(times, longest, width=None if width is None else width + extra)
        return time_buckets(packed, self.clock, self.largest_time, masked=self.asks_with_mask)

    @property
    def mask(self) -> int | None:
        """The MASK index for `pack`, or None."""
        return mask_index(self.item_count) if self.asks_with_mask else None


class Encoder:
    """An onnxruntime session with the packing that its model was trained with.

    One thread: several workers with a pool of threads each would fight for the same cores.
    Safe to call from several threads.
    """

    def __init__(self, model: Path | bytes, spec: EncoderSpec) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # a plan of memory kept for each shape: megabytes, and not faster
        self.spec = spec
        source = model if isinstance(model, bytes) else str(model)
        self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def encode(self, histories: Sequence[IntArray], times: Sequence[IntArray] | None = None) -> Vectors:
        """Query vectors (B, D), float32, of B histories of known item indices, each oldest first and not empty.

        `times` are needed by an encoder with a clock and not looked at by others: for each history of L items L + 1
        epoch microseconds, of its events and, last, of the question.
        """
        if self.spec.clock != "none" and times is None:
            raise ValueError(f"an encoder with clock {self.spec.clock!r} must be told the times of the events")
        queries = np.empty((len(histories), self.spec.width), np.float32)
        extra = 0 if self.spec.mask is None else 1
        by_bucket: dict[int, list[int]] = {}
        for row, history in enumerate(histories):
            bucket = bucket_of(len(history) + extra, self.spec.max_length, self.spec.buckets)
            by_bucket.setdefault(bucket, []).append(row)
        for bucket, rows in merged(by_bucket):
            for start in range(0, len(rows), CHUNK):
                chunk = rows[start : start + CHUNK]
                packed = pack([histories[r] for r in chunk], self.spec.max_length, mask=self.spec.mask, width=bucket)
                if self.spec.clock == "none" or times is None:
                    queries[chunk] = self.run(*packed)
                else:
                    queries[chunk] = self.run(*packed, self.spec.ages([times[r] for r in chunk], bucket))
        return queries

    def run(self, items: IntArray, lengths: IntArray, ages: NDArray[np.int32] | None = None) -> Vectors:
        """The bare network: packed items (B, T), lengths (B,), with a clock ages (B, T, T), to query vectors (B, D)."""
        inputs = {"items": items, "lengths": lengths} | ({} if ages is None else {"ages": ages})
        (queries,) = self.session.run(["query"], inputs)
        return np.asarray(queries, np.float32)


def merged(rows_of: Mapping[int, list[int]]) -> Iterator[tuple[int, list[int]]]:
    """The calls that encode rows, given by their bucket: few rows go along with those of the next larger bucket.

    merged({16: [0], 24: [1, 2], 200: [3]}) -> (200, [3]), (24, [1, 2, 0])
    """
    largest, together = 0, list[int]()
    for bucket, rows in sorted(rows_of.items(), reverse=True):
        if together and len(rows) * (largest - bucket) > PADDING:
            yield largest, together
            together = []
        largest, together = (largest, together + rows) if together else (bucket, rows)
    if together:
        yield largest, together
