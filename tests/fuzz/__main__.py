"""Fuzzing for as long as one likes.

python -m tests.fuzz --minutes 30        schemathesis over the live description
python -m tests.fuzz --machine 1000      runs of the state machine in `machine.py`, 50 steps each

For schemathesis a service of its own (SQLite, Redis, HTTP, a key) is asked everything that its description allows and
much that it forbids, single requests and chains of them, with all checks. Ends with schemathesis' own exit code.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.fuzz.machine import Upnext
from tests.servers import free_port
from tests.worlds import World, cyclic, write_bundle

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("schemathesis.toml")
KEY = "a-key-for-fuzzing-0123456789"


def world() -> World:
    """Items of several categories, so that the filters of the description's examples find something."""
    plain = cyclic(40)
    genres = ("Comedy", "Drama", "Horror", "Action")
    items = tuple(replace(item, categories=(f"genre:{genres[n % 4]}",)) for n, item in enumerate(plain.items))
    return replace(plain, items=items)


@contextmanager
def service(folder: Path) -> Iterator[str]:
    """`python -m service` on a bundle of its own; its URL."""
    write_bundle(folder / "bundles", world())
    port = free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UPNEXT_", "PROMETHEUS_"))}
    settings = {"UPNEXT_PORT": str(port), "UPNEXT_API_KEY": KEY, "UPNEXT_LOG_LEVEL": "warning"}
    environment = kept | settings | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    with (folder / "service.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service"], cwd=folder, env=environment, stdout=log, stderr=log
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError("the service did not start")


def fuzz(url: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run schemathesis on `url` with all checks; its output is in the result."""
    fixed = ["--generation-database", "none", "--no-color", "--request-timeout", "30"]
    words = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(CONFIG), "run"]
    header = ["--header", f"Authorization: Bearer {KEY}"]
    return subprocess.run(
        [*words, f"{url}/openapi.json", *header, *fixed, *options],
        cwd=folder,
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
    with tempfile.TemporaryDirectory(prefix="upnext-fuzz-") as name:
        folder = Path(name)
        with service(folder) as url:
            seed = ["--seed", given.seed] if given.seed else []
            done = fuzz(url, folder, "--max-time", str(int(given.minutes * 60)), "--continue-on-failure", *seed)
        print(done.stdout, done.stderr)
        errors = [line for line in (folder / "service.log").read_text().splitlines() if '"level":"error"' in line]
        print(f"{len(errors)} errors in the service's log", *errors[:5], sep="\n")
        return done.returncode or bool(errors)


if __name__ == "__main__":
    sys.exit(main())
