"""What a run was and what it reached, in one place: `report.json` for programs, `report.html` for people.

Both hold the same numbers; `trainer.page` only draws them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from shared.events import IntArray
from shared.times import DAY, END, UNDATED
from trainer.config import RunConfig, flat
from trainer.curves import read_epochs
from trainer.dataset import Cases, Split
from trainer.metrics import intervals, metrics
from trainer.page import page

GROUPED: Final = ("ndcg@10", "hr@10")
LENGTHS: Final = (1, 6, 11, 21, 51, 101, 201)  # first value of each group
COUNTS: Final = (0, 1, 10, 50, 100, 500, 1_000, 5_000)
DAYS: Final = (0, 1, 7, 30, 90, 365, 1_000)


def write_report(
    folder: Path,
    config: RunConfig,
    split: Split,
    ranks: IntArray,
    measured: Mapping[str, Any],
    baselines: Mapping[str, Any],
) -> None:
    """Write `report.json` and `report.html` of one run; `ranks` (C,) are those of the test cases."""
    found = report(config, split, ranks, measured, baselines, read_epochs(folder / "epochs.csv"))
    text = json.dumps(found, indent=2)
    (folder / "report.json").write_text(text + "\n")
    (folder / "report.html").write_text(page(json.loads(text)))


def report(
    config: RunConfig,
    split: Split,
    ranks: IntArray,
    measured: Mapping[str, Any],
    baselines: Mapping[str, Any],
    epochs: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """All numbers of the report, as plain JSON values."""
    test = split.test
    return {
        "name": config.name,
        "protocol": measured["protocol"],
        "metrics": measured["bundle"],
        "torch": measured["torch"],
        "epochs_trained": measured["epochs"],
        "validation_ndcg@10": measured["validation_ndcg@10"],
        "baselines": dict(baselines),
        "epochs": list(epochs),
        "gates": measured.get("gates", {}),
        "groups": {
            "history_length": groups(test, ranks, np.array([len(h) for h in test.histories()]), LENGTHS),
            "item_popularity": groups(test, ranks, split.popularity.popular(END)[test.target], COUNTS),
            "item_age_days": groups(test, ranks, *_ages(split)),
        },
        "data": _data(split),
        "settings": flat(config.model_dump(mode="json")),
    }


def groups(cases: Cases, ranks: IntArray, values: IntArray, edges: Sequence[int]) -> list[dict[str, Any]]:
    """Metrics of the cases whose value (C,) lies in [edges[i], edges[i + 1]); empty groups are left out.

    A value below the first edge is in no group.
    """
    found = []
    for low, after in zip(edges, [*edges[1:], None], strict=True):
        inside = (values >= low) & (True if after is None else values < after)
        if not inside.any():
            continue
        users = cases.user[inside]
        figures = metrics(ranks[inside], (10,), users)
        found.append(
            {
                "from": low,
                "to": None if after is None else after - 1,
                "cases": int(inside.sum()),
                **{name: figures[name] for name in GROUPED},
                "intervals": intervals(ranks[inside], users, GROUPED),
            }
        )
    return found


def _ages(split: Split) -> tuple[IntArray, tuple[int, ...]]:
    """Whole days that each target's item had existed by the split's rule, (C,), and the groups.

    An item without a training event or a date had not existed, an open beginning is no age, and a target without a
    clock has none: -1, in no group.
    """
    test = split.test
    if not test.dataset.has_times:
        return np.full(len(test), -1), DAYS
    begun = split.rule.available_from[test.target]
    known = (begun > -(1 << 61)) & (begun <= test.timestamp) & (test.timestamp >= UNDATED)
    return np.where(known, (test.timestamp - np.where(known, begun, 0)) // DAY, -1), DAYS


def _data(split: Split) -> dict[str, Any]:
    dataset, lengths = split.test.dataset, split.sequences.lengths
    info = dataset.info.model_dump(mode="json")
    return {
        **info,
        "training_events": int(lengths.sum()),
        "training_users": len(lengths),
        "training_items": len(np.unique(split.sequences.item)),
        "history_length_median": _median(lengths),
        "validation_cases": len(split.validation),
        "test_cases": len(split.test),
        "test_users": len(np.unique(split.test.user)),
        "notes": list(dataset.notes),
    }


def _median(lengths: IntArray) -> float:
    return float(np.median(lengths)) if len(lengths) else 0.0
