"""How good is the vector of an item that nobody has used yet? Items are held out of training and guessed all the same.

A share of the items is drawn; every event on them is taken out of the data, and a model is trained on the rest. It then
knows those items by their metadata alone, as it would an item that came yesterday. Asked is each of their events: the
history is what the user did before with other items.

    user a   1 2 [7] 3 4 [8]     7 and 8 are held out
    trained on 1 2 3 4; guessed 7 after 1 2, and 8 after 1 2 3 4

Two rankings: among the held-out items alone (how well they are told apart), and among all (whether they come up beside
items with a past). Measured through the exported files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.encoder import Encoder
from shared.events import IntArray
from trainer.config import RunConfig
from trainer.dataset import Cases, Dataset, DatasetError, leave_one_out
from trainer.errors import InterruptedTrainingError
from trainer.evaluate import Scores, encode_cases, full_ranks, vector_scores
from trainer.export import export
from trainer.items import features_of
from trainer.metrics import intervals, metrics
from trainer.train import fit

CUTOFFS: Final = (10, 20, 50)
COLUMNS: Final = ("hr@10", "hr@20", "hr@50", "ndcg@10")


@dataclass(frozen=True)
class HeldOut:
    """Items that no model may know by its events, and the events on them."""

    items: IntArray  # (M,) item indices
    asked: Cases  # events on them, in data where these feed no sequence: histories hold other items alone

    @property
    def rest(self) -> Dataset:
        """The data to train on."""
        return self.asked.dataset


def hold_out(dataset: Dataset, share: float, seed: int) -> HeldOut:
    """Draw a share of the items with events. Raises DatasetError where that leaves nothing to ask or to train on."""
    used = np.unique(dataset.item[dataset.feeds])
    items = np.sort(np.random.default_rng(seed).choice(used, round(share * len(used)), replace=False))
    out = np.isin(dataset.item, items)
    rest = replace(dataset, feeds=dataset.feeds & ~out)
    rows = np.flatnonzero(dataset.feeds & out)
    some = [len(history) > 0 for history in Cases(rest, dataset.user[rows], rows).histories()]
    rows = rows[np.array(some, bool)]
    if not len(rows):
        raise DatasetError(f"a share of {share:g} of {len(used):,} items leaves nothing to ask, or nothing to train on")
    return HeldOut(items, Cases(rest, dataset.user[rows], rows))


def measure_cold(config: RunConfig, held: HeldOut, folder: Path, seed: int) -> dict[str, Any]:
    """Train without the held-out items and find them: recall (`hr`) and NDCG among them and among all items.

    Beside the model: `random`, `popular` (training events, of which a held-out item has none), and `popular, told`,
    which counts the held-out events too: what popularity could reach if it knew what it is asked.
    """
    split = leave_one_out(held.rest)
    features = features_of(held.rest, split.sequences, config.model.metadata, config.model.hidden_units)
    N = len(held.rest.catalogue)
    try:
        fitted = fit(config, N, split.sequences, split.validation, folder, features=features)
    except InterruptedTrainingError as error:
        raise InterruptedTrainingError(error.kept, "the same command begins anew") from None
    exported = export(fitted.encoder, config)
    _, queries = encode_cases(Encoder(exported.onnx, exported.spec), held.asked)
    rng = np.random.default_rng(seed)
    told = np.bincount(held.rest.item, minlength=N + 1)[1:].astype(np.float32)
    scores: dict[str, Scores] = {
        config.name: vector_scores(queries, exported.vectors),
        "random": lambda part: rng.random((len(part), N), np.float32),
        "popular": _same_for_all(np.bincount(split.sequences.item, minlength=N + 1)[1:].astype(np.float32)),
        "popular, told": _same_for_all(told),
    }
    return {
        "items": len(held.items),
        "of_items": N,
        "cases": len(held.asked),
        "users": len(np.unique(held.asked.user)),
        "fields": [] if features is None else list(features.spec.fields),
        "epochs": fitted.epochs,
        "validation_ndcg@10": fitted.best,
        "among_held_out": {name: _figures(held, _only(held.items, s)) for name, s in scores.items()},
        "among_all": {name: _figures(held, s) for name, s in scores.items()},
    }


def _same_for_all(values: NDArray[np.float32]) -> Scores:
    return lambda part: np.tile(values, (len(part), 1))


def _only(items: IntArray, scores: Scores) -> Scores:
    """The scores of these items; others are behind all."""

    def chosen(part: IntArray) -> NDArray[np.floating[Any]]:
        table = np.asarray(scores(part))
        found = np.full(table.shape, -np.inf, np.float32)
        found[:, items - 1] = table[:, items - 1]
        return found

    return chosen


def _figures(held: HeldOut, scores: Scores) -> dict[str, Any]:
    ranks, users = full_ranks(held.asked, scores), held.asked.user
    return {**metrics(ranks, CUTOFFS, users), "intervals": intervals(ranks, users, COLUMNS)}


def cold_table(found: Mapping[str, Any]) -> str:
    """The figures as text."""
    lines = []
    for part, title in (("among_held_out", "among the held-out items"), ("among_all", "among all items")):
        lines.append(f"{title:<26}" + "".join(f"{c:>9}" for c in COLUMNS) + "   95 % of hr@10")
        for name, row in found[part].items():
            low, high = row["intervals"]["hr@10"]
            lines.append(f"  {name:<24}" + "".join(f"{row[c]:9.4f}" for c in COLUMNS) + f"   {low:.4f} - {high:.4f}")
    return "\n".join(lines)
