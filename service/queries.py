"""Query vectors, remembered: who asks twice without doing anything in between is encoded once.

A vector is a function of the sequence that the network reads and of nothing else, so it is kept under a digest of that,
for as long as the bundle is live. An encoder with a clock reads the time of the question too: nothing repeats, and
nothing is kept.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from shared.encoder import Encoder, Vectors
from shared.events import IntArray


class Encoded(NamedTuple):
    """Query vectors, and how many of them were remembered."""

    queries: Vectors  # (B, D)
    remembered: int


class QueryVectors:
    """The newest `most` query vectors that were asked for of one encoder. Safe to call from several threads."""

    def __init__(self, encoder: Encoder, most: int) -> None:
        self.encoder = encoder
        self._most = most if encoder.spec.clock == "none" else 0
        self._vectors = np.empty((self._most, encoder.spec.width), np.float32)  # pages that are used, and no others
        self._rows: OrderedDict[bytes, int] = OrderedDict()  # digest -> row, in the order of the last question
        self._lock = threading.Lock()

    def encode(self, sequences: Sequence[IntArray], times: Sequence[IntArray]) -> Encoded:
        """As `Encoder.encode`."""
        if not self._most:
            return Encoded(self.encoder.encode(sequences, times), 0)
        longest = self.encoder.spec.max_length
        digests = [hashlib.blake2b(s[-longest:].tobytes(), digest_size=16).digest() for s in sequences]
        queries = np.empty((len(sequences), self.encoder.spec.width), np.float32)
        with self._lock:
            missing = [b for b, digest in enumerate(digests) if not self._recall(digest, queries[b])]
        if missing:
            queries[missing] = self.encoder.encode([sequences[b] for b in missing], [times[b] for b in missing])
            with self._lock:
                for b in missing:
                    self._keep(digests[b], queries[b])
        return Encoded(queries, len(sequences) - len(missing))

    def _recall(self, digest: bytes, query: Vectors) -> bool:
        """Write the vector to `query` (D,) if it is there."""
        if (row := self._rows.get(digest)) is None:
            return False
        self._rows.move_to_end(digest)
        query[:] = self._vectors[row]
        return True

    def _keep(self, digest: bytes, query: Vectors) -> None:
        row = self._rows.pop(digest, None)  # somebody else may have made it meanwhile
        if row is None:
            row = len(self._rows) if len(self._rows) < self._most else self._rows.popitem(last=False)[1]
        self._vectors[row] = query
        self._rows[digest] = row
