"""`make audit`: known vulnerabilities of the pinned dependencies, by pip-audit; says so where its data is out of reach.

Ends with 0 when everything was looked up and nothing found, 1 for vulnerabilities, 2 when something was not looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def main() -> int:
    """Ask, and tell."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip",
               "--format", "json", "--progress-spinner", "off"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        listed: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        print(f"Not audited: the data on vulnerabilities cannot be reached from here ({reason[0]}).")
        return 2
    text, code = verdict(listed)
    print(text)
    return code


def verdict(listed: list[dict[str, Any]]) -> tuple[str, int]:
    """What pip-audit's list of dependencies comes to."""
    skipped = [one["name"] for one in listed if "skip_reason" in one]
    found = [
        f"{one['name']} {one['version']}: {bug['id']}, fixed in {', '.join(bug['fix_versions']) or 'no release yet'}"
        for one in listed
        for bug in one.get("vulns", [])
    ]
    lines = [
        *found,
        f"{len(listed) - len(skipped)} of {len(listed)} pinned packages looked up, {len(found)} known vulnerabilities.",
    ]
    if skipped and len(skipped) == len(listed):
        lines = [
            "Not audited: the index in use gives no data on vulnerabilities. Run it where PyPI itself can be reached."
        ]
    elif skipped:
        lines.append(f"Not looked up: {', '.join(skipped)}.")
    return "\n".join(lines), 1 if found else 2 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
