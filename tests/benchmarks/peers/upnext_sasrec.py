"""Upnext's SASRec on the same file and with the same sizes as the others. See __main__.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from shared.events import IntArray
from shared.sequences import pack
from trainer.config import RunConfig
from trainer.curves import read_epochs
from trainer.dataset import Sequences
from trainer.train import Fitted, fit


def config(asked: dict[str, Any]) -> RunConfig:
    """SASRec as it was published, for so many epochs."""
    source = {"kind": "files", "events": asked["events"], "columns": {"user": "user", "item": "item"}}
    model = {
        "kind": "sasrec", "block": "original", "hidden_units": asked["width"], "blocks": asked["blocks"],
        "dropout": asked["dropout"], "max_length": asked["length"],
    }  # fmt: skip
    training = {
        "epochs": asked["epochs"], "batch_size": asked["batch"], "threads": asked["threads"], "gradient_clip": 0,
        "accelerator": "cpu", "length_window": asked["window"],
    }  # fmt: skip
    return RunConfig.model_validate(
        {"name": "sasrec", "data": {"source": source}, "model": model, "training": training}
    )


def lists(fitted: Fitted, users: IntArray, items: IntArray, sequences: Sequences) -> pl.DataFrame:
    """The ten best unseen items of each user."""
    found = []
    vectors = fitted.encoder.vectors.detach().numpy()
    for user, start, stop in zip(users, sequences.starts, sequences.stops, strict=True):
        history = sequences.item[start:stop]
        packed, lengths = pack([history], fitted.encoder.longest)
        scores = vectors @ encode(fitted, packed, lengths)  # (N,)
        scores[history - 1] = -np.inf
        best = np.argsort(-scores, kind="stable")[:10]
        found += [(int(user), int(items[item]), rank) for rank, item in enumerate(best, start=1)]
    return pl.DataFrame(found, schema=["user", "item", "rank"], orient="row")


def encode(fitted: Fitted, packed: IntArray, lengths: IntArray) -> Any:
    """The query vector (D,) of one packed history."""
    import torch

    with torch.no_grad():
        return fitted.encoder.query(torch.from_numpy(packed), torch.from_numpy(lengths)).numpy()[0]


def main() -> None:
    """Train as asked and leave seconds and lists where they are expected."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    events = pl.read_csv(asked["events"]).sort("user", "place", maintain_order=True)
    items, codes = np.unique(events["item"].to_numpy(), return_inverse=True)
    users, counts = np.unique(events["user"].to_numpy(), return_counts=True)
    stops = np.cumsum(counts)
    sequences = Sequences(codes.astype(np.int64) + 1, stops - counts, stops)
    folder = Path(asked["answer"]).parent / "runs"
    fitted = fit(config(asked), len(items), sequences, None, folder, epochs=asked["epochs"])
    lists(fitted, users, items, sequences).write_csv(asked["lists"])
    seconds = [row["seconds"] for row in read_epochs(folder / "epochs.csv")]
    Path(asked["answer"]).write_text(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
