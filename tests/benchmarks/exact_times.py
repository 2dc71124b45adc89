"""MovieLens 1M: figures of runs over the users whose last event has an exact time, and over the others.

    python -m tests.benchmarks.exact_times runs/sasrec [another/run/sasrec ...]

No complete copy of the original times was to be had: one in seven is an estimate between exact ones. So a model that is
told the time of the event to guess is told an estimate for as many users. Each argument is the folder of a run that
was evaluated on the data beside the repository.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trainer.compare import CaseRanks, load_ranks
from trainer.metrics import intervals, metrics

EVENTS: Final = Path("../shared/data/ml-1m/interactions.parquet")
SHOWN: Final = ("hr@10", "ndcg@10")


def main() -> int:
    """Print a row for each run and group of users, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+")
    asked = parser.parse_args()
    if not EVENTS.is_file():
        print(f"needs MovieLens 1M in {EVENTS}", file=sys.stderr)
        return 1
    exact = users_with_exact_times()
    rows = []
    for run in asked.run:
        ranks = load_ranks(Path("runs"), run)
        told = np.isin(ranks.user, exact)
        for times, group in (("exact", told), ("estimated", ~told)):
            rows.append({"run": run, "times": times} | figures(ranks, group))
    for row in rows:
        shown = "".join(f"  {name} {row[name]:.4f} ({row['intervals'][name][0]:.4f} - {row['intervals'][name][1]:.4f})"
                        for name in SHOWN)  # fmt: skip
        print(f"{row['run']}: {row['users']:,} users, {row['times']}{shown}")
    print(json.dumps({"benchmark": "exact_times", "rows": rows}))
    return 0


def users_with_exact_times() -> NDArray[np.str_]:
    """Ids of the users whose last event, the one to guess in a test, has an exact time."""
    events = pl.scan_parquet(EVENTS).filter(pl.col("in_5core")).sort("user_id", "position")
    last = events.group_by("user_id").agg(pl.col("timestamp_err").last())
    return last.filter(pl.col("timestamp_err") == 0).collect()["user_id"].cast(pl.String).to_numpy().astype(str)


def figures(ranks: CaseRanks, group: NDArray[np.bool_]) -> dict[str, Any]:
    """Of the cases that `group` (C,) names."""
    rank = ranks.rank[group]
    names, users = np.unique(ranks.user[group], return_inverse=True)
    means = metrics(rank, (10,))
    return {"users": len(names), **{name: means[name] for name in SHOWN}, "intervals": intervals(rank, users, SHOWN)}


if __name__ == "__main__":
    sys.exit(main())
