"""Load on an HTTP server from outside: wrk for closed loops, h2load for open ones (Debian: wrk, nghttp2-client)."""

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
local n = %d
request = function()
  n = n + 1
  local user = "%s" .. (n %% %d)
  %s
end
done = function(summary, latency)
  io.write(string.format('JSON {"requests":%%d,"seconds":%%f,"bad":%%d,"p50":%%f,"p99":%%f,"max":%%f}\\n',
    summary.requests, summary.duration / 1e6,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status +
    summary.errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3))
end
"""
GET = 'return wrk.format("GET", "/recommend/" .. user)'
POST = (
    'return wrk.format("POST", "/predict", {["Content-Type"]="application/json"}, \'{"user_id":"\' .. user .. \'"}\')'
)


@dataclass(frozen=True)
class Result:
    """What one run of a load generator saw. Times in milliseconds."""

    per_second: float
    p50: float
    p99: float
    bad: int  # answers that were no 200, and broken connections


def closed(
    url: str, users: str, count: int, *, connections: int, seconds: float, request: str = GET, first: int = 0
) -> Result:
    """Each connection asks again as soon as it has its answer. `users` is the prefix of user ids `users0`.."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "load.lua"
        script.write_text(_SCRIPT % (first, users, count, request))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "5s", "-s", str(script), url]
        out = subprocess.run([needed(command[0]), *command[1:]], capture_output=True, text=True, check=True).stdout
    found = json.loads(next(line[5:] for line in out.splitlines() if line.startswith("JSON ")))
    return Result(found["requests"] / found["seconds"], found["p50"], found["p99"], found["bad"])


def opened(url: str, users: str, count: int, *, connections: int, rate: float, seconds: int) -> Result:
    """Requests come at `rate` a second, whether or not answers keep up, but at most `connections` at a time."""
    with tempfile.TemporaryDirectory() as folder:
        urls, log = Path(folder) / "urls", Path(folder) / "log"
        urls.write_text("".join(f"{url}/recommend/{users}{i}\n" for i in range(count)))
        command = [
            needed("h2load"), "--h1", f"-c{connections}", "-t1", f"-D{seconds}", f"--rps={rate / connections:g}",
            f"--input-file={urls}", f"--log-file={log}",
        ]  # fmt: skip
        subprocess.run(command, capture_output=True, text=True, check=True)
        rows = [line.split("\t") for line in log.read_text().splitlines()]
    times = sorted(int(micros) / 1000 for _, _, micros in rows)
    bad = sum(status != "200" for _, status, _ in rows)
    return Result(len(rows) / seconds, percentile(times, 50), percentile(times, 99), bad)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` percent of the sorted values lie; nan of none."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share / 100))] if ordered else float("nan")


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
        package = {"h2load": "nghttp2-client"}.get(program, program)
        raise SystemExit(f"{program} is not installed; on Debian: apt-get install {package}")
    return found
