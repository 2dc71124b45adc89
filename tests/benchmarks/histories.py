"""How long histories take from a Parquet file with many events, and how much memory.

    python -m tests.benchmarks.histories                    50 million events
    python -m tests.benchmarks.histories --events 5000000

Made-up events of 1 user in 50 events and 100,000 items, some of them far more popular, in no order of users. Reading,
numbering, sorting and splitting run in a process of their own, whose largest size counts; that file is made before.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import polars as pl
import typer

from shared.times import DAY, SECOND, of_year

ITEMS: Final = 100_000
PART: Final = 5_000_000


def write_events(file: Path, events: int) -> None:
    """Columns user, item (text) and time (microseconds)."""
    rng = np.random.default_rng(0)
    parts: list[Path] = []
    for start in range(0, events, PART):
        count = min(PART, events - start)
        users = rng.integers(0, max(1, events // 50), count)
        items = np.minimum(rng.zipf(1.3, count) - 1, ITEMS - 1) * 7919 % ITEMS  # popular items are not the first ones
        times = of_year(2024) + rng.integers(0, 700 * DAY // SECOND, count) * SECOND
        named = [
            (prefix + pl.Series(name, codes).cast(pl.String)).alias(name)
            for name, prefix, codes in (("user", "u", users), ("item", "i", items))
        ]
        parts.append(file.with_suffix(f".{len(parts)}"))
        pl.DataFrame([*named, pl.Series("time", times)]).write_parquet(parts[-1])
    pl.scan_parquet(parts).sink_parquet(file)
    for part in parts:
        part.unlink()


def read(file: str) -> None:
    """What every training begins with; prints one JSON line."""
    from trainer.config import DataConfig
    from trainer.dataset import leave_one_out, load_dataset

    columns = {"user": "user", "item": "item", "time": "time"}
    config = DataConfig.model_validate({"source": {"kind": "files", "events": file, "columns": columns}})
    began = time.perf_counter()
    dataset, raw = load_dataset(config)
    del raw
    loaded = time.perf_counter() - began
    split = leave_one_out(dataset)
    answer = {
        "events": len(dataset.item), "users": len(dataset.users), "items": len(dataset.catalogue),
        "load_s": round(loaded, 1), "split_s": round(time.perf_counter() - began - loaded, 1),
        "cases": len(split.test), "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }  # fmt: skip
    print(json.dumps(answer))


def main(
    *,
    count: Annotated[int, typer.Option("--events")] = 50_000_000,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print a table and one JSON line."""
    if child:
        read(child)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "events.parquet"
        write_events(file, count)
        size = file.stat().st_size
        command = [sys.executable, "-m", "tests.benchmarks.histories", "--child", str(file)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(said.splitlines()[-1])
    print(
        f"{found['events']:,} events of {found['users']:,} users and {found['items']:,} items, {size / 2**20:,.0f} MB"
    )
    print(f"read, numbered, sorted {found['load_s']:8.1f} s")
    print(f"split                  {found['split_s']:8.1f} s")
    print(f"largest size           {found['peak_gb']:8.1f} GB")
    print(json.dumps({"benchmark": "histories", **found}))


if __name__ == "__main__":
    typer.run(main)
