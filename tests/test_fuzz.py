"""A short run of `python -m tests.fuzz`: the same checks, few examples, always the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.__main__ import fuzz, service


@pytest.mark.slow
def test_the_service_is_as_its_description_says(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = tmp_path_factory.mktemp("fuzz")  # short: the path of a unix socket has 107 bytes at most
    with service(folder) as url:
        done = fuzz(url, folder, "--max-examples", "6", "--seed", "1")
    assert done.returncode == 0, done.stdout[-8000:]
    for phase in ("Examples", "Coverage", "Fuzzing", "Stateful"):
        assert f"✅ {phase}" in done.stdout
    assert '"level":"error"' not in (folder / "service.log").read_text()
