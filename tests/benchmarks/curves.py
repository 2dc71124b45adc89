"""Validation NDCG@10 of several trainings by epoch, as one picture: the README's.

    python -m tests.benchmarks.curves --out curves.svg --above 0.1 SASRec=runs/sasrec BERT4Rec=runs/bert4rec

Each argument is a name for the legend and the folder of a run on a split. What lies below `--above` is left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from trainer.curves import read_epochs
from trainer.page import CHART, COLOURS, curves

VALUE: Final = "val_ndcg@10"


def main() -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="name=run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--above", type=float, default=0.0)
    asked = parser.parse_args()
    series = {}
    for run in asked.runs:
        name, _, folder = run.partition("=")
        rows = read_epochs(Path(folder) / "split" / "epochs.csv")
        series[name] = [(row["epoch"], row[VALUE]) for row in rows if row.get(VALUE, 0) > asked.above]
        if not series[name]:
            print(f"{run}: no validation above {asked.above} in {folder}/split/epochs.csv", file=sys.stderr)
            return 1
    opening, _, drawn = curves(series, kept=0).partition(">")
    # Standing alone it brings the page's colours along, and a ground that they are made for.
    ground = '<rect width="100%" height="100%" style="fill: var(--card)"/>'
    asked.out.write_text(
        f'{opening} xmlns="http://www.w3.org/2000/svg">'
        f"<title>Validation NDCG@10 by epoch</title><style>{COLOURS}{CHART}</style>{ground}{drawn}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
