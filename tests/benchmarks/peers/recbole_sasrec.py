"""RecBole's SASRec, with cross-entropy over all items, in its own virtual environment. See peers/__main__.py.

It makes a row of every prefix of a history, so that an epoch has as many rows as there are events; only the first steps
of an epoch are run, and the speed is that of the whole epoch that they belong to.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec

asked = json.loads(Path(sys.argv[1]).read_text())
events = pd.read_csv(asked["events"])
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
            # Both held-out parts must have something in them; what they take is counted below.
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        },
    )  # fmt: skip
    torch.set_num_threads(asked["threads"])
    dataset = create_dataset(config)
    train, _, _ = data_preparation(config, dataset)
model = SASRec(config, train.dataset)
adam = torch.optim.Adam(model.parameters(), 1e-3)
model.train()
steps: list[float] = []
began = time.perf_counter()
for batch in train:
    loss = model.calculate_loss(batch)
    adam.zero_grad()
    loss.backward()
    adam.step()
    steps.append(time.perf_counter() - began)
    if len(steps) > asked["steps"]:
        break
    began = time.perf_counter()
per_step = sum(steps[1:]) / len(steps[1:])
Path(asked["answer"]).write_text(json.dumps({"seconds": [per_step * len(train)], "rows": len(train.dataset)}))
