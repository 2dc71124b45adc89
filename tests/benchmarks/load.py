"""Load on the service from outside, by wrk: closed loops, in which each connection waits for its answer."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# wrk gives each thread a Lua state of its own; one thread loads two cores' worth of these servers easily.
_SCRIPT = """
local n = 0
request = function()
  n = n + 1
  return %s
end
done = function(summary, latency)
  io.write(string.format('JSON {"requests":%%d,"seconds":%%f,"bad":%%d,"p50":%%f,"p99":%%f,"max":%%f}\\n',
    summary.requests, summary.duration / 1e6,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status +
    summary.errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3))
end
"""


GET = """wrk.format("GET", "/recommend/{users}" .. n % {count})"""
"""One request to the service, in Lua; `users` is the prefix of user ids that end in a number below `count`."""


@dataclass(frozen=True)
class Result:
    """What one run of a load generator saw. Times in milliseconds."""

    per_second: float
    p50: float
    p99: float
    bad: int  # answers that were no 200, and broken connections


def closed(url: str, users: str, count: int, *, connections: int, seconds: float, request: str = GET) -> Result:
    """Each connection asks again as soon as it has its answer. `users` is the prefix of user ids `users0`.."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "load.lua"
        script.write_text(_SCRIPT % request.format(users=users, count=count))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "5s", "-s", str(script), url]
        out = subprocess.run([needed(command[0]), *command[1:]], capture_output=True, text=True, check=True).stdout
    found = json.loads(next(line[5:] for line in out.splitlines() if line.startswith("JSON ")))
    return Result(found["requests"] / found["seconds"], found["p50"], found["p99"], found["bad"])


def median(results: Sequence[Result]) -> Result:
    """The median of each figure; faults add up."""
    return Result(
        statistics.median(r.per_second for r in results),
        statistics.median(r.p50 for r in results),
        statistics.median(r.p99 for r in results),
        sum(r.bad for r in results),
    )


def needed(program: str) -> str:
    """The path of a program that a benchmark cannot do without."""
    found = shutil.which(program)
    if found is None:
        raise SystemExit(f"{program} is not installed; on Debian: apt-get install {program}")
    return found
