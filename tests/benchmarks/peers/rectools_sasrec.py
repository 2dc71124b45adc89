"""RecTools' SASRec, with softmax over all items, in its own virtual environment. See peers/__main__.py."""

import json
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

asked = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(asked["threads"])
seconds: list[float] = []


class Clock(Callback):
    """Seconds of each epoch, data loading included."""

    def on_train_epoch_start(self, *_: object) -> None:
        self.began = time.perf_counter()

    def on_train_epoch_end(self, *_: object) -> None:
        seconds.append(time.perf_counter() - self.began)


def trainer() -> Trainer:
    """One process, no validation, nothing written."""
    return Trainer(
        accelerator="cpu", devices=1, max_epochs=asked["epochs"], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Clock()],
    )  # fmt: skip


events = pd.read_csv(asked["events"])
frame = pd.DataFrame(
    {
        Columns.User: events["user"],
        Columns.Item: events["item"],
        Columns.Weight: 1.0,
        Columns.Datetime: pd.to_datetime(events["place"], unit="s"),
    }
)
dataset = Dataset.construct(frame)
model = SASRecModel(
    n_blocks=asked["blocks"], n_heads=1, n_factors=asked["width"], dropout_rate=asked["dropout"],
    session_max_len=asked["length"], loss="softmax", lr=1e-3, batch_size=asked["batch"], epochs=asked["epochs"],
    get_trainer_func=trainer,
)  # fmt: skip
model.fit(dataset)
lists = model.recommend(users=frame[Columns.User].unique(), dataset=dataset, k=10, filter_viewed=True)
lists = lists.rename(columns={Columns.User: "user", Columns.Item: "item", Columns.Rank: "rank"})
lists[["user", "item", "rank"]].to_csv(asked["lists"], index=False)
Path(asked["answer"]).write_text(json.dumps({"seconds": seconds}))
