"""Values of each epoch in a small CSV beside the checkpoints, for the report and for anybody's own plots.

epoch,seconds,train_loss,val_ndcg@10,val_hr@10,val_mrr
1,3.1,5.2210,0.0312,0.0701,0.0298
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

Row = dict[str, float]


class EpochLog(Callback):
    """Writes a row after each epoch; after a resume, rows of epochs that are trained again are written anew."""

    def __init__(self, file: Path) -> None:
        self.file, self.began, self.validated = file, 0.0, False

    def on_train_epoch_start(self, _trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Start the clock."""
        self.began, self.validated = time.monotonic(), False

    def on_validation_end(self, _trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """This epoch has values of its own: Lightning keeps those of the last validation otherwise."""
        self.validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Every scalar that was logged in this epoch, validation included; the first of several processes writes."""
        if not trainer.is_global_zero:
            return
        epoch = trainer.current_epoch + 1
        earlier = [row for row in read_epochs(self.file) if row["epoch"] < epoch]
        fresh = ((n, v) for n, v in trainer.callback_metrics.items() if self.validated or not n.startswith("val_"))
        values = {name: float(value) for name, value in fresh}
        row = {"epoch": epoch, "seconds": round(time.monotonic() - self.began, 3), **values}
        write_epochs(self.file, [*earlier, row])


def write_epochs(file: Path, rows: list[Row]) -> None:
    """Columns are all names of all rows; a cell without a value is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", newline="") as opened:
        table = csv.DictWriter(opened, names)
        table.writeheader()
        table.writerows({**row, "epoch": int(row["epoch"])} for row in rows)


def read_epochs(file: Path) -> list[Row]:
    """Rows of `write_epochs`, empty cells left out; none where there is no file."""
    if not file.is_file():
        return []
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    return [{name: float(cell) for name, cell in row.items() if cell} for row in rows]
