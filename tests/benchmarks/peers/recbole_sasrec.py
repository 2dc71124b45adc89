"""RecBole's SASRec, with cross-entropy over all items, in its own virtual environment. See peers/__main__.py.

It makes a row of every prefix of a history, so that an epoch has as many rows as there are events. Where only some
steps are asked for, the speed is that of the whole epoch that they belong to, and there is no quality.
"""

import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec

asked = json.loads(Path(sys.argv[1]).read_text())
events = pd.read_csv(asked["events"])
# RecBole keeps the last two events of a user for itself. Two more than there are leave it every real one to train on,
# and the first of them is asked about with the whole real history: that is the list to measure.
last = events.sort_values("place", kind="stable").groupby("user").tail(1)
events = pd.concat([events, *(last.assign(place=last["place"] + more) for more in (1, 2))])
with tempfile.TemporaryDirectory() as folder:
    place = Path(folder) / "events"
    place.mkdir()
    header = {"user": "user_id:token", "item": "item_id:token", "place": "timestamp:float"}
    events.rename(columns=header)[list(header.values())].to_csv(place / "events.inter", sep="\t", index=False)
    config = Config(
        model="SASRec",
        dataset="events",
        config_dict={
            "data_path": folder, "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "use_gpu": False,
            "MAX_ITEM_LIST_LENGTH": asked["length"], "train_batch_size": asked["batch"], "loss_type": "CE",
            "train_neg_sample_args": None, "n_layers": asked["blocks"], "n_heads": 1, "hidden_size": asked["width"],
            "inner_size": asked["width"], "hidden_dropout_prob": asked["dropout"],
            "attn_dropout_prob": asked["dropout"], "show_progress": False,
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        },
    )  # fmt: skip
    torch.set_num_threads(asked["threads"])
    dataset = create_dataset(config)
    train, whole, _ = data_preparation(config, dataset)
model = SASRec(config, train.dataset)
adam = torch.optim.Adam(model.parameters(), 1e-3)
seconds: list[float] = []
model.train()
for _ in range(asked["epochs"] if asked["steps"] == 0 else 1):
    steps: list[float] = []
    began = time.perf_counter()
    for batch in islice(train, asked["steps"] + 1) if asked["steps"] else train:
        loss = model.calculate_loss(batch)
        adam.zero_grad()
        loss.backward()
        adam.step()
        steps.append(time.perf_counter() - began)
        began = time.perf_counter()
    seconds.append(sum(steps[1:]) / len(steps[1:]) * len(train))
if asked["steps"] == 0:
    model.eval()
    items = {user: list(found) for user, found in events.groupby("user")["item"]}
    rows = []
    for batch, *_ in whole:
        with torch.no_grad():
            scores = model.full_sort_predict(batch)  # (B, N + 1): the first is padding
        scores[:, 0] = -torch.inf
        for token, found in zip(dataset.id2token("user_id", batch["user_id"]), scores, strict=True):
            user = int(token)
            found[dataset.token2id("item_id", [str(item) for item in items[user]])] = -torch.inf
            best = dataset.id2token("item_id", found.topk(10).indices)
            rows += [(user, int(item), rank) for rank, item in enumerate(best, start=1)]
    pd.DataFrame(rows, columns=["user", "item", "rank"]).to_csv(asked["lists"], index=False)
Path(asked["answer"]).write_text(json.dumps({"seconds": seconds, "rows": len(train.dataset)}))
