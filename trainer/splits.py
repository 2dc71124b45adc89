"""Which events are held out: each user's last one, or all after one moment.

Leave-one-out is what papers report, and it lets a model learn from what other users did after the target. The global
temporal split does not: nothing after the cut is in training, for any user, so its figures are lower and nearer to what
a deployed model would reach (Meng et al. 2020; Gusak et al. 2025, "Time to Split").

    user a   1 2 3 4 | 5 6        trained on 1 2 3, validated on 4
    user b     1 2 3 |            trained on 1 2, validated on 3, not tested
    user c           | 1 2 3      tested alone; the history of its target 3 is 1 2, that of its target 1 is empty
                    cut           last: 6 and 3;  successive: 5 6 and 2 3 (a target without a history is not asked)
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from shared.events import BoolArray, IntArray
from shared.times import UNDATED, render
from trainer.config import EvaluationConfig
from trainer.dataset import Cases, Dataset, DatasetError, Split, leave_one_out, training_part, training_rule

Targets = Literal["last", "successive"]


def split_of(dataset: Dataset, config: EvaluationConfig) -> Split:
    """The split that the settings ask for. Raises DatasetError where the data does not allow it."""
    if config.split == "leave_one_out":
        return leave_one_out(dataset)
    return temporal(dataset, config.quantile, config.targets)


def temporal(dataset: Dataset, quantile: float, targets: Targets) -> Split:
    """Global temporal split at the time up to which a share `quantile` of the sequence events lie.

    Validation is the last event of each user before the cut (three events needed), as in leave-one-out: the model that
    is tested has then seen nearly all of the time before the cut. Test histories are cut by position and hold what a
    user did after the cut, before the target; the model was never trained on it. Raises DatasetError without times.
    """
    cut = cut_time(dataset, quantile)
    after, place = dataset.timestamp > cut, _place(dataset)
    stops = dataset.offsets[1:] - np.bincount(dataset.user[after], minlength=len(dataset.users))
    validation = _last_of_users(dataset, dataset.feeds & ~after & (place >= 2))
    stops[dataset.user[validation]] = validation
    asked = dataset.feeds & after & (place >= 1)
    test = np.flatnonzero(asked) if targets == "successive" else _last_of_users(dataset, asked)
    sequences, popularity = training_part(dataset, stops)
    return Split(
        sequences,
        popularity,
        training_rule(dataset, stops),
        Cases(dataset, dataset.user[validation], validation),
        Cases(dataset, dataset.user[test], test),
        f"temporal split after {render(cut)} (quantile {quantile:g} of events), {targets} targets",
    )


def cut_time(dataset: Dataset, quantile: float) -> int:
    """Epoch microseconds of the last moment in training. Raises DatasetError where there is no such moment."""
    if not dataset.has_times:
        raise DatasetError(
            "a temporal split needs times, and this data has none: name its time column in data.source.columns.time, "
            "or use evaluation.split=leave_one_out"
        )
    times = dataset.timestamp[dataset.feeds]
    cut = int(np.quantile(times, quantile, method="lower"))
    if cut < UNDATED:
        raise DatasetError(
            f"a share of {quantile:g} of the events has a place in a file and no time: raise evaluation.quantile, "
            "or use evaluation.split=leave_one_out"
        )
    if cut == times.max():
        raise DatasetError(
            f"no event lies after {render(cut)}, up to which a share of {quantile:g} of the events goes into training: "
            "lower evaluation.quantile"
        )
    return cut


def _place(dataset: Dataset) -> IntArray:
    """How many events of the same user's sequence come before each row, (E,)."""
    before: IntArray = np.cumsum(dataset.feeds) - dataset.feeds  # of all users
    return before - before[dataset.offsets[dataset.user]]


def _last_of_users(dataset: Dataset, among: BoolArray) -> IntArray:
    """The last row of each user among the rows marked (E,); users without one are left out."""
    rows = np.flatnonzero(among)
    users = dataset.user[rows]
    ends = np.ones(len(rows), bool)
    ends[:-1] = users[1:] != users[:-1]
    return rows[ends]
