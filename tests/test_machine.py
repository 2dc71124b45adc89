"""A short run of the state machine in `tests/fuzz/machine.py`."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.fuzz.machine import Upnext


@pytest.mark.slow
def test_whatever_happens_the_answers_are_the_model_s() -> None:
    short = settings(
        max_examples=12,
        stateful_step_count=30,
        derandomize=True,
        phases=[Phase.generate],  # shrinking takes minutes: that is for `python -m tests.fuzz --machine`
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Upnext, settings=short)
