"""An ONNX encoder: histories of item indices in, query vectors out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

# A recommender has no business calling home: onnxruntime reads this when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from shared.events import IntArray
from shared.sequences import BUCKETS, bucket_of, mask_index, pack

Vectors = NDArray[np.float32]

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
        self.spec = spec
        source = model if isinstance(model, bytes) else str(model)
        self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def encode(self, histories: Sequence[IntArray]) -> Vectors:
        """Query vectors (B, D), float32, of B histories of known item indices, each oldest first and not empty."""
        queries = np.empty((len(histories), self.spec.width), np.float32)
        extra = 0 if self.spec.mask is None else 1
        by_bucket: dict[int, list[int]] = {}
        for row, history in enumerate(histories):
            bucket = bucket_of(len(history) + extra, self.spec.max_length, self.spec.buckets)
            by_bucket.setdefault(bucket, []).append(row)
        for bucket, rows in sorted(by_bucket.items()):
            for start in range(0, len(rows), CHUNK):
                chunk = rows[start : start + CHUNK]
                packed = pack([histories[r] for r in chunk], self.spec.max_length, mask=self.spec.mask, width=bucket)
                queries[chunk] = self.run(*packed)
        return queries

    def run(self, items: IntArray, lengths: IntArray) -> Vectors:
        """The bare network: packed items (B, T) and lengths (B,) to query vectors (B, D)."""
        (queries,) = self.session.run(["query"], {"items": items, "lengths": lengths})
        return np.asarray(queries, np.float32)
