"""The crash harness, for a few kills; hundreds of them are a command of their own."""

from __future__ import annotations

import pytest

from tests.benchmarks.crash import crash
from tests.faults import fault


@fault("A worker is killed")
@pytest.mark.slow
@pytest.mark.parametrize(("database", "kills"), [("sqlite", 2), ("postgresql", 3)])
def test_nothing_acknowledged_is_lost_doubled_or_out_of_place(database: str, kills: int) -> None:
    verdict, figures = crash(database, kills)
    assert verdict.good(), verdict
    assert sum(figures["kills"].values()) == kills
    assert figures["acknowledged"] > 0
    assert figures["answers"]["cache"] > 0
    assert figures["worker_starts"] >= 2 + figures["kills"]["worker"]
