"""Events of erased users, which no source may bring back."""

from __future__ import annotations

from dataclasses import replace

import polars as pl

from shared.erasure import Tombstones
from trainer.sources.clean import leave_out
from trainer.sources.report import RawData

OF_ERASED_USERS = "from before their user was erased"


def without_erased(raw: RawData, tombstones: Tombstones) -> RawData:
    """`raw` without the events that a tombstone covers; without times, without any of such a user."""
    users = raw.events["user_id"].unique().to_list()
    erased = {user: at for user in users if (at := tombstones.erased_at(user)) is not None}
    if not erased:
        return raw
    until = pl.col("user_id").replace_strict(erased, default=None, return_dtype=pl.Int64)
    kept = raw.events.filter(until.is_null() | (pl.col("timestamp") > until).fill_null(value=False))
    report = leave_out(raw.report.events, OF_ERASED_USERS, raw.events.height - kept.height)
    return replace(raw, events=kept, report=replace(raw.report, events=report))
