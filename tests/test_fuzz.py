"""A short run of `python -m tests.fuzz`: the same checks, few examples, always the same ones."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import errors_of, fuzz, service


@pytest.mark.slow
def test_the_service_is_as_its_description_says() -> None:
    with service() as running:
        done = fuzz(running, "--max-examples", "6", "--seed", "1")
        errors = errors_of(running)
    assert done.returncode == 0, done.stdout[-8000:]
    for phase in ("Examples", "Coverage", "Fuzzing", "Stateful"):
        assert f"✅ {phase}" in done.stdout
    assert errors == []
