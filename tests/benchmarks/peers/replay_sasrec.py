"""RePlay's SasRec, with cross-entropy over all items, in its own virtual environment. See peers/__main__.py."""

import json
import sys
import time
from pathlib import Path

import lightning
import numpy as np
import pandas as pd
import torch
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.sequential import SasRec
from replay.nn.transform.template import make_default_sasrec_transforms

asked = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(asked["threads"])
T, seconds = asked["length"], list[float]()

events = pd.read_csv(asked["events"]).sort_values(["user", "place"], kind="stable")
codes, items = pd.factorize(events["item"])
N = len(items)
rows = events.assign(item_id=codes).groupby("user")["item_id"].agg(list).reset_index()
file = Path(asked["answer"]).with_suffix(".parquet")
rows.rename(columns={"user": "user_id"}).to_parquet(file)

schema = TensorSchema(
    TensorFeatureInfo(
        name="item_id", is_seq=True, cardinality=N, padding_value=N, embedding_dim=asked["width"],
        feature_type=FeatureType.CATEGORICAL, feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
    )
)  # fmt: skip


class Clock(lightning.Callback):
    """Seconds of each epoch, data loading included."""

    def on_train_epoch_start(self, *_: object) -> None:
        self.began = time.perf_counter()

    def on_train_epoch_end(self, *_: object) -> None:
        seconds.append(time.perf_counter() - self.began)


model = SasRec.from_params(
    schema, embedding_dim=asked["width"], num_heads=1, num_blocks=asked["blocks"], max_sequence_length=T,
    dropout=asked["dropout"],
)  # fmt: skip
data = ParquetModule(
    batch_size=asked["batch"],
    metadata={"train": {"item_id": {"shape": T + 1, "padding": N}}},
    transforms={"train": make_default_sasrec_transforms(schema)["train"]},
    train_path=str(file),
)
trainer = lightning.Trainer(
    accelerator="cpu", devices=1, max_epochs=asked["epochs"], logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=[Clock()],
)  # fmt: skip
trainer.fit(LightningModule(model, optimizer_factory=OptimizerFactory(learning_rate=1e-3)), datamodule=data)

model.eval()
found = []
for start in range(0, len(rows), 128):
    part = rows.iloc[start : start + 128]
    packed = np.full((len(part), T), N)
    for at, history in enumerate(part["item_id"]):
        packed[at, -len(history[-T:]) :] = history[-T:]
    real = torch.from_numpy(packed != N)
    with torch.no_grad():
        logits = model(feature_tensors={"item_id": torch.from_numpy(packed)}, padding_mask=real)["logits"][:, :N]
    for at, (user, history) in enumerate(zip(part["user"], part["item_id"], strict=True)):
        logits[at, history] = -torch.inf
        best = logits[at].topk(10).indices.tolist()
        found += [(user, items[item], rank) for rank, item in enumerate(best, start=1)]
pd.DataFrame(found, columns=["user", "item", "rank"]).to_csv(asked["lists"], index=False)
Path(asked["answer"]).write_text(json.dumps({"seconds": seconds}))
