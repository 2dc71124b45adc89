"""What a training with a million items takes: memory, and time of a step.

    python -m tests.benchmarks.million_items

Made-up sequences, SASRec of width 64 and length 200, sampled softmax with 1,024 negatives from all items and as many
from the batch; everything that a training holds, optimiser included, but for the reading of events (see histories.py).
"""

from __future__ import annotations

import json
import resource
import tempfile
from pathlib import Path
from typing import Final

import numpy as np
import typer

from trainer.config import RunConfig
from trainer.curves import read_epochs
from trainer.dataset import Sequences
from trainer.train import fit

USERS: Final = 20 * 128


def main(*, items: int = 1_000_000, threads: int = 1) -> None:
    """Print a line for people and one of JSON."""
    lengths = np.random.default_rng(0).integers(20, 400, USERS)
    stops = np.cumsum(lengths)
    item = np.random.default_rng(1).integers(1, items + 1, int(stops[-1]))
    config = RunConfig.model_validate(
        {
            "name": "sasrec",
            "data": {"source": {"kind": "ml-100k"}},
            "model": {"kind": "sasrec", "max_length": 200},
            "training": {
                "loss": "sampled_softmax", "negatives": 1024, "in_batch_negatives": 1024, "batch_size": 128,
                "threads": threads, "accelerator": "cpu",
            },
        }
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        fit(config, items, Sequences(item, stops - lengths, stops), None, Path(folder), epochs=1)
        seconds = read_epochs(Path(folder) / "epochs.csv")[0]["seconds"]
    found = {"items": items, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
             "step_s": seconds / (USERS / 128)}  # fmt: skip
    print(f"{items:,} items: {found['peak_gb']:.1f} GB at most, {found['step_s']:.2f} s a step of 128 users")
    print(json.dumps({"benchmark": "million_items", **found}))


if __name__ == "__main__":
    typer.run(main)
