"""`make audit` says what it found, and never calls "not looked up" safe."""

from __future__ import annotations

import pytest

from deploy.audit import verdict

CLEAN = {"name": "a", "version": "1", "vulns": []}
BAD = {
    "name": "b",
    "version": "2",
    "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}, {"id": "CVE-2", "fix_versions": []}],
}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (1)"}


@pytest.mark.parametrize(
    ("listed", "code", "said"),
    [
        ([CLEAN], 0, "1 of 1 pinned packages looked up, 0 known"),
        ([CLEAN, BAD], 1, "b 2: CVE-2, fixed in no release yet"),
        ([CLEAN, UNKNOWN], 2, "Not looked up: c."),
        ([BAD, UNKNOWN], 1, "CVE-1, fixed in 3"),
        ([UNKNOWN], 2, "Not audited"),
    ],
)
def test_verdict(listed: list[dict[str, object]], code: int, said: str) -> None:
    text, found = verdict(listed)
    assert found == code
    assert said in text
