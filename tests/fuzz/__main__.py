"""Fuzzing for as long as one likes.

python -m tests.fuzz --minutes 30        schemathesis over the live description
python -m tests.fuzz --machine 1000      runs of the state machine in `machine.py`, 50 steps each

For schemathesis a service of its own (SQLite, Redis, HTTP, a key) is asked everything that its description allows and
much that it forbids, single requests and chains of them, with all checks. Ends with schemathesis' own exit code.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.benchmarks.stack import Stack, stack
from tests.fuzz.machine import Upnext
from tests.worlds import World, cyclic

CONFIG = Path(__file__).with_name("schemathesis.toml")
KEY = "a-key-for-fuzzing-0123456789"


def world() -> World:
    """Items of several categories, so that the filters of the description's examples find something."""
    plain = cyclic(40)
    genres = ("Comedy", "Drama", "Horror", "Action")
    items = tuple(replace(item, categories=(f"genre:{genres[n % 4]}",)) for n, item in enumerate(plain.items))
    return replace(plain, items=items)


def service() -> AbstractContextManager[Stack]:
    """The service with a bundle for fuzzing, and a key."""
    return stack("sqlite", workers=1, world=world(), api_key=KEY, log_level="warning")


def errors_of(service: Stack) -> list[str]:
    """Lines of the service's log that tell of an error."""
    lines = (service.folder / "service.log").read_text().splitlines()
    return [line for line in lines if '"level":"error"' in line]


def fuzz(service: Stack, *options: str) -> subprocess.CompletedProcess[str]:
    """Run schemathesis with all checks; its output is in the result."""
    fixed = ["--generation-database", "none", "--no-color", "--request-timeout", "30"]
    words = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(CONFIG), "run"]
    header = ["--header", f"Authorization: Bearer {KEY}"]
    return subprocess.run(
        [*words, f"{service.url}/openapi.json", *header, *fixed, *options],
        cwd=service.folder,
        capture_output=True,
        text=True,
        check=False,
    )


def main() -> int:
    """The long run."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the service.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", help="of a run to repeat")
    parser.add_argument("--machine", type=int, help="runs of the state machine, instead")
    given = parser.parse_args()
    if given.machine is not None:
        long = settings(max_examples=given.machine, stateful_step_count=50, deadline=None,
                        suppress_health_check=list(HealthCheck))  # fmt: skip
        run_state_machine_as_test(Upnext, settings=long)
        print(f"{given.machine} runs of the state machine, no failure")
        return 0
    with service() as running:
        seed = ["--seed", given.seed] if given.seed else []
        done = fuzz(running, "--max-time", str(int(given.minutes * 60)), "--continue-on-failure", *seed)
        print(done.stdout, done.stderr)
        errors = errors_of(running)
        print(f"{len(errors)} errors in the service's log", *errors[:5], sep="\n")
        return done.returncode or bool(errors)


if __name__ == "__main__":
    sys.exit(main())
