"""Training speed, and quality after the same number of epochs, of SASRec here, in RecTools, RePlay and RecBole.

    python -m tests.benchmarks.peers tests/benchmarks/ml-1m.yaml --epochs 2
    python -m tests.benchmarks.peers tests/benchmarks/amazon-beauty.yaml --steps 0

Each library is installed into a virtual environment of its own below `--venvs` (a folder that stays), and trains in a
process of its own, one after another, on the same events: what leave-one-out leaves for training. All have the same
width, blocks, length, dropout, users a batch, threads, Adam with 1e-3 and cross-entropy over all items. Seconds are
those of the fastest epoch, data loading included. Quality is NDCG@10 of the test events over all items, seen ones left
out. RecBole makes a row of every prefix: some steps are timed, and its users a second are of a whole such epoch; with
`--steps 0` it trains whole epochs too, which on MovieLens 1M takes hours, and has a quality.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import polars as pl
import typer

from tests.benchmarks.venvs import python_with
from trainer.config import load_config
from trainer.dataset import Dataset, load_dataset
from trainer.splits import split_of

HERE: Final = Path(__file__).parent
TORCH: Final = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """A library to train with."""

    name: str
    script: str
    packages: tuple[str, ...] = ()  # none: this project, by the Python that runs this
    window: int = 1  # Upnext: batches in which users are sorted by length; 1 is batches at random, as the others have


PEERS: Final = (
    Peer("upnext", "upnext_sasrec.py", window=20),
    Peer("upnext, random batches", "upnext_sasrec.py"),
    Peer("rectools", "rectools_sasrec.py", ("rectools[torch]==0.19.0",)),
    Peer("replay", "replay_sasrec.py", ("replay-rec[torch]==0.22.0",)),
    Peer("recbole", "recbole_sasrec.py", ("recbole==1.2.1", "numpy<2", "pandas<3")),
)


def python_of(peer: Peer, venvs: Path) -> Path:
    """The Python that has the peer, installed now where it was not."""
    if not peer.packages:
        return Path(sys.executable)
    return python_with(peer.name, (TORCH, *peer.packages), venvs)


def write_events(dataset: Dataset, config: Any, folder: Path) -> tuple[Path, pl.DataFrame]:
    """The training events as numbers, user, item and place in the history; and user and item of the test events."""
    split = split_of(dataset, config.evaluation)
    sequences = split.sequences
    lengths = sequences.lengths
    users = np.repeat(np.arange(len(sequences)), lengths)
    place = np.arange(len(users)) - np.repeat(sequences.starts, lengths)
    events = pl.DataFrame({"user": users, "item": sequences.item, "place": place})
    events.write_csv(folder / "events.csv")
    # Sequences leave out users without training events; here every user with a test has one.
    kept = np.flatnonzero(np.diff(dataset.offsets) > 0)
    number = {int(user): at for at, user in enumerate(kept)}
    asked = [number[int(user)] for user in split.test.user]
    return folder / "events.csv", pl.DataFrame({"user": asked, "item": split.test.target})


def ndcg(lists: Path, tests: pl.DataFrame) -> float:
    """NDCG@10 of the test events."""
    found = pl.read_csv(lists).select(pl.all().cast(pl.Int64))
    hits = tests.select(pl.all().cast(pl.Int64)).join(found, on=["user", "item"], how="left")
    return float((1 / (hits["rank"].cast(pl.Float64) + 1).log(2)).fill_null(0.0).mean() or 0.0)  # type: ignore[arg-type]


def measure(peer: Peer, python: Path, asked: dict[str, Any], tests: pl.DataFrame, users: int) -> dict[str, Any]:
    """Users a second and quality of one peer; what it said where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        told = asked | {"window": peer.window, "lists": str(place / "lists.csv"), "answer": str(place / "a.json")}
        (place / "asked.json").write_text(json.dumps(told))
        environment = os.environ | {f"{name}_NUM_THREADS": str(asked["threads"]) for name in ("OMP", "OPENBLAS")}
        environment |= {"PYTHONPATH": str(Path.cwd()) if not peer.packages else "", "PYTHONWARNINGS": "ignore"}
        command = [str(python), str(HERE / peer.script), str(place / "asked.json")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"peer": peer.name, "failed": done.stderr.strip().splitlines()[-1:]}
        answer = json.loads((place / "a.json").read_text())
        quality = ndcg(place / "lists.csv", tests) if (place / "lists.csv").exists() else None
        return {"peer": peer.name, "users_per_s": users / min(answer["seconds"]), "ndcg@10": quality, **answer}


def main(
    preset: str,
    *,
    epochs: int = 1,
    threads: int = 1,
    steps: Annotated[int, typer.Option(help="Steps of RecBole's epoch that are run; 0: all of every epoch.")] = 20,
    venvs: Path = Path("var/peers"),
    only: Annotated[list[str] | None, typer.Option(help="Peers to run; all otherwise.")] = None,
) -> None:
    """Print a table and one JSON line."""
    config = load_config(preset, [])
    dataset, _ = load_dataset(config.data)
    peers = [p for p in PEERS if not only or p.name in only]
    with tempfile.TemporaryDirectory() as folder:
        events, tests = write_events(dataset, config, Path(folder))
        users = pl.read_csv(events)["user"].n_unique()
        asked = {
            "events": str(events), "epochs": epochs, "threads": threads, "steps": steps, "width": 64, "blocks": 2,
            "dropout": config.model.dropout, "length": config.model.max_length, "batch": 128,
        }  # fmt: skip
        rows = [measure(peer, python_of(peer, venvs), asked, tests, users) for peer in peers]
    base = rows[0].get("users_per_s", float("nan"))
    print(f"{preset}: {users:,} users, T {asked['length']}, d 64, batch 128, {threads} thread(s), {epochs} epoch(s)")
    print(f"{'':24}{'users/s':>9}{'upnext is':>12}{'NDCG@10':>10}")
    for row in rows:
        if "failed" in row:
            print(f"{row['peer']:24}failed: {row['failed']}")
            continue
        quality = "-" if row["ndcg@10"] is None else f"{row['ndcg@10']:.4f}"
        print(f"{row['peer']:24}{row['users_per_s']:9.1f}{base / row['users_per_s']:11.1f}x{quality:>10}")
    print(json.dumps({"benchmark": "peers", "preset": preset, "epochs": epochs, "threads": threads, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
