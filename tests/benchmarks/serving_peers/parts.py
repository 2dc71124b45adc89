"""What all peers are made of: the files of a bundle, read plainly, and histories as lists in Redis.

Nothing of Upnext is imported: peers run in virtual environments of their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

REDIS_SOCKET = os.environ.get("PEER_REDIS_SOCKET", "")
MAX_LENGTH = 200


def key_of(user_id: str) -> str:
    """The Redis key of a list: all items of a user's history, oldest first."""
    return f"peers:history:{user_id}"


@dataclass(frozen=True)
class Item:
    """One line of the catalogue."""

    item_id: str
    title: str
    available_from: str


class Parts:
    """The model and the catalogue. Row r of `vectors` belongs to `items[r]`, which the network knows as r + 1."""

    def __init__(self, bundle: Path | None = None) -> None:
        bundle = bundle or Path(os.environ["PEER_BUNDLE"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        model = bundle / "models" / "sasrec"
        self.session = ort.InferenceSession(str(model / "encoder.onnx"), options, providers=["CPUExecutionProvider"])
        self.vectors: Floats = np.load(model / "vectors.npy")  # (N, D)
        rows = [json.loads(line) for line in (bundle / "items.jsonl").read_text().splitlines()]
        self.items = [Item(row["item_id"], row["title"], row["available_from"]) for row in rows]
        self.row_of = {item.item_id: row for row, item in enumerate(self.items)}
        self.available_from = np.array([datetime.fromisoformat(i.available_from).timestamp() for i in self.items])
        for length in range(8, MAX_LENGTH + 1, 8):  # allocations that a request should not pay for
            self.encode([np.zeros(length, np.int64)])

    def rows(self, item_ids: Sequence[Any]) -> Ints:
        """(L,) rows of the ids (text, though redis-py says it may be bytes) that are known."""
        return np.array([row for i in item_ids if (row := self.row_of.get(i)) is not None], np.int64)

    def encode(self, histories: Sequence[Ints]) -> Floats:
        """Query vectors (B, D) of histories of rows, none empty."""
        kept = [history[-MAX_LENGTH:] for history in histories]
        longest = max(map(len, kept))
        packed = np.zeros((len(kept), min(-(-longest // 8) * 8, MAX_LENGTH)), np.int64)  # (B, T), right-padded
        for at, history in enumerate(kept):
            packed[at, : len(history)] = history + 1
        lengths = np.array([len(history) for history in kept], np.int64)
        queries: Any = self.session.run(["query"], {"items": packed, "lengths": lengths})[0]
        return np.asarray(queries, np.float32)


def best(scores: Floats, n: int) -> Ints:
    """Rows of the n largest scores, best first."""
    found = np.argpartition(scores, len(scores) - n)[len(scores) - n :]
    return np.asarray(found[np.argsort(-scores[found])], np.int64)
